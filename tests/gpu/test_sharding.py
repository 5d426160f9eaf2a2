"""A model divided over two processes: what each has of it, and that it learns and is saved as the whole one."""

from __future__ import annotations

import atexit
import copy
import dataclasses
import math
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed, nn

from smca.gpu.config import OptimConfig
from smca.gpu.files import load_latest_checkpoint, save_checkpoint
from smca.gpu.model import SMCADETR
from smca.gpu.presets import demo
from smca.gpu.shards import (
    SHARDS_FOLDERS,
    described,
    free_folder,
    read_shards,
    remove_others,
    take_sharded,
    write_shards,
)
from smca.gpu.training import guard
from smca.gpu.training import optimizer as training_optimizer
from smca.gpu.training.optimizer import clip_gradient, make_optimizer, update_average
from smca.gpu.training.sharding import adding_up, local, shard, sharded_like, unsharded, whole, whole_weights

CPU = torch.device("cpu")
IMAGES = (torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(1)) * 255).to(torch.uint8)
"""Of which each process takes every second one."""
PARTS = ([0, 1], [2, 3])
"""Of a step, over both."""


def model_of_a_run() -> SMCADETR:
    torch.manual_seed(0)
    config = demo().model
    config = dataclasses.replace(
        config,
        num_classes=3,
        backbone=dataclasses.replace(config.backbone, frozen_norm=True),
        hidden_dim=32,
        num_heads=4,
        num_queries=7,
        feedforward_dim=32,
        encoder_layers=1,
        decoder_layers=2,
        image_short_side=64,
    )
    model = SMCADETR(config, attention_backend="eager").double()
    assert model.decoder.query_content is not None
    # Queries that are all alike attend as they do whatever a weight is: its gradient is rounding, of which Muon makes a step.
    nn.init.normal_(model.decoder.query_content)
    return model


def steps_with(
    model: SMCADETR, average: SMCADETR, optim: OptimConfig, images_of: Callable[[list[int]], list[int]]
) -> Any:
    """Three steps in two parts, each with a clipped gradient; the optimiser and the norms of the gradient."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training_optimizer, "fast_dtype", lambda _: torch.float64)
        optimizer, norms = make_optimizer(model, optim, CPU), []
    for _ in range(3):
        for number, part in enumerate(PARTS):
            with adding_up(model, now=number + 1 == len(PARTS)):
                outputs = model(IMAGES[images_of(part)])
                loss = outputs["logits"].square().mean() + outputs["boxes"].sin().mean()
                (loss / len(PARTS)).backward()
        norms.append(whole(clip_gradient(model.parameters(), 0.05)))
        optimizer.step()
        optimizer.zero_grad()
        update_average(average, model, 0.5)
    return optimizer, torch.stack(norms)


def _process(rank: int, folder: str) -> None:
    """What the tests below look at, into files of `folder`."""
    atexit.register(_note_threads, Path(folder, f"threads.{rank}"))  # what is registered later is called earlier
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.set_num_threads(1)
    for name in ("adamw", "muon"):
        model = model_of_a_run()
        average = copy.deepcopy(model).requires_grad_(False)
        for module in (model, average):
            shard(module, CPU, 2)
        optim = OptimConfig(optimizer=name)  # type: ignore[arg-type]
        optimizer, norms = steps_with(model, average, optim, lambda part: part[rank::2])
        counts = [sum(local(p).numel() for p in module.parameters()) for module in (model, average)]
        of_optimizer = sum(v.numel() for values in optimizer.state.values() for v in map(local, values.values()))
        facts: dict[str, Any] = {"norms": norms, "counts": counts, "of the optimizer": of_optimizer}
        facts["weights"] = whole_weights(model, keep=rank == 0)
        facts["average"] = whole_weights(average, keep=rank == 0)
        with unsharded(average), torch.inference_mode():  # one process has two batches, the other one none
            facts["seen"] = [average.eval()(IMAGES[[0]])["logits"] for _ in range(2 - 2 * rank)]
        facts["counts"] += [sum(local(p).numel() for p in average.parameters())]
        average.train()(IMAGES[:1])["logits"].sum()  # and it may go on after that
        state = {"model": model.state_dict(), "average": None, "optimizer": optimizer.state_dict()}
        tensors = take_sharded(state)
        facts["buffers"], shards = state["model"], Path(folder, name)
        write_shards(shards, tensors)
        again = read_shards(shards, tensors.__getitem__)
        facts["again"] = all(torch.equal(local(again[name]), local(tensors[name])) for name in tensors)
        facts["divided"] = all(
            torch.equal(local(sharded_like(whole(value), value)), local(value)) for value in tensors.values()
        )
        torch.save(facts, f"{folder}/{name}.{rank}")
    Path(folder, "nowhere").write_text("a file, where a folder is to be")
    with pytest.raises(OSError, match=r"nowhere could not be written: .*process \d: ") as error:
        write_shards(Path(folder, "nowhere"), tensors)
    assert "Traceback" not in str(error.value)
    distributed.destroy_process_group()


def _note_threads(file: Path) -> None:
    names = (Path(task, "comm").read_text() for task in Path("/proc/self/task").glob("*"))
    file.write_text("".join(sorted(names)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes leave."""
    folder = tmp_path_factory.mktemp("sharding")
    torch.multiprocessing.spawn(_process, (str(folder),), nprocs=2)
    return folder


