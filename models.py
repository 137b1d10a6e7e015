"""Segmentation networks: a backbone that encodes, a head that decodes, and the checkpoint that describes both.

Contract of every network: images (N, 3, H, W), float, ImageNet-normalised, any H and W, in; logits (N, K, H, W) out.

    features = model.encode(images)          # list of (N, C_i, h_i, w_i), finest first; model.channels, model.strides
    logits = model.decode(features)          # (N, K, h, w), over the input padded right/bottom to model.stride
    logits = model.resize(logits, (H, W))    # (N, K, H, W): bilinear, cropped; forward() is these three

Variants are rows of BACKBONES and HEADS, which go together in any pair, and of NETWORKS, which are whole. Add a row
there and build_model(), the command lines, and the tests know it.

    python models.py      # a table of every network with its parameters
"""

if __name__ == "__main__":  # the imports take seconds: Ctrl-C ends them without a traceback
    import signal

    signal.signal(signal.SIGINT, signal.SIG_DFL)

import contextlib
import datetime
import functools
import glob
import hashlib
import inspect
import itertools
import math
import os
import shutil
import sys
import urllib.error
import urllib.request
import uuid
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torch.overrides import TorchFunctionMode

FORMAT = 2  # version of the checkpoint layout; 2 brought tensors that pack_zeros() made


class ModelError(ValueError):
    """A network, a weights file or a combination of options that cannot be used; the message says what to do."""


def no_grad(function):
    """Decorator: torch.no_grad(), and out of torch.inference_mode(), whose tensors nothing can be trained on later."""
    return torch.inference_mode(False)(torch.no_grad()(function))


def one_line(error, limit=300):
    """What an exception says, in one line of at most `limit` characters; its type where it says nothing."""
    return " ".join(str(error).split())[:limit] or type(error).__name__


# ---- files ----------------------------------------------------------------------------------------------------------

CLAIMED = {}  # folder that a run writes to -> what is called whenever something is to be written there


def print_anything():
    """From now on, what stdout has no letters for is printed as \\u...; it does not end the program."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")


@contextlib.contextmanager
def replacing(path):
    """Yield a path beside `path` to write to: a file, or a folder with a file named like `path` and others that belong
    to it. It takes the name `path` when the block ends well, and goes otherwise: a file is there whole, or as it was.
    Folders that are missing are made, and a link is followed. Raises ModelError where something else than a file is
    there, and OSError with `path` where the disk is full."""
    if Path(path).exists() and not Path(path).is_file():
        raise ModelError(f"{path} is {'a folder' if Path(path).is_dir() else 'no regular file'}: name a file to write")
    path = Path(os.path.realpath(path))
    claimed = [folder for folder in path.parents if folder in CLAIMED]
    for folder in claimed:
        CLAIMED[folder]()  # may move folders away
    path.parent.mkdir(parents=True, exist_ok=True)
    if not claimed:
        remove_litter(path.parent, path.name)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        for file in temporary.iterdir() if temporary.is_dir() else ():
            if file.name != path.name:
                path.unlink(missing_ok=True)  # the old one must not be read with what belongs to the new one
                os.replace(file, path.with_name(file.name))
        os.replace(temporary / path.name if temporary.is_dir() else temporary, path)
    except Exception as error:
        cause = error
        while cause.__context__ and not isinstance(cause, OSError):  # torch.save() raises its own while it handles one
            cause = cause.__context__
        if getattr(cause, "errno", None) and str(cause.filename or temporary).startswith(str(temporary)):
            raise OSError(cause.errno, f"{cause.strerror}; left as it was", str(path)) from error
        raise
    finally:
        remove(temporary)


def write_text(path, text):
    """A text file, in UTF-8, that is there whole, or as it was."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="")


def remove(path):
    """Remove a file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def remove_litter(folder, name="*"):
    """Remove what replacing() was writing to in a folder, for files of that name, when its process was killed."""
    for path in folder.glob(f"{name if name == '*' else glob.escape(name)}.*.tmp"):
        pid = path.name.split(".")[-2]
        if pid.isdecimal() and not _runs(int(pid)):
            remove(path)


def _runs(pid):
    """Whether there is another process of that number."""
    if os.name == "nt":  # where os.kill() is no question
        return True
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return pid != os.getpid()


# ---- blocks ---------------------------------------------------------------------------------------------------------


def make_norm(norm, channels):
    """The normalisation layer named `norm` (batch, group or none) for `channels` feature maps."""
    if norm == "batch":
        return nn.BatchNorm2d(channels)
    if norm == "group":
        return nn.GroupNorm(math.gcd(32, channels), channels)
    if norm == "none":
        return nn.Identity()
    raise ModelError(f"norm {norm!r} is not known: choose one of batch, group, none")


def conv_norm_relu(c_in, c_out, kernel, norm, *, dilation=1, bias=None):
    """Convolution of unchanged size, normalisation, ReLU. `bias=None`: only where no normalisation follows."""
    bias = norm == "none" if bias is None else bias
    padding = dilation * (kernel // 2)
    conv = nn.Conv2d(c_in, c_out, kernel, padding=padding, dilation=dilation, bias=bias)
    return nn.Sequential(conv, make_norm(norm, c_out), nn.ReLU(inplace=True))


def resize_to(x, size):
    """Bilinear resize of (N, C, h, w) to `size`; the identity where it already has that size."""
    return (
        x if x.shape[-2:] == tuple(size) else F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)
    )


def enlarge(x, size):
    """resize_to() a larger size. Coarse float32 maps on a CPU as two matrix products, (H, h) @ (N, C, h, w) @ (w, W):
    the same numbers, several times faster, and so are their gradients."""
    if x.device.type != "cpu" or x.dtype != torch.float32 or x.shape[-1] > 64 or torch.compiler.is_exporting():
        return resize_to(x, size)
    rows, columns = (bilinear_weights(*lengths, x) for lengths in zip(x.shape[-2:], size, strict=True))
    with torch.autocast("cpu", enabled=False):
        return rows @ x.contiguous() @ columns.mT


def bilinear_weights(length, size, like):
    """(size, length): row i is what pixel i of a bilinear resize, without align_corners, takes of each input pixel."""
    place = ((torch.arange(size, device=like.device) + 0.5) * (length / size) - 0.5).clamp(min=0)
    pixel = torch.arange(length, device=like.device)
    return (1 - (place.clamp(max=length - 1)[:, None] - pixel).abs()).clamp(min=0).to(like.dtype)


def adaptive_pool(x, bins):
    """F.adaptive_avg_pool2d(x, bins) as two matrix products: ONNX has no adaptive pooling of a size it cannot know."""
    rows, columns = (bin_weights(n, bins, x) for n in x.shape[-2:])
    return rows @ (x @ columns.mT)  # (bins, h) @ ((N, C, h, w) @ (w, bins))


def bin_weights(length, bins, like):
    """(bins, length): row i averages the pixels from floor(i * length / bins) up to ceil((i + 1) * length / bins)."""
    edges = torch.arange(bins + 1, device=like.device) * length
    start, stop = edges[:-1, None] // bins, (edges[1:, None] + bins - 1) // bins
    pixel = torch.arange(length, device=like.device)
    return (((pixel >= start) & (pixel < stop)) / (stop - start)).to(like.dtype)


class LearnedUpsample(nn.ConvTranspose2d):
    """Transposed convolution of one class map each, starting as bilinear (Long et al. 2015, section 3.3)."""

    def __init__(self, channels, factor):
        kernel = 2 * factor - factor % 2
        super().__init__(
            channels, channels, kernel, factor, padding=math.ceil((factor - 1) / 2), groups=channels, bias=False
        )
        ramp = 1 - (torch.arange(kernel) - (kernel - 1) / 2).abs() / factor
        with torch.no_grad():
            self.weight.copy_((ramp[:, None] * ramp).expand_as(self.weight))


# ---- backbones ------------------------------------------------------------------------------------------------------


class ConvBackbone(nn.Module):
    """Stages run one after the other; the output of each is a feature map."""

    def __init__(self, stages, channels, strides):
        super().__init__()
        self.stages = nn.ModuleList(stages)
        self.channels, self.strides = channels, strides

    def forward(self, x):
        features = []
        for stage in self.stages:
            x = stage(x)
            features.append(x)
        return features[-len(self.channels) :]


class TorchvisionSwin(ConvBackbone):
    """Swin Transformer (Liu et al. 2021): stages that give (N, H, W, C), LayerNorm-ed as in its segmentation code.

    The deepest map has the norm before the classifier. The norms of the others have no scale and shift: the head's next
    layer has its own, and a head that reads the deepest map alone would leave them without a gradient.
    """

    def __init__(self, stages, channels, strides, norms):
        super().__init__(stages, channels, strides)
        self.norms = nn.ModuleList(norms)

    def forward(self, x):
        features = super().forward(x)
        return [norm(f).permute(0, 3, 1, 2) for norm, f in zip(self.norms, features, strict=True)]


class Dinov2(nn.Module):
    """DINOv2 (Oquab et al. 2023) from transformers: LayerNorm-ed patch tokens of the tapped layers as feature maps.

    The position embedding is interpolated to the grid of the input, so every multiple of 14 goes through.
    states: also give the tokens (N, T, C) of all layers, the embedding's first.
    """

    def __init__(self, body, hidden, taps):
        super().__init__()
        self.body, self.attention = body, None
        body.embeddings.mask_token.requires_grad_(False)  # only self-supervised pre-training uses it
        self.channels, self.strides = [hidden] * taps, [14] * taps

    def forward(self, x, *, states=False):
        # The CPU's fused attention kernel has a slow backward pass: plain matrix products train up to 1.4x faster.
        attention = "eager" if self.training and torch.is_grad_enabled() and x.device.type == "cpu" else "sdpa"
        if attention != self.attention:
            self.body.set_attn_implementation(attention)
            self.attention = attention
        out = self.body(pixel_values=x, output_hidden_states=states)
        return (list(out.feature_maps), out.hidden_states) if states else list(out.feature_maps)


def _dilate(stage, dilation):
    """Give up the stride of a stage and dilate what follows it (Yu and Koltun 2016).

    The convolution that had the stride still looks at undilated input, so it keeps half of the stage's dilation, as in
    torchvision's replace_stride_with_dilation, which BasicBlock and MobileNet do not offer. (torchvision's dilated
    MobileNetV3 dilates that one too, which moves what pretrained weights look at.)
    """
    for conv in (m for m in stage.modules() if isinstance(m, nn.Conv2d)):
        d = dilation
        if conv.stride == (2, 2):
            conv.stride, d = (1, 1), dilation // 2
        if conv.kernel_size != (1, 1):
            conv.dilation, conv.padding = (d, d), tuple(d * (k // 2) for k in conv.kernel_size)


def _dilated_strides(stages, strides, output_stride):
    """Dilate the stages whose stride exceeds output_stride; the strides that result."""
    for stage, stride in zip(stages, strides, strict=True):
        if stride > output_stride:
            _dilate(stage, stride // output_stride)
    return [min(s, output_stride) for s in strides]


def _build_dinov2(row, taps, _output_stride, load):
    from transformers import Dinov2Backbone, Dinov2Config  # takes seconds to import: only where it is needed

    numbers = dict(row.numbers)
    layers = numbers["num_hidden_layers"]
    out = [layers * (i + 1) // 4 for i in range(4)][-taps:]  # e.g. after layers 3, 6, 9 and 12; 0: the embedding
    config = Dinov2Config(**numbers, image_size=518, patch_size=14, out_indices=out)

    def scratch():
        body = Dinov2Backbone(config)
        with torch.no_grad():
            _start_transformer(body, numbers["hidden_size"])
        return body

    body, loaded = _transformers_body(Dinov2Backbone, row, load, scratch, out_indices=out, num_hidden_layers=layers)
    return Dinov2(body, numbers["hidden_size"], taps), loaded


def _start_transformer(body, width):
    """First weights of a DINOv2 that learns from scratch: what pre-training would have to find out anyway.

    Positions are sines and cosines of row and column (Beyer et al. 2022, section 2), of up to 4 periods an image, so
    that they survive interpolation to small grids. Attention starts as in mimetic initialization (Trockman and Kolter
    2023, section 4): queries equal keys, so patches look at their like, and what they bring back is subtracted. The
    giant has no such start: with its gated MLPs, small differences grow through 40 layers until they decide the logits.
    """
    place = torch.arange(37)[:, None] / 37 * 2 * math.pi * torch.logspace(-2, 2, width // 4, base=2)  # (37, width / 4)
    waves = torch.cat([place.sin(), place.cos()], 1)  # (37, width / 2)
    grid = torch.cat([waves.repeat_interleave(37, 0), waves.repeat(37, 1)], 1)  # (37 * 37, width)
    body.embeddings.position_embeddings[0, 1:] = grid
    if body.config.use_swiglu_ffn:
        return
    for layer in body.encoder.layer:
        attention = layer.attention
        q = torch.nn.init.orthogonal_(torch.empty(width, width)) * 0.7**0.5
        attention.q_proj.weight.copy_(q)
        attention.k_proj.weight.copy_(q)
        v = torch.nn.init.orthogonal_(torch.empty(width, width)) * 0.4**0.5
        attention.v_proj.weight.copy_(v)
        attention.o_proj.weight.copy_(-v.mT)


def _transformers_body(cls, row, load, scratch, **options):
    """A model of the transformers library, with the weights of the row's hub name where `load` finds them."""
    options["dtype"] = torch.float32  # whatever the file has
    return load(
        scratch=scratch,
        local=lambda path: _load_transformers(cls, path, row.numbers, **options),
        hub=lambda offline: cls.from_pretrained(row.weights, local_files_only=offline, **options),
    )


