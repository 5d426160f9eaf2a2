"""Check implementations of SMCA against the specification.

    smca conformance                                     all of ours, quick profile
    smca conformance --implementation mine.port:Port     yours (docs/conformance.md shows how to write it)
    smca conformance --implementation 'exec:./port'      yours, a program in any language
    smca conformance --only smca_attention --profile ci  part of it, more examples
    smca conformance --mutants                           plant every known bug and see which property finds it
    smca conformance --write-vectors build/vectors       inputs and expected outputs as files, for any language
    smca conformance --report docs/numerics.md           the worst errors over many examples, as a table

Exit status 1 if a property fails or a mutant lives.
"""

from __future__ import annotations

import argparse
import multiprocessing
import shlex
import sys
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from smca.conformance.apart import Apart
from smca.conformance.diagnosis import explain
from smca.conformance.implementations.registry import EXEC, IMPLEMENTATIONS, TIME_LIMIT, implementation_of
from smca.conformance.mutants.plant import MUTANTS, MutantResult, kill
from smca.conformance.progress import followed
from smca.conformance.property import Property
from smca.conformance.protocol import Unavailable, address_of, name_of
from smca.conformance.report import mutants_table, numerics
from smca.conformance.results import summary, write_json, write_junit, write_scoreboard
from smca.conformance.runner import PROFILES, Case, Outcome, cases, run
from smca.conformance.suite import PROPERTIES
from smca.conformance.vectors import write_vectors
from smca.conformance.xfails import judged, read_xfails
from smca.reference import SPECIFICATION_VERSION


