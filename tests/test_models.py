"""Networks: the contract for every row, published numbers, torchvision and transformers as oracles, checkpoints."""

import copy
import dataclasses
import errno
import functools
import itertools
import json
import math
import os
import random
import resource
import shutil
import stat
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
import torchvision
from conftest import made_up
from torch import nn

import models
from losses import mask_set_loss
from models import BACKBONES, HEADS, NETWORKS, ModelError, build_model, count_params, load_checkpoint, save_checkpoint

# One backbone of each builder, small enough to train here, with every head; the quick tests have each head on the first
# of them and on one of the others. test_every_row() goes through the tables.
TRAINABLE_HERE = ["dinov2-tiny", "resnet18", "mobilenet_v2", "swin-mini", "mit-tiny"]
PAIRS = [dict(backbone=backbone, head=head) for backbone in TRAINABLE_HERE for head in HEADS]
QUICK = PAIRS[: len(HEADS)] + [
    dict(backbone=b, head=h) for b, h in zip(itertools.cycle(TRAINABLE_HERE[1:]), HEADS, strict=False)
]
NETS = [pytest.param(net, marks=() if net in QUICK else pytest.mark.slow) for net in PAIRS]
NETS += [dict(backbone="mobilenet_v3_large", head="deeplabv3plus"), dict(model="segformer-tiny")]
ROWS = [dict(backbone=name, head="linear") for name in BACKBONES] + [dict(model=name) for name in NETWORKS]
SMALL = 8_000_000  # parameters up to which test_every_row() computes with a row
BIG = 500_000_000  # parameters from which no test does: DINOv2-giant
DATA = {"name": "toy", "classes": ["a", "b", "c"], "palette": [[0, 0, 0]] * 3, "size": [32, 32], "ignore_index": 255}


def build(backbone=None, head=None, num_classes=3, model=None, **options):
    torch.manual_seed(0)
    if model is None:
        backbone, head = backbone or "dinov2-tiny", head or "fpn"
    if num_classes == 3 and not options and model is None:
        network, random_state = _built(backbone, head)
        torch.set_rng_state(random_state)
        return copy.deepcopy(network)
    return build_model(num_classes=num_classes, backbone=backbone, head=head, model=model, **options)


@functools.lru_cache(maxsize=1)
def _built(backbone, head):
    """(a network, the state of the random numbers then): several checks in a row begin with the same one."""
    return build_model(num_classes=3, backbone=backbone, head=head), torch.get_rng_state()


def save(path, model, **options):
    save_checkpoint(path, model, **{"data": DATA, "pretrained": "no", "command": "test"} | options)


def on_meta(**options):
    with torch.device("meta"):
        return build_model(**options)


# ---- the contract ----


