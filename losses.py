"""Losses for semantic segmentation: functions of (logits, target) that return one scalar.

    logits  (N, K, H, W) float; float16 and bfloat16 are raised to float32 at the door, and autocast is off inside:
            a sum over 512 x 512 pixels does not fit into float16
    target  (N, H, W) int64, a class 0..K-1 or ignore_index

Pixels with ignore_index are out of every sum and every count: they change neither the loss nor any gradient. When all
are ignored the loss is 0 with a gradient of 0, still part of the graph, so that a step on such a batch is harmless.

DDP averages gradients over ranks, so what a loss divides by (valid pixels, Dice's sums) is that of ALL ranks, and OHEM
chooses among the pixels of all: one process or several give the same gradient, however unevenly the ignored pixels
fall. Lovasz, which sorts its pixels, stays per rank, and so do the points that mask_set_loss() draws.

A further loss is a function and a row in LOSSES. The last one, mask_set_loss(), has no row: it takes the queries of
Mask2Former, not logits.
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


class _SumOverProcesses(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        total = x.detach().clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, gradient):
        return _SumOverProcesses.forward(ctx, gradient)


def sum_over_processes(x):
    """x summed over the processes that train together; a gradient is that of the losses of all of them."""
    return _SumOverProcesses.apply(x) if dist.is_available() and dist.is_initialized() else x


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


@torch.no_grad()
def boundary_map(target, ignore_index, width):
    """(N, H, W) bool: valid pixels at most `width` pixels away, diagonals included, from a pixel of another class.

    Both sides of a label boundary, `width` pixels each. Ignored pixels and the image's border make no boundary; classes
    that face each other over a strip of ignored pixels do.
    """
    valid, ids = target != ignore_index, target.float()

    def window_max(x):  # over 2 * width + 1 pixels each way; ignored pixels never win, and padding is -inf too
        x = x.masked_fill(~valid, -math.inf).unsqueeze(1)
        for size, pad in (((2 * width + 1, 1), (width, 0)), ((1, 2 * width + 1), (0, width))):
            x = F.max_pool2d(x, size, stride=1, padding=pad)
        return x.squeeze(1)

    return valid & (window_max(ids) != -window_max(-ids))


def _log_likelihood(logits, target, ignore_index):
    """log p (N, K, H, W), and -log p of the true class (N, H, W), 0 where ignored: what all that follow start from.

    A loss of two parts computes it once: on a CPU the softmax and its gradient cost more than all the rest.
    """
    log_p = logits.log_softmax(1)
    return log_p, F.nll_loss(log_p, target, ignore_index=ignore_index, reduction="none")


def _pixel_cross_entropy(
    log_p, nll, target, ignore_index, *, weight=None, label_smoothing=0.0, boundary_weight=0.0, boundary_width=None
):
    """Loss and weight of each pixel (N, H, W), 0 where ignored; F.cross_entropy's mean is the ratio of their sums.

    The options of the whole cross-entropy family: weight (K,) of the classes; label_smoothing, the share of the target
    spread over all classes; boundary_weight, by which the weight 1 of a pixel in boundary_map(boundary_width) grows, as
    w0 does in U-Net's distance map (Ronneberger et al. 2015, eq. 2; here a band of constant weight).
    """
    loss, weights = nll, target != ignore_index
    weight = None if weight is None else weight.to(log_p.dtype)
    if label_smoothing:
        mean = log_p.mean(1) if weight is None else torch.einsum("nkhw,k->nhw", log_p, weight / len(weight))
        spread = label_smoothing * -mean * weights
    if weight is not None:
        weights = weight[target.where(weights, 0)] * weights  # 255 must never be an index
        loss = nll * weights
    if label_smoothing:
        loss = (1 - label_smoothing) * loss + spread
    if boundary_weight:
        factor = 1 + boundary_weight * boundary_map(target, ignore_index, boundary_width)
        loss, weights = loss * factor, weights * factor
    return loss, weights


@_in_float32
def cross_entropy(logits, target, *, ignore_index=255, **options):
    """Softmax cross-entropy, averaged over the valid pixels of all ranks; options: see _pixel_cross_entropy.

    Equals F.cross_entropy, but for a batch with nothing to average (0, not NaN) and for the mean over ranks: one rank
    returns its sum * ranks / global count, which may be far from its own mean; the average over ranks is the mean.
    """
    pixels = _log_likelihood(logits, target, ignore_index)
    loss, weights = _pixel_cross_entropy(*pixels, target, ignore_index, **options)
    return _global_mean(loss.sum(), weights.sum())


@_in_float32
def focal_loss(logits, target, *, gamma, ignore_index=255, **options):
    """Cross-entropy times (1 - p)^gamma, p the softmax probability of the true class, and the same mean.

    Lin et al. 2017 (arXiv 1708.02002), for K classes. weight (K,) is the paper's alpha; gamma 0 is cross_entropy.
    """
    if gamma < 0:
        raise ValueError(f"the focal loss needs gamma >= 0, got {gamma}")
    log_p, nll = _log_likelihood(logits, target, ignore_index)
    loss, weights = _pixel_cross_entropy(log_p, nll, target, ignore_index, **options)
    # expm1 keeps the digits of a small 1 - p. The clamp stops the gradient at p = 1: gamma < 1 makes it infinite there.
    miss = (-torch.expm1(-nll)).clamp(min=torch.finfo(nll.dtype).tiny)
    return _global_mean((miss**gamma * loss).sum(), weights.sum())


@_in_float32
def ohem_cross_entropy(logits, target, *, thresh, min_kept, ignore_index=255, **options):
    """Online hard example mining: cross-entropy over the hard pixels only (Shrivastava et al. 2016, arXiv 1604.03540).

    Hard: the true class has a probability below thresh. If fewer than min_kept pixels of the batch are hard, the
    min_kept hardest are kept (all valid ones if there are fewer); ties with the last of them are kept too, so the order
    of pixels never matters. The mean is over the kept pixels, or their weights; options: see _pixel_cross_entropy.
    """
    if not 0 < thresh <= 1 or min_kept < 0:
        raise ValueError(f"OHEM needs 0 < thresh <= 1 and min_kept >= 0, got {thresh} and {min_kept}")
    log_p, nll = _log_likelihood(logits, target, ignore_index)
    loss, weights = _pixel_cross_entropy(log_p, nll, target, ignore_index, **options)
    with torch.no_grad():
        # Rank by -log p, not by p: the p of very wrong pixels underflows to 0.
        nll = nll.masked_fill(target == ignore_index, -math.inf)
        keep = nll > -math.log(thresh)
        if min_kept > 0:
            # The k-th is -inf if fewer pixels are valid: then all are kept, and ignored ones have loss and weight 0.
            hardest = nll.flatten().topk(min(min_kept, nll.numel()), sorted=False).values
            if logits.requires_grad and dist.is_available() and dist.is_initialized():  # see _global_mean()
                ranks = [torch.empty_like(hardest) for _ in range(dist.get_world_size())]
                dist.all_gather(ranks, hardest)
                hardest = torch.cat(ranks).topk(min(min_kept, nll.numel() * len(ranks)), sorted=False).values
            keep |= nll >= hardest.min()
    return _global_mean((loss * keep).sum(), (weights * keep).sum())


# ---- region losses ----


def _tversky_per_class(log_p, nll, target, ignore_index, alpha=0.5, beta=0.5):
    """1 - Tversky index of each class over the batch (K,), 0 for classes not in the target, and which are in it (K,).

    With the defaults the index is Dice.
    """
    valid = (target != ignore_index).to(log_p.dtype)  # masks p like y: an ignored pixel is no false positive
    total = (log_p.exp() * valid.unsqueeze(1)).sum((0, 2, 3))  # (K,): sum p
    # sum(p y) without a one-hot (N, K, H, W): the true class's p, added up by class
    classes = target.where(valid > 0, 0).flatten()
    overlap = torch.zeros_like(total).index_add(0, classes, ((-nll).exp() * valid).flatten())
    pixels = torch.zeros_like(total).index_add(0, classes, valid.flatten())
    if total.requires_grad:  # see _global_mean()
        total, overlap, pixels = sum_over_processes(torch.stack([total, overlap, pixels]))
    present = pixels > 0
    # overlap + alpha * (total - overlap) + beta * (pixels - overlap): above 0 for a class in the target, so only the
    # absent ones need the 1, and no smoothing term is needed.
    size = ((1 - alpha - beta) * overlap + alpha * total + beta * pixels).where(present, 1)
    return (1 - overlap / size) * present, present


@_in_float32
def dice_loss(logits, target, *, ignore_index=255):
    """Soft Dice, 1 - 2 sum(p y) / (sum p + sum y), averaged over the classes in the target; sums run over the batch.

    Milletari et al. 2016 (arXiv 1606.04797), without the squares.
    """
    return _dice(*_log_likelihood(logits, target, ignore_index), target, ignore_index)


def _dice(log_p, nll, target, ignore_index):
    loss, present = _tversky_per_class(log_p, nll, target, ignore_index)
    return _mean(loss.sum(), present.sum())


@_in_float32
def tversky_loss(logits, target, *, alpha, beta, ignore_index=255):
    """1 - TP / (TP + alpha FP + beta FN), averaged over the classes in the target; soft sums over the batch.

    TP = sum(p y), FP = sum(p (1 - y)), FN = sum((1 - p) y): beta above alpha favours recall. Salehi et al. 2017 (arXiv
    1706.05721, best with 0.3 and 0.7); 0.5 and 0.5 is Dice, 1 and 1 is the soft IoU.
    """
    if alpha < 0 or beta <= 0:
        raise ValueError(f"the Tversky loss needs alpha >= 0 and beta > 0, got {alpha} and {beta}")
    pixels = _log_likelihood(logits, target, ignore_index)
    loss, present = _tversky_per_class(*pixels, target, ignore_index, alpha, beta)
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


@_in_float32
def ce_dice(logits, target, *, ignore_index=255, **options):
    """cross_entropy (with its options) + dice_loss (without), one to one, as in nnU-Net (Isensee et al. 2021)."""
    pixels = _log_likelihood(logits, target, ignore_index)
    loss, weights = _pixel_cross_entropy(*pixels, target, ignore_index, **options)
    return _global_mean(loss.sum(), weights.sum()) + _dice(*pixels, target, ignore_index)


# ---- binary tasks: logits (N, 2, H, W) of background and foreground ----


def bce(logits, target, *, ignore_index=255, **options):
    """Binary cross-entropy of the foreground logit, which is logits[:, 1] - logits[:, 0].

    The softmax of two logits is the sigmoid of their difference, so this is cross_entropy for K = 2, and a binary
    network keeps the two logits and the argmax that every other part expects. Raises ValueError for K != 2.
    """
    if logits.shape[1] != 2:
        raise ValueError(
            f"a binary loss needs 2 classes, logits (N, 2, H, W) of background and foreground, and got "
            f"{logits.shape[1]}: choose another loss, such as ce or ce-dice"
        )
    return cross_entropy(logits, target, ignore_index=ignore_index, **options)


@_in_float32
def bce_dice(logits, target, *, ignore_index=255, **options):
    """bce + soft Dice of the foreground alone, one to one; the Dice part is 0 for a batch without foreground."""
    ce = bce(logits, target, ignore_index=ignore_index, **options)
    return ce + _tversky_per_class(*_log_likelihood(logits, target, ignore_index), target, ignore_index)[0][1]


# ---- distillation ----
#
# Those of logits take them where the label is: (N, K, H, W), after the network's resizing, and a teacher's of the same
# shape. Those of features take maps (N, C, h, w) or tokens (N, T, C) of an encoder, the student's already as wide as
# the teacher's, and which of these places show a labelled pixel. A teacher never gets a gradient.


@_in_float32
def distillation(
    logits, target, *, teacher, temperature=1.0, ignore_index=255, weight=None, boundary_weight=0.0, boundary_width=3
):
    """T^2 KL(teacher || student) of softmax(logits / T), summed over the classes (Hinton et al. 2015, section 2).

    The mean is over the valid pixels of all ranks, so that neither K, nor the size of the images or the batch, nor what
    is ignored changes the weight of the term. weight (K,): of the classes, a pixel's that of its label, as in
    cross_entropy(); without it rare classes learn little from a teacher. boundary_weight W: the mean over the pixels
    off boundary_map() plus W times the mean over those on it, which are few (after Liu et al. 2024, Boundary Privileged
    Knowledge Distillation).
    """
    student, teacher = ((x / temperature).log_softmax(1) for x in (logits, _like(teacher, logits)))  # (N, K, H, W)
    divergence = temperature**2 * F.kl_div(student, teacher, log_target=True, reduction="none").sum(1)  # (N, H, W)
    weights = (target != ignore_index).to(divergence.dtype)
    if weight is not None:
        weights = weights * weight.to(weights.dtype)[target.where(target != ignore_index, 0)]
    if not boundary_weight:
        return _global_mean((divergence * weights).sum(), weights.sum())
    edge = boundary_map(target, ignore_index, boundary_width)
    body, edge = (_global_mean((divergence * part).sum(), part.sum()) for part in (weights * ~edge, weights * edge))
    return body + boundary_weight * edge


@_in_float32
def channel_distillation(logits, target, *, teacher, temperature=4.0, ignore_index=255):
    """T^2 KL(teacher || student) of softmax(logits / T) over the pixels of a class map, the mean over maps and images.

    Channel-wise distillation (Shu et al. 2021): where in the image a class is, not which class a pixel has.
    """
    valid = (target != ignore_index)[:, None]
    far = torch.finfo(logits.dtype).min / 2  # -inf would make the gradient of an image without a label NaN
    student, teacher = (
        (x / temperature).masked_fill(~valid, far).flatten(2).log_softmax(2) for x in (logits, _like(teacher, logits))
    )  # (N, K, H * W)
    divergence = F.kl_div(student, teacher, log_target=True, reduction="none") * valid.flatten(2)
    return temperature**2 * _global_mean(divergence.sum(2).mean(1).sum(), valid.flatten(1).any(1).sum())


@_in_float32
def relation_distillation(logits, target, *, teacher, ignore_index=255):
    """1 - Pearson correlation of teacher's and student's probabilities over the classes of each pixel, plus the same
    over the pixels of each class and image (DIST, Huang et al. 2022).

    A class map of the teacher without any contrast has no correlation, and is left out.
    """
    valid = (target != ignore_index)[:, None]
    student, teacher = (x.softmax(1) for x in (logits, _like(teacher, logits)))
    between, _ = _correlation(student, teacher, torch.ones_like(valid), 1)  # (N, 1, H, W)
    within, there = _correlation(student.flatten(2), teacher.flatten(2), valid.flatten(2), 2)  # (N, K, 1)
    pixels = _global_mean(((1 - between) * valid).sum(), valid.sum())
    return pixels + _global_mean(((1 - within) * there).sum(), there.sum())


def _like(teacher, logits):
    """The teacher's logits in the student's dtype, without a gradient. Raises ValueError for another shape."""
    if teacher.shape != logits.shape:
        raise ValueError(f"the teacher's logits are {tuple(teacher.shape)}, the student's {tuple(logits.shape)}")
    return teacher.detach().to(logits.dtype)


def _correlation(a, b, valid, dim):
    """(Pearson correlation along `dim`, which it keeps, over what is valid; where b varies at all)."""
    valid = valid.expand_as(a)
    count = valid.sum(dim, keepdim=True).clamp(min=1)
    a, b = ((x - (x * valid).sum(dim, keepdim=True) / count) * valid for x in (a, b))
    square = b.square().sum(dim, keepdim=True)
    length = (a.square().sum(dim, keepdim=True) + 1e-12).sqrt() * (square + 1e-12).sqrt()
    return (a * b).sum(dim, keepdim=True) / length, square > 1e-6


def _of_features(loss):
    """Decorator: run `loss` on float32 (or float64) features with autocast off, the teacher's without a gradient."""

    @functools.wraps(loss)
    def run(student, teacher, valid):
        with torch.autocast(student.device.type, enabled=False):
            student = student if student.dtype == torch.float64 else student.float()
            return loss(student, teacher.detach().to(student.dtype), valid)

    return run


