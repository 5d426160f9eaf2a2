"""Tables for the docs: the worst errors (docs/numerics.md) and what killed the mutants (docs/mutants.md)."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import platform
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

from smca.conformance.mutants.plant import MutantResult
from smca.conformance.progress import followed
from smca.conformance.property import Property
from smca.conformance.protocol import OPERATIONS
from smca.conformance.runner import PROFILES, Case, Outcome, cases, run
from smca.conformance.tolerances import CONSTANTS, UNIT_ROUNDOFF

INTRODUCTION = """# How exact the implementations are

Every implementation computes what the NumPy specification computes, up to rounding. How much rounding is allowed is
derived from each input (`conformance/tolerances.py`), entry by entry:

    bound = constant · roundings · unit roundoff · condition number of the input

The table shows the worst error seen, as a multiple of that bound: 1 would be a failure. "Error" and "bound" are those of
the entry with the worst ratio, in units of the output. Where the bound is loose, the reason is the condition number and
not a tolerance: in the same array, an entry that rounding hardly touches is held to its last digits. To use an example again, run
`from smca.conformance.replay import *`: its `arrays(dtype)` are the inputs, and `replay(property, implementation, dtype, example)`
checks it.
"""

SLOW_EXAMPLES = 12
"""Examples per property for implementations that take seconds each: compiled for every shape, or interpreted."""
ONLY_SLOW_EXAMPLES = 150
"""The same for an operation that no other implementation has."""


def numerics(path: Path, implementations: Sequence[Any], properties: Sequence[Property], examples: int) -> None:
    """Run the comparisons with the oracle on many examples and write the table.

    Args:
        path: of the Markdown file.
        implementations: to compare.
        properties: only those that compare with the oracle are used; for an operation without any (gradients of the loss
            and of the model), those that compare with differences of the oracle.
        examples: least number per operation, over all implementations and dtypes together, not counting slow ones.
    """
    by_operation: dict[str, list[Case]] = defaultdict(list)
    for case in cases([prop for prop in properties if _against_oracle(prop)], implementations, PROFILES["deep"]):
        if case.missing is None:
            by_operation[case.prop.operation].append(case)
    wanted: dict[Case, int] = {}
    for operation_cases in by_operation.values():
        factors = {
            case: case.prop.examples_factor * float(getattr(case.implementation, "examples_factor", 1.0))
            for case in operation_cases
        }
        quick = [case for case in operation_cases if not getattr(case.implementation, "slow", False)]
        number = int(np.ceil(examples / sum(factors[case] for case in quick))) if quick else 0
        for case in operation_cases:
            wanted[case] = number or round(ONLY_SLOW_EXAMPLES / factors[case])
            if quick and case not in quick:
                wanted[case] = round(SLOW_EXAMPLES / factors[case])
    outcomes = [
        run(case, PROFILES["deep"], examples=wanted[case])
        for case in followed(list(wanted), lambda case: f"{case.prop.operation} {case.dtype}")
    ]
    path.write_text("\n".join([INTRODUCTION, *_numerics_lines(outcomes), ""]), encoding="utf-8")
    print(f"wrote {path}")
    failed = [outcome for outcome in outcomes if outcome.status == "failed"]
    for outcome in failed:
        print(outcome.message, end="\n\n")
    if failed:
        raise SystemExit(1)


def _against_oracle(prop: Property) -> bool:
    return prop.oracle or prop.name == "forward_vjp.every_parameter"


def _pytorch() -> str:
    try:
        return f", PyTorch {importlib.metadata.version('torch')}"
    except importlib.metadata.PackageNotFoundError:
        return ""


def _numerics_lines(outcomes: Sequence[Outcome]) -> list[str]:
    lines = [
        f"Measured {date.today().isoformat()}: Python {platform.python_version()}, NumPy {np.__version__}{_pytorch()}, "
        f"{platform.machine()}; `smca conformance --report docs/numerics.md`.",
        "",
    ]
    for operation in OPERATIONS:
        rows = [outcome for outcome in outcomes if outcome.case.prop.operation == operation]
        if not rows:
            continue
        constant, reason = CONSTANTS[operation]
        total = sum(outcome.worst.examples for outcome in rows)
        slow = all(getattr(outcome.case.implementation, "slow", False) for outcome in rows)
        lines += [
            f"## `{operation}`",
            "",
            f"{total:,} examples; {rows[0].case.prop.sentence}. Constant {constant:g}: {reason}.",
            *(["Few examples, because each takes a second, in Triton's interpreter or compiled."] if slow else []),
            "",
            "| implementation | dtype | examples | worst error / bound | error | bound | of |",
            "|---|---|---:|---:|---:|---:|---|",
        ]
        recipes = []
        for outcome in rows:
            worst, name = outcome.worst, outcome.case.implementation.name
            ratio = "**failed**" if outcome.status == "failed" else f"{max(worst.ratio, 0):.3f}"
            lines.append(
                f"| {name} | {outcome.case.dtype} | {worst.examples:,} | {ratio} | {worst.error:.1e} | {worst.bound:.1e} "
                f"| {worst.what.rstrip(', ')} |"
            )
            recipes.append(f"- {name}, {outcome.case.dtype}: `{short(worst.recipe)}`")
        lines += ["", "<details><summary>The examples that gave them</summary>", "", *recipes, "", "</details>", ""]
    roundoffs = ", ".join(f"{dtype} {value:.1e}" for dtype, value in UNIT_ROUNDOFF.items())
    return [*lines, f"Unit roundoffs: {roundoffs}."]


def short(recipe: Any) -> str:
    """Python that makes a recipe again, without the fields that have their default values."""
    if not dataclasses.is_dataclass(recipe):
        return repr(recipe)
    values = {field.name: (getattr(recipe, field.name), field.default) for field in dataclasses.fields(recipe)}
    changed = ", ".join(f"{name}={short(value)}" for name, (value, default) in values.items() if value != default)
    return f"{type(recipe).__name__}({changed})"


def mutants_table(results: Iterable[MutantResult]) -> Iterator[str]:
    """Markdown: one row per mutant as soon as it is there, and at the end how many were found."""
    yield "| bug | where | killed by | after examples | seconds | also without the oracle, by |"
    yield "|---|---|---|---:|---:|---|"
    tried = dead = alone = 0
    for result in results:
        mutant = result.mutant
        names = [name.partition(".")[2].replace("_", " ") for name in result.without_oracle]
        also = ", ".join([*names[:3], *([f"{len(names) - 3} more"] if len(names) > 3 else [])]) or "—"
        where = f"{mutant.package}/{mutant.module.replace('.', '/')}.py"
        yield (
            f"| {mutant.bug} | {where} | {result.killer or '**alive**'} | {result.examples} "
            f"| {result.first_seconds:.2f} | {also} |"
        )
        tried, dead, alone = tried + 1, dead + bool(result.killer), alone + bool(names)
    yield ""
    yield f"{dead} of {tried} killed; {alone} of them also by properties that need no oracle."
