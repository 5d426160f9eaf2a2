"""EfficientNet-Lite: its arithmetic against a slow one, and published weights out of a package, of which every one is taken."""

import importlib.util
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib import cbook
from PIL import Image
from torch import Tensor, nn
from transformers import AutoBackbone, AutoConfig

from smca.gpu.config import BackboneConfig, ModelConfig, OptimConfig
from smca.gpu.model import SMCADETR
from smca.gpu.model import efficientnet_lite as lite
from smca.gpu.model.backbone import Backbone
from smca.gpu.training.optimizer import make_optimizer

TINY: dict[str, Any] = {
    "embedding_size": 4,
    "hidden_sizes": [[4], [6], [6, 8]],
    "depths": [[1], [2], [1, 2]],
    "kernel_sizes": [[3], [5], [3, 5]],
    "expand_ratios": [[1], [2], [3, 2]],
}
PUBLISHED = BackboneConfig(weights=lite.LITE0)
Arrays = dict[str, np.ndarray[Any, np.dtype[np.float64]]]


def published() -> dict[str, Tensor]:
    return lite._lite0_tensors()


def same_convolution(x: Any, weight: Any, stride: int, groups: int) -> Any:
    """[C, H, W] → [out, ⌈H/stride⌉, ⌈W/stride⌉], each number by itself, with TensorFlow's rule for the zeros around x."""
    out_channels, per_group, kernel, _ = weight.shape
    sizes, befores = [], []
    for side in x.shape[1:]:
        size = math.ceil(side / stride)
        sizes.append(size)
        befores.append(max((size - 1) * stride + kernel - side, 0) // 2)
    y = np.zeros((out_channels, *sizes))
    for (channel, row, column), _ in np.ndenumerate(y):
        first = channel // (out_channels // groups) * per_group
        for i in range(kernel):
            for j in range(kernel):
                r, c = row * stride + i - befores[0], column * stride + j - befores[1]
                if 0 <= r < x.shape[1] and 0 <= c < x.shape[2]:
                    y[channel, row, column] += x[first : first + per_group, r, c] @ weight[channel, :, i, j]
    return y


def slow_maps(x: Any, tensors: Arrays, options: dict[str, Any]) -> list[Any]:
    """The maps of stem and stages."""

    def part(x: Any, name: str, stride: int = 1, groups: int = 1, relu: bool = True) -> Any:
        y = same_convolution(x, tensors[f"{name}.convolution.weight"], stride, groups)
        mean, var, scale, shift = (
            tensors[f"{name}.normalization.{key}"][:, None, None]
            for key in ("running_mean", "running_var", "weight", "bias")
        )
        y = (y - mean) / np.sqrt(var + 1e-3) * scale + shift
        return y.clip(0, 6) if relu else y

    maps = [part(x, "stem", stride=2)]
    for number, depths in enumerate(options["depths"]):
        x, block = maps[-1], 0
        for group, depth in enumerate(depths):
            for _ in range(depth):
                name, stride = f"stages.{number}.layers.{block}", 2 if number > 0 and block == 0 else 1
                y = part(x, f"{name}.expand") if options["expand_ratios"][number][group] > 1 else x
                y = part(part(y, f"{name}.depthwise", stride, len(y)), f"{name}.project", relu=False)
                x, block = x + y if stride == 1 and len(x) == len(y) else y, block + 1
        maps.append(x)
    return maps


def with_statistics(body: nn.Module) -> nn.Module:
    """As if it had been trained: no norm is the identity, and ReLU6 cuts on both sides."""
    for module in body.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 1.0, 4.0)
            nn.init.normal_(module.bias, std=2.0)
            nn.init.normal_(module.running_mean)  # type: ignore[arg-type]
            nn.init.uniform_(module.running_var, 0.5, 2.0)  # type: ignore[arg-type]
    return body


@pytest.mark.parametrize("size", [(6, 8), (7, 8), (6, 5), (9, 11), (1, 2)])
@pytest.mark.parametrize(("kernel", "stride", "groups"), [(1, 1, 1), (3, 1, 4), (5, 1, 2), (3, 2, 1), (5, 2, 4)])
def test_zeros_beyond_the_border_are_tensorflows(size: tuple[int, int], kernel: int, stride: int, groups: int) -> None:
    convolution = lite.SameConv2d(4, 8, kernel, stride, groups).double()
    x = torch.randn(1, 4, *size, dtype=torch.float64)
    expected = same_convolution(x[0].numpy(), convolution.weight.detach().numpy(), stride, groups)
    torch.testing.assert_close(convolution(x)[0].detach(), torch.from_numpy(expected))


