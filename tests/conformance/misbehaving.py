"""Implementations of GIoU, each with one bad habit."""

from __future__ import annotations

import os
import time
from typing import Any

import numpy as np

from smca.conformance.implementations.oracle import Oracle

ORACLE = Oracle()


class Right:
    """What misbehaves below does so where the second set has more than two boxes."""

    dtypes = ("float64",)
    asked = 0

    def generalized_box_iou(self, boxes1: Any, boxes2: Any, *, dtype: str) -> Any:
        self.asked += 1
        answer = ORACLE.generalized_box_iou(boxes1, boxes2, dtype=dtype)
        return self.spoil(answer, boxes1) if len(boxes2) > 2 else answer

    def spoil(self, answer: Any, boxes1: Any) -> Any:
        return answer


class Raises(Right):
    def spoil(self, answer: Any, boxes1: Any) -> Any:
        raise KeyError("no such box")


class ReturnsNone(Right):
    def spoil(self, answer: Any, boxes1: Any) -> Any:
        return None


class ReturnsADictionary(Right):
    def spoil(self, answer: Any, boxes1: Any) -> Any:
        return {"giou": answer}


class ReturnsTheTransposed(Right):
    def spoil(self, answer: Any, boxes1: Any) -> Any:
        return np.vstack([answer, answer])


class ReturnsFloat32(Right):
    def spoil(self, answer: Any, boxes1: Any) -> Any:
        return answer.astype(np.float32)


class ReturnsComplex(Right):
    def spoil(self, answer: Any, boxes1: Any) -> Any:
        return answer + 0j


class Writes(Right):
    def spoil(self, answer: Any, boxes1: Any) -> Any:
        boxes1 *= 2
        return answer


class AlternatesAnswers(Right):
    def spoil(self, answer: Any, boxes1: Any) -> Any:
        return answer + 0.1 * (self.asked % 2)


class FailsOnce(Right):
    spoiled = 0

    def spoil(self, answer: Any, boxes1: Any) -> Any:
        self.spoiled += 1
        return answer + (self.spoiled == 5)


class KeepsByShape(Right):
    """A cache that forgets to look at the numbers."""

    def __init__(self) -> None:
        self.kept: dict[Any, Any] = {}

    def generalized_box_iou(self, boxes1: Any, boxes2: Any, *, dtype: str) -> Any:
        answer = super().generalized_box_iou(boxes1, boxes2, dtype=dtype)
        return self.kept.setdefault(answer.shape, answer)


class DriftsAway(Right):
    """Right as long as it is compared, and otherwise later on."""

    def generalized_box_iou(self, boxes1: Any, boxes2: Any, *, dtype: str) -> Any:
        first = self.__dict__.setdefault("first", (boxes1.copy(), boxes2.copy())) if len(boxes2) else (None, None)
        again = self.asked > 5 and np.array_equal(first[0], boxes1) and np.array_equal(first[1], boxes2)
        return super().generalized_box_iou(boxes1, boxes2, dtype=dtype) + 0.1 * again


class Hangs(Right):
    def spoil(self, answer: Any, boxes1: Any) -> Any:
        time.sleep(1000)


class Dies(Right):
    def spoil(self, answer: Any, boxes1: Any) -> Any:
        os.abort()


class Exits(Right):
    def spoil(self, answer: Any, boxes1: Any) -> Any:
        raise SystemExit(3)


class Prints(Right):
    def spoil(self, answer: Any, boxes1: Any) -> Any:
        print("one more")
        os.write(1, b"and not through Python\n")
        return answer


class IsSlow(Right):
    def spoil(self, answer: Any, boxes1: Any) -> Any:
        time.sleep(1.1 * (answer.shape[1] == 5))
        return answer
