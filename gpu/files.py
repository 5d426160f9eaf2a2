"""Files that a run leaves: checkpoints, with all that training needs to go on, and models, with what prediction needs.

    runs/x/checkpoint.pt              before the first step, after every epoch, every few minutes, and when the run is stopped
    runs/x/checkpoint.previous.pt     the one before it, in case that one is damaged
    runs/x/checkpoint.shards.0/…      what is too much for one process, of either of the two (smca.gpu.shards)
    runs/x/model/config.json          of the best evaluation so far
    runs/x/model/model.safetensors
    runs/x/model_last/…               before every evaluation, and when the run is stopped

Every file is replaced in one step. What is read may be cut, damaged or somebody else's: it is checked before it is used, no code
in it is run, and a ValueError names the file.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from smca.gpu.config import ModelConfig
from smca.gpu.config_json import cut
from smca.gpu.shards import check_shards, put_back, read_shards

CHECKPOINT_FILE = "checkpoint.pt"
PREVIOUS_FILE = "checkpoint.previous.pt"
CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
MODEL_FOLDER = "model"
"""Of a run: the model of its best evaluation."""
LAST_FOLDER = "model_last"
"""Of a run: the model as it was last evaluated, or when the run was stopped."""
FORMAT = 2
"""Layout of the checkpoint; raised when it changes."""

_CHECKPOINT_KEYS: dict[str, type | tuple[type, ...]] = {
    "config": str,
    "model": dict,
    "average": (dict, type(None)),
    "optimizer": dict,
    "step": int,
    "epoch": int,
    "batch": int,
    "sum_of_losses": Tensor,
    "logged": dict,
    "total_steps": int,
    "train_seconds": (int, float),
}
"""What every checkpoint holds, and of which type."""
_OPTIONAL_KEYS: dict[str, type | tuple[type, ...]] = {
    "model_config": str,
    "shards": dict,
    "settings": dict,
    "scaler": dict,
    "skipped": tuple,
    "data": dict,
    "evaluate_now": bool,
    "data_seconds": (int, float),
    "loss": (int, float),
    "images_per_second": (int, float),
    "start": str,
}
"""What it may hold."""
_FLOATS = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}
"""What weights may be, by safetensors' names."""
_LFS_POINTER = b"version https://git-lfs"