def _load_transformers(cls, path, numbers, **options):
    """A model that save_pretrained() wrote; its shape must be that of the table row, and no tensor may be missing."""
    kind, wanted = cls.config_class.get_config_dict(path)[0].get("model_type"), cls.config_class.model_type
    if kind != wanted:
        raise ModelError(f"--pretrained {path}: its config.json is of a {kind}, the chosen network is a {wanted}")
    model, info = cls.from_pretrained(path, local_files_only=True, output_loading_info=True, **options)
    wrong = {k: getattr(model.config, k) for k, v in numbers.items() if getattr(model.config, k) != v}
    if wrong:
        raise ModelError(f"--pretrained {path}: its config.json has {wrong}, the chosen network needs {numbers}")
    missing = sorted(info["missing_keys"])
    if missing:
        raise ModelError(f"--pretrained {path}: {len(missing)} tensors are not there, {missing[0]} for one")
    return model


def _build_mit(row, taps, _output_stride, load):
    from transformers import SegformerConfig, SegformerModel

    def scratch():
        return _start_mit(SegformerModel(SegformerConfig(**row.numbers)))

    body, loaded = _transformers_body(SegformerModel, row, load, scratch)
    return ConvBackbone(body.stages, row.numbers["hidden_sizes"][-taps:], [4, 8, 16, 32][-taps:]), loaded


def _start_mit(body):
    """First weights of convolutions as in SegFormer's code: transformers' own all but shut the depthwise ones."""
    for conv in (m for m in body.modules() if isinstance(m, nn.Conv2d)):
        fan_out = math.prod(conv.kernel_size) * conv.out_channels // conv.groups
        nn.init.normal_(conv.weight, std=math.sqrt(2 / fan_out))
    return body


def _torchvision_body(row, load, make=None):
    """A torchvision classifier, made by make(weights=None), with its ImageNet weights where `load` finds them."""
    weights = torchvision.models.get_model_weights(row.weights).DEFAULT
    make = make or functools.partial(torchvision.models.get_model, row.weights)
    return load(
        scratch=make,
        local=lambda path: _with_weights(make(), path),
        hub=lambda offline: make(weights=_cached(weights, offline)),
    )


def _with_weights(net, path):
    """`net` with the tensors in a file, however they are wrapped: in dicts, or with a prefix before each name.

    All must be there and fit, but for a classifier's, which other data do not need. ModelError with counts otherwise.
    """
    own, found = net.state_dict(), dict(_named_tensors(_read(path)))

    def fitting(prefix):
        theirs = {key: found.get(prefix + key) for key in own}
        return {key: t for key, t in theirs.items() if t is not None and t.shape == own[key].shape}

    def matters(key):
        return not key.startswith(("fc.", "classifier.", "aux_classifier.", "head.")) and "num_batches" not in key

    first, parts = next(iter(own)), {key.partition(".")[0] for key in own}
    prefixes = ["", *(name.removesuffix(first) for name in found if name.endswith(first))]
    prefix = max(prefixes, key=lambda prefix: len(fitting(prefix)))
    fit, theirs = fitting(prefix), [name.removeprefix(prefix) for name in found if name.startswith(prefix)]
    missing = [key for key in own if key not in fit and matters(key)]
    beyond = [key for key in theirs if key not in own and key.partition(".")[0] in parts and matters(key)]
    if missing or beyond:  # such as the further blocks of a deeper network
        raise ModelError(
            f"of its {len(found)} tensors {len(fit)} fit the network's {len(own)}, and not, for one, {prefix}"
            f"{[*missing, *beyond][0]}"
        )
    net.load_state_dict(fit, strict=False)
    return net


def _named_tensors(tree, name=""):
    """(dotted name, tensor) of all in dicts within dicts."""
    if torch.is_tensor(tree):
        yield name, tree
    elif isinstance(tree, dict):
        for key, value in tree.items():
            yield from _named_tensors(value, f"{name}.{key}" if name else str(key))


def _cached(weights, offline):
    """torchvision's `weights`; OSError where they would have to be downloaded and `offline` forbids it."""
    cached = Path(torch.hub.get_dir()) / "checkpoints" / Path(weights.url).name
    if offline and not cached.exists():
        raise OSError(f"{cached} is not there")
    return weights


def _build_resnet(row, taps, output_stride, load):
    net, loaded = _torchvision_body(row, load)
    stem = nn.Sequential(net.conv1, net.bn1, net.relu, net.maxpool)
    stages = [nn.Sequential(stem, net.layer1), net.layer2, net.layer3, net.layer4]
    strides = _dilated_strides(stages, [4, 8, 16, 32], output_stride)
    return ConvBackbone(stages, list(row.numbers["channels"])[-taps:], strides[-taps:]), loaded


