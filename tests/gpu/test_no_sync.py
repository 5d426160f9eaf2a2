"""A training step never waits for the GPU: shown without one, with what that requires of the check for non-finite numbers.

On the meta device nothing has a value: an operation that would read one fails there, and a copy between devices is seen
by the dispatcher. (tests/gpu/test_gpu_step.py asks the CUDA runtime itself.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from smca.datasets import Batch, Targets
from smca.gpu.config import LossConfig
from smca.gpu.loss import NonFiniteError, SetCriterion, assignment
from smca.gpu.model import SMCADETR
from smca.gpu.presets import PRESETS
from smca.gpu.training import guard
from smca.gpu.training.bad_step import Step
from smca.gpu.training.guard import FiniteCheck
from smca.gpu.training.muon import Muon, matrices_of
from smca.gpu.training.optimizer import clip_gradient, update_average

READS_A_VALUE = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal", "is_nonzero")


class Constants(TorchFunctionMode):
    """Notes every tensor that is made from values on the host; on a GPU they would be copied there, which waits for it."""

    def __init__(self, waits: list[str]) -> None:
        super().__init__()
        self.waits = waits

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.tensor, torch.as_tensor, torch.asarray, Tensor.new_tensor, torch.from_numpy):
            self.waits.append(f"{func.__name__}({args})")
        return func(*args, **(kwargs or {}))


class Watch(TorchDispatchMode):
    """Notes every operation that makes the host wait for a device."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        self.operations = 0

    def __torch_dispatch__(self, func: Any, types: Sequence[type], args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.operations += 1
        name = func.overloadpacket.__name__
        devices = {t.device.type for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.dim()}
        devices |= {kwargs["device"].type} if isinstance(kwargs.get("device"), torch.device) and devices else set()
        indexed_by_bool = name.startswith("index") and any(
            isinstance(t, Tensor) and t.dtype == torch.bool for t in tree_leaves(args[1:2])
        )
        if name in READS_A_VALUE or len(devices) > 1 or indexed_by_bool:
            self.waits.append(f"{name} on {sorted(devices)}")
        return func(*args, **kwargs)


def meta_batch() -> tuple[Tensor, Tensor, Targets]:
    """Two images of 96 × 128 pixels, one of them padded, with three targets each."""
    targets = Targets(
        torch.empty(2, 3, dtype=torch.int64, device="meta"),
        torch.empty(2, 3, 4, device="meta"),
        torch.empty(2, 3, dtype=torch.bool, device="meta"),
    )
    images = torch.empty(2, 3, 96, 128, dtype=torch.uint8, device="meta")
    return images, torch.empty(2, 96, 128, dtype=torch.bool, device="meta"), targets


@pytest.mark.parametrize("padded", [False, True], ids=["unpadded", "padded"])
@pytest.mark.parametrize("backend", ["auto", "triton"])
@pytest.mark.parametrize("preset", ["small", "smca_r50_multiscale", "smca_r50_multiscale_conv", "detr_r50", "fast_r50"])
def test_a_step_never_waits(preset: str, backend: str, padded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assignment, "available", lambda device: None)  # its op has a form for tensors without values
    monkeypatch.setattr("smca.gpu.attention.fused.available", lambda device: None)
    run = PRESETS[preset]()
    config = run.model
    smaller = {"hidden_dim": 32, "num_queries": 5, "encoder_layers": 1, "decoder_layers": 2, "cross_level_blocks": ()}
    config = replace(config, **smaller, backbone=replace(config.backbone, weights=None))
    if config.cross_attention == "dense" and backend == "triton":
        pytest.skip("DETR has no SMCA attention")
    with torch.device("meta"):
        model = SMCADETR(config, attention_backend=backend, download=False)
    criterion = SetCriterion(run.loss, matcher_backend="cupy")
    images, mask, targets = meta_batch()
    with Watch() as watch, Constants(watch.waits):
        outputs = model(images, mask if padded else None, targets)
        terms = criterion(outputs, targets)
        terms["loss"].backward()
        norm = clip_gradient(model.parameters(), 0.1)
        torch.stack([*terms.values(), norm]).isfinite().all()
        update_average(model, model, 0.9)
    assert watch.operations > 500
    assert watch.waits == []


def test_a_step_of_muon_never_waits() -> None:
    """AdamW's part gets no gradients here: it has no fused form on the meta device."""
    config = PRESETS["smca_r50_multiscale"]().model
    config = replace(config, backbone=replace(config.backbone, weights=None))
    with torch.device("meta"):
        model = SMCADETR(config, download=False)
    matrices = matrices_of(model)
    other = torch.nn.Parameter(torch.empty(1))
    optimizer = Muon([{"params": [other], "lr": 0.1}], [{"params": matrices, "lr": 0.1}], torch.bfloat16, fused=True)
    with Watch() as watch, Constants(watch.waits):
        for _ in range(2):
            for matrix in matrices:
                matrix.grad = torch.empty_like(matrix)
            optimizer.found_inf = torch.empty((), device="meta")  # type: ignore[attr-defined]
            optimizer.step()
    assert len(matrices) > 130
    assert watch.operations > 1000
    assert watch.waits == []


def test_a_scaled_step_never_waits() -> None:
    """As in float16. (AdamW has no fused form on the meta device.)"""
    layer = nn.Linear(32, 32, device="meta")
    optimizer = Muon([{"params": [layer.bias], "lr": 0.1}], [{"params": [layer.weight], "lr": 0.1}], torch.bfloat16)
    scaler = torch.amp.GradScaler("meta")
    with Watch() as watch, Constants(watch.waits):
        for _ in range(2):
            loss = layer(torch.empty(4, 32, device="meta")).square().sum()
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            norm = clip_gradient(layer.parameters(), 0.1)
            optimizer.found_inf = (~norm.isfinite()).float()  # type: ignore[attr-defined]
            layer.bias.grad = None
            optimizer.step()
            scaler.update()
    assert watch.operations > 100
    assert watch.waits == []


def test_no_backward_pass_reads_a_value() -> None:
    """Some do so only on a real device, which neither the meta device nor a dispatch mode shows: that of ``prod`` counts zeros."""
    config = PRESETS["smca_r50_multiscale"]().model
    config = replace(config, backbone=replace(config.backbone, weights=None), hidden_dim=32, decoder_layers=2)
    with torch.device("meta"):
        model = SMCADETR(config, download=False)
    images, mask, targets = meta_batch()
    outputs = model(images, mask)
    names = backward_names(SetCriterion(LossConfig(), matcher_backend="scipy")(outputs, targets)["loss"])
    assert len(names) > 30
    assert not [name for name in names if "Prod" in name]


def test_a_product_is_found() -> None:
    assert "ProdBackward1" in backward_names(torch.rand(3, 2, requires_grad=True).prod(-1).sum())


def backward_names(value: Tensor) -> set[str]:
    """Names of all backward passes that lead to `value`."""
    seen, waiting = set[Any](), [value.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting.extend(before for before, _ in node.next_functions)
    return {node.name() for node in seen}


@pytest.mark.parametrize(
    ("what", "wait"),
    [
        (lambda x: x.sum().item(), "item"),
        (lambda x: x.cpu(), "meta"),
        (lambda x: x + torch.tensor([1.0, 2.0], device=x.device), "tensor"),
        (lambda x: x[x > 0], "index"),
        (lambda x: bool(x.sum() > 0), "item"),
    ],
)
def test_the_watch_sees_what_waits(what: Any, wait: str) -> None:
    """Each way to wait is either noted or impossible on the meta device."""
    watch, refused = Watch(), ""
    with watch, Constants(watch.waits):
        try:
            what(torch.empty(2, device="meta"))
        except (RuntimeError, NotImplementedError) as error:
            refused = str(error)
    assert watch.waits or wait in refused, refused


class Small(nn.Module):
    """One weight matrix under AdamW."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.optimizer = torch.optim.AdamW(self.parameters(), lr=0.1, fused=True)

    def step(self, check: FiniteCheck, image_id: int, spoil: str = "") -> None:
        """The step of the trainer, in small."""
        loss = self.layer(torch.ones(1, 2)).square().sum()
        if spoil == "gradient":
            loss = loss + (self.layer.weight * 0).abs().sqrt().sum()
        check.raise_if_not_finite()
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        norm = clip_gradient(self.parameters(), 0.1)
        shown = loss * torch.nan if spoil == "loss" else loss
        check.record({"class/0": shown, "loss": loss}, norm, Step([batch_of(image_id)]), self.optimizer)
        self.optimizer.step()


def batch_of(image_id: int) -> Batch:
    targets = Targets(torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, 1, 4), torch.zeros(1, 1, dtype=torch.bool))
    sizes = torch.ones(1, 2, dtype=torch.int64)
    images = torch.zeros(1, 3, 2, 2, dtype=torch.uint8)
    return Batch(
        images,
        torch.zeros(1, 2, 2, dtype=torch.bool),
        targets,
        torch.tensor([image_id]),
        sizes,
        torch.zeros(1, dtype=torch.int64),
    )


@pytest.mark.parametrize(
    ("spoil", "message"),
    [("loss", "class term of decoder layer 0 is nan"), ("gradient", r"the gradient of layer.weight is not finite")],
)
def test_a_bad_step_changes_nothing_and_is_named_one_step_later(spoil: str, message: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Small()
    check = FiniteCheck(model, tmp_path, delayed=True)
    model.step(check, 1)
    before = model.layer.weight.detach().clone()
    state = {name: value.clone() for name, value in model.optimizer.state[model.layer.weight].items()}
    model.step(check, 2, spoil)
    assert torch.equal(model.layer.weight, before), "a step with a number that is not finite changed the weights"
    with pytest.raises(NonFiniteError, match=message + r".*Image ids of the batch: \[2\]"):
        model.step(check, 3)
    kept = load_file(tmp_path / "bad_step.safetensors")
    assert torch.equal(kept["model/layer.weight"], before), "what is kept must be what gave the number"
    assert kept["part 0/image_ids"].tolist() == [2]
    for name, value in state.items():
        assert torch.equal(kept[f"optimizer/layer.weight/{name}"], value), name
    assert check.values["loss"] == check.values["loss"]


def test_steps_that_overflow_are_left_out_and_counted_one_step_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in float16 on a GPU."""
    monkeypatch.setattr(guard, "MOST_SKIPPED", 3)
    torch.manual_seed(0)
    model, plain = Small(), Small()
    plain.load_state_dict(model.state_dict())
    check, check_of_plain = (
        FiniteCheck(model, tmp_path, delayed=True, skips=True),
        FiniteCheck(plain, tmp_path, delayed=True),
    )
    counts = []
    for image, spoil in enumerate(["", "gradient", "", "gradient", "gradient", ""]):
        model.step(check, image, spoil)
        if not spoil:
            plain.step(check_of_plain, image)
        counts.append((check.skipped, check.skipped_in_a_row))
    assert counts == [(0, 0), (0, 0), (1, 1), (1, 0), (2, 1), (3, 2)]
    check.raise_if_not_finite()
    assert check.values["skipped_steps"] == 3
    assert torch.equal(model.layer.weight, plain.layer.weight)
    for image in (6, 7, 8):
        model.step(check, image, "gradient")
    with pytest.raises(NonFiniteError, match="3 steps in a row were left out"):
        check.raise_if_not_finite()
    with pytest.raises(NonFiniteError, match="class term of decoder layer 0 is nan"):
        model.step(FiniteCheck(model, tmp_path, delayed=False, skips=True), 9, "loss")


def test_a_good_step_after_a_good_one_moves_the_weights(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, plain = Small(), Small()
    plain.load_state_dict(model.state_dict())
    for made, delayed in ((model, True), (plain, False)):
        check = FiniteCheck(made, tmp_path, delayed=delayed)
        for image in range(3):
            made.step(check, image)
        check.raise_if_not_finite()
    assert torch.equal(model.layer.weight, plain.layer.weight)