@pytest.mark.parametrize("size", [(16, 24), (15, 18), (13, 9), (1, 1)])
def test_the_whole_network_is_what_the_slow_one_is(size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    settings: Any = AutoConfig.for_model(lite.MODEL_TYPE, **TINY, out_features=["stem", "stage1", "stage2", "stage3"])
    body = with_statistics(AutoBackbone.from_config(settings)).double().eval()
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    maps = body(x).feature_maps
    tensors: Arrays = {key: value.numpy() for key, value in body.state_dict().items()}
    for image in range(2):
        for got, expected in zip(maps, slow_maps(x[image].numpy(), tensors, TINY), strict=True):
            torch.testing.assert_close(got[image].detach(), torch.from_numpy(expected))


@pytest.mark.parametrize("size", [(64, 96), (65, 97), (33, 130), (1, 31)])
def test_strides_and_sizes_of_lite0(size: tuple[int, int]) -> None:
    backbone = Backbone(BackboneConfig(lite.MODEL_TYPE), (2, 4, 8, 16, 32)).eval()
    assert (backbone.strides, backbone.channels, backbone.divisor) == ((2, 4, 8, 16, 32), (16, 24, 40, 112, 320), 1)
    with torch.no_grad():
        maps = backbone(torch.zeros(1, 3, *size))
    assert [f.shape[-2:] for f in maps] == [tuple(math.ceil(side / s) for side in size) for s in backbone.strides]


def test_frozen_norms_give_what_the_norms_gave() -> None:
    config = BackboneConfig(lite.MODEL_TYPE, TINY, frozen_norm=False)
    plain, frozen = Backbone(config, (4, 8)), Backbone(BackboneConfig(lite.MODEL_TYPE, TINY), (4, 8))
    with_statistics(plain.body)
    kept = {key: value for key, value in plain.state_dict().items() if not key.endswith("num_batches_tracked")}
    frozen.load_state_dict(kept)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in frozen.modules())
    images = torch.randn(2, 3, 37, 50, dtype=torch.float64)
    maps = [backbone.double()(images) for backbone in (frozen.train(), plain.eval())]
    for got, expected in zip(*maps, strict=True):
        torch.testing.assert_close(got, expected)
    for features in maps:
        sum(f.sin().sum() for f in features).backward()  # type: ignore[union-attr]
    expected_of = dict(plain.named_parameters())
    for name, parameter in frozen.named_parameters():
        torch.testing.assert_close(parameter.grad, expected_of[name].grad)


def test_every_published_weight_is_taken_but_the_classifiers() -> None:
    theirs = list(published().items())
    for strides, stages, convolutions in (((8, 16, 32), 5, 48), ((4,), 2, 9)):
        body = Backbone(BackboneConfig(weights=lite.LITE0, frozen_norm=False), strides).body
        own = body.state_dict()
        assert len(body.stages) == stages  # type: ignore[arg-type]
        assert len(own) == 6 * convolutions
        # In the same order, whatever the names are.
        for (name, value), (their_name, their_value) in zip(own.items(), theirs, strict=False):
            assert torch.equal(value, their_value), f"{name} is not {their_name}"
        if stages == 5:
            left = [name for name, _ in theirs[len(own) :]]
            assert left[0] == "_conv_head.weight"
            assert len(left) == 1 + 5 + 2


def test_the_classifier_on_top_knows_what_a_photograph_shows() -> None:
    """Weights, padding and normalisation belong together: class 652 of ImageNet is "military uniform"."""
    with cbook.get_sample_data("grace_hopper.jpg") as file:  # what matplotlib has for an example, 512×600
        picture = Image.open(file).convert("RGB").crop((0, 44, 512, 556)).resize((224, 224), Image.Resampling.BICUBIC)
    image = torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1)[None] / 255
    body = Backbone(PUBLISHED, (32,)).eval()
    head = published()
    with torch.no_grad():
        (x,) = body((image - lite.PIXEL_MEAN) / lite.PIXEL_STD)
        x = nn.functional.conv2d(x, head["_conv_head.weight"])
        statistics = [head[f"_bn1.{key}"] for key in ("running_mean", "running_var", "weight", "bias")]
        x = nn.functional.batch_norm(x, *statistics, eps=1e-3).clamp(0, 6).mean((2, 3))
        scores = (x @ head["_fc.weight"].T + head["_fc.bias"]).softmax(-1)[0]
    assert int(scores.argmax()) == 652
    assert scores[652] > 0.35


def install(folder: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[[Path], object]) -> None:
    """A package in place of the published one, whose code must not be run."""
    package = folder / lite._PACKAGE
    (package / "models").mkdir(parents=True)
    (package / "__init__.py").write_text("raise AssertionError('imported')\n")
    write(package / lite._FILE)
    monkeypatch.syspath_prepend(str(folder))


