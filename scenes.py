"""Street scenes with their labels, drawn by code: the data sets `synthetic` and, in fog or at night, `synthetic-night`.

    from scenes import draw_scene
    image, label = draw_scene(0, "train", 7, (196, 392))     # uint8 (196, 392, 3) RGB and (196, 392), 255 = ignore

A scene is planned in metres (Scene, Thing), then drawn far to near on a Canvas, which is a picture and its label at
once, then developed like a photograph. Read the end first: draw_scene() is the order of it all. Every choice comes from
a random.Random of its own, so that a scene is the same in every process.
"""

import math
import random
from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter

# ---- tables ---------------------------------------------------------------------------------------------------------

CITYSCAPES_CLASSES = (
    "road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign", "vegetation", "terrain",
    "sky", "person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle",
)  # fmt: skip
# their ids
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


# ---- drawing --------------------------------------------------------------------------------------------------------


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


# ---- the plan of a street -------------------------------------------------------------------------------------------


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


def in_bad_light(rng: random.Random, scene: Scene) -> Scene:
    """The same street in thick fog or at night: less contrast, less light, and more noise beside it."""
    if rng.random() < 0.5:
        grey, haze, brightness = rng.randint(150, 205), rng.uniform(12, 40), rng.uniform(0.8, 1)
        above, below = (grey, grey + 2, grey + 4), (grey + 6, grey + 8, grey + 10)
    else:
        grey, haze, brightness = rng.randint(20, 50), rng.uniform(30, 90), rng.uniform(0.22, 0.42)
        above, below = (grey // 3, grey // 3, grey // 2), (grey, grey + 2, grey + 10)
    return scene._replace(sky=(above, below, brightness), haze=haze, sun=0)


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


# ---- ground, light, camera ------------------------------------------------------------------------------------------


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


def draw_scene(
    seed: int, split: str, index: int, size: tuple[int, int], *, bad_light: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """One street scene of size (H, W): image uint8 (H, W, 3) and label uint8 (H, W), classes 0..18 or 255.

    bad_light: other streets, in fog or at night. A pure function of its arguments: random.Random hashes a string with
    SHA-512, the same in every process.
    """
    rng = random.Random(f"{seed}/{split}/{index}" + "/bad light" * bad_light)
    scene = plan_scene(rng)
    if bad_light:
        scene = in_bad_light(rng, scene)
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
