"""Options of pytest for the suite: ``pytest conformance --implementation package.module:Class --profile ci``; and what every test
must leave as it was."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from smca.conformance.implementations import torch_setting  # noqa: F401 - first: Triton's interpreter is chosen before Triton is imported
from smca.conformance.runner import PROFILES
from smca.gpu.training.determinism import flushes_denormals


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("conformance")
    group.addoption(
        "--implementation",
        action="append",
        default=[],
        help="one of ours by name, or package.module:Class of yours; may be given several times (default: all of ours)",
    )
    group.addoption(
        "--profile", choices=list(PROFILES), default="quick", help="how many examples per property (default: quick)"
    )


@pytest.fixture(autouse=True)
def _process_as_it_was() -> Iterator[None]:
    """No test, and nothing that it calls, leaves the process computing otherwise: the tests after it would depend on it."""
    before = computes()
    yield
    assert computes() == before


def computes() -> dict[str, object]:
    """What holds for the whole process of how it computes."""
    return {
        "flushes the smallest numbers to 0": flushes_denormals(),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "default dtype": torch.get_default_dtype(),
        "float32 matrix products": torch.get_float32_matmul_precision(),
        "threads": torch.get_num_threads(),
    }
