"""Measure checkpoints side by side: latency, size, MACs, memory, energy, mIoU, and the figure of their trade-off.

    python benchmark.py --weights                                          # every checkpoint under checkpoints/
    python benchmark.py --weights checkpoints/a/best.pt checkpoints/b/best.pt --backend torch onnxruntime
    python benchmark.py --backbone resnet18 --head unet --size 512 1024    # an untrained network
    python benchmark.py --figures-from a.json b.json                       # join and draw again, nothing measured

Writes benchmark.json, .csv, .md and .png to --out. A row is one checkpoint on one backend:

latency_ms, latency_iqr_ms: median and interquartile range of one call, images (N, 3, H, W) in memory -> logits
    (N, K, H, W) at full size. Decoding and normalising images, and the arg max, are outside. All networks are loaded
    at once and take turns, a short burst each, so that a machine that drifts slows all of them alike.
macs: multiply-accumulates of one image in convolutions and matrix products, attention's included, padding to the stride
    too; nothing for norms, activations, pooling, resizing. A layer that computes in another operation counts as none.
peak_memory_mb: MiB, of a fresh process that loads the network and runs it: its peak resident set on a CPU (of which
    memory_added_mb came after the imports), the most that PyTorch had allocated on a GPU. ONNX backends run without
    PyTorch in that process.
energy_j: joules an image above those of the idle machine, by RAPL or NVML. They meter the package or the GPU, so
    whatever else runs there counts as well.
miou: of evaluate.evaluate() on the checkpoint's own val split and size, in PyTorch and in the dtype measured.
    agreement says how many percent of the pixels (of noise) a row puts into the class that PyTorch's float32 does, and
    for a quantized network its int8 kernels.

    machine says, where a quantized network is among them, what attention runs in, chosen by a short trial.

What cannot be measured is null, and `reasons` says why.
"""

if __name__ == "__main__":  # the imports take seconds: Ctrl-C ends them without a traceback
    import signal

    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import contextlib
import csv
import importlib
import importlib.metadata
import importlib.util
import inspect
import io
import itertools
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from tqdm import tqdm

import datasets
import evaluate
import export_onnx
from datasets import DATASETS, DataError, eval_loader
from evaluate import ROOT
from int8 import attention_line, is_quantized, kernels, simulated, watched
from models import (
    BACKBONES,
    HEADS,
    NETWORKS,
    ModelError,
    build_model,
    compression_summary,
    count_params,
    fold_batchnorm,
    load_checkpoint,
    model_name,
    read_checkpoint,
    write_text,
)

DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}
WARM_UP = 10  # calls of each network before any is timed
BURST = 5  # timed calls of a network in its turn
PAUSE = 0.05  # seconds before a turn: the thread pools of the network before it stop spinning

# ---- networks -------------------------------------------------------------------------------------------------------


def discover(folder):
    """Paths of the finished checkpoints under `folder`, sorted; what is none of them is named on stderr.

    What has training state (last.pt) is left out: the weights that count stand beside it. So are the folder dry-run,
    and those in which earlier runs are kept aside.
    """
    found = []
    for path in sorted(Path(folder).rglob("*.pt")):
        if any(part == "dry-run" or part.startswith("kept-") for part in path.relative_to(folder).parts[:-1]):
            continue
        try:
            if "training" not in read_checkpoint(path):
                found.append(str(path))
        except (ModelError, OSError) as error:
            print(f"skipped: {error}", file=sys.stderr)
    if not found:
        raise ModelError(f"no checkpoint under {folder}/: `python train.py --head fpn` writes {ROOT}/train/best.pt")
    return found


def load_network(weights, build):
    """(network in eval mode on the CPU, checkpoint dict or None): from a file, or untrained from `build`."""
    if weights is not None:
        return load_checkpoint(weights)
    torch.manual_seed(0)
    return build_model(**build).eval(), None


def for_inference(model, device, dtype):
    """The network as it is timed and scored: eval mode, BatchNorm folded, channels_last, weights cast to `dtype`.

    Changed in place. channels_last is what convolutions run fastest in, and transformers do not mind. Casting is faster
    than autocast, which casts the weights again in every call. A BatchNorm that could not be folded keeps float32
    statistics, which bfloat16 would round. A quantized network has been folded when it was quantized.
    """
    if not is_quantized(model):
        fold_batchnorm(model.eval())
    model = model.to(device, dtype, memory_format=torch.channels_last)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.float()
    return model


def make_images(shape, device="cpu", dtype=torch.float32):
    """Noise (N, 3, H, W), the same at every call; dense layers take as long for it as for a photograph."""
    images = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return images.to(device, dtype, memory_format=torch.channels_last)


# ---- backends -------------------------------------------------------------------------------------------------------
# make(model, images, dtype, threads, path) -> a callable without arguments that returns the logits once they are there.
# model: from for_inference(). images: float32. path: the network as ONNX, for these images.


def torch_runner(model, images, dtype, threads=None, path=None):
    images = images.to(dtype)
    synchronize = torch.cuda.synchronize if images.is_cuda else lambda: None

    def run():
        with torch.inference_mode():
            logits = model(images)
        synchronize()
        return logits

    return run


def compile_runner(model, images, dtype, threads=None, path=None):
    return torch_runner(evaluate.compiled(model, model), images, dtype)


