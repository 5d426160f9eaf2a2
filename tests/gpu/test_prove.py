"""gpu/prove.sh: every part names what exists, every GPU test is in one, and a run reports whatever happens."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tyro

from smca.conformance.implementations.ours import IMPLEMENTATIONS
from smca.gpu.benchmark.command import GROUPS, BenchmarkArgs

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "gpu/prove.sh"

# In place of Python on a GPU machine: notes how it is called, and does what each test wants of it.
STUB = """#!/usr/bin/env bash
echo "$*" >> "$CALLS"
case "$*" in
    -) echo cuda triton cupy ;;
    "- absent") exit 1 ;;
    *test_assignment.py*) echo 'a test failed'; exit 1 ;;
    *triton-cuda*) exec sleep 60 ;;
esac
"""


def prove(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(SCRIPT), *arguments], env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )


def parts() -> dict[str, list[str]]:
    """Part → its command."""
    lines = [line.split("|") for line in prove("list").stdout.splitlines()]
    assert all(len(line) == 5 for line in lines)
    assert {phase for *_, phase, _ in lines} == {"check", "measure"}
    found = {name: shlex.split(command) for name, _, _, _, command in lines}
    assert len(found) == len(lines)
    return found


@pytest.fixture
def stub(tmp_path: Path) -> dict[str, str]:
    """The environment in which the script finds a GPU and everything on it."""
    python = tmp_path / "python"
    python.write_text(STUB)
    python.chmod(0o755)
    return {"PYTHON": str(python), "CALLS": str(tmp_path / "calls")}


def test_parts_name_what_exists() -> None:
    for name, (kind, *arguments) in parts().items():
        assert kind in ("python", "pytest", "smca"), name
        for argument in arguments:
            path, _, test = argument.partition("::")
            if path.startswith("tests/"):
                assert f"def {test}" in (ROOT / path).read_text(encoding="utf-8"), name
        if arguments[0] == "conformance":
            assert arguments[1:] == ["--implementation", name]
            assert name in IMPLEMENTATIONS
        if arguments[0] == "benchmark":
            tyro.cli(BenchmarkArgs, args=arguments[1:])


def test_every_gpu_test_and_every_measurement_is_in_a_part() -> None:
    found = parts()
    skipping = re.compile(r'(reason=|skip\(\s*)"needs a CUDA device')
    needing = {path.name for path in (ROOT / "tests").rglob("test_*.py") if skipping.search(path.read_text("utf-8"))}
    assert len(needing) >= 4
    assert needing <= {Path(argument.partition("::")[0]).name for command in found.values() for argument in command}
    measured = [command[command.index("--only") + 1] for command in found.values() if "benchmark" in command]
    assert sorted(measured) == sorted(GROUPS)
    suite = {command[-1] for command in found.values() if "conformance" in command}
    assert suite == {"triton-cuda", "compiled", "cuda-assignment", "criterion-cupy", "oracle-cupy"}


def test_a_run_goes_on_after_failures_and_says_so(tmp_path: Path, stub: dict[str, str]) -> None:
    out = tmp_path / "proof"
    (tmp_path / "absent-1.0-py3-none-any.whl").touch()
    (tmp_path / "there-1.0-py3-none-any.whl").touch()
    names = ["assignment", "triton-cuda", "cuda-assignment", "multi-scale"]
    ran = prove("run", str(out), *names, **stub, WHEELS=str(tmp_path), TOTAL="7")
    assert ran.returncode == 1
    summary = {entry["part"]: entry for entry in json.loads((out / "summary.json").read_text())}
    assert {name: entry["result"] for name, entry in summary.items()} == {
        "install": "passed",
        "assignment": "failed",
        "triton-cuda": "timed out",
        "cuda-assignment": "passed",
        "multi-scale": "left out",
    }
    assert "exit status 1" in summary["assignment"]["note"]
    assert 5 <= summary["triton-cuda"]["seconds"] <= 12
    assert (out / "assignment.log").read_text() == "a test failed\n"
    assert (out / "summary.md").read_text() in ran.stdout
    assert not list(out.glob("*.result"))
    calls = Path(stub["CALLS"]).read_text()
    assert re.search(r"-m pip install --no-index --no-deps \S*absent-1.0-py3-none-any.whl$", calls, re.MULTILINE)
    assert "main() conformance --implementation cuda-assignment\n" in calls


def test_measurements_write_into_the_folder(tmp_path: Path, stub: dict[str, str]) -> None:
    ran = prove("run", str(tmp_path / "proof"), "multi-scale", **stub, WHEELS=str(tmp_path))
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert f"--minutes 0.6 --output {tmp_path / 'proof'}\n" in Path(stub["CALLS"]).read_text()


def test_without_a_gpu_parts_are_skipped_with_the_reason(tmp_path: Path) -> None:
    python = tmp_path / "python"
    # This Python, but for pip: nothing is installed here.
    python.write_text(f'#!/usr/bin/env bash\n[[ $1 == -m && $2 == pip ]] || exec {shlex.quote(sys.executable)} "$@"\n')
    python.chmod(0o755)
    hidden = {"CUDA_VISIBLE_DEVICES": "", "PYTHON": str(python), "WHEELS": str(tmp_path)}
    ran = prove("run", str(tmp_path / "proof"), "cuda-assignment", "multi-scale", **hidden)
    assert ran.returncode == 3, ran.stdout + ran.stderr
    for name in ("cuda-assignment", "multi-scale"):
        assert f"| {name} | skipped | 0 | PyTorch sees no CUDA device" in ran.stdout


def test_wheels_are_those_of_the_constraints(tmp_path: Path, stub: dict[str, str]) -> None:
    assert prove("wheels", str(tmp_path), "tyro", "docstring-parser", **stub).returncode == 0
    calls = Path(stub["CALLS"]).read_text()
    assert re.search(rf"-m pip download .*--dest {tmp_path} docstring_parser==[\d.]+ tyro==[\d.]+\n", calls)
    assert prove("wheels", str(tmp_path), **stub).returncode == 0
    everything = Path(stub["CALLS"]).read_text().splitlines()[-1]
    assert " numpy==" in everything
    assert " torch==" not in everything
    unknown = prove("wheels", str(tmp_path), "tyro", "nonsense", **stub)
    assert unknown.returncode == 1
    assert "constraints.txt pins tyro==" in unknown.stderr


def test_mistakes_are_named(tmp_path: Path) -> None:
    wrong = prove("run", str(tmp_path), "nonsense")
    assert wrong.returncode == 2
    assert "no part 'nonsense': choose of kernels, " in wrong.stderr
    usage = prove()
    assert usage.returncode == 2
    assert usage.stdout.startswith("Prove on a GPU")


def test_shellcheck_finds_nothing() -> None:
    checker = shutil.which("shellcheck")
    if checker is None:
        pytest.skip("needs shellcheck")
    assert subprocess.run([checker, str(SCRIPT)], capture_output=True, text=True, check=False).stdout == ""
