"""How networks are quantized: observers against brute force, what the command leaves, what each helper is for."""

import copy
import csv
import itertools
import json
import math
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import count_refused, made_up
from test_int8 import images, make, prepared
from torch import nn
from torch.overrides import TorchFunctionMode

import datasets
import evaluate
import int8
import models
import quantize
from int8 import choose_qparams, dequantize, fake_quantize, quant_layers
from models import ModelError, build_model, load_checkpoint, read_checkpoint, save_checkpoint
from quantize import Observer

INFO = datasets.open_dataset("synthetic", "val", length=1, size=(40, 56)).info
FIVE = INFO.to_dict() | {"classes": list("abcde"), "palette": [[0, 0, 0]] * 5}  # the same of five classes

# ---- observers ------------------------------------------------------------------------------------------------------


def observe(method, *batches):
    observer = Observer(method)
    for number in range(observer.passes):
        if number:
            observer.second_pass()
        for batch in batches:
            observer.see(batch)
    return observer.range()


def test_minmax_and_average_by_hand():
    batches = torch.tensor([-1.0, 2.0]), torch.tensor([-3.0, 4.0])
    assert observe("minmax", *batches) == (-3.0, 4.0)
    assert observe("average", *batches) == (-2.0, 3.0)


def test_percentile_is_numpys_to_a_bin():
    x = torch.randn(100_000)
    low, high = observe("percentile", x)
    width = (x.max() - x.min()).item() / quantize.BINS
    assert abs(low - np.quantile(x.numpy(), 1e-4)) <= 2 * width
    assert abs(high - np.quantile(x.numpy(), 1 - 1e-4)) <= 2 * width


@pytest.mark.parametrize("seed", range(3))
def test_mse_range_is_about_the_best_of_all_by_brute_force(seed):
    torch.manual_seed(seed)
    x = torch.randn(20_000) ** 3 if seed else torch.randn(20_000).relu()

    def error(low, high):
        return (fake_quantize(x, *choose_qparams(low, high)) - x).square().mean().item()

    ends = torch.linspace(0.05, 1, 40).tolist()
    best = min(error(x.min() * a, x.max() * b) for a in ends for b in ends)
    low, high = observe("mse", x)
    assert error(low, high) <= 1.1 * best
    assert low == 0 if seed == 0 else low < 0


def test_entropy_cuts_off_what_is_far_out_and_keeps_the_bulk():
    x = torch.cat([torch.randn(100_000).abs(), torch.tensor([50.0])])
    low, high = observe("entropy", x)
    assert low == 0
    assert 2.5 < high < 15


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("method", quantize.OBSERVERS)
def test_observers_refuse_what_is_not_finite(method, wrong):
    with pytest.raises(ModelError, match="not finite"):
        observe(method, torch.tensor([0.0, 1.0]), torch.tensor([wrong, 1.0]))


@pytest.mark.parametrize("method", quantize.OBSERVERS)
def test_observers_of_nothing_and_of_zeros(method):
    with pytest.raises(ModelError, match="saw no values"):
        observe(method)
    low, high = observe(method, torch.zeros(10))
    scale, zero_point = choose_qparams(low, high)
    assert math.isfinite(scale)
    assert dequantize(quantize.quantize(torch.zeros(1), scale, zero_point), scale, zero_point) == 0


# ---- calibration ----------------------------------------------------------------------------------------------------


