"""The tables that ``smca benchmark`` writes, as Markdown and as JSON."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from smca.gpu.benchmark.measure import Part, Run

COCO_IMAGES, EPOCHS = 118_287, 50  # train2017; the published schedule

PARTS = {
    "input": "input transfer",
    "backbone": "backbone",
    "encoder": "encoder",
    "decoder": "decoder without attention",
    "attention": "SMCA attention",
    "criterion": "criterion without matcher",
    "matcher": "matcher",
    "optimizer": "optimiser: clip and AdamW",
    "rest": "rest: normalising, projections, positions",
}
"""Part of a training step → its name in the profile."""

NOTES = {
    "attention": "q, k and v are numbers that bfloat16 holds exactly, so that all cases compute on the same ones. lifted computes "
    "in float32 whatever its inputs are. plain has no prior; on a GPU it is the kernel that PyTorch chooses for these inputs. "
    "Short GPU times are mostly launching: “replayed” is the same work as a CUDA graph, the GPU's own time without the host's.",
    "assignment": "scipy takes costs from the device to the host, solves there and takes the result back.",
    "profile": "Floors: operations of products and convolutions over the rate of a matrix product, or bytes of inputs, outputs "
    "and parameters over that of a copy, whichever takes longer. What a part stores inside itself is not in its floor. "
    "NAME-….trace.json.gz is a step for chrome://tracing, NAME-….ops.txt its operators by time.",
    "data": "Pillow decodes, resizes, makes a float tensor and normalises it, one image after the other, as DETR's code does. ours "
    "is what training does in a process that loads images: the batch is uint8, and the device normalises it; “normalised” does "
    "that here as well: both sides do the same then. A JPEG that is at least twice as large as needed is decoded at half its size.",
    "compiled": "torch.compile of model and criterion, as `smca train --compile` does it.",
    "recipe": "A whole step: forward, loss, backward, gradient clipping, optimiser. docs/convergence.md says what each part gains.",
    "step": "All sides do the same work: the same ResNet from random weights, of which all but the stem and the first stage is "
    "trained (as DETR does, and as transformers means to: its filter looks for “stage.1” where its own ResNet says “stages.1”, and "
    "left alone trains none of it), dropout also inside the feed-forward blocks, 300 queries, no padding. Loading of images is "
    "not part of a step. On a CPU a step is forward, loss and backward around a small ResNet; on a GPU it is those, gradient "
    "clipping and AdamW around a ResNet-50. DeformableDetr has four levels, and runs transformers' PyTorch code in place of its "
    "authors' kernel.",
}


def summarize(runs: dict[str, Run], part: Part, *, gpu: bool) -> dict[str, dict[str, Any]]:
    """Mode → case → seconds (of each turn), their median, the ratio to the first case that was measured ("times as long", median
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
            # A case smaller than a MiB is lost in the memory that imports take: it has no meaningful ratio.
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


def profile_table(title: str, result: dict[str, Any]) -> str:
    """A profile of ``benchmark.profile.profile_step`` as Markdown."""
    step, rates = result["step_seconds"], result["rates"]
    columns = [
        "part",
        "forward ms",
        "floor ms",
        "backward ms",
        "floor ms",
        "together ms",
        "of the step",
        "times the floor",
    ]
    lines = [f"### {title}", "", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for part, directions in result["parts"].items():
        cells, total, floor = [PARTS[part]], 0.0, 0.0
        for direction in ("forward", "backward"):
            spent = directions.get(direction, {"seconds": 0.0, "floor_seconds": 0.0})
            total, floor = total + spent["seconds"], floor + spent["floor_seconds"]
            measured = direction in directions
            cells += [f"{spent[key] * 1e3:.3f}" if measured else "" for key in ("seconds", "floor_seconds")]
        times = f"{total / floor:.1f}×" if floor else ""
        lines.append(f"| {' | '.join([*cells, f'{total * 1e3:.2f}', f'{total / step:.1%}', times])} |")
    return "\n".join(
        [
            *lines,
            "",
            f"The step: {step * 1e3:.2f} ms. Measured beside it: {rates['flops'] / 1e12:.2f} TFLOP/s in a matrix product, "
            f"{rates['bytes'] / 1e9:.0f} GB/s in a copy, {rates['transfer'] / 1e9:.1f} GB/s from the host.",
        ]
    )


def _duration(seconds: list[float]) -> str:
    scale, unit, digits = (1.0, "s", 3) if statistics.median(seconds) >= 0.1 else (1e3, "ms", 3)
    middle, low, high = (f"{f(seconds) * scale:.{digits}f}" for f in (statistics.median, min, max))
    return f"{middle} {unit} ({low}–{high})"


class Report:
    """The results so far, written out after each part, so that they survive if the rest fails."""

    def __init__(self, header: str, stem: Path, *, gpu: bool) -> None:
        self.stem, self.gpu, self.failed = stem, gpu, False
        self.record: dict[str, Any] = {"header": header, "parts": {}}
        self.text = [header]

    def add(self, part: Part, runs: dict[str, Run]) -> None:
        """Add the results of one part."""
        self.failed |= any(run.failed for run in runs.values())
        summary = summarize(runs, part, gpu=self.gpu)
        main = next(reversed(summary))  # the heaviest mode gives the part its key
        for mode, results in summary.items():
            self.record["parts"][part.key if mode == main else f"{part.key}, {mode}"] = results
            self.text += ["", table(f"{part.title}: {mode}" if mode else part.title, results, part.reference)]
        self._write()

    def add_profile(self, key: str, title: str, result: dict[str, Any] | Run) -> None:
        """Add a profile, or the run whose error says why there is none."""
        if isinstance(result, Run):
            self.failed |= result.failed
            self.record["parts"][key] = {"error": result.errors[""], "traceback": result.tracebacks.get("", "")}
            self.text += ["", f"### {title}", "", result.errors[""]]
        else:
            self.add_record(key, result, profile_table(title, result))
        self._write()

    def add_record(self, key: str, record: dict[str, Any], text: str) -> None:
        """Add what has a table, or words, of its own."""
        self.record["parts"][key] = record
        self.text += ["", text]
        self._write()

    def note(self, group: str) -> None:
        """Add the note at the end of a group."""
        if group in NOTES:
            self.text += ["", NOTES[group]]
            self._write()

    def _write(self) -> None:
        self.stem.parent.mkdir(parents=True, exist_ok=True)
        self.stem.with_name(f"{self.stem.name}.json").write_text(
            json.dumps(self.record, indent=2) + "\n", encoding="utf-8"
        )
        self.stem.with_name(f"{self.stem.name}.md").write_text("\n".join(self.text) + "\n", encoding="utf-8")
