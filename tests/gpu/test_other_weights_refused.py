"""What a run cannot start from is refused with a reason: cut, not tensors, of another model, of a variant that there is none
of here.

    pytest -s tests/gpu/test_other_weights_refused.py          prints the messages
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from published_models import Weights, detr_of_transformers, draw_checkpoint, options, save_checkpoint
from smca.gpu.convert_weights import main as convert
from smca.gpu.weights import open_source
from smca.gpu.weights.opening import UNDERSTOOD


def refusal(source: Path | str) -> str:
    """The message, with PATH for what was given."""
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the callers compare the whole message
        open_source(str(source))
    message = str(caught.value).replace(str(source), "PATH")
    print(f"\n{message}")
    return message


class Code:
    """What runs a command when it is unpickled as usual."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_code_is_named_and_not_run(tmp_path: Path) -> None:
    file, trace = tmp_path / "c.pth", tmp_path / "it ran"
    for state in ({"model": Code(trace)}, {"model": {}, "args": Code(trace)}, Code(trace)):
        torch.save(state, file)
        assert refusal(file) == (
            "PATH holds code, posix.mkdir, which is not run: expected tensors, plain values and argparse.Namespace. If you "
            "trust it, load it in Python and save its state_dict() alone"
        )
    torch.save({"model": torch.nn.Linear(2, 2)}, file)
    assert "PATH holds code, torch.nn.modules.linear.Linear, which is not run" in refusal(file)
    torch.save({"model": draw_checkpoint("detr"), "args": options("detr", output_dir=Path("x"))}, file)
    assert "PATH holds code, pathlib" in refusal(file)
    assert not trace.exists()


def test_a_file_that_is_cut_or_no_checkpoint(tmp_path: Path) -> None:
    file = tmp_path / "c.pth"
    save_checkpoint(file, "type3", draw_checkpoint("type3"))
    whole = file.read_bytes()
    for length in (0, 10, 1000, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:length])
        message = refusal(file)
        assert message.startswith("PATH is cut, damaged or no checkpoint (")
        assert message.endswith(f"): expected {UNDERSTOOD}. Take another copy")
    file.write_bytes(b"a letter to a friend")
    assert refusal(file).startswith("PATH is cut, damaged or no checkpoint (")
    file.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    assert refusal(file) == ("PATH is a Git LFS pointer, not the file itself: run `git lfs pull` in its repository")


def test_a_checkpoint_of_another_model(tmp_path: Path) -> None:
    file = tmp_path / "c.pth"
    torch.save({"state_dict": {"fc.weight": torch.zeros(2)}, "epoch": 3}, file)
    assert refusal(file) == (
        f"PATH is a checkpoint of another model (it holds state_dict, epoch): expected {UNDERSTOOD}. Give one of those"
    )


def changed(weights: Weights, **new: Any) -> Weights:
    return {**weights, **{name.replace("__", "."): value for name, value in new.items()}}