def check_any_size_in_logits_of_that_size_out_and_gradients_everywhere(net, _path):
    model = build(**net)
    images = torch.randn(2, 3, 45, 61)
    features = model.encode(images)
    padded = [n + -n % model.stride for n in (45, 61)]
    assert [f.shape[1] for f in features] == model.channels
    assert model.strides == sorted(model.strides)
    for f, stride in zip(features, model.strides, strict=True):
        assert list(f.shape[-2:]) == [n // stride for n in padded]
    logits = model(images)
    assert logits.shape == (2, 3, 45, 61)
    logits.square().mean().backward()
    without = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not [n for n in without if not n.startswith("aux_head")]
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def check_forward_is_encode_decode_resize_and_padding_is_cropped(net, _path):
    model = build(**net).eval()
    images = torch.randn(1, 3, 50, 70)
    with torch.inference_mode():
        by_hand = model.resize(model.decode(model.encode(images)), (50, 70))
        padded = F.pad(images, (0, -70 % model.stride, 0, -50 % model.stride))
        logits = model(images)
        torch.testing.assert_close(logits, by_hand)
        torch.testing.assert_close(logits, model(padded)[..., :50, :70])
        channels_last = model(images.to(memory_format=torch.channels_last))
    torch.testing.assert_close(logits, channels_last, rtol=1e-4, atol=1e-4 * max(1, logits.abs().max().item()))


def check_one_training_step_lowers_the_loss_also_with_a_batch_of_one(net, _path):
    model = build(**net)
    images, target = torch.randn(1, 3, 128, 128), torch.randint(3, (1, 128, 128))
    losses = []
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for _ in range(2):
        torch.manual_seed(0)  # the same layers are dropped each time, where a transformer drops some
        loss = F.cross_entropy(model(images), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def check_bfloat16_autocast_is_finite_and_close(net, _path):
    model = build(**net).eval()
    images = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        exact = model(images)
        with torch.autocast("cpu", torch.bfloat16):
            rough = model(images)
    assert rough.isfinite().all()
    if count_params(model)[0] < 50_000_000:  # bigger ones of random weights amplify any rounding
        assert (rough.float() - exact).abs().max() < 0.15 * max(1.0, exact.abs().max().item())


def check_a_checkpoint_gives_the_same_outputs(net, path):
    model = build(**net).eval()
    with torch.no_grad():
        for buffer in model.buffers():
            if buffer.is_floating_point():  # Swin keeps indices in one
                buffer.add_(1)
    save(path / "a.pt", model, metrics={"miou": 1.5})
    (path / "a.pt").rename(path / "renamed.bin")  # nothing is decided from a name
    loaded, checkpoint = load_checkpoint(path / "renamed.bin")
    images = torch.randn(1, 3, 33, 47)
    with torch.inference_mode():
        assert torch.equal(loaded(images), model(images))
    assert not loaded.training
    assert checkpoint["metrics"] == {"miou": 1.5}
    assert checkpoint["data"] == DATA
    assert torch.load(path / "renamed.bin", weights_only=True)["format"] == models.FORMAT


CONTRACT = [check for name, check in list(globals().items()) if name.startswith("check_")]


@pytest.mark.parametrize("check", CONTRACT, ids=lambda check: check.__name__[6:])
@pytest.mark.parametrize("net", NETS, ids=models.model_name)
def test_the_contract(check, net, tmp_path):
    check(net, tmp_path)


@pytest.mark.parametrize("net", ROWS, ids=models.model_name)
def test_every_row(net, tmp_path):
    """Shapes of every row without computing (so the biggest, too); small ones go through the whole contract."""
    model = on_meta(num_classes=5, **net)
    with torch.no_grad():
        features = model.encode(torch.empty(2, 3, 45, 61, device="meta"))
        assert [f.shape[1] for f in features] == model.channels
        if not hasattr(model.head, "queries"):  # Mask2Former's decoder needs the values, which the meta device has not
            assert model.resize(model.decode(features), (45, 61)).shape == (2, 5, 45, 61)
    if count_params(model)[0] <= SMALL:
        for check in CONTRACT:
            check(net, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("check", CONTRACT, ids=lambda check: check.__name__[6:])
@pytest.mark.parametrize("net", ROWS, ids=models.model_name)
def test_every_big_row_for_real(check, net, tmp_path):
    if SMALL < count_params(on_meta(num_classes=3, **net))[0] < BIG:
        check(net, tmp_path)


@pytest.mark.parametrize(
    "option", [{"taps": 1}, {"norm": "group"}, {"norm": "none"}, {"fuse": False}, {"dropout": 0.3}]
)
@pytest.mark.parametrize("backbone", ["dinov2-tiny", "resnet18"])
def test_ablation_flags_build_different_networks_that_run(backbone, option):
    model, plain = build(backbone, "fpn", **option), build(backbone, "fpn")
    assert model(torch.randn(2, 3, 40, 40)).shape == (2, 3, 40, 40)
    if "norm" in option:
        assert not any(isinstance(m, nn.BatchNorm2d) for m in model.head.modules())
    elif "dropout" in option:
        assert next(m for m in model.head.modules() if isinstance(m, nn.Dropout2d)).p == 0.3
    else:
        assert count_params(model)[0] < count_params(plain)[0]


def test_without_fusing_the_logits_are_the_mean_of_one_prediction_a_tap():
    model = build("resnet18", "fpn", fuse=False).eval()
    features = model.encode(torch.randn(1, 3, 64, 64))
    head = model.head
    each = [c(lateral(f)) for c, lateral, f in zip(head.classifiers, head.laterals, features, strict=True)]
    mean = sum(F.interpolate(e, size=each[0].shape[-2:], mode="bilinear") for e in each) / 4
    torch.testing.assert_close(model.decode(features), mean)


@pytest.mark.parametrize(("backbone", "head"), [("dinov2-tiny", "fpn"), ("resnet18", "unet"), ("resnet18", "ppm")])
def test_learned_upsampling_starts_as_bilinear_interpolation(backbone, head):
    model = build(backbone, head, upsample="learned").eval()
    features = model.encode(torch.randn(1, 3, 112, 112))
    low, stride = model.head(features), int(model.head.stride)
    bilinear = F.interpolate(low, scale_factor=stride, mode="bilinear", align_corners=False)
    learned = model.decode(features)
    assert learned.shape == bilinear.shape
    inner = (..., slice(stride, -stride), slice(stride, -stride))  # the border sees zeros, interpolation repeats pixels
    torch.testing.assert_close(learned[inner], bilinear[inner], rtol=1e-4, atol=1e-5)
    assert model.learned.weight.requires_grad


def test_learned_upsampling_is_refused_where_the_stride_is_not_whole():
    with pytest.raises(ModelError, match=r"whole stride.*1\.75"):
        build("dinov2-tiny", "unet", upsample="learned")


def test_predictions_add_auxiliary_logits_for_training_only():
    plain, aux, ocr = build("resnet18", "fpn"), build("resnet18", "fpn", aux=True), build("resnet18", "ocr", aux=True)
    images = torch.randn(2, 3, 64, 64)
    assert [len(m.predictions(m.encode(images))) for m in (plain, aux, ocr)] == [1, 2, 3]
    aux.eval()
    features = aux.encode(images)
    torch.testing.assert_close(aux.predictions(features)[0], aux.decode(features))
    c = 256  # the tap before the deepest of resnet18
    assert count_params(aux.aux_head)[0] == c * c // 4 * 9 + 2 * c // 4 + c // 4 * 3 + 3


def randomize_norms(model):
    """BatchNorms as after a training: statistics and scales that matter."""
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            for t, low in ((m.running_mean, -0.5), (m.running_var, 0.5), (m.weight.data, 0.5), (m.bias.data, -0.5)):
                t.uniform_(low, low + 1)


@pytest.mark.parametrize("net", NETS[: len(PAIRS)], ids=models.model_name)
def test_folding_batchnorm_leaves_none_and_changes_nothing(net):
    model, head = build(**net).eval(), net["head"]
    randomize_norms(model)
    images = torch.randn(2, 3, 45, 61)
    with torch.inference_mode():
        before = model(images)
    norms = sum(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    lone = norms if head == "linear" else 0  # its norms follow no convolution
    assert models.fold_batchnorm(model) == norms - sum(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    assert sum(isinstance(m, nn.BatchNorm2d) for m in model.modules()) <= lone
    with torch.inference_mode():
        torch.testing.assert_close(model(images), before, rtol=1e-4, atol=1e-4 * before.abs().max().item())


class ConvNorm(nn.Module):
    """A convolution and a BatchNorm, joined by `run`."""

    def __init__(self, run):
        super().__init__()
        self.run, self.conv, self.norm = run, nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)

    def forward(self, x):
        return self.run(self.conv, self.norm, x)


def _through_a_view(conv, norm, x):
    y = conv(x)
    y[:, 0] += 1
    return norm(y)


def _relu_in_place(conv, norm, x):
    y = conv(x)
    y.relu_()
    return norm(y)


JOINED = {  # how many norms fold
    "in a row": (lambda conv, norm, x: norm(conv(x)), 1),
    "then in place": (lambda conv, norm, x: F.relu(norm(conv(x)), inplace=True), 1),
    "output read twice": (lambda conv, norm, x: (y := conv(x)) + norm(y), 0),
    "output read twice, the second hardly": (lambda conv, norm, x: norm(y := conv(x)) + 1e-9 * y, 0),
    "output returned, too": (lambda conv, norm, x: [y := conv(x), norm(y)], 0),
    "ReLU in place between": (_relu_in_place, 0),
    "written through a view": (_through_a_view, 0),
    "convolution called twice": (lambda conv, norm, x: norm(conv(conv(x))), 0),
    "norm called twice": (lambda conv, norm, x: norm(norm(conv(x))), 0),
    "weight read elsewhere": (lambda conv, norm, x: norm(conv(x)) + conv.weight.sum(), 0),
    "value read as a number": (lambda conv, norm, x: norm(y := conv(x)) * y.max().item(), 0),
}


@pytest.mark.parametrize("name", JOINED)
@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_folding_takes_what_it_may_and_leaves_the_rest_as_it_was(name, guard):
    run, folds = JOINED[name]
    model = copy.deepcopy(ConvNorm(run)).eval()
    randomize_norms(model)
    x, before = torch.randn(1, 3, 8, 9), copy.deepcopy(model.state_dict())
    with guard():
        expected = model(x)
        assert models.fold_batchnorm(model) == folds
        assert models.fold_batchnorm(model) == 0
        torch.testing.assert_close(model(x), expected)
    if not folds:
        assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    model(x)[0].sum().backward()  # what was folded can still be trained


class Scaled(nn.Module):
    def __init__(self, more=0.0):
        super().__init__()
        self.scale, self.more = nn.Parameter(torch.rand(4)), more

    def forward(self, x):
        return x * self.scale + self.more if self.more else x * self.scale


SCALED = {
    "after a Linear": (lambda linear, scale, x: scale(linear(x)), 0.0, 1),
    "and more in the same module": (lambda linear, scale, x: scale(linear(x)), 0.5, 0),
    "of what is read twice": (lambda linear, scale, x: scale(y := linear(x)) + y, 0.0, 0),
    "called twice": (lambda linear, scale, x: scale(scale(linear(x))), 0.0, 0),
    "after an activation": (lambda linear, scale, x: scale(linear(x).relu_()), 0.0, 0),
}


@pytest.mark.parametrize("name", SCALED)
@torch.no_grad()
def test_folding_of_layer_scales(name):
    run, more, folds = SCALED[name]
    model = ConvNorm(run)
    model.conv, model.norm = nn.Linear(3, 4), Scaled(more)
    x = torch.randn(1, 3, 5, 3)
    model.run = lambda linear, scale, _images: run(linear, scale, x)  # whatever size is traced
    expected = model(x)
    assert models.fold_layer_scale(model) == ["norm"] * folds
    torch.testing.assert_close(model(x), expected)


def test_a_trace_says_who_made_what_and_who_read_it():
    def run(conv, norm, x):
        y = conv(x)
        z = y.relu_()
        z.shape, len(z), z.dim()  # looks at the shape are no readers
        return norm(z) + z.mT.mT

    model = ConvNorm(run).eval()
    traced = models.trace(model, torch.randn(1, 3, 8, 9))
    names = [call.name for call in traced.calls]
    assert names[:3] == ["conv2d", "relu_", "batch_norm"]
    conv, relu, norm = traced.calls[:3]
    assert (conv.module, relu.module, norm.module) == (model.conv, model, model.norm)
    assert traced.sole_reader(conv.makes[0]) is relu  # the ReLU in place made a new Value
    assert len(relu.makes[0].readers) == 2
    assert traced.sole_reader(relu.makes[0]) is None
    assert norm.reads[0] is relu.makes[0]
    assert traced.owners[id(model.conv.weight)] == [(model.conv, "weight")]
    assert traced.once(model.conv)
    assert traced.once(model.norm)
    assert traced.outputs == [traced.calls[-1].makes[0]]


def test_ocr_gathers_one_representation_a_class_as_the_paper_writes_it():
    head = build("dinov2-tiny", "ocr").head.eval()
    features = [torch.randn(2, 32, 5, 6)] * 4
    final, coarse = head.predictions(features)
    pixels = head.pixels(features[-1])
    regions = torch.zeros(2, 256, 3, 1)
    for n in range(2):
        for k in range(3):
            share = coarse[n, k].flatten().softmax(0)  # equation (1): where the class is
            regions[n, :, k, 0] = (pixels[n].flatten(1) * share).sum(1)
    q, key, value = head.query(pixels).flatten(2), head.key(regions)[..., 0], head.value(regions)[..., 0]
    attention = torch.einsum("ncp,nck->npk", q, key).div(128**0.5).softmax(-1)  # equation (2), scaled
    context = torch.einsum("npk,nck->ncp", attention, value).unflatten(-1, (5, 6))
    torch.testing.assert_close(final, head.classifier(head.mix(torch.cat([pixels, head.up(context)], 1))))


# ---- published numbers ----


def test_dinov2_base_fpn_has_the_published_parameters():
    model = on_meta(num_classes=33, backbone="dinov2-base", head="fpn")
    assert count_params(model.backbone)[0] == 86_580_480
    assert count_params(model.head)[0] == 3_747_617
    assert count_params(model)[0] == 90_328_097
    assert "344.57" in models.parameter_summary(model)
    four = on_meta(num_classes=4, backbone="dinov2-base", head="fpn")
    assert count_params(four.head)[0] == 3_740_164
    assert count_params(four.head.classifiers[0])[0] == 1_028


@pytest.mark.parametrize(
    ("name", "millions"),  # Oquab et al. 2023: 21, 86, 300, 1100 M; transformers' checkpoints to the digit
    [("small", 22_056_576), ("base", 86_580_480), ("large", 304_368_640), ("giant", 1_136_480_768)],
)
def test_dinov2_sizes(name, millions):
    model = on_meta(num_classes=19, backbone=f"dinov2-{name}", head="linear")
    assert count_params(model.backbone)[0] == millions


@pytest.mark.parametrize(
    ("name", "millions"),  # of SegFormer's own code with 19 classes; the paper (Table 1) rounds: 3.8, 27.5, 84.7
    [("b0", 3.72), ("b1", 13.68), ("b2", 27.36), ("b3", 47.24), ("b4", 64.01), ("b5", 84.61)],
)
def test_segformer_sizes(name, millions):
    model = on_meta(num_classes=19, model=f"segformer-{name}")
    assert round(count_params(model)[0] / 1e6, 2) == millions
    backbone = on_meta(num_classes=19, backbone=f"mit-{name}", head="segformer").backbone
    assert count_params(model.backbone) == count_params(backbone)


def test_fcn_resnet50_and_lite_deeplabv3_sizes():
    with torch.device("meta"):
        oracle = torchvision.models.segmentation.fcn_resnet50(weights_backbone=None, num_classes=21, aux_loss=True)
    aux = on_meta(num_classes=21, model="fcn_resnet50", aux=True)
    assert count_params(aux)[0] == count_params(oracle)[0] == 35_322_218
    assert count_params(on_meta(num_classes=21, model="fcn_resnet50"))[0] == 32_957_013
    lite = on_meta(num_classes=21, model="lite_deeplabv3")
    assert count_params(lite.backbone)[0] == 2_971_952  # torchvision's mobilenet_v3_large without its classifier
    head = 960 * 256 + 256 * 256 * 9 + 2 * 2 * 256 + 256 * 21 + 21
    assert count_params(lite)[0] == 2_971_952 + head == 3_813_957


def test_swin_is_torchvisions_without_the_classifier():
    model = on_meta(num_classes=19, backbone="swin_t", head="linear")
    with torch.device("meta"):
        whole = torchvision.models.swin_t()
    assert count_params(model.backbone)[0] == count_params(whole)[0] - count_params(whole.head)[0] == 27_519_354


@pytest.mark.parametrize(
    "name", ["resnet18", "resnet34", "resnet50", "resnet101", "mobilenet_v2", "mobilenet_v3_large"]
)
def test_convolutional_backbones_are_torchvisions_without_the_classifier(name):
    model = on_meta(num_classes=19, backbone=name, head="linear")
    with torch.device("meta"):
        whole = torchvision.models.get_model(name)
    dropped = whole.fc if name.startswith("resnet") else whole.classifier
    if name == "mobilenet_v2":  # its last 1x1 convolution serves the classifier
        dropped = nn.ModuleList([whole.features[18], whole.classifier])
    assert count_params(model.backbone)[0] == count_params(whole)[0] - count_params(dropped)[0]


# ---- oracles ----


@pytest.mark.parametrize("output_stride", [8, 16, 32])
def test_dilated_resnet50_equals_torchvision(output_stride):
    replace = {8: [False, True, True], 16: [False, False, True], 32: [False] * 3}[output_stride]
    torch.manual_seed(0)
    oracle = torchvision.models.resnet50(replace_stride_with_dilation=replace).eval()
    model = build("resnet50", "fpn", output_stride=output_stride).eval()
    ours = nn.Sequential(model.backbone.stages[0], *model.backbone.stages[1:])
    ours.load_state_dict(dict(zip(ours.state_dict(), list(oracle.state_dict().values())[:-2], strict=True)))
    x = torch.randn(1, 3, 64, 96)
    wanted = torchvision.models._utils.IntermediateLayerGetter(oracle, {f"layer{i}": str(i) for i in range(1, 5)})(x)
    for a, b in zip(model.backbone(x), wanted.values(), strict=True):
        torch.testing.assert_close(a, b)


def copy_weights(source, target):
    """Weights and statistics of a module with the same layers under other names."""
    target.load_state_dict(dict(zip(target.state_dict(), source.state_dict().values(), strict=True)))


def shake(module):
    """Norms that do something: random scales, shifts and running statistics."""
    with torch.no_grad():
        for norm in (m for m in module.modules() if isinstance(m, (nn.BatchNorm2d, nn.LayerNorm))):
            for tensor in norm.state_dict().values():
                if tensor.is_floating_point():
                    tensor.uniform_(0.5, 1.5)
    return module


@pytest.mark.parametrize("output_stride", [16, 32])
def test_mobilenet_v3_features_equal_torchvisions(output_stride):
    torch.manual_seed(0)
    features = shake(torchvision.models.mobilenet_v3_large(dilated=output_stride == 16).eval().features)
    if output_stride == 16:  # torchvision dilates also the layer that had the stride; ours, as in ResNets, does not
        depthwise = features[13].block[1][0]
        assert (depthwise.stride, depthwise.dilation, depthwise.padding) == ((1, 1), (2, 2), (4, 4))
        depthwise.dilation, depthwise.padding = (1, 1), (2, 2)
    backbone = build("mobilenet_v3_large", "linear", output_stride=output_stride).eval().backbone
    copy_weights(features, backbone)
    getter = torchvision.models._utils.IntermediateLayerGetter
    wanted = getter(features, {"3": "4", "6": "8", "12": "16", "16": "32"})  # the layers before each stride, the last
    x = torch.randn(1, 3, 64, 96)
    for ours, theirs in zip(backbone(x), wanted(x).values(), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "mobilenet_v3_large"])
def test_a_dilated_backbone_computes_what_pretrained_weights_mean_at_more_places(name, monkeypatch):
    """Every 2nd or 4th place of a dilated map is the undilated map, once squeeze-excitation does not pool it."""
    monkeypatch.setattr(torchvision.ops.SqueezeExcitation, "forward", lambda self, x: x)
    plain = shake(build(name, "linear", output_stride=32)).eval().backbone
    x = torch.randn(1, 3, 96, 128)
    for stride in (8, 16):
        dilated = build(name, "linear", output_stride=stride).eval().backbone
        dilated.load_state_dict(plain.state_dict())
        for coarse, fine in zip(plain(x), dilated(x), strict=True):
            step = fine.shape[-1] // coarse.shape[-1]
            torch.testing.assert_close(fine[..., ::step, ::step], coarse, rtol=1e-4, atol=1e-5)
        assert step == 32 // stride


def test_swin_features_equal_torchvisions():
    torch.manual_seed(0)
    oracle = shake(torchvision.models.swin_t().eval())
    backbone = build("swin_t", "linear").eval().backbone
    copy_weights(oracle.features, backbone.stages)
    copy_weights(oracle.norm, backbone.norms[3])
    x = torch.randn(1, 3, 64, 96)
    wanted = torchvision.models._utils.IntermediateLayerGetter(oracle.features, {str(i): str(i) for i in (1, 3, 5, 7)})
    for ours, theirs, norm in zip(backbone(x), wanted(x).values(), backbone.norms, strict=True):
        theirs = F.layer_norm(theirs, theirs.shape[-1:], norm.weight, norm.bias)  # (N, H, W, C)
        torch.testing.assert_close(ours.movedim(1, -1), theirs, rtol=1e-4, atol=1e-5)
    pooled = backbone(x)[-1].mean((-2, -1))
    torch.testing.assert_close(oracle.head(pooled), oracle(x), rtol=1e-4, atol=1e-5)


def test_fcn_resnet50_equals_torchvisions(tmp_path):
    torch.manual_seed(5)
    oracle = shake(torchvision.models.segmentation.fcn_resnet50(weights_backbone=None, aux_loss=True)).eval()
    torch.save(oracle.state_dict(), tmp_path / "fcn.pth")
    model = build(model="fcn_resnet50", num_classes=21, pretrained=str(tmp_path / "fcn.pth")).eval()
    x = torch.randn(1, 3, 40, 56)
    with torch.inference_mode():
        torch.testing.assert_close(model(x), oracle(x)["out"], rtol=1e-4, atol=1e-4)


def test_segformer_equals_transformers(tmp_path):
    oracle = save_segformer(tmp_path, num_labels=7)
    model = build(model="segformer-tiny", num_classes=7, pretrained=str(tmp_path)).eval()
    x = torch.randn(2, 3, 64, 96)
    with torch.inference_mode():
        torch.testing.assert_close(model.decode(model.encode(x)), oracle(x).logits, rtol=0, atol=1e-5)


def test_deeplabv3plus_refines_the_pyramid_with_48_channels_of_the_finest_tap():
    for stride, rates in ((16, [1, 6, 12, 18]), (8, [1, 12, 24, 36])):
        model = build("resnet18", "deeplabv3plus", output_stride=stride).eval()
        assert [branch[0].dilation[0] for branch in model.head.aspp.branches] == rates
    assert build("resnet18", "deeplabv3plus").strides == [4, 8, 16, 16]
    head = build("resnet18", "deeplabv3plus").head.eval()
    features = [torch.randn(1, c, 48 // s, 48 // s) for c, s in ((64, 4), (128, 8), (256, 16), (512, 16))]
    deep = F.interpolate(head.aspp(features[-1]), size=(12, 12), mode="bilinear")
    low = head.low(features[0])
    assert (deep.shape[1], low.shape[1]) == (256, 48)
    torch.testing.assert_close(head(features), head.classifier(head.mix(torch.cat([deep, low], 1))))
    c = 512
    aspp = c * 256 + 3 * 9 * c * 256 + c * 256 + 256 + 5 * 256 * 256  # convolutions; image pooling has a bias, no norm
    mix = 64 * 48 + 9 * (256 + 48) * 256 + 9 * 256 * 256
    norms = 2 * (4 * 256 + 256 + 48 + 2 * 256)
    assert count_params(head)[0] == aspp + mix + norms + 256 * 3 + 3


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "mobilenet_v3_large"])
def test_output_stride_changes_the_grid_but_no_weight(name):
    models_by_stride = {s: build(name, "linear", output_stride=s) for s in (8, 16, 32)}
    for stride, model in models_by_stride.items():
        assert model.strides == [min(s, stride) for s in (4, 8, 16, 32)]
        assert model.encode(torch.zeros(1, 3, 64, 64))[-1].shape[-1] == 64 // stride
        assert model.state_dict().keys() == models_by_stride[32].state_dict().keys()


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
def test_undilated_features_equal_torchvision(name):
    torch.manual_seed(0)
    oracle = torchvision.models.get_model(name).eval()
    model = build(name, "linear").eval()
    x = torch.randn(1, 3, 64, 64)
    ours, theirs = (list(m.state_dict().values()) for m in (model.backbone, oracle))
    with torch.no_grad():
        for copied, tensor in zip(ours, theirs, strict=False):  # theirs go on, with the classifier
            assert copied.shape == tensor.shape
            if tensor.is_floating_point() and tensor.dim() == 1:  # norms that are not those of the start
                tensor.uniform_(0.5, 1.5)
            copied.copy_(tensor)
    layers = [oracle.layer1, oracle.layer4] if name == "resnet18" else [oracle.features[3], oracle.features[17]]
    seen = []
    for layer in layers:
        layer.register_forward_hook(lambda m, i, o: seen.append(o))
    oracle(x)
    features = model.encode(x)
    torch.testing.assert_close(features[0], seen[0])
    torch.testing.assert_close(features[-1], seen[1])


def test_dinov2_features_are_normalised_patch_tokens_of_the_tapped_layers():
    from transformers import Dinov2Model

    model = build().eval()
    oracle = Dinov2Model(model.backbone.body.config).eval()
    oracle.load_state_dict(model.backbone.body.state_dict())
    x = torch.randn(2, 3, 42, 70)  # a grid of 3 x 5, the position embedding has 37 x 37
    hidden = oracle(x, output_hidden_states=True).hidden_states
    for tap, feature in enumerate(model.encode(x)):
        tokens = oracle.layernorm(hidden[tap + 1])[:, 1:]  # 4 layers, 4 taps; the class token is left out
        torch.testing.assert_close(feature, tokens.mT.unflatten(-1, (3, 5)))


def test_a_dinov2_from_scratch_knows_positions_and_starts_with_mimetic_attention():
    body = build(head="linear").backbone.body
    places = body.embeddings.position_embeddings[0, 1:].unflatten(0, (37, 37))
    distance = (places - places[18, 18]).square().sum(-1)
    assert distance.argmin() == 18 * 37 + 18
    assert distance[18, 20] > distance[18, 19] > 0  # neighbours are nearest, along rows
    assert distance[20, 18] > distance[19, 18] > 0  # and columns
    for layer in body.encoder.layer:
        q, k, v, o = (getattr(layer.attention, f"{name}_proj").weight for name in "qkvo")
        torch.testing.assert_close(q.mT @ k, 0.7 * torch.eye(32), atol=1e-5, rtol=0)
        torch.testing.assert_close(o @ v, -0.4 * torch.eye(32), atol=1e-5, rtol=0)


def test_the_gated_dinov2_keeps_its_own_attention_at_the_start():
    tiny = models.BACKBONES["dinov2-tiny"]
    models.BACKBONES["dinov2-gated"] = dataclasses.replace(tiny, numbers=tiny.numbers | {"use_swiglu_ffn": True})
    layer = build("dinov2-gated", "linear").backbone.body.encoder.layer[0]
    assert not torch.allclose(layer.attention.q_proj.weight, layer.attention.k_proj.weight, atol=1e-3)


def test_convolutions_of_a_mit_from_scratch_start_as_in_segformers_code():
    block = build("mit-tiny", "linear").backbone.stages[3].blocks[0]
    depthwise = block.mlp.dwconv.dwconv
    assert depthwise.weight.std().item() == pytest.approx((2 / 9) ** 0.5, rel=0.1)  # He et al. 2015, fan out
    assert block.mlp.fc1.weight.std().item() == pytest.approx(0.02, rel=0.1)


def test_attention_is_the_same_function_in_training_and_inference():
    model = build(dropout=0.0, norm="none")
    images = torch.randn(2, 3, 42, 42)
    trained = model.train()(images)
    assert model.backbone.body.config._attn_implementation == "eager"  # plain products train faster on a CPU
    with torch.inference_mode():
        inferred = model.eval()(images)
    assert model.backbone.body.config._attn_implementation == "sdpa"
    torch.testing.assert_close(trained, inferred, rtol=1e-4, atol=1e-5)


# ---- freezing ----


@pytest.mark.parametrize("backbone", ["dinov2-tiny", "resnet18"])
def test_a_frozen_backbone_does_not_move_in_training(backbone):
    model = build(backbone, "fpn", freeze_backbone=True).train()
    before = {k: v.clone() for k, v in model.backbone.state_dict().items()}
    assert not any(m.training for m in model.backbone.modules())
    assert model.head.training
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(torch.randn(2, 3, 64, 64)).square().mean().backward()
    optimizer.step()
    assert all(torch.equal(v, before[k]) for k, v in model.backbone.state_dict().items())
    assert count_params(model)[1] == count_params(model.head)[0]


# ---- pretrained weights ----


def save_dinov2(folder, **numbers):
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(5)
    row = BACKBONES["dinov2-tiny"].numbers | numbers
    net = Dinov2Model(Dinov2Config(**row, image_size=518, patch_size=14))
    net.save_pretrained(folder)
    return net


def test_dinov2_loads_a_local_folder_and_is_frozen(tmp_path):
    saved = save_dinov2(tmp_path)
    model = build(pretrained=str(tmp_path))
    for key, value in saved.state_dict().items():
        assert torch.equal(model.backbone.body.state_dict()[key], value)
    assert model.pretrained
    assert model.freeze_backbone
    assert not build(pretrained=str(tmp_path), freeze_backbone=False).freeze_backbone


def save_segformer(folder, cls="SegformerForSemanticSegmentation", **numbers):
    import transformers

    torch.manual_seed(5)
    config = transformers.SegformerConfig(**NETWORKS["segformer-tiny"].numbers | numbers)
    net = shake(getattr(transformers, cls)(config)).eval()
    net.save_pretrained(folder)
    return net


def test_mit_and_segformer_load_a_local_folder(tmp_path):
    saved = save_segformer(tmp_path / "whole", num_labels=150)
    classifier = save_segformer(
        tmp_path / "classifier", cls="SegformerForImageClassification"
    )  # as the hub's mit-b0 is
    x = torch.randn(1, 3, 64, 64)
    for folder, source in (("whole", saved), ("classifier", classifier)):
        mit = build("mit-tiny", "fpn", pretrained=str(tmp_path / folder)).eval()
        wanted = source.segformer(x, output_hidden_states=True).hidden_states
        for ours, theirs in zip(mit.encode(x), wanted, strict=True):
            torch.testing.assert_close(ours, theirs)
        assert mit.pretrained
        assert mit.freeze_backbone
    model = build(model="segformer-tiny", pretrained=str(tmp_path / "whole"))  # 3 classes: all but the classifier
    assert torch.equal(model.head.mix[1].running_mean, saved.decode_head.batch_norm.running_mean)
    assert torch.equal(model.head.laterals[2].weight[..., 0, 0], saved.decode_head.linear_projections[2].proj.weight)
    assert model.head.classifiers[0][1].weight.shape[0] == 3
    saved.half().save_pretrained(tmp_path / "half")
    assert {p.dtype for p in build("mit-tiny", pretrained=str(tmp_path / "half")).parameters()} == {torch.float32}
    group = build(model="segformer-tiny", norm="group", pretrained=str(tmp_path / "whole"))
    assert group.pretrained  # the backbone: another head has weights of its own


def test_torchvision_weights_load_from_a_local_file(tmp_path):
    torch.manual_seed(5)
    net = torchvision.models.resnet18()
    torch.save(net.state_dict(), tmp_path / "r18.pth")
    model = build("resnet18", "linear", pretrained=str(tmp_path / "r18.pth"))
    assert torch.equal(model.backbone.stages[3][1].conv2.weight, net.layer4[1].conv2.weight)
    assert model.pretrained


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {k: v for k, v in state.items() if not k.startswith("fc.")},
        lambda state: {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")},
        lambda state: state | {"fc.weight": torch.zeros(7, 512), "fc.bias": torch.zeros(7)},
        lambda state: {"epoch": 3, "state_dict": state, "optimizer": {"state": {0: {"step": torch.zeros(())}}}},
        lambda state: {"model": {f"module.{k}": v for k, v in state.items()}},
        lambda state: {"teacher": {f"module.backbone.{k}": v.half() for k, v in state.items()}, "args": {"lr": 0.1}},
        lambda state: {f"encoder.{k}": v for k, v in state.items()} | {"projector.0.weight": torch.zeros(3, 3)},
        lambda state: (
            {f"encoder_q.{k}": v for k, v in state.items()}
            | {f"encoder_k.{k}": torch.zeros_like(v) for k, v in state.items()}
        ),
    ],
    ids=["no classifier", "old", "other classes", "nested", "of DDP", "teacher", "encoder", "two encoders"],
)
def test_torchvision_weights_load_however_they_are_wrapped(wrap, tmp_path):
    net = torchvision.models.resnet18()
    torch.save(wrap(net.state_dict()), tmp_path / "r18.pth")
    model = build("resnet18", "linear", pretrained=str(tmp_path / "r18.pth"))
    body, stages = net.state_dict(), model.backbone.stages.state_dict()
    expected = [v for k, v in body.items() if not k.startswith("fc.")]
    assert len(stages) == len(expected)
    for ours, theirs in zip(stages.values(), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-7)  # half precision is one of the cases


def test_wrong_local_weights_are_refused(tmp_path):
    save_dinov2(tmp_path / "wide", hidden_size=64)
    torch.save(torchvision.models.resnet34().state_dict(), tmp_path / "r34.pth")
    (tmp_path / "text.pth").write_text("not weights")
    state = torchvision.models.resnet18().state_dict()
    torch.save({k: v for k, v in state.items() if not k.startswith("layer4")}, tmp_path / "part.pth")
    torch.save([torch.zeros(3), "text"], tmp_path / "list.pth")
    torch.save(torch.zeros(3), tmp_path / "tensor.pth")
    save_dinov2(tmp_path / "dino")
    for name, config in (("torn", '{"model_type": "dinov2", "hid'), ("listed", "[3]"), ("empty", None), ("odd", None)):
        shutil.copytree(tmp_path / "dino", tmp_path / name)
        (tmp_path / name / "config.json").unlink()
        if config:
            (tmp_path / name / "config.json").write_text(config)
    typed = json.loads((tmp_path / "dino" / "config.json").read_text()) | {"hidden_size": "wide"}
    (tmp_path / "odd" / "config.json").write_text(json.dumps(typed))
    save_segformer(tmp_path / "deep", depths=[1, 1, 2, 1])
    save_segformer(tmp_path / "encoder", cls="SegformerModel")
    for options, words in (
        ({"pretrained": str(tmp_path / "none")}, "no such file"),
        ({"pretrained": str(tmp_path / "wide")}, "hidden_size"),
        ({"pretrained": str(tmp_path)}, "does not hold"),
        ({"backbone": "resnet18", "pretrained": str(tmp_path / "r34.pth")}, "does not hold"),
        ({"backbone": "resnet18", "pretrained": str(tmp_path / "text.pth")}, "text.pth"),
        (
            {"backbone": "resnet18", "pretrained": str(tmp_path / "list.pth")},
            "its 0 tensors 0 fit the network's 122",
        ),
        ({"backbone": "resnet18", "pretrained": str(tmp_path / "tensor.pth")}, "of its 1 tensors 0 fit"),
        (
            {"backbone": "resnet18", "pretrained": str(tmp_path / "part.pth")},
            "92 tensors 92 .*layer4.0.conv1",
        ),
        ({"backbone": "resnet18", "pretrained": str(tmp_path / "dino")}, "does not hold"),
        *(({"pretrained": str(tmp_path / name)}, "not hold") for name in ("torn", "odd", "listed", "empty", "r34.pth")),
        ({"backbone": "swin-mini", "pretrained": str(tmp_path / "r34.pth")}, "does not hold"),
        ({"backbone": "mit-tiny", "pretrained": str(tmp_path / "deep")}, "depths"),
        ({"backbone": "mit-tiny", "pretrained": str(tmp_path / "dino")}, "is of a dinov2"),
        ({"backbone": "dinov2-tiny", "pretrained": str(tmp_path / "encoder")}, "is of a segformer"),
        ({"model": "segformer-tiny", "pretrained": str(tmp_path / "deep")}, "depths"),
        ({"model": "segformer-tiny", "pretrained": str(tmp_path / "encoder")}, r"tensors are not there, decode_head"),
        ({"model": "fcn_resnet50", "pretrained": str(tmp_path / "r34.pth")}, "does not hold"),
        ({"model": "lite_deeplabv3", "pretrained": str(tmp_path / "r34.pth")}, "does not hold"),
    ):
        with pytest.raises(ModelError, match=words) as error:
            build(**options)
        assert "\n" not in str(error.value)


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """No network (connections are refused at once) and empty caches."""
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for table in (BACKBONES, NETWORKS):
        for name in ("dinov2-tiny", "mit-tiny", "segformer-tiny"):
            if name in table:
                table[name] = dataclasses.replace(table[name], weights=str(tmp_path / "absent"))


@pytest.mark.parametrize(
    "net",
    [dict(backbone=name) for name in ("dinov2-tiny", "resnet18", "mobilenet_v3_large", "swin-mini", "mit-tiny")]
    + [dict(model=name) for name in ("segformer-tiny", "lite_deeplabv3", "fcn_resnet50")],
    ids=lambda net: next(iter(net.values())),
)
def test_without_a_network_auto_trains_from_scratch_and_require_is_an_error(offline, net):
    model = build(**net, pretrained="auto")
    assert not model.pretrained
    assert not model.freeze_backbone
    assert "cannot be reached" in model.pretrained_error
    with pytest.raises(ModelError, match="--pretrained require"):
        build(**net, pretrained="require")


# ---- checkpoints ----


def test_options_survive_the_checkpoint(tmp_path):
    options = {"taps": 1, "norm": "group", "dropout": 0.3, "fuse": False, "upsample": "learned", "output_stride": 16}
    save(tmp_path / "a.pt", build("resnet18", "fpn", **options))
    loaded, _ = load_checkpoint(tmp_path / "a.pt")
    assert {k: loaded.build[k] for k in options} == options
    save(tmp_path / "b.pt", build("resnet18", "fpn", aux=True, freeze_backbone=True))
    loaded, _ = load_checkpoint(tmp_path / "b.pt")
    assert loaded.freeze_backbone
    assert loaded.aux_head is not None


def test_a_failed_save_leaves_the_old_file_and_no_litter(tmp_path, monkeypatch):
    model = build()
    save(tmp_path / "a.pt", model)
    before = (tmp_path / "a.pt").read_bytes()

    def broken(checkpoint, file):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", broken)
    with pytest.raises(OSError, match="disk full"):
        save(tmp_path / "a.pt", model)
    assert (tmp_path / "a.pt").read_bytes() == before
    assert os.listdir(tmp_path) == ["a.pt"]


def test_files_that_are_no_checkpoint_are_named(tmp_path):
    model = build()
    save(tmp_path / "good.pt", model)
    (tmp_path / "cut.pt").write_bytes((tmp_path / "good.pt").read_bytes()[:1000])
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    checkpoint = torch.load(tmp_path / "good.pt", weights_only=True)
    torch.save(checkpoint | {"format": 99}, tmp_path / "newer.pt")
    torch.save(checkpoint | {"state_dict": dict(list(checkpoint["state_dict"].items())[1:])}, tmp_path / "part.pt")
    torch.save(checkpoint | {"build": checkpoint["build"] | {"head": "nose"}}, tmp_path / "head.pt")
    for name, words in (
        ("none.pt", "python train.py --head fpn"),
        ("cut.pt", "damaged"),
        ("weights.pt", "not a checkpoint"),
        ("newer.pt", "newer"),
        ("part.pt", "does not fit"),
        ("head.pt", "linear, unet, fpn"),
    ):
        with pytest.raises(ModelError, match=words) as error:
            load_checkpoint(tmp_path / name)
        assert name in str(error.value) or name == "head.pt"
        assert "\n" not in str(error.value)


def opened(content, path):
    """Whether load_checkpoint() takes a file of that content, or refuses it in one line that names it; nothing else."""
    torch.save(content, path)
    line, dtypes = "", set()
    try:
        dtypes = {p.dtype for p in load_checkpoint(path)[0].parameters()}
    except ModelError as error:
        line = str(error)
    assert "\n" not in line
    assert line or dtypes == {torch.float32}
    return not line


def test_a_made_up_checkpoint_loads_or_is_refused_in_one_line(tmp_path):
    save(tmp_path / "a.pt", build(model="unet", width=1), metrics={"miou": 1.0}, args={"size": [32, 32]}, run="r")
    good = torch.load(tmp_path / "a.pt", weights_only=True)
    assert opened(good, tmp_path / "b.pt")
    refused = 0
    for what, content in made_up(good, tries=2):
        try:
            refused += not opened(content, tmp_path / "b.pt")
        except Exception as error:
            raise AssertionError(f"{what}: {type(error).__name__}: {error}") from error
    assert refused > 60


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_another_precision_become_float32(dtype, tmp_path):
    model = build(model="unet", width=1)
    save(tmp_path / "a.pt", model)
    content = torch.load(tmp_path / "a.pt", weights_only=True)
    state = {
        k: t.to(dtype) if torch.is_tensor(t) and t.is_floating_point() else t for k, t in model.state_dict().items()
    }
    assert opened(content | {"state_dict": state}, tmp_path / "a.pt")
    assert not opened(content | {"state_dict": {k: t.int() for k, t in state.items()}}, tmp_path / "a.pt")
    key = next(iter(state))
    assert not opened(content | {"state_dict": state | {key: state[key] * math.nan}}, tmp_path / "a.pt")


def test_no_flipped_bit_changes_a_weight_unseen(tmp_path):
    save(tmp_path / "a.pt", build(model="unet", width=1))
    whole, draw = (tmp_path / "a.pt").read_bytes(), random.Random(0)
    state, refused = load_checkpoint(tmp_path / "a.pt")[1]["state_dict"], 0
    for place in draw.sample(range(len(whole)), 60):
        (tmp_path / "b.pt").write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
        try:
            _, checkpoint = load_checkpoint(tmp_path / "b.pt")
        except ModelError as error:
            refused += "damaged" in str(error)
        else:  # what was hit is between the parts of the zip file
            assert all(torch.equal(tensor, state[name]) for name, tensor in checkpoint["state_dict"].items())
    assert refused > 30
    for length in range(0, len(whole), len(whole) // 20):
        (tmp_path / "b.pt").write_bytes(whole[:length])
        with pytest.raises(ModelError, match="damaged"):
            load_checkpoint(tmp_path / "b.pt")


# ---- files ----


def test_nothing_but_a_file_is_replaced_and_a_link_is_followed(tmp_path):
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for place in ("folder", "pipe", "/dev/null"):
        with pytest.raises(ModelError, match="name a file"):
            models.write_text(tmp_path / place, "text")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    (tmp_path / "folder" / "a").write_text("old")
    (tmp_path / "link").symlink_to("folder/a")
    models.write_text(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "folder" / "a").read_text() == "new"
    assert sorted(os.listdir(tmp_path)) == ["folder", "link", "pipe"]


def test_several_files_take_their_places_together(tmp_path):
    (tmp_path / "a").write_text("old")

    def half():
        with models.replacing(tmp_path / "a") as folder:
            folder.mkdir()
            (folder / "a").write_text("half")
            raise KeyError

    with pytest.raises(KeyError):
        half()
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("a", "old")]
    with models.replacing(tmp_path / "a") as folder:
        folder.mkdir()
        for name in ("a", "a.data"):
            (folder / name).write_text(name)
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"a": "a", "a.data": "a.data"}


def test_a_full_disk_names_the_file_and_leaves_it(tmp_path):
    save(tmp_path / "a.pt", build(model="unet", width=1))
    before, (soft, hard) = (tmp_path / "a.pt").read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))  # a stand-in: no file may be larger
    try:
        with pytest.raises(OSError, match=r"a\.pt") as error:
            save(tmp_path / "a.pt", build(model="unet", width=1))
        assert error.value.errno == errno.EFBIG
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (tmp_path / "a.pt").read_bytes() == before
    assert os.listdir(tmp_path) == ["a.pt"]


