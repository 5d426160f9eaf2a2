"""Augmentation: boxes must say what the pixels say.

A bright rectangle is painted, the sample transformed, and the rectangle found again in the pixels. A pixel whose centre
lies inside the rectangle stays above half the brightness under an antialiasing filter, so the extent found by
thresholding is within half a pixel of the true edges.
"""

import numpy as np
import pytest

from smca.datasets import Augmentation, Augmented, Sample, SyntheticShapes

EDGE_PX = 0.55
"""Half a pixel, and the rounding to 8 bits."""
FULL = Augmentation(
    short_sides=(48, 70, 96, 130),
    max_size=160,
    horizontal_flip=0.5,
    vertical_flip=0.5,
    crop_probability=0.5,
    crop_short_sides=(60, 90),
    crop_size=(40, 90),
    zoom=(0.6, 1.6),
    stretch=0.3,
    shift=0.2,
)


def painted(rng: np.random.Generator, height: int = 96, width: int = 128) -> Sample:
    """A black image with a white rectangle of at most a quarter of its area."""
    w, h = int(rng.integers(12, width // 2)), int(rng.integers(12, height // 2))
    x, y = int(rng.integers(0, width - w + 1)), int(rng.integers(0, height - h + 1))
    image = np.zeros((height, width, 3), dtype=np.uint8)
    image[y : y + h, x : x + w] = 255
    boxes_xyxy = np.array([[x, y, x + w, y + h]], dtype=np.float64)
    return Sample(image, boxes_xyxy, np.array([4]), 17, (height, width))


def extent(image: np.ndarray) -> list[int] | None:
    rows, columns = np.nonzero(image[..., 0] >= 128)
    return [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1] if len(rows) else None


def assert_box_matches_pixels(sample: Sample) -> None:
    bright = extent(sample.image)
    if len(sample.boxes_xyxy) == 0:
        return
    assert len(sample.boxes_xyxy) == 1
    x0, y0, x1, y1 = sample.boxes_xyxy[0]
    height, width = sample.image.shape[:2]
    assert 0 <= x0 < x1 <= width
    assert 0 <= y0 < y1 <= height
    if min(x1 - x0, y1 - y0) < 1.5:
        return  # too thin for any pixel's centre to be surely inside
    assert bright is not None, f"box {sample.boxes_xyxy[0]} but nothing bright"
    np.testing.assert_allclose(bright, sample.boxes_xyxy[0], atol=EDGE_PX)


CASES = {
    "resize": Augmentation(short_sides=(40, 77, 200)),
    "max_size": Augmentation(short_sides=(100,), max_size=90),
    "horizontal flip": Augmentation(horizontal_flip=1.0),
    "vertical flip": Augmentation(vertical_flip=1.0),
    "crop": Augmentation(crop_probability=1.0, crop_short_sides=(60, 90), crop_size=(40, 80), min_visibility=0.0),
    "zoom in": Augmentation(zoom=(1.2, 2.0)),
    "zoom out": Augmentation(zoom=(0.5, 0.9)),
    "stretch": Augmentation(stretch=0.5),
    "shift": Augmentation(shift=0.4, min_visibility=0.0),
    "everything": FULL,
}


@pytest.mark.parametrize("name", CASES)
def test_boxes_match_pixels(name: str) -> None:
    rng = np.random.default_rng(0)
    kept = 0
    for _ in range(100):
        result = CASES[name](painted(rng), rng)
        assert_box_matches_pixels(result)
        assert len(result.boxes_xyxy) == len(result.labels)
        assert (result.image_id, result.original_size) == (17, (96, 128))
        assert result.image.dtype == np.uint8
        kept += len(result.boxes_xyxy)
    assert kept >= 40  # the comparison has not become empty


def test_a_box_is_kept_when_enough_of_its_area_is_in_view() -> None:
    rng = np.random.default_rng(1)
    keep_any = Augmentation(shift=0.9, zoom=(0.8, 1.6), min_visibility=0.0)
    keep_most = Augmentation(shift=0.9, zoom=(0.8, 1.6), min_visibility=0.6)
    removed = 0
    for seed in range(200):
        sample = painted(rng)
        x0, y0, x1, y1 = sample.boxes_xyxy[0]
        everything = keep_any(sample, np.random.default_rng(seed))
        most = keep_most(sample, np.random.default_rng(seed))
        np.testing.assert_array_equal(everything.image, most.image)
        bright = int((everything.image[..., 0] >= 128).sum())
        if len(everything.boxes_xyxy) == 0:
            assert bright <= 2 * max(everything.image.shape)  # at most a blurred rim
            assert len(most.boxes_xyxy) == 0
            continue
        inner = everything.boxes_xyxy[0]
        assert len(most.boxes_xyxy) in (0, 1)
        # A side that touches no border has its full length, which gives the scale of its axis.
        touches_x = inner[0] <= 0 or inner[2] >= 128
        touches_y = inner[1] <= 0 or inner[3] >= 96
        if touches_x and touches_y:
            continue
        scale = (inner[3] - inner[1]) / (y1 - y0) if not touches_y else (inner[2] - inner[0]) / (x1 - x0)
        fraction = np.prod(inner[2:] - inner[:2]) / ((x1 - x0) * (y1 - y0) * scale**2)
        if abs(fraction - 0.6) > 0.06:  # the two axes' scales differ by rounding to whole pixels
            assert len(most.boxes_xyxy) == int(fraction > 0.6), fraction
            removed += fraction < 0.6
    assert removed > 10


def test_flips_move_every_pixel_and_every_box() -> None:
    sample = SyntheticShapes(5, seed=3)[1]
    assert len(sample.boxes_xyxy) > 1
    rng = np.random.default_rng(0)
    across = Augmentation(horizontal_flip=1.0)(sample, rng)
    np.testing.assert_array_equal(across.image, sample.image[:, ::-1])
    np.testing.assert_array_equal(across.boxes_xyxy[:, 0], 128 - sample.boxes_xyxy[:, 2])
    np.testing.assert_array_equal(across.boxes_xyxy[:, [1, 3]], sample.boxes_xyxy[:, [1, 3]])
    down = Augmentation(vertical_flip=1.0)(sample, rng)
    np.testing.assert_array_equal(down.image, sample.image[::-1])
    np.testing.assert_array_equal(down.boxes_xyxy[:, 1], 128 - sample.boxes_xyxy[:, 3])
    twice = Augmentation(horizontal_flip=1.0)(across, rng)
    np.testing.assert_array_equal(twice.image, sample.image)
    np.testing.assert_array_equal(twice.boxes_xyxy, sample.boxes_xyxy)


def test_flips_and_crops_happen_as_often_as_asked_for() -> None:
    sample, rng = painted(np.random.default_rng(0)), np.random.default_rng(1)
    x0, y0 = sample.boxes_xyxy[0, :2]
    flipped = [Augmentation(horizontal_flip=0.25, vertical_flip=0.75)(sample, rng).boxes_xyxy[0] for _ in range(400)]
    assert 0.18 < np.mean([box[0] != x0 for box in flipped]) < 0.32
    assert 0.68 < np.mean([box[1] != y0 for box in flipped]) < 0.82
    crop = Augmentation(crop_probability=0.25, crop_short_sides=(96,), crop_size=(50, 60))
    assert 0.18 < np.mean([crop(sample, rng).image.shape != sample.image.shape for _ in range(400)]) < 0.32


@pytest.mark.parametrize(
    ("size", "short_side", "max_size", "expected"),
    [
        ((480, 640), 192, 256, (192, 256)),
        ((480, 640), 192, 200, (150, 200)),
        ((640, 480), 240, None, (320, 240)),
        ((100, 1000), 800, 1333, (133, 1330)),  # as DETR: the longer side follows the rounded shorter one, downwards
        ((480, 641), 800, 1333, (800, 1068)),  # 1068.3
        ((427, 640), 800, 1333, (800, 1199)),  # 1199.06
        ((500, 333), 480, 1333, (720, 480)),  # 720.7
        ((7, 1000), 7, 100, (1, 100)),
        ((333, 500), 800, 1333, (800, 1201)),
        ((480, 640), None, 320, (240, 320)),
        ((480, 640), None, 1000, (480, 640)),  # a limit does not enlarge
        ((480, 640), None, None, (480, 640)),
    ],
)
def test_output_sizes(
    size: tuple[int, int], short_side: int | None, max_size: int | None, expected: tuple[int, int]
) -> None:
    sample = Sample(
        np.zeros((*size, 3), dtype=np.uint8), np.array([[0.0, 0.0, size[1], size[0]]]), np.array([0]), 1, size
    )
    result = Augmentation.evaluation(short_side, max_size)(sample, np.random.default_rng(0))
    assert result.image.shape == (*expected, 3)
    np.testing.assert_allclose(result.boxes_xyxy, [[0, 0, expected[1], expected[0]]])


def test_evaluation_draws_nothing_and_needless_resizing_is_skipped() -> None:
    sample = SyntheticShapes(1)[0]
    rng = np.random.default_rng(5)
    result = Augmentation.evaluation(128, 128)(sample, rng)
    assert np.shares_memory(result.image, sample.image)
    assert rng.bit_generator.state == np.random.default_rng(5).bit_generator.state
    np.testing.assert_array_equal(Augmentation()(sample, rng).image, sample.image)


def test_resizing_is_antialiased() -> None:
    """Stripes one pixel wide become even grey, where sampling without a filter would show stripes or one colour."""
    image = np.zeros((64, 64, 3), dtype=np.uint8)
    image[:, ::2] = 255
    sample = Sample(image, np.zeros((0, 4)), np.zeros(0, dtype=np.int64), 1, (64, 64))
    small = Augmentation.evaluation(16)(sample, np.random.default_rng(0)).image
    assert np.abs(small[:, 1:-1].astype(float) - 127.5).max() < 12


def test_zooming_out_fills_with_the_mean_colour() -> None:
    image = np.full((80, 80, 3), (200, 100, 40), dtype=np.uint8)
    sample = Sample(image, np.zeros((0, 4)), np.zeros(0, dtype=np.int64), 1, (80, 80))
    result = Augmentation(zoom=(0.5, 0.5))(sample, np.random.default_rng(0)).image
    np.testing.assert_array_equal(result, image)
    image[:40] = (100, 50, 20)
    result = Augmentation(zoom=(0.5, 0.5))(sample, np.random.default_rng(0)).image
    filled = (result == (150, 75, 30)).all(axis=2)
    assert 0.7 < filled.mean() < 0.8  # three quarters of the canvas


def test_zoom_covers_its_range_and_shift_moves() -> None:
    rng = np.random.default_rng(2)
    sample = Sample(
        np.zeros((100, 100, 3), dtype=np.uint8), np.array([[45.0, 45, 55, 55]]), np.array([0]), 1, (100, 100)
    )
    zoom = Augmentation(zoom=(0.5, 2.0), min_visibility=1.0)
    boxes = [zoom(sample, rng).boxes_xyxy for _ in range(300)]
    widths = np.array([box[0, 2] - box[0, 0] for box in boxes if len(box)])  # zoomed in, it may be out of view
    assert 4.9 < widths.min() < 6
    assert 17 < widths.max() < 20.5
    assert 0.45 < np.mean(widths < 10) < 0.75  # logarithmic: half of them smaller; evenly, it would be a third
    shifted = [Augmentation(shift=0.2)(sample, rng).boxes_xyxy[0] for _ in range(100)]
    assert 24.5 < min(box[0] for box in shifted) < 30  # 45 ± 20
    assert 60 < max(box[0] for box in shifted) < 65.5
    assert 24.5 < min(box[1] for box in shifted) < 30  # 45 ± 20
    assert 60 < max(box[1] for box in shifted) < 65.5
    stretched = [Augmentation(stretch=0.5)(sample, rng).boxes_xyxy[0] for _ in range(100)]
    ratios = [(box[2] - box[0]) / (box[3] - box[1]) for box in stretched]
    assert 1 / 1.6 < min(ratios) < 0.75
    assert 1.3 < max(ratios) < 1.6


def test_extreme_views_stay_in_the_image() -> None:
    """Tiny and huge zooms with a large shift: always some image in view, never an error, boxes inside."""
    rng = np.random.default_rng(3)
    wild = Augmentation(short_sides=(17, 33), zoom=(0.02, 50.0), shift=0.99, stretch=2.0, min_visibility=0.0)
    wild_crop = Augmentation(
        zoom=(0.02, 50.0), shift=0.99, crop_probability=1.0, crop_size=(1, 2000), min_visibility=0.0
    )
    for _ in range(300):
        sample = painted(rng, height=int(rng.integers(30, 90)), width=int(rng.integers(30, 90)))
        for augmentation in (wild, wild_crop):
            result = augmentation(sample, rng)
            assert (result.boxes_xyxy >= 0).all()
            assert (result.boxes_xyxy <= np.tile(result.image.shape[1::-1], 2)).all()


def test_detr_is_as_published() -> None:
    detr = Augmentation.detr()
    assert detr.short_sides == (480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800)
    assert (detr.max_size, detr.horizontal_flip, detr.crop_probability) == (1333, 0.5, 0.5)
    assert (detr.crop_short_sides, detr.crop_size, detr.min_visibility) == ((400, 500, 600), (384, 600), 0.0)
    sample = Sample(
        np.zeros((480, 640, 3), dtype=np.uint8), np.zeros((0, 4)), np.zeros(0, dtype=np.int64), 1, (480, 640)
    )
    rng = np.random.default_rng(0)
    shapes = [detr(sample, rng).image.shape[:2] for _ in range(60)]
    assert all(min(shape) in detr.short_sides or max(shape) == 1333 for shape in shapes)
    uncropped = [shape for shape in shapes if abs(max(shape) / min(shape) - 4 / 3) < 0.01]
    assert 15 < len(uncropped) < 45


def test_the_crop_has_the_sides_asked_for() -> None:
    rng = np.random.default_rng(4)
    sample = Sample(
        np.zeros((100, 200, 3), dtype=np.uint8), np.zeros((0, 4)), np.zeros(0, dtype=np.int64), 1, (100, 200)
    )
    crop = Augmentation(crop_probability=1.0, crop_short_sides=(50,), crop_size=(30, 60))  # of 50 × 100
    sizes = np.array([crop(sample, rng).image.shape[:2] for _ in range(300)])  # in pixels of the image: twice as many
    assert sizes[:, 0].min() == 60
    assert sizes[:, 0].max() == 100  # the image ends before the largest crop
    assert sizes[:, 1].min() == 60
    assert sizes[:, 1].max() == 120
    assert 70 < sizes[:, 0].mean() < 90
    fixed = Augmentation(crop_probability=1.0, crop_short_sides=(50,), crop_size=(40, 40))
    assert fixed(sample, rng).image.shape == (80, 80, 3)
    small = Augmentation(crop_probability=1.0, crop_short_sides=(50,), crop_size=(60, 70))
    assert small(sample, rng).image.shape[0] == 100  # lower than the least crop: the whole height


def test_colours_change_by_at_most_what_was_asked_for() -> None:
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, size=(40, 40, 3), dtype=np.uint8)
    sample = Sample(image, np.array([[1.0, 2, 3, 4]]), np.array([0]), 1, (40, 40))
    grey = Sample(np.full((9, 9, 3), 100, np.uint8), sample.boxes_xyxy, sample.labels, 1, (9, 9))

    def values(augmentation: Augmentation) -> np.ndarray:
        return np.array([augmentation(grey, rng).image[0, 0] for _ in range(300)])

    brightness = values(Augmentation(brightness=0.3))
    assert (np.ptp(brightness, axis=1) == 0).all()  # all channels alike
    assert 70 <= brightness.min() < 75
    assert 125 < brightness.max() <= 130
    tint = values(Augmentation(tint=0.3))
    assert np.ptp(tint, axis=1).max() > 30
    assert 70 <= tint.min() < 75
    assert 125 < tint.max() <= 130
    gamma = values(Augmentation(gamma=0.5))
    assert gamma.min() == pytest.approx(255 * (100 / 255) ** 1.5, abs=2)
    assert gamma.max() == pytest.approx(255 * (100 / 255) ** (1 / 1.5), abs=2)
    assert (values(Augmentation(contrast=0.5)) == 100).all()  # an even image has no contrast to change
    spread = [Augmentation(contrast=0.5)(sample, rng).image.std() / image.std() for _ in range(50)]
    assert min(spread) < 0.6
    assert 1.2 < max(spread) < 1.51
    both = Augmentation(brightness=0.3, contrast=0.3, tint=0.3, gamma=0.3)(sample, rng)
    np.testing.assert_array_equal(both.boxes_xyxy, sample.boxes_xyxy)
    # The same value in a channel always becomes the same value.
    for c in range(3):
        table = {(int(a), int(b)) for a, b in zip(image[..., c].ravel(), both.image[..., c].ravel(), strict=True)}
        assert len(table) == len({a for a, _ in table})


def test_the_sample_given_is_left_as_it_is() -> None:
    sample = SyntheticShapes(3, seed=1)[1]
    image, boxes_xyxy = sample.image.copy(), sample.boxes_xyxy.copy()
    loud = Augmentation(short_sides=(128,), horizontal_flip=1, vertical_flip=1, zoom=(0.5, 2), tint=0.5)
    loud(Sample(sample.image, sample.boxes_xyxy, sample.labels, 1, (128, 128)), np.random.default_rng(0))
    np.testing.assert_array_equal(sample.image, image)
    np.testing.assert_array_equal(sample.boxes_xyxy, boxes_xyxy)


def test_augmented_is_reproducible_and_differs_between_epochs_images_and_seeds() -> None:
    dataset = SyntheticShapes(4, seed=0, image_size=64)
    a, b = Augmented(dataset, FULL, seed=3), Augmented(dataset, FULL, seed=3)
    np.testing.assert_array_equal(a[1].image, b[1].image)
    np.testing.assert_array_equal(a[1].boxes_xyxy, b[1].boxes_xyxy)
    first = a[1].image
    a.set_epoch(1)
    assert a.epoch == 1
    assert not np.array_equal(a[1].image, first)
    a.set_epoch(0)
    np.testing.assert_array_equal(a[1].image, first)
    assert not np.array_equal(Augmented(dataset, FULL, seed=4)[1].image, first)
    assert len(a) == 4
    assert a.categories == dataset.categories
    assert a.ground_truth() == dataset.ground_truth()
    assert a.report == dataset.report
    with pytest.raises(ValueError, match="epoch must be at least 0"):
        a.set_epoch(-1)
    with pytest.raises(ValueError, match="seed must be at least 0"):
        Augmented(dataset, FULL, seed=-1)


@pytest.mark.parametrize(
    "fields",
    [
        {"short_sides": (0,)},
        {"max_size": 0},
        {"horizontal_flip": 1.1},
        {"vertical_flip": -0.1},
        {"crop_probability": 2},
        {"crop_short_sides": ()},
        {"crop_short_sides": (0,)},
        {"crop_size": (600, 384)},
        {"crop_size": (0, 384)},
        {"zoom": (0.0, 1.0)},
        {"zoom": (1.3, 0.8)},
        {"zoom": (1.0, float("inf"))},
        {"stretch": -0.1},
        {"shift": 1.0},
        {"min_visibility": 1.5},
        {"brightness": 1.0},
        {"contrast": -0.1},
        {"tint": float("nan")},
        {"gamma": float("nan")},
    ],
    ids=str,
)
def test_impossible_fields_are_named(fields: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=rf"Augmentation: {next(iter(fields))} must be .*, got "):
        Augmentation(**fields)  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [(480, 640), (1600, 1200), (900, 901)])
@pytest.mark.parametrize(
    "augmentation",
    [
        Augmentation.detr(),
        Augmentation(short_sides=(192,), max_size=256, zoom=(0.7, 1.4), stretch=0.15, shift=0.3),
        Augmentation(short_sides=(64, 96), zoom=(0.5, 0.9), crop_probability=1.0),
    ],
    ids=["detr", "zoom", "crop"],
)
def test_no_part_of_an_image_is_needed_at_more_pixels_than_is_said(
    augmentation: Augmentation, size: tuple[int, int]
) -> None:
    most, said = 0.0, augmentation.least_short_side / min(size)
    for seed in range(300):
        rng = np.random.default_rng(seed)
        view = augmentation._crop(size, rng)
        height, width = augmentation._output_size(view, rng)
        view = augmentation._zoom(view, rng)
        most = max(most, width / view[2], height / view[3])
    assert most <= said * 1.01  # sides are whole pixels
    assert Augmentation.evaluation(192).least_short_side == np.inf
    assert Augmentation().least_short_side == np.inf
