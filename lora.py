"""Adapt a trained network to other data by a small part of its parameters: LoRA for Linear and every convolution.

    python lora.py                                           # checkpoints/train/best.pt, to scenes in fog and at night
    python lora.py --dataset mastr1325 --data-root PATH      # to other classes: with a new classifier
    python lora.py --method all                              # four ways and full fine-tuning: a table and a figure
    python lora.py --method lora-head --trunk int8           # what is frozen runs in int8
    python lora.py --method head --cache-features 4          # or is not run again: four views of each image are kept
    python evaluate.py --adapter checkpoints/lora/adapter.pt # the network that was adapted, with the adapter

LoRA (Hu et al. 2021): a layer with weights W computes W x + s B A x with A of `rank` outputs, B = 0 at the start, and s
= alpha / rank; only A and B learn. Of a convolution A is a convolution with all of its arguments (kernel, stride,
padding and its mode, dilation, groups; transposed or not), and B a 1x1 one with the same groups. As both are linear,
W + s B A is one layer of the same kind: merge() puts it in W's place, and the network is as fast as it was before. A
layer of which A and B would be larger than W, such as a depthwise one, is trained itself.

--rslora: s = alpha / sqrt(rank) (Kalajdzievski 2023). --dora: W + s B A is given rows of a norm that learns by itself
(Liu et al. 2024). --lr-ratio: B learns faster than A (Hayou et al. 2024). --init svd: A and B start as the smallest
singular vectors of W, the first third of the backbone is left alone and biases learn (SoMA, Yun et al. 2025). --init
data: A starts as the main directions of what the layer sees (EVA, Paischer et al. 2024). W is never written to: what A
and B start from is subtracted, W x + s (B A - B0 A0) x.

Writes to --out (default checkpoints/lora): best.pt, a plain network like any other; adapter.pt, what was trained, and
the hash of the network that it belongs to; last.pt, history.csv, results.json, figures.
"""

import argparse
import collections
import copy
import csv
import fnmatch
import functools
import math
import re
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import datasets
import evaluate
import int8
import models
import quantize
import train
from models import ModelError

# ---- layers ---------------------------------------------------------------------------------------------------------

KINDS = (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)
TENSORS = ("lora_A", "lora_B", "magnitude", "start_A", "start_B")  # of a LoRA layer; those it has not are None


