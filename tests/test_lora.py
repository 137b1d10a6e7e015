"""LoRA: layers against peft's and their merged selves, what is trained and what is not, adapters, the command."""

import copy
import dataclasses
import itertools
import json

import peft
import pytest
import torch
import torch.nn.functional as F
from conftest import count_refused, made_up
from torch import nn

import datasets
import evaluate
import export_onnx
import int8
import lora
import models
import prune
import quantize
import train
from lora import LoRA
from models import ModelError, build_model, load_checkpoint, save_checkpoint

INFO = datasets.open_dataset("synthetic", "val", length=1, size=(40, 56)).info
OPTIONS = dict(rank=2, alpha=6.0, dropout=0.0)


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def stir(model):
    """Give each LoRA layer a B, and a magnitude, that say something; the model."""
    for name, p in model.named_parameters():
        if name.endswith(("lora_B", "magnitude")):
            p.add_(0.2 * noise(*p.shape, seed=p.numel()))
    return model


# ---- against peft ----

CONVS = [dict(kernel_size=3, padding=1), dict(kernel_size=1), dict(kernel_size=3, stride=2, bias=False)]


def with_peft(layer, x, *, dora, rslora):
    """peft's network of one layer with LoRA, ours of the same weights."""
    config = peft.LoraConfig(
        target_modules=["0"], r=2, lora_alpha=6, lora_dropout=0.0, use_dora=dora, use_rslora=rslora
    )
    theirs = peft.get_peft_model(nn.Sequential(copy.deepcopy(layer)), config)
    ours = stir(LoRA(layer, **OPTIONS, dora=dora, rslora=rslora))
    (wrapped,) = (m for m in theirs.modules() if hasattr(m, "base_layer") and hasattr(m, "lora_A"))
    with torch.no_grad():
        wrapped.lora_A["default"].weight.copy_(ours.lora_A)
        wrapped.lora_B["default"].weight.copy_(ours.lora_B)
        if dora:
            magnitude = wrapped.lora_magnitude_vector["default"].weight
            magnitude.copy_(ours.magnitude.view(magnitude.shape))
    return theirs, wrapped, ours


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("arguments", [None, *CONVS], ids=str)
def test_outputs_gradients_and_merged_weights_are_those_of_peft(arguments, dora, rslora):
    torch.manual_seed(0)
    layer, x = (
        (nn.Linear(6, 10), noise(3, 5, 6)) if arguments is None else (nn.Conv2d(6, 10, **arguments), noise(2, 6, 9, 8))
    )
    theirs, wrapped, ours = with_peft(layer, x, dora=dora, rslora=rslora)
    out, expected = ours.train()(x), theirs.train()(x)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    weights = noise(*out.shape, seed=1)
    (out * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(ours.lora_A.grad, wrapped.lora_A["default"].weight.grad, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(ours.lora_B.grad, wrapped.lora_B["default"].weight.grad, rtol=1e-3, atol=1e-4)
    if dora:
        grad = wrapped.lora_magnitude_vector["default"].weight.grad
        torch.testing.assert_close(ours.magnitude.grad, grad.flatten(), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), rtol=1e-4, atol=1e-5)
    ours.merge()
    merged = theirs.merge_and_unload()[0]
    torch.testing.assert_close(ours.base.weight, merged.weight, rtol=1e-4, atol=1e-6)


# ---- merged == not merged ----


def cells():
    """Arguments of layers, and options, in which LoRA must be one layer of the same kind."""
    base = dict(kernel_size=3, padding=1)
    convs = [
        dict(kernel_size=1), base, base | dict(stride=2), base | dict(dilation=2, padding=2), base | dict(groups=2),
        base | dict(padding_mode="reflect"), base | dict(padding_mode="circular", dilation=2), base | dict(bias=False),
        base | dict(padding_mode="replicate", groups=4, stride=2), dict(kernel_size=(3, 1), padding="same"),
        dict(kernel_size=(1, 5), stride=(2, 1), padding=(0, 2), groups=2, dilation=(1, 2)), base | dict(groups=8),
    ]  # fmt: skip
    transposed = [
        dict(kernel_size=2, stride=2), dict(kernel_size=3, stride=2, padding=1, output_padding=1, groups=2),
        dict(kernel_size=3, dilation=2, bias=False), dict(kernel_size=4, stride=2, padding=1, groups=4),
    ]  # fmt: skip
    layers = [(nn.Conv2d, arguments) for arguments in convs] + [(nn.ConvTranspose2d, a) for a in transposed]
    layers += [(nn.Linear, {}), (nn.Linear, dict(bias=False))]
    for (kind, arguments), (dora, rslora), rank in itertools.product(layers, [(0, 0), (1, 0), (0, 1), (1, 1)], (1, 3)):
        yield kind, arguments, dict(dora=bool(dora), rslora=bool(rslora), rank=rank)


def peft_manages(kind, arguments, options, x):
    """Whether peft wraps such a layer, and is after merging what it was before."""
    torch.manual_seed(0)
    config = peft.LoraConfig(
        target_modules=["0"], r=options["rank"], init_lora_weights=False, use_dora=options["dora"],
        use_rslora=options["rslora"],
    )  # fmt: skip
    try:
        model = peft.get_peft_model(nn.Sequential(kind(8, 8, **arguments)), config).eval()
        out = model(x)
        return torch.allclose(out, model.merge_and_unload()(x), rtol=1e-3, atol=1e-3)
    except Exception:
        return False


@torch.no_grad()
def test_merged_is_not_merged_in_every_cell_and_in_more_than_in_peft():
    ours, theirs, count = 0, 0, 0
    for kind, arguments, options in cells():
        torch.manual_seed(count)
        x = noise(2, 7, 8) if kind is nn.Linear else noise(2, 8, 9, 10)
        layer = kind(8, 8, **arguments)
        before, plain = layer.weight.clone(), layer(x)
        own = LoRA(layer, alpha=2.0, dropout=0.5, **options).eval()
        torch.testing.assert_close(own(x), plain, rtol=1e-5, atol=1e-5)  # B is 0
        out = stir(own)(x)
        own.merge()
        ours += torch.allclose(own(x), out, rtol=1e-5, atol=1e-5) and not torch.allclose(out, plain, atol=1e-2)
        own.unmerge()
        assert torch.equal(layer.weight, before)
        assert torch.equal(own(x), out)
        theirs, count = theirs + peft_manages(kind, arguments, options, x), count + 1
    assert count >= 60
    assert ours == count
    assert theirs < count  # peft 0.21.2: 56 of 144
    print(f"ours {ours}, peft {theirs} of {count}")


def test_merging_twice_and_unmerging_what_is_not_merged_are_refused():
    layer = LoRA(nn.Linear(3, 3), **OPTIONS)
    with pytest.raises(ModelError, match="not merged"):
        layer.unmerge()
    layer.merge()
    with pytest.raises(ModelError, match="merged already"):
        layer.merge()


@pytest.mark.parametrize("dora", [False, True])
def test_who_reads_the_weight_trains_the_same_branch(dora):
    layer, x = stir(LoRA(nn.Linear(6, 4), **OPTIONS, dora=dora)), noise(5, 6)
    grads = []
    for out in (layer(x), F.linear(x, layer.weight, layer.bias)):
        grads.append(torch.autograd.grad(out.square().sum(), [layer.lora_A, layer.lora_B]))
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_under_autocast_branches_run_in_bfloat16_and_merging_is_in_float32():
    layer, x = stir(LoRA(nn.Conv2d(4, 6, 3), **OPTIONS, dora=True)), noise(1, 4, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
        delta = layer.delta()
    assert torch.equal(delta, layer.delta())


@pytest.mark.parametrize("p", [0.001, 0.1, 0.5, 0.999])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_dropout_is_that_of_torch_to_a_256th(p, layout):
    dropout, x = lora.Dropout(p), torch.ones(4, 30, 41, 43).contiguous(memory_format=layout).requires_grad_()
    torch.manual_seed(0)
    y = dropout(x)
    gone = min(max(1, round(256 * p)), 255) / 256
    assert y.unique().tolist() == pytest.approx([0, 1 / (1 - gone)])
    spread = (gone * (1 - gone) / x.numel()) ** 0.5
    assert abs((y == 0).float().mean().item() - gone) < 4 * spread
    for dim, n in enumerate(x.shape):  # each channel, row and column: nothing repeats along one
        share = (y == 0).float().movedim(dim, 0).flatten(1).mean(1)
        assert (share - gone).abs().max().item() < 5 * spread * n**0.5
    assert y.is_contiguous(memory_format=layout)
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], y)  # what is scaled, and nothing of what is gone
    torch.manual_seed(0)
    assert torch.equal(dropout(x), y)
    assert not torch.equal(dropout(x), y)
    assert torch.equal(dropout.eval()(x), x)
    part = lora.Dropout(p)(torch.ones(3, 5, 7)[:, 1:4])  # not dense, and not a multiple of eight
    assert part.shape == (3, 3, 7)


