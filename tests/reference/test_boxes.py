"""smca.reference.boxes: formats, and IoU and GIoU by hand, by counting cells, and by their properties."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from smca.reference.boxes import box_iou, cxcywh_to_xyxy, generalized_box_iou, xyxy_to_cxcywh


def random_boxes(count: int, seed: int, high: int = 12) -> Any:
    """[count, 4] xyxy with integer corners and an area."""
    rng = np.random.default_rng(seed)
    low = rng.integers(0, high - 1, size=(count, 2))
    return np.concatenate([low, low + rng.integers(1, high - low + 1)], axis=1).astype(float)


def every_pair(measure: Any, a: Any, b: Any) -> Any:
    """[n, 4], [m, 4] → [n, m]."""
    return measure(a[:, None], b)


def test_formats_invert_each_other() -> None:
    boxes = random_boxes(50, 0)
    np.testing.assert_allclose(cxcywh_to_xyxy(xyxy_to_cxcywh(boxes)), boxes, rtol=1e-15)
    assert xyxy_to_cxcywh(np.array([[0.0, 1.0, 4.0, 3.0]])).tolist() == [[2.0, 2.0, 4.0, 2.0]]
    assert cxcywh_to_xyxy(boxes.reshape(5, 10, 4)).shape == (5, 10, 4)


def test_iou_and_giou_by_counting_cells() -> None:
    """Areas of boxes with integer corners, counted on a grid."""
    a, b = random_boxes(8, 1), random_boxes(9, 2)
    cell = np.arange(12) + 0.5

    def covers(box: Any) -> Any:
        left, top, right, bottom = box
        return ((cell > left) & (cell < right))[None, :] & ((cell > top) & (cell < bottom))[:, None]

    for i, j in np.ndindex(8, 9):
        both, either = (covers(a[i]) & covers(b[j])).sum(), (covers(a[i]) | covers(b[j])).sum()
        hull = covers(np.concatenate([np.minimum(a[i], b[j])[:2], np.maximum(a[i], b[j])[2:]])).sum()
        assert box_iou(a[i], b[j]) == pytest.approx(both / either, rel=1e-14)
        assert generalized_box_iou(a[i], b[j]) == pytest.approx(both / either - (hull - either) / hull, rel=1e-13)


def test_giou_by_hand() -> None:
    a = np.array([[0.0, 0.0, 2.0, 2.0]])
    b = np.array([[1.0, 1.0, 3.0, 3.0], [4.0, 0.0, 6.0, 2.0], [0.0, 0.0, 2.0, 2.0], [0.5, 0.5, 1.5, 1.5]])
    # shares 1 of 7 in a hull of 9; two apart in a hull of 12; equal; inside
    np.testing.assert_allclose(every_pair(generalized_box_iou, a, b), [[1 / 7 - 2 / 9, -4 / 12, 1.0, 0.25]], rtol=1e-14)
    np.testing.assert_allclose(every_pair(box_iou, a, b), [[1 / 7, 0.0, 1.0, 0.25]], rtol=1e-14)


def test_giou_properties() -> None:
    a, b = random_boxes(20, 3), random_boxes(30, 4)
    giou, iou = every_pair(generalized_box_iou, a, b), every_pair(box_iou, a, b)
    assert giou.shape == (20, 30)
    assert (giou <= iou + 1e-15).all()
    assert giou.min() > -1
    assert giou.min() < -0.5  # the sample does reach far apart
    np.testing.assert_allclose(giou, every_pair(generalized_box_iou, b, a).T, rtol=1e-14)
    np.testing.assert_allclose(generalized_box_iou(a, a), 1.0, rtol=1e-14)
    np.testing.assert_allclose(every_pair(generalized_box_iou, 7 * a + 3, 7 * b + 3), giou, rtol=1e-10, atol=1e-14)
    turned_a, turned_b = a[:, [1, 0, 3, 2]], b[:, [1, 0, 3, 2]]
    np.testing.assert_allclose(every_pair(generalized_box_iou, turned_a, turned_b), giou, rtol=1e-13, atol=1e-15)


def test_boxes_without_area_give_numbers() -> None:
    point, line = [1.0, 1.0, 1.0, 1.0], [0.0, 1.0, 4.0, 1.0]
    elsewhere, square = [3.0, 3.0, 3.0, 3.0], [0.0, 0.0, 2.0, 2.0]
    boxes = np.array([point, line, elsewhere, square])
    assert not every_pair(box_iou, boxes[:3], boxes).any()
    expected = [
        [0.0, 0.0, -1.0, 0.0],  # point: with itself, on a line, apart from another point, within a square
        [0.0, 0.0, -1.0, -0.5],  # line: hull with the square is 4 × 2, of which the square fills half
        [-1.0, -1.0, 0.0, 4 / 9 - 1],
    ]
    np.testing.assert_allclose(every_pair(generalized_box_iou, boxes[:3], boxes), expected, rtol=1e-14)


def test_no_boxes_are_legal() -> None:
    assert every_pair(generalized_box_iou, np.zeros((0, 4)), random_boxes(3, 5)).shape == (0, 3)
    assert every_pair(box_iou, random_boxes(3, 5), np.zeros((0, 4))).shape == (3, 0)


def test_bad_boxes_are_named() -> None:
    good = random_boxes(2, 6)
    with pytest.raises(ValueError, match=r"boxes2_xyxy\[1\]: expected left ≤ right .* got \[3.0, 0.0, 1.0, 1.0\]"):
        box_iou(good, np.array([[0.0, 0.0, 1.0, 1.0], [3.0, 0.0, 1.0, 1.0]]))
    with pytest.raises(ValueError, match=r"boxes2_xyxy\[1, 0\]: expected left ≤ right"):
        box_iou(good, np.array([[[0.0, 0.0, 1.0, 1.0]], [[3.0, 0.0, 1.0, 1.0]]]))
    with pytest.raises(ValueError, match=r"boxes1_xyxy: expected shape \(..., 4\), got \(2, 3\)"):
        generalized_box_iou(good[:, :3], good)
    with pytest.raises(ValueError, match=r"boxes_cxcywh: expected shape \(..., 4\), got \(2, 3\)"):
        cxcywh_to_xyxy(good[:, :3])
    with pytest.raises(ValueError, match=r"boxes_xyxy: expected shape"):
        xyxy_to_cxcywh(np.array(1.0))
