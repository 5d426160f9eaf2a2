"""`Augmentation` of an image and its boxes together.

All geometry is collected first and done in one resampling:

    1. the view: a window in the stored image's coordinates, narrowed by the random crop, then scaled, stretched and
       shifted by the zoom; it may reach out of the image, where the image's mean colour is filled in
    2. the output size, from one of `short_sides` and `max_size`
    3. one antialiased bilinear resampling of the part of the image in view; then flips, then colours by table

Each axis is an exact linear map from source to output pixels, and boxes go through the same map as pixels do.
Sources: flip, multi-scale resize and crop as in DETR (Carion et al. 2020, appendix A.4); the rest is common practice.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from PIL import Image

from smca.datasets.batch import FloatArray, IntArray, Sample, UInt8Array
from smca.datasets.settings import require

_MEAN_STEP = 8
"""The mean colour is taken over every 8th pixel of either axis: 1/64 of the work, with no visible difference."""


@dataclass(frozen=True)
class Augmentation:
    """What to do to a training image; every field at its default leaves the image as it is.

    Call it with a sample and a NumPy generator: the same state of the generator gives the same result.
    """

    short_sides: tuple[int, ...] = ()
    """Resize so that the shorter side has one of these lengths in pixels, picked at random; empty: keep the size."""
    max_size: int | None = None
    """The longer side is at most this many pixels, with a shorter short side if necessary; None: no limit."""
    horizontal_flip: float = 0.0
    """Probability of exchanging left and right."""
    vertical_flip: float = 0.0
    """Probability of exchanging top and bottom; for images with no natural top, such as from microscopes or satellites."""
    crop_probability: float = 0.0
    """Probability of DETR's crop: as if resized to one of `crop_short_sides`, then cut at random to `crop_size`."""
    crop_short_sides: tuple[int, ...] = (400, 500, 600)
    """Shorter side in pixels that the image is treated as having when it is cropped."""
    crop_size: tuple[int, int] = (384, 600)
    """Least and largest side of the crop in pixels at that size; width and height are drawn separately."""
    zoom: tuple[float, float] = (1.0, 1.0)
    """Least and largest factor by which the content is scaled inside a canvas of the same size, drawn evenly on a
    logarithmic scale; the position is random. Below 1 the rest is filled with the image's mean colour."""
    stretch: float = 0.0
    """The aspect ratio changes by a factor between 1/(1 + stretch) and 1 + stretch."""
    shift: float = 0.0
    """The content is moved further along either axis, by at most this fraction of the smaller of canvas and content."""
    min_visibility: float = 0.4
    """A box cut by crop, zoom or shift is kept if at least this fraction of its area remains in view (0: if
    anything remains, as in DETR)."""
    brightness: float = 0.0
    """All channels are multiplied by a factor between 1 − brightness and 1 + brightness."""
    contrast: float = 0.0
    """Differences from the image's mean colour are multiplied by a factor between 1 − contrast and 1 + contrast."""
    tint: float = 0.0
    """Each channel is multiplied by a factor of its own between 1 − tint and 1 + tint."""
    gamma: float = 0.0
    """Values in 0–1 are raised to a power between 1/(1 + gamma) and 1 + gamma."""
    reduced_decoding: bool = True
    """Decode a JPEG that is at least twice as large as it is needed to a half, a quarter or an eighth of its size: several times as
    fast. Evaluation and prediction decode all."""

    def __post_init__(self) -> None:
        for name in ("horizontal_flip", "vertical_flip", "crop_probability", "min_visibility"):
            require(0 <= getattr(self, name) <= 1, f"Augmentation: {name}", "a value from 0 to 1", getattr(self, name))
        for name in ("brightness", "contrast", "tint", "shift"):
            require(
                0 <= getattr(self, name) < 1,
                f"Augmentation: {name}",
                "a strength from 0 to below 1",
                getattr(self, name),
            )
        for name in ("stretch", "gamma"):
            require(
                0 <= getattr(self, name) < float("inf"),
                f"Augmentation: {name}",
                "a strength of at least 0",
                getattr(self, name),
            )
        for name in ("short_sides", "crop_short_sides"):
            sides = getattr(self, name)
            require(all(side >= 1 for side in sides), f"Augmentation: {name}", "lengths of at least 1 px", sides)
        require(
            bool(self.crop_short_sides), "Augmentation: crop_short_sides", "at least one length", self.crop_short_sides
        )
        require(
            self.max_size is None or self.max_size >= 1,
            "Augmentation: max_size",
            "at least 1 px, or None",
            self.max_size,
        )
        require(
            1 <= self.crop_size[0] <= self.crop_size[1],
            "Augmentation: crop_size",
            "(least, largest) in px",
            self.crop_size,
        )
        require(
            0 < self.zoom[0] <= self.zoom[1] < float("inf"),
            "Augmentation: zoom",
            "(least, largest), above 0",
            self.zoom,
        )

    @property
    def least_short_side(self) -> float:
        """Pixels of a whole image's shorter side that its result can show: with fewer, some part of it would be enlarged."""
        if not self.short_sides or not self.reduced_decoding:
            return math.inf
        crop = self.crop_size[0] / max(self.crop_short_sides) if self.crop_probability else 1.0
        return max(self.short_sides) / min(crop, 1.0) * max(self.zoom[1], 1.0) * math.sqrt(1 + self.stretch)

    @classmethod
    def evaluation(cls, short_side: int | None, max_size: int | None = None) -> Augmentation:
        """Resize only; `None` for `short_side` keeps the size."""
        sides = () if short_side is None else (short_side,)
        return cls(short_sides=sides, max_size=max_size, reduced_decoding=False)

    @classmethod
    def detr(cls) -> Augmentation:
        """As published for DETR on COCO: sides 480 to 800, at most 1333, flip and crop each for half of the images."""
        return cls(
            short_sides=tuple(range(480, 801, 32)),
            max_size=1333,
            horizontal_flip=0.5,
            crop_probability=0.5,
            min_visibility=0.0,
        )

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        """Return a new sample; `sample` is left as it is.

        Boxes are clipped to the view, those with too little left are removed, and `boxes_xyxy` is in pixels of the
        new image. `original_size` and `image_id` are carried over.
        """
        source_size = sample.image.shape[0], sample.image.shape[1]
        view = self._crop(source_size, rng)
        size = self._output_size(view, rng)
        view = self._zoom(view, rng)
        x_axis = _Axis.of(view[0], view[2], source_size[1], size[1])
        y_axis = _Axis.of(view[1], view[3], source_size[0], size[0])

        image = _resample(sample.image, x_axis, y_axis)
        boxes_xyxy = np.stack([axis(sample.boxes_xyxy[:, i]) for i, axis in enumerate((x_axis, y_axis) * 2)], axis=-1)
        boxes_xyxy, labels = self._visible(boxes_xyxy, sample.labels, size)

        if self.horizontal_flip and rng.random() < self.horizontal_flip:
            image = np.ascontiguousarray(image[:, ::-1])
            boxes_xyxy[:, [0, 2]] = size[1] - boxes_xyxy[:, [2, 0]]
        if self.vertical_flip and rng.random() < self.vertical_flip:
            image = np.ascontiguousarray(image[::-1])
            boxes_xyxy[:, [1, 3]] = size[0] - boxes_xyxy[:, [3, 1]]
        return Sample(self._recolour(image, rng), boxes_xyxy, labels, sample.image_id, sample.original_size)

    def largest_size(self, source_sizes: Iterable[tuple[int, int]]) -> tuple[int, int]:
        """(height, width) in pixels that the results from images of these (height, width) may need together: the largest height
        and the largest width, which may come from different images. A crop counts as if it could be as long as it is ever."""
        heights_widths = []
        for height, width in set(source_sizes):
            views: list[tuple[float, float]] = [(width, height)]
            for short_side in set(self.crop_short_sides) if self.crop_probability else ():
                scale = short_side / min(height, width)
                short, long = (min(side / scale, max(height, width)) for side in self.crop_size)
                views += [(long, short), (short, long)]
            heights_widths += [self._size_at(*view, max(self.short_sides, default=None)) for view in views]
        heights, widths = zip(*heights_widths, strict=True)
        return max(heights), max(widths)

    def _crop(self, source_size: tuple[int, int], rng: np.random.Generator) -> tuple[float, float, float, float]:
        """The part of the image to look at: x, y, width, height in source pixels."""
        height, width = source_size
        if not self.crop_probability or rng.random() >= self.crop_probability:
            return 0.0, 0.0, float(width), float(height)
        scale = int(rng.choice(self.crop_short_sides)) / min(height, width)
        least, largest = self.crop_size
        # In pixels of the image as if resized, then back: only the geometry counts, the pixels are resampled once.
        sides = []
        for side in (width, height):
            limit = int(side * scale)
            crop = int(rng.integers(least, min(largest, limit) + 1)) / scale if limit >= least else float(side)
            sides.append(min(crop, float(side)))
        x, y = (rng.random() * (side - crop) for side, crop in zip((width, height), sides, strict=True))
        return x, y, sides[0], sides[1]

    def _output_size(self, view: tuple[float, float, float, float], rng: np.random.Generator) -> tuple[int, int]:
        """(height, width) in pixels of the result, rounded as in DETR: the longer side down, a limited shorter side to the
        nearest."""
        return self._size_at(view[2], view[3], int(rng.choice(self.short_sides)) if self.short_sides else None)

    def _size_at(self, width: float, height: float, short_side: int | None) -> tuple[int, int]:
        """(height, width) of a view of width × height source pixels, for one of `short_sides`, if there are any."""
        shorter, longer = min(width, height), max(width, height)
        if short_side is None:
            scale = 1.0 if self.max_size is None else min(1.0, self.max_size / longer)
            return max(1, round(height * scale)), max(1, round(width * scale))
        if self.max_size is not None and short_side * longer / shorter > self.max_size:
            short_side = max(1, round(self.max_size * shorter / longer))
        long_side = max(short_side, int(short_side * longer / shorter))
        if self.max_size is not None:  # which rounding a short side of a few pixels up would exceed
            long_side = min(long_side, max(short_side, self.max_size))
        return (short_side, long_side) if height <= width else (long_side, short_side)

    def _zoom(
        self, view: tuple[float, float, float, float], rng: np.random.Generator
    ) -> tuple[float, float, float, float]:
        """The view scaled, stretched and moved; content that grows by f is seen through a window that shrinks by f."""
        x, y, width, height = view
        if self.zoom == (1.0, 1.0) and not self.stretch and not self.shift:
            return view
        scale = np.exp(rng.uniform(*np.log(self.zoom)))
        stretch = np.exp(rng.uniform(-1, 1) * np.log1p(self.stretch) / 2)
        seen_width, seen_height = width / (scale * stretch), height / (scale / stretch)
        # Any position at which the smaller of canvas and content lies inside the larger, then the shift on top. What
        # lies beyond a crop comes back into view here rather than filling: it is real image.
        x += rng.random() * (width - seen_width) + rng.uniform(-1, 1) * self.shift * min(width, seen_width)
        y += rng.random() * (height - seen_height) + rng.uniform(-1, 1) * self.shift * min(height, seen_height)
        return float(x), float(y), float(seen_width), float(seen_height)

    def _visible(self, boxes_xyxy: FloatArray, labels: IntArray, size: tuple[int, int]) -> tuple[FloatArray, IntArray]:
        limits = np.array([size[1], size[0], size[1], size[0]], dtype=np.float64)
        clipped = np.clip(boxes_xyxy, 0.0, limits)
        sides, clipped_sides = boxes_xyxy[:, 2:] - boxes_xyxy[:, :2], clipped[:, 2:] - clipped[:, :2]
        left = clipped_sides.prod(axis=-1)
        # The last factor forgives the rounding of boxes that are wholly in view.
        keep = (clipped_sides > 0).all(axis=-1) & (left >= self.min_visibility * sides.prod(axis=-1) * (1 - 1e-9))
        return clipped[keep], labels[keep]

    def _recolour(self, image: UInt8Array, rng: np.random.Generator) -> UInt8Array:
        """Brightness, tint, contrast and gamma act on single values: one table of 256 entries per channel."""
        if not (self.brightness or self.contrast or self.tint or self.gamma):
            return image
        factor_3 = (1 + rng.uniform(-1, 1) * self.brightness) * (1 + rng.uniform(-1, 1, size=3) * self.tint)
        contrast = 1 + rng.uniform(-1, 1) * self.contrast
        exponent = np.exp(rng.uniform(-1, 1) * np.log1p(self.gamma))
        mean_3 = _mean_colour(image)
        values = np.arange(256.0)[:, None]
        table_256_3 = np.clip(((values - mean_3) * contrast + mean_3) * factor_3, 0, 255)
        table_256_3 = 255 * (table_256_3 / 255) ** exponent
        tables = np.rint(table_256_3).astype(np.uint8).T
        return np.stack([tables[c][image[..., c]] for c in range(3)], axis=-1)


