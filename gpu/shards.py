"""The part of a checkpoint that several processes write at once: of a model that is divided over them (``--fsdp``).

    runs/x/checkpoint.shards.0/shard-00001-model-00001-of-00001.safetensors    by the first process
    runs/x/checkpoint.shards.0/shard-00002-…                                   by the second one

``torch.distributed.checkpoint`` writes and reads it, as safetensors files, so that any number of processes may read what another
number has written. Which folder belongs to a checkpoint, and what is in it, is in the checkpoint itself, written when the folder is
complete: there are two of each, and a third folder while the next one is written.
"""

from __future__ import annotations

import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.tensor import DTensor

from smca.gpu.config_json import cut

SHARDS_FOLDERS = tuple(f"checkpoint.shards.{number}" for number in range(3))
"""Of a run: those of its checkpoint and of the one before it, and one to write into."""


def places_in(state: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Where a checkpoint has tensors: "model", "average", "optimizer/0", "optimizer/1" …, each with its tensors by name."""
    yield "model", state["model"]
    if state["average"] is not None:
        yield "average", state["average"]
    for number, values in state["optimizer"].get("state", {}).items():
        yield f"optimizer/{number}", values


def take_sharded(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """What processes have parts of, by place and name, taken out of `state`, in place."""
    taken: dict[str, Tensor] = {}
    for place, values in places_in(state):
        names = [name for name, value in values.items() if isinstance(value, DTensor)]
        taken |= {f"{place}/{name}": values.pop(name) for name in names}
    return taken


def put_back(state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """The contrary of ``take_sharded``."""
    for place, values in places_in(state):
        values |= {name[len(place) + 1 :]: value for name, value in tensors.items() if name.startswith(f"{place}/")}


def free_folder(output: Path, taken: set[str]) -> str:
    """A folder, by its name, that neither of the checkpoints needs, emptied."""
    name = next(name for name in SHARDS_FOLDERS if name not in taken)
    shutil.rmtree(output / name, ignore_errors=True)
    (output / name).mkdir(parents=True)
    return name


def remove_others(output: Path, taken: set[str]) -> None:
    """Remove the folders that neither of the checkpoints needs."""
    for name in set(SHARDS_FOLDERS) - taken:
        shutil.rmtree(output / name, ignore_errors=True)


def write_shards(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Let each process write its part of `tensors` (``DTensor``, by name) into `folder`. Every process must ask.

    Raises:
        OSError: one of them could not write; says which, and why.
    """
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    try:
        state_dict_saver.save(dict(tensors), storage_writer=writer)
    except CheckpointException as error:
        raise OSError(f"{folder} could not be written: {_reasons(error)}") from error


def described(folder: Path) -> dict[str, Any]:
    """What a checkpoint says of a folder: its name, and the size of each of its files in bytes."""
    return {"folder": folder.name, "files": {file.name: file.stat().st_size for file in sorted(folder.iterdir())}}


def check_shards(output: Path, shards: Mapping[str, Any], source: Path) -> None:
    """Look whether all is there that a checkpoint says is there.

    Raises:
        ValueError: a file is missing or cut, or the checkpoint is not one of ours; names it.
    """
    folder, files = shards.get("folder"), shards.get("files")
    if folder not in SHARDS_FOLDERS or not isinstance(files, dict) or not files:
        raise ValueError(
            f"{source} is damaged or is not a checkpoint of smca train: it does not say which shards it has"
        )
    for name, size in files.items():
        if not re.fullmatch(r"[\w.-]+", str(name)):
            raise ValueError(f"{source} is damaged or is not a checkpoint of smca train: shards named {cut(name)}")
        path = output / folder / name
        if not path.is_file() or path.stat().st_size != size:
            found = f"has {path.stat().st_size:,} bytes" if path.is_file() else "is missing"
            raise ValueError(
                f"{path} {found}, where {source} needs {size:,}: a checkpoint of --fsdp is both, where all processes "
                "can read and write; take another copy of the whole"
            )


def read_shards(folder: Path, like: Callable[[str], Tensor] | None = None) -> dict[str, Tensor]:
    """What was written there, by place and name.

    Args:
        folder: with the shards of one checkpoint.
        like: a name → the ``DTensor`` as which it is to be divided; then every process must ask. None = every process that asks
            gets all of it, on the CPU.

    Raises:
        ValueError: files that are damaged, or of other tensors than `like` knows; says which.
    """
    reader = HuggingFaceStorageReader(str(folder))
    try:
        found = reader.read_metadata().state_dict_metadata
        if like is None:
            entries = {name: entry for name, entry in found.items() if isinstance(entry, TensorStorageMetadata)}
            tensors = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in entries.items()}
        else:
            tensors = {name: torch.zeros_like(like(name)) for name in found}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # where it is not needed
            state_dict_loader.load(tensors, storage_reader=reader, no_dist=like is None)
    except (CheckpointException, Exception) as error:
        raise ValueError(
            f"{folder} is damaged or belongs to another model: {_reasons(error)}; take another copy"
        ) from error
    return tensors


def sync_folder(folder: Path) -> None:
    """Have the names of its files on disk, whose contents are there already."""
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def _reasons(error: BaseException) -> str:
    failures = getattr(error, "failures", None) or {0: (error, None)}
    return "; ".join(
        f"process {rank}: {cut(getattr(inner, 'strerror', None) or inner, 200)}"
        for rank, (inner, _) in failures.items()
    )
