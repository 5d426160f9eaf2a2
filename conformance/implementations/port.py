"""An implementation that is a program, in any language: questions on its standard input, answers on its standard output.

Both are messages: 8 bytes with a length, little-endian, then so many bytes, a safetensors file (`smca.conformance.wire`). Its
texts (``__metadata__``) say what is asked: ``operation`` and ``dtype``, and arguments that are texts. Its tensors are the
arguments, float64, int64 or bool, row-major, by the names that `wire` gives them: ``q``, ``size``, ``targets.labels``,
``levels.0.k``. What is not given has no tensor. The answer's tensors are the results (``out``, ``dq``, …), as F64, F32 or
F16; a text ``error`` in place of them says why there are none.

The first question is the operation ``describe``. The answer's texts are ``name``; ``dtypes`` and ``operations``, each a list
with commas; and, where they apply, ``expanded_up_to`` (JSON, dtype → limit), ``skips_below`` and ``leaves_out`` (a list with
commas), as in `smca.conformance.protocol`. The program ends when its standard input does. What it writes to standard error is
shown if it ends early.
"""

from __future__ import annotations

import contextlib
import json
import shlex
from typing import Any, BinaryIO

from smca.conformance.conduct import DIES, RAISES, Hangs, Misconduct
from smca.conformance.conversation import Conversation, Gone, Silent
from smca.conformance.protocol import OPERATIONS, dtypes_of
from smca.conformance.wire import Tensors, Texts, decode_result, encode, packed, unpacked

MOST = 2**31
"""Bytes: no answer is longer; what claims to be is no answer."""


class Port:
    """A program under test. Operations that it does not list are not implemented."""

    def __init__(self, command: str, time_limit: float) -> None:
        """
        Args:
            command: the program and its arguments, as a shell would split them.
            time_limit: seconds per answer.

        Raises:
            ValueError: it cannot be started, does not answer, or offers nothing.
        """
        self.conformance_address = f"exec:{command}"
        self._time_limit = time_limit
        self._conversation = Conversation(shlex.split(command), _message)
        try:
            _, said = self._ask({}, {"operation": "describe"})
            self.name = said.get("name", shlex.split(command)[0])
            self.dtypes = _listed(said.get("dtypes", ""))
            self._operations = _listed(said.get("operations", ""))
            self.expanded_up_to = json.loads(said.get("expanded_up_to", "{}"))
            self.skips_below = float(said.get("skips_below", 0.0))
            self.leaves_out = _listed(said.get("leaves_out", ""))
        except (OSError, ValueError, IndexError, Misconduct, Hangs) as error:
            self._conversation.end()
            raise ValueError(f"--implementation exec:{command}: asked to describe itself: {error}") from error
        unknown = sorted(set(self._operations) - set(OPERATIONS))
        if unknown or not self._operations or not self.dtypes:
            raise ValueError(
                f"--implementation exec:{command}: expected its description to list operations of {', '.join(OPERATIONS)}, and "
                f"dtypes, got operations {list(self._operations)} and dtypes {list(self.dtypes)}"
            )
        dtypes_of(self)

    def __getattr__(self, name: str) -> Any:
        if name not in self.__dict__.get("_operations", ()):
            raise AttributeError(f"{type(self).__name__} has no {name}")

        def ask(*arguments: Any, **others: Any) -> Any:
            tensors, texts = encode(name, arguments, {key: value for key, value in others.items() if key != "dtype"})
            answer, said = self._ask(tensors, {**texts, "operation": name, "dtype": others["dtype"]})
            if "error" in said:
                raise Misconduct(RAISES, f"it answered with an error: {said['error']}")
            return decode_result(name, answer)

        return ask

    def _ask(self, tensors: Tensors, texts: Texts) -> tuple[Tensors, Texts]:
        data = packed(tensors, texts)
        try:
            self._conversation.say(len(data).to_bytes(8, "little") + data)
            return self._conversation.hear(self._time_limit)
        except Silent as silent:
            raise Hangs(str(silent)) from None
        except Gone as gone:
            raise Misconduct(DIES, str(gone)) from None

    def __del__(self) -> None:
        with contextlib.suppress(Exception):
            self._conversation.end()


def _listed(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _message(stream: BinaryIO) -> tuple[Tensors, Texts]:
    start = stream.read(8)
    if len(start) < 8:
        raise EOFError("it ended")
    length = int.from_bytes(start, "little")
    if length > MOST:
        raise ValueError(
            f"expected a message, 8 bytes with its length first, got {start!r}. Is something else printed to standard output?"
        )
    data = stream.read(length)
    if len(data) < length:
        raise EOFError(f"it ended within an answer, after {len(data)} of {length} bytes")
    return unpacked(data)
