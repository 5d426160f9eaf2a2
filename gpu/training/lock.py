"""One run at a time in a folder: a lock that the system releases when its process ends, however that happens."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from smca.gpu.config_json import cut

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK_FILE = "run.lock"


@contextlib.contextmanager
def only_run_in(folder: Path) -> Iterator[None]:
    """Make `folder`, and let no other run in while this one is entered. What was made and stays empty is removed again.

    Raises:
        OSError: the folder cannot be made or written to; says why.
        ValueError: another run is in it; names its process and machine.
    """
    made = [each for each in (folder, *folder.parents) if not os.path.lexists(each)]
    path = folder / LOCK_FILE
    try:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file = _locked(path)
        except OSError as error:
            reason = "it is a file" if folder.is_file() else error.strerror or str(error)
            raise OSError(
                f"{folder} cannot be written to ({reason}): give --output a folder that can; nothing was read or trained yet"
            ) from error
        with file:
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
    finally:
        for each in made:
            with contextlib.suppress(OSError):  # it holds something
                each.rmdir()


def _locked(path: Path) -> BinaryIO:
    """The lock's file, which is held as long as it is open."""
    while True:
        file = path.open("a+b")
        try:
            _take(file, path)
            # Another run may have ended, and removed its file, between the two calls.
            if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
                file.truncate(0)
                file.write(f"process {os.getpid()} on {socket.gethostname()}, since {time.ctime()}".encode())
                file.flush()
                return file
            file.close()
        except BaseException:
            file.close()
            raise


def _take(file: BinaryIO, path: Path) -> None:
    try:
        if fcntl is None:
            raise OSError(errno.ENOSYS, "this system has no fcntl")
        # Not flock, which the processes that load images would inherit and keep when this one is killed.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.seek(0)
        holder = cut(file.read().decode(errors="replace"), 200) or "another process"
        raise ValueError(
            f"another run is writing into {path.parent} ({holder}): wait until it has ended, stop it, or give this one an --output "
            "of its own"
        ) from None
    except OSError as error:
        warnings.warn(
            f"{path.parent} is on a file system without locks ({error.strerror}): take care that no other run writes into it",
            stacklevel=2,
        )
