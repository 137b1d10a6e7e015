"""Adapt a trained network to other data by a small part of its parameters: LoRA for Linear and every convolution.

    python lora.py                                           # checkpoints/train/best.pt, to scenes in fog and at night
    python lora.py --dataset mastr1325 --data-root PATH      # to other classes: with a new classifier
    python lora.py --method all                              # four ways and full fine-tuning: a table and a figure
    python lora.py --method lora-head --trunk int8           # what is frozen runs in int8
    python lora.py --method head --cache-features 4          # or not again: four views of each image are kept

LoRA (Hu et al. 2021): a layer with weights W computes W x + s B A x; A, of `rank` outputs, and B, 0 at the start, learn
alone; s = alpha / rank. Of a convolution A is one with all of its arguments, transposed or not, and B a 1x1 one of as
many groups. Both are linear, so W + s B A is one layer of the same kind: merge() puts it in W's place, and the network
is as fast as before. A layer smaller than its A and B, such as a depthwise one, is trained itself.

--rslora: s = alpha / sqrt(rank) (Kalajdzievski 2023). --dora: the norms of the rows of W + s B A learn by themselves
(Liu et al. 2024). --lr-ratio: B learns faster than A (Hayou et al. 2024). --init svd: A and B start as the smallest
singular vectors of W, biases learn, the first third of the backbone does not (SoMA, Yun et al. 2025). --init data: A
starts as the main directions of what the layer sees (EVA, Paischer et al. 2024). W is never written to: what A and B
start from is subtracted, W x + s (B A - B0 A0) x.

Writes to --out (default checkpoints/lora): best.pt, a plain network like any other; adapter.pt, what was trained and
the hash of the network that it belongs to; last.pt, history.csv, results.json, figures.
"""

if __name__ == "__main__":  # the imports take seconds: Ctrl-C ends them without a traceback
    import signal

    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import collections
import copy
import fnmatch
import math
import re
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import datasets
import evaluate
import models
import quantize
import train
from models import ModelError

# ---- layers ---------------------------------------------------------------------------------------------------------

KINDS = (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)
TENSORS = ("lora_A", "lora_B", "magnitude", "start_A", "start_B")  # of a LoRA layer; those it has not are None


class Dropout(nn.Dropout):
    """nn.Dropout; on a CPU, where to draw a float for each element takes longer than most layers, a random byte decides
    it, and p is rounded to 1 / 256."""

    def forward(self, x):
        if not self.training or not self.p or x.device.type != "cpu":
            return super().forward(x)
        gone, keep = min(max(1, round(256 * self.p)), 255), torch.empty_like(x)
        draws = torch.empty(-(-x.numel() // 8), dtype=torch.int64).random_(-(2**63), None).view(torch.uint8)
        flat = keep.as_strided((x.numel(),), (1,))  # in the order of memory: the result is converted, not transposed
        torch.ge(draws[: x.numel()], gone, out=flat)
        return x * keep.mul_(256 / (256 - gone))


class LoRA(nn.Module):
    """A Linear, Conv2d or ConvTranspose2d `base`, and a branch beside it that learns in its place.

    Who reads the `weight` of the layer, as fused attention does, gets that of both together, without the dropout.
    """

    def __init__(self, base, *, rank=8, alpha=32.0, dropout=0.1, rslora=False, dora=False):
        super().__init__()
        self.base, self.original = base, None  # original: the weights while others, merged, are in their place
        self.transposed, self.groups = isinstance(base, nn.ConvTranspose2d), getattr(base, "groups", 1)
        self.scaling, self.dropout = alpha / (math.sqrt(rank) if rslora else rank), Dropout(dropout)
        a, b = shapes(base, rank)
        self.lora_A = nn.Parameter(base.weight.new_empty(a))
        self.lora_B = nn.Parameter(base.weight.new_zeros(b))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))  # as a layer of torch starts
        self.magnitude = nn.Parameter(self.norm(base.weight.detach())) if dora else None
        for name in ("start_A", "start_B"):
            self.register_buffer(name, None)

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
        """s (B A - B0 A0), shaped like W and in float32."""
        pairs = [(b.float().view(self.groups, -1, b.shape[1]), self.matrix(a.float())) for a, b in self.branches()]
        with torch.autocast(self.lora_A.device.type, enabled=False):
            first, *start = (b @ a for b, a in pairs)
            return self.scaling * self.from_matrix(first - sum(start))

    def branches(self):
        """(A, B) and, where they do not start from zero, what they started from."""
        started = self.start_A is not None
        return [(self.lora_A, self.lora_B)] + ([(self.start_A, self.start_B)] if started else [])

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
        return self.from_matrix(self.matrix(weight) * self.gain(weight).view(self.groups, -1, 1))

    def gain(self, weight):
        """What DoRA multiplies the outputs by; the norm is taken for a constant, as in section 4.3 of the paper."""
        return self.magnitude / self.norm(weight.detach())

    def down(self, x, a):
        """x through a layer like the base, with all of its arguments, with weights A and no bias."""
        if a.ndim == 2:
            return F.linear(x, a)
        if not self.transposed:
            return self.base._conv_forward(x, a, None)
        stride, padding, more = self.base.stride, self.base.padding, self.base.output_padding
        return F.conv_transpose2d(x, a, None, stride, padding, more, self.groups, self.base.dilation)

    def up(self, x, b):
        return F.linear(x, b) if b.ndim == 2 else F.conv2d(x, b, groups=self.groups)

    def forward(self, x):
        out = self.base(x)
        if self.original is not None:
            return out
        x = self.dropout(x)
        for sign, (a, b) in zip((1, -1), self.branches(), strict=False):
            out.add_(self.up(self.down(x, a), b), alpha=sign * self.scaling)
        if self.magnitude is None:
            return out
        with torch.no_grad():
            weight = self.base.weight.float() + self.delta()
        bias = 0 if self.bias is None else self.bias
        gain, bias = (torch.as_tensor(t, device=out.device).to(out.dtype) for t in (self.gain(weight), bias))
        if self.lora_B.ndim == 4:
            gain, bias = gain.view(-1, 1, 1), bias.view(-1, 1, 1)
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


