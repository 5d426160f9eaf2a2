"""Arguments and results of operations as named tensors, and safetensors files of them: how another language is asked, and tested.

A structure becomes tensors whose names say where in it they were: of ``targets``, ``targets.labels``; of the second level,
``levels.1.k``; of a dictionary, its key. What is None has no tensor. What is no number (a configuration, a word) is text: a
configuration as JSON. Results have the names of ``RESULTS``.

A safetensors file is 8 bytes with the length n of its header, little-endian; n bytes of JSON, name → dtype, shape and
``data_offsets``, and under ``__metadata__`` names → text; then the data, row-major, little-endian, without holes. Here what has
eight bytes per number comes first and each kind in the order of names, and the header is padded with spaces to a multiple of 8, so
that every number is where a processor likes it.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Tensors = dict[str, Array]
Texts = dict[str, str]

_ATTENTION = ("q", "k", "v", "center_xy", "precision_xy", "size", "key_padding_mask")
_LEVELS = ("q", "levels", "level_weights")
_COST = ("logits", "boxes", "labels", "target_boxes", "weights")
_LOSS = ("logits", "boxes", "targets", "weights")
_SOFTMAX_LOSS = ("z", "boxes", "targets", "weights")
_MODEL = ("params", "features", "valid_sizes", "config")
_TRAINING = ("outputs", "targets", "weights", "classification")
ARGUMENTS: dict[str, tuple[str, ...]] = {
    "smca_attention": _ATTENTION,
    "smca_attention_vjp": ("grad_out", *_ATTENTION),
    "smca_attention_dropout": ("grad_out", *_ATTENTION, "rate", "seed"),
    "multi_scale_smca_attention": _LEVELS,
    "multi_scale_smca_attention_vjp": ("grad_out", *_LEVELS),
    "match_cost": _COST,
    "assign": ("cost",),
    "generalized_box_iou": ("boxes1", "boxes2"),
    "set_loss": _LOSS,
    "set_loss_vjp": _LOSS,
    "forward": _MODEL,
    "forward_vjp": ("grad_logits", "grad_boxes", *_MODEL),
    "anchored_forward": (*_MODEL, "further"),
    "anchored_forward_vjp": ("gradients", *_MODEL, "further"),
    "noised_queries": ("targets", "noise"),
    "training_loss": _TRAINING,
    "training_loss_vjp": _TRAINING,
    "log_odds": ("z",),
    "log_odds_vjp": ("grad_out", "z"),
    "softmax_match_cost": _COST,
    "softmax_set_loss": _SOFTMAX_LOSS,
    "softmax_set_loss_vjp": _SOFTMAX_LOSS,
    "train": ("params", "steps", "settings"),
}
"""Operation → the names of its arguments, in their order."""

_GRADIENTS = ("dq", "dk", "dv", "dcenter_xy", "dprecision_xy")
NAMED = "by name"
"""Of an operation whose result is a dictionary of arrays."""
RESULTS: dict[str, str | tuple[str, ...]] = {
    "smca_attention": "out",
    "smca_attention_vjp": _GRADIENTS,
    "smca_attention_dropout": ("out", *_GRADIENTS),
    "multi_scale_smca_attention": "out",
    "multi_scale_smca_attention_vjp": ("dq", "levels", "dlevel_weights"),
    "match_cost": "cost",
    "assign": ("rows", "cols"),
    "generalized_box_iou": "giou",
    "set_loss": NAMED,
    "set_loss_vjp": ("dlogits", "dboxes"),
    "forward": NAMED,
    "forward_vjp": NAMED,
    "anchored_forward": NAMED,
    "anchored_forward_vjp": NAMED,
    "noised_queries": ("box_logits", "labels", "sees"),
    "training_loss": NAMED,
    "training_loss_vjp": NAMED,
    "log_odds": "logits",
    "log_odds_vjp": "dz",
    "softmax_match_cost": "cost",
    "softmax_set_loss": NAMED,
    "softmax_set_loss_vjp": ("dz", "dboxes"),
    "train": NAMED,
}
"""Operation → the name of its result, the names of the parts of a tuple, or ``NAMED``. ``levels`` is a list, by level, of
four gradients,
which are named as those of `smca_attention_vjp`."""

KINDS = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "I64": "<i8",
    "I32": "<i4",
    "U8": "|u1",
    "BOOL": "|b1",
}
"""safetensors' names of dtypes → NumPy's."""


def encode(operation: str, arguments: Sequence[Any], others: Mapping[str, Any]) -> tuple[Tensors, Texts]:
    """Arguments of an operation as tensors and texts. `others`: further ones, by name."""
    names = ARGUMENTS[operation]
    if len(arguments) != len(names):
        raise ValueError(f"{operation}: expected the arguments {', '.join(names)}, got {len(arguments)}")
    tensors, texts = Tensors(), Texts()
    for name, value in [*zip(names, arguments, strict=True), *others.items()]:
        for part, leaf in leaves(name, value):
            if isinstance(leaf, str):
                texts[part] = leaf
            else:
                tensors[part] = np.asarray(leaf)
    return tensors, texts


def leaves(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """The arrays, numbers and texts of a structure, each with the name of where it is."""
    if value is None:
        return
    if isinstance(value, str):
        yield name, value
    elif _is_configuration(value):
        yield name, json.dumps(dataclasses.asdict(value), sort_keys=True)
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from leaves(f"{name}.{key}", item)
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from leaves(f"{name}.{field.name}", getattr(value, field.name))
    elif hasattr(value, "_fields"):
        for field_name in value._fields:
            yield from leaves(f"{name}.{field_name}", getattr(value, field_name))
    elif isinstance(value, (list, tuple)) and not all(isinstance(item, (int, float)) for item in value):
        for number, item in enumerate(value):
            yield from leaves(f"{name}.{number}", item)
    else:
        yield name, value


def _is_configuration(value: Any) -> bool:
    """Whether a structure holds anything but arrays."""
    return dataclasses.is_dataclass(value) and not any(
        isinstance(getattr(value, field.name), np.ndarray) for field in dataclasses.fields(value)
    )


def encode_result(operation: str, result: Any) -> Tensors:
    """A result as tensors."""
    names = RESULTS[operation]
    if names == NAMED:
        return {name: np.asarray(value) for name, value in result.items()}
    if isinstance(names, str):
        return {names: np.asarray(result)}
    tensors = Tensors()
    for name, value in zip(names, result, strict=True):
        if name == "levels":
            for level, gradients in enumerate(value):
                parts = zip(_GRADIENTS[1:], gradients, strict=True)
                tensors |= {f"levels.{level}.{part}": np.asarray(gradient) for part, gradient in parts}
        else:
            tensors[name] = np.asarray(value)
    return tensors


def decode_result(operation: str, tensors: Tensors) -> Any:
    """A result from its tensors.

    Raises:
        ValueError: a tensor is missing.
    """
    names = RESULTS[operation]
    if names == NAMED:
        return dict(tensors)
    if isinstance(names, str):
        return _named(tensors, names, operation)
    parts: list[Any] = []
    for name in names:
        if name == "levels":
            count = len({key.split(".")[1] for key in tensors if key.startswith("levels.")})
            parts.append(
                [
                    tuple(_named(tensors, f"levels.{level}.{part}", operation) for part in _GRADIENTS[1:])
                    for level in range(count)
                ]
            )
        else:
            parts.append(_named(tensors, name, operation))
    return tuple(parts)


def _named(tensors: Tensors, name: str, operation: str) -> Array:
    if name not in tensors:
        raise ValueError(f"{operation}: expected a tensor {name!r} in the answer, got {sorted(tensors) or 'none'}")
    return tensors[name]


def packed(tensors: Mapping[str, Array], texts: Mapping[str, str]) -> bytes:
    """A safetensors file. The same tensors and texts give the same bytes."""
    header: dict[str, Any] = {"__metadata__": dict(sorted(texts.items()))} if texts else {}
    body = bytearray()
    plain = {name: _plain(np.asarray(values)) for name, values in tensors.items()}
    for name, values in sorted(plain.items(), key=lambda item: (-item[1].itemsize, item[0])):
        kind = next(kind for kind, dtype in KINDS.items() if np.dtype(dtype) == values.dtype)
        start = len(body)
        body.extend(values.astype(KINDS[kind]).tobytes())
        header[name] = {"dtype": kind, "shape": list(values.shape), "data_offsets": [start, len(body)]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=True).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + bytes(body)


def _plain(values: Array) -> Array:
    """In one of the dtypes that ports read: float64, int64 or bool."""
    if values.dtype == np.bool_:
        return values
    return values.astype(np.int64 if values.dtype.kind in "iu" else np.float64)


def unpacked(data: bytes) -> tuple[Tensors, Texts]:
    """Tensors and texts of a safetensors file.

    Raises:
        ValueError: it is none, or it holds a dtype that NumPy lacks.
    """
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 + length or length < 2:
        raise ValueError(f"expected a safetensors file, got {len(data)} bytes whose header should have {length}")
    try:
        header = json.loads(data[8 : 8 + length])
        texts = header.pop("__metadata__", {})
        body = memoryview(data)[8 + length :]
        tensors = {name: _tensor(name, entry, body) for name, entry in header.items()}
    except (UnicodeDecodeError, AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"expected a safetensors file, got a header that cannot be read: {error!r}") from error
    return tensors, texts


def _tensor(name: str, entry: dict[str, Any], body: memoryview) -> Array:
    if entry["dtype"] not in KINDS:
        raise ValueError(f"tensor {name!r}: expected a dtype of {', '.join(KINDS)}, got {entry['dtype']!r}")
    start, end = entry["data_offsets"]
    dtype, shape = np.dtype(KINDS[entry["dtype"]]), tuple(entry["shape"])
    if end - start != math.prod(shape) * dtype.itemsize or not 0 <= start <= end <= len(body):
        raise ValueError(
            f"tensor {name!r}: {shape} of {entry['dtype']} does not fit bytes {start} to {end} of {len(body)}"
        )
    return np.frombuffer(body[start:end], dtype).reshape(shape).copy()