class LoRA(nn.Module):
    """A Linear, Conv2d or ConvTranspose2d `base`, and a branch beside it that learns in its place.

    Who reads the `weight` of the layer, as fused attention does, gets that of both together, without the dropout.
    """

    def __init__(self, base, *, rank=8, alpha=32.0, dropout=0.1, rslora=False, dora=False):
        super().__init__()
        self.base, self.original = base, None  # original: the weights while others, merged, are in their place
        self.transposed, self.groups = isinstance(base, nn.ConvTranspose2d), getattr(base, "groups", 1)
        self.scaling, self.dropout = alpha / (math.sqrt(rank) if rslora else rank), nn.Dropout(dropout)
        a, b = shapes(base, rank)
        self.lora_A = nn.Parameter(base.weight.new_empty(a))
        self.lora_B = nn.Parameter(base.weight.new_zeros(b))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))  # as a layer of torch starts
        self.magnitude = nn.Parameter(self.norm(base.weight.detach())) if dora else None
        self.register_buffer("start_A", None)
        self.register_buffer("start_B", None)

    def matrix(self, weight):
        """W or A -> (groups, outputs of a group, inputs of a group x places of the kernel)."""
        if self.transposed:  # (inputs, outputs of a group, h, w)
            return weight.unflatten(0, (self.groups, -1)).transpose(1, 2).flatten(2)
        return weight.reshape(self.groups, weight.shape[0] // self.groups, -1)

    def from_matrix(self, matrix):
        """The inverse of matrix(), for any number of outputs."""
        shape = self.base.weight.shape
        if self.transposed:
            return matrix.unflatten(2, (-1, *shape[2:])).transpose(1, 2).flatten(0, 1)
        return matrix.reshape(-1, *shape[1:])

    def norm(self, weight):
        """The norm of what makes each output channel (outputs,)."""
        return self.matrix(weight.float()).norm(dim=2).flatten()

    def delta(self):
        """s B A, or s (B A - B0 A0), shaped like W and in float32."""

        def product(b, a):
            return b.float().view(self.groups, -1, b.shape[1]) @ self.matrix(a.float())

        with torch.autocast(self.lora_A.device.type, enabled=False):
            total = product(self.lora_B, self.lora_A)
            if self.start_A is not None:
                total = total - product(self.start_B, self.start_A)
            return self.scaling * self.from_matrix(total)

    @property
    def bias(self):
        return self.base.bias

    @property
    def weight(self):
        """The weights of a plain layer that computes the same; in float32."""
        if self.original is not None:
            return self.base.weight
        weight = self.base.weight.float() + self.delta()
        if self.magnitude is None:
            return weight
        gain = self.magnitude / self.norm(weight.detach())  # the norm is taken for a constant, as in the paper
        return self.from_matrix(self.matrix(weight) * gain.view(self.groups, -1, 1))

    def down(self, x, weight):
        """x through a layer like the base with other weights, and no bias."""
        base = self.base
        if isinstance(base, nn.Linear):
            return F.linear(x, weight)
        if self.transposed:
            more = base.stride, base.padding, base.output_padding, base.groups, base.dilation
            return F.conv_transpose2d(x, weight, None, *more)
        return base._conv_forward(x, weight, None)

    def up(self, x, weight):
        return F.linear(x, weight) if weight.ndim == 2 else F.conv2d(x, weight, groups=self.groups)

    def forward(self, x):
        out = self.base(x)
        if self.original is not None:
            return out
        x = self.dropout(x)
        branch = self.up(self.down(x, self.lora_A), self.lora_B)
        if self.start_A is not None:
            branch = branch - self.up(self.down(x, self.start_A), self.start_B)
        out = torch.add(out, branch, alpha=self.scaling)
        if self.magnitude is None:
            return out
        with torch.no_grad():
            norm = self.norm(self.base.weight.float() + self.delta())
        bias = torch.zeros_like(norm) if self.bias is None else self.bias
        place = (-1,) if isinstance(self.base, nn.Linear) else (-1, 1, 1)
        gain, bias = (t.to(out.dtype).view(place) for t in (self.magnitude / norm, bias))
        return gain * (out - bias) + bias

    @torch.no_grad()
    def merge(self):
        """Put the weights of both together in the base's place; its own are kept aside, to the bit."""
        if self.original is not None:
            raise ModelError("this layer is merged already: unmerge() it first")
        merged = torch.empty_like(self.base.weight).copy_(self.weight)  # of the layout that the layer runs in
        self.original, self.base.weight.data = self.base.weight.data, merged

    def unmerge(self):
        """Put the base's own weights back."""
        if self.original is None:
            raise ModelError("this layer is not merged")
        self.base.weight.data, self.original = self.original, None

    @torch.no_grad()
    def start_from_svd(self):
        """A and B from the smallest singular vectors of W, each times the root of its singular value."""
        u, s, v = torch.linalg.svd(self.matrix(self.base.weight.float()), full_matrices=False)
        rank = self.lora_B.shape[1]
        root = s[:, -rank:].sqrt()
        self.lora_B.copy_((u[..., -rank:] * root[:, None]).reshape(self.lora_B.shape))
        self.lora_A.copy_(self.from_matrix(root[..., None] * v[:, -rank:]))
        self.start_A, self.start_B = self.lora_A.detach().clone(), self.lora_B.detach().clone()


def shapes(layer, rank):
    """The shapes of A and B: A has `rank` outputs in each group, B has as many inputs there."""
    shape = layer.weight.shape
    if isinstance(layer, nn.Linear):
        return (rank, shape[1]), (shape[0], rank)
    a = (shape[0], rank) if isinstance(layer, nn.ConvTranspose2d) else (rank * layer.groups, shape[1])
    return (*a, *shape[2:]), (layer.out_channels, rank, 1, 1)


def lora_layers(model):
    """{name: LoRA} of a network."""
    return {name: m for name, m in model.named_modules() if isinstance(m, LoRA)}


def merge(model):
    for layer in lora_layers(model).values():
        layer.merge()


def unmerge(model):
    for layer in lora_layers(model).values():
        layer.unmerge()


@torch.no_grad()
def start_from_data(model, batches, rounds=8):
    """A of each LoRA layer becomes the main directions of what the layer sees -> names of layers that nobody calls.

    They are the first eigenvectors of the covariance X'X of its patches, by subspace iteration: X'X A' is the gradient
    of |A x|^2 / 2, so no layer's patches are ever laid out, whatever its arguments.
    """
    layers = lora_layers(model)
    for _ in range(rounds):
        sums = {}

        def see(layer, inputs, sums=sums):
            with torch.enable_grad():
                a = layer.lora_A.detach().requires_grad_()
                y = layer.down(inputs[0].detach(), a).float()
                channel = y.ndim - 1 if isinstance(layer.base, nn.Linear) else 1
                y = y - y.mean([d for d in range(y.ndim) if d != channel], keepdim=True)
                sums[layer] = sums.get(layer, 0) + torch.autograd.grad(y.square().sum() / 2, a)[0]

        hooks = [layer.register_forward_pre_hook(see) for layer in layers.values()]
        for images in batches:
            model(images)
        for hook in hooks:
            hook.remove()
        for layer, total in sums.items():
            layer.lora_A.copy_(layer.from_matrix(torch.linalg.qr(layer.matrix(total).mT).Q.mT))
    return [name for name, layer in layers.items() if layer not in sums]


# ---- which layers ---------------------------------------------------------------------------------------------------

METHODS = {"classifier": 1e-2, "head": 1e-3, "lora-head": 1e-3, "full": 3e-4, "lora-full": 1e-3}  # learning rates
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj", "qkv", "attn.proj")  # ends of names in the zoo's transformers


class Patch:
    """What was set on the modules of a network, and what was there before: undo() puts the very objects back.

    layers: names of those with LoRA. trained: names of the parameters and buffers that change themselves. numbers:
    {attribute of a module: its value} that a new number of classes changed. options: of the LoRA layers.
    """

    def __init__(self, model, **options):
        self.model, self.options, self.device = model, options, next(model.parameters()).device
        self.before, self.layers, self.trained, self.numbers = [], [], [], {}
        for p in model.parameters():
            self.set(p, "requires_grad", False)

    def set(self, owner, name, value):
        self.before.append((owner, name, getattr(owner, name)))
        setattr(owner, name, value)

    def undo(self):
        while self.before:
            setattr(*self.before.pop())

    def put(self, name, value):
        """Set a submodule, a parameter (to a tensor), a buffer or another attribute by its whole name."""
        path, _, leaf = name.rpartition(".")
        owner = self.model.get_submodule(path)
        value = value.to(self.device) if torch.is_tensor(value) else value
        self.set(owner, leaf, nn.Parameter(value) if leaf in owner._parameters else value)

    def wrap(self, name):
        """Put a LoRA layer around the layer of that name."""
        self.put(name, LoRA(self.model.get_submodule(name), **self.options))
        self.layers.append(name)

    def state(self):
        """{name: tensor} of all that was trained, as an adapter holds it; names are those of the plain network."""
        layers, plain = lora_layers(self.model), plain_state(self.model)
        own = {f"{name}.{key}": getattr(layers[name], key) for name in self.layers for key in TENSORS}
        return {k: t.detach() for k, t in own.items() if t is not None} | {name: plain[name] for name in self.trained}


def plain_state(model):
    """The state_dict of a network without the branches of its LoRA layers, by the names of the plain network."""
    layers, found = lora_layers(model), {}
    for key, tensor in model.state_dict().items():
        owner, _, leaf = key.rpartition(".")
        if owner not in layers:
            inner = owner.removesuffix(".base")
            found[f"{inner}.{leaf}" if inner in layers else key] = tensor
    return found


def hits(model, patterns):
    """Names of the layers that the patterns name. ModelError where one names none."""
    names, found = [name for name, m in model.named_modules() if isinstance(m, KINDS)], set()
    for pattern in patterns:
        if not (new := fnmatch.filter(names, pattern)):
            raise ModelError(
                f"--targets {pattern}: no layer has such a name; there are {', '.join(names[:3])} and so on"
            )
        found.update(new)
    return [name for name in names if name in found]


def preset(model, method):
    """The patterns of a method: of lora-full the head and the backbone's attention, or all layers where it has none."""
    names = [name for name, m in model.backbone.named_modules() if isinstance(m, KINDS)]
    ends = [f"backbone.*{end}" for end in ATTENTION if any(name.endswith(end) for name in names)]
    return {"lora-head": ["head.*"], "lora-full": ["head.*", *(ends or ["backbone.*"])]}.get(method, [])


def adapt(model, method, *, num_classes, targets=(), soma=False, norm_stats=False, **options):
    """Freeze a network, and make trainable, in place, what a method trains -> Patch; no tensor that it had is written.

    targets: patterns in place of the method's. soma: biases learn, and the first third of the backbone's targets is
    left alone. norm_stats: BatchNorm's statistics move. options: of LoRA.
    """
    own = models.skeleton(model.build, freeze_backbone=False).named_parameters()
    classifier, part = models.classifier_of(model.build), {"full": "", "head": "head."}.get(method)
    trained = classifier + [name for name, p in own if p.requires_grad and part is not None and name.startswith(part)]
    chosen = [name for name in hits(model, targets or preset(model, method)) if f"{name}.weight" not in classifier]
    early = [name for name in chosen if name.startswith("backbone.")] if soma else []
    layers = {name: model.get_submodule(name) for name in chosen if name not in early[: round(len(early) / 3)]}
    small = [name for name, m in layers.items() if sum(map(math.prod, shapes(m, options["rank"]))) < m.weight.numel()]
    trained += [f"{name}.weight" for name in layers if name not in small]
    trained += [f"{n}.bias" for n, m in layers.items() if m.bias is not None and (soma or n not in small)]
    norms = {name: m for name, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}
    moving = {n: m for n, m in norms.items() if norm_stats and (n.startswith("head.") or method.endswith("full"))}
    trained += [f"{name}.{key}" for name, m in moving.items() for key, _ in m.named_buffers()]
    patch = Patch(model, **options)
    if num_classes != model.build["num_classes"]:
        for name, value in models.new_classifier(model, num_classes).items():
            patch.put(name, value)
            patch.numbers |= {} if torch.is_tensor(value) else {name: value}
        patch.set(model, "build", model.build | {"num_classes": num_classes})
    patch.trained, state = list(dict.fromkeys(trained)), model.state_dict()
    for name in patch.trained:
        patch.put(name, state[name].clone())
    for name in small:
        patch.wrap(name)
    still = not any(p.requires_grad for p in model.backbone.parameters())
    patch.set(model, "frozen", [m for n, m in norms.items() if n not in moving] + [model.backbone] * still)
    return patch


def attach(model, adapter):
    """Put what adapter.pt holds into the network that it belongs to -> Patch. Nothing in the network is written to."""
    patch, branches = Patch(model, **adapter["options"]), {}
    for key, value in (adapter["numbers"] | adapter["state"]).items():
        name, _, leaf = key.rpartition(".")
        if leaf in TENSORS:
            branches.setdefault(name, {})[leaf] = value
        else:
            patch.put(key, value)
    patch.set(model, "build", adapter["build"])
    for name, tensors in branches.items():
        patch.wrap(name)
        model.get_submodule(name).eval()
        for leaf, tensor in tensors.items():
            patch.put(f"{name}.{leaf}", tensor)
    return patch


# ---- command line ---------------------------------------------------------------------------------------------------

LORA_DEFAULTS = dict(dataset="synthetic-night", lr=None, warmup=10, weight_decay=0.0)  # in place of train.py's
FIXED_FLAGS = ("weights", "method", "targets", "rank", "alpha", "dropout", "rslora", "dora", "init", "lr_ratio",
               "norm_stats", "trunk", "cache_features", "minutes")  # fmt: skip
FLOAT_ONLY = {"quantize": "is quantized: adapt the float checkpoint that it was made from, and quantize that"}


def make_parser():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], formatter_class=evaluate.HelpFormatter)
    rates = ", ".join(f"{name} {rate:g}" for name, rate in METHODS.items())
    add = parser.add_argument_group("LoRA", f"--lr, where it is left out, is the method's: {rates}.").add_argument
    yes_no = argparse.BooleanOptionalAction
    add("--weights", default="checkpoints/train/best.pt", help="float checkpoint to adapt; it is left as it is")
    add("--method", choices=[*METHODS, "all"], default="lora-full", help="what is trained; all: each, and a table")
    add(
        "--targets",
        nargs="+",
        metavar="PATTERN",
        help="layers with LoRA, e.g. 'backbone.*.fc1'; left out: the method's",
    )
    add("--rank", type=datasets.positive_int, default=8, help="outputs of A")
    add("--alpha", type=datasets.positive_float, default=32.0, help="the branch counts alpha / rank")
    add("--dropout", type=datasets.share_below_1, default=0.1, help="on the input of the branch")
    add("--rslora", action=yes_no, default=False, help="the branch counts alpha / sqrt(rank)")
    add("--dora", action=yes_no, default=False, help="norms of the weights' rows learn by themselves")
    add("--init", choices=("default", "svd", "data"), default="default", help="what A, and with svd B, start from")
    add("--lr-ratio", type=datasets.positive_float, default=1.0, help="learning rate of B over that of A")
    add("--norm-stats", action=yes_no, help="BatchNorm's statistics move; left out: with --method head and full")
    add("--trunk", choices=("float", "int8"), default="float", help="what a backbone that is not trained runs in")
    add("--cache-features", type=datasets.count, default=0, metavar="K", help="keep K views of each image; 0: do not")
    add("--minutes", type=datasets.positive_float, help="as many epochs as fit, by timed steps, in place of --epochs")
    parser.add_argument("--out", help="folder to write to; left out: checkpoints/lora")
    parser.add_argument("--resume", action="store_true", help="go on from OUT/last.pt, with its flags")
    datasets.add_data_args(parser)
    train.add_train_args(parser)
    parser.set_defaults(**LORA_DEFAULTS)
    return parser


