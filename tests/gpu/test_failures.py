"""What fails in the middle of a run says why, and nothing is lost: the run goes on as if nothing had happened."""

from __future__ import annotations

import dataclasses
import errno
import os
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from smca.datasets import CocoDetection, SyntheticShapes
from smca.gpu import train
from smca.gpu.files import load_checkpoint
from smca.gpu.loss import NonFiniteError
from smca.gpu.training import lock, resume
from smca.gpu.training.lock import LOCK_FILE, only_run_in
from smca.gpu.training.log import RunLog, read_metrics
from smca.gpu.training.setup import set_up
from tiny_run import tiny


def require_same_run(got: Path, expected: Path) -> None:
    """The last weights, to the last bit, and the metrics."""
    weights = load_file(expected / "model_last/model.safetensors")
    assert all(
        torch.equal(load_file(got / "model_last/model.safetensors")[name], value) for name, value in weights.items()
    )
    lines = [
        [{k: v for k, v in line.items() if "second" not in k} for line in read_metrics(folder / "metrics.jsonl")]
        for folder in (got, expected)
    ]
    assert lines[0] == lines[1]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images in a folder."""
    root = tmp_path_factory.mktemp("data")
    for split, count, seed in (("train", 12, 0), ("val", 4, 1)):
        SyntheticShapes(count, seed, image_size=64).export_coco(root, split)  # type: ignore[arg-type]
    return root


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run in which nothing fails."""
    folder = tmp_path_factory.mktemp("whole")
    train.train(tiny(folder, data=str(data)))
    return folder


# A disk that is full


@contextmanager
def disk_with(bytes_free: int) -> Iterator[None]:
    """No file grows beyond so many bytes: what is beyond them is not written, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_free, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def full_in(call: int, function: Callable[..., Any], bytes_free: int) -> Callable[..., Any]:
    """`function`, in whose call of that number the disk is full."""
    calls = 0

    def limited(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls != call:
            return function(*args, **kwargs)
        with disk_with(bytes_free):
            function(*args, **kwargs)

    return limited


def test_a_disk_that_is_full_at_every_write(data: Path, whole: Path, tmp_path: Path) -> None:
    """One after the other: each file is named, what was there stays, and the run goes on from there."""
    config = tiny(tmp_path, data=str(data), restartable=True)
    moments: list[tuple[Any, str, int, int, str]] = [
        (resume, "save_checkpoint", 2, 1_000_000, r"checkpoint\.pt"),
        (train.SMCADETR, "save_pretrained", 1, 1_000_000, r"model_last/model\.safetensors"),
        (train.SMCADETR, "save_pretrained", 2, 1_000_000, r"model/model\.safetensors"),
        (RunLog, "_write_metrics", 2, 10, r"metrics\.jsonl"),
    ]
    for owner, name, call, bytes_free, file in moments:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(owner, name, full_in(call, getattr(owner, name), bytes_free))
            with pytest.raises(OSError, match=rf"{file} could not be written: File too large; [0-9,]+ MB are free in"):
                train.train(config)
        load_checkpoint(tmp_path / "checkpoint.pt")
        read_metrics(tmp_path / "metrics.jsonl")
        assert not list(tmp_path.rglob("*.partial"))
    train.train(config)
    require_same_run(tmp_path, whole)


# Images, and the processes that load them


def spoiled_in_step(number: int, spoil: Callable[[], object]) -> Any:
    """``seed_step`` in whose call of that number something happens to the data."""
    taken = 0

    def seed_step(*args: Any, of_all: Any = train.seed_step) -> None:
        nonlocal taken
        taken += 1
        of_all(*args)
        if taken == number:
            spoil()

    return seed_step


@pytest.mark.parametrize(
    ("what", "workers", "message"),
    [
        (
            "deleted",
            0,
            r"\d+\.png \(image \d+ of .*train\.json\) existed when the data were opened, but is gone; restore it",
        ),
        (
            "deleted",
            2,
            r"\d+\.png \(image \d+ of .*train\.json\) existed when the data were opened, but is gone; restore it",
        ),
        ("killed", 2, r"no batch of images came: DataLoader worker \(pid.* --workers 0 loads in the training process"),
    ],
)
def test_images_that_cannot_be_loaded_any_more_cost_no_step(
    what: str,
    workers: int,
    message: str,
    data: Path,
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In the middle of an epoch; with workers, once what is loaded ahead by then is used up."""
    copied = Path(shutil.copytree(data, tmp_path / "data"))
    config = tiny(tmp_path / "run", data=str(copied), workers=workers, cache_images=False)
    if workers:
        config = dataclasses.replace(config, batch_size=1)

    def spoil() -> None:
        if what == "killed":
            (tmp_path / "kill").touch()
        for image in (copied / "train").glob("*.png") if what == "deleted" else ():
            image.unlink()

    of_all = CocoDetection._read

    def read(self: Any, *of_one: Any) -> Any:
        if (tmp_path / "kill").exists() and torch.utils.data.get_worker_info() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return of_all(self, *of_one)

    monkeypatch.setattr(CocoDetection, "_read", read)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "seed_step", spoiled_in_step(2 if workers else 4, spoil))
        with pytest.raises((FileNotFoundError, ValueError), match=message):
            train.train(config)
    said = " ".join(capsys.readouterr().out.split())
    step = load_checkpoint(tmp_path / "run/checkpoint.pt")["step"]
    assert step in (range(2, 9) if workers else [4]), "every step that could be taken is saved"
    assert f"step {step} is saved: `smca train … --resume` goes on from there once the cause is removed" in said
    if workers:
        return  # from here on it is the same
    shutil.copytree(data, copied, dirs_exist_ok=True)
    train.train(tiny(tmp_path / "run", data=str(copied), resume=True))
    require_same_run(tmp_path / "run", whole)


