"""Fonts for class names in whatever script: each part of a text in a font that has its characters.

Tried in this order: matplotlib's DejaVu Sans (Latin, Greek, Cyrillic, Arabic and more), fonts that were installed for this
(``pip install 'smca-detr[fonts]'``: Chinese, Japanese, Korean, Hindi, Thai), and the system's.
"""

from __future__ import annotations

import importlib.metadata
import unicodedata
import warnings
from collections.abc import Iterable, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import NamedTuple

import matplotlib
from fontTools.ttLib import TTFont  # type: ignore[import-untyped]
from matplotlib import font_manager
from PIL import ImageFont, features

NAME_LENGTH = 40
"""Longer names are cut to this many characters, and further where the picture is too narrow for them."""
_FONT_PACKAGES = ("noto-cjk-sans-otc", "fontpkg-noto-sans-devanagari", "fontpkg-noto-sans-thai")
_PREFERRED = ("regular", "noto", "sans")
"""Parts of the names of fonts that are tried first."""
_PLACEHOLDERS = ("lastresort", "adobeblank")
"""Fonts that claim every character and draw none."""
_JOINERS = "\u200c\u200d"
"""Invisible; in Persian and in Indian scripts they say which letters join."""


class Part(NamedTuple):
    """Consecutive characters of one font."""

    text: str
    font: ImageFont.FreeTypeFont


def label_parts(name: str, label: int, score: float | None, pixels: int, width: float) -> list[Part]:
    """What is written at a box, from left to right: the class's name and the score, if it has one.

    Where no font has the characters of the name, the class's number stands for it, and a warning says once for each script
    what is missing.

    Args:
        name: the class's name, of any length and script.
        label: the class's number.
        score: in [0, 1]; None = not written.
        pixels: size of the font.
        width: pixels that there are; a name that is longer is cut and ends in "…". The score is never cut.
    """
    clusters = _clusters(name_with_font(name, f"class {label}"))
    if score is None:
        clusters, end = clusters or _clusters(f"class {label}"), []
    else:
        end = _clusters(f" {score:.2f}" if clusters else f"{score:.2f}")
    length = min(len(clusters), NAME_LENGTH)
    while True:
        kept = clusters if length == len(clusters) else [*clusters[: length - 1], "…"]
        parts = _parts(kept, end, pixels)
        if length <= 1 or text_width(parts) <= width:
            return parts
        length -= 1


def name_with_font(name: str, otherwise: str) -> str:
    """The name on one line, without what is invisible; `otherwise`, and a warning, if it has characters that no font has."""
    drawable = _drawable(name)
    missing = next((cluster for cluster in _clusters(drawable) if _font_with(_drawn(cluster)) is None), None)
    if missing is None:
        return drawable
    _warn(_script(missing))
    return otherwise


def text_width(parts: Sequence[Part]) -> float:
    """Pixels from the first character to behind the last."""
    return sum(part.font.getlength(part.text) for part in parts)


def figure_families(texts: Iterable[str]) -> list[str]:
    """Families for matplotlib's ``font.family`` in which it finds the characters of `texts`."""
    paths = {path: None for text in texts for c in text if (path := _font_with(frozenset(c))) not in (None, _dejavu())}
    for path in paths:
        font_manager.fontManager.addfont(path)
    return ["DejaVu Sans", *(font_manager.FontProperties(fname=path).get_name() for path in paths)]


def _drawable(name: str) -> str:
    """The name on one line, accents joined to their letters, without what is invisible."""
    kept = []
    for c in unicodedata.normalize("NFC", name):
        kind = unicodedata.category(c)
        if c in _JOINERS:
            kept.append(c if _joins() else "")
        elif kind == "Cs":  # half a character
            kept.append("\ufffd")
        elif kind != "Cf" and not unicodedata.name(c, "").startswith("VARIATION SELECTOR"):
            kept.append(" " if kind == "Cc" else c)
    return " ".join("".join(kept).split())


