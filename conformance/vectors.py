"""Vectors: inputs, expected outputs and bounds as files, so that a port in any language tests itself without Python.

A folder of safetensors files, one per example, and ``index.json``, which lists them. In a file are (names as in `wire`):

    in.<argument>       the arguments: float64 that holds only values of the dtype, int64 or bool; what is not given is not there
    out.<result>        what is expected, float64
    bound.<result>      of the same shape: |got − expected| may be this large, entry by entry
    along.<n>.<result>  or: a direction in which gradients are compared. The sum over all results of (gradient · direction)
    along.<n>           is expected to be this number,
    along_bound.<n>     within this bound.

Its texts (``__metadata__``) are ``operation``, ``dtype``, ``property``, ``recipe``, and arguments that are texts. Of an
assignment, which need not be the only best one, ``out.total`` is the total cost. Bounds hold for log G from (x − c)², not for
the expanded form (docs/method.md §6).

The files are the same however often they are written on one machine; another may round expected outputs otherwise, in their
last digits.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from hypothesis.errors import UnsatisfiedAssumption

from smca.conformance.implementations.oracle import Oracle
from smca.conformance.inputs.anchored import CONFIGURATIONS as MODELS
from smca.conformance.inputs.attention import AttentionInputs, LevelsInputs
from smca.conformance.inputs.matching import BoxInputs, CostInputs, LossInputs
from smca.conformance.properties.anchored import LEARNED_FROM
from smca.conformance.property import Array, Property, Recorder
from smca.conformance.protocol import DTYPES, OPERATIONS, implemented
from smca.conformance.suite import PROPERTIES
from smca.conformance.tolerances import HALVES
from smca.conformance.wire import Tensors, Texts, encode, encode_result, packed
from smca.reference import SPECIFICATION_VERSION

LEFT_OUT = {
    "smca_attention_dropout": "which weights are dropped is up to the implementation; the suite reads it off, vectors cannot",
    "train": "a trainer is tested where it can be called; files of ten steps would be larger than all others together",
}
"""Operation → why it has no vectors."""

SOURCES = (
    "smca_attention.equals_the_oracle",
    "smca_attention_vjp.equals_the_oracle",
    "multi_scale_smca_attention.equals_the_oracle",
    "multi_scale_smca_attention_vjp.equals_the_oracle",
    "match_cost.equals_the_oracle",
    "assign.equals_the_oracle",
    "assign.forbidden_pairs",
    "generalized_box_iou.equals_the_oracle",
    "set_loss.equals_the_oracle",
    "set_loss_vjp.equals_the_oracle",
    "forward.equals_the_oracle",
    "forward_vjp.every_parameter",
    "anchored_forward.equals_the_oracle",
    "anchored_forward_vjp.every_parameter",
    "noised_queries.equals_the_oracle",
    "training_loss.equals_the_oracle",
    "training_loss_vjp.agrees_with_central_differences",
    "log_odds.equals_the_oracle",
    "log_odds_vjp.is_the_softmax_of_the_others",
    "softmax_match_cost.equals_the_oracle",
    "softmax_set_loss.equals_the_oracle",
    "softmax_set_loss_vjp.is_the_derivative",
)
"""The properties that say what every number of a result must be, and how far it may be off."""

_ATTENTION = (
    AttentionInputs(),
    AttentionInputs(1, 1, 3, 4, (2, 3), 0.0, 0.5, "even", "inside", "none", 2),
    AttentionInputs(2, 3, 3, 16, (1, 7), 10.0, 4.0, "one axis", "cell", "none", 3),
    AttentionInputs(1, 2, 17, 32, (9, 5), 100.0, 0.05, "even", "outside", "edge", 4),
    AttentionInputs(3, 1, 1, 33, (7, 8), 1.0, 1000.0, "wide", "inside", "some", 5),
    AttentionInputs(2, 2, 3, 8, (4, 4), 1.0, 0.0, "even", "inside", "all but one", 6),
    AttentionInputs(1, 1, 5, 16, (12, 16), 1e4, 0.5, "even", "far", "edge", 7),
)
_LEVELS = (
    LevelsInputs(_ATTENTION[1], ((2, 3),), "any"),
    LevelsInputs(_ATTENTION[2], ((5, 7), (3, 4), (2, 2)), "softmax"),
    LevelsInputs(_ATTENTION[3], ((9, 5), (1, 1)), "one hot"),
)
_LOSSES = (
    LossInputs(seed=1),
    LossInputs(layers=3, batch=2, queries=7, classes=4, targets=6, filled=0.5, weighting=(0.0, 2.0, 1.0), seed=5),
    LossInputs(layers=1, batch=3, queries=3, classes=1, targets=9, filled=1.0, logit=10.0, seed=6),
    LossInputs(layers=2, batch=2, queries=4, classes=2, targets=3, filled=0.0, seed=7),
    LossInputs(layers=1, batch=1, queries=5, classes=3, targets=0, seed=8),
)
_IMAGES = tuple(
    LossInputs(queries=queries, classes=classes, targets=targets, logit=logit, weighting=weighting, seed=seed)
    for queries, classes, targets, logit, weighting, seed in (
        (1, 1, 1, 1.0, (2.0, 5.0, 2.0), 1),
        (7, 4, 9, 10.0, (0.0, 5.0, 1.0), 2),
        (3, 2, 0, 1.0, (2.0, 5.0, 2.0), 3),
        (4, 3, 5, 1e4, (1.0, 0.25, 0.0), 5),
    )
)
FURTHER: dict[str, tuple[Any, ...]] = {
    "smca_attention": _ATTENTION,
    "smca_attention_vjp": _ATTENTION,
    "multi_scale_smca_attention": _LEVELS,
    "multi_scale_smca_attention_vjp": _LEVELS,
    "match_cost": _IMAGES,
    "softmax_match_cost": _IMAGES,
    "set_loss": _LOSSES,
    "set_loss_vjp": _LOSSES,
    "generalized_box_iou": tuple(
        BoxInputs(first, second, kind, seed)
        for seed, (first, second, kind) in enumerate(
            [
                (3, 4, "random"),
                (2, 5, "same"),
                (5, 1, "apart"),
                (4, 4, "nested"),
                (5, 5, "flat"),
                (3, 3, "large"),
                (3, 3, "tiny"),
            ]
        )
    ),
    "noised_queries": tuple(recipe for recipe in MODELS if dict(recipe.model.options).get("denoising_groups")),
    "assign": tuple(
        CostInputs(rows, columns, kind, seed)
        for seed, (rows, columns, kind) in enumerate(
            [(0, 3, "random"), (4, 4, "ties"), (9, 5, "wide"), (3, 8, "near"), (6, 6, "permuted"), (5, 5, "constant")]
        )
    ),
}
"""Operation → examples besides those that its property always tries: every kind of input."""

SOME = {
    ("forward", "float64"): slice(0, None, 2),
    ("forward", "float32"): slice(1, None, 4),
    ("forward_vjp", "float64"): slice(3, None, 4),
    ("anchored_forward", "float32"): slice(1, None, 3),
    ("anchored_forward_vjp", "float64"): slice(0, 1),
    **{
        (operation, dtype): slice(0, None, 2)
        for operation in ("smca_attention", "smca_attention_vjp")
        for dtype in HALVES
    },
}
"""Operation and dtype → which of the chosen examples are written, of those that are large; every configuration of the model
is, once
at least."""


@dataclass
class _Vector:
    """One call of an operation, and what is expected of it."""

    operation: str
    tensors: Tensors
    texts: Texts
    answer: Tensors
    """What was answered; where expected numbers belong is found by the memory of what is compared with them."""
    directions: int = 0


class _Asked:
    """Answers as the oracle, or with zeros of the right shapes where the oracle has no such operation; remembers the calls."""

    name = "vectors"

    def __init__(self, dtype: str) -> None:
        self.dtypes, self.calls, self._oracle = (dtype,), list[_Vector](), Oracle()

    def __getattr__(self, operation: str) -> Any:
        if operation not in OPERATIONS:
            raise AttributeError(operation)

        def ask(*arguments: Any, dtype: str, **others: Any) -> Any:
            known = implemented(self._oracle, operation)
            answer = getattr(self._oracle, operation)(*arguments, dtype=dtype, **others) if known else None
            answer = _in_memory(answer if known else _ZEROS[operation](*arguments))
            tensors, texts = encode(operation, arguments, others)
            named = {f"in.{name}": values for name, values in tensors.items()}
            texts = {f"in.{name}": text for name, text in texts.items()}
            self.calls.append(_Vector(operation, named, texts, encode_result(operation, answer)))
            return answer

        return ask


def _in_memory(answer: Any) -> Any:
    """The same, every number an array of float64 of its own."""
    if isinstance(answer, dict):
        return {name: _in_memory(value) for name, value in answer.items()}
    if isinstance(answer, (tuple, list)):
        return [_in_memory(value) for value in answer]
    return np.array(answer, dtype=np.float64)


def _zeros_of_model(*arguments: Any) -> dict[str, Array]:
    params = next(value for value in arguments if isinstance(value, dict) and any("." in name for name in value))
    return {name: np.zeros_like(value) for name, value in params.items()}


_ZEROS: dict[str, Any] = {
    "forward_vjp": _zeros_of_model,
    "anchored_forward_vjp": _zeros_of_model,
    "training_loss_vjp": lambda outputs, *_: {
        name: np.zeros_like(outputs[name]) for name in LEARNED_FROM if name in outputs
    },
    "log_odds_vjp": lambda _, z: np.zeros_like(z),
}


@dataclass
class _Noting(Recorder):
    """Notes what a property expects, and judges nothing."""

    asked: _Asked = field(default_factory=lambda: _Asked("float64"))

    def close(self, got: Any, expected: npt.ArrayLike, bound: npt.ArrayLike, what: str) -> None:
        vector, expected = self.asked.calls[-1], np.asarray(expected, dtype=np.float64)
        limit = np.broadcast_to(self.limit(bound), expected.shape)
        place = _place(np.asarray(got), vector.answer)
        if place is None:
            name = _named_in(what, vector)
            vector.tensors |= {f"out.{name}": expected.reshape(()), f"bound.{name}": limit.reshape(())}
            return
        name, offset, strides = place
        whole = vector.answer[name]
        for kind, values in (("out", expected), ("bound", limit)):
            into = vector.tensors.setdefault(f"{kind}.{name}", np.full(whole.shape, np.nan))
            np.ndarray(expected.shape, np.float64, into, offset, strides)[...] = values

    def along(
        self, parts: Sequence[tuple[Any, npt.NDArray[Any]]], expected: float, bound: npt.ArrayLike, what: str
    ) -> None:
        vector = self.asked.calls[-1]
        number, vector.directions = vector.directions, vector.directions + 1
        for gradient, direction in parts:
            place = _place(np.asarray(gradient), vector.answer)
            assert place is not None, what
            vector.tensors[f"along.{number}.{place[0]}"] = direction
        limit = self.limit(bound).reshape(())
        vector.tensors |= {f"along.{number}": np.array(float(expected)), f"along_bound.{number}": limit}

    def all_finite(self, got: Any, what: str) -> None:
        pass


def _place(got: npt.NDArray[Any], answer: Tensors) -> tuple[str, int, tuple[int, ...]] | None:
    """Which tensor of the answer an array is a view of, and where in it: name, offset in bytes, strides."""
    for name, values in answer.items():
        if got.dtype == values.dtype and (got is values or np.shares_memory(got, values)):
            offset = got.__array_interface__["data"][0] - values.__array_interface__["data"][0]
            return name, offset, got.strides
    return None


def _named_in(what: str, vector: _Vector) -> str:
    """The result that words are about: "term class/0, focal"."""
    if vector.operation == "assign":
        return "total"
    for word in re.split(r"[ ,]+", what):
        if word in vector.answer:
            return word
    raise LookupError(f"{vector.operation}: which of {sorted(vector.answer)} is {what!r}?")


def vectors_of(prop: Property, dtype: str) -> list[tuple[str, Tensors, Texts]]:
    """The vectors of a property's chosen examples: operation, tensors and texts of each."""
    made = []
    chosen = prop.always if prop.name == "assign.forbidden_pairs" else (*prop.always, *FURTHER.get(prop.operation, ()))
    for recipe in chosen[SOME.get((prop.operation, dtype), slice(None))]:
        asked = _Asked(dtype)
        try:
            prop.check(asked, recipe, dtype, _Noting(prop, "vectors", dtype, recipe, asked=asked))
        except UnsatisfiedAssumption:
            continue  # no example in this dtype
        for vector in asked.calls:
            texts = {"operation": vector.operation, "dtype": dtype, "property": prop.name, "recipe": repr(recipe)}
            if vector.operation == prop.operation and any(
                name.startswith(("out.", "along.")) for name in vector.tensors
            ):
                made.append((vector.operation, vector.tensors, vector.texts | texts))
    return made


