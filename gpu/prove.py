"""Prove on a GPU what has only run on a CPU, then measure it (docs/benchmarks/README.md).

    python gpu/prove.py wheels FOLDER [PACKAGE …]     with a network: gather what the GPU machine lacks
    python gpu/prove.py run [OUT] [PART …]            on the GPU machine, which needs none
    python gpu/prove.py list                          the parts of a run

Needs nothing but Python's standard library to start with: it installs the rest from the wheels.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import importlib.util
import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

ROOT = Path(__file__).resolve().parent.parent
PYTEST = ("-m", "pytest", "-p", "no:cacheprovider")
SMCA = ("-c", "from smca.gpu.cli import main; main()")
TOTAL_SECONDS = 520
LEAST_SECONDS = 5
"""A part that would get less is left out."""
OLDEST_SETUPTOOLS = 77
"""That builds the project (pyproject.toml)."""


@dataclass(frozen=True)
class Part:
    """A command of its own, with a time limit of its own."""

    name: str
    command: tuple[str, ...]
    """What follows the interpreter."""
    needs: tuple[str, ...] = ()
    """Of "cuda", "triton" and "cupy"."""
    phase: Literal["check", "measure"] = "check"
    """Checks run side by side, then measurements one by one."""
    seconds: int = 180
    """At most."""


@dataclass(frozen=True)
class Result:
    """What became of a part."""

    part: str
    result: Literal["passed", "failed", "timed out", "skipped", "left out"]
    seconds: int
    note: str = ""
    """Why, unless it passed."""


def tests(name: str, needs: tuple[str, ...], *arguments: str) -> Part:
    """A part that runs tests: files of tests/gpu and other arguments of pytest."""
    return Part(name, (*PYTEST, *(f"tests/gpu/{a}" if a.startswith("test_") else a for a in arguments)), needs)


def only(file: str, *names: str) -> tuple[str, ...]:
    """Arguments of ``tests`` that choose these of a file."""
    return tuple(f"{file}::{name}" for name in names)


def all_but(file: str, *names: str) -> tuple[str, ...]:
    """Arguments of pytest that leave tests out."""
    return tuple(word for name in names for word in ("--deselect", f"tests/gpu/{file}::{name}"))


def suite(name: str, *needs: str) -> Part:
    """A part that runs the conformance suite on an implementation."""
    return Part(name, (*SMCA, "conformance", "--implementation", name), needs)


def benchmark(name: str, group: str, needs: tuple[str, ...], seconds: int, *arguments: str) -> Part:
    """A part that runs one part of ``smca benchmark``."""
    command = (*SMCA, "benchmark", "--only", group, "--repeats", "5", *arguments)
    return Part(name, command, needs, "measure", seconds)


FUSED, STEP = "test_fused_attention.py", "test_gpu_step.py"
HALF = (
    "test_half_precision_keeps_narrow_gaussians",
    "test_half_precision_with_centers_far_off_the_map",
    "test_half_precision_on_maps_of_many_cells",
)
SHAPES = ("test_agrees_with_the_reference", "test_padded_keys_may_hold_anything")
LARGE = "test_at_the_size_of_a_detector"
ON_GPU, ALL = ("cuda", "triton"), ("cuda", "triton", "cupy")

PARTS = (
    # The fused kernels, split so that no part compiles for longer than the others.
    Part("kernels", ("tests/gpu/test_kernel_compilation.py",), ("triton",)),
    tests("fused-attention", ON_GPU, FUSED, *all_but(FUSED, LARGE, *SHAPES, *HALF)),
    tests("fused-attention-half", ON_GPU, *only(FUSED, *HALF)),
    tests("fused-attention-shapes", ON_GPU, *only(FUSED, *SHAPES)),
    *(
        tests(f"fused-attention-{dtype}", ON_GPU, *only(FUSED, LARGE), "-k", f"torch.{dtype}")
        for dtype in ("float32", "float16", "bfloat16")
    ),
    # The oracle at real sizes, the assignment kernel, a step in which nothing waits.
    tests("real-sizes", ALL, "test_real_sizes.py", "-rP"),
    tests("assignment", ("cuda", "cupy"), "test_assignment.py"),
    tests("step", ALL, STEP, "test_layers.py", *all_but(STEP, "test_a_compiled_step_does_not_wait_either")),
    tests("step-compiled", ALL, STEP, "-k", "compiled"),
    tests("muon", ("cuda",), "test_muon.py", "-k", "gpu or cuda or wait"),
    tests("trials", ALL, "test_batch_size.py", "test_fast_dev_run.py", "-k", "gpu or cuda"),
    # The conformance suite.
    suite("triton-cuda", *ON_GPU),
    suite("compiled"),
    suite("cuda-assignment", "cuda", "cupy"),
    suite("criterion-cupy", "cuda", "cupy"),
    suite("oracle-cupy", "cuda", "cupy"),
    # The benchmark, what is worth most first.
    benchmark("attention", "attention", ON_GPU, 105, "--minutes", "0.8"),
    benchmark("step-speed", "step", ALL, 105, "--batches", "16", "--minutes", "0.7"),
    benchmark("recipe-speed", "recipe", ALL, 90, "--minutes", "0.5"),
    benchmark("assignment-speed", "assignment", ("cuda", "cupy"), 50, "--minutes", "0.2"),
    benchmark("profile", "profile", ALL, 90, "--minutes", "0.5"),
    benchmark("multi-scale", "multi-scale", ON_GPU, 105, "--minutes", "0.6"),
    benchmark("data-speed", "data", ALL, 60, "--minutes", "0.3"),
    benchmark("compiled-speed", "compiled", ("cuda", "cupy"), 90, "--minutes", "0.8"),
)


class Runner:
    """Runs parts under their limits and under that of the whole; each in a process group, so that none leaves a child behind."""

    def __init__(self, out: Path, total_seconds: float, began: float | None = None) -> None:
        """Write logs into `out`; end `total_seconds` after `began` (of ``time.monotonic()``; now if None)."""
        self.out, self.total_seconds = out, total_seconds
        self.deadline = (time.monotonic() if began is None else began) + total_seconds
        self._groups: set[int] = set()
        self._stopped = False
        self._starting = threading.Lock()

    def run(self, parts: Sequence[Part], has: set[str]) -> list[Result]:
        """What became of each part, checks first. `has`: of "cuda", "triton" and "cupy" what this machine has."""
        checks = [part for part in parts if part.phase == "check"]
        results: list[Result] = []
        with ThreadPoolExecutor(max(1, len(checks))) as pool:
            try:
                results += pool.map(lambda part: self._run(part, has), checks)
                results += [self._run(part, has) for part in parts if part.phase == "measure"]
            finally:
                self.stop()  # or leaving the pool would wait for what runs
        return results

    def stop(self) -> None:
        """End all that is running; nothing starts after it."""
        with self._starting:
            self._stopped = True
            for group in list(self._groups):
                _kill_group(group)

    def _run(self, part: Part, has: set[str]) -> Result:
        if reasons := missing(part, has):
            return Result(part.name, "skipped", 0, ", ".join(reasons))
        limit = min(part.seconds, self.deadline - time.monotonic())
        if limit < LEAST_SECONDS:
            return Result(part.name, "left out", 0, f"the {self.total_seconds:.0f} seconds of the whole are used up")
        command = [sys.executable, *part.command]
        environment = dict(os.environ)
        if "benchmark" in part.command:
            command += ["--output", str(self.out)]
        if part.phase == "check":
            environment["OMP_NUM_THREADS"] = "2"
        began = time.monotonic()
        with (self.out / f"{part.name}.log").open("wb") as log:
            with self._starting:  # or stop() could miss a process that is about to start, and wait for it
                if self._stopped:
                    return Result(part.name, "left out", 0, "the run was stopped")
                process = subprocess.Popen(
                    command,
                    cwd=ROOT,
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
                self._groups.add(process.pid)
            try:
                status = process.wait(limit)
            except subprocess.TimeoutExpired:
                status = None
            finally:
                _kill_group(process.pid)
                process.wait()
                self._groups.discard(process.pid)
        seconds = round(time.monotonic() - began)
        if status is None:
            return Result(part.name, "timed out", seconds, f"stopped after {limit:.0f} s")
        if status != 0:
            return Result(part.name, "failed", seconds, f"exit status {status}, see {part.name}.log")
        return Result(part.name, "passed", seconds)


def _kill_group(group: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # all of it has ended
        os.killpg(group, signal.SIGKILL)


def missing(part: Part, has: set[str]) -> list[str]:
    """Why a part cannot run where there is no more than `has`; nothing if it can."""
    return [
        "PyTorch sees no CUDA device" if need == "cuda" else f"{need} is not installed"
        for need in part.needs
        if need not in has
    ]


def chosen(names: Sequence[str]) -> list[Part]:
    """The parts of these names, in the order of a run; all if there are none.

    Raises:
        ValueError: a name that no part has.
    """
    known = [part.name for part in PARTS]
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"no part {unknown[0]!r}: choose of {', '.join(known)}")
    return [part for part in PARTS if not names or part.name in names]


def summary(results: Sequence[Result]) -> str:
    """The results as a Markdown table."""
    rows = [f"| {r.part} | {r.result} | {r.seconds} | {r.note} |" for r in results]
    return "\n".join(["| part | result | seconds | |", "|---|---|---|---|", *rows]) + "\n"


def exit_status(results: Iterable[Result]) -> int:
    """0: all passed. 1: a part failed. 3: none failed, but not all ran."""
    became = {result.result for result in results}
    return 1 if became & {"failed", "timed out"} else 3 if became & {"skipped", "left out"} else 0


def plain(name: str) -> str:
    """A distribution's name as pip compares names."""
    return re.sub(r"[-_.]+", "-", name).lower()


