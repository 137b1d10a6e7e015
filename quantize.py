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

Simulated ("fake quantized") and converted networks share one code path. A quantized layer quantizes its input, and
returns a `Lazy` tensor: what it would compute, not yet computed. ReLU and its relatives, residual additions, max
pooling, concatenation, slicing and reshaping are put behind it; the next quantized layer reads it as uint8 in its own
scale, so the int8 kernel does it all and writes bytes; anything else that touches it (resizing, softmax) sees a float
tensor, and LayerNorm computes in float but may write bytes. So every network goes through, whatever its forward() does,
and what does not fit simply is float.

The int8 kernels are PyTorch's oneDNN ones (torch.ops.onednn), for x86 CPUs. Elsewhere the same checkpoint computes the
same numbers, to rounding, in float from the int8 weights.
"""

import argparse
import contextlib
import copy
import csv
import functools
import itertools
import math
import re
import sys
import time
import weakref
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import datasets
import evaluate
import models
import train
from models import ModelError, fold_batchnorm, fold_layer_scale

# ---- primitives -----------------------------------------------------------------------------------------------------

UINT8 = (0, 255)
INT8 = (-127, 127)
MOMENTUM = 0.05  # of the ranges that QAT observes


def choose_qparams(low, high):
    """Affine uint8 parameters of a range: (scale, zero_point), a float32 and an int32 tensor, shaped like `low`.

    The range is widened to hold 0, which then is a whole number. An empty range, as of a dead ReLU, gives scale 1.
    """
    low, high = torch.as_tensor(low).float().clamp(max=0), torch.as_tensor(high).float().clamp(min=0)
    scale = (high - low) / (UINT8[1] - UINT8[0])
    scale = torch.where(scale > torch.finfo(torch.float32).tiny, scale, torch.ones_like(scale))
    return scale, (-low / scale).round().clamp(*UINT8).int()


def _shaped(values, x, axis):
    """Per-channel values, or a single one, in a shape that broadcasts against x along `axis`."""
    return values.view([-1 if d == axis else 1 for d in range(x.dim())]) if values.dim() else values


def quantize(x, scale, zero_point=None, *, limits=UINT8, dtype=torch.uint8, axis=0):
    """clamp(round(x / scale) + zero_point) as `dtype`; scale: one, or one per slice of `axis`."""
    q = torch.round(x / _shaped(scale, x, axis))
    return (q if zero_point is None else q + zero_point).clamp(*limits).to(dtype)


def dequantize(q, scale, zero_point=None, *, axis=0):
    """(q - zero_point) * scale in float32."""
    x = q.float()
    return (x if zero_point is None else x - zero_point) * _shaped(scale, x, axis)


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, scale, zero_point, limits, axis):
        shaped = _shaped(scale, x, axis)
        q = torch.round(x / shaped)
        if zero_point is not None:
            q += zero_point
        inside = (q >= limits[0]) & (q <= limits[1])
        q.clamp_(*limits)
        if zero_point is not None:
            q -= zero_point
        y = q.mul_(shaped)
        ctx.axis = axis
        ctx.save_for_backward(*((x, y, inside, scale) if ctx.needs_input_grad[1] else (inside,)))
        return y

    @staticmethod
    def backward(ctx, grad):
        if not ctx.needs_input_grad[1]:
            (inside,) = ctx.saved_tensors
            return grad * inside, None, None, None, None
        x, y, inside, scale = ctx.saved_tensors
        grad_x = grad * inside
        each = grad * y - grad_x * x  # times 1 / scale: round(x / s) - x / s inside, the limit outside (LSQ, eq. 3)
        grad_scale = each.sum() if not scale.dim() else each.sum([d for d in range(x.dim()) if d != ctx.axis])
        return grad_x, grad_scale / scale, None, None, None


def fake_quantize(x, scale, zero_point=None, *, limits=UINT8, axis=0):
    """dequantize(quantize(x)) with gradients: straight through to x where it is inside the range, 0 outside (Bengio et
    al. 2013), and that of LSQ (Esser et al. 2020, section 2.1) to scale, if it wants one."""
    return _FakeQuantize.apply(x.float(), scale, zero_point, limits, axis)


def group_rows(weight, group_size, axis=0):
    """A weight as (outputs, groups, group_size) for scales of its own in each group of consecutive inputs; 0: one group
    an output. The last group is filled up with zeros."""
    rows = weight.movedim(axis, 0).flatten(1)
    group_size = group_size or rows.shape[1]
    rows = F.pad(rows, (0, -rows.shape[1] % group_size))
    return rows.unflatten(1, (-1, group_size))


def pack4(q):
    """Whole numbers in [-8, 7] -> uint8, flat, two a byte, the first in the low half."""
    q = F.pad(q.flatten().to(torch.int16) + 8, (0, q.numel() % 2)).view(-1, 2)
    return (q[:, 0] | q[:, 1] << 4).to(torch.uint8)


def unpack4(packed, count):
    """What pack4() was given, flat, as int8."""
    return (torch.stack([packed & 15, packed >> 4], 1).flatten()[:count].to(torch.int8)) - 8


# ---- quantization points --------------------------------------------------------------------------------------------


class Point(nn.Module):
    """A tensor of the network that is quantized: its scale and zero point.

    Layers that read the same tensor share a point. quantize() gives floats, fake-quantized, or, once freeze() has said
    so, bytes. While `moving` is above 0 it first moves the range by that share towards what it sees (QAT). `theta`: the
    logarithm of a learned factor on the scale.
    """

    def __init__(self):
        super().__init__()
        self.register_buffer("scale", torch.tensor(1.0))
        self.register_buffer("zero_point", torch.tensor(0, dtype=torch.int32))
        self.register_parameter("theta", None)
        self.observer, self.moving = None, 0.0
        self.int8, self.numbers, self.last = False, None, (lambda: None, None)  # numbers: what the kernels want

    def set_range(self, low, high):
        scale, zero_point = choose_qparams(low, high)
        self.scale.copy_(scale)
        self.zero_point.copy_(zero_point)

    def move(self, x):
        low, high = (-self.zero_point * self.scale, (UINT8[1] - self.zero_point) * self.scale)
        seen = torch.aminmax(x.detach().float())
        self.set_range(low + self.moving * (seen.min - low), high + self.moving * (seen.max - high))

    def learned_scale(self):
        return self.scale if self.theta is None else self.scale * self.theta.exp()

    @torch.no_grad()
    def freeze(self, int8):
        """Take the scale as it is for good; int8: quantize() gives bytes from now on, where there are kernels."""
        self.scale.copy_(self.learned_scale())
        self.theta, self.moving = None, 0.0
        self.int8, self.numbers = int8, (self.scale.item(), int(self.zero_point))

    def gives_bytes(self, x):
        return self.int8 and x.device.type == "cpu"

    def quantize(self, x):
        """float tensor -> bytes or fake-quantized floats; done once for all who read the same tensor."""
        if self.moving:
            self.move(x)
        if not self.gives_bytes(x):
            return fake_quantize(x, self.learned_scale(), self.zero_point)
        kept, q = self.last
        if kept() is not x:
            q = to_bytes(x, *self.numbers)
            self.last = (weakref.ref(x), q)
        return q

    def dequantize(self, q):
        """What quantize() gave, as float."""
        if q.is_floating_point():
            return q
        scale, zero_point = self.numbers
        return q.float().sub_(zero_point).mul_(scale)


class DynamicPoint(Point):
    """A point that takes the range of each tensor as it comes."""

    def quantize(self, x):
        if self.last[0]() is not x:
            low, high = torch.aminmax(x.detach().float())
            self.set_range(low, high)
            self.numbers = (self.scale.item(), int(self.zero_point))
        return super().quantize(x)

    def freeze(self, int8):
        self.int8 = int8


def to_bytes(x, scale, zero_point):
    """quantize() of one scale in few passes over memory."""
    # to() cuts off what stands after the point: half more rounds, but for ties
    return torch.add(torch.tensor(zero_point + 0.5), x.float(), alpha=1 / scale).clamp_(*UINT8).to(torch.uint8)


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

    def see(self, x):
        x = x.detach().float()
        if self.counts is not None:
            self.counts += torch.histc(x, BINS, self.low, self.high).double()
            return
        low, high = (v.item() for v in torch.aminmax(x))
        self.low, self.high = min(self.low, low, 0.0), max(self.high, high, 0.0)
        self.sums, self.batches = [self.sums[0] + low, self.sums[1] + high], self.batches + 1

    def second_pass(self):
        if self.high <= self.low:
            self.high = self.low + 1.0
        self.counts = torch.zeros(BINS, dtype=torch.float64)

    def range(self):
        """(low, high) to quantize; raises ModelError where nothing was seen or a value was not finite."""
        if not self.batches or not math.isfinite(self.high - self.low):
            raise ModelError("calibration saw " + ("no values" if not self.batches else "values that are not finite"))
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


# ---- lazy tensors ---------------------------------------------------------------------------------------------------


class Post(NamedTuple):
    """What comes after the sum of products, in the same kernel: an addend, then an activation."""

    other: object = None  # tensor or Lazy of the same shape
    attr: str = "none"  # key of ACTIVATIONS, and what oneDNN calls it
    args: tuple = ()
    algorithm: str = ""

    @property
    def clips(self):
        """Whether it cuts values off at most, which quantization can do as well."""
        return self.other is None and self.attr in ("none", "relu", "hardtanh")

    def absorbed(self, point):
        """Whether it only cuts off what cannot be stored at a point anyway."""
        if not self.clips:
            return False
        scale, zero_point = point.numbers
        low, high = self.args or (-math.inf if self.attr == "none" else 0.0, math.inf)
        return low <= -zero_point * scale and (UINT8[1] - zero_point) * scale <= high


ACTIVATIONS = {
    "none": lambda x: x,
    "relu": F.relu,
    "hardtanh": F.hardtanh,
    "hardswish": F.hardswish,
    "swish": F.silu,
    "gelu": F.gelu,
}


class Lazy:
    """The output of a quantized layer, computed when it is read; to everything else it behaves as a float tensor.

    read(None) gives float32, read(torch.bfloat16) that, and read(point) the tensor quantized at a Point: in int8
    execution as bytes that come straight out of the kernel. Once it has been quantized, whoever reads it as float sees
    the quantized values; that rule is what makes the simulated and the converted network the same.
    make(what): computes it, in one of these forms. pending: (layer, its input, Post) while the output of a layer.
    parents: the Lazy tensors whose bytes it takes over unchanged, which must share its point. exposed: whether code
    that knows nothing of all this got hold of its memory, so that nothing may be written there.
    """

    __slots__ = ("__weakref__", "exposed", "half", "index", "make", "parents", "pending", "point", "shape", "stored")
    made = itertools.count()
    log = None  # a Tracer's list while one watches

    def __init__(self, make, shape, *, pending=None, parents=(), half=None):
        self.make, self.shape, self.pending, self.parents, self.half = make, torch.Size(shape), pending, parents, half
        self.stored, self.point, self.index, self.exposed = None, None, next(Lazy.made), False

    @classmethod
    def of(cls, layer, x, post, shape):
        return cls(lambda what: layer.compute(x, post, what), shape, pending=(layer, x, post), half=layer.half)

    def read(self, what=None):
        if Lazy.log is not None:
            Lazy.log.append(self)
        if isinstance(what, Point):
            if self.point is not what:
                quantized = self.make(what) if self.stored is None else what.quantize(self.read())
                self.stored, self.point = quantized, what
            return self.stored
        if self.stored is None:
            self.stored = self.make(what)
        x = self.stored if self.point is None else self.point.dequantize(self.stored)
        return x.to(what or torch.float32)

    def expose(self):
        """Its values for the network's own code, which may keep views of them."""
        self.exposed = True
        for x in self.parents:
            if isinstance(x, Lazy):
                x.expose()
        return self.read()

    def become(self, other):
        """What an operation in place does."""
        for name in set(self.__slots__) - {"__weakref__"}:
            setattr(self, name, getattr(other, name))
        return self

    @property
    def open(self):
        """Whether it is a layer's output that nothing has read and no activation has closed."""
        return self.pending is not None and self.stored is None and self.pending[2].attr == "none"

    def __getattr__(self, name):  # methods and properties of a tensor that are not among those below
        return getattr(self.expose(), name)

    def size(self, dim=None):
        return self.shape if dim is None else self.shape[dim]

    def dim(self):
        return len(self.shape)

    ndim = property(dim)

    def __len__(self):
        return self.shape[0]