def places(target, size, covers, ignore_index=255):
    """(N, h, w) bool: which cells of feature maps of `size` (h, w) have a labelled pixel of target (N, H, W).

    covers: (rows, columns) of the padded image that the maps are of.
    """
    labelled = (target != ignore_index).float()[:, None]
    rows, columns = (n - m for n, m in zip(covers, target.shape[1:], strict=True))
    return F.adaptive_max_pool2d(F.pad(labelled, (0, columns, 0, rows)), size)[:, 0] > 0


def labels_on_grid(target, size, covers, ignore_index=255):
    """(N, h, w): the labels of target (N, H, W) at the centres of the cells of feature maps of `size` (h, w), which are
    of the image padded to `covers` (rows, columns); ignore_index where that is padding."""
    for dim, (n, to) in enumerate(zip(size, covers, strict=True), start=1):
        at = (2 * torch.arange(n, device=target.device) + 1) * to // (2 * n)
        inside = (at < target.shape[dim]).unflatten(0, (-1, *[1] * (2 - dim)))
        target = target.index_select(dim, at.clamp(max=target.shape[dim] - 1)).where(inside, ignore_index)
    return target


def on_grid(x, covers, size, covers_too):
    """Maps x (N, C, h, w) of an image padded to `covers` (rows, columns), at the cells of maps of `size` of the image
    padded to `covers_too`: bilinear samples where the stride or the padding is another."""
    if x.shape[-2:] == size and covers == covers_too:
        return x
    both = zip(size, covers_too, covers, strict=True)
    rows, columns = ((2 * torch.arange(n, device=x.device) + 1) / n * to / own - 1 for n, to, own in both)
    grid = torch.stack(torch.meshgrid(rows, columns, indexing="ij")[::-1], -1).to(x.dtype)  # (h, w, 2): x, y
    return F.grid_sample(x, grid.expand(len(x), -1, -1, -1), padding_mode="border", align_corners=False)


