"""ONNX files: PyTorch's numbers at sizes and batches that the exporter has not seen, and what a failure leaves."""

import collections
import contextlib
import itertools
import json
import re

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision import tv_tensors

import datasets
import export_onnx
import int8
import models
import quantize
from evaluate import evaluate, predict
from export_onnx import CheckError, OnnxNetwork, check, describe, export, main
from models import ModelError, build_model, save_checkpoint

INFO = datasets.open_dataset("synthetic", "val", length=1, size=(40, 56)).info
K = len(INFO.classes)


def families(table):
    """{first row: all rows} of those rows that one builder makes."""
    rows = {}
    for name, row in table.items():
        rows.setdefault(row.build, []).append(name)
    return {names[0]: names for names in rows.values()}


BACKBONES, HEADS, NETWORKS = dict(models.BACKBONES), list(models.HEADS), dict(models.NETWORKS)
PLAIN = {"mobilenet_v2", "fcn_resnet50"}  # no operator that another family has not: left to the slow test
# One of each family of backbones, with another head each, and of whole networks; the slow test has all rows.
QUICK = [dict(backbone=b, head=h) for b, h in zip(families(BACKBONES), itertools.cycle(HEADS[::-1]), strict=False)]
QUICK = [row for row in [*QUICK, *(dict(model=name) for name in families(NETWORKS))] if not PLAIN & {*row.values()}]
EVERY = [dict(backbone=name, head="fpn") for name in BACKBONES]
EVERY += [dict(backbone=b, head=h) for b in ("conv-tiny", *families(BACKBONES)) for h in HEADS]
EVERY += [dict(model=name) for name in NETWORKS]


def small(name, rows):
    """The row that conftest.py added for the same builder, a small one, or else `name`."""
    before = BACKBONES if rows is models.BACKBONES else NETWORKS
    same = [n for n, row in rows.items() if n not in before and name in before and row.build is before[name].build]
    return same[0] if same else name


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Tensors here are tiny: a second thread would only wait."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def conv_row():
    """BACKBONES["conv-tiny"]: four convolutions, for the tests in which the network does not matter."""

    def build(row, taps, output_stride, load):
        sizes = [(3, 8, 4), (8, 8, 2), (8, 16, 2), (16, 16, 2)]
        stages = [nn.Sequential(nn.Conv2d(a, b, 3, stride, 1), nn.ReLU()) for a, b, stride in sizes]
        return models.ConvBackbone(stages, [8, 8, 16, 16][-taps:], [4, 8, 16, 32][-taps:]), (False, None)

    models.BACKBONES["conv-tiny"] = models.BackboneRow(build, "")
    yield
    del models.BACKBONES["conv-tiny"]


def pixels(*shape):
    return torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def normalised(images):
    return datasets.eval_transform(INFO, images.shape[-2:])(tv_tensors.Image(images))


def make(num_classes=K, **options):
    """A network with random weights whose logits vary: its batch norms have seen a batch, as in training."""
    torch.manual_seed(0)
    model = build_model(num_classes=num_classes, **(options or dict(backbone="conv-tiny", head="linear")))
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.momentum = None  # the mean of what it sees
    model.train()(normalised(pixels(2, 3, 65, 97)))
    return model.eval()


def assert_same(path, model, *sizes, batch=3):
    """The file agrees with the model far below the spread of its logits, at each size, for one image and several."""
    for height, width in sizes:
        images = [pixels(n, 3, height, width) for n in (1, batch)]
        found = check(path, model, images, info=INFO, repeats=1)
        with torch.inference_mode():
            spread = model(normalised(images[1])).std().item()
        assert spread > 0
        assert found["largest_difference"] < 1e-3 * spread
        assert found["agreement"] > 0.999


# ---- the same numbers ----


def export_and_compare(row, folder, **options):
    """Export a row, or the small one made by the same builder, and compare at other sizes where it takes any."""
    if any(part in export_onnx.UNEXPORTABLE for part in row.values()):
        pytest.skip("documented as not exportable")
    fixed = any(part in export_onnx.FIXED_SIZE for part in row.values())
    model = make(**{k: small(v, models.NETWORKS if k == "model" else models.BACKBONES) for k, v in row.items()})
    export(model, folder / "net.onnx", size=(45, 107) if fixed else None)
    assert_same(folder / "net.onnx", model, *([(45, 107)] if fixed else [(45, 107), (131, 64)]), **options)
    return model


