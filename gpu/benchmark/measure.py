"""How ``smca benchmark`` measures: cases in processes of their own on a CPU, together in one on a GPU; both in turn."""

from __future__ import annotations

import gc
import multiprocessing
import platform
import re
import resource
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor

from smca.gpu.benchmark.cases import Case, Step
from smca.gpu.training.determinism import without_denormals

Values = dict[str, dict[str, Tensor]]
"""Mode → name → tensor: the values by which cases are compared."""

WARM_UP = 2
"""Runs of each step on a GPU that are not counted."""

LEFT_OUT = "left out: --minutes were used up"
"""The error of a case that was not started."""

NO_COMPARISON = "plain"
"""Cases whose names begin with this compute something else."""


@dataclass(frozen=True)
class Part:
    """Cases that are compared with each other."""

    key: str
    title: str
    cases: dict[str, Callable[[], Case]]
    reference: str | None = None
    """The case from which the differences of the others are reported."""
    images: int = 0
    """Images per step, from which rates follow; 0 for none."""


@dataclass
class Run:
    """What was measured of one case, by mode."""

    seconds: dict[str, list[float]] = field(default_factory=dict)
    peak_mib: dict[str, float] = field(default_factory=dict)
    difference: dict[str, dict[str, float]] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)
    """Mode → why it was not measured, in one line; under "", why none was."""
    tracebacks: dict[str, str] = field(default_factory=dict)
    """Mode → the end of the traceback, if the error is a failure."""
    failed: bool = False
    """Whether one of the errors is a failure; running out of memory or of time is not."""

    def add_error(self, mode: str, error: Exception) -> None:
        """Note why `mode` ("" for all) was not measured."""
        if isinstance(error, torch.OutOfMemoryError | MemoryError):
            self.errors[mode] = "out of memory"
            return
        # Dynamo ends its messages with advice.
        lines = [li for li in str(error).strip().splitlines() if li.strip() and "TORCHDYNAMO_VERBOSE" not in li] or [""]
        self.errors[mode] = f"{type(error).__name__}: {lines[-1].strip()[:300]}"
        self.tracebacks[mode] = "".join(traceback.format_exception(error))[-4000:]
        self.failed = True


def measure_apart(part: Part, repeats: int, threads: int, progress: Progress) -> dict[str, Run]:
    """Each case in a process of its own, in turn, on the CPU; the peak memory is that of the whole case."""
    context = multiprocessing.get_context("spawn")
    runs, workers = {name: Run() for name in part.cases}, {}
    task = progress.add_task(part.key, total=len(part.cases) * (repeats + 1))
    for name, build in part.cases.items():
        pipe, worker_pipe = context.Pipe()
        process = context.Process(target=_serve, args=(build, threads, worker_pipe), daemon=True)
        process.start()
        worker_pipe.close()
        workers[name] = (process, pipe)

    def ask(name: str, request: str) -> Any:
        """The answer; None if the case failed, now or before (its run then holds the error)."""
        process, pipe = workers[name]
        if runs[name].errors:
            return None
        try:
            pipe.send(request)
            answer = pipe.recv()
        except (EOFError, OSError):
            process.join()
            answer = Run(errors={"": f"its process ended with exit code {process.exitcode}"}, failed=True)
        if isinstance(answer, Run):
            runs[name] = answer
            return None
        return answer

    for turn in range(repeats + 1):
        for name in part.cases:
            if (answer := ask(name, "run")) is not None and turn:  # the first turn warms up
                seconds, peak = answer
                for mode, value in seconds.items():
                    runs[name].seconds.setdefault(mode, []).append(value)
                runs[name].peak_mib[list(seconds)[-1]] = peak
            progress.advance(task)
    if part.reference is not None and (expected := ask(part.reference, "values")) is not None:
        for name in part.cases:
            if name == part.reference or name.startswith(NO_COMPARISON):
                continue
            if (values := ask(name, "values")) is not None:
                runs[name].difference = _differences(values, expected)
    for name, (process, _) in workers.items():
        ask(name, "stop")
        process.join()
    return runs


@without_denormals()  # as in training
def _serve(build: Callable[[], Case], threads: int, pipe: Connection) -> None:
    """In a process of its own: build the case, then do what is asked until told to stop."""
    torch.set_num_threads(threads)
    before = peak_mib()
    try:
        case = build()
        while (request := pipe.recv()) == "run":
            seconds = {mode: timed(step, "cpu", 1) for mode, step in case.items()}
            pipe.send((seconds, peak_mib() - before))
        if request == "values":  # after all runs: sending them takes memory
            values = {mode: _values(step) for mode, step in case.items()}
            pipe.send({mode: {k: v.numpy() for k, v in tensors.items()} for mode, tensors in values.items()})
            pipe.recv()
        pipe.send("stopped")
    except Exception as error:
        run = Run()
        run.add_error("", error)
        pipe.send(run)


def memory_mib(field: str) -> float | None:
    """A `field` of this process's memory, as Linux has them; None on another system."""
    status = Path("/proc/self/status")
    text = status.read_text(encoding="utf-8") if status.is_file() else ""
    found = re.search(rf"^{field}:\s*(\d+) kB", text, re.MULTILINE)
    return int(found[1]) / 2**10 if found else None