def _parser(name: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=name, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--implementation",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME",
        help="one of ours by name (see --list), yours as package.module:Class, or a program as 'exec:./port --option'; may be "
        "several, and given several times (default: all of ours that run here)",
    )
    parser.add_argument(
        "--profile",
        choices=list(PROFILES),
        default="quick",
        help="examples per property: quick 20, the same each time; ci 100 and deep 5000, new ones each time (default: quick)",
    )
    parser.add_argument(
        "--only",
        default="",
        metavar="TEXT",
        help='part of the name of the properties to check, such as "smca_attention_vjp" or "padded"',
    )
    parser.add_argument(
        "--time-limit",
        type=float,
        default=TIME_LIMIT,
        metavar="SECONDS",
        help="an implementation of yours that takes longer for an example is ended, and said to hang (default: %(default)g)",
    )
    parser.add_argument(
        "--xfails", type=Path, metavar="FILE", help="properties that are expected to fail, one per line"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every outcome to this file")
    parser.add_argument("--junit", type=Path, metavar="FILE", help="the same as JUnit XML, for continuous integration")
    parser.add_argument(
        "--scoreboard", type=Path, metavar="FILE", help="the same as a Markdown page (as docs/scoreboard.md)"
    )
    parser.add_argument("--list", action="store_true", help="only list implementations and properties")
    parser.add_argument(
        "--mutants",
        action="store_true",
        help="plant each known bug by itself, on all cores, and report which property finds it, after how many examples",
    )
    parser.add_argument(
        "--report",
        type=Path,
        metavar="FILE",
        help="write the worst errors of all comparisons with the oracle to this Markdown file (as docs/numerics.md)",
    )
    parser.add_argument(
        "--write-vectors",
        type=Path,
        metavar="DIR",
        help="write inputs, expected outputs and bounds of chosen examples of every operation to this folder, as safetensors "
        "and an index, for ports that test themselves without Python",
    )
    parser.add_argument(
        "--examples",
        type=int,
        default=10_000,
        metavar="N",
        help="with --report: least number of examples per operation, over all implementations and dtypes (default: %(default)s)",
    )
    return parser


def main(argv: Sequence[str] | None = None, name: str = "smca conformance") -> None:
    """Entry point of ``smca conformance``, and under another name of ``smca-conformance``."""
    args = _parser(name).parse_args(argv)
    chosen = [prop for prop in PROPERTIES if args.only in prop.name]
    if not chosen:
        raise ValueError(f"--only {args.only!r}: no property has that in its name; see --list for the names")
    if args.time_limit <= 0:
        raise ValueError(f"--time-limit: expected seconds above 0, got {args.time_limit:g}")
    if args.list:
        _list(chosen)
    elif args.write_vectors is not None:
        files = write_vectors(args.write_vectors)
        print(f"wrote {len(files)} vectors of specification {SPECIFICATION_VERSION} to {args.write_vectors}")
    elif args.mutants:
        _mutants(args, chosen)
    elif args.report is not None:
        numerics(args.report, _made(args), chosen, args.examples)
    else:
        _check(args, chosen, argv)


def _made(args: argparse.Namespace) -> list[Any]:
    """The implementations asked for; by default all of ours that this machine can run."""
    made = []
    for name in args.implementation or IMPLEMENTATIONS:
        try:
            made.append(implementation_of(name, args.time_limit))
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


def _check(args: argparse.Namespace, chosen: Sequence[Property], argv: Sequence[str] | None) -> None:
    profile = PROFILES[args.profile]
    expected = [] if args.xfails is None else read_xfails(args.xfails, [prop.name for prop in PROPERTIES])
    everything = list(cases(chosen, _made(args), profile))
    apart: dict[str, Apart] = {}
    outcomes: list[Outcome] = []

    def described(case: Case) -> str:
        return f"{name_of(case.implementation)} {case.dtype} {case.prop.name}"

    try:
        for case in followed(everything, described):
            address = address_of(case.implementation)
            if ":" not in address or address.startswith(EXEC):  # ours, or in a process of its own already
                outcome = run(case, profile)
            else:
                if address not in apart:
                    apart[address] = Apart(case.implementation, args.time_limit)
                outcome = apart[address].run(case, profile, explained=not any(line.covers(case) for line in expected))
            outcomes.append(judged(outcome, expected))
    finally:
        for process in apart.values():
            process.end()
    failures = [outcome for outcome in outcomes if outcome.status == "failed"]
    for outcome in failures:
        print("\n".join(filter(None, [outcome.message, outcome.explanation or explain(outcome)])), end="\n\n")
    print("\n".join(summary(outcomes)))
    if args.json is not None:
        write_json(args.json, outcomes, profile.name)
    if args.junit is not None:
        write_junit(args.junit, outcomes)
    if args.scoreboard is not None:
        words = sys.argv[1:] if argv is None else argv
        write_scoreboard(args.scoreboard, outcomes, profile.name, shlex.join(["smca", "conformance", *words]))
    if failures:
        raise SystemExit(1)


def _mutants(args: argparse.Namespace, chosen: Sequence[Property]) -> None:
    alive = []

    def results() -> Iterator[MutantResult]:
        # Processes of their own, and not copies of this one: a copy would share its threads.
        with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
            names = [prop.name for prop in chosen]
            tries = [pool.submit(_killed, number, names, args.profile) for number in range(len(MUTANTS))]
            for number in followed(range(len(MUTANTS)), lambda number: MUTANTS[number].bug):
                result = tries[number].result()
                if isinstance(result, str):
                    print(f"not planted: {MUTANTS[number].bug} ({result})", file=sys.stderr)
                    continue
                alive.extend([] if result.killer else [result])
                yield result

    for line in mutants_table(results()):
        print(line, flush=True)
    if alive:
        sys.exit(1)


def _killed(number: int, names: Sequence[str], profile: str) -> MutantResult | str:
    """In a process of its own: what finds the mutant of this number among the properties of these names, or why it cannot run."""
    warnings.simplefilter("ignore", RuntimeWarning)  # a bug may divide by 0 on its way to being found
    mutant, chosen = MUTANTS[number], [prop for prop in PROPERTIES if prop.name in names]
    try:
        return kill(mutant, chosen, PROFILES[profile], thorough=True)
    except Unavailable as reason:
        return str(reason)
