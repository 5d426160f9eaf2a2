"""Imported before anything that imports Triton: without a GPU its kernels run in its interpreter, chosen at that moment."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
torch.set_num_threads(1)  # examples are small: more threads would only wait for each other
