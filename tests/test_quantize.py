"""Quantization: the arithmetic against torch's own, every network simulated and converted, what the command leaves."""

import copy
import csv
import json
import math
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import datasets
import evaluate
import models
import quantize
from models import ModelError, build_model, load_checkpoint, read_checkpoint, save_checkpoint
from quantize import Lazy, Observer, Point, choose_qparams, dequantize, fake_quantize, quant_layers

INFO = datasets.open_dataset("synthetic", "val", length=1, size=(40, 56)).info
KERNELS = pytest.mark.skipif(not quantize.kernels(), reason="this CPU has no int8 kernels")
NETWORKS = [
    dict(backbone="resnet18", head="unet"),
    dict(backbone="resnet50", head="aspp"),
    dict(backbone="mobilenet_v2", head="deeplabv3plus"),
    dict(backbone="mobilenet_v3_large", head="ppm"),
    dict(backbone="dinov2-tiny", head="fpn"),
    dict(backbone="swin-mini", head="segformer"),
    dict(backbone="mit-tiny", head="ocr"),
    dict(model="segformer-tiny"),
    dict(model="mask2former-tiny"),
    dict(model="unet", width=8),
    dict(model="enet"),
    dict(model="lite_deeplabv3"),
    dict(model="fcn_maxunpool"),
    dict(model="fcn_resnet50"),
]


def make(**build):
    """A network whose norms and biases are not those of the start, in eval mode."""
    torch.manual_seed(0)
    model = build_model(num_classes=5, **build).eval()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.8, 1.2)
    return model


def images(*size, count=1):
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(1))


