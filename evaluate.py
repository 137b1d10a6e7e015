"""Score a checkpoint on a data set, or predict images.

    python evaluate.py                                          # checkpoints/train/best.pt on its own validation split
    python evaluate.py --tta                                    # scales 0.75, 1, 1.25, each also flipped
    python evaluate.py --slide 256 256 --slide-stride 170 170   # sliding window, memory constant in the image's height
    python evaluate.py --gallery                                # and gallery.html: every image, the worst first
    python evaluate.py --images photo.jpg --out predictions     # photo_ids.png and photo_overlay.png
    python evaluate.py --crf 5                                  # five mean-field steps of a dense CRF on the prediction
    python evaluate.py --adapter checkpoints/lora/adapter.pt    # --weights with what lora.py trained, each on its data

Writes results.json, confusion.png, class_iou.png and examples.png to --out.

mIoU here: one int64 K x K confusion matrix over the whole data set, at label resolution; the IoU of a class is
TP / (TP + FP + FN), and a class that is absent from both prediction and label is NaN and left out of the mean. So
neither the batch size nor the number of processes changes the number.

Logits never exist at full size. They stay at the network's stride and are upsampled a few rows at a time straight into
the arg max: 150 classes at 2048 x 1024 would otherwise be 1.2 GiB for one image. Only --crf needs them all, and keeps
about six such tensors.
"""

if __name__ == "__main__":  # the imports take seconds: Ctrl-C ends them without a traceback
    import signal

    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import base64
import contextlib
import copy
import csv
import ctypes
import functools
import io
import itertools
import json
import math
import os
import re
import shlex
import signal
import socket
import stat
import statistics
import sys
import threading
import time
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from torchvision import tv_tensors
from tqdm import tqdm

import datasets
import int8
import models
from datasets import DataError, DataInfo, count, image_scale, pixels, positive_int, thread_count, worker_count
from models import ModelError

try:
    import fcntl
except ImportError:  # Windows: nothing keeps two runs apart
    fcntl = None

try:
    import resource
except ImportError:  # Windows
    resource = None

CHUNK = 1 << 20  # numbers in one chunk of upsampled logits: 4 MiB of float32, about what a CPU core's cache holds
TTA_SCALES = (0.75, 1.0, 1.25)

# ---- metrics --------------------------------------------------------------------------------------------------------


class ConfusionMatrix:
    """Pixel counts (K, K), int64 on the CPU: rows are the label, columns the prediction.

    mIoU rule: one matrix over the whole data set, and a class absent from both prediction and label is NaN and left out
    of the mean.
    """

    def __init__(self, num_classes, ignore_index=255):
        self.num_classes, self.ignore_index = num_classes, ignore_index
        self.counts = torch.zeros(num_classes, num_classes, dtype=torch.int64)

    def update(self, target, prediction):
        """Add the pixels of two integer tensors of one shape. ValueError names the values that are no class."""
        if target.shape != prediction.shape:
            raise ValueError(f"target is {tuple(target.shape)} but prediction is {tuple(prediction.shape)}")
        target, prediction = target.cpu().flatten(), prediction.cpu().flatten()
        valid = target != self.ignore_index
        target, prediction = target[valid].long(), prediction[valid].long()  # long first: uint8 sums would wrap round
        for name, ids in (("target", target), ("prediction", prediction)):
            bad = ids[(ids < 0) | (ids >= self.num_classes)]
            if bad.numel():
                allowed = f"0..{self.num_classes - 1} or {self.ignore_index} (ignored)"
                raise ValueError(f"{name} holds {bad.unique().tolist()[:10]}, expected {allowed}")
        pairs = torch.bincount(target * self.num_classes + prediction, minlength=self.num_classes**2)
        self.counts += pairs.view(self.num_classes, self.num_classes)

    def reduce(self):
        """A new matrix summed over the processes; this one keeps its own counts, so reducing twice counts once."""
        total = ConfusionMatrix(self.num_classes, self.ignore_index)
        total.counts = sum_over_processes(self.counts)
        return total

    def metrics(self):
        """miou, macc, aacc in percent; class_iou and class_acc, in percent; classes_averaged.

        macc is the mean accuracy (recall) of the classes present in the label. What is undefined is NaN.
        """
        counts = self.counts.double()
        hits, labelled, predicted = counts.diag(), counts.sum(1), counts.sum(0)
        iou = 100 * hits / (labelled + predicted - hits)  # 0 / 0 is NaN: the class is in neither
        acc = 100 * hits / labelled
        return {
            "miou": iou.nanmean().item(), "macc": acc.nanmean().item(), "class_iou": iou.tolist(),
            "aacc": (100 * hits.sum() / counts.sum()).item(), "class_acc": acc.tolist(),
            "classes_averaged": int((~iou.isnan()).sum()),
        }  # fmt: skip


class BoundaryIoU:
    """IoU of mask boundaries, summed per class over the data set (Cheng et al. 2021, arXiv 2103.16562).

    The boundary of a mask is the mask minus the mask eroded by d = 2% of the image diagonal. The outside of the image
    counts as background, as in the paper's code. Ignored pixels belong to no mask, in label and prediction alike.
    """

    def __init__(self, num_classes, ignore_index=255, *, ratio=0.02):
        self.num_classes, self.ignore_index, self.ratio = num_classes, ignore_index, ratio
        self.counts = torch.zeros(2, num_classes, dtype=torch.int64)  # intersection, union

    def update(self, target, prediction):
        """Add the images of two integer tensors (N, H, W)."""
        target, prediction = target.cpu(), prediction.cpu()
        valid = target != self.ignore_index
        # Class ids move up by one, so that 0 is free for what belongs to no mask: ignored pixels and the outside.
        ids = torch.stack([target.to(torch.int16), prediction.to(torch.int16)]) + 1  # (2, N, H, W)
        ids *= valid
        edges = ids * boundary_pixels(ids, max(1, round(self.ratio * math.hypot(*target.shape[-2:]))))
        both = edges[0][edges[0] == edges[1]]
        inter, label, predicted = (
            torch.bincount(x.flatten().long(), minlength=self.num_classes + 1)[1:] for x in (both, edges[0], edges[1])
        )
        self.counts += torch.stack([inter, label + predicted - inter])

    def reduce(self):
        """A new object summed over the processes."""
        total = BoundaryIoU(self.num_classes, self.ignore_index, ratio=self.ratio)
        total.counts = sum_over_processes(self.counts)
        return total

    def metrics(self):
        """boundary_iou in percent (mean over classes, NaN left out) and class_boundary_iou, a list."""
        inter, union = self.counts.double()
        iou = 100 * inter / union
        return {"boundary_iou": iou.nanmean().item(), "class_boundary_iou": iou.tolist()}


def boundary_pixels(ids, d):
    """(..., H, W) ids > 0 -> bool: the pixels that an erosion by d removes from the mask of their own class.

    A pixel of class c survives if its whole (2d+1) x (2d+1) window is c, so if the window's minimum and maximum are
    both c. That is one max-pool and one min-pool for all classes together, where mask by mask it would be K of them.
    """
    padded = F.pad(ids, (d, d, d, d), value=0)
    highest, lowest = window_max(padded, 2 * d + 1), -window_max(-padded, 2 * d + 1)
    return highest != lowest


def window_max(x, size):
    """Maximum over every size x size window, (..., H, W) -> (..., H - size + 1, W - size + 1).

    A max-pool of stride 1 by doubling: the maximum over 2n pixels is that of two windows of n, so log2(size) steps.
    """
    for dim in (-2, -1):
        width = 1
        while width < size:
            shift = min(width, size - width)
            keep = x.shape[dim] - shift
            x = torch.maximum(x.narrow(dim, 0, keep), x.narrow(dim, shift, keep))
            width += shift
    return x


def sum_over_processes(counts):
    """The sum over all processes of a CPU tensor, as a new one; a plain copy where there is only one process."""
    total = counts.clone()
    if dist.is_available() and dist.is_initialized():
        total = total.cuda() if dist.get_backend() == "nccl" else total  # nccl sums on the GPU only
        dist.all_reduce(total)
    return total.cpu()


# ---- prediction -----------------------------------------------------------------------------------------------------


class View(NamedTuple):
    """Low-resolution logits of one look (a scale, perhaps mirrored) at a part of the image."""

    logits: Tensor  # (N, K, h, w)
    steps: tuple  # logits pixels per pixel of that part, vertically and horizontally
    flipped: bool


def upsample_rows(logits, rows, cols):
    """Bilinear samples of logits (N, K, h, w) at source coordinates rows (R,), cols (C,) -> float32 (N, K, R, C).

    Coordinates are float64 on the CPU, in pixels of the logits, clamped at the border. With (r + 0.5) * h / H - 0.5 it
    is F.interpolate(align_corners=False) to H rows; only the rows asked for are computed.
    """
    (y0, y1, ty), (x0, x1, tx) = neighbours(rows, logits.shape[-2]), neighbours(cols, logits.shape[-1])
    top, bottom = int(y0.min()), int(y1.max()) + 1
    band = logits[:, :, top:bottom].float()  # float before mixing: bfloat16 has 8 bits
    device, shape = band.device, (*band.shape[:3], len(cols))
    # Columns first, while there are few rows. gather is 5 times faster here than indexing.
    left, right = (band.gather(3, x.to(device).expand(shape)) for x in (x0, x1))
    band = torch.lerp(left, right, tx.to(device))  # (N, K, bottom - top, C)
    above, below = (band.index_select(2, (y - top).to(device)) for y in (y0, y1))
    return torch.lerp(above, below, ty.to(device)[:, None])


