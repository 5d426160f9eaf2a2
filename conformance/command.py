"""Check implementations of SMCA against the specification.

    smca conformance                                     all of ours, quick profile
    smca conformance --implementation mine.port:Port     yours (docs/conformance.md shows how to write it)
    smca conformance --only smca_attention --profile ci  part of it, more examples
    smca conformance --mutants                           plant every known bug and see which property finds it
    smca conformance --report docs/numerics.md           the worst errors over many examples, as a table

Exit status 1 if a property fails or a mutant lives.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro
from rich.console import Console
from rich.progress import Progress

from smca.conformance.diagnosis import explain
from smca.conformance.implementations.ours import IMPLEMENTATIONS
from smca.conformance.mutants.plant import MUTANTS, kill
from smca.conformance.property import Property
from smca.conformance.protocol import Unavailable, implemented, name_of
from smca.conformance.replay import implementation_of
from smca.conformance.report import mutants_table, numerics
from smca.conformance.runner import PROFILES, Outcome, cases, run
from smca.conformance.suite import PROPERTIES


@dataclass(frozen=True)
class ConformanceArgs:
    """Check implementations of SMCA against the specification."""

    implementation: tuple[str, ...] = ()
    """One of ours by name, or yours as package.module:Class; may be several. None given: all of ours that run here."""
    profile: Literal["quick", "ci", "deep"] = "quick"
    """Examples per property: quick 20, the same each time; ci 100 and deep 5000, new ones each time."""
    only: str = ""
    """Part of the name of the properties to check, such as "smca_attention_vjp" or "padded"."""
    list: bool = False
    """Only list implementations and properties."""
    mutants: bool = False
    """Plant each known bug by itself and report which property finds it, after how many examples."""
    report: Path | None = None
    """Write the worst errors of all comparisons with the oracle to this Markdown file (as docs/numerics.md)."""
    examples: int = 10_000
    """With --report: least number of examples per operation, over all implementations and dtypes."""


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of ``smca conformance``."""
    args = tyro.cli(ConformanceArgs, args=argv, prog="smca conformance")
    torch.set_num_threads(1)  # examples are small: more threads would only wait for each other
    chosen = [prop for prop in PROPERTIES if args.only in prop.name]
    if not chosen:
        raise ValueError(f"--only {args.only!r}: no property has that in its name; see --list for the names")
    if args.list:
        _list(chosen)
    elif args.mutants:
        _mutants(args, chosen)
    elif args.report is not None:
        numerics(args.report, _made(args), chosen, args.examples)
    else:
        _check(args, chosen)


def _made(args: ConformanceArgs) -> list[object]:
    """The implementations asked for; by default all of ours that this machine can run."""
    made = []
    for name in args.implementation or IMPLEMENTATIONS:
        try:
            made.append(implementation_of(name))
        except Unavailable as reason:
            if args.implementation:
                raise ValueError(f"--implementation {name}: {reason}") from None
            print(f"not run here: {name} ({reason})")
    return made


def _list(chosen: Sequence[Property]) -> None:
    for name, make in IMPLEMENTATIONS.items():
        try:
            made = make()
            print(f"{name:18} {', '.join(made.dtypes)}")
        except Unavailable as reason:
            print(f"{name:18} not here: {reason}")
    print()
    for prop in chosen:
        print(f"{prop.name}\n    {prop.sentence}\n    {prop.equation}")


def _check(args: ConformanceArgs, chosen: Sequence[Property]) -> None:
    profile = PROFILES[args.profile]
    everything = list(cases(chosen, _made(args), profile))
    console, outcomes = Console(stderr=True), []
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("checking", total=len(everything))
        for case in everything:
            progress.update(task, description=f"{name_of(case.implementation)} {case.dtype} {case.prop.name}")
            outcomes.append(run(case, profile))
            progress.advance(task)
    for outcome in outcomes:
        if outcome.status == "failed":
            print("\n".join(filter(None, [outcome.message, explain(outcome)])), end="\n\n")
    print("\n".join(summary(outcomes)))
    if any(outcome.status == "failed" for outcome in outcomes):
        raise SystemExit(1)


def summary(outcomes: Sequence[Outcome]) -> list[str]:
    """One line per implementation, dtype and operation: what passed, what failed, what is missing."""
    lines: list[str] = []
    groups: dict[tuple[str, str, str], list[Outcome]] = {}
    for outcome in outcomes:
        case = outcome.case
        missing = not implemented(case.implementation, case.prop.operation)
        key = name_of(case.implementation), "" if missing else case.dtype, case.prop.operation
        groups.setdefault(key, []).append(outcome)
    lines.append(f"{'implementation':18} {'dtype':9} {'operation':30} {'passed':>6} {'failed':>6}  worst error / bound")
    for (name, dtype, operation), group in groups.items():
        start = f"{name:18} {dtype:9} {operation:30}"
        if not dtype:
            lines.append(f"{start} not implemented")
            continue
        passed, failed = (sum(o.status == status for o in group) for status in ("passed", "failed"))
        worst = max(o.worst.ratio for o in group)
        lacking = sum(o.status == "not implemented" for o in group)
        also = f" ({lacking} not checked: it leaves them out, or lacks an operation that they need)" if lacking else ""
        lines.append(f"{start} {passed:6} {failed:6}  {f'{worst:.3g}' if worst >= 0 else 'exact'}{also}")
    examples, seconds = sum(o.worst.examples for o in outcomes), sum(o.seconds for o in outcomes)
    failures = sum(outcome.status == "failed" for outcome in outcomes)
    lines.append(
        f"{examples} examples in {seconds:.0f} s; {failures or 'no'} propert{'y' if failures == 1 else 'ies'} failed"
    )
    return lines


def _mutants(args: ConformanceArgs, chosen: Sequence[Property]) -> None:
    warnings.simplefilter("ignore", RuntimeWarning)  # a bug may divide by 0 on its way to being found
    results = []
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("planting", total=len(MUTANTS))
        for mutant in MUTANTS:
            progress.update(task, description=mutant.bug)
            try:
                results.append(
                    kill(mutant, chosen, PROFILES[args.profile], thorough=mutant.module != "attention.fused_kernels")
                )
            except Unavailable as reason:
                print(f"not planted: {mutant.bug} ({reason})")
            progress.advance(task)
    print("\n".join(mutants_table(results)))
    if not all(result.killer for result in results):
        sys.exit(1)