def read(x, what=None):
    """Lazy.read() of a Lazy or a plain tensor."""
    if isinstance(x, Lazy):
        return x.read(what)
    if isinstance(what, Point):
        return what.quantize(x)
    return x if what is None else x.to(what)


def _floats(value):
    """An argument of a function of torch with a float tensor in place of each Lazy."""
    if isinstance(value, Lazy):
        return value.expose()
    if isinstance(value, (list, tuple)):
        return type(value)(map(_floats, value))
    return {k: _floats(v) for k, v in value.items()} if isinstance(value, dict) else value


def _torch_function(_cls, function, types, args=(), kwargs=None):
    kwargs = kwargs or {}
    handler = HANDLERS.get(function)
    out = handler(*args, **kwargs) if handler else NotImplemented
    return function(*_floats(args), **_floats(kwargs)) if out is NotImplemented else out


def _activation(attr, function):
    """Handler of an activation: it goes into the kernel of the layer before it, if that has none yet."""

    def handler(x, min_val=-1.0, max_val=1.0, *, inplace=False, approximate="none"):
        if not (isinstance(x, Lazy) and x.open and x.pending[0].fuses(attr, x.pending[2])) or approximate != "none":
            return NotImplemented
        limits = (0.0, 6.0) if function is F.relu6 else (min_val, max_val)
        layer, inputs, post = x.pending
        args, algorithm = limits if attr == "hardtanh" else (), "none" if attr == "gelu" else ""
        post = post._replace(attr=attr, args=args, algorithm=algorithm)
        out = Lazy.of(layer, inputs, post, x.shape)
        return x.become(out) if inplace or function in IN_PLACE else out

    return handler


def _add(a, b, *, alpha=1):
    """Handler of a sum: it goes into the kernel of the layer that made one of the two, the later one, if it can."""
    lazy = [x for x in (a, b) if isinstance(x, Lazy) and x.open and x.pending[0].fuses("add", x.pending[2])]
    if not lazy or alpha != 1 or getattr(a, "shape", 0) != getattr(b, "shape", 1) or a is b:
        return NotImplemented
    main = max(lazy, key=lambda x: x.index)
    other = b if main is a else a
    layer, inputs, post = main.pending
    if layer.tracer is not None and layer.adds_bytes:
        layer.tracer.adds.append((layer, other))
    return Lazy.of(layer, inputs, post._replace(other=other), main.shape)


def _cat(tensors, dim=0):
    rows = [x for x in tensors if isinstance(x, Lazy)]
    shape = list(tensors[0].shape)
    shape[dim] = sum(x.shape[dim] for x in tensors)
    return Lazy(
        lambda what: torch.cat([read(x, what) for x in tensors], dim), shape, parents=tensors, half=rows[0].half
    )


