"""What the tests share: transformers small enough to train here, as more rows of the tables."""

import dataclasses

import pytest

import models


@pytest.fixture(autouse=True)
def tiny_row():
    """BACKBONES["dinov2-tiny"]: 4 layers of width 32, built by the same code as the real ones."""
    numbers = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 4, "use_swiglu_ffn": False}
    models.BACKBONES["dinov2-tiny"] = dataclasses.replace(models.BACKBONES["dinov2-small"], numbers=numbers)
    yield
    del models.BACKBONES["dinov2-tiny"]


@pytest.fixture(autouse=True)
def tiny_mask2former(monkeypatch):
    """NETWORKS["mask2former-tiny"]: one block a stage, ten queries, two decoder layers; built by the same code."""
    decoder = dict(feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=32, dim_feedforward=32)
    decoder |= dict(encoder_layers=1, decoder_layers=3, num_attention_heads=2, num_queries=10)
    numbers = dict(embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=4, decoder=decoder)
    row = dataclasses.replace(models.NETWORKS["mask2former-swin-tiny"], numbers=numbers, weights="absent")
    monkeypatch.setitem(models.NETWORKS, "mask2former-tiny", row)
