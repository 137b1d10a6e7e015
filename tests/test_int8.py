"""How quantized networks run: the arithmetic against torch's own, lazy tensors, every network in int8."""

import copy
import itertools
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import evaluate
import int8
import quantize
from int8 import Point, choose_qparams, dequantize, fake_quantize, quant_layers
from models import ModelError, build_model

KERNELS = pytest.mark.skipif(not int8.kernels(), reason="this CPU has no int8 kernels")
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
    zero = int8.quantize(torch.zeros(1), scale, zero_point)
    assert dequantize(zero, scale, zero_point).item() == 0
    # the ends of the range are moved by the rounding of the zero point, by up to half a step
    x = torch.linspace(min(low, 0), max(high, 0), 1001)
    off = (dequantize(int8.quantize(x, scale, zero_point), scale, zero_point) - x).abs()
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
    packed = int8.pack4(q)
    assert packed.dtype == torch.uint8
    assert len(packed) == (count + 1) // 2
    assert torch.equal(int8.unpack4(packed, count), q)


@pytest.mark.parametrize(("kernel", "stride", "padding"), [(2, 2, 0), (3, 2, 1), ((3, 2), (1, 2), (1, 0))])
def test_max_pooling_of_bytes(kernel, stride, padding):
    x = torch.randint(0, 256, (2, 5, 11, 14), dtype=torch.uint8)
    pairs = [(v, v) if isinstance(v, int) else v for v in (kernel, stride, padding)]
    assert torch.equal(int8.max_pool_bytes(x, *pairs).float(), F.max_pool2d(x.float(), *pairs))


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
        layers = [int8.QuantConv2d(conv) for conv in convs]
        for layer in layers:
            layer.points = (Point(), None)
        found = OPERATIONS[name](*(layer(x) for layer in layers))
        assert found.shape == expected.shape
        assert torch.equal(int8.read(found), expected)


def test_what_was_quantized_is_read_quantized_by_all():
    layer, point = int8.QuantConv2d(nn.Conv2d(3, 4, 1)), Point()
    layer.points = (Point(), None)
    point.set_range(torch.tensor(-1.0), torch.tensor(1.0))
    with torch.no_grad():
        x = layer(torch.randn(1, 3, 5, 7))
        before = layer(torch.randn(1, 3, 5, 7)).read()
        assert torch.equal(x.read(point), x.read())
        assert len(x.read().unique()) < len(before.unique())


# ---- points ---------------------------------------------------------------------------------------------------------


def byte_point(low=-1.0, high=1.0, kind=Point):
    point = kind()
    point.set_range(low, high)
    point.freeze(True)
    return point


@pytest.mark.parametrize("kind", [Point, int8.DynamicPoint])
@pytest.mark.parametrize("inference", [False, True])
def test_bytes_of_a_tensor_that_was_written_to_between_two_readers_are_new_ones(kind, inference):
    with torch.inference_mode(inference), torch.no_grad():
        point, x = byte_point(kind=kind), torch.linspace(-1, 1, 9)
        point.quantize(x)
        x *= -0.5
        found = point.dequantize(point.quantize(x))
        assert (found - x).abs().max() <= point.scale


def test_two_readers_of_a_tensor_share_its_bytes():
    point, x = byte_point(), torch.linspace(-1, 1, 9)
    assert point.quantize(x) is point.quantize(x)
    assert point.quantize(x.clone()) is not point.quantize(x)
    q = point.quantize(x)
    point.set_range(-2.0, 2.0)
    point.freeze(True)
    assert not torch.equal(point.quantize(x), q)