def main(argv=None):
    """Run the command line; returns what results.json holds."""
    command = evaluate.command_line("lora.py", argv)
    args, last = train.parse(make_parser(), argv, script="lora.py", name="lora", inherits=("loss",), fixed=FIXED_FLAGS)
    rows = []
    with train.process_group(train.start(args)) as device:
        parent = train.open_parent(args, device, refuse=FLOAT_ONLY, same_classes=False)
        for method in METHODS if args.method == "all" else ():
            one = copy.copy(args)
            one.method, one.out = method, str(parent.out / method)
            if method.endswith("full"):
                one.trunk, one.cache_features = "float", 0
            Path(one.out).mkdir(exist_ok=True)
            rows.append(tune(one, command, parent._replace(out=Path(one.out)), device, None))
            if not rows[-1] or "stopped" in rows[-1]:
                return rows[-1]
        return compare(rows, parent.out) if rows else tune(args, command, parent, device, last)


def tune(args, command, parent, device, last):
    """One run: adapt, train, report -> what results.json holds."""
    start, model, out, info = time.perf_counter(), parent.model, parent.out, parent.val_set.info
    args.lr = METHODS[args.method] if args.lr is None else args.lr
    is_lora, whole = args.method.startswith("lora"), args.method in ("head", "full")
    zeros = [step for step in parent.checkpoint["compression"] if step.get("kind") == "weights"]
    if zeros and is_lora:
        raise ModelError(f"{args.weights} has weights pruned to 0, which B A would fill: prune what lora.py writes")
    full, classes = copy.deepcopy(model), len(info.classes)
    adapt(full, "full", num_classes=classes, norm_stats=True, rank=args.rank)
    patch = adapt(
        model, args.method, num_classes=classes, targets=args.targets if is_lora else (), soma=args.init == "svd",
        norm_stats=whole if args.norm_stats is None else args.norm_stats, rank=args.rank, alpha=args.alpha,
        dropout=args.dropout, rslora=args.rslora, dora=args.dora,
    )  # fmt: skip
    describe(patch, args)
    if args.init == "svd":
        for layer in lora_layers(model).values():
            layer.start_from_svd()
    elif args.init == "data" and patch.layers:
        for name in start_from_data(model, train.calibration_images(args, device, 16)):
            print(f"starts as by default: {name}, which is not called as a layer")
    encode, train_set = trunk(args, model, full, parent.train_set, device)
    objective = train.make_objective(args, model, parent.train_set, out, device, encode=encode)
    plain = train.Objective(full, objective.loss, objective.aux_weight, objective.ignore_index).to(device)
    pair = {"": (objective, train_set), "_full": (plain, parent.train_set)}
    costs = train.step_costs(args, pair, device, 1 if args.dry_run else 5)
    if args.minutes and not last:
        an_epoch = train.total_steps(args, train_set) / args.epochs * costs[""]["step_ms"] / 60e3
        args.epochs = max(1, int(args.minutes / an_epoch))
    shapes_now = {name: list(tensor.shape) for name, tensor in plain_state(model).items()}
    steps = [
        step | {"plan": {name: shapes_now[name] for name in step["plan"]}} if "plan" in step else step
        for step in parent.checkpoint["compression"]
    ]
    write = train.saver(
        args, command, data=info.to_dict(), pretrained=parent.checkpoint["pretrained"],
        lineage=[*parent.checkpoint["lineage"], train.ancestor(parent.checkpoint)], compression=steps,
    )  # fmt: skip
    base = {"id": parent.checkpoint["id"], "hash": models.fingerprint(parent.checkpoint["state_dict"])}
    about = {"adapter": 1, "base": base, "method": args.method, "data": info.to_dict(), "command": command}
    about |= {"args": {"data_root": train.plain(args.data_root)}, "options": patch.options, "numbers": patch.numbers, "build": model.build}

    def save(path, metrics, training=None):
        """A plain network with the branches merged; last.pt has the adapter beside it, of the others it is a file."""
        more = {"training": training | {"adapter": patch.state()}} if training else {}
        if not training:
            with models.replacing(out / "adapter.pt") as temporary:
                torch.save(about | {"state": patch.state(), "metrics": metrics}, temporary)
        merge(model)
        write(path, model, metrics=metrics, state_dict=plain_state(model), **more)
        unmerge(model)

    state = patch.state()
    for name, tensor in last["training"]["adapter"].items() if last else ():
        state[name].copy_(tensor)
    hooks = {"after_step": train.keep_zeros({n: p for n, p in model.named_parameters() if p.ndim > 1})} if zeros else {}
    done = train.fit_by_flags(
        args, objective, train_set, parent.val_set, script="lora.py", device=device, save=save, last=last,
        adjust=functools.partial(speed_up, model=model, ratio=args.lr_ratio), **hooks,
    )  # fmt: skip
    trained, branches = models.count_params(model)[1], sum(t.numel() for k, t in patch.state().items() if "lora_" in k)
    patch.undo()
    model.eval()
    if done["stopped"] or train.rank_and_world()[0]:
        return {"stopped": done["stopped"], "step": done["step"]} if done["stopped"] else {}
    more = {"method": args.method, "epochs": args.epochs, "minutes": done["seconds"] / 60, "trainable_params": trained}
    more |= {"lora_params": branches, "trained_percent": 100 * trained / models.count_params(model)[0]}
    more |= {f"{key}{name}": value for name, cost in costs.items() for key, value in cost.items()}
    return report(args, command, parent, more, device, start)


