"""Plausible bugs in cost, assignment and losses that show with other weights than usual, with costs that are close, huge or forbidden,
with many classes, or with scores in half precision; each one line of the specification or of the production code changed.

Left out because it changes nothing: the matcher's own conversion to float32, since the loss hands it float32.
"""

# ruff: noqa: E501 - a table: pieces of source and what they become, side by side

from __future__ import annotations

from smca.conformance.mutants.table import Mutant

_SUM = 'weights["class"] * cost_class + weights["l1"] * cost_l1 + weights["giou"] * cost_giou'
_TERM = "float(weights[term] * total / num_boxes)"
_USUAL = '{"class": 2.0, "l1": 5.0, "giou": 2.0}'
_EXCHANGED = '{"class": "giou", "l1": "l1", "giou": "class"}'
_SPECIFIED = "cost = np.asarray(cost, dtype=np.float64)"
_COST = 'weights["class"] * cost_class + weights["l1"] * l1 - weights["giou"] * giou'
_LAYER = "self.weights[name] * value / divisor"
_NOISED = "weights[name] * value.sum() / divisor"

LOSS: list[Mutant] = [
    Mutant(*entry)
    for entry in [
        # The specification
        ("cost: weights of class and GIoU exchanged", "reference", "matching", _SUM,
         'weights["giou"] * cost_class + weights["l1"] * cost_l1 + weights["class"] * cost_giou'),
        ("cost: weights that are given ignored", "reference", "matching", _SUM, "2.0 * cost_class + 5.0 * cost_l1 + 2.0 * cost_giou"),
        ("cost: divided by the sum of the weights", "reference", "matching", _SUM, f"({_SUM}) / sum(weights.values()) * 9.0"),
        ("loss: weights of class and GIoU exchanged", "reference", "losses", _TERM, f"float(weights[{_EXCHANGED}[term]] * total / num_boxes)"),
        ("loss: weights that are given ignored", "reference", "losses", _TERM, f"float({_USUAL}[term] * total / num_boxes)"),
        ("loss: matched with the usual weights", "reference", "losses", "query_of_target = match(logits, boxes, targets, weights, classification)",
         f"query_of_target = match(logits, boxes, targets, {_USUAL}, classification)"),
        ("loss of a softmax with the weight of GIoU", "reference", "losses", 'weights["class"] * mean', 'weights["giou"] * mean'),
        ("noised queries: weights of class and GIoU exchanged", "reference", "denoising", "float(weights[term] * total / number)",
         f"float(weights[{_EXCHANGED}[term]] * total / number)"),
        ("cells: weights of class and GIoU exchanged", "reference", "dense_loss", 'CLASS_WEIGHT * weights["class"]', 'CLASS_WEIGHT * weights["giou"]'),
        ("cells: GIoU with the weight of the class", "reference", "dense_loss", 'weights["giou"] * (1.0 - giou)', 'weights["class"] * (1.0 - giou)'),
        ("assignment of costs in thousandths", "reference", "matching", _SPECIFIED, f"{_SPECIFIED}.round(3)"),
        ("assignment in float32", "reference", "matching", _SPECIFIED, "cost = np.asarray(cost, dtype=np.float32).astype(np.float64)"),
        ("costs cut at 10⁶", "reference", "matching", _SPECIFIED, f"{_SPECIFIED}\n    cost = np.where(np.isinf(cost), cost, np.clip(cost, -1e6, 1e6))"),
        ("a forbidden pair costs as much as the dearest", "reference", "matching", _SPECIFIED,
         f"{_SPECIFIED}\n    cost = np.where(cost == np.inf, cost[np.isfinite(cost)].max(initial=0.0), cost)"),
        ("a forbidden pair costs nothing", "reference", "matching", _SPECIFIED, f"{_SPECIFIED}\n    cost = np.where(cost == np.inf, 0.0, cost)"),
        ("classes beyond the 91st cost what that costs", "reference", "matching", "cost_class = positive - negative",
         "cost_class = (positive - negative)[:, np.arange(len(labels))]\n        if classes > 91:\n"
         "            positive, negative = focal_terms(logits[:, np.minimum(labels, 90)])\n            cost_class = positive - negative"),
        ("the last of many classes taken for \"no object\"", "reference", "losses", "per_logit = sigmoid_focal_loss(logits, present)",
         "per_logit = sigmoid_focal_loss(logits, present) * (np.arange(logits.shape[-1]) < max(1, logits.shape[-1] - (logits.shape[-1] > 4)))"),
        # Production
        ("cost in production: weights of class and GIoU exchanged", "gpu", "loss.matcher", _COST,
         'weights["giou"] * cost_class + weights["l1"] * l1 - weights["class"] * giou'),
        ("cost in production: weights that are given ignored", "gpu", "loss.matcher", _COST, "2.0 * cost_class + 5.0 * l1 - 2.0 * giou"),
        ("loss in production: weights of class and GIoU exchanged", "gpu", "loss.criterion", _LAYER, f"self.weights[{_EXCHANGED}[name]] * value / divisor"),
        ("loss in production: weights that are given ignored", "gpu", "loss.criterion", _LAYER, f"{_USUAL}[name] * value / divisor"),
        ("loss in production: matched with the usual weights", "gpu", "loss.criterion", "cost = self.weights, self.classification",
         f"cost = {_USUAL}, self.classification"),
        ("loss of a softmax in production with the weight of GIoU", "gpu", "loss.criterion", 'self.weights["class"] * mean', 'self.weights["giou"] * mean'),
        ("noised queries in production: weights of class and GIoU exchanged", "gpu", "loss.criterion", _NOISED,
         f"weights[{_EXCHANGED}[name]] * value.sum() / divisor"),
        ("cells in production: weights of class and GIoU exchanged", "gpu", "loss.dense_loss", 'CLASS_WEIGHT * weights["class"]', 'CLASS_WEIGHT * weights["giou"]'),
        ("cells in production: GIoU with the weight of the class", "gpu", "loss.dense_loss", 'weights["giou"] * (giou', 'weights["class"] * (giou'),
        ("matching of costs in thousandths", "gpu", "loss.matcher", "linear_sum_assignment(problem)", "linear_sum_assignment(problem.round(3))"),
        ("matching in float16", "gpu", "loss.matcher", "linear_sum_assignment(problem)", 'linear_sum_assignment(problem.astype("float16"))'),
        ("scores left in half precision", "gpu", "loss.criterion", 'logits, boxes = in_float32(outputs["logits"]), ', 'logits, boxes = outputs["logits"], '),
        ("scores of noised queries left in half precision", "gpu", "loss.criterion", 'in_float32(outputs["further_logits"])', 'outputs["further_logits"]'),
        ("outputs of a softmax left in half precision", "gpu", "loss.criterion", 'in_float32(outputs["class_logits"])', 'outputs["class_logits"]'),
        ("scores of cells left in half precision", "gpu", "loss.dense_loss", 'in_float32(outputs["cell_logits"])', 'outputs["cell_logits"]'),
        ("everything in float16 on the way to the loss", "gpu", "loss.precision", "return x.float() if x.dtype.itemsize < 4 else x", "return x.half().to(x.dtype)"),
        ("float64 cut to float32 on the way to the loss", "gpu", "loss.precision", "return x.float() if x.dtype.itemsize < 4 else x", "return x.float()"),
        ("classes beyond the 91st not learned", "gpu", "loss.criterion", "query * classes + labels, queries", "query * classes + labels.clamp(max=90), queries"),
    ]
]  # fmt: skip
