"""Images from other processes: what is wrong with those ends the run with a reason, and signals are left to the one that trains."""

from __future__ import annotations

import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from torch.utils.data import DataLoader, Dataset

TIMEOUT = 300.0
"""Seconds without a batch after which the processes that load images are given up."""
GRACE = 10.0
"""Seconds that such a process goes on for after SIGTERM."""
SHARED_MEMORY = Path("/dev/shm")


class Loader(DataLoader[Any]):
    """A DataLoader that never waits without end, nor for a process that is dead.

    Iterating raises a ValueError if a batch does not come: the processes that load images have ended, or found no shared memory, or
    take longer than TIMEOUT.
    """

    def __init__(self, dataset: Dataset[Any], *, workers: int, **options: Any) -> None:
        """As of a DataLoader, of which `workers` is the num_workers."""
        more: dict[str, Any] = {"timeout": TIMEOUT, "worker_init_fn": leave_signals_to_the_parent} if workers else {}
        super().__init__(dataset, num_workers=workers, **more, **options)

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        batches = super().__iter__()
        while True:
            try:
                with _hearing_of_dead_processes(self.num_workers):
                    batch = next(batches)
            except StopIteration:
                return
            except Exception as error:
                said = str(error).strip()
                if isinstance(error, ConnectionError | EOFError) and self.num_workers and not said.startswith("Caught"):
                    # It died while it sent a batch, and was not yet known to be dead.
                    said = f"DataLoader worker ended while it sent a batch ({said or type(error).__name__})"
                if not (isinstance(error, RuntimeError | ConnectionError | EOFError) and said.startswith("DataLoader")):
                    # One of the data's own. Its traceback keeps the iterator, which, once it is found to be garbage, can no longer
                    # tell its processes to end, and would wait for each of them for seconds.
                    if self.num_workers:
                        batches._shutdown_workers()  # type: ignore[attr-defined]
                    raise
                raise ValueError(f"no batch of images came: {said}. {_advice(self.num_workers)}") from error
            yield batch


_raises: Any = None
"""PyTorch's handler of SIGCHLD, which raises if a process that loads images has died."""


def _later(_number: int, _frame: FrameType | None) -> None:
    """What handles SIGCHLD while no batch is waited for: it leaves the error until one is."""


@contextmanager
def _hearing_of_dead_processes(workers: int) -> Iterator[None]:
    """Inside, a process that has died raises PyTorch's RuntimeError; outside not any more, where it would tear a step apart."""
    global _raises
    if not workers or not hasattr(signal, "SIGCHLD") or threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.getsignal(signal.SIGCHLD)
    if not callable(handler):  # the default, as once a signal is to end the run: what is loaded is enough
        yield
        return
    if handler is not _later:
        _raises = handler
    try:
        signal.signal(signal.SIGCHLD, _raises)
        _raises(signal.SIGCHLD, None)  # it may have died before
        yield
    finally:
        if signal.getsignal(signal.SIGCHLD) is _raises:
            signal.signal(signal.SIGCHLD, _later)


def _advice(workers: int) -> str:
    try:
        free = f" (of which {shutil.disk_usage(SHARED_MEMORY).free / 1e6:,.0f} MB are free now)"
    except OSError:
        free = ""
    return (
        f"{workers} processes pass images on through {SHARED_MEMORY}{free}: a container often has too little, which `docker run "
        "--shm-size 4g` changes; if files are slow to read, give it fewer; --workers 0 loads in the training process"
    )


def leave_signals_to_the_parent(_worker: int) -> None:
    """In a process that loads images: a signal that reaches it, too, is for the training process, which ends it in time."""
    for name in ("SIGINT", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    if hasattr(signal, "setitimer"):
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, lambda *_: signal.setitimer(signal.ITIMER_REAL, GRACE))
