"""Losses for semantic segmentation: functions of (logits, target) that return one scalar.

    logits  (N, K, H, W) float; float16 and bfloat16 are raised to float32 at the door, and autocast is off inside:
            a sum over 512 x 512 pixels does not fit into float16
    target  (N, H, W) int64, a class 0..K-1 or ignore_index

Pixels with ignore_index are out of every sum and every count: they change neither the loss nor any gradient. When all
are ignored the loss is 0 with a gradient of 0, still part of the graph, so that a step on such a batch is harmless.

DDP averages gradients over ranks, so cross_entropy and bce divide by the number of valid pixels on ALL ranks: one
process or several give the same gradient, however unevenly the ignored pixels fall. OHEM, Dice and Lovasz rank pixels
or divide by sums of their own batch; they stay per rank.

A further loss is a function and a row in LOSSES.
"""

import functools
import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

# ---- shared parts ----


def _in_float32(loss):
    """Decorator: check the shapes, then run `loss` on float32 (or float64) logits with autocast off."""

    @functools.wraps(loss)
    def run(logits, target, **options):
        if logits.dim() != 4 or target.shape != (logits.shape[0], *logits.shape[2:]):
            shapes = f"{tuple(logits.shape)} and {tuple(target.shape)}"
            raise ValueError(f"{loss.__name__}: logits must be (N, K, H, W) and target (N, H, W), got {shapes}")
        with torch.autocast(logits.device.type, enabled=False):
            return loss(logits if logits.dtype == torch.float64 else logits.float(), target, **options)

    return run


def _mean(total, count):
    """total / count; a count of 0 gives 0 with a gradient of 0."""
    count = count.detach().to(total.dtype)
    return total / count.masked_fill(count == 0, math.inf)


def _global_mean(total, count):
    """total / (count summed over ranks) * ranks: its average over ranks is the mean over the pixels of all ranks.

    DDP takes that average of the gradients, and a logger should take it of the values. Ranks exchange counts only when
    a gradient is wanted: in training all ranks call the loss equally often, in evaluation one may have a batch more
    than the others and would wait for ever.
    """
    if not (total.requires_grad and dist.is_available() and dist.is_initialized()):
        return _mean(total, count)
    count = count.detach().to(total.dtype, copy=True)  # all_reduce writes into it
    dist.all_reduce(count)
    return _mean(total * dist.get_world_size(), count)


# ---- cross-entropy ----


def _pixel_cross_entropy(logits, target, ignore_index, weight, label_smoothing):
    """Loss and weight of each pixel (N, H, W), 0 where ignored; F.cross_entropy's mean is the ratio of their sums."""
    weight = None if weight is None else weight.to(logits.dtype)
    # reduction="none": for 4-D logits PyTorch's own sum and mean are not deterministic on CUDA
    loss = F.cross_entropy(
        logits, target, weight, ignore_index=ignore_index, reduction="none", label_smoothing=label_smoothing
    )
    valid = target != ignore_index
    if weight is None:
        return loss, valid
    return loss, weight[target.where(valid, 0)] * valid  # 255 must never be an index


@_in_float32
def cross_entropy(logits, target, *, ignore_index=255, weight=None, label_smoothing=0.0):
    """Softmax cross-entropy, averaged over the valid pixels of all ranks with weights weight[target], weight (K,).

    Equals F.cross_entropy, but for a batch with nothing to average (0, not NaN) and for the mean over ranks: one rank
    returns its sum * ranks / global count, which may be far from its own mean; the average over ranks is the mean.
    """
    loss, weights = _pixel_cross_entropy(logits, target, ignore_index, weight, label_smoothing)
    return _global_mean(loss.sum(), weights.sum())


