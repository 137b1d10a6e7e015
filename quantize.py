"""Quantize a trained network to 8 bits, by hand, and run it on real int8 kernels.

    python quantize.py --method qat                       # fine-tunes checkpoints/train/best.pt while it is quantized
    python quantize.py --method ptq --observer mse        # post-training: calibration images only
    python quantize.py --method dynamic                   # no calibration: ranges of activations at run time
    python quantize.py --method weight-only --bits 4      # for size; computes in float

The arithmetic. An activation x is stored as q = clamp(round(x / scale) + zero_point, 0, 255), uint8, and stands for
(q - zero_point) * scale; round() goes to the even neighbour, in int8 execution ties may go up. scale = (high - low) /
255 and zero_point = round(-low / scale), where low <= 0 <= high, so that 0 (padding, ReLU) is exact. A weight w is
stored as clamp(round(w / scale), -127, 127), int8, with scale = max |w| / 127. A product of both is summed in int32,
exactly, and multiplied by the two scales; the bias, which is not quantized, is added in float32. (Jacob et al. 2018,
section 2; Krishnamoorthi 2018.)

    what                                  granularity           stored as         range from
    input of a Conv2d or Linear           one per tensor        uint8, affine     observer on calibration images
    weight                                one per output        int8, symmetric   max |w|, learned (LSQ), or AdaRound
    weight, --method weight-only          one per output or     int8, or 4 bits   max |w|, or AdaRound
                                          --group-size inputs   in [-7, 7]
    the other operand of a residual add   one per tensor        uint8, affine     observer
    bias, norms, softmax, resizing        -                     float32           -

prepare() puts the layers of int8.py into a network, calibrate() finds the ranges of its activations, and the network is
simulated: it computes in float with quantized values, and can be trained. convert() then stores the weights in int8.
int8.py says how both run, and on what kernels.
"""

if __name__ == "__main__":  # the imports take seconds: Ctrl-C ends them without a traceback
    import signal

    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import contextlib
import copy
import functools
import math
import re
import time
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import datasets
import evaluate
import int8
import models
import train
from datasets import count, not_negative, positive_int
from int8 import Point, choose_qparams, fake_quantize, group_rows, kernels, quant_layers, read, set_mode, simulated
from int8 import dequantize as dequantize
from int8 import quantize as quantize
from models import ModelError, fold_batchnorm, fold_layer_scale

MOMENTUM = 0.05  # of the ranges that QAT observes

# ---- observers ------------------------------------------------------------------------------------------------------

BINS = 2048


class Observer:
    """Finds the range of the values it sees, by `method`:

    minmax: all of them. average: the mean of each batch's smallest and largest. percentile: what is left when a share
    of 1e-4 is cut off at each end. mse: the range with the least squared error of quantized values. entropy: the range
    with the least Kullback-Leibler divergence of the histogram after from the one before (Migacz 2017). The last three
    look at a histogram of `BINS` bins, which needs the extremes: it is filled in a second pass over the same data.
    """

    def __init__(self, method="minmax"):
        self.method, self.low, self.high, self.counts, self.batches = method, math.inf, -math.inf, None, 0
        self.sums = [0.0, 0.0]

    @property
    def passes(self):
        return 1 if self.method in ("minmax", "average") else 2

    def see(self, x, where="a tensor"):
        """Take in the values of x. ModelError, which says `where`, if one of them is not finite."""
        x = x.detach().float()
        if self.counts is not None:
            self.counts += torch.histc(x, BINS, self.low, self.high).double()
            return
        low, high = (v.item() for v in torch.aminmax(x))
        if not math.isfinite(high - low):  # NaN is in both
            raise ModelError(f"calibration saw values that are not finite: {where}")
        self.low, self.high = min(self.low, low, 0.0), max(self.high, high, 0.0)
        self.sums, self.batches = [self.sums[0] + low, self.sums[1] + high], self.batches + 1

    def second_pass(self):
        if self.high <= self.low:
            self.high = self.low + 1.0
        self.counts = torch.zeros(BINS, dtype=torch.float64)

    def range(self):
        """(low, high) to quantize; raises ModelError where nothing was seen."""
        if not self.batches:
            raise ModelError("calibration saw no values")
        if self.method == "average":
            return tuple(total / self.batches for total in self.sums)
        if self.method == "minmax":
            return self.low, self.high
        return RANGES[self.method](self.counts, self.low, self.high)


def percentile_range(counts, low, high, cut=1e-4):
    """The range that leaves `cut` of the values out at each end."""
    edges = torch.linspace(low, high, len(counts) + 1, dtype=torch.float64)
    below = counts.cumsum(0) / counts.sum()
    first, last = int((below <= cut).sum()), int((below < 1 - cut).sum())
    return min(edges[first].item(), 0.0), max(edges[min(last + 1, len(counts))].item(), 0.0)


def mse_range(counts, low, high):
    """The range with the least squared error of quantize-dequantize on the histogram."""
    width = (high - low) / len(counts)
    kept = counts > 0
    centres = (low + width * (torch.arange(len(counts), dtype=torch.float64) + 0.5))[kept].float()
    counts = counts[kept].float()

    def error(range_):
        scale, zero_point = choose_qparams(*map(torch.tensor, range_))
        return ((fake_quantize(centres, scale, zero_point) - centres).square() * counts).sum().item()

    return _best(error, low, high)


def entropy_range(counts, low, high):
    """The range with the least divergence KL(P || Q): P the histogram with what lies outside moved to its ends, Q the
    same after its bins were joined into 256 levels and spread again over the bins that were not empty."""
    edges = torch.linspace(low, high, len(counts) + 1, dtype=torch.float64)

    def divergence(range_):
        first = int((edges < range_[0] - 1e-12).sum())
        last = max(int((edges <= range_[1] + 1e-12).sum()) - 1, first + 1)
        p = counts[first:last].clone()
        q, filled = p.clone(), p > 0
        p[0] += counts[:first].sum()
        p[-1] += counts[last:].sum()
        level = torch.arange(len(p)) * 256 // max(len(p), 256)
        sums = torch.zeros(256, dtype=torch.float64).index_add_(0, level, q)
        sizes = torch.zeros(256, dtype=torch.float64).index_add_(0, level, filled.double())
        q = torch.where(filled, (sums / sizes.clamp(min=1))[level], 0.0)
        p, q = p / p.sum(), q / q.sum().clamp(min=1e-12)
        there = p > 0
        return (p[there] * (p[there] / q[there].clamp(min=1e-12)).log()).sum().item()

    return _best(divergence, low, high)


