"""The production trainer's step under the suite, on the specification's small detector.

Everything but the network is production code: `take_step` with its accumulation, count of boxes, clipping and average, the
criterion, the optimiser with its groups, the gradient scaler, and what a checkpoint holds and puts back, written to disk and
read. Two processes are two processes, joined by gloo, with `DistributedDataParallel` around the network.
"""

from __future__ import annotations

import copy
import math
import multiprocessing
import tempfile
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch._dynamo  # DistributedDataParallel needs it: imported once here, not in every forked process
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from smca.conformance.implementations.oracle import by_place
from smca.conformance.implementations.pytorch import numpy_of
from smca.datasets import Batch, Targets
from smca.gpu import files
from smca.gpu.config import LossConfig, OptimConfig, RunConfig
from smca.gpu.loss import criterion
from smca.gpu.training import guard, optimizer, processes, resume, setup, step

Array = npt.NDArray[Any]
CPU = torch.device("cpu")
START = "spawn" if torch.cuda.is_available() else "fork"
"""How processes come about. Forking takes a fifth of a second, but PyTorch's threads for a GPU forbid a backward pass after it."""


class SmallDetector(nn.Module):
    """`smca.reference.small_detector`. It takes what the trainer gives a network: images [B, I, N, 1], and three things more."""

    def __init__(self, inputs: int, channels: int, classes: int, layers: int) -> None:
        super().__init__()
        self.backbone = nn.Linear(inputs, channels, bias=False)
        self.norm = nn.LayerNorm(channels)
        self.layers = nn.ModuleList(nn.Linear(channels, channels) for _ in range(layers))
        self.class_head, self.box_head = nn.Linear(channels, classes), nn.Linear(channels, 4)

    def forward(self, images: Tensor, *_: Any) -> dict[str, Tensor]:
        hidden, logits, boxes = self.norm(self.backbone(images[..., 0].mT)), [], []
        for layer in self.layers:
            hidden = layer(hidden).tanh()
            logits.append(self.class_head(hidden))
            boxes.append(self.box_head(hidden).sigmoid())
        return {"logits": torch.stack(logits), "boxes": torch.stack(boxes)}


def detector_of(params: dict[str, Array], dtype: torch.dtype) -> SmallDetector:
    """With these parameters."""
    layers = sum(name.startswith("layers.") and name.endswith(".weight") for name in params)
    channels, inputs = params["backbone.weight"].shape
    model = SmallDetector(inputs, channels, len(params["class_head.bias"]), layers).to(dtype)
    model.load_state_dict({name: torch.tensor(value) for name, value in params.items()})
    return model


