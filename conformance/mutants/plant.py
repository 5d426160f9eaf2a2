"""Proof that the suite can fail: every bug of `table` is planted by itself, and a property must go red."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import itertools
import re
import sys
import tempfile
import time
import types
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import smca.gpu
import smca.reference
from smca.conformance.implementations.ours import Criterion, CriterionInHalf, Oracle
from smca.conformance.implementations.pytorch import LIFTED, Auto, TorchModel, Triton
from smca.conformance.implementations.trainer import START, Trainer
from smca.conformance.mutants.table import ORACLE, Mutant
from smca.conformance.mutants.table_anchored import ANCHORED
from smca.conformance.mutants.table_gpu import DROPOUT, KERNELS, LIFTING, PRODUCTION
from smca.conformance.mutants.table_gradients import BOXED, GRADIENTS
from smca.conformance.mutants.table_inputs import INPUTS, LAYOUT
from smca.conformance.mutants.table_loss import LOSS
from smca.conformance.mutants.table_softmax import SOFTMAX
from smca.conformance.mutants.table_training import TRAINING
from smca.conformance.property import Property
from smca.conformance.protocol import Unavailable
from smca.conformance.runner import Case, Profile, run
from smca.gpu.attention import fused as fused_attention

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
    *TRAINING,
]

FOLDERS = {package.__name__: Path(str(package.__path__[0])) for package in (smca.reference, smca.gpu)}
REPLACED = {
    "reference": r"smca\.reference",
    # In the production package, only what holds mutants or uses them is replaced: the rest, with its registrations, is shared.
    "gpu": r"smca\.gpu(?=\.(?:attention|loss|model|training)\b)",
}
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

_count = itertools.count()


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the modules of a package under another name, one of them changed."""

    def __init__(self, name: str, mutant: Mutant) -> None:
        self.name, self.mutant = name, mutant
        self.folder = FOLDERS[f"smca.{mutant.package}"]

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
            text = _changed(text, mutant)
        text = re.sub(REPLACED[mutant.package], self.finder.name, text)
        text = text.replace(
            '"smca::', f'"{self.finder.name}::'
        )  # a custom op of that name would take the true one's place
        module.__file__ = str(path)
        exec(compile(text, f"<{path.name} with the bug: {mutant.bug}>", "exec"), module.__dict__)


def _changed(text: str, mutant: Mutant) -> str:
    if text.count(mutant.source) != 1:
        raise ValueError(
            f"mutant {mutant.bug!r}: expected its source once in {mutant.module}.py, got it {text.count(mutant.source)} times: "
            "update the table"
        )
    return text.replace(mutant.source, mutant.replacement)


@contextmanager
def _in_kernels(mutant: Mutant) -> Iterator[list[Any]]:
    """The fused kernels with the bug in them. Triton reads the source of what it compiles, so it has to be in a file."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    kernels: Any = Triton(device)
    kernels.examples_factor = 0.25 if mutant in DROPOUT else 1.0
    kernels.dtypes = ("float16",) if mutant in LIFTING else ("float32",)
    text = (FOLDERS["smca.gpu"] / "attention/fused_kernels.py").read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"mutant_{next(_count)}.py"
        path.write_text(_changed(text, mutant), encoding="utf-8")
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        with mock.patch.object(fused_attention, "_kernels", return_value=module):
            yield [kernels]


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


@contextmanager
def planted(mutant: Mutant) -> Iterator[list[Any]]:
    """Implementations with the bug in them.

    Raises:
        Unavailable: the code that holds the bug cannot run on this machine.
    """
    if mutant.module == "attention.fused_kernels":
        with _in_kernels(mutant) as implementations:
            yield implementations
        return
    with planted_package(mutant) as name:
        if mutant.package == "reference":
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
            yield [oracle]
        else:
            yield _production(name, mutant)


def _production(name: str, mutant: Mutant) -> list[Any]:
    if mutant in TRAINING:
        if START != "fork":
            raise Unavailable("other processes have the bug only if they are forked, which a GPU forbids")
        trainer = Trainer()
        trainer.criterion = importlib.import_module(f"{name}.loss.criterion")
        for module in ("guard", "optimizer", "resume", "setup", "step"):
            setattr(trainer, module, importlib.import_module(f"{name}.training.{module}"))
        return [trainer]
    if mutant.module.startswith("attention."):
        # The backend that the bug is named after; any other bug shows in every backend.
        backend: Any = TorchModel("eager", "cpu", ("float64", "float16"), {})
        if mutant.bug.startswith("lifted"):
            backend = TorchModel("lifted", "cpu", ("float64", "float16"), LIFTED)
        elif mutant.bug.startswith("auto"):
            backend = Auto("cpu")
            backend.examples_factor, backend.dtypes = 1.0, ("float32", "float16")
        elif mutant.bug.startswith("fused"):
            backend = Triton("cuda" if torch.cuda.is_available() else "cpu")
            backend.examples_factor, backend.dtypes = 0.25, ("float32",)
            backend.fused = importlib.import_module(f"{name}.attention.fused")
        backend.attention = importlib.import_module(f"{name}.attention")
        backend.forward = backend.forward_vjp = None
        return [backend]
    if mutant.module.startswith("model."):
        model: Any = TorchModel("eager", "cpu", ("float64",), {})
        model.model = importlib.import_module(f"{name}.model").SMCADETR
        model.layers = importlib.import_module(f"{name}.model.layers")
        if mutant in SOFTMAX:
            model.dtypes = ("float64", "float32", "bfloat16")
        noising: Any = Criterion("scipy", "cpu")  # of which only this is mutated
        noising.denoising = importlib.import_module(f"{name}.model.denoising")
        return [model, noising]
    criteria: list[Any] = [Criterion("scipy", "cpu")]
    if mutant in LOSS:
        criteria.append(CriterionInHalf("scipy", "cpu"))
    for module in ("boxes", "matcher", "criterion"):
        for criterion in criteria:
            setattr(criterion, module, importlib.import_module(f"{name}.loss.{module}"))
    return criteria


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
    if mutant in LAYOUT:
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
        thorough: do not stop at the first that fails; find all that fail without the oracle.
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
                    if not thorough:
                        return MutantResult(mutant, killer, examples, (), first, message)
                    if not prop.oracle:
                        without.append(prop.name)
    return MutantResult(mutant, killer, examples, tuple(without), first, message)
