"""`smca conformance`: what it prints, writes and refuses."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from smca.conformance import command
from smca.conformance.command import main
from smca.conformance.mutants.plant import MUTANTS
from smca.conformance.protocol import load_outside
from smca.conformance.suite import PROPERTIES


def test_passes_and_what_is_lacking_are_told_apart(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--implementation", "scipy", "smca.conformance.implementations.example_adapter:Example", "--only", "s"])
    out = capsys.readouterr().out
    assert "scipy              float64   assign                              4      0" in out
    assert "scipy                        smca_attention                 not implemented" in out
    assert "example            float32   smca_attention                     17      0" in out
    assert "no properties failed" in out


def test_a_failure_is_printed_and_ends_in_status_1(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(
            [
                "--implementation",
                "smca.conformance.implementations.transformers_adapter:Detr",
                "--only",
                "match_cost.equals",
            ]
        )
    assert stop.value.code == 1
    out = capsys.readouterr().out
    assert "expected = class" in out
    assert "implementation: transformers-detr, float64" in out
    snippet = "\n".join(line.strip() for line in out.split("again:\n")[1].splitlines()[:2])
    assert "'smca.conformance.implementations.transformers_adapter:Detr', 'float64', LossInputs(" in snippet
    with pytest.raises(AssertionError, match="cost"):
        exec(snippet, {})


def test_everything_there_is_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--list"])
    out = capsys.readouterr().out
    assert "eager              float64, float32, float16, bfloat16" in out
    assert "set_loss.padding_of_targets\n    what stands in the padding" in out


def test_the_report_has_a_table_an_operation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "numerics.md"
    main(["--report", str(path), "--examples", "30", "--implementation", "eager", "--only", "smca_attention.equals"])
    text = path.read_text(encoding="utf-8")
    assert "## `smca_attention`" in text
    assert "| eager | bfloat16 | 9 | 0." in text
    assert "- eager, bfloat16: `AttentionInputs(" in text
    assert "AttentionInputs(" in text


def test_the_page_of_errors_has_every_operation_that_is_compared_with_the_oracle() -> None:
    page = (Path(__file__).parents[2] / "docs" / "numerics.md").read_text(encoding="utf-8")
    compared = {prop.operation for prop in PROPERTIES if prop.oracle}
    assert len(compared) > 10
    assert compared <= set(re.findall(r"^## `(\w+)`$", page, re.MULTILINE))


def test_a_bug_that_nothing_finds_ends_in_status_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "MUTANTS", MUTANTS[:2])  # the processes look them up by their numbers
    main(["--mutants", "--only", "smca_attention.equals"])
    rows = capsys.readouterr().out.splitlines()
    assert [row.split(" | ")[0] for row in rows[2:4]] == [f"| {mutant.bug}" for mutant in MUTANTS[:2]]
    assert all(" | smca_attention.equals_the_oracle | 1 | " in row for row in rows[2:4])
    assert rows[-1] == "2 of 2 killed; 0 of them also by properties that need no oracle."
    with pytest.raises(SystemExit) as stop:
        main(["--mutants", "--only", "set_loss.equals"])
    assert stop.value.code == 1
    assert "0 of 2 killed" in capsys.readouterr().out


def test_mistakes_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"--only 'nonsense': no property"):
        main(["--only", "nonsense"])
    with pytest.raises(ValueError, match=r"no implementation 'egger': choose one of oracle, "):
        main(["--implementation", "egger"])
    with pytest.raises(ValueError, match=r"expected package\.module:Class, got 'json'"):
        load_outside("json")
    with pytest.raises(ValueError, match=r"No module named 'nowhere'\. Run in the folder it is in"):
        load_outside("nowhere:Port")
    with pytest.raises(ValueError, match="JSONDecoder: it has none of the operations smca_attention, "):
        load_outside("json:JSONDecoder")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_port.py").write_text(
        "class Port:\n    dtypes = ('float8',)\n    def assign(self, cost, *, dtype): ...\n"
    )
    with pytest.raises(ValueError, match=r"Port\.dtypes: expected some of float64, .* got 'float8'"):
        load_outside("my_port:Port")