class TwoReaders(nn.Module):
    """Two layers that read one tensor of the network's own, which is written to after the first has read it."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.frozen = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1), []

    def forward(self, x):
        x = F.avg_pool2d(x, 2)
        first = self.a(x) * 1
        x *= -0.5
        return torch.cat([first, self.b(x) * 1], 1)


@torch.no_grad()
def test_a_network_that_writes_to_what_a_layer_has_read_is_simulated_as_it_is_converted():
    x = images(12, 14)
    expected, (simulated, _) = TwoReaders()(x), prepared(TwoReaders().eval(), x)
    converted = copy.deepcopy(simulated)
    quantize.convert(converted)
    for network in (simulated, converted):
        assert (network(x) - expected).abs().max() < 0.05 * expected.abs().max()


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
    steps, floats, compute = [0], [0.0], int8.QuantLayer.compute

    def both(layer, q, post, form):
        if (point := post.addend_point) is not None:
            post.other.read(point)  # as compute() does; afterwards the kernel may have written over it
        other = None if post.other is None else int8.read(post.other).clone()
        found = compute(layer, q, post, form)
        if q.dtype != torch.uint8:
            return found
        expected = layer.simulate(layer.points[0].dequantize(q))
        expected = expected if other is None else expected + other
        expected = int8.ACTIVATIONS[post.attr](expected, *post.args)
        if isinstance(form, Point):
            bytes_ = int8.quantize(expected, form.scale, form.zero_point)
            steps.append((found.int() - bytes_.int()).abs().max().item())
        else:
            tolerance = 0.01 if found.dtype == torch.bfloat16 else 1e-5
            floats.append(((found.float() - expected).abs().max() / expected.abs().max()).item() / tolerance)
        return found

    monkeypatch.setattr(int8.QuantLayer, "compute", both)
    model(x)
    monkeypatch.undo()
    return len(steps) + len(floats) - 2, max(steps), max(floats)


@KERNELS
@pytest.mark.parametrize("padding", [0, 1, (2, 0)])
@pytest.mark.parametrize("stride", [1, 2, 3, (2, 1)])
@pytest.mark.parametrize("kernel", [1, 2, 3, (3, 5), 7])
@torch.no_grad()
def test_a_transposed_convolution_as_a_convolution(kernel, stride, padding):
    tried = 0
    for extra, dilation, bias, (c_in, c_out) in itertools.product((0, 1), (1, 2), (True, False), ((3, 5), (16, 11))):
        layer = nn.ConvTranspose2d(c_in, c_out, kernel, stride, padding, extra, bias=bias, dilation=dilation)
        q = torch.randint(0, 256, (2, c_in, 7, 9), dtype=torch.uint8)
        try:
            layer(q.float())
        except (RuntimeError, ValueError):  # nothing is left of the output, or more is added to it than a stride
            continue
        quantized, point = int8.QuantConvTranspose2d(layer), Point()
        quantized.convert()
        point.set_range(torch.tensor(-2.0), torch.tensor(3.0))
        point.freeze(int8=True)
        quantized.points = (point, None)
        weight = dequantize(quantized.weight_q, quantized.weight_scale, axis=1)
        for x in (q, q[:1, :, :5, :4]):  # one packed weight for images of any size
            x = x.contiguous(memory_format=torch.channels_last)
            found = quantized.kernel(x, 1.0, 0, torch.float32, int8.Post())
            options = (stride, padding, extra, 1, dilation)
            expected = F.conv_transpose2d(point.dequantize(x), weight, layer.bias, *options)
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
        tried += 1
    assert tried >= 4


def name(build):
    return "mixed" if build is None else "-".join(map(str, build.values()))


@pytest.mark.parametrize("build", [*NETWORKS, None], ids=name)
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
    int8.set_mode(simulated, "float")
    assert torch.allclose(simulated(x), expected, atol=1e-5 * max(1, expected.abs().max().item()))
    int8.set_mode(simulated, "fake")
    fake = simulated(x)
    assert 0 < (fake - expected).norm() < 0.25 * expected.norm()
    converted = copy.deepcopy(simulated)
    quantize.convert(converted)
    int8.execute(converted, int8=False)
    assert torch.allclose(converted(x), fake, atol=1e-6)  # from int8 weights, in float
    assert not any(p.numel() > 4096 and p.dim() > 3 for p in converted.parameters())
    if int8.kernels():
        int8.execute(converted, int8=True)
        for size in ((65, 97), (48, 40)):
            kernels, steps, floats = compare_each_layer(converted, images(*size, count=2), monkeypatch)
            assert kernels >= len(layers) - len(done.weights_only)
            assert steps <= 1
            assert floats <= 1
        found = converted(x)
        assert (found - fake).norm() < 0.25 * expected.norm()  # a step here and there, through a whole network
    assert converted(images(33, 70)).shape == model(images(33, 70)).shape


@pytest.mark.parametrize(
    "build", [pytest.param(build, marks=pytest.mark.slow) for build in NETWORKS] + [None], ids=name
)
@torch.no_grad()
def test_every_network_compiled(build):
    model, _ = prepared(mixed() if build is None else make(**build), images(65, 97))
    quantize.convert(model)
    compiled = evaluate.compiled(model, model)
    with torch.inference_mode():
        for size in ((65, 97), *[(48, 40)] * (build is not None)):
            x = images(*size)
            expected, found = model(x), compiled(x)
            assert found.shape == expected.shape
            # fused sums are rounded in another order: a step here and there, through a whole network
            assert (found - expected).norm() < 0.1 * expected.norm()
            assert torch.equal(compiled(x), found)


@torch.no_grad()
def test_evaluation_by_the_plain_graph_is_that_of_the_network(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda graph, **_options: graph)
    model, _ = prepared(make(model="segformer-tiny"), images(64, 96))
    quantize.convert(model)
    compiled = evaluate.Compiled(model)
    for size in ((64, 96), (48, 33)):
        x = images(*size)
        assert torch.equal(evaluate.predict(compiled, x), evaluate.predict(model, x))


def test_ranges_that_are_taken_at_run_time_are_not_compiled():
    model = mixed()
    quantize.make_dynamic(model, quantize.prepare(model, images(65, 97)).wiring)
    quantize.convert(model)
    with pytest.raises(ModelError, match="--method dynamic"):
        evaluate.compiled(model, model)


@torch.no_grad()
def test_attention_is_the_same_in_each_of_its_forms(monkeypatch):
    query, key, value = torch.randn(3, 2, 4, 50, 16).unbind()
    expected = F.scaled_dot_product_attention(query, key, value)
    for scores in (1, 3 * 8 * 50, 2**20):  # one query at once, three, all
        assert torch.allclose(int8.attention_products(query, key, value, scores=scores), expected, atol=1e-6)
    assert torch.allclose(int8.attention_products(query, key, value, scale=0.1),
                          F.scaled_dot_product_attention(query, key, value, scale=0.1), atol=1e-6)  # fmt: skip
    x, found = images(65, 97), []
    model, _ = prepared(mixed(), x)
    quantize.convert(model, attention_dtype=torch.bfloat16)
    for form in (("fused", torch.float32), ("fused", torch.bfloat16), ("products", torch.bfloat16)):
        monkeypatch.setattr(int8, "fastest_attention", lambda form=form: form)
        found.append(model(x))
    for other in found[1:]:
        assert (other - found[0]).norm() < 0.05 * found[0].norm()


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
    written, kernel_add = [], int8.QuantLinear.kernel_add

    def spy(layer, x, other, *args):
        before = other.clone()
        out = kernel_add(layer, x, other, *args)
        written.append(not torch.equal(other, before))
        return out

    x = images(6, 7)
    simulated, _ = prepared(Kept(view).eval(), x)
    converted = copy.deepcopy(simulated)
    quantize.convert(converted)
    monkeypatch.setattr(int8.QuantLinear, "kernel_add", spy)
    found, expected = converted(x), simulated(x)
    assert written == [not view]  # in the place of the addend, or beside it
    assert torch.allclose(found, expected, atol=0.1)


@KERNELS
@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
@pytest.mark.parametrize("size", [1, 3, None], ids=["1x1", "3x3", "linear"])
@torch.no_grad()
def test_a_kernel_adds_and_writes_over_what_is_its_own_alone(size, dtype, own):
    plain = nn.Linear(16, 24) if size is None else nn.Conv2d(16, 24, size, padding=size // 2)
    layer, point = (int8.QuantLinear if size is None else int8.QuantConv2d)(plain), Point()
    layer.points = (point, None)
    point.set_range(torch.tensor(-1.0), torch.tensor(2.0))
    layer.convert()
    point.freeze(int8=True)
    shape = (2, 5, 6, 16) if size is None else (2, 16, 5, 6)
    x = torch.randint(0, 256, shape, dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
    x = x.contiguous() if size is None else x
    y = layer.kernel(x, 1.0, 0, torch.float32, int8.Post())
    if dtype == torch.float32:
        other, numbers = torch.randn_like(y), (1.0, 0, 1.0, 0)
        expected = F.relu(y + other)
    else:
        other, numbers = torch.randint_like(y, 0, 256, dtype=torch.uint8), (0.02, 100, 0.03, 40)
        expected = (F.relu(y + 0.02 * (other.float() - 100)) / 0.03 + 40).round().clamp(0, 255)
    before = other.clone()
    found = layer.kernel_add(x, other, own, *numbers, dtype, int8.Post(attr="relu"))
    assert (found.float() - expected).abs().max() <= (1e-4 if dtype == torch.float32 else 1)
    assert (found.float() - expected).abs().mean() <= 0.02
    assert torch.equal(other, before) is not own


@KERNELS
@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 6, 8, 14])
@pytest.mark.parametrize("channels", [3, 16, 32, 64])
@torch.no_grad()
def test_a_kernel_that_is_wrong_is_not_used(size, channels):
    """Windows of every kind: some of oneDNN's kernels give nonsense, and are found out."""
    torch.manual_seed(0)
    layer, point = int8.QuantConv2d(nn.Conv2d(channels, 32, size, size)), Point()
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
    for owner, name in ((int8, "to_bytes"), (Point, "dequantize")):
        function = getattr(owner, name)

        def counted(*args, function=function, name=name):
            seen[name] += 1
            return function(*args)

        monkeypatch.setattr(owner, name, counted)
    model(images(64, 64))
    assert seen == {"to_bytes": 1, "dequantize": 0}


