"""What the benchmark says of the data: both sides load the same pictures, and an index is opened as often as is said."""

import gc
import mmap
import multiprocessing
import os
import re
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from smca.datasets import coco_index
from smca.gpu.benchmark import command, data
from smca.gpu.benchmark.data import bottleneck, loading_case, make_photographs, measure_index
from smca.gpu.benchmark.measure import private_mib


@pytest.mark.parametrize("short_side", [240, 192])
def test_both_ways_load_the_same_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, short_side: int) -> None:
    monkeypatch.setattr(data, "PHOTOGRAPHS", 2)
    folder, _ = make_photographs(tmp_path)
    found = {
        way: loading_case(way, folder, short_side)[""]()["corner"] for way in ("Pillow", "ours", "ours, normalised")
    }
    assert {tuple(value.shape) for value in found.values()} == {(2, 3)}
    assert found["ours"].dtype == torch.uint8
    # Decoded at half its size, a corner's pixel is nearly the same.
    torch.testing.assert_close(found["ours, normalised"], found["Pillow"], atol=0.05, rtol=0)


@pytest.mark.parametrize(
    ("loaded", "taken", "verdict"),
    [
        (100.0, 3.0, "the model is the bottleneck: --workers 1 is enough"),
        (30.0, 149.0, r"the model is the bottleneck with --workers 5 or more \(of 8 cores\)"),
        (10.0, 149.0, "the data are: they need 14.9 cores of 8. Smaller files help, or --cache-images True"),
    ],
)
def test_it_says_what_holds_training_up(loaded: float, taken: float, verdict: str) -> None:
    assert re.search(verdict, bottleneck((loaded, taken), "smca_r50", 8))


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="only Linux says which memory is a process's own")
def test_memory_of_its_own_is_not_what_others_share(tmp_path: Path) -> None:
    """Neither a mapped file's pages, read or written, nor, in a forked process, what was there before."""
    file, mib = tmp_path / "mapped", 2**20
    file.write_bytes(bytes(40 * mib))
    gc.collect()
    before = private_mib()
    shared = np.memmap(file, dtype=np.uint8, mode="r+")
    shared[: 20 * mib] = 1  # on their way to the file
    assert int(shared.sum()) == 20 * mib
    assert private_mib() - before < 5
    changed = np.memmap(file, dtype=np.uint8, mode="c")
    changed[: 10 * mib] = 2
    assert 9 < private_mib() - before < 15
    own = mmap.mmap(-1, 50 * mib, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for page in range(0, len(own), mmap.PAGESIZE):
        own[page] = 3
    together = private_mib()
    assert 59 < together - before < 65
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.apply(private_mib) < together - 45
    own.close()


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="only Linux says which memory is a process's own")
def test_measuring_memory_takes_none() -> None:
    tracemalloc.start()
    try:
        private_mib()
        assert tracemalloc.get_traced_memory()[1] < 2**19
    finally:
        tracemalloc.stop()


def test_the_index_is_made_once_and_found_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def here(measure: Callable[..., dict[str, float]], *arguments: Any) -> dict[str, float]:
        return measure(*arguments)

    monkeypatch.setattr(data, "_apart", here)
    monkeypatch.setattr(data, "_PER_FOLDER", 100)
    monkeypatch.setattr(data, "_TOUCHED", 50)
    monkeypatch.setattr(coco_index, "KEPT_FROM", 0)
    monkeypatch.delenv("SMCA_CACHE", raising=False)
    told: list[str] = []
    record, table = measure_index(250, tmp_path, told.append)
    assert (record["images"], record["boxes"]) == (250, 2000)
    assert record["bytes"] == (tmp_path / "large.json").stat().st_size
    assert told[1:] == ["pycocotools, every start", "first start", "later start", "workers"]
    assert capsys.readouterr().err.count("and its images, once") == 1
    assert record["later start"]["seconds"] < record["first start"]["seconds"]
    assert "SMCA_CACHE" not in os.environ
    for name in told[1:-1]:
        assert f"| {name} | " in table
    with pytest.raises(ValueError, match="--index-images must be at least 1, got 0"):
        command.BenchmarkArgs(index_images=0)