def describe(patch, args):
    """Say what has LoRA and what is trained itself: one line for names that differ by numbers alone."""
    branches = [f"{name}, rank {args.rank}" for name in patch.layers]
    for kind, names in (("LoRA", branches), ("trained itself", patch.trained)):
        for name, count in collections.Counter(re.sub(r"(?<=\.)\d+", "*", name) for name in names).items():
            print(f"{kind}: {name}" + (f" ({count})" if count > 1 else ""))


def trunk(args, model, full, train_set, device):
    """(encode of the objective, None for the network's own; the training set) by --trunk and --cache-features."""
    if args.trunk == "float" and not args.cache_features:
        return None, train_set
    if any(p.requires_grad for p in model.backbone.parameters()):
        raise ModelError("--trunk int8 and --cache-features are for a backbone that is not trained: "
                         "--method classifier, head or lora-head")  # fmt: skip
    net = model if args.trunk == "float" else quantize.int8_copy(full, train.calibration_images(args, device, 16))

    @torch.no_grad()
    def encode(images):
        with torch.autocast(device.type, enabled=False):
            return [int8.read(f) for f in net.encode(images.to(device, memory_format=torch.channels_last))]

    if not args.cache_features:
        return encode, train_set
    args.workers = 0  # what is kept is in this process
    kept = evaluate.AMP_DTYPES[args.amp] or torch.float32
    views = datasets.FeatureViews(train_set, args.cache_features, encode, dtype=kept)
    return (lambda numbers: views.encode(numbers)), views


