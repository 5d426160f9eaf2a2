"""Geometry and rendering for `SyntheticShapes`: where objects lie, what hides them, and how the picture is painted."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from smca.datasets.batch import UInt8Array

Mask = NDArray[np.bool_]
Float32Array = NDArray[np.float32]

CLASSES = ("disc", "rectangle", "triangle", "ring", "cross")
_RING_HOLE = 0.55
"""Radius of a ring's hole, as a fraction of its outer radius."""
_CROSS_ARM = 0.34
"""Half the width of a cross's arms, as a fraction of half its length."""
_MAX_ASPECT = 2.0
_MAX_TURN = np.pi / 6
"""Objects are turned by up to 30° either way: enough that edges follow no axis, while a box still shows where an object is."""
_MIN_SHORT_SIDE_PX = 8.0
"""Below this, a ring's hole and a cross's arms can no longer be seen."""
_MIN_CONTRAST = 55.0
"""An object differs from what it lies on by at least this much (out of 255) in some channel."""
_TRIES = 8


@dataclass(frozen=True, eq=False)
class Shape:
    """An object inside its window of the image."""

    label: int
    window: tuple[slice, slice]
    """Rows and columns of the image."""
    mask: Mask
    """[window] the whole object, as far as it is inside the image."""
    along: Float32Array
    """[window] position along the object's own axis, −1 to 1 on the object; for shading."""

    @property
    def box_xyxy(self) -> tuple[int, int, int, int]:
        """Tight extent of `mask` in pixels of the image."""
        rows, columns = np.flatnonzero(self.mask.any(axis=1)), np.flatnonzero(self.mask.any(axis=0))
        top, left = self.window[0].start, self.window[1].start
        return left + int(columns[0]), top + int(rows[0]), left + int(columns[-1]) + 1, top + int(rows[-1]) + 1


def place_shapes(
    rng: np.random.Generator, size: int, count: int, sides: tuple[float, float], min_visible: float
) -> list[Shape]:
    """Up to `count` objects from front to back in an image of `size` × `size` pixels.

    sides: least and largest geometric mean of an object's sides, in pixels.
    An object is added only if at least `min_visible` of all its pixels would be seen: inside the image and not
    behind those before it. An object that finds no room in a few tries is left out.
    """
    covered: Mask = np.zeros((size, size), dtype=np.bool_)
    shapes: list[Shape] = []
    for _ in range(count):
        label = int(rng.integers(len(CLASSES)))
        for _ in range(_TRIES):
            shape, area = _shape(rng, size, label, sides)
            seen = int((shape.mask & ~covered[shape.window]).sum())
            if seen > 0 and seen >= min_visible * area:
                covered[shape.window] |= shape.mask
                shapes.append(shape)
                break
    return shapes


def _shape(rng: np.random.Generator, size: int, label: int, sides: tuple[float, float]) -> tuple[Shape, int]:
    """A random object and the number of its pixels, those beyond the border included."""
    side = rng.uniform(*sides)
    aspect = np.exp(rng.uniform(-1, 1) * np.log(_MAX_ASPECT))
    half_u, half_v = (max(side * factor, _MIN_SHORT_SIDE_PX) / 2 for factor in (aspect**0.5, aspect**-0.5))
    angle = rng.uniform(-_MAX_TURN, _MAX_TURN)
    center_x, center_y = rng.uniform(0.05, 0.95, size=2) * size

    reach = int(np.ceil(np.hypot(half_u, half_v)))
    left, top = int(center_x) - reach, int(center_y) - reach
    # Pixel centres relative to the object's, turned into its own axes.
    x = (np.arange(left, left + 2 * reach + 2, dtype=np.float32) + np.float32(0.5 - center_x))[None, :]
    y = (np.arange(top, top + 2 * reach + 2, dtype=np.float32) + np.float32(0.5 - center_y))[:, None]
    cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    u: Float32Array = ((x * cos + y * sin) / half_u).astype(np.float32)
    v: Float32Array = ((y * cos - x * sin) / half_v).astype(np.float32)
    mask = _inside(label, u, v)

    window = slice(max(0, top), min(size, top + mask.shape[0])), slice(max(0, left), min(size, left + mask.shape[1]))
    part = slice(window[0].start - top, window[0].stop - top), slice(window[1].start - left, window[1].stop - left)
    return Shape(label, window, mask[part], u[part]), int(mask.sum())