class Mixed(nn.Module):
    """All that a kernel can and cannot take over: strides, dilation, groups, a transposed convolution, residuals, one
    of them in place, concatenation, pooling, several activations, attention."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 2, 1)
        self.a, self.b = nn.Conv2d(8, 8, 3, 1, 2, dilation=2), nn.Conv2d(8, 8, 3, 1, 1, groups=4)
        self.deep, self.shortcut = nn.Conv2d(8, 16, 3, 1, 1, bias=False), nn.Conv2d(8, 16, 1)
        self.qkv, self.out, self.norm = nn.Linear(16, 48), nn.Linear(16, 16), nn.LayerNorm(16)
        self.fc1, self.fc2 = nn.Linear(16, 32), nn.Linear(32, 16)
        self.up, self.last = nn.ConvTranspose2d(16, 8, 2, 2), nn.Conv2d(16, 5, 1)

    def forward(self, x):
        x = F.relu(self.stem(x))
        y = F.hardswish(self.a(x)) if x.shape[0] else x
        y = self.b(y)
        y += x
        y = torch.relu_(y)
        z = F.max_pool2d(y, 3, 2, 1)
        z = F.relu6(self.deep(z)) + self.shortcut(z)
        h, w = z.shape[-2:]
        t = z.flatten(2).transpose(1, 2)
        q, k, v = self.qkv(self.norm(t)).chunk(3, -1)
        t = t + self.out(F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0])
        t = t + self.fc2(F.gelu(self.fc1(t)))
        up = F.relu(self.up(t.transpose(1, 2).unflatten(2, (h, w))))
        return self.last(torch.cat([up[..., : y.shape[2], : y.shape[3]], y], 1))


def mixed():
    torch.manual_seed(0)
    model = Mixed().eval()
    model.frozen = []
    return model


# ---- arithmetic -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("low", "high"), [(-1.0, 3.0), (0.0, 5.0), (-7.0, 0.0), (2.0, 4.0), (-3.0, -1.0), (0.0, 0.0)])
def test_zero_is_exact_and_no_value_in_range_is_off_by_more_than_half_a_step(low, high):
    scale, zero_point = choose_qparams(torch.tensor(low), torch.tensor(high))
    assert 0 <= zero_point <= 255
    zero = quantize.quantize(torch.zeros(1), scale, zero_point)
    assert dequantize(zero, scale, zero_point).item() == 0
    # the ends of the range are moved by the rounding of the zero point, by up to half a step
    x = torch.linspace(min(low, 0), max(high, 0), 1001)
    off = (dequantize(quantize.quantize(x, scale, zero_point), scale, zero_point) - x).abs()
    inside = (x / scale + zero_point >= 0) & (x / scale + zero_point <= 255)
    assert off[inside].max() <= scale / 2 * 1.0001
    assert off.max() <= scale * 1.0001


def test_fake_quantize_is_torchs_in_value_and_gradient():
    x = 3 * torch.randn(4, 6, 5)
    x[0, 0, :3] = torch.tensor([100.0, -100.0, 0.0])
    scale, zero_point = choose_qparams(torch.tensor(-2.0), torch.tensor(3.0))
    grad, results = torch.randn(x.shape), []
    for function in (fake_quantize, lambda x, s, z: torch.fake_quantize_per_tensor_affine(x, s, z, 0, 255)):
        leaf = x.clone().requires_grad_()
        y = function(leaf, scale, zero_point)
        results.append((y, torch.autograd.grad(y, leaf, grad)[0]))
    for ours, theirs in zip(*results, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-6)


@pytest.mark.parametrize("axis", [0, 1])
def test_fake_quantize_per_channel_is_torchs(axis):
    w = torch.randn(6, 4, 3, 3)
    scale = w.abs().amax([d for d in range(4) if d != axis]) / 127
    theirs = torch.fake_quantize_per_channel_affine(w, scale, torch.zeros(w.shape[axis]), axis, -127, 127)
    assert torch.allclose(fake_quantize(w, scale, limits=(-127, 127), axis=axis), theirs, atol=1e-6)


def test_the_gradient_of_a_learned_step_is_that_of_lsq():
    x, grad = 3 * torch.randn(200), torch.randn(200)
    zero_point, found = torch.tensor([100], dtype=torch.int32), []
    for function in (
        lambda x, s: fake_quantize(x, s[0], zero_point[0]),
        lambda x, s: torch._fake_quantize_learnable_per_tensor_affine(x, s, zero_point.float(), 0, 255, 1.0),
    ):
        leaves = x.clone().requires_grad_(), torch.tensor([0.02]).requires_grad_()
        found.append(torch.autograd.grad(function(*leaves), leaves, grad))
    for ours, theirs in zip(*found, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("count", [1, 2, 7, 64])
def test_four_bit_numbers_come_back_from_their_halves_of_a_byte(count):
    q = torch.randint(-8, 8, (count,), dtype=torch.int8)
    packed = quantize.pack4(q)
    assert packed.dtype == torch.uint8
    assert len(packed) == (count + 1) // 2
    assert torch.equal(quantize.unpack4(packed, count), q)


@pytest.mark.parametrize(("kernel", "stride", "padding"), [(2, 2, 0), (3, 2, 1), ((3, 2), (1, 2), (1, 0))])
def test_max_pooling_of_bytes(kernel, stride, padding):
    x = torch.randint(0, 256, (2, 5, 11, 14), dtype=torch.uint8)
    pairs = [(v, v) if isinstance(v, int) else v for v in (kernel, stride, padding)]
    assert torch.equal(quantize.max_pool_bytes(x, *pairs).float(), F.max_pool2d(x.float(), *pairs))


# ---- observers ------------------------------------------------------------------------------------------------------


def observe(method, *batches):
    observer = Observer(method)
    for number in range(observer.passes):
        if number:
            observer.second_pass()
        for batch in batches:
            observer.see(batch)
    return observer.range()


def test_minmax_and_average_by_hand():
    batches = torch.tensor([-1.0, 2.0]), torch.tensor([-3.0, 4.0])
    assert observe("minmax", *batches) == (-3.0, 4.0)
    assert observe("average", *batches) == (-2.0, 3.0)


def test_percentile_is_numpys_to_a_bin():
    x = torch.randn(100_000)
    low, high = observe("percentile", x)
    width = (x.max() - x.min()).item() / quantize.BINS
    assert abs(low - np.quantile(x.numpy(), 1e-4)) <= 2 * width
    assert abs(high - np.quantile(x.numpy(), 1 - 1e-4)) <= 2 * width


@pytest.mark.parametrize("seed", range(3))
def test_mse_range_is_about_the_best_of_all_by_brute_force(seed):
    torch.manual_seed(seed)
    x = torch.randn(20_000) ** 3 if seed else torch.randn(20_000).relu()

    def error(low, high):
        return (fake_quantize(x, *choose_qparams(low, high)) - x).square().mean().item()

    ends = torch.linspace(0.05, 1, 40).tolist()
    best = min(error(x.min() * a, x.max() * b) for a in ends for b in ends)
    low, high = observe("mse", x)
    assert error(low, high) <= 1.1 * best
    assert low == 0 if seed == 0 else low < 0


def test_entropy_cuts_off_what_is_far_out_and_keeps_the_bulk():
    x = torch.cat([torch.randn(100_000).abs(), torch.tensor([50.0])])
    low, high = observe("entropy", x)
    assert low == 0
    assert 2.5 < high < 15


@pytest.mark.parametrize("method", quantize.OBSERVERS)
def test_observers_of_nothing_and_of_zeros(method):
    with pytest.raises(ModelError, match="saw no values"):
        observe(method)
    with pytest.raises(ModelError, match="not finite"):
        Observer("minmax").see(torch.tensor([math.nan, 1.0])) or observe("minmax", torch.tensor([math.inf]))
    low, high = observe(method, torch.zeros(10))
    scale, zero_point = choose_qparams(low, high)
    assert math.isfinite(scale)
    assert dequantize(quantize.quantize(torch.zeros(1), scale, zero_point), scale, zero_point) == 0


# ---- lazy tensors ---------------------------------------------------------------------------------------------------

OPERATIONS = {
    "relu": lambda x, y: F.relu(x),
    "relu in place": lambda x, y: F.relu(x, inplace=True) + x,
    "relu_": lambda x, y: torch.relu_(x) * x,
    "two activations": lambda x, y: F.relu6(F.hardswish(x)),
    "hardtanh": lambda x, y: F.hardtanh(x, -0.5, 0.25) + nn.Hardtanh(-1, 2)(y) - nn.ReLU6()(x),
    "gelu": lambda x, y: F.gelu(x) + F.gelu(y, approximate="tanh"),
    "silu": lambda x, y: F.silu(x),
    "prelu": lambda x, y: F.prelu(x, torch.full((4,), 0.1)),
    "sum": lambda x, y: x + y,
    "sum with a tensor": lambda x, y: torch.ones(1, 4, 5, 7) + x,
    "sum with a number": lambda x, y: 1 + x + 2,
    "sum, broadcast": lambda x, y: x + torch.ones(4, 1, 1),
    "scaled sum": lambda x, y: torch.add(x, y, alpha=2),
    "with itself": lambda x, y: x + x,
    "difference": lambda x, y: 1 - (x - y) / 2,
    "product": lambda x, y: 2 * x * y**2,
    "cat": lambda x, y: torch.cat([x, torch.zeros(1, 2, 5, 7), y], dim=1),
    "cat of rows": lambda x, y: torch.cat((x, y), 2),
    "pool": lambda x, y: F.max_pool2d(F.relu(x), 3, 2, 1),
    "pool, up": lambda x, y: F.max_pool2d(x, 2, ceil_mode=True),
    "layout": lambda x, y: x.flatten(2).transpose(1, 2).reshape(1, 5, 7, 4).permute(0, 3, 1, 2),
    "functions of layout": lambda x, y: torch.flatten(torch.transpose(x, 1, 2), 1),
    "slices": lambda x, y: x[:, 1:, ::2] - y[:, :3, ::2],
    "matmul": lambda x, y: x @ y.transpose(-1, -2),
    "attention": lambda x, y: F.scaled_dot_product_attention(x, y, x),
    "interpolate": lambda x, y: F.interpolate(x, scale_factor=2, mode="bilinear"),
    "split": lambda x, y: torch.stack(x.chunk(2, 1)),
    "mean": lambda x, y: x.mean((2, 3), keepdim=True) * y.sum(),
    "dropout": lambda x, y: F.dropout(x, 0.5, training=False),
}


def in_place_sums(x, y):
    x += y
    kept = x
    x += torch.ones(1, 4, 5, 7)
    return F.relu(x) + kept


OPERATIONS |= {"sums in place": in_place_sums}


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_lazy_tensor_computes_what_a_tensor_does(name):
    """With layers in float mode, an operation on their outputs must give exactly what it gives on tensors."""
    torch.manual_seed(0)
    convs = [nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 4, 1)]
    x = torch.randn(1, 3, 5, 7)
    with torch.no_grad():
        expected = OPERATIONS[name](*(conv(x) for conv in convs))
        layers = [quantize.QuantConv2d(conv) for conv in convs]
        for layer in layers:
            layer.points = (Point(), None)
        found = OPERATIONS[name](*(layer(x) for layer in layers))
        assert found.shape == expected.shape
        assert torch.equal(quantize.read(found), expected)


def test_what_was_quantized_is_read_quantized_by_all():
    layer, point = quantize.QuantConv2d(nn.Conv2d(3, 4, 1)), Point()
    layer.points = (Point(), None)
    point.set_range(torch.tensor(-1.0), torch.tensor(1.0))
    with torch.no_grad():
        x = layer(torch.randn(1, 3, 5, 7))
        before = layer(torch.randn(1, 3, 5, 7)).read()
        assert torch.equal(x.read(point), x.read())
        assert len(x.read().unique()) < len(before.unique())


# ---- networks -------------------------------------------------------------------------------------------------------


def prepared(model, x, observer="minmax"):
    """(the network simulated, what prepare() says)."""
    model = copy.deepcopy(model)
    done = quantize.prepare(model, x)
    quantize.calibrate(model, [x], observer=observer)
    return model, done


def compare_each_layer(model, x, monkeypatch):
    """Run a converted network; each kernel's output against the simulation of the same inputs -> largest differences,
    in steps where it is bytes, and relative to the largest value where it is floats."""
    steps, floats, compute = [0], [0.0], quantize.QuantLayer.compute

    def both(layer, q, post, what):
        if isinstance(post.other, Lazy) and post.other.pending and (point := post.other.pending[0].points[1]):
            post.other.read(point)  # as compute() does; afterwards the kernel may have written over it
        other = None if post.other is None else quantize.read(post.other).clone()
        found = compute(layer, q, post, what)
        if q.dtype != torch.uint8:
            return found
        expected = layer.simulate(layer.points[0].dequantize(q))
        expected = expected if other is None else expected + other
        expected = quantize.ACTIVATIONS[post.attr](expected, *post.args)
        if isinstance(what, Point):
            bytes_ = quantize.quantize(expected, what.scale, what.zero_point)
            steps.append((found.int() - bytes_.int()).abs().max().item())
        else:
            tolerance = 0.01 if found.dtype == torch.bfloat16 else 1e-5
            floats.append(((found.float() - expected).abs().max() / expected.abs().max()).item() / tolerance)
        return found

    monkeypatch.setattr(quantize.QuantLayer, "compute", both)
    model(x)
    monkeypatch.undo()
    return len(steps) + len(floats) - 2, max(steps), max(floats)


@pytest.mark.parametrize(
    "build", [*NETWORKS, None], ids=lambda b: "mixed" if b is None else "-".join(map(str, b.values()))
)
@torch.no_grad()
def test_every_network(build, monkeypatch):
    model = mixed() if build is None else make(**build)
    x = images(65, 97)
    expected = model(x)
    simulated, done = prepared(model, x)
    layers = quant_layers(simulated)
    everything = {n for n, m in simulated.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear, nn.ConvTranspose2d))}
    assert everything == set(done.left)  # each layer is quantized or has a reason
    assert set(done.weights_only) < set(layers)
    if build and build.get("backbone") == "swin-mini":  # which gives its weights to F.linear() itself
        assert not done.weights_only
    quantize.set_mode(simulated, "float")
    assert torch.allclose(simulated(x), expected, atol=1e-5 * max(1, expected.abs().max().item()))
    quantize.set_mode(simulated, "fake")
    fake = simulated(x)
    assert 0 < (fake - expected).norm() < 0.25 * expected.norm()
    converted = copy.deepcopy(simulated)
    quantize.convert(converted)
    quantize.execute(converted, int8=False)
    assert torch.allclose(converted(x), fake, atol=1e-6)  # from int8 weights, in float
    assert not any(p.numel() > 4096 and p.dim() > 3 for p in converted.parameters())
    if quantize.kernels():
        quantize.execute(converted, int8=True)
        for size in ((65, 97), (48, 40)):
            kernels, steps, floats = compare_each_layer(converted, images(*size, count=2), monkeypatch)
            assert kernels >= len(layers) - len(done.weights_only)
            assert steps <= 1
            assert floats <= 1
        found = converted(x)
        assert (found - fake).norm() < 0.25 * expected.norm()  # a step here and there, through a whole network
    assert converted(images(33, 70)).shape == model(images(33, 70)).shape


class Kept(nn.Module):
    """A residual sum that its kernel could write over an addend of which a view is still wanted, or, without `view`,
    not."""

    def __init__(self, view):
        super().__init__()
        torch.manual_seed(0)
        self.view, self.frozen = view, []
        self.first, self.norm, self.second = nn.Linear(3, 8), nn.LayerNorm(8), nn.Linear(8, 8)

    def forward(self, x):
        x = self.first(x.flatten(2).mT)
        part = x.transpose(1, 2).narrow(1, 2, 4) if self.view else torch.zeros(1, 0)
        total = self.second(self.norm(x)) + x
        return torch.cat([total.flatten(1), part.flatten(1)], 1)


@KERNELS
@pytest.mark.parametrize("view", [True, False])
@torch.no_grad()
def test_a_sum_is_not_written_over_what_others_still_see(view, monkeypatch):
    written, kernel_add = [], quantize.QuantLinear.kernel_add

    def spy(layer, x, other, *args):
        written.append(other.data_ptr() in memory)
        return kernel_add(layer, x, other, *args)

    x = images(6, 7)
    simulated, _ = prepared(Kept(view).eval(), x)
    converted = copy.deepcopy(simulated)
    quantize.convert(converted)
    memory, compute = set(), quantize.QuantLayer.compute

    def remember(layer, *args):
        out = compute(layer, *args)
        memory.add(out.data_ptr())
        return out

    monkeypatch.setattr(quantize.QuantLinear, "kernel_add", spy)
    monkeypatch.setattr(quantize.QuantLayer, "compute", remember)
    found, expected = converted(x), simulated(x)
    assert written == [not view]  # in the place of the addend, or of a copy
    assert torch.allclose(found, expected, atol=0.1)


@KERNELS
@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 6, 8, 14])
@pytest.mark.parametrize("channels", [3, 16, 32, 64])
@torch.no_grad()
def test_a_kernel_that_is_wrong_is_not_used(size, channels):
    """Windows of every kind: some of oneDNN's kernels give nonsense, and are found out."""
    torch.manual_seed(0)
    layer, point = quantize.QuantConv2d(nn.Conv2d(channels, 32, size, size)), Point()
    layer.points = (point, None)
    point.set_range(torch.tensor(-1.0), torch.tensor(2.0))
    q = torch.randint(0, 256, (2, channels, 56, 70), dtype=torch.uint8)
    x = dequantize(q, point.scale, point.zero_point)  # so that no value lies between two steps
    layer.mode = "fake"
    expected = layer(x).read()
    layer.convert()
    point.freeze(True)
    found = layer(x).read()
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()


