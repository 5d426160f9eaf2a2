"""Measures what docs/training.md says about several processes: however many share a step, it is the same step.

    python docs/processes.py                    a table, in about six minutes on two cores
    python docs/processes.py --optimizer muon   with the optimiser of the presets demo and small

Trains one small model on the built-in data, 40 steps of four images, in each of the ways of ROWS, and compares it with one process
that takes all images at once: the mean loss of each of four epochs, and every weight at the end. Batch norms are fixed and nothing
is dropped out, since norms that learn see the images of a part, and each process drops out other numbers.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from safetensors.torch import load_file

from smca.gpu import train
from smca.gpu.training.log import read_metrics

EPOCHS = 4
OPTIONS = ["demo", "--device", "cpu", "--workers", "0", "--batch-size", "4", "--optim.schedule", "step"]
OPTIONS += ["--synthetic.train-images", "40", "--synthetic.val-images", "3", "--synthetic.image-size", "64"]
OPTIONS += [
    "--model.backbone.frozen-norm",
    "--model.dropout",
    "0",
    "--optim.warmup-steps",
    "10",
    "--optim.ema-decay",
    "0",
]
Part = tuple[int, int, list[str]]
"""Number of processes, epochs up to which they go, further options."""
ROWS: dict[str, list[Part]] = {
    "1 process": [(1, EPOCHS, [])],
    "2 processes": [(2, EPOCHS, [])],
    "4 processes": [(4, EPOCHS, [])],
    "1 process, --accumulate 4": [(1, EPOCHS, ["--accumulate", "4"])],
    "2 processes, --accumulate 2": [(2, EPOCHS, ["--accumulate", "2"])],
    "2 processes, --fsdp": [(2, EPOCHS, ["--fsdp"])],
    "4 processes, --fsdp": [(4, EPOCHS, ["--fsdp"])],
    "2 processes, from the middle on 1": [(2, EPOCHS // 2, []), (1, EPOCHS, ["--resume"])],
    "1 process, from the middle on 2": [(1, EPOCHS // 2, []), (2, EPOCHS, ["--resume"])],
    "2 processes, --fsdp, from the middle on 1 without": [(2, EPOCHS // 2, ["--fsdp"]), (1, EPOCHS, ["--resume"])],
}


def trained(output: Path, parts: list[Part], options: list[str]) -> None:
    for processes, epochs, more in parts:
        command = [sys.executable]
        if processes > 1:
            command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        command += [train.__file__, *OPTIONS, "--epochs", str(epochs), *options, *more, "--output", str(output)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)}\n{done.stdout}\n{done.stderr}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--optimizer", choices=("adamw", "muon"), default="adamw")
    options = ["--optim.optimizer", parser.parse_args().optimizer]
    print("| | loss of each epoch | its largest difference | mean difference of a weight | largest |")
    print("|---|---|---|---|---|")
    folder = Path(tempfile.mkdtemp())
    try:
        for number, (name, parts) in enumerate(ROWS.items()):
            trained(folder / str(number), parts, options)
            losses = [line["loss"] for line in read_metrics(folder / str(number) / "metrics.jsonl")]
            weights = load_file(folder / str(number) / "model_last/model.safetensors")
            if not number:
                first, first_weights = losses, weights
            off = max(abs(a / b - 1) for a, b in zip(losses, first, strict=True))
            moved = [
                (value - first_weights[key]).abs().flatten()
                for key, value in weights.items()
                if value.is_floating_point()
            ]
            mean = sum(float(d.sum()) for d in moved) / sum(len(d) for d in moved)
            largest = max(float(d.max()) for d in moved)
            print(
                f"| {name} | {', '.join(f'{loss:.4f}' for loss in losses)} | {off:.0e} | {mean:.0e} | {largest:.0e} |",
                flush=True,
            )
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
