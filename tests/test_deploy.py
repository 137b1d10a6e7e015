"""The service: its answers beside NumPy's and evaluate.py's, what it refuses and survives, its page in a browser."""

import ast
import base64
import contextlib
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import venv
from pathlib import Path

import httpx
import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

import evaluate
import export_onnx
import models
from datasets import DataInfo, open_dataset
from deploy import serve

ROOT = Path(__file__).parents[1]
CAMVID = Path(os.environ.get("CAMVID_ROOT", "CamVid")).resolve()
H, W, K = 48, 64, 5
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
META = {
    "classes": [f"class <b>{k}</b>" for k in range(K)],  # names are text, not HTML
    "palette": [[250, 10, 20], [10, 250, 30], [20, 30, 250], [200, 200, 10], [0, 0, 0]],
    **{"mean": MEAN, "std": STD, "size": [H, W], "compression": []},
}
WEIGHT = np.random.default_rng(0).normal(size=(K, 3, 3, 3)).astype(np.float32)
ANSWER = {"json": "application/json", "all": "application/json", "ids": "image/png", "overlay": "image/png"}


def write_file(path, *, kernel=1, raw=False, mask=False, fixed=None, meta=META):
    """An ONNX file of one convolution, normalising or not, of any size or one. Returns the path."""
    h, w = fixed or ("h", "w")
    nodes, x = [], "images"

    def add(op, *inputs, **attributes):
        nodes.append(helper.make_node(op, [*inputs], [f"{op}{len(nodes)}"], **attributes))
        return nodes[-1].output[0]

    constants = {"weight": WEIGHT[:, :, :kernel, :kernel]}
    if raw:
        x = add("Transpose", add("Cast", x, to=TensorProto.FLOAT), perm=[0, 3, 1, 2])
        constants |= {"a": np.float32(MEAN).reshape(3, 1, 1) * 255, "b": np.float32(STD).reshape(3, 1, 1) * 255}
        x = add("Div", add("Sub", x, "a"), "b")
    x = add("Conv", x, "weight", pads=[kernel // 2] * 4)
    if mask:
        x = add("Cast", add("ArgMax", x, axis=1, keepdims=0), to=TensorProto.UINT8)
    shape = ["n", h, w, 3] if raw else ["n", 3, h, w]
    takes = helper.make_tensor_value_info("images", TensorProto.UINT8 if raw else TensorProto.FLOAT, shape)
    gives = helper.make_tensor_value_info(x, TensorProto.UINT8 if mask else TensorProto.FLOAT, None)
    tensors = [numpy_helper.from_array(np.ascontiguousarray(v, np.float32), n) for n, v in constants.items()]
    graph = helper.make_graph(nodes, "net", [takes], [gives], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    helper.set_model_props(model, {key: json.dumps(value) for key, value in meta.items()})
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model, path)
    return path


def expected(pixels):
    """uint8 (h, w, 3) -> the class ids of a file with kernel 1."""
    return ((pixels / 255 - MEAN) / STD @ WEIGHT[:, :, 0, 0].T).argmax(-1)


def draw(height=H, width=W, seed=0):
    """Blocks of random colours: uint8 (height, width, 3)."""
    blocks = np.random.default_rng(seed).integers(0, 256, (-(-height // 8), -(-width // 8), 3), dtype=np.uint8)
    return blocks.repeat(8, 0).repeat(8, 1)[:height, :width]


def encode(pixels, kind="PNG", mode=None, **options):
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    file = io.BytesIO()
    (image.convert(mode) if mode else image).save(file, kind, **options)
    return file.getvalue()


def decode(response):
    assert response.status_code == 200, response.text
    return np.asarray(Image.open(io.BytesIO(response.content)))


@contextlib.contextmanager
def serving(*weights, flags=(), command=(sys.executable, str(ROOT / "deploy" / "serve.py")), **options):
    """A running server -> (its process, a client)."""
    flags = [*command, "--port", "0", "--threads", "1", "--weights", *map(str, weights), *map(str, flags)]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(flags, stdout=subprocess.PIPE, stderr=log, text=True, **options)
        try:
            url = next((line.split()[0] for line in process.stdout if line.startswith("http://")), None)
            log.seek(0)
            assert url, log.read()
            with httpx.Client(base_url=url.replace("0.0.0.0", "127.0.0.1"), timeout=60) as client:
                yield process, client
        finally:
            process.terminate()
            process.wait()
            process.stdout.close()


def wait_until(condition):
    for _ in range(600):
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError("it did not come about")


def memory(process, key="VmRSS"):
    """MiB of a process."""
    return int(re.search(rf"{key}:\s+(\d+)", Path(f"/proc/{process.pid}/status").read_text())[1]) / 1024


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Two files of one network: one takes normalised floats and gives scores, the other pixels and gives class ids."""
    folder = tmp_path_factory.mktemp("onnx")
    return [write_file(folder / "a" / "best.onnx"), write_file(folder / "b" / "best.onnx", raw=True, mask=True)]


@pytest.fixture(scope="module")
def server(files):
    with serving(*files, flags=["--max-mb", 1, "--max-megapixels", 4]) as running:
        yield running


# ---- answers ----


@pytest.mark.parametrize("name", ["a-best", "b-best"])
def test_each_output_is_that_of_the_network(server, name):
    _, client = server
    pixels = draw()
    ids = expected(pixels)
    assert len(np.unique(ids)) == K
    body = encode(pixels)
    answers = {o: client.post("/segment", params={"model": name, "output": o}, content=body) for o in ANSWER}
    for output, answer in answers.items():
        assert answer.status_code == 200
        assert answer.headers["content-type"] == ANSWER[output]
        assert re.fullmatch(
            r"wait;dur=.+, decode;dur=.+, network;dur=.+, encode;dur=.+", answer.headers["server-timing"]
        )
    assert (decode(answers["ids"]) == ids).all()
    blended = (pixels + np.array(META["palette"])[ids]) / 2
    assert np.abs(decode(answers["overlay"]) - blended).max() <= 1
    told = answers["all"].json()
    assert base64.b64decode(told.pop("ids")) == answers["ids"].content
    for found in (told, answers["json"].json()):
        assert (found["model"], found["width"], found["height"]) == (name, W, H)
        assert {c["id"]: c["pixels"] for c in found["classes"]} == dict(enumerate(np.bincount(ids.ravel()).tolist()))
        assert [c["share"] for c in found["classes"]] == sorted(c["pixels"] / H / W for c in found["classes"])[::-1]
        assert all(c["name"] == META["classes"][c["id"]] for c in found["classes"])
        assert found["milliseconds"].keys() == {"wait", "decode", "network", "encode"}
    form = client.post("/segment?output=ids&model=" + name, files={"image": ("photo.png", body)}, data={"other": "1"})
    assert form.content == answers["ids"].content
    clear = decode(client.post("/segment", params={"output": "overlay", "opacity": 0}, content=body))
    assert (clear == pixels).all()


def turned(orientation):
    """A picture stored so that EXIF has to turn it: rows and columns by the table of the EXIF standard."""
    pixels = draw()
    rows_down, columns_right, swapped = {
        1: (1, 1, 0), 2: (1, -1, 0), 3: (-1, -1, 0), 4: (-1, 1, 0), 5: (1, 1, 1), 6: (1, -1, 1), 7: (-1, -1, 1),
        8: (-1, 1, 1),
    }[orientation]  # fmt: skip
    stored = pixels[::rows_down, ::columns_right]
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encode(stored.transpose(1, 0, 2) if swapped else stored, exif=exif)


GREY = draw()[..., 0]
KINDS = {  # what is sent, and the RGB pixels it shows
    "rgba": (encode(np.dstack([draw(), draw(seed=1)[..., 0]])), draw()),
    "grey": (encode(GREY), np.stack([GREY] * 3, -1)),
    "grey with alpha": (encode(GREY, mode="LA"), np.stack([GREY] * 3, -1)),
    "16-bit png": (encode(GREY.astype(np.uint16) * 257), np.stack([GREY] * 3, -1)),
    "16-bit tiff": (encode(GREY.astype(np.uint16) * 257, "TIFF"), np.stack([GREY] * 3, -1)),
    "1-bit": (encode(GREY > 127), np.stack([(GREY > 127) * np.uint8(255)] * 3, -1)),
    "bmp": (encode(draw(), "BMP"), draw()),
    "ppm": (encode(draw(), "PPM"), draw()),
    "tiff": (encode(draw(), "TIFF", compression="tiff_lzw"), draw()),
    "webp": (encode(draw(), "WEBP", lossless=True), draw()),
    "cmyk": (encode(draw(), "TIFF", mode="CMYK"), draw()),  # without a black ink it is the complement of RGB
    **{f"exif {n}": (turned(n), draw()) for n in range(1, 9)},
    "damaged exif": (encode(draw(), exif=b"Exif\0\0II*\0\xff\xff\xff\xff"), draw()),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_image(kind, server):
    body, pixels = KINDS[kind]
    assert (decode(server[1].post("/segment?output=ids", content=body)) == expected(pixels)).all()


def test_palettes_and_jpegs_are_decoded_as_pillow_does(server):
    for body in (encode(draw(), mode="P"), encode(draw(), "JPEG"), encode(draw(), "JPEG", mode="CMYK")):
        pixels = np.asarray(Image.open(io.BytesIO(body)).convert("RGB"))
        assert (decode(server[1].post("/segment?output=ids", content=body)) == expected(pixels)).all()


@pytest.mark.parametrize("size", [(1, 1), (1, 700), (300, 2), (H, W + 1), (500, 300)], ids=str)
def test_an_answer_has_the_images_size(server, size):
    for name in ("a-best", "b-best"):
        ids = decode(server[1].post(f"/segment?output=ids&model={name}", content=encode(draw(*size))))
        assert ids.shape == size


@pytest.mark.parametrize("size", [(97, 131), (30, 41), (48, 200), (7, 9)], ids=str)
def test_scores_are_resized_as_pytorch_does(size, monkeypatch):
    monkeypatch.setattr(serve, "CHUNK", 5 * 131 * 3)  # a few rows at a time
    scores = np.random.default_rng(1).normal(size=(K, 29, 37)).astype(np.float32)
    wanted = F.interpolate(torch.from_numpy(scores)[None], size, mode="bilinear", align_corners=False)[0].argmax(0)
    assert (serve.best_resized(scores, *size) == wanted.numpy()).mean() > 0.999


@pytest.mark.parametrize("size", [(50, 70), (20, 30), (16, 100), (13, 9)], ids=str)
def test_windows_are_averaged(size, tmp_path):
    window = (16, 24)
    network = serve.Network(write_file(tmp_path / "net.onnx", kernel=3), threads=1, window=window)
    pixels = draw(*size)
    total, count = np.zeros((K, *size)), np.zeros(size)
    h, w = min(size[0], window[0]), min(size[1], window[1])
    for top in sorted({*range(0, size[0] - h, h * 2 // 3), size[0] - h}):
        for left in sorted({*range(0, size[1] - w, w * 2 // 3), size[1] - w}):
            total[:, top : top + h, left : left + w] += network.scores(pixels[top : top + h, left : left + w])
            count[top : top + h, left : left + w] += 1
    assert (network.segment(Image.fromarray(pixels)) == (total / count).argmax(0)).mean() > 0.999


def test_a_file_of_one_size_gets_that_size(tmp_path):
    network = serve.Network(write_file(tmp_path / "net.onnx", fixed=(24, 40), mask=True), threads=1)
    for size in ((24, 40), (100, 60), (3, 5)):
        assert network.segment(Image.fromarray(draw(*size))).shape == size
    assert (network.segment(Image.fromarray(draw(24, 40))) == expected(draw(24, 40))).all()
    windows = serve.Network(network.path, threads=1, window=(24, 40))
    assert windows.segment(Image.fromarray(draw(60, 30))).shape == (60, 30)  # too narrow for a window: as a whole
    assert (windows.segment(Image.fromarray(draw(64, 80))) == expected(draw(64, 80))).all()


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A checkpoint of a network whose classes follow the colours, its ONNX file, ten images of several sizes."""
    folder = tmp_path_factory.mktemp("exported")
    info = DataInfo("x", tuple(map(str, range(8))), tuple((30 * k, 255 - 30 * k, 9 * k) for k in range(8)), (90, 120))
    torch.manual_seed(0)
    model = models.build_model(num_classes=8, model="unet", width=4)
    images = folder / "images"
    images.mkdir()
    sources = sorted((CAMVID / "val").glob("*"))[::10][:10]
    scenes = open_dataset("synthetic", "val", length=10, size=(180, 240))
    for i in range(10):
        pixels = scenes.raw(i)[0].permute(1, 2, 0).numpy()
        image = Image.open(sources[i]) if sources else Image.fromarray(pixels)
        image.resize([(480, 360), (120, 90), (333, 200), (75, 61)][i % 4]).save(images / f"{i}.png")
    batch = torch.stack([torch.from_numpy(np.array(Image.open(f).resize((60, 45)))) for f in images.iterdir()])
    batch = batch.permute(0, 3, 1, 2).float() / 255
    model.train()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    target = (batch.mean(1) * 7.999).long()  # brightness, which leaves smooth borders as a trained network's are
    for _ in range(40):
        loss = F.cross_entropy(model((batch - torch.tensor(info.mean).view(3, 1, 1)) / 0.225), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    models.save_checkpoint(folder / "best.pt", model.eval(), data=info.to_dict(), pretrained="no", command="-")
    return folder


@pytest.mark.parametrize("slide", [[], ["--slide", "60", "80"]], ids=["fitted", "slide"])
def test_answers_are_those_of_evaluate(exported, slide, tmp_path, monkeypatch):
    monkeypatch.chdir(exported)
    if not Path("best.onnx").exists():
        export_onnx.main(["--weights", "best.pt", "--out", "best.onnx", "--threads", "1"])
    evaluate.main(["--weights", "best.pt", "--images", "images", "--out", str(tmp_path), "--threads", "1", *slide])
    with serving("best.onnx", flags=slide) as (_, client):
        for image in sorted(Path("images").iterdir()):
            ids = decode(client.post("/segment?output=ids", content=image.read_bytes()))
            theirs = np.asarray(Image.open(tmp_path / f"{image.stem}_ids.png"))
            assert len(np.unique(theirs)) > 1
            assert (ids == theirs).mean() >= 0.999, image.name
            overlay = decode(client.post("/segment?output=overlay", content=image.read_bytes())).astype(int)
            theirs = np.asarray(Image.open(tmp_path / f"{image.stem}_overlay.png"))
            assert (np.abs(overlay - theirs).max(-1) <= 1).mean() >= 0.999


# ---- refusals ----


def bomb(kind, **options):
    return encode(Image.new("1", (30_000, 15_000)), kind, **options)


PHOTO = encode(draw(), "JPEG")
BAD = {  # what is sent, status, words of the sentence
    "nothing": (dict(content=b""), 400, "no image was sent"),
    "no image": (dict(content=b"%PDF-1.7 not an image"), 415, "send JPEG, PNG, WEBP, BMP, TIFF or PPM"),
    "gif": (dict(content=encode(draw(), "GIF")), 415, "send JPEG"),
    "cut off jpeg": (dict(content=PHOTO[:-200]), 422, "damaged or cut off"),
    "cut off header": (dict(content=PHOTO[:200]), 415, "header is damaged"),
    "cut off png": (dict(content=encode(draw())[:-60]), 422, "damaged or cut off"),
    "damaged png": (dict(content=encode(draw()).replace(b"IDAT", b"IDAT\0\0\0", 1)), 422, "damaged or cut off"),
    "header alone": (dict(content=encode(draw())[:20]), 415, "header"),
    "png bomb": (dict(content=bomb("PNG")), 413, "30000 x 15000 pixels: at most 4 megapixels"),
    "tiff bomb": (dict(content=bomb("TIFF", compression="group4")), 413, "30000 x 15000 pixels"),
    "webp bomb": (dict(content=encode(Image.new("RGB", (9000, 9000)), "WEBP")), 413, "9000 x 9000 pixels"),
    "32-bit": (dict(content=encode(np.float32(GREY), "TIFF")), 422, "32 bits a pixel"),
    "large": (dict(content=bytes(2**20 + 1)), 413, "at most 1 MiB"),
    "very large": (dict(content=bytes(5 * 2**20)), 413, "at most 1 MiB"),
    "large without a length": (dict(content=(bytes(2**16) for _ in range(80))), 413, "at most 1 MiB"),
    "large form": (dict(files={"image": ("a.png", bytes(2**20 + 1))}), 413, "at most 1 MiB"),
    "wrong field": (dict(files={"file": ("a.png", PHOTO)}), 422, "field 'image'; its fields: file"),
    "text in the field": (dict(files={"image": (None, "a.png")}), 422, "one file in the field 'image'"),
    "two images": (dict(files=[("image", ("a", PHOTO)), ("image", ("b", PHOTO))]), 422, "one file"),
    "no boundary": (dict(content=PHOTO, headers={"content-type": "multipart/form-data"}), 400, "form"),
    "not a form": (dict(content=PHOTO, headers={"content-type": "multipart/form-data; boundary=x"}), 400, "form"),
    "model": (dict(content=PHOTO, params={"model": "c"}), 404, "no model 'c': there is a-best, b-best"),
    "output": (dict(content=PHOTO, params={"output": "png"}), 422, "'json', 'ids', 'overlay'"),
    "opacity": (dict(content=PHOTO, params={"opacity": "nan"}), 422, "opacity"),
    "unknown in the query": (dict(content=PHOTO, params={"ouput": "ids"}), 422, "takes model, output, opacity"),
    "another site's page": (dict(content=PHOTO, headers={"sec-fetch-site": "cross-site"}), 403, "other sites"),
    "another site's name": (dict(content=PHOTO, headers={"host": "example.org"}), 421, "host"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gets_one_sentence_and_costs_nothing(case, server, files):
    process, client = server
    sent, status, words = BAD[case]
    before = memory(process, "VmHWM")
    answer = client.post("/segment", **sent)
    assert answer.status_code == status
    (error,) = answer.json().values()
    assert words in error
    assert "\n" not in error
    assert str(files[0].parents[1]) not in answer.text + str(answer.headers)
    assert memory(process, "VmHWM") - before < 32
    assert client.post("/segment", content=PHOTO).status_code == 200
    assert client.get("/health").json()["inside"] == 0


def test_other_routes_are_named(server):
    for method, path in (("GET", "/segment"), ("GET", "/docs"), ("POST", "/models"), ("GET", "/page.html")):
        answer = server[1].request(method, path)
        assert answer.status_code in (404, 405)
        assert "POST /segment" in answer.json()["error"]


class SlowClient:
    """A POST /segment of which the first half has been sent."""

    def __init__(self, client):
        self.socket = socket.create_connection((client.base_url.host, client.base_url.port))
        head = f"POST /segment HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(PHOTO)}\r\n\r\n"
        self.socket.sendall(head.encode() + PHOTO[:100])

    def finish(self):
        """Send the rest -> status."""
        self.socket.sendall(PHOTO[100:])
        with self.socket, self.socket.makefile("rb") as answer:
            return int(answer.readline().split()[1])


def test_a_full_queue_is_said_and_a_stop_finishes_what_runs(files):
    with serving(files[0], flags=["--parallel", 1, "--queue", 1]) as (process, client):

        def inside(count):
            wait_until(lambda: client.get("/health").json()["inside"] == count)

        slow = [SlowClient(client), SlowClient(client)]
        inside(2)
        refused = client.post("/segment", content=PHOTO)
        assert refused.status_code == 503
        assert int(refused.headers["retry-after"]) >= 1
        assert "try again" in refused.json()["error"]
        slow.pop().socket.close()  # who leaves gives the place back
        inside(1)
        assert client.post("/segment", content=PHOTO).status_code == 200
        process.send_signal(signal.SIGTERM)

        def closed():
            with socket.socket() as new:
                return new.connect_ex((client.base_url.host, client.base_url.port)) != 0

        wait_until(closed)
        assert process.poll() is None
        assert slow.pop().finish() == 200
        assert process.wait(30) == 0


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: path, "no ONNX file at .*`python export_onnx.py` writes one"),
        (lambda path: path.write_bytes(b"PK\3\4 a checkpoint") and path, "no ONNX file that runs here"),
        (lambda path: write_file(path, meta={}), "no 'classes' in its metadata.*export_onnx.py"),
        (lambda path: write_file(path, meta=META | {"palette": META["palette"][1:]}), "5 classes and 4 colours"),
        (lambda path: write_file(path, meta=META | {"palette": [[0, 0, 300]] * K}), "metadata"),
        (lambda path: write_file(path, meta=META | {"std": [1, 0, 1]}), "std that is not positive"),
        (lambda path: write_file(path, meta={k: v for k, v in META.items() if k != "mean"}), "no 'mean'"),
        (lambda path: write_file(path, meta=META | dict(classes=["x"], palette=[[0] * 3])), "scores of 1 classes"),
        (lambda path: write_file(path, fixed=(8, 8)), "takes images of 8 x 8 only: --slide"),
    ],
    ids=["missing", "no onnx", "no metadata", "palette", "colour", "std", "mean", "classes", "window"],
)
def test_a_file_that_cannot_be_served_is_refused_with_what_to_do(make, words, tmp_path):
    with pytest.raises(serve.FileError, match=words) as error:
        serve.Network(make(tmp_path / "net.onnx"), threads=1, window=(16, 16))
    assert "\n" not in str(error.value)


def test_command_line(files, tmp_path, capsys):
    assert serve.main(["--weights", str(files[0]), "--dry-run"]) == ["best"]
    assert serve.main(["--weights", *map(str, [*files, files[1]]), "--dry-run"]) == ["a-best", "b-best-1", "b-best-2"]
    with socket.create_server(("127.0.0.1", 0)) as taken:
        flags = ["--weights", str(files[0]), "--port", str(taken.getsockname()[1])]
        with pytest.raises(serve.FileError, match=r"cannot listen at 127\.0\.0\.1.*--port"):
            serve.main(flags)
    done = subprocess.run(
        [sys.executable, str(ROOT / "deploy" / "serve.py")], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert re.fullmatch(r"error: no ONNX file at checkpoints/train/best\.onnx: .*\n", done.stderr)


# ---- what it is made of ----


def test_the_server_imports_what_its_requirements_name():
    names = {line.split(">=")[0] for line in (ROOT / "deploy" / "requirements.txt").read_text().split()}
    brought = {"fastapi": {"fastapi", "pydantic", "starlette"}, "pillow": {"PIL"}}
    allowed = set().union(*(brought.get(name, {name}) for name in names)) | sys.stdlib_module_names
    tree = ast.walk(ast.parse((ROOT / "deploy" / "serve.py").read_text()))
    found = {a.name.split(".")[0] for n in tree if isinstance(n, ast.Import) for a in n.names}
    tree = ast.walk(ast.parse((ROOT / "deploy" / "serve.py").read_text()))
    found |= {n.module.split(".")[0] for n in tree if isinstance(n, ast.ImportFrom)}
    assert found <= allowed


def test_the_page_needs_no_other_host_and_no_answer_names_a_path(server, files):
    _, client = server
    answers = [client.get(path) for path in ("/", "/models", "/health", "/nothing")]
    answers += [client.post("/segment", content=body) for body in (PHOTO, b"x")]
    for answer in answers:
        assert "default-src 'none'" in answer.headers["content-security-policy"]
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert "server" not in answer.headers
        assert str(files[0].parents[1]) not in answer.text
        assert str(ROOT) not in answer.text
    page = answers[0].text
    assert set(re.findall(r"https?://[^\s'\"]+", page)) <= {"http://www.w3.org/2000/svg"}  # a name, not an address
    assert not re.findall(r"<(?:script|link|img)[^>]+(?:src|href)=\"(?!data:)|@import|url\(", page)
    assert "style=" not in page  # which the policy does not allow
    shown = answers[1].json()
    assert [row["name"] for row in shown["models"]] == ["a-best", "b-best"]
    assert shown["models"][0]["classes"][1] == {"name": META["classes"][1], "colour": META["palette"][1]}


def docker_steps():
    """{instruction: [its values]} of the Dockerfile."""
    text = (ROOT / "deploy" / "Dockerfile").read_text().replace("\\\n", " ")
    steps = {}
    for line in text.splitlines():
        if line and not line.startswith("#"):
            word, _, value = line.partition(" ")
            steps.setdefault(word, []).append(value.strip())
    return steps


def test_the_dockerfile_copies_what_there_is_and_runs_as_nobody():
    steps = docker_steps()
    for copied in steps["COPY"]:
        for name in copied.split()[:-1]:
            assert (ROOT / "deploy" / name).is_file()
    assert steps["FROM"][0].startswith("python:3.")
    assert "slim" in steps["FROM"][0]
    assert steps["USER"][-1] not in ("root", "0")
    assert "requirements.txt" in " ".join(steps["RUN"])


@pytest.mark.slow
def test_the_dockerfiles_steps_in_a_fresh_environment(files):
    """The files that it copies, the packages that it installs, its commands, as another user, models read-only."""
    steps = docker_steps()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        folder.chmod(0o755)
        for copied in steps["COPY"]:
            for name in copied.split()[:-1]:
                shutil.copy(ROOT / "deploy" / name, folder / name)
        (folder / "models").mkdir()
        shutil.copy(files[0], folder / "models" / "best.onnx")
        (folder / "models").chmod(0o555)
        venv.create(folder / "venv", with_pip=True)
        python = str(folder / "venv" / "bin" / "python")
        (install,) = [step for step in steps["RUN"] if step.startswith("pip install")]
        clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        subprocess.run([python, "-m", *install.split()], cwd=folder, env=clean, check=True, capture_output=True)
        entry, arguments = (json.loads(steps[word][-1]) for word in ("ENTRYPOINT", "CMD"))
        (check,) = re.findall(r"CMD (\[.*\])", steps["HEALTHCHECK"][-1])
        weights = [arguments[1].replace("/models", str(folder / "models"))]
        assert arguments[0] == "--weights"
        user = {"user": 65534, "group": 65534} if os.getuid() == 0 else {}
        with serving(*weights, command=[python, *entry[1:]], cwd=folder, env=clean, **user) as (_, client):
            answer = client.post("/segment", content=PHOTO, headers={"host": "any.example:80"})
            assert answer.status_code == 200
            health = [word.replace("8000", str(client.base_url.port)) for word in json.loads(check)]
            subprocess.run([python, *health[1:]], env=clean, check=True)
        assert subprocess.run([python, *health[1:]], env=clean, capture_output=True).returncode != 0  # nobody there
        packages = subprocess.check_output([python, "-m", "pip", "list"], env=clean, text=True)
        assert "torch" not in packages


# ---- the page ----


class Browser:
    """Chromium through its driver, which speaks W3C WebDriver: JSON over HTTP."""

    def __init__(self, size=(1280, 900), dark=False):
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.driver = subprocess.Popen([shutil.which("chromedriver"), f"--port={port}"], **quiet)
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120)
        wait_until(self.ready)
        flags = ["--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu", "--hide-scrollbars"]
        flags += [f"--window-size={size[0]},{size[1]}", f"--blink-settings=preferredColorScheme={0 if dark else 1}"]
        options = {"goog:chromeOptions": {"args": flags}, "goog:loggingPrefs": {"browser": "ALL"}}
        made = self.ask("POST", "/session", capabilities={"alwaysMatch": options})
        self.session = f"/session/{made['sessionId']}"

    def ready(self):
        with contextlib.suppress(httpx.TransportError):
            return self.http.get("/status").json()["value"]["ready"]

    def ask(self, method, path, **body):
        answer = self.http.request(method, path, **({"json": body} if method == "POST" else {})).json()["value"]
        assert not (isinstance(answer, dict) and "error" in answer), answer
        return answer

    def open(self, url):
        self.ask("POST", f"{self.session}/url", url=str(url))

    def js(self, code):
        return self.ask("POST", f"{self.session}/execute/sync", script=code, args=[])

    def send(self, css, keys):
        """Keys, or the path of a file, to an element."""
        found = self.ask("POST", f"{self.session}/element", using="css selector", value=css)
        self.ask("POST", f"{self.session}/element/{next(iter(found.values()))}/value", text=keys)

    def console(self):
        lines = self.ask("POST", f"{self.session}/se/log", type="browser")
        return [line["message"] for line in lines if line["level"] == "SEVERE"]

    def screenshot(self, path):
        path.write_bytes(base64.b64decode(self.ask("GET", f"{self.session}/screenshot")))

    def close(self):
        with contextlib.suppress(Exception):
            self.ask("DELETE", self.session)
        self.driver.terminate()
        self.driver.wait()
        self.http.close()


@pytest.mark.skipif(not (shutil.which("chromium") and shutil.which("chromedriver")), reason="no Chromium with a driver")
def test_the_page_in_a_browser(server, tmp_path):
    """Choose an image; slider; a class alone, by key; the other network; a file that is none; another image."""
    _, client = server
    photo, other = tmp_path / "photo.png", tmp_path / "other.png"
    photo.write_bytes(turned(6))
    other.write_bytes(encode(draw(40, 30, seed=3)))
    (tmp_path / "no.png").write_text("no image")
    ids = expected(draw())
    read = """const c = document.getElementById('classes');
        return [...c.getContext('2d').getImageData(0, 0, c.width, c.height).data]"""
    browser = Browser()
    try:
        browser.open(client.base_url)
        wait_until(lambda: browser.js("return document.querySelectorAll('#model option').length") == 2)
        assert browser.js("return document.getElementById('takes').textContent").endswith("1 MiB and 4 megapixels")
        browser.send("#file", str(photo))
        wait_until(lambda: browser.js("return document.querySelectorAll('#legend button').length") == K)
        told = client.post("/segment", content=photo.read_bytes()).json()["classes"]
        shown = browser.js("return [...document.querySelectorAll('#legend button')].map(b => b.textContent)")
        assert [text[: text.rindex(">") + 1] for text in shown] == [c["name"] for c in told]
        assert [float(text.split(">")[-1][:-1]) for text in shown] == pytest.approx(
            [100 * c["share"] for c in told], abs=0.051
        )
        layer = np.array(browser.js(read)).reshape(H, W, 4)
        assert (layer[..., :3] == np.array(META["palette"])[ids]).all()
        assert (layer[..., 3] == 255).all()
        seen = np.array(browser.js(read.replace("'classes'", "'photo'"))).reshape(H, W, 4)[..., :3]
        assert (seen == draw()).all()
        times = browser.js("return [...document.querySelectorAll('#times dt')].map(e => e.textContent)")
        assert times[:3] == ["Decode", "Network", "Encode"]

        browser.send("#opacity", "\ue014" * 5)  # right arrow
        assert browser.js("return document.getElementById('classes').style.opacity") == "0.6"
        browser.send("#legend li:nth-child(2) button", "\ue007")  # enter
        layer = np.array(browser.js(read)).reshape(H, W, 4)
        assert ((layer[..., 3] == 255) == (ids == told[1]["id"])).all()
        assert set(np.unique(layer[..., 3])) == {0, 255}
        browser.js("document.getElementById('model').value = 'b-best'; document.getElementById('model').onchange()")
        wait_until(lambda: browser.js("return answer.model") == "b-best")
        assert (np.array(browser.js(read)).reshape(H, W, 4) == layer).all()  # the class is still alone
        browser.send("#legend li:nth-child(2) button", "\ue00c")  # escape
        assert (np.array(browser.js(read)).reshape(H, W, 4)[..., 3] == 255).all()

        browser.screenshot(tmp_path / "page.png")
        assert len(np.unique(np.asarray(Image.open(tmp_path / "page.png").convert("L")))) > 20
        assert browser.console() == []  # nothing that the policy refuses, no error
        browser.send("#file", str(tmp_path / "no.png"))
        wait_until(lambda: not browser.js("return document.getElementById('error').hidden"))
        assert "The file is no image" in browser.js("return document.getElementById('error').textContent")
        assert browser.js("return document.getElementById('photo').width") == W  # the picture before is still there
        browser.send("#file", str(other))
        wait_until(lambda: browser.js("return document.getElementById('photo').width") == 30)
        assert browser.js("return document.getElementById('error').hidden")
    finally:
        browser.close()


# ---- load ----


@pytest.mark.slow
def test_32_clients_for_30_seconds(files, capsys):
    """No answer is wrong or lost, memory stays where it was. The figures are printed.

    LOAD_WEIGHTS, LOAD_IMAGES, LOAD_FLAGS: files, a folder of images and flags of the server instead of the tiny ones.
    """
    weights = os.environ.get("LOAD_WEIGHTS", str(files[0])).split()
    folder = os.environ.get("LOAD_IMAGES")
    bodies = [p.read_bytes() for p in sorted(Path(folder).iterdir())[:10]] if folder else []
    bodies = bodies or [encode(draw(seed=n), "JPEG") for n in range(10)]
    for path in weights:
        with serving(path, flags=os.environ.get("LOAD_FLAGS", "").split()) as (process, client):
            wanted = [client.post("/segment?output=ids", content=body).content for body in bodies]
            times, wrong, resident = [], [], []
            end = time.monotonic() + 30

            def work(number, url=client.base_url, end=end, wanted=wanted, times=times, wrong=wrong):
                with httpx.Client(base_url=url, timeout=60) as mine:
                    while time.monotonic() < end:
                        number = (number + 1) % len(bodies)
                        start = time.perf_counter()
                        answer = mine.post("/segment?output=ids", content=bodies[number])
                        times.append(time.perf_counter() - start)
                        if answer.content != wanted[number]:
                            wrong.append(answer.status_code)

            clients = [threading.Thread(target=work, args=(n,)) for n in range(32)]
            start = time.monotonic()
            for thread in clients:
                thread.start()
            while any(thread.is_alive() for thread in clients):
                time.sleep(0.5)
                resident.append(memory(process))
            seconds = time.monotonic() - start
            p50, p99 = 1000 * np.percentile(times, [50, 99])
            early, late = np.median(resident[8:20]), np.median(resident[-12:])
            with capsys.disabled():
                print(f"\n{path}: {len(times) / seconds:.1f} requests/s, p50 {p50:.0f} ms, p99 {p99:.0f} ms, ", end="")
                print(f"{len(wrong)} of {len(times)} wrong, {early:.0f} -> {late:.0f} MiB")
            assert wrong == []
            assert late < 1.1 * early + 8