def neighbours(coords, length):
    """Source coordinates -> the two neighbouring indices in 0..length-1 and the weight of the second one."""
    coords = coords.clamp(0, length - 1)
    low = coords.floor()
    return low.long(), (low.long() + 1).clamp(max=length - 1), (coords - low).float()


def look(model, images, *, scales, flip, amp_dtype):
    """Run the network on images (N, 3, H, W) at every scale, and mirrored too if `flip` -> list of View."""
    views = []
    height, width = images.shape[-2:]
    for scale in scales:
        size = (max(1, round(height * scale)), max(1, round(width * scale)))
        scaled = images
        if size != (height, width):
            scaled = F.interpolate(images, size=size, mode="bilinear", align_corners=False, antialias=scale < 1)
        padded = [math.ceil(n / model.stride) * model.stride for n in size]
        for flipped in (False, True) if flip else (False,):
            with torch.autocast(images.device.type, dtype=amp_dtype, enabled=amp_dtype is not None):
                logits = model.decode(model.encode(scaled.flip(-1) if flipped else scaled))
            if not torch.isfinite(logits).all():  # the arg max of NaN would be class 0
                raise ModelError("the network gives logits that are not finite: its weights are damaged or diverged")
            h, w = logits.shape[-2:]
            views.append(View(logits, (size[0] / height * h / padded[0], size[1] / width * w / padded[1]), flipped))
    return views


def view_rows(views, rows, cols, width):
    """Scores (N, K, R, C) at pixel positions rows, cols of the part of the image that the views show, `width` wide.

    One view: its logits. Several: the sum of their softmax, in float32. A mirrored view is read at mirrored positions,
    which undoes the flip after the padding on its right has been cropped.
    """
    total = None
    for logits, (step_y, step_x), flipped in views:
        x = width - cols if flipped else cols
        scores = upsample_rows(logits, rows * step_y - 0.5, x * step_x - 0.5)
        if len(views) == 1:
            return scores
        total = scores.softmax(1) if total is None else total.add_(scores.softmax(1))
    return total


def whole_scores(model, images, size, **look_options):
    """Yield (first row, scores (N, K, R, W)) for chunks of rows of the output `size`, from one pass over the images."""
    height, width = images.shape[-2:]
    views = look(model, images, **look_options)
    rows, cols = centres(size[0], height), centres(size[1], width)
    step = chunk_rows(views[0].logits, size[1])
    for first in range(0, size[0], step):
        yield first, view_rows(views, rows[first : first + step], cols, width)


def slide_scores(model, images, size, window, stride, **look_options):
    """Like whole_scores, from windows (h, w) at `stride` that cover the images, the last one flush with the border.

    Scores are the mean over the windows that overlap. Only the rows that the present row of windows covers are kept, so
    memory does not grow with the height of the image.
    """
    (height, width), (window_h, window_w) = images.shape[-2:], window
    rows, cols = centres(size[0], height), centres(size[1], width)
    tops, lefts = (starts(n, w, s) for n, w, s in zip((height, width), window, stride, strict=True))
    windows_y, windows_x = windows_over(rows, tops, window_h), windows_over(cols, lefts, window_w)
    band, first = None, 0  # sums (N, K, R, W) of the output rows first, first + 1, ...
    for top, next_top in zip(tops, [*tops[1:], height], strict=True):
        start, stop = span(rows, top, top + window_h)  # output rows whose centre lies in this row of windows
        for left in lefts:
            views = look(model, images[:, :, top : top + window_h, left : left + window_w], **look_options)
            logits = views[0].logits
            if band is None:
                band = logits.new_zeros((*logits.shape[:2], 0, size[1]), dtype=torch.float32)
            if left == 0:  # a new row of windows: zeros below the rows that it shares with the last one
                band = F.pad(band, (0, 0, 0, stop - first - band.shape[2]))
            c0, c1 = span(cols, left, left + window_w)
            step = chunk_rows(logits, max(1, c1 - c0))
            for r0 in range(start, stop if c1 > c0 else start, step):
                r1 = min(r0 + step, stop)
                scores = view_rows(views, rows[r0:r1] - top, cols[c0:c1] - left, window_w)
                band[:, :, r0 - first : r1 - first, c0:c1] += scores
        done = span(rows, top, next_top)[1] - first  # rows that no later window reaches
        windows = windows_y[first : first + done, None] * windows_x  # (R, W)
        yield first, band[:, :, :done].div_(windows.to(band.device))
        band, first = band[:, :, done:], first + done


def centres(count, length):
    """Centres of `count` output pixels, in pixels of an image of `length` (float64)."""
    return (torch.arange(count, dtype=torch.float64) + 0.5) * (length / count)


def span(positions, low, high):
    """Index range (start, stop) of the sorted positions in low <= p < high."""
    return torch.searchsorted(positions, torch.tensor([low, high], dtype=positions.dtype)).tolist()


def starts(length, window, stride):
    """Where the windows begin: every `stride`, the last one flush with the end."""
    return [*range(0, length - window, stride), length - window]


def windows_over(positions, starts, length):
    """How many of the windows [start, start + length) each of the positions (P,) lies in, (P,)."""
    starts = torch.tensor(starts)
    return ((starts <= positions[:, None]) & (positions[:, None] < starts + length)).sum(1)