def file_runner(open_file):
    """The `make` of a backend that runs an ONNX file, on the CPU."""

    def make(model, images, dtype, threads, path):
        session, array = open_file(path, threads, dtype == torch.bfloat16), images.contiguous().numpy()
        return lambda: torch.from_numpy(session(array))

    return make


# These two use no other name of this file: a fresh process without PyTorch runs their source, see peak_memory().


def open_onnxruntime(path, threads, bf16):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda images: session.run(None, {name: images})[0]


def open_openvino(path, threads, bf16):
    import openvino

    config = {
        "INFERENCE_NUM_THREADS": threads,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "bf16" if bf16 else "f32",  # left to itself it computes in bfloat16 where it can
    }
    network = openvino.Core().compile_model(path, "CPU", config)
    return lambda images: network([images], share_inputs=True, share_outputs=True)[0]


class Backend(NamedTuple):
    """One way to run a network: how, in which dtypes, the package it needs, what opens an ONNX file if it runs one."""

    make: Callable
    dtypes: tuple = ("float32", "bf16")
    package: str = "torch"
    open_file: Callable | None = None


BACKENDS = {
    "torch": Backend(torch_runner),
    "compile": Backend(compile_runner),
    "onnxruntime": Backend(file_runner(open_onnxruntime), ("float32",), "onnxruntime", open_onnxruntime),
    "openvino": Backend(file_runner(open_openvino), ("float32", "bf16"), "openvino", open_openvino),
}


def check_backend(name, dtype, device):
    """ModelError where the backend is not installed, or does not run this dtype or device."""
    row = BACKENDS[name]
    if importlib.util.find_spec(row.package) is None:
        raise ModelError(f"--backend {name} needs its package: pip install {row.package}")
    if dtype not in row.dtypes:
        raise ModelError(f"--backend {name} runs {', '.join(row.dtypes)} only, not --dtype {dtype}")
    if row.open_file and device.type != "cpu":
        raise ModelError(f"--backend {name} is measured on the CPU only: --device cpu")


# ---- time -----------------------------------------------------------------------------------------------------------


def interleave(runs, count, *, burst=BURST, pause=PAUSE, clock=time.perf_counter, sleep=time.sleep, progress=False):
    """Seconds of `count` timed calls of each of `runs`, which take turns -> one list each.

    A turn is a pause, one call that is not timed, as it finds the caches full of another network, and `burst` timed
    ones.
    """
    seconds = [[] for _ in runs]
    for done in tqdm(range(0, count, burst), desc="latency", leave=False, disable=not progress or None):
        for run, timed in zip(runs, seconds, strict=True):
            sleep(pause)
            run()
            for _ in range(min(burst, count - done)):
                start = clock()
                run()
                timed.append(clock() - start)
    return seconds


def latency(seconds, batch):
    """Keys of a row from the seconds of its timed calls, each of `batch` images."""
    low, median, high = statistics.quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else seconds * 3
    return {
        "latency_ms": 1000 * median,
        "latency_iqr_ms": 1000 * (high - low),
        "latency_min_ms": 1000 * min(seconds),
        "fps": batch / median,
    }


def profile(model, images, *, runs, clock=time.perf_counter):
    """Where the time goes: {"types", "slowest", "hooks_add_percent"}, of `runs` calls with a clock at each module.

    The time of a module is its own: what its children took is subtracted, and what its forward() computes by itself
    (resizing, concatenating, attention's products) stands under its name; so the times add up to the whole. A quantized
    layer computes when its output is read: that is its own time, not that of the reader.
    hooks_add_percent: by how much the clocks slow the whole down, by the medians of calls with and without them in
    turn. On a GPU, where each clock waits for the kernels before it, that is a lot.
    """
    names = {module: name or "(network)" for name, module in model.named_modules()}
    own, calls, stack = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0), []
    synchronize = torch.cuda.synchronize if images.is_cuda else lambda: None
    run = torch_runner(model, images, images.dtype)

    def enter(_module, _inputs):
        synchronize()
        stack.append([clock(), 0.0])  # start, seconds of the children

    def leave(module, _inputs, _output):
        close(module)
        calls[module] += 1

    def close(module):
        synchronize()
        start, inner = stack.pop()
        total = clock() - start
        own[module] += total - inner
        if stack:
            stack[-1][1] += total

    def timed(layer, compute, *args):
        enter(layer, args)
        y = compute(*args)
        close(layer)
        return y

    late = [module for module in names if hasattr(module, "compute")]
    plain, hooked = [], []
    run()
    for _ in range(runs):
        for seconds, hooks in ((plain, ()), (hooked, names)):
            handles = [m.register_forward_pre_hook(enter) for m in hooks]
            handles += [m.register_forward_hook(leave) for m in hooks]
            with watched(late if hooks else (), in_compute=timed):
                start = clock()
                run()
                seconds.append(clock() - start)
            for handle in handles:
                handle.remove()

    def line(modules):
        ms = 1000 * sum(own[m] for m in modules) / runs
        percent = 100 * ms * runs / (1000 * sum(own.values()))
        return {"ms": ms, "percent": percent, "calls": sum(calls[m] for m in modules) // runs}

    types = {}
    for module in names:
        types.setdefault(type(module).__name__, []).append(module)
    slowest = sorted(names, key=own.get, reverse=True)[:10]
    return {
        "types": sorted(({"type": k} | line(ms) for k, ms in types.items()), key=lambda r: -r["ms"]),
        "slowest": [{"layer": names[m], "type": type(m).__name__} | line([m]) for m in slowest],
        "hooks_add_percent": 100 * (statistics.median(hooked) / statistics.median(plain) - 1),
    }


# ---- memory ---------------------------------------------------------------------------------------------------------


def status_mb(field):
    """MiB of this process by /proc: VmHWM, its peak resident set, or VmRSS, the present one.

    getrusage() would not do: the peak that it gives may be that of the parent, before this process was what it is.
    """
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) / 1024 for line in file if line.startswith(field + ":"))