@dataclass(frozen=True)
class _Axis:
    """The linear map of one axis: source interval [low, high) in view → output pixels [start, stop) of `length`."""

    low: float
    high: float
    start: int
    stop: int
    length: int

    @classmethod
    def of(cls, view_start: float, view_length: float, source_length: int, length: int) -> _Axis:
        """Where the border of the image is in view, it is moved to the nearest output pixel, so that image and filling
        meet at a pixel's edge; the scale changes by that fraction of a pixel, for pixels and boxes alike."""
        scale = length / view_length
        low, high = max(0.0, view_start), min(float(source_length), view_start + view_length)
        start = min(round((low - view_start) * scale), length - 1)
        stop = max(round((high - view_start) * scale), start + 1)
        return cls(low, high, start, stop, length)

    def __call__(self, position: FloatArray) -> FloatArray:
        return self.start + (position - self.low) * ((self.stop - self.start) / (self.high - self.low))


def _resample(image: UInt8Array, x: _Axis, y: _Axis) -> UInt8Array:
    """The part of `image` in view, resized (antialiased, bilinear) and laid on a canvas of the mean colour."""
    size = x.stop - x.start, y.stop - y.start
    box = x.low, y.low, x.high, y.high
    if box == (0, 0, image.shape[1], image.shape[0]) and size == (image.shape[1], image.shape[0]):
        part = image
    else:
        part = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BILINEAR, box=box))
    if size == (x.length, y.length):
        return part
    canvas = np.empty((y.length, x.length, 3), dtype=np.uint8)
    canvas[...] = np.rint(_mean_colour(image)).astype(np.uint8)
    canvas[y.start : y.stop, x.start : x.stop] = part
    return canvas


def _mean_colour(image: UInt8Array) -> FloatArray:
    mean: FloatArray = image[::_MEAN_STEP, ::_MEAN_STEP].reshape(-1, 3).mean(axis=0)
    return mean