@torch.no_grad()
def start_from_data(model, batches, rounds=8):
    """A of each LoRA layer becomes the main directions of what the layer sees -> names of layers that nobody calls.

    They are the first eigenvectors of the covariance X'X of its patches, by subspace iteration: X'X A' is the gradient
    of |A x|^2 / 2, so no layer's patches are ever laid out, whatever its arguments.
    """
    layers, sums = lora_layers(model), {}

    def see(layer, inputs):
        with torch.enable_grad():
            a = layer.lora_A.detach().requires_grad_()
            y = layer.down(inputs[0].detach(), a).float()
            y = y - y.mean([d for d in range(y.ndim) if d != (y.ndim - 1 if a.ndim == 2 else 1)], keepdim=True)
            sums[layer] = sums.get(layer, 0) + torch.autograd.grad(y.square().sum() / 2, a)[0]

    hooks = [layer.register_forward_pre_hook(see) for layer in layers.values()]
    for _ in range(rounds):
        sums.clear()
        for images in batches:
            model(images)
        for layer, total in sums.items():
            layer.lora_A.copy_(layer.from_matrix(torch.linalg.qr(layer.matrix(total).mT).Q.mT))
    for hook in hooks:
        hook.remove()
    return [name for name, layer in layers.items() if layer not in sums]


# ---- which layers ---------------------------------------------------------------------------------------------------

METHODS = {"classifier": 1e-2, "head": 1e-3, "lora-head": 3e-3, "full": 3e-4, "lora-full": 3e-3}  # learning rates
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj", "qkv", "attn.proj")  # ends of names in the zoo's transformers


class Adapted(models.Patch):
    """A network with LoRA layers, and with trained tensors, in places.

    layers: names of those with LoRA. trained: names of the parameters and buffers that change themselves. numbers:
    {attribute of a module: its value} that a new number of classes changed. options: of the LoRA layers.
    """

    def __init__(self, model, **options):
        super().__init__(model)
        self.layers, self.trained, self.numbers, self.options = [], [], {}, options

    def wrap(self, name):
        """Put a LoRA layer around the layer of that name."""
        self.put(name, LoRA(self.model.get_submodule(name), **self.options))
        self.layers.append(name)

    def state(self):
        """{name: tensor} of all that was trained, as an adapter holds it; names are those of the plain network."""
        layers, plain = lora_layers(self.model), plain_state(self.model)
        own = {f"{name}.{key}": getattr(layers[name], key) for name in self.layers for key in TENSORS}
        return {k: t.detach() for k, t in own.items() if t is not None} | {name: plain[name] for name in self.trained}