def fresh_run(weights, build, backend, device, dtype, shape, threads, calls=3):
    """What a fresh process reports of a network that it loads and runs -> MiB {"peak_memory_mb", "memory_added_mb"}."""
    torch.set_num_threads(threads)
    evaluate.keep_freed_memory()
    device, dtype = torch.device(device), DTYPES[dtype]
    with torch.device("meta"):
        build_model(**build)  # imports what this network needs, so that it counts as imported
    before = None if device.type == "cuda" else status_mb("VmRSS")
    model = for_inference(load_network(weights, build)[0], device, dtype)
    run = BACKENDS[backend].make(model, make_images(shape, device), dtype)
    for _ in range(calls):
        run()
    if device.type == "cuda":
        return {"peak_memory_mb": evaluate.peak_memory_mb(device), "memory_added_mb": None}
    peak = status_mb("VmHWM")
    return {"peak_memory_mb": peak, "memory_added_mb": peak - before}


def fresh_file_run(open_file, package, path, shape, threads, bf16, calls=3):
    """fresh_run() of an ONNX file, where PyTorch is not imported: uses no name of this file but status_mb()."""
    import importlib

    import numpy

    importlib.import_module(package)
    before = status_mb("VmRSS")
    run, images = open_file(path, threads, bf16), numpy.random.rand(*shape).astype("float32")
    for _ in range(calls):
        run(images)
    peak = status_mb("VmHWM")
    return {"peak_memory_mb": peak, "memory_added_mb": peak - before}


