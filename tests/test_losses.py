"""losses.py against hand-computed tables, brute-force loops and PyTorch's own functions."""

import dataclasses
import functools
import itertools
import math
import os

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

import losses
from losses import LOSSES, make_loss

# What is slow to import is imported in the tests that use it: the processes spawned below read this file too.

IGNORE = 255
BINARY = ("bce", "bce-dice")
SETTINGS = {"ohem_thresh": 0.5, "ohem_min_kept": 10, "focal_gamma": 2.0, "tversky_alpha": 0.3, "tversky_beta": 0.7}
BOUNDARY = {"boundary_weight": 4.0, "boundary_width": 1}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Tensors this small only wait for a second thread, and on a busy machine for long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def classes_for(name):
    return 2 if name in BINARY else 4


def make(name, **options):
    return make_loss(name, ignore_index=IGNORE, **SETTINGS | options)


def batch(k, *, size=(2, 7, 5), ignored=0.2, scale=2.0, dtype=torch.float32, seed=0):
    """Random logits (N, k, H, W) and a target with some ignored pixels."""
    rng = torch.Generator().manual_seed(seed)
    n, h, w = size
    logits = scale * torch.randn(n, k, h, w, generator=rng, dtype=torch.float64)
    target = torch.randint(0, k, size, generator=rng)
    target[torch.rand(size, generator=rng) < ignored] = IGNORE
    return logits.to(dtype), target


def grad(loss, logits, target):
    logits = logits.clone().requires_grad_()
    value = loss(logits, target)
    value.backward()
    return value.detach(), logits.grad


def every_loss(test):
    return pytest.mark.parametrize("name", LOSSES)(test)


# ---- four pixels, computed by hand ----

# Probabilities of class 1 at the four pixels; the logits are (0, log(p / (1 - p))).
TABLE = [
    # name, p of class 1, target, loss
    ("ce", [0.5, 0.25, 0.8, 0.9], [1, 0, 1, 0], -math.log(0.5 * 0.75 * 0.8 * 0.1) / 4),
    ("ce", [0.5, 0.25, 0.8, 0.9], [1, 0, 255, 255], -math.log(0.5 * 0.75) / 2),
    ("bce", [0.5, 0.25, 0.8, 0.9], [1, 0, 1, 255], -math.log(0.5 * 0.75 * 0.8) / 3),
    # thresh 0.5, min_kept 2: one hard pixel, so the two hardest
    ("ohem", [0.6, 0.25, 0.8, 0.9], [1, 0, 1, 0], -math.log(0.6 * 0.1) / 2),
    # three hard pixels, all of them
    ("ohem", [0.4, 0.75, 0.8, 0.9], [1, 0, 1, 0], -math.log(0.4 * 0.25 * 0.1) / 3),
    # gamma 2: (1 - p)^2 of 0.25, 0.0625, 0.04 and 0.81
    (
        "focal",
        [0.5, 0.25, 0.8, 0.9],
        [1, 0, 1, 0],
        -(0.25 * math.log(0.5) + 0.0625 * math.log(0.75) + 0.04 * math.log(0.8) + 0.81 * math.log(0.1)) / 4,
    ),
    # none hard, two tie for the second place, both kept
    ("ohem", [0.6, 0.7, 0.7, 0.9], [1, 1, 1, 1], -math.log(0.6 * 0.7 * 0.7) / 3),
    # one valid pixel where two were wanted
    ("ohem", [0.9, 0.1, 0.1, 0.1], [1, 255, 255, 255], -math.log(0.9)),
    # class 1: overlap 1.5, sum p 2.0, sum y 2;  class 0: overlap 1.5, sum p 2.0, sum y 2
    ("dice", [0.75, 0.25, 0.75, 0.25], [1, 0, 1, 0], 1 - 2 * 1.5 / 4),
    # only class 1 is in the target: overlap 1.0, sum p 1.0, sum y 2
    ("dice", [0.25, 0.75, 0.9, 0.9], [1, 1, 255, 255], 1 - 2 / 3),
    # class 1: TP 1.0, FP 0.25 + 0.25 = 0.5, FN 1.0;  class 0: TP 1.5, FP 0.5 + 0.5 = 1.0, FN 0.5
    ("tversky", [0.5, 0.25, 0.5, 0.25], [1, 0, 1, 0], 1 - (1 / (1 + 0.15 + 0.7) + 1.5 / (1.5 + 0.3 + 0.35)) / 2),
    # Only class 1, errors 0.5 and 0.25: the larger costs J({a}) = 1/2, the other 1 - 1/2.
    ("lovasz", [0.5, 0.75, 0.9, 0.9], [1, 1, 255, 255], 0.5 * 0.5 + 0.25 * 0.5),
    # class 1, foreground error 0.6, background error 0.2: 0.6 * J = 1, then 0.2 * (1 - 1) = 0; class 0 the other way
    # round: background error 0.6 has J = 1 - 1/2, then foreground error 0.2 costs the rest 1/2.
    ("lovasz", [0.4, 0.2, 0.9, 0.9], [1, 0, 255, 255], (0.6 + (0.6 * 0.5 + 0.2 * 0.5)) / 2),
    ("ce-dice", [0.25, 0.75, 0.9, 0.9], [1, 1, 255, 255], -math.log(0.25 * 0.75) / 2 + 1 - 2 / 3),
    # Dice of the foreground: overlap 0.25, sum p 1.0, sum y 1
    ("bce-dice", [0.25, 0.75, 0.9, 0.9], [1, 0, 255, 255], -math.log(0.25 * 0.25) / 2 + 1 - 0.5 / 2),
    # no foreground, no Dice part
    ("bce-dice", [0.25, 0.75, 0.9, 0.9], [0, 0, 255, 255], -math.log(0.75 * 0.25) / 2),
]


@pytest.mark.parametrize(("name", "p", "target", "expected"), TABLE)
def test_four_pixels(name, p, target, expected):
    p = torch.tensor(p)
    logits = torch.stack([torch.zeros(4), (p / (1 - p)).log()]).view(1, 2, 2, 2)
    loss = make(name, ohem_min_kept=2)
    assert loss(logits, torch.tensor(target).view(1, 2, 2)).item() == pytest.approx(expected, rel=1e-5)