class Sevens(nn.Module):
    """Two layers, of which the second reads NaN where the image has a 7."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last, self.frozen = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1), []

    def forward(self, x):
        return self.last(F.relu(self.first(x)).masked_fill(x[:, :1] == 7, math.nan))


@pytest.mark.parametrize("observer", quantize.OBSERVERS)
@pytest.mark.parametrize(("value", "layer"), [(7.0, "last"), (math.inf, "first")])
def test_calibration_names_the_layer_and_the_batch_that_is_not_finite(value, layer, observer):
    model, good, bad = Sevens().eval(), images(8, 9), images(8, 9)
    bad[0, 0, 0, 0] = value
    quantize.prepare(model, good)
    with pytest.raises(ModelError, match=rf"not finite: the input of {layer}, batch 2$"):
        quantize.calibrate(model, [good, bad], observer=observer)
    quantize.calibrate(model, [good], observer=observer)  # nothing is left behind
    assert model(good).isfinite().all()


def test_an_addend_that_is_not_finite_is_named():
    model, x = Row(nn.Conv2d(3, 3, 1)), images(8, 9)
    model.other = nn.Conv2d(3, 3, 1)
    model.forward = lambda x: model.layers(x) + model.other(x)
    quantize.prepare(model, x)
    with torch.no_grad():
        model.layers[0].bias[1] = math.nan
    with pytest.raises(ModelError, match=r"not finite: what is added to the output of other, batch 1$"):
        quantize.calibrate(model, [x])


@pytest.mark.parametrize("steps", ["learned", "frozen"])
def test_what_is_prepared_under_inference_mode_can_be_trained_and_converted_anywhere(steps):
    model, x = make(backbone="resnet18", head="fcn"), images(64, 64)
    expected, _ = prepared(model, x)
    quantize.convert(expected)
    with torch.inference_mode():
        quantize.prepare(model, x)
        quantize.calibrate(model, [x])
        converted = copy.deepcopy(model)
        quantize.convert(converted)
        assert torch.equal(converted(x), expected(x))
    with torch.no_grad():
        assert torch.equal(converted(x), expected(x))
        assert torch.equal(copy.deepcopy(converted)(x), expected(x))
    with torch.inference_mode():
        inner = copy.deepcopy(model)
    quantize.calibrate(inner, [2 * x])
    assert inner(x).isfinite().all()
    if steps == "learned":
        quantize.learn_steps(model)
    for point in model.points:
        point.momentum = 0.0 if steps == "learned" else 0.05
    model.train()(images(64, 64, count=2)).square().mean().backward()
    assert all(layer.values.grad.isfinite().all() for layer in quant_layers(model).values())


@torch.no_grad()
def test_helpers_under_inference_mode_do_what_they_do_outside():
    found = []
    for inference in (False, True):
        model, x = make(backbone="resnet18", head="fcn"), images(64, 64)
        with torch.inference_mode(inference):
            done = quantize.prepare(model, x)
            quantize.calibrate(model, [x])
            quantize.correct_bias(model, [x])
            torch.manual_seed(0)
            quantize.adaround(model, [x], steps=3)
            quantize.convert(model)
            ranges = quantize.observe_outputs(model, [x])
            quantize.make_dynamic(model, done.wiring)
        found.append((ranges, model.state_dict(), model(x)))
    assert found[0][0] == found[1][0]
    assert all(torch.equal(found[0][1][key], found[1][1][key]) for key in found[0][1])
    assert torch.equal(found[0][2], found[1][2])


# ---- the command ----------------------------------------------------------------------------------------------------

TINY = ["--size", "40", "56", "--crop", "40", "56", "--batch-size", "2", "--workers", "0", "--calib-images", "3"]


@pytest.fixture
def float_checkpoint(tmp_path, figures_once):
    """A checkpoint of train.py's kind, of a network with norms, a residual and attention, on few drawn scenes."""

    def write(**build):
        torch.manual_seed(0)
        model = build_model(num_classes=len(INFO.classes), **(build or dict(backbone="dinov2-tiny", head="fpn"))).eval()
        path = tmp_path / "float.pt"
        args = {"dataset": "synthetic", "size": [40, 56], "crop": [40, 56], "batch_size": 2, "workers": 0, "loss": "ce"}
        save_checkpoint(
            path, model, data=INFO.to_dict(), pretrained="no", command="train.py", args=args, metrics={"miou": 1.0}
        )
        return path

    return write


@pytest.fixture(autouse=True)
def few_scenes(monkeypatch):
    """Three drawn scenes a split, so that whole epochs fit into a test."""
    real = datasets.open_dataset
    monkeypatch.setattr(datasets, "open_dataset", lambda name, split, **k: real(name, split, **{"length": 4, **k}))


def run(path, out, *flags, dry=True):
    return quantize.main(["--weights", str(path), "--out", str(out), *(["--dry-run"] if dry else []), *TINY, *flags])