def peak_memory(backend, *, weights, build, device, dtype, shape, threads, path=None):
    """fresh_run() or fresh_file_run() in a new process -> its dict; ModelError with its last words if it fails."""
    row = BACKENDS[backend]
    spec = dict(shape=shape, threads=threads)
    if row.open_file:
        sources = [inspect.getsource(f) for f in (status_mb, row.open_file, fresh_file_run)]
        code = "\n".join(sources) + f"\nreport = fresh_file_run({row.open_file.__name__}, **spec)"
        spec |= dict(package=row.package, path=path, bf16=dtype == "bf16")
    else:
        code = "import benchmark\nreport = benchmark.fresh_run(**spec)"
        spec |= dict(weights=weights, build=build, backend=backend, device=str(device), dtype=dtype)
    code = f"import json, sys\nspec = json.loads(sys.argv[1])\n{code}\nprint(json.dumps(report))"
    paths = [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(spec)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(p for p in paths if p)},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise ModelError(f"the fresh process failed: {lines[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


# ---- the machine ----------------------------------------------------------------------------------------------------

CPU_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8", "amx_bf16")


def describe_machine(device, cpuinfo="/proc/cpuinfo"):
    """What the numbers hold for: {"name", "abilities", "cores", "load", "versions"}, plain types."""
    fields = {}
    if os.path.exists(cpuinfo):
        lines = (line.partition(":") for line in Path(cpuinfo).read_text().splitlines())
        fields = {key.strip(): value.strip() for key, _, value in lines}
    name = fields.get("model name") or platform.processor() or platform.machine()
    flags = set((fields.get("flags") or fields.get("Features") or "").split())
    abilities = [flag for flag in CPU_FLAGS if flag in flags]
    if device.type == "cuda":
        name = f"{torch.cuda.get_device_name(device)} ({name})"
        abilities = ["bf16"] if torch.cuda.is_bf16_supported(including_emulation=False) else []
        abilities += ["int8"] if torch.cuda.get_device_capability(device) >= (7, 5) else []  # tensor cores
        abilities += ["tf32 in convolutions"] if torch.backends.cudnn.allow_tf32 else []
    packages = ("torch", "torchvision", "transformers", "onnx", "onnxruntime", "openvino")
    versions = {"python": platform.python_version()}
    for package in packages:
        if importlib.util.find_spec(package) is not None:
            versions[package] = importlib.metadata.version(package)
    return {
        "name": name,
        "abilities": abilities,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load": round(os.getloadavg()[0], 2),  # processes that ran in the minute before: above 0 others were busy
        "versions": versions,
    }


def machine_line(machine):
    """One line of text for what describe_machine() gives."""
    versions = ", ".join(f"{k} {v}" for k, v in machine["versions"].items())
    abilities = ", ".join(machine["abilities"]) or "no int8 or bfloat16 instructions"
    attention = f"; attention in int8 networks: {machine['int8_attention']}" if "int8_attention" in machine else ""
    load = f"load before {machine['load']}"
    return f"{machine['name']}, {machine['cores']} cores ({abilities}); {versions}; {load}{attention}"


# ---- rows -----------------------------------------------------------------------------------------------------------


class Subject(NamedTuple):
    """One network to measure, and what all its rows share."""

    weights: str | None
    build: dict
    model: nn.Module
    dataset: object  # val split, or None
    shape: tuple  # (N, 3, H, W)
    about: dict  # keys of a row
    reasons: dict  # key of a row -> why it is null


def open_subject(weights, build, *, size, batch, dry_run, dtype="float32"):
    """Load one network, find its data, count it -> Subject, the network still in float32."""
    model, checkpoint = load_network(weights, build)
    if is_quantized(model) and dtype != "float32":
        raise ModelError(f"{weights} is quantized: it computes in int8 and float32, not in --dtype {dtype}")
    dataset, reasons = None, {}
    if checkpoint is None:
        reasons["miou"] = "the network is untrained"
        trained_size, state = DATASETS["synthetic"].size, {"state_dict": model.state_dict()}
    else:
        trained_size, state = checkpoint["data"]["size"], checkpoint
        try:
            dataset = evaluate.open_scored(checkpoint, weights=weights, length=2 if dry_run else None)
            trained_size = trained_size or dataset.raw(0)[0].shape[-2:]
        except DataError as error:
            reasons["miou"] = str(error)
            row = DATASETS.get(checkpoint["data"]["name"])
            trained_size = trained_size or checkpoint["args"].get("crop") or (row and row.crop)
    size = size or trained_size
    if not size:
        raise ModelError(f"{weights}: how large are its images? Its data are not here to tell; give --size H W")
    shape = (batch, 3, *map(int, size))
    with simulated(model) if is_quantized(model) else contextlib.nullcontext():  # its int8 kernels count as nothing
        macs = evaluate.count_macs(model, make_images(shape))
    about = {
        "weights": weights,
        "model": model_name(model.build),
        "compression": compression_summary(checkpoint["compression"]) if checkpoint else [],
        "pretrained": checkpoint["pretrained"] if checkpoint else "no",
        "dataset": checkpoint["data"]["name"] if checkpoint else None,
        "size": list(shape[2:]),
        "batch": batch,
        "params": count_params(model)[0],
        "nonzero_params": nonzero_params(model),
        "macs": macs,
        "file_mb": evaluate.weights_mb(weights, state),
    }
    return Subject(weights, dict(model.build), model, dataset, shape, about, reasons)


@torch.no_grad()
def nonzero_params(model):
    """How many parameters are not 0, quantized ones included."""
    quantized = [m.weight for m in model.modules() if getattr(m, "quantized_params", 0)]
    return sum(int(p.count_nonzero()) for p in (*model.parameters(), *quantized))


def open_rows(subject, backends, *, device, dtype, threads, folder):
    """(row, callable or None) of one subject on each backend; prepares its network. What fails becomes a reason."""
    images = make_images(subject.shape)
    path, export_error = None, None
    with torch.inference_mode():
        expected = subject.model(images)
    if any(BACKENDS[name].open_file for name in backends):
        path = str(Path(folder) / f"{len(os.listdir(folder))}.onnx")
        try:
            export_onnx.export(subject.model, path, size=subject.shape[2:], batch=subject.shape[0])
        except Exception as error:  # whatever the exporter meets in a network
            export_error = export_onnx.first_words(error)
    model = for_inference(subject.model, device, DTYPES[dtype])
    rows = []
    for name in backends:
        row = subject.about | {"backend": name, "device": device.type, "dtype": dtype, "threads": threads}
        row |= {"onnx_mb": None, "reasons": dict(subject.reasons)}
        run = None
        try:
            if BACKENDS[name].open_file:
                if export_error:
                    raise ModelError(f"export to ONNX failed: {export_error}")
                row["onnx_mb"] = os.path.getsize(path) / 2**20
            run = BACKENDS[name].make(model, images.to(device), DTYPES[dtype], threads, path)
            row |= deviation(run().float().cpu(), expected)
        except Exception as error:  # one network that one backend cannot run must not lose the others' rows
            run, row["reasons"]["latency_ms"] = None, export_onnx.first_words(error)
        rows.append((row, run, path))
    return rows


def deviation(logits, expected):
    """How far logits are from PyTorch's in float32, and how many percent of the pixels get the same class."""
    same = (logits.max(1).indices == expected.max(1).indices).double().mean()
    return {"agreement": 100 * same.item(), "max_difference": (logits - expected).abs().max().item()}


def score(subject, device, dtype):
    """mIoU in percent of the prepared network on its val split, or None where nothing there is labelled."""
    batches = ((images.to(DTYPES[dtype]), target) for images, target in eval_loader(subject.dataset))
    info = subject.dataset.info
    shared = dict(num_classes=len(info.classes), ignore_index=info.ignore_index, boundary=False, progress=True)
    miou = evaluate.evaluate(subject.model, batches, device=device, **shared)["miou"]
    return None if math.isnan(miou) else miou


KEYS = (
    "weights", "name", "model", "compression", "pretrained", "dataset", "backend", "device", "dtype", "threads",
    "batch", "size", "params", "nonzero_params", "macs", "file_mb", "onnx_mb", "latency_ms", "latency_iqr_ms",
    "latency_min_ms", "fps", "runs", "peak_memory_mb", "memory_added_mb", "energy_j", "idle_watts", "miou",
    "miou_per_ms", "agreement", "max_difference", "reasons", "machine",
)  # fmt: skip


def measure(wanted, *, backends, device, dtype, threads, runs, size, batch, miou, with_profile, dry_run):
    """Rows of benchmark.json for `wanted`, a list of (weights, None) or (None, arguments of build_model())."""
    machine = describe_machine(device)
    if machine["load"] > 0.5:
        print(f"warning: this machine was busy (load {machine['load']}): latencies are too high", file=sys.stderr)
    torch.set_num_threads(threads)
    try:
        meter, no_energy = evaluate.energy_meter(device), None
    except OSError as error:
        meter, no_energy = None, str(error)
    with tempfile.TemporaryDirectory() as folder:
        entries = []  # (subject, row, callable or None, ONNX file or None)
        for weights, build in tqdm(wanted, desc="load", leave=False, disable=None):
            try:
                subject = open_subject(weights, build, size=size, batch=batch, dry_run=dry_run, dtype=dtype)
                opened = open_rows(subject, backends, device=device, dtype=dtype, threads=threads, folder=folder)
            except Exception as error:  # one file that is no good must not lose the others' rows
                if len(wanted) == 1:
                    raise
                known = isinstance(error, (ModelError, DataError))
                print(f"skipped: {error if known else f'{weights}: {export_onnx.first_words(error)}'}", file=sys.stderr)
                continue
            entries += [(subject, *rest) for rest in opened]
        if not entries:
            raise ModelError("none of the networks can be measured")
        if any(is_quantized(subject.model) for subject, *_ in entries) and kernels():
            machine["int8_attention"] = attention_line()
        running = [entry for entry in entries if entry[2]]
        for *_, run, _ in running:
            for _ in range(1 if dry_run else WARM_UP):
                run()
        seconds = interleave([run for *_, run, _ in running], runs, progress=True)
        for (_, row, run, _), timed in zip(running, seconds, strict=True):
            row |= latency(timed, batch) | {"runs": len(timed)}
            if meter:
                row |= evaluate.measure_energy(run, meter, seconds=0.1 if dry_run else 2, batch=batch)
        for subject, row, _, path in tqdm(running, desc="memory", leave=False, disable=None):
            common = dict(device=device, dtype=dtype, shape=subject.shape, threads=threads, path=path)
            try:
                row |= peak_memory(row["backend"], weights=subject.weights, build=subject.build, **common)
            except ModelError as error:
                row["reasons"]["peak_memory_mb"] = str(error)
    scores = {}
    for subject, row, run, _ in entries:
        if with_profile and row["backend"] == "torch" and run:
            images = make_images(subject.shape, device, DTYPES[dtype])
            row["profile"] = profile(subject.model, images, runs=2 if dry_run else 10)
        if not miou:
            row["reasons"]["miou"] = "--no-miou"
        elif subject.dataset is not None:
            if id(subject) not in scores:
                scores[id(subject)] = score(subject, device, dtype)
            row["miou"] = scores[id(subject)]
        if row.get("miou") is not None and row.get("latency_ms"):
            row["miou_per_ms"] = row["miou"] / row["latency_ms"]
        if no_energy:
            row["reasons"]["energy_j"] = no_energy
        row["machine"] = machine
    extra = {"profile"} if with_profile else set()
    return [{key: row.get(key) for key in (*KEYS, *extra)} for _, row, _, _ in entries]


def compression_text(steps):
    """The compression steps of a checkpoint in a few words, in the order applied; "" where there are none."""
    texts = []
    for step in steps or ():
        words = step.values() if isinstance(step, dict) else [step]
        if isinstance(step, dict) and "bits" in step:
            words = (step["method"], f"int{step['bits']}")
        texts.append(" ".join(str(w) for w in words if isinstance(w, str)))
    return " + ".join(texts)


def name_rows(rows):
    """Set row["name"]: the network and its compression and, where several share that, whatever tells them apart."""
    parts = [
        lambda r: r["dataset"] or "no data",
        lambda r: Path(r["weights"]).parent.name if r["weights"] else "untrained",
        lambda r: r["weights"],
        *(lambda r, k=k: r[k] for k in ("backend", "dtype", "device")),
        lambda r: "x".join(map(str, r["size"])),
        *(lambda r, k=k: f"{r[k]} {k}" for k in ("threads", "batch")),
    ]
    for row in rows:
        row["name"] = ", ".join(filter(None, (row["model"], compression_text(row["compression"]))))
    for part in parts:
        groups = {}
        for row in rows:
            groups.setdefault(row["name"], []).append(row)
        for group in groups.values():
            texts = [part(row) for row in group]
            if len(set(texts)) > 1:
                for row, text in zip(group, texts, strict=True):
                    row["name"] += f", {text}"


def merge(files):
    """The rows of several benchmark.json; of two that measured the same thing on the same machine, the later one."""
    rows = {}
    for path in files:
        if not Path(path).is_file():
            raise DataError(f"--figures-from {path}: no such file")
        try:
            loaded = json.loads(Path(path).read_text())
            for row in loaded:
                what = [row[k] for k in ("weights", "model", "backend", "device", "dtype", "threads", "batch", "size")]
                rows[json.dumps([*what, row["machine"]["name"]])] = row
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path} is no benchmark.json of this script ({type(error).__name__}: {error})") from None
    if not rows:
        raise DataError(f"{', '.join(map(str, files))}: no row to draw")
    return list(rows.values())


