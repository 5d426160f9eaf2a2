"""What several files of these tests take."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image
from torch import distributed

from smca.gpu import train
from smca.gpu.pictures.priors import draw_priors
from smca.gpu.pictures.run import draw_run
from smca.gpu.training import priors


@pytest.fixture(scope="module", autouse=True)
def _no_pictures() -> Iterator[None]:
    """Training leaves no drawings of its data, curves and queries, which take longer than a run of a few steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "draw_run", lambda *_: None)
        patch.setattr(priors, "draw_priors", lambda *given: Image.new("RGB", (8, 8)).save(given[-1], "PNG"))
        yield


@pytest.fixture
def pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are drawn after all."""
    monkeypatch.setattr(train, "draw_run", draw_run)
    monkeypatch.setattr(priors, "draw_priors", draw_priors)


@pytest.fixture
def job(tmp_path: Path) -> Iterator[None]:
    """This process takes part in a job, alone."""
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()
