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

import argparse
import copy
import csv
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
from models import ModelError

# ---- single weights -------------------------------------------------------------------------------------------------

SCORES = ("magnitude", "layer", "lamp")
PRUNABLE = (nn.Conv2d, nn.Linear, nn.ConvTranspose2d)


def weights_in(model, scope):
    """({name: weight} that `scope` (backbone, head, all) lets be pruned, {name: why not} of the other parameters)."""
    inside, outside = {}, {}
    kinds = {f"{name}.weight": m for name, m in model.named_modules() if isinstance(m, PRUNABLE)}
    for name, p in model.named_parameters():
        if name not in kinds:
            outside[name] = "no weight of a convolution or Linear"
        elif name.startswith(("aux_head.", "learned.")):
            outside[name] = "only training uses it" if name.startswith("aux") else "it resizes the logits"
        elif scope != "all" and not name.startswith(f"{scope}."):
            outside[name] = f"not in --scope {scope}"
        else:
            inside[name] = p
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

LAYOUT = {
    "view", "reshape", "permute", "transpose", "flatten", "unflatten", "squeeze", "unsqueeze", "contiguous", "chunk",
    "split", "unbind", "narrow", "__getitem__", "cat", "concat", "stack", "roll", "flip", "movedim", "expand", "repeat",
    "pixel_shuffle", "clone", "detach", "to", "float", "type", "type_as", "view_as", "reshape_as", "__get__", "half",
    "bfloat16", "double", "swapaxes", "index_select", "tensor_split", "hsplit", "broadcast_to",
}  # fmt: skip
ELEMENTWISE = {
    "add", "sub", "mul", "div", "pow", "neg", "abs", "exp", "log", "sqrt", "rsqrt", "square", "clamp", "minimum",
    "maximum", "relu", "relu6", "hardtanh", "hardswish", "hardsigmoid", "sigmoid", "silu", "gelu", "tanh", "elu",
    "mish", "leaky_relu", "softplus", "dropout", "dropout2d", "where", "masked_fill", "eq", "ne", "lt", "le", "gt",
    "ge", "and", "or", "xor", "invert", "logical_and", "logical_or", "logical_not", "true_divide", "truediv", "bool",
    "isfinite", "nan_to_num", "lerp", "erf", "round", "floor", "floor_divide", "addcmul", "rsub", "bitwise_not",
    "bitwise_and", "bitwise_or", "reciprocal", "alpha_dropout", "feature_alpha_dropout", "clamp_min", "clamp_max",
}  # fmt: skip
SPATIAL = {"max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "adaptive_max_pool2d", "interpolate", "upsample"}
REDUCTIONS = {"mean", "sum", "amax", "amin", "max", "min"}
LIKE = {"ones_like", "zeros_like", "full_like", "empty_like", "rand_like", "randn_like"}


class Channels:
    """The index numbers of one traced network: which stand for the same channel, which slices of parameters they are.

    members: {(name of a parameter or buffer, dimension): a number for each of its indices}. reason: {number: why its
    class cannot go}.
    """

    def __init__(self, traced):
        self.traced, self.parent, self.members, self.reason, self.ids = traced, [], {}, {}, {}
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

    def unite(self, x, y):
        x, y = self.find(x), self.find(y)
        if x != y:
            self.parent[max(x, y)] = min(x, y)
            if max(x, y) in self.reason:
                self.reason.setdefault(min(x, y), self.reason[max(x, y)])

    def pin(self, numbers, why):
        """The classes of these numbers cannot go."""
        if numbers is not None:
            for number in numbers.unique().tolist():
                if number >= 0:
                    self.reason.setdefault(self.find(number), why)

    def vector(self, ids, dim):
        """One number for each index along a dimension; those that stand at the same index are joined."""
        for d in set(range(ids.dim())) - {dim % ids.dim()}:
            ids = ids.narrow(d, 0, 1) if ids.stride(d) == 0 else ids
        rows = ids.movedim(dim, 0).flatten(1)  # (C, the rest)
        first = rows.amax(1)
        if (rows != first[:, None]).any():
            self.join(rows, first[:, None].expand_as(rows))
        return first

    def varies(self, ids, dim):
        return ids.stride(dim) != 0 and bool((ids != ids.narrow(dim, 0, 1)).any())

    # -- calls

    def parameter(self, value):
        """The name of the parameter or buffer that a Value is, or None."""
        return self.names.get(id(value.tensor)) if value.maker is None else None

    def note(self, name, dim, numbers):
        """Slices of a parameter along a dimension have these numbers; a layer that is called again has its old ones."""
        before = self.members.setdefault((name, dim), numbers)
        return self.join(before, numbers)

    def full(self, value):
        ids = self.ids.get(value)
        return torch.full(value.tensor.shape, FIXED) if ids is None else ids

    def follow(self, call):
        """Set the numbers of what a call makes."""
        name = call.name.strip("_")
        name = name.removeprefix("i") if call.name.startswith("__i") and name[1:] in ELEMENTWISE else name
        tracked = [v for v in call.reads if v in self.ids]
        handler = getattr(self, f"on_{name}", None)
        if handler is not None:
            out = handler(call)
        elif not tracked:
            out = None
        elif name in LIKE:
            out = torch.full(call.makes[0].tensor.shape, FREE)
        elif name in ELEMENTWISE or call.name.strip("_").removeprefix("r") in ELEMENTWISE:
            out = self.elementwise(call)
        elif name in SPATIAL:
            out = self.vector(self.full(call.reads[0]), 1).view(1, -1, 1, 1)
        elif call.name in LAYOUT or name in LAYOUT:
            out = self.layout(call)
        elif name in REDUCTIONS:
            out = self.reduction(call)
        else:
            out = self.stop(call, f"{call.name}() mixes it with others")
        outs = [out] * len(call.makes) if torch.is_tensor(out) else out or []
        for value, ids in zip(call.makes, outs, strict=False):
            if ids is not None and (ids != FIXED).any():
                self.ids[value] = ids.expand(value.tensor.shape)

    def stop(self, call, why):
        for value in call.reads:
            self.pin(self.ids.get(value), why)

    def elementwise(self, call):
        out = None
        for value in call.reads:
            out = self.join(out, self.ids.get(value))
        shape = torch.broadcast_shapes(*(value.tensor.shape for value in call.reads))
        out = out.expand(shape)
        for value in call.reads:
            if value in self.ids:
                continue
            lead = len(shape) - value.tensor.dim()
            for dim, length in enumerate(value.tensor.shape):
                if length > 1 and self.varies(out, dim + lead):
                    if name := self.parameter(value):
                        self.note(name, dim, self.vector(out, dim + lead))
                    else:
                        self.pin(out, "it meets a tensor of fixed width")
        return out

    def layout(self, call):
        replaced = {id(v.tensor): self.full(v) for v in call.reads}

        def ids(x):
            if torch.is_tensor(x):
                return replaced[id(x)]
            return type(x)(map(ids, x)) if type(x) in (list, tuple) else x

        if call.name in ("to", "float", "type", "type_as", "half", "bfloat16", "double", "contiguous"):
            return self.full(call.reads[0])
        index = call.name in ("__getitem__", "index_select")  # tensors that index stay what they are
        args = (ids(call.args[0]), *(call.args[1:] if index else map(ids, call.args[1:])))
        kwargs = call.kwargs if index else {k: ids(v) for k, v in call.kwargs.items()}
        try:
            out = call.function(*args, **kwargs)
        except (RuntimeError, TypeError, IndexError):
            return self.stop(call, f"{call.name}() moves it in ways not followed")
        return out if torch.is_tensor(out) else list(out)

    def reduction(self, call):
        x = self.full(call.reads[0])
        dims = call.kwargs.get("dim", call.args[1] if len(call.args) > 1 else None)
        keep = call.kwargs.get("keepdim", call.args[2] if len(call.args) > 2 else False)
        if dims is None or torch.is_tensor(dims):
            return self.stop(call, f"{call.name}() mixes it with others")
        dims = (dims,) if isinstance(dims, int) else tuple(dims)
        if any(self.varies(x, d) for d in dims):
            return self.stop(call, f"{call.name}() mixes it with others")
        for d in sorted((d % x.dim() for d in dims), reverse=True):
            x = x.narrow(d, 0, 1) if keep else x.select(d, 0)
        return x

    def on_pad(self, call):
        padding = call.args[1] if len(call.args) > 1 else call.kwargs["pad"]
        mode = call.kwargs.get("mode", call.args[2] if len(call.args) > 2 else "constant")
        value = call.kwargs.get("value", call.args[3] if len(call.args) > 3 else 0)
        x = self.full(call.reads[0])
        if mode == "constant":
            return F.pad(x, padding, value=FIXED if value else FREE)
        return F.pad(x.double(), padding, mode=mode).long()

    def weight(self, call):
        """(name of the weight, of the bias or None) of a convolution or Linear; None where they are no parameters."""
        tensors = [*call.args[1:3], call.kwargs.get("weight"), call.kwargs.get("bias")]
        tensors = [t for t in tensors if torch.is_tensor(t)]
        names = [self.names.get(id(t)) for t in tensors]
        return (names[0], names[1] if len(names) > 1 else None) if names and all(names) else None

    def on_linear(self, call):
        return self.layer(call, -1, groups=1, out=0)

    def on_conv2d(self, call):
        return self.layer(call, 1, groups=call.kwargs.get("groups", call.args[6] if len(call.args) > 6 else 1), out=0)

    def on_conv_transpose2d(self, call):
        return self.layer(call, 1, groups=call.kwargs.get("groups", call.args[6] if len(call.args) > 6 else 1), out=1)

    def layer(self, call, dim, *, groups, out):
        """A convolution or Linear whose channels lie along `dim`, and whose outputs along dimension `out` of its
        weight."""
        names, x = self.weight(call), self.vector(self.full(call.reads[0]), dim)
        if names is None:
            return self.stop(call, "its weight is computed")
        weight, bias = names
        outputs = call.makes[0].tensor.shape[dim]
        if groups == 1:
            self.note(weight, 1 - out, x)
            numbers = self.new(outputs)
        elif groups == len(x) and out == 0:  # depthwise: each channel has filters of its own
            numbers = x.repeat_interleave(outputs // groups)
        elif out == 0:  # as many stay in each group: the i-th of all groups go together
            rows = x.view(groups, -1)
            self.note(weight, 1, self.join(rows, rows[:1].expand_as(rows))[0])
            numbers = self.new(outputs)
            self.join(numbers.view(groups, -1), numbers.view(groups, -1)[:1].expand(groups, -1))
        else:
            return self.stop(call, "a transposed convolution in groups reads it")
        if (weight, out) in self.members:
            numbers = self.join(self.members[weight, out], numbers)
        self.note(weight, out, numbers)
        if bias:
            self.note(bias, 0, numbers)
        shape = [1] * call.makes[0].tensor.dim()
        shape[dim] = -1
        return numbers.view(shape)

    def on_batch_norm(self, call):
        x = self.full(call.reads[0])
        numbers = self.vector(x, 1)
        for value in call.reads[1:]:
            if name := self.parameter(value):
                self.note(name, 0, numbers)
        return x

    def on_prelu(self, call):
        x = self.full(call.reads[0])
        if call.reads[1].tensor.numel() > 1 and (name := self.parameter(call.reads[1])):
            self.note(name, 0, self.vector(x, 1))
        return x

    def on_layer_norm(self, call):
        x = self.full(call.reads[0])
        for d in range(len(call.args[1])):
            if self.varies(x, -1 - d):
                self.pin(x, "a LayerNorm reads it")
        return x

    def on_group_norm(self, call):
        return self.stop(call, "a GroupNorm reads it")

    def on_softmax(self, call):
        x, dim = self.full(call.reads[0]), call.kwargs.get("dim", call.args[1] if len(call.args) > 1 else None)
        if dim is None or self.varies(x, dim):
            self.pin(x, "a softmax runs over it")
        return x

    on_log_softmax = on_softmax

    def on_matmul(self, call):
        a, b = (self.full(v) for v in call.reads[:2])
        return self.product(a, b)

    on_bmm = on_mm = on_matmul

    def on_scaled_dot_product_attention(self, call):
        q, k, v = (self.full(value) for value in call.reads[:3])
        return self.product(self.product(q, k.mT), v)

    def product(self, a, b):
        """Numbers of a (..., i, k) @ b (..., k, j)."""
        if a.dim() < 2 or b.dim() < 2:
            self.pin(a, "a product mixes it")
            self.pin(b, "a product mixes it")
            return torch.full((1, 1), FIXED)
        heads = any(self.varies(x, d) for x in (a, b) for d in range(x.dim() - 2))
        summed = [self.varies(a, -1) and bool((a >= 0).any()), self.varies(b, -2) and bool((b >= 0).any())]
        if all(summed):  # queries and keys: what is summed goes together, of several heads each as a whole
            rows = self.join(self.same(a, -2).mT, self.same(b, -1))  # (..., k, 1)
            if not heads:
                self.pin(rows, "attention sums its products")
                return torch.full((1, 1), FIXED)
            head = rows.amax(-2, keepdim=True)  # (..., 1, 1)
            return self.join(rows, head.expand_as(rows)).amax(-2, keepdim=True)
        if any(summed):
            self.pin(a if summed[0] else b, "a product mixes it")
            return torch.full((1, 1), FIXED)
        a, b = a[..., :1], b[..., :1, :]  # (..., i, 1), (..., 1, j)
        if (a >= 0).any() and (b >= 0).any():
            if self.varies(a, -2):  # two axes of channels meet
                self.pin(a, "a product mixes it")
                return b
            return self.join(a, b)
        return a if (a >= 0).any() else b

    def same(self, ids, dim):
        """ids with a dimension along which the numbers are joined."""
        first = ids.narrow(dim, 0, 1)
        return self.join(ids, first.expand_as(ids)).narrow(dim, 0, 1)


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
    channels, units, groups, left = Channels(models.trace(model, run=outputs_of(model))), {}, {}, {}
    for (name, dim), numbers in channels.members.items():
        for index, number in enumerate(numbers.tolist()):
            if number >= 0:
                units.setdefault(channels.find(number), {}).setdefault((name, dim), []).append(index)
    for root, unit in units.items():
        makers = [name.removesuffix(".weight") for name, dim in unit if is_output(model, name, dim)]
        why = channels.reason.get(root)
        if not why and not any(is_input(model, name, dim) for name, dim in unit):
            why = "no layer that could be refitted reads it"
        if why or not makers:
            left |= dict.fromkeys(makers, why)
        else:
            groups.setdefault(tuple(sorted(unit)), []).append((makers, unit))
    shapes = {name: tuple(t.shape) for name, t in tensors_of(model).items()}
    found, makers_of = [], []
    for key, members in groups.items():
        makers = members[0][0]
        roles = sorted((shapes[name], dim, makers[0].partition(".")[0]) for name, dim in key)
        size = len(members[0][1][f"{makers[0]}.weight", output_dim(model, f"{makers[0]}.weight")])
        found.append(Group(makers[0], [unit for _, unit in members], repr(roles), size))
        makers_of.append(makers)
    kept = []
    every = trial(model, found, [{0}] * len(found))
    for number, (group, makers) in enumerate(zip(found, makers_of, strict=True)):
        gone = [{0} if i == number else set() for i in range(len(found))]
        why = every and trial(model, found, gone)
        if why:
            left |= dict.fromkeys(makers, f"its network has the width written down: {why}")
        else:
            kept.append((group, makers))
    for _, makers in kept:
        for name in makers:
            left.pop(name, None)
    return [group for group, _ in kept], left


def outputs_of(model):
    """A function of images that gives all outputs of a network that training uses."""
    return lambda images: model.predictions(model.encode(images))


def tensors_of(model):
    """{name: parameter or buffer} of a network."""
    return dict((*model.named_parameters(), *model.named_buffers()))


@models.no_grad
def trial(model, groups, gone):
    """None where a network without some units gives what it gives with the weights on them at 0, else what is wrong."""
    zeroed, smaller = copy.deepcopy(model), copy.deepcopy(model)
    keep = kept_indices(model, groups, gone)
    zero_readers(zeroed, keep)
    images = torch.randn(1, 3, 2 * model.stride, 2 * model.stride + 1, generator=torch.Generator().manual_seed(0))
    images = images.to(next(model.parameters()))
    expected = outputs_of(model)(images) if not keep else outputs_of(zeroed)(images)
    try:
        shrink(smaller, keep)
        found = outputs_of(smaller)(images)
    except (RuntimeError, ValueError, IndexError) as error:
        return models.one_line(error, 100)
    for x, y in zip(expected, found, strict=True):
        if not (x - y).abs().max() <= 1e-4 * x.abs().max().clamp(min=1e-6):
            return f"outputs differ by {(x - y).abs().max():.2g}"
    return None


@torch.no_grad()
def zero_readers(model, keep):
    """Set to 0, in place, the weights of all layers on inputs that `keep` of kept_indices() does not name."""
    tensors = tensors_of(model)
    for (name, dim), indices in keep.items():
        if is_input(model, name, dim):
            mask = torch.zeros(tensors[name].shape[dim], device=tensors[name].device)
            mask[indices] = 1
            tensors[name].mul_(mask.view([-1 if d == dim else 1 for d in range(tensors[name].dim())]))


def output_dim(model, name):
    """The dimension of a weight that counts outputs."""
    return int(isinstance(model.get_submodule(name.rpartition(".")[0]), nn.ConvTranspose2d))


def is_output(model, name, dim):
    """Whether a dimension of a tensor counts what a convolution or Linear puts out."""
    layer = model.get_submodule(name.rpartition(".")[0])
    return isinstance(layer, PRUNABLE) and name.endswith(".weight") and dim == output_dim(model, name)


def is_input(model, name, dim):
    """Whether a dimension of a tensor counts what a convolution or Linear reads, and not each with filters of its
    own."""
    layer = model.get_submodule(name.rpartition(".")[0])
    return isinstance(layer, PRUNABLE) and name.endswith(".weight") and dim == 1 - output_dim(model, name)


# ---- shrink ---------------------------------------------------------------------------------------------------------


def kept_indices(model, groups, gone):
    """{(parameter, dimension): indices that stay} once the units `gone`, a set of numbers for each group, have left."""
    lost = {}
    for group, numbers in zip(groups, gone, strict=True):
        for number in numbers:
            for place, indices in group.units[number].items():
                lost.setdefault(place, set()).update(indices)
    tensors = tensors_of(model)
    return {
        (name, dim): torch.tensor([i for i in range(tensors[name].shape[dim]) if i not in indices])
        for (name, dim), indices in lost.items()
    }


@models.no_grad
def shrink(model, keep):
    """Take out of a network, in place, all slices that `keep` of kept_indices() does not name -> {tensor: shape}."""
    plan = {}
    for name, tensor in tensors_of(model).items():
        for dim in range(tensor.dim()):
            if (name, dim) in keep:
                tensor = tensor.detach().index_select(dim, keep[name, dim].to(tensor.device))
                plan[name] = list(tensor.shape)
        if name in plan:
            put(model, name, tensor.clone())
    fit_attributes(model, plan)
    return plan


def put(model, name, tensor):
    """Replace a parameter or buffer by a tensor of another shape."""
    path, _, own = name.rpartition(".")
    module = model.get_submodule(path) if path else model
    if own in module._parameters:
        old = module._parameters[own]  # None of a bias that a refit added
        module._parameters[own] = nn.Parameter(tensor, requires_grad=old is None or old.requires_grad)
    else:
        module._buffers[own] = tensor


def fit_attributes(model, plan):
    """Set the numbers of channels that modules keep, after their tensors have got the shapes of `plan`, and those of
    the feature maps."""
    for path in {name.rpartition(".")[0] for name in plan}:
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
        path = name.rpartition(".")[0]
        like = tensors[name if name in tensors else f"{path}.weight"]  # a refit may have brought a bias
        put(model, name, torch.empty(shape, dtype=like.dtype, device=like.device))
    fit_attributes(model, step["plan"])
    if step["plan"]:
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
        self.places, self.target, self.tables, self.scope = places, target, tables, scope
        self.shapes = {name: list(p.shape) for name, p in model.named_parameters()}
        self.attention = [row for row in attention if self.counts(row[0])]
        self.members = [  # for each group: {weight: {dimension: slices of one unit}}
            {name: {d: len(i) for (n, d), i in group.units[0].items() if n == name}
             for name, _ in group.units[0] if name in self.shapes}
            for group in groups
        ]  # fmt: skip

    def counts(self, name):
        return self.scope == "all" or name.startswith(f"{self.scope}.")

    def of(self, shapes, name):
        """The cost of one parameter at these widths."""
        if not self.counts(name):
            return 0
        numel = math.prod(shapes[name])
        if self.target == "params":
            return numel
        if self.target == "latency":
            return self.tables[name](shapes[name]) if name in self.tables else 0.0
        return numel * self.places.get(name, 0)

    def total(self, shapes=None):
        shapes = shapes or self.shapes
        cost = sum(self.of(shapes, name) for name in shapes)
        if self.target == "macs":
            cost += sum(macs * shapes[name][0] / self.shapes[name][0] for name, macs in self.attention)
        return cost

    def without(self, shapes, group, count):
        """(widths, what it saves) after `count` units of group number `group` are gone from `shapes`."""
        after, saved = dict(shapes), 0.0
        for name, dims in self.members[group].items():
            after[name] = [n - count * dims.get(d, 0) for d, n in enumerate(shapes[name])]
            saved += self.of(shapes, name) - self.of(after, name)
        if self.target == "macs":
            for name, macs in self.attention:
                saved += macs * (shapes[name][0] - after[name][0]) / self.shapes[name][0]
        return after, saved


def count_places(model, images):
    """({name of a weight: how often it is applied to an image}, [(weight that makes an attention's values,
    multiply-accumulates of its two products)]) of a network on images (1, 3, H, W) of the size that counts."""
    traced = models.trace(model, images, run=lambda x: model.decode(model.encode(x)))
    names = {module: name for name, module in traced.names.items()}
    places, attention = {}, []
    for call in traced.calls:
        layer = call.module
        if call.name in ("conv2d", "linear", "conv_transpose2d") and isinstance(layer, PRUNABLE):
            shape = (call.reads[0] if call.name == "conv_transpose2d" else call.makes[0]).tensor.shape
            count = math.prod(shape) // shape[-1 if call.name == "linear" else 1] // len(images)
            name = f"{names[layer]}.weight"
            places[name] = places.get(name, 0) + count
        elif call.name == "scaled_dot_product_attention":
            q, k, v = (value.tensor.shape for value in call.reads[:3])
            value = call.reads[2]
            while value.maker is not None and value.maker.name != "linear":
                value = value.maker.reads[0]
            if value.maker is not None and isinstance(value.maker.module, nn.Linear):
                heads = math.prod(q[:-2])
                macs = heads * q[-2] * k[-2] * (q[-1] + v[-1]) // len(images)
                attention.append((f"{names[value.maker.module]}.weight", macs))
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
    """The residual error of each unit of a group, summed over the layers that read it; inf where it is gone."""
    total = torch.zeros(len(group.units), dtype=torch.double)
    for (name, dim), first in group.units[0].items():
        if name in readers and dim == readers[name].dim:
            state = readers[name].state
            indices = [unit[name, dim] for unit in group.units]
            if len(first) == 1:
                total += state.errors()[torch.tensor(indices).flatten()]
            else:
                sets = map(torch.tensor, indices)
                total += torch.tensor([math.inf if state.gone[i].any() else state.set_error(i) for i in sets])
    return total


class Reader(NamedTuple):
    """A layer that reads channels that may go: the dimension of its weight that counts them, its Residual."""

    dim: int
    state: Residual


def steps_of(count, round_to, floor):
    """How many units of a group of `count` may stay: all, and the multiples of round_to below that reach the floor."""
    return [count, *(n for n in range((count - 1) // round_to * round_to, 0, -round_to) if n >= floor)]


def choose(groups, costs, amount, *, loss, remove, round_to, floor, per_cost):
    """Units that leave, a set of numbers for each group, so that costs.total() falls by the share `amount`.

    Step by step the group goes on whose next units, those of least loss down to the next multiple of round_to, lose
    least (per_cost: for what they save). loss(group number): losses of its units, inf of those gone. remove(group
    number, numbers): tells whoever computes losses. Raises ModelError where the floors end it before.
    """
    sizes = [1 if group.size > 1 else round_to for group in groups]
    shapes, gone = dict(costs.shapes), [set() for _ in groups]
    start = costs.total()
    goal, saved = amount * start, 0.0
    floors = [min(len(group.units), -(-floor // group.size)) for group in groups]
    left = [steps_of(len(g.units), n, f) for g, n, f in zip(groups, sizes, floors, strict=True)]
    found = {}

    def propose(i):
        count = len(groups[i].units) - len(gone[i])
        smaller = [n for n in left[i] if n < count]
        if not smaller:
            return None
        each = loss(i)
        numbers = each.topk(count - smaller[0], largest=False).indices.tolist()
        saving = costs.without(shapes, i, len(numbers))[1]
        total = each[numbers].sum().item()
        return (total / max(saving, 1e-30) if per_cost else total / len(numbers)), numbers, saving

    while saved < goal:
        for i in range(len(groups)):
            if i not in found:
                found[i] = propose(i)
        open_ = {i: step for i, step in found.items() if step}
        if not open_:
            raise ModelError(
                f"--amount {amount}: with every group at its floor {100 * saved / start:.1f}% of the {costs.target} "
                "are gone; lower --min-channels or --round-to"
            )
        i = min(open_, key=lambda i: open_[i][0])
        fitting = [j for j, step in open_.items() if saved + step[2] <= goal + 0.01 * start]
        if i not in fitting and fitting:  # the last step must not go far beyond
            i = min(fitting, key=lambda i: open_[i][0])
        numbers = open_[i][1]
        shapes, saving = costs.without(shapes, i, len(numbers))
        gone[i] |= set(numbers)
        saved += saving
        remove(i, numbers)
        touched = {name for name, _ in groups[i].units[0]}
        found = {j: s for j, s in found.items() if j != i and not touched & {name for name, _ in groups[j].units[0]}}
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
    weight = layer.weight
    transposed = isinstance(layer, nn.ConvTranspose2d)
    shape = weight.transpose(0, 1).shape if transposed else weight.shape
    matrix = matrix.reshape(shape)
    weight.copy_(matrix.transpose(0, 1) if transposed else matrix)


def moments(layer, x):
    """Mean (C,) and covariance (C, C) of a layer's input over at most PLACES of its places, in float64."""
    rows = (x if isinstance(layer, nn.Linear) else x.movedim(1, -1)).flatten(0, -2)
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    if len(rows) > PLACES:
        rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:PLACES].to(rows.device)]
    mean = rows.mean(0)
    rows = rows - mean
    return mean.double(), (rows.mT @ rows).double() / len(rows)


def group_blocks(layer, mean, covariance):
    """[(outputs, mean, covariance)] of each group of a convolution; one for any other layer."""
    groups = getattr(layer, "groups", 1)
    width = len(mean) // groups
    outputs = as_matrix(layer).shape[0] // groups
    blocks = []
    for g in range(groups):
        own = slice(g * width, (g + 1) * width)
        blocks.append((slice(g * outputs, (g + 1) * outputs), mean[own], covariance[own, own]))
    return blocks


@models.no_grad
def readers_of(model, groups, images, *, ridge):
    """{name of a weight: Reader} of all layers that read what may go, from one run on images (N, 3, H, W)."""
    names = {name for group in groups for unit in group.units[:1] for name, dim in unit if is_input(model, name, dim)}
    found = {}

    def see(name):
        def hook(layer, args):
            if name not in found:
                blocks = group_blocks(layer, *moments(layer, args[0]))
                covariance = sum(c for _, _, c in blocks) / len(blocks)
                state = Residual(as_matrix(layer).cpu(), covariance.cpu(), ridge)
                found[name] = Reader(1 - output_dim(model, name), state)

        return hook

    layers = {name: model.get_submodule(name.rpartition(".")[0]) for name in names}
    hooks = [layer.register_forward_pre_hook(see(name)) for name, layer in layers.items()]
    outputs_of(model)(images)
    for hook in hooks:
        hook.remove()
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
    norm_after = {}
    for call in traced.calls:
        if call.name == "batch_norm" and call.reads[0].maker and traced.sole_reader(call.reads[0]) is call:
            norm_after[call.reads[0].maker.module] = call.module
    done = set()

    def adapt(name, kept):
        def hook(layer, args):
            if name in done:
                return
            done.add(name)
            matrix, shifts = as_matrix(layer).clone(), []
            middle, spread = moments(layer, args[0])
            if isinstance(layer, nn.ConvTranspose2d):  # outputs get unlike numbers of taps: no bias makes up for all
                middle, spread = torch.zeros_like(middle), spread + middle.outer(middle)
            for rows, mean, covariance in group_blocks(layer, middle, spread):
                matrix[rows], shift = refit(matrix[rows], mean, covariance, kept.to(mean.device), ridge)
                shifts.append(shift)
            set_matrix(layer, matrix)
            shift = torch.cat(shifts)
            if layer in norm_after:
                norm_after[layer].running_mean -= shift
            elif layer.bias is not None:
                layer.bias += shift
            else:
                layer.bias = nn.Parameter(shift)
                if (name, output_dim(model, name)) in keep:  # it goes with the outputs
                    keep[f"{name.removesuffix('weight')}bias", 0] = keep[name, output_dim(model, name)]

        return hook

    hooks = []
    for (name, dim), kept in keep.items():
        if is_input(model, name, dim):
            hooks.append(model.get_submodule(name.rpartition(".")[0]).register_forward_pre_hook(adapt(name, kept)))
    outputs_of(model)(images)
    for hook in hooks:
        hook.remove()
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
    tensors, found = dict(model.named_parameters()), []
    for group in groups:
        total = torch.zeros(len(group.units), dtype=torch.double)
        for name, dim in group.units[0]:
            if name not in tensors or (kind == "taylor" and name not in gradients):
                continue
            norm = isinstance(model.get_submodule(name.rpartition(".")[0]), nn.modules.batchnorm._BatchNorm)
            w = tensors[name].detach().cpu().double()
            if kind == "taylor":
                w = w * gradients[name].cpu().double()
            elif kind == "gamma":
                if not (norm and name.endswith(".weight")):
                    continue
            elif not is_output(model, name, dim):
                continue
            each = w.movedim(dim, 0).reshape(w.shape[dim], -1).abs()
            each = each.square().sum(1) if kind == "l2" else each.sum(1)
            total += torch.stack([each[unit[name, dim]].sum() for unit in group.units])
        found.append(total.sqrt() if kind == "l2" else total)
    return [t / t.mean().clamp(min=1e-30) for t in found]


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
    places, attention = count_places(model, size)
    tables = layer_times(model, size, args.round_to) if args.target == "latency" else None
    costs = Costs(model, groups, places, attention, args.target, tables, scope=args.scope)
    residual = args.importance == "residual"
    readers = readers_of(model, groups, images, ridge=args.ridge) if residual else {}
    fixed = None
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
        for name, dim in groups[i].units[0]:
            if name in readers and dim == readers[name].dim:
                indices = sorted(x for number in numbers for x in groups[i].units[number][name, dim])
                readers[name].state.remove(torch.tensor(indices))

    gone = choose(
        groups, costs, amount, loss=loss, remove=remove, round_to=args.round_to, floor=args.min_channels,
        per_cost=fixed is None or args.target == "latency",
    )  # fmt: skip
    keep = kept_indices(model, groups, gone)
    if why := trial(model, groups, gone):
        raise ModelError(f"the network without these channels is not the one with them at 0: {why}")
    if args.compensate:
        compensate(model, keep, images, ridge=args.ridge)
    before = costs.total()
    plan = shrink(model, keep)
    plan |= {name: list(p.shape) for name, p in model.named_parameters() if name not in costs.shapes}  # new biases
    if plan:
        model.channels = model.backbone.channels = map_channels(model)
    now = costs.total({name: list(p.shape) for name, p in model.named_parameters()})
    reached = 1 - now / before
    if args.target != "latency" and abs(reached - amount) > 0.02:
        raise ModelError(
            f"--amount {amount}: {reached:.3f} of the {args.target} would be gone, as channels go {args.round_to} at a "
            "time; lower --round-to"
        )
    return plan, left


@torch.inference_mode()
def layer_times(model, image, round_to, widths=12, repeats=3):
    """{name of a weight: function of its shape that gives milliseconds} of the layers of a network on an image.

    A layer is timed at up to `widths` numbers of outputs and of inputs, multiples of round_to; what lies between is
    interpolated, and both are taken to multiply. A depthwise one is timed at both at once.
    """
    inputs, tables = {}, {}

    def see(layer, args):
        inputs.setdefault(layer, args[0].shape)

    layers = {f"{name}.weight": m for name, m in model.named_modules() if isinstance(m, PRUNABLE)}
    hooks = [layer.register_forward_pre_hook(see) for layer in layers.values()]
    model.decode(model.encode(image))
    for hook in hooks:
        hook.remove()
    for name, layer in layers.items():
        if layer in inputs:
            tables[name] = time_table(layer, inputs[layer], round_to, widths, repeats)
    return tables


def time_table(layer, shape, round_to, widths, repeats):
    """The function of layer_times() of one layer, for inputs of a shape."""
    transposed, linear = isinstance(layer, nn.ConvTranspose2d), isinstance(layer, nn.Linear)
    weight, depthwise = layer.weight, not linear and layer.groups == layer.in_channels > 1
    dim = -1 if linear else 1

    def measure(outputs, inputs):
        x = torch.randn([inputs if d == dim % len(shape) else n for d, n in enumerate(shape)])
        x = x if linear else x.contiguous(memory_format=torch.channels_last)
        small = copy.deepcopy(layer)
        put(
            small, "weight", weight[:inputs, :outputs] if transposed else weight[:outputs, : 1 if depthwise else inputs]
        )
        small.bias = None
        if not linear:
            small.groups = inputs if depthwise else layer.groups
            small.in_channels, small.out_channels = inputs, outputs
            small = small.to(memory_format=torch.channels_last)
        return evaluate.milliseconds([lambda: small(x)], repeats)[0]

    def curve(count, run):
        step = max(round_to, -(-count // widths // round_to) * round_to)
        at = sorted({count, *range(step, count, step)})
        times = [run(n) for n in at]
        return [0, *at], [0.0, *times]

    if not linear and layer.groups > 1 and not depthwise:
        whole = measure(layer.out_channels, layer.in_channels)
        return lambda s: whole * math.prod(s) / weight.numel()
    outputs, inputs = (weight.shape[1], weight.shape[0]) if transposed else weight.shape[:2]
    if depthwise:
        line = curve(outputs, lambda n: measure(n, n))
        return lambda s: float(np.interp(s[0], *line))
    by_outputs, by_inputs = curve(outputs, lambda n: measure(n, inputs)), curve(inputs, lambda n: measure(outputs, n))
    whole = max(by_outputs[1][-1], 1e-9)

    def milliseconds(s):
        o, i = (s[1], s[0]) if transposed else s[:2]
        return float(np.interp(o, *by_outputs) * np.interp(i, *by_inputs) / whole)

    return milliseconds


# ---- command line ---------------------------------------------------------------------------------------------------

PRUNE_DEFAULTS = dict(epochs=2, lr=3e-4, warmup=10)  # in place of train.py's
FIXED_FLAGS = ("weights", "amount", "structured", "scope", "score", "pattern", "sparsity_schedule", "interval",
               "importance", "rank", "round_to", "min_channels", "target", "compensate", "ridge", "calib_images",
               "steps", "renorm", "sweep")  # fmt: skip
FLOAT_ONLY = {"quantize": "is quantized: prune the float checkpoint that it was made from, and quantize that"}


def make_parser():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], formatter_class=evaluate.HelpFormatter)
    group = parser.add_argument_group("pruning")
    add, yes_no = group.add_argument, argparse.BooleanOptionalAction
    share = datasets.share_below_1
    add("--weights", default="checkpoints/train/best.pt", help="float checkpoint to prune")
    add("--amount", type=share, default=0.3, help="share to take: of the weights, or of what --target says")
    add("--scope", choices=("all", "backbone", "head"), default="all", help="part that is pruned, and that counts")
    add("--sweep", type=share, nargs="+", metavar="AMOUNT", help="a run for each of these, and a figure of the curve")
    add("--calib-images", type=datasets.positive_int, default=64, metavar="N", help="of the training split")
    add("--renorm", action=yes_no, help="new BatchNorm statistics; left out: where training images gain by them")
    add("--kl", type=float, default=0.0, metavar="WEIGHT", help="in training, of the divergence from the whole network")
    add("--temperature", type=datasets.positive_float, default=1.0, help="of that divergence")
    add("--score", choices=SCORES, default="magnitude", help="weights: what is compared; layer: each loses as much")
    add("--pattern", choices=("2:4",), help="weights: two of each four consecutive inputs go, whatever --amount")
    add("--sparsity-schedule", choices=("oneshot", "cubic"), default="oneshot", help="weights: at once, or growing")
    add("--interval", type=datasets.positive_int, default=20, metavar="STEPS", help="weights: of cubic, between masks")
    add("--structured", action="store_true", help="remove channels, attention heads and hidden units")
    add("--target", choices=TARGETS, default="macs", help="channels: what --amount is a share of")
    add("--importance", choices=IMPORTANCE, default="residual", help="channels: what they are worth")
    add("--rank", choices=("global", "group"), default="global", help="channels: among all, or among their like")
    add("--round-to", type=datasets.positive_int, default=8, metavar="N", help="channels: a width is a multiple of it")
    add("--min-channels", type=datasets.positive_int, default=8, metavar="N", help="channels: a group keeps as many")
    add("--compensate", action=yes_no, default=True, help="channels: refit the layers that read what goes")
    add("--ridge", type=datasets.positive_float, default=0.01, help="channels: of the refit, of the mean variance")
    add("--steps", type=datasets.positive_int, default=1, metavar="N", help="channels: prune and train in N turns")
    parser.add_argument("--out", help="folder to write to; left out: checkpoints/prune")
    parser.add_argument("--resume", action="store_true", help="go on from OUT/last.pt, with its flags")
    datasets.add_data_args(parser)
    train.add_train_args(parser)
    parser.set_defaults(**PRUNE_DEFAULTS)
    return parser


def main(argv=None):
    """Run the command line; returns what results.json holds."""
    start = time.perf_counter()
    command = evaluate.command_line("prune.py", argv)
    shared = dict(script="prune.py", name="prune", inherits=("data", "loss"), fixed=FIXED_FLAGS)
    args, last = train.parse(make_parser(), argv, **shared)
    if args.structured and (args.pattern or args.sparsity_schedule == "cubic" or args.score != "magnitude"):
        raise ModelError("--pattern, --sparsity-schedule and --score are of single weights: leave out --structured")
    if args.steps > 1 and not args.structured:
        raise ModelError("--steps is of --structured; single weights have --sparsity-schedule cubic")
    if args.sparsity_schedule == "cubic" and (args.pattern or not args.epochs):
        raise ModelError("--sparsity-schedule cubic chooses masks while it trains: leave out --pattern, and --epochs 0")
    device = train.start(args)
    parent = train.open_parent(args, device, refuse=FLOAT_ONLY)
    before = score(parent.model, parent, device)
    if not args.sweep:
        return prune_once(args, command, parent, before, device, last, start)
    rows = []
    for amount in args.sweep:
        one = copy.copy(args)
        one.amount, one.out = amount, str(parent.out / f"amount-{amount}")
        Path(one.out).mkdir(exist_ok=True)
        own = parent._replace(out=Path(one.out))
        rows.append(prune_once(one, command, own, before, device, None, time.perf_counter()))
        if "stopped" in rows[-1]:
            return rows[-1]
        write_sweep(rows, before["miou"], parent.out)
    done = rows[-1] | {"sweep": [{k: row[k] for k in SWEEP_KEYS} for row in rows]}
    evaluate.write_json(parent.out / "results.json", done)
    print(f"the curve: {parent.out / 'sweep.csv'} and sweep.png")
    return done


def score(model, parent, device, dataset=None):
    """evaluate() of a network on the validation split, or on `dataset`, without boundaries."""
    info = parent.val_set.info
    return evaluate.evaluate(
        model, datasets.eval_loader(dataset or parent.val_set), num_classes=len(info.classes),
        ignore_index=info.ignore_index, device=device, boundary=False, progress=True,
    )  # fmt: skip


def seen_images(args, count=32):
    """Training images, evenly spread, as evaluation sees them, but none of those that calibrate."""
    options = dict(root=args.data_root, size=args.size, cache=False, options=datasets.option_values(args))
    few = dict(length=2) if args.dry_run else {}
    dataset = datasets.open_dataset(args.dataset, "train", **options, **few)
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
    own, new = (score(m, parent, device, seen)["miou"] for m in (model, other))
    taken = args.renorm or new > own
    print(f"on {len(seen)} training images {own:.2f} mIoU with BatchNorm's statistics as they were, {new:.2f} anew: "
          f"{'taken anew' if taken else 'left as they were'}")  # fmt: skip
    if taken:
        model.load_state_dict(other.state_dict())


def prune_once(args, command, parent, before, device, last, start):
    """One run: prune, score, fine-tune, report -> what results.json holds."""
    out, turns = parent.out, args.steps if args.structured else 1
    if last:
        model, entry = models.load_checkpoint(out / "last.pt", device=device)[0], last["compression"][-1]
        model = model.to(memory_format=torch.channels_last)
    else:
        kind = "channels" if args.structured else "weights"
        model = copy.deepcopy(parent.model)
        entry = {"step": "prune", "kind": kind, "amount": args.amount, "scope": args.scope, "plan": {}, "turn": 0}
    save = train.saver(
        args, command, data=parent.checkpoint["data"], pretrained=parent.checkpoint["pretrained"],
        lineage=[*parent.checkpoint["lineage"], train.ancestor(parent.checkpoint, before["miou"])],
        compression=lambda _network: [*parent.checkpoint["compression"], entry],
    )  # fmt: skip
    gradual_run = args.sparsity_schedule == "cubic"  # nothing goes before it is trained
    for turn in range(entry["turn"], turns):
        if not last:
            share = args.amount if turns == 1 else 1 - (1 - args.amount) ** (1 / turns)  # of what is left
            if (share or args.pattern) and not gradual_run:
                (cut_channels if args.structured else cut_weights)(model, share, args, parent, entry, device)
            metrics = score(model, parent, device)
            entry |= {"turn": turn, "untuned": {k: metrics[k] for k in ("miou", "macc", "aacc")}}
            print(f"{'not pruned' if gradual_run else 'pruned'}, not trained yet: {metrics['miou']:.2f} mIoU; "
                  f"before {before['miou']:.2f}")  # fmt: skip
            if not gradual_run:
                save(out / "best.pt", model, metrics=entry["untuned"])
        if args.epochs:
            one = copy.copy(args)
            one.epochs = max(1, args.epochs // turns)
            objective = train.make_objective(
                one, model, parent.train_set, out, device, teacher=parent.model, kl=args.kl,
                temperature=args.temperature,
            )  # fmt: skip
            done = train.fit_by_flags(
                one, objective, parent.train_set, parent.val_set, script="prune.py", device=device,
                save=functools.partial(save, network=model), last=last, **hooks_of(model, one, parent, last),
            )  # fmt: skip
            if done["stopped"]:
                return {"stopped": done["stopped"], "step": done["step"]}
            model = models.load_checkpoint(out / "best.pt", device=device)[0].to(memory_format=torch.channels_last)
        last = None
    return report(args, command, parent, before, device, start)


def cut_weights(model, amount, args, parent, entry, device):
    """Set single weights to 0, in place; BatchNorm anew where that helps."""
    weights, outside = weights_in(model, args.scope)
    for why, names in by_reason(outside).items():
        print(f"not pruned: {len(names)} tensors ({why}), {names[0]} for one")
    masks, left = two_of_four(weights) if args.pattern else (magnitude_masks(weights, amount, args.score), {})
    for name, why in left.items():
        print(f"not pruned: {name} ({why})")
    apply_masks(weights, masks)
    gone, count = sum(int((~mask).sum()) for mask in masks.values()), sum(w.numel() for w in weights.values())
    print(f"pruned: {gone:,} of the {count:,} weights of {len(weights)} layers")
    metrics = score(model, parent, device)
    print(f"pruned, BatchNorm's statistics as they were: {metrics['miou']:.2f} mIoU")
    renorm_where_it_helps(model, calibration(args, device), args, parent, device)


def cut_channels(model, amount, args, parent, entry, device):
    """Remove channels, in place; BatchNorm anew where that helps."""
    images, size = calibration(args, device), parent.val_set[0][0][None].to(device)
    gradients = None
    if args.importance == "taylor":
        objective = train.make_objective(args, model, parent.train_set, parent.out, device)
        steps = 2 if args.dry_run else max(1, args.calib_images // args.batch_size)
        options = dict(batch_size=args.batch_size, seed=args.seed, device=device, steps=steps)
        gradients = gradients_of(model, objective, parent.train_set, **options)
    plan, left = remove_channels(model, images, amount, args=args, gradients=gradients, size=size)
    entry["plan"] = entry["plan"] | plan
    entry["channels"] = list(model.channels)
    for why, names in by_reason(left).items():
        print(f"kept whole: {len(names)} layers ({why}), {names[0]} for one")
    renorm_where_it_helps(model, images, args, parent, device)


def by_reason(left):
    """{name: why} -> {why: names}."""
    found = {}
    for name, why in left.items():
        found.setdefault(why, []).append(name)
    return found


def calibration(args, device):
    """--calib-images training images in one batch (N, 3, H, W), cropped to the smallest."""
    images = train.calibration_images(args, device, args.calib_images)
    height, width = (min(x.shape[d] for x in images) for d in (2, 3))
    return torch.cat([x[..., :height, :width] for x in images]).to(memory_format=torch.channels_last)


def hooks_of(model, args, parent, last):
    """What fit() has to do besides: hold zeros, of earlier pruning too, or bring them."""
    every, _ = weights_in(model, "all")
    if args.structured:
        zeros = any(step["step"] == "prune" and step["kind"] == "weights" for step in parent.checkpoint["compression"])
        return {"score_first": True} | ({"after_step": train.keep_zeros(every)} if zeros else {})
    if args.sparsity_schedule == "oneshot":
        return {"score_first": True, "after_step": train.keep_zeros(every)}
    weights, _ = weights_in(model, args.scope)
    steps = 2 if args.dry_run else train.total_steps(args, parent.train_set)
    grow, end = gradual(
        weights, amount=args.amount, score=args.score, first=last["training"]["step"] if last else 0, steps=steps,
        interval=args.interval,
    )  # fmt: skip
    hold = train.keep_zeros({name: w for name, w in every.items() if name not in weights})

    def after_step(step, shadow):
        grow(step, shadow)
        hold(step, shadow)

    return {"after_step": after_step, "score_from": end}


def report(args, command, parent, before, device, start):
    """Say what is gone, by the file that was written, and what it cost -> what results.json holds."""
    path = parent.out / "best.pt"
    model, checkpoint = models.load_checkpoint(path, device=device)
    entry, size = checkpoint["compression"][-1], parent.val_set[0][0][None].to(device)
    metrics = evaluate.score(model, parent.val_set, device=device, out=parent.out, workers=args.workers)
    weights = [name for name in weights_in(model, "all")[0] if name in checkpoint["state_dict"]]
    zeros, share = sparsity(checkpoint["state_dict"], weights)
    shapes = dict(parent.model.named_parameters())
    if args.structured:
        kept = {name: checkpoint["state_dict"][name].numel() / shapes[name].numel() for name in weights}
        draw_layers(kept, "share of the weights that is left", parent.out / "layers.png")
    else:
        draw_layers(zeros, "share of zeros", parent.out / "layers.png")
    macs, macs_before = (evaluate.count_macs(m, size) for m in (model, parent.model))
    more = {
        "amount": args.amount, "sparsity": share, "layers": zeros, "macs": macs, "macs_before": macs_before,
        "macs_ratio": macs / macs_before, "miou_untuned": entry["untuned"]["miou"], "epochs": args.epochs,
    }  # fmt: skip
    last = evaluate.Stage(metrics, model, checkpoint, path, command)
    stages = {
        "before": evaluate.Stage(
            before, parent.model, parent.checkpoint, Path(args.weights), parent.checkpoint["command"]
        ),
        "pruned": evaluate.Stage(entry["untuned"]), "fine-tuned": last,
    }  # fmt: skip
    if not args.epochs:
        del stages["fine-tuned"]
        stages["pruned"] = last
    seconds = time.perf_counter() - start
    shared = dict(out=parent.out, seconds=seconds, device=device, dry_run=args.dry_run)
    done = evaluate.before_after(stages, size, more=more, **shared)
    if args.structured:
        print(f"{100 * macs / macs_before:.1f}% of the multiply-accumulates, "
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

    with models.replacing(out / "sweep.csv") as temporary, open(temporary, "w", newline="") as file:
        writer = csv.DictWriter(file, SWEEP_KEYS, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
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
