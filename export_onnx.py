"""Write a checkpoint as an ONNX file, which counts only once it has been checked against PyTorch.

    python export_onnx.py                                 # checkpoints/train/best.pt -> checkpoints/train/best.onnx
    python export_onnx.py --raw-input --output mask       # pixels in, class ids out
    python export_onnx.py --size 512 1024 --opset 20      # one height and width
    python export_onnx.py --dataset synthetic             # the mIoU of the file, too

Input `images`: float32 (N, 3, H, W), normalised; with --raw-input uint8 (N, H, W, 3), RGB, as a decoder gives it.
Output `logits`: float32 (N, K, H, W); with --output mask `mask`: uint8 (N, H, W) class ids (int16 from 256 classes on).
N is free, and so are H and W without --size. A checkpoint of quantize.py keeps its int8 weights and its scales: the
file has QuantizeLinear and DequantizeLinear where the network quantizes, which onnxruntime and OpenVINO make integer
kernels of. metadata_props of the file: classes, palette, mean, std, ignore_index,
size, all JSON, and model, dataset, checkpoint (its id), pretrained, compression.

The checks: onnx.checker with shape inference; then onnxruntime against PyTorch on images of the checkpoint's data set
and, without --size, at three more sizes, in batches of 1 and 3. Only a file that passes gets its name; one that was
there before stays until then. Numbers go to FILE.json.
"""

if __name__ == "__main__":  # the imports take seconds: Ctrl-C ends them without a traceback
    import signal

    signal.signal(signal.SIGINT, signal.SIG_DFL)

import contextlib
import copy
import io
import json
import logging
import math
import os
import sys
import time
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF

import datasets
import evaluate
from datasets import DataError, DataInfo, pixels, positive_int, thread_count
from int8 import (
    ACTIVATIONS,
    UINT8,
    DynamicPoint,
    Point,
    Post,
    QuantLayer,
    QuantLinear,
    is_quantized,
    quant_layers,
    read,
    unpack4,
)
from models import ModelError, compression_summary, load_checkpoint, model_name, one_line, replacing

OPSET = 18  # the oldest that PyTorch's exporter writes, so the most widely read
OUTPUTS = ("logits", "mask")
AGREEMENT = 0.999  # share of all pixels whose class must be the same; at each size ten times as many may differ
TOLERANCE = 0.01  # largest difference of logits, as a share of the largest logit
# The same of a quantized network: a runtime sums in another order, which moves values to the next step here and there.
QUANTIZED_AGREEMENT, QUANTIZED_TOLERANCE = 0.99, 0.25
UNEXPORTABLE = {}  # row of BACKBONES, HEADS or NETWORKS: why it has no ONNX file
FIXED_SIZE = dict.fromkeys(  # row: why its file takes images of one size only
    ("mask2former-swin-tiny", "mask2former-swin-small", "mask2former-swin-base"),
    "with unknown sizes, torch.export does not get through its shifted windows in ten minutes",
) | {"swin_t": "windows are shifted only where a map is larger than one, and torch.export keeps one of the two cases"}


class CheckError(Exception):
    """A file that was written does not do what the network does; the message gives the numbers."""


# ---- export ---------------------------------------------------------------------------------------------------------


class Graph(nn.Module):
    """What the file computes: a network and, where asked for, normalisation before it and the arg max after it."""

    def __init__(self, model, *, raw_input, output, mean, std):
        super().__init__()
        self.model, self.raw_input, self.output = model, raw_input, output
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1))

    def forward(self, images):
        if self.raw_input:
            images = (images.permute(0, 3, 1, 2).float() / 255 - self.mean) / self.std
        logits = self.model(images)
        return logits if self.output == "logits" else class_ids(logits)


def class_ids(logits):
    """(N, K, H, W) -> (N, H, W) in the integers that evaluate.predict() gives: uint8, or int16 where K > 255."""
    return logits.argmax(1).to(torch.uint8 if logits.shape[1] <= 255 else torch.int16)


