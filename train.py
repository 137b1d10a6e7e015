"""Train a segmentation network.

    python train.py --head fpn                                   # DINOv2-small + FPN on drawn street scenes
    python train.py --dataset camvid --data-root PATH --backbone resnet18 --head unet --epochs 100
    python train.py --resume                                     # go on where checkpoints/train/last.pt stopped
    torchrun --nproc-per-node 2 train.py --head fpn              # several processes on one machine

Every random choice is a function of the seed and the step: the batch, the augmentation of each sample, the learning
rate. So a run that was stopped and resumed ends in the same bits as one that was not, with any number of workers.
Ctrl-C, SIGTERM and a terminal that closes stop it with its state saved, with status 130, 143 and 129; the second of
them ends it at once.

Writes to --out (default checkpoints/train): best.pt (best mIoU; the EMA's weights with --ema), last.pt (everything
--resume needs), history.csv, results.json, and the figures curves, class_distribution, confusion, class_iou, examples.
What an earlier run left there is first moved to kept-1, kept-2, ... within it.
"""

if __name__ == "__main__":  # the imports take seconds: Ctrl-C ends them without a traceback
    import signal

    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import contextlib
import copy
import datetime
import functools
import inspect
import itertools
import math
import os
import shlex
import shutil
import signal
import statistics
import sys
import time
import uuid
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import datasets
import evaluate
import losses
import models
from datasets import count, not_negative, positive_int, probability, seed_number, share_below_1, thread_count, whole
from evaluate import write_csv
from models import ModelError

OPTIMIZERS = ("adamw", "adam", "sgd")
DEFAULT_LOSS = "ce"
ADVICE = "Try a lower --lr, --clip 1, --warmup, or --amp off"  # where training diverges
SCHEDULES = ("poly", "restarts", "cosine", "plateau", "constant")


class TrainingError(ModelError):
    """Training cannot go on; the message says at which step and what to do."""


# ---- objective ------------------------------------------------------------------------------------------------------


class Objective(nn.Module):
    """Network and loss in one module, which DistributedDataParallel can wrap whole.

    (images (N, 3, H, W), target (N, H, W)) -> scalar loss: that of the logits, resized in float32 to the target's
    size, plus aux_weight times that of each auxiliary output, plus kl times losses.distillation() from a teacher, a
    network in eval mode, at `temperature`. `loss` None: the set loss of a network that has queries, which takes no
    teacher. encode: what gives the features, in place of the network's own encode().
    """

    def __init__(
        self, model, loss, aux_weight=0.4, ignore_index=255, *, teacher=None, kl=0.0, temperature=1.0, encode=None
    ):
        super().__init__()
        self.encode = encode or model.encode
        self.model, self.loss, self.aux_weight, self.ignore_index = model, loss, aux_weight, ignore_index
        self.teacher = (teacher,) if kl else None  # in a tuple: its weights are neither trained nor kept
        self.kl, self.temperature = kl, temperature

    def forward(self, images, target):
        features = self.encode(images)
        if self.loss is None:
            head = self.model.head
            return losses.mask_set_loss(head.queries(features), target, self.ignore_index, stride=head.stride)
        total, logits, _ = self.supervised(features, target)
        if self.teacher:
            with torch.no_grad():
                expected = self.teacher[0](images).float()
            total = total + self.kl * losses.distillation(
                logits, target, teacher=expected, temperature=self.temperature, ignore_index=self.ignore_index
            )
        return total

    def supervised(self, features, target):
        """The loss of the labels, and the logits in float32: (N, K, H, W), as the target, and as decode() has them."""
        # contiguous: in channels_last, what the network computes in, the softmax over K classes is slower on a CPU
        own = [x.float().contiguous() for x in self.model.predictions(features)]
        logits = [self.model.resize(x, target.shape[-2:]) for x in own]
        first, *others = (self.loss(x, target) for x in logits)
        return first + self.aux_weight * sum(others), logits[0], own[0]

    def report(self):
        """What else an epoch's row of history.csv tells: {name: number} of the steps since the last call."""
        return {}


# ---- optimizer, learning rate, weight average -----------------------------------------------------------------------


def make_optimizer(objective, name, *, lr, backbone_lr, weight_decay, momentum=0.9, factors=()):
    """SGD, Adam or AdamW over the trainable parameters, each group with its `base_lr`.

    Parameters of the backbone learn at backbone_lr, all others at lr, times a factor where `factors` has pairs of it
    and an end of their name. Vectors (biases, norms, layer scales) and embeddings of tokens, positions and queries are
    not decayed.
    """
    groups = {}
    embeddings = {id(m.weight) for m in objective.modules() if isinstance(m, nn.Embedding)}
    ends = ("_token", "position_embeddings", "relative_position_bias_table", "level_embed")
    for key, p in objective.named_parameters():
        if p.requires_grad:
            plain = p.ndim <= 1 or id(p) in embeddings or key.endswith(ends)
            factor = math.prod(factor for factor, end in factors if key.endswith(end))
            groups.setdefault((".backbone." in f".{key}", plain, factor), []).append(p)
    if not groups:
        raise TrainingError("nothing to train: every parameter is frozen")
    params = [
        dict(params=group, lr=rate, base_lr=rate, weight_decay=0.0 if plain else weight_decay)
        for (in_backbone, plain, factor), group in groups.items()
        for rate in (factor * (backbone_lr if in_backbone else lr),)
    ]
    if name == "sgd":
        return torch.optim.SGD(params, momentum=momentum, fused=True)
    return {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[name](params, fused=True)


def load_optimizer(optimizer, saved):
    """Take up the state in a state_dict() of the same optimizer; its numbers (learning rates and so on) stay as they
    are. Raises ModelError where it is of other parameters: a fused step reads it unseen."""
    groups = [group["params"] for group in optimizer.param_groups]
    numbers = [number for group in saved["param_groups"] for number in group["params"]]
    if [len(g["params"]) for g in saved["param_groups"]] != list(map(len, groups)) or len(set(numbers)) != len(numbers):
        raise ModelError("the optimizer's state is of other parameters: leave out --resume")
    own = dict(zip(numbers, itertools.chain(*groups), strict=True))
    names = {"momentum_buffer"} if isinstance(optimizer, torch.optim.SGD) else {"step", "exp_avg", "exp_avg_sq"}
    for number, state in saved["state"].items():
        p, state = own[number].detach(), {k: v for k, v in state.items() if v is not None}
        like = {k: p.new_zeros(()) if k == "step" else torch.empty_like(p) for k in names if state}
        models.copy_tensors(like, state, "optimizer's state")
        optimizer.state[own[number]] = like


def make_schedule(name, *, total, warmup=0, power=0.9, cycles=3, patience=3, factor=0.3):
    """Learning-rate factor as a pure function: schedule(step, scores) with the mIoU of every evaluation so far.

    poly: (1 - t)^power (Chen et al. 2017). restarts: `cycles` polys one after the other. cosine: to zero (Loshchilov
    and Hutter 2017). plateau: times `factor` whenever `patience` evaluations brought no better mIoU; the only one to
    read scores. constant. The first `warmup` steps rise linearly, in every schedule.
    """

    def schedule(step, scores=()):
        rise = min(1.0, (step + 1) / (warmup + 1))
        t = min(1.0, max(0, step - warmup) / max(1, total - warmup))  # share of the run that is over
        if name == "poly":
            return rise * (1 - t) ** power
        if name == "restarts":
            return rise * (1 - t * cycles % 1) ** power
        if name == "cosine":
            return rise * (1 + math.cos(math.pi * t)) / 2
        if name == "plateau":
            return rise * factor ** _plateaus(scores, patience)
        return rise

    return schedule


def _plateaus(scores, patience):
    """How often `patience` scores in a row brought no new best; the count starts anew after each."""
    best, waited, plateaus = -math.inf, 0, 0
    for score in scores:
        waited = 0 if score > best else waited + 1
        best = max(best, score)
        if waited == patience:
            plateaus, waited = plateaus + 1, 0
    return plateaus


class Ema:
    """Exponential moving average of the trained weights; buffers (BatchNorm statistics) are copied.

    The decay warms up as min(decay, (1 + n) / (10 + n)) with the number n of updates, so early weights fade fast.
    """

    def __init__(self, model, decay):
        self.decay, self.updates = decay, 0
        self.shadow = {k: v.detach().clone() for k, v in self._averaged(model) + self._copied(model)}

    def _averaged(self, model):
        return [(k, p.detach()) for k, p in model.named_parameters() if p.requires_grad]

    def _copied(self, model):
        return list(model.named_buffers())

    @torch.no_grad()
    def update(self, model):
        self.updates += 1
        weight = 1 - min(self.decay, (1 + self.updates) / (10 + self.updates))
        keys, values = zip(*self._averaged(model), strict=True)
        torch._foreach_lerp_([self.shadow[k] for k in keys], list(values), weight)
        for key, value in self._copied(model):
            self.shadow[key].copy_(value)

    @contextlib.contextmanager
    def applied(self, model):
        """The average in place of the model's weights, for as long as the block lasts."""
        own = {k: v.detach().clone() for k, v in self._averaged(model) + self._copied(model)}
        model.load_state_dict(self.shadow, strict=False)  # what is frozen is not in it
        try:
            yield
        finally:
            model.load_state_dict(own, strict=False)


# ---- numbers, processes, signals ------------------------------------------------------------------------------------


def set_seed(seed, *, deterministic=False):
    """Seed torch everywhere; with `deterministic`, also refuse operations that do not repeat bit for bit."""
    torch.manual_seed(seed)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False


def rank_and_world():
    """(rank, number of processes); (0, 1) without torch.distributed."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


@contextlib.contextmanager
def process_group(device):
    """The process group that torchrun asks for, if it does (nccl on GPUs, else gloo); yields this process's device."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield device
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    patience = datetime.timedelta(minutes=10)  # half an hour, if not given
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=patience)
    try:
        yield device
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        raise TrainingError(
            "another process of this run has ended or does not answer, and what it printed says why; last.pt is as it "
            "was last written: go on with --resume"
        ) from None
    finally:
        dist.destroy_process_group()