@pytest.mark.parametrize("method", ["ptq", "qat", "dynamic", "weight-only"])
def test_each_method_leaves_a_checkpoint_that_computes_what_was_scored(method, float_checkpoint, tmp_path):
    path = float_checkpoint()
    done = run(path, tmp_path / method, "--method", method)
    assert json.loads((tmp_path / method / "results.json").read_text())["miou"] == done["miou"]
    saved = read_checkpoint(tmp_path / method / "best.pt")
    entry = saved["compression"][-1]
    assert (entry["step"], entry["method"], entry["state"]) == ("quantize", method, "int8")
    assert saved["lineage"][-1]["id"] == read_checkpoint(path)["id"]
    quantized = [key for key in saved["state_dict"] if key.endswith("weight_q")]
    assert len(quantized) == len(entry["wiring"])
    assert (0 < sum(entry["macs"].values()) <= entry["total_macs"]) == (method != "weight-only")
    # the small ones share storages, as one of its own costs a tensor 300 bytes in the file
    small = [t for t in saved["state_dict"].values() if t.nbytes < 2**16]
    assert len({t.untyped_storage().data_ptr() for t in small}) == len({t.dtype for t in small})
    assert all(saved["state_dict"][key].dtype == torch.int8 for key in quantized)
    assert not [key for key in saved["state_dict"] if key.endswith("values")]
    model, _ = load_checkpoint(tmp_path / method / "best.pt")
    dataset = datasets.open_dataset("synthetic", "val", size=(40, 56), length=2)
    metrics = evaluate.evaluate(
        model, datasets.eval_loader(dataset), num_classes=len(INFO.classes), ignore_index=INFO.ignore_index,
        device=torch.device("cpu"),
    )  # fmt: skip
    assert metrics["miou"] == pytest.approx(done["miou"], abs=1e-9)
    assert models.count_params(model)[0] == pytest.approx(done["before"]["params"], rel=0.02)  # the norms are folded
    assert done["layers"] == len(entry["wiring"]) + len(entry["left"])
    assert done["int8_layers"] == (0 if method == "weight-only" else len(entry["wiring"]) - len(entry["weights_only"]))
    assert done["quantized_params_percent"] > 50
    if method in ("ptq", "qat"):
        assert abs(done["miou"] - done["miou_fake_quantized"]) < 2
        assert done["quantized_macs_percent"] > 50
    again = evaluate.main(["--weights", str(tmp_path / method / "best.pt"), "--dry-run", "--out", str(tmp_path / "e")])
    assert again["miou"] == pytest.approx(done["miou"], abs=1e-9)


def test_a_checkpoint_whose_wiring_is_called_by_its_older_name_still_loads(float_checkpoint, tmp_path):
    run(float_checkpoint(backbone="resnet18", head="fcn"), tmp_path / "q", "--method", "ptq")
    path = tmp_path / "q" / "best.pt"
    expected, checkpoint = load_checkpoint(path)
    entry = checkpoint["compression"][-1]
    entry["plan"] = entry.pop("wiring")
    torch.save(checkpoint, path)
    found, again = load_checkpoint(path)
    with torch.no_grad():
        assert torch.equal(found(images(40, 56)), expected(images(40, 56)))
    assert again["compression"][-1]["wiring"] == entry["plan"]


