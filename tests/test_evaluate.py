"""evaluate.py against independent references: scikit-learn, SciPy, F.interpolate, and plain loops."""

import base64
import dataclasses
import io
import json
import math
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from scipy import ndimage, special
from sklearn import metrics as sk
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import datasets
import evaluate
import models
from evaluate import BoundaryIoU, ConfusionMatrix, Kernel, mean_field, predict, upsample_rows

SCENE = (32, 64)
BackendCompilerFailed = type("BackendCompilerFailed", (RuntimeError,), {"__module__": "torch._dynamo.exc"})


class Tiny(nn.Module):
    """The smallest network that keeps models.py's contract, at stride 4 and with BatchNorm and Dropout."""

    stride = 4

    def __init__(self, num_classes=5):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 4, stride=4)
        self.norm = nn.BatchNorm2d(8)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Conv2d(8, num_classes, 3, padding=1)

    def encode(self, images):
        h, w = images.shape[-2:]
        return [self.drop(self.norm(self.conv(F.pad(images, (0, -w % 4, 0, -h % 4)))))]

    def decode(self, features):
        return 3 * self.head(features[0])

    def resize(self, logits, size):
        h, w = size
        padded = (h + -h % 4, w + -w % 4)
        return F.interpolate(logits, size=padded, mode="bilinear", align_corners=False)[..., :h, :w]

    def forward(self, images):
        return self.resize(self.decode(self.encode(images)), images.shape[-2:])


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Tensors here are tiny: a second thread would only wait."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Tiny().eval()


