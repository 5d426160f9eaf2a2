"""Bugs around the model, as trainers have had them: of the divisor of the loss, accumulation, clipping, the optimiser and its groups,
the average of the weights, going on after a stop, and gradients written by hand; each one line of the specification or of the
production code changed.

Left out because it changes nothing here: the scale of the loss not restored on resume (whatever it is, it is divided out again).
"""

# ruff: noqa: E501 - a table: pieces of source and what they become, side by side

from __future__ import annotations

from smca.conformance.mutants.table import Mutant

_PROCESS = "    for parts in shards:\n"
_PART = "        for x, targets in parts:\n"
_OWN = "max(1, int(np.asarray(targets.valid).sum()))"
_AVERAGE = "average = moved_average(average, params, average_decay(settings.ema_decay, state.steps))  # (R7)"
_STEPPED = "optimizer.step()\n    scaler.update()\n"
_EMA = "    if run.average is not None:\n        update_average(run.average, run.model, average_decay(config.optim.ema_decay, run.step))"
_TERMS = "added = run.terms_of(outputs, batch.targets, num_boxes)"
_BACKWARD = 'scaler.scale(added["loss"]).backward()  # type: ignore[no-untyped-call]'
_CLIP = (
    "    scaler.unscale_(optimizer)\n    norm = whole(clip_gradient(run.model.parameters(), config.optim.clip_norm))"
)
_GIVEN = "given = outputs, targets, settings.weights, settings.classification"