def export(
    model, path, *, size=None, batch=None, opset=None, raw_input=False, output="logits", metadata=None,
    external_data=False,
):  # fmt: skip
    """Write `model`, which it puts into eval mode, to `path` as ONNX -> opset. Nothing is checked here: see check().

    size: (H, W), or None for any. batch: images at once, or None for any. opset: None for the oldest that will do.
    raw_input, output: see the top of this file; raw_input normalises with the "mean" and "std" of metadata. metadata:
    {name: text, or what JSON can hold}. external_data: weights in a file of their own, PATH.data, as they are in any
    case beyond 2 GB. Raises ModelError where the network or the opset cannot be exported.
    """
    import onnx
    import onnx_ir
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    if output not in OUTPUTS:
        raise ModelError(f"output {output!r} is not known: choose one of {', '.join(OUTPUTS)}")
    name, metadata, newest = model_name(model.build), metadata or {}, onnx.defs.onnx_opset_version()
    oldest = oldest_opset(model)
    opset = opset or oldest
    if not OPSET <= opset <= newest:
        raise ModelError(f"--opset {opset}: PyTorch's exporter writes {OPSET} and newer, up to {newest} of onnx here")
    if opset < oldest:
        raise ModelError(f"--opset {opset}: weights of 4 bits, or scaled in groups, are in {oldest} and newer")
    for part in (model.build.get(key) for key in ("model", "backbone", "head")):
        if part in UNEXPORTABLE:
            raise ModelError(f"{name} has no ONNX form: {UNEXPORTABLE[part]}")
        if part in FIXED_SIZE and not size:
            raise ModelError(f"{name} needs --size H W: {FIXED_SIZE[part]}")
    mean, std = metadata.get("mean", DataInfo.mean), metadata.get("std", DataInfo.std)
    model = onnx_form(model) if is_quantized(model) else model
    graph = Graph(model, raw_input=raw_input, output=output, mean=mean, std=std).eval()
    # The exporter takes what is equal in the example for equal always, and 1 for always 1. So: two images, and a height
    # and a width that differ, fit no stride, and give even the coarsest map more rows than an attention window has.
    n, (h, w) = batch or 2, size or (9 * model.stride + 3, 11 * model.stride + 5)
    example = torch.zeros(n, h, w, 3, dtype=torch.uint8) if raw_input else torch.zeros(n, 3, h, w)
    free = {} if batch else {0: "batch"}
    if not size:
        free |= {1: "height", 2: "width"} if raw_input else {2: "height", 3: "width"}
    with torch.no_grad():
        graph(example)  # what a network settles in its first forward(), as DINOv2 its attention, is settled before
    try:
        with quiet(), eager_attention(model):
            program = torch.onnx.export(
                graph, (example,), dynamo=True, dynamic_shapes=(free,) if free else None, opset_version=opset,
                input_names=["images"], output_names=[output], verbose=False,
            )  # fmt: skip
    except Exception as error:  # whatever the network or the conversion to another opset leads to
        while error.__cause__:  # the exporter's own error is advice to whoever works on it
            error = error.__cause__
        raise ModelError(f"{name} cannot be exported with --opset {opset}: {first_words(error)}") from error
    written = program.model.opset_imports.get("")
    if written != opset:  # the exporter keeps its own opset, with a warning, where it cannot convert
        raise ModelError(f"{name} cannot be converted to --opset {opset}: the exporter stays at {written}")
    (logits,) = program.model.graph.outputs
    if not size:  # the exporter names them by how they come about: Min(height, 32 * ...)
        logits.shape = onnx_ir.Shape([batch or "batch", *logits.shape[1:-2], "height", "width"])
    if is_quantized(model):
        pack_weights(program.model, model)
    ClearMetadataAndDocStringPass()(program.model)  # stack traces with the paths of this machine, and a lot of them
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in metadata.items()}
    program.model.metadata_props.update(texts)
    program.save(path, external_data=external_data)
    return opset