def _max_pool(x, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False, return_indices=False):
    """Handler of max pooling, which commutes with quantization."""

    def pairs(v):
        return (v, v) if isinstance(v, int) else tuple(v)

    kernel, padding = pairs(kernel_size), pairs(padding)
    stride = pairs(stride) if stride else kernel
    if ceil_mode or return_indices or pairs(dilation) != (1, 1):
        return NotImplemented
    size = [(n + 2 * p - k) // s + 1 for n, k, s, p in zip(x.shape[-2:], kernel, stride, padding, strict=True)]

    def make(what):
        y = x.read(what)
        return (
            F.max_pool2d(y, kernel, stride, padding)
            if y.is_floating_point()
            else max_pool_bytes(y, kernel, stride, padding)
        )

    return Lazy(make, (*x.shape[:-2], *size), parents=(x,), half=x.half)


def max_pool_bytes(x, kernel, stride, padding):
    """F.max_pool2d of uint8 (N, C, H, W), which PyTorch's own does not run channels_last, as maxima of slices."""
    if torch.compiler.is_exporting():
        return F.max_pool2d(x, kernel, stride, padding)
    for dim in (2, 3):
        k, s, p = kernel[dim - 2], stride[dim - 2], padding[dim - 2]
        if p:  # 0 is the least byte, and no window is padding alone
            x = F.pad(x, (0, 0, p, p) if dim == 2 else (p, p, 0, 0))
        count = (x.shape[dim] - k) // s + 1
        slices = [x.narrow(dim, i, (count - 1) * s + 1) for i in range(k)]
        slices = [y[:, :, ::s] if dim == 2 else y[..., ::s] for y in slices]
        x = slices[0]
        for y in slices[1:]:
            x = torch.maximum(x, y)
    return x.contiguous(memory_format=torch.channels_last)


def _layout(name):
    """Handler of a method that only moves values."""

    def handler(x, *args, **kwargs):
        if not isinstance(x, Lazy):
            return NotImplemented
        shape = getattr(torch.empty(x.shape, device="meta"), name)(*args, **kwargs).shape
        return Lazy(lambda what: getattr(x.read(what), name)(*args, **kwargs), shape, parents=(x,), half=x.half)

    return handler


def _linear(x, weight, bias=None):
    """Handler of F.linear() on a quantized layer's weight."""
    layer = weight.pending[0] if isinstance(weight, Lazy) and weight.pending else None
    if layer is None or weight.pending[2].attr != "weight" or bias is not layer.bias:
        return NotImplemented
    return layer(x)


def _contiguous(x, **_format):
    return x if isinstance(x, Lazy) else NotImplemented  # its values; a layer lays its input out as its kernel wants it


def _getitem(x, index):
    """Handler of indexing; with tensors it is no mere choice of values."""
    indices = index if isinstance(index, tuple) else (index,)
    if not all(i is None or i is Ellipsis or isinstance(i, (int, slice)) for i in indices):
        return x.expose()[_floats(index)]
    return _layout("__getitem__")(x, index)


def _dropout(x, p=0.5, training=True, inplace=False):
    return NotImplemented if training else x


def _attention(query, key, value, *args, **kwargs):
    """Handler of scaled_dot_product_attention: in bfloat16 in int8 execution, where that was asked for."""
    half = next((x.half for x in (query, key, value) if isinstance(x, Lazy)), None)
    if half is None:
        return NotImplemented
    kwargs = {k: v.to(half) if torch.is_tensor(v) and v.is_floating_point() else v for k, v in kwargs.items()}
    return wrap(F.scaled_dot_product_attention(*(read(x, half) for x in (query, key, value)), *args, **kwargs), half)


def _layer_norm(x, shape, weight=None, bias=None, eps=1e-5):
    """Handler of LayerNorm: into bytes, their scale and zero point go into its weights, which saves a pass."""
    if not isinstance(x, Lazy) or weight is None or bias is None:
        return NotImplemented

    def make(what):
        y = x.read()
        if not (type(what) is Point and what.gives_bytes(y)):
            return read(F.layer_norm(y, shape, weight, bias, eps), what)
        scale, zero_point = what.numbers
        y = F.layer_norm(y, shape, weight / scale, bias / scale + (zero_point + 0.5), eps)
        return y.clamp_(*UINT8).to(torch.uint8)  # as to_bytes() does

    return Lazy(make, x.shape, half=x.half)


def wrap(x, half=None):
    """A tensor that is there already, as Lazy."""
    out = Lazy(None, x.shape, half=half)
    out.stored = x
    return out


IN_PLACE = {torch.relu_, torch.Tensor.relu_, F.relu_}
HANDLERS = (
    {f: _activation("relu", f) for f in (F.relu, torch.relu, torch.Tensor.relu, *IN_PLACE)}
    | {F.relu6: _activation("hardtanh", F.relu6), F.hardtanh: _activation("hardtanh", F.hardtanh)}
    | {F.hardswish: _activation("hardswish", F.hardswish), F.silu: _activation("swish", F.silu)}
    | {F.gelu: _activation("gelu", F.gelu), F.dropout: _dropout, torch.cat: _cat}
    | dict.fromkeys((F.max_pool2d, torch.max_pool2d), _max_pool)
    | {F.scaled_dot_product_attention: _attention, F.layer_norm: _layer_norm, F.linear: _linear}
    | dict.fromkeys((torch.add, torch.Tensor.add, torch.Tensor.__add__, torch.Tensor.__radd__), _add)
)
MOVES = {name: _layout(name) for name in ("flatten", "unflatten", "transpose", "permute", "squeeze", "unsqueeze")}
MOVES |= {"view": _layout("reshape"), "reshape": _layout("reshape"), "contiguous": _contiguous}
for _name, _handler in MOVES.items():
    setattr(Lazy, _name, _handler)
    HANDLERS |= {getattr(owner, _name): _handler for owner in (torch, torch.Tensor) if hasattr(owner, _name)}
Lazy.__getitem__ = _getitem
Lazy.__torch_function__ = classmethod(_torch_function)
OPERATORS = (
    "sub rsub mul rmul truediv rtruediv pow rpow matmul rmatmul neg abs eq ne lt le gt ge setitem isub imul "
    "itruediv float int bool array"
)


def _operator(name):
    return lambda self, *args: getattr(self.expose(), name)(*_floats(args))


for _name in OPERATORS.split():
    setattr(Lazy, f"__{_name}__", _operator(f"__{_name}__"))
Lazy.__hash__ = object.__hash__  # __eq__ was set
Lazy.__add__ = Lazy.__radd__ = lambda self, other: torch.add(self, other)


def _add_in_place(self, other):
    before = Lazy(None, self.shape).become(self)  # the sum, which takes the place of self, reads what self was
    total = torch.add(before, other)
    return self.become(total if isinstance(total, Lazy) else wrap(total))


Lazy.__iadd__ = _add_in_place


# ---- layers ---------------------------------------------------------------------------------------------------------


@functools.cache
def kernels():
    """Whether PyTorch has int8 kernels for this machine's CPU: oneDNN's, on instructions that sum products in 32 bits.

    Older ones sum pairs in 16, which overflows: there the numbers would be wrong.
    """
    abilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    summing = any(abilities.get(name) for name in ("avx512_vnni", "avx_vnni", "amx_int8"))
    return summing and torch.backends.mkldnn.is_available() and hasattr(torch.ops.onednn, "qconv_pointwise")


class QuantLayer(nn.Module):
    """A convolution or Linear whose weight and, unless only that, whose input is quantized; it returns a Lazy.

    mode: "observe" (float; what it reads is observed), "float", or "fake" (simulated, and int8 once the points are).
    `values` is the float weight while it is simulated; `weight_q` takes its place when it is converted: int8 in the
    weight's shape, or with 4 bits packed, and `weight_scale`, (outputs,) or, in groups, (outputs, groups). theta:
    logarithms of learned factors on the scales.
    """

    axis = 0  # of the weight's outputs
    adds_bytes = False  # whether its kernel is better given an addend in bytes

    def __init__(self, layer, *, bits=8, group_size=0):
        super().__init__()
        for name, value in (("values", layer.weight), ("bias", layer.bias), ("theta", None)):
            self.register_parameter(name, value)  # in one order, whether or not there is one, for the optimizer's state
        self.bits, self.group_size, self.shape = bits, group_size, tuple(layer.weight.shape)
        self.limit = 2 ** (bits - 1) - 1
        self.register_buffer("weight_q", None)
        self.register_buffer("weight_scale", None)
        self.reset_scale()
        self.mode, self.half = "float", None
        self.tracer, self.gap, self.packed, self.right = None, None, None, None
        self.watch, self.output_range = None, None  # see observe_outputs()
        self.points, self.overwrites = (None, None), False  # of the input; of the output where it is an addend

    def __getstate__(self):
        return self.__dict__ | {"packed": None, "right": None}  # the kernels' own layout cannot be copied

    @staticmethod
    def has_kernel(layer):
        """Whether there is an int8 kernel for a layer."""
        return True

    def reset_scale(self):
        """The scale of the largest magnitude."""
        rows = group_rows(self.values.detach(), self.group_size, self.axis)
        scale = rows.abs().amax(2) / self.limit
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))
        self.weight_scale = scale if self.group_size else scale.squeeze(1)

    def fake_weight(self):
        if self.theta is None and torch.is_grad_enabled() and self.values.requires_grad:
            self.reset_scale()  # the weight moves, and the scale with it
        scale = self.weight_scale if self.theta is None else self.weight_scale * self.theta.exp()
        limits = (-self.limit, self.limit)
        if not self.group_size:
            return fake_quantize(self.values, scale, limits=limits, axis=self.axis)
        rows = group_rows(self.values, self.group_size, self.axis)
        return self.ungroup(fake_quantize(rows.flatten(0, 1), scale.flatten(), limits=limits).view_as(rows))

    def ungroup(self, rows):
        """(outputs, groups, group_size) -> the weight's shape."""
        moved = [self.shape[self.axis], *(n for d, n in enumerate(self.shape) if d != self.axis)]
        return rows.flatten(1)[:, : math.prod(moved[1:])].reshape(moved).movedim(0, self.axis)

    @property
    def weight(self):
        """For those who call F.linear() themselves, which comes back to this layer; to all else the float weight."""
        return Lazy(lambda what: read(self.dense(), what), self.shape, pending=(self, None, Post(attr="weight")))

    def dense(self):
        """What the layer multiplies with: the weight in float, quantized and dequantized unless the mode is "float"."""
        if self.weight_q is None:
            return self.fake_weight() if self.mode == "fake" else self.values
        if self.bits == 8 and not self.group_size:
            return dequantize(self.weight_q, self.weight_scale, axis=self.axis)
        scale = self.weight_scale.view(self.shape[self.axis], -1, 1)
        size = self.group_size or math.prod(self.shape) // self.shape[self.axis]
        q = self.weight_q
        if self.bits == 4:
            q = unpack4(q, scale.numel() * size).view(*scale.shape[:2], size)
        return self.ungroup(q.float() * scale)

    @torch.no_grad()
    def convert(self):
        """Quantized weights for float ones."""
        if self.theta is not None:
            self.weight_scale, self.theta = self.weight_scale * self.theta.exp(), None
        limits = dict(limits=(-self.limit, self.limit), dtype=torch.int8)
        if self.bits == 8 and not self.group_size:
            self.weight_q = quantize(self.values, self.weight_scale, axis=self.axis, **limits)
        else:
            rows = group_rows(self.values, self.group_size, self.axis)
            q = quantize(rows.flatten(0, 1), self.weight_scale.flatten(), **limits).view_as(rows)
            self.weight_q = pack4(q) if self.bits == 4 else q
        self.values, self.mode = None, "fake"

    @property
    def quantized_params(self):
        """Numbers that `weight_q` stands for; see models.count_params()."""
        return 0 if self.weight_q is None else math.prod(self.shape)

    def forward(self, x):
        if self.tracer is not None:
            self.tracer.reads.append((self, x))
        point = self.points[0]
        if point is not None and self.mode == "observe":
            point.observer.see(read(x))
        if self.gap is not None:
            self.see_gap(read(x), point)
        out = Lazy.of(self, read(x, point if self.mode == "fake" else None), Post(), self.output_shape(x.shape))
        # nothing to gain from waiting; and the numbers of a dynamic point hold only until its next tensor
        return out if type(point) in (Point, OnnxPoint) or self.tracer is not None else out.read()

    def see_gap(self, x, point):
        """How far quantization moves the mean of each output, see correct_bias()."""
        quantized = self.simulate(point.quantize(x))
        self.mode = "float"
        gap = self.simulate(x) - quantized
        self.mode = "fake"
        dim = -1 if isinstance(self, QuantLinear) else 1
        self.gap.append(gap.movedim(dim, 0).flatten(1).mean(1))

    def compute(self, x, post, what):
        """The output, after its Post, as read(what) wants it. x: quantized, if the mode is "fake"."""
        point = post.other.pending[0].points[1] if isinstance(post.other, Lazy) and post.other.pending else None
        if point is not None and self.mode == "observe":
            point.observer.see(post.other.read())
        if point is not None and self.mode == "fake":
            post.other.read(point)
        if x.dtype == torch.uint8:
            x = x.contiguous(memory_format=torch.channels_last if x.dim() == 4 else torch.contiguous_format)
            if self.kernel_is_right(x):
                return self.run(x, post, what)
            x = self.points[0].dequantize(x)
        y = self.simulate(x)
        if self.watch is not None:
            self.watch(self, ACTIVATIONS[post.attr](y, *post.args) if post.clips else y)
        if post.other is not None:
            if self.tracer is not None:
                self.tracer.log.append((self, post.other))
            y = y + read(post.other)
        y = ACTIVATIONS[post.attr](y, *post.args)
        return read(y, what)

    def kernel_is_right(self, x):
        """Whether the int8 kernel gives what it should for the first bytes that come.

        oneDNN has some that do not: on AMX, of 4 x 4 and larger even windows on fewer than 64 channels.
        """
        if self.right is None:
            found = self.kernel(x, 1.0, 0, torch.float32, Post())
            expected = self.simulate(self.points[0].dequantize(x))
            self.right = bool((found - expected).abs().max() <= 1e-3 * expected.abs().max())
        return self.right

    def run(self, x, post, what):
        """compute() by the int8 kernels."""
        other, (scale, zero_point), dtype = post.other, (1.0, 0), what or torch.float32
        if isinstance(what, Point):
            (scale, zero_point), dtype = what.numbers, torch.uint8
        if other is None:
            return self.kernel(x, scale, zero_point, dtype, post)
        numbers = (1.0, 0)
        if dtype == torch.uint8 and isinstance(other, Lazy) and other.point is not None:
            addend, numbers = other.stored, other.point.numbers
        else:
            addend, scale, zero_point = read(other), 1.0, 0
        if self.overwrites and isinstance(other, Lazy) and not other.exposed:
            other.stored, other.point, other.make = None, None, _overwritten
        else:
            addend = addend.clone()  # the kernel writes the sum into it
        y = self.kernel_add(x, addend, *numbers, scale, zero_point, addend.dtype, post)
        return read(y, what) if y.dtype != dtype else y