def _build_mobilenet(row, taps, output_stride, load):
    net, loaded = _torchvision_body(row, load)
    for norm in (m for m in net.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.momentum = 0.1  # torchvision's V3 has 0.01: after 100 steps a third of the statistics is still initial
    stages = [net.features[a:b] for a, b in itertools.pairwise(row.numbers["cuts"])]
    strides = _dilated_strides(stages, [4, 8, 16, 32], output_stride)
    return ConvBackbone(stages, list(row.numbers["channels"])[-taps:], strides[-taps:]), loaded


def _build_swin(row, taps, _output_stride, load):
    def make(weights=None):
        # what torchvision.models.swin_t() makes, which takes no width
        net = torchvision.models.SwinTransformer([4, 4], window_size=[7, 7], stochastic_depth_prob=0.2, **row.numbers)
        if weights is not None:
            net.load_state_dict(weights.get_state_dict(check_hash=True))
        return net

    net, loaded = _torchvision_body(row, load, make)
    stages = [net.features[a:b] for a, b in ((0, 2), (2, 4), (4, 6), (6, 8))]  # each begins with the halving
    channels = [row.numbers["embed_dim"] * 2**i for i in range(4)][-taps:]
    norms = [*(nn.LayerNorm(c, elementwise_affine=False) for c in channels[:-1]), net.norm]
    return TorchvisionSwin(stages, channels, [4, 8, 16, 32][-taps:], norms), loaded


@dataclass(frozen=True)
class BackboneRow:
    """One backbone: how it is built, its pretrained weights (hub name or torchvision model name), its numbers."""

    build: Callable
    weights: str
    numbers: dict = field(default_factory=dict)
    dilatable: bool = True  # whether --output-stride means anything


def _dino(size, hidden, heads, layers, swiglu=False):
    return BackboneRow(
        _build_dinov2,
        f"facebook/dinov2-{size}",
        dict(hidden_size=hidden, num_attention_heads=heads, num_hidden_layers=layers, use_swiglu_ffn=swiglu),
        dilatable=False,
    )


def _resnet(depth, *channels):
    return BackboneRow(_build_resnet, f"resnet{depth}", dict(channels=channels))


def _mobilenet(name, channels, cuts):
    return BackboneRow(_build_mobilenet, name, dict(channels=channels, cuts=cuts))


def _mit(size, hidden_sizes, depths):
    numbers = dict(hidden_sizes=hidden_sizes, depths=depths, num_attention_heads=[1, 2, 5, 8], sr_ratios=[8, 4, 2, 1])
    return BackboneRow(_build_mit, f"nvidia/mit-{size}", numbers, dilatable=False)


BACKBONES = {
    "dinov2-small": _dino("small", 384, 6, 12),
    "dinov2-base": _dino("base", 768, 12, 12),
    "dinov2-large": _dino("large", 1024, 16, 24),
    "dinov2-giant": _dino("giant", 1536, 24, 40, swiglu=True),
    "resnet18": _resnet(18, 64, 128, 256, 512),
    "resnet34": _resnet(34, 64, 128, 256, 512),
    "resnet50": _resnet(50, 256, 512, 1024, 2048),
    "resnet101": _resnet(101, 256, 512, 1024, 2048),
    # MobileNetV2's last 1x1 convolution serves the classifier and is left out. MobileNetV3's is kept, as in
    # torchvision's segmentation networks: the 160 channels before it are a bottleneck without an activation.
    "mobilenet_v2": _mobilenet("mobilenet_v2", (24, 32, 96, 320), (0, 4, 7, 14, 18)),
    "mobilenet_v3_large": _mobilenet("mobilenet_v3_large", (24, 40, 112, 960), (0, 4, 7, 13, 17)),
    "swin_t": BackboneRow(
        _build_swin, "swin_t", dict(embed_dim=96, depths=[2, 2, 6, 2], num_heads=[3, 6, 12, 24]), dilatable=False
    ),
    "mit-b0": _mit("b0", [32, 64, 160, 256], [2, 2, 2, 2]),
    "mit-b1": _mit("b1", [64, 128, 320, 512], [2, 2, 2, 2]),
    "mit-b2": _mit("b2", [64, 128, 320, 512], [3, 4, 6, 3]),
    "mit-b3": _mit("b3", [64, 128, 320, 512], [3, 4, 18, 3]),
    "mit-b4": _mit("b4", [64, 128, 320, 512], [3, 8, 27, 3]),
    "mit-b5": _mit("b5", [64, 128, 320, 512], [3, 6, 40, 3]),
}


# ---- heads ----------------------------------------------------------------------------------------------------------
# A head takes the list of feature maps, finest first, and returns low-resolution logits; `stride` is theirs.


class Classifier(nn.Sequential):
    """Dropout of whole channels, then the 1x1 convolution to K logits."""

    def __init__(self, channels, num_classes, dropout):
        super().__init__(nn.Dropout2d(dropout), nn.Conv2d(channels, num_classes, 1))


class TapHead(nn.Module):
    """Each tap through its own lateral layer; then fused (concatenate, mix, classify) or the mean of a classifier each.

    `linear` (the linear probe of Oquab et al. 2023, section 7.4): normalisation, and no mixing.
    `fpn`: 1x1 convolutions to 256 channels, mixed by two 3x3 convolutions.
    `segformer`: the all-MLP decoder (Xie et al. 2021, section 3.2), whose linear layers are 1x1 convolutions.
    """

    def __init__(self, laterals, widths, mix, mixed, strides, num_classes, dropout, fuse):
        super().__init__()
        self.stride = strides[0]
        self.laterals = nn.ModuleList(laterals)
        self.mix = mix if fuse else None
        self.classifiers = nn.ModuleList(Classifier(c, num_classes, dropout) for c in ([mixed] if fuse else widths))

    def forward(self, features):
        size = features[0].shape[-2:]
        taps = [lateral(f) for lateral, f in zip(self.laterals, features, strict=True)]
        if self.mix is None:
            logits = [resize_to(c(t), size) for c, t in zip(self.classifiers, taps, strict=True)]
            return torch.stack(logits).mean(0)
        return self.classifiers[0](self.mix(torch.cat([resize_to(t, size) for t in taps], dim=1)))


def linear_head(channels, strides, num_classes, norm, dropout, fuse=True):
    laterals = [make_norm(norm, c) for c in channels]
    return TapHead(laterals, channels, nn.Identity(), sum(channels), strides, num_classes, dropout, fuse)


def fpn_head(channels, strides, num_classes, norm, dropout, fuse=True, width=256):
    laterals = [conv_norm_relu(c, width, 1, norm) for c in channels]
    mix = nn.Sequential(
        conv_norm_relu(width * len(channels), width, 3, norm, bias=True),
        conv_norm_relu(width, width, 3, norm, bias=True),
    )
    return TapHead(laterals, [width] * len(channels), mix, width, strides, num_classes, dropout, fuse)


def segformer_head(channels, strides, num_classes, norm, dropout, width=256):
    laterals = [nn.Conv2d(c, width, 1) for c in channels]
    mix = conv_norm_relu(width * len(channels), width, 1, norm)
    return TapHead(laterals, [width] * len(channels), mix, width, strides, num_classes, dropout, fuse=True)


class UnetHead(nn.Module):
    """From the deepest tap up: resize, concatenate the next tap, two 3x3 convolutions (Ronneberger et al. 2015).

    Where the next tap is not finer (a plain ViT has one stride), the map doubles in size all the same.
    """

    def __init__(self, channels, strides, num_classes, norm, dropout, widths=(256, 128, 64)):
        super().__init__()
        self.blocks = nn.ModuleList()
        self.finer = []  # per block: whether the next tap sets the size
        c, self.stride = channels[-1], strides[-1]
        skips = [*list(zip(channels, strides, strict=True))[-2::-1], (0, 0), (0, 0), (0, 0)][:3]
        for (skip, stride), width in zip(skips, widths, strict=True):
            self.finer.append(0 < stride < self.stride)
            self.stride = stride if self.finer[-1] else self.stride / 2
            block = nn.Sequential(conv_norm_relu(c + skip, width, 3, norm), conv_norm_relu(width, width, 3, norm))
            self.blocks.append(block)
            c = width
        self.classifier = Classifier(c, num_classes, dropout)

    def forward(self, features):
        x, skips = features[-1], features[-2::-1]
        for i, (block, finer) in enumerate(zip(self.blocks, self.finer, strict=True)):
            size = skips[i].shape[-2:] if finer else (2 * x.shape[-2], 2 * x.shape[-1])
            x = torch.cat([resize_to(t, size) for t in (x, *skips[i : i + 1])], dim=1)
            x = block(x)
        return self.classifier(x)


class PpmHead(nn.Module):
    """Pyramid pooling with bins 1, 2, 3, 6 (Zhao et al. 2017, section 3.2), on the deepest tap.

    The 1x1 bin has no normalisation: it would see one value a channel, which a batch of one cannot normalise.
    """

    def __init__(self, channels, strides, num_classes, norm, dropout, bins=(1, 2, 3, 6), width=256):
        super().__init__()
        c, self.stride = channels[-1], strides[-1]
        self.bins = bins
        self.branches = nn.ModuleList(conv_norm_relu(c, c // 4, 1, "none" if b == 1 else norm) for b in bins)
        self.mix = conv_norm_relu(c + c // 4 * len(bins), width, 3, norm)
        self.classifier = Classifier(width, num_classes, dropout)

    def forward(self, features):
        x = features[-1]
        pooled = [branch(adaptive_pool(x, b)) for branch, b in zip(self.branches, self.bins, strict=True)]
        return self.classifier(self.mix(torch.cat([x, *(resize_to(p, x.shape[-2:]) for p in pooled)], dim=1)))


class Aspp(nn.Module):
    """Atrous spatial pyramid pooling: parallel dilated 3x3 convolutions and image pooling, mixed to `width` channels.

    Rate 1 is a 1x1 convolution; the image-pooling branch has no normalisation, as in PpmHead.
    """

    def __init__(self, channels, norm, rates, width):
        super().__init__()
        self.branches = nn.ModuleList(
            conv_norm_relu(channels, width, 1 if r == 1 else 3, norm, dilation=r) for r in rates
        )
        self.pool = conv_norm_relu(channels, width, 1, "none")
        self.mix = conv_norm_relu(width * (len(rates) + 1), width, 1, norm)

    def forward(self, x):
        pooled = self.pool(x.mean((-2, -1), keepdim=True)).expand(-1, -1, *x.shape[-2:])
        return self.mix(torch.cat([*(branch(x) for branch in self.branches), pooled], dim=1))


class AsppHead(Aspp):
    """ASPP with rates 1, 2, 3, 6 (Chen et al. 2017, section 3.3) on the deepest tap."""

    def __init__(self, channels, strides, num_classes, norm, dropout, rates=(1, 2, 3, 6), width=256):
        super().__init__(channels[-1], norm, rates, width)
        self.stride = strides[-1]
        self.classifier = Classifier(width, num_classes, dropout)

    def forward(self, features):
        return self.classifier(super().forward(features[-1]))


class DeepLabV3PlusHead(nn.Module):
    """ASPP on the deepest tap, refined by the finest, which 48 channels stand for (Chen et al. 2018, section 3.1).

    The rates are the paper's 1, 6, 12, 18 for stride 16, twice as much for stride 8.
    """

    def __init__(self, channels, strides, num_classes, norm, dropout, width=256, low=48):
        super().__init__()
        self.stride = strides[0]
        scale = max(1, 16 // strides[-1])
        self.aspp = Aspp(channels[-1], norm, (1, 6 * scale, 12 * scale, 18 * scale), width)
        self.low = conv_norm_relu(channels[0], low, 1, norm)
        self.mix = nn.Sequential(conv_norm_relu(width + low, width, 3, norm), conv_norm_relu(width, width, 3, norm))
        self.classifier = Classifier(width, num_classes, dropout)

    def forward(self, features):
        low = self.low(features[0])
        deep = resize_to(self.aspp(features[-1]), low.shape[-2:])
        return self.classifier(self.mix(torch.cat([deep, low], dim=1)))


class OcrHead(nn.Module):
    """Object-contextual representations (Yuan et al. 2020, section 3.2) on the deepest tap.

    Coarse logits gather one representation a class over the image; each pixel then attends to these K representations.
    The coarse logits are trained too: predictions() returns them after the final ones.
    """

    def __init__(self, channels, strides, num_classes, norm, dropout, width=256, key=128):
        super().__init__()
        c, self.stride = channels[-1], strides[-1]
        self.coarse = nn.Sequential(conv_norm_relu(c, width, 1, norm), nn.Conv2d(width, num_classes, 1))
        self.pixels = conv_norm_relu(c, width, 3, norm)
        self.query = nn.Sequential(conv_norm_relu(width, key, 1, norm), conv_norm_relu(key, key, 1, norm))
        self.key = nn.Sequential(conv_norm_relu(width, key, 1, norm), conv_norm_relu(key, key, 1, norm))
        self.value = conv_norm_relu(width, key, 1, norm)
        self.up = conv_norm_relu(key, width, 1, norm)
        self.mix = conv_norm_relu(2 * width, width, 1, norm)
        self.classifier = Classifier(width, num_classes, dropout)

    def predictions(self, features):
        coarse = self.coarse(features[-1])  # (N, K, h, w)
        pixels = self.pixels(features[-1])  # (N, C, h, w)
        share = coarse.flatten(2).float().softmax(-1).to(pixels.dtype)  # (N, K, hw): where in the image each class is
        regions = (share @ pixels.flatten(2).mT).mT.unsqueeze(-1)  # (N, C, K, 1): one representation a class
        q = self.query(pixels).flatten(2).mT[:, None]  # (N, 1, hw, key)
        k = self.key(regions).flatten(2).mT[:, None]  # (N, 1, K, key)
        v = self.value(regions).flatten(2).mT[:, None]  # (N, 1, K, key)
        context = F.scaled_dot_product_attention(q, k, v)[:, 0].mT.unflatten(-1, pixels.shape[-2:])  # (N, key, h, w)
        return [self.classifier(self.mix(torch.cat([pixels, self.up(context)], dim=1))), coarse]

    def forward(self, features):
        return self.predictions(features)[0]


class AuxHead(nn.Sequential):
    """FCN head on the tap before the deepest, for deep supervision (Zhao et al. 2017, section 3.3)."""

    def __init__(self, channels, num_classes, norm, dropout):
        c = channels[-2]
        super().__init__(conv_norm_relu(c, c // 4, 3, norm), Classifier(c // 4, num_classes, dropout))

    def forward(self, features):
        return super().forward(features[-2])


class PlainHead(nn.Sequential):
    """Layers on the deepest tap, one after the other, then the classifier."""

    def __init__(self, stride, layers, width, num_classes, dropout):
        super().__init__(*layers, Classifier(width, num_classes, dropout))
        self.stride = stride

    def forward(self, features):
        return super().forward(features[-1])


def fcn_head(channels, strides, num_classes, norm, dropout):
    """3x3 convolution to a quarter of the channels, as in torchvision (Long et al. 2015)."""
    c = channels[-1] // 4
    return PlainHead(strides[-1], [conv_norm_relu(channels[-1], c, 3, norm)], c, num_classes, dropout)


@dataclass(frozen=True)
class HeadRow:
    """One head: its builder, the output stride it wants of a convolutional backbone, whether it knows --no-fuse."""

    build: Callable
    output_stride: int = 32
    fusable: bool = False


HEADS = {
    "linear": HeadRow(linear_head, fusable=True),
    "unet": HeadRow(UnetHead),
    "fpn": HeadRow(fpn_head, fusable=True),
    "ppm": HeadRow(PpmHead, output_stride=8),
    "aspp": HeadRow(AsppHead, output_stride=8),
    "ocr": HeadRow(OcrHead, output_stride=8),
    "fcn": HeadRow(fcn_head, output_stride=8),
    "deeplabv3plus": HeadRow(DeepLabV3PlusHead, output_stride=16),
    "segformer": HeadRow(segformer_head),
}


# ---- whole networks -------------------------------------------------------------------------------------------------
# Networks that are published as one: a builder gives the backbone and the head of a SegmentationModel.


def _build_fcn_resnet50(row, num_classes, load, *, norm, dropout):
    """torchvision's FCN-ResNet50, at stride 8; pretrained: trained on COCO with the 21 classes of VOC."""
    make = lambda weights=None: torchvision.models.segmentation.fcn_resnet50(  # noqa: E731
        weights=weights, weights_backbone=None, num_classes=21, aux_loss=True
    )
    weights = torchvision.models.segmentation.FCN_ResNet50_Weights.DEFAULT
    net, loaded = load(
        scratch=make,
        local=lambda path: _with_weights(make(), path),
        hub=lambda offline: make(weights=_cached(weights, offline)),
    )
    body = net.backbone
    stem = nn.Sequential(body.conv1, body.bn1, body.relu, body.maxpool)
    stages = [nn.Sequential(stem, body.layer1), body.layer2, body.layer3, body.layer4]
    backbone = ConvBackbone(stages, [256, 512, 1024, 2048], [4, 8, 8, 8])
    head = fcn_head(backbone.channels, backbone.strides, num_classes, norm, dropout)
    if loaded[0] and norm == "batch":
        _copy_in_order(net.classifier, head)
    return backbone, head, loaded


def _build_lite_deeplabv3(_row, num_classes, load, *, norm, dropout, output_stride):
    """DeepLabV3 with one dilated convolution in place of the pyramid, on MobileNetV3-Large at stride 16."""
    row = BACKBONES["mobilenet_v3_large"]
    backbone, loaded = row.build(row, 4, output_stride or 16, load)
    layers = [conv_norm_relu(960, 256, 1, norm), conv_norm_relu(256, 256, 3, norm, dilation=6)]
    return backbone, PlainHead(backbone.strides[-1], layers, 256, num_classes, dropout), loaded


def _build_segformer(row, num_classes, load, *, norm, dropout):
    """SegFormer (Xie et al. 2021); pretrained: trained on ADE20K, 150 classes; another K starts a new classifier."""
    from transformers import SegformerConfig, SegformerForSemanticSegmentation

    def scratch():
        net = SegformerForSemanticSegmentation(SegformerConfig(**row.numbers))
        _start_mit(net.segformer)
        return net

    net, loaded = _transformers_body(SegformerForSemanticSegmentation, row, load, scratch)
    channels, width = row.numbers["hidden_sizes"], row.numbers["decoder_hidden_size"]
    backbone = ConvBackbone(net.segformer.stages, channels, [4, 8, 16, 32])
    head = segformer_head(channels, backbone.strides, num_classes, norm, dropout, width)
    if loaded[0] and norm == "batch":
        fuse = net.decode_head.linear_fuse.weight  # its input has the deepest tap first, ours the finest
        fuse.data = fuse.data.unflatten(1, (len(channels), width)).flip(1).flatten(1, 2)
        _copy_in_order(net.decode_head, head)
    return backbone, head, loaded


def _copy_in_order(source, target):
    """Copy weights between modules with the same layers under other names; those of another width (K) stay.

    A Linear layer's weight fills that of a 1x1 convolution.
    """
    own = target.state_dict()
    pairs = zip(own.items(), source.state_dict().values(), strict=True)
    target.load_state_dict({k: new.view_as(old) if new.shape[:2] == old.shape[:2] else old for (k, old), new in pairs})


def _double_conv(c_in, c_out, norm):
    return nn.Sequential(conv_norm_relu(c_in, c_out, 3, norm), conv_norm_relu(c_out, c_out, 3, norm))


class UnetDecoder(nn.Module):
    """From the deepest map up: 2x2 transposed convolution, concatenate the next map, two 3x3 convolutions."""

    stride = 1

    def __init__(self, channels, num_classes, norm, dropout):
        super().__init__()
        pairs = list(itertools.pairwise(channels[::-1]))  # e.g. (1024, 512), (512, 256), ...
        self.ups = nn.ModuleList(nn.ConvTranspose2d(c, finer, 2, stride=2) for c, finer in pairs)
        self.blocks = nn.ModuleList(_double_conv(2 * finer, finer, norm) for _, finer in pairs)
        self.classifier = Classifier(channels[0], num_classes, dropout)

    def forward(self, features):
        x = features[-1]
        for up, block, skip in zip(self.ups, self.blocks, features[-2::-1], strict=True):
            x = block(torch.cat([skip, up(x)], dim=1))
        return self.classifier(x)


def _pooled_stages(channels, block):
    """block(c_in, c_out) to each of `channels`, with 2x2 max-pooling between them: maps at stride 1, 2, 4, ..."""
    stages = [block(3, channels[0])]
    stages += [nn.Sequential(nn.MaxPool2d(2), block(a, b)) for a, b in itertools.pairwise(channels)]
    return ConvBackbone(stages, list(channels), [2**i for i in range(len(channels))])


def _build_unet(row, num_classes, load, *, norm, dropout, width):
    """U-Net (Ronneberger et al. 2015), but with normalisation, and with padded convolutions, which keep the size.

    `width` channels in the first stage (64 where it is None), twice as many in each of the next four.
    """
    channels = [(width or 64) * 2**i for i in range(5)]
    backbone = _pooled_stages(channels, lambda a, b: _double_conv(a, b, norm))
    return backbone, UnetDecoder(channels, num_classes, norm, dropout), (False, None)


def max_unpool(x, pooled):
    """F.max_unpool2d of x (N, C, h, w): each value goes where `pooled` (N, C, 2h, 2w) has its 2x2 window's maximum.

    The same values and gradients as with the indices of F.max_pool2d(pooled, 2), the first of equal maxima included, in
    operations that ONNX has, for any h and w; ONNX's own MaxUnpool is not exported.
    """
    best = F.max_pool2d(pooled, 2)
    free, placed = torch.ones_like(best, dtype=torch.bool), []
    for row, col in ((0, 0), (0, 1), (1, 0), (1, 1)):
        here = (pooled[..., row::2, col::2] == best) & free
        free = free & ~here
        placed.append(x * here)
    return F.pixel_shuffle(torch.stack(placed, dim=2).flatten(1, 2), 2)


class MaxUnpoolDecoder(nn.Module):
    """From the deepest map up: 3x3 convolution to the channels of the next map, max-unpooling by that map."""

    stride = 1

    def __init__(self, channels, num_classes, norm, dropout):
        super().__init__()
        pairs = itertools.pairwise(channels[::-1])
        self.blocks = nn.ModuleList(conv_norm_relu(c, finer, 3, norm) for c, finer in pairs)
        self.last = conv_norm_relu(channels[0], channels[0], 3, norm)  # fills the zeros that the last unpooling leaves
        self.classifier = Classifier(channels[0], num_classes, dropout)

    def forward(self, features):
        x = features[-1]
        for block, pooled in zip(self.blocks, features[-2::-1], strict=True):
            x = max_unpool(block(x), pooled)
        return self.classifier(self.last(x))


def _build_fcn_maxunpool(row, num_classes, load, *, norm, dropout):
    """A plain encoder and its mirror image: the baseline of many courses, a small SegNet (Badrinarayanan et al. 2017).

    Five 3x3 convolutions with 64, 128, 256, 512 and 2048 channels and 2x2 max-pooling between them; the decoder gets
    nothing from the encoder but the places of the maxima.
    """
    channels = row.numbers["channels"]
    backbone = _pooled_stages(channels, lambda a, b: conv_norm_relu(a, b, 3, norm))
    return backbone, MaxUnpoolDecoder(channels, num_classes, norm, dropout), (False, None)


# ENet's bottlenecks (Paszke et al. 2016, table 1): (kind, channels, number), where number is the dilation of the 3x3
# convolution, or the length of the two kernels of an asymmetric one. "down" halves the size, "up" doubles it.
_ENET_CONTEXT = (
    ("conv", 128, 1), ("conv", 128, 2), ("asymmetric", 128, 5), ("conv", 128, 4),
    ("conv", 128, 1), ("conv", 128, 8), ("asymmetric", 128, 5), ("conv", 128, 16),
)  # fmt: skip
ENET_ENCODER = (
    (("down", 64, 1), *[("conv", 64, 1)] * 4),
    (("down", 128, 1), *_ENET_CONTEXT, *_ENET_CONTEXT),
)
ENET_DECODER = (
    (("up", 64, 1), *[("conv", 64, 1)] * 2),
    (("up", 16, 1), ("conv", 16, 1)),
)


class EnetInitial(nn.Module):
    """A 3x3 convolution of stride 2 to 13 channels beside the max-pooled image (figure 2a)."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 13, 3, stride=2, padding=1, bias=False)
        self.norm = nn.Sequential(nn.BatchNorm2d(16), nn.PReLU(16))

    def forward(self, x):
        return self.norm(torch.cat([self.conv(x), F.max_pool2d(x, 2)], dim=1))


class EnetBottleneck(nn.Module):
    """1x1 to a quarter of the channels, a convolution, 1x1 back, spatial dropout; added to the main branch (figure 2b).

    The main branch is the identity; of `down`, max-pooling with zeros for the new channels; of `up`, a 1x1 convolution
    and max-unpooling by the map that went into the `down` of the same size.
    """

    def __init__(self, kind, c_in, c_out, number, dropout):
        super().__init__()
        self.kind, c = kind, c_out // 4
        if kind == "asymmetric":
            inner = [
                nn.Conv2d(c, c, (number, 1), padding=(number // 2, 0), bias=False),
                nn.Conv2d(c, c, (1, number), padding=(0, number // 2), bias=False),
            ]
        elif kind == "up":
            inner = [nn.ConvTranspose2d(c, c, 3, stride=2, padding=1, output_padding=1, bias=False)]
        else:
            inner = [nn.Conv2d(c, c, 3, padding=number, dilation=number, bias=False)]
        size = 2 if kind == "down" else 1
        self.branch = nn.Sequential(
            *(nn.Conv2d(c_in, c, size, stride=size, bias=False), nn.BatchNorm2d(c), nn.PReLU(c)),
            *(*inner, nn.BatchNorm2d(c), nn.PReLU(c)),
            *(nn.Conv2d(c, c_out, 1, bias=False), nn.BatchNorm2d(c_out), nn.Dropout2d(dropout)),
        )
        self.main = None
        if kind == "up":
            self.main = nn.Sequential(nn.Conv2d(c_in, c_out, 1, bias=False), nn.BatchNorm2d(c_out))
        self.act = nn.PReLU(c_out)

    def forward(self, x, pooled=None):
        main, branch = x, self.branch(x)
        if self.kind == "down":
            main = F.pad(F.max_pool2d(x, 2), (0, 0, 0, 0, 0, branch.shape[1] - x.shape[1]))
        elif self.kind == "up":
            main = max_unpool(self.main(x), pooled)
        return self.act(main + branch)


def _enet_stage(rows, c_in, dropout):
    blocks = []
    for kind, c_out, number in rows:
        blocks.append(EnetBottleneck(kind, c_in, c_out, number, dropout))
        c_in = c_out
    return nn.Sequential(*blocks)


class EnetDecoder(nn.Module):
    """Two stages that unpool, then a transposed convolution to the logits."""

    stride = 1

    def __init__(self, channels, num_classes):
        super().__init__()
        finer = channels[::-1]
        self.stages = nn.ModuleList(_enet_stage(rows, c, 0.1) for rows, c in zip(ENET_DECODER, finer, strict=False))
        self.classifier = nn.ConvTranspose2d(finer[-1], num_classes, 3, stride=2, padding=1, output_padding=1)

    def forward(self, features):
        x = features[-1]
        for (up, *rest), pooled in zip(self.stages, features[-2::-1], strict=True):
            x = up(x, pooled)
            for block in rest:
                x = block(x)
        return self.classifier(x)


def _build_enet(row, num_classes, load):
    """ENet (Paszke et al. 2016). PReLU, one slope a channel, throughout; spatial dropout 0.01 in stage 1, 0.1 later.

    Max-unpooling is max_unpool(): the decoder finds the maxima anew in the maps that encode() returns.
    """
    stages = [EnetInitial(), _enet_stage(ENET_ENCODER[0], 16, 0.01), _enet_stage(ENET_ENCODER[1], 64, 0.1)]
    backbone = ConvBackbone(stages, [16, 64, 128], [2, 4, 8])
    return backbone, EnetDecoder(backbone.channels, num_classes), (False, None)


class Mask2FormerBackbone(nn.Module):
    """The Swin Transformer of a Mask2Former of transformers: the LayerNorm-ed maps of its four stages."""

    def __init__(self, body):
        super().__init__()
        self.body = body
        self.channels, self.strides = list(body.channels), [4, 8, 16, 32]
        body.swin.layernorm.requires_grad_(False)  # normalises an output that is not used here
        for module in body.modules():
            if hasattr(module, "relative_position_index"):
                # into the state dict, where transformers leaves it out: load_checkpoint() has no other values
                module.register_buffer("relative_position_index", module.relative_position_index)

    def forward(self, x):
        return list(self.body(pixel_values=x).feature_maps)


class Mask2FormerHead(nn.Module):
    """Pixel decoder and transformer decoder of Mask2Former (Cheng et al. 2022), from transformers.

    Q queries predict a class (or "no object") and a mask each; forward() turns them into logits a pixel, but it is
    queries() that a set loss trains. Frozen with the backbone are both decoders: fine-tuning then trains the class
    predictor, the last layer.
    """

    stride = 4

    def __init__(self, net):
        super().__init__()
        self.pixel_decoder = net.model.pixel_level_module.decoder
        self.transformer = net.model.transformer_module
        predictor = self.transformer.decoder.mask_predictor
        # transformers keeps these layers in plain lists as well, so that it would not use one put in their place
        predictor.mask_embedder = nn.Sequential(*(nn.Sequential(*m.layers) for m in predictor.mask_embedder.layers))
        self.class_predictor = net.class_predictor

    @property
    def freezes_too(self):
        return self.pixel_decoder, self.transformer

    def queries(self, features):
        """Feature maps -> [(classes (N, Q, K + 1), masks (N, Q, h, w))] of the decoder's layers, the last one first."""
        with torch.autocast(features[0].device.type, enabled=False):  # bfloat16 is too coarse for sampling places
            pixels = self.pixel_decoder([f.float() for f in features])
        decoded = self.transformer(pixels.multi_scale_features, pixels.mask_features)
        classes = [self.class_predictor(hidden.transpose(0, 1)) for hidden in decoded.intermediate_hidden_states]
        *others, last = zip(classes, decoded.masks_queries_logits, strict=True)
        return [last, *others]

    def forward(self, features):
        return class_logits(*self.queries(features)[0])


def class_logits(classes, masks):
    """Queries' classes (N, Q, K + 1) and masks (N, Q, h, w) -> logits (N, K, h, w), in float32.

    They are the log of the sum over the queries of P(class) P(pixel in mask), which section 3.4 of MaskFormer (Cheng et
    al. 2021) takes the arg max of; "no object" is left out.
    """
    with torch.autocast(masks.device.type, enabled=False):
        classes, masks = classes.float().softmax(-1)[..., :-1], masks.float().sigmoid()
        return torch.einsum("nqk,nqhw->nkhw", classes, masks).clamp(min=1e-10).log()


MASK2FORMER_SHAPE = (
    "feature_size", "mask_feature_size", "hidden_dim", "encoder_feedforward_dim", "encoder_layers", "decoder_layers",
    "num_attention_heads", "dim_feedforward", "pre_norm", "num_queries",
)  # fmt: skip


def _build_mask2former(row, num_classes, load):
    """Mask2Former (Cheng et al. 2022) with a Swin backbone; numbers: of SwinConfig and, under "decoder", of its own.

    The class predictor of pretrained weights for another number of classes starts anew.
    """
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

    swin = {k: v for k, v in row.numbers.items() if k != "decoder"}
    stages = [f"stage{i}" for i in range(1, 5)]
    config = Mask2FormerConfig(
        backbone_config=SwinConfig(**swin, drop_path_rate=0.3, out_features=stages),
        num_labels=num_classes,
        **row.numbers.get("decoder", {}),
    )

    def pretrained(name, offline=True):
        net = Mask2FormerForUniversalSegmentation.from_pretrained(
            name, num_labels=num_classes, ignore_mismatched_sizes=True, dtype=torch.float32, local_files_only=offline
        )
        wanted = {k: getattr(config, k) for k in MASK2FORMER_SHAPE} | swin
        found = {k: getattr(net.config if k in MASK2FORMER_SHAPE else net.config.backbone_config, k) for k in wanted}
        wrong = {k: v for k, v in found.items() if v != wanted[k]}
        if wrong:
            raise ModelError(f"its config.json has {wrong}, the chosen network needs {wanted}")
        return net

    net, loaded = load(
        scratch=lambda: Mask2FormerForUniversalSegmentation(config),
        local=pretrained,
        hub=lambda offline: pretrained(row.weights, offline),
    )
    return Mask2FormerBackbone(net.model.pixel_level_module.encoder), Mask2FormerHead(net), loaded


@dataclass(frozen=True)
class NetworkRow:
    """One whole network: build(row, num_classes, load, **options) -> (backbone, head, (loaded, reason)).

    options: which of build_model()'s it knows, beside num_classes, pretrained and freeze_backbone. weights and numbers:
    as in BackboneRow.
    """

    build: Callable
    weights: str = ""
    numbers: dict = field(default_factory=dict)
    options: tuple = ("norm", "dropout")


def _segformer(size, decoder_hidden_size, pretrained_on="ade-512-512"):
    numbers = BACKBONES[f"mit-{size}"].numbers | dict(decoder_hidden_size=decoder_hidden_size)
    return NetworkRow(_build_segformer, f"nvidia/segformer-{size}-finetuned-{pretrained_on}", numbers)


def _mask2former(name, embed_dim, depths, num_heads, window_size):
    numbers = dict(embed_dim=embed_dim, depths=depths, num_heads=num_heads, window_size=window_size)
    return NetworkRow(_build_mask2former, f"facebook/mask2former-swin-{name}-cityscapes-semantic", numbers, options=())


NETWORKS = {
    "fcn_resnet50": NetworkRow(_build_fcn_resnet50, options=("norm", "dropout", "aux")),
    "lite_deeplabv3": NetworkRow(_build_lite_deeplabv3, options=("norm", "dropout", "output_stride")),
    "segformer-b0": _segformer("b0", 256),
    "segformer-b1": _segformer("b1", 256),
    "segformer-b2": _segformer("b2", 768),
    "segformer-b3": _segformer("b3", 768),
    "segformer-b4": _segformer("b4", 768),
    "segformer-b5": _segformer("b5", 768, "ade-640-640"),
    "unet": NetworkRow(_build_unet, options=("norm", "dropout", "width")),
    "enet": NetworkRow(_build_enet, options=()),
    "fcn_maxunpool": NetworkRow(_build_fcn_maxunpool, numbers=dict(channels=(64, 128, 256, 512, 2048))),
    "mask2former-swin-tiny": _mask2former("tiny", 96, [2, 2, 6, 2], [3, 6, 12, 24], 7),
    "mask2former-swin-small": _mask2former("small", 96, [2, 2, 18, 2], [3, 6, 12, 24], 7),
    "mask2former-swin-base": _mask2former("base-IN21k", 128, [2, 2, 18, 2], [4, 8, 16, 32], 12),
}


# ---- network --------------------------------------------------------------------------------------------------------


class SegmentationModel(nn.Module):
    """Backbone, head and, where asked for, an auxiliary head and a learned upsampling; see the top of this file.

    `build` holds the arguments that make the same network again; `pretrained` says whether pretrained weights were
    loaded into the backbone and, where they were not, `pretrained_error` why. freeze_backbone: the backbone, and what
    the head lists as `freezes_too`, keep their weights.
    """

    def __init__(self, backbone, head, *, aux_head=None, learned=None, freeze_backbone=False):
        super().__init__()
        self.backbone, self.head, self.aux_head, self.learned = backbone, head, aux_head, learned
        self.channels, self.strides, self.stride = backbone.channels, backbone.strides, max(backbone.strides)
        self.freeze_backbone = freeze_backbone
        self.frozen = [backbone, *getattr(head, "freezes_too", ())] if freeze_backbone else []
        for part in self.frozen:
            part.requires_grad_(False)

    def train(self, mode=True):
        """Like nn.Module.train(), but what is frozen stays in eval mode: its norms must not move."""
        super().train(mode)
        for part in self.frozen:
            part.eval()
        return self

    def padded(self, size):
        """(H, W), each up to the next multiple of the stride; in a form that torch.export can divide by the stride."""
        return tuple((n + self.stride - 1) // self.stride * self.stride for n in size)

    def encode(self, images, **options):
        """(N, 3, H, W) -> feature maps, finest first, of the input padded right and bottom to its stride.

        options: of the backbone; states=True, of a DINOv2: (feature maps, tokens of all layers).
        """
        (h, w), (height, width) = images.shape[-2:], self.padded(images.shape[-2:])
        return self.backbone(F.pad(images, (0, width - w, 0, height - h)), **options)

    def decode(self, features):
        """Feature maps -> logits (N, K, h, w) over the padded input."""
        logits = self.head(features)
        return logits if self.learned is None else self.learned(logits)

    def predictions(self, features):
        """For training: the logits of decode(), then those of the auxiliary outputs (coarse or deep supervision)."""
        both = getattr(self.head, "predictions", None)
        first, *others = both(features) if both else [self.head(features)]
        if self.learned is not None:
            first = self.learned(first)
        return [first, *others] + ([self.aux_head(features)] if self.aux_head is not None else [])

    def resize(self, logits, size):
        """Low-resolution logits -> (N, K, H, W): bilinear to the padded size, cropped to `size`."""
        h, w = size
        return enlarge(logits, self.padded(size))[..., :h, :w]

    def forward(self, images):
        return self.resize(self.decode(self.encode(images)), images.shape[-2:])


def _row(table, name, flag):
    if name not in table:
        raise ModelError(f"{flag} {name!r} is not known: choose one of {', '.join(table)}")
    return table[name]


def build_model(
    *, num_classes, model=None, backbone=None, head=None, taps=4, norm="batch", dropout=0.0, fuse=True,
    upsample="bilinear", output_stride=None, aux=False, width=None, layers=None, pretrained="no", freeze_backbone=None,
):  # fmt: skip
    """Build a network: a row of BACKBONES with one of HEADS (dinov2-small + fpn where left out), or one of NETWORKS.

    model: a whole network, instead of backbone and head; it knows some of the options only.
    taps: 1 or 4 feature maps. norm, dropout, fuse: of the head. upsample: bilinear or learned. output_stride: 8, 16 or
    32 for a convolutional backbone (None: what the head does best with). aux: auxiliary head for training. width:
    channels of the first stage of a whole network (None: as published). layers: of a DINOv2, the lower ones where it is
    pretrained (None: as published).
    pretrained: "auto" (use what the hub or its cache has, else none), "require", "no", or a local folder or file.
    freeze_backbone: None freezes a pretrained backbone and trains one from scratch.
    Raises ModelError for unknown names (listing the known ones) and for combinations that make no sense.
    """
    options = dict(
        taps=taps, norm=norm, dropout=dropout, fuse=fuse, upsample=upsample, output_stride=output_stride, aux=aux,
        width=width, layers=layers,
    )  # fmt: skip
    checks = [
        (num_classes >= 2, f"num_classes {num_classes}: a network needs two classes or more"),
        (taps in (1, 4), f"--taps {taps}: choose 1 or 4"),
        (0 <= dropout < 1, f"--dropout {dropout}: must be at least 0 and below 1"),
        (output_stride in (None, 8, 16, 32), f"--output-stride {output_stride}: choose 8, 16 or 32"),
        (upsample in ("bilinear", "learned"), f"--upsample {upsample}: choose bilinear or learned"),
        (width is None or width > 0, f"--width {width}: must be at least 1"),
        (not aux or taps > 1, "--aux reads the tap before the deepest: it needs --taps 4"),
    ]
    for fine, message in checks:
        if not fine:
            raise ModelError(message)
    load = _loader(pretrained)
    if model is None:
        backbone, head = backbone or "dinov2-small", head or "fpn"
        body, decoder, (loaded, reason) = _build_pair(backbone, head, num_classes, load, options)
    else:
        if backbone or head:
            raise ModelError(f"--model {model} is a whole network: leave out --backbone and --head")
        body, decoder, (loaded, reason) = _build_whole(model, num_classes, load, options)
    if pretrained not in ("auto", "no") and not loaded:
        raise ModelError(f"--pretrained {pretrained}: there are no pretrained weights of {model}; leave it out")
    learned = None
    if upsample == "learned":
        if decoder.stride != int(decoder.stride):
            raise ModelError(f"--upsample learned needs a whole stride; {head} on {backbone} has {decoder.stride}")
        learned = LearnedUpsample(num_classes, int(decoder.stride))
    freeze = loaded if freeze_backbone is None else freeze_backbone
    net = SegmentationModel(
        body,
        decoder,
        aux_head=AuxHead(body.channels, num_classes, norm, dropout) if aux else None,
        learned=learned,
        freeze_backbone=freeze,
    )
    net.pretrained, net.pretrained_error = loaded, reason
    net.build = dict(
        num_classes=num_classes, model=model, backbone=backbone, head=head, **options, freeze_backbone=freeze
    )
    return net


def _build_pair(backbone, head, num_classes, load, options):
    row, head_row = _row(BACKBONES, backbone, "--backbone"), _row(HEADS, head, "--head")
    if not (options["fuse"] or head_row.fusable):
        raise ModelError(f"--no-fuse is for {', '.join(n for n, r in HEADS.items() if r.fusable)}, not {head}")
    if options["output_stride"] and not row.dilatable:
        dilatable = ", ".join(n for n, r in BACKBONES.items() if r.dilatable)
        raise ModelError(
            f"--output-stride: {backbone} has strides that dilation cannot replace; choose one of {dilatable}"
        )
    if options["width"] is not None:
        known = [name for name, network in NETWORKS.items() if "width" in network.options]
        raise ModelError(f"--width is for --model {', '.join(known)}, not for --backbone and --head")
    if options["layers"] is not None:
        most, least = row.numbers.get("num_hidden_layers"), 3 if options["taps"] > 1 else 1
        if most is None:
            raise ModelError(f"--layers is of a DINOv2 backbone, not of {backbone}")
        if not least <= options["layers"] <= most:
            raise ModelError(f"--layers {options['layers']}: {backbone} with this --taps takes {least} to {most}")
        row = replace(row, numbers=row.numbers | {"num_hidden_layers": options["layers"]})
    stride = options["output_stride"] or head_row.output_stride
    body, loaded = row.build(row, options["taps"], stride, load)
    fuse = {"fuse": options["fuse"]} if head_row.fusable else {}
    decoder = head_row.build(body.channels, body.strides, num_classes, options["norm"], options["dropout"], **fuse)
    return body, decoder, loaded


def _build_whole(model, num_classes, load, options):
    row = _row(NETWORKS, model, "--model")
    defaults = {k: p.default for k, p in inspect.signature(build_model).parameters.items()}
    for name, value in options.items():
        if name not in row.options and value != defaults[name]:
            flags = ", ".join(f"--{o.replace('_', '-')}" for o in row.options) or "none of these options"
            raise ModelError(f"--{name.replace('_', '-')} {value}: {model} is a whole network, which knows {flags}")
    known = {k: v for k, v in options.items() if k in row.options and k not in ("aux", "upsample")}
    return row.build(row, num_classes, load, **known)


def skeleton(build, **changes):
    """The network of build_model(), or with some arguments changed, without weights."""
    with torch.device("meta"):
        return build_model(**build | changes)


def classifier_of(build):
    """Names of the parameters whose shape depends on the number of classes."""
    more = dict(skeleton(build, num_classes=build["num_classes"] + 1).named_parameters())
    return [name for name, p in skeleton(build).named_parameters() if p.shape != more[name].shape]


def new_classifier(model, num_classes):
    """{whole name: parameter, or number that is an attribute} of a classifier of other classes, as build_model() starts
    it, for inputs as many as this one has. Nothing is changed."""
    old, new, found = skeleton(model.build), build_model(**model.build | {"num_classes": num_classes}), {}
    for name in classifier_of(model.build):
        shapes = zip(*(m.get_parameter(name).shape for m in (old, new, model)), strict=True)
        kept = tuple(slice(after if before != after else now) for before, after, now in shapes)  # pruned inputs: gone
        found[name] = new.get_parameter(name).detach()[kept].clone()
        path = name.rpartition(".")[0]
        before, after = (vars(m.get_submodule(path)) for m in (old, new))
        found |= {f"{path}.{k}": n for k, n in after.items() if type(n) is int and n != before[k]}
    return found


class Patch:
    """A network with other modules, parameters, buffers or attributes in places, until undo() puts back the very
    objects that were there. Nothing is trainable in it but the parameters that are put."""

    def __init__(self, model):
        self.model, self.before = model, []
        for p in model.parameters():
            self.set(p, "requires_grad", False)

    def set(self, owner, name, value):
        self.before.append((owner, name, getattr(owner, name)))
        setattr(owner, name, value)

    def put(self, name, value):
        """Set something by its whole name; a parameter to a tensor."""
        path, _, leaf = name.rpartition(".")
        owner = self.model.get_submodule(path)
        if torch.is_tensor(value):
            value = value.to(next(self.model.parameters()).device)
        self.set(owner, leaf, nn.Parameter(value) if leaf in owner._parameters else value)

    def undo(self):
        while self.before:
            setattr(*self.before.pop())


def model_name(build):
    """What tables call a network, e.g. "dinov2-small + fpn" or "enet"."""
    return build.get("model") or f"{build['backbone']} + {build['head']}"


# ---- pretrained weights ---------------------------------------------------------------------------------------------


def _loader(pretrained):
    """How a backbone gets its weights: a function of three ways to make it that returns (module, (loaded, reason))."""

    def load(*, scratch, local, hub):
        if pretrained == "no":
            return scratch(), (False, None)
        if pretrained not in ("auto", "require"):
            where = Path(pretrained)
            if not (where.is_file() or where.is_dir()) or any(p.is_fifo() for p in where.glob("*")):  # a pipe waits
                raise ModelError(f"--pretrained {where}: no such file, or folder of files (or say auto, require or no)")
            try:
                return local(pretrained), (True, None)
            except ModuleNotFoundError:
                raise
            except Exception as error:  # whatever a foreign file or folder leads to
                said = one_line(error).removeprefix(f"--pretrained {pretrained}: ")
                raise ModelError(f"--pretrained {pretrained} does not hold this network's weights: {said}") from error
        try:
            with contextlib.suppress(OSError):
                return hub(True), (True, None)  # cached: no network needed
            _reach_hub()
            return hub(False), (True, None)
        except OSError as error:
            reason = one_line(error, 200)
        if pretrained == "require":
            raise ModelError(f"--pretrained require: no pretrained weights to be had ({reason}); name a local copy")
        return scratch(), (False, reason)

    return load


def _reach_hub(seconds=3):
    """Raise OSError within seconds where there is no network, which the hub clients themselves take minutes to say."""
    url = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    try:
        urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=seconds).close()
    except urllib.error.HTTPError:
        pass  # it answered
    except OSError as error:
        raise OSError(f"{url} cannot be reached: {getattr(error, 'reason', error)}") from error


# ---- parameters -----------------------------------------------------------------------------------------------------


def count_params(module):
    """(all, trainable) parameters of a module, shared ones once, quantized ones as what they stand for."""
    params = list(module.parameters())
    quantized = sum(getattr(m, "quantized_params", 0) for m in module.modules())
    return sum(p.numel() for p in params) + quantized, sum(p.numel() for p in params if p.requires_grad)


def parameter_summary(model):
    """A table of parameters by part: name, total, trainable, MiB (of float32)."""
    parts = [(n, m) for n, m in (*model.named_children(), ("total", model)) if m is not None]
    lines = [f"{'part':10} {'parameters':>13} {'trainable':>13} {'MiB':>9}"]
    for name, part in parts:
        total, trainable = count_params(part)
        lines.append(f"{name:10} {total:13,} {trainable:13,} {total * 4 / 2**20:9.2f}")
    return "\n".join(lines)


def compression_summary(steps):
    """The compression steps of a checkpoint by what is short of them."""
    return [{key: step[key] for key in ("step", "method", "bits") if key in step} for step in steps]


# ---- trace ----------------------------------------------------------------------------------------------------------


class Value:
    """A tensor as one call left it: the `maker` (a Call; None of inputs, parameters and what was written to through a
    view), its `readers`, a Call each. An operation in place ends one Value and begins the next."""

    def __init__(self, tensor, maker=None):
        self.tensor, self.version, self.maker, self.readers = tensor, written(tensor), maker, []


class Call(NamedTuple):
    """One call of a function of torch: `reads` and `makes` are the Values of its tensors in their order, `module` is
    the innermost one whose forward() made the call."""

    function: Callable
    args: tuple
    kwargs: dict
    module: nn.Module
    reads: list
    makes: list

    @property
    def name(self):
        return self.function.__name__


class Trace(TorchFunctionMode):
    """What one run of a network did, at the time it did it; made by trace().

    calls: every Call, in order. outputs: the Values returned. owners: {id of a parameter or buffer: [(module, its name
    there)]}. runs: how often each module ran.
    """

    def __init__(self, model):
        super().__init__()
        self.calls, self.outputs, self.owners, self.names = [], [], {}, dict(model.named_modules())
        self.runs, self.by_module = dict.fromkeys(model.modules(), 0), {module: [] for module in model.modules()}
        self._values, self._stack = {}, [model]  # {id of a tensor: its present Value}, which keeps the tensor
        for module in model.modules():
            for name, tensor in (*module._parameters.items(), *module._buffers.items()):
                if tensor is not None:
                    self.owners.setdefault(id(tensor), []).append((module, name))

    def value(self, tensor):
        """The Value that a tensor is now."""
        value = self._values.get(id(tensor))
        if value is None or value.version != written(tensor):  # not seen yet, or changed through a view of it
            value = self._values[id(tensor)] = Value(tensor)
        return value

    def once(self, module):
        """Whether a module ran once, and nothing but that run read its parameters and buffers."""
        tensors = (*module._parameters.values(), *module._buffers.values())
        users = [c for t in tensors if t is not None for c in self.value(t).readers]
        shared = any(len(self.owners[id(t)]) > 1 for t in tensors if t is not None)
        return self.runs[module] == 1 and not shared and all(call.module is module for call in users)

    def sole_reader(self, value):
        """The one Call that reads a Value; None where there are several, or where the network returns it."""
        return value.readers[0] if len(value.readers) == 1 and value not in self.outputs else None

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        reads = [self.value(t) for t in tensors_in((args, kwargs))]
        out = function(*args, **kwargs)
        made = tensors_in(out)
        if function.__name__ == "__setitem__":
            made = [args[0]]
        if made or function.__name__ in VALUE_READERS:  # not a look at the shape alone
            call = Call(function, args, kwargs, self._stack[-1], reads, [])
            for value in dict.fromkeys(reads):
                value.readers.append(call)
            for tensor in made:
                value = self._values[id(tensor)] = Value(tensor, call)
                call.makes.append(value)
            self.calls.append(call)
            self.by_module[call.module].append(call)
        return out


def written(tensor):
    """How often a tensor was written to, through itself or a view; inference tensors do not count it."""
    return None if tensor.is_inference() else tensor._version


# functions that take numbers out of a tensor
VALUE_READERS = {"item", "tolist", "numpy", "equal", "allclose", "is_nonzero"}
VALUE_READERS |= {f"__{name}__" for name in ("bool", "float", "int", "index", "array", "contains")}


def tensors_in(value):
    """All tensors in nested lists, tuples and dicts (a ModelOutput of transformers is one)."""
    if torch.is_tensor(value):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [t for v in value for t in tensors_in(v)] if isinstance(value, (list, tuple)) else []


@no_grad
def trace(model, images=None, *, run=None):
    """Run a network once, on `images` (N, 3, H, W) or on noise of 64 x 64, and record the run -> Trace.

    Who makes and who reads a tensor is noted call by call, so an operation in place, a layer that is called twice and a
    reader outside of any layer are seen for what they are. run: what to call instead of the network.
    """
    if images is None:
        noise = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
        images = noise.to(next(p for p in model.parameters() if p.is_floating_point()))
    found = Trace(model)

    def enter(module, _inputs):
        found.runs[module] += 1
        found._stack.append(module)

    def leave(_module, _inputs, _output):
        found._stack.pop()

    hooks = [h for m in model.modules() for h in (m.register_forward_pre_hook(enter), m.register_forward_hook(leave))]
    try:
        with found:
            out = (run or model)(images)
    finally:
        for hook in hooks:
            hook.remove()
    found.outputs = [found.value(t) for t in tensors_in(out)]
    return found


# ---- inference ------------------------------------------------------------------------------------------------------


@no_grad
def fold_batchnorm(model):
    """Fold each BatchNorm2d of a network in eval mode into the convolution before it, in place -> how many were folded.

    The convolution is the one whose output the BatchNorm alone reads. One that is called twice, or a BatchNorm with
    another input, is left alone.
    """
    traced, folded = trace(model), 0
    names = {module: name for name, module in model.named_modules()}
    for call in traced.calls:
        norm = call.module
        if type(norm) is not nn.BatchNorm2d or norm.training or not traced.once(norm):
            continue
        maker = call.reads[0].maker
        conv = maker and maker.module
        transposed = type(conv) is nn.ConvTranspose2d
        if not (transposed or type(conv) is nn.Conv2d) or not traced.once(conv) or (transposed and conv.groups > 1):
            continue
        if maker.makes[0] is not call.reads[0] or traced.sole_reader(call.reads[0]) is not call:
            continue
        conv.weight, conv.bias = fuse_conv_bn_weights(
            conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias, transposed
        )
        model.set_submodule(names[norm], nn.Identity())
        folded += 1
    return folded


@no_grad
def fold_layer_scale(model):
    """Fold each layer scale (Touvron et al. 2021, section 2) into the Linear before it, in place -> names folded.

    A layer scale is a module whose only tensor is a vector, and which does nothing but multiply the last dimension of
    its input by it; its input must come from a Linear that runs once, and be read by nothing else.
    """
    traced, folded = trace(model), []
    names = {module: name for name, module in model.named_modules()}
    for scale, calls in traced.by_module.items():
        vectors = list(scale.parameters())
        if len(calls) != 1 or len(vectors) != 1 or vectors[0].dim() != 1 or [*scale.children(), *scale.buffers()]:
            continue
        (call,), (vector,) = calls, vectors
        x, *others = (value for value in call.reads if value.tensor is not vector)
        maker = x.maker
        if call.name not in ("mul", "__mul__", "__rmul__") or others or maker is None or not traced.once(scale):
            continue
        linear = maker.module
        if type(linear) is not nn.Linear or not traced.once(linear) or traced.sole_reader(x) is not call:
            continue
        if maker.makes[0] is not x or x.tensor.shape[-1:] != vector.shape:
            continue
        linear.weight *= vector[:, None]
        if linear.bias is not None:
            linear.bias *= vector
        model.set_submodule(names[scale], nn.Identity())
        folded.append(names[scale])
    return folded


# ---- checkpoints ----------------------------------------------------------------------------------------------------


def save_checkpoint(
    path, model, *, data, pretrained, command, metrics=None, args=None, compression=(), lineage=(), training=None,
    state_dict=None, run="",
):  # fmt: skip
    """Write a checkpoint that describes itself: plain types and tensors, to a temporary file that is then renamed.

    data: what DataInfo.to_dict() gives. lineage: one {"id", "command", "miou"} an ancestor. training: optimizer and
    so on, for last.pt only. state_dict: in place of the model's own, in a form that its compression can read. run: id
    that best.pt and last.pt of a run share. Raises OSError where it cannot be written, ModelError where a weight is not
    finite.
    """
    state_dict = dict(model.state_dict() if state_dict is None else state_dict)
    demand_finite(state_dict.items(), f"{path} was not written")
    state_dict = {key: pack_zeros(tensor) for key, tensor in state_dict.items()}
    checkpoint = {
        "format": FORMAT, "id": uuid.uuid4().hex, "run": run, "command": command, "build": dict(model.build),
        "data": data, "pretrained": pretrained, "compression": list(compression), "state_dict": state_dict,
        "metrics": metrics or {}, "args": args or {}, "lineage": list(lineage),
        "versions": {"torch": str(torch.__version__), "torchvision": str(torchvision.__version__)},
        "saved": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }  # fmt: skip
    if training is not None:
        checkpoint["training"] = training
    write_tensors(path, checkpoint)


def write_tensors(path, content):
    """torch.save() to a file that is there whole, or as it was."""
    with replacing(path) as temporary, open(temporary, "wb") as file:
        torch.save(content, file)


def pack_zeros(tensor):
    """A tensor as a file holds it: where that saves a tenth or more, its shape, a bit for each number that says whether
    it is 0, eight a byte, and the others; else as it is. unpack_zeros() undoes it."""
    tensor = tensor.detach()
    there = tensor.flatten() != 0
    packed_bytes = -(-there.numel() // 8) + int(there.sum()) * tensor.element_size() + 1024  # a dict costs something
    if packed_bytes > 0.9 * tensor.nbytes:
        return tensor
    bits = F.pad(there, (0, -there.numel() % 8)).view(-1, 8).to(torch.uint8)
    bits = (bits << torch.arange(8, dtype=torch.uint8, device=bits.device)).sum(1, dtype=torch.uint8)
    return {"shape": list(tensor.shape), "bits": bits, "values": tensor.flatten()[there]}


def unpack_zeros(packed):
    """The tensor that pack_zeros() was given."""
    if torch.is_tensor(packed):
        return packed
    shape, bits, values = packed["shape"], packed["bits"], packed["values"]
    there = (bits[:, None] >> torch.arange(8, dtype=torch.uint8, device=bits.device) & 1).flatten()
    out = values.new_zeros(math.prod(shape))
    out[there[: len(out)].bool()] = values
    return out.view(shape)


def demand_finite(tensors, consequence):
    """Raise ModelError, which also says the `consequence`, where one of the (name, tensor) holds NaN or infinity."""
    for name, tensor in tensors:
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ModelError(f"{name} is not finite: {consequence}")


@no_grad
def copy_tensors(own, saved, what):
    """Copy the tensors of one dict into those of another. Raises ModelError, which says `what` they are, where names or
    shapes differ."""
    for name in own.keys() | saved.keys():
        if name not in own or name not in saved or own[name].shape != saved[name].shape:
            raise ModelError(f"the {what} of {name} do not fit the network")
        own[name].copy_(saved[name])


def _read(path, device="cpu"):
    """torch.load() of plain types and tensors; one clear line where the file is not that, or a CRC in it is wrong."""
    with open(path, "rb") as file:
        try:
            if zipfile.is_zipfile(file) and (part := zipfile.ZipFile(file).testzip()):
                raise ValueError(f"CRC of {part}")
            return torch.load(path, map_location=device, weights_only=True)
        except Exception as error:  # torch and zipfile raise whatever the broken bytes lead to
            why = f"{type(error).__name__}: {one_line(error, 60)}"
            raise ModelError(f"{path} is not a PyTorch weights file, or is damaged ({why})") from error


def is_text(x):
    return type(x) is str


def is_number(x):
    return type(x) in (int, float)


def is_whole(x, low=0, high=2**53):
    return type(x) is int and low <= x <= high


def is_size(x):
    return x is None or (len(x) == 2 and all(is_whole(side, 1, 2**16) for side in x))


def is_plain(x, depth=20):
    """Whether x is made of nothing but what JSON has."""
    if type(x) is dict:
        return all(map(is_text, x)) and is_plain(list(x.values()), depth)
    if type(x) in (list, tuple):
        return depth > 0 and all(is_plain(value, depth - 1) for value in x)
    return x is None or type(x) in (bool, int, float, str)


def are_tensors(x):
    """Whether x holds nothing but plain tensors, by name."""
    kinds = all(map(is_text, x)) and all(map(torch.is_tensor, x.values()))
    return kinds and not any(
        t.layout != torch.strided or t.is_complex() or t.is_meta or t.is_quantized for t in x.values()
    )


# fields of a checkpoint, None where absent -> whether they are what save_checkpoint() writes; an exception says no
FIELDS = {
    **dict.fromkeys(("id", "command", "pretrained"), is_text),
    "run": lambda x: x is None or is_text(x),
    "build": lambda x: is_plain(x) and is_whole(x["num_classes"], 2, 2**16) and "pretrained" not in x,
    "data": lambda x: (
        is_plain(x)
        and x.keys() <= {"name", "classes", "palette", "size", "ignore_index", "mean", "std", "options"}
        and type(x["classes"]) in (list, tuple)
        and all(map(is_text, [x["name"], *x["classes"]]))
        and len(x["palette"]) == len(x["classes"])
        and all(len(colour) == 3 and all(is_whole(c, 0, 255) for c in colour) for colour in x["palette"])
        and is_size(x["size"])
        and is_whole(x.get("ignore_index", 255), 0, 255)
        and all(len(x.get(k, "rgb")) == 3 and all(math.isfinite(v) for v in x.get(k, ())) for k in ("mean", "std"))
        and min(x.get("std", [1])) > 0
        and type(x.get("options", {})) is dict
    ),
    "compression": lambda x: is_plain(x) and all(STEPS.get(step["step"], bool)(step) for step in x),
    "metrics": lambda x: all(map(is_text, x)) and all(v is None or is_number(v) for v in x.values()),
    "args": lambda x: is_plain(x) and type(x.get("data_root", "")) in (str, type(None)) and is_size(x.get("crop")),
    "lineage": lambda x: type(x) is list and is_plain(x),
    "training": lambda x: x is None or type(x) is dict,
}  # fmt: skip
STEPS = {  # the same of a step of compression
    "prune": lambda x: x["kind"] in ("weights", "channels") and type(x["plan"]) is dict and is_whole(x.get("turn", 0)),
    "quantize": lambda x: (
        all(map(is_text, [x["method"], x["state"], *x["left"].values(), *x["weights_only"].values()]))
        and is_whole(x["bits"], 1, 8)
        and all(math.isfinite(v) and v >= 0 for v in x["macs"].values())
        and x["total_macs"] > 0
    ),
}
ADAPTER = {  # the same of what lora.py writes
    "state": are_tensors,
    "numbers": lambda x: all(map(is_whole, x.values())),
    "options": lambda x: is_plain(x) and 0 <= x["dropout"] < 1,
    "base": lambda x: is_text(x["id"]) and is_text(x["hash"]),
    **{key: FIELDS[key] for key in ("data", "build", "args", "metrics")},
}


def check_fields(found, fields, path):
    """Raise ModelError where a file holds something else than `fields` says."""
    for key, is_right in fields.items():
        with contextlib.suppress(Exception):  # whatever a wrong type leads to
            if is_right(found.get(key)):
                continue
        raise ModelError(f"{path}: its entry {key!r} is not what these scripts write: the file is damaged, or made up")


def _weights(packed):
    """{name: tensor, floats as float32} of what a file holds; an exception where it is something else."""
    state = {}
    for name, value in packed.items():
        if not torch.is_tensor(value) and math.prod(value["shape"]) > 8 * value["bits"].numel():
            raise ValueError(f"{name} is shorter than its shape")
        tensor = unpack_zeros(value)
        state[name] = tensor.float() if tensor.is_floating_point() else tensor
    if not are_tensors(state):
        raise ValueError("tensors of another kind")
    return state


def read_checkpoint(path, *, device="cpu"):
    """The dict that save_checkpoint() wrote. Raises ModelError where there is none, or it is something else."""
    if not Path(path).is_file():
        raise ModelError(f"no checkpoint at {path}: `python train.py --head fpn` writes checkpoints/train/best.pt")
    checkpoint = _read(path, device)
    if not isinstance(checkpoint, dict) or "format" not in checkpoint or "build" not in checkpoint:
        raise ModelError(f"{path} holds tensors but is not a checkpoint of these scripts: train.py writes one")
    if is_whole(checkpoint["format"], FORMAT + 1):
        raise ModelError(f"{path} has format {checkpoint['format']}, newer than {FORMAT}: update these scripts")
    check_fields(checkpoint, FIELDS | {"format": is_whole}, path)
    if len(checkpoint["data"]["classes"]) != checkpoint["build"]["num_classes"]:
        raise ModelError(f"{path} has names for {len(checkpoint['data']['classes'])} of its network's "
                         f"{checkpoint['build']['num_classes']} classes")  # fmt: skip
    try:
        checkpoint["state_dict"] = _weights(checkpoint["state_dict"])
    except Exception as error:  # whatever wrong types and shapes lead to
        raise ModelError(f"{path}: its weights cannot be read: {one_line(error)}") from error
    demand_finite(checkpoint["state_dict"].items(), f"{path} cannot be used")
    return checkpoint


def load_checkpoint(path, *, device="cpu"):
    """(network in eval mode, checkpoint dict) of a file that save_checkpoint() wrote; every tensor must match."""
    checkpoint = read_checkpoint(path, device=device)
    return network_of(checkpoint, path).to(device).eval(), checkpoint


def network_of(checkpoint, path):
    """The network that a checkpoint describes, with its weights; ModelError, which names `path`, where it cannot be.

    A script that changes the structure of networks offers rebuild(model, step, state), which gives a network of
    build_model() the structure that its `step` of the checkpoint describes, for tensors shaped like those in `state`,
    and restore(model, step), which makes it ready to run once these are loaded.
    """
    state = checkpoint["state_dict"]
    try:
        with torch.device("meta"):  # no memory and no time for weights that are replaced at once
            model = build_model(**checkpoint["build"])
            steps = [(_compression(step, path), step) for step in checkpoint["compression"]]
            for script, step in steps:
                script.rebuild(model, step, state)
        for name, tensor in model.state_dict().items():
            if name in state and tensor.dtype != state[name].dtype:
                raise ModelError(f"{path}: {name} is {state[name].dtype}, not {tensor.dtype}")
        model.load_state_dict(state, assign=True)
        for script, step in steps:
            script.restore(model, step)
    except ModelError:
        raise
    except Exception as error:  # whatever wrong numbers, names and shapes lead to
        name = model_name(checkpoint["build"])
        raise ModelError(f"{path} does not fit the network it describes, {name}: {one_line(error)}") from error
    return model


def fingerprint(state_dict):
    """A hash of names and weights: the same for the same network, wherever its file came from."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state_dict.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def load_adapter(model, checkpoint, path):
    """Put an adapter that lora.py wrote into the network of a checkpoint -> (what is in its file, a function that takes
    it out again). No tensor of the network is written to. ModelError where it belongs to another one."""
    if not Path(path).is_file():
        raise ModelError(f"no adapter at {path}: `python lora.py` writes checkpoints/lora/adapter.pt")
    adapter = _read(path)
    own = checkpoint["hash"] = checkpoint.get("hash") or fingerprint(checkpoint["state_dict"])
    if not isinstance(adapter, dict) or "adapter" not in adapter:
        raise ModelError(f"{path} is no adapter: lora.py writes one, beside its best.pt")
    check_fields(adapter, ADAPTER, path)
    demand_finite(adapter["state"].items(), f"{path} cannot be used")
    base = adapter["base"]
    if own != base["hash"]:
        ours = f"checkpoint {checkpoint['id']} with weights {own}"
        raise ModelError(f"{path} belongs to checkpoint {base['id']} with weights {base['hash']}, not to {ours}")
    import lora

    try:
        return adapter, lora.attach(model, adapter).undo
    except Exception as error:  # whatever wrong names and shapes lead to
        raise ModelError(f"{path} does not fit the network that it is for: {one_line(error)}") from error


def _compression(step, path):
    """The script that can rebuild what it did to a network. Here and above: what imports this file is imported."""
    if step["step"] == "quantize":
        import quantize

        return quantize
    if step["step"] == "prune":
        import prune

        return prune
    raise ModelError(f"{path} went through {step['step']!r}, which these scripts do not know: update them")


if __name__ == "__main__":
    print(f"{'network':32} {'parameters at 19 classes':>26}")
    pairs = [dict(backbone=name, head=head) for name in BACKBONES for head in HEADS]
    for row in [*pairs, *(dict(model=name) for name in NETWORKS)]:
        with torch.device("meta"):
            net = build_model(num_classes=19, **row)
        print(f"{model_name(net.build):32} {count_params(net)[0]:26,}")
