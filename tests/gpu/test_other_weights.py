"""Checkpoints of SMCA's authors and of DETR, brought into this project's names, compute what they did: number by number, in
float64, beside their mathematics written down once more (published_models.py) and beside transformers' own DETR.

    pytest -s tests/gpu/test_other_weights.py          prints the worst differences
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional

from published_models import detect, detr_of_transformers, draw_checkpoint, features_of, save_checkpoint
from smca.gpu.model import SMCADETR
from smca.gpu.weights import Source, open_source
from smca.gpu.weights.coco_classes import COCO_CLASSES
from smca.gpu.weights.source import blank, part_of

TOLERANCE = 1e-12
SIZES = [(117, 141), (83, 90)]
"""Two images of a batch, no multiple of 32; of the cells of the second, DETR takes more for the image than there are pixels in."""


def built(source: Source) -> SMCADETR:
    model = SMCADETR(source.config).double().eval()
    model.load_state_dict(source.weights)
    return model


def padded_batch() -> tuple[Tensor, Tensor, Tensor]:
    """Normalised pixels [2, 3, H, W], their padding 0; padding [2, H, W]; sizes [2, 2]."""
    torch.manual_seed(3)
    height, width = (max(side) for side in zip(*SIZES, strict=True))
    padding = torch.ones(len(SIZES), height, width, dtype=torch.bool)
    for index, (h, w) in enumerate(SIZES):
        padding[index, :h, :w] = False
    pixels = torch.randn(len(SIZES), 3, height, width, dtype=torch.float64).masked_fill(padding[:, None], 0.0)
    return pixels, padding, torch.tensor(SIZES)


def class_logits(rows: Tensor, source: Source) -> Tensor:
    """Outputs of a class head → log-odds of the classes that COCO has: of sigmoids as they are; of the softmax over those
    classes and "no object"."""
    kept = rows[..., [*COCO_CLASSES, 91]] if rows.shape[-1] == 92 else rows
    if source.config.class_scores == "sigmoid":
        return kept[..., :-1]
    p = kept.softmax(-1)[..., :-1]
    return p.log() - (1 - p).log()


@pytest.mark.parametrize("kind", ["type1", "type2", "type3", "detr", "detr pre-norm", "detr basic"])
def test_their_checkpoint_computes_here_what_it_did_there(kind: str, tmp_path: Path) -> None:
    """Alone, and padded in a batch; after every decoder layer."""
    print(f"\n{kind}, all layers")
    kind, _, variant = kind.partition(" ")
    how = {"pre_norm": variant == "pre-norm"}
    weights = draw_checkpoint(kind, basic=variant == "basic", **how)
    source = open_source(save_checkpoint(tmp_path / "c.pth", kind, weights, **how))
    model = built(source)
    smooth = 5.0 if kind != "detr" else 8.0
    pixels, padding, sizes = padded_batch()
    with torch.no_grad():
        features = features_of(weights, pixels)
        (found,) = model.backbone(pixels)
        assert worst(found, features, "features") < TOLERANCE
        rows, boxes = detect(weights, features, padding, sizes, kind=kind, smooth=smooth, **how)
        outputs = model.detect([features], sizes, padded_size=(padding.shape[1], padding.shape[2]))
        assert worst(outputs["boxes"], boxes, "boxes, padded") < TOLERANCE
        assert worst(outputs["logits"], class_logits(rows, source), "logits, padded") < TOLERANCE

        height, width = SIZES[1]
        alone = pixels[1:, :, :height, :width]
        none = torch.zeros(1, height, width, dtype=torch.bool)
        rows, boxes = detect(weights, features_of(weights, alone), none, sizes[1:], kind=kind, smooth=smooth, **how)
        outputs = model(alone * model.pixel_std + model.pixel_mean)
        assert worst(outputs["boxes"], boxes, "boxes, alone") < TOLERANCE
        assert worst(outputs["logits"], class_logits(rows, source), "logits, alone") < TOLERANCE


def worst(found: Tensor, expected: Tensor, what: str = "") -> float:
    assert found.shape == expected.shape
    assert float(expected.std()) > 1e-3, "nothing to compare"
    difference = float((found - expected).abs().max())
    if what:
        print(f"  {what}: {difference:.1e}")
    return difference


def test_transformers_detr_computes_here_what_it_did_there(tmp_path: Path) -> None:
    theirs = detr_of_transformers(tmp_path / "detr")
    source = open_source(str(tmp_path / "detr"))
    model = built(source)
    print("\ntransformers' DETR, last layer")
    pixels, padding, sizes = padded_batch()
    with torch.no_grad():
        expected = theirs(pixel_values=pixels, pixel_mask=(~padding).long())
        found = model.detect(model.backbone(pixels), sizes, padded_size=(padding.shape[1], padding.shape[2]))
        assert worst(found["boxes"][-1], expected.pred_boxes, "boxes, padded") < TOLERANCE
        assert worst(found["logits"][-1], class_logits(expected.logits, source), "logits, padded") < TOLERANCE

        height, width = SIZES[1]
        alone = pixels[1:, :, :height, :width]
        expected = theirs(pixel_values=alone)
        found = model(alone * model.pixel_std + model.pixel_mean)
        assert worst(found["boxes"][-1], expected.pred_boxes, "boxes, alone") < TOLERANCE
        assert worst(found["logits"][-1], class_logits(expected.logits, source), "logits, alone") < TOLERANCE


def test_names_of_earlier_versions_and_of_timm_are_the_same_model(tmp_path: Path) -> None:
    """Hub repositories hold the names of transformers 4, and timm's of the ResNet."""
    detr_of_transformers(tmp_path / "detr")
    expected = open_source(str(tmp_path / "detr"))
    weights = load_file(tmp_path / "detr" / "model.safetensors")
    earlier, counted = {}, 0
    for name, value in weights.items():
        new = re.sub(r"model\.backbone\.(conv_encoder\.)?model\.", "model.backbone.conv_encoder.model.", name)
        new = new.replace("o_proj", "out_proj").replace("mlp.fc", "fc")
        new = new.replace("embedder.embedder.convolution", "conv1").replace("embedder.embedder.normalization", "bn1")
        new = re.sub(r"encoder\.stages\.(\d)\.layers\.(\d)\.", lambda m: f"layer{int(m[1]) + 1}.{m[2]}.", new)
        new = re.sub(r"\.layer\.(\d)\.convolution", lambda m: f".conv{int(m[1]) + 1}", new)
        new = re.sub(r"\.layer\.(\d)\.normalization", lambda m: f".bn{int(m[1]) + 1}", new)
        new = new.replace("shortcut.convolution", "downsample.0").replace("shortcut.normalization", "downsample.1")
        counted += new != name
        earlier[new] = value
        if new.endswith("running_var"):
            earlier[new.replace("running_var", "num_batches_tracked")] = torch.tensor(3)
    assert counted > 50
    save_file(earlier, tmp_path / "detr" / "model.safetensors")
    config = json.loads((tmp_path / "detr" / "config.json").read_text())
    (tmp_path / "detr" / "config.json").write_text(
        json.dumps({**config, "backbone_config": None, "backbone": "resnet18", "use_timm_backbone": True})
    )
    found = open_source(str(tmp_path / "detr"))
    assert found.config == expected.config
    assert found.weights.keys() == expected.weights.keys()
    assert all(torch.equal(value, expected.weights[name]) for name, value in found.weights.items())

    # The same in one pickled file, which is read as data.
    (tmp_path / "detr" / "model.safetensors").unlink()
    torch.save(earlier, tmp_path / "detr" / "pytorch_model.bin")
    again = open_source(str(tmp_path / "detr"))
    assert all(torch.equal(value, expected.weights[name]) for name, value in again.weights.items())


