"""The benchmark measures both sides, in processes of their own, and says how far their results differ."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from smca.gpu import benchmark


@pytest.mark.parametrize("part", ["attention", "multi-scale"])
def test_attention_parts_run_and_write_a_table(part: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--attention.queries", "5", "--attention.maps", "4", "6", "2", "3", "--attention.heads", "2"]
    benchmark.main(["--only", part, "--repeats", "2", "--threads", "1", "--output", str(tmp_path), *sizes])
    record = json.loads((tmp_path / "benchmark.json").read_text())["parts"][part]
    assert list(record) == ["lifted", "eager"]
    for result in record.values():
        assert len(result["seconds"]) == 2, "the warm-up is not counted"
        assert result["peak_mib"] >= 0
    names = [f"{n}{level}" for n in ("k", "v", "center_xy", "precision_xy") for level in (" of level 0", " of level 1")]
    if part == "attention":
        names = ["k", "v", "center_xy", "precision_xy"]
    else:
        names.append("level_weights")
    assert set(record["eager"]["difference"]) == {"out", "grad q", *(f"grad {n}" for n in names)}
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