@_of_features
def cosine_distillation(student, teacher, valid):
    """1 - cosine similarity along the channels of maps (N, C, h, w), the mean over the valid (N, h, w) places."""
    return _global_mean(((1 - F.cosine_similarity(student, teacher, dim=1)) * valid).sum(), valid.sum())


@_of_features
def generation_distillation(student, teacher, valid):
    """Squared error of maps (N, C, h, w) to the teacher's, each of whose places is normalised over the channels, the
    mean over the valid (N, h, w) ones and the channels (masked generative distillation, Yang et al. 2022)."""
    wanted = F.layer_norm(teacher.movedim(1, -1), teacher.shape[1:2]).movedim(-1, 1)
    return _global_mean(((student - wanted).square().mean(1) * valid).sum(), valid.sum())


@_of_features
def projection_distillation(student, teacher, valid):
    """Attention-based layer projection (ALP-KD, Passban et al. 2021) -> (loss, attention (S, L)).

    student: tokens (S, N, T, C) of its S layers. teacher: those of its L layers (L, N, T, C). Each token attends, by
    scaled dot product, to the same token in all layers of the teacher; the loss is the squared error to the mix, the
    mean over layers, channels and the valid (N, T) tokens. All are normalised first, without parameters: the few
    channels in which transformers keep huge numbers would decide everything alone. attention: its mean over the tokens.
    """
    student, teacher = (F.layer_norm(x, x.shape[-1:]) for x in (student, teacher))
    attention = (torch.einsum("sntc,lntc->sntl", student, teacher) / student.shape[-1] ** 0.5).softmax(-1)
    mix = torch.einsum("sntl,lntc->sntc", attention, teacher)
    mean = _mean((attention.detach() * valid[..., None]).sum((1, 2)), valid.sum())
    return _global_mean(((student - mix).square().mean((0, 3)) * valid).sum(), valid.sum()), mean