def merged_state(model):
    """The state_dict of the plain network that computes the same."""
    layers = lora_layers(model).values()
    for layer in layers:
        layer.merge()
    state = plain_state(model)
    for layer in layers:
        layer.unmerge()
    return state


def plain_state(model):
    """The state_dict of a network without the branches of its LoRA layers, by the names of the plain network."""
    layers, found = lora_layers(model), {}
    for key, tensor in model.state_dict().items():
        owner, _, leaf = key.rpartition(".")
        if owner not in layers:
            inner = owner.removesuffix(".base")
            found[f"{inner}.{leaf}" if inner in layers else key] = tensor
    return found


def targets_of(model, method, patterns):
    """Names of the layers that the patterns name; without any, the method's: of lora-full the head and the backbone's
    attention, or all layers where it has none. ModelError where a pattern names none."""
    names, found = [name for name, m in model.named_modules() if isinstance(m, KINDS)], set()
    if not patterns:
        attention = [f"backbone.*{end}" for end in ATTENTION if fnmatch.filter(names, f"backbone.*{end}")]
        patterns = {"lora-head": ["head.*"], "lora-full": ["head.*", *(attention or ["backbone.*"])]}.get(method, [])
    for pattern in patterns:
        if not (new := fnmatch.filter(names, pattern)):
            raise ModelError(f"--targets {pattern}: no layer has such a name; one that is there is {names[0]}")
        found.update(new)
    return [name for name in names if name in found]


def adapt(model, method, *, num_classes, targets=(), unfreeze=(), soma=False, norm_stats=False, **options):
    """Freeze a network, and make trainable, in place, what a method trains -> Adapted; no tensor of it is written.

    targets: patterns in place of the method's. unfreeze: patterns of parameters that learn themselves. soma: biases
    learn, and the first third of the backbone's targets is left alone. norm_stats: BatchNorm's statistics move.
    options: of LoRA. Raises ModelError where a pattern names nothing.
    """
    own = models.skeleton(model.build, freeze_backbone=False).named_parameters()
    names, trained = [name for name, p in own if p.requires_grad], models.classifier_of(model.build)
    for pattern in (*{"full": ["*"], "head": ["head.*"]}.get(method, ()), *unfreeze):
        if not (new := fnmatch.filter(names, pattern)):
            raise ModelError(f"--unfreeze {pattern}: no parameter has such a name; one that is there is {names[0]}")
        trained = trained + new
    chosen = [name for name in targets_of(model, method, targets) if f"{name}.weight" not in trained]
    early = [name for name in chosen if name.startswith("backbone.")] if soma else []
    layers = {name: model.get_submodule(name) for name in chosen if name not in early[: round(len(early) / 3)]}
    small = [name for name, m in layers.items() if sum(map(math.prod, shapes(m, options["rank"]))) < m.weight.numel()]
    trained += [f"{name}.weight" for name in layers if name not in small]
    trained += [f"{n}.bias" for n, m in layers.items() if m.bias is not None and (soma or n not in small)]
    norms = {name: m for name, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}
    moving = {n: m for n, m in norms.items() if norm_stats and (n.startswith("head.") or method.endswith("full"))}
    trained += [f"{name}.{key}" for name, m in moving.items() for key, _ in m.named_buffers()]
    patch = Adapted(model, **options)
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
    """Put what adapter.pt holds into the network that it belongs to -> Adapted. No tensor of it is written."""
    state = model.state_dict()
    other = [k for k, t in adapter["state"].items() if k in state and state[k].shape != t.shape]
    if other and set(other) - set(models.classifier_of(model.build)):
        raise ModelError(f"{', '.join(other)} are of other shapes")
    patch, branches = Adapted(model, **adapter["options"]), {}
    for key, value in (adapter["numbers"] | adapter["state"]).items():
        name, _, leaf = key.rpartition(".")
        if leaf in TENSORS:
            branches.setdefault(name, {})[leaf] = value
        else:
            patch.put(key, value)
    patch.set(model, "build", adapter["build"])
    for name, tensors in branches.items():
        patch.wrap(name)
        layer = model.get_submodule(name).eval()
        for leaf, tensor in tensors.items():
            own = getattr(layer, leaf.replace("start_", "lora_"))
            if own is None or own.shape != tensor.shape:
                raise ModelError(f"{leaf} of {name} has the shape {list(tensor.shape)}")
            patch.put(f"{name}.{leaf}", tensor)
    return patch