class Trainer:
    """`smca.gpu.training.step`, and what it stands on."""

    name = "trainer"
    dtypes = ("float64", "float32")
    criterion: Any = criterion
    guard: Any = guard
    optimizer: Any = optimizer
    resume: Any = resume
    setup: Any = setup
    step: Any = step

    def train(self, params: dict[str, Array], steps: Sequence[Any], settings: Any, *, dtype: str) -> dict[str, Any]:
        world = len(steps[0].shards)
        with tempfile.TemporaryDirectory() as folder:
            work = partial(self._process, Path(folder), params, steps, settings, getattr(torch, dtype))
            if world == 1:
                return work(0, 1)
            start: Any = multiprocessing.get_context(START)
            receiver, sender = start.Pipe(duplex=False)
            children = [
                start.Process(target=_in_group, args=(work, rank, world, folder, sender)) for rank in range(world)
            ]
            with warnings.catch_warnings():  # Python warns of forking where there are threads, which none of these use
                warnings.simplefilter("ignore", DeprecationWarning)
                for child in children:
                    child.start()
            sender.close()
            try:
                found: dict[str, Any] | str = receiver.recv()
            except EOFError:
                found = "a process ended without a result"
            for child in children:
                child.join()
            if isinstance(found, str):
                raise RuntimeError(found)
            return found

    def _process(
        self, folder: Path, params: Any, steps: Any, settings: Any, dtype: torch.dtype, rank: int, world: int
    ) -> dict[str, Any]:
        """What one of the processes does."""
        run = self._run(folder, params, steps, settings, dtype, rank, world)
        trajectory: dict[str, Any] = {"loss": [], "gradient_norm": [], "params": [], "average": []}
        for given in steps:
            self.optimizer.set_learning_rates(run.optimizer, run.base_lrs, given.factor)
            parts = [_batch(x, targets, dtype) for x, targets in given.shards[rank]]
            terms, norm = self.step.take_step(run, parts, given.factor)
            run.step += 1
            trajectory["loss"].append(processes.mean_over_processes({"loss": terms["loss"].item()}, run)["loss"])
            trajectory["gradient_norm"].append(norm.item())
            trajectory["params"].append(_arrays(run.model))
            trajectory["average"].append({} if run.average is None else _arrays(run.average))
            if run.step == settings.resume_after:
                path = folder / f"{rank}.pt"
                facts = {
                    "config": run.config.model.to_json(),
                    "logged": {},
                    "total_steps": len(steps),
                    "train_seconds": 0.0,
                }  # which one must have
                files.save_checkpoint(path, {**facts, **self.resume.state_of(run)})
                run = self._run(folder, params, steps, settings, dtype, rank, world)  # which knows of nothing
                self.resume.restore(run, files.load_checkpoint(path))
        stacked = {
            of: {name: np.stack([arrays[name] for arrays in trajectory[of]]) for name in trajectory[of][0]}
            for of in ("params", "average")
        }
        numbers = {name: np.array(trajectory[name]) for name in ("loss", "gradient_norm")}
        return numbers | by_place(stacked["params"], stacked["average"])

    def _run(self, folder: Path, params: Any, steps: Any, settings: Any, dtype: Any, rank: int, world: int) -> Any:
        """As `setup.set_up` puts it together, of a network of another class and without data."""
        model: Any = detector_of(params, dtype)
        weights = settings.weights
        muon = {"muon_lr": settings.muon_lr} if settings.optimizer == "muon" else {}
        config = RunConfig(
            output=folder,
            loss=LossConfig(weights["class"], weights["l1"], weights["giou"], settings.classification),
            optim=OptimConfig(
                settings.optimizer,
                lr=settings.lr,
                backbone_lr=settings.backbone_lr,
                weight_decay=settings.weight_decay,
                decayed="all" if settings.decayed == "all" else "matrices",
                clip_norm=settings.clip_norm or math.inf,
                ema_decay=settings.ema_decay,
                **muon,
            ),
            accumulate=len(steps[0].shards[0]),
        )
        made = self.optimizer.make_optimizer(model, config.optim, CPU, dtype)
        scaled = settings.loss_scale != 1
        no_data: Any = None
        return self.setup.Run(
            config=config,
            rank=rank,
            world=world,
            device=CPU,
            train_data=no_data,
            val_data=no_data,
            augmented=no_data,
            batches=no_data,
            loader=no_data,
            val_loader=no_data,
            total_steps=len(steps),
            model=model,
            parallel=DistributedDataParallel(model) if world > 1 else model,
            average=copy.deepcopy(model).requires_grad_(False) if settings.ema_decay else None,
            terms_of=self.setup.completed(self.criterion.SetCriterion(config.loss), config.loss, config.accumulate),
            optimizer=made,
            base_lrs=[group["lr"] for group in made.param_groups],
            check=self.guard.FiniteCheck(model, folder, delayed=False),
            half=None,
            scaler=torch.amp.GradScaler(
                "cpu", settings.loss_scale if scaled else 1.0, growth_interval=10**6, enabled=scaled
            ),
        )


def _in_group(work: Any, rank: int, world: int, folder: str, results: Any) -> None:
    """What each of several processes runs; the first one, or one that fails, sends what it has to say."""
    torch.set_num_threads(1)
    store = distributed.FileStore(f"{folder}/store", world)  # type: ignore[attr-defined]
    try:
        distributed.init_process_group("gloo", store=store, rank=rank, world_size=world)
        found = work(rank, world)
        if rank == 0:
            results.send(found)
        distributed.barrier()
        distributed.destroy_process_group()
    except Exception as error:
        results.send(f"process {rank}: {type(error).__name__}: {error}")


def _arrays(model: nn.Module) -> dict[str, Array]:
    return {name: numpy_of(value).copy() for name, value in model.state_dict().items()}


def _batch(x: Array, targets: Any, dtype: torch.dtype) -> Batch:
    """x [B, N, I] as images [B, I, N, 1] that are all image."""
    images = torch.tensor(x, dtype=dtype).mT[..., None]
    count = len(images)
    tensors = (torch.tensor(targets.labels), torch.tensor(targets.boxes, dtype=dtype), torch.tensor(targets.valid))
    nothing = torch.zeros(count, dtype=torch.int64)
    padding = torch.zeros(count, images.shape[2], 1, dtype=torch.bool)
    return Batch(images, padding, Targets(*tensors), nothing, torch.zeros(count, 2, dtype=torch.int64), nothing)
