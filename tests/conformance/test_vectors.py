"""Vectors: what is in the files, who can read them, and the numbers that a version of the specification stands for."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from smca.conformance.implementations.registry import implementation_of
from smca.conformance.inputs.model import CONFIGURATIONS
from smca.conformance.protocol import OPERATIONS, implemented
from smca.conformance.suite import PROPERTIES
from smca.conformance.vectors import LEFT_OUT, vectors_of, write_vectors
from smca.conformance.wire import decode_result, encode_result, leaves, packed, unpacked
from smca.reference import SPECIFICATION_VERSION

ROOT = Path(__file__).parents[2]
NUMBERS = Path(__file__).with_name("specification_numbers.json")
READER = ROOT / "conformance" / "examples" / "read_vectors.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("vectors")
    write_vectors(made)
    return made


def test_every_operation_has_vectors_under_twenty_megabytes(folder: Path) -> None:
    index = json.loads((folder / "index.json").read_text(encoding="utf-8"))
    assert index["specification"] == SPECIFICATION_VERSION
    written = {entry["operation"] for entry in index["vectors"]}
    assert written | set(LEFT_OUT) == set(OPERATIONS)
    assert not written & set(LEFT_OUT)
    assert sorted(entry["file"] for entry in index["vectors"]) == sorted(p.name for p in folder.glob("*.safetensors"))
    assert sum(path.stat().st_size for path in folder.iterdir()) < 20e6


def test_every_configuration_of_the_model_is_in_one(folder: Path) -> None:
    recipes = [unpacked(path.read_bytes())[1]["recipe"] for path in folder.glob("forward*.safetensors")]
    assert {repr(recipe) for recipe in CONFIGURATIONS} == set(recipes)


def test_every_number_has_a_bound(folder: Path) -> None:
    for path in folder.glob("*.safetensors"):
        tensors, texts = unpacked(path.read_bytes())
        results = [name[4:] for name in tensors if name.startswith("out.")]
        along = [name[6:] for name in tensors if name.startswith("along.") and name.count(".") == 1]
        assert results or along, path.name
        for name in results:
            assert tensors[f"bound.{name}"].shape == tensors[f"out.{name}"].shape
            assert (tensors[f"bound.{name}"] > 0).all(), path.name  # also: not NaN, so that every number is compared
            assert not np.isnan(tensors[f"out.{name}"]).any(), path.name
        for number in along:
            assert tensors[f"along_bound.{number}"] > 0
            assert any(name.startswith(f"along.{number}.") for name in tensors)
        assert {"operation", "dtype", "property", "recipe"} <= set(texts)


def test_a_second_time_gives_the_same_bytes() -> None:
    prop = next(prop for prop in PROPERTIES if prop.name == "smca_attention_vjp.equals_the_oracle")
    one, two = ([packed(*vector[1:]) for vector in vectors_of(prop, "bfloat16")] for _ in range(2))
    assert one == two
    assert len(one) > 3


def test_other_files_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work", encoding="utf-8")
    with pytest.raises(ValueError, match=r"expected an empty folder or one of vectors, it holds thesis\.tex"):
        write_vectors(tmp_path)
    assert (tmp_path / "thesis.tex").exists()


def answers_of(implementation: Any) -> dict[tuple[str, str], Any]:
    """An implementation as the reader takes it: arguments by name, from tensors and texts of a vector."""

    def answering(operation: str) -> Any:
        def answer(tensors: dict[str, Any], dtype: str) -> dict[str, Any]:
            arguments = {name.removeprefix("in."): value for name, value in tensors.items() if name.startswith("in.")}
            if operation == "smca_attention_vjp":
                names = ("grad_out", "q", "k", "v", "center_xy", "precision_xy", "size")
            else:
                names = ("boxes1", "boxes2")
            given = [tuple(arguments[n].tolist()) if n == "size" else arguments[n] for n in names]
            mask = [arguments.get("key_padding_mask")] if "size" in names else []
            return encode_result(operation, getattr(implementation, operation)(*given, *mask, dtype=dtype))

        return answer

    operations = ("smca_attention_vjp", "generalized_box_iou")
    return {(operation, dtype): answering(operation) for operation in operations for dtype in implementation.dtypes}


@pytest.mark.parametrize(
    ("operation", "name"), [("smca_attention_vjp", "oracle"), ("generalized_box_iou", "criterion-scipy")]
)
def test_the_reader_of_thirty_lines_tells_right_from_wrong(folder: Path, operation: str, name: str) -> None:
    reader = runpy.run_path(str(READER))
    implementation = implementation_of(name)
    assert implemented(implementation, operation)
    checked = 0
    for (of, dtype), answer in answers_of(implementation).items():
        for path in folder.glob(f"{of}.{dtype}.*") if of == operation else ():
            tensors, _ = reader["read"](path)
            got = answer(tensors, dtype)
            assert all(multiple <= 1 for _, multiple in reader["differences"](tensors, got)), path.name
            wrong = {result: value + 0.01 + 0.1 * np.abs(value) for result, value in got.items()}
            multiples = [multiple for _, multiple in reader["differences"](tensors, wrong)]
            checked += all(multiple > 1 for multiple in multiples)
    assert checked > 3


def test_the_reader_runs_as_it_is(folder: Path) -> None:
    ran = subprocess.run([sys.executable, str(READER), str(folder)], capture_output=True, text=True, check=True)
    assert ran.stdout.count(" ok, ") == 8
    assert "WRONG" not in ran.stdout
    code = [line for line in READER.read_text(encoding="utf-8").split("def log_odds")[0].splitlines() if line.strip()]
    assert len(code) <= 30


def test_a_version_of_the_specification_stands_for_its_numbers(folder: Path) -> None:
    """To take new numbers on purpose: raise SPECIFICATION_VERSION (reference/__init__.py), then SMCA_NEW_NUMBERS=1 pytest …"""
    numbers = {}
    for path in sorted(folder.glob("*.float64.*")):
        tensors, _ = unpacked(path.read_bytes())
        results = [tensors[key] for key in sorted(tensors) if key.startswith(("out.", "along."))]
        finite = [values[np.isfinite(values)].astype(np.float64) for values in results]
        weighted = sum(float((np.cos(np.arange(v.size)) * v.ravel()).sum()) for v in finite)
        size = sum(float(np.abs(v).sum()) for v in finite)
        numbers[path.name] = [weighted, size]
    if os.environ.get("SMCA_NEW_NUMBERS"):
        document = {"specification": SPECIFICATION_VERSION, "numbers": numbers}
        NUMBERS.write_text(json.dumps(document, indent=0) + "\n", encoding="utf-8")
    known = json.loads(NUMBERS.read_text(encoding="utf-8"))
    assert known["specification"] == SPECIFICATION_VERSION
    assert sorted(known["numbers"]) == sorted(numbers)
    for name, (weighted, size) in numbers.items():
        was, had = known["numbers"][name]
        # Directions of differences hide in `size`; differences themselves are good to some eight digits.
        assert abs(weighted - was) <= 1e-6 * (size + 1e-3), f"{name}: {weighted} for {was}: another specification?"
        assert abs(size - had) <= 1e-6 * (size + 1e-3), name


def test_safetensors_reads_what_is_written_and_the_other_way(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    tensors = {
        "a": rng.normal(size=(2, 3)),
        "b.1": np.arange(3),
        "none": np.zeros((0, 4)),
        "mask": np.array([True, False]),
    }
    path = tmp_path / "x.safetensors"
    path.write_bytes(packed(tensors, {"words": "größer"}))
    theirs = safetensors.numpy.load_file(path)
    assert sorted(theirs) == sorted(tensors)
    for name, values in tensors.items():
        np.testing.assert_array_equal(theirs[name], values)
    ours, texts = unpacked(safetensors.numpy.save({**theirs, "half": np.float16([1.5])}, metadata={"key": "value"}))
    assert texts == {"key": "value"}
    for name, values in {**tensors, "half": np.float16([1.5])}.items():
        np.testing.assert_array_equal(ours[name], values)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda data: data[:5], "expected a safetensors file, got 5 bytes"),
        (lambda data: (2**60).to_bytes(8, "little") + data[8:], "whose header should have 1152921504606846976"),
        (lambda data: data[:-8], "does not fit bytes"),
        (lambda data: data.replace(b'"F64"', b'"BF9"'), "expected a dtype of F64, .* got 'BF9'"),
        (lambda data: data[:8] + b"\xff" + data[9:], "header that cannot be read|Expecting value|utf"),
    ],
)
def test_spoiled_files_are_refused(spoil: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        unpacked(spoil(packed({"a": np.ones((2, 3))}, {})))


def test_results_survive_the_way_there_and_back() -> None:
    rng = np.random.default_rng(1)
    levels = [tuple(rng.normal(size=(1, 2)) for _ in range(4)) for _ in range(2)]
    result = (rng.normal(size=3), levels, rng.normal(size=2))
    back = decode_result("multi_scale_smca_attention_vjp", encode_result("multi_scale_smca_attention_vjp", result))
    for (name, one), (_, two) in zip(leaves("", result), leaves("", back), strict=True):
        np.testing.assert_array_equal(one, two, err_msg=name)
    with pytest.raises(ValueError, match=r"assign: expected a tensor 'cols' in the answer, got \['rows'\]"):
        decode_result("assign", {"rows": np.zeros(1)})
