"""How a quantized network runs: its arithmetic, lazy tensors, quantized layers, and the int8 kernels below them.

quantize.py makes such networks, and the table at its top says what is quantized how; export_onnx.py writes them down.

A quantized layer does not compute when it is called: it returns a `Lazy` tensor, which knows the layer, its quantized
input and, as they come, the addend and the activation that follow (`Post`). Whoever reads it says in which form: as
float, or quantized at a `Point`, that is a scale and a zero point. Then a single kernel computes product, addend,
activation and the bytes for the next layer; max pooling, concatenation, slicing and reshaping are put behind it.
Anything else that touches it (resizing, softmax) sees a float tensor, and LayerNorm computes in float but may write
bytes. So every network goes through, whatever its forward() does, and what does not fit simply is float. Simulated
("fake quantized") and converted networks share this code path; they differ in what a Point makes of a tensor:
fake-quantized floats, or bytes.

compiled() makes a plain graph of all that for torch.compile, which fuses what is between the kernels.

The kernels are PyTorch's oneDNN ones (torch.ops.onednn), for x86 CPUs. Elsewhere the same checkpoint computes the same
numbers, to rounding, in float from the int8 weights.
"""

import contextlib
import functools
import itertools
import math
import time
import weakref
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch._prims_common import suggest_memory_format
from torch.fx.experimental.const_fold import split_const_subgraphs
from torch.fx.experimental.proxy_tensor import make_fx

from models import ModelError, no_grad

# ---- arithmetic -----------------------------------------------------------------------------------------------------

UINT8 = (0, 255)
INT8 = (-127, 127)


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


def to_bytes(x, scale, zero_point):
    """quantize() of one scale in few passes over memory."""
    # to() cuts off what stands after the point: half more rounds, but for ties
    return torch.add(torch.tensor(zero_point + 0.5), x.float(), alpha=1 / scale).clamp_(*UINT8).to(torch.uint8)


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


# ---- points ---------------------------------------------------------------------------------------------------------


class Point(nn.Module):
    """A tensor of the network that is quantized: its scale and zero point.

    Layers that read the same tensor share a point. quantize() gives floats, fake-quantized, or, once freeze() has said
    so, bytes. While `momentum` is above 0 it first moves the range by that share towards what it sees (QAT). `theta`:
    the logarithm of a learned factor on the scale. `lasting`: whether the numbers hold for the next tensor, too, so
    that whoever is to be quantized here may wait until it is read.
    """

    lasting = True

    def __init__(self):
        super().__init__()
        self.register_buffer("scale", torch.tensor(1.0))
        self.register_buffer("zero_point", torch.tensor(0, dtype=torch.int32))
        self.register_parameter("theta", None)
        self.momentum, self.int8, self.numbers = 0.0, False, None  # numbers: scale and zero point as the kernels want
        self.last = None  # (weak reference to a tensor, its version, its bytes)

    def __getstate__(self):
        return self.__dict__ | {"last": None}  # a weak reference is of this process and of this point alone

    def set_range(self, low, high):
        scale, zero_point = choose_qparams(low, high)
        if self.scale.is_inference():  # as in a copy made under inference_mode, which cannot be written to outside
            self.scale, self.zero_point = self.scale.clone(), self.zero_point.clone()
        self.scale.copy_(scale)
        self.zero_point.copy_(zero_point)

    def move(self, x):
        low, high = (-self.zero_point * self.scale, (UINT8[1] - self.zero_point) * self.scale)
        seen = torch.aminmax(x.detach().float())
        self.set_range(low + self.momentum * (seen.min - low), high + self.momentum * (seen.max - high))

    def learned_scale(self):
        return self.scale if self.theta is None else self.scale * self.theta.exp()

    @no_grad
    def freeze(self, int8):
        """Take the scale as it is for good; int8: quantize() gives bytes from now on, where there are kernels."""
        self.scale = self.learned_scale()
        self.theta, self.momentum = None, 0.0
        self.int8, self.numbers, self.last = int8, (self.scale.item(), int(self.zero_point)), None

    def gives_bytes(self, x):
        return self.int8 and x.device.type == "cpu"

    def quantize(self, x):
        """float tensor -> bytes or fake-quantized floats; bytes once for all who read the same tensor."""
        if self.momentum:
            self.move(x)
        if not self.gives_bytes(x):
            return fake_quantize(x, self.learned_scale(), self.zero_point)
        if not self.knows(x):
            q = to_bytes(x, *self.numbers)
            self.last = None if x.is_inference() else (weakref.ref(x), x._version, q)
            return q
        return self.last[2]

    def knows(self, x):
        """Whether x is what was last quantized here, and nobody has written to it since; inference tensors, which do
        not count what is written to them, are never known."""
        return self.last is not None and self.last[0]() is x and self.last[1] == x._version

    def dequantize(self, q):
        """What quantize() gave, as float."""
        if q.is_floating_point():
            return q
        scale, zero_point = self.numbers
        return q.float().sub_(zero_point).mul_(scale)


