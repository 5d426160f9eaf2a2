"""Training in float16: the loss is scaled, steps whose gradients overflow are left out, and all of it survives a resumption."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tiny_run
from smca.gpu import train
from smca.gpu.config import RunConfig
from smca.gpu.loss import NonFiniteError, SetCriterion
from smca.gpu.training import guard, setup
from smca.gpu.training.guard import FiniteCheck
from smca.gpu.training.log import read_metrics


def tiny(output: Path, **changes: Any) -> RunConfig:
    """Two steps in each epoch, in float16, which a CPU computes slowly; with Muon, AdamW and an average."""
    run: RunConfig = tiny_run.tiny(output)
    run = dataclasses.replace(
        run,
        model=dataclasses.replace(run.model, image_short_side=32, image_max_size=32, decoder_layers=1),
        augmentation=dataclasses.replace(run.augmentation, short_sides=(32,)),
        synthetic=dataclasses.replace(run.synthetic, image_size=32, train_images=4, val_images=2, min_side=0.3),
        optim=dataclasses.replace(run.optim, schedule="step", warmup_steps=0, ema_decay=0.9),
        batch_size=2,
        precision="fp16",
        eval_every=10,
    )
    return dataclasses.replace(run, **changes)


def checkpoint(folder: Path) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(folder / "checkpoint.pt", weights_only=True)
    return state


def norms_of(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Train; the norm of every step's gradient before it is clipped."""
    norms: list[float] = []
    record = FiniteCheck.record

    def noting(self: Any, terms: Any, norm: Tensor, *others: Any) -> None:
        norms.append(norm.item())
        record(self, terms, norm, *others)

    with monkeypatch.context() as patch:
        patch.setattr(FiniteCheck, "record", noting)
        train.train(config)
    return norms


def test_a_step_that_overflows_is_left_out_and_said_and_a_stopped_run_goes_on_exactly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first two steps of four overflow. The run is stopped after the second."""
    backoff = partial(torch.amp.GradScaler, init_scale=2.0**40, backoff_factor=2.0**-14)
    monkeypatch.setattr(setup.torch.amp, "GradScaler", backoff)
    train.train(tiny(tmp_path / "whole"))
    said = capsys.readouterr().out
    assert "epoch 1: 2 steps left out, whose gradients overflowed float16" in said
    assert "epoch 2" not in said
    train.train(tiny(tmp_path / "parts", epochs=1))
    half = checkpoint(tmp_path / "parts")
    assert half["skipped"] == (2, 2)
    assert not any(bool(value.any()) for value in half["optimizer"]["state"][0].values()), "a step was taken"
    train.train(tiny(tmp_path / "parts", resume=True))
    whole, parts = checkpoint(tmp_path / "whole"), checkpoint(tmp_path / "parts")
    assert whole["skipped"] == parts["skipped"] == (2, 0)
    assert whole["scaler"] == parts["scaler"]
    assert (whole["scaler"]["scale"], whole["scaler"]["_growth_tracker"]) == (2.0**12, 2)
    for name in ("model", "average"):
        assert all(torch.equal(value, parts[name][key]) for key, value in whole[name].items())
    assert any(not torch.equal(value, half["model"][key]) for key, value in whole["model"].items())
    assert whole["loss"] == parts["loss"] == read_metrics(tmp_path / "whole" / "metrics.jsonl")[-1]["loss"]


def test_gradients_are_clipped_at_their_own_size_and_another_precision_is_another_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that changes to float16 on purpose begins with a scale of its own."""
    monkeypatch.setattr(setup.torch.amp, "GradScaler", partial(torch.amp.GradScaler, init_scale=2.0**10))
    of_half = norms_of(tiny(tmp_path / "half", max_steps=1), monkeypatch)
    of_full = norms_of(tiny(tmp_path / "full", max_steps=1, precision="fp32"), monkeypatch)
    assert of_half == pytest.approx(of_full, rel=0.05)
    with pytest.raises(ValueError, match="--precision is 'fp16', was 'fp32'"):
        train.train(tiny(tmp_path / "full", max_steps=2, resume=True))
    train.train(tiny(tmp_path / "full", max_steps=2, resume=True, resume_changed=True))
    assert checkpoint(tmp_path / "full")["scaler"]["scale"] == 2.0**10


@pytest.mark.parametrize(
    ("spoiled", "message"),
    [
        (
            "gradient",
            r"2 steps in a row .* overflow float16 .*of the last, the gradient of .*\): take --precision bf16 or fp32",
        ),
        ("loss", "the loss is not finite: the sum of the terms is nan"),
    ],
)
def test_what_no_scale_helps_against_ends_the_run(
    spoiled: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = SetCriterion.forward

    def spoil(self: Any, outputs: dict[str, Tensor], *of_step: Any) -> dict[str, Tensor]:
        terms = forward(self, outputs, *of_step)
        endless = (outputs["logits"] * 0).abs().sqrt().sum()  # d√x at 0 is infinite
        return {**terms, "loss": terms["loss"] + endless if spoiled == "gradient" else terms["loss"] * torch.nan}

    monkeypatch.setattr(SetCriterion, "forward", spoil)
    monkeypatch.setattr(guard, "MOST_SKIPPED", 2)
    with pytest.raises(NonFiniteError, match=message):
        train.train(tiny(tmp_path))
    assert (tmp_path / "bad_step.safetensors").is_file()


def test_it_is_refused_where_no_step_can_be_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setup, "pick_device", lambda _: torch.device("mps"))
    with pytest.raises(ValueError, match=r"precision fp16 needs .* not on mps: take --precision bf16 or fp32"):
        train.train(tiny(tmp_path))