def _over_processes(value, device, op=dist.ReduceOp.SUM):
    """A number summed (or what `op` says) over the processes."""
    if not dist.is_initialized():
        return value
    t = torch.tensor(float(value), device=device, dtype=torch.float64)
    dist.all_reduce(t, op)
    return t.item()


class SyncBatchNorm(nn.BatchNorm2d):
    """BatchNorm by the batches of all processes, as nn.SyncBatchNorm, which refuses a CPU."""

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        with torch.autocast(x.device.type, enabled=False):
            y, over = x.float(), (0, 2, 3)
            *sums, count = losses.sum_over_processes(F.pad(y.sum(over), (0, 1), value=y[:, 0].numel()))
            mean = torch.stack(sums) / count
            y = y - mean[:, None, None]
            variance = losses.sum_over_processes(y.square().sum(over)) / count
            with torch.no_grad():
                self.num_batches_tracked += 1
                self.running_mean.lerp_(mean, self.momentum)
                self.running_var.lerp_(variance * count / (count - 1), self.momentum)
            scale = self.weight * (variance + self.eps).rsqrt()
            return (y * scale[:, None, None] + self.bias[:, None, None]).to(x.dtype)


def sync_norms(model, device):
    """Let the BatchNorms of a network, in place, use the batches of all processes."""
    if device.type == "cuda":
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for module in model.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = SyncBatchNorm


class Pace:
    """What a run says of its time: once the minutes to come, once that it became slow, and in a log, where no bar is
    shown, a line a minute."""

    SLOW = 5  # a step is slow that takes so many times as long as the first ones, the run after as many in a row

    def __init__(self, steps, an_epoch, device, bar):
        self.left, self.device, self.bar = steps, device, bar
        self.few = max(1, min(10, steps - 1, an_epoch - 1))  # the first steps
        self.seconds, self.computing, self.slow, self.said = [], [], 0, time.perf_counter()

    def step(self, seconds, loading, text):
        """After a step of so many seconds, those of loading among them; text: what the bar shows."""
        self.left -= 1
        if len(self.seconds) < self.few:
            self.seconds.append(seconds)
            self.computing.append(seconds - loading)
            if len(self.seconds) == self.few and self.left:
                ms = 1000 * statistics.median(self.seconds)
                self.say(f"{self.left} steps of {ms:.0f} ms to go: {self.left * ms / 60e3:.1f} minutes, and evaluation")
        elif self.slow < self.SLOW:
            first = statistics.median(self.computing)
            self.slow = self.slow + 1 if seconds - loading > self.SLOW * first else 0
            if self.slow == self.SLOW:
                self.say(f"warning: steps now take {(seconds - loading) / first:.0f} times as long as the first ones. "
                         + self.advice())  # fmt: skip
        if self.bar.disable and time.perf_counter() > self.said + 60:
            self.say(f"{self.left} steps to go: {text}")

    def advice(self):
        if self.device.type == "cpu" and torch.get_num_threads() > 1:
            return "Where other programs compute too, threads wait for each other: try --threads 1, with --resume"
        return "Does another program compute here?"

    def say(self, text):
        self.said = time.perf_counter()
        tqdm.write(text)


# ---- the loop -------------------------------------------------------------------------------------------------------


def train_step(
    objective, optimizer, images, target, *, amp_dtype=None, scaler=None, accumulate=1, clip=0.0, check=None
):
    """One optimizer step on a batch, in `accumulate` micro-batches; the mean loss as a float.

    Calls check(loss) before the weights change. clip: largest gradient norm, 0 for none.
    """
    optimizer.zero_grad(set_to_none=True)
    total = 0.0
    pieces = list(zip(images.chunk(accumulate), target.chunk(accumulate), strict=True))
    for i, (x, y) in enumerate(pieces):
        last = i + 1 == len(pieces)
        quiet = contextlib.nullcontext() if last or not hasattr(objective, "no_sync") else objective.no_sync()
        with quiet:
            with torch.autocast(x.device.type, amp_dtype, enabled=amp_dtype is not None):
                loss = objective(x, y) / len(pieces)
            (scaler.scale(loss) if scaler else loss).backward()
        total = total + loss.detach()
    total = total.item()
    if check:
        check(total)
    if scaler:
        scaler.unscale_(optimizer)
    if clip:
        params = (p for group in optimizer.param_groups for p in group["params"])
        nn.utils.clip_grad_norm_(params, clip)
    if scaler:
        scaler.step(optimizer)
        scaler.update()
    else:
        optimizer.step()
    return total


TRAINING = {  # what a Keeper puts into last.pt -> whether it is that; see models.FIELDS
    **dict.fromkeys(("step", "loss_count"), models.is_whole),
    **dict.fromkeys(("seconds", "loss_sum"), math.isfinite),
    "history": lambda x: type(x) is list and all(models.is_number(v) for row in x for v in row.values()),
    "best": lambda x: x is None or all(map(models.is_number, (x["miou"], *x.values()))),
    "ema": lambda x: x is None or (models.is_whole(x["updates"]) and models.are_tensors(x["shadow"])),
    "objective": models.are_tensors,
    "adapter": lambda x: x is None or models.are_tensors(x),
}