class DynamicPoint(Point):
    """A point that takes the range of each tensor as it comes."""

    lasting = False

    def quantize(self, x):
        if not self.knows(x):
            low, high = torch.aminmax(x.detach().float())
            self.set_range(low, high)
            self.numbers = (self.scale.item(), int(self.zero_point))
        return super().quantize(x)

    def freeze(self, int8):
        self.int8, self.last = int8, None


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

    @property
    def addend_point(self):
        """The point of the addend, where it has one."""
        lazy = isinstance(self.other, Lazy) and self.other.pending is not None
        return self.other.pending[0].points[1] if lazy else None


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

    The form in which it is read: read(None) gives float32, read(torch.bfloat16) that, and read(point) the tensor
    quantized at a Point: in int8 execution as bytes that come straight out of the kernel. Once it has been quantized,
    whoever reads it as float sees the quantized values; that rule is what makes the simulated and the converted network
    the same. make(form): computes it. pending: (layer, its input, Post) while the output of a layer. parents: the Lazy
    tensors whose bytes it takes over unchanged, which must share its point. attention_dtype: what attention on it is
    computed in, None for its own. exposed: whether code that knows nothing of all this got hold of its memory, so that
    nothing may be written there.
    """

    __slots__ = (
        "__weakref__", "attention_dtype", "exposed", "index", "make", "parents", "pending", "point", "shape", "stored",
    )  # fmt: skip
    made = itertools.count()
    log = None  # the list of all that is read, while trace_reads() watches

    def __init__(self, make, shape, *, pending=None, parents=(), attention_dtype=None):
        self.make, self.shape, self.pending, self.parents = make, torch.Size(shape), pending, parents
        self.stored, self.point, self.index, self.exposed = None, None, next(Lazy.made), False
        self.attention_dtype = attention_dtype

    @classmethod
    def of(cls, layer, x, post, shape):
        pending, dtype = (layer, x, post), layer.attention_dtype
        return cls(lambda form: layer.compute(x, post, form), shape, pending=pending, attention_dtype=dtype)

    def read(self, form=None):
        if Lazy.log is not None:
            Lazy.log.append(self)
        if isinstance(form, Point):
            if self.point is not form:
                quantized = self.make(form) if self.stored is None else form.quantize(self.read())
                self.stored, self.point = quantized, form
            return self.stored
        if self.stored is None:
            self.stored = self.make(form)
        x = self.stored if self.point is None else self.point.dequantize(self.stored)
        return x.to(form or torch.float32)

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


def read(x, form=None):
    """Lazy.read() of a Lazy or a plain tensor."""
    if isinstance(x, Lazy):
        return x.read(form)
    if isinstance(form, Point):
        return form.quantize(x)
    return x if form is None else x.to(form)


def floats(value):
    """An argument or result of a function, with a float tensor in place of each Lazy."""
    if isinstance(value, Lazy):
        return value.expose()
    if isinstance(value, (list, tuple)):
        return type(value)(map(floats, value))
    return {k: floats(v) for k, v in value.items()} if isinstance(value, dict) else value


def _torch_function(_cls, function, types, args=(), kwargs=None):
    kwargs = kwargs or {}
    handler = HANDLERS.get(function)
    out = handler(*args, **kwargs) if handler else NotImplemented
    return function(*floats(args), **floats(kwargs)) if out is NotImplemented else out


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
    return Lazy.of(layer, inputs, post._replace(other=other), main.shape)


def _cat(tensors, dim=0):
    shape = list(tensors[0].shape)
    shape[dim] = sum(x.shape[dim] for x in tensors)
    dtype = next(x.attention_dtype for x in tensors if isinstance(x, Lazy))
    return Lazy(
        lambda form: torch.cat([read(x, form) for x in tensors], dim), shape, parents=tensors, attention_dtype=dtype
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

    def make(form):
        y = x.read(form)
        return (
            F.max_pool2d(y, kernel, stride, padding)
            if y.is_floating_point()
            else max_pool_bytes(y, kernel, stride, padding)
        )

    return Lazy(make, (*x.shape[:-2], *size), parents=(x,), attention_dtype=x.attention_dtype)


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

        def make(form):
            return getattr(x.read(form), name)(*args, **kwargs)

        return Lazy(make, shape, parents=(x,), attention_dtype=x.attention_dtype)

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
        return x.expose()[floats(index)]
    return _layout("__getitem__")(x, index)


def _dropout(x, p=0.5, training=True, inplace=False):
    return NotImplemented if training else x


def _attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    """Handler of scaled_dot_product_attention: in int8 execution, where that was asked for, in what is fastest here."""
    wanted = next((x.attention_dtype for x in (query, key, value) if isinstance(x, Lazy)), None)
    if wanted is None:
        return NotImplemented
    how, dtype = fastest_attention()
    parts = [read(x, dtype) for x in (query, key, value)]
    if how == "products" and attn_mask is None and not (dropout_p or is_causal or enable_gqa):
        return wrap(attention_products(*parts, scale), wanted)
    if torch.is_tensor(attn_mask) and attn_mask.is_floating_point():
        attn_mask = attn_mask.to(dtype)
    options = dict(dropout_p=dropout_p, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa)
    return wrap(F.scaled_dot_product_attention(*parts, attn_mask, **options), wanted)


def attention_products(query, key, value, scale=None, scores=2**20):
    """scaled_dot_product_attention() as matrix products and a softmax, of so many queries at once that their `scores`
    stay in the cache."""
    rows = max(1, scores // (math.prod(query.shape[:-2]) * key.shape[-2]))
    # once: a product copies what is not contiguous, each time
    key, value = (key * (scale or query.shape[-1] ** -0.5)).contiguous(), value.contiguous()
    return torch.cat([(part @ key.mT).softmax(-1) @ value for part in query.split(rows, -2)], -2)


@functools.cache
def fastest_attention():
    """(how, dtype) in which attention is fastest on this CPU, by a short trial: "fused", by PyTorch's kernel, or
    "products", where there are instructions for bfloat16."""
    ways = {"fused": F.scaled_dot_product_attention, "products": attention_products}
    forms = [("fused", torch.float32), ("fused", torch.bfloat16), ("products", torch.bfloat16)]
    seconds = dict.fromkeys(forms, math.inf)
    with torch.inference_mode():
        for how, dtype in forms * 12:  # in turns, the best of each: what else the machine does must not decide
            x = torch.ones(1, 6, 384, 64, dtype=dtype)
            start = time.perf_counter()
            ways[how](x, x, x)
            seconds[how, dtype] = min(seconds[how, dtype], time.perf_counter() - start)
    return min(seconds, key=seconds.get)


def attention_line():
    """fastest_attention() in words."""
    how, dtype = fastest_attention()
    return f"{'fused' if how == 'fused' else 'matrix products'} in {str(dtype).removeprefix('torch.')}"


def _layer_norm(x, shape, weight=None, bias=None, eps=1e-5):
    """Handler of LayerNorm: into bytes, their scale and zero point go into its weights, which saves a pass."""
    if not isinstance(x, Lazy) or weight is None or bias is None:
        return NotImplemented

    def make(form):
        y = x.read()
        if not (isinstance(form, Point) and form.lasting and form.gives_bytes(y)):
            return read(F.layer_norm(y, shape, weight, bias, eps), form)
        scale, zero_point = form.numbers
        y = F.layer_norm(y, shape, weight / scale, bias / scale + (zero_point + 0.5), eps)
        return y.clamp_(*UINT8).to(torch.uint8)  # as to_bytes() does

    return Lazy(make, x.shape, attention_dtype=x.attention_dtype)


def wrap(x, attention_dtype=None):
    """A tensor that is there already, as Lazy."""
    out = Lazy(None, x.shape, attention_dtype=attention_dtype)
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
    return lambda self, *args: getattr(self.expose(), name)(*floats(args))


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

    mode: "float", or "fake" (simulated, and int8 once the points are).
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
        self.mode, self.attention_dtype = "float", None
        self.packed, self.packed_linear, self.kernel_correct = None, None, None  # of the kernels; see check_kernel()
        self.points, self.overwrites = (None, None), False  # of the input; of the output where it is an addend

    def __getstate__(self):
        own = dict.fromkeys(("packed", "packed_linear", "kernel_correct"))  # the kernels' own layout cannot be copied
        return self.__dict__ | own

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
        return Lazy(lambda form: read(self.dense(), form), self.shape, pending=(self, None, Post(attr="weight")))

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

    @no_grad
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
        point = self.points[0]
        x = read(x, point if self.mode == "fake" else None)
        out = Lazy.of(self, x, Post(), self.output_shape(x.shape))
        # with nothing to gain from waiting, or with numbers that hold until the point's next tensor, now
        return out if point is not None and point.lasting else out.read()

    def compute(self, x, post, form):
        """The output, after its Post, as read(form) wants it. x: quantized, if the mode is "fake"."""
        if self.mode == "fake" and (point := post.addend_point) is not None:
            post.other.read(point)
        if x.dtype == torch.uint8:
            x = x.contiguous(memory_format=torch.channels_last if x.dim() == 4 else torch.contiguous_format)
            if self.check_kernel(x):
                return self.run(x, post, form)
            x = self.points[0].dequantize(x)
        y = self.simulate(x)
        if post.other is not None:
            y = y + read(post.other)
        return read(ACTIVATIONS[post.attr](y, *post.args), form)

    def check_kernel(self, x):
        """Whether the int8 kernel gives what it should for the first bytes that come.

        oneDNN has some that do not: on AMX, of 4 x 4 and larger even windows on fewer than 64 channels.
        """
        if self.kernel_correct is None:
            found = self.kernel(x, 1.0, 0, torch.float32, Post())
            with torch.autocast(x.device.type, enabled=False):  # bfloat16 is too coarse to compare with
                expected = self.simulate(self.points[0].dequantize(x))
            self.kernel_correct = bool((found - expected).abs().max() <= 1e-3 * expected.abs().max())
        return self.kernel_correct

    def run(self, x, post, form):
        """compute() by the int8 kernels."""
        other, (scale, zero_point), dtype = post.other, (1.0, 0), form or torch.float32
        if isinstance(form, Point):
            (scale, zero_point), dtype = form.numbers, torch.uint8
        if other is None:
            return self.kernel(x, scale, zero_point, dtype, post)
        numbers = (1.0, 0)
        if dtype == torch.uint8 and isinstance(other, Lazy) and other.point is not None:
            addend, numbers = other.stored, other.point.numbers
        else:
            addend, scale, zero_point = read(other), 1.0, 0
        own = self.overwrites and isinstance(other, Lazy) and not other.exposed
        if own:
            other.stored, other.point, other.make = None, None, _overwritten
        y = self.kernel_add(x, addend, own, *numbers, scale, zero_point, addend.dtype, post)
        return read(y, form) if y.dtype != dtype else y

    def linear_add(self, x, weight, zeros, other, own, other_scale, other_zero_point, scale, zero_point, dtype, post):
        """The Linear kernel of x (..., inputs), bytes, plus `other` (..., outputs), floats or bytes as `dtype` says:
        written over `other` if `own`, else beside it, for which there is a kernel for floats alone. numbers and post:
        as those of kernel()."""
        if dtype == torch.uint8 and not own:
            other, own = other.clone(), True
        return torch.ops.onednn.qlinear_pointwise.binary(
            x, *self.points[0].numbers, weight, self.weight_scale, zeros, other, self.bias,
            scale, zero_point, dtype, other_scale, other_zero_point, "sum" if own else "add", 1.0,
            post.attr, list(post.args), post.algorithm,
        )  # fmt: skip


def _overwritten(_form):
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

    def kernel_add(self, x, other, own, other_scale, other_zero_point, scale, zero_point, dtype, post):
        """kernel() plus `other`, of the output's shape, which is written over if `own`. PyTorch's kernel then returns a
        copy of that; a 1 x 1 convolution is better off as the Linear layer that it is at each place."""
        weight, zeros, places = self.packs(x)
        other = other.contiguous(memory_format=torch.channels_last)
        numbers = other_scale, other_zero_point, scale, zero_point, dtype, post
        if x.dim() == 4 and (self.kernel_size, *places) == ((1, 1), [1, 1], [0, 0], [1, 1], 1):
            x, other = (t.permute(0, 2, 3, 1) for t in (x, other))
            if self.packed_linear is None:
                self.packed_linear = torch.ops.onednn.qlinear_prepack(self.weight_q.flatten(1), list(x.shape))
            return self.linear_add(x, self.packed_linear, zeros, other, own, *numbers).permute(0, 3, 1, 2)
        return torch.ops.onednn.qconv2d_pointwise.binary(
            x, *self.points[0].numbers, weight, self.weight_scale, zeros, other if own else other.clone(), self.bias,
            *places, scale, zero_point, dtype, other_scale, other_zero_point, "sum", 1.0,
            post.attr, list(post.args), "",
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

    def kernel_add(self, x, other, own, *numbers_and_post):
        return self.linear_add(x, *self.packs(x), other.contiguous(), own, *numbers_and_post)


class QuantConvTranspose2d(QuantLayer):
    """A transposed convolution, which has no int8 kernel of its own: run as the convolution that it is (Shi et al.
    2016, arXiv 1609.07009). Outputs at one place within a stride come from the same taps of the weight, so a
    convolution gives all places of a stride as channels, which are then spread; taps that a place does not have are 0.
    Where windows do not overlap (kernel = stride) it is a 1 x 1 one without zeros.
    """

    axis = 1

    def __init__(self, layer, **options):
        super().__init__(layer, **options)
        self.in_channels, self.out_channels = layer.in_channels, layer.out_channels
        self.options = (layer.stride, layer.padding, layer.output_padding, layer.groups, layer.dilation)

    @staticmethod
    def refuses(layer):
        return "groups" if layer.groups > 1 else None

    def fuses(self, attr, post):
        return attr not in ("gelu", "add")

    def taps(self, axis):
        """Of rows (axis 0) or columns: [(place within the stride, step from the input there)] of each tap."""
        stride, padding, _, _, dilation = (option[axis] if isinstance(option, tuple) else 1 for option in self.options)
        reach = [dilation * tap - padding for tap in range(self.shape[2 + axis])]  # output o = stride * input + reach
        return [(r % stride, -(r // stride)) for r in reach]

    def packs(self, x):
        if self.packed is None:
            (high, wide), taps = self.options[0], [self.taps(0), self.taps(1)]
            steps = [[step for _, step in rows] for rows in taps]
            first, last = [min(s) for s in steps], [max(s) for s in steps]
            kernel = [b - a + 1 for a, b in zip(first, last, strict=True)]
            weight = self.weight_q.new_zeros(high, wide, self.out_channels, self.in_channels, *kernel)
            for i, (row, down) in enumerate(taps[0]):
                for j, (column, right) in enumerate(taps[1]):
                    weight[row, column, :, :, down - first[0], right - first[1]] = self.weight_q[:, :, i, j].T
            weight = weight.flatten(0, 2).contiguous()
            scale = self.weight_scale.repeat(high * wide)
            bias = None if self.bias is None else self.bias.detach().repeat(high * wide)
            # enough for the first place of the output and for the last
            size = self.output_shape(x.shape)[-2:]
            count = [math.ceil(n / s) for n, s in zip(size, self.options[0], strict=True)]
            after = [c - n + b for c, n, b in zip(count, x.shape[-2:], last, strict=True)]
            padding = [max(0, -a, p) for a, p in zip(first, after, strict=True)]
            places = [[1, 1], padding, [1, 1]]
            packed = torch.ops.onednn.qconv_prepack(weight, scale, *self.points[0].numbers, *places, 1, list(x.shape))
            start = [p + a for p, a in zip(padding, first, strict=True)]
            self.packed = packed, scale, torch.zeros(len(scale), dtype=torch.int8), bias, places, start
        return self.packed

    def kernel(self, x, scale, zero_point, dtype, post):
        weight, weight_scale, zeros, bias, places, (top, left) = self.packs(x)
        y = torch.ops.onednn.qconv_pointwise(
            x, *self.points[0].numbers, weight, weight_scale, zeros, bias, *places, 1,
            scale, zero_point, dtype, post.attr, list(post.args), post.algorithm,
        )  # fmt: skip
        (high, wide), (*_, height, width) = self.options[0], self.output_shape(x.shape)
        y = y[..., top : top - (-height // high), left : left - (-width // wide)].permute(0, 2, 3, 1)
        y = y.unflatten(3, (high, wide, -1)).transpose(2, 3).flatten(3, 4).flatten(1, 2)  # (N, rows, columns, channels)
        return y[:, :height, :width].permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)

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


# ---- networks -------------------------------------------------------------------------------------------------------


def is_quantized(model):
    """Whether a network is one that quantize.py has prepared."""
    return hasattr(model, "points")


def quant_layers(model):
    """{name: QuantLayer} of a network."""
    return {name: m for name, m in model.named_modules() if isinstance(m, QuantLayer)}


def set_mode(model, mode, names=None):
    """The mode of all QuantLayers, or of those named."""
    for name, layer in quant_layers(model).items():
        if names is None or name in names:
            layer.mode = mode


def connect(model, wiring, kind=Point):
    """Give a network its points, and each layer its own.

    wiring: {name: [number of the input's point, of the output's where it is an addend, whether the layer's kernel may
    write a sum in the place of the addend]}.
    """
    if not is_quantized(model):
        model.register_forward_hook(_read_output)
    count = 1 + max((i for row in wiring.values() for i in row[:2] if i is not None), default=-1)
    model.points = nn.ModuleList(kind() for _ in range(count))
    for name, (own, addend, overwrites) in wiring.items():
        layer = model.get_submodule(name)
        numbers = (own, addend if kind.lasting else None)
        layer.points = tuple(None if i is None else model.points[i] for i in numbers)
        layer.overwrites = overwrites


def _read_output(_model, _inputs, output):
    return read(output)


def execute(model, *, int8, attention_dtype=None):
    """Run a converted network by the int8 kernels, or in float from the same weights."""
    for point in model.points:
        point.freeze(int8)
    for layer in quant_layers(model).values():
        layer.attention_dtype = attention_dtype if int8 else None


@contextlib.contextmanager
def simulated(model):
    """Inside, a converted network computes in float from its quantized weights."""
    dtype = next((layer.attention_dtype for layer in quant_layers(model).values() if layer.attention_dtype), None)
    int8 = dtype is not None or any(point.int8 for point in model.points)
    execute(model, int8=False)
    try:
        yield model
    finally:
        execute(model, int8=int8, attention_dtype=dtype)


@torch.library.custom_op("int8::resize", mutates_args=())
def resize_whole(x: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Bilinear resizing that torch.compile leaves to PyTorch's kernel, which is several times as fast as what it makes
    of it."""
    return F.interpolate(x, (height, width), mode="bilinear", align_corners=False)


