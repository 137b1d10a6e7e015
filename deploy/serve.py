"""Serve ONNX files of export_onnx.py to programs and to people: an HTTP service and a page. No PyTorch in it.

    python deploy/serve.py                                             # checkpoints/train/best.onnx
    python deploy/serve.py --weights a.onnx b.onnx --slide 512 1024    # two to choose from; windows over large images
    curl -F image=@photo.jpg 'http://127.0.0.1:8000/segment?output=overlay' -o overlay.png

GET /            the page: drop an image, see its classes
POST /segment    an image, as the body or as the field `image` of a form; in the query `model`, `opacity`, `output`:
                 json (share of each class, milliseconds), ids (8-bit PNG), overlay (PNG), all (json and ids in base64)
GET /models      the networks, their classes and colours; what the service takes
GET /health      for whoever watches it

An image is turned as its EXIF says, fitted into the size that the network was trained at, and answered at its own, as
evaluate.py --images does it. What cannot be answered gets a status from 400 on and {"error": "one sentence"}.
"""

import argparse
import asyncio
import base64
import contextlib
import hashlib
import io
import json
import math
import os
import re
import signal
import socket
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import onnxruntime
import uvicorn
from fastapi import FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from PIL import Image, ImageOps
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "PPM")
UNSIZED = (1024, 2048)  # a network that was trained on images of any size sees no larger ones, unless in windows
CHUNK = 2**20  # numbers of the enlarged scores at once
BODY_SECONDS = 60  # for an image to arrive
DRAIN_SECONDS, DRAIN_BYTES = 5, 2**26  # what a refused client may go on sending: most read no answer before they have
ROUTES = "GET /", "GET /health", "GET /models", "POST /segment"
Image.MAX_IMAGE_PIXELS = None  # the limit here is --max-megapixels


class FileError(Exception):
    """An ONNX file or a flag that cannot be served; the message says what to do."""


