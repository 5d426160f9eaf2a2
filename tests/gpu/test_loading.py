"""Processes that load images: what is wrong with them is said, and nothing waits for them without end."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import time
from typing import Any

import pytest
import torch

from smca.gpu import loading
from smca.gpu.loading import Loader


class Numbers(torch.utils.data.Dataset[int]):
    """Eight numbers, of which `bad` does something else."""

    def __init__(self, bad: int, what: str) -> None:
        self.bad, self.what = bad, what

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> int:
        if index == self.bad:
            if self.what == "sleep":
                time.sleep(60)
            elif self.what == "die":
                os.kill(os.getpid(), signal.SIGKILL)
            elif self.what == "ask":
                raise ConnectionError("a number that is elsewhere")
            else:
                raise RuntimeError("a number that cannot be read")
        return index


def read(what: str, workers: int = 2) -> list[Any]:
    return [batch.tolist() for batch in Loader(Numbers(5, what), workers=workers, batch_size=2)]


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_come_in_order(workers: int) -> None:
    loader = Loader(Numbers(-1, ""), workers=workers, batch_size=2, persistent_workers=workers > 0)
    for _ in range(2):
        assert [batch.tolist() for batch in loader] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert len(loader) == 4


def test_a_process_that_does_not_answer_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where shared memory is full: the batch is lost and nobody says so."""
    monkeypatch.setattr(loading, "TIMEOUT", 1.0)
    monkeypatch.setattr(loading, "GRACE", 0.1)
    message = (
        r"no batch of images came: DataLoader timed out after 1.0 seconds. 2 processes .*MB are free now.*--workers 0"
    )
    with pytest.raises(ValueError, match=message):
        read("sleep")


def test_a_process_that_is_killed_is_named() -> None:
    with pytest.raises(ValueError, match=r"no batch of images came: DataLoader worker (\(pid|ended).* --shm-size"):
        read("die")


@pytest.mark.parametrize("error", [ConnectionResetError(104, "Connection reset by peer"), EOFError()], ids=repr)
def test_a_process_that_is_killed_while_it_sends_is_named_too(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def next_data(_: Any) -> Any:
        raise error

    monkeypatch.setattr("torch.utils.data.dataloader._MultiProcessingDataLoaderIter._next_data", next_data)
    with pytest.raises(
        ValueError, match=r"no batch of images came: DataLoader worker ended while it sent a batch \(.+\)\. 2 processes"
    ):
        read("")


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_of_the_data_stays_what_it_is(workers: int) -> None:
    children = multiprocessing.active_children()
    with pytest.raises(RuntimeError, match="a number that cannot be read"):
        read("raise", workers)
    with pytest.raises(ConnectionError, match="a number that is elsewhere"):
        read("ask", workers)
    start = time.monotonic()
    gc.collect()
    assert time.monotonic() - start < 4  # no process is left to be waited for
    assert not set(multiprocessing.active_children()) - set(children)
