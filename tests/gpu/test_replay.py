"""The step that stopped a run at a number which is not finite is kept whole, and happens again without the data."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from smca.datasets import Targets
from smca.gpu import train
from smca.gpu.loss import NonFiniteError
from smca.gpu.model import SMCADETR
from smca.gpu.training import guard
from smca.gpu.training.bad_step import Origin
from smca.gpu.training.replay import replay
from tiny_run import tiny

NAME = "decoder.layers.0.linear"


def too_large(model: SMCADETR) -> None:
    """Weights whose product no float32 holds."""
    weights = dict(model.named_parameters())
    weights[f"{NAME}1.weight"].mul_(1e30)
    weights[f"{NAME}2.weight"].mul_(1e30)


def too_steep(model: SMCADETR) -> None:
    """Weights that give a usual output, and a gradient whose square no float32 holds."""
    weights = dict(model.named_parameters())
    weights[f"{NAME}1.weight"].mul_(1e25)
    weights[f"{NAME}2.weight"].mul_(1e-25)


def stopped(folder: Path, spoil: Callable[[SMCADETR], None], criterion: Any = None) -> Path:
    """Train in steps of two parts, with dropout, and spoil the weights before the fifth; the file that is left."""
    config = tiny(folder, accumulate=2)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, dropout=0.1))
    models = []

    def set_up(*args: Any, of_all: Any = train.set_up) -> Any:
        run = of_all(*args)
        models.append(run.model)
        return run

    def seed_step(device: Any, seed: int, step: int, rank: int, of_all: Any = train.seed_step) -> None:
        of_all(device, seed, step, rank)
        if step == 4:
            with torch.no_grad():
                spoil(models[0])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "set_up", set_up)
        patch.setattr(train, "seed_step", seed_step)
        with pytest.raises(NonFiniteError, match=r"smca train --replay .*bad_step\.safetensors"):
            train.train(config, criterion=criterion)
    return folder / "bad_step.safetensors"


@pytest.fixture(scope="module")
def steep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A step whose gradient overflowed."""
    return stopped(tmp_path_factory.mktemp("steep"), too_steep)


def numbers(text: str) -> dict[str, tuple[str, str]]:
    """The table: then and now."""
    rows = re.findall(r"^(\w.*?) {2,}(\S+) +(\S+)$", text, re.MULTILINE)
    return {title: (then, now) for title, then, now in rows}