def _best(error, low, high, shares=32):
    """The range of the least error: each end shrunk in turn, twice, down to a tenth of what was seen."""
    ends = [low, high]
    for end in (0, 1, 0, 1):
        tries = [[*ends] for _ in range(shares)]
        for trial, share in zip(tries, torch.linspace(1.0, 0.1, shares).tolist(), strict=True):
            trial[end] = (low, high)[end] * share
        ends = min(tries, key=error)
    return tuple(ends)


RANGES = {"percentile": percentile_range, "mse": mse_range, "entropy": entropy_range}
OBSERVERS = ("minmax", "average", *RANGES)


# ---- prepare, calibrate, convert ------------------------------------------------------------------------------------


@models.no_grad
def prepare(model, images, *, activations=True, skip=(), **options):
    """Replace, in place, each convolution and Linear that the network calls by its QuantLayer, and find their points.

    images: a batch that is run. activations: False to quantize weights alone. skip: names of layers to leave. options:
    bits and group_size. BatchNorm is folded first, dropout goes.
    """
    removed = simplify(model)
    candidates = {n: m for n, m in model.named_modules() if type(m) in int8.KINDS and n not in skip}
    left = dict.fromkeys(skip, "left out")
    for name, layer in model.named_modules():
        if isinstance(layer, tuple(int8.KINDS)) and type(layer) not in int8.KINDS:
            left[name] = f"a {type(layer).__name__}"
    for name, layer in candidates.items():
        if why := int8.KINDS[type(layer)].refuses(layer):
            left[name] = why
            continue
        model.set_submodule(name, int8.KINDS[type(layer)](layer, **options))
    layers = quant_layers(model)
    if not layers:
        raise ModelError("no layer of this network can be quantized")
    wiring, macs, weights_only = dict.fromkeys(layers, (None, None, False)), {}, {}
    if activations:
        wiring, macs = int8.trace_reads(model, images, layers)
        weights_only = {name: "not called as a layer" for name, row in wiring.items() if row[0] is None}
    int8.connect(model, wiring)
    return Prepared(wiring, removed, left, weights_only, macs)


class Prepared(NamedTuple):
    """What prepare() did: `wiring`, see int8.connect(); `removed` norms and dropouts; {name: reason} of layers `left`
    in float and of those with `weights_only` quantized; multiply-accumulates an image, by layer."""

    wiring: dict
    removed: list
    left: dict
    weights_only: dict
    macs: dict


@models.no_grad
def simplify(model):
    """Fold BatchNorm and layer scales, drop dropout, in place -> names of what went; norms that stay do not learn."""
    before = {n: m for n, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}
    fold_batchnorm(model.eval())
    removed = [name for name in before if type(model.get_submodule(name)) is nn.Identity]
    removed += fold_layer_scale(model)
    dropouts = [n for n, m in model.named_modules() if isinstance(m, (nn.Dropout, nn.Dropout2d))]
    remove(model, dropouts)
    return removed + dropouts


def remove(model, names):
    for name in names:
        model.set_submodule(name, nn.Identity())
    model.frozen = [*model.frozen, *(m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm))]


@models.no_grad
def calibrate(model, batches, *, observer="minmax"):
    """Run a prepared network in float on batches of images and set each point by what its observer saw. ModelError
    names the layer and the batch, from 1, of a value that is not finite."""
    observers, number = {point: Observer(observer) for point in model.points}, 0
    layers = {layer: name for name, layer in quant_layers(model).items() if layer.points[0] is not None}

    def see_input(layer, args):
        observers[layer.points[0]].see(read(args[0]), f"the input of {layers[layer]}, batch {number}")

    def see_addend(layer, compute, x, post, form):
        if post.addend_point is not None:
            where = f"what is added to the output of {layers[layer]}, batch {number}"
            observers[post.addend_point].see(post.other.read(), where)
        return compute(x, post, form)

    set_mode(model, "float")
    with int8.watched(layers, see_input, see_addend):
        for again in range(Observer(observer).passes):
            for each in observers.values() if again else ():
                each.second_pass()
            for number, images in enumerate(batches, 1):  # noqa: B007, it is for what sees them
                model(images)
    for point, each in observers.items():
        point.set_range(*each.range())
    set_mode(model, "fake")


@models.no_grad
def make_dynamic(model, wiring):
    """Give a prepared network points that take the ranges of activations at run time. wiring: that of prepare()."""
    int8.connect(model, wiring, int8.DynamicPoint)
    set_mode(model, "fake")


@models.no_grad
def learn_steps(model):
    """Make the scales of weights and activations trainable, by a factor each (LSQ, Esser et al. 2020; here its
    logarithm, so that a step of any optimizer changes a small scale by as many percent as a large one)."""
    for layer in quant_layers(model).values():
        layer.theta = nn.Parameter(torch.zeros_like(layer.weight_scale))
    for point in model.points:
        point.theta = nn.Parameter(torch.zeros_like(point.scale))


@models.no_grad
def convert(model, *, attention_dtype=None):
    """Turn a calibrated network, in place, into one that holds int8 weights and, where there are kernels, runs them.
    attention_dtype: torch.bfloat16 to compute attention in that."""
    for layer in quant_layers(model).values():
        layer.convert()
    int8.execute(model, int8=kernels(), attention_dtype=attention_dtype)


