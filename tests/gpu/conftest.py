"""What several files of these tests take."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from smca.gpu import train
from smca.gpu.pictures.run import draw_run


@pytest.fixture(scope="module", autouse=True)
def _no_pictures() -> Iterator[None]:
    """Training ends without drawings of its data and curves, which take longer than a run of a few steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "draw_run", lambda *_: None)
        yield


@pytest.fixture
def pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are drawn after all."""
    monkeypatch.setattr(train, "draw_run", draw_run)
