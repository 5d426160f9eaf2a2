"""docs/extending.md: every diff applies to the file that it names, and the result trains."""

from __future__ import annotations

import csv
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from smca.datasets import SyntheticShapes
from smca.gpu.training.log import read_metrics

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
TINY = (
    *("demo", "--device", "cpu", "--epochs", "1", "--max-steps", "2", "--batch-size", "4"),
    *("--synthetic.image-size", "64", "--synthetic.train-images", "8", "--synthetic.val-images", "4"),
    *(
        "--model.image-short-side",
        "64",
        "--model.hidden-dim",
        "32",
        "--model.num-queries",
        "8",
        "--model.decoder-layers",
        "1",
    ),
    *("--model.feedforward-dim", "32", "--augmentation.short-sides", "64"),
)


def section(title: str) -> str:
    """The text under a heading."""
    return re.split(r"^## ", PAGE, flags=re.MULTILINE)[[*re.findall(r"^## (.+)$", PAGE, re.MULTILINE)].index(title) + 1]


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def apply(diff: str, root: Path) -> None:
    """Apply a diff without line numbers: what each hunk replaces must occur exactly once in its file."""
    for name, body in re.findall(r"^--- a/.+\n\+\+\+ b/(.+)\n((?:(?!--- a/).*\n)*)", diff, re.MULTILINE):
        text = (root / name).read_text(encoding="utf-8")
        for hunk in body.split("@@\n")[1:]:
            lines = hunk.splitlines(keepends=True)
            assert all(line[0] in " +-" for line in lines), hunk
            before, after = ("".join(line[1:] for line in lines if line[0] in kinds) for kinds in (" -", " +"))
            assert text.count(before) == 1, f"{name} has {text.count(before)} times:\n{before}"
            text = text.replace(before, after)
        (root / name).write_text(text, encoding="utf-8")


def script(folder: Path, title: str = "") -> Path:
    """my_train.py of the page, changed by the diff of a section."""
    path = folder / "my_train.py"
    path.write_text(blocks(PAGE, "python")[0], encoding="utf-8")
    for diff in blocks(section(title), "diff") if title else ():
        apply(diff, folder)
    return path


def run(path: Path, output: str, monkeypatch: pytest.MonkeyPatch) -> float:
    """Train by a script, from its folder; the loss of the first epoch."""
    monkeypatch.chdir(path.parent)
    monkeypatch.setattr(sys, "argv", [str(path), *TINY, "--output", output])
    runpy.run_path(str(path), run_name="__main__")
    (metrics,) = read_metrics(Path(output) / "metrics.jsonl")
    return float(metrics["loss"])


def test_another_loss_term(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = run(script(tmp_path), "plain", monkeypatch)
    assert run(script(tmp_path, "Another loss term"), "counting", monkeypatch) > plain + 0.01


@pytest.mark.usefixtures("pictures")
def test_another_dataset_class(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for split, count in (("train", 7), ("val", 3)):
        folder = tmp_path / "table" / split
        folder.mkdir(parents=True)
        data, rows = SyntheticShapes(count, seed=5, image_size=64), []
        for index in range(count):
            sample, name = data[index], f"{index}.png"
            Image.fromarray(sample.image).save(folder / name)
            for label, box in zip(sample.labels.tolist(), sample.boxes_xyxy.tolist(), strict=True):
                rows.append((name, ("circle", "square", "triangle")[label % 3], *box))
        with (folder / "boxes.csv").open("w", newline="") as file:
            csv.writer(file).writerows([("file", "class", "x0", "y0", "x1", "y1"), *rows])
    assert run(script(tmp_path, "Another dataset class"), "table_run", monkeypatch) > 0
    printed = capsys.readouterr().out
    images = len({row[0] for row in rows})
    assert f"held-out images: {images} images (0 empty) · {len(rows)} boxes of 3 classes" in printed
    assert "smca evaluate" not in printed, "the command does not know this data"


def test_a_tracker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(script(tmp_path, "A tracker"), "tracked", monkeypatch)
    (line,) = [line.split(",") for line in (tmp_path / "table.csv").read_text().splitlines() if "eval/ap," in line]
    (metrics,) = read_metrics(Path("tracked") / "metrics.jsonl")
    assert (int(line[0]), float(line[2])) == (2, metrics["ap"])


def test_another_schedule(tmp_path: Path) -> None:
    for package in ("gpu", "datasets"):
        shutil.copytree(ROOT / package, tmp_path / "smca" / package, ignore=shutil.ignore_patterns("__pycache__"))
    for diff in blocks(section("Another schedule"), "diff"):
        apply(diff, tmp_path / "smca")
    check = (
        "from smca.gpu.config import OptimConfig\n"
        "from smca.gpu.training.optimizer import learning_rate_factor as factor\n"
        "linear = OptimConfig(schedule='linear', warmup_steps=10)\n"
        "assert [factor(linear, step, 0, 110) for step in (9, 10, 35, 110)] == [1, 1, 0.75, 0]\n"
    )
    arguments = ["my_train.py", *TINY, "--optim.schedule", "linear", "--output", "run"]
    check += (
        f"import runpy, sys\nsys.argv = {arguments!r}\nrunpy.run_path({str(script(tmp_path))!r}, run_name='__main__')"
    )
    # Started in the folder of the copies, which is where smca is then imported from.
    ran = subprocess.run([sys.executable, "-c", check], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert (tmp_path / "run/model/config.json").is_file()


def test_a_diff_that_does_not_apply_is_noticed(tmp_path: Path) -> None:
    diff = blocks(section("Another loss term"), "diff")[0]
    path = script(tmp_path)
    path.write_text(path.read_text().replace("train(parse(sys.argv[1:]))", "train(parse(None))"))
    with pytest.raises(AssertionError, match="has 0 times"):
        apply(diff, tmp_path)
