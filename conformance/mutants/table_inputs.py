"""Plausible bugs that show with inputs that are seldom tried: strides that do not double, images without padding that fill no whole
cells, boxes near 0 and 1, arrays laid out in another way in memory. Each is one line changed."""

# ruff: noqa: E501 - a table: pieces of source and what they become, side by side

from __future__ import annotations

from smca.conformance.mutants.table import Mutant

INPUTS: list[Mutant] = [
    Mutant(*entry)
    for entry in [
        ("refined boxes through an inverse sigmoid with an ε of 10⁻⁵", "reference", "decoder", "reference_logits = box_logits  # (D9)",
         "p = np.clip(layer_boxes[-1], 1e-5, 1 - 1e-5)\n            reference_logits = np.log(p / (1 - p))"),
        ("finer levels convolved with a stride of 2, whatever theirs", "reference", "encoder_conv", "ratio = grid.stride // grids[j - 1].stride", "ratio = 2"),
        ("coarser cells repeated twice, whatever their stride", "reference", "encoder_conv", "ratio = grids[j + 1].stride // grid.stride", "ratio = 2"),
        ("refined boxes in production through an inverse sigmoid with an ε of 10⁻⁵", "gpu", "model.decoder", "reference_logits = refined[-1][0].detach()",
         "reference_logits = refined[-1][0].detach().sigmoid().clamp(1e-5, 1 - 1e-5).logit()"),
        ("finer levels in production convolved with a stride of 2, whatever theirs", "gpu", "model.encoder_conv", "ratio = self.strides[level] // self.strides[level - 1]", "ratio = 2"),
        ("coarser cells in production repeated twice, whatever their stride", "gpu", "model.encoder_conv", "ratio = self.strides[level + 1] // self.strides[level]", "ratio = 2"),
        ("coarser levels stretched to the finer map", "gpu", "model.encoder_conv", "_fit(coarse.repeat_interleave(ratio, dim=2).repeat_interleave(ratio, dim=3), grid.size)",
         "functional.interpolate(coarse, size=grid.size)"),
        ("unpadded images taken as whole cells", "gpu", "model.levels", "return Grid(size, valid_cells, None)", "return Grid(size, valid_cells.ceil(), None)"),
        ("made levels of unpadded images as large in cells as the backbone's last", "gpu", "model.levels", "valid_cells = (level_map.shape[-2], level_map.shape[-1]), self.valid_sizes / stride",
         "valid_cells = (level_map.shape[-2], level_map.shape[-1]), self.valid_sizes / (stride if self.padded else min(stride, 8))"),
    ]
]  # fmt: skip

LAYOUT: list[Mutant] = [
    Mutant(*entry)
    for entry in [
        ("fused: channels taken to be adjacent", "gpu", "attention.fused", "return tensor if tensor.stride(-1) == 1 else tensor.contiguous()", "return tensor"),
        ("fused: mask taken to be contiguous", "gpu", "attention.fused", "mask.contiguous().view(torch.uint8)", "mask.view(torch.uint8)"),
        ("kernel: v with the strides of k", "gpu", "attention.fused_kernels", "v = _rows(_head(v_ptr, v_strides, b, h), key, v_strides[2]", "v = _rows(_head(v_ptr, k_strides, b, h), key, k_strides[2]"),
        ("kernel: gradient with the strides of the output", "gpu", "attention.fused_kernels", "grad = _rows(_head(grad_ptr, grad_strides, b, h), query, grad_strides[2]",
         "grad = _rows(_head(grad_ptr, out_strides, b, h), query, out_strides[2]"),
    ]
]  # fmt: skip
"""Bugs in the fused kernels and in what calls them; they need Triton, and take seconds each in its interpreter."""
