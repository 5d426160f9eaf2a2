"""The backbone: its stages found by measuring, frozen norms and stages, and models that carry its description along."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoBackbone, AutoConfig, AutoModelForImageClassification

from smca.gpu.config import BackboneConfig, ModelConfig
from smca.gpu.model import SMCADETR
from smca.gpu.model.backbone import Backbone
from smca.gpu.model.frozen_norm import FrozenBatchNorm

FOUR_STAGES = {"embedding_size": 8, "hidden_sizes": [8, 16, 32, 64], "depths": [1, 1, 1, 1], "layer_type": "basic"}


@pytest.mark.parametrize(("stride", "channels"), [(4, 8), (8, 16), (16, 32), (32, 64)])
def test_the_stage_of_a_stride_is_found_by_measuring(stride: int, channels: int) -> None:
    backbone = Backbone(BackboneConfig(options=FOUR_STAGES), [stride])
    assert backbone.channels == (channels,)
    (features,) = backbone(torch.zeros(1, 3, 64, 96))
    assert features.shape == (1, channels, 64 // stride, 96 // stride)


def test_several_levels_come_finest_first_and_those_beyond_the_backbone_are_left_out() -> None:
    backbone = Backbone(BackboneConfig(options=FOUR_STAGES), (8, 32, 64, 128))
    assert (backbone.strides, backbone.channels) == ((8, 32), (16, 64))
    # A size that no stride divides: the maps do not nest.
    assert [tuple(f.shape) for f in backbone(torch.zeros(1, 3, 33, 47))] == [(1, 16, 5, 6), (1, 64, 2, 2)]


@pytest.mark.parametrize(
    ("strides", "message"),
    [
        ((8, 12), "has no stage of stride 12; it offers stage1: 4, stage2: 8, stage3: 16, stage4: 32"),
        ((2, 8), "has no stage of stride 2"),
        ((64,), "has no stage of stride 64"),
        ((8, 64), "has twice the stride of the level before it, here 16"),
        ((32, 96), "has twice the stride of the level before it, here 64"),
    ],
)
def test_strides_that_cannot_be_had(strides: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Backbone(BackboneConfig(options=FOUR_STAGES), strides)


def test_a_saved_model_needs_no_other_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its configuration says what the published weights' repository said."""
    body = AutoBackbone.from_config(AutoConfig.for_model("resnet", **{**FOUR_STAGES, "depths": [1, 2, 1, 1]}))
    body.save_pretrained(tmp_path / "published")
    small = {"num_classes": 2, "hidden_dim": 8, "num_heads": 2, "num_queries": 3, "feedforward_dim": 8}
    backbone = BackboneConfig(weights=str(tmp_path / "published"))
    model = SMCADETR(ModelConfig(backbone=backbone, encoder_layers=1, decoder_layers=1, **small)).eval()
    torch.testing.assert_close(
        model.backbone.body.embedder.embedder.convolution.weight, body.embedder.embedder.convolution.weight
    )
    model.save_pretrained(tmp_path / "ours")
    (tmp_path / "published").rename(tmp_path / "gone")
    again = SMCADETR.from_pretrained(tmp_path / "ours")
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(again(images)["logits"], model(images)["logits"])


def test_other_backbones_of_transformers_work() -> None:
    options = {"num_channels": 3, "hidden_sizes": [8, 12, 16, 20], "depths": [1, 1, 1, 1]}
    backbone = Backbone(BackboneConfig(name="convnext", options=options), [16])
    (features,) = backbone(torch.zeros(1, 3, 64, 64))
    assert features.shape == (1, 16, 4, 4)
    with pytest.raises(ValueError, match="knows no model type 'resnext'"):
        Backbone(BackboneConfig(name="resnext"), [16])


def test_frozen_batch_norm_is_batch_norm_in_evaluation() -> None:
    norm = nn.BatchNorm2d(5)
    for tensor in (norm.weight, norm.bias, norm.running_mean):
        nn.init.normal_(tensor)  # type: ignore[arg-type]
    nn.init.uniform_(norm.running_var, 0.5, 2.0)  # type: ignore[arg-type]
    x = torch.randn(2, 5, 3, 4)
    frozen = FrozenBatchNorm(norm)
    torch.testing.assert_close(frozen(x), norm.eval()(x))
    assert not list(frozen.parameters())