@pytest.mark.parametrize(
    ("kind", "change", "args", "message"),
    [
        (
            "detr",
            lambda w: w,
            {"dilation": True},
            "PATH is a DC5 model, whose last stage is dilated: expected a ResNet of stride 32, which is what there is here. "
            "Take the "
            "checkpoint without DC5",
        ),
        (
            "detr",
            lambda w: changed(w, backbone__1__row_embed__weight=torch.zeros(50, 8)),
            {"position_embedding": "learned"},
            "PATH is a model with learned position embeddings (--position_embedding learned): expected sine positions, which "
            "are all "
            "that there is here. Take a checkpoint trained with those",
        ),
        (
            "detr",
            lambda w: {f"detr.{k}": v for k, v in w.items()} | {"mask_head.lay1.weight": torch.zeros(2, 2, 3, 3)},
            {},
            "PATH is a panoptic DETR, with mask heads: expected a detector. Take the checkpoint without masks that it was "
            "made from",
        ),
        (
            "type3",
            lambda w: changed(w, input_proj_2048__weight=torch.zeros(16, 8, 1, 1)),
            {},
            "PATH is the authors' multi-scale model: expected their single-scale one, which alone is understood so far. Train "
            "multi-scale from that: --init with --model.strides 16 32 64",
        ),
        (
            "type4",
            lambda w: w,
            {},
            "PATH has a prior of type4 (--dynamic_scale), which adds the product of both squared distances and is no Gaussian "
            "(docs/deviations.md): expected one of type1, type2, type3. Take a checkpoint of one of those",
        ),
        (
            "type3",
            lambda w: w,
            {"smooth": 0},
            "PATH: expected a positive number for the option --smooth in it, got 0: take another copy",
        ),
        (
            "type3",
            lambda w: w,
            {"dropout": "much"},
            "PATH: expected a number for the option --dropout in it, got much: take another copy",
        ),
        (
            "type2",
            lambda w: w,
            {"pre_norm": True},
            "PATH says --pre_norm, with which the authors' SMCA does not run: is it another program's?",
        ),
        (
            "detr",
            lambda w: changed(w, transformer__adapter__weight=torch.zeros(2)),
            {},
            "PATH holds 1 weights that are neither DETR's nor SMCA's, such as transformer.adapter.weight: expected a model as "
            "published, "
            "without additions. Give one, or remove them from the file",
        ),
        (
            "detr",
            lambda w: {k: v for k, v in w.items() if k != "query_embed.weight"},
            {},
            "PATH lacks 'decoder.query_position' (in this project's names): expected all weights of a DETR with a ResNet. Is "
            "it half of "
            "a checkpoint? Take another copy",
        ),
        (
            "detr",
            lambda w: {k: v for k, v in w.items() if k != "transformer.encoder.layers.1.norm1.weight"},
            {},
            "PATH looks like DETR (facebookresearch), but its weights are not those of one: 1 weights are missing, such as "
            "encoder.layers.1.norm1.weight (in this project's names). Its code was probably changed; only models as published are "
            "understood",
        ),
        (
            "detr",
            lambda w: changed(w, bbox_embed__layers__2__bias=torch.zeros(5)),
            {},
            "PATH looks like DETR (facebookresearch), but its weights are not those of one: 1 are of another shape, such as "
            "decoder.box_heads.0.layers.2.bias: (5,), expected (4,) (in this project's names). Its code was probably changed; only "
            "models as published are understood",
        ),
        (
            "detr",
            lambda w: changed(w, input_proj__weight=w["input_proj.weight"].long()),
            {},
            "PATH: expected plain tensors of floating-point numbers, got input_proj.weight as torch.int64: it is quantised or "
            "sparse; "
            "give the checkpoint that it was made from",
        ),
        (
            "detr",
            lambda w: changed(w, input_proj__bias=w["input_proj.bias"] * torch.nan),
            {},
            "PATH: input_proj.bias has NaN or infinite values: the file is damaged or the training went wrong; take another "
            "checkpoint "
            "or copy",
        ),
    ],
)
def test_variants_of_detr_and_smca(
    kind: str, change: Callable[[Weights], Weights], args: dict[str, Any], message: str, tmp_path: Path
) -> None:
    file = tmp_path / "c.pth"
    save_checkpoint(file, kind, change(draw_checkpoint(kind)), **args)
    assert refusal(file) == message