# ---- cross-entropy against PyTorch ----


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weight", [None, [0.5, 2.0, 0.0, 1.0]])
@pytest.mark.parametrize("ignore_index", [255, 1, -1])
def test_cross_entropy_equals_pytorch(smoothing, weight, ignore_index):
    logits, target = batch(4)
    target[target == IGNORE] = ignore_index
    weight = None if weight is None else torch.tensor(weight)
    options = {"ignore_index": ignore_index, "label_smoothing": smoothing, "weight": weight}
    value, gradient = grad(make_loss("ce", **options), logits, target)
    expected, expected_gradient = grad(lambda x, t: F.cross_entropy(x, t, **options), logits, target)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(gradient, expected_gradient)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_pixels_of_weight_zero_alone_give_zero(smoothing):
    """A class unseen in training has weight 0; a batch of nothing else must not divide by 0."""
    logits, target = batch(2)
    target[target == 1] = 0
    value, gradient = grad(make("ce", weight=torch.tensor([0.0, 1.0]), label_smoothing=smoothing), logits, target)
    assert value == 0
    assert (gradient == 0).all()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_bce_equals_pytorch(smoothing):
    logits, target = batch(2)
    valid = target != IGNORE
    weight = torch.tensor([0.5, 2.0])
    value, gradient = grad(make("bce", weight=weight, label_smoothing=smoothing), logits, target)

    def oracle(x, t):
        x, y = (x[:, 1] - x[:, 0])[valid], t[valid].float()
        soft = y * (1 - smoothing) + smoothing / 2
        # pos_weight and the division give the classes the weights 0.5 and 2
        loss = F.binary_cross_entropy_with_logits(x, soft, pos_weight=weight[1] / weight[0], reduction="sum")
        return loss * weight[0] / weight[t[valid]].sum()

    expected, expected_gradient = grad(oracle, logits, target)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(gradient, expected_gradient)


@pytest.mark.parametrize("name", BINARY)
@pytest.mark.parametrize("k", [1, 3])
def test_binary_losses_refuse_other_class_counts(name, k):
    logits, target = batch(k)
    with pytest.raises(ValueError, match=rf"2 classes.*got {k}"):
        make(name)(logits, target)


# ---- weights near label boundaries ----


def blocks(k):
    """A batch whose target has areas of one class, and pixels far from any boundary."""
    logits, _ = batch(k, size=(2, 12, 15))
    _, coarse = batch(k, size=(2, 3, 5))
    return logits, coarse.repeat_interleave(4, 1).repeat_interleave(3, 2)


def looped_boundary(target, width):
    """Pixel by pixel: valid, and another valid class no further than `width` rows and columns away."""
    (n, h, w), found = target.shape, torch.zeros(target.shape, dtype=torch.bool)
    for i in range(n):
        for y in range(h):
            for x in range(w):
                around = target[i, max(0, y - width) : y + width + 1, max(0, x - width) : x + width + 1]
                others = (around != IGNORE) & (around != target[i, y, x])
                found[i, y, x] = target[i, y, x] != IGNORE and bool(others.any())
    return found


@pytest.mark.parametrize("width", [1, 2, 5, 20])
def test_boundary_map_equals_a_loop(width):
    _, target = blocks(3)
    target[1, 3:] = 0
    found = losses.boundary_map(target, IGNORE, width)
    assert torch.equal(found, looped_boundary(target, width))
    assert 0 < found.sum() < found.numel()


def test_boundary_map_of_one_edge_and_of_ignored_pixels():
    target = torch.zeros(1, 4, 10, dtype=torch.int64)
    assert not losses.boundary_map(target, IGNORE, 3).any()  # the image's border is none
    target[..., 4:6] = IGNORE
    assert not losses.boundary_map(target, IGNORE, 3).any()
    target[..., 6:] = 2
    facing = [x in (3, 6) for x in range(10)]  # three pixels apart, over the ignored ones
    assert losses.boundary_map(target, IGNORE, 3)[0].tolist() == [facing] * 4
    target[..., 4:6] = 2
    assert losses.boundary_map(target, IGNORE, 3)[0, 0].tolist() == [False] + [True] * 6 + [False] * 3


@pytest.mark.parametrize("weight", [None, [0.5, 2.0, 0.3, 1.0]])
def test_boundary_weights_multiply_loss_and_count(weight):
    logits, target = batch(4, size=(2, 9, 7), ignored=0.3)
    target[0] = target[0].where(target[0] == IGNORE, 0)  # no boundary in the first image
    weight = None if weight is None else torch.tensor(weight)
    pixel = 1 + 4 * looped_boundary(target, 1)
    assert set(pixel[target != IGNORE].tolist()) == {1, 5}

    def oracle(x, t):
        valid = t != IGNORE
        per_pixel = F.cross_entropy(x, t, weight, ignore_index=IGNORE, reduction="none")[valid] * pixel[valid]
        return per_pixel.sum() / (pixel[valid] * (1 if weight is None else weight[t[valid]])).sum()

    value, gradient = grad(make("ce", weight=weight, **BOUNDARY), logits, target)
    expected, expected_gradient = grad(oracle, logits, target)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(gradient, expected_gradient)


@pytest.mark.parametrize("name", [name for name in LOSSES if "boundary_weight" in LOSSES[name][1]])
def test_boundary_weights_keep_what_every_loss_must(name):
    logits, target = blocks(classes_for(name))
    loss = make(name, **BOUNDARY)
    assert torch.equal(make(name, boundary_weight=0.0, boundary_width=1)(logits, target), make(name)(logits, target))
    value, gradient = grad(loss, logits, target)
    assert value != make(name)(logits, target)
    assert (gradient[(target == IGNORE).unsqueeze(1).expand_as(logits)] == 0).all()
    padded = F.pad(logits, (0, 3, 0, 2), value=1.0), F.pad(target, (0, 3, 0, 2), value=IGNORE)
    torch.testing.assert_close(loss(*padded), value)
    nothing, no_gradient = grad(loss, logits.half(), torch.full_like(target, IGNORE))
    assert nothing == 0
    assert nothing.dtype == torch.float32
    assert (no_gradient == 0).all()


@pytest.mark.parametrize("boundary", [{"boundary_weight": -1.0, "boundary_width": 1}, {"boundary_weight": 1.0}])
def test_senseless_boundary_weights_are_refused(boundary):
    with pytest.raises(ValueError, match="boundary_width 1 pixel or more"):
        make("ce", **boundary)


