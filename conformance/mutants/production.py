"""Implementations with a bug in the production code."""

from __future__ import annotations

import importlib
import importlib.util
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from smca.conformance.implementations.losses import Criterion, CriterionInHalf
from smca.conformance.implementations.pytorch import LIFTED, Auto, Autocast, AutocastTriton, TorchModel, Triton
from smca.conformance.implementations.trainer import START, Trainer
from smca.conformance.mutants.importing import changed, folder_of
from smca.conformance.mutants.table import Mutant
from smca.conformance.mutants.table_gpu import DROPOUT, LIFTING
from smca.conformance.mutants.table_loss import LOSS
from smca.conformance.mutants.table_precision import PRECISION
from smca.conformance.mutants.table_softmax import SOFTMAX
from smca.conformance.mutants.table_training import TRAINING
from smca.conformance.protocol import Unavailable
from smca.conformance.tolerances import HALVES
from smca.gpu.attention import fused as fused_attention


@contextmanager
def in_kernels(mutant: Mutant) -> Iterator[list[Any]]:
    """The fused kernels with the bug in them. Triton reads the source of what it compiles, so it has to be in a file."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    kernels: Any = Triton(device)
    kernels.examples_factor = 0.25 if mutant in DROPOUT else 1.0
    kernels.dtypes = ("float16",) if mutant in LIFTING else HALVES if mutant in PRECISION else ("float32",)
    text = (folder_of("gpu") / "attention/fused_kernels.py").read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"mutant_{Path(folder).name}.py"
        path.write_text(changed(text, mutant), encoding="utf-8")
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        with mock.patch.object(fused_attention, "_kernels", return_value=module):
            yield [kernels]


def in_production(name: str, mutant: Mutant) -> list[Any]:
    """Implementations that use the package `name`, where the bug is.

    Raises:
        Unavailable: of several processes, none would have it.
    """
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
        device = "cuda" if torch.cuda.is_available() else "cpu"
        backend: Any = TorchModel(
            "eager", "cpu", ("float64", *HALVES) if mutant in PRECISION else ("float64", "float16"), {}
        )
        if mutant.bug.startswith("lifted"):
            backend = TorchModel("lifted", "cpu", backend.dtypes, LIFTED)
        elif mutant.bug.startswith("autocast"):
            backend = AutocastTriton(device) if mutant.module == "attention.fused" else Autocast("cpu")
            backend.examples_factor = 1.0
        elif mutant.bug.startswith("auto"):
            backend = Auto("cpu")
            backend.examples_factor, backend.dtypes = 1.0, ("float32", "float16")
        elif mutant.bug.startswith("fused"):
            backend = Triton(device)
            backend.examples_factor, backend.dtypes = 0.25, HALVES if mutant in PRECISION else ("float32",)
        if isinstance(backend, Triton):
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
