"""The conformance suite. Start with docs/conformance.md, or `smca conformance --list`."""

import os

import torch

if not torch.cuda.is_available():
    # Without a GPU the Triton kernels run in Triton's interpreter, which must be chosen before anything imports Triton.
    os.environ.setdefault("TRITON_INTERPRET", "1")