@torch.no_grad()
def test_copies_of_a_network_compute_the_same_and_share_nothing():
    x = images(33, 46)
    simulated, _ = prepared(mixed(), x)
    converted = copy.deepcopy(simulated)
    quantize.convert(converted)
    for network in (simulated, converted):
        expected, other = network(x), copy.deepcopy(network)
        assert torch.equal(other(x), expected)
        shared = {id(p) for p in network.modules()} & {id(p) for p in other.modules()}
        assert not shared
        points = set(other.points)
        assert {p for layer in quant_layers(other).values() for p in layer.points if p is not None} == points
        for point in points:
            point.scale *= 3
            point.freeze(point.int8)
        assert torch.equal(network(x), expected)
        assert not torch.equal(other(x), expected)
    pickle.loads(pickle.dumps(converted.points[0]))  # as a process of its own is given it


def test_what_watches_a_network_is_gone_afterwards():
    x = images(33, 46)
    model, _ = prepared(mixed(), x)
    seen = []

    def fail(layer, compute, *args):
        seen.append(layer)
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"), int8.watched(quant_layers(model).values(), None, fail):
        model(x)
    assert len(seen) == 1
    assert not any("compute" in vars(layer) or layer._forward_pre_hooks for layer in quant_layers(model).values())
    assert int8.Lazy.log is None
