"""Plausible bugs in half precision and under autocast, each one line of the production code changed. Each name begins with the backend
that it shows in."""

# ruff: noqa: E501 - a table: pieces of source and what they become, side by side

from __future__ import annotations

from smca.conformance.mutants.table import Mutant

PRECISION: list[Mutant] = [
    Mutant(*entry)
    for entry in [
        ("autocast: inside the lifted form, too", "gpu", "attention.lifted",
         "(dtype != torch.float32 or autocast):", "dtype != torch.float32:"),
        ("autocast: centres and precisions cast with q", "gpu", "attention.fused",
         "q, k, v = (tensor.to(dtype) if tensor.dtype in DTYPES else tensor for tensor in (q, k, v))",
         "q, k, v, center_xy, precision_xy = (x.to(dtype) for x in (q, k, v, center_xy, precision_xy))"),
        ("lifted: centres rounded to q's dtype", "gpu", "attention.lifted",
         "(tensor.float() for tensor in (q, k, v, center_xy, precision_xy))", "(tensor.to(dtype).float() for tensor in (q, k, v, center_xy, precision_xy))"),
        ("lifted: the map's positions in half precision", "gpu", "attention.lifted",
         "key_terms = torch.stack([x.square(), y.square(), x, y], dim=-1)", "key_terms = torch.stack([x.square(), y.square(), x, y], dim=-1).bfloat16().to(k.dtype)"),
        ("eager: centres rounded to q's dtype", "gpu", "attention.eager",
         "center_xy.to(logit_dtype), precision_xy", "center_xy.to(q.dtype).to(logit_dtype), precision_xy"),
        ("eager: precisions rounded to q's dtype", "gpu", "attention.eager",
         "precision_xy.to(logit_dtype)\n", "precision_xy.to(q.dtype).to(logit_dtype)\n"),
        ("eager: softmax in half precision", "gpu", "attention.eager", "weights: Tensor = logits.softmax(dim=-1)", "weights: Tensor = logits.to(q.dtype).softmax(dim=-1)"),
        ("fused: centres rounded to q's dtype", "gpu", "attention.fused",
         "center_xy.float().contiguous(), ", "center_xy.to(q.dtype).float().contiguous(), "),
        ("fused: precisions rounded to q's dtype", "gpu", "attention.fused",
         "precision_xy.float().contiguous()\n", "precision_xy.to(q.dtype).float().contiguous()\n"),
        ("kernel: sums rounded at every block", "gpu", "attention.fused_kernels",
         "acc=summed * shrink[:, None], input_precision=PRECISION)",
         "acc=summed * shrink[:, None], input_precision=PRECISION).to(v_head.dtype.element_ty).to(tl.float32)"),
        ("kernel: the sum of weights rounded at every block", "gpu", "attention.fused_kernels",
         "total = total * shrink + tl.sum(weights, axis=1)", "total = (total * shrink + tl.sum(weights, axis=1)).to(v_head.dtype.element_ty).to(tl.float32)"),
    ]
]  # fmt: skip
"""Bugs that show in half precision only."""