@pytest.fixture(params=["adamw", "muon"])
def optimizer(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def facts_of(folder: Path, optimizer: str) -> list[dict[str, Any]]:
    return [torch.load(folder / f"{optimizer}.{rank}", weights_only=True) for rank in range(2)]


def test_a_divided_model_learns_as_the_whole_one(folder: Path, optimizer: str) -> None:
    """Weights, moving average and norms of the gradient, with gradients that are added up over two parts of each step."""
    first, second = facts_of(folder, optimizer)
    model = model_of_a_run()
    average = copy.deepcopy(model).requires_grad_(False)
    optim = OptimConfig(optimizer=optimizer)  # type: ignore[arg-type]
    start = copy.deepcopy(model.state_dict())
    _, norms = steps_with(model, average, optim, lambda part: part)
    assert torch.allclose(first["norms"], norms, rtol=1e-10)
    assert torch.equal(first["norms"], second["norms"])
    assert second["weights"] == {}
    for name, expected in (("weights", model), ("average", average)):
        moved = 0.0
        for key, value in expected.state_dict().items():
            assert torch.allclose(first[name][key], value, rtol=0, atol=1e-10), key
            moved = max(moved, float((value - start[key]).abs().max()))
        assert moved > 1e-4


@pytest.mark.skipif(sys.platform != "linux", reason="/proc tells the names of threads")
def test_no_thread_of_the_processes_group_outlives_its_program(folder: Path) -> None:
    """One that holds a tensor when Python ends aborts the process."""
    for rank in range(2):
        threads = (folder / f"threads.{rank}").read_text().split()
        assert threads
        assert not [name for name in threads if "gloo" in name]


def test_each_process_has_half_of_it(folder: Path, optimizer: str) -> None:
    """Of parameters, average and the optimiser's state; before an evaluation and after it."""
    model = model_of_a_run()
    average = copy.deepcopy(model).requires_grad_(False)
    of_whole, _ = steps_with(model, average, OptimConfig(optimizer=optimizer), lambda part: part)  # type: ignore[arg-type]
    state = sum(value.numel() for values in of_whole.state.values() for value in values.values())
    parameters = sum(p.numel() for p in model.parameters())
    facts = facts_of(folder, optimizer)
    for counts in zip(*(each["counts"] for each in facts), strict=True):
        assert sum(counts) == parameters
        assert max(counts) < 0.55 * parameters
    of_optimizer = [each["of the optimizer"] for each in facts]
    steps = sum(1 for values in of_whole.state.values() if "step" in values)  # which each process counts
    assert sum(of_optimizer) == state + steps
    assert max(of_optimizer) < 0.55 * state


def test_an_evaluation_may_have_any_number_of_batches_on_each(folder: Path, optimizer: str) -> None:
    first, second = facts_of(folder, optimizer)
    model = model_of_a_run().eval()
    model.load_state_dict(first["average"])
    with torch.inference_mode():
        expected = model(IMAGES[[0]])["logits"]
    assert len(first["seen"]) == 2
    assert second["seen"] == []
    assert all(torch.allclose(seen, expected, atol=1e-5) for seen in first["seen"])


def test_shards_are_read_by_any_number_of_processes(folder: Path, optimizer: str) -> None:
    facts = facts_of(folder, optimizer)
    assert all(each["again"] and each["divided"] for each in facts)
    tensors = read_shards(folder / optimizer)
    assert len(tensors) > 50
    for name, value in tensors.items():
        if name.startswith("model/"):
            assert torch.equal(value, facts[0]["weights"][name.removeprefix("model/")]), name


@pytest.fixture
def run(folder: Path, tmp_path: Path) -> Path:
    """One whose checkpoint has the weights in shards."""
    shutil.copytree(folder / "adamw", tmp_path / SHARDS_FOLDERS[0])
    state = {
        "config": model_of_a_run().config.to_json(),
        "model": facts_of(folder, "adamw")[0]["buffers"],
        "average": None,
    }
    state |= {"step": 3, "epoch": 1, "batch": 0, "sum_of_losses": torch.zeros(()), "logged": {}, "total_steps": 9}
    state |= {"optimizer": {"state": {}}, "train_seconds": 1.0, "shards": described(tmp_path / SHARDS_FOLDERS[0])}
    save_checkpoint(tmp_path / "checkpoint.pt", state)
    return tmp_path


def test_a_checkpoint_with_shards_serves_as_a_model(run: Path, folder: Path) -> None:
    weights = SMCADETR.from_pretrained(run / "checkpoint.pt").state_dict()
    assert weights.keys() == facts_of(folder, "adamw")[0]["weights"].keys()
    for name, value in facts_of(folder, "adamw")[0]["weights"].items():
        assert torch.equal(value.to(weights[name].dtype), weights[name]), name


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _overwrite(path: Path) -> None:
    path.write_bytes(bytes(len(path.read_bytes())))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            Path.unlink,
            r"checkpoint.shards.0.shard-00002\S+ is missing, where \S+checkpoint.pt needs [\d,]+: a checkpoint of --fsdp",
        ),
        (_cut, r"checkpoint.shards.0.shard-00002\S+ has [\d,]+ bytes, where"),
        (_overwrite, r"checkpoint.shards.0 is damaged or belongs to another model: .*; take another copy"),
    ],
)
def test_shards_that_are_damaged_are_named(damage: Callable[[Path], None], message: str, run: Path) -> None:
    damage(next((run / SHARDS_FOLDERS[0]).glob("shard-00002*")))
    with pytest.raises(ValueError, match=message):
        SMCADETR.from_pretrained(run)


