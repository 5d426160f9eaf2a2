"""Plausible bugs, each one line of the production code changed. What is not in the tables, and why: `table`."""

# ruff: noqa: E501 - a table: pieces of source and what they become, side by side

from __future__ import annotations

from smca.conformance.mutants.table import Mutant

PRODUCTION: list[Mutant] = [
    Mutant(*entry)
    for entry in [
        ("lifted: ½ forgotten", "gpu", "attention.lifted", "[q * channels**-0.5, -0.5 * precision, precision * center]",
         "[q * channels**-0.5, -precision, precision * center]"),
        ("lifted: x² and y² swapped", "gpu", "attention.lifted", "[x.square(), y.square(), x, y]", "[y.square(), x.square(), x, y]"),
        ("lifted: centre from the corner, cells from the middle", "gpu", "attention.lifted",
         "center_xy[..., 0] - size[1] / 2", "center_xy[..., 0]"),
        ("lifted: scaled by the lifted width", "gpu", "attention.lifted", "scale=1.0)", "scale=(channels / q_lifted.shape[-1]) ** 0.5)"),
        ("lifted: padded values not cleared", "gpu", "attention.lifted",
         "k, v = k.masked_fill(padded, 0.0), v.masked_fill(padded, 0.0)\n        mask_term",
         "k = k.masked_fill(padded, 0.0)\n        mask_term"),
        ("lifted: half precision left as it is", "gpu", "attention.lifted",
         "dtype != torch.float64 and (dtype != torch.float32", "dtype == torch.int8 and (dtype != torch.float32"),
        ("auto: lifted however narrow the prior", "gpu", "attention.dispatch", "LIFTED_LOGIT_LIMIT = 512.0", "LIFTED_LOGIT_LIMIT = 1e12"),
        ("auto: the reach of a prior from the map's height alone", "gpu", "attention.dispatch", "(max(size) / 2) ** 2", "(size[0] / 2) ** 2"),
        ("eager: prior in the dtype of q", "gpu", "attention.eager",
         "logit_dtype = torch.promote_types(q.dtype, torch.float32)", "logit_dtype = q.dtype"),
        ("eager: q not scaled before the product", "gpu", "attention.eager",
         "(q * q.shape[-1] ** -0.5 @ k.transpose(-1, -2)).to(logit_dtype)",
         "(q @ k.transpose(-1, -2)).to(logit_dtype) / q.shape[-1] ** 0.5"),
        ("levels: weights cut from the graph", "gpu", "attention.dispatch",
         "weight[:, None, :, None].to(attended.dtype)", "weight.detach()[:, None, :, None].to(attended.dtype) + 0 * weight[:, None, :, None]"),
        ("one-hot target at the wrong query", "gpu", "loss.criterion", "query * classes + labels", "labels * classes + query"),
        ("padded targets matched", "gpu", "loss.criterion", "matched = query >= 0", "matched = query >= -1"),
        ("focal loss: gradient through the weight cut", "gpu", "loss.classification",
         "miss = p * (1 - targets) + (1 - p) * targets", "miss = (p * (1 - targets) + (1 - p) * targets).detach()"),
        ("boxes cut from the graph in GIoU", "gpu", "loss.criterion",
         "generalized_box_iou(*corners)) * matched", "generalized_box_iou(corners[0].detach(), corners[1])) * matched"),
        ("NaN of padded targets let in", "gpu", "loss.criterion", "true = true.masked_fill(~matched[..., None], 0.0)", "true = true + 0.0"),
        ("GIoU without a floor for empty hulls", "gpu", "loss.boxes", "hull.clamp(min=tiny)", "hull"),
        ("matching cost with α = ¾", "gpu", "loss.matcher", "FOCAL_ALPHA = 0.25", "FOCAL_ALPHA = 0.75"),
        ("targets of the image before", "gpu", "loss.matcher", "targets.labels[None, :, None]", "targets.labels.roll(1, 0)[None, :, None]"),
        ("padding between objects not counted", "gpu", "loss.matcher", "matched[layer, image, column[cols]] = rows",
         "matched[layer, image, cols] = rows"),
        ("query and target of a pair mixed up", "gpu", "loss.matcher", "matched[layer, image, column[cols]] = rows",
         "matched[layer, image, column[cols]] = rows[::-1].copy()"),
        # The model
        ("centre's gradient cut at the prior", "gpu", "model.decoder",
         "if self.has_anchors else reference_logits).sigmoid()", "if self.has_anchors else reference_logits.detach()).sigmoid()"),
        ("reference centre's gradient cut at the boxes", "gpu", "model.decoder",
         "decoded).to(dtype) + reference_logits]", "decoded).to(dtype) + reference_logits.detach()]"),
        ("level weights' gradient cut", "gpu", "model.decoder",
         "self.level_head(state).softmax(dim=-1)", "self.level_head(state).softmax(dim=-1).detach()"),
        ("level weights normalised over the queries", "gpu", "model.decoder",
         "self.level_head(state).softmax(dim=-1)", "self.level_head(state).softmax(dim=1)"),
        ("query state after the self-attention for that before", "gpu", "model.decoder",
         "entering if self.prior_state == \"entering\" else t", "t"),
        ("cells counted at their middle", "gpu", "model.position", "torch.minimum(number, whole)", "torch.minimum(number - 0.5, whole)"),
        ("nearest pixel by the stride", "gpu", "model.position",
         "torch.arange(cells, device=valid_sizes.device) * padded_size[axis] // cells",
         "torch.arange(cells, device=valid_sizes.device) * (padded_size[axis] // cells)"),
        ("width of the first level for all", "gpu", "model.prior", "(stride / sigma) ** 2 for stride, sigma in levels",
         "(stride / config.sigma_of_levels[0]) ** 2 for stride, sigma in levels"),
        ("keys without their position", "gpu", "model.decoder", "memory_pos = memory + pos", "memory_pos = memory + 0 * pos"),
        ("refined boxes from the first layer's head", "gpu", "model.decoder", "self.box_heads[index], states[-1]",
         "self.box_heads[0], states[-1]"),
        ("refinement from the reference centre instead of the box before", "gpu", "model.decoder",
         "reference_logits = refined[-1][0].detach()", "reference_logits = reference_logits + 0.0"),
        ("offset of the first level for all", "gpu", "model.prior", "offsets[..., level, :]", "offsets[..., 0, :]"),
        ("width of the prior in the first level's cells", "gpu", "model.prior",
         "= self.unit_precision[level]", "= self.unit_precision[0]"),
        ("centre scaled by height and width swapped", "gpu", "model.prior", "grid.valid_cells.flip(-1)", "grid.valid_cells"),
        ("scale's gradient cut", "gpu", "model.prior", "else r[..., level, :].square()", "else r[..., level, :].square().detach()"),
        ("heads and levels of the prior mixed up", "gpu", "model.prior",
         "x.reshape(*x.shape[:2], self.gaussians, levels, -1).transpose(1, 2)",
         "x.reshape(*x.shape[:2], levels, self.gaussians, -1).transpose(2, 3).transpose(1, 2)"),
        ("padded cells convolved", "gpu", "model.encoder_conv",
         "zero_padding(map_of_tokens(tokens, grid), grid)", "map_of_tokens(tokens, grid)"),
        ("convolution: the coarser level's kernel for the finer", "gpu", "model.encoder_conv",
         "functional.conv2d(maps[level - 1], self.finer.weight,", "functional.conv2d(maps[level - 1], self.coarser.weight,"),
        ("convolution: levels aligned by their middle", "gpu", "model.encoder_conv",
         "    x = x[:, :, : size[0], : size[1]]\n", "    x = x[:, :, -size[0] :, -size[1] :]\n"),
        ("authors' encoder: one kernel for all levels", "gpu", "model.encoder_conv",
         "kernel(map_of_tokens(x, grid)) for kernel", "self.own[0](map_of_tokens(x, grid)) for kernel"),
        ("authors' encoder: corners between cells", "gpu", "model.encoder_conv", "align_corners=True", "align_corners=False"),
        ("authors' encoder: what was exchanged is exchanged again", "gpu", "model.encoder_conv",
         "self.finer(own[level - 1])", "self.finer(mixed[level - 1])"),
        ("authors' encoder: nearest cell instead of a line between two", "gpu", "model.encoder_conv",
         'mode="bilinear", align_corners=True', 'mode="nearest-exact"'),
        ("authors' encoder: positions in no block", "gpu", "model.encoder_conv", "self.in_proj(x + pos)", "self.in_proj(x)"),
        ("a level beyond the backbone's sees padding", "gpu", "model.levels",
         "source = zero_padding(features[-1], grids[-1]) if", "source = features[-1] if"),
        ("halved level: padded cells seen", "gpu", "model.levels", "convolution(zero_padding(level_map, grid))", "convolution(level_map)"),
        ("halved level: image as large in cells as before", "gpu", "model.levels", "extent.grid(stride, half)", "extent.grid(stride // 2, half)"),
        ("halved level: width of the prior as before", "gpu", "model.prior", "zip(config.decoder_strides, config.sigma", "zip(config.strides, config.sigma"),
        ("levels never cross", "gpu", "model.encoder", "if self.crosses_levels or len(grids) == 1:", "if len(grids) == 1:"),
        ("values carry their position", "gpu", "model.encoder", "self.self_attn.project(x + pos, x + pos, x)",
         "self.self_attn.project(x + pos, x + pos, x + pos)"),
    ]
]  # fmt: skip

