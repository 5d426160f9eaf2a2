"""Class names of any script and length on pictures."""

from __future__ import annotations

import tomllib
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from fontTools.ttLib import TTFont
from PIL import ImageFont

from smca.gpu.pictures import fonts
from smca.gpu.pictures.drawing import class_color, compare_curves, draw_detections

GREY = np.full((500, 700, 3), 128, dtype=np.uint8)
BOX = [[200.0, 150.0, 600.0, 400.0]]


CACHED = (fonts._fonts, fonts._font_with, fonts._warn, fonts._characters, fonts._load, fonts._joins)


def font_of(characters: str, path: Path, layers: bool = False) -> Path:
    """A font in which every character is a filled square; with `layers`, of colours."""
    pen = TTGlyphPen(None)
    for point in ((0, 0), (0, 800), (800, 800), (800, 0)):
        (pen.moveTo if point == (0, 0) else pen.lineTo)(point)
    pen.closePath()
    square = pen.glyph()
    names = [".notdef", *(f"c{ord(c):x}" for c in characters)]
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder(names)
    builder.setupCharacterMap({ord(c): f"c{ord(c):x}" for c in characters})
    builder.setupGlyf(dict.fromkeys(names, square))
    builder.setupHorizontalMetrics(dict.fromkeys(names, (1000, 0)))
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupNameTable({"familyName": path.stem, "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    if layers:
        builder.setupCOLR({names[1]: [(names[1], 0)]})
        builder.setupCPAL([[(1.0, 0.0, 0.0, 1.0)]])
    builder.save(str(path))
    return path


def without_outlines(path: Path) -> Path:
    """The font as one of pictures in fixed sizes, which Pillow opens at no other."""
    font = TTFont(path)
    del font["glyf"], font["loca"]
    font.recalcBBoxes = False
    font.save(path)
    return path


@pytest.fixture(autouse=True)
def no_other_fonts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """This machine's fonts are not looked at: fonts for a few characters, without digits, stand for all of them."""
    (tmp_path / "damaged.ttf").write_bytes(b"no font")
    everything = "细胞🦄세포ക"
    system = [
        font_of("细胞", tmp_path / "NotoChinese-Regular.ttf"),
        font_of("\u0915\u094d\u0937\u093f ", tmp_path / "NotoHindi-Regular.ttf"),
        font_of("세포", tmp_path / "Korean.ttf"),
        font_of(everything, tmp_path / "LastResort.otf"),
        font_of(everything, tmp_path / "NotoSansColors-Regular.ttf", layers=True),
        without_outlines(font_of(everything, tmp_path / "NotoSansEmoji-Regular.ttf")),
    ]
    monkeypatch.setattr(fonts, "_packaged", lambda: [tmp_path / "damaged.ttf"])
    monkeypatch.setattr(fonts.font_manager, "findSystemFonts", lambda: [str(path) for path in system])
    for cached in CACHED:
        cached.cache_clear()
    yield
    for cached in CACHED:
        cached.cache_clear()


def parts(name: str, width: float = 1e6) -> list[tuple[str, str]]:
    """Text and font of each part of what is written."""
    written = fonts.label_parts(name, 3, 0.5, 20, width)
    return [(part.text, Path(str(part.font.path)).stem) for part in written]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("cat", [("cat 0.50", "DejaVuSans")]),
        ("größer ≥ Ωmega кошка", [("größer ≥ Ωmega кошка 0.50", "DejaVuSans")]),
        ("细胞", [("细胞", "NotoChinese-Regular"), (" 0.50", "DejaVuSans")]),
        (
            "세포 B 细",
            [("세포", "Korean"), (" B ", "DejaVuSans"), ("细", "NotoChinese-Regular"), (" 0.50", "DejaVuSans")],
        ),
        ("क्षि क", [("क्षि क ", "NotoHindi-Regular"), ("0.50", "DejaVuSans")]),
        ("\u1109\u1166\u1111\u1169", [("세포", "Korean"), (" 0.50", "DejaVuSans")]),  # as macOS writes it
        ("two\nlines\tand\x00more\u2028", [("two lines and more 0.50", "DejaVuSans")]),
        ("\u202eright\u200b to\ufeff left\ufe0f", [("right to left 0.50", "DejaVuSans")]),
        ("half \ud800", [("half \ufffd 0.50", "DejaVuSans")]),
        ("", [("0.50", "DejaVuSans")]),
        (" \x00\u200e", [("0.50", "DejaVuSans")]),
        ("x" * 500, [("x" * 39 + "… 0.50", "DejaVuSans")]),
        ("e\u0335" * 41, [("e\u0335" * 39 + "… 0.50", "DejaVuSans")]),
    ],
)
def test_each_part_has_a_font_with_its_characters(name: str, expected: list[tuple[str, str]]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert parts(name) == expected


@pytest.mark.parametrize(("raqm", "text"), [(True, "क्\u200dष"), (False, "क्ष")])
def test_joiners_are_kept_where_letters_are_joined(raqm: bool, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They need no glyph, and ask for none: without Raqm, boxes would stand in their place."""
    asked: list[object] = []
    load = fonts.ImageFont.truetype
    monkeypatch.setattr(
        fonts.ImageFont, "truetype", lambda *a, layout_engine: (asked.append(layout_engine), load(*a))[1]
    )
    monkeypatch.setattr(fonts.features, "check", lambda _: raqm)
    assert parts("क्\u200dष")[0] == (text + " ", "NotoHindi-Regular")
    assert set(asked) == {ImageFont.Layout.RAQM if raqm else ImageFont.Layout.BASIC}


@pytest.mark.parametrize("width", [40.0, 100.0, 200.0])
def test_names_are_cut_to_the_picture_and_scores_never(width: float) -> None:
    for name in ("W" * 30, "细胞" * 200):
        written = fonts.label_parts(name, 3, 0.5, 13, width)
        text = "".join(part.text for part in written)
        assert text.endswith("… 0.50")
        assert fonts.text_width(written) <= width or text == "… 0.50"
        assert width == 40.0 or fonts.text_width(written) > width - 30, "no shorter than it must be"


@pytest.mark.parametrize(
    ("name", "script"), [("ไทย", "THAI"), ("세포 ക", "MALAYALAM"), ("🦄", "SYMBOL"), ("\ue000", "SYMBOL")]
)
def test_without_a_font_the_number_stands_for_the_name_and_it_is_said_once(name: str, script: str) -> None:
    message = f"no font has the {script} characters of a name.*Install a font.*fonts-noto-cjk"
    with pytest.warns(UserWarning, match=message) as said:
        twice = [parts(name), parts(name)]
    assert twice == [[("class 3 0.50", "DejaVuSans")]] * 2
    assert len(said) == 1


@pytest.mark.parametrize("name", ["细胞", "cat", "क्षि ñ 细", "x" * 500, "细" * 500, "", "a\nb\x00"])
def test_names_are_drawn(name: str) -> None:
    drawn = np.asarray(draw_detections(GREY, BOX, [0], [0.9], [name], 0.5))
    unnamed = np.asarray(draw_detections(GREY, BOX, [0], [0.9], ["."], 0.5))
    assert drawn.shape == GREY.shape
    assert (drawn != unnamed).any()


def test_parts_stand_side_by_side_on_one_line() -> None:
    """The squares of the Chinese font, and the score behind them in another: ink on the colour of the class."""
    drawn = np.asarray(draw_detections(GREY, BOX, [1], [0.9], ["-", "细细"], 0.5)).astype(int)
    squares, score = fonts.label_parts("细细", 1, 0.9, 14, 1e6)
    assert fonts.text_width([squares]) == 28
    end = 202 + 28 + int(fonts.text_width([score]))
    ink = (np.abs(drawn[134:149] - class_color(1)).sum(axis=2) > 200)[:, :end]
    assert ink[:, 203:230].any(axis=0).mean() > 0.6
    assert ink[:, 232:].any(axis=0).mean() > 0.5
    bottom = [np.flatnonzero(ink[:, part].any(axis=1)).max() for part in (slice(203, 229), slice(232, end))]
    assert abs(bottom[0] - bottom[1]) <= 1


def test_a_sheet_of_curves_takes_names_as_they_are(tmp_path: Path) -> None:
    """In any script; a "$" is no formula, and a "_" in front hides nothing."""
    metrics = [{"epoch": epoch, "ap": 0.1 * epoch} for epoch in (1, 2)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compare_curves({"_细胞 $x{$": [metrics], "b": [metrics]}, tmp_path / "named.svg", title="세포 $ \\frac $")
    text = (tmp_path / "named.svg").read_text()
    assert all(said in text for said in ("_细胞 $x{$", "세포 $ \\frac $"))


def test_curves_number_the_names_that_no_font_has(tmp_path: Path) -> None:
    metrics = [{"epoch": 1, "ap": 0.1}]
    with pytest.warns(UserWarning, match="THAI") as said:
        compare_curves({"a": [metrics], "ไทย": [metrics]}, tmp_path / "named.svg", title="ไทย")
    assert len(said) == 1, "ours, and none of matplotlib's for each character"
    text = (tmp_path / "named.svg").read_text()
    assert "recipe 2 (0.100)" in text
    assert "ไ" not in text


def test_the_fonts_extra_installs_what_is_looked_for() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extra = project["optional-dependencies"]["fonts"]
    assert [requirement.split(">=")[0] for requirement in extra] == list(fonts._FONT_PACKAGES)