# ---- command line ---------------------------------------------------------------------------------------------------

LORA_DEFAULTS = dict(dataset="synthetic-night", lr=None, warmup=10, weight_decay=0.0)  # in place of train.py's
FIXED_FLAGS = ("weights", "method", "targets", "unfreeze", "rank", "alpha", "dropout", "rslora", "dora", "init",
               "lr_ratio", "norm_stats", "trunk", "cache_features", "minutes")  # fmt: skip
FLOAT_ONLY = {"quantize": "is quantized: adapt the float checkpoint that it was made from, and quantize that"}


def make_parser():
    parser = datasets.Parser(__doc__)
    rates = ", ".join(f"{name} {rate:g}" for name, rate in METHODS.items())
    add = parser.add_argument_group("LoRA", f"--lr, where it is left out, is the method's: {rates}.").add_argument
    yes_no = argparse.BooleanOptionalAction
    add("--weights", default="checkpoints/train/best.pt", help="float checkpoint to adapt; it is left as it is")
    add("--method", choices=[*METHODS, "all"], default="lora-full", help="what is trained; all: each, and a table")
    add("--targets", nargs="+", metavar="PATTERN", help="layers with LoRA, e.g. '*.fc1'; left out: the method's")
    add("--unfreeze", nargs="+", metavar="PATTERN", help="parameters that learn themselves beside it, e.g. 'head.*'")
    add("--rank", type=datasets.positive_int, default=8, help="outputs of A")
    add("--alpha", type=datasets.positive_float, default=32.0, help="the branch counts alpha / rank")
    add("--dropout", type=datasets.share_below_1, default=0.1, help="on the input of the branch")
    add("--rslora", action=yes_no, default=False, help="the branch counts alpha / sqrt(rank)")
    add("--dora", action=yes_no, default=False, help="norms of the weights' rows learn by themselves")
    add("--init", choices=("default", "svd", "data"), default="default", help="what A, and with svd B, start from")
    add("--lr-ratio", type=datasets.positive_float, default=1.0, help="learning rate of B over that of A")
    add("--norm-stats", action=yes_no, help="BatchNorm's statistics move; left out: with --method head and full")
    add("--trunk", choices=("float", "int8"), default="float", help="what runs the backbone's untrained first blocks")
    add("--cache-features", type=datasets.count, default=0, metavar="K", help="keep K views of each image; 0: do not")
    add("--minutes", type=datasets.positive_float, help="as many epochs as fit, by timed steps, in place of --epochs")
    parser.add_argument("--out", help="folder to write to; left out: checkpoints/lora")
    parser.add_argument("--resume", action="store_true", help="go on from OUT/last.pt, with its flags")
    datasets.add_data_args(parser)
    train.add_train_args(parser)
    parser.set_defaults(**LORA_DEFAULTS)
    branches = "--targets --unfreeze --rank --alpha --dropout --rslora --dora --init --lr-ratio"
    parser.only(branches, "methods with LoRA", lambda args: args.method.startswith(("all", "lora")))
    parser.only("--epochs", "runs without --minutes", lambda args: args.resume or not args.minutes)
    return parser


@evaluate.releasing
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
            rows.append(tune(one, command, parent._replace(out=Path(one.out)), device, None))
            if not rows[-1] or "stopped" in rows[-1]:
                return rows[-1]
        return compare(rows, parent.out) if rows else tune(args, command, parent, device, last)