@KERNELS
@pytest.mark.parametrize("backbone", ["resnet18", "mobilenet_v2"])
@torch.no_grad()
def test_activations_stay_bytes_from_layer_to_layer(backbone, monkeypatch):
    """A residual network computes in bytes throughout: nothing is quantized but the image, little dequantized."""
    model, _ = prepared(make(backbone=backbone, head="fcn"), images(64, 64))
    quantize.convert(model)
    model(images(64, 64))
    seen = {"to_bytes": 0, "dequantize": 0}
    for owner, name in ((quantize, "to_bytes"), (Point, "dequantize")):
        function = getattr(owner, name)

        def counted(*args, function=function, name=name):
            seen[name] += 1
            return function(*args)

        monkeypatch.setattr(owner, name, counted)
    model(images(64, 64))
    assert seen == {"to_bytes": 1, "dequantize": 0}


# ---- the command ----------------------------------------------------------------------------------------------------

TINY = ["--size", "40", "56", "--crop", "40", "56", "--batch-size", "2", "--workers", "0", "--calib-images", "3"]


@pytest.fixture
def float_checkpoint(tmp_path):
    """A checkpoint of train.py's kind, of a network with norms, a residual and attention, on few drawn scenes."""

    def write(**build):
        torch.manual_seed(0)
        model = build_model(num_classes=len(INFO.classes), **(build or dict(backbone="dinov2-tiny", head="fpn"))).eval()
        path = tmp_path / "float.pt"
        args = {"dataset": "synthetic", "size": [40, 56], "crop": [40, 56], "batch_size": 2, "workers": 0, "loss": "ce"}
        save_checkpoint(
            path, model, data=INFO.to_dict(), pretrained="no", command="train.py", args=args, metrics={"miou": 1.0}
        )
        return path

    return write