KERNELS: list[Mutant] = [
    Mutant(*entry)
    for entry in [
        ("kernel: cells of a row at i for i + ½", "gpu", "attention.fused_kernels",
         "return (key % W).to(tl.float32) + 0.5\n", "return (key % W).to(tl.float32)\n"),
        ("kernel: x and y of a key swapped", "gpu", "attention.fused_kernels",
         "ux, uy = _cell_x(key, W) - px, _cell_y(key, W) - py", "ux, uy = _cell_y(key, W) - px, _cell_x(key, W) - py"),
        ("kernel: mask not read", "gpu", "attention.fused_kernels",
         "real_keys = real_keys & (tl.load(mask_ptr + first + key, mask=real_keys, other=1) == 0)", "real_keys = real_keys & (key >= 0)"),
        ("kernel: mask of the next key", "gpu", "attention.fused_kernels", "mask_ptr + first + key,", "mask_ptr + first + (key + 1) % L,"),
        ("kernel: ½ forgotten in log G", "gpu", "attention.fused_kernels", "- (0.5 * LOG2_E) * (lx", "- LOG2_E * (lx"),
        ("kernel: log₂e forgotten with q·k", "gpu", "attention.fused_kernels", "logits = logits * (scale * LOG2_E) -", "logits = logits * scale -"),
        ("kernel: precisions of the axes swapped", "gpu", "attention.fused_kernels",
         "(lx * ux * (ux + tx) + ly * uy * (uy + ty))", "(ly * ux * (ux + tx) + lx * uy * (uy + ty))"),
        ("kernel: centre held inside the map", "gpu", "attention.fused_kernels", "return near, 2.0 * (near - center),", "return near, 0.0 * center,"),
        ("kernel: running sum not shrunk when the maximum rises", "gpu", "attention.fused_kernels",
         "total = total * shrink + tl.sum(weights, axis=1)", "total = total + tl.sum(weights, axis=1)"),
        ("kernel: output not shrunk when the maximum rises", "gpu", "attention.fused_kernels",
         "acc=summed * shrink[:, None]", "acc=summed"),
        ("kernel: last block of keys left out", "gpu", "attention.fused_kernels",
         "    summed = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)\n    for start in range(0, L, BLOCK_L):",
         "    summed = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)\n    for start in range(0, L - L % BLOCK_L + (L < BLOCK_L), BLOCK_L):"),
        ("kernel: delta forgotten for k̄", "gpu", "attention.fused_kernels", "weights * (dweights - delta[None, :])", "weights * dweights"),
        ("kernel: delta forgotten for q̄, c̄ and λ̄", "gpu", "attention.fused_kernels", "weights * (dweights - delta[:, None])", "weights * dweights"),
        ("kernel: c̄ without λ", "gpu", "attention.fused_kernels", "tl.store(dcenter_ptr + at, lx * sum_x, mask=real)",
         "tl.store(dcenter_ptr + at, sum_x, mask=real)"),
        ("kernel: λ̄ of y from x", "gpu", "attention.fused_kernels", "tl.store(dprecision_ptr + at + 1, -0.5 * sum_yy, mask=real)",
         "tl.store(dprecision_ptr + at + 1, -0.5 * sum_xx, mask=real)"),
        ("kernel: √d missing in k̄", "gpu", "attention.fused_kernels", "key < L, dk * scale, D, BLOCK_D)",
         "key < L, dk, D, BLOCK_D)"),
        ("kernel: last queries left out of k̄ and v̄", "gpu", "attention.fused_kernels", "for start in range(0, N, BLOCK_N):",
         "for start in range(0, N - N % BLOCK_N + (N < BLOCK_N), BLOCK_N):"),
    ]
]  # fmt: skip
"""Bugs in the fused kernels; they need Triton, and take seconds each in its interpreter."""

