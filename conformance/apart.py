"""An outside implementation in a process of its own, so that nothing that it does ends the run.

``python -m smca.conformance.apart ADDRESS`` is that process. It reads one line of JSON per property from standard input and
answers with lines of JSON: one as each example starts, then the outcome. Whatever the implementation prints goes elsewhere
and is remarked on.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any, BinaryIO

from smca.conformance.conduct import DIES, HANGS
from smca.conformance.conversation import Conversation, Gone, Silent
from smca.conformance.diagnosis import explain
from smca.conformance.implementations.registry import TIME_LIMIT, implementation_of
from smca.conformance.property import Judge, Worst
from smca.conformance.protocol import address_of, name_of
from smca.conformance.runner import PROFILES, Case, Outcome, Profile, run
from smca.conformance.suite import PROPERTIES

START_LIMIT = 300.0
"""Seconds that may pass until the process has imported the implementation and made it."""
EXPLANATION_LIMIT = 300.0
"""Seconds that may pass until a failure is explained."""


class Apart:
    """Runs cases of one implementation in its own process."""

    def __init__(self, implementation: Any, time_limit: float = TIME_LIMIT) -> None:
        """
        Args:
            implementation: as `load_outside` made it; the process makes its own.
            time_limit: seconds per example.
        """
        self._time_limit = time_limit
        paths = [path or os.getcwd() for path in sys.path]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
        command = [sys.executable, "-m", "smca.conformance.apart", address_of(implementation)]
        self._conversation = Conversation(command, _line, environment)

    def run(self, case: Case, profile: Profile, *, explained: bool = True) -> Outcome:
        """As `runner.run`; of the recipes, the outcome has the texts. `explained`: a failure is, which takes a while."""
        if case.missing is not None:
            return run(case, profile)
        question = {
            "property": case.prop.name,
            "dtype": case.dtype,
            "profile": profile.name,
            "explained": explained,
        }
        recipe, tried = "", 0
        try:
            if self._conversation.say(json.dumps(question).encode() + b"\n"):
                self._conversation.hear(START_LIMIT)
            while True:
                answer = self._conversation.hear(self._time_limit)
                if "outcome" in answer:
                    failed = answer["outcome"]["status"] == "failed"
                    return _outcome(case, answer["outcome"], self._explanation() if failed and explained else "")
                recipe, tried = answer["starts"], tried + 1
        except Silent as silent:
            return _ended(case, recipe, tried, HANGS, str(silent))
        except Gone as gone:
            return _ended(case, recipe, tried, DIES, str(gone))

    def _explanation(self) -> str:
        """Which follows a failure, unless the implementation ends or hangs while it is looked for."""
        try:
            return str(self._conversation.hear(EXPLANATION_LIMIT)["explanation"])
        except (Silent, Gone):
            return ""

    def end(self) -> None:
        """End the process."""
        self._conversation.end()


def _line(stream: BinaryIO) -> dict[str, Any]:
    line = stream.readline()
    if not line:
        raise EOFError("it ended")
    answer: dict[str, Any] = json.loads(line)
    return answer


class _Text:
    """A recipe of which only the text is known here."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __repr__(self) -> str:
        return self.text

    def describe(self) -> str:
        return self.text


def _ended(case: Case, recipe: str, tried: int, verdict: str, finding: str) -> Outcome:
    judge = Judge(case.prop, name_of(case.implementation), case.dtype, address=address_of(case.implementation))
    judge.recipe = _Text(recipe or "None, before the first example")
    worst = Worst(examples=tried)
    return Outcome(case, "failed", str(judge.mismatch(finding, verdict)), worst, 0.0, (), verdict)


def _outcome(case: Case, answer: dict[str, Any], explanation: str) -> Outcome:
    worst = Worst(**answer["worst"])
    worst.recipe = _Text(worst.recipe)
    return Outcome(
        case,
        answer["status"],
        answer["message"],
        worst,
        answer["seconds"],
        (),
        answer["verdict"],
        tuple(answer["remarks"]),
        explanation,
    )


def main() -> None:
    """Answer until standard input ends."""
    questions = os.fdopen(os.dup(0), encoding="utf-8")
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    with tempfile.TemporaryFile() as file, open(os.devnull, encoding="utf-8") as nothing:
        os.dup2(nothing.fileno(), 0)
        os.dup2(file.fileno(), 1)  # also for what is no Python
        printed = _Printed(file)
        implementation = implementation_of(sys.argv[1])
        properties = {prop.name: prop for prop in PROPERTIES}

        def answer(what: dict[str, Any]) -> None:
            answers.write(json.dumps(what) + "\n")
            answers.flush()

        answer({"ready": True})
        for line in questions:
            question = json.loads(line)
            case = Case(properties[question["property"]], implementation, question["dtype"])
            outcome = run(
                case,
                PROFILES[question["profile"]],
                starts=lambda recipe: answer({"starts": repr(recipe)}),
            )
            worst = dataclasses.replace(outcome.worst, recipe=repr(outcome.worst.recipe))
            fields = {name: getattr(outcome, name) for name in ("status", "message", "seconds", "verdict")}
            remarks = [*outcome.remarks, *printed.since()]
            answer({"outcome": {**fields, "worst": dataclasses.asdict(worst), "remarks": remarks}})
            if outcome.status == "failed" and question["explained"]:
                answer({"explanation": explain(outcome)})


class _Printed:
    """What was written to a file in place of standard output."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._read = file, 0

    def since(self) -> list[str]:
        """What came since this was last asked, in a few words; empty if nothing did."""
        sys.stdout.flush()
        self._file.seek(self._read)  # which moves where the next text goes, too: read to the end
        new = self._file.read()
        self._read += len(new)
        text = new.decode("utf-8", "replace").strip()
        if not text:
            return []
        first = text.splitlines()[0][:80]
        return [f"prints: {first!r}" + (f" and more, {len(text)} characters in all" if text != first else "")]


if __name__ == "__main__":
    sys.path.insert(0, str(Path.cwd()))
    main()