# ---- sets of masks: what Mask2Former is trained with ----


def mask_set_loss(outputs, target, ignore_index, *, stride=None, points=12544, weights=(2.0, 5.0, 5.0), no_object=0.1):
    """Loss of sets of masks against target (N, H, W) (Cheng et al. 2022, section 3.3), summed over decoder layers.

    outputs: [(classes (N, Q, K + 1), masks (N, Q, h, w))], the masks over the same area as the target, or with `stride`
    over h * stride by w * stride pixels, of which the target is the upper left.

    Every class in an image is a mask to find. The Hungarian algorithm gives each the query that costs least, which
    learns its class (cross-entropy) and its mask (binary cross-entropy and Dice, at random points); the others learn
    "no object", at the weight `no_object`. weights: of the three losses, and of the matching's three costs.

    In float32, whatever autocast says. Ignored pixels are out: a point interpolated from one counts nowhere, an image
    of nothing else is no part of the batch, and where no image is left the loss is 0.
    """
    if stride is not None:
        (h, w), (height, width) = outputs[0][1].shape[-2:], target.shape[-2:]
        target = F.pad(target, (0, stride * w - width, 0, stride * h - height), value=ignore_index)
    with torch.autocast(target.device.type, enabled=False):
        ignored = target == ignore_index
        used = ~ignored.flatten(1).all(1)  # images with a label
        target, ignored = target[used], ignored[used].float()
        labels = [t[t != ignore_index].unique() for t in target]
        count = _mean_over_processes(sum(len(k) for k in labels), target.device)
        if not labels:
            return 0 * sum(classes.float().sum() + masks.float().sum() for classes, masks in outputs)
        truth = [(t == k[:, None, None]).float() for t, k in zip(target, labels, strict=True)]  # (M, H, W) each
        total = 0.0
        for classes, masks in outputs:
            losses = _layer_losses(
                classes.float()[used], masks.float()[used], labels, truth, ignored, count, points, weights, no_object
            )
            total = total + sum(weight * loss for weight, loss in zip(weights, losses, strict=True))
    return total


