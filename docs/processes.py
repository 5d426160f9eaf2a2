"""Measures what docs/training.md says about several processes: however many share a step, it is the same step.

    python docs/processes.py                in float64, which keeps rounding out: a table, in about five minutes on two cores
    python docs/processes.py --as-trained   in float32, and beside it what another number of threads changes

Trains one small model on the built-in data, 40 steps of four images, in each of the ways of ROWS, and compares it with one process
that takes all images at once: the mean loss of each of four epochs, and every weight at the end. Batch norms are fixed and nothing
is dropped out, since norms that learn see the images of a part, and each process drops out other numbers.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from safetensors.torch import load_file

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
IN_FLOAT64 = """
import torch
from smca.gpu import train
from smca.gpu.model import SMCADETR
from smca.gpu.training import optimizer, setup

setup.SMCADETR = lambda *args, **kwargs: SMCADETR(*args, **kwargs).double()
optimizer.fast_dtype = lambda _: torch.float64
train.draw_run = lambda *_: None
train.main()
"""
AS_TRAINED = """
from smca.gpu import train

train.draw_run = lambda *_: None
train.main()
"""
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


def trained(script: Path, output: Path, parts: list[Part], threads: int) -> None:
    """Train in `output`, with a command for each of the parts."""
    for processes, epochs, more in parts:
        command = [sys.executable]
        if processes > 1:
            command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        command += [str(script), *OPTIONS, "--epochs", str(epochs), *more, "--output", str(output)]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)}\n{done.stdout}\n{done.stderr}")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--as-trained", action="store_true", help="compute in float32, as training does")
    as_trained = parser.parse_args().as_trained
    more = {"1 process": ROWS["1 process"], "1 process, 2 threads": ROWS["1 process"]} if as_trained else {}
    rows = {**more, **ROWS}
    print("| | loss of each epoch | largest relative difference | mean difference of a weight |")
    print("|---|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        script = folder / "train.py"
        script.write_text(AS_TRAINED if as_trained else IN_FLOAT64, encoding="utf-8")
        for number, (row, parts) in enumerate(rows.items()):
            trained(script, folder / str(number), parts, 2 if "2 threads" in row else 1)
            losses = [line["loss"] for line in read_metrics(folder / str(number) / "metrics.jsonl")]
            weights = load_file(folder / str(number) / "model_last/model.safetensors")
            if not number:
                first, first_weights = losses, weights
            off = max(abs(a / b - 1) for a, b in zip(losses, first, strict=True))
            moved = [(v - first_weights[k]).abs().flatten() for k, v in weights.items() if v.is_floating_point()]
            mean = sum(float(d.sum()) for d in moved) / sum(len(d) for d in moved)
            print(f"| {row} | {', '.join(f'{loss:.4f}' for loss in losses)} | {off:.0e} | {mean:.0e} |", flush=True)


if __name__ == "__main__":
    main()
