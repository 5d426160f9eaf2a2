"""Bring a trained model of another program into this project's form.

    smca convert-weights SMCA_r50.pth models/smca          the authors' checkpoint, or DETR's
    smca convert-weights facebook/detr-resnet-50 models/detr

writes config.json and model.safetensors, what ``smca evaluate``, ``smca predict``, ``from_pretrained`` and ``--init`` take, and
says where the model is not exactly the one that it came from. No code in the files is run.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from smca.gpu.files import CONFIG_FILE, WEIGHTS_FILE, write_model
from smca.gpu.weights import open_source


@dataclass(frozen=True)
class ConvertArgs:
    """Bring a trained model of another program into this project's form."""

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")]
    """File (.pth) of DETR or of SMCA's authors, folder or hub name of transformers' DETR, or a model or run of this project."""
    output: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]
    """Folder that receives config.json and model.safetensors."""
    overwrite: bool = False
    """Replace a model that is there."""


def main(argv: list[str] | None = None) -> None:
    """Entry point of ``smca convert-weights``."""
    args = tyro.cli(ConvertArgs, args=argv, prog="smca convert-weights")
    present = [name for name in (CONFIG_FILE, WEIGHTS_FILE) if (args.output / name).exists()]
    if present and not args.overwrite:
        raise ValueError(
            f"{args.output} already holds {' and '.join(present)}: --overwrite replaces them, another folder keeps them"
        )
    source = open_source(args.source)
    if source.absent:
        reasons = "; ".join(f"{part}: {reason}" for part, reason in source.absent.items())
        raise ValueError(
            f"{args.source} is {source.kind}, of which some parts have no equivalent here ({reasons}): it makes no "
            "whole model, but a start for one: smca train … --init"
        )
    write_model(args.output, source.config, source.weights)
    config = source.config
    print(
        f"{args.source}, {source.kind} → {args.output}/ ({CONFIG_FILE}, {WEIGHTS_FILE})\n"
        f"  {config.cross_attention} · {config.encoder_layers} + {config.decoder_layers} layers · {config.num_queries} queries · "
        f"{config.num_classes} classes"
    )
    for note in source.notes:
        print(f"  note: {note}")


if __name__ == "__main__":
    from smca.gpu.cli import run

    run(main)
