"""Our own implementations by name. What they are made of is imported when one is made: the suite itself needs NumPy and
Hypothesis."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from smca.conformance.implementations.port import Port
from smca.conformance.protocol import DTYPES, Unavailable, load_outside

_LACKING = "{} is not installed: it comes with the whole project, smca-detr"


@dataclass(frozen=True)
class Ours:
    """How to make one of ours."""

    module: str
    """Of this package."""
    kind: str
    """The class."""
    arguments: tuple[Any, ...] = ()

    def __call__(self) -> Any:
        """The implementation.

        Raises:
            Unavailable: it cannot run on this machine.
        """
        try:
            module = importlib.import_module(f"smca.conformance.implementations.{self.module}")
        except ModuleNotFoundError as error:
            raise Unavailable(_LACKING.format(error.name)) from error
        return getattr(module, self.kind)(*self.arguments)


IMPLEMENTATIONS: dict[str, Callable[[], Any]] = {
    "oracle": Ours("oracle", "Oracle"),
    "oracle-cupy": Ours("oracle", "OracleOnCuPy"),
    "eager": Ours("pytorch", "TorchModel", ("eager", "cpu", DTYPES, {})),
    "lifted": Ours("pytorch", "Lifted", ("cpu",)),
    "auto": Ours("pytorch", "Auto", ("cpu",)),
    "autocast": Ours("pytorch", "Autocast", ("cpu",)),
    "compiled": Ours("pytorch", "Compiled"),
    "eager-cuda": Ours("pytorch", "TorchModel", ("eager", "cuda", DTYPES, {})),
    "lifted-cuda": Ours("pytorch", "Lifted", ("cuda",)),
    "auto-cuda": Ours("pytorch", "Auto", ("cuda",)),
    "autocast-cuda": Ours("pytorch", "Autocast", ("cuda",)),
    "triton": Ours("pytorch", "Triton", ("cpu",)),
    "triton-cuda": Ours("pytorch", "Triton", ("cuda",)),
    "autocast-triton": Ours("pytorch", "AutocastTriton", ("cpu",)),
    "autocast-triton-cuda": Ours("pytorch", "AutocastTriton", ("cuda",)),
    "criterion-scipy": Ours("losses", "Criterion", ("scipy", "cpu")),
    "criterion-half-scipy": Ours("losses", "CriterionInHalf", ("scipy", "cpu")),
    "criterion-cupy": Ours("losses", "Criterion", ("cupy", "cuda")),
    "scipy": Ours("losses", "SciPyAssignment"),
    "cuda-assignment": Ours("losses", "CudaAssignment"),
    "trainer": Ours("trainer", "Trainer"),
}
"""Name → how to make it; making it raises `Unavailable` on a machine that lacks what it needs."""


EXEC = "exec:"
"""Before the command of a program that is an implementation."""
TIME_LIMIT = 60.0
"""Seconds that an answer or an example may take."""


def implementation_of(name: str, time_limit: float = TIME_LIMIT) -> Any:
    """One of ours by name, "package.module:Class", or "exec:program and its arguments".

    Args:
        name: of the implementation.
        time_limit: seconds that a program may take for an answer.

    Raises:
        ValueError: no such implementation.
        Unavailable: it cannot run on this machine.
    """
    if name.startswith(EXEC):
        return Port(name.removeprefix(EXEC), time_limit)
    if ":" in name:
        return load_outside(name)
    if name not in IMPLEMENTATIONS:
        raise ValueError(
            f"no implementation {name!r}: choose one of {', '.join(IMPLEMENTATIONS)}, or name yours as package.module:Class or "
            "'exec:program'"
        )
    return IMPLEMENTATIONS[name]()