@pytest.mark.parametrize("row", QUICK, ids=lambda r: "-".join(r.values()))
def test_one_of_each_family_has_pytorchs_numbers_at_other_sizes_and_batches(row, tmp_path):
    model = export_and_compare(row, tmp_path)
    # DINOv2 attends in another way in training and in export: what it believes must be what it does
    if row.get("backbone", "").startswith("dinov2"):
        assert model.backbone.attention == model.backbone.body.config._attn_implementation == "sdpa"


@pytest.mark.slow
@pytest.mark.parametrize("row", EVERY, ids=lambda r: "-".join(r.values()))
def test_every_row_has_pytorchs_numbers_at_other_sizes_and_batches(row, tmp_path, monkeypatch):
    if row.get("head", "fpn") == "fpn":  # the row itself, at its real width and depth
        monkeypatch.setattr("test_export_onnx.small", lambda name, rows: name)
    export_and_compare(row, tmp_path, batch=2)


# ---- quantized networks ----


class Residual(nn.Module):
    """Two convolutions and the sum with their input; max pooling after it."""

    def __init__(self, c_in, c_out):
        super().__init__()
        self.first, self.second = nn.Conv2d(c_in, c_out, 3, 1, 1), nn.Conv2d(c_out, c_out, 3, 1, 1)
        self.shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x):
        return torch.max_pool2d(torch.relu(self.second(torch.relu(self.first(x))) + self.shortcut(x)), 2)


@pytest.fixture
def residual_row(monkeypatch):
    def build(row, taps, output_stride, load):
        sizes = [(16, 16), (16, 32), (32, 32), (32, 32)]
        stages = [nn.Sequential(nn.Conv2d(3, 16, 3, 1, 1), nn.ReLU(), Residual(16, 16))]
        stages += [Residual(*size) for size in sizes[1:]]
        return models.ConvBackbone(stages, [c for _, c in sizes][-taps:], [2, 4, 8, 16][-taps:]), (False, None)

    monkeypatch.setitem(models.BACKBONES, "residual-tiny", models.BackboneRow(build, ""))