# ---- focal loss ----


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0, 5.0])
def test_focal_equals_torchvisions_for_two_classes(gamma):
    """torchvision's is the sigmoid form, and the softmax of two logits is the sigmoid of their difference."""
    from torchvision.ops import sigmoid_focal_loss

    logits, target = batch(2)

    def oracle(x, t):
        x, t = (x[:, 1] - x[:, 0])[t != IGNORE], t[t != IGNORE]
        return sigmoid_focal_loss(x, t.float(), alpha=-1, gamma=gamma, reduction="mean")

    value, gradient = grad(make("focal", focal_gamma=gamma), logits, target)
    expected, expected_gradient = grad(oracle, logits, target)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(gradient, expected_gradient)


@pytest.mark.parametrize("weight", [None, [0.5, 2.0, 0.3, 1.0]])
def test_focal_equals_a_loop_and_gamma_0_is_cross_entropy(weight):
    logits, target = batch(4)
    weight = None if weight is None else torch.tensor(weight)
    total = count = 0.0
    for n, i, j in (target != IGNORE).nonzero().tolist():
        p = logits[n, :, i, j].double().softmax(0)[target[n, i, j]].item()
        w = 1.0 if weight is None else weight[target[n, i, j]].item()
        total, count = total - w * (1 - p) ** 1.5 * math.log(p), count + w
    assert make("focal", focal_gamma=1.5, weight=weight)(logits, target).item() == pytest.approx(
        total / count, rel=1e-5
    )
    for options in ({"weight": weight}, {"weight": weight, **BOUNDARY}):
        value, gradient = grad(make("focal", focal_gamma=0.0, **options), logits, target)
        expected, expected_gradient = grad(make("ce", **options), logits, target)
        torch.testing.assert_close(value, expected)
        torch.testing.assert_close(gradient, expected_gradient)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
def test_focal_is_finite_where_p_rounds_to_0_or_1(gamma):
    """(1 - p)^gamma has an infinite slope at p = 1 for gamma < 1; times a loss of 0 that would be NaN."""
    logits = torch.tensor([[300.0, -300.0], [-300.0, 300.0]]).view(1, 2, 1, 2)
    value, gradient = grad(make("focal", focal_gamma=gamma), logits, torch.tensor([[[0, 0]]]))
    assert value.item() == pytest.approx(600 / 2)
    assert gradient[0, :, 0, 0].tolist() == [0, 0]
    assert gradient[0, :, 0, 1].tolist() == pytest.approx([-0.5, 0.5])


def test_focal_refuses_a_negative_gamma():
    with pytest.raises(ValueError, match="gamma >= 0"):
        make("focal", focal_gamma=-1.0)(*batch(3))


# ---- OHEM against a loop ----


@pytest.mark.parametrize("thresh", [0.05, 0.3, 0.7, 1.0])
@pytest.mark.parametrize("min_kept", [0, 1, 9, 40, 10_000])
@pytest.mark.parametrize(("smoothing", "weight"), [(0.0, None), (0.3, None), (0.1, [0.5, 2.0, 0.3, 1.0])])
def test_ohem_equals_a_loop(thresh, min_kept, smoothing, weight):
    logits, target = batch(4)
    logits[1] = logits[0].clone()  # a pair of equal pixels, so that there are ties
    target[1] = target[0].clone()
    weight = None if weight is None else torch.tensor(weight)
    probs = logits.softmax(1)
    pixels = []  # (p of the true class, loss, weight)
    for n, i, j in (target != IGNORE).nonzero().tolist():
        t, log_p = target[n, i, j], logits[n, :, i, j].log_softmax(0)
        w = torch.ones(4) if weight is None else weight
        loss = -(1 - smoothing) * w[t] * log_p[t] - smoothing / 4 * (w * log_p).sum()
        pixels.append((probs[n, t, i, j].item(), loss.item(), w[t].item()))
    kept = [pixel for pixel in pixels if pixel[0] < thresh]
    if len(kept) < min_kept:
        cut = sorted(p for p, _, _ in pixels)[:min_kept][-1]
        kept = [pixel for pixel in pixels if pixel[0] <= cut * (1 + 1e-6)]
    expected = sum(loss for _, loss, _ in kept) / sum(w for _, _, w in kept) if kept else 0.0

    options = {"weight": weight, "label_smoothing": smoothing}
    loss = make_loss("ohem", ignore_index=IGNORE, ohem_thresh=thresh, ohem_min_kept=min_kept, **options)
    value, gradient = grad(loss, logits, target)
    assert value.item() == pytest.approx(expected, rel=1e-5)
    assert (gradient.abs().sum(1) > 0).sum() == len(kept)


def test_ohem_ranks_pixels_whose_probability_underflows():
    """p is 0 in float32 at the first two pixels; the second is the worse one. None is hard at this thresh."""
    logits = torch.zeros(1, 2, 1, 3)
    logits[0, 0, 0] = torch.tensor([200.0, 300.0, -5.0])
    value = losses.ohem_cross_entropy(logits, torch.ones(1, 1, 3, dtype=torch.int64), thresh=1e-300, min_kept=1)
    assert value.item() == pytest.approx(300)


def test_ohem_ranks_by_probability_whatever_the_weights():
    """A boundary weight changes the mean of the kept pixels, not which are kept."""
    logits, target = blocks(4)
    _, plain = grad(make("ohem"), logits, target)
    value, gradient = grad(make("ohem", **BOUNDARY), logits, target)
    kept = plain.abs().sum(1) > 0
    assert torch.equal(gradient.abs().sum(1) > 0, kept)
    weights = 1 + 4 * looped_boundary(target, 1)[kept]
    loss = F.cross_entropy(logits, target, ignore_index=IGNORE, reduction="none")[kept]
    torch.testing.assert_close(value, (loss * weights).sum() / weights.sum())


@pytest.mark.parametrize(("thresh", "min_kept"), [(0.0, 1), (1.1, 1), (0.5, -1)])
def test_ohem_refuses_senseless_settings(thresh, min_kept):
    with pytest.raises(ValueError, match="thresh"):
        losses.ohem_cross_entropy(*batch(3), thresh=thresh, min_kept=min_kept)


# ---- Dice and Lovasz from their definitions ----