def rand_ids(shape, num_classes, *, ignored=0.1, seed=0):
    """Blobs of class ids, int64, some of them 255."""
    g = torch.Generator().manual_seed(seed)
    coarse = torch.randint(0, num_classes, (shape[0], 1, shape[1] // 4 + 1, shape[2] // 4 + 1), generator=g).float()
    ids = F.interpolate(coarse, scale_factor=4)[:, 0, : shape[1], : shape[2]].long()
    return torch.where(torch.rand(shape, generator=g) < ignored, 255, ids)


def same_ids(ids, scores, tolerance=1e-4):
    """ids is the arg max of scores (N, K, H, W), except where the best two are equal up to rounding."""
    assert ids.shape == scores.shape[:1] + scores.shape[2:]
    chosen = scores.gather(1, ids.long()[:, None])[:, 0]
    return bool((scores.amax(1) - chosen <= tolerance).all())


# ---- metrics --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtypes", [(torch.int64, torch.uint8), (torch.uint8, torch.uint8), (torch.int16, torch.int64)])
def test_confusion_matrix_equals_sklearn_and_a_loop(dtypes):
    target = rand_ids((3, 21, 17), 4)
    prediction = rand_ids((3, 21, 17), 4, ignored=0, seed=1)
    matrix = ConfusionMatrix(4)
    matrix.update(target.to(dtypes[0]), prediction.to(dtypes[1]))
    valid = target != 255
    t, p = target[valid].numpy(), prediction[valid].numpy()
    assert matrix.counts.dtype == torch.int64
    assert matrix.counts.tolist() == sk.confusion_matrix(t, p, labels=range(4)).tolist()
    looped = torch.zeros(4, 4, dtype=torch.int64)
    for a, b in zip(t.tolist(), p.tolist(), strict=True):
        looped[a, b] += 1
    assert torch.equal(matrix.counts, looped)
    m = matrix.metrics()
    assert m["class_iou"] == pytest.approx(100 * sk.jaccard_score(t, p, average=None))
    assert m["miou"] == pytest.approx(100 * sk.jaccard_score(t, p, average="macro"))
    assert m["macc"] == pytest.approx(100 * sk.balanced_accuracy_score(t, p))
    assert m["aacc"] == pytest.approx(100 * sk.accuracy_score(t, p))


def test_absent_class_is_nan_and_left_out():
    matrix = ConfusionMatrix(4)
    # Class 2 is only predicted: IoU 0, counted in mIoU, not in mAcc. Class 3 is nowhere: left out of both.
    matrix.update(torch.tensor([0, 0, 1, 1, 255]), torch.tensor([0, 2, 1, 1, 3]))
    m = matrix.metrics()
    assert m["class_iou"][:3] == pytest.approx([50, 100, 0])
    assert math.isnan(m["class_iou"][3])
    assert m["miou"] == pytest.approx(50)
    assert m["macc"] == pytest.approx(75)
    assert m["aacc"] == pytest.approx(75)
    assert m["classes_averaged"] == 3


def test_everything_ignored_is_nan_not_an_error():
    matrix = ConfusionMatrix(3)
    matrix.update(torch.full((2, 4), 255), torch.zeros(2, 4, dtype=torch.uint8))
    assert matrix.counts.sum() == 0
    assert math.isnan(matrix.metrics()["miou"])


def test_bad_values_are_named():
    matrix = ConfusionMatrix(3)
    with pytest.raises(ValueError, match=r"target holds \[3, 254\], expected 0..2 or 255"):
        matrix.update(torch.tensor([0, 3, 254, 255], dtype=torch.uint8), torch.zeros(4, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"target holds \[-1\]"):
        matrix.update(torch.tensor([-1]), torch.tensor([0]))
    with pytest.raises(ValueError, match=r"prediction holds \[7\]"):
        matrix.update(torch.tensor([0]), torch.tensor([7]))
    with pytest.raises(ValueError, match="prediction is"):
        matrix.update(torch.zeros(2, 3), torch.zeros(3, 2))
    assert matrix.counts.sum() == 0


def brute_boundary_iou(target, prediction, num_classes, ratio):
    """Mask by mask as in the paper: erosion by 3x3, d times, zeros outside."""
    counts = np.zeros((2, num_classes), dtype=np.int64)
    d = max(1, round(ratio * math.hypot(*target.shape[1:])))
    for t, p in zip(target.numpy(), prediction.numpy(), strict=True):
        for c in range(num_classes):
            masks = [(x == c) & (t != 255) for x in (t, p)]
            edges = [m & ~ndimage.binary_erosion(m, np.ones((3, 3)), iterations=d, border_value=0) for m in masks]
            counts[:, c] += (edges[0] & edges[1]).sum(), (edges[0] | edges[1]).sum()
    return counts


@pytest.mark.parametrize("ratio", [0.02, 0.06])
@pytest.mark.parametrize("ignored", [0, 0.01])
def test_boundary_iou_equals_erosion_mask_by_mask(ratio, ignored):
    target = rand_ids((3, 43, 61), 3, ignored=ignored).repeat_interleave(2, 1)
    prediction = target.roll(1, 2).clamp(max=2)
    prediction[:, 10:30, 5:20] = 3
    metric = BoundaryIoU(5, ratio=ratio)
    metric.update(target[:2].to(torch.uint8), prediction[:2].to(torch.uint8))
    metric.update(target[2:], prediction[2:].to(torch.uint8))
    assert metric.counts.numpy().tolist() == brute_boundary_iou(target, prediction, 5, ratio).tolist()
    m = metric.metrics()
    assert math.isnan(m["class_boundary_iou"][4])
    assert 0 < m["boundary_iou"] < 100


def test_boundary_iou_of_a_square():
    target = torch.zeros(1, 50, 50, dtype=torch.int64)
    target[:, 10:30, 10:30] = 1  # 20 x 20; d = 1, so 76 boundary pixels
    metric = BoundaryIoU(2)
    metric.update(target, target)
    assert metric.counts[:, 1].tolist() == [76, 76]
    assert metric.metrics()["boundary_iou"] == 100


# ---- prediction -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("h", "w", "stride"), [(7, 5, 4), (3, 4, 14), (1, 1, 8), (6, 9, 1)])
@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_upsample_rows_equals_interpolate_and_crop(h, w, stride, chunk):
    logits = torch.randn(2, 3, h, w)
    size = (h * stride - stride // 3, w * stride - stride // 2)
    whole = F.interpolate(logits, size=(h * stride, w * stride), mode="bilinear", align_corners=False)
    expected = whole[..., : size[0], : size[1]]
    rows, cols = ((torch.arange(n, dtype=torch.float64) + 0.5) / stride - 0.5 for n in size)
    parts = [upsample_rows(logits, rows[i : i + chunk], cols) for i in range(0, size[0], chunk)]
    torch.testing.assert_close(torch.cat(parts, dim=2), expected, atol=1e-5, rtol=0)


def test_upsample_rows_mixes_bfloat16_in_float32():
    logits = torch.randn(1, 2, 4, 4).to(torch.bfloat16)
    coords = torch.linspace(0, 3, 16, dtype=torch.float64)
    out = upsample_rows(logits, coords, coords)
    assert out.dtype == torch.float32
    assert torch.equal(out, upsample_rows(logits.float(), coords, coords))


@pytest.mark.parametrize("size", [(32, 48), (31, 45), (5, 3), (1, 1)])
@pytest.mark.parametrize("chunk", [1, 700, 1 << 20])
def test_plain_prediction_is_the_arg_max_of_the_network(model, monkeypatch, size, chunk):
    monkeypatch.setattr(evaluate, "CHUNK", chunk)
    images = torch.randn(2, 3, *size)
    ids = predict(model, images)
    assert ids.dtype == torch.uint8
    assert same_ids(ids, model(images))


def test_prediction_at_label_resolution(model):
    images = torch.randn(1, 3, 32, 48)  # a multiple of the stride, so that one interpolation says it all
    for size in ((64, 96), (77, 50), (11, 200)):
        logits = model.decode(model.encode(images))
        expected = F.interpolate(logits, size=size, mode="bilinear", align_corners=False)
        assert same_ids(predict(model, images, size=size), expected)


def test_flip_equals_flipping_by_hand(model):
    images = torch.randn(2, 3, 21, 34)
    expected = model(images).softmax(1) + model(images.flip(-1)).flip(-1).softmax(1)
    ids = predict(model, images, flip=True)
    assert same_ids(ids, expected)
    assert (ids != predict(model, images)).any()


def by_hand(model, images, scales, flip):
    """Sum of softmax over views; one interpolation from logits to output, through explicit weights."""
    h, w = images.shape[-2:]
    total = 0
    for scale in scales:
        hs, ws = round(h * scale), round(w * scale)
        scaled = F.interpolate(images, size=(hs, ws), mode="bilinear", align_corners=False, antialias=scale < 1)
        for mirror in (False, True)[: 1 + flip]:
            logits = model.decode(model.encode(scaled.flip(-1) if mirror else scaled))
            matrices = []
            for n, ns, length in ((h, hs, logits.shape[2]), (w, ws, logits.shape[3])):
                matrix = torch.zeros(n, length)
                for r in range(n):
                    centre = (r + 0.5) * ns / n  # in pixels of the scaled image
                    if mirror and n == w and matrices:
                        centre = ns - centre
                    y = min(max(centre * length / (math.ceil(ns / 4) * 4) - 0.5, 0), length - 1)
                    low = int(y)
                    matrix[r, low] += 1 - (y - low)
                    matrix[r, min(low + 1, length - 1)] += y - low
                matrices.append(matrix)
            total = total + torch.einsum("rh,nkhw,cw->nkrc", matrices[0], logits, matrices[1]).softmax(1)
    return total


@pytest.mark.parametrize("flip", [False, True])
def test_scales_equal_a_computation_by_hand(model, monkeypatch, flip):
    monkeypatch.setattr(evaluate, "CHUNK", 2000)
    images = torch.randn(2, 3, 22, 35)
    scales = (0.5, 0.75, 1.0, 1.25)
    assert same_ids(predict(model, images, scales=scales, flip=flip), by_hand(model, images, scales, flip))


@pytest.mark.parametrize("views", [{}, {"scales": (1.0, 1.5), "flip": True}])
@pytest.mark.parametrize(
    ("window", "stride"),
    [((16, 16), (11, 9)), ((13, 40), (13, 7)), ((29, 30), (1, 9)), ((33, 8), (5, 8)), ((64, 20), None)],
)
def test_sliding_window_equals_full_accumulators(model, monkeypatch, window, stride, views):
    monkeypatch.setattr(evaluate, "CHUNK", 999)
    images = torch.randn(2, 3, 33, 47)
    (h, w), (wh, ww) = images.shape[-2:], (min(window[0], 33), min(window[1], 47))
    sh, sw = stride or (window[0] * 2 // 3, window[1] * 2 // 3)
    total = torch.zeros(2, 5, h, w)
    for y in sorted({min(y, h - wh) for y in range(0, h, sh)}):
        for x in sorted({min(x, w - ww) for x in range(0, w, sw)}):
            crop = images[:, :, y : y + wh, x : x + ww]
            scores = by_hand(model, crop, views["scales"], views["flip"]) if views else model(crop)
            total[:, :, y : y + wh, x : x + ww] += scores
    ids = predict(model, images, window=window, stride=stride, **views)
    assert same_ids(ids, total, tolerance=1e-3)


def test_sliding_window_larger_than_the_image_is_the_image(model):
    images = torch.randn(1, 3, 20, 30)
    assert torch.equal(predict(model, images, window=(64, 64), stride=(48, 48)), predict(model, images))


@pytest.mark.parametrize("size", [(66, 94), (17, 31), (100, 20)])
def test_sliding_window_at_label_resolution_fills_every_pixel(model, size):
    images = torch.randn(1, 3, 33, 47)
    with torch.no_grad():
        model.head.weight.zero_()
        model.head.bias.copy_(torch.tensor([0.0, 0, 0, 0, 1]))
    ids = predict(model, images, size=size, window=(16, 16), stride=(7, 16))
    assert ids.shape == (1, *size)
    assert (ids == 4).all()


@pytest.mark.parametrize("stride", [(17, 8), (8, 0), (-1, 3)])
def test_a_stride_that_leaves_gaps_is_refused(model, stride):
    with pytest.raises(ValueError, match="leaves gaps"):
        predict(model, torch.randn(1, 3, 40, 40), window=(16, 16), stride=stride)


def test_more_than_255_classes_need_more_than_uint8():
    ids = predict(Tiny(300).eval(), torch.randn(1, 3, 16, 16))
    assert ids.dtype == torch.int16
    assert ids.max() > 255


def test_prediction_under_autocast_is_close(model):
    images = torch.randn(1, 3, 32, 32)
    ids = predict(model, images, amp_dtype=torch.bfloat16)
    assert same_ids(ids, model(images), tolerance=0.2)


class LargestTensor(TorchDispatchMode):
    """Remembers the most elements that any operation returned."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor):
                self.numel = max(self.numel, x.numel())
        return out


@pytest.mark.parametrize("options", [{}, {"scales": (0.5, 1.0), "flip": True}, {"window": (128, 128)}])
def test_logits_never_exist_at_full_size(options):
    classes, height, width = 64, 1200, 256
    model, images = Tiny(classes).eval(), torch.randn(1, 3, height, width)
    with LargestTensor() as largest:
        predict(model, images, **options)
    assert images.numel() < largest.numel < classes * height * width / 4


def test_sliding_window_memory_does_not_grow_with_height():
    model, sizes = Tiny(96).eval(), []
    for height in (256, 1024):
        with LargestTensor() as largest:
            predict(model, torch.randn(1, 3, height, 64), window=(64, 64), stride=(40, 40))
        sizes.append(largest.numel)
    assert sizes[0] == sizes[1]


# ---- dense CRF ------------------------------------------------------------------------------------------------------


def brute_mean_field(log_p, photo, steps, kernels):
    """Algorithm 1 of the paper with P x P matrices in float64; a pair counts where the kernel links it."""
    k, h, w = log_p.shape
    y, x = np.divmod(np.arange(h * w), w)
    dy, dx = y[:, None] - y, x[:, None] - x
    colours = photo.numpy().reshape(3, -1).astype(float)
    rgb = ((colours[:, :, None] - colours[:, None]) ** 2).sum(0)
    matrices = []
    for kernel in kernels:
        distance = (dy**2 + dx**2) / (2 * kernel.theta_xy**2) + rgb / (2 * kernel.theta_rgb**2)
        linked = (dy**2 + dx**2 <= kernel.reach**2) & (dy % kernel.stride == 0) & (dx % kernel.stride == 0)
        matrix = np.exp(-distance) * linked * (1 - np.eye(h * w))
        scale = np.diag(1 / np.sqrt(np.maximum(matrix.sum(1), 1e-20)))
        matrices.append(kernel.weight * scale @ matrix @ scale)
    unary = -log_p.double().numpy().reshape(k, -1)
    potts = 1 - np.eye(k)
    q = special.softmax(-unary, axis=0)
    for _ in range(steps):
        q = special.softmax(-unary - potts @ sum(q @ matrix for matrix in matrices), axis=0)
    return q.reshape(k, h, w)


def rand_crf(k, h, w):
    g = torch.Generator().manual_seed(0)
    photo = torch.randint(0, 256, (3, h, w), generator=g, dtype=torch.uint8)
    return (2 * torch.randn(k, h, w, generator=g)).log_softmax(0), photo


@pytest.mark.parametrize("size", [(9, 7), (5, 12), (1, 6), (1, 1)])
@pytest.mark.parametrize(
    "kernels",
    [
        (Kernel(4.0, 3.0, 60.0, reach=99, stride=1), Kernel(1.0, 1.0, math.inf, reach=99, stride=1)),  # all pairs
        (Kernel(4.0, 3.0, 60.0, reach=5, stride=2), Kernel(1.0, 1.0, math.inf, reach=2, stride=1)),
        (Kernel(3.0, 5.0, 90.0, reach=6, stride=4),),
    ],
)
def test_mean_field_equals_matrices_over_all_pairs(size, kernels):
    log_p, photo = rand_crf(3, *size)
    for steps in (0, 1, 4):
        expected = brute_mean_field(log_p, photo, steps, kernels)
        q = mean_field(log_p, photo, steps, kernels)
        np.testing.assert_allclose(q.numpy(), expected, atol=1e-5)
    assert size == (1, 1) or (q - log_p.exp()).abs().max() > 0.01


def test_mean_field_cleans_noise_up_to_the_colour_edge():
    g = torch.Generator().manual_seed(0)
    truth = torch.zeros(200, 281, dtype=torch.int64)
    truth[:, 140:] = 1
    photo = torch.tensor([60, 180])[truth].expand(3, -1, -1) + torch.randint(-8, 9, (3, 200, 281), generator=g)
    wrong = torch.rand(truth.shape, generator=g) < 0.2
    right = torch.where(wrong, 0.3, 0.7)
    p = torch.stack([torch.where(truth == c, right, 1 - right) for c in (0, 1)])
    assert ((p.argmax(0) == truth) == ~wrong).all()
    assert (mean_field(p.log(), photo.to(torch.uint8), 5).argmax(0) == truth).all()
    grey = torch.full_like(photo, 90).to(torch.uint8)  # without an edge in the image there is none to stop at
    assert (mean_field(p.log(), grey, 5).argmax(0) != truth).any()


def test_mean_field_needs_memory_for_a_few_maps():
    log_p, photo = rand_crf(7, 90, 110)
    with LargestTensor() as largest:
        mean_field(log_p, photo, 2)
    assert largest.numel == log_p.numel()


@pytest.mark.parametrize("options", [{}, {"scales": (0.75, 1.0), "flip": True}, {"window": (16, 20)}])
@pytest.mark.parametrize("views", [{}, {"flip": True}])
def test_refinement_gets_log_probabilities_at_full_size(model, options, views):
    images, seen = torch.randn(2, 3, 32, 48), []

    def refine(ids, log_p):
        seen.append((ids.clone(), log_p))
        return ids + 1

    options = options | views
    plain = predict(model, images, **options)
    assert torch.equal(predict(model, images, refine=refine, **options), plain + 1)
    ids, log_p = seen[0]
    assert torch.equal(ids, plain)
    assert log_p.shape == (2, 5, 32, 48)
    torch.testing.assert_close(log_p.exp().sum(1), torch.ones(2, 32, 48))
    if not options:
        torch.testing.assert_close(log_p, model(images).log_softmax(1), atol=1e-4, rtol=1e-4)
    elif "scales" in options:
        expected = by_hand(model, images, **options) / 4
        torch.testing.assert_close(log_p.exp(), expected, atol=1e-4, rtol=1e-4)
    elif options == {"window": (16, 20)}:  # the mean of the windows' logits: their sum would be too sure of itself
        total, count = torch.zeros(2, 5, 32, 48), torch.zeros(32, 48)
        for y in (0, 10, 16):
            for x in (0, 13, 26, 28):
                total[..., y : y + 16, x : x + 20] += model(images[..., y : y + 16, x : x + 20])
                count[y : y + 16, x : x + 20] += 1
        torch.testing.assert_close(log_p, (total / count).log_softmax(1), atol=1e-4, rtol=1e-4)


# ---- evaluate -------------------------------------------------------------------------------------------------------


def make_batches(count, batch_size):
    g = torch.Generator().manual_seed(1)
    images, target = torch.randn(count, 3, 18, 26, generator=g), rand_ids((count, 36, 52), 5)
    return [(images[i : i + batch_size], target[i : i + batch_size]) for i in range(0, count, batch_size)]


def score(model, batches, **options):
    metrics = evaluate.evaluate(model, batches, num_classes=5, ignore_index=255, device=torch.device("cpu"), **options)
    return {k: v for k, v in metrics.items() if k != "images_per_second"}


@pytest.mark.parametrize("options", [{}, {"flip": True, "scales": (0.75, 1.0)}, {"window": (12, 12)}])
def test_batch_size_does_not_change_the_numbers(model, options):
    one, seven = (score(model, make_batches(9, n), **options) for n in (1, 7))
    assert one == seven
    assert one["images"] == 9
    assert torch.tensor(one["confusion"]).sum() == (rand_ids((9, 36, 52), 5) != 255).sum()


def test_evaluate_equals_prediction_by_hand(model):
    seen = []
    metrics = score(model, make_batches(3, 2), boundary=False, on_batch=lambda *batch: seen.append(batch))
    assert "boundary_iou" not in metrics
    t = torch.cat([b[1] for b in seen])
    p = torch.cat([b[2] for b in seen]).long()
    assert metrics["miou"] == pytest.approx(100 * sk.jaccard_score(t[t != 255], p[t != 255], average="macro"))


def test_training_flags_are_restored_module_by_module(model):
    model.train()
    model.norm.eval()  # a frozen norm in a network that trains
    score(model, make_batches(1, 1))
    assert [m.training for m in (model, model.conv, model.norm, model.drop)] == [True, True, False, True]
    with pytest.raises(ValueError, match="target holds"):
        score(model, [(torch.randn(1, 3, 8, 8), torch.full((1, 8, 8), 9))])
    assert [m.training for m in (model, model.norm, model.drop)] == [True, False, True]


def _process(rank, world, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=world)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    metrics = score(Tiny().eval(), make_batches(5, 1)[rank::world])
    matrix = ConfusionMatrix(5)
    matrix.update(torch.tensor([rank]), torch.tensor([rank]))
    sums = [int(matrix.reduce().counts.sum()) for _ in range(3)] + [int(matrix.counts.sum())]
    heavy = [name for name in ("matplotlib", "transformers", "onnx") if name in sys.modules]
    evaluate.write_json(f"{folder}/{rank}.json", {"metrics": metrics, "sums": sums, "heavy": heavy})
    dist.destroy_process_group()


def test_two_processes_equal_one_exactly(model, tmp_path):
    torch.multiprocessing.spawn(_process, args=(2, str(tmp_path)), nprocs=2)
    one = json.loads(json.dumps(score(model, make_batches(5, 1))))
    for rank in range(2):
        got = json.loads((tmp_path / f"{rank}.json").read_text())
        assert got["metrics"] == one
        assert got["sums"] == [2, 2, 2, 1]
        assert got["heavy"] == []  # a fresh process: importing and scoring needs none of them


# ---- figures and files ----------------------------------------------------------------------------------------------


def check_png(path):
    assert path.stat().st_size < 200_000
    with Image.open(path) as image:
        assert min(image.size) >= 200
        assert max(image.size) < 2200
        return image.convert("RGB").copy()


def test_colorize_and_overlay():
    ids = torch.tensor([[0, 1], [255, 1]], dtype=torch.uint8)
    rgb = evaluate.colorize(ids, ((10, 20, 30), (200, 0, 0)))
    assert rgb.dtype == torch.uint8
    assert rgb.permute(1, 2, 0).tolist() == [[[10, 20, 30], [200, 0, 0]], [[0, 0, 0], [200, 0, 0]]]
    image = torch.full((3, 2, 2), 100, dtype=torch.uint8)
    assert torch.equal(evaluate.overlay(image, ids, ((10, 20, 30), (200, 0, 0)), alpha=1), rgb)
    assert torch.equal(evaluate.overlay(image, ids, ((10, 20, 30), (200, 0, 0)), alpha=0), image)


@pytest.mark.parametrize("k", [2, 19])
def test_figures_are_written_and_small(tmp_path, k):
    info = datasets.open_dataset("synthetic", "val", size=SCENE, length=1).info
    classes, palette = info.classes[:k], info.palette[:k]
    counts = torch.randint(0, 1000, (k, k))
    counts[1], counts[:, 1] = 0, 0  # a class that is nowhere
    ious = ConfusionMatrix(k)
    ious.counts = counts
    evaluate.plot_confusion(counts.tolist(), classes, tmp_path / "a.png")
    evaluate.plot_class_iou(ious.metrics()["class_iou"], classes, palette, tmp_path / "b.png")
    evaluate.plot_class_distribution(counts.sum(1), classes, palette, tmp_path / "c.png")
    rows = [
        (torch.randint(0, 256 if k > 2 else 1, (3, 240, 320)).byte(), rand_ids((1, 240, 320), k)[0], label)
        for label in rand_ids((2, 240, 320), k, ignored=0, seed=1).to(torch.uint8)
    ]
    evaluate.plot_examples(rows, info, tmp_path / "d.png")  # noise: the hardest picture to keep small
    for name in "abcd":
        colours = check_png(tmp_path / f"{name}.png").getcolors(1 << 24)
        assert len(colours) > 5


def test_json_is_whole_and_has_no_nan(tmp_path):
    path = tmp_path / "new" / "x.json"
    evaluate.write_json(path, {"a": math.nan, "b": [1, math.inf, "x"], "c": {"d": (True, torch.tensor(2.5))}})
    assert json.loads(path.read_text()) == {"a": None, "b": [1, None, "x"], "c": {"d": [True, 2.5]}}
    assert [p.name for p in path.parent.iterdir()] == ["x.json"]


def test_table_is_aligned(capsys):
    evaluate.print_table([{"class": "road", "IoU": 97.123}, {"class": "traffic light", "IoU": math.nan}])
    assert capsys.readouterr().out.splitlines() == [
        "class            IoU",
        "road           97.12",
        "traffic light      -",
    ]


# ---- command line ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """An untrained network for the embedded scenes, saved as train.py would."""
    torch.manual_seed(0)
    info = datasets.open_dataset("synthetic", "val", size=SCENE, length=1).info
    net = models.build_model(num_classes=19, backbone="mobilenet_v2", head="linear", pretrained="no")
    path = tmp_path_factory.mktemp("weights") / "best.pt"
    models.save_checkpoint(path, net, data=info.to_dict(), pretrained="no", command="-", args={"data_root": None})
    return path


def run(*argv):
    """main() as the command line runs it, but with its result."""
    result = {}
    evaluate.run_cli(lambda: result.update(evaluate.main([str(a) for a in argv])))
    return result


def test_main_scores_and_writes_everything(checkpoint, tmp_path, capsys):
    done = run("--weights", checkpoint, "--out", tmp_path, "--dry-run", "--threads", 1)
    written = json.loads((tmp_path / "results.json").read_text())
    assert written.keys() == done.keys()
    assert written["miou"] == pytest.approx(done["miou"])
    assert done["command"].startswith("python evaluate.py --weights ")
    assert (done["dataset"], done["split"], done["images"]) == ("synthetic", "val", 2)
    assert done["file_mb"] == pytest.approx(checkpoint.stat().st_size / 2**20)
    assert set(written["class_iou"]) == set(
        datasets.open_dataset("synthetic", "val", size=SCENE, length=1).info.classes
    )
    for name in ("confusion.png", "class_iou.png", "examples.png"):
        check_png(tmp_path / name)
    out = capsys.readouterr().out
    assert "sidewalk" in out
    assert f"{done['miou']:.2f}" in out


def test_main_with_every_prediction_option(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "save_figure", lambda figure, path: None)  # drawn in the test above
    common = ("--weights", checkpoint, "--out", tmp_path, "--dry-run", "--no-boundary", "--threads", 1)
    plain = run(*common)
    assert plain["boundary_iou"] is None
    assert run(*common, "--batch-size", 2)["class_iou"] == pytest.approx(plain["class_iou"], nan_ok=True)
    for options in (
        ("--tta",),
        ("--scales", 1, "--flip"),
        ("--slide", 16, 32, "--slide-stride", 9, 32),
        ("--amp", "bf16"),
    ):
        assert math.isfinite(run(*common, *options)["miou"])


def test_main_with_crf(checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "save_figure", lambda figure, path: None)
    common = ("--weights", checkpoint, "--out", tmp_path, "--dry-run", "--no-boundary", "--threads", 1)
    plain = run(*common)
    assert "crf" not in plain
    none = run(*common, "--crf", 0)
    assert (none["class_iou"], none.keys()) == (pytest.approx(plain["class_iou"], nan_ok=True), plain.keys())
    for options in (("--tta", "--batch-size", 2), ("--slide", 16, 32)):
        without = run(*common, *options)
        done = run(*common, *options, "--crf", 2)
        assert done["crf"]["steps"] == 2
        assert done["crf"]["ms_per_image"] > 0
        assert done["crf"]["miou_without"] == pytest.approx(without["miou"])
        assert f"mIoU {without['miou']:.2f} -> {done['miou']:.2f}, " in capsys.readouterr().out
    assert json.loads((tmp_path / "results.json").read_text())["crf"] == done["crf"]


def test_crf_sees_the_image_at_the_labels_size_and_no_label(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "save_figure", lambda figure, path: None)
    net, _ = models.load_checkpoint(checkpoint)
    predictions = []
    for void in (False, True):
        data = datasets.open_dataset("synthetic", "val", size=(31, 45), length=2)
        data.transform = datasets.eval_transform(data.info, (16, 32))  # the network sees a smaller image
        if void:
            raw = data.raw
            data.raw = lambda i, raw=raw: (raw(i)[0], raw(i)[1].masked_fill(torch.rand(31, 45) < 0.5, 255))
        expected, rows, seconds = [], [], []
        monkeypatch.setattr(evaluate, "plot_examples", lambda found, info, path, rows=rows: rows.extend(found))
        evaluate.score(net, data, device=torch.device("cpu"), out=tmp_path, crf={"steps": 2, "seconds": seconds})
        assert len(seconds) == 2
        for i in range(2):
            logits = net.eval().decode(net.encode(data[i][0][None]))
            log_p = F.interpolate(logits, size=(31, 45), mode="bilinear", align_corners=False).log_softmax(1)
            expected.append(mean_field(log_p[0].detach(), data.raw(i)[0], 2))
        predictions.append(torch.stack([ids for _, _, ids in rows]))
        assert same_ids(predictions[-1], torch.stack(expected))
    assert torch.equal(*predictions)


def test_main_predicts_images_at_their_own_size(checkpoint, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    g = np.random.default_rng(0)
    for name, size in (("a.png", (50, 70)), ("a.jpg", (33, 41)), ("b.png", (64, 32))):
        Image.fromarray(g.integers(0, 256, (*size, 3), dtype=np.uint8)).save(folder / name)
    (folder / "notes.txt").write_text("not an image")
    done = run("--weights", checkpoint, "--images", folder, "--out", tmp_path / "out")
    names = {p.name for p in (tmp_path / "out").iterdir()}
    expected = {f"{stem}_{kind}.png" for stem in ("a_png", "a_jpg", "b") for kind in ("ids", "overlay")}
    assert names == expected | {"results.json"}
    assert len(done["written"]) == 6
    with (
        Image.open(tmp_path / "out" / "a_jpg_ids.png") as ids,
        Image.open(tmp_path / "out" / "a_jpg_overlay.png") as rgb,
    ):
        assert (ids.mode, ids.size, rgb.mode, rgb.size) == ("L", (41, 33), "RGB", (41, 33))
        assert np.asarray(ids).max() < 19


def test_crf_refines_a_photo_at_its_own_size(checkpoint, tmp_path):
    photo = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    Image.fromarray(photo).save(tmp_path / "x.png")
    done = run("--weights", checkpoint, "--images", tmp_path / "x.png", "--out", tmp_path, "--size", 50, 70, "--crf", 3)
    assert done["crf"]["steps"] == 3
    assert done["crf"]["miou_without"] is None
    net, saved = models.load_checkpoint(checkpoint)
    info = datasets.DataInfo.from_dict(saved["data"])
    photo = torch.from_numpy(photo).permute(2, 0, 1)
    batch = datasets.eval_transform(info, (50, 70))(datasets.tv_tensors.Image(photo))[None]
    with Image.open(tmp_path / "x_ids.png") as ids, torch.inference_mode():
        expected = mean_field(net(batch)[0].log_softmax(0), photo, 3)
        assert same_ids(torch.from_numpy(np.array(ids))[None], expected[None], tolerance=1e-3)


def test_predicted_ids_are_those_of_the_network(checkpoint, tmp_path):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)).save(tmp_path / "x.png")
    run("--weights", checkpoint, "--images", tmp_path / "x.png", "--out", tmp_path, "--size", 50, 70)
    net, saved = models.load_checkpoint(checkpoint)
    info = datasets.DataInfo.from_dict(saved["data"])
    image = datasets.eval_transform(info, (50, 70))(
        datasets.tv_tensors.Image(datasets.decode_image(tmp_path / "x.png"))
    )
    with Image.open(tmp_path / "x_ids.png") as ids, torch.inference_mode():
        assert same_ids(torch.from_numpy(np.array(ids))[None], net(image[None]), tolerance=1e-3)


def camvid_with_two_classes(root):
    """A folder data set that has other classes than the embedded scenes."""
    for kind in ("images", "masks"):
        (root / kind / "val").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(root / "images" / "val" / "x.png")
    Image.new("L", (8, 8)).save(root / "masks" / "val" / "x.png")
    (root / "classes.txt").write_text("sky 0 0 255\nroad 128 64 128\n")
    return root


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--weights", "{tmp}/none.pt"], "python train.py --head fpn"),
        (["--images", "{tmp}/none.png"], "no such file"),
        (["--images", "{tmp}/empty"], "holds no image"),
        (["--images", "{tmp}/bad.png"], "bad.png"),
        (["--dataset", "nowhere"], "nowhere"),
        (["--split", "nosplit"], "nosplit"),
        (["--dataset", "folder", "--data-root", "{tmp}/folder"], "19 classes, but folder has 2"),
        (["--slide", "16", "16", "--slide-stride", "20", "16"], "leaves gaps"),
        (["--slide-stride", "20", "16"], "--slide-stride is of --slide"),
        (["--out", "{tmp}/bad.png/x"], "bad.png"),
    ],
)
def test_user_errors_are_one_line_and_exit_2(checkpoint, tmp_path, capsys, argv, words):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.png").write_bytes(b"this is no image")
    camvid_with_two_classes(tmp_path / "folder")
    argv = [a.format(tmp=tmp_path) for a in argv]
    with pytest.raises(SystemExit) as stopped:
        run("--weights", checkpoint, "--out", tmp_path / "out", "--dry-run", *argv)
    assert stopped.value.code == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert error[-1].startswith("error: ")
    assert words in error[-1]
    assert not any("Traceback" in line for line in error)


def test_predictions_replace_no_photo_and_results_not_those_of_a_run(checkpoint, tmp_path):
    for name in ("a.png", "a_ids.png"):
        Image.new("RGB", (30, 20)).save(tmp_path / name)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(SystemExit, match="2"):
        run("--weights", checkpoint, "--images", tmp_path, "--out", tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    with pytest.raises(SystemExit, match="2"):
        run("--weights", checkpoint, "--out", checkpoint.parent, "--dry-run")
    assert os.listdir(checkpoint.parent) == ["best.pt"]


def test_a_terminal_without_the_letters_of_a_class_costs_nothing(monkeypatch):
    screen = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr(sys, "stdout", screen)
    evaluate.run_cli(lambda: evaluate.print_table([{"class": "道路", "IoU": 1.0}]))
    screen.flush()
    assert "\\u9053" in screen.buffer.getvalue().decode()


def test_a_dry_run_leaves_the_results_of_a_real_one(checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    real = tmp_path / "checkpoints" / "evaluate" / "results.json"
    evaluate.write_json(real, {"miou": 1.0})
    run("--weights", checkpoint, "--dry-run", "--no-boundary")
    assert json.loads(real.read_text()) == {"miou": 1.0}
    assert (tmp_path / "checkpoints" / "dry-run" / "evaluate" / "results.json").exists()


@pytest.mark.parametrize(("bf16", "chosen"), [(1.0, "bf16"), (1.9, "off")])
def test_amp_auto_is_not_decided_by_one_interruption(bf16, chosen, monkeypatch):
    now, ticks = 0.0, []
    for turn in range(10):
        for seconds in (2.0, 100.0 if turn == 3 else bf16):
            ticks += [now, now := now + seconds]
    monkeypatch.setattr(evaluate.time, "perf_counter", iter(ticks).__next__)
    assert evaluate.choose_amp("auto", torch.device("cpu")) == chosen


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_gpu_that_is_not_there(capsys):
    with pytest.raises(SystemExit):
        run("--device", "cuda")
    assert "no CUDA GPU" in capsys.readouterr().err
    assert evaluate.pick_device("auto").type == "cpu"


def test_ctrl_c_exits_quietly(capsys):
    def main():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as stopped:
        evaluate.run_cli(main)
    assert stopped.value.code == 130
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "read",
    [
        evaluate.open_images,
        models.read_checkpoint,
        lambda pipe: models.load_adapter(None, {}, pipe),
        lambda pipe: models.build_model(num_classes=3, backbone="resnet18", head="linear", pretrained=str(pipe)),
        lambda pipe: models.build_model(num_classes=3, backbone="mit-tiny", head="fcn", pretrained=str(pipe.parent)),
    ],
)
def test_a_pipe_is_refused_and_not_waited_for(tmp_path, read):
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(ValueError, match=r"^(no checkpoint at|no adapter at|--images|--pretrained) "):
        read(tmp_path / "config.json")


def test_errors_of_loader_processes_stay_one_line(capsys):
    caught = "Caught DataError in DataLoader worker process 0.\nOriginal Traceback\ndatasets.DataError: x.png: broken"

    def main():
        raise datasets.DataError(caught)

    with pytest.raises(SystemExit):
        evaluate.run_cli(main)
    assert capsys.readouterr().err == "error: x.png: broken\n"


def test_weights_size_leaves_optimizer_state_out(checkpoint):
    size = sum(v.numel() * v.element_size() for v in models.load_checkpoint(checkpoint)[1]["state_dict"].values())
    saved = {"state_dict": models.load_checkpoint(checkpoint)[1]["state_dict"], "training": {}}
    assert evaluate.weights_mb(checkpoint, saved) == size / 2**20
    assert evaluate.weights_mb(checkpoint, {}) == pytest.approx(size / 2**20, rel=0.05)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("size", [(1400, 8), (8, 1400), (1, 1)])
def test_figures_of_extreme_shapes_are_bounded(size, tmp_path):
    from matplotlib.figure import Figure

    k = 30
    info = datasets.open_dataset("synthetic", "val", length=1).info
    info = dataclasses.replace(info, classes=tuple(f"class {i}" for i in range(k)), palette=((1, 2, 3),) * k)
    rows = [(torch.zeros(3, *size, dtype=torch.uint8), torch.zeros(size, dtype=torch.uint8), torch.zeros(size).byte())]
    evaluate.plot_examples(rows * 4, info, tmp_path / "examples.png")
    figure = Figure(figsize=(300, 2))
    evaluate.save_figure(figure, tmp_path / "wide.png", pixels=1e6)
    with Image.open(tmp_path / "examples.png") as image:
        assert max(image.size) < 4000
    with Image.open(tmp_path / "wide.png") as image:
        width, height = image.size
    assert 0.5e6 < width * height <= 1e6


@pytest.mark.filterwarnings("error")
def test_class_names_of_any_script_are_drawn_or_their_absence_is_said_once(tmp_path, monkeypatch, capsys):
    from matplotlib import font_manager

    monkeypatch.setattr(evaluate, "FONTS", evaluate.FONTS[:1])
    assert evaluate.drawable(["road", "Straße", "пешеход", "a" * 50]) == ["road", "Straße", "пешеход", "a" * 39 + "…"]
    assert evaluate.drawable(["$x_1$", "a\nb"]) == [r"\$x_1\$", "a b"]
    assert evaluate.FONTS == ["DejaVu Sans"]
    known = font_manager.fontManager.ttflist
    monkeypatch.setattr(font_manager.fontManager, "ttflist", [font for font in known if "DejaVu" in font.name])
    assert capsys.readouterr().err == ""
    assert evaluate.drawable(["路面", "sky $"]) == ["??", r"sky \$"]
    assert capsys.readouterr().err.count("no font here has 路面") == 1
    evaluate.plot_class_iou([50.0, 20.0], ["路面", "$sky$"], ((1, 2, 3),) * 2, tmp_path / "iou.png")
    assert (tmp_path / "iou.png").stat().st_size > 0


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (MemoryError(), "out of memory (MemoryError): give a smaller --batch-size"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), "out of memory ("),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "out of memory (CUDA out of memory."),
        (ModuleNotFoundError("No module named 'onnx'"), "No module named 'onnx': pip install -r requirements.txt"),
        (BackendCompilerFailed("no compiler"), "--compile fails here (no compiler): leave it out"),
        (ValueError("Expected more than 1 value per channel when training"), "BatchNorm needs more than one value"),
        (OSError(28, "No space left on device", "a.pt"), "[Errno 28] No space left on device: 'a.pt'"),
    ],
)
def test_what_a_machine_lacks_is_one_line_and_status_2(error, said, capsys):
    def main():
        raise error

    with pytest.raises(SystemExit) as ended:
        evaluate.run_cli(main)
    (line,) = capsys.readouterr().err.splitlines()
    assert (ended.value.code, line[: len(said) + 7]) == (2, f"error: {said}")


def test_a_fault_of_the_code_is_still_a_traceback():
    with pytest.raises(ZeroDivisionError):
        evaluate.run_cli(lambda: 1 / 0)


# ---- gallery --------------------------------------------------------------------------------------------------------


def gallery_rows(path):
    data = path.read_text().split('id="data">')[1].split("</script>")[0]
    return json.loads(data)


def pixels(uri):
    return Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1])))


def test_gallery_shows_every_image_the_worst_first(tmp_path):
    g = torch.Generator().manual_seed(0)
    colours = ((9, 8, 7), (1, 200, 3), (50, 60, 250))
    info = datasets.DataInfo(
        name="some", classes=("</script><b>road", "sky", "never"), palette=colours, size=SCENE, ignore_index=255
    )
    gallery, expected = evaluate.Gallery(info, 6), {}
    for i in range(6):
        label = torch.randint(0, 2, SCENE, generator=g)
        ids = torch.where(torch.rand(SCENE, generator=g) < i / 6, 1 - label, label).to(torch.uint8)
        label[:4] = 255
        if i == 3:
            label[:] = 255  # nothing to score
        else:
            of_class = sk.jaccard_score(label[4:].flatten(), ids[4:].flatten(), average=None)
            expected[f"val/{i}.png"] = 100 * of_class
        gallery.add(f"val/{i}.png", torch.randint(0, 256, (3, *SCENE), generator=g, dtype=torch.uint8), label, ids)
    gallery.write(tmp_path / "gallery.html", "a & b")
    page = (tmp_path / "gallery.html").read_text()
    assert "<b>road" not in page
    assert "http" not in page
    assert "src=" not in page
    data = gallery_rows(tmp_path / "gallery.html")
    assert [row["name"] for row in data["rows"]] == [f"val/{i}.png" for i in (5, 4, 2, 1, 0, 3)]
    for row in data["rows"][:-1]:
        assert list(row["iou"].values()) == pytest.approx(expected[row["name"]], abs=0.06)
        assert row["miou"] == pytest.approx(np.nanmean(expected[row["name"]]), abs=0.01)
    assert data["rows"][-1]["miou"] is None
    assert data["rows"][-1]["iou"] == {}
    last = {name: pixels(data["rows"][-1][name]) for name in evaluate.PICTURES}
    assert all(picture.size == SCENE[::-1] for picture in last.values())
    assert not np.array(last["label"].convert("RGB")).any()
    assert torch.equal(  # the last that was added
        torch.from_numpy(np.array(pixels(data["rows"][0]["prediction"]).convert("RGB"))).permute(2, 0, 1),
        evaluate.colorize(ids, colours),
    )


def test_gallery_keeps_to_its_size_and_to_the_worst(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "PAGE_IMAGES", 4)
    monkeypatch.setattr(evaluate, "PAGE_BYTES", 100_000)
    info = datasets.DataInfo(name="some", classes=("a", "b"), palette=((0, 0, 0), (255, 0, 0)), size=(200, 300))
    noise = torch.randint(0, 256, (3, 200, 300), dtype=torch.uint8)
    label, gallery = torch.randint(0, 2, (200, 300)), evaluate.Gallery(info, 11)
    for i in range(11):  # the later the better
        gallery.add(str(i), noise, label, torch.where(torch.rand(200, 300) < i / 11, label, 1 - label))
    gallery.write(tmp_path / "gallery.html", "noise")
    data = gallery_rows(tmp_path / "gallery.html")
    assert [row["name"] for row in data["rows"]] == ["0", "1", "2", "3"]
    assert data["seen"] == 11
    assert (tmp_path / "gallery.html").stat().st_size < 115_000


@pytest.mark.skipif(not shutil.which("chromium"), reason="no chromium here")
def test_gallery_in_a_browser(tmp_path):
    info = datasets.DataInfo(name="some", classes=("a", "b"), palette=((0, 0, 0), (255, 0, 0)), size=SCENE)
    gallery, label = evaluate.Gallery(info, 2), torch.arange(64).expand(SCENE) // 32
    for name, ids in (("good", label), ("bad", torch.zeros(SCENE, dtype=torch.long))):
        gallery.add(name, torch.zeros(3, *SCENE, dtype=torch.uint8), label, ids)
    gallery.write(tmp_path / "gallery.html", "two images")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}"]
    page = f"file://{tmp_path}/gallery.html"
    shown = subprocess.run(["chromium", *flags, "--dump-dom", page], capture_output=True, text=True, timeout=60).stdout
    body = shown.split("<main>")[1].split("</main>")[0]
    assert re.findall("<h2>([a-z]+)<span>mIoU ([0-9.]+), pixels ([0-9.]+)%", body) == [
        ("bad", "25.0", "50.0"), ("good", "100.0", "100.0"),
    ]  # fmt: skip
    assert body.count('src="data:image/') == 8
    assert "2 of 2 images" in shown