def int8_encoder(model, batches, adapted=None, trained=()):
    """encode(images (N, 3, H, W)) -> feature maps, of a float network in int8, as --method ptq makes it by default.

    batches: images to calibrate it on; the network is copied. adapted: the same network with something in it that
    learns; trained: names of that, of layers or tensors of the backbone. Its blocks before the first with such a name
    run in int8, the others are adapted's own. ModelError where none is before it.
    """
    model, blocks = copy.deepcopy(model), blocks_in_order(model, batches[0])
    learning = {block_of(model, name) for name in trained}
    first = min((blocks.index(name) if name in blocks else 0 for name in learning), default=len(blocks))
    if not first:
        raise ModelError("--trunk int8: the backbone learns from its first block on; --targets can name later layers")
    for name in blocks[:first] if learning else ():
        model.get_submodule(name).register_forward_hook(lambda _block, _inputs, out: int8.floats(out))
    later = tuple(f"{name}." for name in (*blocks[first:], "head"))
    simplify(model)
    smooth(model, batches[:8])
    prepare(model, batches[0], skip=[n for n, _ in model.named_modules() if f"{n}.".startswith(later)])
    calibrate(model, batches, observer="mse")
    correct_bias(model, batches)
    convert(model.eval().requires_grad_(False), attention_dtype=torch.bfloat16)
    if not learning:
        return functools.partial(_encode, model, {})  # who copies what holds it copies the network
    return functools.partial(_encode, adapted, {name: model.get_submodule(name) for name in blocks[:first]})


@torch.compiler.disable  # which takes no Lazy
def _encode(model, blocks, images):
    """model.encode(images) with blocks {name: module} in the place of its own; without any, nothing of it learns."""
    own = {name: model.get_submodule(name) for name in blocks}
    whole = contextlib.nullcontext() if blocks else torch.autocast(images.device.type, enabled=False)
    try:
        for name, block in blocks.items():
            model.set_submodule(name, block)
        with torch.set_grad_enabled(bool(blocks)), whole:
            return [read(feature) for feature in model.encode(images)]
    finally:
        for name, block in own.items():
            model.set_submodule(name, block)


def block_of(model, name):
    """The block that a module, or a tensor, is in, by name: the member of the outermost list, else the module."""
    module, parts = model, name.split(".")
    for i, part in enumerate(parts):
        listed, module = isinstance(module, (nn.Sequential, nn.ModuleList)), getattr(module, part)
        if listed:
            return ".".join(parts[: i + 1])
    return name if isinstance(module, nn.Module) else name.rpartition(".")[0]


@models.no_grad
def blocks_in_order(model, images):
    """Names of the backbone's blocks, block_of() its layers, in the order in which they run on images (N, 3, H, W)."""
    layers, called = [(n, m) for n, m in model.named_modules() if n.startswith("backbone.") and not [*m.children()]], []
    hooks = [layer.register_forward_pre_hook(lambda *_, name=name: called.append(name)) for name, layer in layers]
    model.encode(images)
    for hook in hooks:
        hook.remove()
    return list(dict.fromkeys(block_of(model, name) for name in called))


def packed(state, small=2**16):
    """The state_dict of a converted network for a file: its points as two vectors, and tensors of at most `small` bytes
    as views of one storage for each dtype. A tensor with a storage of its own takes some 300 bytes more, a point 600.
    """
    state, views = dict(state), {}
    for kind in ("scale", "zero_point"):
        keys = [key for key in state if re.fullmatch(rf"points\.\d+\.{kind}", key)]
        if keys:
            state[f"points.{kind}"] = torch.stack([state.pop(key) for key in keys])
    for key, value in state.items():
        if value.nbytes <= small:
            views.setdefault(value.dtype, []).append(key)
    for keys in views.values():
        storage = torch.cat([state[key].flatten() for key in keys]).split([state[key].numel() for key in keys])
        state |= {key: view.view(state[key].shape) for key, view in zip(keys, storage, strict=True)}
    return state


def rebuild(model, entry, state):
    """Give a network as build_model() makes it the structure that `entry` of a checkpoint's compression describes.

    state: the checkpoint's state_dict, for what it holds; nothing is copied, but what packed() did is undone.
    """

    def empty(key):
        return torch.empty_like(state[key], device="meta")

    for kind in ("scale", "zero_point"):  # see packed()
        for number, value in enumerate(state.pop(f"points.{kind}", ())):
            state[f"points.{number}.{kind}"] = value

    if "plan" in entry:  # its name in older checkpoints
        entry["wiring"] = entry.pop("plan")
    if 2 * len(entry["wiring"]) < max((i for row in entry["wiring"].values() for i in row[:2] if i), default=0):
        raise ModelError("it has more points than its layers can have")
    remove(model, entry["removed"])
    for name in entry["relu6"]:
        model.set_submodule(name, nn.ReLU())
    for name in entry["wiring"]:
        layer = model.get_submodule(name)
        layer = int8.KINDS[type(layer)](layer, bits=entry["bits"], group_size=entry["group_size"])
        if f"{name}.weight_q" in state:
            layer.convert()
        if f"{name}.theta" in state:
            layer.theta = nn.Parameter(torch.empty_like(layer.weight_scale))
        model.set_submodule(name, layer)
    int8.connect(model, entry["wiring"], int8.DynamicPoint if entry["method"] == "dynamic" else Point)
    for number, point in enumerate(model.points):
        if f"points.{number}.theta" in state:
            point.theta = nn.Parameter(torch.empty_like(point.scale))
    for key in state:  # of convolutions that took over a BatchNorm
        name, _, kind = key.rpartition(".")
        if kind == "bias" and model.get_submodule(name).bias is None:
            model.get_submodule(name).bias = nn.Parameter(empty(key))


def restore(model, entry):
    """Make a rebuilt network whose tensors are loaded ready to run."""
    set_mode(model, "fake")
    model.output_ranges = entry.get("outputs", {})
    if entry["state"] == "int8":
        int8.execute(model, int8=kernels(), attention_dtype=torch.bfloat16 if entry["attention"] == "bf16" else None)


