"""A program that answers for GIoU, with the bad habit that its argument names: `exec:python misbehaving_port.py HABIT`."""

from __future__ import annotations

import os
import sys
import time

from smca.conformance.implementations.oracle import Oracle
from smca.conformance.wire import packed, unpacked

DESCRIPTION = {"name": "misbehaving port", "dtypes": "float64", "operations": "generalized_box_iou"}


def answer(data: bytes) -> None:
    sys.stdout.buffer.write(len(data).to_bytes(8, "little") + data)
    sys.stdout.buffer.flush()


def main(habit: str) -> None:
    while start := sys.stdin.buffer.read(8):
        tensors, texts = unpacked(sys.stdin.buffer.read(int.from_bytes(start, "little")))
        if texts["operation"] == "describe":
            answer(packed({}, {} if habit == "says nothing" else DESCRIPTION))
            continue
        giou = Oracle().generalized_box_iou(tensors["boxes1"], tensors["boxes2"], dtype="float64")
        if len(tensors["boxes2"]) <= 2:
            answer(packed({"giou": giou}, {}))
        elif habit == "hangs":
            time.sleep(1000)
        elif habit == "ends":
            print("out of memory", file=sys.stderr)
            os._exit(7)
        elif habit == "prints":
            print("progress: 10%", flush=True)
            answer(packed({"giou": giou}, {}))
        elif habit == "stops halfway":
            sys.stdout.buffer.write((1000).to_bytes(8, "little") + b"half")
            sys.stdout.buffer.flush()
            os._exit(0)
        elif habit == "sends nonsense":
            answer(b"nonsense" * 4)
        elif habit == "forgets the result":
            answer(packed({"iou": giou}, {}))
        else:
            answer(packed({}, {"error": f"no such habit: {habit}"}))


if __name__ == "__main__":
    main(sys.argv[1])