class Keeper:
    """What a run leaves behind: evaluates where it is due, keeps best.pt, last.pt, history.csv and the running sums.

    `state` is what of it last.pt holds. save(path, metrics=..., training=...) writes the network as it is.
    """

    def __init__(
        self, objective, val_set, *, data, optimizer, scaler, ema, out_dir, save, device, amp_dtype, workers, writer,
        score_from=0,
    ):  # fmt: skip
        self.objective, self.val_set, self.optimizer, self.scaler, self.ema = objective, val_set, optimizer, scaler, ema
        self.out_dir, self.save, self.device, self.amp_dtype, self.writer = out_dir, save, device, amp_dtype, writer
        self.score_from, self.data = score_from, data
        self.rank, world = rank_and_world()
        self.loader = datasets.eval_loader(val_set, batch_size=1, workers=workers, rank=self.rank, world=world)
        self.state = dict(step=0, history=[], best=None, seconds=0.0, loss_sum=0.0, loss_count=0)
        self.signals = evaluate.StopSignal()
        self.started = time.perf_counter()

    def seconds(self):
        """Seconds of training so far, over all the resumed parts."""
        return self.state["seconds"] + time.perf_counter() - self.started

    def stopping(self):
        """The number of the signal that this process, or another one of the run, was sent; 0 for none."""
        return int(_over_processes(self.signals.number, self.device, dist.ReduceOp.MAX))

    def scores(self):
        return [row["miou"] for row in self.state["history"] if "miou" in row]

    def resume(self, training):
        """Take up the "training" entry of a last.pt; learning rates and so on stay those of the optimizer given. Raises
        TrainingError where it is none of this network, or of other data."""
        columns = {"epoch", "step", "lr", "loss", "images_per_second", *self.objective.report()}
        try:
            if other := "; ".join(changes(training.get("data", self.data), self.data)):  # older files do not say
                raise ModelError(f"its data were others: {other}")
            self.state.update({k: training[k] for k in self.state})
            if lacking := [sorted(columns - row.keys()) for row in training["history"] if columns - row.keys()]:
                raise ModelError(f"its history has no {', '.join(lacking[0])}")
            load_optimizer(self.optimizer, training["optimizer"])
            models.copy_tensors(self.own_state(), training["objective"], "trained tensors")
            if self.scaler:
                self.scaler.load_state_dict(training["scaler"])
            if self.ema:
                self.ema.updates = training["ema"]["updates"]
                models.copy_tensors(self.ema.shadow, training["ema"]["shadow"], "averages")
        except Exception as error:  # whatever wrong types lead to
            why = str(error) if isinstance(error, ModelError) else f"{type(error).__name__}: {models.one_line(error)}"
            raise TrainingError(f"--resume: {self.out_dir / 'last.pt'} cannot be gone on with: {why}") from error

    def own_state(self):
        """What the objective trains besides the network."""
        return {k: v for k, v in self.objective.state_dict().items() if not k.startswith("model.")}

    def save_last(self):
        if self.rank:
            return
        training = {
            **self.state,
            "data": self.data,
            "seconds": self.seconds(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict() if self.scaler else None,
            "ema": {"updates": self.ema.updates, "shadow": self.ema.shadow} if self.ema else None,
            "objective": self.own_state(),
        }
        self.save(self.out_dir / "last.pt", metrics=self.state["best"], training=training)

    def demand_finite(self):
        """Raise TrainingError where the last step left weights, or an average of them, that are not finite."""
        ours = [*self.objective.state_dict().items(), *(self.ema.shadow.items() if self.ema else ())]
        try:
            models.demand_finite(ours, "")
        except ModelError as error:
            raise TrainingError(
                f"after step {self.state['step']} {str(error).rstrip(': ')}. Stopped; what is in {self.out_dir} was "
                f"left alone. {ADVICE}"
            ) from None

    def batches(self):
        """Those of the validation split, until a signal comes."""
        batches = iter(self.loader)
        try:
            while batch := self.signals.while_waiting(lambda: next(batches, None)):
                yield batch
        except evaluate.Stopped:
            if not self.signals.number:  # it is not ours: nothing is being trained yet
                raise

    def evaluate(self):
        """mIoU, mAcc and aAcc of the weights (the EMA's, if there is one), written to best.pt if they are the best;
        None where a signal came."""
        model, info = self.objective.model, self.val_set.info
        with self.ema.applied(model) if self.ema else contextlib.nullcontext():
            metrics = evaluate.evaluate(
                model, self.batches(), num_classes=len(info.classes), ignore_index=info.ignore_index,
                device=self.device, boundary=False, amp_dtype=self.amp_dtype,
            )  # fmt: skip
            if self.stopping():
                return None
            metrics = {k: metrics[k] for k in ("miou", "macc", "aacc")}
            best = self.state["best"]
            if self.state["step"] < self.score_from:
                return metrics
            if best is None or metrics["miou"] > best["miou"] or math.isnan(best["miou"]):
                self.state["best"] = metrics | {"step": self.state["step"]}
                if self.rank == 0:
                    self.save(self.out_dir / "best.pt", metrics=self.state["best"])
        return metrics

    def end_epoch(self, epoch, *, images_per_second, evaluate, save):
        """Close an epoch: its row of history.csv, its line on the screen, last.pt. A signal leaves it open."""
        state = self.state
        loss = _over_processes(state["loss_sum"], self.device) / _over_processes(state["loss_count"], self.device)
        row = dict(epoch=epoch + 1, step=state["step"], lr=self.optimizer.param_groups[-1]["lr"], loss=loss)
        self.demand_finite()
        metrics = self.evaluate() if evaluate else {}
        if metrics is None:
            return
        row.update(self.objective.report(), **metrics)
        row.update(images_per_second=round(images_per_second, 2), seconds=round(self.seconds(), 2))
        state["history"].append(row)
        state.update(loss_sum=0.0, loss_count=0)
        if self.rank == 0:
            write_csv(self.out_dir / "history.csv", state["history"])
        if self.writer:
            for key in row.keys() - {"epoch", "step"}:
                self.writer.add_scalar(key, row[key], state["step"])
        if save:
            self.save_last()
        if self.rank == 0:
            tqdm.write("  ".join(f"{k} {row[k]:.4g}" for k in row if k != "seconds") + f"  {row['seconds']:.0f} s")


def changes(then, now):
    """In what two {split: about() of its data} differ, a text each."""
    (old, palette), (new, colours) = ((about["train"]["classes"], about["train"]["palette"]) for about in (then, now))
    if set(old) != set(new):
        yield f"only one of them has the classes {', '.join(sorted(set(old) ^ set(new))[:5])}"
    elif old != new:
        yield f"the classes were {', '.join(old)} and are {', '.join(new)}"
    elif palette != colours:
        yield "the classes had other colours"
    for split in now:
        if then[split]["images"] != now[split]["images"]:
            yield f"{split} had {then[split]['images']} images and has {now[split]['images']}"
        elif then[split]["names"] != now[split]["names"]:
            yield f"the images of {split} had other names"


def fit(
    objective, train_set, val_set, *, optimizer, schedule, epochs, batch_size, seed, device, out_dir, save, workers=0,
    accumulate=1, clip=0.0, amp="off", ema_decay=0.0, eval_every=1, save_every=1, max_steps=None, resume=None,
    compile_step=False, writer=None, on_epoch_start=None, after_step=None, score_first=False, score_from=0,
):  # fmt: skip
    """Train objective.model on train_set, keeping the weights with the best mIoU on val_set.

    objective: module of (images, target) -> loss with the network as `.model`. schedule(step, scores) -> factor of each
    group's base_lr. batch_size: over all processes. save(path, metrics, training) writes a checkpoint. resume: the
    "training" entry of a last.pt. max_steps: stop there, whatever `epochs` says. on_epoch_start(epoch), also called
    where a resumed run goes on within one, and after_step(step, shadow), shadow being the average's tensors by name ({}
    without one), are for callers that do something of their own to the network. score_first: what it starts from counts
    as well. score_from: the number of steps before which no score does.

    Returns {"history": rows, "best": metrics of best.pt, "seconds", "step", "stopped": signal name or None}. The first
    signal ends it after the step it is in, with last.pt written; an evaluation is broken off, and made up for on
    resume. Raises TrainingError where the loss is not finite; best.pt stays as it was.
    """
    rank, world = rank_and_world()
    if batch_size % (world * accumulate):
        parts = f"{world} processes x --accumulate {accumulate}"
        raise TrainingError(f"--batch-size {batch_size} is no multiple of {parts}")
    scaler = torch.amp.GradScaler(device.type) if amp == "fp16" else None
    ema = Ema(objective.model, ema_decay) if ema_decay else None
    keeper = Keeper(
        objective, val_set, optimizer=optimizer, scaler=scaler, ema=ema, out_dir=Path(out_dir), save=save,
        data={"train": train_set.about(), "val": val_set.about()},
        device=device, amp_dtype=evaluate.AMP_DTYPES[amp], workers=workers, writer=writer, score_from=score_from,
    )  # fmt: skip
    state = keeper.state
    if resume:
        keeper.resume(resume)
    share = dict(batch_size=batch_size, seed=seed, rank=rank, world=world)
    sampler = datasets.StepSampler(len(train_set), start=0, stop=0, **share)
    first, an_epoch = state["step"], sampler.steps_per_epoch
    stop = min(epochs * an_epoch, max_steps or math.inf)
    batches = iter(datasets.train_loader(train_set, start=first, stop=stop, workers=workers, **share))
    step_module = objective
    if world > 1:
        sync_norms(objective.model, device)
        step_module = DistributedDataParallel(objective, device_ids=[device.index] if device.type == "cuda" else None)
    if compile_step:
        step_module = torch.compile(step_module)

    def check(loss):
        if not math.isfinite(loss):
            step = state["step"]
            files = ", ".join(train_set.file(i) for i, _ in sampler.batch(step))
            raise TrainingError(
                f"the loss is {loss} at step {step} (epoch {step // an_epoch + 1}), on {files}. Stopped; "
                f"{keeper.out_dir / 'best.pt'} was left alone. {ADVICE}"
            )

    images_done, seconds_done = 0, 0.0

    def set_rates(step):
        factor = schedule(step, keeper.scores())
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor

    def end_epoch():
        """Where an epoch, or the run, is at its end."""
        over, (epochs_done, within) = state["step"] == stop, divmod(state["step"], an_epoch)
        if state["loss_count"] and (over or within == 0):
            keeper.end_epoch(
                epochs_done - (within == 0),
                images_per_second=images_done / seconds_done if seconds_done else 0.0,
                evaluate=over or epochs_done % eval_every == 0,
                save=over or epochs_done % save_every == 0,
            )

    if score_first and not state["step"]:
        keeper.evaluate()
    objective.train()
    shown = dict(total=stop, initial=first, disable=rank > 0 or None, unit="step", leave=False)
    with keeper.signals as signals, tqdm(**shown) as bar:
        pace = Pace(stop - first, an_epoch, device, bar)
        set_rates(max(0, first - 1))
        end_epoch()  # one whose evaluation a signal broke off
        for step in range(first, stop):
            if keeper.stopping():
                break
            if on_epoch_start and (step % an_epoch == 0 or step == first):
                on_epoch_start(step // an_epoch)
            began = time.perf_counter()
            set_rates(step)
            try:
                images, target = next(batches) if world > 1 else signals.while_waiting(lambda: next(batches))
            except evaluate.Stopped:  # of one process alone: several wait for each other in what follows
                break
            loading = time.perf_counter() - began
            torch.manual_seed(datasets.mix_seed(seed, step, rank))  # for dropout: the same when resumed
            loss = train_step(
                step_module,
                optimizer,
                images.to(device, non_blocking=True, memory_format=torch.channels_last),
                target.to(device, non_blocking=True),
                amp_dtype=evaluate.AMP_DTYPES[amp],
                scaler=scaler,
                accumulate=accumulate,
                clip=clip,
                check=check,
            )
            if ema:
                ema.update(objective.model)
            if after_step:
                after_step(step, ema.shadow if ema else {})
            state.update(step=step + 1, loss_sum=state["loss_sum"] + loss, loss_count=state["loss_count"] + 1)
            images_done, seconds_done = images_done + batch_size, seconds_done + time.perf_counter() - began
            rate = optimizer.param_groups[-1]["lr"]
            text = f"loss {loss:.3f}, lr {rate:.2e}, {images_done / seconds_done:.1f} images/s"
            bar.update()
            bar.set_postfix_str(text)
            if rank == 0:
                pace.step(time.perf_counter() - began, loading, text)
            end_epoch()
            if not state["loss_count"]:
                images_done, seconds_done = 0, 0.0
        if number := keeper.stopping():
            keeper.demand_finite()
            keeper.save_last()
            datasets.kill_workers()  # not waited for: they may be stopped as well
    stopped = signal.Signals(number).name if number else None
    return {**{k: state[k] for k in ("history", "best", "step")}, "seconds": keeper.seconds(), "stopped": stopped}


def plot_curves(history, path):
    """Loss, learning rate and, where evaluated, mIoU and aAcc over the epochs."""
    from matplotlib.figure import Figure  # without pyplot, which keeps every figure until it is closed

    figure = Figure(figsize=(11, 3.2), layout="constrained")
    axes = figure.subplots(1, 3, sharex=True)
    panels = (
        ("training", ("loss",), "loss"),
        ("schedule", ("lr",), "learning rate"),
        ("validation", ("miou", "aacc"), "%"),
    )
    names = {"miou": "mIoU", "aacc": "aAcc"}
    for axis, (title, keys, unit) in zip(axes, panels, strict=True):
        for key in keys:
            rows = [row for row in history if key in row]
            axis.plot([r["epoch"] for r in rows], [r[key] for r in rows], marker="o", ms=3, label=names.get(key, key))
        axis.set(title=title, xlabel="epoch", ylabel=unit)
        axis.grid(alpha=0.3)
    axes[2].set_ylim(0, 100)
    axes[2].legend()
    evaluate.save_figure(figure, path)


# ---- command line ---------------------------------------------------------------------------------------------------


def add_model_args(parser):
    """Flags that choose the network: the arguments of build_model(), with its defaults."""
    default = {k: p.default for k, p in inspect.signature(models.build_model).parameters.items()}
    group = parser.add_argument_group("network")
    add, yes_no = group.add_argument, argparse.BooleanOptionalAction
    add("--model", choices=models.NETWORKS, help="whole network, in place of --backbone and --head")
    add("--backbone", choices=models.BACKBONES, help="encoder; left out: dinov2-small")
    add("--head", choices=models.HEADS, help="decoder; left out: fpn")
    add("--taps", type=int, default=default["taps"], choices=(1, 4), help="feature maps taken from the backbone")
    add("--norm", default=default["norm"], choices=("batch", "group", "none"), help="normalisation in the head")
    add("--dropout", type=share_below_1, default=default["dropout"], help="share of channels, before the classifier")
    add(
        "--fuse",
        action=yes_no,
        default=default["fuse"],
        help="concatenate and mix the taps, or average a prediction each",
    )
    add(
        "--upsample",
        default=default["upsample"],
        choices=("bilinear", "learned"),
        help="of the logits to the input's size",
    )
    add("--output-stride", type=int, choices=(8, 16, 32), help="of a convolutional backbone; left out: the head's")
    add("--aux", action=yes_no, default=default["aux"], help="auxiliary FCN head while training")
    add("--width", type=whole(1, 4096), metavar="N", help="of unet: channels of the first stage; left out: 64")
    add("--layers", "--student-layers", type=positive_int, metavar="N", help="of a DINOv2 backbone; left out: all")
    add("--pretrained", default="auto", metavar="auto|require|PATH", help="hub weights if to be had, or a local copy")
    add("--no-pretrained", dest="pretrained", action="store_const", const="no", help="train from scratch")
    add("--freeze-backbone", action=yes_no, help="left out: frozen if pretrained, trained from scratch otherwise")


def add_train_args(parser, *, without=(), fewest_epochs=1):
    """Flags of the loss, the optimizer, the loop and the machine, but those `without`, which a script does not read."""

    def group(title):
        known = parser.add_argument_group(title).add_argument
        return lambda flag, **options: None if flag in without else known(flag, **options)

    add, yes_no = group("loss"), argparse.BooleanOptionalAction
    add("--loss", choices=losses.LOSSES, help=f"left out: {DEFAULT_LOSS}, or the network's own")
    add("--aux-weight", type=not_negative, default=0.4, help="weight of the losses of auxiliary outputs")
    add("--label-smoothing", type=share_below_1, default=0.0, help="share of the target spread over all classes")
    add("--ohem-thresh", type=probability, default=0.5, help="OHEM: pixels below this probability count as hard")
    add("--ohem-kept", type=count, default=10_000, help="OHEM: pixels of a batch kept at least")
    add("--focal-gamma", type=not_negative, default=2.0, help="focal loss: how fast easy pixels fade; 0: cross-entropy")
    add("--tversky-alpha", type=not_negative, default=0.3, help="Tversky loss: weight of false positives")
    add("--tversky-beta", type=not_negative, default=0.7, help="Tversky loss: weight of false negatives")
    add(
        "--boundary-weight", type=not_negative, default=0.0, metavar="W", help="boundaries weigh 1 + W in cross-entropy"
    )
    add("--boundary-width", type=whole(1, 1000), default=3, metavar="PIXELS", help="of that band, on each side of one")
    add = group("training")
    add("--optimizer", default="adamw", choices=OPTIMIZERS, help="optimizer")
    add("--lr", type=not_negative, default=7e-4, help="learning rate of all but the backbone")
    add("--backbone-lr", type=not_negative, help="learning rate of the backbone; left out: that of the rest")
    add("--weight-decay", type=not_negative, default=0.05, help="not applied to biases, norms and embeddings")
    add("--momentum", type=share_below_1, default=0.9, help="SGD only")
    add("--schedule", default="poly", choices=SCHEDULES, help="learning rate over the steps")
    add("--warmup", type=count, default=50, metavar="STEPS", help="linear rise of the learning rate")
    add("--power", type=not_negative, default=0.9, help="of poly and restarts")
    add("--cycles", type=positive_int, default=3, help="restarts: number of polys")
    add("--patience", type=positive_int, default=3, help="plateau: evaluations without a better mIoU")
    add("--epochs", type=whole(fewest_epochs), default=6, help="passes over the training split")
    add("--accumulate", type=positive_int, default=1, metavar="N", help="micro-batches a step, of one batch together")
    add("--clip", type=not_negative, default=1.0, help="largest gradient norm; 0: no limit")
    add("--ema", type=share_below_1, default=0.0, metavar="DECAY", help="average the weights, e.g. 0.999; 0: do not")
    add("--frozen-norm-epochs", type=count, default=0, metavar="N", help="last epochs: BatchNorm's statistics stay")
    add("--eval-every", type=positive_int, default=1, metavar="EPOCHS", help="evaluate, and keep the best by mIoU")
    add("--save-every", type=positive_int, default=1, metavar="EPOCHS", help="write last.pt")
    add = group("machine")
    add("--amp", default="auto", choices=("auto", "off", "bf16", "fp16"), help="mixed precision; auto: the fastest")
    add("--compile", action=yes_no, default=False, help="torch.compile the step")
    add("--seed", type=seed_number, default=0, help="of everything random")
    add("--deterministic", action=yes_no, default=False, help="refuse operations that do not repeat bit for bit")
    add("--device", default="auto", choices=("auto", "cpu", "cuda"), help="where to run")
    add("--threads", type=thread_count, help="CPU threads; left out: PyTorch's choice")
    add("--tensorboard", action="store_true", help="also write TensorBoard events")
    add("--dry-run", action="store_true", help="two steps and two images of everything, to see that it works")
    for flags, where, test in (
        ("--ohem-thresh --ohem-kept", "--loss ohem", lambda args: args.loss == "ohem"),
        ("--focal-gamma", "--loss focal", lambda args: args.loss == "focal"),
        ("--tversky-alpha --tversky-beta", "--loss tversky", lambda args: args.loss == "tversky"),
        ("--boundary-width", "--boundary-weight", lambda args: args.boundary_weight or getattr(args, "boundary_kl", 0)),
        ("--momentum", "--optimizer sgd", lambda args: args.optimizer == "sgd"),
        ("--power", "--schedule poly and restarts", lambda args: args.schedule in ("poly", "restarts")),
        ("--cycles", "--schedule restarts", lambda args: args.schedule == "restarts"),
        ("--patience", "--schedule plateau", lambda args: args.schedule == "plateau"),
    ):
        parser.only(flags, where, test)


def get_parser():
    parser = datasets.Parser(__doc__)
    datasets.add_data_args(parser)
    add_model_args(parser)
    add_train_args(parser)
    parser.add_argument("--out", help="folder to write to; left out: checkpoints/train")
    parser.add_argument("--resume", action="store_true", help="go on from OUT/last.pt, with its flags")
    parser.add_argument("--time-steps", type=positive_int, metavar="N", help="only time N steps, a plain loop, loading")
    return parser


# what --resume cannot change, as it would be another run: of every script, and of train.py besides
FIXED_FLAGS = ("dataset", "size", "crop", "batch_size", "seed", "optimizer", "ema", "amp", "void_as_class",
               "train_share", "val_drives")  # fmt: skip
NETWORK_FLAGS = ("model", "backbone", "head", "taps", "norm", "dropout", "fuse", "upsample", "output_stride", "aux",
                 "width", "layers", "pretrained", "freeze_backbone")  # fmt: skip


# ---- what every script that trains shares ---------------------------------------------------------------------------


def parse(parser, argv, *, script, name, inherits=(), fixed=()):
    """Parsed flags and, with --resume, the last.pt to go on from, else None.

    Flags that the command line leaves out are, with --resume, those of that last.pt; otherwise, in the groups that
    `inherits` names, those that the checkpoint --weights was trained with. fixed: flags, besides FIXED_FLAGS, that
    --resume cannot change; it takes up every other one that is given. args.out becomes the folder to write to: --out,
    or that of `name`, a text or a function of what the command line gives. Raises ModelError.
    """
    args, given = parser.parse_args(argv), parser.given(argv)
    name = name if isinstance(name, str) else name(given)
    source = evaluate.out_folder(args.out, name, dry_run=False)
    known, last = {}, None
    if args.resume:
        last = read_last(source / "last.pt", script)
        known = read_flags(last["args"], parser, source / "last.pt")
        if lacking := {*FIXED_FLAGS, *fixed} - known.keys():
            raise ModelError(f"{source / 'last.pt'} does not say what --{min(lacking).replace('_', '-')} was")
        changed = [k for k in (*FIXED_FLAGS, *fixed) if k in given and plain(given[k]) != known.get(k)]
        if changed:
            flags = ", ".join(f"--{k.replace('_', '-')}" for k in changed)
            raise ModelError(f"--resume goes on with the run in {source / 'last.pt'}: {flags} cannot change now")
    elif inherits:
        known = models.read_checkpoint(args.weights)["args"]
        of_groups = {a.dest for group in parser._action_groups if group.title in inherits for a in group._group_actions}
        known = read_flags({k: v for k, v in known.items() if k in of_groups}, parser, args.weights)
    own = ("out", "resume", "dry_run")
    parser.set_defaults(**{k: v for k, v in known.items() if k in vars(args) and k not in own})
    args = parser.parse_args(argv)
    parser.refuse_idle(args, given)
    out = evaluate.out_folder(args.out, name, dry_run=args.dry_run)
    if last and out != source and (source / "best.pt").exists():  # of a dry run, which leaves the run alone
        with models.replacing(out / "best.pt") as temporary:
            shutil.copy(source / "best.pt", temporary)
    args.out, args.run = str(out), last.get("run", "") if last else uuid.uuid4().hex
    return args, last


def read_flags(known, parser, path):
    """The flags that the checkpoint at `path` holds, read as those of a command line are. ModelError where one is no
    value of its flag."""
    reader, words = copy.deepcopy(parser), []

    def refuse(message):
        raise ModelError(f"{path} was not written by these scripts, by its flags: {message}")

    reader.error = refuse
    for action in reader._actions:
        value, flags = known.get(action.dest), action.option_strings
        if isinstance(action, (argparse.BooleanOptionalAction, argparse._StoreTrueAction)):
            if type(value) not in (bool, type(None)):
                refuse(f"{flags[0]} {value}")
            words += flags[:1] if value else flags[1:2] if value is False else []
        elif value is not None and action.nargs != 0:
            many = list(value) if isinstance(value, (list, tuple)) else None
            words += [f"{flags[0]}={value}"] if many is None else [flags[0], *map(str, many)] if many else []
    read = vars(reader.parse_args(words))
    return known | {k: read[k] for k in read if known.get(k) is not None}


def read_last(path, script):
    """The checkpoint that a run of `script` stopped at. Raises ModelError where it is none."""
    if not path.is_file():
        raise ModelError(f"no checkpoint at {path}: leave out --resume, or name the --out of a run of {script}")
    last = models.read_checkpoint(path)
    if "training" not in last:
        raise ModelError(f"{path} has no training state: it cannot be resumed")
    models.check_fields(last["training"], TRAINING, path)
    wrote = last["command"].split()[1:2]
    if wrote != [script]:
        raise ModelError(f"{path} is of a run of {' '.join(wrote)}, not of {script}: go on with that script")
    step = script.removesuffix(".py")
    if step in models.STEPS and [s["step"] for s in last["compression"]][-1:] != [step]:
        raise ModelError(f"{path} has not gone through {script}")
    best = path.with_name("best.pt")
    if best.exists() and models.read_checkpoint(best).get("run") != last.get("run"):
        raise ModelError(f"{best} and {path.name} are of two runs: keep those of one, or leave out --resume")
    if last["training"].get("best") and not best.exists():
        raise ModelError(f"{path} cannot be gone on with: best.pt, which was beside it, is gone")
    return last


def start(args):
    """Threads, seed, precision, as the flags say -> the device to run on."""
    if args.threads:
        torch.set_num_threads(args.threads)
    evaluate.keep_freed_memory()
    set_seed(args.seed, deterministic=args.deterministic)
    device = evaluate.pick_device(args.device)
    args.amp = evaluate.choose_amp(args.amp, device)
    return device


class Parent(NamedTuple):
    """What a script that changes a network starts from: the network of --weights, its checkpoint and data, and the
    folder to write to."""

    model: nn.Module
    checkpoint: dict
    train_set: datasets.SegmentationDataset
    val_set: datasets.SegmentationDataset
    out: Path


def open_parent(args, device, *, refuse=None, same_classes=True):
    """The network of --weights and the data of the flags -> Parent; its folder is made.

    refuse: {step of compression that cannot come before this one: why}. same_classes: whether the data must have the
    classes that the network knows. Raises ModelError.
    """
    model, checkpoint = models.load_checkpoint(args.weights, device=device)
    for step in checkpoint["compression"]:
        if why := (refuse or {}).get(step["step"]):
            raise ModelError(f"{args.weights} {why}")
    train_set, val_set = open_splits(args)
    if same_classes and list(val_set.info.classes) != list(checkpoint["data"]["classes"]):
        data = checkpoint["data"]["name"]
        raise ModelError(f"{args.weights} was trained on {data}, whose classes {args.dataset} does not have")
    own_folder(args)
    return Parent(model.to(memory_format=torch.channels_last), checkpoint, train_set, val_set, Path(args.out))


def own_folder(args):
    """Make args.out the folder of this run alone; see evaluate.claim(). What is in it stays where it is gone on with,
    and what a dry run left in a folder of its own is worth nothing."""
    if rank_and_world()[0] == 0:
        flags = vars(args)
        given = [*map(flags.get, ("weights", "student", "pretrained", "data_root")), *flags.get("teachers", ())]
        dry = Path(evaluate.ROOT, "dry-run")
        keep = not args.resume and not (args.dry_run and dry in Path(args.out).parents)
        evaluate.claim(args.out, inputs=[path for path in given if path and Path(path).exists()], keep=keep)


def score(model, parent, device, dataset=None):
    """evaluate() of a network on a Parent's validation split, or on `dataset`, by this process alone."""
    info = parent.val_set.info
    return evaluate.evaluate(
        model, datasets.eval_loader(dataset or parent.val_set), num_classes=len(info.classes),
        ignore_index=info.ignore_index, device=device, boundary=False, progress=True, reduce=False,
    )  # fmt: skip


def ancestor(checkpoint, miou=None):
    """A checkpoint as an entry of its descendants' lineage. miou: as measured now; left out: as it says itself."""
    miou = checkpoint["metrics"].get("miou") if miou is None else miou
    return {"id": checkpoint["id"], "command": checkpoint["command"], "miou": miou}


def saver(args, command, *, data, pretrained, lineage, compression=()):
    """save(path, network, **more of save_checkpoint()'s) for the checkpoints of a run; `compression`: the steps so far,
    or a function of the network that gives them."""
    flags = {k: plain(v) for k, v in vars(args).items() if k not in ("resume", "time_steps", "run")}
    about = dict(data=data, pretrained=pretrained, command=command, args=flags, lineage=lineage, run=args.run)

    def save(path, network, **more):
        steps = compression(network) if callable(compression) else compression
        models.save_checkpoint(path, network, compression=steps, **about, **more)

    return save


def make_objective(args, model, train_set, out, device, **more):
    """The Objective that the flags describe; more: its teacher or encode."""
    loss = make_loss(args, model, train_set, out)
    return Objective(model, loss, args.aux_weight, train_set.info.ignore_index, **more).to(device)


def optimizer_and_schedule(args, objective, steps, factors=()):
    """(optimizer, schedule over `steps` steps) that the flags describe; factors: of make_optimizer()."""
    optimizer = make_optimizer(
        objective, args.optimizer, lr=args.lr, backbone_lr=args.lr if args.backbone_lr is None else args.backbone_lr,
        weight_decay=args.weight_decay, momentum=args.momentum, factors=factors,
    )  # fmt: skip
    return optimizer, make_schedule(
        args.schedule, total=steps, warmup=args.warmup, power=args.power, cycles=args.cycles, patience=args.patience
    )


def total_steps(args, train_set):
    return args.epochs * max(1, len(train_set) // args.batch_size)


def fit_by_flags(args, objective, train_set, val_set, *, script, device, save, last=None, factors=(), **hooks):
    """fit() as the flags say, with norms frozen for the last epochs; then draws curves.png -> what fit() returns.

    save(path, **more) writes the network. last: the last.pt to go on from. factors: of make_optimizer().
    hooks: after_step, score_first and score_from of fit().
    Where a signal stopped it, it says how to go on, and draws nothing.
    """
    rank, _ = rank_and_world()
    out, training = Path(args.out), last and last["training"]
    optimizer, schedule = optimizer_and_schedule(args, objective, total_steps(args, train_set), factors)

    def on_epoch_start(epoch):
        if epoch >= args.epochs - args.frozen_norm_epochs:
            freeze_norms(objective.model)

    if val_set.pairs:
        datasets.class_distribution(val_set)  # reads every mask now, not after the first epoch
        datasets.print_notes(val_set)
    writer = open_writer(args, out, rank)
    done = fit(
        objective, train_set, val_set, optimizer=optimizer, schedule=schedule, epochs=args.epochs,
        batch_size=args.batch_size, seed=args.seed, device=device, out_dir=out, save=save, workers=args.workers,
        accumulate=args.accumulate, clip=args.clip, amp=args.amp, ema_decay=args.ema, eval_every=args.eval_every,
        save_every=args.save_every, max_steps=(training["step"] if last else 0) + 2 if args.dry_run else None,
        resume=training, compile_step=args.compile, writer=writer, on_epoch_start=on_epoch_start, **hooks,
    )  # fmt: skip
    if writer:
        writer.close()
    if rank == 0 and done["stopped"]:
        print(f"{done['stopped']}: stopped after step {done['step']}. "
              f"Go on with: {shlex.join(['python', script, '--resume', '--out', str(out)])}")  # fmt: skip
    elif rank == 0:
        plot_curves(done["history"], out / "curves.png")
    return done


def plain(value):
    """A flag's value as a checkpoint holds it: paths as text, tuples as lists."""
    if isinstance(value, Path):
        return str(value)
    return list(value) if isinstance(value, tuple) else value


def open_splits(args):
    """(training split, validation split) that the data flags describe."""
    common = dict(root=args.data_root, size=args.size, cache=args.cache, options=datasets.option_values(args))
    few = dict(length=max(2, args.batch_size)) if args.dry_run else {}
    train_set = datasets.open_dataset(args.dataset, "train", **common, **few)
    train_set.transform = datasets.train_transform(
        train_set.info, crop=args.crop, scale=args.scale, cat_max_ratio=args.cat_max_ratio, flip=args.flip,
        photometric=args.photometric, augment=args.augment,
    )  # fmt: skip
    train_set.color_transfer = args.color_transfer if args.augment else 0.0
    few = dict(length=2) if args.dry_run else {}
    val_set = datasets.open_dataset(args.dataset, "val", **common, **few)
    if shared := datasets.shared_images(val_set, train_set):
        (ours, theirs), n = shared[0], len(shared)
        val_set.notes.append(f"{n} of {len(val_set)} images of val are also in train, first {ours}, which is {theirs}")
    datasets.print_notes(train_set, val_set)
    return train_set, val_set


def calibration_set(args):
    """The training split as the network sees it in evaluation; in a dry run two images of it."""
    few = dict(length=2) if args.dry_run else {}
    options = dict(root=args.data_root, size=args.size, cache=False, options=datasets.option_values(args))
    return datasets.open_dataset(args.dataset, "train", **options, **few)


def calibration_images(args, device, count):
    """Images (1, 3, H, W) of calibration_set(), evenly spread; in a dry run a corner of each."""
    dataset, corner = calibration_set(args), 112 if args.dry_run else None
    count = min(count, len(dataset))
    return [dataset[i * len(dataset) // count][0][None, :, :corner, :corner].to(device) for i in range(count)]


def keep_zeros(weights):
    """after_step of fit() that holds at 0 what is 0 now in {name: weight}, in the average of the weights too."""
    masks = {name: weight.detach() != 0 for name, weight in weights.items()}
    masks = {name: mask for name, mask in masks.items() if not mask.all()}

    @torch.no_grad()
    def after_step(_step, shadow):
        for name, mask in masks.items():
            weights[name].mul_(mask)
            if name in shadow:
                shadow[name].mul_(mask)

    return after_step


def make_loss(args, model, train_set, out):
    """The loss that the flags describe, None for the network's own; counts the classes (once, with a figure in the
    folder `out`, if one is given)."""
    info = train_set.info
    counts = datasets.class_distribution(train_set)
    datasets.print_notes(train_set)

    def draw():
        if out and rank_and_world()[0] == 0:
            evaluate.plot_class_distribution(counts, info.classes, info.palette, out / "class_distribution.png")

    if hasattr(model.head, "queries"):
        if args.loss or args.class_weights != "none" or args.label_smoothing or args.boundary_weight:
            name = models.model_name(model.build)
            flags = "--loss, --class-weights, --label-smoothing, --boundary-weight"
            raise TrainingError(f"leave out {flags}: {name} has a loss of its own")
        draw()
        return None
    name, weight = args.loss or DEFAULT_LOSS, None
    if args.class_weights != "none":
        weight = datasets.class_weights(counts, args.class_weights, args.class_weights_power)
    try:
        loss = losses.make_loss(
            name, ignore_index=info.ignore_index, weight=weight, label_smoothing=args.label_smoothing,
            boundary_weight=args.boundary_weight, boundary_width=args.boundary_width,
            ohem_thresh=args.ohem_thresh, ohem_min_kept=args.ohem_kept, focal_gamma=args.focal_gamma,
            tversky_alpha=args.tversky_alpha, tversky_beta=args.tversky_beta,
        )  # fmt: skip
        k = len(info.classes)
        loss(torch.zeros(1, k, 1, 1), torch.zeros(1, 1, 1, dtype=torch.int64))  # a binary loss refuses K classes here
    except ValueError as error:
        raise TrainingError(f"--loss {name}: {error}") from error
    draw()
    return loss


def make_network(args, num_classes, last):
    """The network of the flags, or of the last.pt to go on from; says where its weights come from."""
    if last:
        model = models.network_of(last, "last.pt")
        model.pretrained = last["pretrained"] == "yes"
        return model
    model = models.build_model(
        num_classes=num_classes, model=args.model, backbone=args.backbone, head=args.head, taps=args.taps,
        norm=args.norm, dropout=args.dropout, fuse=args.fuse, upsample=args.upsample, output_stride=args.output_stride,
        aux=args.aux, width=args.width, layers=args.layers, pretrained=args.pretrained,
        freeze_backbone=args.freeze_backbone,
    )  # fmt: skip
    if model.pretrained_error and rank_and_world()[0] == 0:
        print(f"*** NO PRETRAINED WEIGHTS: {model.pretrained_error}", file=sys.stderr)
        print(f"*** Training from scratch, the backbone {'frozen' if model.freeze_backbone else 'unfrozen'}. "
              "--pretrained PATH uses a local copy.", file=sys.stderr)  # fmt: skip
    return model


def freeze_norms(model):
    """BatchNorm in eval mode: training sees the statistics that evaluation will use, not those of a small batch."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()


def open_writer(args, out, rank):
    """TensorBoard's writer where --tensorboard asks for it, else None."""
    if not args.tensorboard or rank:
        return None
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise TrainingError("--tensorboard needs its package: pip install tensorboard") from None
    return SummaryWriter(out)


def time_steps(args, objective, train_set, device):
    """Time --time-steps steps of fit() against a plain loop on the same network, and the loader alone -> images/s.

    The two kinds of step alternate on the same batches, so that a drifting machine slows both alike; medians.
    """
    steps, ahead = args.time_steps, 2 * args.workers + 1  # batches that the workers have ready before the clock starts
    share = dict(batch_size=args.batch_size, seed=args.seed, start=0, stop=steps + 2 + ahead)
    loader = iter(datasets.train_loader(train_set, workers=args.workers, **share))
    for _ in range(ahead):
        next(loader)
    began = time.perf_counter()
    batches = list(loader)
    loading = (time.perf_counter() - began) / len(batches)
    optimizer, schedule = optimizer_and_schedule(args, objective, total_steps(args, train_set))
    ema = Ema(objective.model, args.ema) if args.ema else None
    amp_dtype = evaluate.AMP_DTYPES[args.amp]

    def ours(images, target):
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * schedule(0)
        torch.manual_seed(0)
        images = images.to(device, memory_format=torch.channels_last)
        train_step(objective, optimizer, images, target.to(device), amp_dtype=amp_dtype, clip=args.clip, check=float)
        if ema:
            ema.update(objective.model)

    def plain_loop(images, target):
        images, target = images.to(device, memory_format=torch.channels_last), target.to(device)
        optimizer.zero_grad()
        with torch.autocast(device.type, amp_dtype, enabled=amp_dtype is not None):
            own = objective.loss is None
            loss = objective(images, target) if own else objective.loss(objective.model(images), target)
        loss.backward()
        optimizer.step()
        loss.item()

    seconds = {ours: [], plain_loop: []}
    objective.train()
    for images, target in batches:
        for step in (ours, plain_loop):
            began = time.perf_counter()
            step(images, target)
            seconds[step].append(time.perf_counter() - began)
    mine, plain_one = (sorted(s[2:])[len(s[2:]) // 2] for s in (seconds[ours], seconds[plain_loop]))
    speeds = {
        "loader_images_per_second": args.batch_size / loading,
        "training_images_per_second": args.batch_size / mine,
        "plain_images_per_second": args.batch_size / plain_one,
        "step_ratio": mine / plain_one,
    }
    evaluate.print_table([{"what": k, "value": round(v, 3)} for k, v in speeds.items()])
    return speeds


def step_costs(args, objectives, device, steps=5):
    """What a step of each of {name: (objective, training set)} costs -> {name: {"step_ms", "step_memory_mb"}}.

    Copies take turns on a batch, so that a drifting machine slows all alike; medians. The memory is that of weights,
    gradients, optimizer state and what is kept for the backward pass.
    """
    runs, amp_dtype, (rank, world) = {}, evaluate.AMP_DTYPES[args.amp], rank_and_world()
    share = dict(batch_size=args.batch_size, seed=args.seed, rank=rank, world=world)
    for name, (objective, train_set) in objectives.items():
        loader = datasets.train_loader(train_set, start=0, stop=1, **share)
        images, target = (x.to(device) for x in next(iter(loader)))
        own = copy.deepcopy(objective).train()
        optimizer = optimizer_and_schedule(args, own, 1)[0]
        batch = images.to(memory_format=torch.channels_last), target
        runs[name] = functools.partial(train_step, own, optimizer, *batch, amp_dtype=amp_dtype, clip=args.clip)
    costs, seconds = {}, {name: [] for name in runs}
    for name, run in runs.items():
        own, optimizer = run.args[:2]
        kept = {t.data_ptr(): t.nbytes for t in (*own.parameters(), *own.buffers())}

        def keep(t, kept=kept):
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            run()
        state = [t for values in optimizer.state.values() for t in values.values() if torch.is_tensor(t)]
        more = sum(t.nbytes for t in (*state, *(p.grad for p in own.parameters() if p.grad is not None)))
        costs[name] = {"step_memory_mb": (sum(kept.values()) + more) / 2**20}
    for _ in range(steps):
        for name, run in runs.items():
            began = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - began)
    for name in runs:
        costs[name]["step_ms"] = 1000 * _over_processes(statistics.median(seconds[name]), device, dist.ReduceOp.MAX)
    return costs


@evaluate.releasing
def main(argv=None):
    """Run the command line; returns what results.json holds."""
    command = evaluate.command_line("train.py", argv)
    args, last = parse(get_parser(), argv, script="train.py", name="train", fixed=NETWORK_FLAGS)
    with process_group(start(args)) as device:
        return run(args, last, command, device)


def run(args, last, command, device):
    """Train, then score best.pt and write figures and results.json; see main()."""
    rank, _ = rank_and_world()
    out = Path(args.out)
    train_set, val_set = open_splits(args)
    if not args.time_steps:
        own_folder(args)
    model = make_network(args, len(train_set.info.classes), last).to(device, memory_format=torch.channels_last)
    objective = make_objective(args, model, train_set, None if args.time_steps else out, device)
    if rank == 0:
        precision = "float32" if args.amp == "off" else args.amp
        print(f"{models.model_name(model.build)} on {args.dataset} ({device}, {precision}): "
              f"{len(train_set)} images, {total_steps(args, train_set) // args.epochs} steps an epoch")  # fmt: skip
        print(models.parameter_summary(model))
    if args.time_steps:
        return time_steps(args, objective, train_set, device)
    save = saver(
        args, command, data=train_set.info.to_dict(), pretrained="yes" if model.pretrained else "no",
        lineage=last["lineage"] if last else [],
    )  # fmt: skip
    save = functools.partial(save, network=model)
    done = fit_by_flags(args, objective, train_set, val_set, script="train.py", device=device, save=save, last=last)
    if done["stopped"]:
        return {"stopped": done["stopped"], "step": done["step"]}
    if rank:
        return {}
    return finish(done, val_set, out, command, device, args)


def finish(done, val_set, out, command, device, args):
    """Score best.pt in float32, draw the figures, print the summary -> what results.json holds."""
    best, checkpoint = models.load_checkpoint(out / "best.pt", device=device)
    metrics = evaluate.score(best, val_set, device=device, out=out, workers=args.workers)
    common = dict(command=command, split="val", seconds=done["seconds"], device=device, path=out / "best.pt")
    results = evaluate.results(best, checkpoint, metrics, **common)
    speeds = [row["images_per_second"] for row in done["history"] if row["images_per_second"]] or [math.nan]
    results |= {"epochs": args.epochs, "steps": done["step"], "images_per_second": sum(speeds) / len(speeds)}
    evaluate.write_json(out / "results.json", results)
    keys = "model dataset pretrained params miou macc aacc boundary_iou seconds images_per_second peak_memory_mb"
    print()
    evaluate.print_table([{k: results[k] for k in keys.split()}])
    print(f"best of {len(done['history'])} epochs: {out / 'best.pt'}; figures, history.csv and results.json beside it")
    return results


if __name__ == "__main__":
    evaluate.run_cli(main)