def test_classes_by_name_without_those_that_do_not_exist(tmp_path: Path) -> None:
    labels = {0: "N/A", 1: "person", 2: "N/A", 3: "zebra"}
    theirs = detr_of_transformers(tmp_path / "detr", id2label=labels, label2id={v: k for k, v in labels.items()})
    source = open_source(str(tmp_path / "detr"))
    assert source.config.class_names == ("person", "zebra")
    assert source.config.category_ids == (1, 3)
    assert source.notes[0] == (
        "2 columns of the class head belong to category ids that COCO does not use and are left out: the scores of the others "
        "are exact but for what those had of the softmax, next to nothing"
    )
    rows = theirs.class_labels_classifier.weight[[1, 3, 4]].detach()
    found = source.weights["decoder.class_head.weight"]
    assert torch.equal(found, rows)

    conditional = detr_of_transformers(
        tmp_path / "conditional", "conditional_detr", id2label=labels, label2id={v: k for k, v in labels.items()}
    )
    source = open_source(str(tmp_path / "conditional"))
    assert source.config.class_names == ("person", "zebra")
    assert torch.equal(source.weights["decoder.class_head.weight"], conditional.class_labels_classifier.weight[[1, 3]])


def test_what_there_is_of_conditional_detr(tmp_path: Path) -> None:
    """Everything but queries and keys of the decoder's attentions: checked where it can be, on the encoder's output and on boxes
    of the same decoder states."""
    theirs = detr_of_transformers(tmp_path / "c", "conditional_detr")
    source = open_source(str(tmp_path / "c"))
    assert (source.config.cross_attention, source.config.query_init) == ("smca", "grid")
    missing = {name for name in blank(source.config).state_dict() if name not in source.weights}
    assert {part_of(name) for name in missing} == {"decoder", "prior"} == source.absent.keys()
    assert all(re.search(r"\.[qk]_proj\.", name) for name in missing if part_of(name) == "decoder")
    model = SMCADETR(source.config).double().eval()
    model.load_state_dict(source.weights, strict=False)
    pixels, padding, sizes = padded_batch()
    seen: dict[str, Tensor] = {}
    model.encoder.register_forward_hook(lambda module, inputs, output: seen.update(memory=output))
    with torch.no_grad():
        expected = theirs(pixel_values=pixels, pixel_mask=(~padding).long())
        model.detect(model.backbone(pixels), sizes, padded_size=(padding.shape[1], padding.shape[2]))
        shown = ~padding[:, ::32, ::32].flatten(1)
        assert worst(seen["memory"][shown], expected.encoder_last_hidden_state[shown]) < TOLERANCE
        states = expected.last_hidden_state
        center = model.decoder.query_center
        assert center is not None
        boxes = model.decoder.box_heads[0](states) + functional.pad(center, (0, 2))
        assert worst(boxes.sigmoid(), expected.pred_boxes) < 1e-9, "their logit of a sigmoid is cut at 1e-5"
        assert worst(model.decoder.class_head(states), expected.logits) < TOLERANCE