def test_run_as_a_script_it_knows_the_layers_of_what_it_loads_as_its_own(float_checkpoint, tmp_path):
    script, weights = Path(quantize.__file__), str(float_checkpoint(backbone="resnet18", head="fcn"))
    flags = ["--weights", weights, "--out", str(tmp_path / "q"), "--method", "ptq", "--dry-run", *TINY]
    done = subprocess.run([sys.executable, str(script), *flags], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads((tmp_path / "q" / "results.json").read_text())["int8_layers"] > 20


def test_energy_is_reported_where_the_machine_has_a_meter(float_checkpoint, tmp_path, monkeypatch, capsys):
    path, start = float_checkpoint(), time.perf_counter()

    def no_meter(device):
        raise OSError("no RAPL package under /sys")

    monkeypatch.setattr(evaluate, "energy_meter", no_meter)
    done = run(path, tmp_path / "q", "--method", "ptq")
    assert done["energy_j"] is done["energy_j_before"] is None
    assert "no energy: no RAPL package under /sys" in capsys.readouterr().out
    monkeypatch.setattr(evaluate, "energy_meter", lambda device: lambda: 30 * (time.perf_counter() - start))
    done = run(path, tmp_path / "q", "--method", "ptq")
    assert done["energy_j"] == pytest.approx(0, abs=0.01)  # idle at 30 W, and busy at 30 W
    assert "energy, J" in capsys.readouterr().out


@pytest.mark.parametrize(("bits", "group", "ratio"), [(8, 0, 0.30), (8, 16, 0.45), (4, 0, 0.18), (4, 32, 0.30)])
def test_weights_alone_are_that_much_smaller_and_that_close(bits, group, ratio, float_checkpoint, tmp_path):
    path = float_checkpoint(backbone="resnet18", head="fcn")
    done = run(path, tmp_path / "w", "--method", "weight-only", "--bits", str(bits), "--group-size", str(group))
    assert done["file_mb"] < ratio * done["before"]["file_mb"]
    model, before = load_checkpoint(tmp_path / "w" / "best.pt")[0], load_checkpoint(path)[0]
    quantize.simplify(before)
    for name, layer in quant_layers(model).items():
        weight = before.get_submodule(name).weight
        groups = int8.group_rows(weight.detach(), group, layer.axis)
        step = groups.abs().amax(2, keepdim=True) / (2 ** (bits - 1) - 1)
        off = int8.group_rows((layer.weight - weight).detach(), group, layer.axis).abs()
        assert (off <= step / 2 * 1.001 + 1e-8).all()


@pytest.mark.parametrize("steps", ["learned", "frozen"])
def test_qat_of_n_steps_and_n_more_is_qat_of_2n(steps, float_checkpoint, tmp_path, monkeypatch):
    path = float_checkpoint()
    flags = ["--weights", str(path), "--method", "qat", "--steps", steps, *TINY, "--epochs", "2", "--ema", "0.9"]
    fit, whole, parts = quantize.train.fit, tmp_path / "whole", tmp_path / "parts"
    quantize.main([*flags, "--out", str(whole)])
    with monkeypatch.context() as patch:
        patch.setattr(quantize.train, "fit", lambda *a, **k: fit(*a, **k | {"max_steps": 2}))
        quantize.main([*flags, "--out", str(parts)])
    assert read_checkpoint(parts / "last.pt")["training"]["step"] == 2
    quantize.main(["--method", "qat", "--resume", "--out", str(parts)])
    ours, theirs = (read_checkpoint(out / "last.pt")["state_dict"] for out in (parts, whole))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    start = read_checkpoint(path)["state_dict"]
    moved = [key for key in theirs if key.endswith("theta") and theirs[key].abs().max() > 0]
    assert bool(moved) == (steps == "learned")
    assert any(not torch.equal(theirs[key], start[key]) for key in start if key in theirs)


def test_resume_finds_the_run_of_qat_and_no_other(float_checkpoint, tmp_path, monkeypatch):
    path = float_checkpoint()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match=r"no checkpoint at checkpoints/quantize-qat/last.pt: .*quantize.py"):
        quantize.main(["--resume"])
    quantize.main(["--weights", str(path), "--method", "qat", *TINY])
    first = read_checkpoint("checkpoints/quantize-qat/last.pt")["training"]["step"]
    with pytest.raises(ModelError, match="has ended: give more --epochs"):
        quantize.main(["--resume"])
    with pytest.raises(ModelError, match="--observer cannot change now"):
        quantize.main(["--resume", "--observer", "minmax", "--epochs", "2"])
    done = quantize.main(["--resume", "--epochs", "2"])
    assert done["int8_layers"] > 0
    assert read_checkpoint("checkpoints/quantize-qat/last.pt")["training"]["step"] == 2 * first
    last = read_checkpoint("checkpoints/quantize-qat/last.pt") | {"command": "python train.py --head fpn"}
    torch.save(last, "checkpoints/quantize-qat/last.pt")
    with pytest.raises(ModelError, match=r"is of a run of train.py, not of quantize.py"):
        quantize.main(["--resume"])


def test_auxiliary_losses_weigh_in_qat_what_they_did_in_training(float_checkpoint, tmp_path, monkeypatch):
    path = float_checkpoint(backbone="resnet18", head="fcn", aux=True)
    checkpoint = read_checkpoint(path)
    checkpoint["args"] |= {"aux_weight": 0.25}
    torch.save(checkpoint, path)
    weights, objective = [], quantize.train.Objective
    monkeypatch.setattr(quantize.train, "Objective", lambda *a, **k: weights.append(a[2]) or objective(*a, **k))
    run(path, tmp_path / "q", "--method", "qat")
    assert weights == [0.25]


