"""Every knob does something: the table in docs/training.md names each field of a run's configuration, and a test that shows it."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from smca.datasets import SyntheticShapes
from smca.gpu import train
from smca.gpu.config import RunConfig
from smca.gpu.presets import tiny_resnet
from smca.gpu.training.guard import FiniteCheck
from smca.gpu.training.log import RunLog
from smca.gpu.training.setup import set_up
from smca.gpu.training.stop import Stop
from tiny_run import tiny

ROOT = Path(__file__).parents[2]
ROW = re.compile(r"^\| `--(\S+)` \| (.+) \| `(\S+)::(\S+)` \|$", re.MULTILINE)
"""flag, what it does, file and name of a test"""


def fields_of(config: Any, prefix: str = "") -> Iterator[str]:
    """Names of the settings as on the command line, nested ones with a dot."""
    for field in dataclasses.fields(config):
        value, name = getattr(config, field.name), prefix + field.name.replace("_", "-")
        if dataclasses.is_dataclass(value):
            yield from fields_of(value, f"{name}.")
        else:
            yield name


def test_the_table_has_every_knob_and_a_test_of_each() -> None:
    section = (ROOT / "docs/training.md").read_text(encoding="utf-8").partition("## Every knob")[2]
    rows = ROW.findall(section)
    flags = [row[0] for row in rows]
    assert len(flags) == len(set(flags)), "a knob is listed twice"
    expected = list(fields_of(RunConfig()))
    assert sorted(expected) == sorted(flags), (
        f"not in the table of docs/training.md: {sorted(set(expected) - set(flags))}; there, but no field: "
        f"{sorted(set(flags) - set(expected))}"
    )
    absent = [
        f"{file}::{name}"
        for _, _, file, name in rows
        if not (ROOT / "tests" / file).is_file()
        or not re.search(rf"^def {name}\(", (ROOT / "tests" / file).read_text(encoding="utf-8"), re.MULTILINE)
    ]
    assert absent == [], "the table names tests that do not exist"


def changed(config: Any, changes: Mapping[str, Any]) -> Any:
    """The configuration with other values for some fields, by names as on the command line."""
    for name, value in changes.items():
        first, _, rest = name.partition(".")
        first = first.replace("-", "_")
        config = dataclasses.replace(
            config, **{first: changed(getattr(config, first), {rest: value}) if rest else value}
        )
    return config


@functools.cache
def losses(*changes: tuple[str, Any]) -> tuple[float, ...]:
    """Of the steps of an epoch of a tiny run: one, for every two training images."""
    seen: list[float] = []

    def noted(self: Any, terms: Mapping[str, Tensor], *others: Any) -> None:
        seen.append(terms["loss"].item())

    smaller = {
        "model.backbone": tiny_resnet(1, 1),
        "synthetic.image-size": 32,
        "synthetic.train-images": 2,
        "augmentation.short-sides": (32,),
        "optim.optimizer": "adamw",
        "optim.warmup-steps": 0,
        "optim.lr": 4e-3,
        "optim.backbone-lr": 4e-3,
    }
    base = tiny(Path("nowhere"), batch_size=2, checkpoint_every=math.inf)
    config = changed(changed(base, smaller), dict(changes))
    run = set_up(config, 0, 1, None, None, None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FiniteCheck, "record", noted)
        train._train_epoch(run, RunLog(config.output, 2, first_step=0, main_process=False), Stop())
    return tuple(seen)


LEVELS = ("model.strides", (8, 16))
PIXELS = ("model.prior-unit", "pixels")
TWO_STEPS = ("synthetic.train-images", 4)
"""Of which the second one sees what the first one did to the weights."""
MUON = ("optim.optimizer", "muon")
NOT_NOISED = ("model.denoising-groups", 0)
SOFTMAX = ("model.class-scores", "softmax")
SETTINGS: list[tuple[str, Any, tuple[tuple[str, Any], ...]]] = [
    ("model.strides", (4,), ()),
    ("model.hidden-dim", 16, ()),
    ("model.num-heads", 2, ()),
    ("model.num-queries", 5, ()),
    ("model.encoder", "conv", (LEVELS,)),
    ("model.encoder", "pyramid_conv", (LEVELS,)),
    ("model.halve-finest", True, (LEVELS,)),
    ("model.encoder-layers", 0, ()),
    ("model.cross-level-blocks", (0,), (LEVELS,)),
    ("model.decoder-layers", 1, ()),
    ("model.feedforward-dim", 16, ()),
    ("model.dropout", 0.3, ()),
    ("model.cross-attention", "dense", (PIXELS,)),
    ("model.prior-scale", "single", ()),
    ("model.prior-heads", "shared", ()),
    ("model.scale-selection", False, (LEVELS,)),
    ("model.prior-sigma-px", 9.0, (PIXELS,)),
    ("model.query-init", "anchors", ()),
    ("model.box-refinement", False, ()),
    ("model.prior-unit", "pixels", ()),
    ("model.dense-head", False, (("model.query-init", "anchors"),)),
    ("model.denoising-groups", 0, ()),
    ("model.class-scores", "softmax", (NOT_NOISED,)),
    ("model.pre-norm", False, ()),
    ("model.pixel-mean", (0.1, 0.2, 0.3), ()),
    ("model.pixel-std", (0.5, 0.5, 0.5), ()),
    ("model.backbone.frozen-norm", True, ()),
    ("model.backbone.frozen-stages", 1, (TWO_STEPS,)),
    ("loss.class-weight", 3.0, ()),
    ("loss.l1-weight", 3.0, ()),
    ("loss.giou-weight", 3.0, ()),
    ("loss.classification", "focal", ()),
    ("loss.classification", "softmax", (NOT_NOISED, SOFTMAX)),
    ("loss.no-object-weight", 0.3, (NOT_NOISED, SOFTMAX, ("loss.classification", "softmax"))),
    ("optim.optimizer", "muon", (TWO_STEPS,)),
    ("optim.lr", 1e-3, (TWO_STEPS,)),
    ("optim.backbone-lr", 1e-3, (TWO_STEPS,)),
    ("optim.muon-lr", 0.01, (TWO_STEPS, MUON)),
    ("optim.weight-decay", 10.0, (TWO_STEPS,)),
    ("optim.clip-norm", 1e-5, (TWO_STEPS,)),
    ("precision", "bf16", ()),
    ("seed", 1, ()),
    ("shape-bucket", 48, ()),
]


@pytest.mark.parametrize(("name", "value", "base"), SETTINGS, ids=[name for name, _, _ in SETTINGS])
def test_a_setting_changes_what_is_learned(name: str, value: Any, base: tuple[tuple[str, Any], ...]) -> None:
    """By the losses; which are the same when nothing is changed."""
    got = losses(*(pair for pair in base if pair[0] != name), (name, value))
    assert len(got) == 1 + (TWO_STEPS in base)
    assert got != losses(*base)


def test_without_a_change_the_losses_are_the_same() -> None:
    assert losses(TWO_STEPS) == losses.__wrapped__(TWO_STEPS)


def test_how_data_are_loaded_is_a_setting(tmp_path: Path) -> None:
    def loaders(**changes: Any) -> tuple[Any, Any, Any]:
        run = set_up(tiny(tmp_path, **changes), 0, 1, None, None, None)
        return run.loader, run.val_loader, run.train_data

    for workers in (0, 1):
        assert [loader.num_workers for loader in loaders(workers=workers)[:2]] == [workers] * 2
    assert [len(loaders(eval_batch_size=size)[1]) for size in (1, 4, 6)] == [6, 2, 1]
    for cache, kept in ((False, 0), (True, 64 * 64 * 3)):
        data = loaders(cache_images=cache)[2]
        data[0]
        assert data.cache_bytes == kept * (len(data) if cache else 0)


@pytest.mark.parametrize(("short", "longest", "expected"), [(48, 64, (48, 48)), (96, 80, (80, 80))])
def test_images_have_a_size_at_evaluation(short: int, longest: int, expected: tuple[int, int], tmp_path: Path) -> None:
    config = changed(tiny(tmp_path), {"model.image-max-size": longest, "model.image-short-side": min(short, longest)})
    run = set_up(config, 0, 1, None, None, None)
    assert next(iter(run.val_loader)).images.shape[-2:] == expected


def test_held_out_images_have_an_annotation_file_of_their_own(tmp_path: Path) -> None:
    for split, count in (("train", 4), ("val", 3)):
        SyntheticShapes(count, 1, image_size=64).export_coco(tmp_path, split)  # type: ignore[arg-type]
    other = SyntheticShapes(2, 7, image_size=64)
    other.export_coco(tmp_path / "other", "val")
    config = tiny(tmp_path / "run", data=str(tmp_path), val_json=tmp_path / "other/annotations/val.json")
    run = set_up(config, 0, 1, None, None, None)
    assert (len(run.train_data), run.val_report.images) == (4, 2)


def test_evaluations_are_as_far_apart_as_asked(tmp_path: Path) -> None:
    run = set_up(tiny(tmp_path, epochs=5, eval_every=2), 0, 1, None, None, None)
    planned = []
    for epoch in range(1, 6):
        run.epoch, run.step = epoch, 3 * epoch
        planned.append(train._is_planned(run))
    assert planned == [False, True, False, True, True]


def test_several_folders_are_trained_on(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("a", "b")]
    for number, folder in enumerate(folders):
        for split in ("train", "val"):
            SyntheticShapes(3 + number, number, image_size=64).export_coco(folder, split)
    run = set_up(
        changed(tiny(tmp_path), {"data": str(folders[0]), "more-data": (str(folders[1]),)}),
        0,
        1,
        None,
        None,
        None,
    )
    assert (len(run.train_data), len(run.val_data)) == (7, 3)
    assert str(run.train_report).startswith("7 images")


def test_the_built_in_data_are_settings(tmp_path: Path) -> None:
    changes = {"image-size": 48, "train-images": 9, "val-images": 5, "max-objects": 2, "min-side": 0.3, "max-side": 0.4}
    run = set_up(
        changed(tiny(tmp_path), {f"synthetic.{name}": value for name, value in changes.items()}),
        0,
        1,
        None,
        None,
        None,
    )
    assert (len(run.train_data), len(run.val_data), run.train_data[0].image.shape[:2]) == (9, 5, (48, 48))
    boxes = [annotation["bbox"] for annotation in run.train_data.ground_truth()["annotations"]]
    assert run.most_objects == 2
    usual = set_up(tiny(tmp_path), 0, 1, None, None, None).train_data.ground_truth()["annotations"]
    sides = [
        [(w * h) ** 0.5 / size for _, _, w, h in found]
        for found, size in ((boxes, 48), ([a["bbox"] for a in usual], 64))
    ]
    assert min(sides[0]) > min(sides[1])
    assert max(sides[0]) < max(sides[1])