def _layer_losses(classes, masks, labels, truth, ignored, count, points, weights, no_object):
    """(class, mask, Dice) loss of one decoder layer; the latter two summed over the masks and divided by `count`."""
    pairs = [
        _match(c, m, k, t, i, points, weights)
        for c, m, k, t, i in zip(classes, masks, labels, truth, ignored, strict=True)
    ]
    image = torch.cat([torch.full_like(q, n) for n, (q, _) in enumerate(pairs)])
    query = torch.cat([q for q, _ in pairs])
    wanted = torch.full(classes.shape[:2], classes.shape[2] - 1, device=classes.device)  # "no object" is the last
    wanted[image, query] = torch.cat([k[found] for k, (_, found) in zip(labels, pairs, strict=True)])
    class_weights = torch.ones(classes.shape[2], device=classes.device)
    class_weights[-1] = no_object
    class_loss = F.cross_entropy(classes.mT, wanted, class_weights)

    masks, ignored = masks[image, query], ignored[image]  # (M, h, w), (M, H, W) of all images
    truth = torch.cat([t[found] for t, (_, found) in zip(truth, pairs, strict=True)])
    with torch.no_grad():
        places = _uncertain_places(masks, ignored, points)
        truth, valid = _sample(truth, places), _sample(ignored, places) == 0
    masks, truth = _sample(masks, places), truth * valid
    bce = F.binary_cross_entropy_with_logits(masks, truth, reduction="none") * valid
    p = masks.sigmoid() * valid
    dice = 1 - (2 * (p * truth).sum(1) + 1) / (p.sum(1) + truth.sum(1) + 1)
    return class_loss, (bce.sum(1) / valid.sum(1).clamp(min=1)).sum() / count, dice.sum() / count


