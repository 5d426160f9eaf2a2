"""The backbone: its stages found by measuring, frozen norms and stages, and models that carry its description along."""

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoBackbone, AutoConfig

from smca.gpu.config import BackboneConfig, ModelConfig
from smca.gpu.model import SMCADETR
from smca.gpu.model.backbone import Backbone, FrozenBatchNorm

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