def test_what_a_killed_process_was_writing_goes_and_what_a_living_one_writes_stays(tmp_path):
    with subprocess.Popen([sys.executable, "-c", ""]) as gone:
        pass
    names = [f"a.{gone.pid}.tmp", f"a.{os.getppid()}.tmp", "a.b.tmp", f"c.{gone.pid}.tmp"]
    for name in names:
        (tmp_path / name).write_text("half")
    models.write_text(tmp_path / "a", "whole")
    assert sorted(os.listdir(tmp_path)) == sorted(["a", *names[1:]])
    models.remove_litter(tmp_path)
    assert sorted(os.listdir(tmp_path)) == sorted(["a", *names[1:3]])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"backbone": "resnet"}, "resnet18, resnet34"),
        ({"head": "fpm"}, "linear, unet, fpn, ppm, aspp, ocr"),
        ({"taps": 2}, "1 or 4"),
        ({"norm": "layer"}, "batch, group, none"),
        ({"upsample": "nearest"}, "bilinear or learned"),
        ({"dropout": 1.0}, "--dropout"),
        ({"num_classes": 1}, "two classes"),
        ({"output_stride": 8}, "dilation cannot replace.*resnet18"),
        ({"backbone": "swin_t", "output_stride": 8}, "swin_t has strides"),
        ({"backbone": "mit-b0", "output_stride": 8}, "mit-b0 has strides"),
        ({"model": "segformer-b0", "output_stride": 8}, "knows --norm, --dropout"),
        ({"model": "segformer"}, "segformer-b0, segformer-b1"),
        ({"backbone": "resnet18", "output_stride": 4}, "8, 16 or 32"),
        ({"head": "unet", "fuse": False}, "--no-fuse is for linear, fpn"),
        ({"aux": True, "taps": 1}, "--taps 4"),
    ],
)
def test_wrong_names_and_combinations_list_the_right_ones(options, words):
    with pytest.raises(ModelError, match=words):
        build(**options)