# ---- starts ----

STARTS = [
    (nn.Linear(12, 20), {}), (nn.Conv2d(8, 20, 3, padding=1, dilation=2, groups=2), {}),
    (nn.ConvTranspose2d(12, 8, 2, 2), {}),
]  # fmt: skip


@pytest.mark.parametrize("layer", [layer for layer, _ in STARTS], ids=lambda m: type(m).__name__)
def test_svd_starts_from_the_smallest_singular_vectors_and_changes_nothing(layer):
    own, x = LoRA(layer, **OPTIONS), noise(2, 12) if isinstance(layer, nn.Linear) else noise(2, layer.in_channels, 6, 6)
    before = layer.weight.detach().clone()
    own.start_from_svd()
    torch.testing.assert_close(own(x), layer(x))
    assert torch.equal(layer.weight, before)
    product = own.lora_B.view(own.groups, -1, 2) @ own.matrix(own.lora_A)
    for part, whole in zip(product, own.matrix(before), strict=True):
        expected = torch.linalg.svdvals(whole)[-2:]
        torch.testing.assert_close(torch.linalg.svdvals(part)[:2], expected, rtol=1e-3, atol=1e-4)
        rest = torch.linalg.svdvals(whole - part)  # what it starts from is part of W
        torch.testing.assert_close(rest[:-2], torch.linalg.svdvals(whole)[:-2], rtol=1e-3, atol=1e-4)


