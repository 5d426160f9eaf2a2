"""Measure speed and memory on this machine.

    smca benchmark                    all of it
    smca benchmark --only attention   ways to compute SMCA attention against each other, over one level
    smca benchmark --only multi-scale the same over three levels
    smca benchmark --only assignment  the matcher's assignments: SciPy on the host, and the kernel on a GPU
    smca benchmark --only step        inference and a whole training step against transformers' detectors

Writes docs/benchmarks/NAME.json and NAME.md, NAME from the card or the CPU. Times are medians; ratios are medians of the
ratios turn by turn: cases take turns (A B C, A B C …), so that a machine whose speed drifts slows all alike. Memory is the
most that a case held above what was held before it was built. A case that fails is reported, the others go on, and the
command ends with exit status 1; running out of memory is a result, not a failure.

On a CPU every case runs in a process of its own, on sizes that a laptop takes. On a GPU the cases of a part share a process
and are timed by CUDA events. The GPU part has not yet been run on a GPU.
"""

from __future__ import annotations

import importlib.metadata
import json
import multiprocessing
import os
import platform
import re
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from datetime import date
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal, cast

import torch
import tyro
from rich.progress import Progress

from smca.gpu import benchmark_cases as cases
from smca.gpu.benchmark_attention import Size, attention_case
from smca.gpu.benchmark_cases import Case, Work
from smca.gpu.benchmark_measure import Part, Run, measure_apart, measure_together

GROUPS = ("assignment", "step", "attention", "multi-scale")  # what has to be compiled comes last
COCO_IMAGES, EPOCHS = 118_287, 50  # train2017; the published schedule
_GRACE = 30.0
"""Seconds that a process on the GPU gets beyond --minutes to finish the part that it is in."""

NOTES = {
    "attention": "q, k and v are numbers that bfloat16 holds exactly, so that all cases compute on the same ones. lifted computes "
    "in float32 whatever its inputs are. plain has no prior: the floor. GPU times under 0.2 ms are mostly launching.",
    "assignment": "scipy takes costs from the device to the host, solves there and takes the result back.",
    "step": "All sides do the same work: the same ResNet from random weights, of which all but the stem and the first stage is "
    "trained (as DETR does, and as transformers means to: its filter looks for “stage.1” where its own ResNet says “stages.1”, and "
    "left alone trains none of it), dropout also inside the feed-forward blocks, 300 queries, no padding. Loading of images is "
    "not part of a step. On a CPU a step is forward, loss and backward around a small ResNet; on a GPU it is those, gradient "
    "clipping and AdamW around a ResNet-50. DeformableDetr has four levels, and runs transformers' PyTorch code in place of its "
    "authors' kernel.",
}


