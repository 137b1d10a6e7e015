"""benchmark.py: numbers by hand, fake clocks and counters, and the command line on a small network."""

import csv
import io
import itertools
import json
import math
import sys
import types

import pytest
import torch
from torch import nn

import benchmark
import datasets
import evaluate
import export_onnx
import models
import quantize
from models import ModelError

CPU = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Tensors here are tiny: a second thread would only wait."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Clock:
    """Time that passes only when told to."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds


def save(path, *, head="linear", data=None, **extra):
    """A checkpoint of an untrained network for small scenes."""
    torch.manual_seed(1)
    network = models.build_model(num_classes=19, backbone="resnet18", head=head, taps=1)
    data = data or datasets.open_dataset("synthetic", "val", size=(32, 64)).info.to_dict()
    models.save_checkpoint(path, network, data=data, pretrained="no", command="python train.py", **extra)
    return str(path)


# ---- what is counted and run ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layer", "macs"),
    [
        (nn.Conv2d(3, 8, 3, padding=1), 8 * 3 * 9 * 12 * 10),
        (nn.Conv2d(3, 8, 3, stride=2), 8 * 3 * 9 * 5 * 4),
        (nn.Conv2d(3, 6, 5, padding=2, groups=3, bias=False), 6 * 1 * 25 * 12 * 10),
        (nn.Conv2d(3, 4, 3, dilation=2), 4 * 3 * 9 * 8 * 6),
        (nn.ConvTranspose2d(3, 5, 2, stride=2), 5 * 3 * 4 * 12 * 10),
        (nn.Linear(10, 7), 7 * 10 * 3 * 12),
        (nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.AvgPool2d(2), nn.Upsample(scale_factor=2)), 0),
    ],
    ids=["conv", "stride", "groups", "dilation", "transposed", "linear", "nothing"],
)
def test_macs_of_layers_by_hand(layer, macs):
    assert evaluate.count_macs(layer.eval(), torch.randn(3, 3, 12, 10)) == macs  # of one image


def test_macs_of_attention_by_hand():
    network = models.build_model(num_classes=5, backbone="dinov2-tiny", head="linear").eval()
    tokens, width = 6 + 1, 32  # 2 x 3 patches of 14 x 14 and the class token
    layer = 4 * width * width * tokens + 2 * tokens * tokens * width + 2 * 4 * width * width * tokens
    embedding, classifier = 3 * 14 * 14 * width * 6, 4 * width * 5 * 6
    assert evaluate.count_macs(network, torch.randn(1, 3, 28, 42)) == embedding + 4 * layer + classifier
    assert evaluate.count_macs(network, torch.randn(1, 3, 27, 30)) == embedding + 4 * layer + classifier  # padded


@pytest.mark.parametrize("backend", ["torch", "compile", "onnxruntime", "openvino"])
def test_every_backend_computes_what_torch_does_at_an_odd_size(backend, tmp_path):
    pytest.importorskip(benchmark.BACKENDS[backend].package)
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.BatchNorm2d(4), nn.Conv2d(4, 5, 3, padding=2)).eval()
    images = benchmark.make_images((2, 3, 33, 47))
    with torch.inference_mode():
        expected = network(images)
    network.build = dict(model="two convolutions")
    export_onnx.export(network, tmp_path / "net.onnx", size=(33, 47), batch=2)
    network = benchmark.for_inference(network, CPU, torch.float32)
    make = benchmark.BACKENDS[backend].make
    run = make(network, images, torch.float32, 1, str(tmp_path / "net.onnx"))
    torch.testing.assert_close(run(), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(run(), run())


@pytest.mark.slow
@pytest.mark.parametrize(("backbone", "head"), [("resnet18", "unet"), ("dinov2-tiny", "fpn"), ("mobilenet_v2", "aspp")])
def test_every_backend_runs_real_networks_as_torch_does(backbone, head, tmp_path):
    build = dict(num_classes=7, backbone=backbone, head=head)
    subject = benchmark.open_subject(None, build, size=(61, 83), batch=1, dry_run=True)
    opened = benchmark.open_rows(
        subject, list(benchmark.BACKENDS), device=CPU, dtype="float32", threads=1, folder=tmp_path
    )
    for row, run, _ in opened:
        assert run, row["reasons"]
        assert row["agreement"] > 99.9
        assert row["max_difference"] < 1e-3


def test_more_networks_are_compiled_than_dynamo_keeps_by_default(monkeypatch):
    torch._dynamo.reset()
    real, graphs = torch.compile, []
    count = lambda graph, _inputs, **_options: graphs.append(graph) or graph.forward  # noqa: E731
    monkeypatch.setattr(torch, "compile", lambda m, **options: real(m, backend=count, **options))

    class Net(nn.Module):
        def __init__(self, channels):
            super().__init__()
            self.conv = nn.Conv2d(3, channels, 1)

        def forward(self, x):
            return self.conv(x)

    images = torch.randn(1, 3, 4, 4)
    runs = [benchmark.compile_runner(Net(c), images, torch.float32) for c in range(1, 11)]
    for _ in range(2):
        assert [run().shape[1] for run in runs] == list(range(1, 11))
    assert len(graphs) == 10
    torch._dynamo.reset()


def test_for_inference_casts_weights_but_not_batchnorm():
    network = models.build_model(num_classes=5, backbone="resnet18", head="linear", taps=1).eval()
    images = benchmark.make_images((1, 3, 40, 56))
    with torch.inference_mode():
        expected = network(images)
        network = benchmark.for_inference(network, CPU, torch.bfloat16)
        logits = benchmark.torch_runner(network, images, torch.bfloat16)()
    kinds = {type(m): next(m.parameters()).dtype for m in network.modules() if list(m.parameters(recurse=False))}
    assert kinds == {nn.Conv2d: torch.bfloat16, nn.BatchNorm2d: torch.float32}
    assert network.backbone.stages[0][0][0].weight.is_contiguous(memory_format=torch.channels_last)
    assert logits.dtype == torch.bfloat16
    close = benchmark.deviation(logits.float(), expected)
    assert 0 < close["max_difference"] < 0.05 * expected.abs().max()
    assert benchmark.deviation(expected, expected) == {"agreement": 100.0, "max_difference": 0.0}


# ---- time and energy ------------------------------------------------------------------------------------------------


def test_networks_take_turns_and_only_the_warm_calls_are_timed():
    clock, calls = Clock(), []

    def runner(name, seconds):
        def run():
            first = calls[-1:] != [name]  # comes after another network: 100 times slower, and not to be counted
            calls.append(name)
            clock.now += 100 * seconds if first else seconds + len(calls) / 1e6

        return run

    pauses = []
    runs = [runner("a", 1), runner("b", 2)]
    seconds = benchmark.interleave(runs, 5, burst=2, pause=7, clock=clock, sleep=pauses.append)
    assert "".join(calls) == "aaabbb" + "aaabbb" + "aabb"  # one call that is not timed, then two; the rest last
    assert pauses == [7] * 6
    assert [len(s) for s in seconds] == [5, 5]
    assert seconds[0] == pytest.approx([1 + i / 1e6 for i in (2, 3, 8, 9, 14)])
    assert seconds[1] == pytest.approx([2 + i / 1e6 for i in (5, 6, 11, 12, 16)])


def test_median_and_interquartile_range():
    row = benchmark.latency([0.001, 0.009, 0.002, 0.004, 0.003], batch=4)
    assert row == pytest.approx(
        {"latency_ms": 3, "latency_iqr_ms": 2, "latency_min_ms": 1, "fps": 4 / 0.003}
    )  # quartiles 2 and 4: one slow call moves nothing
    assert benchmark.latency([0.25], batch=1)["latency_iqr_ms"] == 0


def test_profile_gives_each_module_its_own_time():
    clock = Clock()

    class Slow(nn.Module):
        def __init__(self, before, *children):
            super().__init__()
            self.before, self.parts = before, nn.ModuleList(children)

        def forward(self, x):
            clock.now += self.before
            for part in self.parts:
                x = part(x)
            return x + 1

    class Quick(Slow):
        pass

    leaf = Quick(0.5)
    network = Slow(1.0, Slow(2.0, leaf, leaf), Quick(4.0))
    done = benchmark.profile(network, torch.zeros(1), runs=3, clock=clock)
    types_ = {row["type"]: (row["ms"], row["calls"]) for row in done["types"]}
    assert types_["Quick"] == pytest.approx((1000 * (0.5 + 0.5 + 4.0), 3))  # the leaf runs twice
    assert types_["Slow"] == pytest.approx((1000 * (1.0 + 2.0), 2))
    assert [row["layer"] for row in done["slowest"]][:4] == ["parts.1", "parts.0", "(network)", "parts.0.parts.0"]
    assert sum(row["percent"] for row in done["types"]) == pytest.approx(100)
    assert done["hooks_add_percent"] == pytest.approx(0)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in network.modules())


def rapl_zone(root, zone, name, energy, top=1_000_000):
    folder = root / zone
    folder.mkdir(parents=True, exist_ok=True)
    for file, text in (("name", name), ("energy_uj", energy), ("max_energy_range_uj", top)):
        (folder / file).write_text(f"{text}\n")


def test_rapl_adds_packages_and_wraps_around(tmp_path):
    rapl_zone(tmp_path, "intel-rapl:0", "package-0", 900_000)
    rapl_zone(tmp_path, "intel-rapl:1", "package-1", 100, top=500_000)
    rapl_zone(tmp_path, "intel-rapl:0:0", "core", 5)
    rapl_zone(tmp_path, "intel-rapl:2", "psys", 5)
    joules = evaluate.rapl_meter(tmp_path)
    assert joules() == 0
    rapl_zone(tmp_path, "intel-rapl:0", "package-0", 950_000)
    rapl_zone(tmp_path, "intel-rapl:0:0", "core", 900_000)  # is part of its package
    rapl_zone(tmp_path, "intel-rapl:2", "psys", 900_000)  # contains the packages
    assert joules() == pytest.approx(0.05)
    rapl_zone(tmp_path, "intel-rapl:0", "package-0", 20_000)  # wrapped at 1 J: 0.07 J more
    rapl_zone(tmp_path, "intel-rapl:1", "package-1", 200_100, top=500_000)
    assert joules() == pytest.approx(0.05 + 0.07 + 0.2)
    rapl_zone(tmp_path, "intel-rapl:1", "package-1", 100, top=500_000)
    assert joules() == pytest.approx(0.05 + 0.07 + 0.5)


def test_rapl_says_why_it_is_not_there(tmp_path):
    with pytest.raises(OSError, match="no RAPL package under"):
        evaluate.rapl_meter(tmp_path / "powercap")
    rapl_zone(tmp_path, "intel-rapl:0", "package-0", 1)
    (tmp_path / "intel-rapl:0" / "energy_uj").unlink()
    with pytest.raises(OSError, match="energy_uj"):  # as PermissionError, which only root escapes, is one
        evaluate.rapl_meter(tmp_path)


def test_energy_is_that_above_idle():
    clock = Clock()
    frames = 0

    def run():  # 0.25 s at 30 W
        nonlocal frames, used
        frames += 2
        clock.now += 0.25
        used += 0.25 * 30

    def sleep(seconds):  # idle at 10 W
        nonlocal used
        clock.now += seconds
        used += seconds * 10

    used = 0.0
    row = evaluate.measure_energy(run, lambda: used, seconds=2, batch=2, clock=clock, sleep=sleep)
    assert frames == 16
    assert row == pytest.approx({"energy_j": (30 - 10) * 0.25 / 2, "idle_watts": 10})


def test_nvml_counts_millijoules(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.raises(OSError, match="nvidia-ml-py"):
        evaluate.nvml_meter(torch.device("cuda"))
    asked = []
    fake = types.ModuleType("pynvml")
    fake.NVMLError = type("NVMLError", (Exception,), {})
    fake.nvmlInit = lambda: None
    fake.nvmlDeviceGetHandleByUUID = lambda uuid: asked.append(uuid) or "handle"
    fake.nvmlDeviceGetTotalEnergyConsumption = lambda handle: {"handle": 12_500}[handle]
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: types.SimpleNamespace(uuid="12-34"))
    assert evaluate.nvml_meter(torch.device("cuda"))() == 12.5
    assert asked == ["GPU-12-34"]

    def unsupported(_handle):
        raise fake.NVMLError("Not Supported")

    fake.nvmlDeviceGetTotalEnergyConsumption = unsupported
    with pytest.raises(OSError, match="NVML: Not Supported"):
        evaluate.nvml_meter(torch.device("cuda"))


def test_the_machine_is_described_by_cpuinfo(tmp_path):
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor\t: 0\nmodel name\t: Some CPU\nflags\t\t: fpu avx2 avx512_vnni amx_int8x\n\n")
    machine = benchmark.describe_machine(CPU, cpuinfo)
    assert machine["name"] == "Some CPU"
    assert machine["abilities"] == ["avx2", "avx512_vnni"]
    assert machine["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert "Some CPU" in benchmark.machine_line(machine)
    assert "torch " in benchmark.machine_line(machine)


# ---- finding checkpoints --------------------------------------------------------------------------------------------


def test_discovery_goes_by_what_files_hold(tmp_path, capsys):
    best = save(tmp_path / "a" / "b" / "any_name.pt")
    save(tmp_path / "a" / "b" / "other.pt", training={"step": 1})
    save(tmp_path / "dry-run" / "train" / "best.pt")
    (tmp_path / "broken.pt").write_bytes(b"no zip file")
    torch.save({"weight": torch.zeros(2)}, tmp_path / "tensors.pt")
    assert benchmark.discover(tmp_path) == [best]
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert "broken.pt is not a PyTorch weights file" in lines[0]
    assert "tensors.pt holds tensors but is not a checkpoint" in lines[1]
    assert benchmark.discover(tmp_path / "dry-run") == [str(tmp_path / "dry-run" / "train" / "best.pt")]


def test_a_file_that_no_network_is_made_of_costs_the_others_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "peak_memory", lambda *_, **__: {"peak_memory_mb": 9.0, "memory_added_mb": 1.0})
    good, bad = save(tmp_path / "a.pt"), save(tmp_path / "b.pt")
    content = torch.load(bad, weights_only=True)
    torch.save(content | {"build": content["build"] | {"taps": 4}}, bad)
    rows = benchmark.main(["--weights", str(tmp_path), "--dry-run", "--size", "32", "32", "--out", str(tmp_path / "o")])
    assert [row["weights"] for row in rows] == [good]
    assert "skipped: " in capsys.readouterr().err


def test_errors_say_what_to_do(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for flags in ([], ["--weights"]):
        with pytest.raises(ModelError, match=r"no checkpoint under checkpoints/: `python train.py --head fpn`"):
            benchmark.main(flags)
    with pytest.raises(ModelError, match=r"no checkpoint at nothing.pt"):
        benchmark.main(["--weights", "nothing.pt"])
    with pytest.raises(ModelError, match="onnxruntime runs float32 only, not --dtype bf16"):
        benchmark.main(["--backend", "torch", "onnxruntime", "--dtype", "bf16"])
    monkeypatch.setitem(benchmark.BACKENDS, "torch", benchmark.Backend(None, package="not_installed"))
    with pytest.raises(ModelError, match="pip install not_installed"):
        benchmark.main([])
    with pytest.raises(ModelError, match="measured on the CPU only"):
        benchmark.check_backend("onnxruntime", "float32", torch.device("cuda"))
    (tmp_path / "odd.json").write_text('[{"weights": 1}]')
    with pytest.raises(datasets.DataError, match=r"odd.json is no benchmark.json"):
        benchmark.main(["--figures-from", "odd.json"])


# ---- the command line -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """(folder, rows) of `benchmark.py --weights` over one small checkpoint on two backends."""
    folder = tmp_path_factory.mktemp("benchmark")
    save(folder / "checkpoints" / "train" / "best.pt", args={"data_root": None})
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setitem(datasets.DATASETS["synthetic"].lengths, "val", 4)
        flags = ["--weights", "--backend", "torch", "onnxruntime", "--runs", "2", "--threads", "1", "--profile"]
        return folder, benchmark.main(flags)


def test_rows_hold_the_keys_that_programs_rely_on(measured):
    folder, rows = measured
    saved = json.loads((folder / "checkpoints" / "benchmark.json").read_text())
    assert saved == json.loads(json.dumps(rows))
    promised = "weights model compression backend threads size params macs file_mb latency_ms latency_iqr_ms fps "
    promised += "peak_memory_mb energy_j miou"
    for row, backend in zip(rows, ("torch", "onnxruntime"), strict=True):
        assert set(promised.split()) <= row.keys()
        assert row["backend"] == backend
        assert row["weights"] == "checkpoints/train/best.pt"
        assert row["size"] == [32, 64]
        assert row["runs"] == 2
        assert row["latency_ms"] >= row["latency_min_ms"] > 0
        assert row["fps"] == pytest.approx(1000 / row["latency_ms"])
        assert row["miou_per_ms"] == pytest.approx(row["miou"] / row["latency_ms"])
        assert row["agreement"] > 99
        for key in ("energy_j", "peak_memory_mb", "miou"):  # a number, or the reason why not
            assert (row[key] is None) == (key in row["reasons"])
    network, checkpoint = models.load_checkpoint(folder / "checkpoints" / "train" / "best.pt")
    assert rows[0]["params"] == sum(p.numel() for p in network.parameters())
    assert rows[0]["file_mb"] == evaluate.weights_mb(folder / "checkpoints" / "train" / "best.pt", checkpoint)
    assert rows[0]["onnx_mb"] is None
    assert rows[1]["onnx_mb"] > 40
    assert rows[0]["profile"]["types"][0]["type"] == "Conv2d"


def test_miou_is_that_of_evaluate(measured, monkeypatch):
    folder, rows = measured
    monkeypatch.setitem(datasets.DATASETS["synthetic"].lengths, "val", 4)
    weights = folder / "checkpoints" / "train" / "best.pt"
    scored = evaluate.main(["--weights", str(weights), "--no-boundary", "--out", str(folder / "scored")])
    assert scored["miou"] > 0
    assert [row["miou"] for row in rows] == pytest.approx([scored["miou"]] * 2, abs=1e-3)


def test_memory_is_that_of_a_fresh_process(measured):
    small = measured[1]
    parameters = small[0]["params"] * 4 / 2**20
    assert parameters < small[0]["memory_added_mb"] < small[0]["peak_memory_mb"] < 4000
    assert parameters < small[1]["memory_added_mb"] < small[1]["peak_memory_mb"] < small[0]["peak_memory_mb"]
    build = dict(num_classes=19, backbone="resnet101", head="linear", taps=1)
    shared = dict(device=CPU, dtype="float32", threads=1)
    large = benchmark.peak_memory("torch", weights=None, build=build, shape=[1, 3, 32, 64], **shared)
    more = (42.5 - 11.2) * 4 * 1e6 / 2**20  # the networks' millions of parameters
    assert large["peak_memory_mb"] - small[0]["peak_memory_mb"] > 0.9 * more
    assert large["memory_added_mb"] - small[0]["memory_added_mb"] > 0.9 * more


def test_a_fresh_process_that_fails_says_why():
    with pytest.raises(ModelError, match=r"the fresh process failed: .*(No such file|doesn't exist|NoSuchFile)"):
        benchmark.peak_memory(
            "onnxruntime", weights=None, build={}, device=CPU, dtype="float32", shape=[1], threads=1, path="no.onnx"
        )


def no_memory(*_args, **_kwargs):
    return {"peak_memory_mb": 1.0, "memory_added_mb": 0.5}


@pytest.fixture(scope="module")
def quantized_rows(tmp_path_factory):
    """(folder, quantized network, rows of its float and its int8 checkpoint on two backends)."""
    folder = tmp_path_factory.mktemp("quantized")
    args = {"data_root": None}
    weights = save(folder / "float.pt", args=args)
    model, checkpoint = models.load_checkpoint(weights)
    images = torch.randn(1, 3, 32, 64)
    done = quantize.prepare(model, images)
    quantize.calibrate(model, [images])
    quantize.convert(model)
    step = {"step": "quantize", "method": "ptq", "bits": 8, "group_size": 0, "attention": "float32", "relu6": []}
    step |= done._asdict() | {"state": "int8", "outputs": quantize.observe_outputs(model, [images])}
    step["total_macs"] = sum(done.macs.values())
    kept = {key: checkpoint[key] for key in ("data", "pretrained", "command")}
    models.save_checkpoint(folder / "int8.pt", model, compression=[step], args=args, **kept)
    flags = ["--weights", weights, str(folder / "int8.pt"), "--backend", "torch", "onnxruntime"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(benchmark, "peak_memory", no_memory)
        flags += ["--profile", "--dry-run", "--threads", "1", "--no-miou", "--out", str(folder)]
        rows = benchmark.main(flags)
    return folder, model, rows


def test_rows_of_a_quantized_network(quantized_rows):
    _, _, rows = quantized_rows
    floats, int8 = rows[:2], rows[2:]
    assert [row["name"] for row in int8] == [f"resnet18 + linear, ptq int8, {b}" for b in ("torch", "onnxruntime")]
    for row, before in zip(int8, floats, strict=True):
        assert row["compression"] == [{"step": "quantize", "method": "ptq", "bits": 8}]
        assert row["latency_ms"] > 0, row["reasons"]
        assert row["macs"] == before["macs"] > 0
        assert 0.9 < row["params"] / before["params"] < 1  # without those of BatchNorm
        assert 0.9 * row["params"] < row["nonzero_params"] <= row["params"]
        assert row["file_mb"] < 0.3 * before["file_mb"]
        assert row["agreement"] > 80  # random weights, noise
    for row, before in zip(int8[1:], floats[1:], strict=True):
        assert row["onnx_mb"] < 0.3 * before["onnx_mb"]


def test_profiles_stand_side_by_side_by_layer_type(quantized_rows):
    _, _, rows = quantized_rows
    profiled = [row for row in rows if row["profile"]]
    lines = {line.pop("ms in"): line for line in benchmark.profile_by_type(profiled)}
    assert all(value > 0 for value in lines["Conv2d"].values())
    assert list(lines["Conv2d"]) == [row["name"] for row in profiled]


def test_a_quantized_layer_is_given_the_time_of_its_kernel_which_runs_when_it_is_read():
    clock = Clock()

    class Late(nn.Module):
        def compute(self, x):
            clock.now += 3
            return x

        def forward(self, x):
            clock.now += 1
            return lambda: self.compute(x)

    class Reader(nn.Module):
        def forward(self, x):
            clock.now += 5
            return x()

    done = benchmark.profile(nn.Sequential(Late(), Reader()), torch.zeros(1), runs=2, clock=clock)
    assert {row["type"]: (row["ms"], row["calls"]) for row in done["types"] if row["ms"]} == {
        "Late": (4000, 1), "Reader": (5000, 1)}  # fmt: skip


def test_a_quantized_network_does_not_take_bf16(quantized_rows):
    folder, _, _ = quantized_rows
    with pytest.raises(ModelError, match=r"int8.pt is quantized: .* not in --dtype bf16"):
        benchmark.main(["--weights", str(folder / "int8.pt"), "--dtype", "bf16", "--out", str(folder)])


def test_an_untrained_network_and_a_dry_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(benchmark, "peak_memory", no_memory)
    flags = ["--backbone", "resnet18", "--head", "linear", "--num-classes", "3", "--size", "33", "47", "--batch", "2"]
    (row,) = benchmark.main([*flags, "--dtype", "bf16", "--dry-run"])
    assert (row["weights"], row["miou"], row["dataset"]) == (None, None, None)
    assert row["reasons"]["miou"] == "the network is untrained"
    assert (row["size"], row["batch"], row["dtype"], row["runs"]) == ([33, 47], 2, "bf16", 2)
    assert row["fps"] == pytest.approx(2000 / row["latency_ms"])
    assert row["file_mb"] == pytest.approx(row["params"] * 4 / 2**20, rel=0.01)
    assert (tmp_path / "checkpoints" / "dry-run" / "benchmark" / "benchmark.json").exists()
    assert not (tmp_path / "checkpoints" / "benchmark.json").exists()


def test_what_cannot_be_measured_is_null_with_the_reason(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "peak_memory", no_memory)

    def broken(*_args, **_options):
        raise RuntimeError("this network\nhas no ONNX")

    monkeypatch.setattr(torch.onnx, "export", broken)
    info = datasets.open_dataset("camvid", "val", root=camvid(tmp_path)).info.to_dict()
    info["classes"], info["palette"] = list(map(str, range(19))), [[0, 0, 0]] * 19
    gone = {"data_root": str(tmp_path / "gone"), "crop": [32, 48]}
    weights = save(tmp_path / "best.pt", data=info, args=gone)
    flags = ["--weights", weights, "--backend", "onnxruntime", "torch", "--runs", "1", "--out", str(tmp_path)]
    first, second = benchmark.main(flags)
    reason = "resnet18 + linear cannot be exported with --opset 18: RuntimeError: this network has no ONNX"
    assert first["reasons"]["latency_ms"] == f"ModelError: export to ONNX failed: ModelError: {reason}"
    assert all(first[key] is None for key in ("latency_ms", "fps", "miou", "peak_memory_mb"))
    assert second["latency_ms"] > 0
    assert second["size"] == [32, 48]  # the crop it was trained on, as its images are gone
    assert second["miou"] is None
    assert "gone" in second["reasons"]["miou"]
    text = (tmp_path / "benchmark.md").read_text()
    assert "No latency_ms of resnet18 + linear, onnxruntime: ModelError: export to ONNX failed" in text


def camvid(folder):
    """A CamVid of one image."""
    from PIL import Image

    for name in ("val", "valannot"):
        (folder / "camvid" / name).mkdir(parents=True)
        Image.new("L" if "annot" in name else "RGB", (8, 8)).save(folder / "camvid" / name / "a.png")
    return folder / "camvid"


# ---- tables and figures ---------------------------------------------------------------------------------------------

NETWORKS = (  # made up: name, file MiB, GMACs, mIoU, ms, compression
    ("dinov2-small + fpn", 97, 5.35, 71.2, 140, []),
    ("resnet18 + unet", 54, 2.9, 66.0, 48, []),
    ("enet", 1.4, 0.5, 58.9, 21, []),
    ("segformer-b0", 14.3, 1.7, 68.2, 60, []),
    ("unet", 118, 12.0, 64.1, 160, []),
    ("lite_deeplabv3", 14.6, 0.9, 63.9, 22.5, []),
    ("fcn_resnet50", 126, 11.0, 69.5, 210, []),
    ("mobilenet_v2 + deeplabv3plus", 12, 1.1, 64.3, 25, []),
    ("resnet18 + unet", 13.6, 2.9, 65.8, 47, [{"step": "quantize", "method": "qat", "bits": 8}]),
    ("resnet18 + unet", 54, 2.9, 65.9, 49, [{"step": "prune", "method": "magnitude"}]),
    ("resnet18 + unet", 30, 1.6, 65.1, 31, [{"step": "prune", "method": "structured"}]),
    ("segformer-b2", 95, 4.5, 73.0, 151, []),
)


def made_up(count=12, backends=("torch",), data=("synthetic",)):
    machine = {"name": "CPU", "abilities": ["avx2"], "cores": 2, "load": 0.0, "versions": {"torch": "2"}}
    rows = []
    for i, dataset, k in itertools.product(range(count), data, range(len(backends))):
        name, mb, macs, miou, ms, compression = NETWORKS[i]
        ms *= 1 - 0.3 * k
        rows.append(
            dict.fromkeys(benchmark.KEYS)
            | dict(weights=f"checkpoints/run{i}-{dataset}/best.pt", model=name, compression=compression)
            | dict(dataset=dataset, backend=backends[k], device="cpu", dtype="float32", threads=2, batch=1)
            | dict(size=[140, 280], params=int(mb * 2e5), macs=int(macs * 1e9), file_mb=mb, latency_ms=ms)
            | dict(latency_iqr_ms=ms / 20, fps=1000 / ms, miou=miou - 20 * (dataset != "synthetic"))
            | dict(reasons={"energy_j": "no RAPL"}, machine=machine)
        )
    benchmark.name_rows(rows)
    return rows


def test_rows_are_named_by_what_tells_them_apart():
    names = [row["name"] for row in made_up()]
    assert names[:2] == ["dinov2-small + fpn", "resnet18 + unet"]
    assert names[8:11] == [f"resnet18 + unet, {s}" for s in ("qat int8", "prune magnitude", "prune structured")]
    two = [row["name"] for row in made_up(2, ("torch", "compile"), ("synthetic", "camvid"))]
    assert two[:2] == ["dinov2-small + fpn, synthetic, torch", "dinov2-small + fpn, synthetic, compile"]
    assert len(set(two)) == 8
    rows = made_up(2)
    rows[0] |= {"model": "resnet18 + unet", "weights": "checkpoints/b/best.pt", "size": [1, 2]}
    benchmark.name_rows(rows)
    assert [row["name"] for row in rows] == ["resnet18 + unet, b", "resnet18 + unet, run1-synthetic"]


def test_json_csv_and_markdown_agree(tmp_path):
    rows = made_up(5, ("torch", "compile"))
    rows[3]["miou"] = None
    rows[4]["reasons"] = {"miou": "a | b"}
    benchmark.write(rows, tmp_path)
    saved = json.loads((tmp_path / "benchmark.json").read_text())
    lines = list(csv.DictReader(io.StringIO((tmp_path / "benchmark.csv").read_text())))
    header, rule, *cells = (tmp_path / "benchmark.md").read_text().split("\n\n")[0].splitlines()
    columns = [c.strip() for c in header.strip("|").split("|")]
    assert len(rule.strip("|").split("|")) == len(columns)
    assert len(saved) == len(lines) == len(cells) == 10
    for row, line, cell in zip(saved, lines, cells, strict=True):
        shown = dict(zip(columns, (c.strip() for c in cell.strip("|").split("|")), strict=True))
        assert shown["network"] == line["name"] == row["name"]
        for column, (key, unit, places) in benchmark.MARKDOWN.items():
            if unit is None or column not in shown:
                continue
            if row[key] is None:
                assert (shown[column], line[key]) == ("-", "")
            else:
                assert float(line[key]) == row[key]
                assert float(shown[column]) == pytest.approx(row[key] / unit, abs=0.51 * 10**-places)
    assert "energy, J" not in columns  # nothing there in any row
    notes = (tmp_path / "benchmark.md").read_text().split("\n\n")[1]
    assert "Measured on CPU, 2 cores (avx2)" in notes
    assert notes.count("no RAPL") == 1


def test_joined_files_keep_the_later_of_two_measurements(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    old, new = made_up(3), made_up(2)
    new[1]["latency_ms"], new[0]["threads"] = 1.0, 8
    evaluate.write_json("old.json", old)
    evaluate.write_json("new.json", new)
    rows = benchmark.main(["--figures-from", "old.json", "new.json", "--out", "joined"])
    assert [(r["model"], r["threads"]) for r in rows] == [
        ("dinov2-small + fpn", 2), ("resnet18 + unet", 2), ("enet", 2), ("dinov2-small + fpn", 8)]  # fmt: skip
    assert rows[1]["latency_ms"] == 1.0
    assert {f.name for f in (tmp_path / "joined").iterdir()} == {f"benchmark.{e}" for e in ("json", "csv", "md", "png")}


@pytest.mark.parametrize("seed", range(5))
def test_pareto_front_equals_brute_force(seed):
    g = torch.Generator().manual_seed(seed)
    values = torch.randint(1, 8, (25, 2), generator=g).tolist()  # few values, so that there are ties
    rows = [{"latency_ms": x, "miou": y} for x, y in values] + [{"latency_ms": None, "miou": 99}]
    rows += [{"latency_ms": 1, "miou": None}]

    def beats(a, b):
        as_good = a["latency_ms"] <= b["latency_ms"] and a["miou"] >= b["miou"]
        return as_good and (a["latency_ms"], a["miou"]) != (b["latency_ms"], b["miou"])

    known = [row for row in rows if None not in row.values()]
    expected = [row for row in known if not any(beats(other, row) for other in known)]
    front = benchmark.pareto(rows)
    assert sorted(map(id, front)) == sorted(map(id, expected))
    assert [row["latency_ms"] for row in front] == sorted(row["latency_ms"] for row in expected)


@pytest.mark.parametrize(
    ("count", "backends", "data"),
    [(10, ("torch",), ("synthetic",)), (12, ("torch",), ("synthetic",)), (6, ("torch", "compile"), ("synthetic",)),
     (5, ("torch",), ("synthetic", "camvid"))],
    ids=["ten", "twelve", "two backends", "two data sets"],
)  # fmt: skip
def test_labels_of_the_figure_keep_apart(count, backends, data, tmp_path):
    rows = made_up(count, backends, data)
    figure = benchmark.draw(rows, tmp_path / "f.png")
    assert (tmp_path / "f.png").stat().st_size < 200_000
    renderer = figure.canvas.get_renderer()
    for axes in figure.subfigs[0].axes:
        boxes = [text.get_window_extent(renderer) for text in axes.texts]
        points = [axes.transData.transform(p.get_offsets()) for p in axes.collections]
        assert len(boxes) == len({(row["latency_ms" if axes is figure.subfigs[0].axes[0] else "macs"], row["miou"])
                                  for row in rows})  # fmt: skip
        for a, b in itertools.combinations(boxes, 2):
            assert min(a.x1, b.x1) - max(a.x0, b.x0) < 1 or min(a.y1, b.y1) - max(a.y0, b.y0) < 1
        for box in boxes:
            assert not any(box.contains(*p) for p in itertools.chain(*points))
            assert axes.get_window_extent().padded(1).contains(box.x0, box.y0)
            assert axes.get_window_extent().padded(1).contains(box.x1, box.y1)


def test_a_figure_without_any_score_shows_the_bars(tmp_path):
    rows = made_up(3)
    for row in rows:
        row["miou"] = None
    figure = benchmark.draw(rows, tmp_path / "f.png")
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["latency and IQR (ms)", "file (MiB)"]
    shown = [math.floor(bar.get_width()) for bar in figure.axes[0].patches]
    assert shown == [140, 48, 21]