def private_mib() -> float:
    """The memory that this process has for itself, on Linux.

    Not counted is what it shares with the process that it was forked from, and the pages of a mapped file, which other processes
    share and which are dropped when memory is short, unless it has written numbers of its own into them.
    """
    total = private = 0
    of_file = False
    # Line by line: the whole text, split, is megabytes of the memory that is being measured.
    with open("/proc/self/smaps", encoding="utf-8") as lines:
        for line in lines:
            name, *values = line.split()
            if not name.endswith(":"):  # the next mapping: addresses, rights, offset, device, inode, perhaps a path
                of_file = len(values) > 4 and values[4].startswith("/")
                private = 0
            elif name in ("Private_Clean:", "Private_Dirty:"):
                private += int(values[0])
            elif name == "Anonymous:":
                total += min(private, int(values[0])) if of_file else private
    return total / 2**10


def peak_mib() -> float:
    """The most memory that this process has held."""
    if (held := memory_mib("VmHWM")) is not None:
        return held
    # Not used on Linux, where the number begins with what the parent process held.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if platform.system() == "Darwin" else 2**10)


@without_denormals()  # as in training
def measure_together(part: Part, repeats: int, device: str, deadline: float) -> dict[str, Run]:
    """All cases in this process: each built and warmed up, then all in turn, mode after mode.

    Args:
        part: what to measure.
        repeats: counted turns.
        device: where its cases run; "cuda", or for tests "cpu", of which memory is reported as 0.
        deadline: once ``time.time()`` is beyond this, no further case is built.
    """
    cuda = device.startswith("cuda")
    runs: dict[str, Run] = {name: Run() for name in part.cases}
    live: dict[tuple[str, str], Step] = {}  # by (mode, case), as are the next two
    held: dict[tuple[str, str], int] = {}
    times: dict[tuple[str, str], int] = {}
    expected: Values = {}
    for name in sorted(part.cases, key=lambda name: name != part.reference):  # the reference first
        run = runs[name]
        if time.time() > deadline:
            run.errors[""] = LEFT_OUT
            continue
        _release(cuda)
        before = _allocated(cuda)
        try:
            case = part.cases[name]()
        except Exception as error:  # a case that fails does not stop the others
            run.add_error("", error)
            continue
        for mode, step in case.items():
            try:
                for _ in range(WARM_UP):
                    seconds = timed(step, device, 1)
                if part.reference is not None and not name.startswith(NO_COMPARISON):
                    values = _values(step)
                    if name == part.reference:
                        expected[mode] = values
                    elif mode in expected:
                        run.difference |= _differences({mode: values}, {mode: expected[mode]})
            except Exception as error:
                run.add_error(mode, error)
                continue
            # Memory kept between steps. Modes get heavier, so what later ones keep (optimiser, gradients) is not included.
            live[mode, name], held[mode, name] = step, _allocated(cuda) - before
            # Short steps are repeated for 5 ms or so between two events: otherwise the launch would be measured.
            times[mode, name] = max(1, min(20, int(0.005 / max(seconds, 1e-6)))) if cuda else 1
        del case, step  # a failed case would otherwise keep its memory
    _release(cuda)
    for mode in dict.fromkeys(mode for mode, _ in live):
        for _ in range(repeats):
            for key in [key for key in live if key[0] == mode]:
                run = runs[key[1]]
                try:
                    if cuda:
                        torch.cuda.reset_peak_memory_stats()
                    before = _allocated(cuda)
                    seconds = timed(live[key], device, times[key])
                    peak = held[key] + (torch.cuda.max_memory_allocated() - before if cuda else 0)
                except Exception as error:
                    run.add_error(mode, error)
                    del live[key]
                    _release(cuda)
                    continue
                run.seconds.setdefault(mode, []).append(seconds)
                run.peak_mib[mode] = max(peak / 2**20, run.peak_mib.get(mode, 0.0))
    return runs


def _release(cuda: bool) -> None:
    """Free the memory of cases that failed or are finished."""
    gc.collect()
    if cuda:
        torch.cuda.empty_cache()


def _allocated(cuda: bool) -> int:
    return torch.cuda.memory_allocated() if cuda else 0


def timed(step: Step, device: str, times: int) -> float:
    """Seconds of one `step`, of `times` in a row."""
    if not device.startswith("cuda"):
        began = time.perf_counter()
        for _ in range(times):
            step()
        return (time.perf_counter() - began) / times
    event: Any = torch.cuda.Event  # untyped
    start, end = event(enable_timing=True), event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    for _ in range(times):
        step()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3 / times


def _values(step: Step) -> dict[str, Tensor]:
    return {key: value.float().cpu() for key, value in step().items()}


def _differences(got: Any, expected: Any) -> dict[str, dict[str, float]]:
    """‖a − b‖/‖b‖ of every value of every mode; tensors or arrays."""
    return {
        mode: {
            k: float(((got[mode][k] - b) ** 2).sum() ** 0.5 / max(float((b**2).sum()) ** 0.5, 1e-30))
            for k, b in values.items()
        }
        for mode, values in expected.items()
    }
