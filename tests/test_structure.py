"""What structure.py counts is what is there."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

STRUCTURE = runpy.run_path(str(Path(__file__).with_name("structure.py")))

SOURCE = '''"""Three words here."""
# two words

LIMIT = 3
"""Of all."""


def outer(x):
    """Doc."""

    def inner():  # one
        return (
            x
        )
    return inner
'''


def test_lines_words_and_functions_of_a_module() -> None:
    assert STRUCTURE["code_lines"](SOURCE) == 7
    assert STRUCTURE["prose_words"](SOURCE) == 3 + 3 + 2 + 1 + 2
    assert sorted(STRUCTURE["functions"](SOURCE)) == [(3, "inner"), (5, "outer")]


def test_a_checkout_is_described(tmp_path: Path) -> None:
    for name, text in {
        "reference/a.py": SOURCE,
        "gpu/b.py": "import smca.gpu.c\n",
        "gpu/c.py": "import smca.gpu.b\n",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    text = STRUCTURE["describe"](tmp_path)
    assert "circles of imports: 1\n  smca.gpu.b, smca.gpu.c" in text
    assert "reference: 11 words of docstrings and comments, 7 lines of code, 1 minutes to read; 0 errors" in text
    assert any(line.split() == ["gpu/", "2", "2", "2"] for line in text.splitlines())


def test_this_checkout_is_described() -> None:
    assert "circles of imports: 0" in STRUCTURE["describe"](STRUCTURE["ROOT"])


def test_the_tour_names_the_minutes_that_the_files_take() -> None:
    tour = (STRUCTURE["ROOT"] / "docs" / "tour.md").read_text(encoding="utf-8")
    named, total = set(), 0.0
    for minutes, links in re.findall(r"^\| (\d+) \| (\[.+?) \|", tour, re.MULTILINE):
        files = re.findall(r"\.\./(reference/\w+\.py)", links)
        takes = sum(STRUCTURE["minutes"]((STRUCTURE["ROOT"] / file).read_text(encoding="utf-8")) for file in files)
        assert abs(int(minutes) - takes) <= 1, f"{files} take {takes:.1f} minutes"
        named |= set(files)
        total += takes
    every = {f"reference/{path.name}" for path in (STRUCTURE["ROOT"] / "reference").glob("*.py")}
    assert named == every - {"reference/__init__.py"}
    assert f"about {round(total, -1):.0f} minutes" in tour
