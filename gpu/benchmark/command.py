"""Measure speed and memory on this machine.

    smca benchmark                    everything
    smca benchmark --only attention   ways to compute SMCA attention against each other, over one level
    smca benchmark --only multi-scale the same over three levels
    smca benchmark --only assignment  the matcher's assignments: SciPy on the host, and the kernel on a GPU
    smca benchmark --only step        inference and a whole training step against transformers' detectors
    smca benchmark --only recipe      a whole training step without and with each part beyond the paper
    smca benchmark --only profile     where the time of a training step goes, part by part, and the floor of each
    smca benchmark --only data        images/s that one core loads, against Pillow; whether data or model is the bottleneck
    smca benchmark --only compiled    a training step through torch.compile; on a GPU only
    smca benchmark --only index       opening an annotation file of --index-images images, and pycocotools'; only if named

Writes NAME.json and NAME.md into runs/benchmark (or --output), with NAME made from the name of the GPU or CPU. Times are
medians; ratios are medians of the ratios in each turn: cases take turns (A B C, A B C …), so that a drift of the machine's
speed affects all alike. Memory is the maximum that a case held beyond what was held before it was built. A case that fails
is reported, the others continue, and the command ends with exit status 1; running out of memory is a result, not a failure.

On a CPU every case runs in a process of its own, on sizes that a laptop takes. On a GPU the cases of a part share a process
and are timed by CUDA events.
"""

from __future__ import annotations

import importlib.metadata
import multiprocessing
import os
import platform
import re
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import date
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal, cast

import torch
import tyro
from rich.progress import Progress

from smca.gpu.benchmark import cases
from smca.gpu.benchmark.attention import Size, attention_case
from smca.gpu.benchmark.cases import Case, Work
from smca.gpu.benchmark.data import PHOTOGRAPHS, bottleneck, loading_case, make_photographs, measure_index
from smca.gpu.benchmark.measure import LEFT_OUT, Part, Run, measure_apart, measure_together
from smca.gpu.benchmark.report import Report

GROUPS = ("assignment", "step", "recipe", "data", "profile", "attention", "multi-scale", "compiled")
"""Parts that need compilation come last."""
_GRACE = 30.0
"""Seconds beyond --minutes in which a process on the GPU may finish its current part."""


