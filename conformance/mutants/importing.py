"""A package of ours under another name, with a bug in one of its modules."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import itertools
import re
import sys
import types
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from smca.conformance.mutants.table import Mutant
from smca.conformance.protocol import Unavailable

REPLACED = {
    "reference": r"smca\.reference",
    # In the production package, only what holds mutants or uses them is replaced: the rest, with its registrations, is shared.
    "gpu": r"smca\.gpu(?=\.(?:attention|loss|model|training)\b)",
}

_count = itertools.count()


def folder_of(package: str) -> Path:
    """Where the source of a package of ours is: "reference" or "gpu".

    Raises:
        Unavailable: it is not installed.
    """
    try:
        spec = importlib.util.find_spec(f"smca.{package}")
    except ModuleNotFoundError:
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise Unavailable(f"smca.{package} is not installed: it comes with the whole project, smca-detr")
    return Path(spec.submodule_search_locations[0])


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the modules of a package under another name, one of them changed."""

    def __init__(self, name: str, mutant: Mutant) -> None:
        self.name, self.mutant = name, mutant
        self.folder = folder_of(mutant.package)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if not fullname.startswith(f"{self.name}."):
            return None
        folder = self.folder.joinpath(*fullname.removeprefix(f"{self.name}.").split("."))
        return importlib.util.spec_from_loader(fullname, _Loader(self), is_package=folder.is_dir())


class _Loader(importlib.abc.Loader):
    def __init__(self, finder: _Finder) -> None:
        self.finder = finder

    def exec_module(self, module: types.ModuleType) -> None:
        mutant, name = self.finder.mutant, module.__name__.removeprefix(f"{self.finder.name}.")
        folder = self.finder.folder.joinpath(*name.split("."))
        path = folder / "__init__.py" if folder.is_dir() else folder.with_suffix(".py")
        text = path.read_text(encoding="utf-8")
        if name == mutant.module:
            text = changed(text, mutant)
        text = re.sub(REPLACED[mutant.package], self.finder.name, text)
        text = text.replace(
            '"smca::', f'"{self.finder.name}::'
        )  # a custom op of that name would take the true one's place
        module.__file__ = str(path)
        exec(compile(text, f"<{path.name} with the bug: {mutant.bug}>", "exec"), module.__dict__)


def changed(text: str, mutant: Mutant) -> str:
    if text.count(mutant.source) != 1:
        raise ValueError(
            f"mutant {mutant.bug!r}: expected its source once in {mutant.module}.py, got it {text.count(mutant.source)} times: "
            "update the table"
        )
    return text.replace(mutant.source, mutant.replacement)


@contextmanager
def planted_package(mutant: Mutant) -> Iterator[str]:
    """Within the context, the mutant's package with the bug in it can be imported under the name that this gives."""
    name = f"_smca_mutant_{next(_count)}"
    package, finder = types.ModuleType(name), _Finder(name, mutant)
    package.__path__ = []
    sys.modules[name] = package
    sys.meta_path.insert(0, finder)
    try:
        yield name
    finally:
        sys.meta_path.remove(finder)
        for loaded in [key for key in sys.modules if key == name or key.startswith(f"{name}.")]:
            del sys.modules[loaded]
