"""What a run can start from: found, read as data (no code in it is run), and brought into this project's names."""

from __future__ import annotations

import json
import re
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from smca.gpu.config_json import cut
from smca.gpu.files import CONFIG_FILE, WEIGHTS_FILE, instead, open_model, refuse_pointer, require_finite
from smca.gpu.model.detector import check_saved
from smca.gpu.weights.detr import is_detr, read_detr, tensors_of
from smca.gpu.weights.hf_detr import read_transformers
from smca.gpu.weights.source import Source

BIN_FILE = "pytorch_model.bin"
OURS = "a model of this project"
UNDERSTOOD = (
    "a model or run of this project, DETR's or the SMCA authors' checkpoint (.pth), or DETR or Conditional DETR of "
    "transformers"
)


def open_source(name: str) -> Source:
    """Find a trained model and bring it into this project's names.

    Args:
        name: folder of a model or a run, a checkpoint, or a repository on the Hugging Face hub. What is in it says whose it
            is: this project's; SMCA of its authors or DETR (a .pth file); DETR or Conditional DETR of transformers
            (config.json with model.safetensors, or with pytorch_model.bin).

    Raises:
        ValueError: nothing there, damaged, holds code, or another model; says which, and what to do.
    """
    path = Path(name)
    if path.is_dir():
        return _open_folder(name, path) if (path / CONFIG_FILE).is_file() else _open_own(name)
    if path.is_file():
        half = path.name in (CONFIG_FILE, WEIGHTS_FILE)  # which open_model refuses
        return _open_own(name) if half else _open_file(name, path)
    if hint := instead(path):
        raise ValueError(f"there is no {path}: {hint}")
    return _open_folder(name, _from_hub(name))


def _open_own(name: str) -> Source:
    saved = open_model(name)
    check_saved(saved)
    return Source(name, OURS, saved.config, saved.read())


def _open_folder(name: str, folder: Path) -> Source:
    """One with a config.json: transformers' has a model_type."""
    config = folder / CONFIG_FILE
    refuse_pointer(config)
    text = config.read_bytes().decode("utf-8", "replace")
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict) or "model_type" not in values:
        return _open_own(str(folder))
    return read_transformers(name, text, lambda: _weights_of_transformers(folder))


def _weights_of_transformers(folder: Path) -> dict[str, Tensor]:
    weights = folder / WEIGHTS_FILE
    if weights.is_file():
        refuse_pointer(weights)
        try:
            return require_finite(load_file(weights), weights)
        except SafetensorError as error:
            raise ValueError(
                f"{weights} is cut, damaged or not a safetensors file ({cut(error)}): copy or download it again"
            ) from error
    if not (folder / BIN_FILE).is_file():
        raise ValueError(
            f"{folder} holds no weights: expected {WEIGHTS_FILE} or {BIN_FILE} beside {CONFIG_FILE}, in one piece. "
            "Save the model again, or download it whole"
        )
    found = dict(tensors_of(_unpickled(folder / BIN_FILE)))
    return require_finite(found, folder / BIN_FILE)


def _open_file(name: str, path: Path) -> Source:
    """A checkpoint: this project's says its format."""
    refuse_pointer(path)
    state = _unpickled(path)
    if isinstance(state, dict) and "format" in state:
        return _open_own(name)
    weights = dict(tensors_of(state))
    if not is_detr(weights):
        held = ", ".join(map(str, state)) if isinstance(state, dict) else type(state).__name__
        raise ValueError(
            f"{path} is a checkpoint of another model (it holds {cut(held, 120)}): expected {UNDERSTOOD}. Give one of those"
        )
    strange = [key for key, value in weights.items() if value.layout != torch.strided or not value.is_floating_point()]
    strange = [key for key in strange if not key.endswith("num_batches_tracked")]
    if strange:
        raise ValueError(
            f"{path}: expected plain tensors of floating-point numbers, got {cut(strange[0])} as "
            f"{weights[strange[0]].dtype}: it is quantised or sparse; give the checkpoint that it was made from"
        )
    return read_detr(name, require_finite(weights, path), state.get("args"))


def _unpickled(path: Path) -> Any:
    """What torch.save wrote, if it is tensors and plain values, and the options of a command line (argparse.Namespace), which DETR
    keeps beside them."""
    try:
        with torch.serialization.safe_globals([Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged bytes end in errors of any type
        found = re.search(r"(?:GLOBAL|class|function) ([\w.]+)", str(error).partition("Trying to")[2] or str(error))
        if "Weights only load failed" in str(error) and found:
            raise ValueError(
                f"{path} holds code, {cut(found[1])}, which is not run: expected tensors, plain values and "
                "argparse.Namespace. If you trust it, load it in Python and save its state_dict() alone"
            ) from error
        raise ValueError(
            f"{path} is cut, damaged or no checkpoint ({type(error).__name__}): expected {UNDERSTOOD}. Take another copy"
        ) from error


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        folder = Path(snapshot_download(name, allow_patterns=[CONFIG_FILE, WEIGHTS_FILE]))
        if not (folder / WEIGHTS_FILE).is_file():
            folder = Path(snapshot_download(name, allow_patterns=[CONFIG_FILE, BIN_FILE]))
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise ValueError(
            f"there is no {name}, and no such repository can be reached on the Hugging Face hub: expected "
            f"{UNDERSTOOD}. Check the name and the connection"
        ) from error
    if not (folder / CONFIG_FILE).is_file():
        raise ValueError(f"{name} on the Hugging Face hub has no {CONFIG_FILE}: expected {UNDERSTOOD}")
    return folder