def tune(args, command, parent, device, last):
    """One run: adapt, train, report -> what results.json holds."""
    start, model, checkpoint, info = time.perf_counter(), parent.model, parent.checkpoint, parent.val_set.info
    if any(step.get("kind") == "weights" for step in checkpoint["compression"]):
        raise ModelError(f"{args.weights} has weights pruned to 0, which B A would fill: prune what lora.py writes")
    args.lr = METHODS[args.method] if args.lr is None else args.lr
    norm_stats = args.method in ("head", "full") if args.norm_stats is None else args.norm_stats
    full, classes = copy.deepcopy(model), len(info.classes)
    adapt(full, "full", num_classes=classes, norm_stats=True, rank=args.rank)
    targets, unfreeze = (args.targets, args.unfreeze or ()) if args.method.startswith("lora") else ((), ())
    patch = adapt(
        model, args.method, num_classes=classes, targets=targets, unfreeze=unfreeze, soma=args.init == "svd",
        norm_stats=norm_stats, rank=args.rank, alpha=args.alpha, dropout=args.dropout, rslora=args.rslora,
        dora=args.dora,
    )  # fmt: skip
    print_names(f"LoRA of rank {args.rank}", patch.layers)
    print_names("trained itself", patch.trained)
    if args.init == "svd":
        for layer in lora_layers(model).values():
            layer.start_from_svd()
    elif args.init == "data" and patch.layers:
        for name in start_from_data(model, train.calibration_images(args, device, 16)):
            print(f"starts as by default: {name}, which is not called as a layer")
    model.to(memory_format=torch.channels_last)  # of what is new
    encode, train_set = trunk(args, model, full, parent.train_set, device, patch.layers + patch.trained)
    objective = train.make_objective(args, model, parent.train_set, parent.out, device, encode=encode)
    plain = train.Objective(full, objective.loss, objective.aux_weight, objective.ignore_index).to(device)
    pair = {"": (objective, train_set), "_full": (plain, parent.train_set)}
    costs = train.step_costs(args, pair, device, 1 if args.dry_run else 5)
    del full, plain, pair  # they take as much memory as the network
    if args.minutes and not last:
        an_epoch = costs[""]["step_ms"] / 1000 * train.total_steps(args, train_set) / args.epochs
        views = len(train_set) * train_set.seconds_a_view() if args.cache_features else 0  # one of each image
        seconds = 60 * args.minutes
        args.epochs = max(1, int(max(seconds / (an_epoch + views), (seconds - args.cache_features * views) / an_epoch)))
    base = {"id": checkpoint["id"], "hash": models.fingerprint(checkpoint["state_dict"])}
    write = train.saver(
        args, command, data=info.to_dict(), pretrained=checkpoint["pretrained"], compression=checkpoint["compression"],
        lineage=[*checkpoint["lineage"], train.ancestor(checkpoint)],
    )  # fmt: skip

    def save(path, metrics, training=None):
        """A plain network, merged. What was trained is in last.pt, for --resume, or else in adapter.pt."""
        state, about = patch.state(), {"args": {"data_root": train.plain(args.data_root)}, "data": info.to_dict()}
        if training:
            training = training | {"adapter": state}
        else:
            about |= dict(base=base, build=model.build, options=patch.options, numbers=patch.numbers, metrics=metrics)
            models.write_tensors(parent.out / "adapter.pt", {"adapter": 1, "state": state, **about})
        write(path, model, metrics=metrics, training=training, state_dict=merged_state(model))

    if last:
        models.copy_tensors(patch.state(), last["training"].get("adapter", {}), "adapter's tensors")
    done = train.fit_by_flags(
        args, objective, train_set, parent.val_set, script="lora.py", device=device, save=save, last=last,
        factors=[(args.lr_ratio, ".lora_B")],
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


def print_names(what, names):
    """A line of names, those that differ by a number alone counted together; of the first process, if there are any."""
    like = collections.Counter(re.sub(r"(?<=\.)\d+", "*", name) for name in names)
    if names and train.rank_and_world()[0] == 0:
        print(f"{what}:", ", ".join(f"{name} ({count})" for name, count in like.items()))


def trunk(args, model, full, train_set, device, trained):
    """(encode of the objective, None for the network's own; the training set) by --trunk and --cache-features.

    full: the network before it was adapted. trained: names of the layers and tensors of `model` that learn. Raises
    ModelError where the backbone learns so much that a flag has nothing to do.
    """
    encode, learning = None, [name for name in trained if name.startswith("backbone.")]
    if args.cache_features and learning:
        raise ModelError("--cache-features: features change as the backbone learns; it is for --method classifier, "
                         "head and lora-head")  # fmt: skip
    if args.trunk == "int8":
        encode = quantize.int8_encoder(full, train.calibration_images(args, device, 16), model, learning)
        print_names("in int8", list(encode.args[1]) or ["backbone"])
    if not args.cache_features:
        return encode, train_set
    args.workers, kept = 0, evaluate.AMP_DTYPES[args.amp] or torch.float32  # what is kept is in this process
    views = datasets.FeatureViews(train_set, args.cache_features, encode or model.encode, device=device, dtype=kept)
    return (lambda numbers: views.encode(numbers)), views  # a function is not copied by who copies the objective


def report(args, command, parent, more, device, start):
    """Score both networks on both data sets, and see that the base is as it was -> what results.json holds."""
    path, info, image = parent.out / "best.pt", parent.val_set.info, parent.val_set[0][0][None].to(device)
    (best, checkpoint), base, source = models.load_checkpoint(path, device=device), parent.model, None
    adapter, undo = models.load_adapter(base, parent.checkpoint, parent.out / "adapter.pt")
    with torch.inference_mode():
        difference = (base(image) - best(image)).abs().max().item()
    undo()
    began = time.perf_counter()
    attach(base, adapter).undo()
    more |= {"merge_difference": difference, "swap_ms": 1000 * (time.perf_counter() - began)}
    if models.fingerprint(base.state_dict()) != adapter["base"]["hash"]:
        raise ModelError("the base is not what it was: something wrote to its tensors")
    try:
        few = 2 if args.dry_run else None
        source = evaluate.open_scored(parent.checkpoint, weights=args.weights, length=few)
    except (datasets.DataError, OSError) as error:
        print(f"not scored on its own data: {models.one_line(error)}")

    def score(model, dataset):
        if model is best and dataset is parent.val_set:
            return evaluate.score(model, dataset, device=device, out=parent.out, workers=args.workers)
        classes = (checkpoint if model is best else parent.checkpoint)["data"]["classes"]
        if dataset is None or list(dataset.info.classes) != list(classes):
            return dict.fromkeys(("miou", "macc", "aacc"))
        return evaluate.evaluate(
            model, datasets.eval_loader(dataset), num_classes=len(classes), ignore_index=dataset.info.ignore_index,
            device=device, boundary=False, progress=True, reduce=False,
        )  # fmt: skip

    sets = {f"{parent.checkpoint['data']['name']} (source)": source, f"{info.name} (target)": parent.val_set}
    networks = {"base": base, "adapted": best}
    scores = {f"{who}, {where}": score(networks[who], sets[where]) for who in networks for where in sets}
    stages = {name: evaluate.Stage(metrics) for name, metrics in scores.items()}
    (first, before), (_, target), (_, after), (final, now) = scores.items()
    stages[first] = evaluate.Stage(before, base, parent.checkpoint, Path(args.weights), parent.checkpoint["command"])
    stages[final] = evaluate.Stage(now, best, checkpoint, path, command)
    more |= {"source_miou_before": before["miou"], "source_miou_after": after["miou"]}
    more |= {"target_miou_before": target["miou"], "adapter_mb": (parent.out / "adapter.pt").stat().st_size / 1e6}
    shared = dict(out=parent.out, seconds=time.perf_counter() - start, device=device, dry_run=args.dry_run)
    done = evaluate.before_after(stages, image, more=more, **shared)
    print("{trainable_params:,} parameters trained, {trained_percent:.2f}%; a step {step_ms:.0f} ms, of full tuning "
          "{step_ms_full:.0f}; merged and not, logits differ by {merge_difference:.1g}".format(**more))  # fmt: skip
    print(f"{path}; adapter.pt ({more['adapter_mb']:.2f} MB), results.json and figures beside it")
    return done


COLUMNS = ("method", "epochs", "minutes", "miou", "source_miou_after", "trainable_params", "trained_percent",
           "adapter_mb", "step_ms", "step_memory_mb")  # fmt: skip


def compare(rows, out):
    """A table and methods.png of a run of each method -> what results.json holds: the last, and all as `methods`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axis = figure.subplots()
    for row in rows:
        axis.plot(row["trainable_params"], row["miou"], "o")
        axis.annotate(f" {row['method']}", (row["trainable_params"], row["miou"]), va="bottom")
    if rows[0]["target_miou_before"] is not None:
        axis.axhline(rows[0]["target_miou_before"], color="black", linestyle="--", linewidth=1, label="not adapted")
        axis.legend()
    axis.set(xscale="log", xlabel="parameters trained", ylabel="mIoU (%)")
    axis.margins(0.15)  # for the names
    axis.grid(alpha=0.3)
    evaluate.save_figure(figure, out / "methods.png")
    done = rows[-1] | {"methods": [{key: row[key] for key in COLUMNS} for row in rows]}
    evaluate.write_json(out / "results.json", done)
    evaluate.print_table(done["methods"])
    return done


if __name__ == "__main__":
    import lora

    evaluate.run_cli(lora.main)  # the module that load_adapter() imports
