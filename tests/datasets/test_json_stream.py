"""Reading a JSON file entry by entry: as json.loads reads it, whatever the size of the parts that are read at a time."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from smca.datasets import coco_file, json_stream
from smca.datasets.coco_file import CocoFile, read_coco_file
from smca.datasets.json_stream import entries_of

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
OBJECTS = st.lists(st.dictionaries(st.text(max_size=3), VALUES, max_size=3), max_size=4)
EVERY = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@EVERY
@given(
    first=OBJECTS,
    second=OBJECTS,
    other=VALUES,
    window=st.integers(1, 40),
    indent=st.sampled_from([None, 0, 2]),
    ascii_only=st.booleans(),
    encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-32-le"]),
)
def test_the_entries_are_those_of_the_whole_file(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    first: Any,
    second: Any,
    other: Any,
    window: int,
    indent: int | None,
    ascii_only: bool,
    encoding: str,
) -> None:
    monkeypatch.setattr(json_stream, "_WINDOW", window)
    path = tmp_path / "a.json"
    text = json.dumps(
        {"other": other, "first": first, "more": [other], "second": second}, indent=indent, ensure_ascii=ascii_only
    )
    path.write_bytes(text.encode(encoding, "surrogatepass"))
    found: dict[str, list[Any]] = {"first": [], "second": []}
    for name, number, entry in entries_of(path, found):
        assert number == len(found[name])
        found[name].append(entry)
    assert repr(found) == repr({"first": first, "second": second})  # NaN is not equal to itself


@EVERY
@given(
    text=st.from_regex(r'\{"a": \[(\{"b": [0-9\[\]"]{0,4}\}, ?){0,3}[\]}{",a0-9\[ ]{0,4}\}?', fullmatch=True),
    window=st.integers(1, 9),
)
def test_what_is_no_json_is_refused_at_the_same_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, window: int
) -> None:
    monkeypatch.setattr(json_stream, "_WINDOW", window)
    path = tmp_path / "a.json"
    path.write_text("\n \n" + text)
    try:
        json.loads(path.read_text())
        refused = None
    except json.JSONDecodeError as error:
        refused = error
    try:
        list(entries_of(path, ["a"]))
        message = ""
    except ValueError as error:
        message = str(error)
    if "is not valid JSON" in message:
        assert refused is not None
        place = re.search(r"line (\d+) column (\d+) \(char (\d+)\)", message)
        assert place is not None
        # Python's own parser names the bracket before a list's first value, or a comma too many, where that value should be.
        assert int(place[1]) == refused.lineno
        assert 0 <= int(place[3]) - refused.pos <= 2
        assert int(place[3]) - refused.pos == int(place[2]) - refused.colno
    elif refused is not None:
        assert "must be an object" in message or "occurs twice" in message


def test_a_fault_is_found_where_it_is_and_not_at_the_end_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    with path.open("w") as file:
        file.write('{"a": [{"b": 1},\n')
        file.write('{"b" 1},\n')
        file.write('{"b": "' + "x" * 6_000_000 + '"},\n')  # longer than what is read at a time
        file.write('{"b": 1}]}')
    with pytest.raises(ValueError, match=r"Expecting ':' delimiter: line 2 column 6 \(char 22\)"):
        list(entries_of(path, ["a"]))
    path.write_text(path.read_text().replace('"b" 1', '"b": 1'))
    assert [len(str(entry["b"])) for _, _, entry in entries_of(path, ["a"])] == [1, 1, 6_000_000, 1]
    path.write_text('{"a": [], "a": []}')
    with pytest.raises(ValueError, match="the key 'a' occurs twice"):
        list(entries_of(path, ["a"]))


def as_values(file: CocoFile) -> str:
    return repr({name: value.tolist() if hasattr(value, "tolist") else value for name, value in vars(file).items()})


WHOLE = st.integers(0, 3)
WRITTEN = WHOLE | st.sampled_from([1.0, "2", " 3 ", 2**70, None, True, -1, "x", 10**400, 0.5])
ENTRIES = st.fixed_dictionaries(
    {
        "image_id": WHOLE | WRITTEN,
        "category_id": WHOLE,
        "bbox": st.lists(st.floats() | WRITTEN, min_size=4, max_size=4),
    },
    optional={
        "id": st.integers(0, 10**6) | WRITTEN,
        "area": st.floats() | WRITTEN,
        "iscrowd": st.integers(0, 1) | WRITTEN,
    },
)


@settings(EVERY, max_examples=200)
@given(entries=st.lists(ENTRIES, max_size=4))
def test_the_short_way_for_plain_entries_gives_what_the_careful_one_gives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, entries: list[dict[str, Any]]
) -> None:
    path = tmp_path / "a.json"
    images = [{"id": i, "file_name": f"{i}.png"} for i in range(4)]
    categories = [{"id": i, "name": str(i)} for i in range(4)]
    path.write_text(json.dumps({"images": images, "annotations": entries, "categories": categories}))
    found = []
    for plain in (coco_file._plain, lambda _: None):
        with monkeypatch.context() as patched:
            patched.setattr(coco_file, "_plain", plain)
            try:
                found.append(as_values(read_coco_file(path)))
            except ValueError as error:
                found.append(str(error))
    assert found[0] == found[1]
