"""CocoDetection's images: what is read, cached and converted, and the errors for files that are damaged or missing."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from smca.datasets import CocoDetection

# tests/ is no package, so what several files share is loaded by its path.
SPEC: Any = importlib.util.spec_from_file_location("coco_folder", Path(__file__).with_name("coco_folder.py"))
shared: Any = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(shared)
content, write, open_with = shared.content, shared.write, shared.open_with
HEIGHT, WIDTH = shared.HEIGHT, shared.WIDTH


def test_the_cache_reads_every_file_once(tmp_path: Path) -> None:
    images, annotations = write(tmp_path, content())
    plain, cached = CocoDetection(images, annotations), CocoDetection(images, annotations, cache=True)
    assert (plain.cache_bytes, cached.cache_bytes) == (0, 3 * HEIGHT * WIDTH * 3)
    before = [cached[i] for i in (2, 0, 1)]
    for name in ("a.png", "b.png", "sub/c.png"):
        (images / name).unlink()
    after = [cached[i] for i in (2, 0, 1)]
    for a, b in zip(before, after, strict=True):
        np.testing.assert_array_equal(a.image, b.image)
    assert len({a.image.tobytes() for a in after}) == 3
    with pytest.raises(FileNotFoundError, match=r"b\.png .*is gone"):
        plain[0]


# Image files


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "1", "I;16", "RGB"])
def test_every_kind_of_image_becomes_rgb(tmp_path: Path, mode: str) -> None:
    images, annotations = write(tmp_path, content())
    grey = np.linspace(0, 255, WIDTH).astype(np.uint8)[None].repeat(HEIGHT, axis=0)
    if mode == "I;16":
        image = Image.fromarray(grey.astype(np.uint16) * 256 + 37)
    elif mode == "1":
        grey = np.where(grey > 128, 255, 0).astype(np.uint8)
        image = Image.fromarray(grey).convert("1")
    else:
        image = Image.fromarray(grey).convert("RGB").convert(mode)
    image.save(images / "b.png", format="TIFF" if mode == "CMYK" else "PNG")
    sample = CocoDetection(images, annotations)[0]
    assert sample.image.shape == (HEIGHT, WIDTH, 3)
    assert sample.image.dtype == np.uint8
    tolerance = 60 if mode == "P" else 1  # the web palette has steps of 51
    assert np.abs(sample.image.astype(int) - grey[..., None]).max() <= tolerance


def test_a_palette_with_transparency(tmp_path: Path) -> None:
    images, annotations = write(tmp_path, content())
    image = Image.new("P", (WIDTH, HEIGHT), 1)
    image.putpalette([0, 0, 0, 200, 100, 50])
    image.save(images / "b.png", transparency=bytes([0, 128]))
    assert CocoDetection(images, annotations)[0].image[0, 0].tolist() == [200, 100, 50]


def test_exif_orientation_is_not_applied(tmp_path: Path) -> None:
    """COCO's boxes refer to the stored pixels."""
    images, annotations = write(tmp_path, content())
    pixels = np.zeros((HEIGHT, WIDTH, 3), dtype=np.uint8)
    pixels[:, : WIDTH // 2] = 255
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(images / "b.png", exif=exif)
    np.testing.assert_array_equal(CocoDetection(images, annotations)[0].image, pixels)
    Image.fromarray(pixels).transpose(Image.Transpose.ROTATE_90).save(images / "b.png", exif=exif)
    with pytest.raises(
        ValueError, match=r"b\.png is 40×60 pixels, but image 70 of .* says 60×40; its EXIF orientation"
    ):
        CocoDetection(images, annotations)[0]


def test_an_image_of_another_size(tmp_path: Path) -> None:
    images, annotations = write(tmp_path, content())
    Image.new("RGB", (50, 40)).save(images / "b.png")
    with pytest.raises(
        ValueError, match=r"b\.png is 50×40 pixels, but image 70 of .*annotations\.json says 60×40; boxes"
    ):
        CocoDetection(images, annotations)[0]


@pytest.mark.parametrize(
    "damage", ["truncated png", "truncated jpeg", "empty", "text", "header only", "a 32-bit image"]
)
def test_a_damaged_image_is_named(tmp_path: Path, damage: str) -> None:
    images, annotations = write(tmp_path, content())
    path = images / "b.png"
    if damage == "truncated jpeg":
        Image.open(path).save(path, format="JPEG")
    if damage.startswith("truncated"):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif damage == "a 32-bit image":
        Image.fromarray(np.zeros((HEIGHT, WIDTH), dtype=np.float32)).save(path, format="TIFF")
    else:
        path.write_bytes({"empty": b"", "text": b"<html>404</html>", "header only": path.read_bytes()[:60]}[damage])
    dataset = CocoDetection(images, annotations)
    assert dataset[1].image_id == 9  # the others are not affected
    with pytest.raises(
        ValueError, match=r"cannot read .*b\.png \(image 70 of .*annotations\.json\): .*; replace the file"
    ):
        dataset[0]


def test_a_png_broken_between_two_chunks_is_named(tmp_path: Path) -> None:
    """Pillow raises SyntaxError here, which is no OSError."""
    pixels = np.random.default_rng(0).integers(0, 256, size=(200, 300, 3), dtype=np.uint8)
    images, annotations = write(tmp_path, content())
    Image.fromarray(pixels).save(images / "b.png")
    head, first, second, *rest = (images / "b.png").read_bytes().split(b"IDAT")
    (images / "b.png").write_bytes(b"IDAT".join([head, first]) + bytes(4) + b"IDAT".join([second, *rest]))
    data = content()
    data["images"][0].update(width=300, height=200)
    annotations.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=r"cannot read .*b\.png .*broken PNG"):
        CocoDetection(images, annotations)[0]


def test_missing_images_are_found_when_the_data_set_is_opened(tmp_path: Path) -> None:
    images, annotations = write(tmp_path, content())
    (images / "a.png").unlink()
    (images / "sub" / "c.png").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"2 of 3 images of .*annotations\.json are missing in .*: a\.png, sub/c\.png;"
    ):
        CocoDetection(images, annotations)
    (images / "sub").rmdir()
    with pytest.raises(FileNotFoundError, match="2 of 3 images"):
        CocoDetection(images, annotations)


def test_only_the_first_missing_images_are_listed(tmp_path: Path) -> None:
    def many(data: dict[str, Any]) -> None:
        data["images"] += [
            {"id": 1000 + i, "file_name": f"{i}.png", "width": WIDTH, "height": HEIGHT} for i in range(2000)
        ]

    with pytest.raises(
        FileNotFoundError, match=r"2,000 of 2,003 images .*: 0\.png, 1\.png, 2\.png, 3\.png, 4\.png, …;"
    ):
        open_with(tmp_path, many)


def test_a_file_name_in_other_case_is_suggested(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"the folder has 'b\.png': correct 'file_name'"):
        open_with(tmp_path, lambda d: d["images"][0].update(file_name="B.PNG"))


def test_a_missing_folder_of_images(tmp_path: Path) -> None:
    _, annotations = write(tmp_path, content())
    with pytest.raises(FileNotFoundError, match=r"image folder .*elsewhere does not exist; .*expects 3 images"):
        CocoDetection(tmp_path / "elsewhere", annotations)