@_in_float32
def ohem_cross_entropy(logits, target, *, thresh, min_kept, ignore_index=255, weight=None, label_smoothing=0.0):
    """Online hard example mining: cross-entropy over the hard pixels only (Shrivastava et al. 2016, arXiv 1604.03540).

    Hard: the true class has a probability below thresh. If fewer than min_kept pixels of the batch are hard, the
    min_kept hardest are kept (all valid ones if there are fewer); ties with the last of them are kept too, so the order
    of pixels never matters. The mean is over the kept pixels, or their class weights.
    """
    if not 0 < thresh <= 1 or min_kept < 0:
        raise ValueError(f"OHEM needs 0 < thresh <= 1 and min_kept >= 0, got {thresh} and {min_kept}")
    loss, weights = _pixel_cross_entropy(logits, target, ignore_index, weight, label_smoothing)
    with torch.no_grad():
        # Rank by -log p, not by p: the p of very wrong pixels underflows to 0.
        nll = loss
        if weight is not None or label_smoothing:
            nll, _ = _pixel_cross_entropy(logits, target, ignore_index, None, 0.0)
        nll = nll.masked_fill(target == ignore_index, -math.inf)
        keep = nll > -math.log(thresh)
        if min_kept > 0:
            # The k-th is -inf if fewer pixels are valid: then all are kept, and ignored ones have loss and weight 0.
            keep |= nll >= nll.flatten().topk(min(min_kept, nll.numel()), sorted=False).values.min()
    return _mean((loss * keep).sum(), (weights * keep).sum())


# ---- region losses ----


def _dice_per_class(logits, target, ignore_index):
    """1 - Dice of each class over the batch (K,), 0 for classes not in the target, and which are in it (K,) bool."""
    valid = target != ignore_index  # masks p like y: a probability at an ignored pixel is no false positive
    log_p, k = logits.log_softmax(1), logits.shape[1]
    total = (log_p.exp() * valid.unsqueeze(1)).sum((0, 2, 3))  # (K,): sum p
    # sum(p y) without a one-hot (N, K, H, W): the true class's p, added up by class
    true_p = (-F.nll_loss(log_p, target, ignore_index=ignore_index, reduction="none")).exp() * valid  # (N, H, W)
    classes = target.where(valid, 0).flatten()
    overlap = total.new_zeros(k).index_add(0, classes, true_p.flatten())
    pixels = total.new_zeros(k).index_add(0, classes, valid.to(total.dtype).flatten())
    # A class in the target has pixels >= 1, so the clamp moves only absent ones and no smoothing term is needed.
    dice = 2 * overlap / (total + pixels).clamp(min=1)
    present = pixels > 0
    return (1 - dice) * present, present


@_in_float32
def dice_loss(logits, target, *, ignore_index=255):
    """Soft Dice, 1 - 2 sum(p y) / (sum p + sum y), averaged over the classes in the target; sums run over the batch.

    Milletari et al. 2016 (arXiv 1606.04797), without the squares.
    """
    loss, present = _dice_per_class(logits, target, ignore_index)
    return _mean(loss.sum(), present.sum())


@torch.no_grad()
def _lovasz_weights(errors, foreground):
    """Gradient (P,) of the Lovasz extension of the Jaccard loss at errors (P,), for the class of foreground (P,).

    With errors in falling order, weight i is J(first i pixels wrong) - J(first i - 1 wrong), where J is 1 - IoU. It is
    written in closed form: with millions of pixels, neighbouring values of J differ by no more than float32 rounding.
    """
    order = errors.argsort(descending=True)
    hit = foreground[order]
    # Integers: exact, and deterministic on CUDA, where a float cumsum is not.
    intersection = (foreground.sum() - hit.cumsum(0)).to(errors.dtype)
    union = (foreground.sum() + (~hit).cumsum(0)).to(errors.dtype)
    # A missed foreground pixel leaves the intersection; a false positive joins the union.
    weights = torch.where(hit, 1 / union, intersection / union / (union - 1))
    return torch.empty_like(errors).scatter_(0, order, weights)


@_in_float32
def lovasz_softmax(logits, target, *, ignore_index=255):
    """Lovasz-Softmax, a surrogate of 1 - IoU, averaged over the classes in the target; sums run over the batch.

    Berman et al. 2018 (arXiv 1705.08790). One class at a time, to save memory. Only the product with the weights is
    differentiated, not the sort.
    """
    valid = target != ignore_index
    present = target[valid].unique().tolist()
    if not present:
        return 0 * logits.softmax(1).sum()  # 0, but still part of the graph
    probs = logits.softmax(1).unbind(1)  # K of (N, H, W); slicing instead would build a full-size gradient a class
    total = 0.0
    for k in present:
        foreground = valid & (target == k)
        # An ignored pixel has error 0: last in the order, nothing in the sum.
        errors = (torch.where(foreground, 1 - probs[k], probs[k]) * valid).flatten()
        total = total + (errors * _lovasz_weights(errors, foreground.flatten())).sum()
    return total / len(present)