def test_sensitivity_names_the_layer_that_suffers(float_checkpoint, tmp_path):
    model, x = make(backbone="resnet18", head="fcn"), images(64, 64)
    spoiled = "backbone.stages.2.0.conv1"
    layer = model.get_submodule(spoiled)
    with torch.no_grad():
        layer.weight[:, 0] *= 300  # one input channel leaves the others few steps
        model.get_submodule("backbone.stages.1.1.bn2").weight[0] /= 300
        model.get_submodule("backbone.stages.1.1.bn2").bias[0] /= 300
    simulated, _ = prepared(model, x)
    shares = quantize.sensitivity(simulated, [x])
    assert set(shares) == set(quant_layers(simulated))
    assert list(shares.values()) == sorted(shares.values(), reverse=True)
    assert spoiled in list(shares)[:2]
    path = float_checkpoint(backbone="resnet18", head="fcn")
    done = run(path, tmp_path / "s", "--method", "ptq", "--sensitivity", dry=False)
    with open(tmp_path / "s" / "sensitivity.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == done["int8_layers"]
    assert (tmp_path / "s" / "sensitivity.png").stat().st_size > 5000


def test_max_drop_leaves_in_float_what_it_takes(float_checkpoint, tmp_path, monkeypatch):
    path = float_checkpoint(backbone="resnet18", head="fcn")
    all_of_them = run(path, tmp_path / "a", "--method", "ptq")["int8_layers"]
    assert run(path, tmp_path / "b", "--method", "ptq", "--max-drop", "100")["int8_layers"] == all_of_them
    points = iter(range(50, 0, -1))  # whatever is scored next is worse
    monkeypatch.setattr(quantize.evaluate, "evaluate", lambda *_, **__: {"miou": float(next(points))})
    with pytest.raises(ModelError, match="no layer can be quantized within"):
        run(path, tmp_path / "c", "--method", "ptq", "--max-drop", "0", dry=False)


def test_max_drop_leaves_the_fewest_of_the_worst_layers_in_float(float_checkpoint, tmp_path, monkeypatch):
    path, real, tried = float_checkpoint(backbone="resnet18", head="fcn"), quantize.evaluate.evaluate, []

    def pretend(model, *args, **kwargs):  # 50 points; 2 fewer for each of the three worst layers that is quantized
        worst = list(ranking)[:3] if ranking else []
        tried.append(sum(isinstance(model.get_submodule(name), int8.QuantLayer) for name in worst))
        return real(model, *args, **kwargs) | {"miou": 50.0 - 2 * tried[-1]}

    def rank(*args, **kwargs):
        ranking.update(quantized(*args, **kwargs))
        return ranking

    ranking, quantized = {}, quantize.sensitivity
    monkeypatch.setattr(quantize, "sensitivity", rank)
    monkeypatch.setattr(quantize.evaluate, "evaluate", pretend)
    done = run(path, tmp_path / "d", "--method", "ptq", "--max-drop", "3", dry=False)
    assert set(done["float_layers"]) == set(list(ranking)[:2])
    assert len(ranking) > 15
    assert len(tried) < 10  # the float network, the search by halves, the result


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--bits", "4"], "weight-only"),
        (["--method", "qat", "--group-size", "32"], "weight-only"),
        (["--skip", "no.such.layer"], "no.such.layer"),
        (["--method", "ptq", "--resume"], "last.pt"),
        (["--dataset", "camvid", "--data-root", "absent"], "absent"),
    ],
)
def test_what_cannot_be_is_one_line(flags, message, float_checkpoint, tmp_path):
    path = float_checkpoint()
    with pytest.raises((ModelError, datasets.DataError, OSError), match=message):
        run(path, tmp_path / "out", *flags)


def test_a_quantized_checkpoint_is_not_quantized_again(float_checkpoint, tmp_path):
    run(float_checkpoint(backbone="resnet18", head="fcn"), tmp_path / "q", "--method", "ptq")
    with pytest.raises(ModelError, match="is quantized already"):
        run(tmp_path / "q" / "best.pt", tmp_path / "r", "--method", "ptq")


# ---- post-training helpers ------------------------------------------------------------------------------------------


class Row(nn.Module):
    """Layers in a row."""

    def __init__(self, *layers):
        super().__init__()
        self.layers, self.frozen = nn.Sequential(*layers), []
        self.eval()

    def forward(self, x):
        return self.layers(x)