def test_what_a_published_file_does_not_say(tmp_path: Path) -> None:
    """It holds weights alone: options are read from shapes, and said where they cannot be."""
    torch.save({"model": draw_checkpoint("type2")}, tmp_path / "smca.pth")
    source = open_source(str(tmp_path / "smca.pth"))
    assert (source.config.prior_scale, source.config.num_heads, source.config.prior_sigma_px) == ("single", 2, 64.0)
    assert source.notes[0] == (
        "the file does not say with which options it was trained; taken for granted: --smooth 8, no dilation (DC5)"
    )
    torch.save({"model": draw_checkpoint("detr")}, tmp_path / "detr-r50-dc5.pth")
    assert refusal(tmp_path / "detr-r50-dc5.pth").startswith("PATH is a DC5 model")
    torch.save({"model": draw_checkpoint("detr", rows=3)}, tmp_path / "detr.pth")
    source = open_source(str(tmp_path / "detr.pth"))
    assert (source.config.num_classes, source.config.class_names, source.config.num_heads) == (2, (), 8)
    assert source.notes[:2] == (
        "the file does not say with which options it was trained; taken for granted: --nheads 8, no dilation (DC5)",
        "the file names no classes: they are the 2 columns of its class head, in order",
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"model_type": "yolos"},
            "PATH holds a model of transformers of the type 'yolos': expected one of detr, conditional_detr. Give one of "
            "those, or a "
            "model of this project",
        ),
        (
            {"position_embedding_type": "learned"},
            "PATH, a DETR (transformers), has position_embedding_type = learned: expected sine positions (sine), which is all "
            "that there "
            "is here. Take another model",
        ),
        (
            {"activation_function": "gelu"},
            "PATH, a DETR (transformers), has activation_function = gelu: expected ReLU in the feed-forward blocks (relu), "
            "which is all "
            "that there is here. Take another model",
        ),
        (
            {"decoder_ffn_dim": 9},
            "PATH, a DETR (transformers), has decoder_ffn_dim = 9: expected feed-forward blocks as wide in the decoder as in "
            "the encoder "
            "(24), which is all that there is here. Take another model",
        ),
        (
            {"dilation": True},
            "PATH, a DETR (transformers), is a DC5 model, whose last stage is dilated: expected a ResNet of stride 32, which "
            "is what there "
            "is here. Take the model without DC5",
        ),
        (
            {"backbone_config": {"model_type": "swin"}},
            "PATH has the backbone 'swin': expected a ResNet, of timm or transformers. Take a model with one",
        ),
        (
            {"d_model": "wide"},
            "PATH, by its config.json: hidden_dim must be a whole number of at most 2^53, got 'wide': correct it, or take the "
            "file from "
            "the run or the copy that it came from",
        ),
        (
            {"num_queries": 9},
            "PATH looks like DETR (transformers), but its weights are not those of one: 1 are of another shape, such as "
            "decoder.query_position: (5, 16), expected (9, 16) (in this project's names). Its code was probably changed; only "
            "models as "
            "published are understood",
        ),
    ],
)
def test_variants_of_transformers(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    detr_of_transformers(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    assert refusal(tmp_path) == message


def test_folders_of_transformers_that_are_not_whole(tmp_path: Path) -> None:
    detr_of_transformers(tmp_path)
    file = tmp_path / "model.safetensors"
    weights, whole = load_file(file), file.read_bytes()
    save_file({**weights, "mask_head.lay1.weight": torch.zeros(1)}, file)
    assert refusal(tmp_path) == (
        "PATH holds 1 weights that no DETR (transformers) for detection has, such as mask_head.lay1.weight: expected "
        "DetrForObjectDetection, with a ResNet"
    )
    file.write_bytes(whole[:-5])
    assert refusal(tmp_path).startswith("PATH/model.safetensors is cut, damaged or not a safetensors file (")
    file.unlink()
    assert refusal(tmp_path) == (
        "PATH holds no weights: expected model.safetensors or pytorch_model.bin beside config.json, in one piece. Save the "
        "model again, "
        "or download it whole"
    )


def test_what_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def snapshot_download(name: str, **_: Any) -> str:
        asked.append(name)
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert refusal("somebody/detr") == (
        f"there is no PATH, and no such repository can be reached on the Hugging Face hub: expected {UNDERSTOOD}. Check the "
        "name and "
        "the connection"
    )
    assert asked == ["somebody/detr"]
    assert refusal(tmp_path).startswith("PATH lacks config.json and model.safetensors")


def test_a_hub_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    detr_of_transformers(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **_: str(tmp_path))
    source = open_source("somebody/detr")
    assert (source.name, source.kind) == ("somebody/detr", "DETR (transformers)")
    (tmp_path / "config.json").unlink()
    assert refusal("somebody/detr") == f"PATH on the Hugging Face hub has no config.json: expected {UNDERSTOOD}"


def test_convert_weights_writes_whole_models_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from smca.gpu.model import SMCADETR

    file = save_checkpoint(tmp_path / "c.pth", "type3", draw_checkpoint("type3"))
    convert([file, str(tmp_path / "model")])
    assert capsys.readouterr().out == (
        f"{file}, SMCA by its authors → {tmp_path}/model/ (config.json, model.safetensors)\n"
        "  smca · 2 + 3 layers · 5 queries · 80 classes\n"
        "  note: 12 columns of the class head belong to category ids that COCO does not use and are left out; the scores of "
        "the others "
        "are exact\n"
    )
    model = SMCADETR.from_pretrained(tmp_path / "model")
    assert model.config == open_source(file).config
    assert model.config.class_names[model.config.category_ids.index(90)] == "toothbrush"
    with pytest.raises(
        ValueError, match=r"already holds config\.json and model\.safetensors: --overwrite replaces them"
    ):
        convert([file, str(tmp_path / "model")])
    convert([str(tmp_path / "model"), str(tmp_path / "model"), "--overwrite"])

    detr_of_transformers(tmp_path / "c", "conditional_detr")
    with pytest.raises(ValueError, match="it makes no whole model, but a start for one: smca train … --init"):
        convert([str(tmp_path / "c"), str(tmp_path / "other")])
    assert not (tmp_path / "other").exists()