def pareto(rows, cost="latency_ms", gain="miou"):
    """The rows that no other beats: none is as good in both and better in one. Sorted by cost; nulls are left out."""
    front, best = [], -math.inf
    known = [row for row in rows if row[cost] is not None and row[gain] is not None]
    for row in sorted(known, key=lambda r: (r[cost], -r[gain])):
        if row[gain] > best or (front and row[cost] == front[-1][cost] and row[gain] == best):
            front.append(row)
            best = row[gain]
    return front


# ---- output ---------------------------------------------------------------------------------------------------------


def csv_text(rows):
    """The rows as CSV, numbers in full; what is null is empty, and nested values are put in words."""
    words = {
        "compression": compression_text,
        "size": lambda size: "x".join(map(str, size)),
        "reasons": lambda reasons: "; ".join(f"{k}: {v}" for k, v in reasons.items()),
        "machine": machine_line,
    }
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(KEYS)
    for row in rows:
        writer.writerow(words[k](row[k]) if k in words else "" if row[k] is None else row[k] for k in KEYS)
    return out.getvalue()


MARKDOWN = {  # column -> (key, what a number is divided by, decimals)
    "network": ("name", None, 0),
    "backend": ("backend", None, 0),
    "dtype": ("dtype", None, 0),
    "threads": ("threads", 1, 0),
    "input": ("size", None, 0),
    "parameters, M": ("params", 1e6, 2),
    "MACs, G": ("macs", 1e9, 2),
    "file, MiB": ("file_mb", 1, 1),
    "latency, ms": ("latency_ms", 1, 1),
    "IQR, ms": ("latency_iqr_ms", 1, 1),
    "images/s": ("fps", 1, 1),
    "peak memory, MiB": ("peak_memory_mb", 1, 0),
    "energy, J": ("energy_j", 1, 3),
    "mIoU, %": ("miou", 1, 2),
    "mIoU/ms": ("miou_per_ms", 1, 2),
}


