"""Files that a run leaves, as they come back: cut, damaged, somebody else's, or from a run that was stopped."""

from __future__ import annotations

import dataclasses
import json
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from smca.gpu.config import BackboneConfig, ModelConfig
from smca.gpu.files import load_checkpoint, save_checkpoint
from smca.gpu.model import SMCADETR
from smca.gpu.presets import tiny_resnet

CONFIG = ModelConfig(
    num_classes=2,
    class_names=("cat", "dog"),
    category_ids=(3, 8),
    backbone=tiny_resnet(1),
    strides=(4, 8),
    hidden_dim=8,
    num_heads=2,
    num_queries=3,
    encoder_layers=1,
    decoder_layers=1,
    feedforward_dim=8,
    prior_sigma_px=8.0,
    image_short_side=32,
    image_max_size=32,
)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that is finished: model/, model_last/ and checkpoint.pt."""
    torch.manual_seed(0)
    run, model, average = tmp_path_factory.mktemp("run"), SMCADETR(CONFIG), SMCADETR(CONFIG)
    model.save_pretrained(run / "model")
    SMCADETR(CONFIG).save_pretrained(run / "model_last")
    save_checkpoint(run / "checkpoint.pt", state_of(model, average))
    return run


@pytest.fixture
def run(saved: Path, tmp_path: Path) -> Path:
    """A copy of `saved` that may be changed."""
    return Path(shutil.copytree(saved, tmp_path / "run"))


def state_of(model: SMCADETR, average: SMCADETR | None = None, **changes: Any) -> dict[str, Any]:
    state: dict[str, Any] = {"config": model.config.to_json(), "model": model.state_dict()}
    state |= {"average": average.state_dict() if average is not None else None, "sum_of_losses": torch.zeros(())}
    state |= {"optimizer": {"state": {}, "param_groups": []}, "step": 5, "epoch": 1, "batch": 2, "total_steps": 9}
    return {**state, "logged": {"loss": 1.5}, "train_seconds": 2.5, **changes}


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def refused(name: Path, file: Path | str, load: Callable[[Path], object] = SMCADETR.from_pretrained) -> str:
    """The message of the ValueError that names `file`."""
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the caller looks at the message
        load(name)
    message = str(caught.value)
    assert str(file) in message
    assert len(message) < 600 + 2 * len(str(file))
    assert message.isprintable()
    return message


# config.json


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_classes": "2"}, "num_classes must be a whole number of at most 2^53, got '2'"),
        ({"num_queries": True}, "num_queries must be a whole number of at most 2^53, got True"),
        ({"num_queries": 3.5}, "num_queries must be a whole number of at most 2^53, got 3.5"),
        ({"num_queries": 10**400}, "num_queries must be a whole number of at most 2^53, got 1000"),
        ({"num_queries": 10**9}, "model.num_queries must be at least 1 and at most 100000, got 1000000000"),
        ({"encoder_layers": 10**6}, "model.encoder_layers must be at least 0 and at most 1000, got 1000000"),
        ({"encoder_layers": -1}, "model.encoder_layers must be at least 0 and at most 1000, got -1"),
        ({"decoder_layers": 0}, "model.decoder_layers must be at least 1 and at most 1000, got 0"),
        ({"dropout": float("nan")}, "dropout must be a finite number, got nan"),
        ({"prior_sigma_px": float("inf")}, "prior_sigma_px must be a finite number, got inf"),
        ({"pre_norm": 1}, "pre_norm must be true or false, got 1"),
        ({"encoder": "cnn"}, "encoder must be one of 'attention', 'conv', 'pyramid_conv', got 'cnn'"),
        ({"encoder": ["conv"]}, "encoder must be one of 'attention', 'conv', 'pyramid_conv', got ['conv']"),
        ({"class_names": "ab"}, "class_names must be a list, got 'ab'"),
        ({"class_names": ["cat", 4]}, "class_names[1] must be text, got 4"),
        ({"class_names": ["cat", "\ud800"]}, "class_names[1] must be text, got '\\ud800'"),
        ({"strides": [4, None]}, "strides[1] must be a whole number of at most 2^53, got None"),
        ({"strides": list(range(1, 40))}, "model.strides must be at most 16, got 39"),
        ({"pixel_mean": [0.5, 0.5]}, "pixel_mean must be a list of 3 values, got [0.5, 0.5]"),
        ({"pixel_std": [0.5, 0.5, 0]}, "model.pixel_std must be positive, got (0.5, 0.5, 0.0)"),
        ({"backbone": None}, "backbone must be an object {…}, got None"),
        ({"backbone": {"weights": 3}}, "backbone.weights must be text, got 3"),
        ({"backbone": {"nam": "resnet"}}, "backbone has unknown keys ['nam']; the nearest that there is: 'name'"),
        ({"backbone": {"options": [1]}}, "backbone.options must be an object {…}, got [1]"),
        (
            {"backbone": {"options": {"a": [{"b": float("inf")}]}}},
            "backbone.options.a[0].b must be text, a finite number",
        ),
        ({"num_quarries": 3}, "unknown keys ['num_quarries']; the nearest that there is: 'num_queries'"),
        ({"class_names": ["x" * 9999, 4]}, "class_names[1] must be text, got 4"),
        ({"num_classes": "x" * 9999}, "got '" + "x" * 78 + "…"),
    ],
)
def test_every_value_of_a_configuration_is_held_to_its_type(run: Path, change: dict[str, Any], message: str) -> None:
    path = run / "model" / "config.json"
    edit(path, **change)
    said = refused(run / "model", path)
    assert said.startswith(f"{path}: ")
    assert message in said
    assert said.endswith(("copy that it came from", "Correct or remove them"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "expected JSON, got  ("),
        (b'{"num_classes": 2', 'expected JSON, got {"num_classes": 2 ('),
        (b"[1, 2]", "the file must be an object {…}, got [1, 2]"),
        (b"[" * 100_000, "expected JSON, got [[["),
        (b'{"a": ' * 100_000, "expected JSON, got {"),
        (b"1" * 5000, "expected JSON, got 111"),
        (b"\xff\xfe\x00", "expected JSON, got "),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
    ],
)
def test_text_that_is_no_configuration(run: Path, text: bytes, message: str) -> None:
    path = run / "model" / "config.json"
    path.write_bytes(text)
    assert message in refused(run / "model", path)


def test_a_configuration_survives_json() -> None:
    config = dataclasses.replace(CONFIG, backbone=BackboneConfig("swin", {"depths": [1, 2]}, "a/b", False, 1))
    assert ModelConfig.from_json(config.to_json()) == config


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"auto_map": {"AutoBackbone": "evil--x.Y"}}, "no option 'auto_map'"),
        ({"attn_implementation": "evil/kernels"}, "no option 'attn_implementation'"),
        ({"_attn_implementation": "evil/kernels"}, "no option '_attn_implementation'"),
        ({"_name_or_path": "evil/model"}, "no option '_name_or_path'"),
        ({"custom_pipelines": {}}, "no option 'custom_pipelines'"),
        ({"dtype": "float16"}, "no option 'dtype'"),
        ({"num_labels": 10**9}, "no option 'num_labels'"),
        ({"out_features": ["stem"]}, "no option 'out_features'"),
        ({"hidden_sizes": {"auto_map": 1}}, "must not hold 'auto_map'"),
        (
            {"depths": [1, 10**8]},
            "option 'depths' of backbone 'resnet' must be at most 1000 in all, got [1, 100000000]",
        ),
        ({"embedding_size": 10**12}, "option 'embedding_size' of backbone 'resnet' must be at most 1000000, got"),
        ({"depths": "abc"}, "backbone 'resnet' cannot be built"),
        ({"depths": []}, "backbone 'resnet' cannot be built"),
        ({"layer_type": "other"}, "backbone 'resnet' cannot be built"),
    ],
)
def test_options_of_the_backbone_describe_an_architecture_and_nothing_else(
    run: Path, options: dict[str, Any], message: str
) -> None:
    path = run / "model" / "config.json"
    edit(path, backbone={"name": "resnet", "options": options})
    said = refused(run / "model", path)
    assert said.startswith(f"{path}: no model can be built from it: ")
    assert message in said


def test_options_that_multiply_are_bounded_together(run: Path) -> None:
    path = run / "model" / "config.json"
    edit(
        path, backbone={"name": "hgnet_v2", "options": {"stage_num_blocks": [99] * 4, "stage_numb_of_layers": [99] * 4}}
    )
    assert "would have too many layers: lower depths, stage_num_blocks, stage_numb_of_layers" in refused(run, path)


@pytest.mark.parametrize("name", ["bert", "timm_backbone", "x" * 999])
def test_a_backbone_is_one_of_transformers_backbones(run: Path, name: str) -> None:
    path = run / "model" / "config.json"
    edit(path, backbone={"name": name})
    refused(run / "model", path)


# model.safetensors


def test_a_saved_model_never_asks_for_published_weights(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = json.loads((run / "model" / "config.json").read_text())
    edit(run / "model" / "config.json", backbone={**config["backbone"], "weights": "nobody/nothing"})
    monkeypatch.setattr("socket.socket", None)
    assert SMCADETR.from_pretrained(run / "model").config.backbone.weights is None


def test_weights_that_are_cut_or_no_weights_at_all(run: Path) -> None:
    path = run / "model" / "model.safetensors"
    whole = path.read_bytes()
    for damaged in (b"", whole[:5], whole[:100], whole[:-1], b"garbage " * 99, whole + b"x", b"\xff" * 8 + whole[8:]):
        path.write_bytes(damaged)
        assert "is cut, damaged or not a safetensors file" in refused(run / "model", path)
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    assert "is a Git LFS pointer, not the file itself: run `git lfs pull`" in refused(run / "model", path)


def test_weights_that_are_not_numbers(run: Path) -> None:
    path = run / "model" / "model.safetensors"
    weights = load_file(path)
    for value in (torch.nan, torch.inf):
        bad = {k: v.clone() for k, v in weights.items()}
        bad["decoder.query_position"][0, 0] = value
        save_file(bad, path)
        assert "decoder.query_position has NaN or infinite values: " in refused(run / "model", path)
    bad["input_proj.0.bias"][0] = value
    save_file(bad, path)
    assert "decoder.query_position has NaN or infinite values (and 1 more weights have)" in refused(run / "model", path)


def test_weights_that_do_not_fit(run: Path) -> None:
    path = run / "model" / "model.safetensors"
    weights = load_file(path)
    bias = weights.pop("input_proj.0.bias")
    save_file({**weights, "other": bias}, path)
    said = refused(run / "model", path)
    assert "1 missing: input_proj.0.bias; 1 unknown: other. Take" in said
    save_file({**weights, "input_proj.0.bias": bias.to(torch.int32)}, path)
    assert "input_proj.0.bias is (8,) of whole numbers, the model needs (8,)" in refused(run / "model", path)
    save_file({**weights, "input_proj.0.bias": bias.to(torch.float16)}, path)
    assert SMCADETR.from_pretrained(run / "model").input_proj[0].bias.dtype == torch.float32  # type: ignore[union-attr]
    save_file({**weights, "input_proj.0.bias": bias, "backbone.body.encoder.stages.3.x": bias.clone()}, path)
    assert "An earlier version saved it, with stages of the backbone that are no longer kept" in refused(run, path)
    for old in (
        {"encoder.layers.0.conv.own.weight": torch.ones(8, 1, 3, 3)},
        {"input_proj.0.weight": torch.ones(8, 8, 3, 3)},
    ):
        save_file({**weights, "input_proj.0.bias": bias, **old}, path)
        assert "with another convolutional encoder or level beyond the backbone: train it anew" in refused(run, path)


def test_memory_is_taken_only_for_weights_that_fit(run: Path) -> None:
    """The configuration describes a model of 4 TB, the file has weights of a few kB."""
    edit(run / "model" / "config.json", hidden_dim=16_384, feedforward_dim=1_000_000, decoder_layers=60, num_heads=1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert "of another shape or kind: " in refused(run / "model", run / "model" / "model.safetensors")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # kB


# Runs and checkpoints


def test_a_run_is_taken_for_its_model_or_else_its_checkpoint(run: Path) -> None:
    name = "decoder.query_position"
    expected = load_file(run / "model" / "model.safetensors")[name]
    average = load_checkpoint(run / "checkpoint.pt")["average"][name]
    assert torch.equal(SMCADETR.from_pretrained(run).state_dict()[name], expected)
    assert torch.equal(SMCADETR.from_pretrained(run / "checkpoint.pt").state_dict()[name], average)
    (run / "model" / "config.json").unlink()  # the model was not finished
    last = load_file(run / "model_last" / "model.safetensors")[name]
    assert torch.equal(SMCADETR.from_pretrained(run).state_dict()[name], last)
    assert not torch.equal(last, expected)
    assert f"lacks config.json: give {run / 'model_last'}" in refused(run / "model", run / "model_last")
    shutil.rmtree(run / "model_last")
    model = SMCADETR.from_pretrained(str(run))
    assert torch.equal(model.state_dict()[name], average)
    assert not torch.equal(average, expected)
    assert model.config.class_names == ("cat", "dog")
    assert not model.training
    said = refused(run / "model", run / "model")
    assert f"lacks config.json: give {run / 'checkpoint.pt'}, which the run has left (it is not finished)" in said
    shutil.rmtree(run / "model")
    assert f"there is no {run / 'model'}: give {run / 'checkpoint.pt'}" in refused(run / "model", run / "checkpoint.pt")


def test_what_to_give_instead_is_said(run: Path) -> None:
    (run / "checkpoint.pt").unlink()
    for wrong in ("checkpoint.pt", "best.pt"):
        assert f"there is no {run / wrong}: give {run / 'model'}" in refused(run / wrong, run / wrong)
    for half in ("config.json", "model.safetensors"):
        assert f"half of a model: give its folder, {run / 'model'}" in refused(
            run / "model" / half, run / "model" / half
        )
    (run / "empty").mkdir()
    assert f"lacks config.json and model.safetensors: give {run / 'model'}" in refused(run / "empty", run / "empty")


def test_a_checkpoint_without_an_average_serves_its_model_and_its_resolved_configuration(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, path = SMCADETR(CONFIG), tmp_path / "checkpoint.pt"
    unresolved = dataclasses.replace(CONFIG, backbone=BackboneConfig(weights="nobody/nothing")).to_json()
    save_checkpoint(path, state_of(model, config=unresolved, model_config=CONFIG.to_json()))
    again = SMCADETR.from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), model.state_dict().values(), strict=True))
    save_checkpoint(path, state_of(model, config=unresolved))
    assert "does not fit its configuration" in refused(path, path)
    save_checkpoint(path, state_of(model, model_config=3))
    assert "model_config missing or of the wrong type" in refused(path, path)
    model.state_dict()["decoder.query_position"][1, 1] = torch.nan
    save_checkpoint(path, state_of(model))
    assert "decoder.query_position has NaN or infinite values" in refused(path, path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 1}, "was not written by this version of smca train"),
        ({"model": None}, "model missing or of the wrong type"),
        ({"model": {"a": 3}}, "model missing or of the wrong type"),
        ({"average": {3: torch.zeros(1)}}, "average missing or of the wrong type"),
        (
            {"optimizer": [], "sum_of_losses": 1, "step": "3"},
            "optimizer, step, sum_of_losses missing or of the wrong type",
        ),
        ({"batch": -1}, "batch missing or of the wrong type"),
        ({"logged": {"loss": "high"}}, "logged missing or of the wrong type"),
        ({"config": {}}, "config missing or of the wrong type"),
        ({"train_seconds": None}, "train_seconds missing or of the wrong type"),
    ],
)
def test_a_checkpoint_holds_what_it_must(saved: Path, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = tmp_path / "checkpoint.pt"
    state = torch.load(saved / "checkpoint.pt", weights_only=True)
    torch.save({**state, **change}, path)
    assert message in refused(path, path, load_checkpoint)
    (key, *_) = change
    torch.save({k: v for k, v in state.items() if k != key}, path)
    refused(path, path, load_checkpoint)
    torch.save([1, 2], path)
    assert "was not written by this version" in refused(path, path, load_checkpoint)


# Damage at random


def mutations(content: bytes, rng: np.random.Generator) -> bytes:
    """`content` with a few bytes changed, a piece missing or doubled, or the end cut off."""
    data = bytearray(content)
    kind, at = rng.integers(4), int(rng.integers(len(data)))
    if kind == 0:
        for place in rng.integers(len(data), size=rng.integers(1, 6)):
            data[place] = rng.integers(256)
    elif kind == 1:
        del data[at:]
    elif kind == 2:
        del data[at : at + int(rng.integers(1, 40))]
    else:
        data[at:at] = data[at : at + int(rng.integers(1, 40))]
    return bytes(data)


def mutated_json(value: Any, rng: np.random.Generator) -> Any:
    """`value` with one of its values, however deep, replaced by one of another kind or size."""
    others = [
        None,
        True,
        -1,
        0,
        7,
        10**6,
        10**30,
        1e308,
        float("nan"),
        "",
        "conv",
        "é" * 500,
        [],
        [1, 1],
        {},
        {"a": [0]},
    ]
    if isinstance(value, dict | list) and value and rng.random() < 0.8:
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        key, changed = keys[rng.integers(len(keys))], value.copy()
        changed[key] = mutated_json(value[key], rng)
        return changed
    return others[rng.integers(len(others))]


@pytest.mark.parametrize(
    ("file", "count"), [("model/config.json", 120), ("model/model.safetensors", 60), ("checkpoint.pt", 120)]
)
def test_damaged_files_load_or_are_named(run: Path, file: str, count: int) -> None:
    rng, path = np.random.default_rng(5), run / file
    whole, loaded = path.read_bytes(), 0
    for index in range(count):
        if path.suffix == ".json" and index % 2:
            path.write_text(json.dumps(mutated_json(json.loads(whole), rng)))
        elif path.suffix == ".safetensors" and index % 2:  # its header is where a change shows
            path.write_bytes(mutations(whole[:4000], rng) + whole[4000:])
        else:
            path.write_bytes(mutations(whole, rng))
        try:
            SMCADETR.from_pretrained(path if path.suffix == ".pt" else path.parent)
            loaded += 1
        except ValueError as error:
            message = str(error)
            assert str(path.parent) in message, message
            assert len(message) < 600, message
    assert loaded < count / 2, "hardly any damage was seen"
