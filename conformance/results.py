"""What a run gave: as a table, as a page, as JSON, and as JUnit XML for continuous integration."""

from __future__ import annotations

import json
import math
import platform
import re
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

from smca.conformance.protocol import DTYPES, implemented, name_of
from smca.conformance.report import short
from smca.conformance.runner import Outcome
from smca.conformance.xfails import FAILED_AS_EXPECTED, PASSED_UNEXPECTEDLY
from smca.reference import SPECIFICATION_VERSION


def summary(outcomes: Sequence[Outcome]) -> list[str]:
    """One line per implementation, dtype and operation: what passed, what failed, what is missing; then what else was noticed."""
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
        passed = sum(o.status in ("passed", PASSED_UNEXPECTEDLY) for o in group)
        failed = sum(o.status == "failed" for o in group)
        worst = max(o.worst.ratio for o in group)
        lacking = sum(o.status == "not implemented" for o in group)
        expected = sum(o.status == FAILED_AS_EXPECTED for o in group)
        also = f" ({expected} more failed as expected)" if expected else ""
        also += f" ({lacking} not checked: it leaves them out, or lacks an operation that they need)" if lacking else ""
        lines.append(f"{start} {passed:6} {failed:6}  {f'{worst:.3g}' if worst >= 0 else 'exact'}{also}")
    lines += _remarks(outcomes)
    examples, seconds = sum(o.worst.examples for o in outcomes), sum(o.seconds for o in outcomes)
    failures = sum(outcome.status == "failed" for outcome in outcomes)
    lines.append(
        f"{examples} examples in {seconds:.0f} s; {failures or 'no'} propert{'y' if failures == 1 else 'ies'} failed; "
        f"specification {SPECIFICATION_VERSION}"
    )
    return lines


def _remarks(outcomes: Sequence[Outcome]) -> list[str]:
    lines = []
    for outcome in outcomes:
        if outcome.status == PASSED_UNEXPECTEDLY:
            lines.append(f"{_title(outcome)} passed, and was {outcome.remarks[-1]}: take the line out")
    seen: set[tuple[str, str]] = set()
    for outcome in outcomes:
        for remark in outcome.remarks:
            kind = name_of(outcome.case.implementation), remark.partition(":")[0]
            if kind[1] in ("prints", "slow") and kind not in seen:  # the first of each kind is enough
                seen.add(kind)
                lines.append(f"{kind[0]}: {remark}, in {outcome.case.prop.name}")
    return lines


def _title(outcome: Outcome) -> str:
    return f"{name_of(outcome.case.implementation)}, {outcome.case.dtype}: {outcome.case.prop.name}"


_SCOREBOARD = """# Scoreboard

Every implementation, every operation that it offers, in every dtype: how many properties passed, and the worst error as a
multiple of its bound (1 would be a failure). Specification {version}, profile `{profile}`, {date}; Python {python}, NumPy
{numpy}, {machine}.

A cell again: `smca conformance --implementation NAME --only OPERATION.`; all of it:

```
{command}
```

*n fail* counts properties that an implementation is known not to hold; what they say, and why, is below the tables.
"""


def write_scoreboard(path: Path, outcomes: Sequence[Outcome], profile: str, command: str) -> None:
    """A Markdown page: a table per implementation, operations × dtypes, and below it what differs and why.

    Args:
        path: of the page.
        outcomes: of the run.
        profile: its name.
        command: that makes the page again.
    """
    lines = _SCOREBOARD.format(
        version=SPECIFICATION_VERSION,
        profile=profile,
        date=date.today().isoformat(),
        python=platform.python_version(),
        numpy=np.__version__,
        machine=platform.machine(),
        command=command,
    ).splitlines()
    by_implementation: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        if implemented(outcome.case.implementation, outcome.case.prop.operation):
            by_implementation.setdefault(name_of(outcome.case.implementation), []).append(outcome)
    for name, own in by_implementation.items():
        dtypes = [dtype for dtype in DTYPES if any(outcome.case.dtype == dtype for outcome in own)]
        operations = list(dict.fromkeys(outcome.case.prop.operation for outcome in own))
        lines += ["", f"## {name}", "", f"| operation | {' | '.join(dtypes)} |", f"|---|{'---|' * len(dtypes)}"]
        for operation in operations:
            cells = [
                _cell([o for o in own if (o.case.prop.operation, o.case.dtype) == (operation, dtype)])
                for dtype in dtypes
            ]
            lines.append(f"| `{operation}` | {' | '.join(cells)} |")
        differing = [outcome for outcome in own if outcome.status in ("failed", FAILED_AS_EXPECTED)]
        if differing:
            lines += ["", "| what differs | dtypes | it says | why |", "|---|---|---|---|"]
        for prop in dict.fromkeys(outcome.case.prop.name for outcome in differing):
            same = [outcome for outcome in differing if outcome.case.prop.name == prop]
            finding = re.sub(r"^    (verdict: .*\n    )?", "", same[0].message.partition("\n")[2]).partition("\n")[0]
            why = same[0].remarks[-1].partition("): ")[2] if same[0].status == FAILED_AS_EXPECTED else "not expected"
            lines.append(
                f"| `{prop}` | {', '.join(o.case.dtype for o in same)} | {finding.replace('|', '/')} | {why} |"
            )
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _cell(outcomes: Sequence[Outcome]) -> str:
    tried = [outcome for outcome in outcomes if outcome.status != "not implemented"]
    if not tried:
        return "–"
    failed = sum(outcome.status in ("failed", FAILED_AS_EXPECTED) for outcome in tried)
    worst = max(
        (outcome.worst.ratio for outcome in tried if outcome.status in ("passed", PASSED_UNEXPECTEDLY)), default=-1
    )
    error = "exact" if worst < 0 else f"{worst:.2g}"
    passed = f"{len(tried) - failed} pass, {error}" if failed < len(tried) else ""
    return ", ".join(filter(None, [passed, f"**{failed} fail**" if failed else ""]))