def _clusters(text: str) -> list[str]:
    """The text cut between characters that stand alone: marks and joiners stay with the letter before them."""
    clusters: list[str] = []
    for c in text:
        if clusters and (unicodedata.category(c)[0] == "M" or c in _JOINERS):
            clusters[-1] += c
        else:
            clusters.append(c)
    return clusters


def _parts(name: Sequence[str], end: Sequence[str], pixels: int) -> list[Part]:
    """Clusters, each of which some font has, as parts that are as long as can be."""
    path = _font_with(_drawn("".join(name))) or _dejavu()
    texts: list[tuple[str, Path]] = []
    for cluster in (*name, *end):
        needed = _drawn(cluster)
        if not needed <= _characters(path):
            path = _font_with(needed) or path
        if texts and texts[-1][1] == path:
            texts[-1] = (texts[-1][0] + cluster, path)
        else:
            texts.append((cluster, path))
    return [Part(text, _load(path, pixels)) for text, path in texts]


def _drawn(text: str) -> frozenset[str]:
    """The characters that a font must have."""
    return frozenset(text) - frozenset(_JOINERS)


@cache
def _joins() -> bool:
    """Whether Pillow has Raqm, which joins the characters of scripts such as Devanagari as they are written; the basic
    layout sets them side by side."""
    return bool(features.check("raqm") and features.check("fribidi"))


@cache
def _load(path: Path, pixels: int) -> ImageFont.FreeTypeFont:
    layout = ImageFont.Layout.RAQM if _joins() else ImageFont.Layout.BASIC
    return ImageFont.truetype(str(path), pixels, layout_engine=layout)


@cache
def _font_with(characters: frozenset[str]) -> Path | None:
    return next((path for path in _fonts() if characters <= _characters(path)), None)


@cache
def _dejavu() -> Path:
    return Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"


@cache
def _fonts() -> tuple[Path, ...]:
    system = [Path(path) for path in font_manager.findSystemFonts()]
    system = [path for path in system if not path.name.lower().startswith(_PLACEHOLDERS)]
    system.sort(key=lambda path: (-sum(part in path.name.lower() for part in _PREFERRED), path.name))
    return (_dejavu(), *_packaged(), *system)


def _packaged() -> list[Path]:
    files: list[importlib.metadata.PackagePath] = []
    for package in _FONT_PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            files += importlib.metadata.files(package) or []
    return [Path(str(file.locate())) for file in files if file.suffix in (".ttc", ".otf", ".ttf")]


@cache
def _characters(path: Path) -> frozenset[str]:
    """Characters that Pillow draws with a font file; of a collection, with its first font, which is the one it takes.

    None for a font of pictures in fixed sizes or of layered colours (emoji): Pillow refuses the ones and draws nothing for the
    others.
    """
    try:
        with path.open("rb") as file:
            font = TTFont(file, fontNumber=0, lazy=True)
            has_outlines = any(table in font for table in ("glyf", "CFF ", "CFF2")) and "COLR" not in font
            return frozenset(map(chr, font.getBestCmap() or ())) if has_outlines else frozenset()
    except Exception:  # a font of a kind that fontTools does not read, or a damaged one: errors of any type
        return frozenset()


def _script(cluster: str) -> str:
    """The script of the cluster's first character that no font has, by Unicode's name of it; "SYMBOL" for pictures."""
    first = next((c for c in cluster if _font_with(frozenset(c)) is None), cluster[0])
    is_written = unicodedata.category(first)[0] in "LMNP"
    return unicodedata.name(first, f"U+{ord(first):04X}").split()[0] if is_written else "SYMBOL"


@cache
def _warn(script: str) -> None:
    warnings.warn(
        f"no font has the {script} characters of a name: a number is drawn in its place. Install a font that has them "
        "(Chinese, Japanese, Korean, Hindi, Thai: pip install 'smca-detr[fonts]'; or the system's fonts-noto-cjk for the first "
        "three, fonts-noto for others)",
        stacklevel=3,
    )
