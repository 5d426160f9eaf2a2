"""The benchmark measures both sides, in processes of their own, and says how far their results differ."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from smca.gpu import benchmark


def test_attention_part_runs_and_writes_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--attention.queries", "5", "--attention.height", "4", "--attention.width", "6", "--attention.heads", "2"]
    benchmark.main(["--only", "attention", "--repeats", "2", "--threads", "1", "--output", str(tmp_path), *sizes])
    record = json.loads((tmp_path / "benchmark.json").read_text())["parts"]["attention"]
    assert list(record) == ["lifted", "eager"]
    for result in record.values():
        assert len(result["seconds"]) == 2, "the warm-up is not counted"
        assert result["peak_mib"] >= 0
    assert set(record["eager"]["difference"]) == {
        "out",
        *(f"grad {n}" for n in ("q", "k", "v", "center_xy", "precision_xy")),
    }
    assert max(record["eager"]["difference"].values()) < 1e-4
    table = (tmp_path / "benchmark.md").read_text()
    assert "| eager |" in table
    assert table.strip() in capsys.readouterr().out


@pytest.mark.parametrize("case", ["smca", "Detr", "ConditionalDetr"])
def test_each_training_step_takes_gradients(case: str) -> None:
    size = (64, 96)
    step = (
        benchmark.smca_step_case("smca", size) if case == "smca" else benchmark.transformers_step_case(case, size)  # type: ignore[arg-type]
    )
    assert 0 < float(step()["loss"]) < 1e4
