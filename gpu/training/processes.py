"""The processes of a run: how they come together, agree, and share what each of them has."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import distributed
from torch.distributed.rendezvous import rendezvous

from smca.datasets.settings import shown
from smca.gpu.training.setup import Run

Value = TypeVar("Value")
ALL_COME = timedelta(minutes=5)
"""How long processes wait for each other at the start."""


@contextmanager
def process_group() -> Iterator[tuple[int, int]]:
    """(rank, world size); joins the group that torchrun set up, if it did.

    Raises:
        ValueError: the environment promises processes that do not come, or says of this one something that cannot be.
    """
    promised = {name: os.environ.get(name) for name in ("RANK", "WORLD_SIZE")}
    rank, world = _promised(promised)
    if promised["RANK"] is None or promised["WORLD_SIZE"] is None:
        yield 0, 1
        return
    try:
        store, _, _ = next(rendezvous("env://", timeout=ALL_COME))
    except (ValueError, RuntimeError) as error:  # DistStoreError is one
        raise ValueError(
            f"RANK={rank} and WORLD_SIZE={world} promise {world} processes, which did not all come within "
            f"{ALL_COME.total_seconds() / 60:.0f} minutes ({shown(error)}): start them with torchrun, or unset the two"
        ) from error
    # What torchrun starts again finds the store of before, with addresses of processes that are no more. (Of several machines, each
    # counts its own starts; there TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 makes torchrun take a new store.)
    if os.environ.get("GROUP_WORLD_SIZE") == "1":
        store = distributed.PrefixStore(  # type: ignore[attr-defined]
            f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store
        )
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    distributed.init_process_group(backend, store=store, rank=rank, world_size=world)
    try:
        yield rank, world
        distributed.barrier()  # the others wait for what the first writes: a group that ends by halves may hang
    except RuntimeError as error:
        if not isinstance(error, distributed.DistError) and "gloo" not in str(error):
            raise
        raise ValueError(
            f"process {rank} of {world} cannot go on, since another one has ended or does not answer: look for what that one says "
            f"({shown(error)})"
        ) from error
    finally:
        distributed.destroy_process_group()


def _promised(environment: Mapping[str, str | None]) -> tuple[int, int]:
    """(rank, world size) that the environment says this process has."""
    words = " ".join(f"{name}={value}" for name, value in environment.items() if value is not None)
    try:
        rank, world = int(environment["RANK"] or 0), int(environment["WORLD_SIZE"] or 1)
    except ValueError:
        raise ValueError(f"the environment says {words}: expected whole numbers") from None
    if not 0 <= rank < world:
        raise ValueError(
            f"the environment says {words}, which cannot be: RANK counts from 0 to WORLD_SIZE − 1. Start several processes with "
            "torchrun, which sets both, or unset them"
        )
    absent = [name for name, value in environment.items() if value is None]
    if len(absent) == 1 and words != "WORLD_SIZE=1":
        raise ValueError(
            f"the environment says {words} and no {absent[0]}: start several processes with torchrun, which sets both, or unset it"
        )
    return rank, world


def gather(results: list[dict[str, Any]], world: int) -> list[dict[str, Any]]:
    """The results of all processes."""
    if world == 1:
        return results
    parts: list[list[dict[str, Any]] | None] = [None] * world
    distributed.all_gather_object(parts, results)
    return [result for part in parts for result in part or []]


def share_buffers(run: Run) -> None:
    """Give every process the first one's batch norm statistics, so that what is evaluated in parts is what is saved."""
    if run.world > 1:
        for module in (run.model, run.average):
            for buffer in module.buffers() if module is not None else ():
                distributed.broadcast(buffer, 0)


def as_the_first_says(value: Value, run: Run) -> Value:
    """The first process's `value`, on all."""
    answer = [value]
    if run.world > 1:
        distributed.broadcast_object_list(answer, 0)
    return answer[0]


def wait_for_all(run: Run) -> None:
    """Until every process has come as far."""
    if run.world > 1:
        distributed.barrier()


def mean_over_processes(values: Mapping[str, float], run: Run) -> dict[str, float]:
    """The mean of each number over all processes: a loss is that of the whole batch, not of one process's part."""
    if run.world == 1:
        return dict(values)
    dtype = torch.float64 if run.device.type in ("cpu", "cuda") else torch.float32
    numbers = torch.tensor(list(values.values()), dtype=dtype, device=run.device)
    distributed.all_reduce(numbers)
    return dict(zip(values, (numbers / run.world).tolist(), strict=True))
