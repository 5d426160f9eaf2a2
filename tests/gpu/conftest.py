"""What several files of these tests take."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from smca.gpu import train


@pytest.fixture(scope="module")
def no_pictures() -> Iterator[None]:
    """Training ends without drawings of its data and curves, which take longer than a run of a few steps.

    A file whose runs are not looked at takes it with ``pytestmark = pytest.mark.usefixtures("no_pictures")``.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "draw_run", lambda *_: None)
        yield
