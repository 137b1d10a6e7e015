"""The repository itself: imports that run one way, lint, and README commands that work."""

import argparse
import ast
import dataclasses
import importlib
import itertools
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import benchmark
import datasets
import models
import prune
import train

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = {path: path.read_text() for path in (ROOT / "README.md", *sorted((ROOT / "assets").glob("*.md")))}
CAMVID = Path(os.environ.get("CAMVID_ROOT", "CamVid")).resolve()

# who may import whom; compression scripts stand here before they exist, so that the rule is there when they come
TRIO = {"models", "datasets", "losses"}
COMPRESSION = {"distill", "quantize", "prune", "lora"}
ALLOWED = {
    "models": set(),
    "losses": set(),
    "scenes": set(),
    "datasets": {"scenes", "models"},
    "evaluate": {"models", "datasets", "int8"},
    "train": TRIO | {"evaluate"},
    "int8": {"models"},
    **{name: TRIO | {"evaluate", "train"} for name in COMPRESSION},
    "quantize": TRIO | {"evaluate", "train", "int8"},
    "lora": TRIO | {"evaluate", "train", "quantize"},  # what is frozen can run in int8 while it trains
    "export_onnx": {"models", "datasets", "evaluate", "int8"},
    "benchmark": {"models", "datasets", "evaluate", "int8", "export_onnx"},
}
LAZY_BACK_EDGES = {"models": {"quantize", "prune", "lora"}}  # load_checkpoint() rebuilds compressed networks
HEAVY = {"transformers", "onnx", "onnxruntime", "matplotlib", "scipy", "tensorboard"}


def imports(source):
    """(imported where the module is, imported inside functions): first parts of module names.

    importlib.import_module() and __import__() of a name that stands there are imports as well.
    """
    tree = ast.parse(source)
    functions = [n for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))]
    inside = {id(n) for function in functions for n in ast.walk(function)}
    top, lazy = set(), set()
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
            words = (*node.args, *(k.value for k in node.keywords if k.arg == "name"))
            names = [w.value for w in words if isinstance(w, ast.Constant) and isinstance(w.value, str)][:1]
        (lazy if id(node) in inside else top).update(name.split(".")[0] for name in names)
    return top, lazy


def test_no_import_is_overlooked():
    source = """
import a.b, c
from d.e import f
try:
    import g
finally:
    h = importlib.import_module("h.i")

def function():
    import j
    from k import l
    return import_module(name="m"), __import__("n"), importlib.import_module(o), lambda: import_module("p", "q")
"""
    assert imports(source) == (set("acdgh"), set("jkmnp"))


@pytest.mark.parametrize("path", sorted(ROOT.glob("*.py")), ids=lambda p: p.stem)
def test_imports_run_one_way_and_heavy_packages_wait(path):
    siblings = {p.stem for p in ROOT.glob("*.py")} - {path.stem}  # a script may import itself as a module
    top, lazy = imports(path.read_text())
    assert path.stem in ALLOWED
    assert top & siblings <= ALLOWED[path.stem]
    assert lazy & siblings <= ALLOWED[path.stem] | LAZY_BACK_EDGES.get(path.stem, set())
    assert not top & HEAVY


def test_importing_prints_nothing_and_loads_nothing_heavy():
    names = sorted(p.stem for p in ROOT.glob("*.py"))
    code = f"import sys, {', '.join(names)}; print(sorted({HEAVY!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert done.stderr == ""