@dataclass(frozen=True)
class BenchmarkArgs:
    """Measure speed and memory on this machine."""

    only: Literal["attention", "multi-scale", "assignment", "step"] | None = None
    """Measure this part alone."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """"auto" takes a GPU if there is one."""
    repeats: int | None = None
    """Counted turns of each case, after one (on a GPU, two) not counted; 7 on a CPU and 10 on a GPU if not given."""
    threads: int = 2
    """CPU threads of each case; on a CPU only."""
    attention: Size = field(default_factory=Size)
    """Sizes of the attention comparison."""
    image_size: tuple[int, int] | None = None
    """(height, width) in pixels of the images of the step; 800 1216 on a CPU and 800 1333 on a GPU if not given."""
    batches: tuple[int, ...] = (2, 16)
    """Images a step on a GPU, each measured; a CPU takes two."""
    minutes: float = 7.5
    """On a GPU, begin no case after so many minutes; what is left is reported as left out."""
    output: Path = Path("docs/benchmarks")
    """Folder that receives the results."""
    name: str | None = None
    """Name of the two files, without extension; after the card or CPU (and the part) if not given."""

    def __post_init__(self) -> None:
        if self.repeats is not None and self.repeats < 1:
            raise ValueError(f"--repeats must be at least 1, got {self.repeats}")


def parts_of(group: str, args: BenchmarkArgs, device: str, *, full: bool) -> Iterator[Part]:
    """The parts of a group.

    Args:
        group: of ``GROUPS``.
        args: sizes.
        device: where the cases run.
        full: what a GPU measures; otherwise what a CPU does. (Tests run the former on a CPU with small sizes.)
    """
    if group in ("attention", "multi-scale"):
        size = replace(args.attention, batch=args.attention.batch or (16 if full else 2))
        single = group == "attention"
        for index, maps in enumerate([(m,) for m in size.maps[:2]] if single else [size.maps]):
            sized = replace(size, maps=maps)
            keys = ", ".join(f"{height}×{width}" for height, width in maps)
            yield Part(
                group if index == 0 else f"{group} {keys}",
                f"{'' if single else 'Multi-scale '}SMCA attention (B={size.batch}, h={size.heads}, N={size.queries}, "
                f"d={size.channels}, keys: {keys})",
                _attention_cases(sized, device, full),
                reference="eager float32" if full else "eager",
            )
    elif group == "assignment":
        names = ("scipy", "kernel") if full else ("scipy",)
        for batch in (2, 8, 16, 32):
            yield Part(
                f"assignment {batch}",
                f"Assignment (B={batch}, M={cases.LAYERS}, N={cases.QUERIES}, T={cases.TARGETS})",
                {name: partial(cases.assignment_case, name, batch, device) for name in names},
                reference="scipy",
            )
    elif not full:
        work = Work(args.image_size or (800, 1216))
        sides = f"two {work.image_size[0]}×{work.image_size[1]} images, 6+6 layers, 300 queries"
        yield Part("step", f"Step: {sides}", _step_cases(work, full))
    else:
        for dtype in (torch.bfloat16, torch.float32):
            for batch in sorted(args.batches, reverse=True):
                work = Work(args.image_size or (800, 1333), batch, dtype, device, small=False)
                height, width = work.image_size
                kind = "bf16 autocast" if dtype == torch.bfloat16 else "float32"
                title = f"Step: {batch} images of {height}×{width}, {kind}, ResNet-50, 300 queries"
                yield Part(f"step {kind} {batch}", title, _step_cases(work, full), images=batch)


def _attention_cases(size: Size, device: str, full: bool) -> dict[str, Callable[[], Case]]:
    if not full:
        kinds = dict.fromkeys(("lifted", "eager", "sdpa-mask", "lifted-bf16-split", "plain"), torch.float32)
        kinds["lifted-bf16-split"] = torch.bfloat16
        return {name: partial(attention_case, name, dtype, size, device) for name, dtype in kinds.items()}
    both = ("eager", "sdpa-mask", "lifted", "flex", "triton", "triton-skip", "plain")
    names = [(n, torch.float32) for n in both] + [(n, torch.bfloat16) for n in (*both, "lifted-bf16-split")]
    return {
        f"{name} {'bf16' if dtype == torch.bfloat16 else 'float32'}".replace("bf16-split bf16", "bf16-split"): partial(
            attention_case, name, dtype, size, device
        )
        for name, dtype in names
    }


def _step_cases(work: Work, full: bool) -> dict[str, Callable[[], Case]]:
    ours = {"smca": ("smca_r50", "auto"), "dense": ("detr_r50", "auto")}
    theirs = ["Detr", "ConditionalDetr"]
    if full:
        presets = ("smca_r50", "smca_r50_multiscale")
        ours = {f"{p}{' triton' * (b == 'triton')}": (p, b) for p in presets for b in ("auto", "triton")}
        ours["detr_r50"] = ("detr_r50", "auto")
        theirs.append("DeformableDetr")
    return {
        **{name: partial(cases.smca_step_case, *what, work) for name, what in ours.items()},
        **{f"transformers {name}": partial(cases.transformers_step_case, name, work) for name in theirs},
    }


def summarize(runs: dict[str, Run], part: Part, *, gpu: bool) -> dict[str, dict[str, Any]]:
    """By mode and case: seconds (of each turn), their median, the ratio to the first case that has any ("times as long", median
    of turns, and its extremes), peak_mib and its ratio, differences, rates; or the error."""
    modes = list(dict.fromkeys(mode for run in runs.values() for mode in (*run.seconds, *run.errors) if mode))
    return {mode: _summarize_mode(runs, mode, part, gpu) for mode in modes or [""]}


def _summarize_mode(runs: dict[str, Run], mode: str, part: Part, gpu: bool) -> dict[str, Any]:
    measured = [name for name, run in runs.items() if mode in run.seconds and mode not in run.errors]
    results: dict[str, Any] = {}
    for name, run in runs.items():
        if name not in measured:
            key = mode if mode in run.errors else ""
            results[name] = {"error": run.errors.get(key, "not measured"), "traceback": run.tracebacks.get(key, "")}
            continue
        first, seconds = runs[measured[0]], run.seconds[mode]
        ratios = [a / b for a, b in zip(seconds, first.seconds[mode], strict=True)]
        median = statistics.median(seconds)
        results[name] = {
            "seconds": seconds,
            "median_seconds": median,
            "times_as_long": statistics.median(ratios),
            "times_as_long_spread": [min(ratios), max(ratios)],
            "difference": run.difference.get(mode, {}),
        }
        if mode in run.peak_mib:
            # A case smaller than a MiB hides in what importing took: no ratio can be read off it.
            ratio = max(run.peak_mib[mode], 1.0) / max(first.peak_mib[mode], 1.0)
            results[name] |= {"peak_mib": run.peak_mib[mode], "times_the_memory": ratio}
        if part.images:
            results[name]["images_per_second"] = part.images / median
            if gpu and mode == "training":
                results[name]["hours"] = EPOCHS * COCO_IMAGES * median / part.images / 3600
    return results


def table(title: str, results: dict[str, Any], reference: str | None) -> str:
    """One comparison as Markdown; `results` of one mode."""
    done = {name: r for name, r in results.items() if "error" not in r}
    first = next(iter(done), "")
    columns = ["case", "median (min–max)", f"time against {first} (min–max)"]
    has = {key: any(key in r for r in done.values()) for key in ("peak_mib", "images_per_second", "hours")}
    columns += ["peak memory", f"memory against {first}"] * has["peak_mib"]
    columns += ["images/s"] * has["images_per_second"] + [f"{EPOCHS} epochs of COCO"] * has["hours"]
    columns += [f"largest relative difference from {reference}"] * (reference is not None)
    lines = [f"### {title}", "", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for name, r in results.items():
        if name not in done:
            cells = [name, r["error"].replace("|", "\\|"), *[""] * (len(columns) - 2)]
        else:
            low, high = r["times_as_long_spread"]
            cells = [name, _duration(r["seconds"]), f"{r['times_as_long']:.2f}× ({low:.2f}–{high:.2f})"]
            cells += [f"{r['peak_mib']:.0f} MiB", f"{r['times_the_memory']:.2f}×"] if has["peak_mib"] else []
            cells += [f"{r['images_per_second']:.1f}"] if has["images_per_second"] else []
            cells += [f"{r['hours']:.0f} h"] if has["hours"] else []
            if reference is not None:
                key, worst = max(r["difference"].items(), key=lambda item: item[1], default=("", None))
                cells.append("" if worst is None else f"{worst:.1e} ({key})")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _duration(seconds: list[float]) -> str:
    scale, unit, digits = (1.0, "s", 3) if statistics.median(seconds) >= 0.1 else (1e3, "ms", 3)
    middle, low, high = (f"{f(seconds) * scale:.{digits}f}" for f in (statistics.median, min, max))
    return f"{middle} {unit} ({low}–{high})"


class Report:
    """Results so far, written out after each part: what was measured stays if the rest does not come."""

    def __init__(self, header: str, stem: Path, *, gpu: bool) -> None:
        self.stem, self.gpu, self.failed = stem, gpu, False
        self.record: dict[str, Any] = {"header": header, "parts": {}}
        self.text = [header]

    def add(self, part: Part, runs: dict[str, Run]) -> None:
        """Take up one part."""
        self.failed |= any(run.failed for run in runs.values())
        summary = summarize(runs, part, gpu=self.gpu)
        main = next(reversed(summary))  # the heaviest mode gives the part its key
        for mode, results in summary.items():
            self.record["parts"][part.key if mode == main else f"{part.key}, {mode}"] = results
            self.text += ["", table(f"{part.title}: {mode}" if mode else part.title, results, part.reference)]
        self._write()

    def note(self, group: str) -> None:
        """End a group."""
        if group in NOTES:
            self.text += ["", NOTES[group]]
            self._write()

    def _write(self) -> None:
        self.stem.parent.mkdir(parents=True, exist_ok=True)
        self.stem.with_name(f"{self.stem.name}.json").write_text(json.dumps(self.record, indent=2) + "\n")
        self.stem.with_name(f"{self.stem.name}.md").write_text("\n".join(self.text) + "\n")


def measure_on_gpu(group: str, args: BenchmarkArgs, repeats: int, deadline: float, report: Report) -> None:
    """A group in a process of its own: one that crashes or hangs takes no other group with it."""
    parts = {part.key: part for part in parts_of(group, args, "cuda", full=True)}
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_serve_group, args=(group, args, repeats, "cuda", deadline, theirs), daemon=False)
    process.start()
    theirs.close()
    trouble = ""
    while parts and not trouble:
        part = next(iter(parts.values()))
        try:
            if ours.poll(max(0.0, deadline + _GRACE - time.time())):
                report.add(part, ours.recv())
                del parts[part.key]
                print(f"{part.title}: done")
                continue
            trouble = "stopped: --minutes were used up"
            process.terminate()
        except EOFError:
            process.join()
            trouble = f"its process ended with exit code {process.exitcode}"
    process.join()
    for part in parts.values():
        lost = {name: Run(errors={"": trouble}, failed=not trouble.startswith("stopped")) for name in part.cases}
        report.add(part, lost)


def _serve_group(group: str, args: BenchmarkArgs, repeats: int, device: str, deadline: float, pipe: Connection) -> None:
    for part in parts_of(group, args, device, full=True):
        pipe.send(measure_together(part, repeats, device, deadline))


def machine(gpu: bool) -> str:
    """The card's or the CPU's name."""
    if gpu:
        return torch.cuda.get_device_name(0)
    info = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE) if info.is_file() else []
    return names[0].strip() if names else platform.processor() or f"{platform.machine()} CPU"


def _header(args: BenchmarkArgs, argv: list[str], repeats: int, gpu: bool) -> str:
    packages = ["torch", "transformers", *(["triton", "cupy-cuda12x", "cupy-cuda13x"] if gpu else ["scipy"])]
    versions = []
    for package in packages:
        try:
            versions.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    where = f"{platform.machine()} CPU, {args.threads} threads"
    if gpu:
        memory = torch.cuda.get_device_properties(0).total_memory / 2**30
        where = (
            f"{memory:.0f} GiB · CUDA {torch.version.cuda} · cuDNN {cast(Any, torch.backends.cudnn).version()} · float32 products "
            f"{torch.get_float32_matmul_precision()}, TF32 in convolutions {torch.backends.cudnn.allow_tf32} · "
            f"{os.cpu_count()} CPU cores"
        )
    command = shlex.join(["smca", "benchmark", *argv])
    return (
        f"{date.today()} · {machine(gpu)} · {where} · {' · '.join(versions)} · Python {platform.python_version()} · "
        f"median of {repeats} turns · `{command}`"
    )


def main(argv: list[str] | None = None) -> None:
    """Entry point of ``smca benchmark``."""
    argv = sys.argv[1:] if argv is None else argv
    args = tyro.cli(BenchmarkArgs, args=argv, prog="smca benchmark")
    gpu = args.device != "cpu" and torch.cuda.is_available()
    if args.device == "cuda" and not gpu:
        raise ValueError("--device cuda: PyTorch sees no CUDA device here")
    repeats = args.repeats or (10 if gpu else 7)
    name = args.name or "-".join(re.findall("[a-z0-9]+", f"{machine(gpu)} {args.only or ''}".lower()))
    report = Report(_header(args, argv, repeats, gpu), args.output / name, gpu=gpu)
    deadline = time.time() + 60 * args.minutes
    for group in [args.only] if args.only else GROUPS:
        if gpu:
            measure_on_gpu(group, args, repeats, deadline, report)
        else:
            with Progress() as progress:
                for part in parts_of(group, args, "cpu", full=False):
                    report.add(part, measure_apart(part, repeats, args.threads, progress))
        report.note(group)
    print("\n".join(report.text))
    print(f"\nwritten to {report.stem}.json and {report.stem.name}.md")
    if report.failed:
        print("error: a case failed; the tables say which and why", file=sys.stderr)
        raise SystemExit(1)


if __name__ == "__main__":
    from smca.gpu.cli import run

    run(main)