def test_dice_equals_a_loop():
    logits, target = batch(5)
    target[target == 3] = 0  # class 3 is absent
    probs = logits.double().softmax(1).numpy()
    scores = []
    for k in (0, 1, 2, 4):
        overlap = size = 0.0
        for (n, i, j), t in np.ndenumerate(target.numpy()):
            if t != IGNORE:
                overlap += probs[n, k, i, j] * (t == k)
                size += probs[n, k, i, j] + (t == k)
        scores.append(2 * overlap / size)
    assert make("dice")(logits, target).item() == pytest.approx(1 - np.mean(scores), rel=1e-5)


@pytest.mark.parametrize(("alpha", "beta"), [(0.3, 0.7), (0.0, 1.0), (1.0, 1.0), (2.0, 0.5)])
def test_tversky_equals_a_loop(alpha, beta):
    logits, target = batch(5)
    target[target == 3] = 0  # class 3 is absent
    probs = logits.double().softmax(1).numpy()
    scores = []
    for k in (0, 1, 2, 4):
        tp = fp = fn = 0.0
        for (n, i, j), t in np.ndenumerate(target.numpy()):
            if t == k:
                tp, fn = tp + probs[n, k, i, j], fn + 1 - probs[n, k, i, j]
            elif t != IGNORE:
                fp += probs[n, k, i, j]
        scores.append(tp / (tp + alpha * fp + beta * fn))
    loss = make("tversky", tversky_alpha=alpha, tversky_beta=beta)
    assert loss(logits, target).item() == pytest.approx(1 - np.mean(scores), rel=1e-5)


def test_tversky_with_two_halves_is_dice():
    logits, target = batch(4)
    value, gradient = grad(make("tversky", tversky_alpha=0.5, tversky_beta=0.5), logits, target)
    expected, expected_gradient = grad(make("dice"), logits, target)
    assert torch.equal(value, expected)
    assert torch.equal(gradient, expected_gradient)


@pytest.mark.parametrize(("alpha", "beta"), [(-0.1, 0.5), (0.5, 0.0)])
def test_tversky_refuses_senseless_settings(alpha, beta):
    with pytest.raises(ValueError, match="beta > 0"):
        make("tversky", tversky_alpha=alpha, tversky_beta=beta)(*batch(3))


def lovasz_extension(set_function, errors):
    """Sum over errors in falling order of error * (gain of adding that element to the set): Berman et al. 2018."""
    total, chosen, before = 0.0, set(), 0.0
    for i in np.argsort(-errors, kind="stable").tolist():
        chosen.add(i)
        after = set_function(chosen)
        total, before = total + errors[i] * (after - before), after
    return total


def test_lovasz_equals_its_definition():
    logits, target = batch(4)
    target[target == 2] = 0  # class 2 is absent
    valid = (target != IGNORE).numpy()
    probs, labels = logits.double().softmax(1).movedim(1, -1).numpy()[valid], target.numpy()[valid]  # (P, K), (P,)
    terms = []
    for k in (0, 1, 3):
        truth = set(np.flatnonzero(labels == k).tolist())

        def jaccard_loss(wrong, truth=truth):
            # The prediction differs from the truth in the set of wrong pixels.
            predicted = truth ^ wrong
            return 1 - len(truth & predicted) / len(truth | predicted)

        terms.append(lovasz_extension(jaccard_loss, np.abs((labels == k) - probs[:, k])))
    assert make("lovasz")(logits, target).item() == pytest.approx(np.mean(terms), rel=1e-5)


def test_hard_predictions_give_one_minus_iou_and_one_minus_f1():
    metrics = pytest.importorskip("sklearn.metrics")
    _, target = batch(4)
    _, guess = batch(4, ignored=0, seed=1)
    logits = 1000.0 * F.one_hot(guess, 4).movedim(-1, 1)
    valid = target != IGNORE
    flat = {"y_true": target[valid].numpy(), "y_pred": guess[valid].numpy(), "average": "macro"}
    assert set(flat["y_true"]) == set(range(4))
    assert make("lovasz")(logits, target).item() == pytest.approx(1 - metrics.jaccard_score(**flat), rel=1e-5)
    assert make("dice")(logits, target).item() == pytest.approx(1 - metrics.f1_score(**flat), rel=1e-5)
    for alpha, beta, score in (
        (1.0, 1.0, metrics.jaccard_score(**flat)),
        (0.2, 0.8, metrics.fbeta_score(**flat, beta=2)),  # F_b: alpha 1 / (1 + b^2), beta b^2 / (1 + b^2)
    ):
        tversky = make("tversky", tversky_alpha=alpha, tversky_beta=beta)
        assert tversky(logits, target).item() == pytest.approx(1 - score, rel=1e-5)


def test_lovasz_weights_keep_their_digits_on_large_maps():
    """Late pixels of a million: a difference of float32 Jaccard values would be off by several percent."""
    errors = torch.rand(1_000_000, generator=torch.Generator().manual_seed(0))
    foreground = torch.arange(1_000_000) % 2 == 0
    single = losses._lovasz_weights(errors, foreground)
    double = losses._lovasz_weights(errors.double(), foreground)
    torch.testing.assert_close(single.double(), double, rtol=1e-5, atol=0)
    assert single.double().sum().item() == pytest.approx(1, rel=1e-6)  # J climbs from 0 to 1


# ---- what every loss must keep ----


@every_loss
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_all_ignored_gives_zero_and_zero_gradient(name, dtype):
    logits, target = batch(classes_for(name), dtype=dtype)
    value, gradient = grad(make(name), logits, torch.full_like(target, IGNORE))
    assert value == 0
    assert value.dtype == torch.float32
    assert (gradient == 0).all()


@every_loss
def test_ignored_pixels_count_for_nothing(name):
    logits, target = batch(classes_for(name))
    ignored = (target == IGNORE).unsqueeze(1).expand_as(logits)
    other = torch.where(ignored, 30 * torch.randn(logits.shape, generator=torch.Generator().manual_seed(1)), logits)
    value, gradient = grad(make(name), logits, target)
    other_value, other_gradient = grad(make(name), other, target)
    torch.testing.assert_close(other_value, value)
    torch.testing.assert_close(other_gradient, gradient)
    assert (gradient[ignored] == 0).all()
    assert (other_gradient[ignored] == 0).all()
    assert (gradient[~ignored] != 0).any()


