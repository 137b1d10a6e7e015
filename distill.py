"""Distil a teacher into a smaller or faster student, beside a control that learns from the labels alone.

    python distill.py --mode feature                             # 3 of the 12 layers of checkpoints/train/best.pt
    python distill.py --mode response --model enet               # any network of models.py learns from any other
    python distill.py --mode response+dist --student checkpoints/prune/best.pt
    python distill.py --mode response --seeds 3 --minutes 10     # equal minutes, the teacher's cost included

A student learns from the labels and from the terms of --mode, each with a weight of its own (see WEIGHTS):

    none      nothing else: what the control is
    response  the teacher's softened class probabilities (Hinton et al. 2015), by default at temperature 2
    feature   of two DINOv2s: attention-based layer projection (Passban et al. 2021), where each token of each layer
              follows a mix of that token in all layers of the teacher, and response; of other networks: the direction
              of the teacher's feature vectors, after a 1x1 convolution to its width
    cwd       where each class is (channel-wise distillation, Shu et al. 2021)
    dist      how classes and pixels correlate (DIST, Huang et al. 2022)
    mgd       the teacher's deepest features, generated from the student's with three quarters of the places hidden
              (masked generative distillation, Yang et al. 2022)

The teacher sees the crop that the student sees (Beyer et al. 2022), in eval mode and without gradients; it may be
quantized, which makes it several times cheaper. Logits are compared before they are resized to the image, at the places
of the coarser network, which is how cwd and dist were published and costs a fraction. Projections are trained beside
the student and are not part of it: its checkpoint is a plain one, whose lineage names the teacher.

The control has the same start, steps, augmentation and seed. With --minutes a few steps of both are timed first, and
each gets as many epochs as fit. What the report prints as a gain is against that control, never against the start.

Writes to --out (default checkpoints/distill-MODE): best.pt, last.pt, history.csv with every term, results.json, the
figures terms, curves, confusion, class_iou, examples and, of two DINOv2s, layers (which layer of the teacher a layer of
the student follows); the control and the other --seeds stand in folders inside.
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
import statistics
import time
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

import datasets
import evaluate
import losses
import models
import train
from models import ModelError

# ---- teacher --------------------------------------------------------------------------------------------------------


class Answer(NamedTuple):
    """What a teacher says of images: logits (N, K, h, w) of the image padded to `covers` (rows, columns), feature maps,
    tokens (N, T, C) by layer; of an int8 network the latter two are computed when they are read as floats."""

    logits: torch.Tensor
    covers: tuple
    features: list
    states: tuple


class Teacher(nn.Module):
    """One network or several in eval mode, asked without gradients, in the form of a network of stride 1.

    Of several, or with `flip`, which also shows each the mirrored image, the softmax is averaged at the images' size;
    features and tokens are those of the first.
    """

    stride = 1

    def __init__(self, networks, *, flip=False):
        super().__init__()
        self.networks, self.flip = nn.ModuleList(networks).eval().requires_grad_(False), flip
        self.own_precision = any(hasattr(network, "points") for network in networks)  # int8 wants no autocast around it

    def train(self, mode=True):
        return super().train(False)

    @torch.no_grad()
    def answer(self, images, *, states=False):
        with torch.autocast(images.device.type, enabled=False) if self.own_precision else contextlib.nullcontext():
            return self._answer(images, states)

    def _answer(self, images, states):
        first, size = self.networks[0], images.shape[-2:]
        encoded = first.encode(images, **({"states": True} if states else {}))
        features, tokens = encoded if states else (encoded, ())
        logits = first.decode(features).float().contiguous()
        if len(self.networks) == 1 and not self.flip:
            return Answer(logits, first.padded(size), features, tokens)
        logits = [first.resize(logits, size), *(network(images).float() for network in self.networks[1:])]
        if self.flip:
            logits += [network(images.flip(-1)).float().flip(-1) for network in self.networks]
        mean = torch.stack([x.softmax(1) for x in logits]).mean(0)
        return Answer(mean.clamp(min=1e-12).log(), size, features, tokens)

    def encode(self, images):
        return [images]

    def decode(self, features):
        size = features[0].shape[-2:]
        logits, covers, *_ = self.answer(features[0])
        return models.enlarge(logits, covers)[..., : size[0], : size[1]]


# ---- objective ------------------------------------------------------------------------------------------------------

# weight of each term of the loss; where several modes are joined, the least of the labels and the most of the others
WEIGHTS = {
    "none": {"ce": 1.0},
    "response": {"ce": 0.5, "kl": 0.5},
    "feature, tokens": {"ce": 0.5, "kl": 0.25, "alp": 0.25},
    "feature, maps": {"ce": 1.0, "cosine": 0.1, "cosine_last": 0.5},
    "cwd": {"ce": 1.0, "cwd": 3.0},
    "dist": {"ce": 1.0, "dist": 1.0},
    "mgd": {"ce": 1.0, "mgd": 0.5},
}
MODES = ("none", "response", "feature", "cwd", "dist", "mgd")
TERMS = {
    "ce": "the loss of the labels", "kl": "response", "alp": "feature, of two DINOv2s: layer projection",
    "cosine": "feature, of others: all maps but the deepest", "cosine_last": "feature, of others: the deepest map",
    "cwd": "cwd", "dist": "dist", "mgd": "mgd",
}  # fmt: skip


def term_weights(modes, tokens, given):
    """{term: weight} of the joined modes; tokens: whether both networks are DINOv2s; given: {term: weight or None}."""
    weights = {}
    for mode in modes:
        for term, weight in WEIGHTS[
            mode if mode != "feature" else f"feature, {'tokens' if tokens else 'maps'}"
        ].items():
            better = min if term == "ce" else max
            weights[term] = better(weight, weights.get(term, weight))
    weights |= {term: weight for term, weight in given.items() if weight is not None}
    return {term: weight for term, weight in weights.items() if weight}


def has_tokens(model):
    return isinstance(model.backbone, models.Dinov2)


class Generator(nn.Sequential):
    """The student's deepest map (N, C, h, w) with a share of its places at 0 -> what the teacher's may be."""

    def __init__(self, channels, wide, hidden=0.75):
        super().__init__(
            nn.Conv2d(channels, wide, 1), nn.Conv2d(wide, wide, 3, padding=1), nn.ReLU(inplace=True),
            nn.Conv2d(wide, wide, 3, padding=1),
        )  # fmt: skip
        self.hidden = hidden

    def forward(self, x):
        x = self[0](x)
        shown = torch.rand(len(x), 1, *x.shape[2:], device=x.device) >= self.hidden
        return self[3](self[2](self[1](x * shown)))


def widen(own, wanted, layer):
    """A 1x1 layer from `own` channels to `wanted`, nothing where they are equal."""
    return nn.Identity() if own == wanted else layer(own, wanted)


class Distiller(train.Objective):
    """Student, teacher and the weighted terms of the loss, in place of train.Objective.

    The layers that project the student's features to the teacher's width are part of it, not of the student. attention:
    that of losses.projection_distillation(), of the last batch.
    """

    def __init__(self, model, loss, teacher, weights, *, aux_weight, ignore_index, temperature, boundary):
        super().__init__(model, loss, aux_weight, ignore_index)
        self.weights, self.temperature, self.boundary = weights, temperature, boundary
        self.asked, self.attention = (teacher,), None  # in a tuple: its weights are neither trained nor kept
        self.register_buffer("sums", torch.zeros(len(weights) + 1))
        first, extra = teacher.networks[0], {}
        taps = min(len(model.channels), len(first.channels))
        own, wanted = model.channels[-taps:], first.channels[-taps:]
        if "alp" in weights:
            if not (has_tokens(model) and has_tokens(first)):
                raise ModelError("--alp is of two DINOv2s, whose tokens have the same places: leave it out")
            extra["tokens"] = widen(own[-1], wanted[-1], nn.Linear)
        if {"cosine", "cosine_last"} & weights.keys():
            conv = functools.partial(nn.Conv2d, kernel_size=1)
            extra["maps"] = nn.ModuleList(widen(a, b, conv) for a, b in zip(own, wanted, strict=True))
        if "mgd" in weights:
            extra["generator"] = Generator(own[-1], wanted[-1])
        self.extra = nn.ModuleDict(extra)

    def forward(self, images, target):
        states = "alp" in self.weights
        answer = self.asked[0].answer(images, states=states)
        encoded = self.model.encode(images, **({"states": True} if states else {}))
        features, tokens = encoded if states else (encoded, ())
        terms = {}
        terms["ce"], _, logits = self.supervised(features, target)
        terms |= self.of_logits(logits, target, answer)
        terms |= self.of_maps(features, target, answer.features)
        if states:
            terms["alp"] = self.of_tokens(tokens, target, answer.states)
        terms = [weight * terms[term] for term, weight in self.weights.items()]
        with torch.no_grad():
            self.sums += torch.stack([*terms, torch.ones_like(terms[0])]).detach()
        return sum(terms)

    def of_logits(self, logits, target, answer):
        """The terms of logits, before they are resized to the image: at the places of the coarser of both networks."""
        both = [(logits, self.model.padded(target.shape[-2:])), (answer.logits, answer.covers)]
        size, covers = min(((x.shape[-2:], area) for x, area in both), key=lambda grid: math.prod(grid[0]))
        logits, wanted = (losses.on_grid(x, area, size, covers) for x, area in both)
        target = losses.labels_on_grid(target, size, covers, self.ignore_index)
        shared = dict(teacher=wanted, ignore_index=self.ignore_index)
        weight = getattr(self.loss, "weight", None)  # of the classes: as in the loss of the labels
        softened = shared | dict(temperature=self.temperature, weight=weight)
        if self.boundary:
            width = max(1, round(self.boundary["boundary_width"] * size[0] / covers[0]))
            softened |= self.boundary | {"boundary_width": width}
        known = {
            "kl": functools.partial(losses.distillation, **softened),
            "cwd": functools.partial(losses.channel_distillation, **shared),
            "dist": functools.partial(losses.relation_distillation, **shared),
        }
        return {term: loss(logits, target) for term, loss in known.items() if term in self.weights}

    def of_maps(self, features, target, wanted):
        """The terms of feature maps, at the places of the teacher's, from the deepest on."""
        if not {"cosine", "cosine_last", "mgd"} & self.weights.keys():
            return {}
        size, first, terms = target.shape[-2:], self.asked[0].networks[0], {}
        covers, theirs = self.model.padded(size), first.padded(size)

        def compare(loss, mine, other):
            other = other.float()
            valid = losses.places(target, other.shape[-2:], theirs, self.ignore_index)
            return loss(losses.on_grid(mine, covers, other.shape[-2:], theirs), other, valid)

        if "maps" in self.extra:
            count = len(self.extra["maps"])
            rows = zip(self.extra["maps"], features[-count:], wanted[-count:], strict=True)
            *others, terms["cosine_last"] = (compare(losses.cosine_distillation, f(x), y) for f, x, y in rows)
            terms["cosine"] = sum(others) / len(others) if others else 0 * terms["cosine_last"]
        if "generator" in self.extra:
            terms["mgd"] = compare(losses.generation_distillation, self.extra["generator"](features[-1]), wanted[-1])
        return terms

    def of_tokens(self, tokens, target, wanted):
        """Layer projection of the patch tokens of each layer of the student to all layers of the teacher."""
        covers = self.model.padded(target.shape[-2:])
        grid = [n // self.model.stride for n in covers]
        count = grid[0] * grid[1]
        own = torch.stack([self.extra["tokens"](t[:, -count:]) for t in tokens[1:]])  # the embedding is no layer
        valid = losses.places(target, grid, covers, self.ignore_index).flatten(1)
        loss, self.attention = losses.projection_distillation(
            own, torch.stack([t.float()[:, -count:] for t in wanted]), valid
        )
        return loss

    def report(self):
        *sums, count = self.sums.tolist()
        self.sums.zero_()
        return {term: x / max(1.0, count) for term, x in zip(self.weights, sums, strict=True)}


# ---- student --------------------------------------------------------------------------------------------------------


def make_student(args, parent):
    """(student, the checkpoint whose weights it starts from or None), as the flags say."""
    teacher, classes = parent.model, parent.val_set.info.classes
    if args.student:
        model, checkpoint = models.load_checkpoint(args.student)
        if hasattr(model, "points"):
            raise ModelError(f"--student {args.student} is quantized: distil the float network, then quantize that")
        theirs = list(checkpoint["data"]["classes"])
        if theirs != list(classes):
            raise ModelError(f"--student {args.student} has the classes {', '.join(theirs)}; "
                             f"the teacher has {', '.join(classes)}")  # fmt: skip
        if args.init == "teacher":
            raise ModelError("--init teacher: a --student has weights of its own; leave one of them out")
        return model.requires_grad_(True), checkpoint
    one, like = copy.copy(args), not (args.model or args.backbone or args.head)
    if like:  # the teacher's network, but for what the flags say, and of a DINOv2 the layers
        build = teacher.build | ({"layers": 3} if has_tokens(teacher) else {}) | {"freeze_backbone": False}
        vars(one).update({k: v for k, v in build.items() if k in vars(one) and is_default(k, vars(one)[k])})
    init = args.init or ("teacher" if like and has_tokens(teacher) else "scratch")
    if init == "teacher":
        one.pretrained = "no"
    model = train.make_network(one, len(classes), None)
    if init == "teacher":
        model.pretrained = parent.checkpoint["pretrained"] == "yes"
        print(f"the student starts from the teacher: {start_from(model, teacher, args.init_layers)}")
    return model, parent.checkpoint if init == "teacher" else None


def is_default(flag, value):
    return value == make_parser().get_default(flag)


def start_from(student, teacher, which):
    """Copy the teacher's tensors of the same name and shape, of its lower or of evenly spaced layers; says which.

    Raises ModelError where no tensor of the backbone fits.
    """
    layers, count = [], 0
    if has_tokens(student) and has_tokens(teacher):
        layers, count = student.backbone.body.encoder.layer, len(teacher.backbone.body.encoder.layer)
    own = len(layers)
    chosen = [i if which == "lower" else (i + 1) * count // own - 1 for i in range(own)]
    theirs, state = teacher.state_dict(), student.state_dict()

    def source(name):
        return re.sub(r"(?<=encoder\.layer\.)\d+", lambda found: str(chosen[int(found[0])]), name) if own else name

    found = {name: theirs.get(source(name)) for name in state}
    fitting = {name: x for name, x in found.items() if x is not None and x.shape == state[name].shape}
    if not any(name.startswith("backbone.") and name.endswith("weight") for name in fitting):
        raise ModelError("--init teacher: no tensor of the teacher's backbone fits the student's; give --init scratch")
    student.load_state_dict(fitting, strict=False)
    text = f"{len(fitting)} of {len(state)} tensors"
    return f"{text}, layers {', '.join(str(i + 1) for i in chosen)} of {count}" if own else text


# ---- command line ---------------------------------------------------------------------------------------------------

FIXED_FLAGS = ("weights", "teachers", "mode", "student", "init", "init_layers", "teacher_flip", "seeds", "minutes",
               "control", *(f"{term}_weight" for term in TERMS))  # fmt: skip


def modes_of(text):
    """--mode: names joined by +."""
    modes = text.split("+")
    wrong = [mode for mode in modes if mode not in MODES]
    if wrong or len(set(modes)) < len(modes):
        raise argparse.ArgumentTypeError(f"{text!r}: choose one of {', '.join(MODES)}, or several joined by +")
    return text


def make_parser():
    parser = datasets.Parser(__doc__)
    group = parser.add_argument_group("distillation")
    add, yes_no = group.add_argument, argparse.BooleanOptionalAction
    add("--weights", default="checkpoints/train/best.pt", help="checkpoint of the teacher, quantized or not")
    add("--teachers", nargs="+", default=[], metavar="PATH", help="further teachers: their softmax is averaged")
    add("--teacher-flip", action="store_true", help="the teacher also looks at each image mirrored")
    add("--mode", type=modes_of, default="response", help=f"{', '.join(MODES)}, or several joined by +")
    add("--temperature", type=datasets.positive_float, default=2.0, help="of response")
    add("--boundary-kl", type=datasets.not_negative, default=0.0, metavar="W",
        help="response: label boundaries, --boundary-width wide, count W times beside the rest")  # fmt: skip
    for term, what in TERMS.items():
        flag = f"--{term.replace('_', '-')}-weight"
        add(flag, type=datasets.not_negative, metavar="W", help=f"weight of that term ({what}); left out: by --mode")
    add("--student", metavar="PATH", help="checkpoint to go on from, e.g. of a pruned network")
    add("--init", choices=("teacher", "scratch"), help="left out: the teacher's weights for some of its layers")
    add("--init-layers", choices=("lower", "even"), default="lower", help="which of the teacher's layers these are")
    add("--control", action=yes_no, default=True, help="also train a student without distillation")
    add("--seeds", type=datasets.positive_int, default=1, metavar="N", help="train student and control N times")
    add("--minutes", type=datasets.positive_float, help="for each training, in place of --epochs")
    parser.add_argument("--out", help="folder to write to; left out: checkpoints/distill-MODE")
    parser.add_argument("--resume", action="store_true", help="go on from OUT/last.pt, with its flags")
    datasets.add_data_args(parser)
    train.add_model_args(parser)
    train.add_train_args(parser)
    parser.set_defaults(epochs=4)  # in place of train.py's
    network = parser.flags("network")
    for flags, where, test in (
        ("--temperature --boundary-kl", "--mode response", lambda args: args.kl_weight or "response" in args.mode),
        ("--control", "a teacher, not of --mode none", lambda args: args.mode != "none"),
        (network, "a new student: --student brings its network", lambda args: not args.student),
        ("--init-layers", "--init teacher", lambda args: not args.student and args.init != "scratch"),
        ("--epochs", "runs without --minutes", lambda args: not args.minutes),
    ):
        parser.only(flags, where, test)
    return parser


@evaluate.releasing
def main(argv=None):
    """Run the command line; returns what results.json holds."""
    start = time.perf_counter()
    command = evaluate.command_line("distill.py", argv)
    args, last = train.parse(
        make_parser(), argv, script="distill.py", name=lambda given: f"distill-{given.get('mode', 'response')}",
        inherits=("data", "loss"), fixed=(*FIXED_FLAGS, *train.NETWORK_FLAGS),
    )  # fmt: skip
    with train.process_group(train.start(args)) as device:
        return run(args, last, command, device, start)


def run(args, last, command, device, start):
    """Score the teacher, train students and controls, report; see main(). last: the last.pt to go on from."""
    parent = train.open_parent(args, device)
    others = [open_teacher(path, parent, device) for path in args.teachers]
    teacher = Teacher([parent.model, *others], flip=args.teacher_flip).to(device)
    rank, _ = train.rank_and_world()
    before = train.score(parent.model if len(teacher.networks) == 1 and not teacher.flip else teacher, parent, device)
    if rank == 0:
        print(f"teacher: {before['miou']:.2f} mIoU on the {len(parent.val_set)} images of val")
    kinds = ("student", "control") if args.control and args.mode != "none" else ("student",)
    args.run_epochs = dict.fromkeys(kinds, args.epochs)
    if args.minutes:
        args.run_epochs = last["args"].get("run_epochs") if last else epochs_in(args, kinds, teacher, parent, device)
        if not isinstance(args.run_epochs, dict) or any(type(args.run_epochs.get(kind)) is not int for kind in kinds):
            raise ModelError(f"{parent.out / 'last.pt'} does not say how many epochs were to fit into --minutes")
    runs = {kind: [] for kind in kinds}
    for turn in range(args.seeds):
        for kind in kinds:
            one = copy.copy(args)
            one.seed, one.epochs = args.seed + turn, args.run_epochs[kind]
            one.out = str(parent.out / (f"seed-{one.seed}" if turn else "") / ("control" if kind == "control" else ""))
            done = train_one(one, kind, command, teacher, parent, before, device, resumed=last is not None)
            if done["stopped"]:
                return {"stopped": done["stopped"], "step": done["step"]}
            runs[kind].append(done)
    return {} if rank else report(args, command, teacher, parent, before, runs, device, start)


def open_teacher(path, parent, device):
    model, checkpoint = models.load_checkpoint(path, device=device)
    ours, theirs = (list(c["data"]["classes"]) for c in (parent.checkpoint, checkpoint))
    if ours != theirs:
        raise ModelError(f"--teachers {path} has the classes {', '.join(theirs)}; --weights has {', '.join(ours)}")
    return model.to(memory_format=torch.channels_last)


def make_run(args, kind, teacher, parent, device, last=None):
    """(objective, checkpoint that it starts from or None) of a student or control; last: its last.pt to go on from."""
    train.set_seed(args.seed, deterministic=args.deterministic)
    model, source = make_student(args, parent)
    if last:
        models.copy_tensors(model.state_dict(), last["state_dict"], "weights")
    model = model.to(device, memory_format=torch.channels_last)
    tokens = has_tokens(model) and has_tokens(teacher.networks[0])
    given = {term: getattr(args, f"{term}_weight") for term in TERMS}
    weights = term_weights(args.mode.split("+"), tokens, given)
    if kind == "control" or set(weights) <= {"ce"}:
        return train.make_objective(args, model, parent.train_set, Path(args.out), device), source
    if hasattr(model.head, "queries"):
        name = models.model_name(model.build)
        raise ModelError(f"{name} has a loss of its own, on masks: it can teach, but not be taught")
    boundary = dict(boundary_weight=args.boundary_kl, boundary_width=args.boundary_width)
    loss = train.make_loss(args, model, parent.train_set, Path(args.out))
    torch.manual_seed(args.seed)  # whatever was drawn before, the projections start alike
    objective = Distiller(
        model, loss, teacher, weights, aux_weight=args.aux_weight, ignore_index=parent.train_set.info.ignore_index,
        temperature=args.temperature, boundary=boundary,
    )  # fmt: skip
    return objective.to(device), source


def epochs_in(args, kinds, teacher, parent, device):
    """{kind: epochs that fit into --minutes}, by the median of a few steps, student and control in turns."""
    objectives = {kind: (make_run(args, kind, teacher, parent, device)[0], parent.train_set) for kind in kinds}
    step = {kind: cost["step_ms"] for kind, cost in train.step_costs(args, objectives, device).items()}
    an_epoch = train.total_steps(args, parent.train_set) // args.epochs
    epochs = {kind: max(1, round(60e3 * args.minutes / (an_epoch * ms))) for kind, ms in step.items()}
    for kind in kinds:
        print(f"{kind}: {step[kind]:.0f} ms a step, {epochs[kind]} epochs in {args.minutes:g} minutes")
    return epochs


def train_one(args, kind, command, teacher, parent, before, device, *, resumed):
    """One training -> what fit_by_flags() returns, and its objective, folder and epochs."""
    out = Path(args.out)
    last = train.read_last(out / "last.pt", "distill.py") if resumed and (out / "last.pt").is_file() else None
    if last and last["run"] != args.run:
        raise ModelError(f"{out / 'last.pt'} is of another run than {args.out}: remove it")
    objective, source = make_run(args, kind, teacher, parent, device, last)
    line = [*source["lineage"], train.ancestor(source)] if source else []
    if kind == "student" and source is not parent.checkpoint:
        line += [*parent.checkpoint["lineage"], train.ancestor(parent.checkpoint, before["miou"])]
    steps = source["compression"] if args.student else []
    pretrained = source["pretrained"] if source else "yes" if objective.model.pretrained else "no"
    save = train.saver(
        args, command, data=parent.checkpoint["data"], pretrained=pretrained, lineage=line, compression=steps
    )
    if train.rank_and_world()[0] == 0:
        terms = ", ".join(f"{k} {v:g}" for k, v in getattr(objective, "weights", {"ce": 1.0}).items())
        print(f"{kind}: {models.model_name(objective.model.build)}, seed {args.seed}, {args.epochs} epochs; {terms}")
    zeros = any(step["step"] == "prune" and step["kind"] == "weights" for step in steps)
    weights = {name: p for name, p in objective.model.named_parameters() if p.ndim > 1}
    done = train.fit_by_flags(
        args, objective, parent.train_set, parent.val_set, script="distill.py", device=device, last=last,
        save=functools.partial(save, network=objective.model), after_step=train.keep_zeros(weights) if zeros else None,
    )  # fmt: skip
    return done | {"objective": objective, "out": out, "epochs": args.epochs}


def report(args, command, teacher, parent, before, runs, device, start):
    """Score what was trained, print it beside the teacher and what it gained -> what results.json holds."""
    stages = {"teacher": evaluate.Stage(
        before, parent.model, parent.checkpoint, Path(args.weights), parent.checkpoint["command"]
    )}  # fmt: skip
    mious = {kind: [] for kind in runs}
    for kind in sorted(runs):  # the control first: what was made comes last
        for turn, done in enumerate(runs[kind]):
            path = done["out"] / "best.pt"
            model, checkpoint = models.load_checkpoint(path, device=device)
            metrics = evaluate.score(model, parent.val_set, device=device, out=done["out"], workers=args.workers)
            mious[kind].append(metrics["miou"])
            if turn == 0:
                model = model.to(memory_format=torch.channels_last)
                stages[kind] = evaluate.Stage(metrics, model, checkpoint, path, command)
    first, image = runs["student"][0], parent.val_set[0][0][None].to(device)
    draw_terms(first, runs.get("control", [None])[0], before["miou"], parent.out / "terms.png")
    if getattr(first["objective"], "attention", None) is not None:
        draw_layers(attention_of(first["objective"], parent, device), parent.out / "layers.png")
    paired = [s - c for s, c in zip(mious["student"], mious["control"], strict=True)] if "control" in runs else []
    more = {
        "mode": args.mode, "terms": getattr(first["objective"], "weights", {"ce": 1.0}),
        "miou_teacher": before["miou"], "miou_student": mious["student"], "miou_control": mious.get("control"),
        "gain": statistics.mean(paired) if paired else None, "gain_standard_error": standard_error(paired),
        "epochs": {kind: done[0]["epochs"] for kind, done in runs.items()},
        "training_seconds": {kind: [done["seconds"] for done in each] for kind, each in runs.items()},
    }  # fmt: skip
    seconds = time.perf_counter() - start
    shared = dict(out=parent.out, seconds=seconds, device=device, dry_run=args.dry_run)
    done = evaluate.before_after(stages, image, more=more, **shared)
    for kind, values in mious.items():
        minutes = statistics.mean(more["training_seconds"][kind]) / 60
        print(f"{kind}: {spread(values)} mIoU, {minutes:.1f} minutes of training")
    if paired:
        error = more["gain_standard_error"]
        known = f"standard error {error:.2f}" if error is not None else "of one seed; --seeds 3 says how sure that is"
        gap = before["miou"] - statistics.mean(mious["control"])
        longer = sum(more["training_seconds"]["student"]) / sum(more["training_seconds"]["control"])
        equal = "minutes" if args.minutes else f"steps, in {longer:.1f} times the time: --minutes gives both the same"
        print(f"gain by distillation: {more['gain']:+.2f} ({known}) in equal {equal}")
        print(f"the teacher is {gap:+.2f} from the control")
    print(f"{done['latency_ms'] / done['latency_ms_before']:.3f} of the teacher's latency; "
          f"{parent.out / 'best.pt'}; results.json and figures beside it")  # fmt: skip
    return done


def standard_error(values):
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None


def spread(values):
    """Mean and, of several, standard deviation as text."""
    mean = f"{statistics.mean(values):.2f}"
    return f"{mean} +- {statistics.stdev(values):.2f} ({len(values)} seeds)" if len(values) > 1 else mean


def draw_terms(student, control, teacher_miou, path):
    """The weighted terms of the loss over the epochs, and the mIoU of student and control beside the teacher's."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    epochs = [row["epoch"] for row in student["history"]]
    for term in getattr(student["objective"], "weights", ["loss"]):
        left.plot(epochs, [row[term] for row in student["history"]], marker="o", ms=3, label=term)
    left.set(xlabel="epoch", ylabel="share of the loss", ylim=(0, None))
    for name, done in (("student", student), ("control", control)):
        rows = [row for row in done["history"] if "miou" in row] if done else []
        if rows:
            right.plot([row["epoch"] for row in rows], [row["miou"] for row in rows], marker="o", ms=3, label=name)
    right.axhline(teacher_miou, color="black", linestyle="--", linewidth=1, label="teacher")
    right.set(xlabel="epoch", ylabel="mIoU (%)")
    for axis in (left, right):
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
        axis.legend()
    evaluate.save_figure(figure, path)


@torch.no_grad()
def attention_of(objective, parent, device, count=8):
    """(S, L): how much each layer of the student attends to each of the teacher's, on some validation images."""
    objective.eval()
    found = []
    for i in range(min(count, len(parent.val_set))):
        image, target = parent.val_set[i * len(parent.val_set) // count if len(parent.val_set) > count else i]
        if target.shape == image.shape[-2:]:
            objective(image[None].to(device), target[None].to(device))
            found.append(objective.attention)
    return torch.stack(found or [objective.attention]).mean(0).cpu()


def draw_layers(attention, path):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 1.5 + 0.35 * len(attention)), layout="constrained")
    axis = figure.subplots()
    image = axis.imshow(attention.numpy(), vmin=0, aspect="auto", cmap="viridis")
    axis.set(xlabel="layer of the teacher (0: the embedding)", ylabel="layer of the student")
    axis.set_xticks(range(attention.shape[1]))
    axis.set_yticks(range(len(attention)), [str(i + 1) for i in range(len(attention))])
    figure.colorbar(image, label="attention")
    evaluate.save_figure(figure, path)


if __name__ == "__main__":
    evaluate.run_cli(main)