# ---- whole networks: U-Net, ENet, FCN with max-unpooling, Mask2Former ----

SMALL_NETWORKS = {"unet": {"width": 8}, "enet": {}, "fcn_maxunpool": {}, "mask2former-tiny": {}}


def build_whole(name, num_classes=3, **options):
    torch.manual_seed(0)
    return build_model(num_classes=num_classes, model=name, **SMALL_NETWORKS[name], **options)


@pytest.mark.parametrize("name", SMALL_NETWORKS)
def test_a_whole_network_keeps_the_contract(name, tmp_path):
    model = build_whole(name)
    images = torch.randn(2, 3, 45, 61)
    features = model.encode(images)
    padded = [n + -n % model.stride for n in (45, 61)]
    assert [list(f.shape[1:]) for f in features] == [
        [c, *(n // s for n in padded)] for c, s in zip(model.channels, model.strides, strict=True)
    ]
    logits = model(images)
    assert logits.shape == (2, 3, 45, 61)
    logits.square().mean().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    save(tmp_path / "a.pt", model.eval())
    loaded, _ = load_checkpoint(tmp_path / "a.pt")
    with torch.inference_mode():
        exact = model(images)
        assert torch.equal(loaded(images), exact)
        with torch.autocast("cpu", torch.bfloat16):
            rough = model(images)
    assert rough.isfinite().all()
    assert (rough.float() - exact).abs().mean() < 0.1 * exact.abs().mean()


@pytest.mark.parametrize("name", SMALL_NETWORKS)
@pytest.mark.parametrize("num_classes", [2, 19])
def test_training_a_whole_network_lowers_its_loss(name, num_classes):
    model = build_whole(name, num_classes)
    images, target = torch.randn(1, 3, 64, 64), torch.randint(num_classes, (1, 8, 8)).repeat_interleave(8, 1)
    target = target.repeat_interleave(8, 2)
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=1e-2), []
    for _ in range(3):
        torch.manual_seed(0)  # dropout, and the points of Mask2Former's loss
        if hasattr(model.head, "queries"):
            loss = mask_set_loss(model.head.queries(model.encode(images)), target, 255, stride=4)
        else:
            loss = F.cross_entropy(model(images), target)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("name", "num_classes", "low", "high"),
    [
        ("unet", 2, 31_037_698, 31_037_698),  # milesial/Pytorch-UNet: the same layers, two classes
        ("enet", 19, 350_000, 370_000),  # the paper's 0.37 M, and 0.35 M of a re-implementation
        ("mask2former-swin-tiny", 133, 46.5e6, 47.5e6),  # the paper's tables: 47, 69 and 107 M
        ("mask2former-swin-small", 133, 68.5e6, 69.5e6),
        ("mask2former-swin-base", 133, 106.5e6, 107.5e6),
    ],
)
def test_whole_networks_have_the_published_parameters(name, num_classes, low, high):
    assert low <= count_params(on_meta(num_classes=num_classes, model=name))[0] <= high


