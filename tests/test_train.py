"""Training: schedules, optimizer and average against torch, resume to the bit, two processes like one, the CLI."""

import argparse
import csv
import dataclasses
import itertools
import json
import math
import os
import signal
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import count_refused, made_up
from torch import nn

import datasets
import evaluate
import losses
import models
import train
from train import Ema, Objective, TrainingError, make_optimizer, make_schedule

SMALL = ["--backbone", "dinov2-tiny", "--size", "28", "42", "--crop", "28", "28", "--batch-size", "4", "--workers", "0"]
SMALL += ["--amp", "off", "--warmup", "2"]


@pytest.fixture(autouse=True)
def few_scenes(monkeypatch, figures_once):
    row = dataclasses.replace(datasets.DATASETS["synthetic"], lengths={"train": 10, "val": 3, "test": 2})
    monkeypatch.setitem(datasets.DATASETS, "synthetic", row)


def run(out, *flags):
    return train.main([*SMALL, "--out", str(out), *flags])


def read(path):
    return torch.load(path, weights_only=True)


CHANGING = {"run", "seconds", "images_per_second", "id", "saved", "command"}


def same(a, b):
    """Equal to the bit, through dicts and lists; times and ids are no part of a run's result."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a.keys() - CHANGING)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def tiny(**options):
    torch.manual_seed(0)
    return models.build_model(num_classes=3, backbone="dinov2-tiny", head="fpn", **options)


def loss_of(**options):
    return losses.make_loss("ce", ignore_index=255, **options)


# ---- learning rate ----


def test_poly_with_warmup_by_hand():
    schedule = make_schedule("poly", total=110, warmup=10, power=0.9)
    assert schedule(0) == pytest.approx(1 / 11)
    assert schedule(9) == pytest.approx(10 / 11)
    assert schedule(10) == 1
    assert schedule(60) == pytest.approx(0.5**0.9)
    assert schedule(109) == pytest.approx(0.01**0.9)


def test_cosine_and_poly_equal_torchs_schedulers():
    for name, make in (
        ("cosine", lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 50)),
        ("poly", lambda o: torch.optim.lr_scheduler.PolynomialLR(o, 50, power=0.9)),
    ):
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
        oracle, schedule = make(optimizer), make_schedule(name, total=50, power=0.9)
        for step in range(50):
            assert schedule(step) == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-6)
            optimizer.step()
            oracle.step()


def test_restarts_begin_anew_and_constant_stays():
    schedule = make_schedule("restarts", total=90, cycles=3, power=1.0)
    assert [round(schedule(s), 6) for s in (0, 15, 30, 45, 60, 75)] == [1, 0.5, 1, 0.5, 1, 0.5]
    assert {make_schedule("constant", total=90)(s) for s in range(90)} == {1.0}


def test_plateau_counts_evaluations_without_a_new_best_as_torch_does():
    scores = [1, 2, 2, 2, 1, 3, 3, 3, 3, 3, 3, 3]
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    oracle = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, "max", factor=0.3, patience=2, threshold=0)
    schedule = make_schedule("plateau", total=99, patience=3, factor=0.3)
    for i, score in enumerate(scores):
        oracle.step(score)
        assert schedule(50, scores[: i + 1]) == pytest.approx(optimizer.param_groups[0]["lr"])


@pytest.mark.parametrize("name", train.SCHEDULES)
def test_the_schedule_is_a_pure_function_of_the_step(name):
    schedule = make_schedule(name, total=40, warmup=4)
    forward = [schedule(s) for s in range(40)]
    assert [schedule(s) for s in reversed(range(40))] == forward[::-1]
    assert all(0 <= f <= 1 for f in forward)
    assert forward[0] == pytest.approx(0.2)


# ---- optimizer ----


@pytest.mark.parametrize("name", train.OPTIMIZERS)
def test_groups_learn_at_their_rate_and_spare_norms_and_biases_from_decay(name):
    model = tiny()
    objective = Objective(model, loss_of())
    optimizer = make_optimizer(objective, name, lr=0.1, backbone_lr=0.01, weight_decay=0.05)
    names = {id(p): n for n, p in model.named_parameters()}
    seen = set()
    for group in optimizer.param_groups:
        for p in group["params"]:
            key = names[id(p)]
            seen.add(key)
            assert group["lr"] == (0.01 if key.startswith("backbone.") else 0.1)
            spared = key.endswith((".bias", "lambda1", "_token", "position_embeddings")) or p.ndim == 1
            assert group["weight_decay"] == (0.0 if spared else 0.05)
    assert seen == {n for n, p in model.named_parameters() if p.requires_grad}


def test_nothing_to_train_is_an_error():
    model = tiny().requires_grad_(False)
    with pytest.raises(TrainingError, match="nothing to train"):
        make_optimizer(Objective(model, loss_of()), "sgd", lr=1, backbone_lr=1, weight_decay=0)


# ---- the step ----


def batch(n=4, size=28):
    g = torch.Generator().manual_seed(1)
    return torch.randn(n, 3, size, size, generator=g), torch.randint(3, (n, size, size), generator=g)


def test_micro_batches_give_the_gradient_of_the_whole_batch():
    images, target = batch()
    weights = []
    for accumulate in (1, 2, 4):
        objective = Objective(tiny(norm="group", dropout=0.0), loss_of())
        optimizer = make_optimizer(objective, "sgd", lr=0.1, backbone_lr=0.1, weight_decay=0)
        value = train.train_step(objective, optimizer, images, target, accumulate=accumulate)
        weights.append((torch.cat([p.detach().flatten() for p in objective.parameters()]), value))
    for other, value in weights[1:]:
        torch.testing.assert_close(other, weights[0][0], rtol=1e-5, atol=1e-6)
        assert value == pytest.approx(weights[0][1], rel=1e-6)


def test_clipping_limits_the_norm_of_the_gradient():
    images, target = batch()
    objective = Objective(tiny(dropout=0.0), loss_of())
    optimizer = make_optimizer(objective, "sgd", lr=0.0, backbone_lr=0.0, weight_decay=0)
    norm = lambda: torch.cat([p.grad.flatten() for p in objective.parameters() if p.grad is not None]).norm()  # noqa: E731
    train.train_step(objective, optimizer, images, target)
    assert norm() > 0.01
    train.train_step(objective, optimizer, images, target, clip=0.01)
    assert norm() == pytest.approx(0.01, rel=1e-3)


def test_the_objective_weighs_auxiliary_losses():
    images, target = batch()
    torch.manual_seed(0)
    model = models.build_model(num_classes=3, backbone="resnet18", head="ocr", aux=True).eval()
    first, coarse, aux = (model.resize(x, (28, 28)) for x in model.predictions(model.encode(images)))
    wanted = F.cross_entropy(first, target) + 0.3 * (F.cross_entropy(coarse, target) + F.cross_entropy(aux, target))
    assert Objective(model, loss_of(), 0.3)(images, target).item() == pytest.approx(wanted.item(), rel=1e-5)


def test_ema_equals_torchs_average_and_copies_buffers():
    model = models.build_model(num_classes=3, backbone="mobilenet_v2", head="linear")
    ema, n = Ema(model, 0.9), 0

    def average(averaged, current, _):
        decay = min(0.9, (1 + n) / (10 + n))
        return decay * averaged + (1 - decay) * current

    oracle = torch.optim.swa_utils.AveragedModel(model, avg_fn=average)
    oracle.n_averaged += 1  # start from the first weights, not with a copy of the second
    for _ in range(12):
        n += 1
        with torch.no_grad():
            for p in (*model.parameters(), *(b for b in model.buffers() if b.is_floating_point())):
                p.add_(torch.randn_like(p))
        ema.update(model)
        oracle.update_parameters(model)
    own = {k: v.clone() for k, v in model.state_dict().items()}
    with ema.applied(model):
        for key, p in oracle.module.named_parameters():
            torch.testing.assert_close(model.state_dict()[key], p.detach(), rtol=1e-5, atol=1e-5)
        for key, buffer in model.named_buffers():
            assert torch.equal(buffer, own[key])
    assert same(model.state_dict(), own)


# ---- the loop ----


def make_fit(tmp_path, **options):
    """fit() on ten drawn scenes with everything explicit; returns (objective, what it returned)."""
    info_set = datasets.open_dataset("synthetic", "train", size=(28, 42), length=10)
    info_set.transform = datasets.train_transform(
        info_set.info, crop=(28, 28), scale=(0.5, 2.0), cat_max_ratio=0.75, flip=0.5, photometric=True
    )
    val_set = datasets.open_dataset("synthetic", "val", size=(28, 42), length=2)
    torch.manual_seed(0)
    model = models.build_model(num_classes=19, backbone="dinov2-tiny", head="fpn", dropout=0.2)
    objective = options.pop("objective", None) or Objective(model, loss_of())
    optimizer = make_optimizer(objective, "adamw", lr=1e-3, backbone_lr=1e-3, weight_decay=0.05)
    about = {"data": info_set.info.to_dict(), "pretrained": "no", "command": "test"}

    def save(path, **state):
        models.save_checkpoint(path, model, **about, **state)

    common = dict(
        optimizer=optimizer,
        schedule=make_schedule("poly", total=6),
        epochs=3,
        batch_size=4,
        seed=0,
        device=torch.device("cpu"),
        out_dir=tmp_path,
        save=save,
    )
    return objective, train.fit(objective, info_set, val_set, **common | options)


def test_fit_is_a_plain_loop_over_the_same_samples(tmp_path):
    objective, done = make_fit(tmp_path, seed=7)
    torch.manual_seed(0)
    model = models.build_model(num_classes=19, backbone="dinov2-tiny", head="fpn", dropout=0.2).train()
    dataset = datasets.open_dataset("synthetic", "train", size=(28, 42), length=10)
    dataset.transform = datasets.train_transform(
        dataset.info, crop=(28, 28), scale=(0.5, 2.0), cat_max_ratio=0.75, flip=0.5, photometric=True
    )
    decayed = [p for p in model.parameters() if p.requires_grad]
    plain = make_optimizer(Objective(model, loss_of()), "adamw", lr=1e-3, backbone_lr=1e-3, weight_decay=0.05)
    sampler = datasets.StepSampler(10, batch_size=4, start=0, stop=6, seed=7)
    for step, keys in enumerate(sampler):
        images, targets = zip(*(dataset[k] for k in keys), strict=True)
        for group in plain.param_groups:
            group["lr"] = 1e-3 * (1 - step / 6) ** 0.9
        torch.manual_seed(datasets.mix_seed(7, step, 0))
        loss = F.cross_entropy(model(torch.stack(images)), torch.stack(targets), ignore_index=255)
        plain.zero_grad()
        loss.backward()
        plain.step()
    for a, b in zip([p for p in objective.model.parameters() if p.requires_grad], decayed, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert done["step"] == 6
    assert done["history"][-1]["loss"] > 0


def test_callbacks_and_files(tmp_path):
    epochs, steps = [], []
    _, done = make_fit(
        tmp_path,
        on_epoch_start=epochs.append,
        after_step=lambda step, _: steps.append(step),
        eval_every=2,
        save_every=3,
    )
    assert (epochs, steps) == ([0, 1, 2], list(range(6)))
    assert ["miou" in row for row in done["history"]] == [False, True, True]  # the last epoch is always evaluated
    with open(tmp_path / "history.csv") as file:
        rows = list(csv.DictReader(file))
    assert [r["miou"] == "" for r in rows] == [True, False, False]
    best = max(r["miou"] for r in done["history"] if "miou" in r)
    assert read(tmp_path / "best.pt")["metrics"]["miou"] == best == done["best"]["miou"]
    assert "training" not in read(tmp_path / "best.pt")


def test_a_loss_that_is_not_finite_stops_with_the_files_and_spares_best(tmp_path):
    make_fit(tmp_path, epochs=1)
    before = (tmp_path / "best.pt").read_bytes()

    class Exploding(Objective):
        steps = 0

        def forward(self, images, target):
            self.steps += 1
            return super().forward(images, target) * (math.inf if self.steps == 2 else 1)

    model = tiny()
    model.build["num_classes"] = 19
    model.head = models.build_model(num_classes=19, backbone="dinov2-tiny", head="fpn").head
    objective = Exploding(model, loss_of())
    with pytest.raises(TrainingError, match=r"loss is inf at step 1 .*synthetic/train/\d+, synthetic/train/\d+"):
        make_fit(tmp_path, objective=objective)
    assert (tmp_path / "best.pt").read_bytes() == before
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("ema", [0.0, 0.9])
@pytest.mark.parametrize("eval_every", [1, 9])  # whether it would be scored, or saved only
def test_a_network_that_its_last_step_destroyed_is_neither_scored_nor_saved(tmp_path, ema, eval_every):
    make_fit(tmp_path, epochs=1)
    before = {name: (tmp_path / name).read_bytes() for name in ("best.pt", "last.pt")}
    objective = Objective(models.build_model(num_classes=19, backbone="dinov2-tiny", head="fpn"), loss_of())
    weight = objective.model.head.classifiers[0][1].weight

    def destroy(step, _shadow):
        if step == 1:  # the last of the epoch
            weight.data[0, 0] = math.nan

    with pytest.raises(TrainingError, match=r"after step 2 .*classifiers.0.1.weight is not finite.*left alone"):
        make_fit(tmp_path, objective=objective, after_step=destroy, ema_decay=ema, eval_every=eval_every)
    assert before == {name: (tmp_path / name).read_bytes() for name in before}


def test_an_average_that_is_not_finite_is_not_saved_either(tmp_path):
    with pytest.raises(TrainingError, match="is not finite"):
        make_fit(tmp_path, ema_decay=math.nan)
    assert not (tmp_path / "best.pt").exists()


def test_a_score_that_is_no_number_is_not_the_best(tmp_path, monkeypatch):
    scores = iter([5.0, math.nan, 7.0])
    monkeypatch.setattr(train.evaluate, "evaluate", lambda *a, **k: dict(miou=next(scores), macc=1.0, aacc=1.0))
    _, done = make_fit(tmp_path)
    assert done["best"]["miou"] == 7.0
    assert read(tmp_path / "best.pt")["metrics"]["step"] == 6


def test_the_objective_learns_from_a_teacher_where_there_is_one():
    student, teacher = tiny(), tiny().eval().requires_grad_(False)
    images, target = torch.randn(2, 3, 28, 28), torch.randint(0, 3, (2, 28, 28))
    target[0] = 255
    options = dict(teacher=teacher, kl=0.7, temperature=2.0)
    alone, taught = Objective(student, loss_of()), Objective(student, loss_of(), **options)
    with torch.no_grad():
        taught.model.head.classifiers[0][1].bias += torch.tensor([1.0, -1.0, 0.0])
        expected = losses.distillation(student(images), target, teacher=teacher(images), temperature=2.0)
        assert expected > 0.01
        torch.testing.assert_close(taught(images, target) - alone(images, target), 0.7 * expected)
    taught(images, target).backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert taught.state_dict().keys() == alone.state_dict().keys()


def test_frozen_norms_keep_their_statistics_for_the_last_epochs(tmp_path):
    statistics = {}
    for frozen in (0, 1, 2):
        run(tmp_path / str(frozen), "--epochs", "2", "--frozen-norm-epochs", str(frozen))
        state = read(tmp_path / str(frozen) / "last.pt")["state_dict"]
        statistics[frozen] = {k: v for k, v in state.items() if k.endswith("num_batches_tracked")}
    assert {len(s) for s in statistics.values()} != {0}
    for frozen, counts in statistics.items():
        assert {int(v) for v in counts.values()} == {2 * (2 - frozen)}  # 2 steps an epoch


# ---- resume ----


@pytest.mark.parametrize(
    "flags",
    [
        ["--ema", "0.9", "--frozen-norm-epochs", "3"],
        ["--optimizer", "sgd", "--schedule", "plateau", "--patience", "1"],
    ],
)
@pytest.mark.parametrize("stop_at", [3, 4, "evaluation"])  # in an epoch, at its end (2 steps each), and after that
def test_a_stopped_and_resumed_run_ends_in_the_same_bits(tmp_path, monkeypatch, capsys, flags, stop_at):
    flags = [*flags, "--epochs", "4", "--dropout", "0.3", "--scale", "0.5", "2", "--photometric"]
    whole = run(tmp_path / "whole", *flags)
    # what is interrupted: a step, or the prediction of the second image in the second epoch's evaluation
    module, name, at = (evaluate, "predict", 5) if stop_at == "evaluation" else (train, "train_step", stop_at)
    function, count = getattr(module, name), itertools.count(1)

    def interrupted(*args, **options):
        value = function(*args, **options)
        if next(count) == at:
            os.kill(os.getpid(), signal.SIGTERM)
        return value

    with monkeypatch.context() as patch:
        patch.setattr(module, name, interrupted)
        stopped = run(tmp_path / "part", *flags)
        assert next(count) == at + 1
    assert stopped == {"stopped": "SIGTERM", "step": 4 if stop_at == "evaluation" else stop_at}
    assert f"python train.py --resume --out {tmp_path / 'part'}" in capsys.readouterr().out
    torch.manual_seed(123)  # whatever the process did before
    resumed = train.main(["--resume", "--out", str(tmp_path / "part"), "--workers", "1"])
    for name in ("last.pt", "best.pt"):
        a, b = (read(tmp_path / run / name) for run in ("whole", "part"))
        for checkpoint in (a, b):
            for flag in ("out", "workers"):
                checkpoint["args"].pop(flag)
        assert [k for k in a.keys() - CHANGING if not same(a[k], b[k])] == []
    assert resumed["miou"] == whole["miou"]


def test_resume_takes_its_flags_from_the_run_and_refuses_another_run(tmp_path):
    run(tmp_path, "--epochs", "1", "--lr", "0.002")
    longer = train.main(["--resume", "--out", str(tmp_path), "--epochs", "2"])
    assert longer["steps"] == 4
    assert read(tmp_path / "last.pt")["args"]["lr"] == 0.002
    with pytest.raises(models.ModelError, match=r"--batch-size, --head cannot change"):
        train.main(["--resume", "--out", str(tmp_path), "--head", "linear", "--batch-size", "2"])
    with pytest.raises(models.ModelError, match="no checkpoint at"):
        train.main(["--resume", "--out", str(tmp_path / "none")])
    os.replace(tmp_path / "best.pt", tmp_path / "last.pt")
    with pytest.raises(models.ModelError, match="no training state"):
        train.main(["--resume", "--out", str(tmp_path)])


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_resumed_run_learns_at_the_rates_it_is_given(tmp_path, monkeypatch, optimizer):
    run(tmp_path, "--epochs", "1", "--optimizer", optimizer, "--lr", "0.002")
    seen, make = [], train.make_optimizer
    monkeypatch.setattr(train, "make_optimizer", lambda *a, **k: seen.append(make(*a, **k)) or seen[-1])
    new = {"--lr": 0.004, "--backbone-lr": 0.001, "--weight-decay": 0.3, "--epochs": 2}
    new |= {"--momentum": 0.5} if optimizer == "sgd" else {}
    train.main(["--resume", "--out", str(tmp_path), *(str(x) for pair in new.items() for x in pair)])
    groups = seen[0].param_groups
    assert {g["base_lr"] for g in groups} == {0.004, 0.001}
    assert {g["weight_decay"] for g in groups} == {0.3, 0.0}
    assert optimizer == "adamw" or {g["momentum"] for g in groups} == {0.5}
    assert seen[0].state  # and the state is that of the run
    args = read(tmp_path / "last.pt")["args"]
    assert (args["lr"], args["backbone_lr"], args["weight_decay"]) == (0.004, 0.001, 0.3)


def another(action, value):
    """Words of a command line that give a flag another value than `value`."""
    if isinstance(action, argparse.BooleanOptionalAction):
        return [action.option_strings[1] if value else action.option_strings[0]]
    if action.nargs == 0:
        return [action.option_strings[0]]
    if action.choices:
        return [action.option_strings[0], str(next(c for c in reversed(list(action.choices)) if c != value))]
    shares = ("cat_max_ratio", "train_share", "flip", "dropout", "label_smoothing", "momentum", "ema", "ohem_thresh")
    number = "0.3" if action.dest in (*shares, "color_transfer") else "9"
    return [action.option_strings[0], *([number] * (action.nargs if isinstance(action.nargs, int) else 1))]


def test_on_resume_every_flag_takes_effect_or_is_refused(tmp_path):
    """Taking effect: what is given is in the flags that the run reads (tests/test_project.py sees that they are)."""
    run(tmp_path, "--epochs", "1")
    last = read(tmp_path / "last.pt")["args"]
    shared = dict(script="train.py", name="train", fixed=train.NETWORK_FLAGS)
    for action in train.get_parser()._actions:
        if action.dest in ("help", "out", "resume"):
            continue
        argv = ["--resume", "--out", str(tmp_path), *another(action, last.get(action.dest))]
        idle = [test for name, *_, test in train.get_parser().conditions if name == action.dest]
        if not all(test(argparse.Namespace(**last)) for test in idle):  # another loss, schedule or optimizer reads it
            with pytest.raises(models.ModelError, match=f"--{action.dest.replace('_', '-')} is of .*leave it out"):
                train.parse(train.get_parser(), argv, **shared)
        elif action.dest in (*train.FIXED_FLAGS, *train.NETWORK_FLAGS):
            with pytest.raises(models.ModelError, match=f"--{action.dest.replace('_', '-')} cannot change now"):
                train.parse(train.get_parser(), argv, **shared)
        else:
            args, _ = train.parse(train.get_parser(), argv, **shared)
            assert train.plain(getattr(args, action.dest)) != last.get(action.dest), action.dest


@pytest.mark.parametrize(("command", "words"), [("python quantize.py --method qat", "quantize.py, not of train.py")])
def test_a_run_of_another_script_is_not_gone_on_with(tmp_path, command, words):
    run(tmp_path, "--epochs", "1")
    last = read(tmp_path / "last.pt") | {"command": command}
    torch.save(last, tmp_path / "last.pt")
    with pytest.raises(models.ModelError, match=words):
        train.main(["--resume", "--out", str(tmp_path)])


# ---- what a run says of its time ----


def test_a_run_says_how_long_it_takes_and_when_it_became_slow(monkeypatch, capsys):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    clock = itertools.count(0, 5)
    monkeypatch.setattr(train.time, "perf_counter", lambda: next(clock))  # 5 s from one look to the next
    pace = train.Pace(100, 50, torch.device("cpu"), argparse.Namespace(disable=True))
    said = []
    for step, seconds in enumerate([9.0, *[1.0] * 20, 30.0, *[1.0] * 10, *[8.0] * 20]):
        pace.step(seconds + 0.5, 0.5, "loss 1")
        said += [(step, line) for line in capsys.readouterr().out.splitlines()]
    minutes, *others = said
    assert minutes == (9, "90 steps of 1500 ms to go: 2.2 minutes, and evaluation")
    warnings = [(step, line) for step, line in others if "warning" in line]
    assert [step for step, _ in warnings] == [36]  # the fifth in a row; one alone is none
    assert "now take 8 times as long as the first ones" in warnings[0][1]
    assert "--threads 1" in warnings[0][1]
    lines = [line for line in others if line not in warnings]
    assert 2 < len(lines) < 6  # in 260 s
    assert lines[0][1].endswith(" steps to go: loss 1")


def run_unet(out, *flags):
    """A run of two steps of a network of 8,000 parameters."""
    net = ["--model", "unet", "--width", "1", "--size", "32", "32", "--crop", "32", "32", "--epochs", "1"]
    return train.main([*SMALL[8:], *net, "--no-pretrained", "--out", str(out), *flags])


def test_a_made_up_state_to_go_on_from_is_taken_or_refused_in_one_line(tmp_path):
    run_unet(tmp_path, "--ema", "0.9")
    last, info = read(tmp_path / "last.pt"), datasets.open_dataset("synthetic", "val", size=(32, 32))
    argv = ["--resume", "--out", str(tmp_path)]
    shared = dict(script="train.py", name="train", fixed=train.NETWORK_FLAGS)

    def resume():
        args, found = train.parse(train.get_parser(), argv, **shared)
        objective = Objective(train.make_network(args, 19, found), None)
        optimizer, _ = train.optimizer_and_schedule(args, objective, 2)
        train.Keeper(
            objective, info, optimizer=optimizer, scaler=None, ema=Ema(objective.model, 0.9), out_dir=tmp_path,
            save=None, device=torch.device("cpu"), amp_dtype=None, workers=0, writer=None,
            data=last["training"]["data"],
        ).resume(found["training"])  # fmt: skip

    resume()
    refused = 0
    for part in ("training", "args"):

        def use(content, part=part):
            torch.save(last | {part: content}, tmp_path / "last.pt")
            resume()

        refused += count_refused(itertools.islice(made_up(last[part], tries=1), 0, None, 9), use, models.ModelError)
    assert refused > 5


def test_best_and_last_of_two_runs_are_not_gone_on_with(tmp_path):
    for name in ("a", "b"):
        run_unet(tmp_path / name)
    os.replace(tmp_path / "a" / "last.pt", tmp_path / "b" / "last.pt")
    with pytest.raises(models.ModelError, match="of two runs"):
        train.main(["--resume", "--out", str(tmp_path / "b")])
    (tmp_path / "b" / "best.pt").unlink()
    with pytest.raises(models.ModelError, match=r"best\.pt, which was beside it, is gone"):
        train.main(["--resume", "--out", str(tmp_path / "b")])


def test_the_state_of_another_optimizer_is_not_read():
    model = tiny()
    saved = make_optimizer(Objective(model, None), "adamw", lr=1.0, backbone_lr=1.0, weight_decay=0.0).state_dict()
    optimizer = make_optimizer(Objective(model, None), "adamw", lr=1.0, backbone_lr=1.0, weight_decay=0.0)
    p = optimizer.param_groups[0]["params"][0]
    right = {"step": torch.tensor(1.0), "exp_avg": torch.randn_like(p), "exp_avg_sq": torch.rand_like(p)}
    train.load_optimizer(optimizer, saved | {"state": {0: right}})
    assert same(optimizer.state[p], right)
    wrong = [{"exp_avg": torch.zeros(1)}, {"exp_avg": right["exp_avg"][None]}, {"step": torch.zeros(2)}, {"more": p}]
    for state in (*(right | one for one in wrong), {k: right[k] for k in ("step", "exp_avg")}):
        with pytest.raises(models.ModelError, match="do not fit"):
            train.load_optimizer(optimizer, saved | {"state": {0: state}})


# ---- one folder, one run ----


def test_what_a_run_left_is_kept_aside_once_another_has_something_to_write(tmp_path, capsys, monkeypatch):
    run_unet(tmp_path)
    (tmp_path / "amount-0.5").mkdir()
    (tmp_path / "amount-0.5" / "best.pt").write_bytes(b"of a sweep")
    (tmp_path / "mine").mkdir()
    first = {p.relative_to(tmp_path): p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}

    def there(folder):
        return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}

    with pytest.raises(models.ModelError, match="whole network"):
        run_unet(tmp_path, "--head", "fpn")  # nothing is written
    assert there(tmp_path) == first

    def full(*args, **options):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises(OSError, match=r"best\.pt"):
            run_unet(tmp_path)
    assert {k: v for k, v in there(tmp_path).items() if k in first} == first
    assert not (tmp_path / "kept-1").exists()
    capsys.readouterr()
    for n in (1, 2):
        before = there(tmp_path)
        run_unet(tmp_path, "--lr", "0.1")
        assert f"is kept in {tmp_path / f'kept-{n}'}" in capsys.readouterr().out
        assert there(tmp_path / f"kept-{n}") == {k: v for k, v in before.items() if "kept-1" not in k.parts}
    assert there(tmp_path / "kept-1") == first
    assert (tmp_path / "mine").exists()


def test_a_second_run_in_a_folder_is_refused_while_the_first_lives(tmp_path):
    code = f"import evaluate, time; evaluate.claim({str(tmp_path)!r}); print('claimed', flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout.readline() == "claimed\n"
        with pytest.raises(models.ModelError, match="another run is writing there"):
            run_unet(tmp_path)
        assert os.listdir(tmp_path) == [".lock"]
        first.kill()
    (tmp_path / f"best.pt.{first.pid}.tmp").write_bytes(b"half")
    run_unet(tmp_path)
    assert not {p.name for p in tmp_path.iterdir()} & {".lock", f"best.pt.{first.pid}.tmp"}


# ---- several processes ----


def one_process(rank, world, port, out, flags):
    """A process of torchrun: the same table row, environment and command line."""
    numbers = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 4, "use_swiglu_ffn": False}
    models.BACKBONES["dinov2-tiny"] = dataclasses.replace(models.BACKBONES["dinov2-small"], numbers=numbers)
    row = dataclasses.replace(datasets.DATASETS["synthetic"], lengths={"train": 10, "val": 3, "test": 2})
    datasets.DATASETS["synthetic"] = row
    os.environ |= dict(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=port
    )
    torch.set_num_threads(1)
    train.main([*SMALL, "--out", out, *flags])
    os.environ["MASTER_PORT"] = str(int(port) + 1)
    with pytest.raises(TrainingError, match="another process of this run has ended"):
        one_is_lost(rank)


def one_is_lost(rank):
    with train.process_group(torch.device("cpu")):
        if rank:
            os._exit(0)
        for _ in range(100):
            torch.distributed.all_reduce(torch.zeros(1))


def test_two_processes_train_like_one_with_the_same_batch(tmp_path):
    # SGD, so that weights can be compared: Adam makes whole steps of a gradient that is 0 but for rounding (key biases)
    flags = ["--epochs", "2", "--norm", "batch", "--loss", "ohem", "--class-weights", "enet"]
    flags += ["--optimizer", "sgd", "--lr", "0.05"]
    run(tmp_path / "1", *flags)
    port = str(29500 + 2 * (os.getpid() % 1000))
    torch.multiprocessing.spawn(one_process, (2, port, str(tmp_path / "2"), flags), nprocs=2)
    histories = []
    for world in ("1", "2"):
        with open(tmp_path / world / "history.csv") as file:
            histories.append(list(csv.DictReader(file)))
    for a, b in zip(*histories, strict=True):
        assert float(b["loss"]) == pytest.approx(float(a["loss"]), rel=1e-5)
    assert [r["miou"] for r in histories[0]] == [r["miou"] for r in histories[1]]
    a, b = (read(tmp_path / world / "last.pt")["state_dict"] for world in ("1", "2"))
    for key in a:
        torch.testing.assert_close(b[key], a[key], rtol=1e-3, atol=1e-5)


# ---- command line ----


def test_a_run_leaves_its_files_and_numbers(tmp_path):
    done = run(tmp_path, "--epochs", "2", "--aux", "--class-weights", "effective", "--loss", "ohem", "--clip", "1")
    written = {"best.pt", "last.pt", "history.csv", "results.json", "curves.png", "class_distribution.png"}
    written |= {"confusion.png", "class_iou.png", "examples.png"}
    assert {p.name for p in tmp_path.iterdir()} == written
    assert json.loads((tmp_path / "results.json").read_text()).keys() == done.keys()
    assert done["command"].startswith("python train.py --backbone dinov2-tiny")
    assert done["pretrained"] == "no"
    assert len(done["class_iou"]) == 19
    checkpoint = read(tmp_path / "best.pt")
    assert checkpoint["data"]["classes"][0] == "road"
    assert checkpoint["lineage"] == []


@pytest.mark.parametrize("amp", ["auto", "bf16", "off"])
def test_amp(tmp_path, amp):
    run(tmp_path, "--dry-run", "--amp", amp)
    assert read(tmp_path / "last.pt")["args"]["amp"] in (("bf16", "off") if amp == "auto" else (amp,))


def test_dry_run_does_not_touch_a_trained_network(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train.main([*SMALL, "--dry-run"])
    assert not (tmp_path / "checkpoints" / "train").exists()
    assert (tmp_path / "checkpoints" / "dry-run" / "train" / "best.pt").exists()


def test_compiled_step(tmp_path):
    assert run(tmp_path, "--dry-run", "--compile")["steps"] == 2


def test_time_steps_measures_the_loader_and_a_plain_loop(tmp_path):
    speeds = run(tmp_path, "--time-steps", "3", "--ema", "0.99")
    assert all(v > 0 for v in speeds.values())
    assert speeds["step_ratio"] == pytest.approx(
        speeds["plain_images_per_second"] / speeds["training_images_per_second"]
    )


def test_deterministic(tmp_path):
    try:
        a, b = (run(tmp_path / n, "--dry-run", "--deterministic")["miou"] for n in "ab")
    finally:
        torch.use_deterministic_algorithms(False)
    assert a == b


def test_tensorboard_is_optional(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(TrainingError, match="pip install tensorboard"):
        run(tmp_path, "--dry-run", "--tensorboard")


def test_tensorboard_events(tmp_path):
    pytest.importorskip("tensorboard")
    run(tmp_path, "--dry-run", "--tensorboard")
    assert [p for p in tmp_path.iterdir() if p.name.startswith("events.out.tfevents")]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--loss", "bce"], "--loss bce"),
        (["--loss", "dice", "--class-weights", "enet"], "--loss dice"),
        (["--batch-size", "4", "--accumulate", "3"], "no multiple of"),
        (["--amp", "fp16"], "needs a GPU"),
        (["--dataset", "camvid"], "--data-root"),
        (["--pretrained", "nowhere"], "no such file"),
        (["--head", "unet", "--no-fuse"], "--no-fuse"),
    ],
)
def test_bad_flags_are_one_line_that_says_so(tmp_path, flags, words):
    with pytest.raises((models.ModelError, datasets.DataError), match=words) as error:
        run(tmp_path, "--dry-run", *flags)
    assert "\n" not in str(error.value)


# ---- networks with a loss of their own ----

WHOLE = ["--size", "32", "64", "--crop", "32", "32", "--batch-size", "4", "--workers", "0", "--warmup", "2"]


def run_mask2former(out, *flags):
    return train.main([*WHOLE, "--amp", "off", "--model", "mask2former-tiny", "--out", str(out), *flags])


def test_a_network_trains_with_its_own_loss(tmp_path):
    done = run_mask2former(tmp_path, "--dry-run", "--epochs", "2")
    assert done["model"] == "mask2former-tiny"
    assert done["steps"] == 2
    last = read(tmp_path / "last.pt")
    assert last["args"]["loss"] is None
    assert all(row["loss"] > 0 and "miou" in row for row in last["training"]["history"])
    model, _ = models.load_checkpoint(tmp_path / "last.pt")
    assert model(torch.randn(1, 3, 40, 50)).shape == (1, 19, 40, 50)


def test_the_objective_of_a_network_with_its_own_loss_is_that_loss():
    torch.manual_seed(0)
    model = models.build_model(num_classes=3, model="mask2former-tiny")
    images, target = batch()
    target[:, :14] = 9  # ignored here
    values = []
    for value in (  # with the same points, which follow from the seed
        lambda: Objective(model, None, ignore_index=9)(images, target),
        lambda: losses.mask_set_loss(model.head.queries(model.encode(images)), target, 9, stride=4),
    ):
        torch.manual_seed(1)
        values.append(value())
    assert torch.equal(*values)


def test_only_mask2formers_last_layer_learns_with_a_frozen_backbone():
    torch.manual_seed(0)
    model = models.build_model(num_classes=3, model="mask2former-tiny", freeze_backbone=True)
    objective = Objective(model, None).train()
    optimizer = make_optimizer(objective, "adamw", lr=1e-3, backbone_lr=1e-3, weight_decay=0.05)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    first, last = (train.train_step(objective, optimizer, *batch(2)) for _ in range(2))
    moved = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert moved == {"head.class_predictor.weight", "head.class_predictor.bias"}
    assert last < first


def test_embeddings_and_position_tables_are_not_decayed():
    objective = Objective(models.build_model(num_classes=3, model="mask2former-tiny"), None)
    optimizer = make_optimizer(objective, "adamw", lr=1, backbone_lr=1, weight_decay=0.05)
    names = {id(p): n for n, p in objective.named_parameters()}
    spared = {names[id(p)] for group in optimizer.param_groups if not group["weight_decay"] for p in group["params"]}
    matrices = {n for n, p in objective.named_parameters() if p.ndim > 1}
    ends = ("queries_embedder.weight", "queries_features.weight", "level_embed.weight", "level_embed", "bias_table")
    assert spared & matrices == {n for n in matrices if n.endswith(ends)}


@pytest.mark.parametrize("flags", [["--loss", "ce"], ["--class-weights", "enet"], ["--label-smoothing", "0.1"]])
def test_another_loss_is_refused_where_the_network_has_its_own(tmp_path, flags):
    with pytest.raises(TrainingError, match="mask2former-tiny has a loss of its own"):
        run_mask2former(tmp_path, "--dry-run", *flags)


def test_a_loss_left_out_is_the_default_one_and_width_reaches_the_network(tmp_path):
    flags = [*WHOLE, "--model", "unet", "--width", "4", "--dry-run", "--amp", "off"]  # auto goes by the clock
    left_out = train.main([*flags, "--out", str(tmp_path / "a")])
    named = train.main([*flags, "--out", str(tmp_path / "b"), "--loss", train.DEFAULT_LOSS])
    a, b = (read(tmp_path / name / "last.pt") for name in "ab")
    assert a["build"]["width"] == 4
    assert same(a["state_dict"], b["state_dict"])
    assert left_out["miou"] == named["miou"]
    with pytest.raises(models.ModelError, match="--width cannot change"):
        train.main(["--resume", "--out", str(tmp_path / "a"), "--width", "8"])


def test_time_steps_of_a_network_with_its_own_loss(tmp_path):
    assert run_mask2former(tmp_path, "--time-steps", "1")["step_ratio"] > 0