@contextlib.contextmanager
def eager_attention(model):
    """Attention of transformers as plain matrix products: fewer operators than the fused one is taken apart into."""
    bodies = [(m, m.config._attn_implementation) for m in model.modules() if hasattr(m, "set_attn_implementation")]
    try:
        for body, _ in bodies:
            body.set_attn_implementation("eager")
        yield
    finally:
        for body, before in bodies:
            body.set_attn_implementation(before)


@contextlib.contextmanager
def quiet():
    """The exporter reports its progress to stdout, stderr, warnings and the log: none of it is for the user."""
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            with contextlib.redirect_stderr(io.StringIO()):
                yield
    finally:
        logging.disable(disabled)


def describe(checkpoint):
    """The metadata of a checkpoint's file: what a program that reads the file needs to know, and where it is from."""
    info = DataInfo.from_dict(checkpoint["data"]).to_dict()
    kept = {key: info[key] for key in ("classes", "palette", "mean", "std", "ignore_index", "size")}
    return kept | {
        "model": model_name(checkpoint["build"]),
        "dataset": info["name"],
        "checkpoint": checkpoint["id"],
        "pretrained": checkpoint["pretrained"],
        "compression": compression_summary(checkpoint["compression"]),
    }


# ---- quantized networks ---------------------------------------------------------------------------------------------


def _operator_of_onnx(name, x, *others, dtype, **attributes):
    """An operator of ONNX as torch.export takes it into the graph, with an output like x, of `dtype`."""
    version = 21 if "block_size" in attributes else 18
    return torch.onnx.ops.symbolic(name, [x, *others], attributes, dtype=dtype, shape=x.shape, version=version)


class OnnxPoint(Point):
    """A point of a network in export: bytes are made by QuantizeLinear and read by DequantizeLinear."""

    def gives_bytes(self, x):
        return False  # the operators make them, nobody else

    def quantize(self, x):
        return _operator_of_onnx("QuantizeLinear", x.float(), self.scale, self.zero_point, dtype=torch.uint8)

    def dequantize(self, q):
        if q.is_floating_point():
            return q
        return _operator_of_onnx("DequantizeLinear", q, self.scale, self.zero_point, dtype=torch.float32)

    @classmethod
    def of(cls, point):
        """Turn a Point into this, with a zero point of the type that the operators want."""
        point.__class__, point.zero_point = cls, point.zero_point.to(torch.uint8)
        return point


