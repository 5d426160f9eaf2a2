"""Training end to end at the smallest size: it learns, resumes exactly, stops on non-finite numbers, names mistakes."""

from __future__ import annotations

import dataclasses
import json
import runpy
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from smca.datasets import SyntheticShapes, Targets
from smca.gpu import cli, train
from smca.gpu.attention import dispatch
from smca.gpu.config import LossConfig, RunConfig
from smca.gpu.files import load_checkpoint
from smca.gpu.loss import NonFiniteError, SetCriterion
from smca.gpu.model import SMCADETR
from smca.gpu.presets import PRESETS
from smca.gpu.training.guard import FiniteCheck
from smca.gpu.training.log import read_metrics
from tiny_run import tiny


def weights_of(model_dir: Path) -> dict[str, torch.Tensor]:
    return load_file(model_dir / "model.safetensors")


@pytest.mark.usefixtures("pictures")
def test_a_run_leaves_what_it_promises(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model_dir = train.train(tiny(tmp_path, optim=dataclasses.replace(tiny(tmp_path).optim, ema_decay=0.9)))
    for name in ("checkpoint.pt", "metrics.jsonl", "curves.png", "predictions.png", "model/config.json"):
        assert (tmp_path / name).is_file(), name
    metrics = read_metrics(tmp_path / "metrics.jsonl")
    assert [m["epoch"] for m in metrics] == [1, 2]
    assert {"epoch", "step", "loss", "ap", "ap50", "train_seconds"} <= metrics[0].keys()
    assert not list(tmp_path.glob("*.partial"))
    model = SMCADETR.from_pretrained(model_dir)
    assert model.config.class_names
    assert len(model.config.class_names) == model.config.num_classes
    said = capsys.readouterr().out
    assert f"smca evaluate {tmp_path}/model" in said, "the last lines say what to type next"


def test_the_loss_falls_on_a_few_images(tmp_path: Path) -> None:
    losses = []
    for epochs in (1, 40):
        train.train(tiny(tmp_path / str(epochs), epochs=epochs, eval_every=epochs))
        losses.append(read_metrics(tmp_path / str(epochs) / "metrics.jsonl")[-1]["loss"])
    assert losses[1] < 0.8 * losses[0], f"12 images seen 40 times must have a lower loss than seen once: {losses}"


def test_same_seed_same_weights_and_another_seed_others(tmp_path: Path) -> None:
    runs = [weights_of(train.train(tiny(tmp_path / str(i), epochs=1, seed=seed))) for i, seed in enumerate((0, 0, 1))]
    name = "decoder.layers.0.linear1.weight"
    assert torch.equal(runs[0][name], runs[1][name])
    assert not torch.equal(runs[0][name], runs[2][name])


@pytest.mark.parametrize(
    ("term", "message"),
    [("class", r"class term of decoder layer 1 is nan"), ("gradient", r"the gradient of .* is not finite")],
)
def test_non_finite_numbers_stop_training(
    term: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After one good epoch a term turns NaN: training names it, keeps the step, and leaves the good checkpoint alone."""
    calls = 0
    forward = SetCriterion.forward

    def poisoned(self: Any, outputs: dict[str, torch.Tensor], *of_step: Any) -> dict[str, torch.Tensor]:
        nonlocal calls
        calls += 1
        terms = forward(self, outputs, *of_step)
        if calls == 5 and term == "class":
            terms["class/1"] = terms["class/1"] * torch.nan
        if calls == 5 and term == "gradient":
            terms["loss"] = terms["loss"] + (outputs["logits"] * 0).abs().sqrt().sum()  # d√x at 0 is infinite
        return terms

    monkeypatch.setattr(SetCriterion, "forward", poisoned)
    with pytest.raises(NonFiniteError, match=message) as caught:
        train.train(tiny(tmp_path, epochs=3))
    assert "bad_step.safetensors" in str(caught.value)
    step = load_file(tmp_path / "bad_step.safetensors")
    assert step["part 0/images"].shape == (4, 3, 64, 64)
    assert step["part 0/image_ids"].tolist() == [
        int(i) for i in str(caught.value).split("[")[1].split("]")[0].split(",")
    ]
    state = load_checkpoint(tmp_path / "checkpoint.pt")
    assert state["epoch"] == 1
    assert all(torch.isfinite(v).all() for v in state["model"].values())


def test_a_step_in_parts_that_turns_nan_is_kept_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, forward = 0, SetCriterion.forward

    def poisoned(self: Any, outputs: dict[str, torch.Tensor], *of_step: Any) -> dict[str, torch.Tensor]:
        nonlocal calls
        calls += 1
        terms = forward(self, outputs, *of_step)
        return {**terms, "loss": terms["loss"] * (torch.nan if calls == 3 else 1)}

    monkeypatch.setattr(SetCriterion, "forward", poisoned)
    with pytest.raises(NonFiniteError, match="the sum of the terms is nan") as caught:
        train.train(tiny(tmp_path, accumulate=2))
    step = load_file(tmp_path / "bad_step.safetensors")
    ids = [i for part in range(2) for i in step[f"part {part}/image_ids"].tolist()]
    assert f"Image ids of the batch: {ids}" in str(caught.value)
    assert step["part 1/images"].shape == (2, 3, 64, 64)


def test_a_loss_of_ones_own_is_checked(tmp_path: Path) -> None:
    class Learned(SetCriterion):
        def __init__(self) -> None:
            super().__init__(LossConfig())
            self.factor = torch.nn.Parameter(torch.ones(()))

    with pytest.raises(ValueError, match=r"without parameters to train, got \['factor'\]"):
        train.train(tiny(tmp_path / "parameters"), criterion=Learned())
    for terms in ({"loss": torch.zeros(2)}, {"class": torch.zeros(())}):
        with pytest.raises(ValueError, match='one of them "loss"'):
            train.train(tiny(tmp_path / "shape", overwrite=True), criterion=lambda o, t, terms=terms: terms)  # type: ignore[misc]


def test_a_loss_of_ones_own_that_turns_nan_is_named(tmp_path: Path) -> None:
    def criterion(outputs: dict[str, torch.Tensor], targets: Targets) -> dict[str, torch.Tensor]:
        bad = outputs["logits"].sum() * torch.nan
        return {"mine": bad, "loss": bad}

    with pytest.raises(NonFiniteError, match="the mine term is nan"):
        train.train(tiny(tmp_path), criterion=criterion)


def test_a_step_in_parts_is_the_same_step(tmp_path: Path) -> None:
    """Where norms do not learn: the loss of each term, and the gradient, whatever the number of objects in a part."""
    seen: list[tuple[dict[str, float], torch.Tensor]] = []

    def recorded(self: Any, terms: Mapping[str, torch.Tensor], norm: torch.Tensor, *more: Any) -> None:
        gradient = torch.cat([p.grad.flatten() for p in self.model.parameters() if p.grad is not None])
        seen.append(({name: float(value) for name, value in terms.items()}, gradient))

    for parts in (1, 2, 4):
        config = tiny(tmp_path / str(parts), max_steps=1, accumulate=parts, seed=1)
        frozen = dataclasses.replace(config.model.backbone, frozen_norm=True)
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, backbone=frozen))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(FiniteCheck, "record", recorded)
            train.train(config)
    assert len(seen) == 3
    (terms, gradient), *others = seen
    for of_parts, its_gradient in others:
        assert of_parts == pytest.approx(terms, rel=1e-5)
        assert torch.allclose(its_gradient, gradient, rtol=0, atol=1e-5 * float(gradient.norm()))


def test_bf16_trains_with_losses_in_float32(tmp_path: Path) -> None:
    train.train(tiny(tmp_path, precision="bf16", epochs=1))
    (metrics,) = read_metrics(tmp_path / "metrics.jsonl")
    assert 0 < metrics["loss"] < 30


def test_compiled_training_has_no_graph_break_and_gives_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Network, matching and loss are each traced whole. (What the compiler makes of it, conformance/ checks for attention.)

    Compared are the terms of the loss and the first gradient. (Traced, attention is computed the plain way, otherwise as four more
    channels, and how either rounds depends on the processor and on the number of threads.) Weights hardly move: optimisers divide
    a gradient by its own size, so that one which is nothing but rounding would move a weight as far as any other.
    """
    compiled: list[str] = []
    original = torch.nn.Module.compile

    def traced(self: torch.nn.Module) -> None:
        compiled.append(type(self).__name__)
        original(self, backend="eager", fullgraph=True)  # the tracer alone; C++ takes minutes

    monkeypatch.setattr(torch.nn.Module, "compile", traced)
    config = tiny(tmp_path / "plain", epochs=1, shape_bucket=32)
    optim = dataclasses.replace(config.optim, lr=1e-9, backbone_lr=1e-9, muon_lr=1e-9)
    config = dataclasses.replace(config, optim=optim)
    expected, expected_gradient = steps_of(config, monkeypatch)
    config = dataclasses.replace(config, output=tmp_path / "compiled", compile=True)
    found, gradient = steps_of(config, monkeypatch)
    assert compiled == ["SMCADETR", "SetCriterion"]
    assert len(found) == len(expected) == 3
    for step, (got, want) in enumerate(zip(found, expected, strict=True)):
        assert got == pytest.approx(want, rel=1e-4), f"step {step}"
    assert gradient.keys() == expected_gradient.keys()
    largest = max(value.abs().max().item() for value in expected_gradient.values())
    for name, value in expected_gradient.items():
        torch.testing.assert_close(gradient[name], value, rtol=1e-3, atol=1e-4 * largest, msg=name)


def steps_of(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
    """Train; the terms of every step's loss, and the gradient of the first step by parameter (clipped)."""
    terms_of: list[dict[str, float]] = []
    gradient: dict[str, torch.Tensor] = {}
    record = FiniteCheck.record

    def noting(self: Any, terms: Mapping[str, torch.Tensor], *others: Any) -> None:
        if not terms_of:
            gradient.update({n: p.grad.clone() for n, p in self.model.named_parameters() if p.grad is not None})
        terms_of.append({name: value.item() for name, value in terms.items()})
        record(self, terms, *others)

    with monkeypatch.context() as patch:
        patch.setattr(FiniteCheck, "record", noting)
        train.train(config)
    return terms_of, gradient


@pytest.mark.parametrize("backend", ["eager", "lifted"])
def test_attention_is_computed_as_asked(backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    for name in ("eager", "lifted"):
        plain = getattr(dispatch, f"{name}_smca_attention")
        monkeypatch.setattr(dispatch, f"{name}_smca_attention", lambda *a, n=name, f=plain: (taken.append(n), f(*a))[1])
    train.train(tiny(tmp_path, epochs=1, attention=backend, max_steps=1, model=tiny(tmp_path).model))
    assert backend in taken


def test_no_way_to_compute_smca_attention_is_asked_of_detr(tmp_path: Path) -> None:
    model = dataclasses.replace(tiny(tmp_path).model, cross_attention="dense", prior_unit="pixels")
    with pytest.raises(ValueError, match=r'attention must be left at its default with model.cross_attention="dense"'):
        tiny(tmp_path, attention="lifted", model=model)


def coco_folder(root: Path) -> Path:
    """The built-in data as files: 8 images to train on, 4 held out."""
    for split, count, seed in (("train", 8, 0), ("val", 4, 1)):
        SyntheticShapes(count, seed, image_size=64).export_coco(root, split)  # type: ignore[arg-type]
    return root


def test_any_coco_folder_trains_without_editing_code(tmp_path: Path) -> None:
    """Other category ids and names, one class fewer: head, names and ids follow from the data."""
    root = coco_folder(tmp_path / "data")
    for file in (root / "annotations").iterdir():
        coco = json.loads(file.read_text())
        coco["categories"] = [{"id": 10 * c["id"], "name": f"my {c['name']}"} for c in coco["categories"][:4]]
        coco["annotations"] = [
            {**a, "category_id": 10 * a["category_id"]} for a in coco["annotations"] if a["category_id"] < 5
        ]
        file.write_text(json.dumps(coco))
    model_dir = train.train(tiny(tmp_path / "run", data=str(root), epochs=1, cache_images=False))
    config = SMCADETR.from_pretrained(model_dir).config
    assert config.category_ids == (10, 20, 30, 40)
    assert config.class_names == ("my disc", "my rectangle", "my triangle", "my ring")


def test_a_corrupt_image_is_named_also_from_a_worker(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = coco_folder(tmp_path / "data")
    bad = sorted((root / "train").iterdir())[3]
    bad.write_bytes(bad.read_bytes()[:200])
    for workers in (0, 1):
        config = tiny(tmp_path / f"run{workers}", data=str(root), workers=workers)
        with pytest.raises(SystemExit):
            cli.run(lambda _, config=config: train.train(config) and None, [])  # type: ignore[misc]
        said = capsys.readouterr().err
        assert bad.name in said
        assert "Traceback (most" not in said


def test_more_objects_than_queries_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny(tmp_path, epochs=1)
    train.train(dataclasses.replace(config, model=dataclasses.replace(config.model, num_queries=2)))
    assert "queries, one for each object it can find: set --model.num-queries 9 or so" in " ".join(
        capsys.readouterr().out.split()
    )


@pytest.mark.usefixtures("pictures")
def test_bccd_trains(tmp_path: Path) -> None:
    root = Path(__file__).parents[3] / "shared" / "data" / "bccd"
    if not root.is_dir():
        pytest.skip(f"the BCCD photographs are not at {root}")
    train.train(tiny(tmp_path, data=str(root), max_steps=2, epochs=1))
    (metrics,) = read_metrics(tmp_path / "metrics.jsonl")
    assert metrics["step"] == 2
    assert {"RBC", "WBC", "Platelets"} <= set(str(metrics).replace("'", " ").replace("/", " ").split())


def test_an_existing_run_is_not_overwritten_by_accident(tmp_path: Path) -> None:
    (tmp_path / "checkpoint.pt").write_bytes(b"precious")
    with pytest.raises(ValueError, match="already holds a run"):
        train.train(tiny(tmp_path))
    with pytest.raises(ValueError, match="damaged or is not a checkpoint"):
        train.train(tiny(tmp_path, resume=True))
    with pytest.raises(ValueError, match="no checkpoint at"):
        train.train(tiny(tmp_path / "elsewhere", resume=True))


def test_a_checkpoint_never_runs_code(tmp_path: Path) -> None:
    """A pickle that would call a function when loaded is refused, and the function is not called."""

    class Attack:
        def __reduce__(self) -> tuple[Any, tuple[str, ...]]:
            return Path.touch, (tmp_path / "owned",)  # type: ignore[return-value]

    torch.save({"format": 2, "model": Attack()}, tmp_path / "checkpoint.pt")
    with pytest.raises(ValueError, match="damaged or is not a checkpoint"):
        load_checkpoint(tmp_path / "checkpoint.pt")
    assert not (tmp_path / "owned").exists()


def test_resume_checks_that_the_run_is_the_same(tmp_path: Path) -> None:
    config = tiny(tmp_path, epochs=1)
    train.train(config)
    wider = dataclasses.replace(config.model, num_queries=9)
    with pytest.raises(ValueError, match="configured otherwise"):
        train.train(dataclasses.replace(config, model=wider, resume=True))


@pytest.mark.parametrize("name", PRESETS)
def test_presets_parse_and_take_overrides(name: str) -> None:
    run = train.parse([name, "--model.num-queries", "7", "--optim.lr", "0.5", "--epochs", "3"])
    assert (run.model.num_queries, run.optim.lr, run.epochs) == (7, 0.5, 3)
    assert run.model.backbone == PRESETS[name]().model.backbone


def test_the_settings_of_the_ablation_page_parse(capsys: pytest.CaptureFixture[str]) -> None:
    page = Path(__file__).parents[2] / "docs" / "ablations.py"
    presets = runpy.run_path(str(page))["PRESETS"]
    for name, preset in presets.items():
        run = train.parse([name, "--seed", "7"], presets, prog="ablations.py")
        assert run.model == preset().model
        assert run.seed == 7
    assert len({repr(preset().model) for preset in presets.values()}) == len(presets), "each differs from the others"
    command = [sys.executable, str(page), "small", "--seed", "7"]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 1
    assert "no preset 'small': choose one of plain," in ran.stderr


def test_published_presets_stay_as_published() -> None:
    lengths = {"smca_r50": (300, 16, 50, (40,)), "detr_r50": (100, 64, 500, (400,))}
    scores = {"smca_r50": ("sigmoid", "focal", 2.0, 0.1), "detr_r50": ("softmax", "softmax", 1.0, 0.1)}
    for name, kind in (("smca_r50", "smca"), ("detr_r50", "dense")):
        run = PRESETS[name]()
        assert run.model.cross_attention == kind
        assert (run.model.num_queries, run.batch_size, run.epochs, run.optim.drop_epoch) == lengths[name]
        loss = run.loss
        got = (run.model.class_scores, loss.classification, loss.class_weight, loss.no_object_weight)
        assert got == scores[name]
        assert (loss.l1_weight, loss.giou_weight) == (5.0, 2.0)
        assert (run.model.encoder_layers, run.model.decoder_layers, run.model.dropout) == (6, 6, 0.1)
        conventions = (run.model.position_encoding, run.model.padding_cells, run.model.initialization)
        assert conventions == ("detr", "nearest", "published")
        assert (run.model.hidden_dim, run.model.num_heads, run.model.strides) == (256, 8, (32,))
        assert (run.optim.lr, run.optim.backbone_lr, run.optim.weight_decay) == (1e-4, 1e-5, 1e-4)
        assert run.optim.clip_norm == 0.1
        assert not (run.model.pre_norm)
        assert not (run.model.box_refinement)
        assert (run.model.query_init, run.model.prior_unit, run.model.dense_head) == ("random", "pixels", False)
        assert (run.model.denoising_groups, run.optim.optimizer) == (0, "adamw")
        assert 2 * (run.model.prior_sigma_px / run.model.strides[0]) ** 2 == 8.0, "β = 8 cells² at stride 32"


@pytest.mark.parametrize(
    ("name", "parameters", "macs"),
    [
        ("smca_r50", 41.76, 83.98),
        ("smca_r50_multiscale", 39.75, 134.14),
        ("smca_r50_multiscale_conv", 40.98, 163.74),
        ("smca_r101_multiscale", 58.69, 197.59),
        ("fast_r50", 40.59, 134.84),
    ],
)
def test_a_dry_run_says_how_large_the_model_is(
    name: str,
    parameters: float,
    macs: float,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    train.main([name, "--dry-run"])
    out = capsys.readouterr().out
    (total,) = [line for line in out.splitlines() if line.startswith("all")]
    assert float(total.split()[1]) == pytest.approx(parameters, abs=0.01)
    assert float(total.split()[5]) == pytest.approx(macs, abs=0.01)
    assert not list(tmp_path.iterdir()), "a dry run writes nothing"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["train", "huge"], "no preset 'huge': choose one of demo, small"),
        (["train", "small"], "no data given: pass --data DIR"),
        (["train", "small", "--data", "/nowhere"], "/nowhere"),
        (["train", "demo", "--epochs", "0"], "epochs must be at least 1, got 0"),
        (["train", "demo", "--model.hidden-dim", "30"], "model.hidden_dim must be a multiple of num_heads = 4"),
        (
            ["train", "smca_r50", "--model.cross-attention", "dense", "--model.prior-scale", "fixed"],
            "model.prior_scale must be left at its default",
        ),
        (["train", "demo", "--model.strides", "5"], "has no stage of stride 5; it offers stage1: 4, stage2: 8"),
        (["train", "demo", "--model.strides", "8", "4"], "model.strides must be at least one stride, from the finest"),
        (
            ["train", "demo", "--model.no-scale-selection"],
            "model.scale_selection must be left at its default with a single",
        ),
        (["train", "smca_r50_multiscale_conv", "--model.cross-level-blocks", "2"], 'must be empty with encoder="conv"'),
        (["train", "demo", "--device", "cuda"], "torch sees no CUDA GPU"),
        (["evaluate", "/nowhere/model"], "neither a folder nor a reachable repository"),
    ],
)
def test_mistakes_on_the_command_line_get_one_readable_message(
    argv: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if "cuda" in argv and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(sys, "argv", ["smca", *argv])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code not in (0, None)
    said = capsys.readouterr()
    assert message in " ".join((said.err + said.out).split())
    assert "Traceback" not in said.err


def test_an_unknown_option_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        train.parse(["demo", "--model.num-querys", "7"])
    assert "num-querys" in " ".join(capsys.readouterr().err.split())


def test_python_train_py_is_smca_train(tmp_path: Path) -> None:
    script = Path(train.__file__)
    done = subprocess.run(
        [sys.executable, str(script), "demo", "--epochs", "0"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert "epochs must be at least 1" in " ".join((done.stdout + done.stderr).split())
