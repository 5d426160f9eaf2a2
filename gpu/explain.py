"""Show why a model detects what it detects.

    smca explain runs/small/model photo.jpg --output out

writes for every image one page, which needs no server and no network, and one picture. Open the page in a browser: choose a
detection and see where its heads looked in every layer, how box and score came about, and what the attention would be without the
Gaussians.
A file that cannot be read is skipped and named.
"""

from __future__ import annotations

import base64
import io
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import tyro
from PIL import Image
from rich.progress import track

from smca.datasets.batch import UInt8Array
from smca.datasets.images import read_image
from smca.gpu.evaluation import pick_device
from smca.gpu.model import SMCADETR, draw_thresholds
from smca.gpu.model.explanation import Explanation
from smca.gpu.pictures.explanation import draw_explanation
from smca.gpu.pictures.files import find_images, report_skipped, save_signed

PAGE_BYTES = 1_900_000
"""Of a page, at most: detections whose maps go beyond that are left out, the best stay."""
PHOTO_SIDE = 1280
"""The longer side of the photograph in a page, in pixels, at most."""


@dataclass(frozen=True)
class ExplainArgs:
    """Show why a model detects what it detects: a page and a picture for every image."""

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """Folder of a model (config.json, model.safetensors) or of a run, its checkpoint, or a name on the Hugging Face hub."""
    images: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="IMAGE [IMAGE …]")]
    """Image files, or folders of them (searched recursively)."""
    output: Path = Path("explanations")
    """Folder that receives the pages and pictures."""
    threshold: float | None = None
    """Lowest score that is shown; by default the one of best F1 for each class that is saved with the model, or 0.35
    where none is."""
    most: int = 12
    """Largest number of detections per page, best first."""
    device: str = "auto"
    """"cuda", "cpu" …"""

    def __post_init__(self) -> None:
        if self.threshold is not None and not 0 <= self.threshold <= 1:
            raise ValueError(f"--threshold must be in [0, 1], got {self.threshold}")
        if self.most < 1:
            raise ValueError(f"--most must be at least 1, got {self.most}")


def page(
    image: UInt8Array, name: str, shown: Explanation, everyone: Explanation, class_names: Sequence[str]
) -> tuple[str, int]:
    """One HTML page that needs nothing else.

    Args:
        image: [H, W, 3] RGB, of the size at which the page is to hold it.
        name: of the image.
        shown: of the detections that can be chosen.
        everyone: of all queries, without maps.
        class_names: of the model.

    Returns:
        The page, of at most PAGE_BYTES bytes, and how many detections it has: if need be, fewer than `shown`.
    """
    height, width = shown.image_size
    tops = np.cumsum([0, *(len(shown.scores) * level.shape[-2] for level in shown.attention)])
    data: dict[str, Any] = {
        "name": name,
        "width": width,
        "height": height,
        "photo": _data_uri(Image.fromarray(image), "jpeg", quality=85),
        "classes": class_names,
        "layers": len(shown.scores),
        "heads": shown.attention[0].shape[2],
        # Rows, columns, pixels of the image per column and row, first row in an atlas.
        "grids": [
            [*level.shape[-2:], *_rounded(cell), int(top)]
            for level, cell, top in zip(shown.attention, shown.cell_sizes_xy, tops, strict=False)
        ],
        "queries": _everyone(everyone),
        "detections": [],
    }
    template = resources.files("smca.gpu.pictures").joinpath("explanation.html").read_text(encoding="utf-8")
    left = PAGE_BYTES - len(template.encode()) - len(json.dumps(data))
    for n in range(len(shown.queries)):
        detection = _detection(shown, n)
        left -= len(json.dumps(detection)) + 2
        if left < 0:
            break
        data["detections"].append(detection)
    # In a script, "<" could begin a tag that ends it; in JSON it may be written as a number.
    return template.replace("/*DATA*/", json.dumps(data).replace("<", "\\u003c")), len(data["detections"])


def _detection(shown: Explanation, n: int) -> dict[str, Any]:
    label = int(shown.scores[-1, n].argmax())
    maps = [_atlas([level[:, n] for level in levels]) for levels in (shown.attention, shown.attention_without_prior)]
    found = {
        "query": int(shown.queries[n]),
        "label": label,
        "boxes": _rounded(shown.boxes_xyxy[:, n]),
        "scores": _rounded(shown.scores[:, n, label], 4),
        "level_weights": _rounded(shown.level_weights[:, n], 3),
        "attention": maps[0][0],
        "plain": maps[1][0],
        "largest": [maps[0][1], maps[1][1]],
        "references": None,
        "centers": None,
        "sigmas": None,
    }
    if shown.centers_xy is not None and shown.sigmas_xy is not None and shown.references_xy is not None:
        found["references"] = _rounded(shown.references_xy[:, n])
        found["centers"], found["sigmas"] = _rounded(shown.centers_xy[:, n]), _rounded(shown.sigmas_xy[:, n])
    return found