def table(rows):
    """The rows as dicts of text, by column of MARKDOWN; a column without any value is left out."""

    def text(row, key, unit, places):
        value = row[key]
        if value is None:
            return "-"
        if key == "size":
            return " x ".join(map(str, value))
        return value if unit is None else f"{value / unit:.{places}f}"

    columns = {c: how for c, how in MARKDOWN.items() if any(row[how[0]] is not None for row in rows)}
    return [{column: text(row, *how) for column, how in columns.items()} for row in rows]


def notes(rows):
    """Lines below a table: the machines, then why which values are missing, each once."""
    machines = list(dict.fromkeys(machine_line(row["machine"]) for row in rows))
    missing = {}
    for row in rows:
        for key, reason in row["reasons"].items():
            missing.setdefault((key, reason), []).append(row["name"])
    lines = [f"Measured on {machine}." for machine in machines]
    for (key, reason), names in missing.items():
        where = "" if len(names) == len(rows) else f" of {', '.join(names)}"
        lines.append(f"No {key}{where}: {reason}.")
    return lines


def markdown_text(rows):
    """The rows as a Markdown table, rounded, with notes() below it."""
    lines = table(rows)
    right = [how[1] is not None for how in (MARKDOWN[c] for c in lines[0])]
    cells = [lines[0].keys(), ["---:" if r else "---" for r in right], *(line.values() for line in lines)]
    escaped = ("| " + " | ".join(str(c).replace("|", "\\|") for c in line) + " |" for line in cells)
    return "\n".join([*escaped, "", *(f"{note}  " for note in notes(rows))]) + "\n"