def _inside(label: int, u: Float32Array, v: Float32Array) -> Mask:
    """Which points (u, v) belong to the object; −1 to 1 along either axis is its extent."""
    name = CLASSES[label]
    if name == "disc":
        inside = u * u + v * v <= 1
    elif name == "rectangle":
        inside = np.maximum(np.abs(u), np.abs(v)) <= 1
    elif name == "triangle":
        inside = (v <= 1) & (2 * np.abs(u) <= v + 1)
    elif name == "ring":
        radius2 = u * u + v * v
        inside = (radius2 <= 1) & (radius2 >= _RING_HOLE**2)
    else:
        near, far = np.minimum(np.abs(u), np.abs(v)), np.maximum(np.abs(u), np.abs(v))
        inside = (near <= _CROSS_ARM) & (far <= 1)
    return np.asarray(inside, dtype=np.bool_)


def paint(rng: np.random.Generator, size: int, shapes: list[Shape], noise: float) -> UInt8Array:
    """The picture [size, size, 3]: background, distractors, `shapes` (ordered front to back), sensor noise."""
    canvas = np.asarray(_distract(rng, _background(rng, size)), dtype=np.float32).copy()
    for shape in reversed(shapes):
        under = canvas[shape.window]
        under[shape.mask] = _fill(rng, shape, under[shape.mask].mean(axis=0))
    if noise:
        canvas += rng.standard_normal(canvas.shape, dtype=np.float32) * np.float32(noise * rng.uniform(0.5, 1.5))
    return np.clip(np.rint(canvas), 0, 255).astype(np.uint8)


def _background(rng: np.random.Generator, size: int) -> UInt8Array:
    """A colour with texture: noise at three scales, often stripes on it, and soft spots without an edge."""
    texture = np.zeros((size, size), dtype=np.float32)
    for cells, strength in ((3, 22.0), (9, 14.0), (27, 9.0)):
        texture += _smooth_noise(rng, cells, size) * np.float32(strength * rng.uniform(0.3, 1.2))
    axis = np.arange(size, dtype=np.float32) / np.float32(size)
    if rng.random() < 0.5:
        angle, waves = rng.uniform(0, np.pi), rng.uniform(4, 20)
        phase = axis[None, :] * np.float32(np.cos(angle)) + axis[:, None] * np.float32(np.sin(angle))
        texture += np.float32(rng.uniform(3, 14)) * np.sin(phase * np.float32(2 * np.pi * waves))
    for _ in range(int(rng.integers(0, 4))):
        x, y = rng.random(2)
        width = rng.uniform(0.05, 0.15)
        bump_x, bump_y = (np.exp(-0.5 * ((axis - np.float32(p)) / np.float32(width)) ** 2) for p in (x, y))
        texture += np.float32(rng.uniform(-45, 45)) * bump_y[:, None] * bump_x[None, :]
    colour = rng.uniform(50, 205, size=3)
    mix = rng.uniform(0.6, 1.2, size=3)
    canvas = texture[..., None] * mix.astype(np.float32) + colour.astype(np.float32)
    return np.clip(canvas, 0, 255).astype(np.uint8)


def _smooth_noise(rng: np.random.Generator, cells: int, size: int) -> Float32Array:
    small = Image.fromarray(rng.standard_normal((cells, cells), dtype=np.float32))
    return np.asarray(small.resize((size, size), Image.Resampling.BICUBIC))


def _distract(rng: np.random.Generator, canvas: UInt8Array) -> Image.Image:
    """Streaks and specks: edges and contrast that belong to no class."""
    image = Image.fromarray(canvas)
    draw = ImageDraw.Draw(image)
    size = image.width
    for _ in range(int(rng.integers(0, 6))):
        x, y = rng.random(2) * size
        angle, length = rng.uniform(0, 2 * np.pi), rng.uniform(0.1, 0.6) * size
        end = x + length * np.cos(angle), y + length * np.sin(angle)
        draw.line((x, y, *end), fill=_colour(rng), width=int(rng.integers(1, 1 + max(2, round(size / 64)))))
    for _ in range(int(rng.integers(0, 12))):
        x, y = rng.random(2) * size
        radius = rng.uniform(0.5, 2.0) * size / 128
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=_colour(rng))
    return image


def _colour(rng: np.random.Generator) -> tuple[int, int, int]:
    red, green, blue = (int(value) for value in rng.integers(15, 241, size=3))
    return red, green, blue


def _fill(rng: np.random.Generator, shape: Shape, under: Float32Array) -> Float32Array:
    """Colours [pixels of the object, 3]: one that stands out from what is `under` it, shaded, sometimes striped."""
    colour = np.array(_colour(rng), dtype=np.float32)
    while np.abs(colour - under).max() < _MIN_CONTRAST:
        colour = np.array(_colour(rng), dtype=np.float32)
    along = shape.along[shape.mask]
    shade = np.float32(rng.uniform(-25, 25)) * along
    if rng.random() < 0.3:
        shade += np.float32(rng.uniform(8, 20)) * np.sin(along * np.float32(rng.uniform(6, 14)))
    return colour + shade[:, None]