def _overwritten(_what):
    raise RuntimeError("an output of a quantized layer is read after the sum that took its place")


class QuantConv2d(QuantLayer):
    adds_bytes = True

    def __init__(self, layer, **options):
        super().__init__(layer, **options)
        self.in_channels, self.out_channels, self.kernel_size = layer.in_channels, layer.out_channels, layer.kernel_size
        self.stride, self.dilation, self.groups = layer.stride, layer.dilation, layer.groups
        self.padding = layer.padding
        if isinstance(self.padding, str):
            total = [d * (k - 1) for d, k in zip(self.dilation, self.kernel_size, strict=True)]
            self.padding = tuple(t // 2 for t in total) if self.padding == "same" else (0, 0)

    @staticmethod
    def refuses(layer):
        """Why a layer cannot become this one, or None."""
        if layer.padding_mode != "zeros":
            return f"padding mode {layer.padding_mode}"
        odd = all(d * (k - 1) % 2 == 0 for d, k in zip(layer.dilation, layer.kernel_size, strict=True))
        return None if odd or layer.padding != "same" else "padding on one side"

    def fuses(self, attr, post):
        """Whether the kernel can do that, an activation or "add", after what is in `post`."""
        return attr == "relu" if post.other is not None else attr != "gelu"

    def output_shape(self, shape):
        size = [
            (n + 2 * p - d * (k - 1) - 1) // s + 1
            for n, p, d, k, s in zip(
                shape[-2:], self.padding, self.dilation, self.kernel_size, self.stride, strict=True
            )
        ]
        return (*shape[:-3], self.out_channels, *size)

    def simulate(self, x):
        return F.conv2d(x, self.dense(), self.bias, self.stride, self.padding, self.dilation, self.groups)

    def packs(self, x):
        """The weight in the kernel's own layout, made once."""
        if self.packed is None:
            places = [list(v) for v in (self.stride, self.padding, self.dilation)]
            scale, zero_point = self.points[0].numbers
            self.packed = (
                torch.ops.onednn.qconv_prepack(
                    self.weight_q, self.weight_scale, scale, zero_point, *places, self.groups, list(x.shape)
                ),
                torch.zeros(self.out_channels, dtype=torch.int8),
                [*places, self.groups],
            )
        return self.packed

    def kernel(self, x, scale, zero_point, dtype, post):
        weight, zeros, places = self.packs(x)
        return torch.ops.onednn.qconv_pointwise(
            x, *self.points[0].numbers, weight, self.weight_scale, zeros, self.bias, *places,
            scale, zero_point, dtype, post.attr, list(post.args), post.algorithm,
        )  # fmt: skip

    def kernel_add(self, x, other, other_scale, other_zero_point, scale, zero_point, dtype, post):
        weight, zeros, places = self.packs(x)
        other = other.contiguous(memory_format=torch.channels_last)
        return torch.ops.onednn.qconv2d_pointwise.binary(
            x, *self.points[0].numbers, weight, self.weight_scale, zeros, other, self.bias, *places,
            scale, zero_point, dtype, other_scale, other_zero_point, "sum", 1.0, post.attr, list(post.args), "",
        )  # fmt: skip


class QuantLinear(QuantLayer):
    def __init__(self, layer, **options):
        super().__init__(layer, **options)
        self.in_features, self.out_features = layer.in_features, layer.out_features

    @staticmethod
    def refuses(layer):
        return None

    def fuses(self, attr, post):
        return post.other is None

    def output_shape(self, shape):
        return (*shape[:-1], self.out_features)

    def simulate(self, x):
        return F.linear(x, self.dense(), self.bias)

    def packs(self, x):
        if self.packed is None:
            packed = torch.ops.onednn.qlinear_prepack(self.weight_q, list(x.shape))
            self.packed = packed, torch.zeros(self.out_features, dtype=torch.int8)
        return self.packed

    def kernel(self, x, scale, zero_point, dtype, post):
        weight, zeros = self.packs(x)
        return torch.ops.onednn.qlinear_pointwise(
            x, *self.points[0].numbers, weight, self.weight_scale, zeros, self.bias,
            scale, zero_point, dtype, post.attr, list(post.args), post.algorithm,
        )  # fmt: skip

    def kernel_add(self, x, other, other_scale, other_zero_point, scale, zero_point, dtype, post):
        weight, zeros = self.packs(x)
        return torch.ops.onednn.qlinear_pointwise.binary(
            x, *self.points[0].numbers, weight, self.weight_scale, zeros, other.contiguous(), self.bias,
            scale, zero_point, dtype, other_scale, other_zero_point, "sum", 1.0,
            post.attr, list(post.args), post.algorithm,
        )  # fmt: skip


class QuantConvTranspose2d(QuantLayer):
    """A transposed convolution. Where its windows do not overlap (kernel = stride), it is a 1 x 1 convolution to all
    places of the window, which are then spread; for others there is no int8 kernel, and the weight alone is quantized.
    """

    axis = 1

    def __init__(self, layer, **options):
        super().__init__(layer, **options)
        self.in_channels, self.out_channels = layer.in_channels, layer.out_channels
        self.options = (layer.stride, layer.padding, layer.output_padding, layer.groups, layer.dilation)

    @staticmethod
    def refuses(layer):
        return "groups" if layer.groups > 1 else None

    @staticmethod
    def has_kernel(layer):
        plain = layer.padding == layer.output_padding == (0, 0) and layer.dilation == (1, 1)
        return plain and layer.kernel_size == layer.stride and layer.stride[0] == layer.stride[1]

    def fuses(self, attr, post):
        return attr not in ("gelu", "add")

    def packs(self, x):
        if self.packed is None:
            size = self.shape[2]
            weight = self.weight_q.permute(1, 2, 3, 0).reshape(-1, self.in_channels, 1, 1).contiguous()
            scale = self.weight_scale.repeat_interleave(size**2)
            bias = None if self.bias is None else self.bias.detach().repeat_interleave(size**2)
            places = [[1, 1], [0, 0], [1, 1]]
            packed = torch.ops.onednn.qconv_prepack(weight, scale, *self.points[0].numbers, *places, 1, list(x.shape))
            self.packed = packed, scale, torch.zeros(len(scale), dtype=torch.int8), bias, places
        return self.packed

    def kernel(self, x, scale, zero_point, dtype, post):
        weight, weight_scale, zeros, bias, places = self.packs(x)
        y = torch.ops.onednn.qconv_pointwise(
            x, *self.points[0].numbers, weight, weight_scale, zeros, bias, *places, 1,
            scale, zero_point, dtype, post.attr, list(post.args), post.algorithm,
        )  # fmt: skip
        return F.pixel_shuffle(y, self.shape[2]).contiguous(memory_format=torch.channels_last)

    def output_shape(self, shape):
        stride, padding, extra, _, dilation = self.options
        size = [
            (n - 1) * s - 2 * p + d * (k - 1) + e + 1
            for n, s, p, d, k, e in zip(shape[-2:], stride, padding, dilation, self.shape[2:], extra, strict=True)
        ]
        return (*shape[:-3], self.out_channels, *size)

    def simulate(self, x):
        return F.conv_transpose2d(x, self.dense(), self.bias, *self.options)


KINDS = {nn.Conv2d: QuantConv2d, nn.Linear: QuantLinear, nn.ConvTranspose2d: QuantConvTranspose2d}


# ---- prepare, calibrate, convert ------------------------------------------------------------------------------------


class Tracer:
    """What a run of the network shows: who reads which tensor."""

    def __init__(self):
        self.reads, self.adds, self.log = [], [], []  # (layer, what it read), (layer, addend), all that was read

    def groups(self):
        """Sets of tensors that must be quantized alike, as their bytes are handed on -> {id: a number of its set}."""
        parent = {}

        def find(x):
            while parent.setdefault(x, x) != x:
                x = parent[x]
            return x

        def join(x):
            find(id(x))
            if isinstance(x, Lazy):
                for y in x.parents:
                    parent[find(id(y))] = find(id(x))
                    join(y)

        for _, x in self.reads + self.adds:
            join(x)
        first = {}
        for layer, x in self.reads:  # a layer that is called twice has one point
            parent[find(id(x))] = find(id(first.setdefault(layer, x)))
        return {x: find(x) for x in parent}

    def last_readers(self):
        """Layers whose kernel is the last to read the addend that it is given, and may write the sum in its place."""
        last, sums = {}, []

        def note(x, number):
            last[id(x)] = number
            for y in x.parents:  # who reads a view of it reads it, too
                if isinstance(y, Lazy):
                    note(y, number)

        for number, x in enumerate(self.log):
            if isinstance(x, Lazy):
                note(x, number)
            else:
                sums.append((*x, number))
        # a layer notes its sum just before it reads the addend
        layers = {layer: True for layer, _, _ in sums}
        for layer, other, number in sums:
            layers[layer] &= isinstance(other, Lazy) and last.get(id(other)) == number + 1
        return {layer for layer, alone in layers.items() if alone}


def quant_layers(model):
    """{name: QuantLayer} of a network."""
    return {name: m for name, m in model.named_modules() if isinstance(m, QuantLayer)}


@torch.no_grad()
def prepare(model, images, *, activations=True, skip=(), **options):
    """Replace, in place, each convolution and Linear that the network calls by its QuantLayer, and find their points.

    images: a batch that is run. activations: False to quantize weights alone. skip: names of layers to leave. options:
    bits and group_size. BatchNorm is folded first, dropout goes.
    """
    removed = simplify(model)
    candidates = {n: m for n, m in model.named_modules() if type(m) in KINDS and n not in skip}
    weights_only, left = {}, dict.fromkeys(skip, "left out")
    for name, layer in model.named_modules():
        if isinstance(layer, tuple(KINDS)) and type(layer) not in KINDS:
            left[name] = f"a {type(layer).__name__}"
    for name, layer in candidates.items():
        if why := KINDS[type(layer)].refuses(layer):
            left[name] = why
            continue
        if not KINDS[type(layer)].has_kernel(layer):
            weights_only[name] = "no int8 kernel"
        model.set_submodule(name, KINDS[type(layer)](layer, **options))
    layers = quant_layers(model)
    if not layers:
        raise ModelError("no layer of this network can be quantized")
    called = {name: layer for name, layer in layers.items() if name not in weights_only}
    plan, macs = dict.fromkeys(layers, (None, None, False)), {}
    if activations:
        traced, macs = trace(model, images, called)
        plan |= traced
        weights_only |= {name: "not called as a layer" for name, row in traced.items() if row[0] is None}
    connect(model, plan)
    return Prepared(plan, removed, left, weights_only if activations else {}, macs)


class Prepared(NamedTuple):
    """What prepare() did: `plan`, see connect(); `removed` norms and dropouts; {name: reason} of layers `left` in float
    and of those with `weights_only` quantized; multiply-accumulates an image, by layer."""

    plan: dict
    removed: list
    left: dict
    weights_only: dict
    macs: dict


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


def trace(model, images, layers):
    """Who reads what -> {name: see connect()}, and {name: multiply-accumulates an image}."""
    tracer = Tracer()
    for layer in layers.values():
        layer.tracer = tracer
    Lazy.log = tracer.log
    try:
        read(model(images))
    finally:
        Lazy.log = None
        for layer in layers.values():
            layer.tracer = None
    groups, numbers, overwriting = tracer.groups(), {}, tracer.last_readers()
    plan = {layer: [None, None, layer in overwriting] for layer in layers.values()}
    for layer, x in tracer.reads:
        plan[layer][0] = numbers.setdefault(groups[id(x)], len(numbers))
    for _, x in tracer.adds:
        if isinstance(x, Lazy) and x.pending is not None:
            plan[x.pending[0]][1] = numbers.setdefault(groups[id(x)], len(numbers))
    macs = dict.fromkeys(plan, 0)
    for layer, x in tracer.reads:
        places = x.shape if isinstance(layer, QuantConvTranspose2d) else layer.output_shape(x.shape)
        macs[layer] += math.prod(places) // len(images) * (math.prod(layer.shape) // layer.shape[0])
    return tuple({name: found[layer] for name, layer in layers.items()} for found in (plan, macs))


def connect(model, plan, kind=Point):
    """Give a network its points, and each layer its own.

    plan: {name: [number of the input's point, of the output's where it is an addend, whether the layer's kernel may
    write a sum in the place of the addend]}.
    """
    if not hasattr(model, "points"):
        model.register_forward_hook(_read_output)
    count = 1 + max((i for row in plan.values() for i in row[:2] if i is not None), default=-1)
    model.points = nn.ModuleList(kind() for _ in range(count))
    for name, (own, addend, overwrites) in plan.items():
        layer = model.get_submodule(name)
        numbers = (own, None if kind is DynamicPoint else addend)
        layer.points = tuple(None if i is None else model.points[i] for i in numbers)
        layer.overwrites = overwrites


def _read_output(_model, _inputs, output):
    return read(output)


def set_mode(model, mode, names=None):
    """The mode of all QuantLayers, or of those named."""
    for name, layer in quant_layers(model).items():
        if names is None or name in names:
            layer.mode = mode


@torch.no_grad()
def calibrate(model, batches, *, observer="minmax"):
    """Run a prepared network in float on batches of images and set each point by what its observer saw."""
    points = list(model.points)
    for point in points:
        point.observer = Observer(observer)
    set_mode(model, "observe")
    for number in range(points[0].observer.passes):
        if number:
            for point in points:
                point.observer.second_pass()
        for images in batches:
            model(images)
    for point in points:
        point.set_range(*point.observer.range())
        point.observer = None
    set_mode(model, "fake")


def make_dynamic(model, plan):
    """Give a prepared network points that take the ranges of activations at run time. plan: that of prepare()."""
    connect(model, plan, DynamicPoint)
    set_mode(model, "fake")


def learn_steps(model):
    """Make the scales of weights and activations trainable, by a factor each (LSQ, Esser et al. 2020; here its
    logarithm, so that a step of any optimizer changes a small scale by as many percent as a large one)."""
    for layer in quant_layers(model).values():
        layer.theta = nn.Parameter(torch.zeros_like(layer.weight_scale))
    for point in model.points:
        point.theta = nn.Parameter(torch.zeros_like(point.scale))


def convert(model, *, half=None):
    """Turn a calibrated network, in place, into one that holds int8 weights and, where there are kernels, runs them.

    half: torch.bfloat16 to compute attention in that.
    """
    for layer in quant_layers(model).values():
        layer.convert()
    execute(model, int8=kernels(), half=half)


def execute(model, *, int8, half=None):
    """Run a converted network by the int8 kernels, or in float from the same weights."""
    for point in model.points:
        point.freeze(int8)
    for layer in quant_layers(model).values():
        layer.half = half if int8 else None


@contextlib.contextmanager
def simulated(model):
    """Inside, a converted network computes in float from its quantized weights."""
    half = next((layer.half for layer in quant_layers(model).values() if layer.half), None)
    int8 = half is not None or any(point.int8 for point in model.points)
    execute(model, int8=False)
    try:
        yield model
    finally:
        execute(model, int8=int8, half=half)


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

    remove(model, entry["removed"])
    for name in entry["relu6"]:
        model.set_submodule(name, nn.ReLU())
    for name in entry["plan"]:
        layer = model.get_submodule(name)
        layer = KINDS[type(layer)](layer, bits=entry["bits"], group_size=entry["group_size"])
        if f"{name}.weight_q" in state:
            layer.weight_q, layer.values, layer.mode = empty(f"{name}.weight_q"), None, "fake"
        if f"{name}.theta" in state:
            layer.theta = nn.Parameter(empty(f"{name}.theta"))
        model.set_submodule(name, layer)
    connect(model, entry["plan"], DynamicPoint if entry["method"] == "dynamic" else Point)
    for number, point in enumerate(model.points):
        if f"points.{number}.theta" in state:
            point.theta = nn.Parameter(empty(f"points.{number}.theta"))
    for key in state:  # of convolutions that took over a BatchNorm
        name, _, kind = key.rpartition(".")
        if kind == "bias" and model.get_submodule(name).bias is None:
            model.get_submodule(name).bias = nn.Parameter(empty(key))


def restore(model, entry):
    """Make a rebuilt network whose tensors are loaded ready to run."""
    set_mode(model, "fake")
    for name, layer in quant_layers(model).items():
        layer.output_range = entry.get("outputs", {}).get(name)
    if entry["state"] == "int8":
        execute(model, int8=kernels(), half=torch.bfloat16 if entry["attention"] == "bf16" else None)


# ---- ONNX -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def observe_outputs(model, batches):
    """Find the range of what each convolution of a converted network puts out, ReLU included, addends not -> {name:
    [low, high]}, also its `output_range`.

    onnxruntime computes a convolution in integers only if its output is quantized, which ours is not where a sum,
    another activation or resizing follows. The convolution that comes last, which makes the logits, has no range.
    """
    ranges = {}

    def watch(layer, y):
        low, high = ranges.pop(layer, (0.0, 0.0))
        seen = torch.aminmax(y)
        ranges[layer] = min(low, seen.min.item()), max(high, seen.max.item())

    layers = {name: m for name, m in quant_layers(model).items() if isinstance(m, QuantConv2d) and m.points[0]}
    with simulated(model):
        for layer in layers.values():
            layer.watch = watch
        for images in batches:
            model(images)
    for layer in layers.values():
        layer.watch = None
    for layer in list(ranges)[:-1]:
        layer.output_range = list(ranges[layer])
    return {name: layer.output_range for name, layer in layers.items() if layer.output_range}


def _operator_of_onnx(name, x, *others, dtype, **attributes):
    version = 21 if "block_size" in attributes else 18
    return torch.onnx.ops.symbolic(name, [x, *others], attributes, dtype=dtype, shape=x.shape, version=version)


class OnnxPoint(Point):
    """A point of a network in export: bytes are made by QuantizeLinear and read by DequantizeLinear."""

    def quantize(self, x):
        return _operator_of_onnx("QuantizeLinear", x.float(), self.scale, self.zero_point, dtype=torch.uint8)

    def dequantize(self, q):
        if q.is_floating_point():
            return q
        return _operator_of_onnx("DequantizeLinear", q, self.scale, self.zero_point, dtype=torch.float32)

    @classmethod
    def of(cls, point):
        """Turn a Point into this, with a zero point of the type that the operators want."""
        point.__class__, point.zero_point = cls, point.zero_point.to(torch.uint8)
        return point


class OnnxLayer(QuantLayer):
    """A QuantLayer in export, mixed into its class: a weight read by DequantizeLinear, and float operators, of which
    the runtimes make integer ones where they find them between DequantizeLinear and QuantizeLinear."""

    def kernel_is_right(self, x):
        return True

    def lay_out(self):
        """Set what dense() reads: a Linear's as the matrix product takes it."""
        outputs, q = self.shape[self.axis], self.weight_q
        places = {"axis": self.axis}
        if self.bits == 4 or self.group_size:  # (outputs, inputs)
            size = self.group_size or math.prod(self.shape) // outputs
            q = unpack4(q, self.weight_scale.numel() * size) if self.bits == 4 else q
            q = q.reshape(outputs, -1)[:, : math.prod(self.shape) // outputs]
            places = {"axis": 1, "block_size": size} if self.group_size else {"axis": 0}
        scale = self.weight_scale
        if isinstance(self, QuantLinear):
            q, places["axis"] = q.t(), 1 - places["axis"]
            scale = scale.t() if self.group_size else scale
        self.read_weight = q.contiguous(), scale.contiguous(), places
        if self.output_range is not None:
            self.output = Point()
            self.output.set_range(*map(torch.tensor, self.output_range))
            OnnxPoint.of(self.output)

    def dense(self):
        q, scale, places = self.read_weight
        weight = _operator_of_onnx("DequantizeLinear", q, scale, dtype=torch.float32, **places)
        if isinstance(self, QuantLinear):
            return weight.t()
        return weight if weight.shape == self.shape else self.ungroup(weight[:, None])

    def run(self, x, post, what):
        y = self.simulate(self.points[0].dequantize(x))
        followed = isinstance(what, Point) and post.absorbed(what)  # by a QuantizeLinear
        if post.clips:
            y, post = ACTIVATIONS[post.attr](y, *post.args), Post()
        if self.output_range is not None and not followed:
            y = self.output.dequantize(self.output.quantize(y))
        if post.other is not None:
            y = y + read(post.other)
        return read(ACTIVATIONS[post.attr](y, *post.args), what)


def onnx_form(model):
    """A copy of a converted network for torch.onnx.export(), which puts our scales into the file and computes nothing.

    ModelError where there are no weights or no ranges to put there.
    """
    layers = quant_layers(model).values()
    if any(layer.weight_q is None for layer in layers):
        raise ModelError("it is quantized in simulation, from float weights: best.pt of the same run has int8 ones")
    if any(isinstance(point, DynamicPoint) for point in model.points):
        raise ModelError("--method dynamic finds ranges at run time, an ONNX file holds them: take --method ptq")
    model = copy.deepcopy(model)
    for point in model.points:
        OnnxPoint.of(point)
    for layer in quant_layers(model).values():
        layer.__class__, layer.half = type(f"Onnx{type(layer).__name__}", (OnnxLayer, type(layer)), {}), None
        layer.lay_out()
    return model


def pack_onnx(graph_model, model):
    """Store the weights of an exported onnx_form(), which torch held in int8, with 4 bits where that is all they need.

    graph_model: an onnx_ir.Model.
    """
    import onnx_ir

    if not any(layer.bits == 4 for layer in quant_layers(model).values()):
        return
    int4 = onnx_ir.DataType.INT4
    for node in graph_model.graph:
        weight = node.inputs[0] if node.op_type == "DequantizeLinear" else None
        if weight is not None and weight.const_value is not None and weight.dtype == onnx_ir.DataType.INT8:
            weight.const_value = onnx_ir.Tensor(weight.const_value.numpy().astype(int4.numpy()), name=weight.name)
            weight.dtype = int4


def onnx_opset(model):
    """The oldest version of the ONNX operators that has those of onnx_form(): 21 brought groups and 4 bits."""
    return 21 if any(layer.bits == 4 or layer.group_size for layer in quant_layers(model).values()) else 18


# ---- post-training helpers ------------------------------------------------------------------------------------------


@torch.inference_mode(False)
@torch.no_grad()
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
            qw = fake_quantize(w, w.abs().amax(1).clamp(min=1e-8) / INT8[1], limits=INT8)
            total += (F.linear(qx, qw) - F.linear(x, layer.weight)).square().sum().item()
        return total

    alpha = min((None, *alphas), key=error)
    s = factor(alpha)
    norm.weight /= s
    norm.bias /= s
    for layer in linears:
        layer.weight *= s
    return alpha


@torch.no_grad()
def correct_bias(model, batches):
    """Add to each layer's bias what quantization takes from the mean of its outputs (Nagel et al. 2019, section 4.2).

    Both means are of the same inputs, those of the quantized network before them, so each layer answers for itself.
    """
    layers = [layer for layer in quant_layers(model).values() if layer.points[0] is not None]
    for layer in layers:
        layer.gap = []
    for images in batches:
        model(images)
    for layer in layers:
        gap = torch.stack(layer.gap).mean(0) if layer.gap else None
        layer.gap = None
        if gap is not None:
            layer.bias = nn.Parameter(gap if layer.bias is None else layer.bias + gap)


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


@torch.inference_mode(False)
@torch.no_grad()
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


SCALE_EQUIVARIANT = {F.relu, torch.relu, torch.Tensor.relu, *IN_PLACE, F.max_pool2d, torch.max_pool2d}


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


@torch.no_grad()
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
    targets, progress = {}, tqdm(total=len(layers), desc="adaround", leave=False)

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
        handles = [layer.register_forward_pre_hook(hook) for layer in layers.values()]
        model(images)
        for handle in handles:
            handle.remove()
    progress.close()


def sampled_inputs(layer, x, count):
    """What a layer multiplies its weight with at about `count` places of its output, or at all: (groups, places, inputs
    of an output), the same places for each x of one shape. Of a transposed convolution: at places of its input."""
    if not isinstance(layer, QuantConv2d):
        x = x.movedim(1, -1) if isinstance(layer, QuantConvTranspose2d) else x
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
    if isinstance(layer, QuantConvTranspose2d):
        return weight.flatten(1).mT[None]
    return weight.flatten(1).unflatten(0, (layer.groups if isinstance(layer, QuantConv2d) else 1, -1))


def from_matrix(layer, matrix):
    """as_matrix() undone."""
    return (matrix[0].mT if isinstance(layer, QuantConvTranspose2d) else matrix).reshape(layer.shape)


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
    for name in tqdm(layers, desc="sensitivity", leave=False):
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
        moving = MOMENTUM if args.steps == "frozen" and step < third and model.training else 0.0
        for point in model.points:
            point.moving = moving

    observe(last["training"]["step"] if last else 0)
    return train.fit_by_flags(
        args, objective, parent.train_set, parent.val_set, script="quantize.py", device=device, save=save, last=last,
        after_step=lambda step, _shadow: observe(step + 1), score_first=True,
    )  # fmt: skip


# ---- command line ---------------------------------------------------------------------------------------------------

METHODS = ("dynamic", "ptq", "qat", "weight-only")
QAT_DEFAULTS = dict(epochs=1, lr=1e-5, warmup=0, weight_decay=0.0, ema=0.98)  # in place of train.py's
# what --resume cannot change: it was settled when the network was prepared
FIXED_FLAGS = ("weights", "method", "observer", "calib_images", "smooth", "correct_bias", "equalize", "adaround",
               "bits", "group_size", "skip", "sensitivity", "max_drop", "attention", "steps")  # fmt: skip
FLOAT_ONLY = {"quantize": "is quantized already: give the float checkpoint that it was made from"}


def make_parser():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], formatter_class=evaluate.HelpFormatter)
    group = parser.add_argument_group("quantization")
    add, yes_no = group.add_argument, argparse.BooleanOptionalAction
    add("--weights", default="checkpoints/train/best.pt", help="float checkpoint to quantize")
    add("--method", choices=METHODS, default="ptq", help="what is quantized, and where ranges come from")
    add("--observer", choices=OBSERVERS, default="mse", help="how a range is found from calibration images")
    add("--calib-images", type=datasets.positive_int, default=32, metavar="N", help="of the training split")
    add("--smooth", action=yes_no, default=True, help="SmoothQuant, where a LayerNorm feeds Linear layers")
    add("--correct-bias", action=yes_no, default=True, help="make up for what quantization does to means")
    add("--equalize", choices=("off", "relu", "relu6"), default="off",
        help="balance the weights of convolutions in a row; relu6: each ReLU6 becomes a ReLU for that")  # fmt: skip
    add("--adaround", type=int, default=0, metavar="STEPS", help="ptq, weight-only: learn to round, in STEPS a layer")
    add("--bits", type=int, choices=(8, 4), default=8, help="weight-only: of a weight")
    add("--group-size", type=int, default=0, metavar="N", help="weight-only: inputs that share a scale; 0: an output's")
    add("--skip", nargs="+", default=[], metavar="LAYER", help="layers to leave in float")
    add("--sensitivity", action="store_true", help="rank the layers by the error each brings alone (figure, CSV)")
    add("--max-drop", type=float, metavar="POINTS", help="leave as many layers in float as this mIoU drop takes")
    add("--attention", choices=("bf16", "float32"), default="bf16", help="what attention is computed in")
    add("--steps", choices=("learned", "frozen"), default="learned", help="qat: scales are trained (LSQ), or observed")
    add("--kl", type=float, default=1.0, metavar="WEIGHT", help="qat: of the divergence from the float network")
    add("--out", help="folder to write to; left out: checkpoints/quantize-METHOD")
    add("--resume", action="store_true", help="qat: go on from OUT/last.pt, with its flags")
    datasets.add_data_args(parser)
    train.add_train_args(parser, without=("--compile", "--frozen-norm-epochs"))  # lazy tensors; norms are folded
    parser.set_defaults(**QAT_DEFAULTS, compile=False, frozen_norm_epochs=0)
    return parser