def pinned(names: Sequence[str], constraints: str) -> list[str]:
    """The lines "name==version" of constraints.txt for these packages; if none are named, for all but PyTorch and Triton.

    Raises:
        ValueError: a package that is not pinned there.
    """
    lines = {
        plain(line.partition("==")[0]): line.strip()
        for line in constraints.splitlines()
        if "==" in line and line[0] != "#"
    }
    if unknown := [name for name in names if plain(name) not in lines]:
        raise ValueError(f"constraints.txt pins no {', '.join(unknown)}: it has {', '.join(sorted(lines))}")
    wanted = map(plain, names) if names else (name for name in lines if name not in ("torch", "triton"))
    return [lines[name] for name in wanted]


def gather_wheels(folder: Path, names: Sequence[str], python_version: str) -> None:
    """Download the wheels of packages, for x86-64 Linux, in the versions of constraints.txt."""
    packages = pinned(names, (ROOT / "constraints.txt").read_text(encoding="utf-8"))
    tags = [
        f"manylinux{v}_x86_64"
        for v in ("_2_28", "_2_27", "_2_26", "_2_24", "_2_17", "2014", "_2_12", "2010", "_2_5", "1")
    ]
    platforms = [word for tag in tags for word in ("--platform", tag)]
    command = ["pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--implementation", "cp", *platforms]
    subprocess.run(
        [sys.executable, "-m", *command, "--python-version", python_version, "--dest", str(folder), *packages],
        check=True,
    )