def _everyone(every: Explanation) -> list[dict[str, Any]]:
    """Every query's Gaussians in the last layer: level, centre and width along x and y."""
    if every.centers_xy is None or every.sigmas_xy is None:
        return []
    queries = []
    for n, scores in enumerate(every.scores[-1]):
        gaussians = [
            [j, *_rounded(every.centers_xy[-1, n, i, j]), *_rounded(every.sigmas_xy[-1, n, i, j])]
            for i, j in np.ndindex(*every.centers_xy.shape[2:4])
        ]
        label = int(scores.argmax())
        weights = _rounded(every.level_weights[-1, n], 3)
        queries.append(
            {"label": label, "score": round(float(scores[label]), 3), "level_weights": weights, "gaussians": gaussians}
        )
    return queries


def _atlas(levels: list[npt.NDArray[np.float64]]) -> tuple[str, list[Any]]:
    """All maps of one query, [M, h, H, W] for each level, as one grey picture (heads side by side, layers below each other, then
    the next level), and the largest number of each map: a pixel of 255·s stands for s² of it."""
    heads = levels[0].shape[1]
    wide = max(level.shape[3] for level in levels) * heads
    parts, largest = [], []
    for level in levels:
        most = level.max((-2, -1), keepdims=True)
        grey = np.rint(255 * np.sqrt(level / np.maximum(most, 1e-30))).astype(np.uint8)  # [M, h, H, W]
        rows = grey.transpose(0, 2, 1, 3).reshape(-1, heads * level.shape[3])
        parts.append(np.pad(rows, ((0, 0), (0, wide - rows.shape[1]))))
        largest.append(_rounded(most[..., 0, 0], 7))
    return _data_uri(Image.fromarray(np.concatenate(parts)), "png", optimize=True), largest


def _data_uri(picture: Image.Image, kind: str, **options: Any) -> str:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


def _photograph(image: UInt8Array) -> UInt8Array:
    picture = Image.fromarray(image)
    picture.thumbnail((PHOTO_SIDE, PHOTO_SIDE))
    return np.asarray(picture)


def _rounded(values: npt.ArrayLike, digits: int = 1) -> Any:
    """Nested lists; null for what is not finite, which JSON lacks."""
    array = np.asarray(values, dtype=np.float64)
    if array.ndim == 0:
        return round(float(array), digits) if np.isfinite(array) else None
    return [_rounded(value, digits) for value in array]


def main(argv: list[str] | None = None) -> None:
    """Entry point of ``smca explain``."""
    args = tyro.cli(ExplainArgs, args=argv, prog="smca explain")
    paths = find_images(args.images, args.output)
    model = SMCADETR.from_pretrained(args.model).to(pick_device(args.device))
    names, thresholds = model.config.names, draw_thresholds(model.config, args.threshold).numpy()
    args.output.mkdir(parents=True, exist_ok=True)
    skipped: list[str] = []
    for number, path in enumerate(track(paths, "explaining", disable=not sys.stdout.isatty()), start=1):
        try:
            image = read_image(path)
        except (ValueError, OSError) as error:
            skipped.append(str(error))
            continue
        encoded = model.encode(image)
        everyone = encoded.explain(queries=range(model.config.num_queries), maps=False)
        scores, labels = everyone.scores[-1].max(-1), everyone.scores[-1].argmax(-1)
        order = np.argsort(-scores, kind="stable")
        chosen = order[(scores >= thresholds[labels])[order]][: args.most].tolist()
        shown = encoded.explain(queries=chosen)
        stem = args.output / f"{number:04d}_{path.stem[:100]}"
        photograph = _photograph(image)
        text, fitted = page(photograph, path.name, shown, everyone, names)
        stem.with_name(stem.name + ".html").write_text(text, encoding="utf-8")
        save_signed(draw_explanation(photograph, shown, names), stem.with_name(stem.name + ".png"))
        lacking = f" of {len(chosen)}, as many as fit" if fitted < len(chosen) else ""
        print(f"{stem}.html: {fitted} detections{lacking}, {len(text.encode()) / 1e6:.2f} MB", flush=True)
    report_skipped(skipped, len(paths))


if __name__ == "__main__":
    from smca.gpu.cli import run

    run(main)