@torch.no_grad()
def uneven(*layers):
    """Layers in a row, the output channels of each convolution of ranges that differ a hundredfold."""
    torch.manual_seed(0)
    for conv in (layer for layer in layers if isinstance(layer, nn.Conv2d)):
        nn.init.normal_(conv.weight, 0, 0.1)
        conv.weight *= torch.logspace(-1, 1, conv.out_channels)[torch.randperm(conv.out_channels), None, None, None]
    return Row(*layers)


def channel_ranges(conv, dim):
    return conv.weight.detach().abs().transpose(0, dim).flatten(1).amax(1)


@pytest.mark.parametrize(
    "between", [[nn.ReLU()], [nn.ReLU(inplace=True)], [nn.ReLU(), nn.MaxPool2d(2)], [nn.Identity()]]
)
@torch.no_grad()
def test_equalize_gives_both_sides_the_geometric_mean_of_their_ranges(between):
    model, x = uneven(nn.Conv2d(3, 8, 3), *between, nn.Conv2d(8, 5, 3, bias=False)), images(20, 24)
    expected, first, second = model(x), model.layers[0], model.layers[-1]
    r1, r2, bias = channel_ranges(first, 0), channel_ranges(second, 1), first.bias.clone()
    assert quantize.equalize(model, [x]) == [("layers.0", f"layers.{len(between) + 1}")]
    assert torch.allclose(channel_ranges(first, 0), (r1 * r2).sqrt(), rtol=1e-4)
    assert torch.allclose(channel_ranges(second, 1), (r1 * r2).sqrt(), rtol=1e-4)
    assert torch.allclose(first.bias, bias / ((r1 * r2).sqrt() / r2), rtol=1e-4)
    assert torch.allclose(model(x), expected, atol=1e-4)


@torch.no_grad()
def test_equalize_goes_through_depthwise_convolutions():
    depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
    model, x = uneven(nn.Conv2d(3, 8, 1), nn.ReLU(), depthwise, nn.ReLU(), nn.Conv2d(8, 5, 1)), images(12, 16)
    expected, first, last = model(x), model.layers[0], model.layers[4]
    mean = (channel_ranges(first, 0) * channel_ranges(depthwise, 0) * channel_ranges(last, 1)) ** (1 / 3)
    assert quantize.equalize(model, [x]) == [("layers.0", "layers.2"), ("layers.2", "layers.4")]
    for conv, dim in ((first, 0), (depthwise, 0), (last, 1)):
        assert torch.allclose(channel_ranges(conv, dim), mean, rtol=1e-2)
    assert torch.allclose(model(x), expected, atol=1e-4)


class Pair(nn.Module):
    def __init__(self, run, groups=1):
        super().__init__()
        torch.manual_seed(0)
        self.run, self.a, self.b = run, nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1, groups=groups)

    def forward(self, x):
        return self.run(self.a, self.b, x)


def _two_readers(a, b, x):
    y = F.relu(a(x))
    return b(y) + y


def _two_readers_of_the_sum(a, b, x):
    y = a(x)
    return b(F.relu(y)) + y


def _moved_in_place(a, b, x):
    y = F.relu(a(x))
    y += 1
    return b(y)


UNEQUAL = {
    "two readers": _two_readers,
    "two readers before the activation": _two_readers_of_the_sum,
    "moved in place": _moved_in_place,
    "ReLU6": lambda a, b, x: b(F.relu6(a(x))),
    "second called twice": lambda a, b, x: b(b(F.relu(a(x)))),
    "first called twice": lambda a, b, x: b(F.relu(a(x))) + a(x),
    "weight read elsewhere": lambda a, b, x: b(F.relu(a(x))) + a.weight.square().sum(),
    "groups": lambda a, b, x: b(F.relu(a(x))),
}


@pytest.mark.parametrize("name", UNEQUAL)
@torch.no_grad()
def test_equalize_leaves_alone_what_it_would_change(name):
    model = Pair(UNEQUAL[name], groups=2 if name == "groups" else 1)
    before = copy.deepcopy(model.state_dict())
    assert quantize.equalize(model, [images(10, 12)]) == []
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


@torch.no_grad()
def test_relu6_stands_in_the_way_until_it_is_a_relu():
    x = images(9, 9)
    model = uneven(nn.Conv2d(3, 8, 3), nn.ReLU6(), nn.Conv2d(8, 5, 3), nn.Hardtanh(), nn.Conv2d(5, 5, 1))
    assert quantize.equalize(model, [x]) == []
    assert quantize.replace_relu6(model) == ["layers.1"]
    assert quantize.equalize(model, [x]) == [("layers.0", "layers.2")]


