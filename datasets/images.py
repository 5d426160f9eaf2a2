"""Reading one image file as 8-bit RGB, with errors that name the file and what to do about it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from smca.datasets.batch import UInt8Array

_EXIF_ORIENTATION = 0x0112


def read_image(path: Path, size: tuple[int, int], image_id: int, annotations_file: Path) -> UInt8Array:
    """Decode `path` to [H, W, 3] RGB uint8 and check its (height, width) against the annotation file's.

    Grey, palette, CMYK and transparent images are converted (transparency is ignored, 16-bit grey keeps its high byte);
    an EXIF orientation is not applied, because COCO's boxes refer to the stored pixels.

    Raises FileNotFoundError if the file is gone, ValueError if it cannot be decoded or has another size.
    """
    entry = f"image {image_id} of {annotations_file}"
    try:
        with Image.open(path) as opened:
            width, height = opened.size
            fits = (height, width) == size
            turned = not fits and opened.getexif().get(_EXIF_ORIENTATION, 1) != 1
            pixels: UInt8Array = np.asarray(_to_rgb(opened) if fits else (), dtype=np.uint8)
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{path} ({entry}) existed when the dataset was opened, but is gone; restore it"
        ) from None
    # Pillow reports damaged files as OSError (truncated, not an image), SyntaxError (broken PNG) or ValueError.
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(
            f"cannot read {path} ({entry}): {error}; replace the file, or remove the entry from the annotation file"
        ) from error
    if not fits:
        exif = (
            "; its EXIF orientation turns it for viewing, but COCO's boxes refer to the stored pixels" if turned else ""
        )
        raise ValueError(
            f"{path} is {width}×{height} pixels, but {entry} says {size[1]}×{size[0]}{exif}; boxes would be misplaced: "
            "correct 'width' and 'height', or use the image that was annotated (turned upright before it was stored)"
        )
    return pixels


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        image.load()
        return image
    if image.mode.startswith("I;16"):
        # Pillow would cut at 255, which turns a 16-bit microscope image white.
        return Image.fromarray((np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError(f"32-bit grey (mode {image.mode}) has no defined range; save it with 8 or 16 bits")
    if image.mode == "P" and "transparency" in image.info:
        return image.convert("RGBA").convert("RGB")
    return image.convert("RGB")
