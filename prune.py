"""Prune a trained network: single weights by global magnitude, or whole channels, heads and hidden units.

    python prune.py --amount 0.3                                  # 30% of the weights of checkpoints/train/best.pt
    python prune.py --amount 0.9 --sparsity-schedule cubic --kl 1 # step by step while it is trained, and taught
    python prune.py --structured --amount 0.5                     # half of the multiply-accumulates, really gone
    python prune.py --structured --amount 0.5 --target latency    # half of the milliseconds, by timed layers
    python prune.py --sweep 0.1 0.3 0.5 0.7 0.9                   # the curve, before and after fine-tuning

Single weights. The weights of smallest magnitude in all layers of --scope together become 0 (Han et al. 2015; --score
lamp ranks by w^2 over the sum of the squares not smaller in its layer, Lee et al. 2021). With --sparsity-schedule cubic
the share grows as s (1 - (1 - t)^3) over the first half of the training (Zhu and Gupta 2017). A dense kernel multiplies
by 0 as slowly as by anything else, so the network is no faster; its file is smaller, see models.pack_zeros().

Channels. Which numbers stand and fall together is found by sending index numbers through the network: each channel that
a layer makes gets one, a view, permute, cat, slice or pad moves them as it moves the data, and those that meet in a sum
or product are joined (channel_groups()). What is left over is a class of slices of parameters that can go at once. A
channel is worth what least squares cannot make up for: with H the covariance of a layer's inputs, removing input p
costs |W_p|^2 / [H^-1]_pp, and the best weights of the others are W - W_p [H^-1]_p / [H^-1]_pp (Hassibi and Stork 1993;
of channels, OSSCAR: Meng et al. 2024). Greedily, what costs least for what it saves goes next. Then, front to back on
the network as it is by then, each layer that read what is gone is refitted to calibration images in closed form, and
BatchNorm gets new statistics: no gradient is needed. The result is a smaller network of plain layers.
"""

if __name__ == "__main__":  # the imports take seconds: Ctrl-C ends them without a traceback
    import signal

    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import copy
import functools
import math
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import datasets
import evaluate
import models
import train
from datasets import not_negative, positive_float, positive_int
from models import ModelError

# ---- single weights -------------------------------------------------------------------------------------------------

SCORES = ("magnitude", "layer", "lamp")
PRUNABLE = (nn.Conv2d, nn.Linear, nn.ConvTranspose2d)


def weights_in(model, scope):
    """({name: weight} that `scope` (backbone, head, all) lets be pruned, {name: why not} of the other parameters)."""
    inside, outside, kinds = {}, {}, input_dims(model)
    parts = {"aux_head": "only training uses it", "learned": "it resizes the logits"}
    for name, p in model.named_parameters():
        part = name.partition(".")[0]
        why = parts.get(part) or (None if scope in ("all", part) else f"not in --scope {scope}")
        if name not in kinds:
            why = "no weight of a convolution or Linear"
        (outside if why else inside)[name] = why or p
    if not inside:
        raise ModelError(f"--scope {scope}: no weight of a convolution or Linear is there")
    return inside, outside


def lamp(weight):
    """LAMP scores (Lee et al. 2021, section 3): w^2 over the sum of all squares in the layer that are not smaller."""
    order = weight.detach().double().square().flatten().sort()
    scores = torch.empty_like(order.values)
    scores[order.indices] = order.values / order.values.flip(0).cumsum(0).flip(0).clamp(min=1e-300)
    return scores.view_as(weight)


@torch.no_grad()
def magnitude_masks(weights, amount, score="magnitude"):
    """{name: bool mask, True where a weight stays}; round(amount * all) are False, the least by `score`.

    magnitude: |w| over all weights together. layer: the same share of each. lamp: see lamp(). Of equal scores topk
    decides, as in torch.nn.utils.prune.
    """
    if score == "layer":
        return {k: _least(w.abs().flatten(), round(amount * w.numel())).view_as(w) for k, w in weights.items()}
    scores = torch.cat([(w.abs() if score == "magnitude" else lamp(w)).flatten() for w in weights.values()])
    kept = _least(scores, round(amount * len(scores))).split([w.numel() for w in weights.values()])
    return {k: mask.view_as(w) for (k, w), mask in zip(weights.items(), kept, strict=True)}


def _least(scores, count):
    kept = torch.ones_like(scores, dtype=torch.bool)
    kept[scores.topk(count, largest=False).indices] = False
    return kept


@torch.no_grad()
def two_of_four(weights):
    """(masks that keep the two largest of each four consecutive input channels, {name: why it has none})."""
    masks, left = {}, {}
    for name, w in weights.items():
        if w.shape[1] % 4:
            left[name] = f"its {w.shape[1]} input channels are no multiple of 4"
            continue
        fours = w.abs().transpose(0, 1).reshape(-1, 4, w[:, 0].numel())  # (inputs / 4, 4, the rest)
        mask = torch.zeros_like(fours, dtype=torch.bool).scatter_(1, fours.topk(2, dim=1).indices, True)
        masks[name] = mask.view(w.shape[1], w.shape[0], *w.shape[2:]).transpose(0, 1)
    return masks, left


@torch.no_grad()
def apply_masks(tensors, masks):
    """Set what the masks say to 0 in {name: tensor}, in place."""
    for name, mask in masks.items():
        if name in tensors:
            tensors[name].mul_(mask)