@pytest.fixture(autouse=True)
def few_scenes(monkeypatch):
    """Three drawn scenes a split, so that whole epochs fit into a test."""
    real = datasets.open_dataset
    monkeypatch.setattr(datasets, "open_dataset", lambda name, split, **k: real(name, split, **{"length": 4, **k}))


def run(path, out, *flags, dry=True):
    return quantize.main(["--weights", str(path), "--out", str(out), *(["--dry-run"] if dry else []), *TINY, *flags])


@pytest.mark.parametrize("method", ["ptq", "qat", "dynamic", "weight-only"])
def test_each_method_leaves_a_checkpoint_that_computes_what_was_scored(method, float_checkpoint, tmp_path):
    path = float_checkpoint()
    done = run(path, tmp_path / method, "--method", method)
    assert json.loads((tmp_path / method / "results.json").read_text())["miou"] == done["miou"]
    saved = read_checkpoint(tmp_path / method / "best.pt")
    entry = saved["compression"][-1]
    assert (entry["step"], entry["method"], entry["state"]) == ("quantize", method, "int8")
    assert saved["lineage"][-1]["id"] == read_checkpoint(path)["id"]
    quantized = [key for key in saved["state_dict"] if key.endswith("weight_q")]
    assert len(quantized) == len(entry["plan"])
    assert (0 < sum(entry["macs"].values()) <= entry["total_macs"]) == (method != "weight-only")
    # the small ones share storages, as one of its own costs a tensor 300 bytes in the file
    small = [t for t in saved["state_dict"].values() if t.nbytes < 2**16]
    assert len({t.untyped_storage().data_ptr() for t in small}) == len({t.dtype for t in small})
    assert all(saved["state_dict"][key].dtype == torch.int8 for key in quantized)
    assert not [key for key in saved["state_dict"] if key.endswith("values")]
    model, _ = load_checkpoint(tmp_path / method / "best.pt")
    dataset = datasets.open_dataset("synthetic", "val", size=(40, 56), length=2)
    metrics = evaluate.evaluate(
        model, datasets.eval_loader(dataset), num_classes=len(INFO.classes), ignore_index=INFO.ignore_index,
        device=torch.device("cpu"),
    )  # fmt: skip
    assert metrics["miou"] == pytest.approx(done["miou"], abs=1e-9)
    assert models.count_params(model)[0] == pytest.approx(done["before"]["params"], rel=0.02)  # the norms are folded
    assert done["layers"] == len(entry["plan"]) + len(entry["left"])
    assert done["int8_layers"] == (0 if method == "weight-only" else len(entry["plan"]) - len(entry["weights_only"]))
    assert done["quantized_params_percent"] > 50
    if method in ("ptq", "qat"):
        assert abs(done["miou"] - done["miou_fake_quantized"]) < 2
        assert done["quantized_macs_percent"] > 50
    again = evaluate.main(["--weights", str(tmp_path / method / "best.pt"), "--dry-run", "--out", str(tmp_path / "e")])
    assert again["miou"] == pytest.approx(done["miou"], abs=1e-9)


