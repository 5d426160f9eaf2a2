"""Class names of any script and length on pictures."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen

from smca.gpu.pictures import fonts
from smca.gpu.pictures.drawing import draw_detections

GREY = np.full((500, 700, 3), 128, dtype=np.uint8)
BOX = [[200.0, 150.0, 600.0, 400.0]]


def font_of(characters: str, path: Path) -> Path:
    """A font in which every character is a filled square."""
    pen = TTGlyphPen(None)
    for point in ((0, 0), (0, 800), (800, 800), (800, 0)):
        (pen.moveTo if point == (0, 0) else pen.lineTo)(point)
    pen.closePath()
    names = [".notdef", *(f"c{ord(c):x}" for c in characters)]
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder(names)
    builder.setupCharacterMap({ord(c): f"c{ord(c):x}" for c in characters})
    builder.setupGlyf({name: pen.glyph() for name in names})
    builder.setupHorizontalMetrics(dict.fromkeys(names, (1000, 0)))
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupNameTable({"familyName": "test", "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    builder.save(str(path))
    return path


@pytest.fixture(autouse=True)
def no_other_fonts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """This machine's fonts are not looked at: a font for two Chinese characters stands for all of them."""
    system = font_of("细胞0123456789. ", tmp_path / "NotoTest-Regular.ttf")
    (tmp_path / "damaged.ttf").write_bytes(b"no font")
    monkeypatch.setattr(fonts, "_packaged", lambda: [tmp_path / "damaged.ttf"])
    monkeypatch.setattr(fonts.font_manager, "findSystemFonts", lambda: [str(system)])
    for cached in (fonts._fonts, fonts._font_with, fonts._warn, fonts._characters, fonts._load):
        cached.cache_clear()
    yield
    for cached in (fonts._fonts, fonts._font_with, fonts._warn, fonts._characters, fonts._load):
        cached.cache_clear()


def chosen(name: str) -> tuple[str, str]:
    text, font = fonts.label_and_font(name, 3, 0.5, 20)
    return text, Path(str(font.path)).name


@pytest.mark.parametrize(
    ("name", "text", "font"),
    [
        ("cat", "cat 0.50", "DejaVuSans.ttf"),
        ("größer ≥ Ωmega кошка", "größer ≥ Ωmega кошка 0.50", "DejaVuSans.ttf"),
        ("细胞", "细胞 0.50", "NotoTest-Regular.ttf"),
        ("two\nlines\tand\x00more", "two lines and more 0.50", "DejaVuSans.ttf"),
        ("", "0.50", "DejaVuSans.ttf"),
        ("x" * 500, "x" * 39 + "… 0.50", "DejaVuSans.ttf"),
    ],
)
def test_the_first_font_that_has_all_characters(name: str, text: str, font: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert chosen(name) == (text, font)


def test_without_a_font_the_number_stands_for_the_name_and_it_is_said_once() -> None:
    with pytest.warns(
        UserWarning, match="no font has the DEVANAGARI characters of a class name.*Install a font"
    ) as said:
        twice = [chosen("कोशिका"), chosen("कोशिका")]
    assert twice == [("class 3 0.50", "DejaVuSans.ttf")] * 2
    assert len(said) == 1
    with pytest.warns(UserWarning, match="no font has the HANGUL characters"):
        chosen("세포 细胞")


@pytest.mark.parametrize("name", ["细胞", "cat", "x" * 500, ""])
def test_names_are_drawn(name: str) -> None:
    drawn = np.asarray(draw_detections(GREY, BOX, [0], [0.9], [name], 0.5))
    unnamed = np.asarray(draw_detections(GREY, BOX, [0], [0.9], ["."], 0.5))
    assert drawn.shape == GREY.shape
    assert (drawn != GREY).any()
    assert np.array_equal(drawn, unnamed) == (name == ".")
