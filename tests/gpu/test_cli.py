"""The command's manners: terminals and systems of other code pages, readers that go away, Ctrl-C."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from smca.gpu import cli
from smca.gpu.config import ModelConfig
from smca.gpu.model import SMCADETR
from smca.gpu.presets import tiny_resnet

ROOT = Path(__file__).parents[2]
SMCA = [sys.executable, "-c", "from smca.gpu.cli import main; main()"]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained model whose classes have names in several scripts."""
    torch.manual_seed(0)
    small = {
        "hidden_dim": 8,
        "num_heads": 2,
        "num_queries": 3,
        "encoder_layers": 0,
        "decoder_layers": 1,
        "feedforward_dim": 8,
    }
    config = ModelConfig(
        num_classes=5,
        class_names=("红细胞", "적혈구", "लाल", "círculo", "cross → ×"),
        category_ids=(1, 2, 3, 4, 5),
        backbone=tiny_resnet(1),
        strides=(4,),
        image_short_side=32,
        image_max_size=64,
        **small,
    )
    directory = tmp_path_factory.mktemp("model")
    SMCADETR(config).save_pretrained(directory)
    return directory


def test_output_survives_its_terminal(model_dir: Path, tmp_path: Path) -> None:
    """predict prints an arrow; evaluate says in its error what the model's classes are: a Western console has one of them."""
    encoding = "cp1252"
    Image.new("RGB", (40, 40)).save(tmp_path / "寿司.png")
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "NO_COLOR": "1"}
    predicts = [
        "predict",
        str(model_dir),
        str(tmp_path / "寿司.png"),
        "--output",
        str(tmp_path / "out"),
        "--threshold",
        "0",
    ]
    evaluates = ["evaluate", str(model_dir), "--workers", "0"]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "env": environment}
    with (
        subprocess.Popen([*SMCA, *predicts], **pipes) as predict,
        subprocess.Popen([*SMCA, *evaluates], **pipes) as evaluate,
    ):
        out, err = predict.communicate()
        _, refused = evaluate.communicate()
    assert predict.returncode == 0, err.decode(encoding, "replace")
    assert " objects in 1 images " in out.decode(encoding)
    assert "line" not in err.decode(encoding), "what a class name lacks is said without code"
    assert evaluate.returncode == 1
    said = refused.decode(encoding)
    assert "are not those of synthetic" in said
    assert "红细胞" not in said
    assert "círculo" in said


def test_a_script_survives_its_terminal_too() -> None:
    command = [sys.executable, str(ROOT / "gpu/train.py"), "small", "--help"]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    done = subprocess.run(command, env=environment, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"?" in done.stdout, "what ASCII lacks, such as a dash"


def without_encoding(source: str) -> list[int]:
    """Lines that open a file for text and leave its encoding to the system."""
    lines = []
    for call in (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)):
        name = call.func.id if isinstance(call.func, ast.Name) else getattr(call.func, "attr", "")
        if name not in ("open", "fdopen", "read_text", "write_text", "NamedTemporaryFile"):
            continue
        if isinstance(call.func, ast.Attribute) and ast.unparse(call.func.value) in ("Image", "os"):
            continue
        given = [*call.args, *(keyword.value for keyword in call.keywords if keyword.arg == "mode")]
        binary = any(isinstance(a, ast.Constant) and isinstance(a.value, str) and "b" in a.value for a in given)
        if not binary and "encoding" not in {keyword.arg for keyword in call.keywords}:
            lines.append(call.lineno)
    return lines


def test_text_files_are_utf_8_whatever_the_system() -> None:
    folders = ("gpu", "conformance", "reference", "docs")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    found = {str(path.relative_to(ROOT)): without_encoding(path.read_text(encoding="utf-8")) for path in files}
    assert {path: lines for path, lines in found.items() if lines} == {}
    assert without_encoding('path.read_text()\nopen("a")\nfile.open("w")\nopen("b", "rb")\nImage.open(p)') == [1, 2, 3]


NOBODY_READS = {
    "train small --help": "from smca.gpu.cli import main; main()",
    "Rich, which ends a program itself": "import rich; run(lambda _: rich.print('x'))",
    "an exit with output unwritten": "run(lambda _: (print('x'), sys.exit(1)))",
    "an error with output unwritten": "run(lambda _: (print('x'), int('y')))",
}


@pytest.mark.parametrize(
    ("name", "unbuffered"),
    [(name, unbuffered) for name in NOBODY_READS for unbuffered in ("", "1") if not (unbuffered and "--help" in name)],
)
def test_a_reader_that_goes_away_ends_the_command_quietly(name: str, unbuffered: str) -> None:
    """As of a pipe into head, but gone for certain before anything is written."""
    command = [sys.executable, "-c", f"import sys; from smca.gpu.cli import run; {NOBODY_READS[name]}", *name.split()]
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered, "SMCA_TRACEBACK": ""}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, text=True, env=environment, **pipes) as process:  # type: ignore[call-overload]
        process.stdout.close()
        said = process.stderr.read()
    if "an error" in name and not unbuffered:
        assert process.returncode == 1
        assert said.startswith("error: invalid literal")
        assert said.endswith("(SMCA_TRACEBACK=1 shows where)\n"), "nothing that Python adds as it ends"
    else:
        assert (process.returncode, said) == (141, "")


def test_a_broken_pipe_to_a_process_of_its_own_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    def loses_a_worker(_: list[str]) -> None:
        raise BrokenPipeError(32, "Broken pipe")

    with pytest.raises(SystemExit) as ended:
        cli.run(loses_a_worker, [])
    assert ended.value.code == 1
    assert "error: [Errno 32] Broken pipe" in capsys.readouterr().err


def test_without_a_stdout(monkeypatch: pytest.MonkeyPatch) -> None:
    """None is what Python makes of one that was closed before the start."""
    monkeypatch.setattr(sys, "stdout", None)
    cli.run(lambda _: print("x"), [])
    with pytest.raises(SystemExit) as ended:
        cli.run(lambda _: sys.exit(3), [])
    assert ended.value.code == 3


def test_ctrl_c_of_a_command_that_leaves_nothing_advises_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    def stopped(_: list[str]) -> None:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as ended:
        cli.run(stopped, [])
    assert ended.value.code == 130
    assert capsys.readouterr().err == "\nstopped\n"
