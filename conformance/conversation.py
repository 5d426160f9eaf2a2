"""Another process that answers over its standard output, within a time limit."""

from __future__ import annotations

import atexit
import contextlib
import queue
import subprocess
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import BinaryIO, Generic, TypeVar

Answer = TypeVar("Answer")


class Silent(Exception):
    """No answer came within the time limit; the process has been ended."""


class Gone(Exception):
    """The process has ended, or its answer could not be read; the message says how, and what it wrote to stderr last."""


class Conversation(Generic[Answer]):
    """A process, started when it is first spoken to, and again after it has ended."""

    def __init__(
        self, command: Sequence[str], read: Callable[[BinaryIO], Answer], environment: Mapping[str, str] | None = None
    ) -> None:
        """
        Args:
            command: and its arguments.
            read: one answer, from the process's standard output.
            environment: its variables; None = ours.
        """
        self._command, self._read, self._environment = list(command), read, environment
        self._process: subprocess.Popen[bytes] | None = None

    def say(self, data: bytes) -> bool:
        """Write to its standard input.

        Returns:
            Whether it was started for that.

        Raises:
            Gone: it does not read.
            OSError: it cannot be started.
        """
        starts = self._process is None
        if starts:
            self._start()
        assert self._process is not None
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(data)
            self._process.stdin.flush()
        except OSError:
            raise self._gone() from None
        return starts

    def hear(self, time_limit: float) -> Answer:
        """Its next answer.

        Args:
            time_limit: seconds.

        Raises:
            Silent: none came.
            Gone: none will come.
        """
        try:
            answer = self._answers.get(timeout=time_limit)
        except queue.Empty:
            self.end()
            raise Silent(f"no answer within {time_limit:g} s") from None
        if isinstance(answer, BaseException):
            raise self._gone(answer)
        return answer

    def end(self) -> None:
        """End the process, if there is one."""
        atexit.unregister(self.end)
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._thread.join()
            for stream in (self._process.stdin, self._process.stdout):
                if stream is not None:
                    with contextlib.suppress(OSError):  # about what it did not read
                        stream.close()
            self._errors.close()
            self._process = None

    def _start(self) -> None:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed by `end`
        self._answers: queue.Queue[Answer | BaseException] = queue.Queue()
        self._process = process = subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=None if self._environment is None else dict(self._environment),
        )
        assert process.stdout is not None
        self._thread = threading.Thread(target=self._listen, args=(process.stdout, self._answers), daemon=True)
        self._thread.start()
        atexit.register(self.end)  # later, as the interpreter ends, the thread would keep its stream's lock forever

    def _listen(self, stream: BinaryIO, answers: queue.Queue[Answer | BaseException]) -> None:
        try:
            while True:
                answers.put(self._read(stream))
        except Exception as error:
            answers.put(error)

    def _gone(self, answer: BaseException | None = None) -> Gone:
        assert self._process is not None
        try:
            status = self._process.wait(timeout=0.5 if isinstance(answer, ValueError) else 10.0)
        except subprocess.TimeoutExpired:
            status = None
        self._errors.seek(0)
        written = self._errors.read().decode("utf-8", "replace").strip().splitlines()[-5:]
        self.end()
        if status is None or isinstance(answer, ValueError):
            how = str(answer) if answer is not None else "it reads no more"
        else:
            how = f"it ended {f'by signal {-status}' if status < 0 else f'with status {status}'}"
        return Gone("; on stderr: ".join([how, " / ".join(written)]) if written else how)
