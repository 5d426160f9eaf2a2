"""Pictures to pixels: the one way in, for training, evaluation and prediction.

    read_image("photo.jpg")                       a file, as a viewer shows it
    read_image("photo.jpg", frame="stored")       the same, as its pixels are stored: without its EXIF orientation
    to_rgb(picture)                               a picture in memory: PIL, or an array

All give [H, W, 3] RGB uint8. What has another range of values is converted so that equal pictures give equal pixels:

    grey of 16 bits   the values' high bits: of the smallest depth of 8, 10, 12, 14 and 16 bits that holds the largest value
                      (or of the depth that a TIFF declares), since cameras of 10 to 14 bits fill the low bits of 16
    grey of 32 bits   whole numbers from 0 to 65535: as of 16 bits; fractions from 0 to 1, or from 0 to 255
    palette, CMYK, YCbCr    by Pillow; transparency is ignored
    animations, pages       the first
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from smca.datasets.batch import UInt8Array
from smca.datasets.settings import shortened

Frame = Literal["upright", "stored"]
"""Whether a picture is turned as its EXIF orientation says ("upright", as viewers and labelling tools show it) or not."""

FORMATS = ("JPEG", "MPO", "PNG", "TIFF", "WEBP", "AVIF", "BMP", "GIF", "JPEG2000", "PPM", "TGA", "PCX", "SGI", "QOI")
"""Pillow's decoders that are used. Not all it has: EPS would run Ghostscript, whatever the file's name."""
REDUCTIONS = (1, 2, 4, 8)
"""What a JPEG's sides can be divided by as it is decoded."""
MAX_PIXELS = 500_000_000
"""Largest picture that is read: 1.5 GB as RGB."""
_STRIP_PIXELS = 1 << 24
"""A larger picture is converted strip by strip: Pillow takes 4 bytes per pixel for RGB beside what it has decoded."""
_ORIENTATION = 0x0112
_PHOTOMETRIC, _MAX_SAMPLE_VALUE = 262, 281  # tags of TIFF
_DEPTHS = (8, 10, 12, 14, 16)
_INVERSE = {6: 8, 8: 6}


@dataclass(frozen=True)
class Header:
    """What a picture's file says before it is decoded."""

    stored_size: tuple[int, int]
    """(height, width) in pixels."""
    orientation: int
    """EXIF's, 1 to 8; 1 = as stored."""


def read_header(path: Path) -> Header:
    """Size and orientation of the picture at `path`; nothing is decoded.

    Raises FileNotFoundError if it is missing, ValueError if it is not a picture or too large.
    """
    with _opened(path) as picture:
        return _header(picture)