def write_vectors(folder: Path) -> list[str]:
    """Write all vectors and their index.

    Args:
        folder: that is made, or empty, or holds vectors, which are replaced.

    Returns:
        The names of the files, without the index.

    Raises:
        ValueError: the folder holds something else.
    """
    folder.mkdir(parents=True, exist_ok=True)
    others = [path.name for path in folder.iterdir() if path.name != "index.json" and path.suffix != ".safetensors"]
    if others:
        raise ValueError(f"--write-vectors {folder}: expected an empty folder or one of vectors, it holds {others[0]}")
    for path in folder.iterdir():
        path.unlink()
    entries: list[dict[str, Any]] = []
    for name in SOURCES:
        prop = next(prop for prop in PROPERTIES if prop.name == name)
        for dtype in DTYPES if prop.dtypes is None else prop.dtypes:
            for operation, tensors, texts in vectors_of(prop, dtype):
                number = sum(entry["operation"] == operation and entry["dtype"] == dtype for entry in entries)
                file = f"{operation}.{dtype}.{number:02}.safetensors"
                (folder / file).write_bytes(packed(tensors, texts))
                entries.append(
                    {"file": file, "operation": operation, "dtype": dtype, "property": name, "why": prop.equation}
                )
    document = {"specification": SPECIFICATION_VERSION, "left_out": LEFT_OUT, "vectors": entries}
    (folder / "index.json").write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return [entry["file"] for entry in entries]