# ---- U-Net ----


def test_unets_parameters_by_hand():
    def double(c_in, c):
        return 9 * c_in * c + 9 * c * c + 2 * 2 * c  # two convolutions without bias, two BatchNorms

    for width in (8, 64):
        c = [width * 2**i for i in range(5)]
        down = double(3, c[0]) + sum(double(a, b) for a, b in itertools.pairwise(c))
        up = sum(4 * b * a + a + double(2 * a, a) for a, b in itertools.pairwise(c))  # 2x2 transposed, with bias
        model = on_meta(num_classes=19, model="unet", width=width)
        assert model.channels == c
        assert count_params(model)[0] == down + up + c[0] * 19 + 19
    assert count_params(on_meta(num_classes=19, model="unet"))[0] == count_params(model)[0]  # 64 is the default


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"model": "enet", "width": 32}, "--width 32: enet"),
        ({"backbone": "resnet18", "width": 32}, "--width is for --model unet"),
        ({"model": "unet", "width": 0}, "--width 0"),
        ({"model": "enet", "norm": "group"}, "--norm group: enet is a whole network, which knows none"),
        ({"model": "mask2former-tiny", "aux": True}, "--aux True: mask2former-tiny"),
        ({"model": "unet", "pretrained": "require"}, "no pretrained weights of unet"),
        ({"model": "enet", "pretrained": "some.pth"}, "no pretrained weights of enet"),
    ],
)
def test_options_of_other_networks_are_refused(options, words):
    with pytest.raises(ModelError, match=words):
        build_model(num_classes=3, **options)