def correlated(*shape):
    x = noise(*shape)
    return x * torch.linspace(3, 0.1, shape[1]).view(-1, *[1] * (len(shape) - 2)) + x.mean(1, keepdim=True)


@pytest.mark.parametrize("stride", [1, 2])
def test_data_starts_from_the_first_eigenvectors_of_the_covariance(stride):
    conv, x = nn.Conv2d(6, 40, 3, padding=1, stride=stride), correlated(3, 6, 12, 12)
    model = nn.Sequential(LoRA(conv, **OPTIONS))
    assert lora.start_from_data(model, [x], rounds=300) == []  # the second and third values are close
    patches = F.unfold(x, 3, padding=1, stride=stride).transpose(1, 2).flatten(0, 1)
    _, vectors = torch.linalg.eigh(torch.cov(patches.T))
    found = model[0].lora_A.detach().flatten(1)
    torch.testing.assert_close(found @ found.T, torch.eye(2), rtol=1e-4, atol=1e-4)
    overlap = torch.linalg.svdvals(found @ vectors[:, -2:])
    torch.testing.assert_close(overlap, torch.ones(2), rtol=0, atol=1e-2)


def test_a_layer_that_is_not_called_keeps_its_start_and_is_named():
    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.read = LoRA(nn.Linear(6, 6), **OPTIONS)

        def forward(self, x):
            return F.linear(x, self.read.weight)

    model = Reads()
    before = model.read.lora_A.detach().clone()
    assert lora.start_from_data(model, [noise(4, 6)]) == ["read"]
    assert torch.equal(model.read.lora_A, before)


# ---- networks ----