def test_frozen_stages_have_no_gradient() -> None:
    options = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
    body = Backbone(BackboneConfig(options=options, frozen_norm=True, frozen_stages=2), [8]).body
    trained = {name for name, p in body.named_parameters() if p.requires_grad}
    assert trained
    assert all(name.startswith("encoder.stages.1.") for name in trained)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_frozen_norm_is_batch_norm_that_keeps_its_input_for_nothing(dtype: torch.dtype) -> None:
    norm = nn.BatchNorm2d(5).eval()
    for tensor in (*norm.parameters(), *norm.buffers()):
        if tensor.is_floating_point():
            nn.init.uniform_(tensor, 0.5, 1.5)
    frozen, kept = FrozenBatchNorm(norm), list[torch.Tensor]()
    x = torch.randn(2, 5, 3, 4).to(dtype).to(memory_format=torch.channels_last).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = frozen(x)
    assert (y.dtype, y.is_contiguous(memory_format=torch.channels_last)) == (dtype, True)
    assert max(t.numel() for t in kept) == 5
    grad = torch.randn(y.shape).to(dtype)
    (got,) = torch.autograd.grad(y, x, grad)
    wide = x.detach().float().requires_grad_()
    expected = norm(wide)
    (expected_grad,) = torch.autograd.grad(expected, wide, grad.float())
    exact = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(y.float(), expected, rtol=exact, atol=exact)
    torch.testing.assert_close(got.float(), expected_grad, rtol=exact, atol=exact)


FAMILIES: dict[str, dict[str, Any]] = {
    "resnet": FOUR_STAGES,
    "convnext": {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1]},
    "swin": {"embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2], "window_size": 4, "image_size": 128},
    "pvt_v2": {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 1, 1, 1]},
    "bit": {"embedding_size": 8, "hidden_sizes": [32, 32, 64, 64], "depths": [1, 1, 1, 1], "num_groups": 4},
    "dinov2": {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 8, "image_size": 64},
    "focalnet": {"embed_dim": 8, "hidden_sizes": [8, 16, 32, 32], "depths": [1, 1, 1, 1]},
    "efficientnet_lite": {
        "embedding_size": 8,
        "hidden_sizes": [[8], [8], [8, 16], [16, 16]],
        "depths": [[1], [1], [1, 1], [1, 2]],
        "kernel_sizes": [[3], [3], [3, 5], [5, 3]],
        "expand_ratios": [[1], [2], [2, 2], [2, 2]],
    },
}
UNREAD = {"dinov2": {"embeddings.mask_token"}, "focalnet": "stages cannot be cut off"}


@pytest.mark.parametrize("name", FAMILIES)
def test_stages_behind_the_last_one_read_are_not_there(name: str, tmp_path: Path) -> None:
    """With published weights and without: the same maps from fewer parameters, each of which is trained."""
    torch.manual_seed(0)
    settings: Any = AutoConfig.for_model(name, **FAMILIES[name])
    names = [stage for stage in settings.stage_names if stage != "stem"]
    read = {"focalnet": 0, "dinov2": len(names) - 1, "efficientnet_lite": 2}.get(name, 1)  # of stride 8
    settings.out_features = [names[read]]
    whole = AutoBackbone.from_config(settings).eval()
    whole.save_pretrained(tmp_path)
    config = BackboneConfig(name, FAMILIES[name], str(tmp_path), frozen_norm=False)
    backbone = Backbone(config, (8,)).eval()
    images = torch.randn(2, 3, 64, 64)
    (features,) = backbone(images)
    torch.testing.assert_close(features, whole(images).feature_maps[0])
    assert (features.shape[1], *features.shape[2:]) == (*backbone.channels, 8, 8)

    sizes = {key: p.shape for key, p in backbone.body.named_parameters()}
    if name not in UNREAD:
        assert len(sizes) < 0.75 * len(list(whole.parameters()))
    plain = Backbone(BackboneConfig(name, FAMILIES[name], frozen_norm=False), (8,))
    again = Backbone(backbone.resolved(config), (8,)).eval()
    for other in (plain, again):
        assert {key: p.shape for key, p in other.body.named_parameters()} == sizes
    again.load_state_dict(backbone.state_dict())
    assert torch.equal(again(images)[0], features)

    backbone.train()(images)[0].square().sum().backward()
    parameters = dict(backbone.body.named_parameters())
    assert {key for key, p in parameters.items() if p.grad is None} == {
        key for key, p in parameters.items() if not p.requires_grad
    }
    frozen = {key for key, p in parameters.items() if not p.requires_grad}
    if name == "focalnet":
        assert any("stages.2" in key for key in frozen)
    else:
        assert {key for key in frozen if "norm" not in key} == UNREAD.get(name, set())