def write_json(path: Path, outcomes: Sequence[Outcome], profile: str) -> None:
    """All outcomes, with the version of the specification that they are held to."""
    cases = [
        {
            "implementation": name_of(outcome.case.implementation),
            "dtype": outcome.case.dtype,
            "operation": outcome.case.prop.operation,
            "property": outcome.case.prop.name,
            "status": outcome.status,
            "verdict": outcome.verdict,
            "examples": outcome.worst.examples,
            "worst_error_over_bound": _number(outcome.worst.ratio),
            "worst_example": short(outcome.worst.recipe) if outcome.worst.ratio >= 0 else None,
            "seconds": round(outcome.seconds, 3),
            "remarks": list(outcome.remarks),
            "message": "\n".join(filter(None, [outcome.message, outcome.explanation])),
        }
        for outcome in outcomes
    ]
    document = {
        "specification": SPECIFICATION_VERSION,
        "profile": profile,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "machine": platform.machine(),
        "cases": cases,
    }
    path.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _number(ratio: float) -> float | str | None:
    """None where nothing was compared; JSON has no infinity."""
    return None if ratio < 0 else ratio if math.isfinite(ratio) else "infinite"


def write_junit(path: Path, outcomes: Sequence[Outcome]) -> None:
    """One test per case, one suite per implementation, as continuous integration shows it."""
    root = ET.Element("testsuites", name="smca conformance")
    suites: dict[str, Any] = {}
    for outcome in outcomes:
        name = name_of(outcome.case.implementation)
        if name not in suites:
            suites[name] = ET.SubElement(root, "testsuite", name=name)
            properties = ET.SubElement(suites[name], "properties")
            ET.SubElement(properties, "property", name="specification", value=SPECIFICATION_VERSION)
        case = ET.SubElement(
            suites[name],
            "testcase",
            classname=f"{name}.{outcome.case.prop.operation}",
            name=f"{outcome.case.prop.name}[{outcome.case.dtype}]",
            time=f"{outcome.seconds:.3f}",
        )
        message = _printable("\n".join(filter(None, [outcome.message, outcome.explanation])))
        if outcome.status == "failed":
            ET.SubElement(case, "failure", message=outcome.verdict).text = message
        elif outcome.status != "passed":
            said = outcome.remarks[-1:] if outcome.status == FAILED_AS_EXPECTED else ()
            if outcome.status != PASSED_UNEXPECTEDLY:
                ET.SubElement(case, "skipped", message=": ".join([outcome.status, *said]))
        if outcome.remarks:
            ET.SubElement(case, "system-out").text = _printable("\n".join(outcome.remarks))
    for suite in suites.values():
        tests = suite.findall("testcase")
        suite.set("tests", str(len(tests)))
        suite.set("failures", str(sum(test.find("failure") is not None for test in tests)))
        suite.set("skipped", str(sum(test.find("skipped") is not None for test in tests)))
    ET.indent(root)
    ET.ElementTree(root).write(path, encoding="utf-8", xml_declaration=True)


def _printable(text: str) -> str:
    """Without the control characters that XML cannot hold."""
    return "".join(letter if letter in "\n\t" or ord(letter) >= 32 else "?" for letter in text)