@every_loss
def test_ignore_index_may_be_a_class(name):
    logits, target = batch(classes_for(name))
    expected, expected_gradient = grad(make(name), logits, target.where(target != 0, IGNORE))
    loss = make_loss(name, ignore_index=0, **SETTINGS)
    value, gradient = grad(loss, logits, target.where(target != IGNORE, 0))
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(gradient, expected_gradient)


@every_loss
def test_padding_with_ignored_pixels_changes_nothing(name):
    logits, target = batch(classes_for(name))
    padded = F.pad(logits, (0, 3, 0, 2), value=1.0), F.pad(target, (0, 3, 0, 2), value=IGNORE)
    torch.testing.assert_close(make(name)(*padded), make(name)(logits, target))


@every_loss
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_do_not_overflow(name, dtype):
    logits, target = batch(classes_for(name), size=(1, 512, 512), scale=1e4, dtype=dtype)
    logits = logits.clamp(-6e4, 6e4)
    value, gradient = grad(make(name), logits, target)
    assert value.dtype == torch.float32
    assert value.isfinite()
    assert gradient.dtype == dtype
    assert gradient.isfinite().all()
    torch.testing.assert_close(value, make(name)(logits.float(), target))


@every_loss
def test_autocast_changes_nothing(name):
    logits, target = batch(classes_for(name))
    expected, expected_gradient = grad(make(name), logits, target)
    with torch.autocast("cpu", torch.bfloat16):
        value, gradient = grad(make(name), logits, target)
    assert value.dtype == torch.float32
    assert torch.equal(value, expected)
    assert torch.equal(gradient, expected_gradient)


def test_autocast_is_off_inside():
    with torch.autocast("cpu", torch.bfloat16):
        product = losses._in_float32(lambda x, t: x.flatten() @ x.flatten())(*batch(3))
    assert product.dtype == torch.float32


@every_loss
def test_gradient_by_finite_differences(name):
    """In double, which is not lowered to float32. OHEM and Lovasz are smooth where no two pixels tie."""
    logits, target = batch(classes_for(name), size=(1, 3, 4), dtype=torch.float64)
    options = {"weight": torch.rand(classes_for(name)), "label_smoothing": 0.1, "boundary_weight": 3.0}
    options = {option: value for option, value in options.items() if option in LOSSES[name][1]}
    loss = make(name, ohem_thresh=0.3, ohem_min_kept=5, boundary_width=1, **options)
    assert loss(logits, target).dtype == torch.float64
    assert torch.autograd.gradcheck(lambda x: loss(x, target), logits.requires_grad_())


