"""Options of pytest for the suite: ``pytest conformance --implementation package.module:Class --profile ci``."""

from __future__ import annotations

import pytest
import torch

from smca.conformance.runner import PROFILES


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


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)  # examples are small: more threads only wait for each other