def blocks(n, h, w):
    """Images of one colour each 16 x 16 pixels, and which of red, green and blue is the strongest."""
    x = F.interpolate(pixels(n, 3, h // 16 + 1, w // 16 + 1), scale_factor=16)[..., :h, :w].contiguous()
    return x, x.max(1).indices


def decided(**build):
    """A network that has learned what blocks() asks for: of one with random weights, noise decides the classes."""
    torch.manual_seed(0)
    model = build_model(num_classes=3, **build).train()
    images, target = blocks(2, 64, 96)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(30):
        loss = F.cross_entropy(model(normalised(images)), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.6
    return model.eval()


def quantized(model, method="ptq", **options):
    """What quantize.py makes of a network, calibrated on two images."""
    calibration = [normalised(blocks(2, *size)[0]) for size in ((64, 96), (80, 64))]
    done = quantize.prepare(model, calibration[0], activations=method != "weight-only", **options)
    if method == "dynamic":
        quantize.make_dynamic(model, done.wiring)
    if method == "ptq":
        quantize.calibrate(model, calibration)
    quantize.convert(model)
    if method == "ptq":
        quantize.observe_outputs(model, calibration)
    return model


def operators(path):
    """How often the graph that onnxruntime makes of a file has each operator."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = f"{path}.optimized", 3
    onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return collections.Counter(node.op_type for node in onnx.load(f"{path}.optimized").graph.node)


INT8_ROWS = {  # how many convolutions and products are in integers, and how many are not: attention's and the last
    "residual": (dict(backbone="residual-tiny", head="unet"), dict(QLinearConv=16, QLinearAdd=3, Conv=1)),
    "concatenation": (dict(model="unet", width=4), dict(QLinearConv=18, Conv=1, FusedConv=0)),
    "transformer": (
        dict(backbone="dinov2-tiny", head="linear"),
        dict(MatMulIntegerToFloat=24, MatMul=4, FusedMatMul=4),
    ),
}


@pytest.mark.parametrize("kind", INT8_ROWS)
def test_a_quantized_network_runs_in_integers_with_our_scales(kind, tmp_path, residual_row):
    build, expected = INT8_ROWS[kind]
    model, path = decided(**build), tmp_path / "net.onnx"
    quantized(model)
    assert export(model, path) == export_onnx.OPSET
    with int8.simulated(model):
        check(path, model, [blocks(1, 64, 96)[0], blocks(3, 51, 70)[0]], info=INFO, repeats=1)
    in_bytes = sum(layer.quantized_params for layer in int8.quant_layers(model).values())
    in_floats = models.count_params(model)[0] - in_bytes
    assert path.stat().st_size < in_bytes + 4 * in_floats + 150_000  # of the graph itself
    held = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}
    known = {v.item() for v in (*(p.scale for p in model.points),)}
    assert {v.item() for name, v in held.items() if "points" in name and name.endswith("scale")} <= known
    for layer in int8.quant_layers(model).values():
        weight = layer.weight_q.t() if layer.weight_q.dim() == 2 else layer.weight_q
        assert any(
            v.dtype == np.int8 and v.shape == weight.shape and (v == weight.numpy()).all() for v in held.values()
        )
        assert any(np.array_equal(v, layer.weight_scale.numpy()) for v in held.values())
    found = operators(path)
    assert {name: found[name] for name in expected} == expected


@pytest.mark.parametrize("options", [{}, dict(group_size=40), dict(bits=4), dict(bits=4, group_size=40)], ids=str)
def test_quantized_weights_alone_are_stored_in_their_bits(options, tmp_path):
    model, path = make(backbone="conv-tiny", head="linear"), tmp_path / "net.onnx"
    quantized(model, "weight-only", **options)
    opset = export(model, path, size=(40, 56))
    check(path, model, [pixels(2, 3, 40, 56)], info=INFO, repeats=1)  # classes may differ by 1%
    held = onnx.load(path).graph.initializer
    stored = onnx.TensorProto.INT4 if options.get("bits") == 4 else onnx.TensorProto.INT8
    assert sum(t.data_type == stored for t in held) == len(int8.quant_layers(model))
    assert not [t.name for t in held if t.data_type == onnx.TensorProto.FLOAT and len(t.dims) == 4]
    if options:
        assert opset == 21
        with pytest.raises(ModelError, match="--opset 20: weights of 4 bits, or scaled in groups, are in 21 and newer"):
            export(model, path, opset=20)


def test_what_has_no_ranges_or_no_int8_weights_is_refused(tmp_path):
    with pytest.raises(ModelError, match="dynamic finds ranges at run time"):
        export(quantized(make(), "dynamic"), tmp_path / "net.onnx")
    model = make()
    quantize.prepare(model, normalised(pixels(1, 3, 40, 56)))
    with pytest.raises(ModelError, match="quantized in simulation"):
        export(model, tmp_path / "net.onnx")
    assert not list(tmp_path.iterdir())


def test_documented_exceptions_are_rows_and_say_why(monkeypatch, tmp_path):
    for name, reason in (export_onnx.UNEXPORTABLE | export_onnx.FIXED_SIZE).items():
        assert name in {**models.BACKBONES, **models.HEADS, **models.NETWORKS}
        assert len(reason) > 20
    monkeypatch.setitem(export_onnx.UNEXPORTABLE, "linear", "a reason")
    with pytest.raises(ModelError, match=r"conv-tiny \+ linear has no ONNX form: a reason"):
        export(make(), tmp_path / "net.onnx")
    monkeypatch.setitem(export_onnx.FIXED_SIZE, "conv-tiny", "another reason")
    with pytest.raises(ModelError, match=r"conv-tiny \+ fpn needs --size H W: another reason"):
        export(make(backbone="conv-tiny", head="fpn"), tmp_path / "net.onnx")


def test_adaptive_pooling_as_matrix_products_is_adaptive_pooling():
    for height, width in ((9, 12), (1, 1), (5, 7), (6, 6), (13, 40), (2, 100)):
        x = torch.randn(2, 7, height, width, dtype=torch.float64)
        for bins in (1, 2, 3, 6):
            expected = torch.nn.functional.adaptive_avg_pool2d(x, bins)
            torch.testing.assert_close(models.adaptive_pool(x, bins), expected)


# ---- what goes in and what comes out ----


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("onnx")


@pytest.fixture
def raw_mask(folder):
    """(network, its file from pixels to class ids), exported once."""
    model, path = make(backbone="conv-tiny", head="ppm"), folder / "raw.onnx"
    if not path.exists():
        export(model, path, raw_input=True, output="mask", metadata=INFO.to_dict() | {"note": "text"})
    return model, path


def test_pixels_in_class_ids_out_is_what_evaluate_predicts(raw_mask):
    model, path = raw_mask
    session = onnxruntime.InferenceSession(path)
    images, mask = session.get_inputs()[0], session.get_outputs()[0]
    assert (images.name, images.type, images.shape) == ("images", "tensor(uint8)", ["batch", "height", "width", 3])
    assert (mask.name, mask.type, mask.shape) == ("mask", "tensor(uint8)", ["batch", "height", "width"])
    for shape in ((3, 3, 47, 61), (1, 3, 70, 33)):
        seen = pixels(*shape)
        [ids] = session.run(None, {"images": seen.permute(0, 2, 3, 1).contiguous().numpy()})
        expected = predict(model, normalised(seen))
        assert len(expected.unique()) > 3
        assert (torch.from_numpy(ids) == expected).float().mean() > 0.999


def test_class_ids_are_the_arg_max_of_logits_in_evaluates_type():
    for k, dtype in ((255, torch.uint8), (256, torch.int16)):
        logits = torch.randn(2, k, 5, 7)
        ids = export_onnx.class_ids(logits)
        assert ids.dtype == dtype
        assert torch.equal(ids.long(), logits.max(1).indices)


def test_evaluates_metric_on_the_file_is_that_of_the_network(raw_mask):
    model, path = raw_mask
    dataset = datasets.open_dataset("synthetic", "val", length=2, size=(40, 56))
    options = dict(num_classes=K, ignore_index=255, device=torch.device("cpu"))
    found = evaluate(OnnxNetwork(path, INFO), datasets.eval_loader(dataset), **options)
    expected = evaluate(model, datasets.eval_loader(dataset), **options)
    assert expected["miou"] > 0
    for key in ("miou", "macc", "aacc", "boundary_iou"):
        assert found[key] == pytest.approx(expected[key], abs=0.05)


def test_metadata_survives_and_no_path_of_this_machine_is_in_the_file(raw_mask):
    session = onnxruntime.InferenceSession(raw_mask[1])
    found = session.get_modelmeta().custom_metadata_map
    assert json.loads(found["classes"]) == list(INFO.classes)
    assert json.loads(found["palette"]) == [list(rgb) for rgb in INFO.palette]
    assert json.loads(found["mean"]) == list(INFO.mean)
    assert json.loads(found["std"]) == list(INFO.std)
    assert json.loads(found["ignore_index"]) == 255
    assert found["note"] == "text"
    assert b"export_onnx.py" not in raw_mask[1].read_bytes()
    assert b"site-packages" not in raw_mask[1].read_bytes()


def test_a_fixed_size_another_opset_and_weights_in_their_own_file(tmp_path):
    model, path = make(), tmp_path / "net.onnx"
    export(model, path, size=(45, 70), opset=20, external_data=True)
    assert_same(path, model, (45, 70))
    assert onnx.load(path, load_external_data=False).opset_import[0].version == 20
    assert [file.name for file in export_onnx.data_files(path)] == ["net.onnx.data"]
    assert path.stat().st_size < (tmp_path / "net.onnx.data").stat().st_size
    with pytest.raises(CheckError, match="cannot run 1 x 46 x 70"):
        check(path, model, [pixels(1, 3, 46, 70)], info=INFO)


def test_an_opset_nobody_writes_is_refused_at_once(tmp_path):
    for opset in (3, 999):
        with pytest.raises(ModelError, match=f"--opset {opset}"):
            export(make(), tmp_path / "net.onnx", opset=opset)
    assert not list(tmp_path.iterdir())


# ---- checks that fail ----


def test_numbers_that_are_too_far_off_raise_with_the_numbers():
    logits = torch.randn(1, 3, 10, 10)
    assert export_onnx.compare(logits, logits, "a") == {"largest_difference": 0, "agreement": 1}
    with pytest.raises(CheckError, match=r"a: logits differ by up to 0\.5, where 0\.0\d+ is allowed"):
        export_onnx.compare(logits + 0.5, logits, "a")  # the arg max is the same
    with pytest.raises(CheckError, match="nan"):
        export_onnx.compare(logits * torch.nan, logits, "a")
    ids = logits.argmax(1).to(torch.uint8)
    ids[0, 0, 0] = (ids[0, 0, 0] + 1) % 3
    with pytest.raises(CheckError, match=r"a: 99\.000% of the pixels have the same class, 99\.9% must"):
        export_onnx.compare(ids, logits, "a")
    with pytest.raises(CheckError, match=r"\(1, 3, 10, 9\)"):
        export_onnx.compare(logits[..., 1:], logits, "a")


def test_pixels_are_judged_together_and_those_of_one_size_more_mildly(tmp_path, monkeypatch):
    model, images = make(backbone="conv-tiny", head="unet"), [pixels(4, 3, 80, 96), pixels(3, 3, 20, 24)]
    export(model, tmp_path / "net.onnx", output="mask")
    for large, small, said in (
        (0, 0.004, None),
        (0, 0.02, r"3 x 20 x 24: 97\.986% of the pixels have the same class, 99\.0% must"),
        (0.004, 0, r"all sizes together: 99\.618% of the pixels have the same class, 99\.9% must"),
    ):

        def class_ids(logits, shares=(large, small)):
            """Those of PyTorch, but for a share of the pixels of the large or the small images."""
            ids = logits.argmax(1).to(torch.uint8)
            some = ids.view(-1)[: round(shares[len(ids) == 3] * ids.numel())]
            some.copy_((some + 1) % K)
            return ids

        monkeypatch.setattr(export_onnx, "class_ids", class_ids)
        with pytest.raises(CheckError, match=said) if said else contextlib.nullcontext():
            found = check(tmp_path / "net.onnx", model, images, info=INFO, repeats=1)
            assert found["agreement"] == pytest.approx(1 - 6 / 32160)


def test_a_file_that_is_no_onnx_fails_its_check(tmp_path):
    (tmp_path / "net.onnx").write_bytes(b"nonsense")
    with pytest.raises(CheckError, match="not valid ONNX"):
        check(tmp_path / "net.onnx", make(), [pixels(1, 3, 32, 32)], info=INFO)


# ---- command line ----


@pytest.fixture
def weights(tmp_path):
    path = tmp_path / "run" / "best.pt"
    save_checkpoint(path, make(backbone="conv-tiny", head="unet"), data=INFO.to_dict(), pretrained="no", command="test")
    return path


def test_the_command_writes_a_checked_file_beside_the_checkpoint_and_its_numbers(weights, capfd):
    done = main(["--weights", str(weights), "--dataset", "synthetic", "--out", f"{weights.parent}/a.onnx"])
    path = weights.parent / "a.onnx"
    assert sorted(p.name for p in weights.parent.iterdir()) == ["a.onnx", "a.onnx.json", "best.pt"]
    written = json.loads((weights.parent / "a.onnx.json").read_text())
    assert written["model"] == done["model"] == "conv-tiny + unet"
    assert written["command"].startswith("python export_onnx.py --weights")
    assert written["file_mb"] == pytest.approx(path.stat().st_size / 2**20)
    assert written["opset"] == export_onnx.OPSET
    assert written["miou"] == pytest.approx(written["miou_torch"], abs=0.05)
    assert written["miou"] > 0
    assert set(written["latency_ms"]) == {"torch", "onnxruntime"}
    sizes = [row["images"] for row in written["checks"]["sizes"]]
    assert sizes == ["1 x 40 x 56"] * 4 + ["3 x 31 x 35", "3 x 57 x 41", "3 x 33 x 67"]
    assert written["checks"]["agreement"] > 0.999
    found = onnxruntime.InferenceSession(path).get_modelmeta().custom_metadata_map
    checkpoint = models.read_checkpoint(weights)
    assert found["checkpoint"] == checkpoint["id"]
    assert set(found) == set(describe(checkpoint))
    out, err = capfd.readouterr()
    assert out.startswith("checked on")  # the exporter's own lines are not there
    assert "torch.onnx" not in out + err


def test_files_are_replaced_whole_after_the_checks_only(weights, monkeypatch):
    flags = ["--weights", str(weights), "--size", "41", "56", "--dry-run", "--out", f"{weights.parent}/best.onnx"]
    main([*flags, "--external-data"])
    first = {p.name: p.read_bytes() for p in weights.parent.iterdir()}
    assert sorted(first) == ["best.onnx", "best.onnx.data", "best.onnx.json", "best.pt"]

    class AlignedCorners(export_onnx.Graph):
        """A file that resizes in the other of the two usual ways: a mistake that looks right."""

        def forward(self, images):
            resize = torch.nn.functional.interpolate
            with monkeypatch.context() as patch:
                patch.setattr(models.F, "interpolate", lambda x, **how: resize(x, **how | {"align_corners": True}))
                return super().forward(images)

    with monkeypatch.context() as patch:
        patch.setattr(export_onnx, "Graph", AlignedCorners)
        with pytest.raises(SystemExit) as failure:
            main([*flags, "--external-data"])
    # a text is printed and means status 1
    assert re.match(r"check failed: 1 x 41 x 56: (logits differ by up to|\d+\.\d+% of the pixels)", failure.value.code)
    assert {p.name: p.read_bytes() for p in weights.parent.iterdir()} == first
    main(flags)  # the new file holds its weights itself, so those of the old one go
    assert sorted(p.name for p in weights.parent.iterdir()) == ["best.onnx", "best.onnx.json", "best.pt"]


def test_only_what_an_export_wrote_is_replaced(weights):
    last = weights.with_name("last.pt")
    last.write_bytes(b"of a run")
    weights.with_name("results.json").write_text('{"miou": 1}')
    for place in (last, weights, weights.with_name("results"), "/dev/null"):
        with pytest.raises(ModelError, match=r"name (a|another) file"):
            main(["--weights", str(weights), "--out", str(place), "--size", "32", "32"])
    assert last.read_bytes() == b"of a run"


def test_without_out_the_file_goes_beside_the_weights_and_a_dry_run_elsewhere(weights):
    parse = export_onnx.make_parser().parse_args
    beside = export_onnx.choose_path(parse(["--weights", str(weights)]))
    assert beside == weights.with_suffix(".onnx")
    dry = export_onnx.choose_path(parse(["--weights", str(weights), "--dry-run"]))
    assert str(dry) == "checkpoints/dry-run/best.onnx"
    for wrong in (weights, weights.parent):
        with pytest.raises(ModelError, match="--out"):
            export_onnx.choose_path(parse(["--weights", str(weights), "--out", str(wrong)]))


def test_a_checkpoint_whose_images_are_gone_is_checked_on_drawn_scenes(tmp_path, capsys):
    data = INFO.to_dict() | {"name": "camvid", "size": None}
    args = export_onnx.make_parser().parse_args(["--dry-run"])
    dataset = export_onnx.open_images({"data": data, "args": {"data_root": str(tmp_path / "gone")}}, args)
    assert dataset.info.name == "synthetic"
    assert "gone" in capsys.readouterr().err
    args.data_root = str(tmp_path / "gone")
    with pytest.raises(datasets.DataError, match="gone"):  # asked for by name: an error
        export_onnx.open_images({"data": data, "args": {}}, args)


def test_a_missing_checkpoint_names_the_command_that_makes_it(tmp_path):
    with pytest.raises(ModelError, match=r"python train\.py --head fpn"):
        main(["--weights", str(tmp_path / "none.pt")])