def write_atomically(path: Path, write: Callable[[BinaryIO], object], *, keep: Path | None = None) -> None:
    """Let `write` fill a neighbour of `path`, then put it in place: a reader sees the old file or the new, never half.

    Args:
        path: the file.
        write: is given the open neighbour.
        keep: where the old file goes; None = it is replaced.

    Raises:
        OSError: it could not be written; says why, and how much space is left. The old file is untouched.
    """
    partial = path.with_name(path.name + ".partial")
    with naming(path):
        try:
            with partial.open("wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            if keep is not None and path.exists():
                os.replace(path, keep)
            os.replace(partial, path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
    with contextlib.suppress(OSError):  # a system whose folders are no files has no such thing to put on disk
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """An error of writing becomes an OSError that says what could not be written, why, and how much space is left."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        # torch.save turns a write that came to nothing into a RuntimeError about positions in the file.
        if isinstance(error, OSError) or "unexpected pos" in str(error):
            raise OSError(f"{path} could not be written: {_reason(error)}; {_free_space(path.parent)}") from error
        raise


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write `state` (tensors and plain values) to `path` atomically; the one before it becomes PREVIOUS_FILE."""
    previous = path.with_name(PREVIOUS_FILE)
    write_atomically(path, lambda file: torch.save({"format": FORMAT, **state}, file), keep=previous)


def load_latest_checkpoint(path: Path) -> dict[str, Any]:
    """The checkpoint at `path`, or, with a warning, the one before it, if that is missing or damaged.

    Raises:
        ValueError: neither can be read; says why not of the first.
    """
    previous = path.with_name(PREVIOUS_FILE)
    try:
        return load_checkpoint(path)
    except ValueError as error:
        if not previous.is_file():
            raise
        try:
            state = load_checkpoint(previous)
        except ValueError:
            raise error from None
        reason = str(error) if path.is_file() else f"there is no {path}"
        warnings.warn(f"{reason}. Going on from the one before it, {previous}, of step {state['step']}", stacklevel=2)
        return state


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read what ``save_checkpoint`` wrote. Only tensors and plain values are unpickled, never code.

    Raises:
        ValueError: no file, not a checkpoint of this program, or damaged.
    """
    if not path.is_file():
        raise ValueError(f"no checkpoint at {path}: start without --resume, or point --output at the run to go on with")
    refuse_pointer(path)
    try:
        state: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged bytes end in errors of any type
        raise ValueError(
            f"{path} is damaged or is not a checkpoint of smca train ({type(error).__name__}): take another copy, or remove "
            "it and start anew"
        ) from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise ValueError(f"{path} was not written by this version of smca train: start anew with --overwrite")
    kinds = _CHECKPOINT_KEYS | {k: kind for k, kind in _OPTIONAL_KEYS.items() if k in state}
    wrong = [k for k, kind in kinds.items() if k not in state or not isinstance(state[k], kind)]
    wrong += [k for k in ("model", "average") if k not in wrong and not _are_weights(state[k])]
    wrong += [k for k in ("step", "epoch", "batch") if k not in wrong and state[k] < 0]
    if "logged" not in wrong and not all(isinstance(v, float) for v in state["logged"].values()):
        wrong.append("logged")
    if wrong:
        raise ValueError(
            f"{path} is damaged or is not a checkpoint of smca train: {', '.join(wrong)} missing or of the wrong type; "
            "take another copy, or remove it and start anew"
        )
    ModelConfig.from_json(state["config"], str(path))
    if "shards" in state:
        check_shards(path.parent, state["shards"], path)
    return state


def with_shards(state: dict[str, Any], path: Path) -> dict[str, Any]:
    """A checkpoint with all tensors, those too that several processes wrote; `state` itself, in place.

    Raises:
        ValueError: as ``load_checkpoint``.
    """
    if "shards" in state:
        put_back(state, read_shards(path.parent / state.pop("shards")["folder"]))
    return state


@dataclass(frozen=True)
class SavedModel:
    """A model as it was found: what it is, which weights there are, and how to read them."""

    config: ModelConfig
    config_source: str
    """File of the configuration, for messages."""
    weights_source: str
    """File of the weights, for messages."""
    layout: Mapping[str, tuple[tuple[int, ...], bool]]
    """Name of each weight → its shape, and whether it is a floating-point number. Known without reading the weights."""
    read: Callable[[], dict[str, Tensor]]
    """The weights, on the CPU.

    Raises ValueError where one is not finite."""


def write_model(directory: Path, config: ModelConfig, weights: Mapping[str, Tensor]) -> None:
    """Write config.json and model.safetensors into `directory`; the configuration last, as it makes the model complete.

    Raises:
        OSError: as ``write_atomically``.
    """
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {name: value.detach().cpu().contiguous() for name, value in weights.items()}
    write_atomically(directory / WEIGHTS_FILE, lambda file: file.write(save(tensors)))
    _write_config(directory, config)


def write_thresholds(directory: Path, thresholds: tuple[float | None, ...]) -> None:
    """Put the score thresholds of the classes into config.json of the model in `directory`; nothing else is changed.

    Raises:
        ValueError: a configuration that is damaged or has other classes.
        OSError: as ``write_atomically``.
    """
    path = directory / CONFIG_FILE
    config = ModelConfig.from_json(path.read_bytes().decode("utf-8", "replace"), str(path))
    _write_config(directory, dataclasses.replace(config, score_thresholds=thresholds))


def _write_config(directory: Path, config: ModelConfig) -> None:
    write_atomically(directory / CONFIG_FILE, lambda file: file.write((config.to_json() + "\n").encode()))


def folder_with_config(name: str | Path) -> Path:
    """The folder whose config.json ``open_model`` reads for `name`, to write into it.

    Raises:
        ValueError: there is none: a checkpoint, or a repository on the Hugging Face hub; says what to give instead.
    """
    folder = _complete_folder(Path(name))
    if folder is None:
        raise ValueError(
            f"{name} has no {CONFIG_FILE} to write into: give the folder of a model or of a run with a model; "
            f"`smca convert-weights {name} FOLDER` makes one of a checkpoint or of a repository on the Hugging Face hub"
        )
    return folder


def _complete_folder(path: Path) -> Path | None:
    """The folder of the model that `path` is or, of a run, has: the best one, otherwise the last."""
    candidates = (path, path / MODEL_FOLDER, path / LAST_FOLDER)
    return next((folder for folder in candidates if _is_complete(folder)), None)


def open_model(name: str | Path) -> SavedModel:
    """Find a model and read its configuration and the shapes of its weights.

    Args:
        name: folder of a model, folder of a run (its best model, otherwise its last, otherwise its checkpoint), a checkpoint, or a
            repository on the Hugging Face hub.

    Raises:
        ValueError: nothing there (names what is there instead), or files that are damaged or somebody else's.
    """
    path = Path(name)
    if path.is_dir():
        if folder := _complete_folder(path):
            return _open_folder(folder)
        if (path / CHECKPOINT_FILE).is_file():
            return _open_checkpoint(path / CHECKPOINT_FILE)
        absent = [f for f in (CONFIG_FILE, WEIGHTS_FILE) if not (path / f).is_file()]
        raise ValueError(
            f"{path} lacks {' and '.join(absent)}: {instead(path) or 'give a folder written by save_pretrained (runs/…/model)'}"
        )
    if path.is_file():
        if path.name in (CONFIG_FILE, WEIGHTS_FILE):
            raise ValueError(f"{path} is half of a model: give its folder, {path.parent}")
        return _open_checkpoint(path)
    if hint := instead(path):
        raise ValueError(f"there is no {path}: {hint}")
    return _open_folder(_from_hub(str(name)))


def _is_complete(folder: Path) -> bool:
    return all((folder / file).is_file() for file in (CONFIG_FILE, WEIGHTS_FILE))


def instead(path: Path) -> str:
    """In words, what to give in place of `path`, of a run, which is not there or not complete; "" if there is nothing beside it."""
    for folder in (MODEL_FOLDER, LAST_FOLDER):
        if _is_complete(path.parent / folder):
            return f"give {path.parent / folder}"
    if (path.parent / CHECKPOINT_FILE).is_file():
        return f"give {path.parent / CHECKPOINT_FILE}, which the run has left (it is not finished)"
    return ""


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        folder = Path(snapshot_download(name, allow_patterns=[CONFIG_FILE, WEIGHTS_FILE]))
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise ValueError(
            f"{name} is neither a folder nor a reachable repository on the Hugging Face hub, nor a checkpoint: check the name "
            "and the connection"
        ) from error
    if not _is_complete(folder):
        raise ValueError(
            f"{name} on the Hugging Face hub holds no model of ours: it needs {CONFIG_FILE} and {WEIGHTS_FILE}"
        )
    return folder


def _open_folder(folder: Path) -> SavedModel:
    config_path, weights_path = folder / CONFIG_FILE, folder / WEIGHTS_FILE
    refuse_pointer(config_path)
    refuse_pointer(weights_path)
    config = ModelConfig.from_json(config_path.read_bytes().decode("utf-8", "replace"), str(config_path))
    try:
        with safe_open(weights_path, "pt") as file:
            parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - it is no dictionary
            layout = {k: (tuple(v.get_shape()), v.get_dtype() in _FLOATS) for k, v in parts.items()}
    except SafetensorError as error:
        raise _damaged(weights_path, error) from error

    def read() -> dict[str, Tensor]:
        try:
            weights = load_file(weights_path)
        except SafetensorError as error:
            raise _damaged(weights_path, error) from error
        return require_finite(weights, weights_path)

    return SavedModel(config, str(config_path), str(weights_path), layout, read)


def _open_checkpoint(path: Path) -> SavedModel:
    state = with_shards(load_checkpoint(path), path)
    weights: dict[str, Tensor] = state["average"] or state["model"]
    # "model_config" names no published weights, whose repository may have said what "config" leaves open.
    text: str = state.get("model_config", state["config"])
    layout = {k: (tuple(v.shape), v.dtype in _FLOATS.values()) for k, v in weights.items()}
    return SavedModel(
        ModelConfig.from_json(text, str(path)), str(path), str(path), layout, lambda: require_finite(weights, path)
    )


def _are_weights(value: Any) -> bool:
    """Whether it is None, or plain tensors by name."""
    return value is None or all(
        isinstance(k, str) and isinstance(v, Tensor) and v.layout == torch.strided and v.device.type == "cpu"
        for k, v in value.items()
    )


def require_finite(weights: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """`weights`, read from `path`; a ValueError names one that has NaN or infinite values."""
    bad = sorted(name for name, value in weights.items() if not bool(torch.isfinite(value).all()))
    if bad:
        raise ValueError(
            f"{path}: {cut(bad[0])} has NaN or infinite values"
            + (f" (and {len(bad) - 1} more weights have)" if len(bad) > 1 else "")
            + ": the file is damaged or the training went wrong; take another checkpoint or copy"
        )
    return weights


def refuse_pointer(path: Path) -> None:
    """Raise ValueError for a text that a clone without Git LFS has in place of a large file."""
    with path.open("rb") as file:
        if file.read(len(_LFS_POINTER)) == _LFS_POINTER:
            raise ValueError(f"{path} is a Git LFS pointer, not the file itself: run `git lfs pull` in its repository")


def _damaged(path: Path, error: Exception) -> ValueError:
    return ValueError(
        f"{path} is cut, damaged or not a safetensors file ({cut(error)}): copy or download it again, or take the run's "
        f"{CHECKPOINT_FILE}"
    )


def _reason(error: BaseException) -> str:
    """Why a write failed: the operating system's words, if it was asked."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    return (cause.strerror if cause is not None else None) or cut(error, 200)


def _free_space(folder: Path) -> str:
    try:
        return f"{shutil.disk_usage(folder).free / 1e6:,.0f} MB are free in {folder}"
    except OSError:
        return f"there is no folder {folder}"