def chunk_rows(logits, width):
    """How many output rows of `width` to upsample at once. A GPU likes larger pieces than a CPU cache."""
    limit = 16 * CHUNK if logits.is_cuda else CHUNK
    return max(1, limit // (logits.shape[0] * logits.shape[1] * width))


@torch.inference_mode()
def predict(
    model, images, *, size=None, scales=(1.0,), flip=False, window=None, stride=None, amp_dtype=None, refine=None
):
    """Class ids (N, H, W) of images (N, 3, h, w) at `size` (H, W), default the images' own. uint8, int16 if K > 255.

    scales, flip: average the softmax of several views. window, stride: (h, w) of a sliding window in pixels of the
    images (stride: 2/3 of the window if None); what windows give, logits or with several views their softmax, is
    averaged in overlaps. amp_dtype: autocast to it, None for float32. refine(ids, log_p (N, K, H, W)) -> ids: a last
    step that needs log-probabilities at full size, which exist for it alone. ModelError if the stride leaves gaps.
    """
    height, width = images.shape[-2:]
    size = (height, width) if size is None else tuple(size)
    options = {"scales": scales, "flip": flip, "amp_dtype": amp_dtype}
    if window is not None:
        stride = [max(1, n * 2 // 3) for n in window] if stride is None else stride
        if not all(0 < s <= w for s, w in zip(stride, window, strict=True)):
            raise ModelError(
                f"stride {tuple(stride)} leaves gaps between windows of {tuple(window)}; give 1 up to the window"
            )
        window = (min(window[0], height), min(window[1], width))
    if window is None or window == (height, width):
        parts = whole_scores(model, images, size, **options)
    else:
        parts = slide_scores(model, images, size, window, stride, **options)
    ids, full = None, None
    for first, scores in parts:
        if ids is None:
            dtype = torch.uint8 if scores.shape[1] <= 255 else torch.int16
            ids = torch.empty((len(images), *size), dtype=dtype, device=scores.device)
            full = scores.new_empty((*scores.shape[:2], *size)) if refine else None
        # max(1) also gives the arg max, and is 7 times faster on a CPU than argmax(1).
        ids[:, first : first + scores.shape[2]] = scores.max(1).indices
        if refine:
            full[:, :, first : first + scores.shape[2]] = scores
    if not refine:
        return ids
    one_view = len(scales) == 1 and not flip  # its scores are logits, those of several the sum of their softmax
    return refine(ids, full.log_softmax(1) if one_view else full.div_(full.sum(1, keepdim=True)).log_())


def evaluate(
    model, loader, *, num_classes, ignore_index, device, boundary=True, progress=False, on_batch=None, reduce=True,
    **predict_options,
):  # fmt: skip
    """Score the model on batches (images (N, 3, h, w), target (N, H, W)), at the size of the target -> dict.

    Keys: those of the two metrics() above, confusion (nested list), images, images_per_second. Under torch.distributed
    each process gives its own share of the data and gets the numbers of the whole; reduce=False where only this one
    evaluates. on_batch(images, target, prediction) sees every batch. Afterwards every module is in the mode, training
    or not, that it was in before. DataError where no pixel is labelled.
    """
    matrix = ConfusionMatrix(num_classes, ignore_index)
    edges = BoundaryIoU(num_classes, ignore_index) if boundary else None
    training = [(module, module.training) for module in model.modules()]
    model.eval()
    images_seen, start = 0, time.perf_counter()
    try:
        for images, target in tqdm(loader, desc="evaluate", disable=not progress or None, leave=False):
            prediction = predict(model, images.to(device), size=target.shape[-2:], **predict_options).cpu()
            matrix.update(target, prediction)
            if edges:
                edges.update(target, prediction)
            if on_batch:
                on_batch(images, target, prediction)
            images_seen += len(images)
    finally:
        for module, was_training in training:
            module.training = was_training
    if reduce:
        matrix, edges = matrix.reduce(), edges and edges.reduce()
        images_seen = int(sum_over_processes(torch.tensor(images_seen)))
    if images_seen and not matrix.counts.any():  # without images, it was stopped
        raise DataError(f"nothing is labelled in the {images_seen} images to score: every pixel is ignored")
    metrics = matrix.metrics() | {"confusion": matrix.counts.tolist(), "images": images_seen}
    metrics["images_per_second"] = images_seen / (time.perf_counter() - start)
    return metrics | (edges.metrics() if edges else {})


# ---- cost ------------------------------------------------------------------------------------------------------------


def count_macs(model, images):
    """Multiply-accumulates of one of the images: those of the logits, without their resizing to its size. Attention is
    counted as the matrix products that it consists of."""
    counter = FlopCounterMode(display=False)
    with torch.inference_mode(), sdpa_kernel(SDPBackend.MATH), counter:
        logits = model.decode(model.encode(images[:1])) if hasattr(model, "decode") else model(images[:1])
        logits.float()  # a quantized network computes its last layer only when it is read
    return counter.get_total_flops() // 2


def milliseconds(functions, repeats, of=statistics.median):
    """Median time (or `of` the times) of each of `functions`, which take turns, after a call of each that does not
    count."""
    times = [[] for _ in functions]
    for turn in range(repeats + 1):
        for function, taken in zip(functions, times, strict=True):
            start = time.perf_counter()
            function()
            if turn:
                taken.append(1000 * (time.perf_counter() - start))
    return [of(taken) for taken in times]


# ---- energy ---------------------------------------------------------------------------------------------------------


def rapl_meter(root="/sys/class/powercap"):
    """A function that gives the joules used so far by all CPU packages, though their counters wrap around.

    Call it more often than they do (minutes). OSError where there are none, or only root may read them.
    """
    zones = [d for d in sorted(Path(root).glob("intel-rapl:*")) if (d / "name").read_text().startswith("package")]
    if not zones:
        raise OSError(f"no RAPL package under {root}")
    ranges = [int((d / "max_energy_range_uj").read_text()) for d in zones]

    def read():
        return [int((d / "energy_uj").read_text()) for d in zones]

    last, total = read(), 0

    def joules():
        nonlocal last, total
        now = read()
        total += sum((new - old) % top for new, old, top in zip(now, last, ranges, strict=True))
        last = now
        return total / 1e6

    return joules


def nvml_meter(device):
    """A function that gives the joules used so far by the GPU. OSError where NVML or its counter is missing."""
    try:
        import pynvml
    except ImportError:
        raise OSError("NVML needs a package: pip install nvidia-ml-py") from None
    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except pynvml.NVMLError as error:
        raise OSError(f"NVML: {error}") from None
    return lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1000  # millijoules since the driver started


def energy_meter(device):
    """nvml_meter() or rapl_meter(), whichever the device has; OSError, which says why, where there is none."""
    return nvml_meter(device) if device.type == "cuda" else rapl_meter()


def measure_energy(run, meter, *, seconds, batch, clock=time.perf_counter, sleep=time.sleep):
    """Joules an image above idle, {"energy_j", "idle_watts"}: idle for `seconds`, then calls for at least as long."""

    def spend(work):
        joules, start = meter(), clock()
        calls = work(start)
        return meter() - joules, clock() - start, calls

    def calls_until(start):
        calls = 0
        while clock() - start < seconds or calls == 0:
            run()
            calls += 1
        return calls

    idle_joules, idle_seconds, _ = spend(lambda _: sleep(seconds))
    idle = idle_joules / idle_seconds
    used, elapsed, calls = spend(calls_until)
    return {"energy_j": (used - idle * elapsed) / (calls * batch), "idle_watts": idle}


# ---- dense CRF ------------------------------------------------------------------------------------------------------


class Kernel(NamedTuple):
    """A Gaussian of the CRF: weight * exp(-|p - p'|^2 / (2 theta_xy^2) - |I - I'|^2 / (2 theta_rgb^2)).

    It links a pixel to those at most `reach` away whose offset is a multiple of `stride` in both directions.
    """

    weight: float
    theta_xy: float  # pixels of the output
    theta_rgb: float  # colour steps of 0..255; infinite: the colour does not matter
    reach: int  # pixels
    stride: int  # pixels


# The paper's appearance kernel (w1, theta_alpha, theta_beta) and smoothness kernel (w2, theta_gamma). Its CRF links all
# pairs of pixels, which costs P^2: here both end at three theta_xy, and the wide one sees a grid of 80 neighbours. Of a
# few settings tried on eight CamVid images of 480 x 360 these were the best; the paper too fits them to its data.
CRF_KERNELS = (Kernel(4.0, 60.0, 20.0, reach=180, stride=36), Kernel(1.0, 1.0, math.inf, reach=3, stride=1))


def mean_field(log_p, photo, steps, kernels=CRF_KERNELS):
    """Probabilities (K, H, W) after `steps` mean-field updates of a CRF with Potts compatibility, on log_p (K, H, W).

    photo: the image (3, H, W) in 0..255. Kraehenbuhl and Koltun 2011 (arXiv 1210.5644), algorithm 1, with kernels cut
    off as in Teichmann and Cipolla 2018 (arXiv 1805.04777) and scaled by D^-1/2 K D^-1/2, D their row sums, as in the
    first paper's code: a weight then means the same with any reach and stride. Memory is that of a few log_p.
    """
    photo = photo.to(log_p)
    scales = [blur(torch.ones_like(log_p[:1]), photo, k).clamp(min=1e-20).rsqrt() for k in kernels]  # each (1, H, W)
    q = log_p.softmax(0)
    for _ in range(steps):
        energy = log_p.clone()
        for kernel, scale in zip(kernels, scales, strict=True):
            energy.addcmul_(blur(q * scale, photo, kernel), scale, value=kernel.weight)
        q = energy.softmax(0)  # Potts: what other classes get is what this one does not, up to a constant
    return q


def blur(q, photo, kernel):
    """Sum over the pixels j != i that the kernel links to i, without its weight: q (K, H, W) -> (K, H, W)."""
    out, (height, width) = torch.zeros_like(q), q.shape[-2:]
    along = range(-(kernel.reach // kernel.stride) * kernel.stride, kernel.reach + 1, kernel.stride)
    for dy in along:
        for dx in along:
            if (dy, dx) <= (0, 0) or dy >= height or abs(dx) >= width or dy**2 + dx**2 > kernel.reach**2:
                continue  # (dy, dx) stands for (-dy, -dx) too
            here = (..., slice(0, height - dy), slice(max(0, -dx), width - max(0, dx)))
            there = (..., slice(dy, height), slice(max(0, dx), width - max(0, -dx)))
            distance = (photo[here] - photo[there]).square_().sum(0).div_(2 * kernel.theta_rgb**2)
            k = distance.add_((dy**2 + dx**2) / (2 * kernel.theta_xy**2)).neg_().exp_()
            out[here].addcmul_(q[there], k)
            out[there].addcmul_(q[here], k)
    return out


def refine_with_crf(ids, log_p, photos, *, steps, seconds):
    """Class ids (N, H, W) after mean_field() on each image; appends the seconds that each took to a list."""
    for n, photo in enumerate(photos):
        began = time.perf_counter()
        ids[n] = mean_field(log_p[n], photo, steps).max(0).indices
        if ids.is_cuda:
            torch.cuda.synchronize(ids.device)
        seconds.append(time.perf_counter() - began)
    return ids


# ---- figures --------------------------------------------------------------------------------------------------------


def colorize(ids, palette):
    """Class ids (H, W) -> RGB uint8 (3, H, W) in the palette's colours; ids outside of it (ignored) are black."""
    table = torch.zeros(len(palette) + 1, 3, dtype=torch.uint8)
    table[:-1] = torch.tensor(palette, dtype=torch.uint8)
    ids = ids.long().cpu()
    return table[torch.where((ids >= 0) & (ids < len(palette)), ids, len(palette))].permute(2, 0, 1)


def overlay(image, ids, palette, alpha=0.5):
    """uint8 image (3, H, W) with the colours of ids (H, W) laid over it; alpha 1 hides the image."""
    return torch.lerp(image.float(), colorize(ids, palette).float(), alpha).round().to(torch.uint8)


FONTS = ["DejaVu Sans"]  # matplotlib's own, and those that drawable() found to be needed beside it


def drawable(names, length=40):
    """Names as figures can show them: in fonts of this machine, without mathematics, of `length` characters at most.

    Where no font has a character, it becomes a question mark, which is said on stderr.
    """
    from matplotlib import font_manager

    def characters(file):
        try:
            font = font_manager.get_font(file)
            return {chr(code) for code in font.get_charmap()} if font.scalable else set()
        except (OSError, RuntimeError):  # a damaged file
            return set()

    missing = {c for c in "".join(names) if not c.isspace()}
    for family in FONTS:
        missing -= characters(font_manager.findfont(family)) if missing else set()
    for font in sorted(font_manager.fontManager.ttflist, key=lambda font: font.name) if missing else ():
        if "Last" not in font.name and missing & (has := characters(font.fname)):  # the font of last resort has boxes
            missing -= has
            FONTS.append(font.name)
    if missing:
        print(f"no font here has {''.join(sorted(missing))}: figures show ? in place of each; "
              "the Noto fonts have most", file=sys.stderr)  # fmt: skip
    shown = ("".join("?" if c in missing else c for c in " ".join(name.split())) for name in names)
    return [(name if len(name) <= length else name[: length - 1] + "…").replace("$", r"\$") for name in shown]


def save_figure(figure, path, *, limit=200_000, pixels=20e6):
    """Write a matplotlib figure as PNG of 256 colours, at 100 dpi or as many as keep it under `limit` bytes, and within
    `pixels` pixels."""
    import matplotlib
    from PIL import Image

    width, height = figure.get_size_inches()
    most = min((pixels / width / height) ** 0.5, 30_000 / width, 30_000 / height)  # dpi

    for dpi in (100, 80, 65, 50, 40):
        drawn, packed = io.BytesIO(), io.BytesIO()
        with matplotlib.rc_context({"font.sans-serif": FONTS}):
            figure.savefig(drawn, dpi=min(dpi, most))
        image = (
            Image.open(drawn).convert("RGB").quantize(256, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
        )
        image.save(packed, "PNG", optimize=True)
        if packed.tell() < limit:
            break
    with models.replacing(path) as temporary:
        temporary.write_bytes(packed.getvalue())


def plot_confusion(matrix, classes, path):
    """Confusion matrix (K, K) of pixel counts, each row in percent of its label's pixels."""
    from matplotlib.figure import Figure

    counts, classes = torch.as_tensor(matrix).double(), drawable(classes)
    percent = 100 * counts / counts.sum(1, keepdim=True)  # NaN, drawn grey, where the label never occurs
    k = len(classes)
    side = max(4.0, 0.38 * k + 1.6)
    figure = Figure(figsize=(side + 0.9, side), layout="constrained")
    axes = figure.subplots()
    axes.set_facecolor("0.85")
    shown = axes.imshow(percent.numpy(), cmap="Blues", vmin=0, vmax=100)
    for i, j in (percent >= 0.5).nonzero().tolist():  # what rounds to 0 is left out
        value = percent[i, j].item()
        axes.text(j, i, f"{value:.0f}", ha="center", va="center", fontsize=7, color="white" if value > 55 else "black")
    axes.set_xticks(range(k), classes, rotation=90, fontsize=8)
    axes.set_yticks(range(k), classes, fontsize=8)
    axes.set(title="Confusion matrix, % of each label's pixels", xlabel="prediction", ylabel="label")
    figure.colorbar(shown, ax=axes, shrink=0.8, label="% of the label's pixels")
    save_figure(figure, path)


def plot_class_iou(ious, classes, palette, path):
    """Bars of the IoU of each class in percent, in the data set's order, with the mean; NaN is written as absent."""
    values = [None if v is None or math.isnan(v) else v for v in ious]
    known = [v for v in values if v is not None]
    figure, axes, label_style = class_bars([v or 0 for v in values], classes, palette)
    for i, value in enumerate(values):
        axes.text((value or 0) + 1, i, "absent" if value is None else f"{value:.1f}", **label_style)
    if known:
        mean = sum(known) / len(known)
        axes.axvline(mean, color="black", linestyle="--", linewidth=1, label=f"mean of {len(known)}: {mean:.1f}")
        axes.legend(loc="lower right", bbox_to_anchor=(1, 1), frameon=False, borderaxespad=0)
    axes.set(xlim=(0, 108), xticks=range(0, 101, 20), xlabel="IoU (%)")
    axes.set_title("IoU by class", loc="left")
    save_figure(figure, path)


def plot_class_distribution(counts, classes, palette, path):
    """Bars of the share of labelled pixels of each class in percent, on a log scale; counts (K,) in pixels."""
    percent = (100 * torch.as_tensor(counts).double() / max(1, int(torch.as_tensor(counts).sum()))).tolist()
    figure, axes, label_style = class_bars(percent, classes, palette)
    floor = min([p for p in percent if p > 0], default=1) / 3
    axes.set_xscale("log")
    axes.set_xlim(floor, 300)
    for i, value in enumerate(percent):
        axes.text(max(value, floor) * 1.1, i, f"{value:.2g}" if value else "absent", **label_style)
    axes.set(title="Class distribution", xlabel="share of labelled pixels (%, log scale)")
    save_figure(figure, path)


def class_bars(values, classes, palette):
    """Figure, axes with one horizontal bar a class (the first on top), and the style of a number beside its bar."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, max(2.0, 0.26 * len(classes) + 1.1)), layout="constrained")
    axes = figure.subplots()
    colors = [tuple(c / 255 for c in rgb) for rgb in palette]
    axes.barh(range(len(classes)), values, color=colors, edgecolor="0.3", linewidth=0.5)
    axes.set_yticks(range(len(classes)), drawable(classes))
    axes.set_ylim(len(classes) - 0.4, -0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", color="0.9")
    axes.set_axisbelow(True)
    return figure, axes, dict(va="center", fontsize=8, bbox=dict(facecolor="white", edgecolor="none", pad=0.6))


ERROR_COLOURS = ((170, 170, 170), (214, 39, 40))  # correct grey, wrong red; ignored black, as no class has that id


def errors(label, ids, ignore_index):
    """0 where the prediction is right, 1 where it is wrong, 2 where the label is ignored; all (H, W)."""
    return torch.where(label.long() != ignore_index, (label.long() != ids.long()).long(), 2)


def plot_examples(rows, info, path):
    """Grid image | label | prediction | error; rows of (uint8 image (3, H, W), label (H, W), prediction (H, W))."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    height, width = rows[0][1].shape
    present = sorted({int(v) for _, label, ids in rows for v in torch.cat([label.unique(), ids.unique()]).long()})
    present = [c for c in present if c != info.ignore_index and c < len(info.classes)]
    legend_rows = math.ceil((len(present) + 3) / 8)
    tall = (min(6.0, 3.0 * height / width) + 0.2) * len(rows)  # inches; a narrower image leaves room beside it
    figure = Figure(figsize=(12.2, tall + 0.5 + 0.24 * legend_rows), layout="constrained")
    axes = figure.subplots(len(rows), 4, squeeze=False)
    for line, (image, label, ids) in zip(axes, rows, strict=True):
        wrong = errors(label, ids, info.ignore_index)
        accuracy = 100 * int((wrong == 0).sum()) / max(1, int((wrong < 2).sum()))
        pictures = (image, colorize(label, info.palette), colorize(ids, info.palette), colorize(wrong, ERROR_COLOURS))
        for cell, picture in zip(line, pictures, strict=True):
            cell.imshow(picture.permute(1, 2, 0).numpy(), interpolation="nearest")
            cell.set(xticks=[], yticks=[])
        line[3].set_xlabel(f"{accuracy:.1f}% of pixels correct", fontsize=8)
    for cell, title in zip(axes[0], ("image", "label", "prediction", "error"), strict=True):
        cell.set_title(title)
    shown = drawable(info.classes)
    named = [(shown[c], info.palette[c]) for c in present]
    named += [*zip(("correct", "wrong"), ERROR_COLOURS, strict=True), ("ignored", (0, 0, 0))]
    patches = [Patch(facecolor=[c / 255 for c in rgb], edgecolor="0.3", label=name) for name, rgb in named]
    figure.legend(handles=patches, loc="outside lower center", ncols=min(8, len(patches)), fontsize=8, frameon=False)
    save_figure(figure, path)


# ---- gallery ---------------------------------------------------------------------------------------------------------

PAGE_BYTES, PAGE_IMAGES = 28_000_000, 500  # a page that a browser opens at once, and a mail takes
PICTURES = ("photo", "label", "prediction", "error")


class Gallery:
    """A page of a split's images, the worst mIoU first, that needs no other file: add() each, then write(path).

    Pictures are shrunk until PAGE_IMAGES of them stay within PAGE_BYTES; of a larger split the worst are kept.
    """

    def __init__(self, info, length):
        self.info, self.rows, self.seen = info, [], 0
        self.budget = PAGE_BYTES // min(length, PAGE_IMAGES)  # bytes of an image

    def add(self, name, image, label, ids):
        """One image: uint8 (3, H, W), label and prediction (H, W)."""
        matrix = ConfusionMatrix(len(self.info.classes), self.info.ignore_index)
        matrix.update(label, ids)
        metrics = matrix.metrics()
        row = {key: None if math.isnan(metrics[key]) else round(metrics[key], 2) for key in ("miou", "aacc")}
        row["iou"] = {c: round(iou, 1) for c, iou in enumerate(metrics["class_iou"]) if not math.isnan(iou)}
        wrong = errors(label, ids, self.info.ignore_index)
        self.rows.append({"name": name} | row | thumbnails(image, label, ids, wrong, self.info.palette, self.budget))
        self.seen += 1
        if len(self.rows) >= 2 * PAGE_IMAGES:
            self.keep()

    def keep(self):
        self.rows.sort(key=lambda row: (row["miou"] is None, row["miou"]))
        del self.rows[PAGE_IMAGES:]

    def write(self, path, title):
        self.keep()
        classes = [{"name": name, "rgb": rgb} for name, rgb in zip(self.info.classes, self.info.palette, strict=True)]
        page = {"title": title, "classes": classes, "seen": self.seen, "rows": self.rows}
        with models.replacing(path) as temporary:
            data = json.dumps(page).replace("<", "\\u003c")  # nothing in a name ends the script
            temporary.write_text(GALLERY_PAGE.replace("PAGE_DATA", data), encoding="utf-8")


def thumbnails(image, label, ids, wrong, palette, budget):
    """{picture: data URI}, as large as `budget` characters allow: a JPEG and three PNGs of the same size."""
    from PIL import Image

    pictures = {"photo": Image.fromarray(image.permute(1, 2, 0).numpy())}
    for name, numbers, colours in zip(
        PICTURES[1:], (label, ids, wrong), (palette, palette, ERROR_COLOURS), strict=True
    ):
        known = torch.where(numbers < len(colours), numbers, 255).to(torch.uint8)  # what is no class is black
        pictures[name] = Image.fromarray(known.numpy())
        pictures[name].putpalette([channel for rgb in colours for channel in rgb] + [0] * (768 - 3 * len(colours)))
    for side in (960, 720, 480, 360, 240, 160, 96):
        scale = min(1, side / max(label.shape))
        size = tuple(max(1, round(length * scale)) for length in reversed(label.shape))
        files = {}
        for name, picture in pictures.items():
            how, kind = (Image.Resampling.LANCZOS, "jpeg") if name == "photo" else (Image.Resampling.NEAREST, "png")
            picture.resize(size, how).save(stream := io.BytesIO(), kind, quality=75)
            files[name] = f"data:image/{kind};base64,{base64.b64encode(stream.getvalue()).decode()}"
        if sum(map(len, files.values())) <= budget:
            break
    return files


GALLERY_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Gallery</title>
<style>
:root { color-scheme: light dark; --line: #8884; --back: light-dark(#fff, #16181c); }
body { font: 14px/1.45 system-ui, sans-serif; margin: 0; background: var(--back); color: light-dark(#222, #ddd); }
header { position: sticky; top: 0; z-index: 1; background: var(--back); border-bottom: 1px solid var(--line);
  padding: .6rem 1rem; display: flex; flex-wrap: wrap; gap: .5rem 1.2rem; align-items: center; }
h1 { font-size: 1rem; margin: 0; } header output { opacity: .7; }
fieldset { border: 0; margin: 0; padding: 0; display: flex; gap: .7rem; }
main { display: grid; grid-template-columns: repeat(auto-fill, minmax(340px, 1fr)); gap: 1rem; padding: 1rem; }
article { border: 1px solid var(--line); border-radius: 8px; overflow: hidden; content-visibility: auto;
  contain-intrinsic-size: auto 400px; }
article.large { grid-column: 1 / -1; }
.stack { position: relative; display: block; width: 100%; padding: 0; border: 0; background: #8882; cursor: zoom-in; }
.large .stack { cursor: zoom-out; }
.stack img { position: absolute; inset: 0; width: 100%; height: 100%; opacity: 0; }
.stack img:first-child { position: static; display: block; height: auto; opacity: 1; }
body[data-view=label] .label, body[data-view=prediction] .prediction, body[data-view=error] .error { opacity: 1; }
body[data-view=overlay] .prediction { opacity: var(--alpha, .5); }
body:not([data-view=photo], [data-view=overlay]) .stack img:not(.photo) { image-rendering: pixelated; }
h2 { font-size: .9rem; margin: .5rem .7rem 0; overflow-wrap: anywhere; } h2 span { float: right; font-weight: normal; }
ul { list-style: none; margin: .3rem .7rem .6rem; padding: 0; display: flex; flex-wrap: wrap; gap: .1rem .8rem; }
li::before { content: ""; display: inline-block; width: .75em; height: .75em; margin-right: .35em;
  background: var(--colour); border: 1px solid var(--line); }
li.chosen { font-weight: bold; }
</style>
<header><h1></h1>
<fieldset id="views"></fieldset>
<label>opacity <input id="alpha" type="range" min="0" max="1" step=".05" value=".5"></label>
<label>class <select id="class"><option value="">all</option></select></label>
<label>order <select id="order"><option value="worst">worst first<option value="best">best first
<option value="name">name</select></label><output></output></header>
<main></main>
<script type="application/json" id="data">PAGE_DATA</script>
<script>
const page = JSON.parse(document.getElementById("data").textContent), $ = (query) => document.querySelector(query);
const make = (tag, to, more = {}) => to.appendChild(Object.assign(document.createElement(tag), more));
const views = ["photo", "label", "prediction", "overlay", "error"];
document.title = $("h1").textContent = page.title;
for (const [i, view] of views.entries()) {
  const label = make("label", $("#views"), { title: `key ${i + 1}` });
  make("input", label, { type: "radio", name: "view", value: view, onchange: () => show(view) });
  label.append(" " + view);
}
function show(view) {
  document.body.dataset.view = view;
  $(`input[value=${view}]`).checked = true;
}
$("#alpha").oninput = (event) => {
  document.body.style.setProperty("--alpha", event.target.value);
  show("overlay");
};
onkeydown = (event) => views[event.key - 1] && event.target.tagName != "SELECT" && show(views[event.key - 1]);
const percent = (value) => (value == null ? "-" : value.toFixed(1));
const cards = page.rows.map((row) => {
  const card = make("article", document.createDocumentFragment(), { row });
  const stack = make("button", card, { className: "stack", onclick: () => card.classList.toggle("large") });
  stack.setAttribute("aria-label", "larger or smaller");
  for (const kind of ["photo", "label", "prediction", "error"])
    make("img", stack, { className: kind, alt: kind, decoding: "async", src: row[kind] });
  const title = make("h2", card, { textContent: row.name });
  make("span", title, { textContent: `mIoU ${percent(row.miou)}, pixels ${percent(row.aacc)}%` });
  const list = make("ul", card), known = Object.keys(row.iou).sort((a, b) => row.iou[a] - row.iou[b]);
  for (const c of known) {
    const item = make("li", list, { textContent: `${page.classes[c].name} ${percent(row.iou[c])}` });
    item.style.setProperty("--colour", `rgb(${page.classes[c].rgb})`);
    item.dataset.class = c;
  }
  return card;
});
for (const [c, { name }] of page.classes.entries())
  if (page.rows.some((row) => c in row.iou)) make("option", $("#class"), { value: c, textContent: name });
function arrange() {
  const c = $("#class").value, order = $("#order").value, value = ({ row }) => (c ? row.iou[c] : row.miou) ?? 101;
  const chosen = cards.filter(({ row }) => !c || c in row.iou);
  chosen.sort((a, b) => (order == "name" ? a.row.name.localeCompare(b.row.name, undefined, { numeric: true })
    : order == "best" ? value(b) - value(a) : value(a) - value(b)));
  for (const card of chosen) for (const item of card.querySelectorAll("li"))
    item.classList.toggle("chosen", item.dataset.class == c);
  $("main").replaceChildren(...chosen);
  const some = page.seen > cards.length ? ` (the worst of ${page.seen})` : "";
  $("output").textContent = `${chosen.length} of ${cards.length} images${some}${c ? ", by the class's IoU" : ""}`;
}
$("#class").onchange = $("#order").onchange = arrange;
show("overlay");
arrange();
</script>
"""


# ---- what every script shares ---------------------------------------------------------------------------------------


class Stopped(KeyboardInterrupt):
    """One of datasets.SIGNALS, whose `number` it has."""

    def __init__(self, number):
        super().__init__()
        self.number = number


class StopSignal:
    """While the block lasts, the first of datasets.SIGNALS is kept as `number`, and raises Stopped if `raising`."""

    def __init__(self, *, raising=False):
        self.raising, self.number, self.previous = raising, 0, {}

    def __enter__(self):
        with contextlib.suppress(ValueError):  # only the main thread may set handlers
            for s in datasets.SIGNALS:
                if s in (signal.SIGINT, signal.SIGTERM) or signal.getsignal(s) is not signal.SIG_IGN:  # as by nohup
                    self.previous[s] = signal.signal(s, self._stop)
        return self

    def _stop(self, number, frame):
        if self.number:
            return
        self.number = number
        if signal.Signals(number).name == "SIGHUP":  # the terminal is gone, and to write to it an error
            for stream in (1, 2):
                if stat.S_ISCHR(os.fstat(stream).st_mode):
                    os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
        if self.raising:
            raise Stopped(number)

    def while_waiting(self, call):
        """call(), which the first signal, also one that came before, ends by raising Stopped."""
        self.raising = True
        try:
            if self.number:
                raise Stopped(self.number)
            return call()
        finally:
            self.raising = False

    def __exit__(self, *exc):
        for s, handler in self.previous.items():
            signal.signal(s, handler)


@contextlib.contextmanager
def second_signal_ends():
    """While the block lasts, the second of datasets.SIGNALS ends the process and its workers at once, whatever it does.

    Python's handlers wait for the main thread, which may wait itself; the wake-up socket is written to at once. Signals
    within a tenth of a second are one: `timeout` sends its own to the process and to its group.
    """
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)

    def watch():
        first = math.inf
        while numbers := ours.recv(64):
            for number in set(numbers) & set(datasets.SIGNALS):
                first = min(first, time.monotonic())
                if time.monotonic() > first + 0.1:
                    datasets.kill_workers()
                    os._exit(128 + number)

    try:
        before = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
    except ValueError:  # not the main thread
        yield
        return
    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        theirs.close()  # which ends the thread


def run_cli(main):
    """Run a script's main(): what the user can mend ends as one line `error: ...` and exit status 2, a signal with
    128 + its number."""
    models.print_anything()
    try:
        try:
            with second_signal_ends(), StopSignal(raising=True):
                done = main()
        finally:
            datasets.kill_workers()  # each that ends by itself could raise, in what follows too
        if isinstance(done, dict) and "stopped" in done:
            raise Stopped(signal.Signals[done["stopped"]])
    except (DataError, ModelError, OSError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        if lines[0].startswith("Caught "):  # a loader process sends its traceback as the message; the last line says it
            lines = [lines[-1].partition(": ")[2] or lines[-1]]
        print("error:", models.one_line(" ".join(lines), None), file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt as stop:
        raise SystemExit(128 + getattr(stop, "number", signal.SIGINT)) from None
    except Exception as error:
        if not (line := datasets.worker_failure(error) or lacking(error)):
            raise
        print("error:", line, file=sys.stderr)
        raise SystemExit(2) from None


def lacking(error):
    """One line about what is short where that is what an exception says: memory, a package, a compiler, a batch."""
    said = models.one_line(error)
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or re.search("allocate memory|out of memory", said):
        return f"out of memory ({said}): give a smaller --batch-size, --size or --crop, or a smaller network"
    if isinstance(error, ImportError):
        return f"{said}: pip install -r requirements.txt (of the tests and other backends: requirements-dev.txt)"
    if "more than 1 value per channel" in said:
        return "BatchNorm needs more than one value a channel: give a larger --batch-size or --crop, or --norm group"
    if sys.flags.optimize > 1 and "docstring" in said:  # the transformers package reads its own
        return "python -OO takes away docstrings that a package needs for this network: use -O"
    if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
        said = said.partition(" Set TORCHDYNAMO")[0]
        return f"--compile fails here ({said}): leave it out, or install a C++ compiler"
    return None


def command_line(script, argv):
    """The command that runs `script` with these flags, None: those of this process; can be pasted into a shell."""
    return shlex.join(["python", script, *map(str, sys.argv[1:] if argv is None else argv)])


ROOT = "checkpoints"  # where runs write


def out_folder(out, name, *, dry_run):
    """Where a run writes: --out, else checkpoints/NAME, of a dry run checkpoints/dry-run/NAME: two steps must not
    replace a real result."""
    return Path(out) if out else Path(ROOT, *(["dry-run"] if dry_run else []), name)


PARTS = ("control", "seed-*", "amount-*", "lora-*", "head", "classifier", "full")  # subfolders of distill, prune, lora


def claim(folder, *, inputs=(), keep=True):
    """Make `folder` that of a run, until its main() ends; see releasing(). What an earlier run left there is kept aside
    when this one first writes something, unless `keep` is False, as where it goes on with that run.

    inputs: paths that are read. Raises ModelError where one of them would be overwritten, or where another process has
    the folder: the lock ends with its process, however that ends.
    """
    run = RunFolder(folder, keep)
    for path in map(Path, inputs):
        real = Path(os.path.realpath(path))
        places = {real, *real.parents, Path(os.path.realpath(path.parent), path.name)}
        if real == run.folder or any(places & {own, Path(os.path.realpath(own))} for own in run.files()):
            raise ModelError(f"--out {folder} holds {path}, which would be overwritten: name another folder")
    if run.folder not in models.CLAIMED:
        run.lock()
        models.CLAIMED[run.folder] = run


def releasing(main):
    """Decorator of a script's main(): the folders that it claims are free for other processes when it ends."""

    @functools.wraps(main)
    def run(argv=None):
        try:
            return main(argv)
        finally:
            while models.CLAIMED:
                models.CLAIMED.popitem()[1].release()

    return run


class RunFolder:
    """A folder while a run has it; called before anything is written there."""

    def __init__(self, folder, keep):
        self.shown, self.folder, self.keep = folder, Path(os.path.realpath(folder)), keep
        self.written, self.aside, self.file = False, None, None

    def files(self):
        """What a run leaves there: files, and the folders of its parts."""
        there = [path for path in sorted(self.folder.glob("*")) if not path.name.startswith(".")]
        return [path for path in there if path.is_file() or any(path.match(part) for part in PARTS)]

    def has(self, *ends):
        """Whether a file of a run ends like that."""
        files = (file for path in self.files() for file in (path.rglob("*") if path.is_dir() else [path]))
        return any(file.name.endswith(ends) for file in files)

    def lock(self):
        """Raise ModelError where another process has the lock, which is gone with its process, not with its file."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / ".lock"
        while fcntl:
            self.file = open(path, "a")  # noqa: SIM115
            try:
                fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # a kind that no worker inherits and outlives
            except (BlockingIOError, PermissionError):
                self.file.close()
                raise ModelError(f"--out {self.shown}: another run is writing there; name another folder") from None
            except OSError:  # a file system that knows no locks
                return
            if path.exists() and os.path.samestat(os.fstat(self.file.fileno()), os.stat(path)):
                return
            self.file.close()  # who had it has just removed it

    def __call__(self):
        if self.written:
            return
        self.written = True
        for place in (self.folder, *filter(Path.is_dir, self.files())):
            models.remove_litter(place)
        if self.keep and self.has(".pt", "results.json"):
            names = (f"kept-{n}" for n in itertools.count(1))
            self.aside = next(self.folder / name for name in names if not (self.folder / name).exists())
            self.move(self.files(), self.aside)
            print(f"what an earlier run left in {self.shown} is kept in {Path(self.shown) / self.aside.name}")

    def move(self, paths, where):
        where.mkdir(exist_ok=True)
        for path in paths:
            models.remove(where / path.name)
            os.replace(path, where / path.name)

    def release(self):
        """Leave the folder; where no checkpoint was written, to what had been kept aside."""
        if self.aside and not self.has(".pt"):
            self.move(list(self.aside.iterdir()), self.folder)
            self.aside.rmdir()
            print(f"no checkpoint was written: what was in {self.shown} is there again")
        if self.file:
            (self.folder / ".lock").unlink(missing_ok=True)
            self.file.close()


def pick_device(name):
    """auto, cpu or cuda -> torch.device. ModelError if a GPU is asked for and none is there."""
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ModelError(f"--device {name}: PyTorch finds no CUDA GPU here; use --device cpu or auto")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


AMP_DTYPES = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def choose_amp(name, device):
    """Resolve --amp (auto, off, bf16, fp16) to a key of AMP_DTYPES. auto: what multiplies matrices fastest here.

    A CPU is timed for a moment, best of ten turns each: whether bfloat16 pays depends on its instructions (AMX,
    AVX512-BF16), and what else runs just then must not decide it for the whole run.
    """
    if name == "fp16" and device.type != "cuda":
        raise ModelError("--amp fp16 needs a GPU: choose bf16, off or auto on the CPU")
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    matrices = {amp: torch.ones(512, 512, dtype=AMP_DTYPES[amp] or torch.float32) for amp in ("off", "bf16")}
    times = dict.fromkeys(matrices, math.inf)
    for _ in range(10):
        for amp, a in matrices.items():
            start = time.perf_counter()
            a @ a
            times[amp] = min(times[amp], time.perf_counter() - start)
    return "bf16" if 1.2 * times["bf16"] < times["off"] else "off"  # the casts cost something too


def compiled(model, run):
    """run(images), of a network, by torch.compile, anew for each shape of images and with the weights that are there
    then."""
    # Networks share the code of forward(), and the ninth version of one piece of code would silently stay uncompiled.
    torch._dynamo.config.recompile_limit = 256
    # Weights become constants, which a CPU then keeps in the layout that its kernels want; as an option of
    # torch.compile() this comes too late.
    torch._inductor.config.freezing = True
    return int8.compiled(model, run) if int8.is_quantized(model) else torch.compile(run, dynamic=False)


class Compiled(nn.Module):
    """A network as predict() calls it, compiled: encode() goes up to the logits, which decode() leaves as they are."""

    def __init__(self, model):
        super().__init__()
        self.model, self.stride = model, model.stride
        self.encode = compiled(model, lambda images: model.decode(model.encode(images)))

    def decode(self, logits):
        return logits


def keep_freed_memory():
    """Tell glibc to keep what is freed: a network frees and allocates the same large tensors again and again, and
    getting each from the kernel as zeroed pages makes a training step on a CPU 5 to 15% slower, and a small network of
    large maps by up to a half. Does nothing under another C library."""
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        m_trim_threshold, m_top_pad, m_mmap_max = -1, -2, -4  # malloc.h
        mallopt(m_mmap_max, 0)
        mallopt(m_trim_threshold, 2**31 - 1)
        mallopt(m_top_pad, 2**28)


def peak_memory_mb(device):
    """Peak memory so far, MiB: of the tensors on a GPU, or of this whole process on a CPU; None where none can say."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    if resource is None:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB on Linux, bytes on macOS
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def weights_mb(path, checkpoint):
    """MiB of the weights on disk: the file, or the weights' share of it where it also holds optimizer state."""
    if path is not None and "training" not in checkpoint:
        return os.path.getsize(path) / 2**20
    return sum(v.numel() * v.element_size() for v in checkpoint["state_dict"].values() if torch.is_tensor(v)) / 2**20


def results(model, checkpoint, metrics, *, command, split, seconds, device, path):
    """What every script writes to results.json; `metrics` from evaluate(), {} where nothing was scored."""
    total, trainable = models.count_params(model)
    classes = checkpoint["data"]["classes"]
    return {
        "command": command, "model": models.model_name(checkpoint["build"]), "dataset": checkpoint["data"]["name"],
        "split": split, "pretrained": checkpoint["pretrained"], "compression": checkpoint["compression"],
        "params": total, "trainable_params": trainable, "file_mb": weights_mb(path, checkpoint),
        **{key: metrics.get(key) for key in ("miou", "macc", "aacc", "boundary_iou", "classes_averaged")},
        "class_iou": dict(zip(classes, metrics.get("class_iou") or [None] * len(classes), strict=True)),
        "images": metrics.get("images"), "images_per_second": metrics.get("images_per_second"),
        "seconds": seconds, "peak_memory_mb": peak_memory_mb(device),
    }  # fmt: skip


def write_json(path, obj):
    """Write JSON, whole or not at all. NaN and infinity, which JSON lacks, become null."""

    def plain(x):
        if isinstance(x, dict):
            return {str(k): plain(v) for k, v in x.items()}
        if isinstance(x, (list, tuple)):
            return [plain(v) for v in x]
        x = x.item() if hasattr(x, "item") else x  # a number of torch or NumPy
        if isinstance(x, float) and not math.isfinite(x):
            return None
        return x if x is None or isinstance(x, (bool, int, float, str)) else str(x)

    models.write_text(path, json.dumps(plain(obj), indent=2) + "\n")


def write_csv(path, rows, columns=None):
    """Write dicts as CSV, whole or not at all. columns: left out: every key, empty where a row lacks it."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns or dict.fromkeys(k for row in rows for k in row), extrasaction="ignore")
    writer.writeheader()
    writer.writerows(rows)
    models.write_text(path, text.getvalue())


class Stage(NamedTuple):
    """A network on its way from before to after: what evaluate() says of it and, unless it is gone by now, the network
    itself; where it is in a file, its checkpoint, path and command."""

    metrics: dict
    model: nn.Module | None = None
    checkpoint: dict | None = None
    path: Path | None = None
    command: str | None = None


def before_after(stages, image, *, out, seconds, device, more, dry_run=False):
    """What a compression script reports -> what results.json in `out` then holds.

    stages: {name: Stage}, the first what it started from, the last what it wrote; all scored by the same evaluate().
    Networks that are there are timed on `image` (1, 3, H, W), in turns, BatchNorm folded, and metered where there is a
    meter. The keys are those of results() of the last, `before` with those of the first, latency_ms and energy_j of
    both, macs, macs_before and their ratio (None of a quantized network), and `more`. A table of all stages is printed.
    """
    first, *_, last = stages.values()
    shared = dict(split="val", device=device, seconds=seconds)
    before, done = (
        results(s.model, s.checkpoint, s.metrics, command=s.command, path=s.path, **shared) for s in (first, last)
    )
    timed = {name: ready(s.model) for name, s in stages.items() if s.model is not None}
    calls = [functools.partial(run_once, model, image.to(device)) for model in timed.values()]
    latency = dict(zip(timed, milliseconds(calls, 1 if dry_run else 10), strict=True))
    joules, no_energy = energy_of(calls, device, seconds=0.1 if dry_run else 2)
    energy = dict(zip(timed, joules, strict=True))
    macs = {n: None if int8.is_quantized(m) else count_macs(m, image.to(device)) for n, m in timed.items()}
    done |= {"before": before, "macs": macs[list(stages)[-1]], "macs_before": macs[next(iter(stages))]}
    done["macs_ratio"] = done["macs"] / done["macs_before"] if done["macs"] and done["macs_before"] else None
    for key, values in (("latency_ms", list(latency.values())), ("energy_j", joules)):
        done |= {key: values[-1], f"{key}_before": values[0]}
    write_json(Path(out) / "results.json", done | more)
    print_table([
        {"network": name, "mIoU": s.metrics["miou"], "mAcc": s.metrics["macc"], "aAcc": s.metrics["aacc"],
         "parameters, M": models.count_params(s.model)[0] / 1e6 if s.model is not None else None,
         "MACs, G": macs[name] / 1e9 if macs.get(name) else None,
         "file, MiB": weights_mb(s.path, s.checkpoint) if s.path else None, "latency, ms": latency.get(name),
         **({} if no_energy else {"energy, J": energy.get(name)})}
        for name, s in stages.items()
    ])  # fmt: skip
    if no_energy:
        print(f"no energy: {no_energy}")
    if done["latency_ms"] > done["latency_ms_before"]:
        print(f"slower than before: {done['latency_ms']:.1f} ms against {done['latency_ms_before']:.1f}")
    return done | more


def ready(model):
    """A network as it is timed: BatchNorm and layer scales folded, in a copy; a quantized one as it is."""
    if int8.is_quantized(model):
        return model
    model = copy.deepcopy(model).eval()
    models.fold_batchnorm(model)
    models.fold_layer_scale(model)
    return model


@torch.inference_mode()
def run_once(model, image):
    model(image)
    if image.is_cuda:
        torch.cuda.synchronize(image.device)


def energy_of(calls, device, *, seconds):
    """([joules of a call of each of `calls`], None), or ([None, ...], why there is no meter)."""
    try:
        meter = energy_meter(device)
    except OSError as error:
        return [None] * len(calls), str(error)
    return [measure_energy(call, meter, seconds=seconds, batch=1)["energy_j"] for call in calls], None


def print_table(rows):
    """Print dicts with the same keys as an aligned table. Floats get two places; None and NaN are shown as -."""

    def text(x):
        if x is None or (isinstance(x, float) and math.isnan(x)):
            return "-"
        return f"{x:.2f}" if isinstance(x, float) else str(x)

    cells = [[str(k) for k in rows[0]], *([text(v) for v in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    left = [all(isinstance(row[k], str) for row in rows) for k in rows[0]]
    for line in cells:
        padded = (c.ljust(w) if words else c.rjust(w) for c, w, words in zip(line, widths, left, strict=True))
        print("  ".join(padded).rstrip())


# ---- command line ---------------------------------------------------------------------------------------------------


def make_parser():
    parser = datasets.Parser(__doc__)
    add = parser.add_argument
    inherit = "left out: the checkpoint's"
    add("--weights", default="checkpoints/train/best.pt", help="checkpoint to score")
    add("--adapter", nargs="+", metavar="FILE", help="adapters that lora.py made for it: scored in turn, on their data")
    add("--dataset", help=f"data set to score on ({inherit})")
    add("--data-root", help=f"folder of the data set ({inherit})")
    add("--size", type=pixels, nargs=2, metavar=("H", "W"), help=f"input size, pixels ({inherit})")
    add("--split", default="val", help="split to score on")
    datasets.add_option_args(add)
    add("--batch-size", type=positive_int, default=1, help="images a batch; does not change the numbers")
    add("--workers", type=worker_count, default=0, help="processes that load images")
    add("--gallery", action="store_true", help="gallery.html: every image with label, prediction and error")
    add("--images", metavar="FILE|DIR", help="predict these images instead of scoring a data set")
    add("--tta", action="store_true", help=f"test-time augmentation: scales {TTA_SCALES} and flip")
    add("--scales", type=image_scale, nargs="+", help="image scales to average over; left out: 1")
    add("--flip", action=argparse.BooleanOptionalAction, help="average with the mirror image")
    add("--slide", type=positive_int, nargs=2, metavar=("H", "W"), help="sliding window, pixels")
    add("--slide-stride", type=positive_int, nargs=2, metavar=("H", "W"), help="its stride; left out: 2/3 of it")
    add("--crf", type=count, default=0, metavar="N", help="mean-field steps of a dense CRF on the prediction")
    add("--boundary", action=argparse.BooleanOptionalAction, default=True, help="boundary IoU too")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to run")
    add("--amp", choices=("auto", "off", "bf16"), default="off", help="mixed precision; off is float32")
    add(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="torch.compile, once for each input shape",
    )
    add("--threads", type=thread_count, help="CPU threads; left out: PyTorch's choice")
    add("--out", help="folder to write to; left out: checkpoints/evaluate")
    add("--dry-run", action="store_true", help="two images only")
    scoring = "--dataset --data-root --split --batch-size --workers"
    options = "--void-as-class --train-share --val-drives --download"
    parser.only(f"{scoring} {options}", "scoring, not of --images", lambda args: not args.images)
    parser.only("--compile", "one network, not of --adapter", lambda args: not args.adapter)
    parser.only("--slide-stride", "--slide H W, the window", lambda args: args.slide)
    return parser


def open_images(path):
    """FILE or DIR -> sorted list of image files. DataError where there is none."""
    path = Path(path)
    if not path.is_file() and not path.is_dir():  # nor a pipe, which would be waited for
        raise DataError(f"--images {path}: no such file or folder")
    files = datasets.image_files(path) if path.is_dir() else [path]
    if not files:
        raise DataError(f"--images {path}: the folder holds no image ({', '.join(datasets.IMAGE_SUFFIXES)})")
    return files


def predict_images(
    model, info, files, out, *, device, size=None, fit=None, crf=None, max_pixels=datasets.MAX_PIXELS, **predict_options
):
    """Write NAME_ids.png and NAME_overlay.png at the image's own size for every file; returns the paths written.

    The network sees the image at `size` if given, else shrunk or enlarged to fit into `fit` with its shape kept (the
    size the network was trained on), else as it is. crf: None, or the steps and seconds of refine_with_crf().
    max_pixels: of decode_image().
    """
    from PIL import Image

    stems = [file.stem for file in files]
    # a.png beside a.jpg: names that tell them apart
    names = [file.stem if stems.count(file.stem) == 1 else file.name.replace(".", "_") for file in files]
    written = [out / f"{name}_{kind}.png" for name in names for kind in ("ids", "overlay")]
    if lost := {os.path.realpath(path) for path in files} & {os.path.realpath(path) for path in written}:
        raise DataError(f"--out {out}: {min(lost)} is one of --images, and would be overwritten: name another folder")
    for file, name in zip(tqdm(files, desc="predict", leave=False, disable=len(files) < 2 or None), names, strict=True):
        image = datasets.decode_image(file, max_pixels)
        height, width = image.shape[-2:]
        scale = min(fit[0] / height, fit[1] / width) if fit else 1
        seen = size or (max(1, round(height * scale)), max(1, round(width * scale)))
        batch = datasets.eval_transform(info, seen)(tv_tensors.Image(image))[None].to(device)
        refine = functools.partial(refine_with_crf, photos=[image], **crf) if crf else None
        ids = predict(model, batch, size=(height, width), refine=refine, **predict_options)[0].cpu()
        grey = ids.numpy() if ids.dtype == torch.uint8 else ids.numpy().astype("uint16")
        colours = overlay(image, ids, info.palette).permute(1, 2, 0).numpy()
        for kind, picture in (("ids", grey), ("overlay", colours)):
            with models.replacing(out / f"{name}_{kind}.png") as temporary:
                Image.fromarray(picture).save(temporary, "PNG")
    return list(map(str, written))


def open_scored(
    checkpoint, *, weights, dataset=None, data_root=None, size=None, split="val", length=None, options=None
):
    """The data set that is named, or else the checkpoint's, with what else is not given as it was in training.

    weights: the checkpoint's path, for messages. length: only that many images. options: see datasets.open_dataset().
    DataError if its classes are not the network's.
    """
    trained = DataInfo.from_dict(checkpoint["data"])
    name = dataset or trained.name
    root = data_root or (checkpoint["args"].get("data_root") if name == trained.name else None)
    options = (trained.options if name == trained.name else {}) | (options or {})  # split rule, void: as trained
    dataset = datasets.open_dataset(name, split, root=root, size=size or trained.size, length=length, options=options)
    ours, theirs = tuple(trained.classes), tuple(dataset.info.classes)
    if ours != theirs:
        odd = sorted(set(ours) ^ set(theirs))
        raise DataError(
            f"{weights} was trained on {trained.name} with {len(ours)} classes, but {name} has {len(theirs)}; "
            + (f"only one of them has {', '.join(odd[:5])}" if odd else "their order differs")
        )
    return dataset


def score(
    model, dataset, *, device, out, batch_size=1, workers=0, boundary=True, crf=None, gallery=None, **predict_options
):
    """evaluate() on a whole data set in this process alone; confusion.png, class_iou.png, examples.png in `out`.

    gallery: a Gallery that gets every image.
    crf: None, or the steps and seconds of refine_with_crf(); the metrics then have miou_without_crf too.
    """
    info, examples, seen = dataset.info, [], 0
    before = ConfusionMatrix(len(info.classes), info.ignore_index)
    wanted = {round(i * (len(dataset) - 1) / 3) for i in range(4)}  # four examples, evenly spread

    def keep_examples(images, _target, prediction):
        nonlocal seen
        for i, ids in enumerate(prediction, seen):
            if i in wanted:
                examples.append((*dataset.raw(i), ids))
            if gallery:
                gallery.add("/".join(Path(dataset.file(i)).parts[-2:]), *dataset.raw(i), ids)
        seen += len(images)

    def refine(ids, log_p):
        photos, labels = zip(*(dataset.raw(seen + i) for i in range(len(ids))), strict=True)
        before.update(torch.stack(labels), ids)
        return refine_with_crf(ids, log_p, photos, **crf)

    loader = datasets.eval_loader(dataset, batch_size=batch_size, workers=workers)
    metrics = evaluate(
        model, loader, num_classes=len(info.classes), ignore_index=info.ignore_index, device=device, boundary=boundary,
        progress=True, on_batch=keep_examples, reduce=False, refine=refine if crf else None, **predict_options,
    )  # fmt: skip
    if crf:
        metrics["miou_without_crf"] = before.metrics()["miou"]
    plot_confusion(metrics["confusion"], info.classes, Path(out) / "confusion.png")
    plot_class_iou(metrics["class_iou"], info.classes, info.palette, Path(out) / "class_iou.png")
    plot_examples(examples, info, Path(out) / "examples.png")
    return metrics


def print_classes(metrics, classes):
    """One line a class: IoU, accuracy, boundary IoU where it was measured, share of the label's pixels."""
    confusion = torch.tensor(metrics["confusion"])
    columns = {"class": classes, "IoU %": metrics["class_iou"], "acc %": metrics["class_acc"]}
    if "class_boundary_iou" in metrics:
        columns["boundary IoU %"] = metrics["class_boundary_iou"]
    columns["pixels %"] = (100 * confusion.sum(1) / max(1, confusion.sum())).tolist()
    print_table([dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)])


@releasing
def main(argv=None):
    """Run the command line; returns what results.json holds."""
    args = make_parser().parse(argv)
    command = command_line("evaluate.py", argv)
    keep_freed_memory()
    device = pick_device(args.device)
    if args.threads:
        torch.set_num_threads(args.threads)
    model, checkpoint = models.load_checkpoint(args.weights, device=device)
    out, rows = out_folder(args.out, "evaluate", dry_run=args.dry_run), []
    if run_files := sorted(out.glob("*.pt")):
        raise ModelError(f"--out {out} is the folder of {run_files[0].name}, whose results.json would be overwritten: "
                         "name another")  # fmt: skip
    claim(out, keep=False)
    if not args.adapter:
        model = Compiled(model) if args.compile else model
        return run(args, model, checkpoint, command, device, out)
    for i, path in enumerate(args.adapter, 1):
        began = time.perf_counter()
        adapter, undo = models.load_adapter(model, checkpoint, path)
        row = {"adapter": path, "swap_ms": 1000 * (time.perf_counter() - began)}
        own = checkpoint | {key: adapter[key] for key in ("data", "build", "args", "metrics")}
        done = run(args, model, own, command, device, out if len(args.adapter) == 1 else out / str(i))
        rows.append(row | {key: done[key] for key in ("dataset", "miou", "macc", "aacc")})
        undo()
    write_json(out / "results.json", done := done | {"adapters": rows})
    print_table(rows)
    return done


def run(args, model, checkpoint, command, device, out):
    """Score, or predict images with, one network -> what results.json in `out` holds."""
    start = time.perf_counter()
    length = 2 if args.dry_run else None
    files = open_images(args.images)[:length] if args.images else None
    options = {
        "scales": tuple(args.scales or (TTA_SCALES if args.tta else (1.0,))), "window": args.slide,
        "flip": args.tta if args.flip is None else args.flip, "stride": args.slide_stride,
        "amp_dtype": AMP_DTYPES[choose_amp(args.amp, device)], "crf": args.crf and {"steps": args.crf, "seconds": []},
    }  # fmt: skip
    metrics, extra, crf = {}, {}, options["crf"]
    if files:
        info = DataInfo.from_dict(checkpoint["data"])
        fit = None if args.slide else info.size  # a sliding window is for images larger than what was trained on
        limit = args.max_pixels or info.options.get("max_pixels", datasets.MAX_PIXELS)
        shown = dict(size=args.size, fit=fit, max_pixels=limit)
        extra["written"] = predict_images(model, info, files, out, device=device, **shown, **options)
    else:
        dataset = open_scored(
            checkpoint, weights=args.weights, dataset=args.dataset, data_root=args.data_root, size=args.size,
            split=args.split, length=length, options=datasets.option_values(args),
        )  # fmt: skip
        datasets.print_notes(dataset)
        loading = {"batch_size": args.batch_size, "workers": args.workers}
        gallery = Gallery(dataset.info, len(dataset)) if args.gallery else None
        metrics = score(
            model, dataset, device=device, out=out, boundary=args.boundary, gallery=gallery, **loading, **options
        )
        if gallery:
            name = f"{models.model_name(checkpoint['build'])} on {dataset.info.name}, {args.split}"
            gallery.write(out / "gallery.html", f"{name}: {metrics['miou']:.2f} mIoU")
        extra["dataset"] = dataset.info.name
    if crf:
        cost = 1000 * sum(crf["seconds"]) / len(crf["seconds"])
        extra["crf"] = {"steps": args.crf, "miou_without": metrics.get("miou_without_crf"), "ms_per_image": cost}
    common = {"command": command, "split": None if files else args.split, "device": device, "path": args.weights}
    done = results(model, checkpoint, metrics, seconds=time.perf_counter() - start, **common) | extra
    write_json(out / "results.json", done)
    if files:
        print(f"wrote {len(extra['written'])} files for {len(files)} images to {out}/")
    else:
        print_classes(metrics, dataset.info.classes)
        shown = ("model", "dataset", "split", "pretrained", "miou", "macc", "aacc", "boundary_iou", "images_per_second")
        print()
        print_table([{key: done[key] for key in shown}])
        print(f"mIoU is over {done['classes_averaged']} classes. Wrote results.json and three figures to {out}/")
        if args.gallery:
            print(f"{out / 'gallery.html'}: open it in a browser")
    if crf:
        gain = "" if files else f"mIoU {metrics['miou_without_crf']:.2f} -> {done['miou']:.2f}, "
        print(f"CRF, {args.crf} steps: {gain}{cost:.0f} ms an image added")
    return done


if __name__ == "__main__":
    run_cli(main)