@every_loss
def test_gradient_descent_lowers_the_loss(name):
    logits, target = batch(classes_for(name), scale=0.5)
    logits.requires_grad_()
    optimizer = torch.optim.SGD([logits], lr=20.0)
    values = []
    for _ in range(30):
        loss = make(name)(logits, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        values.append(loss.item())
    assert values[-1] < 0.6 * values[0]


@every_loss
def test_perfect_prediction_costs_nothing(name):
    _, target = batch(classes_for(name))
    logits = 100.0 * F.one_hot(target.where(target != IGNORE, 0), classes_for(name)).movedim(-1, 1)
    assert make(name)(logits, target).item() == pytest.approx(0, abs=1e-6)


@every_loss
def test_shape_mismatch_is_named(name):
    logits, target = batch(classes_for(name))
    with pytest.raises(ValueError, match=r"\(N, K, H, W\)"):
        make(name)(logits, target[:, :1])  # would broadcast


# ---- the table ----


def test_unknown_name_lists_the_names():
    with pytest.raises(ValueError, match="unknown loss 'focall'") as error:
        make("focall")
    assert all(name in str(error.value) for name in LOSSES)


@pytest.mark.parametrize("missing", SETTINGS)
def test_a_loss_needs_its_settings_and_no_others(missing):
    settings = {name: value for name, value in SETTINGS.items() if name != missing}
    with pytest.raises(ValueError, match=f"needs {missing}"):
        make_loss(missing.partition("_")[0], ignore_index=IGNORE, **settings)
    for name in LOSSES.keys() - {missing.partition("_")[0]}:
        make_loss(name, ignore_index=IGNORE, **settings)


@every_loss
@pytest.mark.parametrize("option", ["weight", "label_smoothing", "boundary_weight"])
def test_an_option_has_an_effect_or_is_refused(name, option):
    k = classes_for(name)
    value = torch.tensor([1.0, 3.0, 5.0, 7.0])[:k] if option == "weight" else 0.2
    options = {option: value, "boundary_width": 1}
    if option not in LOSSES[name][1]:
        with pytest.raises(ValueError, match="no use for"):
            make(name, **options)
        return
    logits, target = blocks(k)
    assert make(name, **options)(logits, target) != make(name)(logits, target)


def test_class_weights_are_a_buffer():
    loss = make("ce", weight=torch.ones(4))
    assert [name for name, _ in loss.named_buffers()] == ["weight"]
    assert loss.to("meta").weight.device.type == "meta"
    assert not loss.state_dict()
    assert not list(loss.parameters())


# ---- distillation, of logits ----

TAUGHT = {
    "response": losses.distillation,
    "softened": functools.partial(losses.distillation, temperature=4.0),
    "weighted": functools.partial(losses.distillation, weight=torch.tensor([1.0, 3.0, 0.5, 2.0])),
    "boundary": functools.partial(losses.distillation, boundary_weight=2.0, boundary_width=1),
    "channel": losses.channel_distillation,
    "relation": losses.relation_distillation,
}


def taught(name, teacher):
    return lambda logits, target: TAUGHT[name](logits, target, teacher=teacher)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
def test_distillation_is_torchs_divergence_on_the_valid_pixels(temperature):
    (student, target), (teacher, _) = batch(4), batch(4, seed=1)
    valid = target != IGNORE
    rows = (x.movedim(1, -1)[valid].div(temperature).log_softmax(1) for x in (student, teacher))
    expected = temperature**2 * F.kl_div(*rows, reduction="batchmean", log_target=True)
    found = losses.distillation(student, target, teacher=teacher, temperature=temperature)
    torch.testing.assert_close(found, expected)


def test_classes_weigh_as_in_the_cross_entropy():
    (student, target), (teacher, _) = batch(4), batch(4, seed=1)
    weight, total = torch.tensor([1.0, 3.0, 0.5, 2.0]), 0.0
    for k in range(4):
        only = target.masked_fill(target != k, IGNORE)
        total = total + weight[k] * (target == k).sum() * losses.distillation(student, only, teacher=teacher)
    expected = total / sum(weight[k] * (target == k).sum() for k in range(4))
    torch.testing.assert_close(taught("weighted", teacher)(student, target), expected)


def test_boundaries_weigh_beside_the_rest_not_by_their_number():
    (student, target), (teacher, _) = batch(4, ignored=0.1), batch(4, seed=1)
    target[:, :, :3] = 1  # few pixels off a boundary otherwise
    edge = losses.boundary_map(target, IGNORE, 1)
    parts = [target.masked_fill(off, IGNORE) for off in (edge, ~edge)]
    body, edge = (losses.distillation(student, part, teacher=teacher) for part in parts)
    assert body > 0
    assert edge > 0
    torch.testing.assert_close(taught("boundary", teacher)(student, target), body + 2 * edge)


def test_channel_distillation_is_a_loop_over_images_and_classes():
    (student, target), (teacher, _) = batch(4), batch(4, seed=1)
    maps = []
    for s, t, y in zip(student, teacher, target, strict=True):
        for k in range(4):
            p, q = (x[k][y != IGNORE].div(4).softmax(0) for x in (s, t))
            maps.append(16 * (q * (q / p).log()).sum())
    torch.testing.assert_close(taught("channel", teacher)(student, target), torch.stack(maps).mean())


def test_relation_distillation_is_numpys_correlation():
    (student, target), (teacher, _) = batch(4), batch(4, seed=1)
    between, within = [], []
    for s, t, y in zip(student.softmax(1), teacher.softmax(1), target, strict=True):
        s, t = (x[:, y != IGNORE].numpy() for x in (s, t))  # (K, pixels)
        between += [np.corrcoef(s[:, i], t[:, i])[0, 1] for i in range(s.shape[1])]
        within += [np.corrcoef(s[k], t[k])[0, 1] for k in range(4)]
    expected = 2 - np.mean(between) - np.mean(within)
    assert taught("relation", teacher)(student, target).item() == pytest.approx(expected, abs=1e-5)


def test_a_class_without_contrast_in_the_teacher_counts_nowhere():
    (student, target), (teacher, _) = batch(4), batch(4, seed=1)
    teacher[:, 2] = -math.inf  # a probability of 0 everywhere
    teacher = teacher.clamp(min=-1e4)
    value, gradient = grad(taught("relation", teacher), student, target)
    assert 0 < value < 4
    assert gradient.isfinite().all()


@pytest.mark.parametrize("name", TAUGHT)
def test_distillation_of_a_perfect_student_and_of_nothing_is_zero(name):
    student, target = batch(4)
    value, gradient = grad(taught(name, student), student, target)
    assert value == pytest.approx(0, abs=1e-5)
    assert gradient.abs().max() < 1e-6
    teacher = batch(4, seed=1)[0]
    value, gradient = grad(taught(name, teacher), student, torch.full_like(target, IGNORE))
    assert value == 0
    assert (gradient == 0).all()
    target[0] = IGNORE  # one image of several
    value, gradient = grad(taught(name, teacher), student, target)
    assert value > 0
    assert gradient.isfinite().all()
    assert (gradient[0] == 0).all()


@pytest.mark.parametrize("name", TAUGHT)
def test_distillation_does_not_depend_on_batch_size_or_ignored_pixels(name):
    (student, target), (teacher, _) = batch(4), batch(4, seed=1)
    value = taught(name, teacher)(student, target)
    student2, target2, teacher2 = (torch.cat([x, x]) for x in (student, target, teacher))
    torch.testing.assert_close(taught(name, teacher2)(student2, target2), value)
    moved = student + 9 * (target == IGNORE).unsqueeze(1) * torch.arange(4).view(4, 1, 1)
    torch.testing.assert_close(taught(name, teacher)(moved, target), value)


@pytest.mark.parametrize("name", TAUGHT)
def test_distillation_in_half_precision_is_finite_and_the_teacher_gets_no_gradient(name):
    (student, target), (teacher, _) = batch(4, scale=300.0, dtype=torch.bfloat16), batch(4, scale=300.0, seed=1)
    teacher.requires_grad_()
    value, gradient = grad(taught(name, teacher), student, target)
    assert value.dtype == torch.float32
    assert value.isfinite()
    assert gradient.isfinite().all()
    assert teacher.grad is None


@pytest.mark.parametrize("name", TAUGHT)
def test_distillation_wants_logits_of_one_shape(name):
    with pytest.raises(ValueError, match=r"teacher's logits are \(2, 5, 7, 5\)"):
        taught(name, batch(5)[0])(*batch(4))


# ---- distillation, of features ----


def features(*shape, seed=0, scale=1.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tokens_loss(student, teacher, valid):
    """Layer projection of maps (N, C, h, w), as tokens of one layer and of a teacher of one."""
    student, teacher = (x.flatten(2).mT[None] for x in (student, teacher))
    return losses.projection_distillation(student, teacher, valid.flatten(1))[0]


OF_FEATURES = {
    "cosine": losses.cosine_distillation,
    "generation": losses.generation_distillation,
    "projection": tokens_loss,
}


@pytest.mark.parametrize("name", OF_FEATURES)
def test_distillation_of_features_is_that_of_the_valid_places_alone(name):
    loss = OF_FEATURES[name]
    student, teacher = features(2, 6, 3, 4), features(2, 6, 3, 4, seed=1)
    valid = features(2, 3, 4, seed=2) > -0.5
    value = loss(student, teacher, valid)
    apart = [x.movedim(1, -1)[valid].mT[None, :, :, None] for x in (student, teacher)]  # (1, C, places, 1)
    torch.testing.assert_close(value, loss(*apart, torch.ones(1, apart[0].shape[2], 1, dtype=torch.bool)))
    twice = [torch.cat([x, x]) for x in (student, teacher, valid)]
    torch.testing.assert_close(loss(*twice), value)
    student.requires_grad_()
    teacher.requires_grad_()
    nothing = loss(student, teacher, torch.zeros_like(valid))
    nothing.backward()
    assert nothing == 0
    assert (student.grad == 0).all()
    assert teacher.grad is None
    coarse = loss(features(2, 6, 3, 4, scale=300.0).bfloat16(), teacher, valid)
    assert coarse.dtype == torch.float32
    assert coarse.isfinite()


def test_cosine_distillation_counts_directions_alone():
    teacher, all_ = features(2, 6, 3, 4), torch.ones(2, 3, 4, dtype=torch.bool)
    assert losses.cosine_distillation(3 * teacher, teacher, all_) == pytest.approx(0, abs=1e-6)
    assert losses.cosine_distillation(-teacher, teacher, all_) == pytest.approx(2)


def test_generation_distillation_by_hand():
    teacher = torch.tensor([1.0, 3.0]).view(1, 2, 1, 1)  # normalised: -1, 1
    student = torch.tensor([-1.0, 4.0]).view(1, 2, 1, 1)
    found = losses.generation_distillation(student, teacher, torch.ones(1, 1, 1, dtype=torch.bool))
    assert found.item() == pytest.approx((0**2 + 3**2) / 2, abs=1e-3)


def test_layer_projection_is_a_loop_over_tokens():
    student, teacher, valid = features(2, 3, 5, 8), features(4, 3, 5, 8, seed=1), features(3, 5, seed=2) > -0.5
    errors, followed = [], torch.zeros(2, 4)
    for s, n, t in itertools.product(range(2), range(3), range(5)):
        if not valid[n, t]:
            continue
        query, *keys = (F.layer_norm(x[n, t], (8,)) for x in (student[s], *teacher))
        attention = torch.stack([query @ key / 8**0.5 for key in keys]).softmax(0)
        mix = sum(a * key for a, key in zip(attention, keys, strict=True))
        errors.append(((query - mix) ** 2).mean())
        followed[s] += attention / valid.sum()
    loss, attention = losses.projection_distillation(student, teacher, valid)
    torch.testing.assert_close(loss, torch.stack(errors).mean())
    torch.testing.assert_close(attention, followed)


def test_a_layer_that_is_one_of_the_teachers_follows_it_and_costs_nothing():
    teacher, valid = features(3, 2, 5, 400), torch.ones(2, 5, dtype=torch.bool)  # 400 channels: next to one-hot
    loss, attention = losses.projection_distillation(teacher[1:2], teacher, valid)
    assert loss < 1e-6
    assert attention[0].argmax() == 1


@pytest.mark.parametrize("covers", [(8, 12), (9, 15)])
def test_places_are_the_cells_with_a_labelled_pixel(covers):
    target = torch.full((1, 8, 12), IGNORE)
    target[0, 3, 5] = 1
    size = (covers[0] // 2, covers[1] // 3)
    found = losses.places(target, size, covers)
    rows, columns = 2 * torch.arange(size[0]), 3 * torch.arange(size[1])
    for i, j in itertools.product(range(size[0]), range(size[1])):
        inside = rows[i] <= 3 < covers[0] * (i + 1) / size[0] and columns[j] <= 5 < covers[1] * (j + 1) / size[1]
        assert not inside or found[0, i, j]
    assert 1 <= found.sum() <= 2  # cells of 9 / 4 pixels share one


@pytest.mark.parametrize(("covers", "covers_too"), [((24, 32), (24, 32)), ((24, 32), (28, 28)), ((32, 32), (28, 42))])
def test_maps_of_another_stride_or_padding_are_sampled_at_the_same_pixels(covers, covers_too):
    """A map whose value is the row, or the column, of its cell's middle in pixels: so must be its samples."""

    def ramp(shape, covers):
        rows, columns = ((torch.arange(n) + 0.5) * c / n for n, c in zip(shape, covers, strict=True))
        return torch.stack(torch.meshgrid(rows, columns, indexing="ij"))[None]

    own, size = tuple(n // 4 for n in covers), tuple(n // 7 for n in covers_too)
    found, expected = losses.on_grid(ramp(own, covers), covers, size, covers_too), ramp(size, covers_too)
    inside = ((expected > 2) & (expected < torch.tensor(covers).view(1, 2, 1, 1) - 2)).all(1, keepdim=True)
    assert inside.any()
    torch.testing.assert_close(found.where(inside, 0), expected.where(inside, 0))


@pytest.mark.parametrize(
    ("size", "covers"), [((6, 8), (24, 32)), ((3, 4), (28, 28)), ((2, 3), (32, 42)), ((23, 30), (23, 30))]
)
def test_labels_on_a_grid_are_those_of_the_pixels_in_the_middle_of_its_cells(size, covers):
    target = torch.arange(2 * 23 * 30).view(2, 23, 30)
    found = losses.labels_on_grid(target, size, covers, ignore_index=-1)
    for i, j in itertools.product(range(size[0]), range(size[1])):
        row, column = int((i + 0.5) * covers[0] / size[0]), int((j + 0.5) * covers[1] / size[1])
        inside = row < 23 and column < 30
        assert found[:, i, j].tolist() == ([target[n, row, column] for n in (0, 1)] if inside else [-1, -1])


# ---- several processes ----


def shares():
    """The batch, and the images of each of two ranks: rank 0 has about 45 valid pixels, rank 1 has two."""
    logits, target = batch(4, size=(4, 5, 5), ignored=0.1, dtype=torch.float64)
    target[2:] = IGNORE
    target[2, 0, :2] = torch.tensor([3, 1])
    return logits, target, (slice(0, 2), slice(2, 4))


GLOBAL = {  # losses of the pixels of all ranks
    "plain": ("ce", {}),
    "weighted": ("ce", {"weight": torch.tensor([0.5, 2.0, 0.3, 1.0])}),
    "boundary": ("ce", BOUNDARY),
    "focal": ("focal", {}),
    "ohem": ("ohem", {}),
    "ohem of few": ("ohem", {"ohem_thresh": 0.01, "ohem_min_kept": 7}),
    "dice": ("dice", {}),
    "tversky": ("tversky", {}),
    "both": ("ce-dice", {}),
}


def teacher(logits):
    return 0.5 * logits.flip(1)


def rank_main(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=2)
    try:
        logits, target, images = shares()
        logits, target = logits[images[rank]], target[images[rank]]
        result = {}
        for key, (name, options) in GLOBAL.items():
            result[key] = grad(make(name, **options), logits, target)
        result["taught"] = grad(taught("response", teacher(logits)), logits, target)
        # Every pixel of every rank is ignored: the global count is 0.
        result["empty"] = grad(make("ce"), logits, torch.full_like(target, IGNORE))
        if rank == 0:  # One rank alone, as in evaluation: it must not wait for the other.
            with torch.no_grad():
                result["alone"] = make("ce")(logits, target)
        torch.save(result, os.path.join(folder, f"{rank}.pt"))
    finally:
        dist.destroy_process_group()


def test_two_processes_average_to_the_single_process_loss(tmp_path):
    torch.multiprocessing.spawn(rank_main, args=(str(tmp_path),), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    logits, target, images = shares()
    whole = {key: make(name, **options) for key, (name, options) in GLOBAL.items()}
    for key, loss in (whole | {"taught": taught("response", teacher(logits))}).items():
        value, gradient = grad(loss, logits, target)
        torch.testing.assert_close((ranks[0][key][0] + ranks[1][key][0]) / 2, value)
        # DDP divides the sum of the gradients by 2; each rank saw its own images only.
        torch.testing.assert_close(torch.cat([ranks[0][key][1], ranks[1][key][1]]) / 2, gradient)
    for rank in range(2):
        value, gradient = ranks[rank]["empty"]
        assert value == 0
        assert (gradient == 0).all()
    torch.testing.assert_close(ranks[0]["alone"], make("ce")(logits[images[0]], target[images[0]]))


# ---- in training ----


@every_loss
def test_every_loss_supervises_the_auxiliary_head(name):
    import models
    import train

    images, (_, target) = torch.randn(2, 3, 28, 28), batch(classes_for(name), size=(2, 28, 28))
    torch.manual_seed(0)
    model = models.build_model(num_classes=classes_for(name), backbone="dinov2-tiny", head="fpn", aux=True).eval()
    loss = make(name, **BOUNDARY if "boundary_weight" in LOSSES[name][1] else {})
    first, aux = (model.resize(x, (28, 28)) for x in model.predictions(model.encode(images)))
    value = train.Objective(model, loss, 0.4)(images, target)
    torch.testing.assert_close(value, loss(first, target) + 0.4 * loss(aux, target))
    value.backward()
    assert all(p.grad.abs().sum() > 0 for p in (*model.head.parameters(), *model.aux_head.parameters()))


RECIPE = (
    "--optimizer adamw --schedule poly --power 1.0 --class-weights effective --loss ohem --aux --aux-weight 0.4 "
    "--scale 0.5 2"
)


@pytest.fixture
def describe(monkeypatch, tmp_path):
    """Flags -> what train.py makes of them, seen where it would begin to train."""
    import datasets
    import train

    row = dataclasses.replace(datasets.DATASETS["synthetic"], lengths={"train": 8, "val": 2, "test": 2})
    monkeypatch.setitem(datasets.DATASETS, "synthetic", row)
    monkeypatch.setattr(train, "time_steps", lambda *parts: parts)
    monkeypatch.setattr(train.evaluate, "plot_class_distribution", lambda *parts: None)

    def describe(flags):
        small = "--backbone dinov2-tiny --size 28 42 --crop 28 28 --amp off --warmup 0 --epochs 2 --time-steps 1"
        args, objective, train_set, _ = train.main([*small.split(), *flags.split(), "--out", str(tmp_path)])
        optimizer, schedule = train.optimizer_and_schedule(args, objective, train.total_steps(args, train_set))
        model = objective.model
        return {
            "optimizer": type(optimizer),
            "schedule": schedule(1),  # halfway
            "loss": objective.loss.function,
            "weights": objective.loss.weight is not None,
            "outputs": len(model.predictions(model.encode(torch.zeros(2, 3, 28, 28)))),
            "aux_weight": objective.aux_weight,
            "scale": tuple(train_set.transform.transforms[0].scale),
        }

    return describe


def test_each_trick_of_the_recipe_can_be_turned_off_alone(describe):
    recipe = describe(RECIPE)
    assert recipe == {
        "optimizer": torch.optim.AdamW,
        "schedule": 0.5,
        "loss": losses.ohem_cross_entropy,
        "weights": True,
        "outputs": 2,
        "aux_weight": 0.4,
        "scale": (0.5, 2.0),
    }
    for off, what, value in (
        ("--optimizer sgd", "optimizer", torch.optim.SGD),
        ("--power 0.9", "schedule", pytest.approx(0.5**0.9)),
        ("--loss ce", "loss", losses.cross_entropy),
        ("--class-weights none", "weights", False),
        ("--no-aux", "outputs", 1),
        ("--scale 1 1", "scale", (1.0, 1.0)),
    ):
        assert describe(f"{RECIPE} {off}") == recipe | {what: value}, off


@pytest.mark.parametrize(
    ("flags", "name", "options"),
    [
        ("--loss focal --focal-gamma 1.5", "focal", {"focal_gamma": 1.5}),
        (
            "--loss tversky --tversky-alpha 0.2 --tversky-beta 0.9",
            "tversky",
            {"tversky_alpha": 0.2, "tversky_beta": 0.9},
        ),
        ("--loss ce --boundary-weight 4 --boundary-width 1", "ce", BOUNDARY),
        ("--loss ohem --ohem-thresh 0.01 --ohem-kept 7", "ohem", {"ohem_thresh": 0.01, "ohem_min_kept": 7}),
    ],
)
def test_flags_reach_the_loss(flags, name, options, tmp_path, monkeypatch):
    import datasets
    import models
    import train

    monkeypatch.setattr(train.evaluate, "plot_class_distribution", lambda *parts: None)
    args = train.get_parser().parse_args(flags.split())
    train_set = datasets.open_dataset("synthetic", "train", size=(28, 42), length=2)
    model = models.build_model(num_classes=19, backbone="dinov2-tiny", head="linear")
    logits, target = blocks(19)
    expected = make(name, **options)(logits, target)
    assert torch.equal(train.make_loss(args, model, train_set, tmp_path)(logits, target), expected)
    assert expected != make(name)(logits, target)


# ---- CUDA ----


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@every_loss
def test_cuda_is_deterministic_and_equals_cpu(name):
    logits, target = batch(classes_for(name), size=(2, 64, 64))
    expected, expected_gradient = grad(make(name), logits, target)
    torch.use_deterministic_algorithms(True)
    try:
        value, gradient = grad(make(name).cuda(), logits.cuda(), target.cuda())
    finally:
        torch.use_deterministic_algorithms(False)
    torch.testing.assert_close(value.cpu(), expected)
    torch.testing.assert_close(gradient.cpu(), expected_gradient)
