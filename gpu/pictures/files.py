"""The images that a command is given, and the pictures that it leaves."""

from __future__ import annotations

import sys
from pathlib import Path

from PIL import Image, PngImagePlugin

from smca.datasets.images import suffixes

_SIGN = "smca predict"
"""Written into each picture, so that it is not taken for an image to detect in."""
_SKIPPED_SHOWN = 20


def find_images(paths: tuple[Path, ...], output: Path) -> list[Path]:
    """The named files, and every image file below the named folders, in order; not what this command wrote itself."""
    files: list[Path] = []
    own = output.resolve()
    for path in paths:
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in suffixes() and p.is_file())
            if own not in (
                path.resolve(),
                *path.resolve().parents,
            ):  # images and results in one folder: see the signature
                inside = [p for p in inside if own not in p.resolve().parents]
            inside = [p for p in inside if not _is_signed(p)]
            if not inside:
                raise ValueError(f"{path} holds no image ({', '.join(suffixes())}): name another folder")
            files += inside
        elif path.is_file():
            files.append(path)
        else:
            raise FileNotFoundError(f"no image or folder at {path}: check the path")
    if not files:
        raise ValueError("no images given: name image files or folders after the model")
    return files


def _is_signed(path: Path) -> bool:
    if path.suffix != ".png":
        return False
    try:
        with Image.open(path, formats=["PNG"]) as picture:
            return picture.info.get("Software") == _SIGN
    except Exception:  # damaged: reported when it is read
        return False


def save_signed(picture: Image.Image, path: Path) -> None:
    """As PNG, with the mark by which ``find_images`` knows what these commands wrote themselves."""
    sign = PngImagePlugin.PngInfo()
    sign.add_text("Software", _SIGN)
    picture.save(path, "PNG", pnginfo=sign)


def report_skipped(skipped: list[str], of: int) -> None:
    """Say which files could not be read, and why; then the command ends with status 1."""
    if not skipped:
        return
    more = f"\n  and {len(skipped) - _SKIPPED_SHOWN} more" if len(skipped) > _SKIPPED_SHOWN else ""
    listed = "\n  ".join(skipped[:_SKIPPED_SHOWN])
    print(f"skipped {len(skipped)} of {of} files:\n  {listed}{more}", file=sys.stderr)
    raise SystemExit(1)