def draw(rows, path):
    """Figure of the rows: mIoU over latency and over MACs with their Pareto fronts, then bars of all rows.

    A data set at a size has a colour and a front of its own, as scores on two of them cannot be compared; a backend has
    a marker. The bars' mIoU stands beside its difference to the first row of the same data set, for ablations.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [
        row | {"name": name} for row, name in zip(rows, evaluate.drawable([row["name"] for row in rows]), strict=True)
    ]
    scored = any(row["miou"] is not None and row["latency_ms"] for row in rows)
    low = 0.27 * len(rows) + 1.0  # inches
    figure = Figure(figsize=(13, (5.2 if scored else 0) + low), layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subfigures(2, 1, height_ratios=(5.2, low)) if scored else (None, figure)
    draw_bars(below.subplots(1, 3 if scored else 2, sharey=True), rows)
    if scored:
        left, right = above.subplots(1, 2)
        labels = [
            draw_scatter(left, rows, "latency_ms", 1, "latency (ms)"),
            draw_scatter(right, rows, "macs", 1e9, "MACs (G)"),
        ]
        handles, names = left.get_legend_handles_labels()
        if len(names) > 1:
            above.legend(handles, names, loc="outside upper left", ncols=4, fontsize=8, frameon=False)
        figure.draw_without_rendering()  # only now is it known where everything stands
        figure.set_layout_engine("none")
        for axes, points in zip((left, right), labels, strict=True):
            place_labels(axes, points)
    evaluate.save_figure(figure, path)
    return figure


def draw_scatter(axes, rows, cost, unit, label):
    """Points of mIoU over row[cost] / unit with the Pareto fronts -> [(x, y, text)], what is left to label."""
    from matplotlib.ticker import LogLocator, NullFormatter

    points = [row for row in rows if row[cost] and row["miou"] is not None]
    groups = list(dict.fromkeys((row["dataset"], *row["size"]) for row in points))
    backends = list(dict.fromkeys(row["backend"] for row in points))
    for i, group in enumerate(groups):
        members = [row for row in points if (row["dataset"], *row["size"]) == group]
        front = pareto(members, cost)
        x, y = [row[cost] / unit for row in front], [row["miou"] for row in front]
        axes.plot(x, y, color=f"C{i}", linewidth=1, alpha=0.6, drawstyle="steps-post", zorder=1)
        for backend, marker in zip(backends, "osD^vP*X", strict=False):
            shown = [row for row in members if row["backend"] == backend]
            name = f"{group[0]} {group[1]} x {group[2]}, {backend}"
            axes.scatter(
                [row[cost] / unit for row in shown],
                [row["miou"] for row in shown],
                s=36,
                marker=marker,
                color=f"C{i}",
                label=name if shown else None,
            )
    values = [row[cost] for row in points]
    if max(values) > 8 * min(values):
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter(NullFormatter())
    axes.margins(0.12)
    axes.set(xlabel=label, ylabel="mIoU (%)")
    axes.grid(color="0.92")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    texts = {}  # backends may share a point: it is labelled once, with what their names have in common
    for row in points:
        texts.setdefault((row[cost] / unit, row["miou"]), []).append(row["name"])
    labels = []
    for (x, y), names in texts.items():
        shared = [part for part in names[0].split(", ") if all(part in name.split(", ") for name in names)]
        labels.append((x, y, ", ".join(shared or names[:1])))
    return labels


def place_labels(axes, points):
    """Write the text of each (x, y, text) as near to it as it covers no point, no line, no other text and no border.

    A thin line leads to the point where the text had to go far.
    """
    figure = axes.get_figure(root=True)
    renderer, pixel = figure.canvas.get_renderer(), figure.dpi / 72  # pixels a typographic point
    inside = axes.get_window_extent(renderer).extents
    where = axes.transData.transform([(x, y) for x, y, _ in points])
    taken = [(x - 4 * pixel, y - 4 * pixel, x + 4 * pixel, y + 4 * pixel) for x, y in where]
    for line in axes.lines:  # the fronts: steps, each first across and then up
        corners = axes.transData.transform(line.get_xydata())
        for (x0, y0), (x1, y1) in itertools.pairwise(corners):
            taken += [(x0, y0 - 1, x1, y0 + 1), (x1 - 1, y0, x1 + 1, y1)]

    def overlap(a, b):
        return max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))

    for (x, y, text), (px, py) in zip(points, where, strict=True):
        label = axes.annotate(text, (x, y), (0, 0), textcoords="offset points", fontsize=8)
        extent = label.get_window_extent(renderer)
        choices = []
        for distance in (7, 12, 18, 25, 34, 45, 60, 80, 100):  # typographic points
            for angle in range(0, 360, 20):
                dx, dy = (distance * pixel * f(math.radians(angle)) for f in (math.cos, math.sin))
                left, bottom = px + dx - (extent.width if dx < 0 else 0), py + dy - extent.height / 2
                box = (left, bottom, left + extent.width, bottom + extent.height)
                covered = sum(overlap(box, other) for other in taken)
                covered += extent.width * extent.height - overlap(box, inside)
                choices.append((round(covered), distance, box))
        _, distance, box = min(choices)
        taken.append(box)
        label.set_position(((box[0] - px) / pixel, (box[1] - py) / pixel))
        if distance > 12:
            near = (max(box[0], min(px, box[2])), max(box[1], min(py, box[3])))
            ends = axes.transData.inverted().transform([(px, py), near])
            axes.plot(*ends.T, color="0.6", linewidth=0.6, zorder=0, scalex=False, scaley=False)


def draw_bars(panels, rows):
    """Bars of latency (with IQR), file size and, on a third panel, mIoU; the rows' names stand on the left."""
    places = range(len(rows))
    columns = [("latency_ms", "latency and IQR (ms)"), ("file_mb", "file (MiB)"), ("miou", "mIoU (%)")]
    for axes, (key, title) in zip(panels, columns, strict=False):
        values = [row[key] or 0 for row in rows]
        errors = [(row["latency_iqr_ms"] or 0) / 2 for row in rows] if key == "latency_ms" else None
        axes.barh(places, values, xerr=errors, height=0.7, color="C0", alpha=0.75, error_kw=dict(lw=1, capsize=2))
        for i, row in enumerate(rows):
            text = "-" if row[key] is None else f"{row[key]:.1f}"
            if key == "miou":
                alike = [r["miou"] for r in rows if r["dataset"] == row["dataset"] and r["miou"] is not None]
                text += f"  {row[key] - alike[0]:+.1f}" if row[key] is not None and row[key] != alike[0] else ""
            end = values[i] + (errors[i] if errors else 0)
            axes.annotate(text, (end, i), (4, 0), textcoords="offset points", va="center", fontsize=8)
        axes.set_xlim(0, 1.25 * max(1e-9, *(v + e for v, e in zip(values, errors or [0] * len(rows), strict=True))))
        axes.set_title(title, loc="left", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="x", color="0.92")
        axes.set_axisbelow(True)
    panels[0].set_yticks(places, [row["name"] for row in rows], fontsize=8)
    panels[0].set_ylim(len(rows) - 0.4, -0.6)