def ce_dice(logits, target, *, ignore_index=255, weight=None, label_smoothing=0.0):
    """cross_entropy (with weight, smoothing) + dice_loss (without), one to one, as in nnU-Net (Isensee et al. 2021)."""
    ce = cross_entropy(logits, target, ignore_index=ignore_index, weight=weight, label_smoothing=label_smoothing)
    return ce + dice_loss(logits, target, ignore_index=ignore_index)


# ---- binary tasks: logits (N, 2, H, W) of background and foreground ----


def bce(logits, target, *, ignore_index=255, weight=None, label_smoothing=0.0):
    """Binary cross-entropy of the foreground logit, which is logits[:, 1] - logits[:, 0].

    The softmax of two logits is the sigmoid of their difference, so this is cross_entropy for K = 2, and a binary
    network keeps the two logits and the argmax that every other part expects. Raises ValueError for K != 2.
    """
    if logits.shape[1] != 2:
        raise ValueError(
            f"a binary loss needs 2 classes, logits (N, 2, H, W) of background and foreground, and got "
            f"{logits.shape[1]}: choose another loss, such as ce or ce-dice"
        )
    return cross_entropy(logits, target, ignore_index=ignore_index, weight=weight, label_smoothing=label_smoothing)


@_in_float32
def bce_dice(logits, target, *, ignore_index=255, weight=None, label_smoothing=0.0):
    """bce + soft Dice of the foreground alone, one to one; the Dice part is 0 for a batch without foreground."""
    ce = bce(logits, target, ignore_index=ignore_index, weight=weight, label_smoothing=label_smoothing)
    return ce + _dice_per_class(logits, target, ignore_index)[0][1]


# ---- the table ----

# name for --loss: (function, the options it takes besides ignore_index)
LOSSES = {
    "ce": (cross_entropy, ("weight", "label_smoothing")),
    "ohem": (ohem_cross_entropy, ("weight", "label_smoothing", "thresh", "min_kept")),
    "dice": (dice_loss, ()),
    "lovasz": (lovasz_softmax, ()),
    "ce-dice": (ce_dice, ("weight", "label_smoothing")),
    "bce": (bce, ("weight", "label_smoothing")),
    "bce-dice": (bce_dice, ("weight", "label_smoothing")),
}


class Loss(nn.Module):
    """A loss function with its options: forward(logits, target) -> scalar. weight (K,) or None follows .to(device)."""

    def __init__(self, function, *, weight, **options):
        super().__init__()
        self.function, self.options = function, options
        # Not in the state_dict: class weights follow from the data and the flags.
        self.register_buffer("weight", weight, persistent=False)

    def forward(self, logits, target):
        weight = {} if self.weight is None else {"weight": self.weight}
        return self.function(logits, target, **weight, **self.options)


def make_loss(name, *, ignore_index, weight=None, label_smoothing=0.0, ohem_thresh=None, ohem_min_kept=None):
    """Row `name` of LOSSES as a module; ohem_thresh and ohem_min_kept are needed, and read, only by ohem.

    Raises ValueError for an unknown name, and for class weights or smoothing given to a loss that would ignore them.
    """
    if name not in LOSSES:
        raise ValueError(f"unknown loss {name!r}, choose one of: {', '.join(LOSSES)}")
    function, takes = LOSSES[name]
    for option, given in (("weight", weight is not None), ("label_smoothing", label_smoothing != 0)):
        if given and option not in takes:
            able = ", ".join(row for row, (_, options) in LOSSES.items() if option in options)
            raise ValueError(f"the loss {name} has no use for {option}: leave it out, or choose one of: {able}")
    if "thresh" in takes and None in (ohem_thresh, ohem_min_kept):
        raise ValueError(f"the loss {name} needs ohem_thresh and ohem_min_kept")
    options = {"label_smoothing": label_smoothing, "thresh": ohem_thresh, "min_kept": ohem_min_kept}
    options = {option: value for option, value in options.items() if option in takes}
    return Loss(function, weight=weight, ignore_index=ignore_index, **options)
