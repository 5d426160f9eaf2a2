"""The ``smca`` command: train, check-data, evaluate, predict, explain, convert-weights, benchmark, conformance."""

from __future__ import annotations

import importlib.metadata
import io
import os
import sys
import warnings
from collections.abc import Callable
from typing import TextIO

COMMANDS = {
    "train": "train a detector on COCO-format or built-in data",
    "check-data": "what is in data, what is wrong with them, and whether a preset's settings suffice",
    "evaluate": "the COCO metrics of a trained model",
    "predict": "detect objects in images: annotated pictures and COCO results JSON",
    "explain": "why a model detects what it detects: a page and a picture for every image",
    "convert-weights": "a checkpoint of DETR or of SMCA's authors as a model of this project",
    "benchmark": "measure speed and memory on this machine",
    "conformance": "check implementations of SMCA, ours or yours, against the specification",
}
READER_GONE = 141
"""Exit status of a command whose output nobody reads any more: a shell's for one that SIGPIPE ended."""


def run(command: Callable[[list[str]], None], argv: list[str] | None = None) -> None:
    """Run a command; expected errors become one readable message and exit status 1.

    What a terminal cannot show (a code page without "→" or without the letters of a class name) is shown as "?". A reader that goes
    away, such as ``head``, ends the command quietly with status 141, and Ctrl-C with 130.
    So does a signal that stops training, with the status of its own that a shell gives.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"  # without the line that gave it
    try:
        _run_and_flush(command, sys.argv[1:] if argv is None else argv)
    except (ValueError, OSError) as error:
        # Written to once more, because the pipe may also have been one to a process of ours.
        if isinstance(error, BrokenPipeError) and _drop_unwritable("\n"):
            raise SystemExit(READER_GONE) from None
        if os.environ.get("SMCA_TRACEBACK"):
            raise
        print(f"error: {_message(error)}\n(SMCA_TRACEBACK=1 shows where)", file=sys.stderr)
        raise SystemExit(1) from None
    except KeyboardInterrupt as error:
        print("\nstopped", file=sys.stderr)
        raise SystemExit(getattr(error, "status", 130)) from None
    finally:
        _drop_unwritable()


def _run_and_flush(command: Callable[[list[str]], None], argv: list[str]) -> None:
    """Run a command until its output is written; BrokenPipeError if nobody reads it, also of a command that ends by itself."""
    try:
        command(argv)
    except SystemExit as ended:
        if isinstance(ended.__context__, BrokenPipeError):  # Rich ends the program at once, with status 1
            raise SystemExit(READER_GONE) from None
        if sys.stdout is not None:
            sys.stdout.flush()
        raise
    if sys.stdout is not None:  # None if it was closed before the start
        sys.stdout.flush()


def _drop_unwritable(text: str = "") -> bool:
    """Write `text` to stdout, else to stderr: what the first that cannot take it holds goes nowhere, now and as Python ends.

    Returns:
        Whether one could not take it.
    """
    for stream in (sys.stdout, sys.stderr):
        if stream is not None and not _takes(stream, text):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
            return True
    return False


def _takes(stream: TextIO, text: str) -> bool:
    try:
        stream.write(text)
        stream.flush()
    except OSError:
        return False
    return True


def _message(error: Exception) -> str:
    """The text of `error`, without the traceback that torch puts before an error from a process that loads images."""
    text = str(error).rstrip()
    return text.rpartition(f"{type(error).__name__}: ")[2] if text.startswith("Caught ") else text


def main() -> None:
    """Entry point of ``smca``."""
    run(_dispatch)


def _dispatch(argv: list[str]) -> None:
    """Run the command that the first argument names."""
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: smca COMMAND [options]\n")
        width = max(map(len, COMMANDS))
        print("\n".join(f"  {name:{width}} {text}" for name, text in COMMANDS.items()))
        print("\nsmca COMMAND --help lists its options.")
        return
    if argv[0] not in COMMANDS:
        print(f"error: no command {argv[0]!r}: choose one of {', '.join(COMMANDS)}", file=sys.stderr)
        raise SystemExit(2)
    # By entry point (pyproject.toml): the suite imports all packages, so this one must not import it.
    points = importlib.metadata.entry_points(group="smca.commands", name=argv[0])
    if not points:
        print(f"error: this installation has no command {argv[0]!r}: reinstall it (make setup)", file=sys.stderr)
        raise SystemExit(1)
    try:
        command = next(iter(points)).load()
    except ModuleNotFoundError as error:
        if argv[0] != "conformance" or error.name not in ("hypothesis", "pytest"):
            raise
        print("error: the suite needs Hypothesis: pip install 'smca-detr[conformance]'", file=sys.stderr)
        raise SystemExit(1) from None
    command(argv[1:])
