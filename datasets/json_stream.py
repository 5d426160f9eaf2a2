"""A JSON file that is an object with long lists of objects, read entry by entry: memory does not grow with the file."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Collection, Iterator
from json import JSONDecodeError
from pathlib import Path
from typing import Any

from smca.datasets.json_values import Entry
from smca.datasets.settings import shown

_WINDOW = 1 << 22
"""Bytes that are read at a time."""
_UNDECIDED = 1 << 20
"""Characters before the window's end: what is wrong there may just be cut off."""
_SPACE = re.compile(r"[ \t\n\r]*")
_CUT_NUMBER = re.compile(r"(\.|[eE][+-]?)\Z")
"""What comes after the digits of a number that goes on behind the window."""
_scan: Callable[[str, int], tuple[Any, int]] = vars(json.JSONDecoder())["scan_once"]


def entries_of(
    path: Path, lists: Collection[str], progress: Callable[[int], None] | None = None
) -> Iterator[tuple[str, int, Entry]]:
    """(name of the list, number of the entry in it, entry) for every entry of `lists`, in the file's order; other keys are skipped.

    progress: is told now and then how many bytes have been read.

    Raises ValueError, naming the file, as soon as it comes to what is no JSON or otherwise no object with these lists of objects.
    """
    try:
        with path.open("rb") as file:
            yield from _entries(_Window(file, progress), path, lists)
    except RecursionError:
        raise ValueError(f"{path}: its JSON is nested too deeply to be read; export it anew in COCO's format") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not valid JSON: it is no UTF-8 text ({error.reason}); save it as UTF-8") from error
    except (JSONDecodeError, _DigitsError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}; was the download or the export cut short?") from error


class _DigitsError(Exception):
    """A number of more digits than Python reads."""


def _entries(window: _Window, path: Path, lists: Collection[str]) -> Iterator[tuple[str, int, Entry]]:
    if window.next() != "{":
        content = window.value()
        if window.next():
            window.fail("Extra data")
        raise ValueError(
            f"{path}: expected an object with 'images', 'annotations' and 'categories', got a {type(content).__name__}"
            "; is it a file of detection results?"
        )
    window.at += 1
    keys: set[str] = set()
    while window.next() != "}" or keys:
        window.expect('"', "Expecting property name enclosed in double quotes", consume=False)
        key = window.value()
        window.expect(":", "Expecting ':' delimiter")
        if key in keys and key in lists:
            raise ValueError(f"{path}: the key {key!r} occurs twice; merge the two lists")
        keys.add(key)
        if window.next() == "[":
            for number, entry in enumerate(window.items()):
                if key in lists:
                    if not isinstance(entry, dict):
                        raise ValueError(f"{path}: {key}[{number}] must be an object, got {shown(entry)}")
                    yield key, number, entry
        else:
            value = window.value()
            if key in lists:
                raise ValueError(f"{path}: {key!r} must be a list, got a {type(value).__name__}")
        if window.next() == "}":
            break
        window.expect(",", "Expecting ',' delimiter")
    window.at += 1
    if window.next():
        window.fail("Extra data")
    for name in lists:
        if name not in keys:
            raise ValueError(
                f"{path}: the key {name!r} is missing (the file has {shown(sorted(keys))}); export in COCO's format"
            )


class _Window:
    """The part of a JSON text that is being read; `at` is where in it."""

    def __init__(self, file: Any, progress: Callable[[int], None] | None) -> None:
        self._file, self._progress = file, progress
        head = file.read(4)
        file.seek(0)
        self._decoder = codecs.getincrementaldecoder(json.detect_encoding(head))("surrogatepass")
        self._ended = False
        self._characters = self._lines = self._column = 0  # of what lies before the window
        self._text, self.at = "", 0

    def next(self) -> str:
        """The next character that is no space, which is not consumed; "" at the end."""
        while True:
            match = _SPACE.match(self._text, self.at)
            self.at = match.end() if match else self.at
            if self.at < len(self._text):
                return self._text[self.at]
            if not self._read_on():
                return ""

    def expect(self, character: str, otherwise: str, consume: bool = True) -> None:
        """The next character must be this one."""
        if self.next() != character:
            self.fail(otherwise)
        self.at += consume

    def value(self) -> Any:
        """The next value, of any kind."""
        self.next()
        while True:
            try:
                value, end = _scan(self._text, self.at)
            except StopIteration as stop:
                problem, position = "Expecting value", stop.value
            except JSONDecodeError as error:
                problem, position = error.msg, error.pos
            except ValueError as error:
                raise _DigitsError(str(error)) from error
            else:
                cut = end == len(self._text) or _CUT_NUMBER.match(self._text, end)
                length = end - self.at  # for reading on moves the window
                if not cut or not self._read_on():
                    self.at += length
                    return value
                continue
            cut = problem.startswith("Unterminated string") or len(self._text) - position <= _UNDECIDED
            before = position - self.at
            if not cut or not self._read_on():
                self.at += before
                self.fail(problem)

    def items(self) -> Iterator[Any]:
        """The values of the list that begins here."""
        self.at += 1
        if self.next() == "]":
            self.at += 1
            return
        while True:
            yield self.value()
            if self.next() == "]":
                self.at += 1
                return
            self.expect(",", "Expecting ',' delimiter")

    def fail(self, problem: str) -> None:
        """Raise a JSONDecodeError whose place is that in the file."""
        error = JSONDecodeError(problem, self._text, min(self.at, len(self._text)))
        first = error.lineno == 1
        place = f"line {self._lines + error.lineno} column {error.colno + (self._column if first else 0)}"
        error.args = (f"{problem}: {place} (char {self._characters + error.pos})",)
        raise error

    def _read_on(self) -> bool:
        """Leave what was read behind, and read on; False at the end."""
        if self._ended:
            return False
        left = self._text[: self.at]
        self._characters += len(left)
        self._lines += left.count("\n")
        self._column = len(left) - left.rfind("\n") - 1 if "\n" in left else self._column + len(left)
        rest = self._text[self.at :]
        # Twice as much each time: a value that is longer than the window is not parsed again for each part of it.
        content = self._file.read(max(_WINDOW, len(rest)))
        self._ended = not content
        self._text, self.at = rest + self._decoder.decode(content, final=self._ended), 0
        if self._progress is not None:
            self._progress(self._file.tell())
        return bool(content)