def gradual(weights, *, amount, score, first, steps, interval):
    """(after_step of train.fit(), number of steps to the last new masks) for the cubic schedule: every `interval` steps
    until half of them are done new masks, of the weights as the step left them, so that what was 0 may grow again.

    Between two choices what is 0 stays 0, in the average of the weights too. A resumed run finds the mask in the zeros.
    """
    interval = min(interval, max(1, steps // 2))
    end = max(1, steps // 2 // interval) * interval
    masks = {name: w.detach() != 0 for name, w in weights.items()} if first else {}

    def after_step(step, shadow):
        done = min(step + 1, end)
        if step + 1 <= end and done % interval == 0:
            share = amount * (1 - (1 - done / end) ** 3)
            masks.update(magnitude_masks(weights, share, score))
        apply_masks(weights, masks)
        apply_masks(shadow, masks)

    return after_step, end


def sparsity(state, names):
    """({name: share of zeros}, share of all) of the tensors of a state_dict by these names."""
    zeros = {name: (state[name] == 0).sum().item() for name in names}
    total = sum(state[name].numel() for name in names)
    return {name: zeros[name] / state[name].numel() for name in names}, sum(zeros.values()) / max(1, total)


# ---- channel groups -------------------------------------------------------------------------------------------------

FIXED, FREE = -1, -2  # index numbers of what cannot go (images, constants), and of zeros that fill up to any width

# names of functions, without underscores, and the i of one in place or the r of one whose operands are swapped
LAYOUT = {
    "cat", "chunk", "expand", "flatten", "flip", "get", "getitem", "movedim", "narrow", "permute", "pixel_shuffle",
    "reshape", "roll", "split", "squeeze", "stack", "transpose", "unbind", "unflatten", "unsqueeze", "view",
}  # fmt: skip
ELEMENTWISE = {
    "add", "and", "clamp", "clone", "contiguous", "detach", "div", "dropout", "dropout2d", "elu", "eq", "exp", "float",
    "ge", "gelu", "gt", "hardsigmoid", "hardswish", "hardtanh", "invert", "le", "leaky_relu", "lt", "masked_fill",
    "maximum", "minimum", "mish", "mul", "ne", "neg", "or", "pow", "relu", "relu6", "rsqrt", "sigmoid", "silu",
    "softplus", "sqrt", "sub", "tanh", "to", "truediv", "where",
}  # fmt: skip
SPATIAL = {"adaptive_avg_pool2d", "avg_pool2d", "interpolate", "max_pool2d"}
REDUCTIONS = {"amax", "amin", "mean", "sum"}
LIKE = {"ones_like", "zeros_like"}
# {function: (dimension of its input that channels lie along, dimension of its weight that counts outputs)}
LAYERS = {"linear": (-1, 0), "conv2d": (1, 0), "conv_transpose2d": (1, 1)}


class Channels:
    """The index numbers of one traced network: which stand for the same channel, which slices of parameters they are.

    members: {(name of a parameter or buffer, dimension): a number for each of its indices}. reason: {number: why its
    class cannot go}.
    """

    def __init__(self, traced):
        self.parent, self.members, self.reason, self.ids = [], {}, {}, {}
        modules = {module: name for name, module in traced.names.items()}
        self.names = {  # of parameters and buffers, by id; not of those that modules share
            tensor: ".".join(filter(None, (modules[owners[0][0]], owners[0][1])))
            for tensor, owners in traced.owners.items() if len(owners) == 1
        }  # fmt: skip
        for call in traced.calls:
            self.follow(call)
        for value in traced.outputs:
            self.pin(self.ids.get(value), "its numbers are the logits")

    # -- classes of numbers

    def new(self, count):
        self.parent += range(len(self.parent), len(self.parent) + count)
        return torch.arange(len(self.parent) - count, len(self.parent))

    def find(self, number):
        while self.parent[number] != number:
            self.parent[number] = self.parent[self.parent[number]]
            number = self.parent[number]
        return number

    def unite(self, x, y):
        x, y = sorted((self.find(x), self.find(y)))
        self.parent[y] = x
        if y in self.reason:
            self.reason.setdefault(x, self.reason[y])

    def pin(self, numbers, why):
        """The classes of these numbers cannot go."""
        for number in () if numbers is None else numbers.unique().tolist():
            if number >= 0:
                self.reason.setdefault(self.find(number), why)

    def join(self, a, b):
        """Number by number, those of two tensors that broadcast -> the numbers of the result."""
        if a is None or b is None:
            return b if a is None else a
        a, b = torch.broadcast_tensors(a, b)
        for d in range(a.dim()):
            if a.stride(d) == b.stride(d) == 0:  # the same all along
                a, b = a.narrow(d, 0, 1), b.narrow(d, 0, 1)
        both = (a >= 0) & (b >= 0) & (a != b)
        if both.any():
            for x, y in torch.stack([a[both], b[both]], 1).unique(dim=0).tolist():
                self.unite(x, y)
        self.pin(a[(a >= 0) & (b == FIXED)], "it is added to what cannot go")
        self.pin(b[(b >= 0) & (a == FIXED)], "it is added to what cannot go")
        return torch.maximum(a, b)

    def along(self, ids, dim):
        """ids with a dimension along which the numbers are joined, to one."""
        top = ids.amax(dim, keepdim=True)
        self.join(ids, top.expand_as(ids))
        return top

    def vector(self, ids, dim):
        """One number for each index along a dimension; those that stand at the same index are joined."""
        for d in set(range(ids.dim())) - {dim % ids.dim()}:
            ids = ids.narrow(d, 0, 1) if ids.stride(d) == 0 else ids
        return self.along(ids.movedim(dim, 0).flatten(1), 1)[:, 0]

    def varies(self, ids, dim):
        return ids.stride(dim) != 0 and bool((ids != ids.narrow(dim, 0, 1)).any())

    # -- calls

    def parameter(self, value):
        """The name of the parameter or buffer that a Value is, or None."""
        return self.names.get(id(value.tensor)) if value.maker is None else None

    def note(self, name, dim, numbers):
        """Slices of a parameter along a dimension have these numbers; a layer that is called again has its old ones."""
        return self.join(self.members.setdefault((name, dim), numbers), numbers)

    def full(self, value):
        ids = self.ids.get(value)
        return torch.full(value.tensor.shape, FIXED) if ids is None else ids

    def follow(self, call):
        """Set the numbers of what a call makes."""
        name = call.name.strip("_")
        name = name[1:] if call.name.startswith("__") and name[1:] in ELEMENTWISE else name
        if name in LAYERS:
            out = self.layer(call, *LAYERS[name])
        elif handler := getattr(self, f"on_{name}", None):
            out = handler(call)
        elif not any(value in self.ids for value in call.reads):
            out = None
        elif name in LIKE:
            out = torch.full(call.makes[0].tensor.shape, FREE)
        elif name in ELEMENTWISE:
            out = self.elementwise(call)
        elif name in SPATIAL:
            out = self.vector(self.full(call.reads[0]), 1).view(1, -1, 1, 1)
        elif name in LAYOUT:
            out = self.layout(call, indexes=name == "getitem")
        elif name in REDUCTIONS:
            out = self.reduction(call)
        else:
            out = self.stop(call)
        outs = [out] * len(call.makes) if torch.is_tensor(out) else out or []
        for value, ids in zip(call.makes, outs, strict=False):
            if ids is not None and (ids != FIXED).any():
                self.ids[value] = ids.expand(value.tensor.shape)

    def stop(self, call, why="{}() mixes it with others"):
        for value in call.reads:
            self.pin(self.ids.get(value), why.format(call.name))

    def elementwise(self, call):
        out = functools.reduce(self.join, map(self.ids.get, call.reads))
        out = out.expand(torch.broadcast_shapes(*(value.tensor.shape for value in call.reads)))
        for value in call.reads:
            lead = out.dim() - value.tensor.dim()
            for dim, length in enumerate(value.tensor.shape if value not in self.ids else ()):
                if length > 1 and self.varies(out, dim + lead):
                    if name := self.parameter(value):
                        self.note(name, dim, self.vector(out, dim + lead))
                    else:
                        self.pin(out, "it meets a tensor of fixed width")
        return out

    def layout(self, call, indexes):
        """The call itself, on numbers; what an index holds stays what it is."""
        numbers = {id(v.tensor): self.full(v) for v in call.reads}

        def ids(x):
            if torch.is_tensor(x):
                return numbers[id(x)]
            return type(x)(map(ids, x)) if type(x) in (list, tuple) else x

        first, *rest = call.args
        args, kwargs = (rest, call.kwargs) if indexes else (ids(rest), {k: ids(v) for k, v in call.kwargs.items()})
        try:
            out = call.function(ids(first), *args, **kwargs)
        except (RuntimeError, TypeError, IndexError):
            return self.stop(call, "{}() moves it in ways not followed")
        return out if torch.is_tensor(out) else list(out)

    def reduction(self, call):
        x, dims = self.full(call.reads[0]), argument(call, 1, "dim")
        dims = (dims,) if isinstance(dims, int) else dims
        if dims is None or torch.is_tensor(dims) or any(self.varies(x, d) for d in dims):
            return self.stop(call)
        for d in sorted((d % x.dim() for d in dims), reverse=True):
            x = x.narrow(d, 0, 1) if argument(call, 2, "keepdim") else x.select(d, 0)
        return x

    def on_pad(self, call):
        x, padding, mode = self.full(call.reads[0]), argument(call, 1, "pad"), argument(call, 2, "mode", "constant")
        if mode == "constant":
            return F.pad(x, padding, value=FIXED if argument(call, 3, "value") else FREE)
        return F.pad(x.double(), padding, mode=mode).long()

    def layer(self, call, dim, out):
        """A convolution or Linear; see LAYERS."""
        x, count = self.vector(self.full(call.reads[0]), dim), call.makes[0].tensor.shape[dim]
        groups = argument(call, 6, "groups", 1)  # of a Linear none
        weight, bias = (self.names.get(id(argument(call, *at))) for at in ((1, "weight"), (2, "bias")))
        if weight is None or (bias is None and argument(call, 2, "bias") is not None):
            return self.stop(call, "its weight is computed")
        if groups == len(x) > 1 and out == 0:  # depthwise: each channel has filters of its own
            numbers = x.repeat_interleave(count // groups)
        elif groups == 1 or out == 0:  # as many stay in each group: the i-th of all groups go together
            numbers = self.new(count)
            self.note(weight, 1 - out, self.along(x.view(groups, -1), 0)[0])
            self.along(numbers.view(groups, -1), 0)
        else:
            return self.stop(call, "a transposed convolution in groups reads it")
        numbers = self.note(weight, out, numbers)
        if bias:
            self.note(bias, 0, numbers)
        shape = [1] * call.makes[0].tensor.dim()
        shape[dim] = -1
        return numbers.view(shape)

    def on_batch_norm(self, call):
        """Also a PReLU: vectors of a number for each channel."""
        x = self.full(call.reads[0])
        for value in call.reads[1:]:
            if value.tensor.numel() > 1 and (name := self.parameter(value)):
                self.note(name, 0, self.vector(x, 1))
        return x

    on_prelu = on_batch_norm

    def on_layer_norm(self, call):
        x = self.full(call.reads[0])
        if any(self.varies(x, -1 - d) for d in range(len(call.args[1]))):
            self.pin(x, "a LayerNorm reads it")
        return x

    def on_softmax(self, call):
        x, dim = self.full(call.reads[0]), argument(call, 1, "dim")
        if dim is None or self.varies(x, dim):
            self.pin(x, "a softmax runs over it")
        return x

    on_log_softmax = on_softmax

    def on_matmul(self, call):
        return self.product(*map(self.full, call.reads[:2]))

    on_bmm = on_mm = on_matmul

    def on_scaled_dot_product_attention(self, call):
        q, k, v = map(self.full, call.reads[:3])
        return self.product(self.product(q, k.mT), v)

    def product(self, a, b):
        """Numbers of a (..., i, k) @ b (..., k, j)."""
        flat = min(a.dim(), b.dim()) < 2
        summed = [flat or bool(self.varies(x, d) and (x >= 0).any()) for x, d in ((a, -1), (b, -2))]
        heads = not flat and any(self.varies(x, d) for x in (a, b) for d in range(x.dim() - 2))
        if all(summed) and heads:  # queries and keys: what is summed goes together, each head as a whole
            return self.along(self.join(self.along(a, -2).mT, self.along(b, -1)), -2)  # of (..., k, 1)
        if any(summed):
            why = "attention sums its products" if all(summed) and not flat else "a product mixes it"
            for x in (x for x, mixed in zip((a, b), summed, strict=True) if mixed):
                self.pin(x, why)
            return torch.full((1, 1), FIXED)
        a, b = a[..., :1], b[..., :1, :]  # (..., i, 1), (..., 1, j)
        if not ((a >= 0).any() and (b >= 0).any()):
            return a if (a >= 0).any() else b
        if self.varies(a, -2):  # two axes of channels meet
            self.pin(a, "a product mixes it")
            return b
        return self.join(a, b)


def argument(call, at, name, default=None):
    """An argument of a call, by its place or its name."""
    return call.args[at] if len(call.args) > at else call.kwargs.get(name, default)


class Group(NamedTuple):
    """Channels of one kind: units, {(parameter, dimension): [indices]} each, of which any may go; `kind` says how they
    look, for ranking like among like; `size` is the number of slices of the first parameter that a unit takes."""

    name: str
    units: list
    kind: str
    size: int


def channel_groups(model):
    """([Group, ...] of a network, {name of a layer: why none of its outputs can go}).

    The network, in eval mode, is traced on noise with all outputs that training uses. Taking one unit of each group out
    is then tried: where forward() has a width written down, which no trace can see, it fails.
    """
    channels, units, alike, left = Channels(models.trace(model, run=outputs_of(model))), {}, {}, {}
    for place, numbers in channels.members.items():
        for index, number in enumerate(numbers.tolist()):
            if number >= 0:
                units.setdefault(channels.find(number), {}).setdefault(place, []).append(index)
    for root, unit in units.items():
        alike.setdefault((frozenset(unit), channels.reason.get(root)), []).append(unit)
    groups, makers_of, inputs = [], [], input_dims(model)
    shapes = {name: tuple(t.shape) for name, t in tensors_of(model).items()}
    for (places, why), members in alike.items():
        makers = [name for name, dim in members[0] if inputs.get(name) == 1 - dim]
        if not why and not any(inputs.get(name) == dim for name, dim in places):
            why = "no layer that could be refitted reads it"
        if why or not makers:
            left |= dict.fromkeys(makers, why)
            continue
        name = makers[0].removesuffix(".weight")
        roles = sorted((shapes[place[0]], place[1], name.partition(".")[0]) for place in places)
        groups.append(Group(name, members, repr(roles), len(members[0][makers[0], 1 - inputs[makers[0]]])))
        makers_of.append(makers)
    failed = trial(model, groups, [{0} for _ in groups])
    whys = [failed and trial(model, groups, [{0} if other is group else set() for other in groups]) for group in groups]
    for makers, why in zip(makers_of, whys, strict=True):
        left |= dict.fromkeys(makers, f"its network has the width written down: {why}") if why else {}
    made = {name for makers, why in zip(makers_of, whys, strict=True) if not why for name in makers}
    left = {name.removesuffix(".weight"): why for name, why in left.items() if name not in made}
    return [group for group, why in zip(groups, whys, strict=True) if not why], left


def outputs_of(model):
    """A function of images that gives all outputs of a network that training uses."""
    return lambda images: model.predictions(model.encode(images))


def tensors_of(model):
    """{name: parameter or buffer} of a network."""
    return dict((*model.named_parameters(), *model.named_buffers()))


def input_dims(model):
    """{name of a weight: the dimension that counts inputs} of a network's convolutions and Linear layers; the other of
    the first two counts outputs."""
    layers = ((name, m) for name, m in model.named_modules() if isinstance(m, PRUNABLE))
    return {f"{name}.weight": int(not isinstance(m, nn.ConvTranspose2d)) for name, m in layers}


@models.no_grad
def trial(model, groups, gone):
    """None where a network without some units gives what it gives with the weights on them at 0, else what is wrong."""
    zeroed, smaller, keep = copy.deepcopy(model), copy.deepcopy(model), kept_indices(model, groups, gone)
    zero_readers(zeroed, keep)
    images = torch.randn(1, 3, 2 * model.stride, 2 * model.stride + 1, generator=torch.Generator().manual_seed(0))
    images = images.to(next(model.parameters()))
    try:
        shrink(smaller, keep)
        found = outputs_of(smaller)(images)
    except (RuntimeError, ValueError, IndexError) as error:
        return models.one_line(error, 100)
    for x, y in zip(outputs_of(zeroed)(images), found, strict=True):
        if not (x - y).abs().max() <= 1e-4 * x.abs().max().clamp(min=1e-6):
            return f"outputs differ by {(x - y).abs().max():.2g}"
    return None


@torch.no_grad()
def zero_readers(model, keep):
    """Set to 0, in place, the weights of all layers on inputs that `keep` of kept_indices() does not name."""
    tensors, inputs = tensors_of(model), input_dims(model)
    for (name, dim), indices in keep.items():
        if inputs.get(name) == dim:
            gone = torch.ones(tensors[name].shape[dim], dtype=torch.bool)
            gone[indices] = False
            tensors[name].index_fill_(dim, gone.nonzero()[:, 0].to(tensors[name].device), 0)


# ---- shrink ---------------------------------------------------------------------------------------------------------


def kept_indices(model, groups, gone):
    """{(parameter, dimension): indices that stay} once the units `gone`, a set of numbers for each group, have left."""
    lost, tensors = {}, tensors_of(model)
    for group, numbers in zip(groups, gone, strict=True):
        for number in numbers:
            for place, indices in group.units[number].items():
                lost.setdefault(place, set()).update(indices)
    return {
        (name, dim): torch.tensor([i for i in range(tensors[name].shape[dim]) if i not in indices])
        for (name, dim), indices in lost.items()
    }


@models.no_grad
def shrink(model, keep):
    """Take out of a network, in place, all slices that `keep` of kept_indices() does not name -> {tensor: shape}."""
    tensors = tensors_of(model)
    small = {name: tensors[name].detach() for name, _ in keep}
    for (name, dim), indices in keep.items():
        small[name] = small[name].index_select(dim, indices.to(small[name].device))
    for name, tensor in small.items():
        put(model, name, tensor)
    fit_attributes(model, small)
    return {name: list(tensor.shape) for name, tensor in small.items()}


def put(model, name, tensor):
    """Replace a parameter or buffer by a tensor of another shape."""
    path, _, own = name.rpartition(".")
    module = model.get_submodule(path)
    if own in module._parameters:
        old = module._parameters[own]  # None of a bias that a refit added
        module._parameters[own] = nn.Parameter(tensor, requires_grad=old is None or old.requires_grad)
    else:
        module._buffers[own] = tensor


def fit_attributes(model, names):
    """Set the numbers of channels that modules keep to the shapes that their tensors of these names now have."""
    for path in {name.rpartition(".")[0] for name in names}:
        layer = model.get_submodule(path)
        if isinstance(layer, nn.Linear):
            layer.out_features, layer.in_features = layer.weight.shape
        elif isinstance(layer, nn.ConvTranspose2d):
            layer.in_channels, layer.out_channels = layer.weight.shape[0], layer.weight.shape[1] * layer.groups
        elif isinstance(layer, nn.Conv2d):
            outputs = layer.weight.shape[0]
            if layer.groups == layer.in_channels > 1:
                layer.groups = layer.groups * outputs // layer.out_channels
            layer.out_channels, layer.in_channels = outputs, layer.weight.shape[1] * layer.groups
        elif isinstance(layer, nn.modules.batchnorm._BatchNorm):
            layer.num_features = layer.running_mean.shape[0]
        elif isinstance(layer, nn.PReLU):
            layer.num_parameters = layer.weight.shape[0]
    for attention in model.modules():
        if hasattr(attention, "head_dim") and hasattr(attention, "q_proj"):
            attention.num_attention_heads = attention.q_proj.out_features // attention.head_dim


def rebuild(model, step, state):
    """Give a network of build_model() the shapes that a pruned one had; see models.load_checkpoint()."""
    tensors = tensors_of(model)
    for name, shape in step["plan"].items():
        if name in state:  # lora.py may have given it other classes since
            shape = state[name].shape
        like = tensors[name if name in tensors else f"{name.rpartition('.')[0]}.weight"]  # a refit may bring a bias
        put(model, name, like.new_empty(shape))
    fit_attributes(model, step["plan"])
    if step["plan"]:
        if len(step["channels"]) != len(model.channels):
            raise ModelError(f"it has {len(step['channels'])} feature maps, not {len(model.channels)}")
        model.channels = model.backbone.channels = list(step["channels"])


def restore(model, step):
    """Nothing is left to do."""


def map_channels(model):
    """How many channels each of a network's feature maps has."""
    with torch.inference_mode():
        noise = torch.zeros(1, 3, model.stride, model.stride)
        return [f.shape[1] for f in model.encode(noise.to(next(model.parameters())))]


# ---- what to take -------------------------------------------------------------------------------------------------

IMPORTANCE = ("residual", "l1", "l2", "gamma", "taylor")
TARGETS = ("params", "macs", "latency")


class Costs:
    """What a network costs with some units gone: parameters, multiply-accumulates of an image or milliseconds.

    Weights are counted with the width that each dimension still has. places, attention: of count_places(). tables: of
    layer_times(). scope: the part that counts, backbone, head or all.
    """

    def __init__(self, model, groups, places, attention, target, tables=None, scope="all"):
        self.places, self.attention, self.target, self.tables, self.scope = places, attention, target, tables, scope
        self.shapes = {name: list(p.shape) for name, p in model.named_parameters()}
        self.members = [  # for each group: {weight: {dimension: slices of one unit}}
            {name: {d: len(i) for (n, d), i in group.units[0].items() if n == name}
             for name, _ in group.units[0] if name in self.shapes}
            for group in groups
        ]  # fmt: skip

    def of(self, shapes, name):
        """The cost of one parameter at these widths."""
        if self.scope != "all" and not name.startswith(f"{self.scope}."):
            return 0
        if self.target == "latency":
            return self.tables[name](shapes[name]) if name in self.tables else 0.0
        numel = math.prod(shapes[name])
        if self.target == "params":
            return numel
        share = shapes[name][0] / self.shapes[name][0] if name in self.attention else 0
        return numel * self.places.get(name, 0) + share * self.attention.get(name, 0)

    def total(self, shapes=None):
        shapes = shapes or self.shapes
        return sum(self.of(shapes, name) for name in shapes)

    def without(self, shapes, group, count):
        """(widths, what it saves) after `count` units of group number `group` are gone from `shapes`."""
        after, saved = dict(shapes), 0.0
        for name, dims in self.members[group].items():
            after[name] = [n - count * dims.get(d, 0) for d, n in enumerate(shapes[name])]
            saved += self.of(shapes, name) - self.of(after, name)
        return after, saved


def count_places(model, images):
    """({name of a weight: how often it is applied to an image}, {name of a weight that makes an attention's values:
    multiply-accumulates of its two products}) of a network on images (1, 3, H, W) of the size that counts."""
    traced = models.trace(model, images, run=lambda x: model.decode(model.encode(x)))
    names = {module: f"{name}.weight" for name, module in traced.names.items()}
    places, attention = {}, {}
    for call in traced.calls:
        if call.name in LAYERS and isinstance(call.module, PRUNABLE):
            shape = (call.reads[0] if call.name == "conv_transpose2d" else call.makes[0]).tensor.shape
            count = math.prod(shape) // shape[LAYERS[call.name][0]] // len(images)
            places[names[call.module]] = places.get(names[call.module], 0) + count
        elif call.name == "scaled_dot_product_attention":
            q, k, v = (value.tensor.shape for value in call.reads[:3])
            maker = call.reads[2].maker
            while maker is not None and maker.name != "linear":
                maker = maker.reads[0].maker
            if maker is not None and isinstance(maker.module, nn.Linear):
                macs = math.prod(q[:-1]) * k[-2] * (q[-1] + v[-1]) // len(images)
                attention[names[maker.module]] = attention.get(names[maker.module], 0) + macs
    return places, attention


class Residual:
    """What removing inputs of one layer costs, as a share of the variance of its outputs, after the best refit of its
    other weights; see the top of this file.

    weight: (outputs, inputs, taps). covariance: (inputs, inputs), of the inputs at single places. ridge: added to its
    diagonal, as a share of the diagonal's mean.
    """

    def __init__(self, weight, covariance, ridge):
        covariance = covariance.double()
        self.rows = weight.double().transpose(1, 2).flatten(0, 1).contiguous()  # (outputs * taps, inputs)
        self.taps = weight.shape[2]
        self.scale = 1 / max(((self.rows @ covariance) * self.rows).sum().item(), 1e-30)
        covariance = covariance + ridge * covariance.diag().mean().clamp(min=1e-12) * torch.eye(len(covariance))
        self.inverse = torch.linalg.inv(covariance)
        self.gone = torch.zeros(len(covariance), dtype=torch.bool)

    @property
    def weight(self):
        """(outputs, inputs, taps), as it has become."""
        return self.rows.unflatten(0, (-1, self.taps)).transpose(1, 2)

    def errors(self):
        """Of each single input, inf where it is gone."""
        errors = self.scale * self.rows.square().sum(0) / self.inverse.diag().clamp(min=1e-30)
        return errors.masked_fill(self.gone, math.inf)

    def set_error(self, indices):
        """Of inputs that go together."""
        if self.gone[indices].any():
            return math.inf
        w = self.rows[:, indices]
        return self.scale * ((w @ torch.linalg.inv(self.inverse[indices][:, indices])) * w).sum().item()

    def remove(self, indices):
        """Take inputs out: the weights of the others make up for them."""
        others = torch.linalg.solve(self.inverse[indices][:, indices], self.inverse[indices])  # (P, inputs)
        self.rows.addmm_(self.rows[:, indices], others, alpha=-1)
        self.inverse.addmm_(self.inverse[:, indices], others, alpha=-1)
        self.rows[:, indices] = 0
        self.gone[indices] = True


def losses_of(group, readers):
    """The residual error of each unit of a group, summed over the layers that read it; inf where it is gone. readers:
    of readers_of()."""
    total = torch.zeros(len(group.units), dtype=torch.double)
    for place in (place for place in group.units[0] if place in readers):
        sets = torch.tensor([unit[place] for unit in group.units])  # (units, inputs of each)
        if sets.shape[1] == 1:
            total += readers[place].errors()[sets[:, 0]]
        else:
            total += torch.tensor([readers[place].set_error(indices) for indices in sets])
    return total


def choose(groups, costs, amount, *, loss, remove, round_to, floor, per_cost):
    """Units that leave, a set of numbers for each group, so that costs.total() falls by the share `amount`.

    Step by step the group goes on whose next units, those of least loss down to the next multiple of round_to, lose
    least (per_cost: for what they save). loss(group number): losses of its units, inf of those gone. remove(group
    number, numbers): tells whoever computes losses. Raises ModelError where the floors end it before.
    """
    shapes, gone, found = dict(costs.shapes), [set() for _ in groups], {}
    start, saved = costs.total(), 0.0

    def propose(i):
        """(what is compared, numbers of the units, what they save) of a group's next step, None at its end."""
        group, count = groups[i], len(groups[i].units) - len(gone[i])
        step = 1 if group.size > 1 else round_to  # of heads each
        fewer = (count - 1) // step * step
        if fewer < max(1, min(len(group.units), -(-floor // group.size))):
            return None
        each = loss(i)
        numbers = each.topk(count - fewer, largest=False).indices.tolist()
        saving, total = costs.without(shapes, i, len(numbers))[1], each[numbers].sum().item()
        return (total / max(saving, 1e-30) if per_cost else total / len(numbers)), numbers, saving

    while saved < amount * start:
        found |= {i: propose(i) for i in range(len(groups)) if i not in found}
        steps = {i: step for i, step in found.items() if step}
        if not steps:
            raise ModelError(
                f"--amount {amount}: with every group at its floor {100 * saved / start:.1f}% of the {costs.target} "
                "are gone; lower --min-channels or --round-to"
            )
        # the last step must not go far beyond
        fitting = [i for i, step in steps.items() if saved + step[2] <= (amount + 0.01) * start]
        i = min(fitting or steps, key=lambda i: steps[i][0])
        numbers = steps[i][1]
        shapes, saving = costs.without(shapes, i, len(numbers))
        gone[i] |= set(numbers)
        saved += saving
        remove(i, numbers)
        touched = {name for name, _ in groups[i].units[0]}
        found = {j: s for j, s in found.items() if not touched & {name for name, _ in groups[j].units[0]}}
    return gone


# ---- refit without a gradient ---------------------------------------------------------------------------------------

PLACES = 2**16  # of a layer's input that its moments are taken from


def as_matrix(layer):
    """The weight of a convolution or Linear as (outputs, inputs, taps); inputs of one of its groups."""
    weight = layer.weight.detach()
    weight = weight.transpose(0, 1) if isinstance(layer, nn.ConvTranspose2d) else weight
    return weight.reshape(*weight.shape[:2], -1)


def set_matrix(layer, matrix):
    """Undo as_matrix() into the layer."""
    weight = layer.weight.transpose(0, 1) if isinstance(layer, nn.ConvTranspose2d) else layer.weight
    weight.copy_(matrix.view(weight.shape))


def moments(layer, x):
    """[(outputs, mean (C,), covariance (C, C))] of the inputs of each group of a convolution, or of any other layer as
    one; in float64, over at most PLACES places of the input x."""
    rows = (x if isinstance(layer, nn.Linear) else x.movedim(1, -1)).flatten(0, -2)
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    if len(rows) > PLACES:
        rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:PLACES].to(rows.device)]
    mean = rows.mean(0)
    rows = rows - mean
    mean, covariance = mean.double(), (rows.mT @ rows).double() / len(rows)
    groups = getattr(layer, "groups", 1)
    outputs, inputs = as_matrix(layer).shape[0] // groups, len(mean) // groups
    parts = [(slice(g * outputs, (g + 1) * outputs), slice(g * inputs, (g + 1) * inputs)) for g in range(groups)]
    return [(rows, mean[own], covariance[own, own]) for rows, own in parts]


def watch(model, names, see, run):
    """run(), and see(name, layer, its input) before the layer of each weight of these names runs first."""
    seen = set()

    def hook(layer, args, name):
        if name not in seen:
            seen.add(name)
            see(name, layer, args[0])

    hooks = [
        model.get_submodule(name.removesuffix(".weight")).register_forward_pre_hook(functools.partial(hook, name=name))
        for name in names
    ]
    run()
    for handle in hooks:
        handle.remove()


@models.no_grad
def readers_of(model, groups, images, *, ridge):
    """{(name of a weight, dimension of its inputs): Residual} of all layers that read what may go, from one run on
    images (N, 3, H, W)."""
    inputs, found = input_dims(model), {}

    def see(name, layer, x):
        covariances = [covariance for _, _, covariance in moments(layer, x)]
        covariance = sum(covariances) / len(covariances)
        found[name, inputs[name]] = Residual(as_matrix(layer).cpu(), covariance.cpu(), ridge)

    read = {name for group in groups for name, dim in group.units[0] if inputs.get(name) == dim}
    watch(model, read, see, lambda: outputs_of(model)(images))
    return found


def refit(weight, mean, covariance, kept, ridge):
    """The best weights on the inputs `kept` alone -> (weight (outputs, inputs, taps), 0 elsewhere, shift (outputs,)).

    With S kept and P gone: W_S + W_P B and a shift of W_P (mean_P - B mean_S), summed over the taps, where
    B = C_PS (C_SS + ridge mean(diag C_SS) I)^-1.
    """
    gone = torch.ones(len(mean), dtype=torch.bool, device=mean.device)
    gone[kept] = False
    c = covariance[kept][:, kept]
    c = c + ridge * c.diag().mean().clamp(min=1e-12) * torch.eye(len(kept), device=c.device)
    b = torch.linalg.solve(c, covariance[kept][:, gone]).mT  # (P, S)
    w = weight.double()
    out = torch.zeros_like(w)
    out[:, kept] = w[:, kept] + torch.einsum("opt,ps->ost", w[:, gone], b)
    shift = w[:, gone].sum(2) @ (mean[gone] - b @ mean[kept])
    return out.to(weight.dtype), shift.to(weight.dtype)


@models.no_grad
def compensate(model, keep, images, *, ridge):
    """Refit, in place and front to back in one run on images (N, 3, H, W), each layer to the inputs that it keeps.

    Weights on the others become 0. A layer sees inputs as they are once those before it are refitted. What a mean
    gains or loses goes into the bias, or the mean of the BatchNorm that follows.
    """
    traced = models.trace(model, run=outputs_of(model))
    norm_after, inputs = {}, input_dims(model)
    for call in traced.calls:
        if call.name == "batch_norm" and call.reads[0].maker and traced.sole_reader(call.reads[0]) is call:
            norm_after[call.reads[0].maker.module] = call.module

    def adapt(name, layer, x):
        matrix, kept, shifts = as_matrix(layer).clone(), keep[name, inputs[name]].to(x.device), []
        for rows, mean, covariance in moments(layer, x):
            if isinstance(layer, nn.ConvTranspose2d):  # outputs get unlike numbers of taps: no bias makes up for all
                mean, covariance = torch.zeros_like(mean), covariance + mean.outer(mean)
            matrix[rows], shift = refit(matrix[rows], mean, covariance, kept, ridge)
            shifts.append(shift)
        set_matrix(layer, matrix)
        if layer in norm_after:
            norm_after[layer].running_mean -= torch.cat(shifts)
        elif layer.bias is not None:
            layer.bias += torch.cat(shifts)
        else:
            layer.bias = nn.Parameter(torch.cat(shifts))
            if (name, 1 - inputs[name]) in keep:  # it goes with the outputs
                keep[f"{name.removesuffix('weight')}bias", 0] = keep[name, 1 - inputs[name]]

    read = [name for name, dim in keep if inputs.get(name) == dim]
    watch(model, read, adapt, lambda: outputs_of(model)(images))
    zero_readers(model, keep)  # those that did not run


@models.no_grad
def reestimate_norms(model, images, batch=8):
    """Give each BatchNorm the mean of the statistics of batches of images (N, 3, H, W), in place."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    before = [(norm.training, norm.momentum) for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum, norm.training = None, True
    for part in images.split(batch):
        outputs_of(model)(part)
    for norm, (training, momentum) in zip(norms, before, strict=True):
        norm.training, norm.momentum = training, momentum


# ---- prune ----------------------------------------------------------------------------------------------------------


def unit_importance(model, groups, kind, gradients=None):
    """[importance of each unit (U,) of each group], a group's mean being 1.

    l1, l2: norm of the weights that make its channels (Li et al. 2017). gamma: |gamma| of their BatchNorms (Liu et al.
    2017). taylor: |w dL/dw| summed over every parameter that would go, BatchNorm's included (Molchanov et al. 2019);
    gradients: {name: dL/dw}.
    """
    inputs, found = input_dims(model), []
    norms = {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}
    tensors = {name: p.detach().cpu().double() for name, p in model.named_parameters()}
    if kind == "taylor":
        tensors = {name: tensors[name] * g.cpu().double() for name, g in gradients.items()}
    for group in groups:
        total = torch.zeros(len(group.units), dtype=torch.double)
        for name, dim in group.units[0]:
            counts = {"taylor": name in tensors, "gamma": name in norms and name in tensors}
            if counts.get(kind, inputs.get(name) == 1 - dim):
                each = tensors[name].movedim(dim, 0).abs().reshape(tensors[name].shape[dim], -1)
                each = each.square().sum(1) if kind == "l2" else each.sum(1)
                total += torch.stack([each[unit[name, dim]].sum() for unit in group.units])
        total = total.sqrt() if kind == "l2" else total
        found.append(total / total.mean().clamp(min=1e-30))
    return found


def gradients_of(model, objective, train_set, *, batch_size, seed, device, steps):
    """{name: dL/dw} summed over `steps` training batches, in eval mode: BatchNorm as it is used."""
    model.zero_grad(set_to_none=True)
    loader = datasets.train_loader(train_set, batch_size=batch_size, start=0, stop=steps, seed=seed)
    for images, target in loader:
        objective(images.to(device, memory_format=torch.channels_last), target.to(device)).backward()
    found = {name: p.grad.detach() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def percentiles(losses, groups):
    """Each unit's rank, 0 to 1, among those of all groups that look alike (isomorphic pruning, Fang et al. 2024)."""
    found = [None] * len(groups)
    for kind in {group.kind for group in groups}:
        members = [i for i, group in enumerate(groups) if group.kind == kind]
        every = torch.cat([losses[i] for i in members])
        ranks = torch.empty_like(every)
        ranks[every.argsort()] = torch.linspace(0, 1, len(every), dtype=every.dtype)
        for i, own in zip(members, ranks.split([len(groups[j].units) for j in members]), strict=True):
            found[i] = own
    return found


@torch.inference_mode(False)
def remove_channels(model, images, amount, *, args, gradients=None, size=None):
    """Prune a network's channels, in place -> (plan, {layer: why it kept all}); see the flags of the same names.

    images (N, 3, H, W): for calibration. amount: share of args.target to take, of what the model costs now. size: image
    (1, 3, H, W) that multiply-accumulates are counted for. Raises ModelError where the target is not met.
    """
    groups, left = channel_groups(model)
    groups = [g for g in groups if args.scope == "all" or g.name.startswith(f"{args.scope}.")]
    if not groups:
        raise ModelError(f"--scope {args.scope}: no channel there can go")
    tables = layer_times(model, size, args.round_to) if args.target == "latency" else None
    costs = Costs(model, groups, *count_places(model, size), args.target, tables, scope=args.scope)
    residual = args.importance == "residual"
    readers = readers_of(model, groups, images, ridge=args.ridge) if residual else {}
    fixed = None  # losses that do not change as others go
    if not residual:
        fixed = unit_importance(model, groups, args.importance, gradients)
    elif args.rank == "group":
        fixed = [losses_of(group, readers) for group in groups]
    if args.rank == "group":
        fixed = percentiles(fixed, groups)

    def loss(i):
        return losses_of(groups[i], readers) if fixed is None else fixed[i]

    def remove(i, numbers):
        if fixed is not None:
            fixed[i][numbers] = math.inf
            return
        for place in (place for place in groups[i].units[0] if place in readers):
            indices = sorted(x for number in numbers for x in groups[i].units[number][place])
            readers[place].remove(torch.tensor(indices))

    gone = choose(
        groups, costs, amount, loss=loss, remove=remove, round_to=args.round_to, floor=args.min_channels,
        per_cost=fixed is None or args.target == "latency",
    )  # fmt: skip
    keep = kept_indices(model, groups, gone)
    if why := trial(model, groups, gone):
        raise ModelError(f"the network without these channels is not the one with them at 0: {why}")
    if args.compensate:
        compensate(model, keep, images, ridge=args.ridge)
    plan = shrink(model, keep)
    plan |= {name: list(p.shape) for name, p in model.named_parameters() if name not in costs.shapes}  # new biases
    if plan:
        model.channels = model.backbone.channels = map_channels(model)
    reached = 1 - costs.total({name: list(p.shape) for name, p in model.named_parameters()}) / costs.total()
    if args.target != "latency" and abs(reached - amount) > 0.02:
        raise ModelError(
            f"--amount {amount}: {reached:.3f} of the {args.target} would be gone, as channels go {args.round_to} at a "
            "time; lower --round-to"
        )
    return plan, left


@torch.inference_mode()
def layer_times(model, image, round_to, widths=12, repeats=5):
    """{name of a weight: function of its shape that gives milliseconds} of the layers of a network on an image.

    A layer is timed at up to `widths` numbers of outputs and of inputs, multiples of round_to; what lies between is
    interpolated, and both are taken to multiply. One in groups is timed as it is, a depthwise one by its outputs. The
    shortest of `repeats` times counts: other programs only make a call longer, each width's by chance.
    """
    inputs, seen = input_dims(model), {}
    watch(
        model, inputs, lambda name, layer, x: seen.update({name: (layer, x)}), lambda: model.decode(model.encode(image))
    )

    def table(layer, x, dim):
        counts, groups = layer.weight.shape[:2], getattr(layer, "groups", 1)

        def milliseconds(axis, count):
            small = copy.deepcopy(layer)
            put(small, "weight", layer.weight.narrow(axis, 0, count).clone())
            small.bias = None
            fit_attributes(small, ["weight"])
            small.to(memory_format=torch.channels_last)
            some = x.narrow(
                *((-1, 0, small.in_features) if isinstance(small, nn.Linear) else (1, 0, small.in_channels))
            )
            some = torch.randn_like(some)
            return evaluate.milliseconds([lambda: small(some)], repeats, of=min)[0]

        def curve(axis):
            most = 1 if 1 < groups < layer.in_channels else widths
            step = max(round_to, -(-counts[axis] // most // round_to) * round_to)
            at = [*range(step, counts[axis], step), counts[axis]]
            return [0, *at], [0.0, *(milliseconds(axis, count) for count in at)]

        by_outputs, by_inputs = curve(1 - dim), curve(dim)
        whole = max(by_inputs[1][-1], 1e-9)
        return lambda s: float(np.interp(s[1 - dim], *by_outputs) * np.interp(s[dim], *by_inputs) / whole)

    return {name: table(layer, x, inputs[name]) for name, (layer, x) in seen.items()}


# ---- command line ---------------------------------------------------------------------------------------------------

PRUNE_DEFAULTS = dict(epochs=2, lr=3e-4, warmup=10)  # in place of train.py's
FIXED_FLAGS = ("weights", "amount", "structured", "scope", "score", "pattern", "sparsity_schedule", "interval",
               "importance", "rank", "round_to", "min_channels", "target", "compensate", "ridge", "calib_images",
               "steps", "renorm", "sweep")  # fmt: skip
FLOAT_ONLY = {"quantize": "is quantized: prune the float checkpoint that it was made from, and quantize that"}


def make_parser():
    parser = datasets.Parser(__doc__)
    group = parser.add_argument_group("pruning")
    add, yes_no = group.add_argument, argparse.BooleanOptionalAction
    share = datasets.share_below_1
    add("--weights", default="checkpoints/train/best.pt", help="float checkpoint to prune")
    add("--amount", type=share, default=0.3, help="share to take: of the weights, or of what --target says")
    add("--scope", choices=("all", "backbone", "head"), default="all", help="part that is pruned, and that counts")
    add("--sweep", type=share, nargs="+", metavar="AMOUNT", help="a run for each of these, and a figure of the curve")
    add("--calib-images", type=positive_int, default=64, metavar="N", help="of the training split")
    add("--renorm", action=yes_no, help="new BatchNorm statistics; left out: where training images gain by them")
    add("--kl", type=not_negative, default=0.0, metavar="WEIGHT", help="in training: divergence from the whole network")
    add("--temperature", type=positive_float, default=1.0, help="of that divergence")
    add("--score", choices=SCORES, default="magnitude", help="weights: what is compared; layer: each loses as much")
    add("--pattern", choices=("2:4",), help="weights: two of each four consecutive inputs go, whatever --amount")
    add("--sparsity-schedule", choices=("oneshot", "cubic"), default="oneshot", help="weights: at once, or growing")
    add("--interval", type=positive_int, default=20, metavar="STEPS", help="weights: of cubic, between masks")
    add("--structured", action="store_true", help="remove channels, attention heads and hidden units")
    add("--target", choices=TARGETS, default="macs", help="channels: what --amount is a share of")
    add("--importance", choices=IMPORTANCE, default="residual", help="channels: what they are worth")
    add("--rank", choices=("global", "group"), default="global", help="channels: among all, or among their like")
    add("--round-to", type=positive_int, default=8, metavar="N", help="channels: a width is a multiple of it")
    add("--min-channels", type=positive_int, default=8, metavar="N", help="channels: a group keeps as many")
    add("--compensate", action=yes_no, default=True, help="channels: refit the layers that read what goes")
    add("--ridge", type=positive_float, default=0.01, help="channels: of the refit, of the mean variance")
    add("--steps", type=positive_int, default=1, metavar="N", help="channels: prune and train in N turns")
    parser.add_argument("--out", help="folder to write to; left out: checkpoints/prune")
    parser.add_argument("--resume", action="store_true", help="go on from OUT/last.pt, with its flags")
    datasets.add_data_args(parser)
    train.add_train_args(parser, fewest_epochs=0)
    parser.set_defaults(**PRUNE_DEFAULTS)
    single = "--score --pattern --sparsity-schedule --interval"
    channels = "--target --importance --rank --round-to --min-channels --compensate --ridge --steps"
    trained = f"--kl {parser.flags('training', without=('--epochs',))}"
    for flags, where, test in (
        (single, "single weights, not of --structured", lambda args: not args.structured),
        (channels, "--structured", lambda args: args.structured),
        ("--interval", "--sparsity-schedule cubic", lambda args: args.sparsity_schedule == "cubic"),
        ("--temperature", "--kl", lambda args: args.kl),
        ("--amount", "runs without --pattern and --sweep", lambda args: not (args.pattern or args.sweep)),
        (trained, "training, not of --epochs 0", lambda args: args.epochs),
    ):
        parser.only(flags, where, test)
    return parser


@evaluate.releasing
def main(argv=None):
    """Run the command line; returns what results.json holds."""
    start = time.perf_counter()
    command = evaluate.command_line("prune.py", argv)
    shared = dict(script="prune.py", name="prune", inherits=("data", "loss"), fixed=FIXED_FLAGS)
    args, last = train.parse(make_parser(), argv, **shared)
    if args.sparsity_schedule == "cubic" and (args.pattern or not args.epochs):
        raise ModelError("--sparsity-schedule cubic chooses masks while it trains: leave out --pattern, and --epochs 0")
    device = train.start(args)
    parent = train.open_parent(args, device, refuse=FLOAT_ONLY)
    before = train.score(parent.model, parent, device)
    if not args.sweep:
        return prune_once(args, command, parent, before, device, last, start)
    rows = []
    for amount in args.sweep:
        out = parent.out / f"amount-{amount}"
        one = argparse.Namespace(**vars(args) | {"amount": amount, "out": str(out)})
        rows.append(prune_once(one, command, parent._replace(out=out), before, device, None, time.perf_counter()))
        if "stopped" in rows[-1]:
            return rows[-1]
        write_sweep(rows, before["miou"], parent.out)
    done = rows[-1] | {"sweep": [{k: row[k] for k in SWEEP_KEYS} for row in rows]}
    evaluate.write_json(parent.out / "results.json", done)
    print(f"the curve: {parent.out / 'sweep.csv'} and sweep.png")
    return done


def seen_images(args, count=32):
    """Training images, evenly spread, as evaluation sees them, but none of those that calibrate."""
    dataset = train.calibration_set(args)
    used = min(args.calib_images, len(dataset))
    free = sorted(set(range(len(dataset))) - {i * len(dataset) // used for i in range(used)}) or range(len(dataset))
    return torch.utils.data.Subset(dataset, free[:: -(-len(free) // count)])


def renorm_where_it_helps(model, images, args, parent, device):
    """New BatchNorm statistics, in place: always, never, or where images that were trained on score higher by them;
    says which."""
    if args.renorm is False or not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules()):
        return
    other, seen = copy.deepcopy(model), seen_images(args)
    reestimate_norms(other, images)
    own, new = (train.score(m, parent, device, seen)["miou"] for m in (model, other))
    taken = args.renorm or new > own
    print(f"on {len(seen)} training images {own:.2f} mIoU with BatchNorm's statistics as they were, {new:.2f} anew: "
          f"{'taken anew' if taken else 'left as they were'}")  # fmt: skip
    if taken:
        model.load_state_dict(other.state_dict())


def prune_once(args, command, parent, before, device, last, start):
    """One run: prune, score, fine-tune, report -> what results.json holds."""
    out, turns = parent.out, args.steps if args.structured else 1
    model, kind = copy.deepcopy(parent.model), "channels" if args.structured else "weights"
    entry = {"step": "prune", "kind": kind, "amount": args.amount, "scope": args.scope, "plan": {}, "turn": 0}
    if last:
        model, entry = models.load_checkpoint(out / "last.pt", device=device)[0], last["compression"][-1]
        if not {"turn", "untuned"} <= entry.keys():
            raise ModelError(f"{out / 'last.pt'} does not say how far it was pruned")
        model = model.to(memory_format=torch.channels_last)
    save = train.saver(
        args, command, data=parent.checkpoint["data"], pretrained=parent.checkpoint["pretrained"],
        lineage=[*parent.checkpoint["lineage"], train.ancestor(parent.checkpoint, before["miou"])],
        compression=lambda _network: [*parent.checkpoint["compression"], entry],
    )  # fmt: skip
    cubic = args.sparsity_schedule == "cubic"  # nothing goes before it is trained
    for turn in range(entry["turn"], turns):
        if not last:
            share = args.amount if turns == 1 else 1 - (1 - args.amount) ** (1 / turns)  # of what is left
            if (share or args.pattern) and not cubic:
                (cut_channels if args.structured else cut_weights)(model, share, args, parent, entry, device)
            metrics = train.score(model, parent, device)
            entry |= {"turn": turn, "untuned": {k: metrics[k] for k in ("miou", "macc", "aacc")}}
            print(f"{'not pruned' if cubic else 'pruned'}, not trained yet: {metrics['miou']:.2f} mIoU; "
                  f"before {before['miou']:.2f}")  # fmt: skip
            if not cubic:
                save(out / "best.pt", model, metrics=entry["untuned"])
        if args.epochs:
            one = argparse.Namespace(**vars(args) | {"epochs": max(1, args.epochs // turns)})
            teacher = dict(teacher=parent.model, kl=args.kl, temperature=args.temperature)
            done = train.fit_by_flags(
                one, train.make_objective(one, model, parent.train_set, out, device, **teacher), parent.train_set,
                parent.val_set, script="prune.py", device=device, save=functools.partial(save, network=model),
                last=last, **hooks_of(model, one, parent, last),
            )  # fmt: skip
            if done["stopped"]:
                return {"stopped": done["stopped"], "step": done["step"]}
            model = models.load_checkpoint(out / "best.pt", device=device)[0].to(memory_format=torch.channels_last)
        last = None
    return report(args, command, parent, before, device, start)


def cut_weights(model, amount, args, parent, entry, device):
    """Set single weights to 0, in place; BatchNorm anew where that helps."""
    weights, outside = weights_in(model, args.scope)
    masks, left = two_of_four(weights) if args.pattern else (magnitude_masks(weights, amount, args.score), {})
    print_reasons("not pruned", outside | left)
    apply_masks(weights, masks)
    gone, count = sum(int((~mask).sum()) for mask in masks.values()), sum(w.numel() for w in weights.values())
    print(f"pruned: {gone:,} of the {count:,} weights of {len(weights)} layers")
    metrics = train.score(model, parent, device)
    print(f"pruned, BatchNorm's statistics as they were: {metrics['miou']:.2f} mIoU")
    renorm_where_it_helps(model, calibration(args, device), args, parent, device)


def cut_channels(model, amount, args, parent, entry, device):
    """Remove channels, in place; BatchNorm anew where that helps."""
    images, gradients = calibration(args, device), None
    if args.importance == "taylor":
        objective = train.make_objective(args, model, parent.train_set, parent.out, device)
        steps = 2 if args.dry_run else max(1, args.calib_images // args.batch_size)
        options = dict(batch_size=args.batch_size, seed=args.seed, device=device, steps=steps)
        gradients = gradients_of(model, objective, parent.train_set, **options)
    size = parent.val_set[0][0][None].to(device)
    plan, left = remove_channels(model, images, amount, args=args, gradients=gradients, size=size)
    entry |= {"plan": entry["plan"] | plan, "channels": list(model.channels)}
    print_reasons("kept whole", left)
    renorm_where_it_helps(model, images, args, parent, device)


def print_reasons(what, left):
    """A line for each reason in {name: why}."""
    for why in dict.fromkeys(left.values()):
        names = [name for name in left if left[name] == why]
        print(f"{what}: {names[0]}{f' and {len(names) - 1} more' if names[1:] else ''} ({why})")


def calibration(args, device):
    """--calib-images training images in one batch (N, 3, H, W), cropped to the smallest."""
    images = train.calibration_images(args, device, args.calib_images)
    height, width = (min(x.shape[d] for x in images) for d in (2, 3))
    return torch.cat([x[..., :height, :width] for x in images]).to(memory_format=torch.channels_last)


def hooks_of(model, args, parent, last):
    """What fit() has to do besides: hold zeros, of earlier pruning too, or bring them."""
    every, _ = weights_in(model, "all")
    if args.sparsity_schedule == "oneshot":
        earlier = [step["kind"] for step in parent.checkpoint["compression"] if step["step"] == "prune"]
        zeros = not args.structured or "weights" in earlier
        return {"score_first": True, "after_step": train.keep_zeros(every if zeros else {})}
    weights, _ = weights_in(model, args.scope)
    grow, end = gradual(
        weights, amount=args.amount, score=args.score, first=last["training"]["step"] if last else 0,
        steps=2 if args.dry_run else train.total_steps(args, parent.train_set), interval=args.interval,
    )  # fmt: skip
    hold = train.keep_zeros({name: w for name, w in every.items() if name not in weights})

    def after_step(step, shadow):
        grow(step, shadow)
        hold(step, shadow)

    return {"after_step": after_step, "score_from": end}


def report(args, command, parent, before, device, start):
    """Say what is gone, by the file that was written, and what it cost -> what results.json holds."""
    path, size = parent.out / "best.pt", parent.val_set[0][0][None].to(device)
    model, checkpoint = models.load_checkpoint(path, device=device)
    untuned = checkpoint["compression"][-1]["untuned"]
    metrics = evaluate.score(model, parent.val_set, device=device, out=parent.out, workers=args.workers)
    weights, whole = weights_in(model, "all")[0], dict(parent.model.named_parameters())
    zeros, share = sparsity(checkpoint["state_dict"], weights)
    left = {name: w.numel() / whole[name].numel() for name, w in weights.items()}
    label = "share of the weights that is left" if args.structured else "share of zeros"
    draw_layers(left if args.structured else zeros, label, parent.out / "layers.png")
    more = {
        "amount": args.amount, "sparsity": share, "layers": zeros, "miou_untuned": untuned["miou"],
        "epochs": args.epochs,
    }  # fmt: skip
    source = parent.model, parent.checkpoint, Path(args.weights), parent.checkpoint["command"]
    stages = {"before": evaluate.Stage(before, *source), "pruned": evaluate.Stage(untuned)}
    stages["fine-tuned" if args.epochs else "pruned"] = evaluate.Stage(metrics, model, checkpoint, path, command)
    shared = dict(out=parent.out, seconds=time.perf_counter() - start, device=device, dry_run=args.dry_run)
    done = evaluate.before_after(stages, size, more=more, **shared)
    if args.structured:
        print(f"{100 * done['macs_ratio']:.1f}% of the multiply-accumulates, "
              f"{100 * done['params'] / done['before']['params']:.1f}% of the parameters and "
              f"{100 * done['latency_ms'] / done['latency_ms_before']:.1f}% of the latency are left")  # fmt: skip
    else:
        print(f"{100 * share:.2f}% of the weights are 0, {100 * done['file_mb'] / done['before']['file_mb']:.1f}% of "
              "the file is left; dense kernels gain nothing by zeros, so it is no faster")  # fmt: skip
    print(f"{path}; results.json and figures beside it")
    return done


def draw_layers(shares, label, path):
    """A bar for each layer."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 0.8 + 0.17 * len(shares)), layout="constrained")
    axis = figure.subplots()
    axis.barh(list(shares), list(shares.values()))
    axis.set_ylim(len(shares) - 0.4, -0.6)
    axis.tick_params(axis="y", labelsize=7)
    axis.set(xlim=(0, 1), xlabel=label)
    axis.grid(axis="x", alpha=0.3)
    evaluate.save_figure(figure, path)


SWEEP_KEYS = ("amount", "sparsity", "macs_ratio", "miou_untuned", "miou", "file_mb", "latency_ms")


def write_sweep(rows, before, out):
    """sweep.csv and sweep.png of the runs so far: mIoU over the amount, before and after fine-tuning."""
    from matplotlib.figure import Figure

    evaluate.write_csv(out / "sweep.csv", rows, SWEEP_KEYS)
    figure = Figure(figsize=(6, 4), layout="constrained")
    axis = figure.subplots()
    for key, label in (("miou_untuned", "before fine-tuning"), ("miou", "after fine-tuning")):
        axis.plot([row["amount"] for row in rows], [row[key] for row in rows], marker="o", label=label)
    axis.axhline(before, color="black", linestyle="--", linewidth=1, label="not pruned")
    axis.set(xlabel="amount", ylabel="mIoU (%)", ylim=(0, None))
    axis.grid(alpha=0.3)
    axis.legend()
    evaluate.save_figure(figure, out / "sweep.png")


if __name__ == "__main__":
    import prune

    evaluate.run_cli(prune.main)  # the module that load_checkpoint() imports
