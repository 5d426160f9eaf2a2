"""CocoDetection's images: what is read, cached and converted, and the errors for files that are damaged or missing."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from coco_folder import HEIGHT, WIDTH, content, open_with, write
from smca.datasets import AnnotationOptions, Augmentation, Augmented, CocoDetection
from smca.datasets.cache import ImageCache
from smca.datasets.images import MAX_PIXELS, read_header, read_image, to_rgb

PILLOW_LIMIT = Image.MAX_IMAGE_PIXELS


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


def test_a_cache_keeps_what_fits() -> None:
    cache = ImageCache(np.array([(10, 10), (20, 10), (10, 10)]), limit=300 + 600)
    assert (cache.nbytes, cache.left_out) == (900, 1)
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in ((10, 10), (20, 10), (10, 10))]
    for index, image in enumerate(images):
        np.testing.assert_array_equal(cache.put(index, image), image)
    np.testing.assert_array_equal(cache.get(1), images[1])
    assert cache.get(2) is None, "no room: read from its file again"


def test_what_does_not_fit_into_the_cache_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images, annotations = write(tmp_path, content())
    monkeypatch.setattr("smca.datasets.cache.memory_limit", lambda: 2 * HEIGHT * WIDTH * 3)
    dataset = CocoDetection(images, annotations, cache=True)
    assert dataset.cache_bytes == 2 * HEIGHT * WIDTH * 3
    assert "no room in the cache for 1 images" in str(dataset.report)
    np.testing.assert_array_equal(dataset[2].image, np.asarray(Image.open(images / "sub/c.png")))


# Pictures: one way in


GREY = np.random.default_rng(5).integers(0, 256, (23, 31)).astype(np.uint8)
GREY[0, 0] = 255


def as_rgb(grey: Any) -> Any:
    return np.repeat(grey[:, :, None], 3, axis=2)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["png", "tiff", "webp"])
def test_upright_is_what_pillow_shows_and_stored_is_what_was_saved(
    tmp_path: Path, suffix: str, orientation: int
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (7, 12, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(pixels).save(path, exif=exif, **({"lossless": True} if suffix == "webp" else {}))
    with Image.open(path) as opened:
        shown = np.asarray(ImageOps.exif_transpose(opened))
        np.testing.assert_array_equal(to_rgb(opened), shown)
    np.testing.assert_array_equal(read_image(path), shown)
    np.testing.assert_array_equal(read_image(path, "stored"), pixels)
    header = read_header(path)
    assert (header.stored_size, header.orientation) == ((7, 12), orientation)


def test_a_nonsensical_orientation_turns_nothing(tmp_path: Path) -> None:
    for number, value in enumerate((0, 9, 77)):
        exif = Image.Exif()
        exif[0x0112] = value
        Image.fromarray(GREY).save(tmp_path / f"{number}.png", exif=exif)
        np.testing.assert_array_equal(read_image(tmp_path / f"{number}.png"), as_rgb(GREY))


@pytest.mark.parametrize("suffix", ["png", "tiff"])
@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
def test_grey_of_16_bits_is_read_by_the_depth_that_it_fills(tmp_path: Path, bits: int, suffix: str) -> None:
    values = GREY.astype(np.uint16) << (bits - 8)
    values += np.random.default_rng(1).integers(0, max(1, 1 << (bits - 8)), GREY.shape).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / f"a.{suffix}")
    np.testing.assert_array_equal(read_image(tmp_path / f"a.{suffix}"), as_rgb(GREY))
    np.testing.assert_array_equal(to_rgb(values), as_rgb(GREY))
    np.testing.assert_array_equal(to_rgb(Image.fromarray(values)), as_rgb(GREY))
    np.testing.assert_array_equal(to_rgb(values.astype(np.int32)), as_rgb(GREY))


def test_colours_of_16_bits_and_fractions_as_arrays() -> None:
    colours = np.random.default_rng(0).integers(0, 256, (9, 8, 4)).astype(np.uint8)
    colours[0, 0, 0] = 255
    for array in (
        colours,
        colours.astype(np.uint16) << 4,
        colours.astype(np.uint16) * 257,
        (colours / 255).astype(np.float32),
    ):
        np.testing.assert_array_equal(to_rgb(array), colours[:, :, :3])


def test_a_declared_depth_and_a_reversed_scale_of_a_tiff(tmp_path: Path) -> None:
    dark = GREY.astype(np.uint16) << 2  # of 12 bits, a quarter of them filled
    Image.fromarray(dark).save(tmp_path / "a.tiff", tiffinfo={281: 4095})
    np.testing.assert_array_equal(read_image(tmp_path / "a.tiff"), as_rgb(GREY >> 2))
    Image.fromarray(GREY.astype(np.uint16) * 257).save(tmp_path / "b.tiff", tiffinfo={262: 0})
    np.testing.assert_array_equal(read_image(tmp_path / "b.tiff"), as_rgb(255 - GREY))


def test_fractions(tmp_path: Path) -> None:
    for number, values in enumerate((GREY.astype(np.float32) / 255, GREY.astype(np.float32))):
        Image.fromarray(values).save(tmp_path / f"{number}.tiff")
        np.testing.assert_array_equal(read_image(tmp_path / f"{number}.tiff"), as_rgb(GREY))


@pytest.mark.parametrize("values", [[[-1.0, 3.0]], [[0.0, 256.0]], [[0.5, math.nan]], [[-1, 3]], [[0, 70000]]])
def test_values_without_a_defined_range_are_refused(tmp_path: Path, values: list[list[float]]) -> None:
    array = np.array(values)
    array = array.astype(np.float32 if array.dtype.kind == "f" else np.int32)
    Image.fromarray(array).save(tmp_path / "a.tiff")
    for read in (
        lambda: read_image(tmp_path / "a.tiff"),
        lambda: to_rgb(array),
        lambda: to_rgb(Image.fromarray(array)),
    ):
        with pytest.raises(ValueError, match=r"its values lie between .* save it with 8 or 16 bits"):
            read()


def test_the_first_picture_of_an_animation(tmp_path: Path) -> None:
    frames = [Image.fromarray(np.full((8, 9, 3), value, dtype=np.uint8)) for value in (200, 10, 90)]
    for suffix in ("gif", "webp", "tiff", "png"):
        frames[0].save(tmp_path / f"a.{suffix}", save_all=True, append_images=frames[1:])
        assert np.abs(read_image(tmp_path / f"a.{suffix}").astype(int) - 200).max() <= 2


def test_a_very_large_picture_is_read(tmp_path: Path) -> None:
    """More than what Pillow takes for an attack; converted strip by strip."""
    large = Image.new("1", (20_000, 9_500))
    large.paste(1, (0, 9_000, 20_000, 9_500))
    large.save(tmp_path / "a.png")
    pixels = read_image(tmp_path / "a.png")
    assert pixels.shape == (9_500, 20_000, 3)
    assert not pixels[8_999].any()
    assert (pixels[9_000:] == 255).all()
    assert Image.MAX_IMAGE_PIXELS == PILLOW_LIMIT, "for others, Pillow's limit stays"


def test_too_large_a_picture_is_refused_before_it_is_decoded(tmp_path: Path) -> None:
    Image.new("1", (30_000, 20_000)).save(tmp_path / "a.png")
    assert MAX_PIXELS < 30_000 * 20_000
    for read in (read_header, read_image):
        with pytest.raises(
            ValueError, match=r"a\.png: 30000×20000 pixels are more than 500 million: cut the picture into tiles"
        ):
            read(tmp_path / "a.png")


@pytest.mark.parametrize("array", [np.zeros((4, 4)), np.zeros((4, 4, 2), np.uint8), np.zeros((0, 4, 3), np.uint8)])
def test_arrays_that_are_no_pictures(array: Any) -> None:
    with pytest.raises(ValueError, match="expected a PIL image, or an array"):
        to_rgb(array)


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


def test_an_image_of_another_size(tmp_path: Path) -> None:
    images, annotations = write(tmp_path, content())
    Image.new("RGB", (50, 40)).save(images / "b.png")
    with pytest.raises(ValueError, match=r"b\.png is 50×40 pixels, but .*annotations\.json says 60×40; boxes"):
        CocoDetection(images, annotations)


def test_images_that_were_resized_after_they_were_annotated(tmp_path: Path) -> None:
    """Half as large as the file says: boxes are scaled for training, and everything else is in the file's pixels."""
    images, annotations = write(tmp_path, content())
    plain = CocoDetection(images, annotations)
    original = [plain[i] for i in range(3)]
    for name in ("a.png", "b.png"):
        Image.open(images / name).resize((WIDTH // 2, HEIGHT // 2)).save(images / name)
    with pytest.raises(
        ValueError, match=r"and so for 2 of 3 images.*--annotations.sizes scaled.*--annotations.sizes ignored"
    ):
        CocoDetection(images, annotations)
    scaled = CocoDetection(images, annotations, options=AnnotationOptions(sizes="scaled"), cache=True)
    for sample, before in zip([scaled[i] for i in range(3)], original, strict=True):
        factor = sample.image.shape[0] / HEIGHT
        np.testing.assert_allclose(sample.boxes_xyxy, before.boxes_xyxy * factor)
        assert sample.original_size == (HEIGHT, WIDTH)
    assert [scaled[i].image.shape[0] for i in range(3)] == [HEIGHT // 2, HEIGHT // 2, HEIGHT]
    assert scaled.ground_truth()["annotations"] == plain.ground_truth()["annotations"]
    assert "2 resized since they were annotated" in str(scaled.report)
    ignored = CocoDetection(images, annotations, options=AnnotationOptions(sizes="ignored"))
    assert ignored[1].original_size == (HEIGHT // 2, WIDTH // 2)
    assert ignored[1].boxes_xyxy.tolist() == [[1, 2, 11, 20]], "the other lies outside the smaller picture"


def test_an_image_that_changes_its_size_later(tmp_path: Path) -> None:
    images, annotations = write(tmp_path, content())
    dataset = CocoDetection(images, annotations)
    Image.new("RGB", (50, 40)).save(images / "b.png")
    with pytest.raises(ValueError, match=r"b\.png \(image 70 of .*\) is 50×40 pixels, but was 60×40 when"):
        dataset[0]


@pytest.mark.parametrize(
    ("damage", "found"),
    [
        ("truncated png", "read"),
        ("truncated jpeg", "read"),
        ("truncated avif", "opened"),
        ("empty", "opened"),
        ("text", "opened"),
        ("header only", "read"),
        ("a 32-bit image", "read"),
        ("an EPS named .png", "opened"),
    ],
)
def test_a_damaged_image_is_named(tmp_path: Path, damage: str, found: str) -> None:
    images, annotations = write(tmp_path, content())
    path = images / "b.png"
    if damage in ("truncated jpeg", "truncated avif"):
        Image.open(path).save(path, format=damage.split()[1].upper())
    if damage.startswith("truncated"):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif damage == "a 32-bit image":
        Image.fromarray(np.full((HEIGHT, WIDTH), 300, dtype=np.float32)).save(path, format="TIFF")
    elif damage == "an EPS named .png":
        Image.open(path).save(path, format="EPS")  # which Pillow would hand to Ghostscript
    else:
        path.write_bytes({"empty": b"", "text": b"<html>404</html>", "header only": path.read_bytes()[:60]}[damage])
    if found == "opened":
        with pytest.raises(
            ValueError,
            match=r"1 of 3 images of .*annotations\.json cannot be used: cannot read .*b\.png: .*; replace the file",
        ):
            CocoDetection(images, annotations)
        return
    dataset = CocoDetection(images, annotations)
    assert dataset[1].image_id == 9  # the others are not affected
    with pytest.raises(
        ValueError,
        match=r"cannot read .*b\.png: .*; replace the file, or remove its entry \(image 70 of .*annotations\.json\)",
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
    with pytest.raises(ValueError, match=r"cannot read .*b\.png: broken PNG"):
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


# Decoding at a reduced size


def photograph(height: int, width: int) -> Any:
    """Smooth, so that its JPEG is nearly what it was, and no side alike."""
    y, x = np.mgrid[:height, :width]
    return np.stack([127 + 120 * np.sin(x / 23), 255 * y / height, 255 * x / width], axis=-1).astype(np.uint8)


@pytest.mark.parametrize("orientation", [1, 3, 6])
@pytest.mark.parametrize("width", [453, 448])
@pytest.mark.parametrize(("least", "most"), [(151, 1), (150, 2), (76, 2), (75, 4), (38, 4), (37, 8), (1, 8)])
def test_a_large_jpeg_is_decoded_as_small_as_is_asked_for(
    tmp_path: Path, least: int, most: int, width: int, orientation: int
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = photograph(300, width)
    Image.fromarray(pixels).save(tmp_path / "a.jpg", quality=98, subsampling=0, exif=exif)
    whole, found = read_image(tmp_path / "a.jpg"), read_image(tmp_path / "a.jpg", least_short_side=least)
    exact = max(divisor for divisor in (1, 2, 4, 8) if 300 % divisor == width % divisor == 0)
    divisor = most if orientation == 1 else min(most, exact)
    assert found.shape == (*(-(-side // divisor) for side in whole.shape[:2]), 3)
    padding = [(0, divisor * shrunk - side) for shrunk, side in zip(found.shape, whole.shape, strict=False)]
    padded = np.pad(whole, [*padding[:2], (0, 0)], mode="edge").astype(float)
    blocks = padded.reshape(found.shape[0], divisor, found.shape[1], divisor, 3)
    assert np.abs(blocks.mean(axis=(1, 3)) - found).mean() < 1
    Image.fromarray(pixels).save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_image(tmp_path / "a.png", least_short_side=1), pixels)


def test_boxes_follow_a_picture_that_is_decoded_smaller(tmp_path: Path) -> None:
    Image.fromarray(photograph(300, 453)).save(tmp_path / "a.jpg")
    content = {
        "images": [{"id": 1, "file_name": "a.jpg", "width": 453, "height": 300}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [90.6, 30, 181.2, 150]}],
        "categories": [{"id": 1, "name": "a"}],
    }
    (tmp_path / "a.json").write_text(json.dumps(content))
    data = CocoDetection(tmp_path, tmp_path / "a.json")
    assert data[0].image.shape == (300, 453, 3)
    small = data.read(0, 75)
    assert (small.image.shape, small.original_size) == ((75, 114, 3), (300, 453))
    np.testing.assert_allclose(
        small.boxes_xyxy, [[22.65, 7.5, 67.95, 45]]
    )  # 114 pixels show 456 of the picture, were it so wide
    assert CocoDetection(tmp_path, tmp_path / "a.json", cache=True).read(0, 75).image.shape == (300, 453, 3)
    augmented = Augmented(data, Augmentation(short_sides=(60,)))
    np.testing.assert_allclose(augmented[0].boxes_xyxy[:, 1::2], [[6, 36]])
    Image.fromarray(photograph(302, 453)).save(tmp_path / "a.jpg")
    with pytest.raises(ValueError, match="was 453×300 when the data were opened"):
        data.read(0, 75)