TRAINING: list[Mutant] = [
    Mutant(*entry)
    for entry in [
        # The specification: what the loss is divided by, and what is added up
        ("boxes counted by each process for itself", "reference", "training_step", _PROCESS,
         f"{_PROCESS}        num_boxes = max(1, sum(int(np.asarray(t.valid).sum()) for _, t in parts))\n"),
        ("boxes of all processes not divided by their number", "reference", "training_step", "num_boxes = max(1, objects) / processes", "num_boxes = max(1, objects)"),
        ("one box at least per process", "reference", "training_step", "num_boxes = max(1, objects) / processes", "num_boxes = max(1, objects / processes)"),
        ("each part divided by its own boxes", "reference", "training_step", _PART, f"{_PART}            num_boxes = {_OWN} / processes\n"),
        ("each part divided by its own boxes, then the mean", "reference", "training_step", _PART, f"{_PART}            num_boxes = {_OWN} * len(parts) / processes\n"),
        ("gradients added up, not averaged, over processes", "reference", "training_step", "gradient / processes / settings.loss_scale", "gradient / settings.loss_scale"),
        ("gradient of the last part alone", "reference", "training_step", "total[name] += gradient", "total[name] = gradient"),
        ("loss computed in half precision", "reference", "training_step", "outputs = forward(params, x)",
         "outputs = {name: value.astype(np.float16).astype(np.float64) for name, value in forward(params, x).items()}"),
        # Clipping and the scale of the loss
        ("clipped before the scale is taken out", "reference", "training_step", "clip(gradients, settings.clip_norm)", "clip(gradients, settings.clip_norm / settings.loss_scale)"),
        ("scale of the loss not taken out", "reference", "training_step", "gradient / processes / settings.loss_scale", "gradient / processes"),
        ("each part clipped by itself", "reference", "training_step", 'backward(params, x, scaled["logits"], scaled["boxes"]).items()',
         'clip(backward(params, x, scaled["logits"], scaled["boxes"]), (settings.clip_norm or np.inf) * settings.loss_scale).items()'),
        ("never clipped", "reference", "training_step", "    if settings.clip_norm:\n", "    if settings.clip_norm > 1e3:\n"),
        ("each parameter clipped by itself", "reference", "optimizers", "return {name: gradient * factor for name, gradient in gradients.items()}",
         "return {name: g * min(1.0, largest_norm / (norm_of({name: g}) + CLIP_EPSILON)) for name, g in gradients.items()}"),
        ("short gradients drawn out to the largest norm", "reference", "optimizers", "factor = min(1.0, largest_norm / (norm_of(gradients) + CLIP_EPSILON))",
         "factor = largest_norm / (norm_of(gradients) + CLIP_EPSILON)"),
        # The optimiser
        ("no bias correction", "reference", "optimizers", "first / (1 - BETAS[0] ** step), second / (1 - BETAS[1] ** step)", "first, second"),
        ("bias correction counts steps from 0", "reference", "training_step", "state.steps + 1, rate, decay", "max(1, state.steps), rate, decay"),
        ("decay added to the gradient", "reference", "optimizers", "decayed = parameter * (1 - rate * decay)", "decayed, gradient = parameter, gradient + decay * parameter"),
        ("decay not times the rate", "reference", "optimizers", "decayed = parameter * (1 - rate * decay)", "decayed = parameter * (1 - decay)"),
        ("ε under the root", "reference", "optimizers", "(np.sqrt(unbiased_second) + EPSILON)", "np.sqrt(unbiased_second + EPSILON)"),
        ("β₂ of 0.95", "reference", "optimizers", "BETAS = (0.9, 0.999)", "BETAS = (0.9, 0.95)"),
        ("Muon does not look ahead", "reference", "optimizers", "ahead = (1 - MOMENTUM) * gradient + MOMENTUM * momentum", "ahead = momentum"),
        ("Muon's rate is the same for all shapes", "reference", "optimizers", "np.sqrt(max(1.0, rows / columns))", "1.0"),
        ("Muon's rate grows with columns", "reference", "optimizers", "np.sqrt(max(1.0, rows / columns))", "np.sqrt(max(1.0, columns / rows))"),
        ("four steps of Newton and Schulz", "reference", "optimizers", "NEWTON_SCHULZ_STEPS = 5", "NEWTON_SCHULZ_STEPS = 4"),
        ("Muon's matrices decay", "reference", "training_step", "muon(params[name], gradient,", "muon(params[name] * (1 - rate * settings.weight_decay), gradient,"),
        # Groups
        ("norms and biases decay though only weights should", "reference", "training_step", 'settings.decayed == "all" or of_a_layer', "True"),
        ("weights of norms decay with those of layers", "reference", "training_step", 'name.endswith(".weight") and not name.startswith("norm.")', 'name.endswith(".weight")'),
        ("the backbone learns at the rate of the rest", "reference", "training_step", "return settings.backbone_lr if in_backbone else settings.lr", "return settings.lr"),
        ("the backbone's matrices learn at Muon's full rate", "reference", "training_step", "settings.muon_lr * settings.backbone_lr / settings.lr if in_backbone else", "settings.muon_lr if in_backbone else"),
        ("Muon takes larger matrices only", "reference", "training_step", "LEAST_SIDE = 16", "LEAST_SIDE = 17"),
        ("the schedule passes the backbone by", "reference", "training_step", "rate = factor * rate_of(name, settings, by_muon)",
         'rate = (1.0 if name.startswith("backbone.") else factor) * rate_of(name, settings, by_muon)'),
        # The average
        ("average updated twice per step", "reference", "training_step", _AVERAGE, f"{_AVERAGE}\n        {_AVERAGE}"),
        ("average updated with every part", "reference", "training_step", _AVERAGE, f"for _ in shards[0]:\n            {_AVERAGE}"),
        ("average follows the weights before the step", "reference", "training_step", _AVERAGE, _AVERAGE.replace("params,", "state.params,")),
        ("average starts at 0", "reference", "training_step", "dict(copies) if settings.ema_decay else {}", "{n: 0 * v for n, v in copies.items()} if settings.ema_decay else {}"),
        ("average without a warm-up", "reference", "optimizers", "return min(decay, (1 + steps_before) / (10 + steps_before))", "return decay"),
        ("average's warm-up a step ahead", "reference", "optimizers", "return min(decay, (1 + steps_before) / (10 + steps_before))", "return min(decay, (2 + steps_before) / (11 + steps_before))"),
        ("average and weights exchanged", "reference", "optimizers", "decay * average[name] + (1 - decay) * params[name]", "decay * params[name] + (1 - decay) * average[name]"),
        # Going on
        ("average lost on resume: it starts anew from the weights", "reference", "training_run", 'TrainingState(places["params"], places["average"],',
         'TrainingState(places["params"], dict(places["params"]) if places["average"] else {},'),
        ("going on from the average", "reference", "training_run", 'TrainingState(places["params"], places["average"],', 'TrainingState(places["average"] or places["params"], places["average"],'),
        ("moments lost on resume", "reference", "training_run", 'Moments(places["first"][name], places["second"][name])', 'Moments(0 * places["first"][name], 0 * places["second"][name])'),
        ("second moments lost on resume", "reference", "training_run", 'Moments(places["first"][name], places["second"][name])', 'Moments(places["first"][name], 0 * places["second"][name])'),
        ("Muon's momentum lost on resume", "reference", "training_run", 'moments, places["momentum"], steps)', 'moments, {n: 0 * v for n, v in places["momentum"].items()}, steps)'),
        ("number of steps lost on resume", "reference", "training_run", 'steps = int(arrays["steps"])', "steps = 0"),
        # Classes and gradients
        ("class ids off by one", "reference", "training_step", _GIVEN,
         "given = outputs, type(targets)(np.maximum(np.asarray(targets.labels) - 1, 0), targets.boxes, targets.valid), settings.weights, settings.classification"),
        ("the last class taken for none", "reference", "training_step", _GIVEN,
         "last = np.asarray(targets.labels) == outputs[\"logits\"].shape[-1] - 1\n            "
         "given = outputs, type(targets)(targets.labels, targets.boxes, targets.valid & ~last), settings.weights, settings.classification"),
        ("class ids off by one in the gradient", "reference", "losses_backward", "matched = (*pairs, labels[image, target])", "matched = (*pairs, labels[image, target] - 1)"),
        ("α of ½, whatever is asked for, in the gradient", "reference", "losses_backward", "p, not_p = sigmoid(logits), sigmoid(-logits)", "p, not_p, alpha = sigmoid(logits), sigmoid(-logits), 0.5"),
        ("α of ½, whatever is asked for, in loss and cost", "reference", "matching", "positive = alpha * sigmoid(-logits)", "alpha = 0.5\n    positive = alpha * sigmoid(-logits)"),
        ("γ not differentiated", "reference", "losses_backward", "(gamma * p * softplus(-logits) + not_p)", "not_p"),
        ("gradient of L1 as of a square", "reference", "losses_backward", "np.sign(predicted - wanted)", "(predicted - wanted)"),
        ("GIoU climbs where it should fall", "reference", "losses_backward", "of_giou = weights[\"giou\"] * giou", "of_giou = -weights[\"giou\"] * giou"),
        ("gradient of GIoU that of IoU alone", "reference", "losses_backward", " + d_hull * union[:, None] * per_hull**2", ""),
        ("union taken as given in the gradient of GIoU", "reference", "losses_backward", "d_union = d_size - d_overlap", "d_union = 0 * d_size"),
        ("width and height get twice their gradient", "reference", "losses_backward", "(d_high - d_low) / 2]", "d_high - d_low]"),
        ("matchability: the weight of the background is 1 in the gradient", "reference", "losses_backward", "v, z = p**MATCHABILITY_GAMMA,", "v, z = np.ones(p.shape),"),
        ("\"no object\" weighs 1 in the gradient", "reference", "losses_backward", "np.full(z.shape[:-1], no_object_weight)", "np.full(z.shape[:-1], 1.0)"),
        ("layer norm's deviation taken as given", "reference", "small_detector", "d_normalised.mean(axis=-1, keepdims=True) - along)", "d_normalised.mean(axis=-1, keepdims=True))"),
        ("gradient of the sigmoid of boxes left out", "reference", "small_detector", "d_boxes[layer] * boxes * (1 - boxes)", "d_boxes[layer]"),
        # Production: the step
        ("each part in production divided by its own boxes", "gpu", "training.step", _TERMS, "added = run.terms_of(outputs, batch.targets, boxes_per_process(batch.targets.valid.sum()))"),
        ("boxes in production counted in the first part", "gpu", "training.step", "for batch in batches]).sum())", "for batch in batches[:1]]).sum())"),
        ("loss in production computed in half precision", "gpu", "training.step", _TERMS, f"outputs = {{name: value.half().to(value.dtype) for name, value in outputs.items()}}\n                {_TERMS}"),
        ("clipped in production before the scale is taken out", "gpu", "training.step", _CLIP, "\n".join(reversed(_CLIP.split("\n")))),
        ("each part clipped by itself in production", "gpu", "training.step", _BACKWARD, f"{_BACKWARD}\n            clip_gradient(run.model.parameters(), config.optim.clip_norm)"),
        ("gradient of the last part alone in production", "gpu", "training.step", "if number == 0:\n", "if True:\n"),
        ("processes in production share the first part's gradient alone", "gpu", "training.step", "now=number + 1 == len(parts)", "now=number == 0"),
        ("average in production updated twice per step", "gpu", "training.step", _EMA, f"{_EMA}\n{_EMA}"),
        ("average in production updated with every part", "gpu", "training.step", _EMA, _EMA.replace("        update", "        for _ in parts:\n            update")),
        ("average in production follows the weights before the step", "gpu", "training.step", f"{_STEPPED}{_EMA}", f"{_EMA.lstrip()}\n    {_STEPPED}"),
        ("boxes in production not added up over processes", "gpu", "loss.count", "distributed.all_reduce(count)", "pass"),
        ("boxes in production not divided by the number of processes", "gpu", "loss.count", "world = distributed.get_world_size()", "world = 1"),
        ("one box at least per process in production", "gpu", "loss.count", "count.clamp(min=1.0) / world", "(count / world).clamp(min=1.0)"),
        # Production: the optimiser
        ("norms and biases decay in production though only weights should", "gpu", "training.optimizer", "optim.backbone_lr, weight_decay=0.0)", "optim.backbone_lr)"),
        ("nothing decays in production where only weights should", "gpu", "training.optimizer", "(p for p in parameters if id(p) in weights), optim.lr, optim.backbone_lr)",
         "(p for p in parameters if id(p) in weights), optim.lr, optim.backbone_lr, weight_decay=0.0)"),
        ("the backbone learns in production at the rate of the rest", "gpu", "training.optimizer", "lr if d == _OUTSIDE else backbone_lr * optim.backbone_lr_decay**d", "lr"),
        ("the schedule in production sets the first group alone", "gpu", "training.optimizer", 'group["lr"] = base * factor', 'group["lr"] = base * (factor if group is optimizer.param_groups[0] else 1.0)'),
        ("Adam in production, its decay in the gradient", "gpu", "training.optimizer", "return torch.optim.AdamW(", "return torch.optim.Adam("),
        ("norm in production taken after clipping", "gpu", "training.optimizer", "    return norm\n", "    return norm.clamp(max=max_norm)\n"),
        ("average in production exchanged with the weights", "gpu", "training.optimizer", "[m for _, m in floats], 1 - decay)", "[m for _, m in floats], decay)"),
        ("average in production without a warm-up", "gpu", "training.optimizer", "return min(decay, (1 + steps_before) / (10 + steps_before))", "return decay"),
        ("Muon in production does not look ahead", "gpu", "training.muon", "updates = torch._foreach_lerp(grads, momenta, MOMENTUM)", "updates = [momentum.clone() for momentum in momenta]"),
        ("Muon's rate in production is the same for all shapes", "gpu", "training.muon", "math.sqrt(max(1.0, rows / columns))", "1.0"),
        ("Muon in production without the backbone's rate", "gpu", "training.optimizer", "optim.muon_lr * optim.backbone_lr / optim.lr)", "optim.muon_lr)"),
        ("Muon's momentum in production added up, not averaged", "gpu", "training.muon", "torch._foreach_lerp_(momenta, grads, 1 - MOMENTUM)",
         "torch._foreach_mul_(momenta, MOMENTUM)\n        torch._foreach_add_(momenta, grads)"),
        # Production: going on
        ("average lost in production on resume", "gpu", "training.resume", 'run.average.load_state_dict(state["average"])', 'run.average.load_state_dict(state["model"])'),
        ("moments lost in production on resume", "gpu", "training.resume", 'run.optimizer.load_state_dict(state["optimizer"])', 'run.optimizer.load_state_dict({**state["optimizer"], "state": {}})'),
        ("number of steps lost in production on resume", "gpu", "training.resume", 'state["step"], state["epoch"], state["batch"]\n', '0, state["epoch"], state["batch"]\n'),
        # Production: classes
        ("class ids off by one in production", "gpu", "loss.criterion", "torch.where(matched, query * classes + labels, queries * classes)",
         "torch.where(matched, query * classes + (labels - 1).clamp(min=0), queries * classes)"),
        ("α of ½ in production, whatever is asked for", "gpu", "loss.classification", "weight = alpha * targets + (1 - alpha) * (1 - targets)", "weight = 0.5"),
    ]
]  # fmt: skip
"""α and class ids have lines of their own in other tables for a single loss; these have to be found in a run."""
