"""How far a run is, on a terminal's last line."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

WIDTH = 100


def followed(items: Sequence[Any], describe: Callable[[Any], str]) -> Iterator[Any]:
    """The items one by one; stderr shows how many are done and what comes now, where it is a terminal.

    Args:
        items: to go through.
        describe: item → a few words.
    """
    shown = sys.stderr.isatty()
    for number, item in enumerate(items):
        if shown:
            print(f"\r{f'{number}/{len(items)} {describe(item)}'[:WIDTH]:{WIDTH}}", end="", file=sys.stderr, flush=True)
        yield item
    if shown:
        print(f"\r{'':{WIDTH}}\r", end="", file=sys.stderr, flush=True)