class OnnxLayer(QuantLayer):
    """A QuantLayer in export, mixed into its class: a weight read by DequantizeLinear, and float operators, of which
    the runtimes make integer ones where they find them between DequantizeLinear and QuantizeLinear."""

    def check_kernel(self, x):
        return True

    def lay_out(self, output_range):
        """Set what dense() reads: a Linear's as the matrix product takes it; and the point of the output, if it has
        one, from its [low, high]."""
        outputs, q = self.shape[self.axis], self.weight_q
        places = {"axis": self.axis}
        if self.bits == 4 or self.group_size:  # (outputs, inputs)
            size = self.group_size or math.prod(self.shape) // outputs
            q = unpack4(q, self.weight_scale.numel() * size) if self.bits == 4 else q
            q = q.reshape(outputs, -1)[:, : math.prod(self.shape) // outputs]
            places = {"axis": 1, "block_size": size} if self.group_size else {"axis": 0}
        scale = self.weight_scale
        if isinstance(self, QuantLinear):
            q, places["axis"] = q.t(), 1 - places["axis"]
            scale = scale.t() if self.group_size else scale
        self.read_weight = q.contiguous(), scale.contiguous(), places
        self.output = None
        if output_range is not None:
            self.output = Point()
            self.output.set_range(*output_range)
            OnnxPoint.of(self.output)

    def dense(self):
        q, scale, places = self.read_weight
        weight = _operator_of_onnx("DequantizeLinear", q, scale, dtype=torch.float32, **places)
        if isinstance(self, QuantLinear):
            return weight.t()
        return weight if weight.shape == self.shape else self.ungroup(weight[:, None])

    def run(self, x, post, form):
        y = self.simulate(self.points[0].dequantize(x))
        followed = isinstance(form, Point) and absorbed(post, form)  # by a QuantizeLinear
        if post.clips:
            y, post = ACTIVATIONS[post.attr](y, *post.args), Post()
        if self.output is not None and not followed:
            y = self.output.dequantize(self.output.quantize(y))
        if post.other is not None:
            y = y + read(post.other)
        return read(ACTIVATIONS[post.attr](y, *post.args), form)


def absorbed(post, point):
    """Whether what comes after the product only cuts off what cannot be stored at a point anyway."""
    if not post.clips:
        return False
    scale, zero_point = point.numbers
    low, high = post.args or (-math.inf if post.attr == "none" else 0.0, math.inf)
    return low <= -zero_point * scale and (UINT8[1] - zero_point) * scale <= high


def onnx_form(model):
    """A copy of a converted network for torch.onnx.export(), which puts our scales into the file and computes nothing.

    ModelError where there are no weights or no ranges to put there.
    """
    layers = quant_layers(model).values()
    if any(layer.weight_q is None for layer in layers):
        raise ModelError("it is quantized in simulation, from float weights: best.pt of the same run has int8 ones")
    if any(isinstance(point, DynamicPoint) for point in model.points):
        raise ModelError("--method dynamic finds ranges at run time, an ONNX file holds them: take --method ptq")
    model, ranges = copy.deepcopy(model), getattr(model, "output_ranges", {})
    for point in model.points:
        OnnxPoint.of(point)
    for name, layer in quant_layers(model).items():
        layer.__class__ = type(f"Onnx{type(layer).__name__}", (OnnxLayer, type(layer)), {})
        layer.attention_dtype = None
        layer.lay_out(ranges.get(name))
    return model


def pack_weights(graph_model, model):
    """Store the weights of an exported onnx_form(), which torch held in int8, with 4 bits where that is all they need.

    graph_model: an onnx_ir.Model.
    """
    import onnx_ir

    if not any(layer.bits == 4 for layer in quant_layers(model).values()):
        return
    int4 = onnx_ir.DataType.INT4
    for node in graph_model.graph:
        weight = node.inputs[0] if node.op_type == "DequantizeLinear" else None
        if weight is not None and weight.const_value is not None and weight.dtype == onnx_ir.DataType.INT8:
            weight.const_value = onnx_ir.Tensor(weight.const_value.numpy().astype(int4.numpy()), name=weight.name)
            weight.dtype = int4


def oldest_opset(model):
    """The oldest version of the ONNX operators that will do: 21 brought scales in groups and weights of 4 bits."""
    return 21 if any(layer.bits == 4 or layer.group_size for layer in quant_layers(model).values()) else OPSET


# ---- check ----------------------------------------------------------------------------------------------------------


class OnnxNetwork(nn.Module):
    """An ONNX file in onnxruntime, on the CPU with PyTorch's number of threads, as evaluate.evaluate() wants a network.

    It takes normalised images (N, 3, H, W) whatever the file takes, and gives logits (N, K, H, W); a file that gives
    class ids yields 1 for that class and 0 for the others.
    """

    stride = 1  # of the logits

    def __init__(self, path, info):
        import onnxruntime

        super().__init__()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = torch.get_num_threads(), 1
        options.log_severity_level = 4  # what goes wrong is raised; the log would repeat it
        self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self.raw_input = self.session.get_inputs()[0].type == "tensor(uint8)"
        self.output = self.session.get_outputs()[0].name
        self.classes = len(info.classes)
        self.mean, self.std = (torch.tensor(x).view(3, 1, 1) for x in (info.mean, info.std))

    def run(self, images):
        """The file's output for its input."""
        return torch.from_numpy(self.session.run([self.output], {"images": images.numpy()})[0])

    def encode(self, images):
        return images

    def decode(self, images):
        if self.raw_input:
            images = (255 * (images * self.std + self.mean)).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()
        out = self.run(images)
        return out if self.output == "logits" else F.one_hot(out.long(), self.classes).permute(0, 3, 1, 2).float()


@torch.inference_mode()
def check(path, model, images, *, info, repeats=5):
    """Run the file with onnxruntime and `model` with PyTorch on the same images and compare.

    images: uint8 batches (N, 3, H, W), of any sizes that the file takes; latency is that of the first one. info:
    DataInfo with the mean and std that PyTorch's input is normalised with, as in evaluate.py. Returns {"sizes": a row
    for each batch, "largest_difference": of logits, None where the file gives class ids, "agreement": share of all
    pixels with the same class, "latency_ms": {"torch", "onnxruntime"}, the median of `repeats`}. Raises CheckError at
    the first check that fails.
    """
    import onnx

    try:
        onnx.checker.check_model(str(path), full_check=True)
        onnx_network = OnnxNetwork(path, info)
    except Exception as error:  # both raise many kinds
        raise CheckError(f"the file is not valid ONNX: {first_words(error)}") from error
    normalise, rows, latency = v2.Compose(datasets.to_network(info)), [], {}
    agreement, tolerance = AGREEMENT, TOLERANCE
    if is_quantized(model):
        agreement, tolerance = QUANTIZED_AGREEMENT, QUANTIZED_TOLERANCE
    for batch in images:
        normal = normalise(tv_tensors.Image(batch))
        fed = batch.permute(0, 2, 3, 1).contiguous() if onnx_network.raw_input else normal
        row = {"images": " x ".join(map(str, (len(batch), *batch.shape[-2:])))}
        expected = model(normal)
        try:
            found = onnx_network.run(fed)
        except Exception as error:
            raise CheckError(f"onnxruntime cannot run {row['images']}: {first_words(error)}") from error
        least = 1 - 10 * (1 - agreement)  # of a small size, a few pixels at the borders of classes are some percent
        rows.append(row | compare(found, expected, row["images"], agreement=least, tolerance=tolerance))
        if not latency:
            runs = (lambda x=normal: model(x), lambda x=fed: onnx_network.run(x))
            latency = dict(zip(("torch", "onnxruntime"), evaluate.milliseconds(runs, repeats), strict=True))
    counts = [len(batch) * math.prod(batch.shape[-2:]) for batch in images]
    same = sum(row["agreement"] * n for row, n in zip(rows, counts, strict=True)) / sum(counts)
    demand_agreement(same, agreement, "all sizes together")
    return {
        "sizes": rows,
        "largest_difference": None if onnx_network.output == "mask" else max(r["largest_difference"] for r in rows),
        "agreement": same,
        "latency_ms": latency,
    }


def compare(found, expected, what, *, agreement=AGREEMENT, tolerance=TOLERANCE):
    """Output of the file against logits of PyTorch -> the numbers of one row; CheckError where they are too far off."""
    ids, difference = found, None
    if found.dtype.is_floating_point:
        if found.shape != expected.shape:
            raise CheckError(f"{what}: onnxruntime gives {tuple(found.shape)}, PyTorch {tuple(expected.shape)}")
        ids, difference = class_ids(found), (found - expected).abs().max().item()
        limit = tolerance * max(1.0, expected.abs().max().item())
        if not difference <= limit:  # so that NaN fails
            raise CheckError(f"{what}: logits differ by up to {difference:.3g}, where {limit:.3g} is allowed")
    same = (ids == class_ids(expected)).float().mean().item()
    demand_agreement(same, agreement, what)
    return {"largest_difference": difference, "agreement": same}


def demand_agreement(same, agreement, what):
    if not same >= agreement:
        raise CheckError(f"{what}: {same:.3%} of the pixels have the same class, {agreement:.1%} must")


def first_words(error):
    """An exception in one line, with its type."""
    return f"{type(error).__name__}: {one_line(error)}"


def check_images(dataset, *, size, stride, any_size):
    """uint8 batches (N, 3, H, W): four images one by one, then three together at one size or, if any_size, at three.

    size: (H, W), or None for each image's own. The three sizes fit no stride: smaller, portrait, and hardly more than
    `stride`, where the coarsest map has only two rows.
    """
    singles = [dataset.raw(i)[0] for i in range(min(4, len(dataset)))]
    singles = [TF.resize(image, size, antialias=True) if size else image for image in singles]
    h, w = singles[0].shape[-2:]
    sizes = [(h * 3 // 4 | 1, w * 5 // 8 | 1), (w | 1, h | 1), (stride + 1, 2 * stride + 3)] if any_size else [(h, w)]
    three = [singles[i % len(singles)] for i in range(3)]
    together = [torch.stack([TF.resize(image, size, antialias=True) for image in three]) for size in sizes]
    return [image[None] for image in singles] + together


def open_images(checkpoint, args):
    """The data set to check on; drawn scenes where that of the checkpoint is no longer there."""
    try:
        return evaluate.open_scored(
            checkpoint, weights=args.weights, dataset=args.dataset, data_root=args.data_root, size=args.size,
            split=args.split, length=2 if args.dry_run else None,
        )  # fmt: skip
    except DataError as error:
        if args.dataset or args.data_root:
            raise
        print(f"no images of {checkpoint['data']['name']} ({error}): checked on drawn scenes", file=sys.stderr)
        return datasets.open_dataset("synthetic", "val", size=args.size or checkpoint["data"]["size"], length=4)


def score(path, model, dataset):
    """evaluate.py's metrics of the file on a whole data set, and the mIoU of the network it was made from."""
    options = {
        "num_classes": len(dataset.info.classes),
        "ignore_index": dataset.info.ignore_index,
        "device": torch.device("cpu"),
        "progress": True,
    }
    loader = datasets.eval_loader(dataset)
    metrics = evaluate.evaluate(OnnxNetwork(path, dataset.info), loader, **options)
    return metrics, evaluate.evaluate(model, loader, boundary=False, **options)["miou"]


# ---- files ----------------------------------------------------------------------------------------------------------


def data_files(path):
    """The files beside an ONNX file that hold its weights; none where it holds them itself, or is no ONNX file."""
    import onnx

    try:
        graph = onnx.load(str(path), load_external_data=False).graph
    except Exception:  # whatever the bytes lead to
        return set()
    places = {entry.value for tensor in graph.initializer for entry in tensor.external_data if entry.key == "location"}
    return {Path(path).parent / Path(place).name for place in places}


def is_onnx(path):
    import onnx

    try:
        return bool(onnx.load(str(path), load_external_data=False).graph.output)
    except Exception:  # whatever the bytes lead to
        return False


# ---- command line ---------------------------------------------------------------------------------------------------


def make_parser():
    parser = datasets.Parser(__doc__)
    add = parser.add_argument
    add("--weights", default="checkpoints/train/best.pt", help="checkpoint to export")
    add("--out", metavar="FILE", help="ONNX file to write; left out: --weights with the suffix .onnx")
    add("--size", type=pixels, nargs=2, metavar=("H", "W"), help="input size, pixels; left out: any")
    add("--opset", type=positive_int, help=f"version of the ONNX operators; left out: {OPSET}, or what weights need")
    add("--raw-input", action="store_true", help="uint8 N x H x W x 3 in: the file normalises")
    add("--output", choices=OUTPUTS, default="logits", help="what comes out: logits or class ids")
    add("--external-data", action="store_true", help="weights in a file beside it (beyond 2 GB always)")
    add("--dataset", help="score the file on this data set; left out: checked on images of the checkpoint's")
    add("--data-root", help="folder of the data set to score on; left out: the checkpoint's")
    add("--split", default="val", help="split to check and score on")
    add("--threads", type=thread_count, help="CPU threads; left out: PyTorch's choice")
    add(
        "--dry-run",
        action="store_true",
        help="check on two images and one other size; to checkpoints/dry-run/ where --out is left out",
    )
    return parser


def choose_path(args):
    """Where the file goes. ModelError where that is the checkpoint itself, a folder, or a file of another kind."""
    weights = Path(args.weights)
    folder = evaluate.out_folder(None, "", dry_run=True) if args.dry_run else weights.parent
    out = Path(args.out) if args.out else folder / f"{weights.stem}.onnx"
    if out.is_dir() or out.resolve() == weights.resolve():
        raise ModelError(f"--out {out}: {'is a folder' if out.is_dir() else 'is --weights'}; name a file")
    numbers = Path(f"{out}.json")
    for file, ours in ((out, is_onnx(out)), (numbers, numbers.is_file() and b'"opset"' in numbers.read_bytes())):
        if file.exists() and not ours:
            raise ModelError(f"--out {out}: {file} is there and was not written by an export; name another file")
    return out


def main(argv=None):
    """Run the command line; returns what FILE.json holds. SystemExit with status 1 where a check fails."""
    start = time.perf_counter()
    args = make_parser().parse(argv)
    command = evaluate.command_line("export_onnx.py", argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    model, checkpoint = load_checkpoint(args.weights)
    out, info = choose_path(args), DataInfo.from_dict(checkpoint["data"])
    dataset = open_images(checkpoint, args)
    size = args.size or dataset.info.size
    images = check_images(dataset, size=size, stride=model.stride, any_size=not args.size)[
        : 3 if args.dry_run else None
    ]
    scored, old = bool(args.dataset or args.data_root), data_files(out)
    try:
        with replacing(out) as folder:
            folder.mkdir()
            new = folder / Path(os.path.realpath(out)).name
            opset = export(
                model, new, size=args.size, opset=args.opset, raw_input=args.raw_input, output=args.output,
                metadata=describe(checkpoint), external_data=args.external_data,
            )  # fmt: skip
            checks = check(new, model, images, info=info, repeats=1 if args.dry_run else 5)
            metrics, miou_torch = score(new, model, dataset) if scored else ({}, None)
            file_mb = sum(file.stat().st_size for file in (new, *data_files(new))) / 2**20
    except CheckError as error:
        raise SystemExit(f"check failed: {error}\n{out} was not written") from None
    for file in old - data_files(out):
        if file.name.startswith(out.name):  # weights of the file that was there
            file.unlink(missing_ok=True)
    done = evaluate.results(
        model, checkpoint, metrics, command=command, split=args.split if scored else None,
        seconds=time.perf_counter() - start, device=torch.device("cpu"), path=args.weights,
    )  # fmt: skip
    done |= {"file": str(out), "file_mb": file_mb, "opset": opset, "output": args.output}
    done |= {"raw_input": args.raw_input, "size": args.size, "miou_torch": miou_torch}
    done |= {"threads": torch.get_num_threads(), "latency_ms": checks.pop("latency_ms"), "checks": checks}
    if scored:
        done["dataset"] = dataset.info.name
    evaluate.write_json(f"{out}.json", done)
    report(done, data_files(out))
    return done


def report(done, beside):
    """Print the checks and the summary."""
    evaluate.print_table([
        {
            "checked on": row["images"],
            "largest difference": "-" if row["largest_difference"] is None else f"{row['largest_difference']:.1e}",
            "same class": f"{row['agreement']:.3%}",
        }
        for row in done["checks"]["sizes"]
    ])  # fmt: skip
    print()
    keys = ("model", "dataset", "split", "opset", "params", "file_mb", "miou", "miou_torch")
    latency = {f"{name}_ms": value for name, value in done["latency_ms"].items()}
    evaluate.print_table([{key: done[key] for key in keys} | latency])
    files = " and ".join(map(str, (done["file"], *beside)))
    print(f"wrote {files}; the numbers are in {done['file']}.json ({done['threads']} threads)")


if __name__ == "__main__":
    evaluate.run_cli(main)