def test_energy_is_reported_where_the_machine_has_a_meter(float_checkpoint, tmp_path, monkeypatch, capsys):
    path, start = float_checkpoint(), time.perf_counter()

    def no_meter(device):
        raise OSError("no RAPL package under /sys")

    monkeypatch.setattr(evaluate, "energy_meter", no_meter)
    done = run(path, tmp_path, "--method", "ptq")
    assert done["energy_j"] is done["energy_j_before"] is None
    assert "no energy: no RAPL package under /sys" in capsys.readouterr().out
    monkeypatch.setattr(evaluate, "energy_meter", lambda device: lambda: 30 * (time.perf_counter() - start))
    done = run(path, tmp_path, "--method", "ptq")
    assert done["energy_j"] == pytest.approx(0, abs=0.01)  # idle at 30 W, and busy at 30 W
    assert "energy, J" in capsys.readouterr().out


@pytest.mark.parametrize(("bits", "group", "ratio"), [(8, 0, 0.30), (8, 16, 0.45), (4, 0, 0.18), (4, 32, 0.30)])
def test_weights_alone_are_that_much_smaller_and_that_close(bits, group, ratio, float_checkpoint, tmp_path):
    path = float_checkpoint(backbone="resnet18", head="fcn")
    done = run(path, tmp_path / "w", "--method", "weight-only", "--bits", str(bits), "--group-size", str(group))
    assert done["file_mb"] < ratio * done["before"]["file_mb"]
    model, before = load_checkpoint(tmp_path / "w" / "best.pt")[0], load_checkpoint(path)[0]
    quantize.simplify(before)
    for name, layer in quant_layers(model).items():
        weight = before.get_submodule(name).weight
        groups = quantize.group_rows(weight.detach(), group, layer.axis)
        step = groups.abs().amax(2, keepdim=True) / (2 ** (bits - 1) - 1)
        off = quantize.group_rows((layer.weight - weight).detach(), group, layer.axis).abs()
        assert (off <= step / 2 * 1.001 + 1e-8).all()