@pytest.mark.parametrize(
    "shards",
    [{}, {"folder": "../secret", "files": {"a": 1}}, {"folder": SHARDS_FOLDERS[0], "files": {"../../a": 1}}],
    ids=str,
)
def test_shards_lie_where_a_run_puts_them(shards: dict[str, Any], run: Path) -> None:
    state = torch.load(run / "checkpoint.pt", weights_only=True)
    torch.save({**state, "shards": shards}, run / "checkpoint.pt")
    with pytest.raises(ValueError, match=r"checkpoint.pt is damaged or is not a checkpoint of smca train"):
        SMCADETR.from_pretrained(run)


def test_the_checkpoint_before_is_used_if_shards_are_missing(run: Path) -> None:
    """Loudly."""
    state = torch.load(run / "checkpoint.pt", weights_only=True)
    shutil.copytree(run / SHARDS_FOLDERS[0], run / SHARDS_FOLDERS[1])
    save_checkpoint(run / "checkpoint.pt", {**state, "step": 4, "shards": described(run / SHARDS_FOLDERS[1])})
    shutil.rmtree(run / SHARDS_FOLDERS[1])
    with pytest.warns(UserWarning, match=r"is missing, where .* Going on from the one before it, .*, of step 3"):
        assert load_latest_checkpoint(run / "checkpoint.pt")["step"] == 3


def test_folders_take_turns(tmp_path: Path) -> None:
    """The next one is empty, and is none that a checkpoint needs; others go."""
    for name in SHARDS_FOLDERS:
        (tmp_path / name).mkdir()
        (tmp_path / name / "old.safetensors").touch()
    assert free_folder(tmp_path, set(SHARDS_FOLDERS[:2])) == SHARDS_FOLDERS[2]
    assert [len(list((tmp_path / name).iterdir())) for name in SHARDS_FOLDERS] == [1, 1, 0]
    remove_others(tmp_path, {SHARDS_FOLDERS[1]})
    assert [path.name for path in tmp_path.iterdir()] == [SHARDS_FOLDERS[1]]


def test_a_process_whose_part_of_the_gradients_is_finite_does_not_call_it_an_overflow(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layer = torch.nn.Linear(2, 2)
    layer(torch.ones(1, 2)).sum().backward()
    assert guard._bad_gradient(layer, math.inf) == "the norm of the gradient is inf: it overflows"
    monkeypatch.setattr(guard, "local", torch.clone)
    said = "the norm of the gradient is nan: it overflows, or what another process has of the gradients is not finite"
    assert guard._bad_gradient(layer, math.nan) == said
