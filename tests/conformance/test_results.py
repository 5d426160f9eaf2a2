"""Expected failures, and what a run leaves for other programs."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from smca.conformance.command import main
from smca.conformance.suite import PROPERTIES
from smca.conformance.xfails import read_xfails
from smca.reference import SPECIFICATION_VERSION

FLOAT32 = "misbehaving:ReturnsFloat32"
"""Breaks two of the properties of GIoU, and not those of sets that are too small for its habit."""
BROKEN = (
    "generalized_box_iou.equals_the_oracle",
    "generalized_box_iou.symmetric_and_bounded",
    "generalized_box_iou.scale_and_shift",
)


def checked(*arguments: str) -> int:
    """Exit status of a run."""
    try:
        main(["--implementation", FLOAT32, "--only", "generalized_box_iou", *arguments])
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def test_failures_that_are_expected_fail_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    xfails, report, junit = tmp_path / "xfails.txt", tmp_path / "report.json", tmp_path / "junit.xml"
    xfails.write_text(f"# known\n\n{BROKEN[0]}  # single precision\n{BROKEN[1]}[float64]\n", encoding="utf-8")
    assert checked("--xfails", str(xfails)) == 1, "the third is in no line"
    assert "1 property failed" in capsys.readouterr().out

    xfails.write_text("generalized_box_iou.*  # single precision\n", encoding="utf-8")
    assert checked("--xfails", str(xfails), "--json", str(report), "--junit", str(junit)) == 0
    out = capsys.readouterr().out
    assert "(3 more failed as expected)" in out
    unexpected = "generalized_box_iou.iou_where_the_hull_is_the_union"
    assert (
        f"ReturnsFloat32, float64: {unexpected} passed, and was expected to fail ({xfails}:1): single precision" in out
    )

    document = json.loads(report.read_text(encoding="utf-8"))
    assert document["specification"] == SPECIFICATION_VERSION
    by_name = {case["property"]: case for case in document["cases"]}
    assert {case["status"] for case in by_name.values()} == {"failed as expected", "passed unexpectedly"}
    assert by_name[unexpected]["status"] == "passed unexpectedly"
    for name in BROKEN:
        assert by_name[name]["verdict"] == "another dtype"
        assert "it returned float32, expected float64 or wider" in by_name[name]["message"]

    suite = ET.parse(junit).getroot().find("testsuite")
    assert suite is not None
    assert (suite.get("tests"), suite.get("failures"), suite.get("skipped")) == ("4", "0", "3")
    assert suite.find("properties/property").attrib == {"name": "specification", "value": SPECIFICATION_VERSION}  # type: ignore[union-attr]


def test_failures_are_failures_for_other_programs_too(tmp_path: Path) -> None:
    report, junit = tmp_path / "report.json", tmp_path / "junit.xml"
    assert checked("--json", str(report), "--junit", str(junit)) == 1
    statuses = [case["status"] for case in json.loads(report.read_text(encoding="utf-8"))["cases"]]
    assert sorted(statuses) == ["failed", "failed", "failed", "passed"]
    failures = ET.parse(junit).getroot().findall("testsuite/testcase/failure")
    assert [failure.get("message") for failure in failures] == ["another dtype"] * 3
    assert all("replay(" in (failure.text or "") for failure in failures)


def test_a_line_may_be_of_one_implementation(tmp_path: Path) -> None:
    path = tmp_path / "xfails.txt"
    path.write_text("Returns*: generalized_box_iou.*\nanother: assign.*\n", encoding="utf-8")
    assert checked("--xfails", str(path)) == 0
    path.write_text("another: generalized_box_iou.*\n", encoding="utf-8")
    assert checked("--xfails", str(path)) == 1


def test_the_scoreboard_says_what_passes_and_why_the_rest_does_not(tmp_path: Path) -> None:
    path, xfails = tmp_path / "scoreboard.md", tmp_path / "xfails.txt"
    xfails.write_text("generalized_box_iou.*  # single precision\n", encoding="utf-8")
    checked("--scoreboard", str(path), "--xfails", str(xfails))
    page = path.read_text(encoding="utf-8")
    assert "## ReturnsFloat32\n\n| operation | float64 |\n|---|---|\n| `generalized_box_iou` | 1 pass, " in page
    assert ", **3 fail** |\n" in page
    for name in BROKEN:
        assert f"| `{name}` | float64 | it returned float32, expected float64 or wider | single precision |\n" in page
    assert f"smca conformance --implementation {FLOAT32} --only generalized_box_iou --scoreboard " in page


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("generalised_box_iou.*", r":2: no property is called 'generalised_box_iou\.\*'\. `smca conformance --list`"),
        ("assign.*[float8]", r":2: expected a dtype of float64, .* got 'float8'"),
        ("assign.* float32", r":2: expected a property and perhaps \[dtype\], .* got 'assign\.\* float32'"),
    ],
)
def test_a_line_that_says_nothing_is_refused(tmp_path: Path, line: str, says: str) -> None:
    path = tmp_path / "xfails.txt"
    path.write_text(f"# known\n{line}\n", encoding="utf-8")
    with pytest.raises(ValueError, match=says):
        read_xfails(path, [prop.name for prop in PROPERTIES])
