"""gpu/prove.py: every part names what exists, every GPU test is in one, and a run reports whatever happens."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tyro

from smca.conformance.implementations.registry import IMPLEMENTATIONS
from smca.gpu import prove
from smca.gpu.benchmark.command import GROUPS, BenchmarkArgs
from smca.gpu.prove import PARTS, Part, Result, Runner

ROOT = Path(__file__).parents[2]
EVERYTHING = {"cuda", "triton", "cupy"}


def script(name: str, code: str, **fields: object) -> Part:
    """A part that runs a line of Python."""
    return Part(name, ("-c", code), **fields)  # type: ignore[arg-type]


def test_parts_name_what_exists() -> None:
    assert len({part.name for part in PARTS}) == len(PARTS)
    for part in PARTS:
        arguments = part.command
        for argument in arguments:
            path, _, test = argument.partition("::")
            if path.startswith("tests/"):
                assert f"def {test}" in (ROOT / path).read_text(encoding="utf-8"), part.name
        if "conformance" in arguments:
            assert arguments[2:] == ("conformance", "--implementation", part.name)
            assert part.name in IMPLEMENTATIONS
        if "benchmark" in arguments:
            tyro.cli(BenchmarkArgs, args=arguments[3:])
            assert part.phase == "measure"


def test_every_gpu_test_and_every_measurement_is_in_a_part() -> None:
    skipping = re.compile(r'(reason=|skip\(\s*)"needs a CUDA device')
    needing = {path.name for path in (ROOT / "tests").rglob("test_*.py") if skipping.search(path.read_text("utf-8"))}
    assert len(needing) >= 4
    assert needing <= {Path(argument.partition("::")[0]).name for part in PARTS for argument in part.command}
    measured = [part.command[part.command.index("--only") + 1] for part in PARTS if "benchmark" in part.command]
    assert sorted(measured) == sorted(GROUPS)
    suite = {part.name for part in PARTS if "conformance" in part.command}
    assert suite == {"triton-cuda", "compiled", "cuda-assignment", "criterion-cupy", "oracle-cupy"}


def test_what_one_part_leaves_out_another_runs() -> None:
    """Each test of the fused kernels is in exactly one part."""
    parts = [part for part in PARTS if any("test_fused_attention.py" in argument for argument in part.command)]
    assert len(parts) == 6
    text = (ROOT / "tests/gpu/test_fused_attention.py").read_text("utf-8")
    for test in re.findall(r"^def (test_\w+)", text, re.MULTILINE):
        name = f"tests/gpu/test_fused_attention.py::{test}"
        inside = [
            part for part in parts if ("--deselect", name) not in zip(part.command, part.command[1:], strict=False)
        ]
        inside = [p for p in inside if name in p.command or "tests/gpu/test_fused_attention.py" in p.command]
        dtypes = [part.command[-1] for part in inside if "-k" in part.command]
        assert len(inside) == 1 or dtypes == ["torch.float32", "torch.float16", "torch.bfloat16"], test


def test_a_run_goes_on_after_failures_and_reports_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prove, "LEAST_SECONDS", 1)
    alive = tmp_path / "alive"
    sleeper = f"import pathlib, time\nwhile True: time.sleep(.1); pathlib.Path({str(alive)!r}).touch()"
    with_child = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {sleeper!r}]); time.sleep(60)"
    parts = [
        script("fails", "print('a test failed'); raise SystemExit(4)"),
        script("hangs", with_child, seconds=4),
        script("passes", "import os; print('threads', os.environ['OMP_NUM_THREADS'])"),
        script("lacks", "", needs=("cuda", "cupy", "triton")),
        script("measures", "print('measured')", phase="measure", seconds=20),
    ]
    began = time.monotonic()
    results = Runner(tmp_path, 60).run(parts, {"triton"})
    assert 4 <= time.monotonic() - began < 14, "checks run side by side, each under its limit"
    assert [(result.part, result.result) for result in results] == [
        ("fails", "failed"),
        ("hangs", "timed out"),
        ("passes", "passed"),
        ("lacks", "skipped"),
        ("measures", "passed"),
    ]
    notes = {result.part: result.note for result in results}
    assert notes["fails"] == "exit status 4, see fails.log"
    assert notes["hangs"] == "stopped after 4 s"
    assert notes["lacks"] == "PyTorch sees no CUDA device, cupy is not installed"
    assert (tmp_path / "fails.log").read_text() == "a test failed\n"
    assert (tmp_path / "passes.log").read_text() == "threads 2\n"
    assert alive.exists()
    last = alive.stat().st_mtime
    time.sleep(0.5)
    assert alive.stat().st_mtime == last, "a child of a part that was stopped goes on"


def test_checks_run_side_by_side(tmp_path: Path) -> None:
    """Each of two waits for a file that the other writes."""
    code = (
        "import pathlib, sys, time\npathlib.Path({!r}).touch()\nwhile not pathlib.Path({!r}).exists(): time.sleep(.05)"
    )
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    parts = [script("a", code.format(a, b), seconds=6), script("b", code.format(b, a), seconds=6)]
    assert [result.result for result in Runner(tmp_path, 60).run(parts, set())] == ["passed", "passed"]


def test_nothing_starts_after_a_stop(tmp_path: Path) -> None:
    runner = Runner(tmp_path, 60)
    runner.stop()
    (result,) = runner.run([script("late", f"open({str(tmp_path / 'started')!r}, 'w')")], set())
    assert (result.result, result.note) == ("left out", "the run was stopped")
    assert not (tmp_path / "started").exists()


def test_it_needs_the_standard_library_alone() -> None:
    """Without site-packages, as on a machine where nothing is installed yet."""
    command = [sys.executable, "-I", "-S", str(ROOT / "gpu/prove.py"), "list"]
    listed = subprocess.run(command, capture_output=True, text=True, check=False)
    assert listed.returncode == 0, listed.stderr
    assert [line.split()[0] for line in listed.stdout.splitlines()] == [part.name for part in PARTS]


def test_help_survives_a_terminal_without_its_characters() -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    command = [sys.executable, str(ROOT / "gpu/prove.py"), "--help"]
    shown = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert shown.returncode == 0, shown.stderr
    assert "wheels" in shown.stdout


def test_what_the_whole_has_no_time_for_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prove, "LEAST_SECONDS", 1)
    parts = [script("first", "import time; time.sleep(60)"), script("second", "", phase="measure")]
    first, second = Runner(tmp_path, 1.5).run(parts, set())
    assert (first.result, first.note) == ("timed out", "stopped after 1 s")
    assert (second.result, second.note) == ("left out", "the 2 seconds of the whole are used up")
    assert not (tmp_path / "second.log").exists()


def test_a_measurement_writes_into_the_folder(tmp_path: Path) -> None:
    part = Part("speed", ("-c", "import sys; print(sys.argv[1:])", "benchmark", "--only", "step"), phase="measure")
    (result,) = Runner(tmp_path, 60).run([part], set())
    assert result.result == "passed"
    assert (tmp_path / "speed.log").read_text() == f"{['benchmark', '--only', 'step', '--output', str(tmp_path)]}\n"


def test_summary_and_exit_status() -> None:
    passed, failed = Result("a", "passed", 3), Result("b", "failed", 4, "exit status 1, see b.log")
    hung, skipped, late = Result("c", "timed out", 9), Result("d", "skipped", 0, "no"), Result("e", "left out", 0)
    assert prove.summary([passed, failed]).splitlines()[2:] == [
        "| a | passed | 3 |  |",
        "| b | failed | 4 | exit status 1, see b.log |",
    ]
    assert prove.exit_status([passed, passed]) == 0
    assert prove.exit_status([passed, failed, skipped]) == prove.exit_status([hung, late]) == 1
    assert prove.exit_status([passed, skipped]) == prove.exit_status([late, passed]) == 3


def test_parts_are_chosen_by_name() -> None:
    assert prove.chosen([]) == list(PARTS)
    assert [part.name for part in prove.chosen(["attention", "kernels"])] == ["kernels", "attention"]
    with pytest.raises(ValueError, match="no part 'nonsense': choose of kernels, "):
        prove.chosen(["kernels", "nonsense"])


def test_wheels_are_those_of_the_constraints() -> None:
    constraints = "# pinned\ntorch==2.0\ntriton==3.0\nDocstring_Parser==1.2\ntyro==0.9\n"
    assert prove.pinned([], constraints) == ["Docstring_Parser==1.2", "tyro==0.9"]
    assert prove.pinned(["tyro", "docstring-parser"], constraints) == ["tyro==0.9", "Docstring_Parser==1.2"]
    assert prove.pinned(["torch"], constraints) == ["torch==2.0"]
    with pytest.raises(ValueError, match="pins no nonsense: it has docstring-parser, torch, triton, tyro"):
        prove.pinned(["tyro", "nonsense"], constraints)
    everything = prove.pinned([], (ROOT / "constraints.txt").read_text())
    assert any(line.startswith("numpy==") for line in everything)


def test_only_what_is_lacking_is_installed(tmp_path: Path) -> None:
    wheels = [tmp_path / f"{name}-1.0-py3-none-any.whl" for name in ("absent_of_course", "numpy", "setuptools")]
    assert prove.not_installed(wheels) == wheels[:1]
    log = tmp_path / "install.log"
    assert prove.install(tmp_path / "nothing", log) == Result("install", "passed", prove.install(tmp_path, log).seconds)
    assert "nothing\n" in log.read_text()


def test_a_wheel_that_is_none_fails_the_installation(tmp_path: Path) -> None:
    (tmp_path / "absent_of_course-1.0-py3-none-any.whl").write_bytes(b"no wheel")
    result = prove.install(tmp_path, tmp_path / "install.log")
    assert (result.result, result.note) == ("failed", "see install.log")
    assert "absent_of_course" in (tmp_path / "install.log").read_text()


def test_the_command_runs_without_a_gpu(tmp_path: Path) -> None:
    """As a person runs it: by its path, from anywhere."""
    command = [sys.executable, str(ROOT / "gpu/prove.py"), "run", "proof", "cuda-assignment", "multi-scale"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 3, ran.stdout + ran.stderr
    entries = json.loads((tmp_path / "proof/summary.json").read_text())
    assert [(entry["part"], entry["result"]) for entry in entries] == [
        ("install", "passed"),
        ("cuda-assignment", "skipped"),
        ("multi-scale", "skipped"),
    ]
    assert entries[1]["note"].startswith("PyTorch sees no CUDA device")
    assert (tmp_path / "proof/summary.md").read_text() in ran.stdout
    assert "torch" in (tmp_path / "proof/environment.txt").read_text()


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_stopping_it_stops_what_it_started(sent: signal.Signals, tmp_path: Path) -> None:
    alive = tmp_path / "alive"
    code = f"import pathlib, time\nwhile True: time.sleep(.05); pathlib.Path({str(alive)!r}).touch()"
    program = (
        "import pathlib, sys; from smca.gpu import prove; prove.install = lambda *_: prove.Result('install', 'passed', 0); "
        f"prove.PARTS = (prove.Part('long', ('-c', {code!r})),); "
        "raise SystemExit(prove.main(['run', 'proof']))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    for _ in range(400):
        if alive.exists():
            break
        time.sleep(0.05)
    process.send_signal(sent)
    _, errors = process.communicate(timeout=10)
    assert process.returncode == (130 if sent == signal.SIGINT else 143), errors
    last = alive.stat().st_mtime
    time.sleep(0.3)
    assert alive.stat().st_mtime == last


def test_mistakes_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert prove.main(["run", "out", "nonsense"]) == 2
    assert "error: no part 'nonsense': choose of kernels, " in capsys.readouterr().err
    assert prove.main(["run", "out", "kernels", "--wheels", "nowhere"]) == 2
    assert "error: no folder nowhere: make it with `python gpu/prove.py wheels nowhere`" in capsys.readouterr().err
    assert prove.main(["list"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(PARTS)
    with pytest.raises(SystemExit) as ended:
        prove.main([])
    assert ended.value.code == 2
    for command in ("wheels", "run", "list"):
        with pytest.raises(SystemExit):
            prove.main([command, "--help"])
    assert "(default: runs/proof)" in capsys.readouterr().out