def one_line(error):
    """An exception's first line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


# ---- images ---------------------------------------------------------------------------------------------------------


def decode(body, max_pixels):
    """Bytes of an image file -> PIL image, RGB, the right way up. HTTPException where they are none, or too large.

    The size is known, and refused, before any pixel is decoded. 16-bit grey becomes 8-bit; transparency is left out.
    """
    try:
        image = Image.open(io.BytesIO(body), formats=FORMATS)
    except Exception:  # PIL raises OSError, SyntaxError, ValueError, struct.error, ...
        kinds = f"{', '.join(FORMATS[:-1])} or {FORMATS[-1]}"
        raise HTTPException(415, f"the file is no image, or its header is damaged: send {kinds}") from None
    if image.width * image.height > max_pixels:
        size = f"{image.width} x {image.height} pixels"
        raise HTTPException(413, f"the image has {size}: at most {max_pixels / 1e6:g} megapixels are taken")
    try:
        image.load()
    except Exception:
        raise HTTPException(422, "the image is damaged or cut off: its pixels cannot be decoded") from None
    with contextlib.suppress(Exception):  # damaged EXIF says nothing about the pixels
        image = ImageOps.exif_transpose(image)
    if image.mode[0] in "IF":
        values = np.asarray(image)
        if image.mode == "F" or values.min() < 0 or values.max() > 65535:
            raise HTTPException(422, "the image has 32 bits a pixel: convert it to 8 or 16")
        image = Image.fromarray((values >> 8).astype(np.uint8))
    return image if image.mode == "RGB" else image.convert("RGB")


def png(image):
    """PIL image -> bytes. Level 1: class ids hardly get smaller beyond it, and photos take five times as long."""
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=1)
    return file.getvalue()


# ---- network --------------------------------------------------------------------------------------------------------


class Network:
    """An ONNX file of export_onnx.py in onnxruntime, on the CPU."""

    def __init__(self, path, *, threads, fit=None, window=None):
        """fit: (H, W) that images are fitted into, None: the file's. window: (h, w), None: images as a whole."""
        path = Path(path)
        if not path.is_file():
            raise FileError(f"no ONNX file at {path}: `python export_onnx.py` writes one from a checkpoint")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.enable_cpu_mem_arena = options.enable_mem_pattern = False  # both keep memory for every size they saw
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # cores are for images, not waiting
        options.log_severity_level = 4  # what goes wrong is raised; the log would repeat it
        export = "`python export_onnx.py --weights CHECKPOINT`"
        try:
            self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # many kinds
            raise FileError(f"{path} is no ONNX file that runs here: {export} writes one ({one_line(error)})") from None
        self.path, self.megabytes, self.window = path, path.stat().st_size / 2**20, window
        self.about = self.session.get_modelmeta().custom_metadata_map
        try:
            self.read_metadata()
        except (ArithmeticError, KeyError, TypeError, ValueError) as error:
            what = f"no {error}" if isinstance(error, KeyError) else one_line(error)
            raise FileError(f"{path} does not describe its network ({what} in its metadata): {export} does") from None
        takes = self.session.get_inputs()[0]
        self.input, self.raw_input = takes.name, takes.type == "tensor(uint8)"
        fixed = tuple(takes.shape[1:3] if self.raw_input else takes.shape[2:])
        self.fixed = fixed if all(isinstance(n, int) for n in fixed) else None
        self.size = self.fixed or fit or self.size
        if window and self.fixed not in (None, window):
            raise FileError(f"{path} takes images of {self.fixed[0]} x {self.fixed[1]} only: --slide must be that")
        try:
            h, w = self.fixed or self.size or (64, 64)
            self.segment(Image.new("RGB", (w, h)))  # the first run also takes longest
        except Exception as error:
            raise FileError(
                f"{path} does not take an image and give scores of {len(self.classes)} classes, or class ids, as a "
                f"file of {export} does ({one_line(error)})"
            ) from None

    def read_metadata(self):
        """Set classes, palette, mean, std, size. KeyError, TypeError, ValueError where they make no sense."""
        names = "classes", "palette", "mean", "std", "size"
        self.classes, self.palette, mean, std, self.size = (json.loads(self.about[name]) for name in names)
        if np.array(self.palette, dtype=np.uint8).shape != (len(self.classes), 3) or len(self.classes) > 256:
            raise ValueError(f"{len(self.classes)} classes and {len(self.palette)} colours")
        mean, std = np.array([mean, std], dtype=np.float32).reshape(2, 3)
        if not (std > 0).all():
            raise ValueError("a std that is not positive")
        self.steps = json.loads(self.about.get("compression", "[]"))
        self.scale, self.shift = 1 / (255 * std), -mean / std

    def scores(self, pixels):
        """uint8 (h, w, 3) -> float32 (K, h, w): logits, or 1 and 0 where the file gives class ids."""
        if self.raw_input:
            x = pixels[None]
        else:
            x = np.empty((1, 3, *pixels.shape[:2]), dtype=np.float32)
            for i in range(3):
                np.multiply(pixels[..., i], self.scale[i], out=x[0, i])
                x[0, i] += self.shift[i]
        out = self.session.run(None, {self.input: x})[0][0]
        if out.ndim == 2:
            out = (np.arange(len(self.classes))[:, None, None] == out).astype(np.float32)
        if out.shape != (len(self.classes), *pixels.shape[:2]):
            raise ValueError(f"scores of shape {out.shape} for an image of {pixels.shape}")
        return out

    def segment(self, image):
        """PIL image (W, H) -> class ids uint8 (H, W)."""
        width, height = image.size
        if self.window and not (self.fixed and (height < self.fixed[0] or width < self.fixed[1])):
            return self.slide(np.asarray(image))
        h, w = self.seen(height, width)
        scores = self.scores(np.asarray(image if (h, w) == (height, width) else image.resize((w, h), Image.BILINEAR)))
        return best(scores) if (h, w) == (height, width) else best_resized(scores, height, width)

    def seen(self, height, width):
        """The size at which the network sees an image: its own, shape kept, as large as fits."""
        if self.fixed:
            return self.fixed
        (h, w), limit = self.size or UNSIZED, math.inf if self.size else 1
        scale = min(h / height, w / width, limit)
        return max(1, round(height * scale)), max(1, round(width * scale))

    def slide(self, pixels):
        """uint8 (H, W, 3) -> uint8 (H, W): class ids of the summed scores of windows, each 2/3 of one further.

        Only the rows that the present row of windows covers are kept.
        """
        size = pixels.shape[:2]
        window = [min(n, w) for n, w in zip(size, self.window, strict=True)]
        tops, lefts = ([*range(0, n - w, max(1, w * 2 // 3)), n - w] for n, w in zip(size, window, strict=True))
        ids, (h, w) = np.empty(size, dtype=np.uint8), window
        band = np.zeros((len(self.classes), h, size[1]), dtype=np.float32)
        for top, below in zip(tops, [*tops[1:], size[0]], strict=True):
            for left in lefts:
                band[:, :, left : left + w] += self.scores(pixels[top : top + h, left : left + w])
            done = below - top
            ids[top:below] = best(band[:, :done])
            band[:, : h - done] = band[:, done:]
            band[:, h - done :] = 0
        return ids


def best(scores):
    """Scores (K, h, w) -> uint8 (h, w), the class of the highest one; many times faster than argmax(0)."""
    highest, ids = scores[0].copy(), np.zeros(scores.shape[1:], dtype=np.uint8)
    for k, score in enumerate(scores[1:], 1):
        np.copyto(ids, k, where=score > highest)
        np.maximum(highest, score, out=highest)
    if not np.isfinite(highest).all():  # NaN is highest
        raise ValueError("the network gives scores that are not finite")
    return ids


def best_resized(scores, height, width):
    """best() of scores (K, h, w) interpolated to (K, height, width), some rows at a time."""
    y0, y1, ty = neighbours(height, scores.shape[1])
    x0, x1, tx = neighbours(width, scores.shape[2])
    ids, step = np.empty((height, width), dtype=np.uint8), max(1, CHUNK // (len(scores) * width))
    for first in range(0, height, step):
        rows = slice(first, first + step)
        top = y0[rows][0]
        band = scores[:, top : y1[rows][-1] + 1]
        band = lerp(band.take(x0, 2), band.take(x1, 2), tx)  # (K, r, width)
        ids[rows] = best(lerp(band.take(y0[rows] - top, 1), band.take(y1[rows] - top, 1), ty[rows, None]))
    return ids


def neighbours(count, length):
    """For the centres of `count` pixels laid over `length`: the indices before and after, the weight of the second."""
    at = ((np.arange(count) + 0.5) * (length / count) - 0.5).clip(0, length - 1)
    low = at.astype(np.int64)
    return low, np.minimum(low + 1, length - 1), (at - low).astype(np.float32)


def lerp(a, b, t):
    """a + t (b - a), in the memory of b."""
    b -= a
    b *= t
    b += a
    return b


def distinct_names(paths):
    """A name for each file, of its stem; where several share one, with that of its folder, then a number."""
    names = [path.stem for path in paths]
    count = Counter(names)
    names = [f"{p.resolve().parent.name}-{n}" if count[n] > 1 else n for p, n in zip(paths, names, strict=True)]
    count, seen = Counter(names), Counter()
    for i, name in enumerate(names):
        seen[name] += 1
        names[i] = f"{name}-{seen[name]}" if count[name] > 1 else name
    return names


# ---- service --------------------------------------------------------------------------------------------------------


class Asked(BaseModel):
    """The query of POST /segment. model: None, the first."""

    model_config = {"extra": "forbid"}
    model: str | None = None
    output: Literal["json", "ids", "overlay", "all"] = "json"
    opacity: Annotated[float, Query(ge=0, le=1)] = 0.5


class Places:
    """Who is inside: `parallel` images are worked on at once, `queue` more may wait; whoever comes then is refused."""

    def __init__(self, parallel, queue):
        self.parallel, self.limit, self.inside, self.seconds = parallel, parallel + queue, 0, 1.0
        self.slots, self.pool = asyncio.Semaphore(parallel), ThreadPoolExecutor(parallel)

    @contextlib.contextmanager
    def place(self):
        if self.inside >= self.limit:
            wait = max(1, math.ceil(self.seconds * self.inside / self.parallel))
            raise HTTPException(
                503, f"too many images are waiting: try again in {wait} s", headers={"Retry-After": str(wait)}
            )
        self.inside += 1
        try:
            yield
        finally:
            self.inside -= 1

    async def run(self, function, *args):
        """function(*args) in a thread."""
        start = time.perf_counter()
        done = await asyncio.get_running_loop().run_in_executor(self.pool, function, *args)
        self.seconds += 0.2 * (time.perf_counter() - start - self.seconds)  # a moving mean
        return done


async def read_image(request, max_bytes):
    """The image of a request's body. HTTPException where it is too large, too slow or in no field `image`."""
    too_large = HTTPException(413, f"the file is too large: at most {max_bytes / 2**20:g} MiB are taken")
    most = max_bytes + 2**16  # a form has words around its file
    if int(request.headers.get("content-length", 0)) > most:
        raise too_large

    async def chunks():
        size = 0
        async for chunk in request.stream():
            size += len(chunk)
            if size > most:
                raise too_large
            yield chunk

    async def read():
        if request.headers.get("content-type", "").split(";")[0].strip().lower() != "multipart/form-data":
            return b"".join([chunk async for chunk in chunks()])
        parser = MultiPartParser(request.headers, chunks(), max_files=8, max_fields=8)
        parser.spool_max_size = 2 * max_bytes  # no file on disk
        form = await parser.parse()
        try:
            files = form.getlist("image")
            if len(files) != 1 or isinstance(files[0], str):
                found = ", ".join(dict.fromkeys(name for name, _ in form.multi_items()))[:100] or "none"
                raise HTTPException(422, f"a form needs one file in the field 'image'; its fields: {found}")
            return await files[0].read()
        finally:
            await form.close()

    try:
        body = await asyncio.wait_for(read(), BODY_SECONDS)
    except asyncio.TimeoutError:
        raise HTTPException(408, f"the image did not arrive within {BODY_SECONDS} s") from None
    except ClientDisconnect:
        raise HTTPException(499, "the image was not sent to its end") from None  # to nobody
    except MultiPartException as error:
        raise HTTPException(400, f"the form cannot be read: {error.message}") from None
    if not body:
        raise HTTPException(400, "no image was sent: it belongs into the body, or into the field 'image' of a form")
    if len(body) > max_bytes:
        raise too_large
    return body


def answer(network, name, body, asked, max_pixels, waited):
    """Bytes of an image -> Response. waited: seconds until now."""
    marks = [time.perf_counter()]
    image = decode(body, max_pixels)
    marks.append(time.perf_counter())
    ids = network.segment(image)
    marks.append(time.perf_counter())
    picture = Image.fromarray(ids)
    pixels = picture.histogram()[: len(network.classes)]
    if asked.output == "overlay":
        coloured = picture.copy()
        coloured.putpalette(np.array(network.palette, dtype=np.uint8).tobytes())
        picture = Image.blend(image, coloured.convert("RGB"), asked.opacity)
    data = None if asked.output == "json" else png(picture)
    marks.append(time.perf_counter())
    ms = {"wait": 1000 * waited}
    ms |= {w: 1000 * (b - a) for w, a, b in zip(("decode", "network", "encode"), marks, marks[1:], strict=False)}
    timing = {"Server-Timing": ", ".join(f"{what};dur={number:.2f}" for what, number in ms.items())}
    if asked.output in ("ids", "overlay"):
        return Response(data, media_type="image/png", headers=timing)
    present = [
        {"id": k, "name": network.classes[k], "colour": network.palette[k], "pixels": n, "share": n / ids.size}
        for k, n in sorted(enumerate(pixels), key=lambda pair: -pair[1])
        if n
    ]
    done = {"model": name, "width": image.width, "height": image.height, "classes": present}
    done["milliseconds"] = {what: round(number, 2) for what, number in ms.items()}
    if data:
        done["ids"] = base64.b64encode(data).decode()
    return JSONResponse(done, headers=timing)


def make_app(networks, *, max_bytes, max_pixels, parallel, queue, hosts=None):
    """The service as an ASGI application. networks: {name: Network}. hosts: names it answers to, None: any."""
    app = FastAPI(title="Semantic segmentation", openapi_url=None)  # its pages need other hosts
    page = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    places = Places(parallel, queue)

    @app.exception_handler(HTTPException)
    async def refuse(request, error):
        words = error.detail
        if words in ("Not Found", "Method Not Allowed"):  # FastAPI's own
            words = f"no {request.method} {request.url.path[:100]} here, but " + ", ".join(ROUTES)
        return JSONResponse({"error": words}, error.status_code, headers=error.headers)

    @app.exception_handler(RequestValidationError)
    async def refuse_query(_request, error):
        first = error.errors()[0]
        words = f"{first['loc'][-1]}: {first['msg']}; the query takes {', '.join(Asked.model_fields)}"
        return JSONResponse({"error": words}, 422)

    @app.exception_handler(Exception)
    async def fail(_request, _error):
        return JSONResponse({"error": "the service failed on this image; its log says why"}, 500)

    @app.api_route("/", methods=["GET", "HEAD"], response_class=HTMLResponse)
    async def show_page():
        return page

    @app.api_route("/health", methods=["GET", "HEAD"])
    async def health():
        return {"status": "ok", "models": len(networks), "inside": places.inside, "limit": places.limit}

    @app.get("/models")
    async def models():
        rows = []
        for name, network in networks.items():
            about = {key: network.about.get(key) for key in ("model", "dataset")} | {"compression": network.steps}
            classes = [{"name": c, "colour": p} for c, p in zip(network.classes, network.palette, strict=True)]
            rows.append({"name": name, **about, "size": network.size, "window": network.window})
            rows[-1] |= {"megabytes": round(network.megabytes, 2), "classes": classes}
        return {"models": rows, "formats": FORMATS, "max_bytes": max_bytes, "max_pixels": max_pixels}

    @app.post("/segment")
    async def segment(request: Request, asked: Annotated[Asked, Query()]):
        name = asked.model or next(iter(networks))
        if name not in networks:
            raise HTTPException(404, f"no model {name[:100]!r}: there is {', '.join(networks)}")
        with places.place():
            body = await read_image(request, max_bytes)
            start = time.perf_counter()
            async with places.slots:
                if await request.is_disconnected():
                    return Response(status_code=499)  # to nobody
                waited = time.perf_counter() - start
                return await places.run(answer, networks[name], name, body, asked, max_pixels, waited)

    return Guard(app, page, hosts)


class Guard:
    """Around the application: hosts it answers to, headers of every answer, and what is still being sent read first."""

    def __init__(self, app, page, hosts):
        self.app, self.hosts = app, hosts
        policy = ["default-src 'none'", "connect-src 'self'", "img-src 'self' blob: data:", "base-uri 'none'"]
        policy += ["form-action 'none'", "frame-ancestors 'none'"]
        for tag in ("script", "style"):  # those of the page, and no other
            parts = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
            sums = [base64.b64encode(hashlib.sha256(part.encode()).digest()).decode() for part in parts]
            policy.append(f"{tag}-src " + " ".join(f"'sha256-{digest}'" for digest in sums))
        headers = {
            "Content-Security-Policy": "; ".join(policy),
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Cross-Origin-Resource-Policy": "same-origin",
            "Cross-Origin-Opener-Policy": "same-origin",
            "Cache-Control": "no-store",
        }
        self.headers = [(name.lower().encode(), value.encode()) for name, value in headers.items()]

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        given = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        unread = given.get("content-length", "0") != "0" or "transfer-encoding" in given
        asked = False  # whether a client that waits to be asked for its body has been

        async def read():
            nonlocal unread, asked
            asked = True
            message = await receive()
            unread = unread and message["type"] == "http.request" and message.get("more_body", False)
            return message

        async def drain():
            size = 0
            while unread and size < DRAIN_BYTES:
                size += len((await read()).get("body", b""))

        async def answer(message):
            if message["type"] == "http.response.start":
                if unread and (asked or "expect" not in given):
                    with contextlib.suppress(asyncio.TimeoutError):
                        await asyncio.wait_for(drain(), DRAIN_SECONDS)
                message = message | {"headers": [*message["headers"], *self.headers]}
            await send(message)

        host = re.sub(r":\d+$", "", given.get("host", "")).strip("[]").lower()
        if self.hosts and host not in self.hosts:  # another site's name that was made to lead here
            return await JSONResponse({"error": "this host is not served here"}, 421)(scope, read, answer)
        if given.get("sec-fetch-site") == "cross-site" and scope["method"] == "POST":
            return await JSONResponse({"error": "other sites' pages are not served"}, 403)(scope, read, answer)
        return await self.app(scope, read, answer)


# ---- command line ---------------------------------------------------------------------------------------------------


def number_from(least):
    """A type for argparse: an integer of at least that."""

    def number(text):
        if int(text) < least:
            raise argparse.ArgumentTypeError(f"{text}: give {least} or more")
        return int(text)

    return number


def make_parser():
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add, positive = parser.add_argument, number_from(1)
    pair = dict(type=positive, nargs=2, metavar=("H", "W"))
    add("--weights", nargs="+", metavar="FILE", default=["checkpoints/train/best.onnx"], help="files of export_onnx.py")
    add("--host", default="127.0.0.1", help="address to listen at; 0.0.0.0: whoever can reach this machine")
    add("--port", type=int, default=8000, help="port to listen at; 0: any free one")
    sizes = parser.add_mutually_exclusive_group()
    sizes.add_argument("--fit", **pair, help="what images are fitted into, pixels; left out: the size in the file")
    sizes.add_argument("--slide", **pair, help="sliding window, pixels, over images at their own size")
    add("--threads", type=positive, help="CPU threads of one network; left out: one a core")
    add("--parallel", type=positive, default=2, help="images worked on at once")
    add("--queue", type=number_from(0), default=32, help="images that may wait; the next gets status 503")
    add("--max-mb", type=positive, default=20, help="largest file taken, MiB")
    add("--max-megapixels", type=positive, default=50, help="largest image taken")
    add("--dry-run", action="store_true", help="load the files, label one image with each, and end")
    return parser


def open_socket(host, port):
    """A socket that listens. FileError where it cannot be had."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(2048)
    except (OSError, OverflowError) as error:
        raise FileError(f"cannot listen at {host}, port {port}: {one_line(error)}; see --host and --port") from None
    return listener


def main(argv=None):
    """Run the command line: serves until it is stopped. Returns the networks' names."""
    args = make_parser().parse_args(argv)
    fit, window = (size and tuple(size) for size in (args.fit, args.slide))
    threads = args.threads or os.cpu_count()
    files = [Network(path, threads=threads, fit=fit, window=window) for path in args.weights]
    networks = dict(zip(distinct_names([file.path for file in files]), files, strict=True))
    local = args.host in ("localhost", "::1") or args.host.startswith("127.")
    app = make_app(
        networks, max_bytes=args.max_mb * 2**20, max_pixels=args.max_megapixels * 10**6, parallel=args.parallel,
        queue=args.queue, hosts={args.host, "localhost", "127.0.0.1", "::1"} if local else None,
    )  # fmt: skip
    for name, network in networks.items():
        print(f"{name}: {network.path}, {len(network.classes)} classes, {network.megabytes:.1f} MiB")
    if args.dry_run:
        return list(networks)
    listener = open_socket(args.host, args.port)
    host = f"[{args.host}]" if ":" in args.host else args.host
    print(f"http://{host}:{listener.getsockname()[1]} (Ctrl-C stops it)", flush=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # uvicorn stops gracefully, then repeats the signal
    config = uvicorn.Config(app, log_level="warning", server_header=False, timeout_graceful_shutdown=BODY_SECONDS)
    uvicorn.Server(config).run(sockets=[listener])
    return list(networks)


if __name__ == "__main__":
    try:
        main()
    except FileError as error:
        print("error:", error, file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
