"""Networks: the contract for every row, published numbers, torchvision and transformers as oracles, checkpoints."""

import dataclasses
import os

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

import models
from models import BACKBONES, HEADS, ModelError, build_model, count_params, load_checkpoint, save_checkpoint

TRAINABLE_HERE = ["dinov2-tiny", "resnet18", "mobilenet_v2"]  # one of each builder; ResNet-50 against torchvision below
DATA = {"name": "toy", "classes": ["a", "b", "c"], "palette": [[0, 0, 0]] * 3, "size": [32, 32], "ignore_index": 255}


def build(backbone="dinov2-tiny", head="fpn", num_classes=3, **options):
    torch.manual_seed(0)
    return build_model(num_classes=num_classes, backbone=backbone, head=head, **options)


def save(path, model, **options):
    save_checkpoint(path, model, **{"data": DATA, "pretrained": "no", "command": "test"} | options)


def on_meta(**options):
    with torch.device("meta"):
        return build_model(**options)


# ---- the contract ----


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("backbone", TRAINABLE_HERE)
def test_any_size_in_logits_of_that_size_out_and_gradients_everywhere(backbone, head):
    model = build(backbone, head)
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


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("backbone", TRAINABLE_HERE)
def test_forward_is_encode_decode_resize_and_padding_is_cropped(backbone, head):
    model = build(backbone, head).eval()
    images = torch.randn(1, 3, 50, 70)
    with torch.inference_mode():
        by_hand = model.resize(model.decode(model.encode(images)), (50, 70))
        padded = F.pad(images, (0, -70 % model.stride, 0, -50 % model.stride))
        torch.testing.assert_close(model(images), by_hand)
        torch.testing.assert_close(model(images), model(padded)[..., :50, :70])


@pytest.mark.parametrize("head", HEADS)
def test_one_training_step_lowers_the_loss_also_with_a_batch_of_one(head):
    for backbone in ("dinov2-tiny", "mobilenet_v2"):
        model = build(backbone, head, dropout=0.0, norm="batch")
        images, target = torch.randn(1, 3, 64, 64), torch.randint(3, (1, 64, 64))
        losses = []
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
        for _ in range(3):
            loss = F.cross_entropy(model(images), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < losses[0]


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("backbone", TRAINABLE_HERE)
def test_bfloat16_autocast_is_finite_and_close(backbone, head):
    model = build(backbone, head).eval()
    images = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        exact = model(images)
        with torch.autocast("cpu", torch.bfloat16):
            rough = model(images)
    assert rough.isfinite().all()
    assert (rough.float() - exact).abs().max() < 0.15 * max(1.0, exact.abs().max().item())


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


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("backbone", TRAINABLE_HERE)
def test_folding_batchnorm_leaves_none_and_changes_nothing(backbone, head):
    model = build(backbone, head).eval()
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


def test_folding_refuses_a_convolution_that_is_read_twice():
    class Forked(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

        def forward(self, x):
            x = self.conv(x)
            return x + self.norm(x)

    model = Forked().eval()
    randomize_norms(model)
    with pytest.raises(ModelError, match="changed the logits"):
        models.fold_batchnorm(model)


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


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50", "resnet101", "mobilenet_v2"])
def test_convolutional_backbones_are_torchvisions_without_the_classifier(name):
    model = on_meta(num_classes=19, backbone=name, head="linear")
    with torch.device("meta"):
        whole = torchvision.models.get_model(name)
    dropped = whole.fc if name.startswith("resnet") else nn.ModuleList([whole.features[18], whole.classifier])
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


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
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
    torch.manual_seed(0)
    with torch.no_grad():
        for p in (*oracle.parameters(), *model.parameters()):
            p.fill_(0.01) if p.ndim > 1 else None
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


def test_torchvision_weights_load_from_a_local_file(tmp_path):
    torch.manual_seed(5)
    net = torchvision.models.resnet18()
    torch.save(net.state_dict(), tmp_path / "r18.pth")
    model = build("resnet18", "linear", pretrained=str(tmp_path / "r18.pth"))
    assert torch.equal(model.backbone.stages[3][1].conv2.weight, net.layer4[1].conv2.weight)
    assert model.pretrained


def test_wrong_local_weights_are_refused(tmp_path):
    save_dinov2(tmp_path / "wide", hidden_size=64)
    torch.save(torchvision.models.resnet34().state_dict(), tmp_path / "r34.pth")
    (tmp_path / "text.pth").write_text("not weights")
    for options, words in (
        ({"pretrained": str(tmp_path / "none")}, "no such file"),
        ({"pretrained": str(tmp_path / "wide")}, "hidden_size"),
        ({"pretrained": str(tmp_path)}, "does not hold"),
        ({"backbone": "resnet18", "pretrained": str(tmp_path / "r34.pth")}, "does not hold"),
        ({"backbone": "resnet18", "pretrained": str(tmp_path / "text.pth")}, "text.pth"),
    ):
        with pytest.raises(ModelError, match=words):
            build(**options)


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """No network (connections are refused at once) and empty caches."""
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setitem(
        BACKBONES, "dinov2-tiny", dataclasses.replace(BACKBONES["dinov2-tiny"], weights=str(tmp_path / "absent"))
    )


@pytest.mark.parametrize("backbone", ["dinov2-tiny", "resnet18"])
def test_without_a_network_auto_trains_from_scratch_and_require_is_an_error(offline, backbone):
    model = build(backbone, pretrained="auto")
    assert not model.pretrained
    assert not model.freeze_backbone
    assert "cannot be reached" in model.pretrained_error
    with pytest.raises(ModelError, match="--pretrained require"):
        build(backbone, pretrained="require")


# ---- checkpoints ----


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("backbone", TRAINABLE_HERE)
def test_a_checkpoint_gives_the_same_outputs(tmp_path, backbone, head):
    model = build(backbone, head).eval()
    with torch.no_grad():
        for buffer in model.buffers():
            buffer.add_(1)
    save(tmp_path / "a.pt", model, metrics={"miou": 1.5})
    (tmp_path / "a.pt").rename(tmp_path / "renamed.bin")  # nothing is decided from a name
    loaded, checkpoint = load_checkpoint(tmp_path / "renamed.bin")
    images = torch.randn(1, 3, 33, 47)
    with torch.inference_mode():
        assert torch.equal(loaded(images), model(images))
    assert not loaded.training
    assert checkpoint["metrics"] == {"miou": 1.5}
    assert checkpoint["data"] == DATA
    assert torch.load(tmp_path / "renamed.bin", weights_only=True)["format"] == models.FORMAT


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
        ({"output_stride": 8}, "patch size"),
        ({"backbone": "resnet18", "output_stride": 4}, "8, 16 or 32"),
        ({"head": "unet", "fuse": False}, "--no-fuse is for linear, fpn"),
        ({"aux": True, "taps": 1}, "--taps 4"),
    ],
)
def test_wrong_names_and_combinations_list_the_right_ones(options, words):
    with pytest.raises(ModelError, match=words):
        build(**options)
