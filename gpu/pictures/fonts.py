"""A font for a class name in whatever script: the first that has all its characters.

Tried in this order: matplotlib's DejaVu Sans (Latin, Greek, Cyrillic, Arabic and more), fonts that were installed for this
(``pip install 'smca-detr[fonts]'``: Chinese, Japanese, Korean), and the system's.
"""

from __future__ import annotations

import importlib.metadata
import unicodedata
import warnings
from functools import cache
from pathlib import Path

import matplotlib
from fontTools.ttLib import TTCollection, TTFont  # type: ignore[import-untyped]
from matplotlib import font_manager
from PIL import ImageFont, features

NAME_LENGTH = 40
"""Longer names are cut to this many characters."""
_FONT_PACKAGE = "noto-cjk-sans-otc"
_PREFERRED = ("regular", "noto", "sans")
"""Parts of the names of fonts that are tried first."""


def label_and_font(name: str, label: int, score: float, pixels: int) -> tuple[str, ImageFont.FreeTypeFont]:
    """What is written at a box, and a font of that size that has its characters.

    Without such a font the class's number stands for its name, and a warning says once what is missing.
    """
    clean = " ".join("".join(c if unicodedata.category(c)[0] != "C" else " " for c in name).split())
    clean = clean if len(clean) <= NAME_LENGTH else clean[: NAME_LENGTH - 1] + "…"
    text = f"{clean} {score:.2f}".strip()
    path = _font_with(frozenset(map(ord, text)))
    if path is None:
        _warn(_script(text))
        text, path = f"class {label} {score:.2f}", _dejavu()
    return text, _load(path, pixels)


@cache
def _load(path: Path, pixels: int) -> ImageFont.FreeTypeFont:
    # Raqm joins the characters of scripts such as Devanagari as they are written; the basic layout sets them side by side.
    joins = features.check("raqm") and features.check("fribidi")
    layout = ImageFont.Layout.RAQM if joins else ImageFont.Layout.BASIC
    return ImageFont.truetype(str(path), pixels, layout_engine=layout)


@cache
def _font_with(characters: frozenset[int]) -> Path | None:
    return next((path for path in _fonts() if characters <= _characters(path)), None)


def _dejavu() -> Path:
    return Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"


@cache
def _fonts() -> tuple[Path, ...]:
    system = [Path(path) for path in font_manager.findSystemFonts()]
    system.sort(key=lambda path: (-sum(part in path.name.lower() for part in _PREFERRED), path.name))
    return (_dejavu(), *_packaged(), *system)


def _packaged() -> list[Path]:
    try:
        files = importlib.metadata.files(_FONT_PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        return []
    return [Path(str(file.locate())) for file in files if file.suffix in (".ttc", ".otf", ".ttf")]


@cache
def _characters(path: Path) -> frozenset[int]:
    """Code points that a font file draws; of a collection, those of its first font, which is the one that Pillow takes."""
    try:
        with path.open("rb") as file:
            is_collection = path.suffix.lower() == ".ttc"
            font = TTCollection(file, lazy=True).fonts[0] if is_collection else TTFont(file, lazy=True)
            return frozenset(font.getBestCmap() or ())
    except Exception:  # a font of a kind that fontTools does not read, or a damaged one: errors of any type
        return frozenset()


def _script(text: str) -> str:
    """The script of the first character that DejaVu Sans lacks, by Unicode's name of it."""
    first = next(c for c in text if ord(c) not in _characters(_dejavu()))
    return unicodedata.name(first, f"U+{ord(first):04X}").split()[0]


@cache
def _warn(script: str) -> None:
    warnings.warn(
        f"no font has the {script} characters of a class name: its number is drawn in its place. Install a font that has them "
        "(Chinese, Japanese, Korean: pip install 'smca-detr[fonts]', or the system's fonts-noto-cjk; others: the system's "
        "fonts-noto)",
        stacklevel=3,
    )
