"""What has the same name in ``reference`` and in ``gpu`` takes the same arguments in the same order."""

from __future__ import annotations

import ast
from dataclasses import replace
from pathlib import Path

import pytest

from smca.gpu.config import ModelConfig
from smca.gpu.presets import smca_r50
from smca.reference.config import ModelConfig as SpecifiedConfig

ROOT = Path(__file__).parent.parent
RUNS_OTHERWISE = {
    "ModelConfig": "the production model has more fields: a backbone, dropout, names of classes, sizes of images",
    "draw_noise": "production draws from a seed of each image, so that noise does not depend on which images share a batch",
}
"""Same name, other fields or arguments, and why."""


def signatures(folder: str) -> dict[str, tuple[str, list[str], list[str]]]:
    """Public function or class at the top of a module → (file, arguments or fields in order, keyword-only arguments)."""
    found = {}
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            where = str(path.relative_to(ROOT))
            if isinstance(node, ast.FunctionDef):
                arguments = [a.arg for a in node.args.posonlyargs + node.args.args]
                found[node.name] = where, arguments, [a.arg for a in node.args.kwonlyargs]
            elif isinstance(node, ast.ClassDef):
                fields = [ast.unparse(n.target) for n in node.body if isinstance(n, ast.AnnAssign)]
                found[node.name] = where, fields, []
    return {name: what for name, what in found.items() if not name.startswith("_")}


SPECIFIED, PRODUCTION = signatures("reference"), signatures("gpu")


@pytest.mark.parametrize("name", sorted(SPECIFIED.keys() & PRODUCTION.keys()))
def test_same_name_same_order(name: str) -> None:
    """Production may add keyword-only arguments; a tuple or dataclass may leave out fields, but keeps their order."""
    (here, wanted, _), (there, got, _) = SPECIFIED[name], PRODUCTION[name]
    if name in RUNS_OTHERWISE:
        assert got != wanted, f"{name} need not be named as an exception any more"
    elif name[0].isupper():
        assert [field for field in wanted if field in got] == got, f"{name} of {there} and of {here}"
    else:
        assert got == wanted, f"{name} of {there} and of {here}"


def test_a_configuration_of_the_specification_is_one_of_the_model() -> None:
    """Same names, same defaults; the published model differs from them in conventions alone."""
    published = vars(SpecifiedConfig())
    model = ModelConfig(**published)
    assert {name: getattr(model, name) for name in published} == published
    assert ModelConfig() == model
    conventions = {
        "prior_state": "entering",
        "position_encoding": "detr",
        "padding_cells": "nearest",
        "initialization": "published",
    }
    assert smca_r50().model == replace(model, backbone=smca_r50().model.backbone, **conventions)  # type: ignore[arg-type]


def test_the_contract_is_among_them() -> None:
    shared = SPECIFIED.keys() & PRODUCTION.keys()
    contract = {
        "smca_attention",
        "multi_scale_smca_attention",
        "Level",
        "Grid",
        "cxcywh_to_xyxy",
        "generalized_box_iou",
    }
    assert shared >= contract | {"match", "sigmoid_focal_loss", "sine_position_encoding"}