DROPOUT: list[Mutant] = [
    Mutant(*entry)
    for entry in [
        ("kernel: dropout of key and query swapped backwards", "gpu", "attention.fused_kernels",
         "kept = _kept(seed, bh, query[None, :], key[:, None], dropout)",
         "kept = _kept(seed, bh, key[:, None], query[None, :], dropout)"),
        ("kernel: dropped weights left out of the denominator", "gpu", "attention.fused_kernels",
         "        total = total * shrink + tl.sum(weights, axis=1)\n        if HAS_DROPOUT:  # of A, after the softmax: the "
         "dropped weights count in the denominator\n"
         "            weights = tl.where(_kept(seed, bh, query[:, None], key[None, :], dropout), weights, 0.0)\n",
         "        if HAS_DROPOUT:\n"
         "            weights = tl.where(_kept(seed, bh, query[:, None], key[None, :], dropout), weights, 0.0)\n"
         "        total = total * shrink + tl.sum(weights, axis=1)\n"),
        ("kernel: output not divided by 1 − p", "gpu", "attention.fused_kernels", "        out = out / (1.0 - dropout)\n",
         "        out = out * 1.0\n"),
        ("kernel: Ā of q̄ not divided by 1 − p", "gpu", "attention.fused_kernels",
         "kept = _kept(seed, bh, query[:, None], key[None, :], dropout)\n"
         "            dweights = tl.where(kept, dweights / (1.0 - dropout), 0.0)",
         "kept = _kept(seed, bh, query[:, None], key[None, :], dropout)\n"
         "            dweights = tl.where(kept, dweights, 0.0)"),
        ("kernel: v̄ from weights not dropped", "gpu", "attention.fused_kernels",
         "dropped = tl.where(kept, weights / (1.0 - dropout), 0.0)", "dropped = weights / (1.0 - dropout)"),
        ("kernel: k̄ through dropped weights", "gpu", "attention.fused_kernels",
         "dropped = tl.where(kept, weights / (1.0 - dropout), 0.0)\n"
         "            dweights = tl.where(kept, dweights / (1.0 - dropout), 0.0)",
         "dropped = tl.where(kept, weights / (1.0 - dropout), 0.0)\n            dweights = dweights / (1.0 - dropout)"),
        ("kernel: the same dropout for every head", "gpu", "attention.fused_kernels",
         "zero + query, zero + bh.to(tl.int32), zero)", "zero + query, zero, zero)"),
        ("kernel: kept with the probability of being dropped", "gpu", "attention.fused_kernels",
         "uint_to_uniform_float(random) >= dropout", "uint_to_uniform_float(random) < dropout"),
        ("fused: seed cut to 32 bits", "gpu", "attention.fused", "torch.full((1,), seed, dtype=torch.int64", "torch.full((1,), seed & 0xFFFFFFFF, dtype=torch.int64"),
        ("kernel: dropout by the sum of key and query", "gpu", "attention.fused_kernels", "tl.philox(seed, zero + key, zero + query,", "tl.philox(seed, zero + key + query, zero,"),
    ]
]  # fmt: skip
"""Bugs in the fused kernels that show with dropout only."""

