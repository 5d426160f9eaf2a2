"""The example of a port in C: it passes, it goes red when a bug is planted, and it refuses what is no message."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from smca.conformance.command import main
from smca.conformance.conduct import WRONG_NUMBERS
from smca.conformance.implementations.port import Port
from smca.conformance.runner import PROFILES, Case, cases, run
from smca.conformance.suite import PROPERTIES
from smca.conformance.vectors import SOURCES, vectors_of
from smca.conformance.wire import Tensors, Texts, packed, unpacked

SOURCE = Path(__file__).parents[2] / "conformance" / "examples" / "port.c"
OPERATIONS = {
    "smca_attention",
    "smca_attention_vjp",
    "multi_scale_smca_attention",
    "generalized_box_iou",
    "match_cost",
    "assign",
}


def compiled(folder: Path, planted: tuple[str, str] | None = None) -> Path:
    """The program, built in `folder`; `planted`: a piece of its source, and what it becomes."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("there is no C compiler (cc) here")
    text = SOURCE.read_text(encoding="utf-8")
    if planted is not None:
        assert text.count(planted[0]) == 1
        text = text.replace(*planted)
    source, program = folder / SOURCE.name, folder / "port"
    source.write_text(text, encoding="utf-8")
    # The last warning is of arithmetic in float that is done in double.
    flags = ["-O2", "-std=c11", "-Wall", "-Wextra", "-Werror", "-Wdouble-promotion"]
    done = subprocess.run([compiler, *flags, "-o", program, source, "-lm"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return program


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compiled(tmp_path_factory.mktemp("port"))


def test_all_that_it_offers_passes_in_both_dtypes(program: Path) -> None:
    port, passed = Port(str(program), 60.0), Counter[str]()
    for case in cases(PROPERTIES, [port], PROFILES["quick"]):
        outcome = run(case, PROFILES["quick"], examples=5, shrink=False)
        assert outcome.status == ("not implemented" if case.missing else "passed"), outcome.message
        if outcome.status == "passed":
            passed[f"{case.prop.operation} {case.dtype}"] += 1
    assert set(passed) == {f"{operation} {dtype}" for operation in OPERATIONS for dtype in port.dtypes}
    assert passed["smca_attention float32"] == passed["smca_attention float64"] > 10


def test_the_command_ends_in_status_0(program: Path) -> None:
    """As the interpreter ends, a program under test still waits for questions."""
    command = [sys.executable, "-m", "smca.conformance", "--implementation", f"exec:{program}"]
    done = subprocess.run(
        [*command, "--only", "generalized_box_iou.equals"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "no properties failed" in done.stdout


def test_a_planted_bug_in_the_attention_goes_red(tmp_path: Path) -> None:
    port = Port(str(compiled(tmp_path, ("precision[1] * y * y) / 2;", "precision[1] * y * y) / 1;"))), 60.0)
    prop = next(prop for prop in PROPERTIES if prop.name == "smca_attention.equals_the_oracle")
    for dtype in port.dtypes:
        outcome = run(Case(prop, port, dtype), PROFILES["quick"], examples=0, shrink=False)
        assert (outcome.status, outcome.verdict) == ("failed", WRONG_NUMBERS)


def test_a_planted_bug_is_reported_by_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    program = compiled(tmp_path, ("if (through_row < distance[j])", "if (through_row > distance[j])"))
    with pytest.raises(SystemExit) as stop:
        main(["--implementation", f"exec:{program}", "--only", "assign.equals"])
    assert stop.value.code == 1
    assert "implementation: port.c, float64" in capsys.readouterr().out


def said(program: Path, *messages: bytes) -> Iterator[tuple[Tensors, Texts]]:
    """Its answers to messages."""
    data = b"".join(len(message).to_bytes(8, "little") + message for message in messages)
    done = subprocess.run([program], input=data, capture_output=True, check=True, timeout=60)
    assert done.stderr == b""
    rest = done.stdout
    while rest:
        end = 8 + int.from_bytes(rest[:8], "little")
        yield unpacked(rest[8:end])
        rest = rest[end:]


def test_what_is_no_message_has_an_error_for_an_answer_and_the_next_one_is_answered(program: Path) -> None:
    pair = {"boxes1": np.zeros((1, 4)), "boxes2": np.ones((1, 4))}
    texts = {"operation": "generalized_box_iou", "dtype": "float64"}
    good = packed(pair, texts)
    inverted = packed({**pair, "boxes1": np.array([[1.0, 0.0, 0.0, 1.0]])}, texts)
    mistakes = {
        b"": "do not hold its header",
        good[: len(good) // 2]: "do not hold its header",
        good[:-8]: "bytes 32 to 64 of 56 do not hold",
        b"\xff" * 16: "do not hold its header",
        good.replace(b'"shape"', b'"shap\\"'): "expected",
        good.replace(b"[1,4]", b"[4,1]"): "boxes1: expected the shape [any,4], got [4,1]",
        good.replace(b"[1,4]", b"[9,4]"): "do not hold [9,4] of F64",
        good.replace(b"[0,32]", b"[32,0]"): "do not hold",
        good.replace(b"[1,4]", b"[-1,]"): "expected a list of at most 8 whole numbers",
        good.replace(b"boxes2", b"boxes3"): "boxes2: expected a tensor of this name",
        packed(pair, texts | {"dtype": "float16"}): "there is no operation generalized_box_iou in float16",
        packed(pair, texts | {"operation": 'set\\"loss'}): "there is no operation set??loss",
        inverted: "left <= right",
        packed({"cost": np.array([[np.nan]])}, texts | {"operation": "assign"}): "cost: expected numbers or +inf",
        packed({"cost": np.full((2, 2), np.inf)}, texts | {"operation": "assign"}): "too many pairs of +inf",
    }
    answers = list(said(program, *[message for mistake in mistakes for message in (mistake, good)]))
    assert len(answers) == 2 * len(mistakes)
    for (tensors, answer), expected in zip(answers[::2], mistakes.values(), strict=True):
        assert tensors == {}
        assert expected in answer["error"]
    assert all(set(tensors) == {"giou"} for tensors, _ in answers[1::2])


def test_an_input_that_ends_within_a_message_is_an_error(program: Path) -> None:
    for data in (b"abc", b"\x10" + b"\0" * 7 + b"abc", b"\xff" * 8 + b"abc"):
        done = subprocess.run([program], input=data, capture_output=True, check=False, timeout=60)
        assert done.returncode == 1
        assert b"expected" in done.stderr


def vectors(dtype: str) -> list[tuple[str, Tensors, Texts]]:
    """Those of the operations that it offers: operation, tensors and texts."""
    sources = [prop for prop in PROPERTIES if prop.name in SOURCES and prop.operation in OPERATIONS]
    return [vector for prop in sources for vector in vectors_of(prop, dtype)]


def checked(program: Path, folder: Path, *files: bytes) -> subprocess.CompletedProcess[str]:
    """What it says of vectors."""
    paths = [folder / f"{number}.safetensors" for number in range(len(files))]
    for path, data in zip(paths, files, strict=True):
        path.write_bytes(data)
    return subprocess.run([program, *paths], capture_output=True, text=True, check=False, timeout=60)


def test_vectors_pass_and_what_is_lacking_is_skipped(program: Path, tmp_path: Path) -> None:
    made = [vector for dtype in ("float64", "float32") for vector in vectors(dtype)]
    assert {operation for operation, *_ in made} == OPERATIONS
    files = [packed(tensors, {**texts, "note": 'a "text", é\n'}) for _, tensors, texts in made]
    lacking = [
        packed({}, {"operation": "set_loss", "dtype": "float64"}),
        packed({}, {**made[0][2], "dtype": "float16"}),
    ]
    done = checked(program, tmp_path, *files, *lacking)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{len(files)} vectors passed, 0 failed, 2 skipped\n"


def test_vectors_that_differ_fail_with_a_line_each(program: Path, tmp_path: Path) -> None:
    files = []
    for _, tensors, texts in vectors("float64"):
        for name in tensors:
            if name.startswith("out.") and tensors[name].size:
                wrong = np.array(tensors[name])
                wrong[(-1,) * wrong.ndim] += 2 * tensors[f"bound.{name[4:]}"].max() + 0.5
                files.append(packed({**tensors, name: wrong}, texts))
    done = checked(program, tmp_path, *files)
    assert done.returncode == 1
    lines = done.stdout.splitlines()
    assert lines[-1] == f"0 vectors passed, {len(files)} failed, 0 skipped"
    assert len(lines) == len(files) + 1
    assert lines[0].startswith(f"{tmp_path}/0.safetensors: out[1,1,4,7]: got ")


def test_gradients_are_compared_along_a_direction(program: Path, tmp_path: Path) -> None:
    tensors, texts = next(rest for operation, *rest in vectors("float64") if operation == "smca_attention_vjp")
    kept = {name: value for name, value in tensors.items() if name.startswith("in.")}
    directions = {name: np.cos(np.arange(tensors[f"out.{name}"].size) + 1.0) for name in ("dq", "dv")}
    expected = sum(float(tensors[f"out.{name}"].ravel() @ values) for name, values in directions.items())
    for name, values in directions.items():
        kept[f"along.0.{name}"] = values.reshape(tensors[f"out.{name}"].shape)
    files = [
        packed({**kept, "along.0": np.array(number), "along_bound.0": np.array(1e-9)}, texts)
        for number in (expected, expected + 1e-6)
    ]
    done = checked(program, tmp_path, *files)
    assert done.returncode == 1
    line, counts = done.stdout.splitlines()
    assert line.startswith(f"{tmp_path}/1.safetensors: along.0: got ")
    assert counts == "1 vectors passed, 1 failed, 0 skipped"


def test_files_that_are_no_vectors_fail(program: Path, tmp_path: Path) -> None:
    _, tensors, texts = vectors("float64")[0]
    good = packed(tensors, texts)
    inputs = {name: value for name, value in tensors.items() if name.startswith("in.")}
    files = [
        good[:100],
        good[:-1],
        good.replace(b"bound.out", b"bounds.xy"),
        packed(inputs, texts),
        packed(inputs, {}),
        b"",
    ]
    done = checked(program, tmp_path, *files, good)
    assert done.returncode == 1
    assert done.stdout == "1 vectors passed, 6 failed, 0 skipped\n"
    assert len(done.stderr.splitlines()) == 6
    assert "2.safetensors: bound.out: expected a tensor of this name, got none" in done.stderr
