"""Check an implementation against vectors: ``python read_vectors.py FOLDER``. NumPy alone; put your own in place of `ANSWERS`."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

KINDS = {"F64": np.float64, "I64": np.int64, "BOOL": np.bool_}


def read(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Tensors and texts of a safetensors file, by name."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    texts = header.pop("__metadata__")
    return {
        n: np.frombuffer(body[slice(*e["data_offsets"])], KINDS[e["dtype"]]).reshape(e["shape"])
        for n, e in header.items()
    }, texts


def differences(tensors: dict[str, Any], answer: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """How far each result, or gradient along a direction, is off, in multiples of its bound."""
    for name, expected in tensors.items():
        if name.startswith("out."):
            yield name, np.max(np.abs(answer[name[4:]] - expected) / tensors[f"bound.{name[4:]}"], initial=0.0)
        elif name.startswith("along.") and name.count(".") == 1:
            parts = [(n.removeprefix(f"{name}."), d) for n, d in tensors.items() if n.startswith(f"{name}.")]
            along = sum((answer[result] * direction).sum() for result, direction in parts)
            yield name, np.abs(along - expected) / tensors[name.replace("along.", "along_bound.")]


def log_odds(tensors: dict[str, Any], dtype: str) -> dict[str, Any]:
    z = tensors["in.z"].astype(dtype)
    others = np.where(np.eye(z.shape[-1])[:-1], -np.inf, z[:, None])
    most = others.max(-1, keepdims=True)
    return {"logits": z[:, :-1] - (most[..., 0] + np.log(np.exp(others - most).sum(-1)))}


ANSWERS = {("log_odds", "float64"): log_odds, ("log_odds", "float32"): log_odds}
"""(operation, dtype) → a function of the tensors and the dtype that gives the results by name."""

if __name__ == "__main__":
    for entry in json.loads((Path(sys.argv[1]) / "index.json").read_text(encoding="utf-8"))["vectors"]:
        if (entry["operation"], entry["dtype"]) in ANSWERS:
            tensors, _ = read(Path(sys.argv[1]) / entry["file"])
            answer = ANSWERS[entry["operation"], entry["dtype"]](tensors, entry["dtype"])
            for name, multiple in differences(tensors, answer):
                print(f"{entry['file']}: {name} {'ok' if multiple <= 1 else 'WRONG'}, {multiple:.3g} of its bound")
