"""collate: padding, masks and normalised targets."""

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from smca.datasets import Augmentation, Augmented, Category, DetectionDataset, Report, Sample, SyntheticShapes, collate


def sample(height: int, width: int, boxes: list[list[float]], labels: list[int], image_id: int = 1) -> Sample:
    image = np.random.default_rng(image_id).integers(1, 256, size=(height, width, 3), dtype=np.uint8)
    boxes_xyxy = np.array(boxes, dtype=np.float64).reshape(-1, 4)
    return Sample(image, boxes_xyxy, np.array(labels, dtype=np.int64), image_id, (2 * height, 3 * width))


def test_images_are_padded_with_zeros_at_the_right_and_at_the_bottom() -> None:
    small, wide = sample(4, 6, [], [], 1), sample(3, 10, [], [], 2)
    batch = collate([small, wide])
    assert batch.images.shape == (2, 3, 4, 10)
    assert batch.images.dtype == torch.uint8
    assert batch.images.is_contiguous(memory_format=torch.channels_last)
    np.testing.assert_array_equal(batch.images[0, :, :4, :6].permute(1, 2, 0), small.image)
    np.testing.assert_array_equal(batch.images[1, :, :3, :10].permute(1, 2, 0), wide.image)
    assert batch.images.sum() == small.image.sum() + wide.image.sum()  # zeros everywhere else
    # The images have no zero of their own, so the mask is exactly where the batch is zero.
    assert torch.equal(batch.padding_mask, (batch.images == 0).all(dim=1))
    assert batch.padding_mask.dtype == torch.bool
    assert batch.original_sizes.tolist() == [[8, 18], [6, 30]]
    assert batch.image_ids.tolist() == [1, 2]
    assert len(batch) == 2


def test_boxes_are_normalised_by_the_unpadded_size() -> None:
    batch = collate([sample(10, 20, [[2, 1, 6, 9]], [3]), sample(40, 80, [[0, 0, 80, 40], [8, 4, 16, 12]], [1, 2])])
    expected = [
        [[4 / 20, 5 / 10, 4 / 20, 8 / 10], [0, 0, 0, 0]],
        [[0.5, 0.5, 1, 1], [12 / 80, 8 / 40, 8 / 80, 8 / 40]],
    ]
    assert batch.targets.boxes.dtype == torch.float32
    np.testing.assert_allclose(batch.targets.boxes, expected, atol=1e-7)
    assert batch.targets.labels.tolist() == [[3, 0], [1, 2]]
    assert batch.targets.valid.tolist() == [[True, False], [True, True]]


def test_a_batch_without_a_box_has_one_invalid_target() -> None:
    batch = collate([sample(5, 5, [], []), sample(5, 5, [], [])])
    assert batch.targets.boxes.shape == (2, 1, 4)
    assert batch.targets.labels.shape == (2, 1)
    assert batch.targets.labels.dtype == torch.int64
    assert not batch.targets.valid.any()


def test_size_divisor_rounds_the_padded_size_up() -> None:
    batch = collate([sample(33, 64, [[0, 0, 64, 33]], [0])], size_divisor=32)
    assert batch.images.shape == (1, 3, 64, 64)
    np.testing.assert_allclose(batch.targets.boxes, [[[0.5, 0.5, 1, 1]]])
    assert batch.padding_mask[0].sum() == 31 * 64


def test_target_divisor_rounds_the_number_of_targets_up() -> None:
    box = [0.0, 0.0, 1.0, 1.0]
    batch = collate([sample(5, 5, [box] * 5, [0] * 5), sample(5, 5, [], [])], target_divisor=4)
    assert batch.targets.boxes.shape == (2, 8, 4)
    assert batch.targets.valid.tolist() == [[True] * 5 + [False] * 3, [False] * 8]


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="at least one sample"):
        collate([])
    with pytest.raises(ValueError, match="size_divisor ≥ 1, got 0"):
        collate([sample(5, 5, [], [])], size_divisor=0)
    with pytest.raises(ValueError, match="target_divisor ≥ 1, got -1"):
        collate([sample(5, 5, [], [])], target_divisor=-1)


def test_to_moves_every_tensor() -> None:
    batch = collate([sample(5, 5, [[0, 0, 1, 1]], [0])]).to("meta")
    targets = batch.targets
    tensors = [*vars(batch).values(), targets.labels, targets.boxes, targets.valid]
    assert {t.device.type for t in tensors if isinstance(t, torch.Tensor)} == {"meta"}
    assert batch.images.dtype == torch.uint8


def test_a_loader_with_a_worker_gives_the_same_batches_and_hears_of_the_epoch() -> None:
    augmented = Augmented(SyntheticShapes(6, seed=1, image_size=64), Augmentation(zoom=(0.5, 2.0), tint=0.3), seed=5)
    plain = DataLoader(augmented, batch_size=3, collate_fn=collate)
    persistent = DataLoader(augmented, batch_size=3, collate_fn=collate, num_workers=1, persistent_workers=True)
    seen = []
    for epoch in (0, 1, 0):
        augmented.set_epoch(epoch)
        images = [batch.images for batch in persistent]
        assert all(torch.equal(a, b.images) for a, b in zip(images, plain, strict=True))
        seen.append(torch.cat(images))
    assert not torch.equal(seen[0], seen[1])
    assert torch.equal(seen[0], seen[2])


def test_the_report_is_one_line_with_what_matters() -> None:
    assert str(Report(images=1200, boxes=3, classes=2)) == "1,200 images (0 empty) · 3 boxes of 2 classes"
    full = str(
        Report(9, 8, 7, empty_images=6, crowds=5, degenerate=4, outside=3, clipped=2, unused_classes=("cat", "dog"))
    )
    for part in ("6 empty", "5 crowd", "4 degenerate", "3 outside", "clipped 2", "no box of cat, dog"):
        assert part in full
    assert "\n" not in full


class Squares(DetectionDataset):
    """Two images, of which the second was stored twice as large, and one without objects."""

    categories = (Category(7, "a"), Category(9, "b"))

    def __init__(self, label: int = 1, image_id: int = 2) -> None:
        self.label, self.image_id = label, image_id

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> Sample:
        boxes = np.array([[1.0, 2.0, 5.0, 4.0]] * (index < 2)).reshape(-1, 4)
        labels = np.array([self.label] * (index < 2), dtype=np.int64)
        image_id = (1, self.image_id, 3)[index]
        size = (20, 16) if index == 1 else (10, 8)
        return Sample(np.zeros((10, 8, 3), np.uint8), boxes, labels, image_id=image_id, original_size=size)


def test_report_and_ground_truth_of_a_dataset_of_ones_own() -> None:
    data = Squares()
    assert str(data.report) == "3 images (1 empty) · 2 boxes of 2 classes"
    truth = data.ground_truth()
    assert [(a["id"], a["image_id"], a["category_id"], a["bbox"], a["area"]) for a in truth["annotations"]] == [
        (1, 1, 9, [1, 2, 4, 2], 8),
        (2, 2, 9, [2, 4, 8, 4], 32),
    ]
    assert truth["images"][1] == {"id": 2, "width": 16, "height": 20}
    assert truth["categories"] == [{"id": 7, "name": "a"}, {"id": 9, "name": "b"}]


def test_mistakes_of_a_dataset_of_ones_own_are_named() -> None:
    with pytest.raises(ValueError, match="sample 0: label 2 is not an index into the 2 categories"):
        Squares(label=2).ground_truth()
    with pytest.raises(ValueError, match="sample 1: image_id 1 occurs twice"):
        Squares(image_id=1).ground_truth()
