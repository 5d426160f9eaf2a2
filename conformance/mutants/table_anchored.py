"""Plausible bugs in what goes beyond the paper, each one line of the specification or of the production code changed."""

# ruff: noqa: E501 - a table: pieces of source and what they become, side by side

from __future__ import annotations

from smca.conformance.mutants.table import Mutant

ANCHORED: list[Mutant] = [
    Mutant(*entry)
    for entry in [
        # The specification: queries with boxes
        ("position made from the width for the centre", "reference", "decoder", "for pair in (box[..., :2], box[..., 2:]))", "for pair in (box[..., 2:], box[..., :2]))"),
        ("position not renewed from layer to layer", "reference", "decoder",
         "query_position = position_of_queries(looked_at, params, config)  # p",
         "query_position = query_position if index else position_of_queries(looked_at, params, config)"),
        ("prior in units of the height for the width", "reference", "prior", "unit_xy = (sigmoid(reference_logits[..., 2:]) * extent)", "unit_xy = (sigmoid(reference_logits[..., :1:-1]) * extent)"),
        ("prior narrower than half a cell", "reference", "prior", "LEAST_SIGMA = 0.5", "LEAST_SIGMA = 0.0001"),
        ("offset in pixels with a prior in boxes", "reference", "prior", "center_xy + unit_xy * offset_xy", "center_xy + 1.0 * offset_xy"),
        ("further queries seen by the others", "reference", "decoder", "joined[:, :num_queries, :num_queries] = True", "joined[:, :num_queries, :] = True"),
        ("further queries see the others", "reference", "decoder", "joined[:, num_queries:, num_queries:] = sees", "joined[:, num_queries:, num_queries:] = sees\n    joined[:, num_queries:, :num_queries] = True"),
        ("content forgotten", "reference", "decoder", 'content = params["decoder.query_content"]', 'content = 0.0 * params["decoder.query_content"]'),
        # The specification: cells
        ("cells' boxes at the corner", "reference", "position", "np.stack([x.ravel(), y.ravel()], axis=-1) + 0.5", "np.stack([x.ravel(), y.ravel()], axis=-1) + 0.0"),
        ("cells' boxes of one size in every level", "reference", "dense_head", "* grid.stride / grids[-1].stride", ""),
        ("cells' anchors of the padded map", "reference", "dense_head", "extent = grid.valid_cells[:, None, ::-1]  # [B, 1, 2], (w, h)", "extent = grid.valid_cells[:, None, ::-1] * 0 + np.array(grid.size[::-1])"),
        ("padded cells selected", "reference", "dense_head", "rank = np.where(cells.padding, -1.0, score + np.concatenate(peaks, axis=1))", "rank = np.where(cells.padding, 3.0, score + np.concatenate(peaks, axis=1))"),
        ("peaks over all levels as one map", "reference", "dense_head", "peaks = [is_peak(part, grid.size) for", "peaks = [is_peak(part, (1, grid.size[0] * grid.size[1])) for"),
        ("peaks not preferred", "reference", "dense_head", "score + np.concatenate(peaks, axis=1))", "score + 0 * np.concatenate(peaks, axis=1))"),
        ("worst cells first", "reference", "dense_head", "order = np.argsort(-rank", "order = np.argsort(rank"),
        ("score of the first class alone", "reference", "dense_head", "sigmoid(cells.logits.max(axis=-1))", "sigmoid(cells.logits[..., 0])"),
        # The specification: the losses
        ("near by the whole side", "reference", "dense_loss", "NEAR_SIDE = 0.4", "NEAR_SIDE = 0.8"),
        ("small objects without a cell", "reference", "dense_loss", "NEAR_CELL = 0.75", "NEAR_CELL = 0.2"),
        ("padded cells assigned", "reference", "dense_loss", ".all(axis=-1) & ~padding[image, :, None]", ".all(axis=-1)"),
        ("as many cells as are near", "reference", "dense_loss", "CELLS_PER_OBJECT = 6", "CELLS_PER_OBJECT = 60"),
        ("score not in the metric", "reference", "dense_loss", "near * np.sqrt(score) *", "near *"),
        ("contested cells to the first object", "reference", "dense_loss", "np.argmax(np.where(chosen, iou, -1.0), axis=1)", "np.argmax(chosen, axis=1)"),
        ("goal of 1", "reference", "dense_loss", "LEAST_GOAL = 0.1", "LEAST_GOAL = 1.0"),
        ("padded cells taught", "reference", "dense_loss", "** 2) * ~padding[..., None]", "** 2)"),
        ("cells' boxes divided by the cells", "reference", "dense_loss", "num_cells = CELLS_PER_OBJECT * num_boxes", "num_cells = max(1, len(image))"),
        ("matchability: IoU itself", "reference", "losses", "MATCHABILITY_GAMMA = 1.5", "MATCHABILITY_GAMMA = 1.0"),
        ("matchability: matched weighted as others", "reference", "losses", "np.where(matched, 1.0, sigmoid(logits) ** MATCHABILITY_GAMMA)", "sigmoid(logits) ** MATCHABILITY_GAMMA"),
        ("negative queries matched", "reference", "denoising", "positive, negative = first + target, first + count + target", "negative, positive = first + target, first + count + target"),
        ("negative queries left out", "reference", "denoising", "logits[layer, image, negative]])", "logits[layer, image, negative] - 1e9])"),
        ("noised loss not divided by the groups", "reference", "denoising", "* num_groups\n    sums", "* 1\n    sums"),
        ("groups see each other", "reference", "denoising", "(group[:, None] == group) & real", "(group[:, None] >= 0) & real"),
        ("padding seen", "reference", "denoising", "(group[:, None] == group) & real.reshape(batch, 1, queries)", "(group[:, None] == group) & (real.reshape(batch, 1, queries) | True)"),
        ("noise in whole sides", "reference", "denoising", "targets.boxes, dtype=np.float64)[:, None, None], 0.5)\n    half_sides = np.concatenate([boxes[..., 2:], boxes[..., 2:]], axis=-1) / 2",
         "targets.boxes, dtype=np.float64)[:, None, None], 0.5)\n    half_sides = np.concatenate([boxes[..., 2:], boxes[..., 2:]], axis=-1)"),
        # Production: the model
        ("position and prior teach the box", "gpu", "model.decoder", "(reference_logits.detach() if self.has_anchors else reference_logits).sigmoid()", "reference_logits.sigmoid()"),
        ("position teaches the box", "gpu", "model.decoder", "self.norm.normalized_shape[0], reference_logits.detach().sigmoid()", "self.norm.normalized_shape[0], reference_logits.sigmoid()"),
        ("a learned box that learns nothing", "gpu", "model.decoder", "anchors.to(dtype).expand(batch, -1, -1)", "anchors.detach().to(dtype).expand(batch, -1, -1)"),
        ("further queries unmasked", "gpu", "model.layers", "attn_mask=sees[:, None])", "attn_mask=sees[:, None] | True)"),
        ("mask of further queries transposed", "gpu", "model.decoder", "functional.pad(sees, (num_queries, 0))", "functional.pad(sees.transpose(1, 2), (num_queries, 0))"),
        ("prior's least width in boxes", "gpu", "model.prior", "(SIGMA_OF_SIDE * side).clamp(min=LEAST_SIGMA)", "SIGMA_OF_SIDE * side.clamp(min=LEAST_SIGMA)"),
        ("queries teach the cells", "gpu", "model.dense_head", "@torch.no_grad()\ndef select_queries", "def select_queries"),
        ("peak among padding", "gpu", "model.dense_head", "rank.masked_fill(cells.padding, -1.0).topk", "rank.topk"),
        ("fewer queries than cells, padding for the rest", "gpu", "model.dense_head", "torch.where(best[..., None] > -1.0, chosen, start[:, :found])", "chosen"),
        ("padded cells hold what the encoder left", "gpu", "model.dense_head", "x = memory if padding is None else memory.masked_fill(padding[..., None], 0.0)", "x = memory"),
        ("boxes of cells start by their own level's stride", "gpu", "model.dense_head", "stride / strides[-1] /", "stride / strides[0] / 4 /"),
        # Production: the losses
        ("padded cells assigned in production", "gpu", "loss.dense_loss", ".all(-1) & real & ~padding[..., None]", ".all(-1) & real"),
        ("padded targets own cells", "gpu", "loss.dense_loss", ".all(-1) & real & ~padding[..., None]", ".all(-1) & ~padding[..., None]"),
        ("weights of cells differentiated", "gpu", "loss.dense_loss", "NEGATIVE_WEIGHT * logits.detach().sigmoid() ** 2", "NEGATIVE_WEIGHT * logits.sigmoid() ** 2"),
        ("goal differentiated", "gpu", "loss.dense_loss", "@torch.no_grad()\ndef assign_cells", "def assign_cells"),
        ("noised targets' padding counted", "gpu", "loss.criterion", "per_logit = per_logit * counted[..., None]", "per_logit = per_logit * 1"),
        ("groups and layers mixed", "gpu", "loss.criterion", "logits = logits.reshape(layers, batch, num_groups, 2 * count, classes).transpose(1, 2).flatten(0, 1)",
         "logits = logits.reshape(layers, batch, 2 * count, num_groups, classes).movedim(3, 1).flatten(0, 1)"),
        ("quality differentiated", "gpu", "loss.criterion", "1 + box_iou(*corners).detach())", "1 + box_iou(*corners))"),
        ("matched boxes that missed weighted as background", "gpu", "loss.criterion", "(hot - 1).clamp(min=0), hot > 0)", "(hot - 1).clamp(min=0), hot > 1)"),
        ("noised boxes without a least side", "gpu", "model.denoising", "(high - low).clamp(min=LEAST_SIDE)", "(high - low)"),
        ("noised boxes of the image before", "gpu", "model.denoising", "boxes = targets.boxes[:, None, None]", "boxes = targets.boxes.roll(1, 0)[:, None, None]"),
    ]
]  # fmt: skip