LIFTING: list[Mutant] = [
    Mutant(*entry)
    for entry in [
        ("lifting kernel: ½ forgotten", "gpu", "attention.fused_kernels", "square = -0.5 * tl.where(", "square = -1.0 * tl.where("),
        ("lifting kernel: precisions of the axes swapped", "gpu", "attention.fused_kernels",
         "precision = tl.where(along_x, lx[:, None], ly[:, None]) / scale", "precision = tl.where(along_x, ly[:, None], lx[:, None]) / scale"),
        ("lifting kernel: centre's axes swapped", "gpu", "attention.fused_kernels", "offset = tl.where(along_x, ", "offset = tl.where(channel >= 8, "),
        ("lifting kernel: √d counts for the prior", "gpu", "attention.fused_kernels", "ly[:, None]) / scale", "ly[:, None])"),
        ("lifting kernel: λ in one part", "gpu", "attention.fused_kernels", "square = -0.5 * tl.where(part < 2, first, second)",
         "square = -0.5 * tl.where(part < 2, first, 0.0 * second)"),
        ("lifting kernel: λ·(c − m) in one part", "gpu", "attention.fused_kernels", "linear = tl.where(part == 4, one, tl.where(",
         "linear = tl.where(part == 4, one, 0.0 * tl.where("),
        ("lifting kernel: centre from the corner, cells from the middle", "gpu", "attention.fused_kernels",
         "return near - 0.5 * t - 0.5 * extent", "return near - 0.5 * t"),
        ("lifting kernel: keys beyond the map count", "gpu", "attention.fused_kernels",
         "constant = tl.where(channel == 15, BEYOND_MAP, 0.0)", "constant = tl.where(channel == 15, 0.0, 0.0)"),
        ("lifting kernel: mask not looked at", "gpu", "attention.fused_kernels", "    if HAS_MASK or not LIFT:\n", "    if not LIFT:\n"),
        ("lifting kernel: c̄ and λ̄ from the middle of the map", "gpu", "attention.fused_kernels", "way = near - 0.5 * extent", "way = 0.0 * near"),
        ("lifting kernel: λ̄ of a centre off the map", "gpu", "attention.fused_kernels", "return sums, squares + t * sums", "return sums, squares"),
        ("lifting kernel: c̄ and λ̄ of y from x", "gpu", "attention.fused_kernels", "_sums(moments, 8, py", "_sums(moments, 0, py"),
    ]
]  # fmt: skip
"""Bugs in how the fused kernels lift the prior, which they do in half precision."""