@torch.no_grad()
def _match(classes, masks, labels, truth, ignored, points, weights):
    """Queries and the true masks they are given, both (M,): the pairs of least cost in one image (Kuhn 1955).

    classes (Q, K + 1), masks (Q, h, w), labels (M,), truth (M, H, W), ignored (H, W); all are compared at the same
    random places.
    """
    from scipy.optimize import linear_sum_assignment

    places = torch.rand(1, points, 2, device=masks.device)
    masks, truth = _sample(masks, places), _sample(truth, places)  # (Q, P), (M, P)
    valid = _sample(ignored[None], places) == 0  # (1, P)
    truth, p = truth * valid, masks.sigmoid() * valid
    bce = (F.softplus(-masks) * valid) @ truth.mT + (F.softplus(masks) * valid) @ (1 - truth).mT  # (Q, M)
    dice = 1 - (2 * p @ truth.mT + 1) / (p.sum(1)[:, None] + truth.sum(1) + 1)
    costs = (-classes.softmax(-1)[:, labels], bce / valid.sum().clamp(min=1), dice)
    cost = sum(weight * c for weight, c in zip(weights, costs, strict=True))
    query, found = linear_sum_assignment(cost.nan_to_num(posinf=1e9, neginf=-1e9, nan=1e9).cpu())  # loop reports NaN
    return torch.as_tensor(query, device=masks.device), torch.as_tensor(found, device=masks.device)


