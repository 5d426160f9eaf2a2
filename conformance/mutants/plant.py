"""Proof that the suite can fail: every bug of `table` is planted by itself, and a property must go red."""

from __future__ import annotations

import importlib
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from smca.conformance.implementations.oracle import Oracle
from smca.conformance.mutants.importing import folder_of, planted_package
from smca.conformance.mutants.table import ORACLE, Mutant
from smca.conformance.mutants.table_anchored import ANCHORED
from smca.conformance.mutants.table_gpu import DROPOUT, KERNELS, LIFTING, PRODUCTION
from smca.conformance.mutants.table_gradients import BOXED, GRADIENTS
from smca.conformance.mutants.table_inputs import INPUTS, LAYOUT
from smca.conformance.mutants.table_loss import LOSS
from smca.conformance.mutants.table_precision import PRECISION
from smca.conformance.mutants.table_softmax import SOFTMAX
from smca.conformance.mutants.table_training import TRAINING
from smca.conformance.property import Property
from smca.conformance.runner import Case, Profile, run

MUTANTS = [
    *ORACLE,
    *PRODUCTION,
    *KERNELS,
    *DROPOUT,
    *LIFTING,
    *ANCHORED,
    *SOFTMAX,
    *LOSS,
    *GRADIENTS,
    *BOXED,
    *INPUTS,
    *LAYOUT,
    *PRECISION,
    *TRAINING,
]

_ATTENTION = (
    "smca_attention",
    "smca_attention_vjp",
    "multi_scale_smca_attention",
    "multi_scale_smca_attention_vjp",
)
CONCERNS = {
    "gaussian": _ATTENTION[:3],
    **dict.fromkeys(("attention_forward", "attention_backward", "dispatch", "eager", "lifted"), _ATTENTION),
    "fused_kernels": ("smca_attention", "smca_attention_vjp"),
    "boxes": ("generalized_box_iou", "match_cost", "set_loss", "set_loss_vjp"),
    "matching": ("match_cost", "assign", "set_loss"),
    "matcher": ("match_cost", "set_loss"),
    "losses": ("set_loss",),
    **dict.fromkeys(("criterion", "classification"), ("set_loss", "set_loss_vjp")),
}
"""File → the operations that a bug in it can reach; for any other file, the whole model."""

_BEYOND = ("anchored_forward", "anchored_forward_vjp", "noised_queries", "training_loss", "training_loss_vjp")
"""What a bug of `table_anchored` can reach."""

_SOFTMAX = (
    "log_odds",
    "log_odds_vjp",
    "softmax_match_cost",
    "softmax_set_loss",
    "softmax_set_loss_vjp",
    "forward",
    "forward_vjp",
)
"""What a bug of `table_softmax` can reach."""

_LOSS = (
    "match_cost",
    "assign",
    "set_loss",
    "set_loss_vjp",
    "training_loss",
    "training_loss_vjp",
    "softmax_match_cost",
    "softmax_set_loss",
    "softmax_set_loss_vjp",
)
"""What a bug of `table_loss` can reach."""

_TRAINING = ("train", "set_loss_vjp", "softmax_set_loss_vjp")
"""What a bug of `table_training` can reach."""


@contextmanager
def planted(mutant: Mutant) -> Iterator[list[Any]]:
    """Implementations with the bug in them.

    Raises:
        Unavailable: the code that holds the bug cannot run on this machine.
    """
    if mutant.package == "reference":
        with planted_package(mutant) as name:
            yield [_oracle_of(name)]
        return
    folder_of(mutant.package)  # raises where it is not installed
    from smca.conformance.mutants import production

    if mutant.module == "attention.fused_kernels":
        with production.in_kernels(mutant) as implementations:
            yield implementations
    else:
        with planted_package(mutant) as name:
            yield production.in_production(name, mutant)


def _oracle_of(name: str) -> Any:
    """The specification as it is in another package."""
    oracle: Any = Oracle()
    oracle.examples_factor, oracle.is_oracle = 1.0, False
    for module in (
        "attention",
        "boxes",
        "matching",
        "losses",
        "model",
        "dense_loss",
        "denoising",
        "softmax_scores",
        "losses_backward",
        "training_run",
    ):
        setattr(oracle, module, importlib.import_module(f"{name}.{module}"))
    return oracle


def operations_of(mutant: Mutant) -> tuple[str, ...]:
    """What a bug can reach."""
    if mutant in TRAINING:
        return _TRAINING
    if mutant in ANCHORED:
        return _BEYOND
    if mutant in SOFTMAX:
        return _SOFTMAX
    if mutant in LOSS:
        return _LOSS
    if mutant in GRADIENTS:
        return ("forward_vjp",)
    if mutant in BOXED:
        return ("anchored_forward_vjp",)
    if mutant in DROPOUT:
        return ("smca_attention_dropout",)
    if mutant in LAYOUT or mutant in PRECISION:
        return ("smca_attention", "smca_attention_vjp")
    return CONCERNS.get(mutant.module.rpartition(".")[2], ("forward", "forward_vjp"))


@dataclass(frozen=True)
class MutantResult:
    """Which property killed a mutant, and when."""

    mutant: Mutant
    killer: str
    """Name of the first property that failed; empty if none did: the mutant lives."""
    examples: int
    """Examples that the property tried until it failed."""
    without_oracle: tuple[str, ...]
    """Properties that fail without the oracle, by comparing the implementation only with itself; filled in on request."""
    first_seconds: float
    """Seconds from planting the bug to the first property that failed."""
    message: str


def kill(mutant: Mutant, properties: Iterable[Property], profile: Profile, *, thorough: bool = False) -> MutantResult:
    """Run the properties that the bug can reach: first equality with the oracle, then the others. Where what holds the bug is slow,
    the examples that are always tried come first, of every operation, before any that is drawn.

    Args:
        mutant: what to plant.
        properties: all properties.
        profile: how many examples of each.
        thorough: do not stop at the first that fails; find all that fail without the oracle, unless what holds the bug is slow.
    """
    operations = operations_of(mutant)
    concerned = [prop for prop in properties if prop.operation in operations]
    concerned.sort(key=lambda prop: not prop.oracle)
    begun, first, killer, examples, message, without = time.perf_counter(), 0.0, "", 0, "", []
    with planted(mutant) as implementations:
        slow = any(getattr(implementation, "slow", False) for implementation in implementations)
        order: list[tuple[Property, int | None]] = [(p, 0) for p in concerned if slow and p.always]
        order += [(prop, None) for prop in concerned]
        for prop, number in order:
            for implementation in implementations:
                for dtype in implementation.dtypes:
                    case = Case(prop, implementation, dtype)
                    if case.missing or (prop.dtypes and dtype not in prop.dtypes) or prop.name in without:
                        continue
                    outcome = run(case, profile, examples=number, shrink=False)
                    if outcome.status != "failed":
                        continue
                    if not killer:
                        killer, examples, message = prop.name, outcome.worst.examples, outcome.message
                        first = time.perf_counter() - begun
                    if slow or not thorough:
                        return MutantResult(mutant, killer, examples, (), first, message)
                    if not prop.oracle:
                        without.append(prop.name)
    return MutantResult(mutant, killer, examples, tuple(without), first, message)