@pytest.mark.parametrize("steps", ["learned", "frozen"])
def test_qat_of_n_steps_and_n_more_is_qat_of_2n(steps, float_checkpoint, tmp_path, monkeypatch):
    path = float_checkpoint()
    flags = ["--weights", str(path), "--method", "qat", "--steps", steps, *TINY, "--epochs", "2", "--ema", "0.9"]
    fit, whole, parts = quantize.train.fit, tmp_path / "whole", tmp_path / "parts"
    quantize.main([*flags, "--out", str(whole)])
    with monkeypatch.context() as patch:
        patch.setattr(quantize.train, "fit", lambda *a, **k: fit(*a, **k | {"max_steps": 2}))
        quantize.main([*flags, "--out", str(parts)])
    assert read_checkpoint(parts / "last.pt")["training"]["step"] == 2
    quantize.main(["--method", "qat", "--resume", "--out", str(parts)])
    ours, theirs = (read_checkpoint(out / "last.pt")["state_dict"] for out in (parts, whole))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    start = read_checkpoint(path)["state_dict"]
    moved = [key for key in theirs if key.endswith("theta") and theirs[key].abs().max() > 0]
    assert bool(moved) == (steps == "learned")
    assert any(not torch.equal(theirs[key], start[key]) for key in start if key in theirs)


def test_sensitivity_names_the_layer_that_suffers(float_checkpoint, tmp_path):
    model, x = make(backbone="resnet18", head="fcn"), images(64, 64)
    spoiled = "backbone.stages.2.0.conv1"
    layer = model.get_submodule(spoiled)
    with torch.no_grad():
        layer.weight[:, 0] *= 300  # one input channel leaves the others few steps
        model.get_submodule("backbone.stages.1.1.bn2").weight[0] /= 300
        model.get_submodule("backbone.stages.1.1.bn2").bias[0] /= 300
    simulated, _ = prepared(model, x)
    shares = quantize.sensitivity(simulated, [x])
    assert set(shares) == set(quant_layers(simulated))
    assert list(shares.values()) == sorted(shares.values(), reverse=True)
    assert spoiled in list(shares)[:2]
    path = float_checkpoint(backbone="resnet18", head="fcn")
    done = run(path, tmp_path / "s", "--method", "ptq", "--sensitivity", dry=False)
    with open(tmp_path / "s" / "sensitivity.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == done["int8_layers"]
    assert (tmp_path / "s" / "sensitivity.png").stat().st_size > 5000


def test_max_drop_leaves_in_float_what_it_takes(float_checkpoint, tmp_path):
    path = float_checkpoint(backbone="resnet18", head="fcn")
    all_of_them = run(path, tmp_path / "a", "--method", "ptq")["int8_layers"]
    assert run(path, tmp_path / "b", "--method", "ptq", "--max-drop", "100")["int8_layers"] == all_of_them
    with pytest.raises(ModelError, match="no layer can be quantized within"):
        run(path, tmp_path / "c", "--method", "ptq", "--max-drop", "-100", dry=False)  # a gain of 100 points


def test_max_drop_leaves_the_fewest_of_the_worst_layers_in_float(float_checkpoint, tmp_path, monkeypatch):
    path, real, tried = float_checkpoint(backbone="resnet18", head="fcn"), quantize.evaluate.evaluate, []

    def pretend(model, *args, **kwargs):  # 50 points; 2 fewer for each of the three worst layers that is quantized
        worst = list(ranking)[:3] if ranking else []
        tried.append(sum(isinstance(model.get_submodule(name), quantize.QuantLayer) for name in worst))
        return real(model, *args, **kwargs) | {"miou": 50.0 - 2 * tried[-1]}

    def rank(*args, **kwargs):
        ranking.update(quantized(*args, **kwargs))
        return ranking

    ranking, quantized = {}, quantize.sensitivity
    monkeypatch.setattr(quantize, "sensitivity", rank)
    monkeypatch.setattr(quantize.evaluate, "evaluate", pretend)
    done = run(path, tmp_path / "d", "--method", "ptq", "--max-drop", "3", dry=False)
    assert set(done["float_layers"]) == set(list(ranking)[:2])
    assert len(ranking) > 15
    assert len(tried) < 10  # the float network, the search by halves, the result


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--bits", "4"], "weight-only"),
        (["--method", "qat", "--group-size", "32"], "weight-only"),
        (["--skip", "no.such.layer"], "no.such.layer"),
        (["--method", "ptq", "--resume"], "last.pt"),
        (["--dataset", "camvid", "--data-root", "absent"], "absent"),
    ],
)
def test_what_cannot_be_is_one_line(flags, message, float_checkpoint, tmp_path):
    path = float_checkpoint()
    with pytest.raises((ModelError, datasets.DataError, OSError), match=message):
        run(path, tmp_path / "out", *flags)


def test_a_quantized_checkpoint_is_not_quantized_again(float_checkpoint, tmp_path):
    run(float_checkpoint(backbone="resnet18", head="fcn"), tmp_path / "q", "--method", "ptq")
    with pytest.raises(ModelError, match="is quantized already"):
        run(tmp_path / "q" / "best.pt", tmp_path / "r", "--method", "ptq")


# ---- post-training helpers ------------------------------------------------------------------------------------------


class Row(nn.Module):
    """Layers in a row."""

    def __init__(self, *layers):
        super().__init__()
        self.layers, self.frozen = nn.Sequential(*layers), []
        self.eval()

    def forward(self, x):
        return self.layers(x)