def _uncertain_places(masks, ignored, points, oversample=3, share=0.75):
    """Random places (M, P, 2), a `share` the least certain of oversample * P (Kirillov et al. 2020, section 3.1)."""
    places = torch.rand(len(masks), oversample * points, 2, device=masks.device)
    doubt = -_sample(masks, places).abs()
    doubt = doubt.masked_fill(_sample(ignored, places) > 0, -math.inf)
    first = doubt.topk(int(share * points)).indices
    chosen = places.gather(1, first[..., None].expand(-1, -1, 2))
    more = torch.rand(len(masks), points - first.shape[1], 2, device=masks.device)
    return torch.cat([chosen, more], dim=1)


def _sample(maps, places):
    """Bilinear samples (M, P) of maps (M, H, W) at places (M or 1, P, 2): x and y from 0 to 1, over the whole map."""
    grid = 2 * places[:, None].expand(len(maps), -1, -1, -1) - 1
    return F.grid_sample(maps[:, None], grid, align_corners=False)[:, 0, 0]


def _mean_over_processes(count, device):
    """The mean of `count` over the processes that train together, 1 at least (their gradients are averaged too)."""
    count = torch.tensor(float(count), device=device)
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(count)
        count /= dist.get_world_size()
    return count.clamp(min=1)


# ---- the table ----

# what the cross-entropy family can switch on
FAMILY = ("weight", "label_smoothing", "boundary_weight")

# name for --loss: (function, what may be switched on, the settings it needs)
LOSSES = {
    "ce": (cross_entropy, FAMILY, ()),
    "focal": (focal_loss, ("weight", "boundary_weight"), ("gamma",)),
    "ohem": (ohem_cross_entropy, FAMILY, ("thresh", "min_kept")),
    "dice": (dice_loss, (), ()),
    "tversky": (tversky_loss, (), ("alpha", "beta")),
    "lovasz": (lovasz_softmax, (), ()),
    "ce-dice": (ce_dice, FAMILY, ()),
    "bce": (bce, FAMILY, ()),
    "bce-dice": (bce_dice, FAMILY, ()),
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


def make_loss(
    name, *, ignore_index, weight=None, label_smoothing=0.0, boundary_weight=0.0, boundary_width=None, **settings
):
    """Row `name` of LOSSES as a module.

    settings: `<row>_<option>` for what a row needs, such as ohem_thresh and ohem_min_kept; those of other rows are not
    read. Raises ValueError for an unknown name, for a missing setting, and for class weights, smoothing or boundary
    weights given to a loss that would ignore them.
    """
    if name not in LOSSES:
        raise ValueError(f"unknown loss {name!r}, choose one of: {', '.join(LOSSES)}")
    function, switches, needs = LOSSES[name]
    options = {"label_smoothing": label_smoothing, "boundary_weight": boundary_weight}
    options = {option: value for option, value in options.items() if value}
    for option in [*options, *(["weight"] if weight is not None else [])]:
        if option not in switches:
            able = ", ".join(row for row in LOSSES if option in LOSSES[row][1])
            raise ValueError(f"the loss {name} has no use for {option}: leave it out, or choose one of: {able}")
    if boundary_weight:
        if boundary_weight < 0 or boundary_width is None or boundary_width < 1:
            given = f"{boundary_weight} and {boundary_width}"
            raise ValueError(f"boundary_weight must be 0 or more and boundary_width 1 pixel or more, got {given}")
        options["boundary_width"] = boundary_width
    options |= {option: settings.get(f"{name}_{option}") for option in needs}
    missing = [f"{name}_{option}" for option in needs if options[option] is None]
    if missing:
        raise ValueError(f"the loss {name} needs {' and '.join(missing)}")
    return Loss(function, weight=weight, ignore_index=ignore_index, **options)
