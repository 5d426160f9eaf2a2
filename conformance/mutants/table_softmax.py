"""Plausible bugs in DETR's own scores and loss, each one line of the specification or of the production code changed.

Left out because it changes nothing: the weights summed over all layers, which have equally many matched queries each.
"""

# ruff: noqa: E501 - a table: pieces of source and what they become, side by side

from __future__ import annotations

from smca.conformance.mutants.table import Mutant

SOFTMAX: list[Mutant] = [
    Mutant(*entry)
    for entry in [
        # The specification
        ("odds against \"no object\" alone", "reference", "softmax_scores", "np.delete(z, k, axis=-1)", "z[..., -1:]"),
        ("odds without \"no object\"", "reference", "softmax_scores", "np.delete(z, k, axis=-1)", "np.delete(z, [k, z.shape[-1] - 1], axis=-1)"),
        ("logarithms of probabilities for odds", "reference", "softmax_scores", "np.delete(z, k, axis=-1)", "z"),
        ("odds from the rounded probability", "reference", "softmax_scores", "    result: FloatArray = z[..., :-1] - np.stack(others, axis=-1)\n",
         "    p = np.exp(z - z.max(-1, keepdims=True))\n    p = (p / p.sum(-1, keepdims=True))[..., :-1]\n    result: FloatArray = np.log(p) - np.log1p(-p) + 0 * np.stack(others, axis=-1)\n"),
        ("cross-entropy normalised without \"no object\"", "reference", "softmax_scores", "np.logaddexp.reduce(z, axis=-1) - chosen", "np.logaddexp.reduce(z[..., :-1], axis=-1) - chosen"),
        ("weights not in the divisor", "reference", "softmax_scores", ".sum() / weight.sum())  # (K6)", ".sum() / weight.size)  # (K6)"),
        ("cross-entropy divided by the objects", "reference", "softmax_scores", ".sum() / weight.sum())  # (K6)", ".sum() / max(1, len(labels)))  # (K6)"),
        ("\"no object\" weighs as much as an object", "reference", "softmax_scores", "np.where(wanted == no_object, no_object_weight, 1.0)", "np.where(wanted == no_object, 1.0, 1.0)"),
        ("objects weighed down", "reference", "softmax_scores", "np.where(wanted == no_object, no_object_weight, 1.0)", "np.where(wanted == no_object, 1.0, no_object_weight)"),
        ("\"no object\" is the first column", "reference", "softmax_scores", "wanted = np.full(z.shape[:2], no_object)", "wanted = np.full(z.shape[:2], 0)"),
        ("class term of a softmax without its weight", "reference", "losses", "= weights[\"class\"] * mean", "= mean"),
        ("matched by the focal cost", "reference", "losses", "query_of_target = match(logits, boxes, targets, weights, classification)", "query_of_target = match(logits, boxes, targets, weights)"),
        ("cost of −ln p for −p", "reference", "matching", "cost_class = -sigmoid(logits[:, labels])", "cost_class = softplus(-logits[:, labels])"),
        ("cost of p for −p", "reference", "matching", "cost_class = -sigmoid(logits[:, labels])", "cost_class = sigmoid(logits[:, labels])"),
        ("cost of −odds for −p", "reference", "matching", "cost_class = -sigmoid(logits[:, labels])", "cost_class = -logits[:, labels]"),
        ("outputs for odds", "reference", "model", "logits = log_odds(z) if config.class_scores == \"softmax\" else z", "logits = z[..., :-1] if config.class_scores == \"softmax\" else z"),
        # Production
        ("odds of the best from a difference", "gpu", "model.layers", "torch.where(is_best, others_of_best, others.log())", "torch.where(is_best, (exponentials.sum(-1, keepdim=True) - exponentials).log(), others.log())"),
        ("gradient of the best output's odds NaN where it has all", "gpu", "model.layers", "- exponentials).masked_fill(is_best, 1.0)", "- exponentials)"),
        ("odds of the first of equal outputs", "gpu", "model.layers", "best = z.detach().argmax(dim=-1, keepdim=True)", "best = z.detach()[..., :1].argmax(dim=-1, keepdim=True)"),
        ("odds in half precision", "gpu", "model.layers", "    z = z if z.dtype == torch.float64 else z.float()\n    best", "    z = z + 0\n    best"),
        ("largest output cut from the graph", "gpu", "model.layers", "exponentials = z.exp()", "exponentials = z.masked_fill(is_best, 0.0).exp()"),
        ("the others cut from the graph", "gpu", "model.layers", "-torch.inf).logsumexp(-1, keepdim=True)", "-torch.inf).logsumexp(-1, keepdim=True).detach()"),
        ("odds of one column further", "gpu", "model.layers", "others.log()))[..., :-1]", "others.log()))[..., 1:]"),
        ("outputs for odds in production", "gpu", "model.detector", "logits = log_odds(logits)", "logits = logits[..., :-1]"),
        ("odds cut from the graph", "gpu", "model.detector", "logits = log_odds(logits)", "logits = log_odds(logits.detach()) + 0 * logits[..., :-1]"),
        ("cost of a softmax over the classes", "gpu", "loss.matcher", "cost_class = -p", "cost_class = -logits.softmax(-1).gather(-1, labels)"),
        ("cost of −ln p for −p in production", "gpu", "loss.matcher", "cost_class = -p", "cost_class = -functional.logsigmoid(logit)"),
        ("matched by the focal cost in production", "gpu", "loss.criterion", "cost = self.weights, self.classification", "cost = (self.weights,)"),
        ("weights not in the divisor in production", "gpu", "loss.classification", "/ weight.sum((1, 2))", "/ weight[0].numel()"),
        ("mean of each image's own mean", "gpu", "loss.classification", "return (weight * cross_entropy).sum((1, 2)) / weight.sum((1, 2))", "return ((weight * cross_entropy).sum(2) / weight.sum(2)).mean(1)"),
        ("weight of \"no object\" in float32", "gpu", "loss.classification", "torch.ones_like(z[..., 0]).masked_fill(wanted == columns - 1, no_object_weight)", "torch.where(wanted == columns - 1, no_object_weight, 1.0)"),
        ("labels of padding wanted of the first query", "gpu", "loss.classification", "place = torch.where(query >= 0, query, queries)", "place = query.clamp(min=0)"),
        ("softmax without \"no object\"", "gpu", "loss.classification", "-z.log_softmax(-1).gather(-1, wanted[..., None])[..., 0]",
         "z[..., :-1].logsumexp(-1) - z.gather(-1, wanted[..., None])[..., 0]"),
        ("cross-entropy by the logarithm of a rounded probability", "gpu", "loss.classification", "-z.log_softmax(-1)", "-z.softmax(-1).log()"),
        ("class term of a softmax divided by the boxes", "gpu", "loss.criterion", "self.weights[\"class\"] * mean / parts", "self.weights[\"class\"] * mean / divisor"),
    ]
]  # fmt: skip