# ---- max-unpooling, ENet ----


def test_max_unpooling_equals_torchs_with_ties_and_gradients():
    torch.manual_seed(0)
    for pooled in (torch.randn(2, 5, 8, 12), torch.randn(2, 5, 8, 12).relu(), torch.randint(3, (2, 5, 8, 12)).float()):
        small, indices = F.max_pool2d(pooled, 2, return_indices=True)
        ours, theirs = (torch.randn_like(small).requires_grad_() for _ in range(2))
        theirs.data = ours.data.clone()
        out, oracle = models.max_unpool(ours, pooled), F.max_unpool2d(theirs, indices, 2)
        assert torch.equal(out, oracle)
        weight = torch.randn_like(out)
        (out * weight).sum().backward()
        (oracle * weight).sum().backward()
        assert torch.equal(ours.grad, theirs.grad)
    assert (pooled == small.repeat_interleave(2, 2).repeat_interleave(2, 3)).sum() > small.numel()  # there were ties


def test_max_unpooling_exports_for_any_size(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")

    class Around(nn.Module):
        def forward(self, x):
            x = F.pad(x, (0, -x.shape[3] % 2, 0, -x.shape[2] % 2)).relu()
            return models.max_unpool(F.max_pool2d(x, 2) + 1, x).argmax(1)

    free = {0: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}
    example = torch.randn(2, 3, 9, 13)
    program = torch.onnx.export(Around().eval(), (example,), dynamo=True, dynamic_shapes=(free,), verbose=False)
    program.save(tmp_path / "a.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "a.onnx")
    for size in ((9, 13), (6, 8), (31, 18)):
        x = torch.randn(1, 3, *size)
        (out,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        assert torch.equal(torch.from_numpy(out), Around()(x))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["unet", "enet", "fcn_maxunpool"])
def test_whole_networks_export_for_any_size(name, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    model = build_whole(name)
    model(torch.randn(2, 3, 64, 64))  # BatchNorm statistics of its own
    free = {2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}
    example = torch.randn(1, 3, 70, 90)
    torch.onnx.export(model.eval(), (example,), dynamo=True, dynamic_shapes=(free,), verbose=False).save(
        tmp_path / "a.onnx"
    )
    session = onnxruntime.InferenceSession(tmp_path / "a.onnx")
    x = torch.randn(1, 3, 45, 61)
    (out,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.inference_mode():
        assert torch.equal(torch.from_numpy(out).argmax(1), model(x).argmax(1))


def test_enet_has_the_papers_stages():
    model = on_meta(num_classes=12, model="enet")
    features = model.encode(torch.zeros(1, 3, 512, 512, device="meta"))
    assert [tuple(f.shape[1:]) for f in features] == [(16, 256, 256), (64, 128, 128), (128, 64, 64)]  # table 1
    convs = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert sorted(m.dilation[0] for m in convs if m.dilation[0] > 1) == [2, 2, 4, 4, 8, 8, 16, 16]
    assert sum(m.kernel_size == (5, 1) for m in convs) == sum(m.kernel_size == (1, 5) for m in convs) == 4
    assert sum(m.p == 0.01 for m in model.modules() if isinstance(m, nn.Dropout2d)) == 5  # stage 1; 0.1 later
    assert sum(m.p == 0.1 for m in model.modules() if isinstance(m, nn.Dropout2d)) == 17 + 5


# ---- Mask2Former ----


def mask2former_oracle(model):
    """transformers' own network around the same modules."""
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation

    head = model.head
    config = Mask2FormerConfig(
        backbone_config=model.backbone.body.config,
        num_labels=head.class_predictor.out_features - 1,
        **models.NETWORKS["mask2former-tiny"].numbers["decoder"],
    )
    net = Mask2FormerForUniversalSegmentation(config)
    net.model.pixel_level_module.encoder = model.backbone.body
    net.model.pixel_level_module.decoder = head.pixel_decoder
    net.model.transformer_module, net.class_predictor = head.transformer, head.class_predictor
    return net


def blocks(n=2, size=64, num_classes=3):
    """Targets (n, size, size) of squares of 8 pixels."""
    g = torch.Generator().manual_seed(3)
    small = torch.randint(num_classes, (n, size // 8, size // 8), generator=g)
    return small.repeat_interleave(8, 1).repeat_interleave(8, 2)


def test_mask2formers_logits_give_transformers_segmentation():
    from types import SimpleNamespace

    from transformers.models.mask2former.image_processing_mask2former import Mask2FormerImageProcessor

    model = build_whole("mask2former-tiny").eval()
    images = torch.randn(2, 3, 64, 96)
    with torch.inference_mode():
        classes, masks = model.head.queries(model.encode(images))[0]
        theirs = mask2former_oracle(model).eval()(pixel_values=images)
        torch.testing.assert_close(classes, theirs.class_queries_logits)
        torch.testing.assert_close(masks, theirs.masks_queries_logits)
        # The processor resizes masks to 384 x 384 before it sums them, we sum at stride 4: compare at one size.
        g = torch.Generator().manual_seed(0)
        classes, masks = torch.randn(2, 10, 4, generator=g), 5 * torch.randn(2, 10, 384, 384, generator=g)
        outputs = SimpleNamespace(class_queries_logits=classes, masks_queries_logits=masks)
        wanted = Mask2FormerImageProcessor().post_process_semantic_segmentation(outputs)
        logits = models.class_logits(classes, masks)
    assert torch.equal(logits.argmax(1), torch.stack(wanted))
    summed = torch.einsum("nqk,nqhw->nkhw", classes.softmax(-1)[..., :-1], masks.sigmoid())
    torch.testing.assert_close(logits.softmax(1), summed / summed.sum(1, keepdim=True))


def test_mask2formers_loss_equals_transformers():
    model = build_whole("mask2former-tiny")
    images, target = torch.randn(2, 3, 64, 64), blocks()
    target[1][target[1] == 2] = 0  # the second image has two classes, the first three
    labels = [t.unique() for t in target]
    masks = [(t == k[:, None, None]).float() for t, k in zip(target, labels, strict=True)]
    oracle, wanted = mask2former_oracle(model), [model.head.class_predictor.weight, *model.backbone.parameters()]
    wanted = [p for p in wanted if p.requires_grad]
    torch.manual_seed(7)
    ours = mask_set_loss(model.head.queries(model.encode(images)), target, 255, stride=4)
    gradients = torch.autograd.grad(ours, wanted)
    torch.manual_seed(7)
    theirs = oracle(pixel_values=images, mask_labels=masks, class_labels=labels).loss
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(gradients, torch.autograd.grad(theirs, wanted), rtol=1e-3, atol=1e-4)


def random_outputs(n, num_classes=3, size=16, dtype=torch.float32):
    g = torch.Generator().manual_seed(5)
    classes, masks = torch.randn(n, 10, num_classes + 1, generator=g), torch.randn(n, 10, size, size, generator=g)
    return classes.to(dtype).requires_grad_(), masks.to(dtype).requires_grad_()


def set_loss(outputs, target, **options):
    torch.manual_seed(0)
    return mask_set_loss([outputs], target, 255, **{"points": 500} | options)


def test_ignored_pixels_are_out_of_mask2formers_loss():
    target = blocks()
    target[:, :32] = 255
    classes, masks = random_outputs(2)
    loss = set_loss((classes, masks), target)
    _, gradient = torch.autograd.grad(loss, [classes, masks])
    assert gradient[:, :, 9:].abs().sum() > 0
    assert gradient[:, :, :7].abs().sum() == 0  # rows 0 to 7 of the masks lie over rows 0 to 31 of the target
    other = masks.detach().clone()
    other[:, :, :7] = 50 * torch.randn(2, 10, 7, 16)
    torch.testing.assert_close(set_loss((classes, other), target), loss)


def test_images_without_a_label_are_out_of_mask2formers_loss():
    target = blocks()
    classes, masks = random_outputs(2)
    alone = set_loss((classes[:1], masks[:1]), target[:1])
    target[1] = 255
    both = set_loss((classes, masks), target)
    torch.testing.assert_close(both, alone)
    assert all(g[1].abs().sum() == 0 for g in torch.autograd.grad(both, [classes, masks]))
    nothing = set_loss((classes, masks), torch.full_like(target, 255))
    assert nothing == 0
    assert all((g == 0).all() for g in torch.autograd.grad(nothing, [classes, masks]))


def test_a_set_of_masks_in_any_order_is_matched_and_a_wrong_class_costs_its_cross_entropy():
    target = blocks(1)
    truth = F.one_hot(target, 3).permute(0, 3, 1, 2).float()
    masks = torch.full((1, 10, 64, 64), -20.0)
    masks[:, [4, 1, 7]] = 40 * truth - 20  # class 0 is found by query 4, and so on
    classes = torch.full((1, 10, 4), -20.0)
    classes[:, :, 3] = 20  # "no object"
    for query, k in ((4, 0), (1, 1), (7, 2)):
        classes[0, query, 3], classes[0, query, k] = -20, 20
    perfect = set_loss((classes, masks), target)
    assert set_loss((classes, -masks), target) > perfect + 50
    swapped = set_loss((classes[..., [1, 0, 2, 3]], masks), target)  # two queries, 40 nats each, of 3 + 7 "no object"
    torch.testing.assert_close(swapped - perfect, torch.tensor(2 * 2 * 40 / (3 + 7 * 0.1)))
    logits = models.class_logits(classes, masks)
    assert torch.equal(logits.argmax(1), target)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_mask2formers_loss_is_computed_in_float32(dtype):
    target = blocks()
    classes, masks = random_outputs(2, dtype=dtype)
    large = (masks.detach() * 1000).requires_grad_()  # a sum over the points is beyond 65504, the largest of float16
    exact = set_loss((classes.detach().float(), large.detach().float()), target)
    with torch.autocast("cpu", torch.bfloat16):
        loss = set_loss((classes, large), target)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, exact)
    assert all(g.isfinite().all() for g in torch.autograd.grad(loss, [classes, large]))


def test_mask2former_trains_under_autocast_also_after_inference():
    model, images = build_whole("mask2former-tiny"), torch.randn(2, 3, 50, 70)
    with torch.inference_mode():
        model(images)  # transformers keeps the position embedding of the last size
    with torch.autocast("cpu", torch.bfloat16):
        features = model.encode(images)
        loss = mask_set_loss(model.head.queries(features), blocks(2, 80)[:, :50, :70], 255, stride=4)
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def test_padding_is_no_part_of_mask2formers_loss():
    model = build_whole("mask2former-tiny")
    features, target = model.encode(torch.randn(1, 3, 50, 70)), blocks(1, 80)[:, :50, :70]
    padded = F.pad(target, (0, 96 - 70, 0, 64 - 50), value=255)
    torch.manual_seed(0)
    loss = mask_set_loss(model.head.queries(features), target, 255, stride=4)
    torch.manual_seed(0)
    torch.testing.assert_close(loss, mask_set_loss(model.head.queries(features), padded, 255))


def test_the_number_of_masks_is_a_mean_over_processes(tmp_path):
    target, outputs = blocks(), random_outputs(2)
    alone = set_loss(outputs, target)
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.FileStore(str(tmp_path / "s"), 1), rank=0, world_size=1
    )
    try:
        torch.testing.assert_close(set_loss(outputs, target), alone)
    finally:
        torch.distributed.destroy_process_group()


def save_mask2former(folder, num_classes, **numbers):
    row = models.NETWORKS["mask2former-tiny"]
    decoder = row.numbers["decoder"] | numbers
    models.NETWORKS["mask2former-tiny"] = dataclasses.replace(row, numbers=row.numbers | {"decoder": decoder})
    torch.manual_seed(5)
    net = mask2former_oracle(build_model(num_classes=num_classes, model="mask2former-tiny"))
    models.NETWORKS["mask2former-tiny"] = row
    net.save_pretrained(folder)
    return net


def test_mask2former_loads_a_local_folder_and_only_another_k_starts_anew(tmp_path):
    saved = save_mask2former(tmp_path, 3)
    same, other = (build_whole("mask2former-tiny", k, pretrained=str(tmp_path)) for k in (3, 5))
    for model in (same, other):
        assert model.pretrained
        assert model.freeze_backbone
        for part, whole in (
            (model.backbone.body, saved.model.pixel_level_module.encoder),
            (model.head.pixel_decoder, saved.model.pixel_level_module.decoder),
            (model.head.transformer, saved.model.transformer_module),
        ):
            for key, value in whole.state_dict().items():
                assert torch.equal(part.state_dict()[key], value), key
    assert torch.equal(same.head.class_predictor.weight, saved.class_predictor.weight)
    assert other.head.class_predictor.weight.shape == (6, 32)
    assert not any(p.requires_grad for p in other.backbone.parameters())
    assert other(torch.randn(1, 3, 40, 40)).shape == (1, 5, 40, 40)


def test_another_mask2former_is_refused_and_auto_without_a_network_starts_from_scratch(tmp_path, offline):
    save_mask2former(tmp_path, 3, num_queries=7)
    with pytest.raises(ModelError, match=r"num_queries': 7"):
        build_whole("mask2former-tiny", pretrained=str(tmp_path))
    model = build_whole("mask2former-tiny", pretrained="auto")
    assert not model.pretrained
    assert "cannot be reached" in model.pretrained_error


@pytest.mark.parametrize("backbone", ["mobilenet_v2", "mobilenet_v3_large"])
def test_batchnorm_statistics_of_mobilenets_settle_within_fifty_steps(backbone):
    norms = [m for m in build(backbone, "linear").modules() if isinstance(m, nn.BatchNorm2d)]
    assert all((1 - m.momentum) ** 50 < 0.01 for m in norms)


# ---- resizing -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(45, 61), (9, 8), (7, 200), (8, 9)])
@pytest.mark.parametrize("autocast", [False, True])
def test_enlarging_is_bilinear_interpolation(size, autocast):
    x = torch.randn(2, 3, 7, 8).to(memory_format=torch.channels_last).requires_grad_()
    y = x.detach().clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found, expected = models.enlarge(x, size), F.interpolate(y, size=size, mode="bilinear", align_corners=False)
    torch.testing.assert_close(found, expected)
    grad = torch.randn_like(expected)
    found.backward(grad)
    expected.backward(grad)
    torch.testing.assert_close(x.grad, y.grad)