def speed_up(optimizer, *, model, ratio):
    """Give B its own groups, of `ratio` times the learning rate (LoRA+)."""
    fast = {id(layer.lora_B) for layer in lora_layers(model).values()}
    for group in list(optimizer.param_groups) if ratio != 1 else ():
        ours = [p for p in group["params"] if id(p) in fast]
        if ours:
            group["params"] = [p for p in group["params"] if id(p) not in fast]
            optimizer.add_param_group(group | {"params": ours, "base_lr": ratio * group["base_lr"]})


def report(args, command, parent, more, device, start):
    """Score the two networks on the two data sets, see that the base is as it was -> what results.json holds."""
    path, info, image = parent.out / "best.pt", parent.val_set.info, parent.val_set[0][0][None].to(device)
    best, checkpoint = models.load_checkpoint(path, device=device)
    adapter, undo = models.load_adapter(parent.model, parent.checkpoint, parent.out / "adapter.pt")
    with torch.inference_mode():
        difference = (parent.model(image) - best(image)).abs().max().item()
    undo()
    began = time.perf_counter()
    attach(parent.model, adapter).undo()
    swap_ms = 1000 * (time.perf_counter() - began)
    if models.fingerprint(parent.model.state_dict()) != adapter["base"]["hash"]:
        raise ModelError("the base is not what it was: a tensor of it was written to")
    stages, home = {}, parent.checkpoint["data"]["name"]
    length = 2 if args.dry_run else None
    try:
        source = evaluate.open_scored(parent.checkpoint, weights=args.weights, length=length)
    except (datasets.DataError, OSError) as error:
        source, why = None, models.one_line(error)
        print(f"not scored on {home}: {why}")

    def score(model, dataset):
        if dataset is None or len(dataset.info.classes) != model.build["num_classes"]:
            return dict.fromkeys(("miou", "macc", "aacc"))
        return evaluate.evaluate(
            model, datasets.eval_loader(dataset, workers=args.workers), num_classes=len(dataset.info.classes),
            ignore_index=dataset.info.ignore_index, device=device, boundary=False, progress=True, reduce=False,
        )  # fmt: skip

    same = list(info.classes) == list(parent.checkpoint["data"]["classes"])
    rows = {"base": (parent.model, parent.val_set if same else None), "adapted": (best, source if same else None)}
    before = evaluate.Stage(score(parent.model, source), parent.model, parent.checkpoint, Path(args.weights),
                            parent.checkpoint["command"])  # fmt: skip
    crossed = {name: evaluate.Stage(score(*row)) for name, row in rows.items()}
    metrics = evaluate.score(best, parent.val_set, device=device, out=parent.out, workers=args.workers)
    stages = {
        f"base, on {home} (source)": before, f"base, on {info.name} (target)": crossed["base"],
        f"adapted, on {home} (source)": crossed["adapted"],
        f"adapted, on {info.name} (target)": evaluate.Stage(metrics, best, checkpoint, path, command),
    }  # fmt: skip
    more |= {
        "source_miou_before": before.metrics["miou"], "source_miou_after": crossed["adapted"].metrics["miou"],
        "target_miou_before": crossed["base"].metrics["miou"], "merge_difference": difference, "swap_ms": swap_ms,
        "adapter_mb": (parent.out / "adapter.pt").stat().st_size / 1e6,
    }  # fmt: skip
    seconds = time.perf_counter() - start
    shared = dict(out=parent.out, seconds=seconds, device=device, dry_run=args.dry_run)
    done = evaluate.before_after(stages, image, more=more, **shared)
    print(f"{args.method}: {more['trainable_params']:,} parameters trained, {more['trained_percent']:.2f}%, in "
          f"{more['minutes']:.1f} minutes; a step {more['step_ms']:.0f} ms and {more['step_memory_mb']:.0f} MiB, of full "
          f"fine-tuning {more['step_ms_full']:.0f} ms and {more['step_memory_mb_full']:.0f} MiB")  # fmt: skip
    print(f"merged and not merged differ by {difference:.1g} at most; the base is as it was, to the bit; {path}; "
          f"adapter.pt ({more['adapter_mb']:.2f} MB), results.json and figures beside it")  # fmt: skip
    return done