def parse_args(argv):
    """(flags, last.pt to go on from or None); flags of data and loss that are not given are the checkpoint's."""

    def name(given):  # only QAT can be gone on with
        return f"quantize-{given.get('method', 'qat' if given.get('resume') else 'ptq')}"

    shared = dict(script="quantize.py", name=name, inherits=("data", "loss"), fixed=FIXED_FLAGS)
    args, last = train.parse(make_parser(), argv, **shared)
    if args.method != "weight-only" and (args.bits != 8 or args.group_size):
        raise ModelError("--bits 4 and --group-size are of --method weight-only: the int8 kernels take neither")
    if args.adaround < 0 or (args.adaround and args.method not in ("ptq", "weight-only")):
        raise ModelError("--adaround takes a number of steps, and is of --method ptq and weight-only: "
                         "dynamic has no calibration, and qat moves the weights on")  # fmt: skip
    return args, last


def main(argv=None):
    """Run the command line; returns what results.json holds."""
    start = time.perf_counter()
    command = evaluate.command_line("quantize.py", argv)
    args, last = parse_args(argv)
    device = train.start(args)
    parent = train.open_parent(args, device, refuse=FLOAT_ONLY)
    info, out = parent.val_set.info, parent.out
    score = functools.partial(
        evaluate.evaluate, loader=datasets.eval_loader(parent.val_set, workers=args.workers), device=device,
        progress=True, num_classes=len(info.classes), ignore_index=info.ignore_index, boundary=False,
    )  # fmt: skip
    before = score(parent.model)
    if last:
        model, entry = models.load_checkpoint(out / "last.pt", device=device)[0], last["compression"][-1]
    else:
        images = calibration_images(args, device)
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
    convert(model.eval(), half=torch.bfloat16 if entry["attention"] == "bf16" else None)
    if args.method in ("ptq", "qat"):
        entry["outputs"] = observe_outputs(model, calibration_images(args, device))
    metrics = evaluate.score(model, parent.val_set, device=device, out=out, workers=args.workers)
    kept = {k: metrics[k] for k in ("miou", "macc", "aacc")}
    save(out / "best.pt", model, metrics=kept, state_dict=packed(model.state_dict()))
    stages["float"] = evaluate.Stage(
        before, parent.model, parent.checkpoint, Path(args.weights), parent.checkpoint["command"]
    )
    return report(stages, metrics, args=args, command=command, parent=parent, device=device, start=start, more=more)