def replayed(path: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """(exit status, what is said) of the command."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        train.main(["--replay", str(path), "--device", "cpu"])
    return int(ended.value.code or 0), capsys.readouterr().out


def test_a_gradient_that_overflows_is_reproduced_to_the_last_digit_shown(
    steep: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, said = replayed(steep, capsys)
    assert status == 0, said
    table = numbers(said)
    assert {f"{term}, decoder layer {m}" for term in ("class", "l1", "giou") for m in (0, 1)} < table.keys()
    assert {"class of cells", "giou of noised", "loss"} < table.keys()
    assert table.pop("norm of the gradient") == ("inf", "inf")
    assert all(then == now and re.match(r"\d", now) for then, now in table.values()), table
    assert "step 5, of epoch 2; seed 0" in said
    assert re.search(r"image ids: \[\d+, \d+, \d+, \d+\], in 2 parts", said)
    assert "weights before the step: finite\noptimiser's state before the step: finite" in said
    assert (
        "first module whose output is not finite: none\nfirst gradient that is not finite, going backward: none" in said
    )
    assert "\nreproduced: the norm of the gradient is inf: it overflows" in said


def test_where_a_number_arises_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, said = replayed(stopped(tmp_path, too_large), capsys)
    assert status == 0, said
    first = r"first module whose output is not finite: decoder\.layers\.0\.linear2 \(Linear\), whose input is finite, for the image"
    assert re.search(first + r" ids \[\d+, \d+\]", said), said
    assert "none was taken, since there is no loss without a matching" in said
    assert re.search(r"^class, decoder layer 1 +– +nan$", said, re.MULTILINE)
    assert "\nreproduced: matching cost of decoder layer 0" in said


def test_a_number_that_does_not_come_again(steep: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With tame weights in place of those that were kept."""
    path = rewritten(steep, tmp_path, tensors=lambda t: t[f"model/{NAME}1.weight"].mul_(1e-25))
    status, said = replayed(path, capsys)
    assert status == 1
    assert "NOT reproduced: the norm of the gradient is inf" in said
    assert "(now everything is finite.)" in said
    path = rewritten(steep, tmp_path, tensors=lambda t: t[f"model/{NAME}1.weight"].fill_(torch.nan))
    _, said = replayed(path, capsys)
    assert f"weights before the step: NOT finite: {NAME}1.weight (1 in all)" in said
    assert "(now class, decoder layer 0 is the first.)" in said


def test_the_gradient_where_it_arises_is_named(steep: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Going backward from a loss that is not finite, the last layers come first."""

    class Bad(torch.nn.Module):
        def forward(self, outputs: dict[str, Tensor], targets: Targets) -> dict[str, Tensor]:
            return {"loss": (outputs["logits"][-1] * 0).abs().sqrt().sum()}  # d√x at 0 is infinite

    path = stopped(tmp_path, lambda model: None, Bad())
    with pytest.raises(ValueError, match=r"bad_step.* a loss of its own, .*Bad, which the file cannot hold"):
        replay(path, device="cpu")
    assert replay(path, device="cpu", criterion=Bad())
    assert "first gradient that is not finite, going backward: decoder." in capsys.readouterr().out


def rewritten(
    path: Path,
    folder: Path,
    *,
    tensors: Callable[[dict[str, Tensor]], Any] = lambda tensors: None,
    facts: Callable[[dict[str, Any]], Any] = lambda facts: None,
) -> Path:
    with safe_open(path, "pt") as file:
        (key, text), *_ = file.metadata().items()
    held, said = load_file(path), json.loads(text)
    tensors(held)
    facts(said)
    save_file(held, folder / path.name, {key: json.dumps(said)})
    return folder / path.name


def test_the_share_of_one_process_says_what_is_missing(
    steep: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def of_two(facts: dict[str, Any]) -> None:
        facts["origin"].update(world=2)
        facts["num_boxes"] *= 2  # as if the other process had three times as many

    _, said = replayed(rewritten(steep, tmp_path, facts=of_two), capsys)
    for term in ("class", "l1", "giou"):
        then, now = map(float, numbers(said)[f"{term}, decoder layer 0"])
        assert now == pytest.approx(then / 2, rel=1e-4), "sums are divided by the objects of all processes"
    assert "process 0 of 2, its own images: what batch norms saw of the others' is missing" in said
    check = guard.FiniteCheck(torch.nn.Linear(1, 1), tmp_path, delayed=False, origin=Origin(None, 1, 2, "cpu", None))  # type: ignore[arg-type]
    assert check.path.name == "rank1_bad_step.safetensors"


def test_files_that_are_no_bad_step_are_named(steep: Path, tmp_path: Path) -> None:
    path = tmp_path / steep.name
    with pytest.raises(FileNotFoundError, match=r"there is no .*bad_step\.safetensors: give the"):
        replay(path)
    path.write_bytes(steep.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"bad_step\.safetensors is cut, damaged"):
        replay(path)
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=r"bad_step\.safetensors is not a step of smca train"):
        replay(path)
    rewritten(steep, tmp_path, facts=lambda facts: facts.update(step="five"))
    with pytest.raises(ValueError, match=r"bad_step\.safetensors: step must be a whole number .* got 'five'"):
        replay(path)
    rewritten(steep, tmp_path, tensors=lambda tensors: tensors.pop("part 1/boxes"))
    with pytest.raises(ValueError, match=r"bad_step\.safetensors lacks 'part 1/boxes'"):
        replay(path)
    rewritten(steep, tmp_path, tensors=lambda tensors: tensors.update({"part 0/boxes": torch.zeros(1)}))
    with pytest.raises(ValueError, match=r"bad_step\.safetensors lacks part 0/boxes of the shape \(2, \d+, 4\)"):
        replay(path)
    rewritten(steep, tmp_path, tensors=lambda tensors: tensors["part 0/labels"].fill_(99))
    with pytest.raises(ValueError, match=r"bad_step\.safetensors lacks part 0/labels of its classes"):
        replay(path)
    rewritten(steep, tmp_path, facts=lambda facts: facts.update(norm="large"))
    with pytest.raises(ValueError, match=r"bad_step\.safetensors lacks .*'large'"):
        replay(path)
    rewritten(steep, tmp_path, tensors=lambda tensors: tensors.pop(f"model/{NAME}1.weight"))
    with pytest.raises(ValueError, match=r"bad_step\.safetensors: its weights do not fit its configuration"):
        replay(path)


def test_a_full_disk_does_not_hide_what_was_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError("bad_step.safetensors could not be written: No space left on device")

    monkeypatch.setattr(guard, "save_bad_step", full)
    check = guard.FiniteCheck(torch.nn.Linear(1, 1), tmp_path, delayed=False)
    optimizer = torch.optim.AdamW(check.model.parameters())
    with pytest.raises(NonFiniteError, match=r"term of decoder layer 0 is nan.* could not be kept \(.*No space left"):
        check.record({"class/0": torch.tensor(torch.nan)}, torch.ones(()), guard.Step([]), optimizer)