NETWORKS = [dict(backbone=b, head="fpn") for b in ("dinov2-tiny", "swin-mini", "mit-tiny", "resnet18", "mobilenet_v2")]
NETWORKS += [dict(model=m) for m in ("segformer-tiny", "enet", "mask2former-tiny", "fcn_maxunpool")]
NETWORKS += [dict(backbone="mit-tiny", head="ocr", aux=True), dict(model="unet", width=8)]
NETWORKS += [dict(backbone="resnet18", head="linear", upsample="learned")]


def called(build):
    return "-".join(map(str, build.values()))


@pytest.mark.parametrize(
    ("method", "count"),
    [("head", 3_740_164), ("classifier", 1_028), ("lora-head", 130_052), ("lora-full", 719_876)],
)
def test_trainable_parameters_are_those_of_the_report(method, count):
    model = models.skeleton(dict(num_classes=4, backbone="dinov2-base", head="fpn", freeze_backbone=True))
    patch = lora.adapt(model, method, num_classes=4, rank=8)
    assert models.count_params(model)[1] == count
    assert sum(t.numel() for t in patch.state().values()) == count


@pytest.mark.parametrize("method", ["lora-full", "lora-head", "head", "classifier"])
@pytest.mark.parametrize("build", NETWORKS, ids=called)
def test_what_is_to_be_trained_changes_and_nothing_else(build, method):
    torch.manual_seed(0)
    model = build_model(num_classes=5, **build)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    shown = [p.requires_grad for p in model.parameters()]
    model.eval()
    x = noise(2, 3, 64, 64)
    plain = model(x).detach()
    patch = lora.adapt(model, method, num_classes=5, norm_stats=method == "head", **OPTIONS)
    torch.testing.assert_close(model(x), plain, rtol=1e-4, atol=1e-4)
    stir(model)  # A has no gradient while B is 0
    trained = {k: t.clone() for k, t in patch.state().items()}
    objective = train.Objective(model, None if hasattr(model.head, "queries") else nn.CrossEntropyLoss())
    optimizer = torch.optim.Adam([p for p in objective.parameters() if p.requires_grad], lr=0.01)
    target = torch.randint(5, (2, 64, 64), generator=torch.Generator().manual_seed(0))
    objective.train()
    objective(x, target).backward()
    optimizer.step()
    now = patch.state()
    still = {k for k, t in trained.items() if torch.equal(t, now[k])}
    assert len(still) <= len(trained) // 10 or method == "head", still  # of a whole head, some train.py never trains
    rest = lora.plain_state(model)
    for name, tensor in before.items():
        assert (name in now) or torch.equal(rest[name], tensor), name
    patch.undo()
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert [p.requires_grad for p in model.parameters()] == shown


@pytest.mark.parametrize("build", NETWORKS, ids=called)
@torch.no_grad()
def test_merged_networks_are_plain_ones_of_the_same_logits(build):
    torch.manual_seed(0)
    model, x = build_model(num_classes=5, **build).eval(), noise(1, 3, 64, 64)
    lora.adapt(model, "lora-full", num_classes=5, dora=True, **OPTIONS)
    stir(model.eval())
    out = model(x)
    plain = build_model(num_classes=5, **build).eval()
    plain.load_state_dict(lora.merged_state(model))
    assert (plain(x) - out).abs().max() < 2e-4 * out.abs().max()
    assert torch.equal(model(x), out)


@pytest.mark.parametrize("build", NETWORKS, ids=called)
def test_other_classes_bring_a_new_classifier(build):
    torch.manual_seed(0)
    model = build_model(num_classes=5, **build).eval()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    patch = lora.adapt(model, "classifier", num_classes=3, **OPTIONS)
    assert model.eval()(noise(1, 3, 64, 64)).shape == (1, 3, 64, 64)
    assert patch.numbers
    fresh = build_model(**model.build)
    fresh.load_state_dict(lora.plain_state(model))
    patch.undo()
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert model.build["num_classes"] == 5


