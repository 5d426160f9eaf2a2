"""The benchmark measures both sides, says how far their results differ, and goes on after a case that fails."""

from __future__ import annotations

import gzip
import inspect
import json
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from smca.gpu.attention import smca_attention
from smca.gpu.benchmark import command as benchmark
from smca.gpu.benchmark.attention import Size, _attention_inputs, attention_case, flex, lifted_bf16_split
from smca.gpu.benchmark.cases import (
    BEYOND,
    Step,
    Work,
    assignment_case,
    recipe_step_case,
    smca_step_case,
    transformers_step_case,
)
from smca.gpu.benchmark.measure import Part, Run, measure_together
from smca.gpu.benchmark.profile import profile_step
from smca.gpu.benchmark.report import PARTS, Report, summarize, table
from smca.gpu.loss import criterion
from smca.gpu.model import decoder
from smca.gpu.training.muon import Muon

ON_CPU = ["--device", "cpu", "--repeats", "2", "--threads", "1", "--name", "benchmark"]
SMALL = Size(batch=1, heads=2, queries=9, maps=((50, 84),))


@pytest.mark.parametrize("part", ["attention", "multi-scale"])
def test_attention_parts_run_and_write_a_table(part: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    maps = ["4", "6"] if part == "attention" else ["4", "6", "2", "3"]
    sizes = ["--attention.queries", "5", "--attention.heads", "2", "--attention.maps", *maps]
    benchmark.main(["--only", part, "--output", str(tmp_path), *ON_CPU, *sizes])
    parts = json.loads((tmp_path / "benchmark.json").read_text())["parts"]
    assert list(parts) == [f"{part}, forward", part]
    record = parts[part]
    assert list(record) == ["lifted", "eager", "sdpa-mask", "lifted-bf16-split", "plain"]
    for result in record.values():
        assert len(result["seconds"]) == 2, "the warm-up is not counted"
        assert result["peak_mib"] >= 0
    names = [f"{n}{level}" for n in ("k", "v", "center_xy", "precision_xy") for level in (" of level 0", " of level 1")]
    if part == "attention":
        names = ["k", "v", "center_xy", "precision_xy"]
    else:
        names.append("level_weights")
    for name, most in {"lifted": 1e-4, "sdpa-mask": 1e-5, "lifted-bf16-split": 0.03}.items():
        assert set(record[name]["difference"]) == {"out", "grad q", *(f"grad {n}" for n in names)}
        assert 0 < max(record[name]["difference"].values()) < most
    assert record["eager"]["difference"] == record["plain"]["difference"] == {}
    table = (tmp_path / "benchmark.md").read_text()
    assert "| eager |" in table
    assert table.strip() in capsys.readouterr().out


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Small work on several threads of a busy machine mostly waits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_flex_attention_adds_the_prior(dtype: torch.dtype) -> None:
    """The score_mod of flex, uncompiled; compiled, it needs a GPU."""
    q, (level,), *_ = _attention_inputs(SMALL)
    prior = (level.center_xy, level.precision_xy, level.size)
    out = flex(q.to(dtype), level.k.to(dtype), level.v.to(dtype), *prior)
    assert out.dtype == dtype
    assert _difference(out, smca_attention(q, level.k, level.v, *prior, backend="eager")) < (
        1e-5 if dtype == torch.float32 else 5e-3
    )


def test_splitting_into_bf16_parts_keeps_the_prior_where_bf16_loses_it() -> None:
    """The output and the gradients of q, k, v to bfloat16's rounding; those of the prior to some hundredths, as documented."""
    got = attention_case("lifted-bf16-split", torch.bfloat16, SMALL)["forward+backward"]()
    expected = attention_case("eager", torch.float32, SMALL)["forward+backward"]()
    for name, value in got.items():
        assert _difference(value, expected[name]) < (0.1 if "_xy" in name else 6e-3), name


def test_parts_carry_the_prior_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Summed in float64 in place of a kernel, the bfloat16 parts are the definition's logits to float32's rounding."""

    def exact(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        assert {q.dtype, k.dtype, v.dtype} == {torch.bfloat16}
        assert q.shape[-1] == k.shape[-1] == v.shape[-1] == 48
        return (scale * q.double() @ k.double().mT).softmax(-1) @ v.double()

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", exact)
    q, (level,), *_ = _attention_inputs(SMALL)
    inputs = [t.double() for t in (q, level.k, level.v, level.center_xy, level.precision_xy)]
    got = lifted_bf16_split(*inputs, level.size)
    assert _difference(got, smca_attention(*inputs, level.size, backend="eager")) < 1e-5
    with pytest.raises(ValueError, match="at most 256"):
        lifted_bf16_split(*inputs, (10, 420))


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        ("smca_r50", torch.float32),
        ("smca_r50_multiscale", torch.bfloat16),
        ("Detr", torch.bfloat16),
        ("ConditionalDetr", torch.float32),
        ("DeformableDetr", torch.bfloat16),
    ],
)
def test_each_detector_infers_and_takes_gradients(case: str, dtype: torch.dtype) -> None:
    work = Work((64, 96), batch=1, dtype=dtype)
    modes = smca_step_case(case, "auto", work) if case.islower() else transformers_step_case(case, work)
    assert list(modes) == ["inference", "training"]
    assert modes["inference"]()["logits"].shape[:2] == (1, 300)
    assert 0 < float(modes["training"]()["loss"]) < 1e4


def test_what_a_gpu_measures_trains_a_resnet50() -> None:
    work = Work((64, 96), batch=1, small=False)
    step = smca_step_case("smca_r50 dense", "auto", work)["training"]
    first, second = float(step()["loss"]), float(step()["loss"])
    assert first != second
    parts = list(benchmark.parts_of("step", benchmark.BenchmarkArgs(batches=(2, 4)), "cpu", full=True))
    assert [p.images for p in parts] == [4, 2, 4, 2]
    assert {"smca_r50", "smca_r50 lifted", "smca_r50 dense", "transformers DeformableDetr"} <= set(parts[0].cases)


def test_each_part_beyond_the_paper_is_a_step_of_its_own() -> None:
    """By name, whether a model's outputs and its optimiser are those of the parts that it keeps."""
    (part,) = benchmark.parts_of("recipe", benchmark.BenchmarkArgs(), "cpu", full=False)
    assert list(part.cases) == [
        "nothing beyond, 3 decoder layers",
        "nothing beyond the paper",
        "+ boxes",
        "+ Muon",
        "+ matchability",
        "+ noised queries = demo",
    ]
    work = Work((32, 48), batch=2)
    losses = [float(recipe_step_case("demo", beyond, work)["training"]()["loss"]) for beyond in range(len(BEYOND) + 1)]
    plain, boxes, muon, matchability, everything = losses
    assert plain < boxes == muon != matchability < everything, (
        "a dense head and noised queries have losses of their own"
    )
    for beyond, optimizer in ((1, torch.optim.AdamW), (2, Muon)):
        step = recipe_step_case("demo", beyond, work)["training"]
        made = inspect.getclosurevars(step).nonlocals["optimizer"]
        assert type(made) is optimizer
        first, second = float(step()["loss"]), float(step()["loss"])
        assert first != second, "the optimiser moves the weights"
    (part,) = benchmark.parts_of("recipe", benchmark.BenchmarkArgs(image_size=(64, 96), batches=(2,)), "cpu", full=True)
    assert next(reversed(part.cases)) == "+ noised queries = fast_r50"
    assert "2 images of 64×96" in part.title


def test_a_case_that_fails_leaves_the_others(tmp_path: Path) -> None:
    """The code for a GPU, run on the CPU: cases that need CUDA fail there; running out of memory is no failure."""
    part = next(benchmark.parts_of("assignment", benchmark.BenchmarkArgs(), "cpu", full=True))
    part.cases["big"] = lambda: {"forward": _no_memory}
    forward = partial(dict, query=torch.zeros(6, 2, 20))
    part.cases["forward only"] = lambda: {
        "forward": forward,
        "training": partial(_raise, ValueError("line\nlast line")),
    }
    runs = measure_together(part, 3, "cpu", time.time() + 60)
    assert len(runs["scipy"].seconds["forward"]) == 3
    assert not runs["scipy"].failed
    assert "needs a CUDA device" in runs["kernel"].errors["forward"]
    assert runs["kernel"].failed
    assert runs["big"].errors == {"forward": "out of memory"}
    assert not runs["big"].failed
    assert runs["forward only"].errors == {"training": "ValueError: last line"}
    assert len(runs["forward only"].seconds["forward"]) == 3
    report = Report("header", tmp_path / "gpu", gpu=True)
    report.add(part, runs)
    assert report.failed
    text = (tmp_path / "gpu.md").read_text()
    assert "| big | out of memory |" in text
    assert "| forward only | ValueError: last line |" in text
    late = measure_together(part, 3, "cpu", time.time() - 1)
    assert {run.errors[""] for run in late.values()} == {"left out: --minutes were used up"}
    assert not any(run.failed for run in late.values())


@pytest.mark.skipif(torch.cuda.is_available(), reason="without a GPU every case fails, which is what this looks at")
def test_a_group_on_the_gpu_reports_from_its_own_process(tmp_path: Path) -> None:
    report = Report("header", tmp_path / "gpu", gpu=True)
    benchmark.measure_on_gpu("assignment", benchmark.BenchmarkArgs(), 2, time.time() + 120, report)
    assert report.failed
    assert list(report.record["parts"]) == [f"assignment {batch}" for batch in (2, 8, 16, 32)]
    for results in report.record["parts"].values():
        assert all("error" in r and "Traceback" in r["traceback"] for r in results.values())


def test_hours_follow_from_the_rate() -> None:
    runs = {"ours": Run(seconds={"training": [2.0, 1.0, 1.0]}, peak_mib={"training": 5.0})}
    part = Part("step", "Step", {}, images=16)
    result = summarize(runs, part, gpu=True)["training"]["ours"]
    assert result["images_per_second"] == 16
    assert result["hours"] == pytest.approx(50 * 118_287 / 16 / 3600)
    assert "hours" not in summarize(runs, part, gpu=False)["training"]["ours"]
    assert f"| {result['hours']:.0f} h |" in table("Step", {"ours": result}, None)


def test_the_command_ends_with_an_error_after_a_failed_case(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def parts_of(*_: Any, **__: Any) -> Iterator[Part]:
        names = ("kernel", "scipy")
        yield Part("assignment", "Assignment", {name: partial(assignment_case, name, 2) for name in names})

    monkeypatch.setattr(benchmark, "parts_of", parts_of)
    with pytest.raises(SystemExit) as ending:
        benchmark.main(["--only", "assignment", "--output", str(tmp_path), *ON_CPU])
    assert ending.value.code == 1
    out = capsys.readouterr().out
    assert "| kernel | RuntimeError: the assignment kernel needs a CUDA device" in out
    assert "| scipy | " in out, "the others are measured"


def test_a_profile_tells_parts_and_directions_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention that takes 20 ms longer forward and 40 ms longer backward per layer; a matcher that takes 0.1 s longer."""
    attend, match = decoder.multi_scale_smca_attention, criterion.match

    def slow_attend(q: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        time.sleep(0.02)
        q.register_hook(lambda grad: time.sleep(0.04))
        return attend(q, *args, **options)

    def slow_match(*args: Any, **options: Any) -> torch.Tensor:
        time.sleep(0.1)
        return match(*args, **options)

    monkeypatch.setattr(decoder, "multi_scale_smca_attention", slow_attend)
    monkeypatch.setattr(criterion, "match", slow_match)
    result = profile_step("smca_r50", Work((64, 96), batch=1), 2, tmp_path / "step")
    parts = result["parts"]
    assert list(parts) == list(PARTS)
    seconds = {(part, direction): x["seconds"] for part, times in parts.items() for direction, x in times.items()}
    assert 0.12 < seconds["attention", "forward"] < seconds["attention", "backward"] - 0.1
    assert seconds["matcher", "forward"] > 0.1
    assert all(s < 0.1 for where, s in seconds.items() if where[0] in ("input", "rest", "criterion"))
    assert sum(seconds.values()) == pytest.approx(result["step_seconds"], rel=0.1)
    assert parts["attention"]["forward"]["flops"] == 4 * 6 * 300 * (2 * 3) * 256  # 6 layers, 2×3 cells, 256 channels
    for part in ("backbone", "encoder", "decoder"):
        flops = {direction: times["flops"] for direction, times in parts[part].items()}
        assert 0.9 * flops["forward"] < flops["backward"] < 2.1 * flops["forward"], part  # the stem is not trained
    assert all(x["floor_seconds"] > 0 for times in parts.values() for x in times.values())
    assert decoder.multi_scale_smca_attention is slow_attend, "put back"
    with gzip.open(tmp_path / "step.trace.json.gz") as file:
        assert json.load(file)["traceEvents"]
    assert "aten::addmm" in (tmp_path / "step.ops.txt").read_text()


def test_the_profile_part_writes_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first profile in a process of its own, as it should be; the second in this one, which is faster."""
    pools = [ProcessPoolExecutor, lambda workers, _: ThreadPoolExecutor(workers)]
    monkeypatch.setattr(benchmark, "ProcessPoolExecutor", lambda *arguments: pools.pop(0)(*arguments))
    benchmark.main(["--only", "profile", "--output", str(tmp_path), *ON_CPU, "--image-size", "64", "96"])
    parts = json.loads((tmp_path / "benchmark.json").read_text())["parts"]
    assert list(parts) == ["profile smca_r50", "profile smca_r50_multiscale"]
    text = (tmp_path / "benchmark.md").read_text()
    assert text.count("| SMCA attention | ") == 2
    assert (tmp_path / "benchmark-smca_r50_multiscale.ops.txt").is_file()


def test_a_profile_that_fails_leaves_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The profiles of a GPU, without one; in this process, which is faster."""
    monkeypatch.setattr(benchmark, "ProcessPoolExecutor", lambda workers, _: ThreadPoolExecutor(workers))
    if torch.cuda.is_available():
        pytest.skip("without a GPU every profile fails, which is what this looks at")
    report = Report("header", tmp_path / "gpu", gpu=True)
    benchmark.measure_profile(benchmark.BenchmarkArgs(image_size=(64, 96)), 1, time.time() + 60, "cuda", report)
    assert report.failed
    assert len(report.record["parts"]) == 2
    assert all("Traceback" in part["traceback"] for part in report.record["parts"].values())
    late = Report("header", tmp_path / "late", gpu=True)
    benchmark.measure_profile(benchmark.BenchmarkArgs(), 1, time.time() - 1, "cuda", late)
    assert not late.failed
    assert "left out" in (tmp_path / "late.md").read_text()


def test_a_gpu_compares_with_plain_attention_of_the_same_dtype() -> None:
    parts = list(benchmark.parts_of("attention", benchmark.BenchmarkArgs(), "cpu", full=True))
    kinds, sizes = ("bf16 replayed", "bf16", "float32"), ("", " 100×168", " 25×42")
    assert [part.key for part in parts] == [f"attention {kind}{size}" for kind in kinds for size in sizes]
    for part in parts:
        first, second, *others = part.cases
        kind = part.key.split()[1]
        assert (first, second) == (f"plain {kind}", f"triton {kind}")
        if "replayed" in part.key:
            assert others == []
            continue
        assert part.reference in others
        assert {f"{name} {kind}" for name in ("lifted", "flex", "sdpa-mask", "eager")} <= set(others)
    (_, half, single) = benchmark.parts_of("multi-scale", benchmark.BenchmarkArgs(), "cpu", full=True)
    assert "keys: 50×84, 25×42, 13×21; bf16" in half.title
    assert single.key == "multi-scale float32"


def test_compiled_is_for_a_gpu(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="on a GPU only"):
        benchmark.main(["--only", "compiled", "--output", str(tmp_path), *ON_CPU])
    (part,) = benchmark.parts_of("compiled", benchmark.BenchmarkArgs(), "cuda", full=True)
    assert list(part.cases) == ["smca_r50", "smca_r50 compiled"]
    assert part.images == 16
    assert list(benchmark.parts_of("compiled", benchmark.BenchmarkArgs(), "cpu", full=False)) == []


def _difference(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got.double() - expected.double()).norm() / expected.double().norm())


def _raise(error: Exception) -> dict[str, torch.Tensor]:
    raise error


_no_memory: Step = partial(_raise, torch.OutOfMemoryError("CUDA out of memory."))
