"""What the tests share: one thread for each process; transformers small enough to train here, as rows of the tables."""

import dataclasses
import math
import os
import random
import signal
from pathlib import Path

import pytest
import torch

if "PYTEST_XDIST_WORKER" in os.environ:  # several at once: one thread each, also in what they start
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import models

signal.signal(signal.SIGINT, signal.default_int_handler)  # also in the background, and under nohup, where they are
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # ignored, by the tests' own processes too


def add_row(table, name, like, **numbers):
    """Row `name`: what the row `like` builds, with other numbers."""
    table[name] = dataclasses.replace(table[like], numbers=table[like].numbers | numbers)


@pytest.fixture(autouse=True)
def tiny_rows():
    """Rows of a few layers of width 32 or less, built by the same code as the real ones; gone after the test."""
    before = dict(models.BACKBONES), dict(models.NETWORKS)
    mit = dict(hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1], num_attention_heads=[1, 2, 3, 4])
    add_row(models.BACKBONES, "dinov2-tiny", "dinov2-small", hidden_size=32, num_attention_heads=2, num_hidden_layers=4)
    add_row(models.BACKBONES, "swin-mini", "swin_t", embed_dim=8, depths=[1, 1, 2, 1], num_heads=[1, 2, 2, 4])
    add_row(models.BACKBONES, "mit-tiny", "mit-b0", **mit)
    add_row(models.NETWORKS, "segformer-tiny", "segformer-b0", **mit, decoder_hidden_size=32)
    yield
    for table, rows in zip((models.BACKBONES, models.NETWORKS), before, strict=True):
        table.clear()
        table.update(rows)


FIGURES = {}  # by file name


@pytest.fixture
def figures_once(monkeypatch):
    """The first figure of a name is drawn, others are its copies: drawing takes as long as all else in a small run."""
    import evaluate

    draw = evaluate.save_figure

    def once(figure, path, **options):
        path = Path(path)
        if path.name not in FIGURES:
            draw(figure, path, **options)
            FIGURES[path.name] = path.read_bytes()
        with models.replacing(path) as temporary:
            temporary.write_bytes(FIGURES[path.name])

    monkeypatch.setattr(evaluate, "save_figure", once)


def entries(content, path=(), most=3):
    """The paths of all that is in nested dicts and lists, of each at most the first `most` items below the top."""
    if isinstance(content, (dict, list)):
        for key in list(content if isinstance(content, dict) else range(len(content)))[: most if path else None]:
            yield (*path, key)
            yield from entries(content[key], (*path, key))


def changed(content, path, change):
    """A copy of nested dicts and lists, with change(container, key) called where the path leads."""
    copy = dict(content) if isinstance(content, dict) else list(content)
    if len(path) > 1:
        copy[path[0]] = changed(content[path[0]], path[1:], change)
    else:
        change(copy, path[0])
    return copy


def made_up(content, tries, seed=0):
    """(what was done, content) with one entry deleted, or replaced by something of another type, size or shape."""
    nested, values = [], [None, True, 7, -1, 10**18, 0.5, math.nan, math.inf, "x", "", b"x", [], {}, ["x"], {"x": 1}]
    values += [torch.zeros(2, 3), torch.zeros(0), torch.tensor(math.nan), torch.ones(2, dtype=torch.complex64)]
    for _ in range(200):
        nested = [nested]
    draw = random.Random(seed)
    for path in entries(content):
        yield f"without {path}", changed(content, path, lambda c, k: c.pop(k))
        for value in draw.sample([*values, nested], tries):
            yield f"{path}: {str(value)[:30]!r}", changed(content, path, lambda c, k, v=value: c.__setitem__(k, v))


@pytest.fixture(autouse=True)
def tiny_mask2former(monkeypatch):
    """NETWORKS["mask2former-tiny"]: one block a stage, ten queries, two decoder layers; built by the same code."""
    decoder = dict(feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=32, dim_feedforward=32)
    decoder |= dict(encoder_layers=1, decoder_layers=3, num_attention_heads=2, num_queries=10)
    numbers = dict(embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=4, decoder=decoder)
    row = dataclasses.replace(models.NETWORKS["mask2former-swin-tiny"], numbers=numbers, weights="absent")
    monkeypatch.setitem(models.NETWORKS, "mask2former-tiny", row)


def count_refused(tries, use, error):
    """How many of the (what was done, content) `use` refuses with an `error` of one line; another exception fails."""
    lines = []
    for what, content in tries:
        try:
            use(content)
        except error as known:
            lines.append(str(known))
        except Exception as unknown:
            raise AssertionError(f"{what}: {type(unknown).__name__}: {unknown}") from unknown
    assert not any("\n" in line for line in lines)
    return len(lines)