def not_installed(wheels: Iterable[Path]) -> list[Path]:
    """Those wheels whose package this Python lacks, setuptools also where it is too old to build the project."""
    lacking = []
    for wheel in wheels:
        name = wheel.name.partition("-")[0]
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            lacking.append(wheel)
            continue
        if name == "setuptools" and int(version.partition(".")[0]) < OLDEST_SETUPTOOLS:
            lacking.append(wheel)
    return lacking


def install(wheels: Path, log: Path) -> Result:
    """Install what this Python lacks of the wheels, then the project from this folder, unless it is."""
    began, status = time.monotonic(), 0
    lacking = not_installed(sorted(wheels.glob("*.whl")))
    with log.open("wb") as file:
        file.write(f"from {wheels}: {', '.join(wheel.name for wheel in lacking) or 'nothing'}\n".encode())
        file.flush()
        pip = [sys.executable, "-m", "pip", "install", "--no-deps"]
        commands = [[*pip, "--no-index", *map(str, lacking)]] if lacking else []
        if not _is_project_installed():
            commands.append([*pip, "--no-build-isolation", "-e", str(ROOT)])
        for command in commands:
            status = status or subprocess.run(command, stdout=file, stderr=file, check=False).returncode
    seconds = round(time.monotonic() - began)
    return Result("install", "failed", seconds, f"see {log.name}") if status else Result("install", "passed", seconds)


