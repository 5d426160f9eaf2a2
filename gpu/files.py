"""Files that a run leaves: checkpoints, with all that training needs to go on, each replaced in one step."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch

CHECKPOINT_FILE = "checkpoint.pt"
FORMAT = 1
"""Layout of the file; raised when it changes."""


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Let `write` fill a neighbour of `path`, then put it in place: a reader sees the old file or the new, never half."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write `state` (tensors and plain values) to `path` atomically."""
    write_atomically(path, lambda file: torch.save({"format": FORMAT, **state}, file))


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read what ``save_checkpoint`` wrote. Only tensors and plain values are unpickled, never code.

    Raises:
        ValueError: no file, not a checkpoint of this program, or damaged.
    """
    if not path.is_file():
        raise ValueError(f"no checkpoint at {path}: start without --resume, or point --output at the run to go on with")
    try:
        state: Any = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, OSError) as error:
        raise ValueError(
            f"{path} is damaged or is not a checkpoint of smca train ({type(error).__name__}): remove it and start anew"
        ) from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise ValueError(f"{path} was not written by this version of smca train: start anew with --overwrite")
    return state