@resize_whole.register_fake
def _(x, height, width):
    size = (*x.shape[:2], height, width)
    return torch.empty(size, dtype=x.dtype, device=x.device).contiguous(memory_format=suggest_memory_format(x))


RESIZING = {torch.ops.aten.upsample_bilinear2d.vec: lambda x, size, *_: torch.ops.int8.resize(x, *size)}


def compiled(model, run):
    """run(images), of a quantized network, by torch.compile: as that takes no Lazy, it is given a plain graph of
    operators, for each shape of images one. ModelError of --method dynamic, whose numbers are not known beforehand."""
    if any(not point.lasting for point in model.points):
        raise ModelError("torch.compile wants ranges of activations that are known, which --method dynamic has not")
    graphs = {}

    def call(images):
        if images.shape not in graphs:
            read(run(images))  # so that the kernels are checked and have their weights' layout
            graph = make_fx(lambda images: read(run(images)), decomposition_table=RESIZING)(images)
            graph.graph.eliminate_dead_code()
            graph = split_const_subgraphs(graph)
            graph.run_folding()
            graphs[images.shape] = torch.compile(graph, dynamic=False)
        return graphs[images.shape](images)

    return call


@contextlib.contextmanager
def watched(layers, on_call=None, in_compute=None):
    """Inside, on_call(layer, inputs) runs before a layer is called, and in_compute(layer, compute, *args) in place of
    its compute(*args), which it is given as `compute`. Not to be nested."""
    layers = list(layers)
    handles = [layer.register_forward_pre_hook(on_call) for layer in layers if on_call]
    for layer in layers if in_compute else ():
        layer.compute = functools.partial(in_compute, layer, layer.compute)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for layer in layers if in_compute else ():
            del layer.compute


