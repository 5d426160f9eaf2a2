"""The command's manners: terminals of other code pages, readers that go away, Ctrl-C."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from smca.gpu import cli
from smca.gpu.config import ModelConfig
from smca.gpu.model import SMCADETR
from smca.gpu.presets import tiny_resnet

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


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_output_survives_its_terminal(encoding: str, model_dir: Path, tmp_path: Path) -> None:
    """predict prints an arrow; evaluate says in its error what the model's classes are."""
    Image.new("RGB", (40, 40)).save(tmp_path / "寿司.png")
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "NO_COLOR": "1"}
    done = subprocess.run(
        [
            *SMCA,
            "predict",
            str(model_dir),
            str(tmp_path / "寿司.png"),
            "--output",
            str(tmp_path / "out"),
            "--threshold",
            "0",
        ],
        env=environment,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode(encoding, "replace")
    assert " objects in 1 images " in done.stdout.decode(encoding)
    assert "line" not in done.stderr.decode(encoding), "what a class name lacks is said without code"
    done = subprocess.run(
        [*SMCA, "evaluate", str(model_dir), "--workers", "0"], env=environment, capture_output=True, check=False
    )
    assert done.returncode == 1
    said = done.stderr.decode(encoding)
    assert "are not those of synthetic" in said
    assert "红细胞" not in said
    assert ("círculo" in said) == (encoding == "cp1252")


def test_a_reader_that_goes_away_ends_the_command_quietly() -> None:
    """As of a pipe into head, but gone for certain before anything is written."""
    command = [*SMCA, "train", "small", "--help"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        said = process.stderr.read()
    assert process.returncode == 141
    assert said == ""


def test_ctrl_c_of_a_command_that_leaves_nothing_advises_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    def stopped(_: list[str]) -> None:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as ended:
        cli.run(stopped, [])
    assert ended.value.code == 130
    assert capsys.readouterr().err == "\nstopped\n"