def read_image(path: Path, frame: Frame = "upright", least_short_side: float = math.inf) -> UInt8Array:
    """The picture at `path` as [H, W, 3] RGB uint8.

    least_short_side: a JPEG whose shorter side has at least twice, four or eight times as many pixels is decoded to a half, a
        quarter or an eighth of its size (rounded up), which is many times faster than to decode all and shrink it then.

    Raises FileNotFoundError if it is missing; ValueError, naming it, if it cannot be decoded, is larger than `MAX_PIXELS`, or has
    values without a defined range.
    """
    with _opened(path) as picture:
        header = _header(picture)
        if picture.format in ("JPEG", "MPO"):
            (height, width), divisor = header.stored_size, _reduction(header, least_short_side)
            picture.draft(None, (width // divisor, height // divisor))
        return _decode(picture, frame)


def _reduction(header: Header, least_short_side: float) -> int:
    """The most by which a picture's sides can be divided with `least_short_side` pixels left of the shorter one."""
    # Rounded up, the last row or column shows less than the others; turned, it would be the first, and boxes would be off.
    whole = header.orientation == 1
    sides = header.stored_size
    fitting = [
        d for d in REDUCTIONS if min(sides) // d >= least_short_side and (whole or not any(s % d for s in sides))
    ]
    return max(fitting, default=1)


def to_rgb(picture: Image.Image | NDArray[Any]) -> UInt8Array:
    """A picture in memory, upright, as [H, W, 3] RGB uint8.

    picture: a PIL image of any mode, turned as its EXIF orientation says; or an array [H, W, 3] or [H, W, 4] (RGB, RGBA) or [H, W]
        (grey) of uint8, uint16, int32 or float32.

    Raises ValueError for another shape or type, a damaged or too large picture, and values without a defined range.
    """
    if isinstance(picture, Image.Image):
        with _whole_pictures():
            try:
                return _decode(picture, "upright")
            except Exception as error:
                raise ValueError(f"a picture of mode {picture.mode}, {picture.size}: {_reason(error)}") from error
    array = np.asarray(picture)
    colours = array.ndim == 3 and array.shape[2] in (3, 4)
    if array.size and (colours or array.ndim == 2) and array.dtype in (np.uint8, np.uint16, np.int32, np.float32):
        values = array[:, :, :3] if colours else array
        pixels = values if values.dtype == np.uint8 else _to_8_bits(values, None)
        return np.ascontiguousarray(pixels if colours else _three_times(pixels))
    raise ValueError(
        "expected a PIL image, or an array [H, W, 3] (RGB), [H, W, 4] or [H, W] (grey) of uint8, uint16, int32 or float32, got "
        f"{array.dtype} {list(array.shape)}"
    )


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """The picture at `path`; whatever its decoder raises inside becomes a ValueError that names it."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist" if not path.exists() else f"{path} is not a file")
    with _whole_pictures():
        try:
            with Image.open(path, formats=_formats()) as picture:
                yield picture
        except FileNotFoundError:
            raise
        # Decoders meet damage with whatever comes: OSError, SyntaxError, struct.error, IndexError …
        except Exception as error:
            raise ValueError(f"cannot read {path}: {_reason(error)}; replace the file") from error


def suffixes() -> tuple[str, ...]:
    """Endings of the names of files that are read, in lower case."""
    return tuple(sorted(end for end, name in Image.registered_extensions().items() if name in FORMATS))


@cache
def _formats() -> list[str]:
    """Those of `FORMATS` that this Pillow was built with."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return f"not a picture of a known format ({', '.join(FORMATS)})"
    return shortened(str(error) or type(error).__name__, 200)


_lock, _users, _pillow_limit = threading.Lock(), 0, Image.MAX_IMAGE_PIXELS


@contextmanager
def _whole_pictures() -> Iterator[None]:
    """Inside, Pillow's own limit (179 million pixels, as an attack) does not hold: `MAX_PIXELS` does. Counted, for threads."""
    global _users, _pillow_limit
    with _lock:
        if _users == 0:
            _pillow_limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        _users += 1
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if _users == 0:
                Image.MAX_IMAGE_PIXELS = _pillow_limit


def _header(picture: Image.Image) -> Header:
    width, height = picture.size
    if width * height > MAX_PIXELS:
        raise ValueError(
            f"{width}×{height} pixels are more than {MAX_PIXELS // 10**6} million: cut the picture into tiles, or shrink it"
        )
    if min(width, height) < 1:
        raise ValueError(f"it has {width}×{height} pixels")
    orientation = _orientation(picture)
    # Pillow turns a TIFF as it decodes it, and gives the size that it will have then.
    turned = picture.format == "TIFF" and orientation >= 5
    return Header((width, height) if turned else (height, width), orientation)


def _orientation(picture: Image.Image) -> int:
    try:
        value = picture.getexif().get(_ORIENTATION, 1)
    except Exception:  # damaged EXIF data: the picture itself may well be whole
        return 1
    return value if value in range(2, 9) else 1


def _decode(picture: Image.Image, frame: Frame) -> UInt8Array:
    header = _header(picture)
    pixels = _rgb(picture)
    if picture.format == "TIFF":  # upright by now
        turn = _INVERSE.get(header.orientation, header.orientation) if frame == "stored" else 1
    else:
        turn = header.orientation if frame == "upright" else 1
    return np.ascontiguousarray(_turned(pixels, turn))


def _turned(pixels: UInt8Array, orientation: int) -> UInt8Array:
    """[H, W, 3] as EXIF's `orientation` tells viewers to show it."""
    if orientation in (5, 7):
        pixels = pixels.swapaxes(0, 1)
    if orientation in (6, 8):
        return np.rot90(pixels, -1 if orientation == 6 else 1)
    if orientation in (3, 4, 7):
        pixels = pixels[::-1]
    if orientation in (2, 3, 7):
        pixels = pixels[:, ::-1]
    return pixels


def _rgb(picture: Image.Image) -> UInt8Array:
    if picture.mode in ("I", "F") or picture.mode.startswith("I;16"):
        tags = getattr(picture, "tag_v2", {})
        values = np.asarray(picture)
        grey = _to_8_bits(values, tags.get(_MAX_SAMPLE_VALUE), inverted=tags.get(_PHOTOMETRIC) == 0)
        return _three_times(grey)
    if picture.width * picture.height <= _STRIP_PIXELS:
        return np.asarray(_convert(picture), dtype=np.uint8)
    picture.load()
    pixels = np.empty((picture.height, picture.width, 3), dtype=np.uint8)
    rows = max(1, _STRIP_PIXELS // picture.width)
    for top in range(0, picture.height, rows):
        bottom = min(top + rows, picture.height)
        pixels[top:bottom] = np.asarray(_convert(picture.crop((0, top, picture.width, bottom))))
    return pixels


def _three_times(grey: UInt8Array) -> UInt8Array:
    """[H, W] → [H, W, 3]."""
    return np.repeat(grey[:, :, None], 3, axis=2)


def _convert(picture: Image.Image) -> Image.Image:
    if picture.mode == "PA" or (picture.mode == "P" and "transparency" in picture.info):
        picture = picture.convert("RGBA")
    return picture.convert("RGB")


def _to_8_bits(values: NDArray[Any], declared_maximum: object, inverted: bool = False) -> UInt8Array:
    """Values of 16 or 32 bits → uint8, of the same shape. inverted: the largest value is black, as in some X-ray pictures."""
    least, largest = values.min(), values.max()
    if values.dtype.kind == "f":
        if not (np.isfinite(values).all() and least >= 0 and largest <= 255):
            raise ValueError(
                f"its values lie between {least:g} and {largest:g}: fractions must be from 0 to 1, or from 0 to 255, to have "
                "a defined range; save it with 8 or 16 bits"
            )
        fractions: UInt8Array = np.rint(values * (255 if largest <= 1 else 1)).astype(np.uint8)
        return 255 - fractions if inverted else fractions
    if least < 0 or largest >= 1 << 16:
        raise ValueError(
            f"its values lie between {least} and {largest}: whole numbers must be from 0 to 65535 to have a defined range; "
            "save it with 8 or 16 bits"
        )
    if isinstance(declared_maximum, tuple) and declared_maximum:
        declared_maximum = declared_maximum[0]
    known = max(int(largest), declared_maximum if isinstance(declared_maximum, int) else 0)
    depth = next((bits for bits in _DEPTHS if known < 1 << bits), _DEPTHS[-1])
    grey: UInt8Array = (values.astype(np.uint16) >> (depth - 8)).astype(np.uint8)
    return 255 - grey if inverted else grey