def _is_project_installed() -> bool:
    """Whether what is imported as smca is in this folder."""
    where = "import pathlib, smca.gpu.cli as cli; print(pathlib.Path(cli.__file__).resolve().parents[1])"
    asked = subprocess.run([sys.executable, "-c", where], capture_output=True, text=True, check=False)
    return asked.stdout.strip() == str(ROOT)


def probe() -> set[str]:
    """What this machine has of "cuda", "triton" and "cupy"."""
    has = {name for name in ("triton", "cupy") if importlib.util.find_spec(name)}
    cuda = "import torch; raise SystemExit(not torch.cuda.is_available())"  # in a process of its own: this one takes no GPU
    if subprocess.run([sys.executable, "-c", cuda], capture_output=True, check=False).returncode == 0:
        has.add("cuda")
    return has


def describe_environment(file: Path) -> None:
    """Date, commit, card and packages."""
    commands = (
        ["date", "-u"],
        ["git", "log", "-1", "--format=commit %H"],
        ["nvidia-smi"],
        [sys.executable, "-m", "pip", "list", "--disable-pip-version-check"],
    )
    with file.open("wb") as out:
        for command in commands:
            try:
                subprocess.run(command, cwd=ROOT, stdout=out, stderr=out, check=False)
            except FileNotFoundError:
                out.write(f"{command[0]}: not found\n".encode())
            out.flush()


def run(out: Path, names: Sequence[str], wheels: Path | None, total_seconds: float) -> int:
    """Install, run the parts, write the summary; the exit status.

    Raises:
        ValueError: a name that no part has, or a folder of wheels that is not there. None: "wheels", if it is there.
    """
    parts, began = chosen(names), time.monotonic()
    if wheels is not None and not wheels.is_dir():
        raise ValueError(
            f"no folder {wheels}: make it with `python gpu/prove.py wheels {wheels}` on a machine with a network, "
            "or leave --wheels out if all packages are installed"
        )
    wheels = wheels or Path("wheels")
    out.mkdir(parents=True, exist_ok=True)
    out = out.resolve()
    results = [install(wheels, out / "install.log")]
    describe_environment(out / "environment.txt")
    results += Runner(out, total_seconds, began).run(parts, probe())
    (out / "summary.md").write_text(summary(results), encoding="utf-8")
    (out / "summary.json").write_text(
        json.dumps([asdict(result) for result in results], indent=2) + "\n", encoding="utf-8"
    )
    print(f"{summary(results)}{time.monotonic() - began:.0f} s in all; logs and results in {out}")
    return exit_status(results)


def main(argv: list[str] | None = None) -> int:
    """Entry point; the exit status."""
    parser = argparse.ArgumentParser(
        prog="prove.py", description=(__doc__ or "").strip(), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    gather = commands.add_parser("wheels", help="with a network: gather what the GPU machine lacks")
    gather.add_argument("folder", type=Path, help="receives the wheels")
    gather.add_argument(
        "packages", nargs="*", help="in the versions of constraints.txt (default: all of it but torch and triton)"
    )
    gather.add_argument("--python", default="3.12", help="Python version of the GPU machine (default: %(default)s)")
    go = commands.add_parser(
        "run",
        help="on the GPU machine: install, check, measure",
        epilog="Exit status 0: all passed. 1: a part failed. 3: none failed, but not all ran.",
    )
    go.add_argument(
        "out", nargs="?", type=Path, default=Path("runs/proof"), help="receives the results (default: %(default)s)"
    )
    go.add_argument("parts", nargs="*", help="the parts to run (default: all; `list` shows them)")
    go.add_argument(
        "--wheels", type=Path, help="folder with wheels to install from (default: the folder wheels, if there is one)"
    )
    go.add_argument("--total", type=float, default=TOTAL_SECONDS, help="seconds for the whole (default: %(default)s)")
    commands.add_parser("list", help="the parts of a run")
    for stream in (sys.stdout, sys.stderr):  # a terminal that cannot show a character shows a question mark
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    args = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started ends, too
    try:
        if args.command == "wheels":
            gather_wheels(args.folder, args.packages, args.python)
        elif args.command == "run":
            return run(args.out, args.parts, args.wheels, args.total)
        else:
            for part in PARTS:
                print(f"{part.name:24} {part.phase:8} {part.seconds:4} s  {' '.join(part.needs)}")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except subprocess.CalledProcessError as error:
        print(f"error: pip ended with exit status {error.returncode}; what it printed is above", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