# ---- who reads what when --------------------------------------------------------------------------------------------


class Reads:
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


@no_grad
def trace_reads(model, images, layers):
    """Run a network whose `layers` {name: QuantLayer} are in float -> {name: see connect()}, and {name: multiply-
    accumulates an image}."""
    seen, kept = Reads(), {layer: layer.points for layer in layers.values()}

    def note_call(layer, args):
        seen.reads.append((layer, args[0]))

    def note_addend(layer, compute, x, post, form):
        if post.other is not None:
            seen.log.append((layer, post.other))
            if layer.adds_bytes:
                seen.adds.append((layer, post.other))
        return compute(x, post, form)

    Lazy.log = seen.log
    try:
        for layer in kept:
            layer.points = (Point(), None)  # so that it waits until it is read, as it will
        with watched(kept, note_call, note_addend):
            read(model(images))
    finally:
        Lazy.log = None
        for layer, points in kept.items():
            layer.points = points
    groups, numbers, overwriting = seen.groups(), {}, seen.last_readers()
    wiring = {layer: [None, None, layer in overwriting] for layer in kept}
    for layer, x in seen.reads:
        wiring[layer][0] = numbers.setdefault(groups[id(x)], len(numbers))
    for _, x in seen.adds:
        if isinstance(x, Lazy) and x.pending is not None:
            wiring[x.pending[0]][1] = numbers.setdefault(groups[id(x)], len(numbers))
    macs = dict.fromkeys(wiring, 0)
    for layer, x in seen.reads:
        places = x.shape if isinstance(layer, QuantConvTranspose2d) else layer.output_shape(x.shape)
        macs[layer] += math.prod(places) // len(images) * (math.prod(layer.shape) // layer.shape[0])
    return tuple({name: found[layer] for name, layer in layers.items()} for found in (wiring, macs))