def test_a_pattern_that_names_no_layer_is_refused():
    model = build_model(num_classes=3, backbone="mit-tiny", head="fpn")
    with pytest.raises(ModelError, match=r"--targets backbone\.\*\.fc9: no layer has such a name"):
        lora.adapt(model, "lora-full", num_classes=3, targets=["head.*", "backbone.*.fc9"], **OPTIONS)
    patch = lora.adapt(model, "lora-full", num_classes=3, targets=["*.fc2"], **OPTIONS)
    assert patch.layers
    assert all(name.endswith("fc2") for name in patch.layers)


def test_a_head_learns_itself_beside_lora_on_the_backbone():
    model = build_model(num_classes=3, backbone="mit-tiny", head="fpn")
    with pytest.raises(ModelError, match=r"--unfreeze heads\.\*: no parameter has such a name"):
        lora.adapt(model, "lora-full", num_classes=3, unfreeze=["heads.*"], **OPTIONS)
    count = {}
    for method, unfreeze in (("head", []), ("lora-full", []), ("lora-full", ["head.*", "backbone.*.fc1.bias"])):
        patch = lora.adapt(model, method, num_classes=3, unfreeze=unfreeze, **OPTIONS)
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        count[len(count)] = {name for name in trained if name.startswith("head.")}, trained
        patch.undo()
    (head, _), (branches, without), (both, with_head) = count.values()
    assert both == head > {name for name in branches if "lora_" not in name}
    fc1 = {name for name, _ in model.named_parameters() if name.startswith("backbone.") and name.endswith("fc1.bias")}
    assert with_head - both == (without - branches) | fc1 > fc1 > set()


def test_depthwise_layers_are_trained_themselves():
    model = build_model(num_classes=3, backbone="mobilenet_v2", head="fpn")
    patch = lora.adapt(model, "lora-full", num_classes=3, rank=8)
    depthwise = {n for n, m in model.named_modules() if isinstance(m, nn.Conv2d) and m.groups > 1}
    assert depthwise
    assert {f"{name}.weight" for name in depthwise} <= set(patch.trained)


# ---- the command ----

TINY = [
    "--size",
    "40",
    "56",
    "--crop",
    "40",
    "56",
    "--batch-size",
    "2",
    "--workers",
    "0",
    "--amp",
    "off",
    "--epochs",
    "1",
]


@pytest.fixture
def base(tmp_path, monkeypatch, figures_once):
    """A checkpoint of train.py's kind, and four drawn scenes a split."""
    for name in ("synthetic", "synthetic-night"):
        row = dataclasses.replace(datasets.DATASETS[name], lengths={"train": 4, "val": 2, "test": 2})
        monkeypatch.setitem(datasets.DATASETS, name, row)
    monkeypatch.setattr(evaluate, "save_figure", lambda *a, **k: None)

    def write(name="base.pt", classes=INFO.classes, seed=0, **build):
        torch.manual_seed(seed)
        model = build_model(num_classes=len(classes), **(build or dict(backbone="mit-tiny", head="segformer"))).eval()
        info = dataclasses.replace(INFO, classes=tuple(classes), palette=INFO.palette[: len(classes)])
        shared = dict(
            data=info.to_dict(), pretrained="no", command="train.py", args={"loss": "ce"}, metrics={"miou": 1.0}
        )
        save_checkpoint(tmp_path / name, model, **shared)
        return tmp_path / name

    return write


def run(weights, out, *flags):
    return lora.main(["--weights", str(weights), "--out", str(out), *TINY, *flags])


def logits(path):
    model, _ = load_checkpoint(path)
    with torch.no_grad():
        return model(noise(1, 3, 40, 56))