@torch.no_grad()
def uneven(*layers):
    """Layers in a row, the output channels of each convolution of ranges that differ a hundredfold."""
    torch.manual_seed(0)
    for conv in (layer for layer in layers if isinstance(layer, nn.Conv2d)):
        nn.init.normal_(conv.weight, 0, 0.1)
        conv.weight *= torch.logspace(-1, 1, conv.out_channels)[torch.randperm(conv.out_channels), None, None, None]
    return Row(*layers)


def channel_ranges(conv, dim):
    return conv.weight.detach().abs().transpose(0, dim).flatten(1).amax(1)


@pytest.mark.parametrize(
    "between", [[nn.ReLU()], [nn.ReLU(inplace=True)], [nn.ReLU(), nn.MaxPool2d(2)], [nn.Identity()]]
)
@torch.no_grad()
def test_equalize_gives_both_sides_the_geometric_mean_of_their_ranges(between):
    model, x = uneven(nn.Conv2d(3, 8, 3), *between, nn.Conv2d(8, 5, 3, bias=False)), images(20, 24)
    expected, first, second = model(x), model.layers[0], model.layers[-1]
    r1, r2, bias = channel_ranges(first, 0), channel_ranges(second, 1), first.bias.clone()
    assert quantize.equalize(model, [x]) == [("layers.0", f"layers.{len(between) + 1}")]
    assert torch.allclose(channel_ranges(first, 0), (r1 * r2).sqrt(), rtol=1e-4)
    assert torch.allclose(channel_ranges(second, 1), (r1 * r2).sqrt(), rtol=1e-4)
    assert torch.allclose(first.bias, bias / ((r1 * r2).sqrt() / r2), rtol=1e-4)
    assert torch.allclose(model(x), expected, atol=1e-4)


@torch.no_grad()
def test_equalize_goes_through_depthwise_convolutions():
    depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
    model, x = uneven(nn.Conv2d(3, 8, 1), nn.ReLU(), depthwise, nn.ReLU(), nn.Conv2d(8, 5, 1)), images(12, 16)
    expected, first, last = model(x), model.layers[0], model.layers[4]
    mean = (channel_ranges(first, 0) * channel_ranges(depthwise, 0) * channel_ranges(last, 1)) ** (1 / 3)
    assert quantize.equalize(model, [x]) == [("layers.0", "layers.2"), ("layers.2", "layers.4")]
    for conv, dim in ((first, 0), (depthwise, 0), (last, 1)):
        assert torch.allclose(channel_ranges(conv, dim), mean, rtol=1e-2)
    assert torch.allclose(model(x), expected, atol=1e-4)


class Pair(nn.Module):
    def __init__(self, run, groups=1):
        super().__init__()
        torch.manual_seed(0)
        self.run, self.a, self.b = run, nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1, groups=groups)

    def forward(self, x):
        return self.run(self.a, self.b, x)


def _two_readers(a, b, x):
    y = F.relu(a(x))
    return b(y) + y


def _two_readers_of_the_sum(a, b, x):
    y = a(x)
    return b(F.relu(y)) + y


def _moved_in_place(a, b, x):
    y = F.relu(a(x))
    y += 1
    return b(y)


UNEQUAL = {
    "two readers": _two_readers,
    "two readers before the activation": _two_readers_of_the_sum,
    "moved in place": _moved_in_place,
    "ReLU6": lambda a, b, x: b(F.relu6(a(x))),
    "second called twice": lambda a, b, x: b(b(F.relu(a(x)))),
    "first called twice": lambda a, b, x: b(F.relu(a(x))) + a(x),
    "weight read elsewhere": lambda a, b, x: b(F.relu(a(x))) + a.weight.square().sum(),
    "groups": lambda a, b, x: b(F.relu(a(x))),
}


@pytest.mark.parametrize("name", UNEQUAL)
@torch.no_grad()
def test_equalize_leaves_alone_what_it_would_change(name):
    model = Pair(UNEQUAL[name], groups=2 if name == "groups" else 1)
    before = copy.deepcopy(model.state_dict())
    assert quantize.equalize(model, [images(10, 12)]) == []
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


@torch.no_grad()
def test_relu6_stands_in_the_way_until_it_is_a_relu():
    x = images(9, 9)
    model = uneven(nn.Conv2d(3, 8, 3), nn.ReLU6(), nn.Conv2d(8, 5, 3), nn.Hardtanh(), nn.Conv2d(5, 5, 1))
    assert quantize.equalize(model, [x]) == []
    assert quantize.replace_relu6(model) == ["layers.1"]
    assert quantize.equalize(model, [x]) == [("layers.0", "layers.2")]


def rounding_network():
    """One of each kind of layer that learns to round, and an image of broad blobs: inputs that go together."""
    torch.manual_seed(0)
    model = Row(
        nn.Conv2d(3, 16, 3, 2), nn.ReLU(), nn.Conv2d(16, 16, 3, 1, 2, dilation=2, groups=2), nn.ReLU(),
        nn.ConvTranspose2d(16, 12, 2, 2), nn.ReLU(), nn.Conv2d(12, 5, 1),
    )  # fmt: skip
    return model, [F.interpolate(torch.randn(1, 3, 6, 7), scale_factor=5, mode="bicubic") for _ in range(6)]