@pytest.mark.parametrize("command", [["check"], ["format", "--check"]], ids=["lint", "format"])
def test_ruff(command):
    done = subprocess.run([sys.executable, "-m", "ruff", *command, "."], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_requirements_have_lower_bounds_only():
    for name in ("requirements.txt", "requirements-dev.txt", "deploy/requirements.txt"):
        for line in (ROOT / name).read_text().split("\n"):
            assert re.fullmatch(r"|[a-z-]+>=[\d.]+|-r (deploy/)?requirements\.txt", line), line


# ---- README and the pages it links to ----


def commands():
    """Every `python script.py ...` of the pages' code blocks, comments cut off."""
    blocks = [b for page in PAGES.values() for b in re.findall(r"```(?:bash|sh)\n(.*?)```", page, re.DOTALL)]
    lines = "\n".join(blocks).replace("\\\n", " ").split("\n")
    lines = [re.sub(r"\s+#.*", "", line).strip() for line in lines]
    return list(dict.fromkeys(" ".join(line.split()) for line in lines if line.startswith("python ")))


def test_readme_has_the_commands_and_figures_it_speaks_of():
    assert "python train.py --head fpn" in commands()
    assert any("--dataset camvid" in c for c in commands())
    linked = set()
    for path, page in PAGES.items():
        for link in re.findall(r"\]\(([^)#:]+)\)", page):  # not those to the web or to a section
            target = (path.parent / link).resolve()
            assert 0 < target.stat().st_size < 200_000, f"{path.name}: {link}"
            linked.add(target)
    assert linked >= {path.resolve() for path in (ROOT / "assets").iterdir()}
    for script in ROOT.glob("*.py"):
        assert f"`{script.name}`" in README


def test_readme_has_no_long_lines_and_is_not_long():
    lines = README.splitlines()
    assert len(lines) < 300
    assert [line for line in lines if len(line) > 120] == []


def test_the_sections_in_the_reading_order_are_in_the_files():
    page = PAGES[ROOT / "assets" / "code.md"]
    rows = dict(re.findall(r"^\| \d+ \| `(\w+\.py)` \| ([^|]+) \|", page, re.MULTILINE))
    assert rows.keys() >= {path.name for path in ROOT.glob("*.py")}
    for name, sections in rows.items():
        if (ROOT / name).exists():
            banners = re.findall(r"^# ---- (.+?) -{4,}$", (ROOT / name).read_text(), re.MULTILINE)
            assert set(sections.split("; ")) <= set(banners), name


def test_the_flags_in_the_comparison_build_networks():
    rows = re.findall(r"^\| `(--[^`]*)` \| (\d+) \|", PAGES[ROOT / "assets" / "networks.md"], re.MULTILINE)
    assert len(rows) >= 8
    for flags, _ in rows:
        args = train.get_parser().parse_args(shlex.split(flags))
        with torch.device("meta"):
            models.build_model(
                num_classes=11, model=args.model, backbone=args.backbone, head=args.head, width=args.width
            )


def test_the_ci_script_finds_readmes_test_command():
    pattern = re.search(r"grep -m1 -E '(.*)'", (ROOT / ".ci" / "run").read_text())[1]
    assert re.search(pattern, README, re.MULTILINE)[0].strip().endswith(".venv/bin/python -m pytest")


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with what README's commands build on: a trained network, a photo."""
    folder = tmp_path_factory.mktemp("readme")
    call(folder, "python train.py --head fpn --dry-run")
    return furnished(folder)


@pytest.fixture(scope="module")
def small_workplace(tmp_path_factory):
    """The same, of small networks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("small"))
        shrink_networks(patch)
        train.main(["--head", "fpn", "--dry-run"])
        return furnished(Path.cwd())


def furnished(folder):
    shutil.move(folder / "checkpoints" / "dry-run" / "train", folder / "checkpoints" / "train")
    shutil.copy(folder / "checkpoints" / "train" / "examples.png", folder / "photo.jpg")
    return folder


def shrink_networks(monkeypatch):
    """Make DINOv2 four layers of width 32. No process of its own could load one: benchmark.py starts none."""
    small = dict(hidden_size=32, num_attention_heads=2, num_hidden_layers=4)
    for name in ("dinov2-small", "dinov2-base"):
        row = models.BACKBONES[name]
        small_row = dataclasses.replace(row, numbers=row.numbers | small, weights="absent")
        monkeypatch.setitem(models.BACKBONES, name, small_row)
    one_process(monkeypatch)


def one_process(monkeypatch):
    monkeypatch.setattr(benchmark, "peak_memory", lambda *_, **__: {"peak_memory_mb": 9.0, "memory_added_mb": 1.0})


def call(folder, command):
    _, script, *flags = shlex.split(command)
    command = [sys.executable, str(ROOT / script), *flags]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


def run_here(command):
    """A command in this process: one of its own imports for seconds."""
    _, script, *flags = shlex.split(command)
    threads = torch.get_num_threads()
    importlib.import_module(script.removesuffix(".py").replace("/", ".")).main(flags)
    torch.set_num_threads(threads)


def sizes_for_times(model, *_):
    """In place of prune.layer_times(): a call of a layer of a small network takes as long whatever its width."""
    return dict.fromkeys(prune.input_dims(model), math.prod)


def trained(folder, *, camvid, size):
    """A checkpoint of two steps, on drawn scenes or on CamVid."""
    if not camvid:
        return folder / "checkpoints" / "train" / "best.pt"
    if not (folder / "camvid").exists():
        flags = f"--dataset camvid --data-root {CAMVID} --backbone resnet18 --head unet {size}"
        run_here(f"python train.py {flags} --dry-run --out camvid")
    return folder / "camvid" / "best.pt"


@pytest.mark.usefixtures("figures_once")
@pytest.mark.parametrize("whole", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["small", "whole"])
@pytest.mark.parametrize("command", commands())
def test_readme_command(command, whole, request, monkeypatch):
    folder, size = request.getfixturevalue("workplace" if whole else "small_workplace"), ""
    monkeypatch.chdir(folder)
    if not whole:
        shrink_networks(monkeypatch)
        size = "--size 90 120 --crop 90 120"
        monkeypatch.setattr(prune, "layer_times", sizes_for_times)
    camvid = "camvid" in command.lower()
    if camvid:
        if not CAMVID.exists():
            pytest.skip("CamVid is not here")
        command = command.replace("--data-root CamVid", f"--data-root {CAMVID}")
        command += f" {size}" if "train.py" in command else ""
    paths = re.findall(r"(?<=--weights|--student)(?: checkpoints/\S+)+", command)
    paths += ["checkpoints/train/best.onnx"] if "serve.py" in command else []
    for path in " ".join(paths).split():  # what an earlier command would have left
        weights = folder / path if Path(path).suffix else folder / path / "a" / "best.pt"
        if weights.exists():
            continue
        weights.parent.mkdir(parents=True, exist_ok=True)
        made = trained(folder, camvid=camvid, size=size)
        if weights.suffix == ".onnx":
            checkpoint, made = made, folder / "made.onnx"
            if not made.exists():
                run_here(f"python export_onnx.py --weights {checkpoint} --out {made} --dry-run")
        shutil.copy(made, weights)
    if "--adapter" in command and not (folder / "checkpoints" / "lora").exists():
        run_here("python lora.py --method classifier --dry-run --out checkpoints/lora")
    if "benchmark.py" in command:  # other backends compile for minutes, and have tests of their own
        command = re.sub("--backend [a-z ]+", "--backend torch ", command)
        command = re.sub("--size [0-9]+ [0-9]+", "--size 64 96", command)
    dry = "" if "--time-steps" in command else "--dry-run"
    run_here(f"{re.sub('--time-steps [0-9]+', '--time-steps 3', command)} {dry}")


def test_readmes_python_labels_a_photo(workplace, monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names = {}
    monkeypatch.chdir(workplace)
    exec(code, names)
    assert names["ids"].shape == names["image"].shape[-2:]
    assert names["ids"].max() < len(names["info"].classes)


def test_a_script_ends_with_status_0(workplace):
    done = call(workplace, "python evaluate.py --dry-run")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Traceback" not in done.stderr


def test_an_error_is_one_line_with_status_2(workplace):
    done = call(workplace, "python evaluate.py --weights nothing.pt")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: no checkpoint at nothing.pt")
    assert "Traceback" not in done.stderr


# ---- every script ----


SIZE = "--size 56 70 --crop 56 56 --class-weights enet"
SMALL = f"--backbone mit-tiny --head fcn {SIZE}"
SCRIPTS = {  # runs of two steps that together show what a script reads
    "train": [SMALL, "--resume", f"{SMALL} --time-steps 1", f"{SMALL} --tensorboard"],
    "evaluate": ["", "--tta --slide 56 56 --slide-stride 28 28", "--images photo.jpg", "--crf 1"],
    "distill": ["--mode feature --init teacher", "--resume --mode feature", "--mode response --minutes 1 --model enet"],
    "quantize": ["", "--method qat", "--resume --epochs 2", "--max-drop 99 --adaround 1", "--method weight-only"],
    "prune": ["", "--resume", "--structured --kl 1 --steps 2 --round-to 2", "--sparsity-schedule cubic", "--sweep 0.5"],
    "lora": [
        f"{SIZE} --init data",
        "--resume --epochs 7",
        f"{SIZE} --method head --trunk int8 --cache-features 2 --minutes 1",
    ],
    "export_onnx": ["--size 56 70"],
    "benchmark": [
        "--weights checkpoints/train/best.pt",
        "--model unet --size 32 32",
        "--figures-from b/benchmark.json",
    ],
}
CONTRACT = {
    *("command", "model", "dataset", "split", "pretrained", "compression", "params", "trainable_params", "file_mb"),
    *("miou", "macc", "aacc", "class_iou", "seconds", "peak_memory_mb"),
}


@pytest.mark.usefixtures("figures_once")
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_reads_every_flag_that_it_shows_and_keeps_the_contract(script, small_workplace, tmp_path, monkeypatch):
    module = importlib.import_module(script)
    read = {option for row in datasets.DATASETS.values() for option in row.options}  # by datasets.option_values()

    class Namespace(argparse.Namespace):
        def __getattribute__(self, name):
            if sys._getframe(1).f_globals["__name__"] != "argparse":  # which looks at each to set its default
                read.add(name)
            return super().__getattribute__(name)

    parsers, parse_args = [], argparse.ArgumentParser.parse_args

    def spy(parser, args=None, namespace=None):
        parsers.append(parser)
        return parse_args(parser, args, namespace)

    monkeypatch.chdir(tmp_path)
    shutil.copy(small_workplace / "photo.jpg", "photo.jpg")
    train.main([*shlex.split(SMALL), "--dry-run", "--out", "checkpoints/train"])
    out = {"benchmark": "b", "export_onnx": "e.onnx"}.get(script, "flags")
    for flags in SCRIPTS[script]:
        with monkeypatch.context() as patch:
            patch.setattr(argparse, "Namespace", Namespace)
            patch.setattr(argparse.ArgumentParser, "parse_args", spy)
            done = module.main([*shlex.split(flags), "--dry-run", "--out", out])
        if script != "benchmark" and "--time-steps" not in flags:
            assert done.keys() >= CONTRACT
            assert done["command"] == shlex.join(
                ["python", f"{script}.py", *shlex.split(flags), "--dry-run", "--out", out]
            )
            written = json.loads(
                (tmp_path / (f"{out}.json" if script == "export_onnx" else f"{out}/results.json")).read_text()
            )
            assert written.keys() == done.keys()
            if script in ("distill", "quantize", "prune", "lora"):
                assert done["before"].keys() >= CONTRACT
    shown = {a.dest for parser in parsers for a in parser._actions} - {"help"}
    assert shown - read == set()


# ---- which step may follow which ----

STEPS = {  # what writes a checkpoint, tiny, two steps of it
    "train": "train.py --model unet --width 4 --size 32 64 --crop 32 64 --lr 0.05 --warmup 0",
    "distill": "distill.py --mode response --no-control",
    "distilled back": "distill.py --mode cwd --no-control --weights {train} --student",
    "prune weights": "prune.py --amount 0.5",
    "prune channels": "prune.py --structured --round-to 1 --min-channels 1 --amount 0.2",
    "lora": "lora.py --method lora-full --rank 2",
    "ptq": "quantize.py --method ptq",
    "qat": "quantize.py --method qat",
    "weight-only": "quantize.py --method weight-only",
    "dynamic": "quantize.py --method dynamic",
}
ENDS = {"evaluate": "evaluate.py", "export": "export_onnx.py", "benchmark": "benchmark.py --threads 1"}
INT8 = ("ptq", "qat", "weight-only", "dynamic")
REFUSED = {  # (what wrote it, what takes it) -> words of the reason
    **{(first, then): "quantized" for first in INT8 for then in (*INT8, "prune weights", "prune channels", "lora")},
    **{(first, "distilled back"): "quantized" for first in INT8},
    ("prune weights", "lora"): "pruned to 0",
    ("dynamic", "export"): "dynamic",
}


@pytest.fixture(scope="module")
def steps(tmp_path_factory):
    """A folder for what take() makes."""
    return tmp_path_factory.mktemp("steps")


@pytest.fixture(name="one_process")
def _one_process(monkeypatch):
    one_process(monkeypatch)


def take(folder, chain):
    """The checkpoint that the steps of `chain`, in turn, leave."""
    path = folder / "-".join(chain).replace(" ", "_")
    if not path.exists():
        *before, last = chain
        start = f"--weights {take(folder, before)}" if before else ""
        command = STEPS[last].format(train=take(folder, ["train"])) if before else STEPS[last]
        if command.endswith("--student"):
            start = str(take(folder, before))
        run_here(f"python {command} {start} --workers 0 --threads 1 --dry-run --out {path}")
    return path / "best.pt"


ALIKE = {"distill", "distilled back", "prune weights", "weight-only"}  # the same to ENDS as others are
BACK = {"distilled back"}  # the same to other steps as "distill"
PAIRS = [
    pytest.param(first, then, marks=[pytest.mark.slow] if first in (ALIKE if then in ENDS else BACK) else [])
    for first in STEPS
    for then in (*list(STEPS)[1:], *ENDS)
]


@pytest.mark.usefixtures("figures_once", "one_process")
@pytest.mark.parametrize(("first", "then"), PAIRS)
def test_a_step_may_follow_another_or_is_refused_with_the_reason(first, then, steps):
    start = ["train", first] if first != "train" else ["train"]
    path = take(steps, start)

    def follow():
        if then in ENDS:
            run_here(f"python {ENDS[then]} --weights {path} --dry-run --out {steps / 'end' / then}")
        else:
            parent = models.load_checkpoint(path)[1]
            model, checkpoint = models.load_checkpoint(take(steps, [*start, then]))
            assert parent["id"] in [ancestor["id"] for ancestor in checkpoint["lineage"]]
            assert model(torch.zeros(1, 3, 32, 64)).isfinite().all()

    if (first, then) in REFUSED:
        with pytest.raises((models.ModelError, datasets.DataError), match=REFUSED[first, then]):
            follow()
    else:
        follow()


@pytest.mark.usefixtures("figures_once", "one_process")
def test_the_whole_way_leaves_a_small_network_that_knows_its_ancestors(steps):
    chain = ["train", "prune channels", "distilled back", "qat"]
    path = take(steps, chain)
    model, checkpoint = models.load_checkpoint(path)
    assert path.stat().st_size < take(steps, ["train"]).stat().st_size / 2
    ancestors = [re.search(r"(\w+)\.py", ancestor["command"])[1] for ancestor in checkpoint["lineage"]]
    assert ancestors == ["train", "prune", "train", "distill"]  # the student's, and the teacher
    assert [step["step"] for step in checkpoint["compression"]] == ["prune", "quantize"]
    assert torch.isfinite(model(torch.zeros(1, 3, 32, 64))).all()
    for end in ENDS:
        run_here(f"python {ENDS[end]} --weights {path} --dry-run --out {steps / 'end' / end}")


# ---- flags ----


def parsers():
    """{script: its parser}."""
    found = {"train": train.get_parser(), "datasets": datasets.make_parser()}
    return found | {name: importlib.import_module(name).make_parser() for name in SCRIPTS if name != "train"}


def values_of(action):
    """An action's values that are none of a list: the number of texts that each takes, 0 for a switch."""
    return 0 if action.nargs == 0 or action.choices else action.nargs if isinstance(action.nargs, int) else 1


def test_every_number_among_the_flags_has_a_range():
    for script, parser in parsers().items():
        for action in parser._actions:
            if values_of(action) and (action.type is not None or type(action.default) in (int, float)):
                flag = f"{script}.py {action.option_strings[-1]}"
                assert action.type not in (int, float, None), f"{flag} takes any number"
                if action.type not in (Path, datasets.absolute):
                    for wrong in ("nan", "inf", "-1", "1e999", "", "\N{SUPERSCRIPT TWO}"):
                        with pytest.raises(argparse.ArgumentTypeError, match=re.escape(repr(wrong))):
                            action.type(wrong)


@pytest.mark.parametrize("script", ["datasets", *SCRIPTS])
def test_a_value_of_a_flag_is_taken_or_refused_in_one_line(script, capsys):
    parser, values = parsers()[script], ("-1", "0", "nan", "inf", "1e20", "1e-9", "9" * 5000, "", " ", "x\0y")
    actions = [action for action in parser._actions if values_of(action)]
    for action, value in itertools.product(actions, values):
        flag = action.option_strings[-1]
        texts = [f"{flag}={value}"] if action.nargs is None else [flag, *[value] * values_of(action)]
        try:
            parsed = getattr(parser.parse_args(texts), action.dest)
        except SystemExit as ended:
            (line,) = capsys.readouterr().err.splitlines()
            said = f"error: argument {'/'.join(action.option_strings)}: "
            assert (ended.code, line[: len(said)]) == (2, said)  # noqa: PT017
        else:
            assert value not in ("", " ", "x\0y"), flag
            numbers = parsed if isinstance(parsed, (list, tuple)) else [parsed]
            assert all(math.isfinite(x) for x in numbers if isinstance(x, (int, float)))
    assert len(actions) >= 5


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("quantize.py --method ptq --kl 1", "--kl is of --method qat"),
        ("quantize.py --method dynamic --observer mse", "--observer is of --method ptq and qat"),
        ("quantize.py --epochs 3", "--epochs is of --method qat"),
        ("train.py --loss ce --focal-gamma 1", "--focal-gamma is of --loss focal"),
        ("train.py --momentum 0.5", "--momentum is of --optimizer sgd"),
        ("train.py --schedule cosine --power 2", "--power is of --schedule poly and restarts"),
        ("train.py --no-augment --flip 1", "--flip is of --augment"),
        ("prune.py --epochs 0 --lr 1", "--lr is of training, not of --epochs 0"),
        ("prune.py --structured --score layer", "--score is of single weights, not of --structured"),
        ("prune.py --temperature 2", "--temperature is of --kl"),
        ("distill.py --mode cwd --temperature 3", "--temperature is of --mode response"),
        ("lora.py --method head --rank 4", "--rank is of methods with LoRA"),
        ("evaluate.py --images a.jpg --split test", "--split is of scoring, not of --images"),
        ("benchmark.py --figures-from a.json --runs 3", "--runs is of measuring, not of --figures-from"),
    ],
)
def test_a_flag_that_nothing_would_read_is_refused(command, said, small_workplace, monkeypatch):
    monkeypatch.chdir(small_workplace)
    with pytest.raises(models.ModelError, match=f"^{re.escape(said)}: leave it out$"):
        run_here(f"python {command}")