@pytest.mark.parametrize(
    "flags",
    [
        ["--method", "lora-full", "--dora"], ["--method", "lora-head", "--trunk", "int8", "--cache-features", "2"],
        ["--method", "head", "--cache-features", "1"], ["--method", "classifier", "--trunk", "int8"],
        ["--trunk", "int8", "--ema", "0.9", "--targets", "head.*", "backbone.stages.3.*", "backbone.stages.2.*"],
        ["--init", "svd", "--rslora", "--ema", "0.9"], ["--method", "full", "--amp", "bf16"],
        ["--init", "data", "--lr-ratio", "4", "--norm-stats", "--unfreeze", "head.*"],
        pytest.param(["--trunk", "int8", "--targets", "backbone.stages.3.*", "--compile"], marks=pytest.mark.slow),
    ],
    ids=" ".join,
)  # fmt: skip
def test_a_run_leaves_a_plain_network_an_adapter_of_it_and_the_base_as_it_was(flags, base, tmp_path, capsys):
    weights = base()
    before = weights.read_bytes()
    done = run(weights, tmp_path / "run", *flags)
    said = "in int8: " + ("backbone.stages.* (" if "--targets" in flags else "backbone (1)")
    assert (said in capsys.readouterr().out) == ("--trunk" in flags)
    assert weights.read_bytes() == before
    model, checkpoint = load_checkpoint(weights)
    adapter, undo = models.load_adapter(model, checkpoint, tmp_path / "run" / "adapter.pt")
    with torch.no_grad():
        out = model(noise(1, 3, 40, 56))
    torch.testing.assert_close(out, logits(tmp_path / "run" / "best.pt"), rtol=1e-4, atol=1e-4)
    undo()
    assert models.fingerprint(model.state_dict()) == adapter["base"]["hash"] == checkpoint["hash"]
    assert done["merge_difference"] < 1e-4
    assert (done["before"]["dataset"], done["dataset"]) == ("synthetic", "synthetic-night")
    assert {"source_miou_before", "source_miou_after", "target_miou_before", "step_ms", "step_ms_full"} <= done.keys()
    lineage = load_checkpoint(tmp_path / "run" / "best.pt")[1]["lineage"]
    assert lineage[-1]["id"] == checkpoint["id"]


def test_other_classes_keep_the_features_and_get_a_new_classifier(base, tmp_path):
    weights = base(classes=("a", "b", "c"))
    done = run(weights, tmp_path / "run")
    assert (done["target_miou_before"], done["source_miou_after"], len(done["class_iou"])) == (None, None, 19)
    assert logits(tmp_path / "run" / "best.pt").shape[1] == 19
    again = evaluate.main(["--weights", str(weights), "--adapter", str(tmp_path / "run" / "adapter.pt"),
                           "--out", str(tmp_path / "scored")])  # fmt: skip
    assert again["miou"] == pytest.approx(done["miou"], abs=0.05)


def test_an_adapter_of_another_base_is_refused_by_name_of_both(base, tmp_path):
    run(base(), tmp_path / "run")
    adapter = torch.load(tmp_path / "run" / "adapter.pt", weights_only=True)
    model, checkpoint = load_checkpoint(base("other.pt", seed=1))
    with pytest.raises(ModelError) as error:
        models.load_adapter(model, checkpoint, tmp_path / "run" / "adapter.pt")
    assert adapter["base"]["id"] in str(error.value)
    assert checkpoint["id"] in str(error.value)
    for path, words in ((tmp_path / "none.pt", "no adapter at"), (tmp_path / "run" / "best.pt", "is no adapter")):
        with pytest.raises(ModelError, match=words):
            models.load_adapter(model, checkpoint, path)


def test_a_made_up_adapter_fits_or_is_refused_in_one_line(base, tmp_path):
    path = base(model="unet", width=1)
    run(path, tmp_path / "run", "--rank", "1")
    good = torch.load(tmp_path / "run" / "adapter.pt", weights_only=True)

    def use(adapter):
        torch.save(adapter, tmp_path / "a.pt")
        model, checkpoint = load_checkpoint(path)
        models.load_adapter(model, checkpoint, tmp_path / "a.pt")
        model(torch.zeros(1, 3, 32, 32))

    refused = count_refused(itertools.islice(made_up(good, tries=1), 0, None, 4), use, ModelError)
    assert refused > 10