@pytest.mark.parametrize(("bits", "group", "activations"), [(8, 0, True), (4, 0, True), (4, 8, False)])
@torch.no_grad()
def test_adaround_chooses_floor_or_ceil_for_better_outputs_and_convert_keeps_it(bits, group, activations):
    model, (*batches, fresh) = rounding_network()
    expected = model(fresh)
    nearest = copy.deepcopy(model)
    quantize.prepare(nearest, batches[0], activations=activations, bits=bits, group_size=group)
    if activations:
        quantize.calibrate(nearest, batches)
    quantize.set_mode(nearest, "fake")
    learned = copy.deepcopy(nearest)
    quantize.adaround(learned, batches, steps=300)
    errors = [(network(fresh) - expected).square().mean() for network in (nearest, learned)]
    assert errors[1] < (0.98 if bits == 8 else 0.8) * errors[0]  # of 8 bits, most is that of the activations
    others = 0
    for name, layer in quant_layers(learned).items():
        start = nearest.get_submodule(name)
        scale = start.weight_scale.view(layer.shape[layer.axis], -1, 1)
        exact, chosen = (quantize.group_rows(x.values, group, layer.axis) / scale for x in (start, layer))
        assert torch.allclose(chosen, chosen.round(), atol=1e-4)
        assert ((chosen.round() == exact.floor()) | (chosen.round() == exact.ceil())).all()
        others += (chosen.round() != exact.round()).sum().item()
        kept = layer.values.clone()
        layer.convert()
        assert torch.allclose(layer.weight, kept, rtol=1e-5)
        if bits == 8 and not group:
            assert torch.equal(quantize.group_rows(layer.weight_q.float(), group, layer.axis), chosen.round())
    assert others > 20


@torch.no_grad()
def test_correct_bias_brings_the_mean_of_each_output_back():
    model, x = uneven(nn.Conv2d(3, 8, 3, bias=False)), [images(24, 24) + 1, images(16, 30) + 1]
    simulated = copy.deepcopy(model)
    quantize.prepare(simulated, x[0], bits=4)
    quantize.calibrate(simulated, x)

    def gaps():
        """Mean error of each output channel, on average over the images."""
        return torch.stack([(simulated(y) - model(y)).mean((0, 2, 3)) for y in x]).mean(0).abs()

    before = gaps()
    quantize.correct_bias(simulated, x)
    assert before.max() > 1e-3
    assert gaps().max() < 1e-5


class Tokens(nn.Module):
    """Two Linear layers after a LayerNorm with two channels far out; with `read`, its output is read as it is, too."""

    def __init__(self, read=False):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.norm, self.read, self.frozen = nn.Conv2d(3, 16, 4, 4), nn.LayerNorm(16), read, []
        self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)
        with torch.no_grad():
            self.norm.weight[3:5] = 100.0
            for layer in (self.a, self.b):
                layer.weight[:, 3:5] /= 100

    def forward(self, x):
        tokens = self.norm(self.embed(x).flatten(2).mT)
        return self.a(tokens) * self.b(tokens) + (tokens if self.read else 0)


@torch.no_grad()
def test_smooth_moves_outliers_into_the_weights():
    model, x = Tokens(), images(32, 32)
    expected, errors = model(x), []
    smoothed = copy.deepcopy(model)
    assert quantize.smooth(smoothed, [x])["norm"] is not None
    assert torch.allclose(smoothed(x), expected, atol=1e-4)
    for network in (model, smoothed):
        simulated, _ = prepared(network, x)
        errors.append((simulated(x) - expected).square().mean())
    assert errors[1] < 0.1 * errors[0]


@torch.no_grad()
def test_smooth_leaves_a_norm_alone_that_others_read():
    model = Tokens(read=True)
    before = copy.deepcopy(model.state_dict())
    assert quantize.smooth(model, [images(32, 32)]) == {"norm": None}
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


@torch.no_grad()
def test_what_the_helpers_change_is_in_the_checkpoint(tmp_path):
    """A network without its norms and ReLU6, equalized and rounded, comes back from its file."""
    model, x = make(backbone="mobilenet_v2", head="fcn"), images(48, 64)
    args = quantize.make_parser().parse_args(["--equalize", "relu6", "--adaround", "2", "--observer", "minmax"])
    converted, entry = quantize.quantize_network(model, [x], args, None, None, tmp_path)
    assert len(entry["relu6"]) > 30
    assert len(entry["equalized"]) > 30
    assert entry["removed"] == quantize.simplify(copy.deepcopy(model))
    quantize.convert(converted)
    save_checkpoint(
        tmp_path / "q.pt", converted, data=INFO.to_dict(), pretrained="no", command="quantize.py",
        compression=[entry | {"state": "int8"}],
    )  # fmt: skip
    found, _ = load_checkpoint(tmp_path / "q.pt")
    assert torch.equal(found(x), converted(x))


@pytest.mark.parametrize("flags", [["--method", "qat", "--adaround", "10"], ["--adaround", "-1"]])
def test_adaround_where_it_has_no_place_is_refused(flags, tmp_path):
    model = make(model="unet", width=8)
    save_checkpoint(tmp_path / "f.pt", model, data=INFO.to_dict(), pretrained="no", command="train.py", args={})
    with pytest.raises(ModelError, match="--adaround takes"):
        quantize.parse_args(["--weights", str(tmp_path / "f.pt"), *flags])