def test_weights_of_other_names_or_shapes_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = published()
    name = "_blocks.3._depthwise_conv.weight"
    changed = {
        "renamed": {key.replace("_depthwise", "_deep") if key == name else key: t for key, t in tensors.items()},
        "reshaped": {key: t[..., :3, :3] if key == name else t for key, t in tensors.items()},
        "more": tensors | {"_blocks.3._se_reduce.weight": torch.zeros(1)},
    }
    messages = {
        "renamed": r"1 of 288 tensors are missing or of another shape, such as stages\.2\.layers\.0\.depthwise\.conv",
        "reshaped": r"1 of 288 tensors are missing or of another shape, such as stages\.2\.layers\.0\.depthwise\.conv",
        "more": r"hold '_blocks\.3\._se_reduce\.weight', which 'efficientnet_lite' has not",
    }
    for case, content in changed.items():
        with monkeypatch.context() as patch:
            install(tmp_path / case, patch, lambda path, content=content: torch.save(content, path))  # type: ignore[misc]
            with pytest.raises(ValueError, match=messages[case]):
                Backbone(PUBLISHED, (32,))


def test_a_damaged_file_and_code_in_it_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return (open, (str(tmp_path / "owned"), "w"))

    for case, content in (("cut", b"PK\3\4"), ("code", pickle.dumps({"_fc.weight": Evil()}, protocol=2))):
        with monkeypatch.context() as patch:
            install(tmp_path / case, patch, lambda path, content=content: path.write_bytes(content))  # type: ignore[misc]
            with pytest.raises(ValueError, match=r"cannot be read .* Install the package anew"):
                Backbone(PUBLISHED, (32,))
    assert not (tmp_path / "owned").exists()


def test_options_that_the_published_weights_are_not_of() -> None:
    with pytest.raises(ValueError, match="do not fit 'efficientnet_lite' with its options: 90 of 108 tensors"):
        Backbone(BackboneConfig(lite.MODEL_TYPE, TINY, lite.LITE0), (8,))
    options = {"hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
    with pytest.raises(ValueError, match=r"are of 'efficientnet_lite' alone\. Set model.backbone.name to it"):
        Backbone(BackboneConfig("resnet", options, lite.LITE0), (8,))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"depths": [[1], [2], [1]]}, r"depths must have a number for each group .* \[1, 1, 2\] groups; it has \[1, 1, 1\]"),
        ({"kernel_sizes": [[3], [4], [3, 5]]}, "kernel_sizes must be odd, got 4"),
        ({"hidden_sizes": [4, 6, 8]}, r"hidden_sizes must be a list of whole numbers .*, got \[4, 6, 8\]"),
        ({"expand_ratios": [[1], [0], [3, 2]]}, "expand_ratios must be a list of whole numbers of 1 or more"),
        ({"depths": [[1], [999], [1, 2]]}, "option 'depths' .* must be at most 1000 in all"),
        ({"strides": [1, 2]}, "has no option 'strides'"),
    ],
)  # fmt: skip
def test_options_that_describe_no_network(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Backbone(BackboneConfig(lite.MODEL_TYPE, {**TINY, **changes}), (8,))


def test_a_trained_model_is_read_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small: dict[str, Any] = {"num_classes": 2, "hidden_dim": 8, "num_heads": 2, "num_queries": 3, "feedforward_dim": 8}
    config = ModelConfig(backbone=PUBLISHED, strides=(8, 16), encoder_layers=1, decoder_layers=1, **small)
    model = SMCADETR(config).eval()
    model.save_pretrained(tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"is not installed: pip install 'smca-detr\[lite\]'"):
        SMCADETR(config)
    again = SMCADETR.from_pretrained(tmp_path)
    images = torch.rand(1, 3, 50, 70)
    with torch.no_grad():
        assert torch.equal(again(images)["logits"], model(images)["logits"])


def test_earlier_parts_learn_at_lower_rates_or_not_at_all() -> None:
    backbone = BackboneConfig(lite.MODEL_TYPE, TINY, frozen_stages=1)
    small: dict[str, Any] = {"hidden_dim": 8, "num_heads": 2, "num_queries": 3, "feedforward_dim": 8}
    model = SMCADETR(ModelConfig(backbone=backbone, strides=(4, 8), encoder_layers=1, decoder_layers=1, **small))
    optim = OptimConfig(lr=1e-3, backbone_lr=1e-4, backbone_lr_decay=0.5)
    groups = make_optimizer(model, optim, torch.device("cpu")).param_groups
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    body = dict(model.backbone.body.named_parameters())
    assert list(model.backbone.parts()) == ["stem", "stage1", "stage2", "stage3"]
    for name, parameter in body.items():
        expected = None if name.startswith("stem.") else 1e-4 * 0.5 ** (2 - int(name.split(".")[1]))
        assert rates.get(id(parameter)) == expected, name
