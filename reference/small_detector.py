"""A detector so small that its whole gradient fits on a page: what a training step is specified on.

It has one parameter of every kind that trainers treat in a way of its own: a backbone, matrices inside, heads, a norm, biases.
What each query sees of an image is given: x [B, N, I], numbers in place of features. For decoder layers l = 1 … M:

    (Q1) f   = x·W_backboneᵀ                                                  W [C, I], no bias
    (Q2) h_0 = layer_norm(f) = n·γ + β        n = (f − mean)/d,  d = √(variance + 10⁻⁵)                   layers (L3)
    (Q3) h_l = tanh(h_{l−1}·W_lᵀ + b_l)
    (Q4) logits_l = h_l·W_classᵀ + b_class    boxes_l = σ(h_l·W_boxᵀ + b_box)                             one head for all layers

Backward, with a bar for the gradient of a scalar, sums over images and queries wherever a parameter is shared by them:

    (Q5) ō_l = b̄oxes_l · boxes_l·(1 − boxes_l)                                                            from (Q4)
    (Q6) h̄_l = l̄ogits_l·W_class + ō_l·W_box + ā_{l+1}·W_{l+1}                 (the last only where there is a layer l + 1)
    (Q7) ā_l = h̄_l·(1 − h_l²)                                                                             from (Q3)
    (Q8) W̄_l = Σ ā_l ⊗ h_{l−1}   b̄_l = Σ ā_l   W̄_class = Σ_l Σ l̄ogits_l ⊗ h_l   b̄_class = Σ_l Σ l̄ogits_l   likewise the box head
    (Q9) γ̄ = Σ h̄_0·n   β̄ = Σ h̄_0   n̄ = h̄_0·γ   f̄ = ( n̄ − mean(n̄) − n·mean(n̄·n) )/d   W̄_backbone = Σ f̄ ⊗ x     from (Q2), (Q1)
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from smca.reference.arrays import FloatArray, require_shape
from smca.reference.layers import LAYER_NORM_EPSILON, layer_norm, linear, sigmoid

Params = Mapping[str, FloatArray]


class Sizes(NamedTuple):
    """Of the detector."""

    inputs: int
    """I."""
    channels: int
    """C."""
    classes: int
    """K."""
    layers: int
    """M, at least 1."""


def parameter_shapes(sizes: Sizes) -> dict[str, tuple[int, ...]]:
    """Name of every parameter → its shape, weights as [out, in].

    >>> list(parameter_shapes(Sizes(inputs=3, channels=2, classes=5, layers=1)).items())[:3]
    [('backbone.weight', (2, 3)), ('norm.weight', (2,)), ('norm.bias', (2,))]
    """
    channels = sizes.channels
    shapes: dict[str, tuple[int, ...]] = {"backbone.weight": (channels, sizes.inputs)}
    shapes |= {"norm.weight": (channels,), "norm.bias": (channels,)}
    for layer in range(sizes.layers):
        shapes |= {f"layers.{layer}.weight": (channels, channels), f"layers.{layer}.bias": (channels,)}
    for head, outputs in (("class_head", sizes.classes), ("box_head", 4)):
        shapes |= {f"{head}.weight": (outputs, channels), f"{head}.bias": (outputs,)}
    return shapes


def sizes_of(params: Params) -> Sizes:
    """The sizes that parameters have.

    Raises:
        ValueError: a parameter is missing, too many, or of another shape.

    >>> sizes = Sizes(inputs=3, channels=2, classes=5, layers=1)
    >>> sizes_of({name: np.zeros(shape) for name, shape in parameter_shapes(sizes).items()}) == sizes
    True
    """
    channels, inputs = params["backbone.weight"].shape
    layers = sum(name.startswith("layers.") and name.endswith(".weight") for name in params)
    sizes = Sizes(inputs, channels, params["class_head.weight"].shape[0], layers)
    expected = parameter_shapes(sizes)
    if set(expected) != set(params):
        raise ValueError(f"params: expected the names {sorted(expected)}, got {sorted(params)}. Name each, no other.")
    for name, shape in expected.items():
        require_shape(f"params[{name!r}]", params[name], shape, "Weights are [out, in].")
    return sizes


def forward(params: Params, x: FloatArray) -> dict[str, FloatArray]:
    """Equations (Q1) to (Q4).

    Args:
        params: by name, of the shapes of `parameter_shapes`.
        x: [B, N, I].

    Returns:
        "logits" [M, B, N, K] and "boxes" [M, B, N, 4], cxcywh in (0, 1).

    Raises:
        ValueError: parameters that do not fit each other or x.

    With all weights and biases at 0 it says ½ to everything:

    >>> zeros = {n: np.zeros(s) for n, s in parameter_shapes(Sizes(inputs=3, channels=2, classes=1, layers=1)).items()}
    >>> {name: value.ravel().tolist() for name, value in forward(zeros, np.ones((1, 1, 3))).items()}
    {'logits': [0.0], 'boxes': [0.5, 0.5, 0.5, 0.5]}
    """
    hidden = _hidden(params, x)[1:]
    return {
        "logits": np.stack([linear(h, params, "class_head") for h in hidden]),  # (Q4)
        "boxes": np.stack([sigmoid(linear(h, params, "box_head")) for h in hidden]),
    }


def _hidden(params: Params, x: FloatArray) -> list[FloatArray]:
    """h_0 to h_M, each [B, N, C]."""
    sizes = sizes_of(params)
    require_shape("x", x, (None, None, sizes.inputs), "Give [B, N, I], as many numbers as backbone.weight has columns.")
    states = [layer_norm(x @ params["backbone.weight"].T, params, "norm")]  # (Q1), (Q2)
    for layer in range(sizes.layers):
        states.append(np.tanh(linear(states[-1], params, f"layers.{layer}")))  # (Q3)
    return states


def backward(params: Params, x: FloatArray, d_logits: FloatArray, d_boxes: FloatArray) -> dict[str, FloatArray]:
    """The gradient of every parameter. Equations (Q5) to (Q9).

    Args:
        params, x: as given to `forward`.
        d_logits: [M, B, N, K], the gradient of a scalar with respect to "logits".
        d_boxes: [M, B, N, 4], with respect to "boxes".

    Returns:
        Name → gradient, shaped like the parameter.

    Raises:
        ValueError: as `forward`, or gradients of other shapes than the outputs'.

    Where nothing is learned yet, only the heads' biases get a gradient; the box's is ½·½ of what it is told:

    >>> zeros = {n: np.zeros(s) for n, s in parameter_shapes(Sizes(inputs=3, channels=2, classes=1, layers=1)).items()}
    >>> told = np.array([1.0, -2.0, 0.0, 4.0]).reshape(1, 1, 1, 4)
    >>> gradient = backward(zeros, np.ones((1, 1, 3)), np.full((1, 1, 1, 1), 3.0), told)
    >>> gradient["class_head.bias"].tolist(), gradient["box_head.bias"].tolist(), gradient["layers.0.bias"].tolist()
    ([3.0], [0.25, -0.5, 0.0, 1.0], [0.0, 0.0])
    """
    outputs, states = forward(params, x), _hidden(params, x)
    require_shape("d_logits", d_logits, outputs["logits"].shape, "It is the gradient of logits.")
    require_shape("d_boxes", d_boxes, outputs["boxes"].shape, "It is the gradient of boxes.")
    gradients = {name: np.zeros(value.shape) for name, value in params.items()}

    def add_linear(name: str, d_out: FloatArray, given: FloatArray) -> None:
        gradients[f"{name}.weight"] += np.einsum("bno,bni->oi", d_out, given)  # (Q8)
        gradients[f"{name}.bias"] += d_out.sum(axis=(0, 1))

    d_hidden = np.zeros(states[0].shape)
    for layer in reversed(range(len(states) - 1)):
        boxes, hidden = outputs["boxes"][layer], states[layer + 1]
        d_box_logits = d_boxes[layer] * boxes * (1 - boxes)  # (Q5)
        add_linear("class_head", d_logits[layer], hidden)
        add_linear("box_head", d_box_logits, hidden)
        of_heads = d_logits[layer] @ params["class_head.weight"] + d_box_logits @ params["box_head.weight"]
        d_sum = (d_hidden + of_heads) * (1 - hidden**2)  # (Q6), (Q7)
        add_linear(f"layers.{layer}", d_sum, states[layer])
        d_hidden = d_sum @ params[f"layers.{layer}.weight"]

    features = x @ params["backbone.weight"].T
    centered = features - features.mean(axis=-1, keepdims=True)
    deviation = np.sqrt(np.mean(centered**2, axis=-1, keepdims=True) + LAYER_NORM_EPSILON)  # d
    normalised = centered / deviation  # n
    gradients["norm.weight"] = (d_hidden * normalised).sum(axis=(0, 1))  # (Q9)
    gradients["norm.bias"] = d_hidden.sum(axis=(0, 1))
    d_normalised = d_hidden * params["norm.weight"]
    along = normalised * np.mean(d_normalised * normalised, axis=-1, keepdims=True)
    d_features = (d_normalised - d_normalised.mean(axis=-1, keepdims=True) - along) / deviation
    gradients["backbone.weight"] = np.einsum("bnc,bni->ci", d_features, x)
    return gradients