@pytest.mark.parametrize("script", [lora, prune, quantize])
def test_a_folder_that_holds_what_is_read_is_not_written_to(script, base, tmp_path):
    (tmp_path / "run").mkdir()
    weights = base().rename(tmp_path / "run" / "best.pt")
    before = weights.read_bytes()
    (tmp_path / "link").symlink_to(weights)
    for path in (weights, tmp_path / "link"):
        with pytest.raises(ModelError, match="would be overwritten: name another folder"):
            script.main(["--weights", str(path), "--out", str(tmp_path / "run"), "--dry-run"])
    assert weights.read_bytes() == before
    assert [p.name for p in weights.parent.iterdir()] == ["best.pt"]


def test_two_adapters_swapped_give_each_its_own_scores(base, tmp_path):
    weights, paths, expected = base(), [], []
    for method in ("lora-head", "lora-full"):
        expected.append(run(weights, tmp_path / method, "--method", method, "--lr", "0.01"))
        paths.append(str(tmp_path / method / "adapter.pt"))
    done = evaluate.main(["--weights", str(weights), "--adapter", *paths, *paths, "--out", str(tmp_path / "scored")])
    assert [row["miou"] for row in done["adapters"]] == pytest.approx([e["miou"] for e in expected] * 2, abs=0.05)
    assert json.loads((tmp_path / "scored" / "results.json").read_text()).keys() == done.keys()


def test_a_resumed_run_ends_in_the_same_bits(base, tmp_path):
    weights, flags = base(), ["--ema", "0.9", "--init", "svd", "--schedule", "constant"]
    run(weights, tmp_path / "whole", *flags, "--epochs", "2")
    run(weights, tmp_path / "parts", *flags)
    lora.main(["--resume", "--out", str(tmp_path / "parts"), "--epochs", "2"])
    ends = [torch.load(tmp_path / part / "last.pt", weights_only=True) for part in ("whole", "parts")]
    one, other = (end["training"]["adapter"] for end in ends)
    assert one.keys() == other.keys()
    assert all(torch.equal(t, other[name]) for name, t in one.items())


def test_what_was_merged_is_pruned_quantized_and_exported(base, tmp_path):
    run(base(backbone="mit-tiny", head="fpn"), tmp_path / "run", "--method", "lora-head")
    best = str(tmp_path / "run" / "best.pt")
    shared = [*TINY[: TINY.index("--amp")], "--out"]
    quantize.main(["--weights", best, "--calib-images", "2", *shared, str(tmp_path / "int8")])
    prune.main(["--weights", best, "--structured", "--round-to", "2", "--min-channels", "2", "--epochs", "0",
                "--calib-images", "2", *shared, str(tmp_path / "pruned")])  # fmt: skip
    assert load_checkpoint(tmp_path / "int8" / "best.pt")[1]["lineage"][-1]["command"].startswith("python lora.py")
    export_onnx.main(["--weights", best, "--size", "40", "56", "--out", str(tmp_path / "a.onnx")])
    done = run(tmp_path / "pruned" / "best.pt", tmp_path / "again")  # and what was pruned is adapted
    assert done["params"] < models.count_params(load_checkpoint(best)[0])[0]
    with pytest.raises(ModelError, match="is quantized: adapt the float checkpoint"):
        run(tmp_path / "int8" / "best.pt", tmp_path / "never")


def test_weights_pruned_to_0_are_refused(base, tmp_path):
    weights = ["--weights", str(base())]
    prune.main([*weights, "--amount", "0.5", *TINY[:-2], "--epochs", "0", "--out", str(tmp_path / "p")])
    with pytest.raises(ModelError, match="pruned to 0"):
        run(tmp_path / "p" / "best.pt", tmp_path / "never")


def test_all_methods_make_a_table(base, tmp_path, capsys):
    done = run(base(), tmp_path / "all", "--method", "all", "--dry-run")
    assert [row["method"] for row in done["methods"]] == list(lora.METHODS)
    assert {p.name for p in (tmp_path / "all").iterdir() if p.is_dir()} == set(lora.METHODS)