def write(rows, out):
    """Write the rows as benchmark.json, .csv, .md and .png into the folder `out`."""
    name_rows(rows)
    evaluate.write_json(out / "benchmark.json", rows)
    for kind, text in (("csv", csv_text(rows)), ("md", markdown_text(rows))):
        write_text(out / f"benchmark.{kind}", text)
    draw(rows, out / "benchmark.png")


def profile_by_type(rows):
    """A line for each layer type, with its milliseconds in each row; QuantConv2d and so on stand beside Conv2d."""
    lines = {}
    for row in rows:
        for found in row["profile"]["types"]:
            line = lines.setdefault(found["type"].removeprefix("Quant"), {})
            line[row["name"]] = line.get(row["name"], 0.0) + found["ms"]
    slowest = sorted(lines, key=lambda name: -max(lines[name].values()))
    return [{"ms in": name} | {row["name"]: lines[name].get(row["name"]) for row in rows} for name in slowest]


def print_profile(row):
    """The two tables of --profile for one row."""
    print(f"\n{row['name']}: the clocks at each layer add {row['profile']['hooks_add_percent']:.1f}% to the whole")
    evaluate.print_table(row["profile"]["types"])
    print()
    evaluate.print_table(row["profile"]["slowest"])


# ---- command line ---------------------------------------------------------------------------------------------------


def make_parser():
    parser = datasets.Parser(__doc__)
    add, yes_no = parser.add_argument, argparse.BooleanOptionalAction
    add("--weights", nargs="*", metavar="FILE|DIR", help=f"checkpoints; without a value, all under {ROOT}/")
    add("--model", choices=NETWORKS, help="measure this whole network, untrained")
    add("--backbone", choices=BACKBONES, help="measure this encoder with --head, untrained")
    add("--head", choices=HEADS, help="measure this decoder with --backbone, untrained")
    add("--num-classes", type=datasets.whole(2, 10_000), default=19, help="classes of an untrained network")
    add("--backend", nargs="+", choices=BACKENDS, default=["torch"], help="what runs the networks")
    add("--size", type=datasets.pixels, nargs=2, metavar=("H", "W"), help="pixels; left out: that of its data or crop")
    add("--batch", type=datasets.positive_int, default=1, help="images a call")
    add("--dtype", choices=DTYPES, default="float32", help="of weights, activations and logits")
    add("--threads", type=datasets.thread_count, help="CPU threads; left out: PyTorch's choice")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to run")
    add("--runs", type=datasets.positive_int, default=50, help="timed calls of each row")
    add("--miou", action=yes_no, default=True, help="score each checkpoint on its own val split")
    add("--profile", action="store_true", help="time by layer type and the ten slowest layers, on backend torch")
    add("--figures-from", nargs="+", metavar="JSON", help="measure nothing: join these benchmark.json and draw them")
    add("--out", help=f"folder to write to; left out: {ROOT}")
    add("--dry-run", action="store_true", help="two timed calls, two images")
    parser.only("--num-classes", "untrained networks", lambda args: args.model or args.backbone or args.head)
    measuring = parser.flags(without=("--figures-from", "--out", "--dry-run"))
    parser.only(measuring, "measuring, not of --figures-from", lambda args: not args.figures_from)
    return parser


def wanted_networks(args):
    """[(weights, None) or (None, arguments of build_model())] that the flags ask for."""
    untrained = args.model or args.backbone or args.head
    paths = args.weights if args.weights or untrained else [ROOT]
    wanted = []
    for path in paths or ():
        wanted += [(file, None) for file in (discover(path) if path == ROOT or Path(path).is_dir() else [path])]
    if untrained:
        build = dict(num_classes=args.num_classes, model=args.model, backbone=args.backbone, head=args.head)
        wanted.append((None, build))
    return wanted


@evaluate.releasing
def main(argv=None):
    """Run the command line; returns the rows that benchmark.json holds."""
    args = make_parser().parse(argv)
    out = evaluate.out_folder(args.out, "benchmark" if args.dry_run else "", dry_run=args.dry_run)
    evaluate.claim(out, keep=False)
    evaluate.keep_freed_memory()
    if args.figures_from:
        rows = merge(args.figures_from)
    else:
        device = evaluate.pick_device(args.device)
        for backend in args.backend:
            check_backend(backend, args.dtype, device)
        rows = measure(
            wanted_networks(args),
            backends=list(dict.fromkeys(args.backend)),
            device=device,
            dtype=args.dtype,
            threads=args.threads or torch.get_num_threads(),
            runs=min(2, args.runs) if args.dry_run else args.runs,
            size=args.size,
            batch=args.batch,
            miou=args.miou,
            with_profile=args.profile,
            dry_run=args.dry_run,
        )
    write(rows, out)
    evaluate.print_table(table(rows))
    print("\n".join(["", *notes(rows)]))
    profiled = [row for row in rows if row.get("profile")]
    if len(profiled) > 1:
        print()
        evaluate.print_table(profile_by_type(profiled))
    for row in rows:
        if row.get("profile"):
            print_profile(row)
        if row["dtype"] == "float32" and (row["agreement"] or 100) < 99:
            share = f"{row['agreement']:.1f}% of pixels"
            print(f"warning: {row['name']} puts only {share} into the class that PyTorch does", file=sys.stderr)
    print(f"wrote benchmark.json, .csv, .md and .png to {out}/")
    return rows


if __name__ == "__main__":
    evaluate.run_cli(main)