COLUMNS = ("method", "epochs", "minutes", "miou", "source_miou_after", "trainable_params", "trained_percent",
           "adapter_mb", "step_ms", "step_memory_mb")  # fmt: skip


def compare(rows, out):
    """methods.csv and methods.png of a run of each method -> what results.json holds: the last, and all as `methods`."""
    from matplotlib.figure import Figure

    table = [{key: row[key] for key in COLUMNS} for row in rows]
    evaluate.print_table(table)
    with models.replacing(out / "methods.csv") as temporary, open(temporary, "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(table)
    figure = Figure(figsize=(6, 4), layout="constrained")
    axis = figure.subplots()
    for row in table:
        axis.plot(row["trainable_params"], row["miou"], "o")
        axis.annotate(f" {row['method']}", (row["trainable_params"], row["miou"]), va="bottom")
    axis.set(xscale="log", xlabel="parameters trained", ylabel="mIoU (%)")
    axis.grid(alpha=0.3)
    evaluate.save_figure(figure, out / "methods.png")
    evaluate.write_json(out / "results.json", done := rows[-1] | {"methods": table})
    print(f"the table: {out / 'methods.csv'} and methods.png")
    return done


if __name__ == "__main__":
    import lora

    evaluate.run_cli(lora.main)  # the module that load_adapter() imports