# The folder


@contextmanager
def another_process(claims: Path | None = None) -> Iterator[int]:
    """A process that waits, with the lock of a folder or without, and is killed at the end."""
    reads, writes = os.pipe()
    process = os.fork()
    if not process:
        try:
            with only_run_in(claims) if claims is not None else nullcontext():
                os.write(writes, b"x")
                signal.pause()
        finally:
            os._exit(1)
    try:
        assert os.read(reads, 1) == b"x"
        yield process
    finally:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        os.close(reads)
        os.close(writes)


def test_two_runs_never_write_into_one_folder(tmp_path: Path) -> None:
    """The second says who the first is; a killed one's lock is gone."""
    with another_process(tmp_path) as other:
        held = rf"another run is writing into .* \(process {other} on \S+, since .*\): wait until it has ended"
        for changes in ({}, {"overwrite": True}, {"restartable": True}):
            with pytest.raises(ValueError, match=held):
                train.train(tiny(tmp_path, data="nowhere", **changes))  # before any data are read
    assert (tmp_path / LOCK_FILE).exists(), "as a killed process leaves it"
    with only_run_in(tmp_path):
        assert (tmp_path / LOCK_FILE).read_text().startswith(f"process {os.getpid()} on ")
    assert not list(tmp_path.iterdir())


def test_a_process_that_loads_images_does_not_keep_the_folder(tmp_path: Path) -> None:
    """It may outlive a training process that is killed."""
    reads, writes = os.pipe()
    process = os.fork()
    if not process:
        with only_run_in(tmp_path):
            if loader := os.fork():
                os.write(writes, str(loader).encode())
            signal.pause()
    loader = int(os.read(reads, 99))
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    try:
        with only_run_in(tmp_path):
            pass
    finally:
        os.kill(loader, signal.SIGKILL)


def test_a_folder_that_cannot_be_written_to_is_found_before_the_data_are_read(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for folder, reason in ((tmp_path / "file", "it is a file"), (tmp_path / "file" / "run", "Not a directory")):
        with pytest.raises(
            OSError, match=rf"{folder} cannot be written to \({reason}\): give --output a folder that can"
        ):
            train.train(tiny(folder, data="nowhere"))
    assert (tmp_path / "file").read_text() == "mine"
    if Path("/proc/version").exists():  # a file system that nobody writes to, root neither
        with pytest.raises(OSError, match=r"/proc/run cannot be written to \("):
            train.train(tiny(Path("/proc/run"), data="nowhere"))


def test_a_mistake_leaves_no_folder_behind(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        train.train(tiny(tmp_path / "runs" / "x", data=str(tmp_path / "nowhere")))
    assert not list(tmp_path.iterdir())


def test_a_file_system_without_locks_is_warned_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock.fcntl, "lockf", none)
    message = "without locks .No locks available.: take care that no other run"
    with pytest.warns(UserWarning, match=message), only_run_in(tmp_path / "run"):
        assert (tmp_path / "run").is_dir()


@pytest.mark.parametrize("names", [("decoder.layers.1.linear2.bias",), ("backbone.", "decoder.layers.1.linear2.bias")])
def test_a_gradient_that_is_not_finite_is_named_though_all_are_clipped(
    names: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the first and the last of those that were so when the backward pass ended."""
    spoilt: list[str] = []

    def spoiling(*arguments: Any) -> Any:
        run = set_up(*arguments)
        for name, parameter in run.model.named_parameters():
            if name.startswith(names):
                spoilt.append(name)
                parameter.register_hook(lambda gradient: gradient * (torch.nan if run.step == 1 else 1))
        return run

    monkeypatch.setattr(train, "set_up", spoiling)
    with pytest.raises(NonFiniteError) as caught:
        train.train(tiny(tmp_path))
    others = f" (nor are those of {len(spoilt) - 1} more; the last is {spoilt[-1]})" if len(spoilt) > 1 else ""
    assert f"the gradient of {spoilt[0]} is not finite{others}, though the loss is. Image" in str(caught.value)
    assert (len(spoilt) > 1) == (len(names) > 1)
