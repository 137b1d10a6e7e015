"""What the tests share: a DINOv2 small enough to train here, as one more row of the table."""

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