@models.no_grad
def observe_outputs(model, batches):
    """Find the range of what each convolution of a converted network puts out, ReLU included, addends not -> {name:
    [low, high]}, also the network's `output_ranges`.

    onnxruntime computes a convolution in integers only if its output is quantized, which ours is not where a sum,
    another activation or resizing follows. The convolution that comes last, which makes the logits, has no range.
    """
    ranges = {}
    layers = {layer: name for name, layer in quant_layers(model).items() if isinstance(layer, int8.QuantConv2d)}

    def see(layer, compute, x, post, form):
        y = compute(x, post if post.clips else int8.Post(), None)
        low, high = ranges.pop(layer, (0.0, 0.0))
        seen = torch.aminmax(y)
        ranges[layer] = min(low, seen.min.item()), max(high, seen.max.item())
        return read(y, form) if post.clips else compute(x, post, form)

    with simulated(model), int8.watched(layers, in_compute=see):
        for images in batches:
            model(images)
    model.output_ranges = {layers[layer]: list(ranges[layer]) for layer in list(ranges)[:-1]}
    return model.output_ranges


# ---- post-training helpers ------------------------------------------------------------------------------------------


@models.no_grad
def smooth(model, batches, *, alphas=(0.3, 0.4, 0.5, 0.6, 0.7, 0.8)):
    """SmoothQuant (Xiao et al. 2023, section 4): outliers of LayerNorm's channels move into the Linear layers after it.

    Each LayerNorm whose output only Linear layers read is divided, channel by channel, by max|x|^a / max|w|^(1-a), and
    their weights are multiplied by it, which changes nothing in float. Of `alphas`, and of no smoothing, the one whose
    quantized products come closest to the float ones is taken. Returns {name of the LayerNorm: alpha, or None}; those
    that something else reads as well have None.
    """
    readers, inputs = linear_readers(models.trace(model, batches[0])), {}

    def sample(norm, _inputs, output):
        rows = output.flatten(0, -2)
        inputs.setdefault(norm, []).append(rows[:: 1 + len(rows) // 512].clone())

    hooks = [norm.register_forward_hook(sample) for norm, linears in readers.items() if linears]
    for images in batches:
        model(images)
    for hook in hooks:
        hook.remove()
    names, chosen = {m: name for name, m in model.named_modules()}, {}
    for norm, linears in readers.items():
        chosen[names[norm]] = smooth_one(norm, linears, torch.cat(inputs[norm]), alphas) if linears else None
    return chosen


def linear_readers(traced):
    """{LayerNorm with weights that a Linear reads: the Linears that alone read it, or [] where others do}."""
    found = {}
    for call in traced.calls:
        norm = call.module
        if call.function is not F.layer_norm or type(norm) is not nn.LayerNorm or not norm.elementwise_affine:
            continue
        (value,) = call.makes
        linears = [c.module for c in value.readers if c.function is F.linear and c.reads[0] is value]
        if any(type(linear) is nn.Linear for linear in linears):
            alone = len(linears) == len(value.readers) and value not in traced.outputs and traced.once(norm)
            alone = alone and all(type(linear) is nn.Linear and traced.once(linear) for linear in linears)
            found[norm] = linears if alone else []
    return found


def smooth_one(norm, linears, x, alphas):
    """smooth() of one LayerNorm with outputs like x (rows, channels), in place -> the alpha taken, or None."""
    largest_x = x.abs().amax(0).clamp(min=1e-5)
    largest_w = torch.stack([layer.weight.abs().amax(0) for layer in linears]).amax(0).clamp(min=1e-5)

    def factor(alpha):
        return torch.ones_like(largest_x) if alpha is None else (largest_x**alpha / largest_w ** (1 - alpha))

    def error(alpha):
        s = factor(alpha)
        qx = fake_quantize(x / s, *choose_qparams((x / s).min(), (x / s).max()))
        total = 0.0
        for layer in linears:
            w = layer.weight * s
            qw = fake_quantize(w, w.abs().amax(1).clamp(min=1e-8) / int8.INT8[1], limits=int8.INT8)
            total += (F.linear(qx, qw) - F.linear(x, layer.weight)).square().sum().item()
        return total

    alpha = min((None, *alphas), key=error)
    s = factor(alpha)
    norm.weight /= s
    norm.bias /= s
    for layer in linears:
        layer.weight *= s
    return alpha


@models.no_grad
def correct_bias(model, batches):
    """Add to each layer's bias what quantization takes from the mean of its outputs (Nagel et al. 2019, section 4.2).

    Both means are of the same inputs, those of the quantized network before them, so each layer answers for itself.
    """
    shifts = {layer: [] for layer in quant_layers(model).values() if layer.points[0] is not None}

    def see(layer, args):
        x = read(args[0])
        quantized = layer.simulate(layer.points[0].quantize(x))
        layer.mode = "float"
        shift = layer.simulate(x) - quantized
        layer.mode = "fake"
        dim = -1 if isinstance(layer, int8.QuantLinear) else 1
        shifts[layer].append(shift.movedim(dim, 0).flatten(1).mean(1))

    with int8.watched(shifts, see):
        for images in batches:
            model(images)
    for layer, found in shifts.items():
        if found:
            mean = torch.stack(found).mean(0)
            layer.bias = nn.Parameter(mean if layer.bias is None else layer.bias + mean)


def replace_relu6(model):
    """Replace, in place, each ReLU6 by a ReLU, past which equalize() can scale channels -> their names.

    (Nagel et al. 2019, section 5.1.1.) It changes what the network computes wherever a value exceeds 6.
    """
    clips = [
        name
        for name, m in model.named_modules(remove_duplicate=False)
        if isinstance(m, nn.Hardtanh) and (m.min_val, m.max_val) == (0, 6)
    ]
    for name in clips:
        model.set_submodule(name, nn.ReLU())
    return clips


@models.no_grad
def equalize(model, batches, *, rounds=50):
    """Cross-layer equalization (Nagel et al. 2019, section 4.1): convolutions in a row get weights of like ranges.

    Where one convolution alone reads another's output, directly or past ReLU and max pooling, output channel i of the
    first is divided, and input channel i of the second multiplied, by s = sqrt(r1 * r2) / r2, r1 and r2 the largest
    magnitudes of their weights for that channel. Both then are sqrt(r1 * r2), and the network's function is the same.
    The second has one group or is depthwise. Rows of more than two are balanced pair by pair until nothing changes by
    more than a thousandth. Expects BatchNorm to be folded. Returns [(name of the first, name of the second)].
    """
    pairs = consecutive_convs(models.trace(model, batches[0]))
    for _ in range(rounds):
        if max((balance(*pair) for pair in pairs), default=1.0) < 1.001:
            break
    names = {m: name for name, m in model.named_modules()}
    return [(names[first], names[second]) for first, second in pairs]


def consecutive_convs(traced):
    """Pairs of nn.Conv2d, each run once, of which the second alone reads the first's output past functions that commute
    with a positive factor on each channel."""

    def is_conv(call):
        return call.function is F.conv2d and type(call.module) is nn.Conv2d and traced.once(call.module)

    pairs = []
    for call in filter(is_conv, traced.calls):
        reader = traced.sole_reader(call.makes[0])
        while reader and reader.function in SCALE_EQUIVARIANT:
            reader = traced.sole_reader(reader.makes[0])
        second = reader.module if reader and is_conv(reader) else None
        if second and (second.groups == 1 or second.groups == second.in_channels == second.out_channels):
            pairs.append((call.module, second))
    return pairs


SCALE_EQUIVARIANT = {F.relu, torch.relu, torch.Tensor.relu, *int8.IN_PLACE, F.max_pool2d, torch.max_pool2d}


def balance(first, second):
    """Equalize two convolutions in a row, in place -> the largest factor on a channel, or its inverse."""
    depthwise = second.groups > 1
    r1 = first.weight.abs().flatten(1).amax(1)
    r2 = second.weight.abs().transpose(0, int(not depthwise)).flatten(1).amax(1)
    s = torch.where((r1 > 0) & (r2 > 0), (r1 * r2).sqrt() / r2, 1.0)
    first.weight /= s.view(-1, 1, 1, 1)
    if first.bias is not None:
        first.bias /= s
    second.weight *= s.view(-1, 1, 1, 1) if depthwise else s.view(1, -1, 1, 1)
    return torch.maximum(s, 1 / s).max().item()


@models.no_grad
def adaround(model, batches, *, steps, places=2048):
    """AdaRound (Nagel et al. 2020, sections 3 and 4): learn which weights of a simulated network to round up or down.

    In one run, each layer as it is called: of the outputs that the float network has there, `places` are sampled, and
    the rounding is learned with which they come out best from the quantized network's inputs (asymmetric
    reconstruction, section 3.4; without the activation). The weights become exact multiples of their scales. A layer
    that is called twice learns from the first call. batches: all in one, cropped to the smallest.
    """
    layers = quant_layers(model)
    height, width = (min(images.shape[d] for images in batches) for d in (2, 3))
    images = torch.cat([images[..., :height, :width] for images in batches])
    targets, progress = {}, tqdm(total=len(layers), desc="adaround", leave=False, disable=None)

    def see(layer, args):
        if layer not in targets:
            targets[layer] = sampled_inputs(layer, read(args[0]), places) @ as_matrix(layer, layer.values).mT

    def learn(layer, args):
        if targets[layer] is not None:
            x = read(args[0], layer.points[0])
            learn_rounding(layer, sampled_inputs(layer, x, places), targets[layer], steps=steps)
            targets[layer] = None
            progress.update()

    for mode, hook in (("float", see), ("fake", learn)):
        set_mode(model, mode)
        with int8.watched(layers.values(), hook):
            model(images)
    progress.close()


def sampled_inputs(layer, x, count):
    """What a layer multiplies its weight with at about `count` places of its output, or at all: (groups, places, inputs
    of an output), the same places for each x of one shape. Of a transposed convolution: at places of its input."""
    if not isinstance(layer, int8.QuantConv2d):
        x = x.movedim(1, -1) if isinstance(layer, int8.QuantConvTranspose2d) else x
        x = x.flatten(0, -2)
        return x[_some(len(x), count)][None]
    rows = []
    for image in x:
        row = F.unfold(image[None], layer.kernel_size, layer.dilation, layer.padding, layer.stride)[0]
        rows.append(row[:, _some(row.shape[1], max(1, count // len(x)))].unflatten(0, (layer.groups, -1)).mT)
    return torch.cat(rows, 1)


def _some(total, count):
    return torch.randperm(total, generator=torch.Generator().manual_seed(0))[:count]


def as_matrix(layer, weight):
    """A layer's weight, or what has its shape, as (groups, outputs, inputs) for sampled_inputs(): products of a
    transposed convolution are those before their overlaps are summed."""
    if isinstance(layer, int8.QuantConvTranspose2d):
        return weight.flatten(1).mT[None]
    return weight.flatten(1).unflatten(0, (layer.groups if isinstance(layer, int8.QuantConv2d) else 1, -1))


def from_matrix(layer, matrix):
    """as_matrix() undone."""
    return (matrix[0].mT if isinstance(layer, int8.QuantConvTranspose2d) else matrix).reshape(layer.shape)


def learn_rounding(layer, x, target, *, steps, batch_size=256, lr=0.03, strength=0.1, stretch=(-0.1, 1.1)):
    """Set a layer's weight to the multiples of its scale, each the next below or above, that bring the product with x
    (groups, places, inputs) closest to `target` (groups, places, outputs) in the squared sum.

    h = clip(sigmoid(v) * (zeta - gamma) + gamma, 0, 1) of each weight moves from its fraction to 0 or 1 under the
    regularizer 1 - |2h - 1|^beta, beta from 20 to 2, after a fifth of the steps without it. Errors are in units of what
    the rounding of one weight changes, which makes `strength` the same for every layer. An output for which rounding to
    nearest turns out better keeps that.
    """
    (gamma, zeta), limits = stretch, (-layer.limit, layer.limit)
    rows = group_rows(layer.values, layer.group_size, layer.axis)
    scale = layer.ungroup(layer.weight_scale.view(len(rows), -1, 1).expand_as(rows))  # one for each weight
    scale, weight = as_matrix(layer, scale), as_matrix(layer, layer.values / scale)
    floor, nearest = weight.floor().clamp(*limits), weight.round().clamp(*limits)
    v = torch.logit(((weight - floor).clamp(0, 1) - gamma) / (zeta - gamma)).requires_grad_()
    unit = scale.amax(2).unsqueeze(1) * x.square().mean((1, 2), keepdim=True).sqrt().clamp(min=1e-8)
    optimizer = torch.optim.Adam([v], lr=lr, fused=True)

    def error(q, x, target):
        """Squared error of each output, (groups, outputs), with weights q * scale."""
        return ((x @ (q * scale).mT - target) / unit).square().mean(1)

    for step in range(steps):
        some = torch.randint(x.shape[1], (batch_size,))
        with torch.enable_grad():
            h = (v.sigmoid() * (zeta - gamma) + gamma).clamp(0, 1)
            loss = error((floor + h).clamp(*limits), x[:, some], target[:, some]).sum()
            progress = (step / steps - 0.2) / 0.8
            if progress > 0:
                loss = loss + strength * (1 - (2 * h - 1).abs().pow(20 - 18 * progress)).sum()
            optimizer.zero_grad()
            loss.backward()
        optimizer.step()
    learned = (floor + (v > 0)).clamp(*limits)  # h > 1/2
    better = error(learned, x, target) < error(nearest, x, target)
    layer.values.copy_(from_matrix(layer, torch.where(better.unsqueeze(2), learned, nearest) * scale))


@torch.no_grad()
def sensitivity(model, batches, *, most=None):
    """How much each layer alone, quantized in an otherwise float network, changes the logits: {name: share}, worst
    first. The share is of their energy: sum of squared differences over sum of squares. Stops after `most` layers."""
    layers = [name for name, layer in quant_layers(model).items() if layer.points[0] is not None][:most]
    set_mode(model, "float")
    expected = [model(images) for images in batches]
    energy = sum(logits.square().sum() for logits in expected)
    shares = {}
    for name in tqdm(layers, desc="sensitivity", leave=False, disable=None):
        set_mode(model, "fake", [name])
        errors = [(model(x) - y).square().sum() for x, y in zip(batches, expected, strict=True)]
        set_mode(model, "float", [name])
        shares[name] = (sum(errors) / energy).item()
    set_mode(model, "fake")
    return dict(sorted(shares.items(), key=lambda item: -item[1]))


# ---- training -------------------------------------------------------------------------------------------------------


def fine_tune(model, float_model, parent, *, args, device, save, last=None):
    """QAT: train the simulated network by train.fit(), with KL from the float one; best.pt and last.pt then hold it as
    such. Scales learn (LSQ), or follow what is seen for the first third of the steps, and then stay."""
    if args.steps == "learned" and last is None:
        learn_steps(model)
    kl = 0.0 if hasattr(model.head, "queries") else args.kl  # a loss on masks has no such term
    objective = train.make_objective(args, model, parent.train_set, parent.out, device, teacher=float_model, kl=kl)
    third = train.total_steps(args, parent.train_set) / 3

    def observe(step):
        momentum = MOMENTUM if args.steps == "frozen" and step < third and model.training else 0.0
        for point in model.points:
            point.momentum = momentum

    def after_step(step, shadow):
        observe(step + 1)
        hold_zeros(step, shadow)

    pruned = any(step["step"] == "prune" for step in parent.checkpoint["compression"])
    weights = {name: p for name, p in model.named_parameters() if name.endswith(".values")}
    hold_zeros = train.keep_zeros(weights if pruned else {})
    observe(last["training"]["step"] if last else 0)
    return train.fit_by_flags(
        args, objective, parent.train_set, parent.val_set, script="quantize.py", device=device, save=save, last=last,
        after_step=after_step, score_first=True,
    )  # fmt: skip


# ---- command line ---------------------------------------------------------------------------------------------------

METHODS = ("dynamic", "ptq", "qat", "weight-only")
QAT_DEFAULTS = dict(epochs=1, lr=1e-5, warmup=0, weight_decay=0.0, ema=0.98)  # in place of train.py's
# what --resume cannot change: it was settled when the network was prepared
FIXED_FLAGS = ("weights", "method", "observer", "calib_images", "smooth", "correct_bias", "equalize", "adaround",
               "bits", "group_size", "skip", "sensitivity", "max_drop", "attention", "steps")  # fmt: skip
FLOAT_ONLY = {"quantize": "is quantized already: give the float checkpoint that it was made from"}


def make_parser():
    parser = datasets.Parser(__doc__)
    group = parser.add_argument_group("quantization")
    add, yes_no = group.add_argument, argparse.BooleanOptionalAction
    add("--weights", default="checkpoints/train/best.pt", help="float checkpoint to quantize")
    add("--method", choices=METHODS, default="ptq", help="what is quantized, and where ranges come from")
    add("--observer", choices=OBSERVERS, default="mse", help="how a range is found from calibration images")
    add("--calib-images", type=positive_int, default=32, metavar="N", help="of the training split")
    add("--smooth", action=yes_no, default=True, help="SmoothQuant, where a LayerNorm feeds Linear layers")
    add("--correct-bias", action=yes_no, default=True, help="make up for what quantization does to means")
    add("--equalize", choices=("off", "relu", "relu6"), default="off",
        help="balance the weights of convolutions in a row; relu6: each ReLU6 becomes a ReLU for that")  # fmt: skip
    add("--adaround", type=count, default=0, metavar="STEPS", help="ptq, weight-only: learn to round, in STEPS a layer")
    add("--bits", type=int, choices=(8, 4), default=8, help="weight-only: of a weight")
    add("--group-size", type=count, default=0, metavar="N", help="weight-only: inputs with one scale; 0: an output's")
    add("--skip", nargs="+", default=[], metavar="LAYER", help="layers to leave in float")
    add("--sensitivity", action="store_true", help="rank the layers by the error each brings alone (figure, CSV)")
    add("--max-drop", type=not_negative, metavar="POINTS", help="leave as many layers in float as this mIoU drop takes")
    add("--attention", choices=("bf16", "float32"), default="bf16", help="its numbers; bf16: or float32 where faster")
    add("--steps", choices=("learned", "frozen"), default="learned", help="qat: scales are trained (LSQ), or observed")
    add("--kl", type=not_negative, default=1.0, metavar="WEIGHT", help="qat: of the divergence from the float network")
    add("--out", help="folder to write to; left out: checkpoints/quantize-METHOD")
    add("--resume", action="store_true", help="qat: go on from OUT/last.pt, with its flags")
    datasets.add_data_args(parser)
    train.add_train_args(parser, without=("--compile", "--frozen-norm-epochs"))  # lazy tensors; norms are folded
    parser.set_defaults(**QAT_DEFAULTS, compile=False, frozen_norm_epochs=0)
    drawn = "--augment --scale --cat-max-ratio --flip --photometric --color-transfer"
    weighed = "--class-weights --class-weights-power"
    trained = f"--kl --steps --tensorboard {drawn} {weighed} {parser.flags('loss', 'training')}"
    parser.only(trained, "--method qat", lambda args: args.method == "qat")
    calibrated = "--observer --smooth --correct-bias --equalize --sensitivity --max-drop"
    parser.only(calibrated, "--method ptq and qat", lambda args: args.method in ("ptq", "qat"))
    return parser


def parse_args(argv):
    """(flags, last.pt to go on from or None); flags of data and loss that are not given are the checkpoint's."""

    def name(given):  # only QAT can be gone on with
        return f"quantize-{given.get('method', 'qat' if given.get('resume') else 'ptq')}"

    shared = dict(script="quantize.py", name=name, inherits=("data", "loss"), fixed=FIXED_FLAGS)
    args, last = train.parse(make_parser(), argv, **shared)
    if args.method != "weight-only" and (args.bits != 8 or args.group_size):
        raise ModelError("--bits 4 and --group-size are of --method weight-only: the int8 kernels take neither")
    if args.adaround and args.method not in ("ptq", "weight-only"):
        raise ModelError("--adaround is of --method ptq and weight-only: "
                         "dynamic has no calibration, and qat moves the weights on")  # fmt: skip
    return args, last


@evaluate.releasing
def main(argv=None):
    """Run the command line; returns what results.json holds."""
    start = time.perf_counter()
    command = evaluate.command_line("quantize.py", argv)
    args, last = parse_args(argv)
    device = train.start(args)
    parent = train.open_parent(args, device, refuse=FLOAT_ONLY)
    out, score = parent.out, functools.partial(train.score, parent=parent, device=device)
    before = score(parent.model)
    if last:
        model, entry = models.load_checkpoint(out / "last.pt", device=device)[0], last["compression"][-1]
        model = model.to(memory_format=torch.channels_last)
        converted = out / "best.pt"
        if converted.exists() and models.read_checkpoint(converted)["compression"][-1]["state"] == "int8":  # it ended
            if last["training"]["step"] >= train.total_steps(args, parent.train_set):
                raise ModelError(f"the run in {out} has ended: give more --epochs to train on, or leave out --resume")
            last["training"]["best"] = None  # and its best network was converted
    else:
        images = train.calibration_images(args, device, args.calib_images)
        model, entry = quantize_network(parent.model, images, args, score, before["miou"], out)

    def steps(network):
        converted = all(layer.weight_q is not None for layer in quant_layers(network).values())
        return [*parent.checkpoint["compression"], entry | {"state": "int8" if converted else "simulated"}]

    lineage = [*parent.checkpoint["lineage"], train.ancestor(parent.checkpoint, before["miou"])]
    save = train.saver(
        args, command, data=parent.checkpoint["data"], pretrained=parent.checkpoint["pretrained"], lineage=lineage,
        compression=steps,
    )  # fmt: skip
    stages, more = {"float": evaluate.Stage(before)}, {}
    if args.method == "qat":
        done = fine_tune(
            model,
            parent.model,
            parent,
            args=args,
            device=device,
            save=functools.partial(save, network=model),
            last=last,
        )
        if done["stopped"]:
            return {"stopped": done["stopped"], "step": done["step"]}
        model, more["epochs"] = models.load_checkpoint(out / "best.pt", device=device)[0], args.epochs
    if args.method in ("ptq", "qat"):
        stages["fake quantized"] = evaluate.Stage(score(model))
    convert(model.eval(), attention_dtype=torch.bfloat16 if entry["attention"] == "bf16" else None)
    if args.method in ("ptq", "qat"):
        entry["outputs"] = observe_outputs(model, train.calibration_images(args, device, args.calib_images))
    metrics = evaluate.score(model, parent.val_set, device=device, out=out, workers=args.workers)
    kept = {k: metrics[k] for k in ("miou", "macc", "aacc")}
    save(out / "best.pt", model, metrics=kept, state_dict=packed(model.state_dict()))
    stages["float"] = evaluate.Stage(
        before, parent.model, parent.checkpoint, Path(args.weights), parent.checkpoint["command"]
    )
    return report(stages, metrics, args=args, command=command, parent=parent, device=device, start=start, more=more)


def quantize_network(float_model, images, args, score, miou, out):
    """Copy the network and quantize the copy, simulated -> (network, its entry of the checkpoint's `compression`)."""
    source, alphas, relu6, equalized = copy.deepcopy(float_model), {}, [], []
    activations, calibrated = args.method != "weight-only", args.method in ("ptq", "qat")
    removed = simplify(source)
    if calibrated and args.equalize != "off":
        relu6 = replace_relu6(source) if args.equalize == "relu6" else []
        equalized = equalize(source, images[:1])
    if calibrated and args.smooth:
        alphas = smooth(source, images[:8])

    def attempt(skip, steps=0):
        model = copy.deepcopy(source)
        unknown = set(skip) - {name for name, m in model.named_modules() if type(m) in int8.KINDS}
        if unknown:
            raise ModelError(f"--skip {sorted(unknown)[0]}: no convolution or Linear of this network has that name")
        done = prepare(model, images[0], activations=activations, skip=skip, bits=args.bits, group_size=args.group_size)
        set_mode(model, "fake")
        if args.method == "dynamic":
            make_dynamic(model, done.wiring)
        elif activations:
            calibrate(model, images, observer=args.observer)
        if steps:
            adaround(model, images[:16], steps=steps)
        if calibrated and args.correct_bias:
            correct_bias(model, images)
        return model, done._replace(removed=removed + done.removed)

    skip, search = list(args.skip), calibrated and (args.sensitivity or args.max_drop is not None)
    model, done = attempt(skip, 0 if search else args.adaround)
    if search:
        ranking = sensitivity(model, images[:8], most=2 if args.dry_run else None)
        write_sensitivity(ranking, out)
        if args.max_drop is not None:
            fewest, most = 0, len(ranking)  # layers in float: too few, as far as is known, and enough
            while fewest < most:
                count = (fewest + most) // 2
                skip = [*args.skip, *list(ranking)[:count]]
                drop = miou - score(attempt(skip)[0])["miou"]
                tqdm.write(f"{count} of {len(ranking)} layers in float: {drop:.2f} points lost")
                fewest, most = (fewest, count) if drop <= args.max_drop else (count + 1, most)
            if most == len(ranking) and not args.dry_run:
                raise ModelError(f"--max-drop {args.max_drop}: no layer can be quantized within that many points")
            skip = [*args.skip, *list(ranking)[:most]]
        if args.max_drop is not None or args.adaround:
            model, done = attempt(skip, args.adaround)  # once, as it takes minutes
    return model, {
        "step": "quantize", "method": args.method, "bits": args.bits, "group_size": args.group_size,
        "attention": args.attention, "observer": args.observer if calibrated else None,
        "smoothed": alphas, "equalized": equalized, "relu6": relu6, "adaround": args.adaround, **done._asdict(),
        "total_macs": evaluate.count_macs(source, images[0]),  # of the image that `macs` are of
    }  # fmt: skip


def write_sensitivity(ranking, out):
    """sensitivity.csv and .png: the layers, worst first."""
    from matplotlib.figure import Figure

    evaluate.write_csv(out / "sensitivity.csv", [{"layer": name, "error": error} for name, error in ranking.items()])
    shown = dict(list(ranking.items())[:30])
    figure = Figure(figsize=(8, 0.8 + 0.2 * len(shown)), layout="constrained")
    axis = figure.subplots()
    axis.barh(list(shown), list(shown.values()))
    axis.invert_yaxis()
    axis.set(xscale="log", xlabel="share of the logits' energy that the layer's quantization changes")
    axis.grid(axis="x", alpha=0.3)
    evaluate.save_figure(figure, out / "sensitivity.png")


def report(stages, metrics, *, args, command, parent, device, start, more):
    """Print what was quantized, what was not and why, and what it cost -> what results.json holds."""
    path = parent.out / "best.pt"
    model, checkpoint = models.load_checkpoint(path, device=device)
    entry, image = checkpoint["compression"][-1], parent.val_set[0][0][None].to(device)
    stages["converted"] = evaluate.Stage(metrics, model, checkpoint, path, command)
    evaluate.run_once(model, image)  # checks the kernels
    layers = quant_layers(model)
    wrong = {
        name: "its int8 kernel is wrong on this machine"
        for name, layer in layers.items()
        if layer.kernel_correct is False
    }
    in_int8 = [name for name, layer in layers.items() if layer.points[0] is not None and name not in wrong]
    quantized = sum(layer.quantized_params for layer in layers.values())
    fake = stages.get("fake quantized")
    more |= {
        "miou_fake_quantized": fake.metrics["miou"] if fake else None,
        "int8_kernels": bool(in_int8) and kernels(),
        "layers": len(entry["wiring"]) + len(entry["left"]), "int8_layers": len(in_int8),
        "float_layers": entry["left"] | entry["weights_only"] | wrong,
        "quantized_macs_percent": 100 * sum(entry["macs"].get(name, 0) for name in in_int8) / entry["total_macs"],
        "quantized_params_percent": 100 * quantized / models.count_params(model)[0],
    }  # fmt: skip
    seconds = time.perf_counter() - start
    shared = dict(out=parent.out, seconds=seconds, device=device, dry_run=args.dry_run)
    done = evaluate.before_after(stages, image, more=more, **shared)
    for name, why in more["float_layers"].items():
        print(f"in float: {name} ({why}{'; its weight is int8' if name in layers else ''})")
    print(f"int8: {more['int8_layers']} of {more['layers']} layers, {more['quantized_macs_percent']:.1f}% of the MACs; "
          f"{more['quantized_params_percent']:.1f}% of the parameters in {args.bits} bits")  # fmt: skip
    if entry["attention"] == "bf16" and more["int8_kernels"]:
        print(f"attention, if there is any: {int8.attention_line()}, the fastest here")
    if in_int8 and not kernels():
        print("no int8 kernels on this machine: computed in float from the int8 weights")
    print(f"{done['file_mb'] / done['before']['file_mb']:.3f} of the size, "
          f"{done['latency_ms_before'] / done['latency_ms']:.2f} times as fast; "
          f"{path}; results.json and figures beside it")  # fmt: skip
    return done


if __name__ == "__main__":
    import quantize  # the module that load_checkpoint() imports: its classes, not those of a second copy

    evaluate.run_cli(quantize.main)