FIRST_PARTS: dict[str, tuple[str, ...]] = {
    "resnet": ("embedder.", "encoder.stages.0."),
    "convnext": ("embeddings.", "encoder.stages.0."),
    "swin": ("swin.embeddings.", "swin.encoder.layers.0.blocks."),  # merging patches begins the next stage
    "pvt_v2": ("encoder.layers.0.",),  # each of its stages has patches of its own
    "bit": ("bit.embedder.", "bit.encoder.stages.0."),
    "dinov2": ("embeddings.", "encoder.layer.0."),  # the norm of all its maps belongs to the last layer
    "focalnet": ("focalnet.embeddings.",),
    "efficientnet_lite": ("stem.", "stages.0."),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_stem_and_stages_of_any_network_can_be_left_untrained(name: str) -> None:
    plain = Backbone(BackboneConfig(name, FAMILIES[name], frozen_norm=False), (8,))
    first = FIRST_PARTS[name]
    backbone = Backbone(BackboneConfig(name, FAMILIES[name], frozen_norm=False, frozen_stages=len(first)), (8,)).train()
    statistics = {key: value.clone() for key, value in backbone.state_dict().items() if key.startswith(first, 5)}
    backbone(torch.randn(2, 3, 64, 64))[0].square().sum().backward()
    trained = {key for key, p in backbone.body.named_parameters() if p.grad is not None}
    assert trained == {key for key, p in plain.body.named_parameters() if p.requires_grad and not key.startswith(first)}
    assert trained
    assert all(torch.equal(backbone.state_dict()[key], value) for key, value in statistics.items()), (
        "norms go on learning"
    )


@pytest.mark.parametrize(
    ("name", "strides", "parts"),
    [("resnet", (4, 8), "3 parts .*: stem, stage1, stage2"), ("dinov2", (8,), "3 parts .*: stem, stage1, stage2")],
)
def test_more_untrained_stages_than_there_are(name: str, strides: tuple[int, ...], parts: str) -> None:
    Backbone(BackboneConfig(name, FAMILIES[name], frozen_stages=3), strides)
    with pytest.raises(ValueError, match=rf"frozen_stages is 4, but '{name}' has only {parts}. Set it to at most 3"):
        Backbone(BackboneConfig(name, FAMILIES[name], frozen_stages=4), strides)


def test_a_stem_that_cannot_be_had_by_itself_is_part_of_the_first_stage() -> None:
    options = {"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 1], "window_size": 4, "image_size": 64}
    parts = Backbone(BackboneConfig("maskformer-swin", options), (8,)).parts()
    assert list(parts) == ["stage1", "stage2"]


def test_a_network_is_built_in_inference_mode_too() -> None:
    with torch.inference_mode():
        assert Backbone(BackboneConfig(options=FOUR_STAGES), (8,)).channels == (16,)


def test_published_weights_that_do_not_fit_are_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    options = {**FOUR_STAGES, "depths": [1, 1, 1, 2]}
    AutoModelForImageClassification.from_config(AutoConfig.for_model("resnet", **FOUR_STAGES)).half().save_pretrained(
        tmp_path
    )
    body = Backbone(BackboneConfig(weights=str(tmp_path)), (32,)).body
    assert {p.dtype for p in body.parameters()} == {torch.float32}
    # Up to the stage that does not fit.
    Backbone(BackboneConfig(options=options, weights=str(tmp_path)), (16,))
    message = r"10 of 84 tensors are missing or of another shape, such as encoder\.stages\.3\.layers\.1\."
    with pytest.raises(ValueError, match=message) as caught:
        Backbone(BackboneConfig(options=options, weights=str(tmp_path)), (32,))
    assert str(tmp_path) in str(caught.value)
    assert "LOAD REPORT" not in caplog.text
    wide = {**FOUR_STAGES, "hidden_sizes": [8, 16, 32, 48]}
    with pytest.raises(ValueError, match=r"tensors are missing or of another shape, such as encoder\.stages\.3\."):
        Backbone(BackboneConfig(options=wide, weights=str(tmp_path)), (32,))
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-7])
    with pytest.raises(ValueError, match="cannot be read"):
        Backbone(BackboneConfig(weights=str(tmp_path)), (32,))


def test_a_model_of_ours_is_no_published_backbone(tmp_path: Path) -> None:
    backbone = BackboneConfig(options=FOUR_STAGES)
    SMCADETR(ModelConfig(backbone=backbone, hidden_dim=8, feedforward_dim=8, num_queries=2)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="a model that this trainer saved has other names"):
        Backbone(BackboneConfig(options=FOUR_STAGES, weights=str(tmp_path)), (32,))
    with pytest.raises(ValueError, match="Unrecognized model"):
        Backbone(BackboneConfig(weights=str(tmp_path)), (32,))


@pytest.mark.parametrize("model_type", ["resnet", "evil"])
def test_code_beside_published_weights_is_not_run(
    model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    AutoBackbone.from_config(AutoConfig.for_model("resnet", **FOUR_STAGES)).save_pretrained(tmp_path)
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'owned')!r}, 'w')\n")
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"model_type": model_type, "auto_map": {"AutoConfig": "evil.Evil", "AutoBackbone": "evil.Evil"}}
    config |= {"attn_implementation": "nobody/kernels", "_attn_implementation": "nobody/kernels"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr("socket.socket", None)
    if model_type == "resnet":
        assert Backbone(BackboneConfig(weights=str(tmp_path)), (32,)).channels == (64,)
    else:
        with pytest.raises(ValueError, match="backbone weights"):
            Backbone(BackboneConfig(weights=str(tmp_path)), (32,))
    assert not (tmp_path / "owned").exists()