def test_minutes_become_epochs_and_a_trained_backbone_has_no_cheap_trunk(base, tmp_path):
    weights = base()
    flags = ["--weights", str(weights), "--out", str(tmp_path / "run"), *TINY[: TINY.index("--epochs")]]
    assert lora.main([*flags, "--method", "classifier", "--minutes", "0.0001"])["epochs"] == 1
    with pytest.raises(ModelError, match="learns from its first block on; --targets can name later layers"):
        run(weights, tmp_path / "run", "--trunk", "int8")
    with pytest.raises(ModelError, match="it is for --method classifier"):
        run(weights, tmp_path / "run", "--cache-features", "2", "--targets", "backbone.stages.3.*")


@pytest.mark.parametrize(
    ("build", "targets", "first"),
    [(dict(backbone="dinov2-tiny", head="fpn"), "backbone.*.layer.[23].*_proj", "backbone.body.encoder.layer.2"),
     (dict(backbone="mit-tiny", head="segformer"), "backbone.stages.2.*", "backbone.stages.2"),
     (dict(model="unet", width=4), "backbone.stages.[34].*", "backbone.stages.3")],
    ids=str,
)  # fmt: skip
def test_int8_below_what_is_trained(build, targets, first):
    """From what the int8 blocks hand on, outputs and gradients are those of the adapted network, to the bit; what they
    hand on is the float network's, but for rounding; nothing below learns, and a copy learns by itself."""
    torch.manual_seed(0)
    model = build_model(num_classes=5, **build).eval()
    full, batch, inputs = copy.deepcopy(model), noise(2, 3, 64, 96), {}
    patch = lora.adapt(model, "lora-full", num_classes=5, targets=["head.*", targets], **OPTIONS)
    for layer in lora.lora_layers(model).values():
        nn.init.normal_(layer.lora_B, std=0.1)
    trained = [name for name in patch.layers if name.startswith("backbone.")]
    encode = quantize.int8_encoder(full, [batch], model, trained)
    with torch.autocast("cpu", torch.bfloat16):
        encode(batch)
    if int8.kernels():  # each layer's was tried in the first call, and is to be used after it
        assert all(m.kernel_correct for block in encode.args[1].values() for m in quantize.quant_layers(block).values())
    own = dict(model.named_parameters())
    block = model.get_submodule(first)

    def gradients(run):
        model.zero_grad()
        features = run()
        sum((i + 1) * f.square().mean() for i, f in enumerate(features)).backward()
        return features, {name: p.grad for name, p in own.items() if p.grad is not None}

    hook = block.register_forward_pre_hook(lambda _, args: inputs.update(int8=args[0]))
    features, found = gradients(lambda: encode(batch))
    hook.remove()
    hook = block.register_forward_pre_hook(
        lambda _, args: (inputs.update(float=args[0]), (inputs["int8"], *args[1:]))[1]
    )
    expected, theirs = gradients(lambda: model.encode(batch))
    hook.remove()
    assert type(inputs["int8"]) is torch.Tensor
    distance = (inputs["int8"] - inputs["float"]).norm() / inputs["float"].norm()
    assert 0 < distance < 0.05
    assert found.keys() == theirs.keys() == {n for n, p in own.items() if p.requires_grad and n.startswith("backbone.")}
    assert all(torch.equal(found[name], grad) for name, grad in theirs.items())
    assert torch.equal(features[-1], expected[-1])
    twin, twin_encode = copy.deepcopy((model, encode))
    with torch.no_grad():
        for p in own.values():
            p.add_(p.requires_grad)
    assert not torch.equal(encode(batch)[-1], features[-1])
    assert torch.equal(twin_encode(batch)[-1], features[-1])
    assert twin_encode.args[0] is twin


def test_B_learns_faster_by_the_ratio():
    model = nn.Sequential(LoRA(nn.Linear(4, 4), **OPTIONS), nn.Linear(4, 4))
    shared = dict(lr=0.1, backbone_lr=0.1, weight_decay=0, factors=[(8, ".lora_B")])
    optimizer = train.make_optimizer(model, "adamw", **shared)
    rates = {id(p): group["base_lr"] for group in optimizer.param_groups for p in group["params"]}
    assert len(rates) == len(list(model.parameters()))
    assert rates[id(model[0].lora_B)] == pytest.approx(0.8)
    assert rates[id(model[0].lora_A)] == pytest.approx(0.1)