def calibration_images(args, device):
    """Images (1, 3, H, W) of the training split, evenly spread, as the network sees them in evaluation; in a dry run
    corners of them."""
    options = dict(root=args.data_root, size=args.size, cache=False, options=datasets.option_values(args))
    few, corner = (dict(length=2), 112) if args.dry_run else ({}, None)
    dataset = datasets.open_dataset(args.dataset, "train", **options, **few)
    count = min(args.calib_images, len(dataset))
    return [dataset[i * len(dataset) // count][0][None, :, :corner, :corner].to(device) for i in range(count)]


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
        unknown = set(skip) - {name for name, m in model.named_modules() if type(m) in KINDS}
        if unknown:
            raise ModelError(f"--skip {sorted(unknown)[0]}: no convolution or Linear of this network has that name")
        done = prepare(model, images[0], activations=activations, skip=skip, bits=args.bits, group_size=args.group_size)
        set_mode(model, "fake")
        if args.method == "dynamic":
            make_dynamic(model, done.plan)
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

    with open(out / "sensitivity.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["layer", "error"])
        writer.writerows(ranking.items())
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
    wrong = {name: "its int8 kernel is wrong on this machine" for name, layer in layers.items() if layer.right is False}
    int8 = [name for name, layer in layers.items() if layer.points[0] is not None and name not in wrong]
    quantized = sum(layer.quantized_params for layer in layers.values())
    fake = stages.get("fake quantized")
    more |= {
        "miou_fake_quantized": fake.metrics["miou"] if fake else None,
        "int8_kernels": bool(int8) and kernels(),
        "layers": len(entry["plan"]) + len(entry["left"]), "int8_layers": len(int8),
        "float_layers": entry["left"] | entry["weights_only"] | wrong,
        "quantized_macs_percent": 100 * sum(entry["macs"].get(name, 0) for name in int8) / entry["total_macs"],
        "quantized_params_percent": 100 * quantized / models.count_params(model)[0],
    }  # fmt: skip
    for name, why in more["float_layers"].items():
        print(f"in float: {name} ({why}{'; its weight is int8' if name in layers else ''})")
    print(f"int8: {more['int8_layers']} of {more['layers']} layers, {more['quantized_macs_percent']:.1f}% of the MACs; "
          f"{more['quantized_params_percent']:.1f}% of the parameters in {args.bits} bits")  # fmt: skip
    seconds = time.perf_counter() - start
    shared = dict(out=parent.out, seconds=seconds, device=device, dry_run=args.dry_run)
    done = evaluate.before_after(stages, image, more=more, **shared)
    if int8 and not kernels():
        print("no int8 kernels on this machine: computed in float from the int8 weights")
    print(f"{done['file_mb'] / done['before']['file_mb']:.3f} of the size, "
          f"{done['latency_ms_before'] / done['latency_ms']:.2f} times as fast; "
          f"{path}; results.json and figures beside it")  # fmt: skip
    return done


if __name__ == "__main__":
    sys.modules["quantize"] = sys.modules[__name__]  # the name by which load_checkpoint() imports it
    evaluate.run_cli(main)