def rounding_network():
    """One of each kind of layer that learns to round, and an image of broad blobs: inputs that go together."""
    torch.manual_seed(0)
    model = Row(
        nn.Conv2d(3, 16, 3, 2), nn.ReLU(), nn.Conv2d(16, 16, 3, 1, 2, dilation=2, groups=2), nn.ReLU(),
        nn.ConvTranspose2d(16, 12, 2, 2), nn.ReLU(), nn.Conv2d(12, 5, 1),
    )  # fmt: skip
    return model, [F.interpolate(torch.randn(1, 3, 6, 7), scale_factor=5, mode="bicubic") for _ in range(6)]


@pytest.mark.parametrize(("bits", "group", "activations"), [(8, 0, True), (4, 0, True), (4, 8, False)])
@torch.no_grad()
def test_adaround_chooses_floor_or_ceil_for_better_outputs_and_convert_keeps_it(bits, group, activations):
    model, (*batches, fresh) = rounding_network()
    expected = model(fresh)
    nearest = copy.deepcopy(model)
    quantize.prepare(nearest, batches[0], activations=activations, bits=bits, group_size=group)
    if activations:
        quantize.calibrate(nearest, batches)
    int8.set_mode(nearest, "fake")
    learned = copy.deepcopy(nearest)
    quantize.adaround(learned, batches, steps=300)
    errors = [(network(fresh) - expected).square().mean() for network in (nearest, learned)]
    assert errors[1] < (0.98 if bits == 8 else 0.8) * errors[0]  # of 8 bits, most is that of the activations
    others = 0
    for name, layer in quant_layers(learned).items():
        start = nearest.get_submodule(name)
        scale = start.weight_scale.view(layer.shape[layer.axis], -1, 1)
        exact, chosen = (int8.group_rows(x.values, group, layer.axis) / scale for x in (start, layer))
        assert torch.allclose(chosen, chosen.round(), atol=1e-4)
        assert ((chosen.round() == exact.floor()) | (chosen.round() == exact.ceil())).all()
        others += (chosen.round() != exact.round()).sum().item()
        kept = layer.values.clone()
        layer.convert()
        assert torch.allclose(layer.weight, kept, rtol=1e-5)
        if bits == 8 and not group:
            assert torch.equal(int8.group_rows(layer.weight_q.float(), group, layer.axis), chosen.round())
    assert others > 20


@torch.no_grad()
def test_correct_bias_brings_the_mean_of_each_output_back():
    model, x = uneven(nn.Conv2d(3, 8, 3, bias=False)), [images(24, 24) + 1, images(16, 30) + 1]
    simulated = copy.deepcopy(model)
    quantize.prepare(simulated, x[0], bits=4)
    quantize.calibrate(simulated, x)

    def gaps():
        """Mean error of each output channel, on average over the images."""
        return torch.stack([(simulated(y) - model(y)).mean((0, 2, 3)) for y in x]).mean(0).abs()

    before = gaps()
    quantize.correct_bias(simulated, x)
    assert before.max() > 1e-3
    assert gaps().max() < 1e-5


class Readers(TorchFunctionMode):
    """Notes which of the tensors {id: (name, tensor)} a function other than F.linear() reads."""

    def __init__(self, tensors, others):
        super().__init__()
        self.tensors, self.others = tensors, others

    def __torch_function__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in args:
            if id(x) in self.tensors and function is not F.linear and torch.is_tensor(out):
                self.others[self.tensors[id(x)][0]] = True
        return out


class Tokens(nn.Module):
    """Two Linear layers after a LayerNorm with two channels far out; its output is also read as it is, times `read`."""

    def __init__(self, read=False):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.norm, self.read, self.frozen = nn.Conv2d(3, 16, 4, 4), nn.LayerNorm(16), read, []
        self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)
        with torch.no_grad():
            self.norm.weight[3:5] = 100.0
            for layer in (self.a, self.b):
                layer.weight[:, 3:5] /= 100

    def forward(self, x):
        tokens = self.norm(self.embed(x).flatten(2).mT)
        return self.a(tokens) * self.b(tokens) + (self.read * tokens if self.read else 0)