@dataclass(frozen=True)
class BenchmarkArgs:
    """Measure speed and memory on this machine."""

    only: (
        Literal["attention", "multi-scale", "assignment", "step", "recipe", "data", "profile", "compiled", "index"]
        | None
    ) = None
    """Measure only this part."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """"auto" takes a GPU if there is one."""
    repeats: int | None = None
    """Counted turns of each case, after one (on a GPU, two) that is not counted; by default 7 on a CPU and 10 on a GPU."""
    threads: int = 2
    """CPU threads of each case; on a CPU only."""
    attention: Size = field(default_factory=Size)
    """Sizes of the attention comparison."""
    image_size: tuple[int, int] | None = None
    """(height, width) in pixels of the images of a step; by default 800 1333 on a GPU; on a CPU 800 1216,
    or 400 608 for a profile."""
    batches: tuple[int, ...] = (2, 16)
    """Images per step on a GPU; each number is measured, or only the largest in some parts. A CPU takes two images."""
    index_images: int = 100_000
    """Images in the annotation file of --only index, with 8 boxes each; a million take 8 GB of disk and some minutes."""
    minutes: float = 7.5
    """On a GPU, begin no case after this many minutes; what is left is reported as left out."""
    output: Path = Path("runs/benchmark")
    """Folder that receives the results."""
    name: str | None = None
    """Name of the two files, without extension; by default made from the name of the GPU or CPU (and the part)."""

    def __post_init__(self) -> None:
        if self.repeats is not None and self.repeats < 1:
            raise ValueError(f"--repeats must be at least 1, got {self.repeats}")
        if self.index_images < 1:
            raise ValueError(f"--index-images must be at least 1, got {self.index_images}")


def parts_of(group: str, args: BenchmarkArgs, device: str, *, full: bool) -> Iterator[Part]:
    """The parts of a group.

    Args:
        group: of ``GROUPS``.
        args: sizes.
        device: where the cases run.
        full: True for the parts of a GPU, False for those of a CPU. (Tests run the former on a CPU with small sizes.)
    """
    if group in ("attention", "multi-scale"):
        size = replace(args.attention, batch=args.attention.batch or (16 if full else 2))
        single = group == "attention"
        finest = size.maps[0]
        twice = [(2 * finest[0], 2 * finest[1])] if full else []  # the finest at half its stride
        for kind in ("bf16 replayed", "bf16", "float32") if full else ("",):
            for index, maps in enumerate([(m,) for m in [finest, *twice, *size.maps[1:2]]] if single else [size.maps]):
                keys = ", ".join(f"{height}×{width}" for height, width in maps)
                yield Part(
                    " ".join(filter(None, [group, kind, keys if index else ""])),
                    f"{'' if single else 'Multi-scale '}SMCA attention (B={size.batch}, h={size.heads}, N={size.queries}, "
                    f"d={size.channels}, keys: {keys}{f'; {kind}' if kind else ''})",
                    _attention_cases(replace(size, maps=maps), device, kind),
                    reference=None if "replayed" in kind else "eager float32" if full else "eager",
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
    elif group == "compiled":
        if full:
            work = _largest_work(args, device)
            steps: dict[str, Callable[[], Case]] = {
                f"smca_r50{' compiled' * compiled}": partial(
                    cases.smca_step_case, "smca_r50", "auto", work, compiled=compiled
                )
                for compiled in (False, True)
            }
            yield Part("compiled", f"Compiled {_describe(work)}", steps, images=work.batch)
    elif group == "data":  # of which a GPU only takes the step
        work = _largest_work(args, device)
        step = partial(cases.smca_step_case, "smca_r50", "auto", work)
        yield Part("data step", f"Data, the step to feed: {_describe(work)}", {"smca_r50": step}, images=work.batch)
    elif group == "recipe":
        yield _recipe_part(_largest_work(args, device) if full else Work((128, 128), batch=8))
    elif not full:
        work = Work(args.image_size or (800, 1216))
        sides = f"two {work.image_size[0]}×{work.image_size[1]} images, 6+6 layers, 300 queries"
        yield Part("step", f"Step: {sides}", _step_cases(work, full))
    else:
        for dtype in (torch.bfloat16, torch.float32):
            for batch in sorted(args.batches, reverse=True):
                work = Work(args.image_size or (800, 1333), batch, dtype, device, small=False)
                key = f"step {_KINDS[dtype]} {batch}"
                yield Part(key, f"Step{_describe(work)[4:]}", _step_cases(work, full), images=batch)


def _recipe_part(work: Work) -> Part:
    """On a CPU a step of ``demo`` as it is trained, whose predecessor had a decoder layer more; on a GPU one of ``fast_r50``."""
    preset = "demo" if work.small else "fast_r50"
    names = [
        "nothing beyond the paper",
        *(f"+ {part}" for part in cases.BEYOND[:-1]),
        f"+ {cases.BEYOND[-1]} = {preset}",
    ]
    steps: dict[str, Callable[[], Case]] = {
        name: partial(cases.recipe_step_case, preset, kept, work) for kept, name in enumerate(names)
    }
    if work.small:
        before = partial(cases.recipe_step_case, preset, 0, work, decoder_layers=3)
        steps = {"nothing beyond, 3 decoder layers": before, **steps}
    height, width = work.image_size
    return Part("recipe", f"Recipe: a whole step of {preset}, {work.batch} images of {height}×{width}", steps)


_KINDS = {torch.bfloat16: "bf16 autocast", torch.float32: "float32"}


def _largest_work(args: BenchmarkArgs, device: str) -> Work:
    """The workload on a GPU that is profiled and compiled."""
    return Work(args.image_size or (800, 1333), max(args.batches), torch.bfloat16, device, small=False)


def _describe(work: Work) -> str:
    height, width = work.image_size
    backbone = "small ResNet" if work.small else "ResNet-50"
    return f"step: {work.batch} images of {height}×{width}, {_KINDS[work.dtype]}, {backbone}, 300 queries"


def _attention_cases(size: Size, device: str, kind: str) -> dict[str, Callable[[], Case]]:
    """The cases that a GPU compares in a dtype, or (`kind` "") those of a CPU. Times are compared with the first case."""

    replayed = kind.endswith("replayed")

    def cases_of(names: Sequence[str], dtype: torch.dtype, suffix: str = "") -> dict[str, Callable[[], Case]]:
        return {
            f"{name}{suffix}": partial(attention_case, name, dtype, size, device, replayed=replayed) for name in names
        }

    if not kind:
        names = cases_of(("lifted", "eager", "sdpa-mask", "lifted-bf16-split", "plain"), torch.float32)
        return {**names, **cases_of(["lifted-bf16-split"], torch.bfloat16)}
    both = ("plain", "triton", "lifted", "flex", "sdpa-mask", "eager")
    if kind == "float32":
        return cases_of(both, torch.float32, " float32")
    if replayed:
        return cases_of(both[:2], torch.bfloat16, " bf16")
    half = cases_of(both, torch.bfloat16, " bf16") | cases_of(["lifted-bf16-split"], torch.bfloat16)
    return half | cases_of(["eager"], torch.float32, " float32")  # the reference for differences


def _step_cases(work: Work, full: bool) -> dict[str, Callable[[], Case]]:
    ours = {"smca": ("smca_r50", "auto"), "dense": ("smca_r50 dense", "auto")}
    transformers_names = ["Detr", "ConditionalDetr"]
    if full:
        presets = ("smca_r50", "smca_r50_multiscale")
        ours = {f"{p}{' lifted' * (b == 'lifted')}": (p, b) for p in presets for b in ("auto", "lifted")}
        ours["smca_r50 dense"] = ("smca_r50 dense", "auto")
        transformers_names.append("DeformableDetr")
    return {
        **{name: partial(cases.smca_step_case, *what, work) for name, what in ours.items()},
        **{f"transformers {name}": partial(cases.transformers_step_case, name, work) for name in transformers_names},
    }


def measure_on_gpu(group: str, args: BenchmarkArgs, repeats: int, deadline: float, report: Report) -> None:
    """A group in a process of its own: one that crashes or hangs takes no other group with it."""
    parts = {part.key: part for part in parts_of(group, args, "cuda", full=True)}
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_serve_group, args=(group, args, repeats, "cuda", deadline, sender), daemon=False)
    process.start()
    sender.close()
    trouble = ""
    while parts and not trouble:
        part = next(iter(parts.values()))
        try:
            if receiver.poll(max(0.0, deadline + _GRACE - time.time())):
                report.add(part, receiver.recv())
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


def measure_profile(args: BenchmarkArgs, repeats: int, deadline: float, device: str, report: Report) -> None:
    """Profiles of our steps, each in a process of its own; on a GPU until the deadline."""
    # Imported here, because other parts count the memory of the model that it imports.
    from smca.gpu.benchmark.profile import profile_step

    gpu = device == "cuda"
    work = _largest_work(args, device) if gpu else Work(args.image_size or (400, 608))
    for name in ("smca_r50", "smca_r50_multiscale"):
        stem = report.stem.with_name(f"{report.stem.name}-{name}")
        result: Any = Run(errors={"": LEFT_OUT})
        if not gpu or time.time() < deadline:
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                future = pool.submit(profile_step, name, work, repeats, stem, None if gpu else args.threads)
                try:
                    result = future.result(deadline + _GRACE - time.time() if gpu else None)
                except TimeoutError:
                    for child in multiprocessing.active_children():
                        child.terminate()
                except Exception as error:  # a profile that fails does not stop the others
                    result.add_error("", error)
        report.add_profile(f"profile {name}", f"Profile of {name}, training {_describe(work)}", result)
        print(f"Profile of {name}: done")


def measure_data(args: BenchmarkArgs, repeats: int, deadline: float, gpu: bool, report: Report) -> None:
    """How many images a core loads, at the sizes of two presets, and how many a training step of one of them takes."""
    with tempfile.TemporaryDirectory() as temporary, Progress() as progress:
        folder, _ = make_photographs(Path(temporary))
        for preset, short_side in (("smca_r50", 800), ("small", 192)):
            ways: dict[str, Callable[[], Case]] = {
                way: partial(loading_case, way, folder, short_side) for way in ("Pillow", "ours", "ours, normalised")
            }
            title = (
                f"Loading: {PHOTOGRAPHS} JPEGs of 640×480, resized to {short_side} pixels as for {preset}, on one core"
            )
            part = Part(f"data {short_side}", title, ways, images=PHOTOGRAPHS)
            report.add(part, measure_apart(part, repeats, 1, progress))
        if not gpu:
            work, preset, key = Work((192, 256), batch=8), "small", "data 192"
            step = partial(cases.recipe_step_case, preset, len(cases.BEYOND), work)
            part = Part(
                "data step", f"A training step of {preset} on {args.threads} threads", {preset: step}, images=work.batch
            )
            report.add(part, measure_apart(part, repeats, args.threads, progress))
    if gpu:
        preset, key = "smca_r50", "data 800"
        measure_on_gpu("data", args, repeats, deadline, report)
    rates = [
        report.record["parts"][part].get(case, {}).get("images_per_second")
        for part, case in ((key, "ours"), ("data step", preset))
    ]
    if None not in rates:
        report.add_record(
            "data bottleneck",
            {"images_per_second": rates},
            bottleneck((rates[0], rates[1]), preset, os.cpu_count() or 1),
        )


def machine(gpu: bool) -> str:
    """The name of the GPU or the CPU."""
    if gpu:
        return torch.cuda.get_device_name(0)
    info = Path("/proc/cpuinfo")
    names = (
        re.findall(r"^model name\s*:\s*(.+)$", info.read_text(encoding="utf-8"), re.MULTILINE) if info.is_file() else []
    )
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
        raise ValueError("--device cuda: PyTorch sees no CUDA device here; use --device cpu")
    if args.only == "compiled" and not gpu:
        raise ValueError(
            "--only compiled: measured on a GPU only; on a CPU compiling takes longer than it is worth here"
        )
    repeats = args.repeats or (10 if gpu else 7)
    name = args.name or "-".join(re.findall("[a-z0-9]+", f"{machine(gpu)} {args.only or ''}".lower()))
    report = Report(_header(args, argv, repeats, gpu), args.output / name, gpu=gpu)
    deadline = time.time() + 60 * args.minutes
    for group in [args.only] if args.only else GROUPS:
        if group == "data":
            measure_data(args, repeats, deadline, gpu, report)
        elif group == "index":
            args.output.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=args.output) as folder:
                report.add_record(group, *measure_index(args.index_images, Path(folder), print))
        elif group == "profile":
            measure_profile(args, repeats, deadline, "cuda" if gpu else "cpu", report)
        elif gpu:
            measure_on_gpu(group, args, repeats, deadline, report)
        else:
            with Progress() as progress:
                for part in parts_of(group, args, "cpu", full=False):
                    report.add(part, measure_apart(part, repeats, args.threads, progress))
        if gpu or group != "compiled":  # a CPU measures nothing of it
            report.note(group)
    print("\n".join(report.text))
    print(f"\nwritten to {report.stem}.json and {report.stem.name}.md")
    if report.failed:
        print("error: a case failed; the tables show which and why", file=sys.stderr)
        raise SystemExit(1)


if __name__ == "__main__":
    from smca.gpu.cli import run

    run(main)
