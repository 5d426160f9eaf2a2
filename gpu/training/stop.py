"""Signals that end a run: the step that they fall into is finished and saved."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

import torch
from torch import distributed

SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
"""Ctrl-C; a scheduler's end of the time; a terminal that is closed."""


class StoppedError(KeyboardInterrupt):
    """A signal ended the run; what was done is on disk."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number

    @property
    def status(self) -> int:
        """The exit status that a shell gives a process that this signal ended."""
        return 128 + self.number

    def __str__(self) -> str:
        return signal.Signals(self.number).name


class Stop:
    """While it is entered, a signal that comes while ``waits`` is set is left until ``agreed`` is asked, which is where a step is
    complete; otherwise, and from the second one on, it raises StoppedError at once."""

    def __init__(self) -> None:
        self.waits = False
        """Whether a signal is to wait."""
        self.number = 0
        """Of the signal that waits; 0 = none."""
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Stop:
        # A signal that is ignored, as nohup ignores a terminal's end, stays so; threads other than the main one get none.
        if threading.current_thread() is threading.main_thread():
            heard = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
            self._before = {number: signal.signal(number, self._handle) for number in heard}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if self.number or not self.waits:
            raise StoppedError(number)
        self.number = number
        if hasattr(signal, "SIGCHLD"):
            # A scheduler ends the processes that load images, too; what they have loaded is enough for the step.
            self._before[signal.SIGCHLD] = signal.signal(signal.SIGCHLD, signal.SIG_DFL)

    def agreed(self, world: int, device: torch.device) -> int:
        """The number of a signal that one of the processes got, 0 if none did. All of them must ask at the same step."""
        if world == 1:
            return self.number
        number = torch.tensor(self.number, device=device)
        distributed.all_reduce(number, distributed.ReduceOp.MAX)
        return int(number)