@torch.no_grad()
def test_smooth_moves_outliers_into_the_weights():
    model, x = Tokens(), images(32, 32)
    expected, errors = model(x), []
    smoothed = copy.deepcopy(model)
    assert quantize.smooth(smoothed, [x])["norm"] is not None
    assert torch.allclose(smoothed(x), expected, atol=1e-4)
    for network in (model, smoothed):
        simulated, _ = prepared(network, x)
        errors.append((simulated(x) - expected).square().mean())
    assert errors[1] < 0.1 * errors[0]


@pytest.mark.parametrize("weight", [1.0, 1e-9])  # also where the other reader hardly matters to the output
@torch.no_grad()
def test_smooth_leaves_a_norm_alone_that_others_read(weight):
    model = Tokens(read=weight)
    before = copy.deepcopy(model.state_dict())
    assert quantize.smooth(model, [images(32, 32)]) == {"norm": None}
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


@torch.no_grad()
def test_smooth_leaves_the_norms_of_an_untrained_segformer_alone_that_a_convolution_reads():
    model, x = make(model="segformer-tiny"), images(64, 64)
    norms = {n: m for n, m in model.named_modules() if isinstance(m, nn.LayerNorm)}
    others = dict.fromkeys(norms, False)  # whether something other than a Linear reads it

    def spy(name):
        def hook(norm, _inputs, output):
            made[id(output)] = name, output

        return hook

    made = {}
    hooks = [m.register_forward_hook(spy(n)) for n, m in norms.items()]
    with Readers(made, others):
        model(x)
    for hook in hooks:
        hook.remove()
    assert any(others.values())
    before = {n: m.weight.clone() for n, m in norms.items()}
    quantize.smooth(model, [x])
    changed = {n for n, m in norms.items() if not torch.equal(m.weight, before[n])}
    assert changed
    assert not [n for n in changed if others[n]]


@torch.no_grad()
def test_what_the_helpers_change_is_in_the_checkpoint(tmp_path):
    """A network without its norms and ReLU6, equalized and rounded, comes back from its file."""
    model, x = make(backbone="mobilenet_v2", head="fcn"), images(48, 64)
    args = quantize.make_parser().parse_args(["--equalize", "relu6", "--adaround", "2", "--observer", "minmax"])
    converted, entry = quantize.quantize_network(model, [x], args, None, None, tmp_path)
    assert len(entry["relu6"]) > 30
    assert len(entry["equalized"]) > 30
    assert entry["removed"] == quantize.simplify(copy.deepcopy(model))
    quantize.convert(converted)
    save_checkpoint(
        tmp_path / "q.pt", converted, data=FIVE, pretrained="no", command="quantize.py",
        compression=[entry | {"state": "int8"}],
    )  # fmt: skip
    found, _ = load_checkpoint(tmp_path / "q.pt")
    assert torch.equal(found(x), converted(x))


def test_a_made_up_description_of_a_quantized_network_is_read_or_refused_in_one_line(tmp_path):
    model, x = make(model="unet", width=8), images(32, 32)
    converted, entry = quantize.quantize_network(
        model, [x], quantize.make_parser().parse_args([]), None, None, tmp_path
    )
    quantize.convert(converted)
    about = dict(data=FIVE, pretrained="no", command="quantize.py", compression=[entry | {"state": "int8"}])
    save_checkpoint(tmp_path / "q.pt", converted, **about)
    good = torch.load(tmp_path / "q.pt", weights_only=True)

    def use(step):
        torch.save(good | {"compression": [step]}, tmp_path / "q.pt")
        load_checkpoint(tmp_path / "q.pt")[0](x)

    tries = itertools.islice(made_up(good["compression"][0], tries=1), 0, None, 3)
    refused = count_refused(tries, use, ModelError)
    assert refused > 5


@pytest.mark.parametrize("flags", [["--method", "qat", "--adaround", "10"], ["--method", "dynamic", "--adaround", "1"]])
def test_adaround_where_it_has_no_place_is_refused(flags, tmp_path):
    model = make(model="unet", width=8)
    save_checkpoint(tmp_path / "f.pt", model, data=FIVE, pretrained="no", command="train.py", args={})
    with pytest.raises(ModelError, match="--adaround is of"):
        quantize.parse_args(["--weights", str(tmp_path / "f.pt"), *flags])
