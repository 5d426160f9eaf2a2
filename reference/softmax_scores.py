"""DETR's own scores of classes: a softmax with an output for "no object", and its loss (class_scores="softmax").

SMCA scores each class by itself, p = σ(logit), and "no object" is that all of them are low. DETR has one output more than
there are classes, and the scores of all add up to 1. For the outputs z of one query, k = 0 … K − 1 the classes and k = K
"no object":

    (K1) z         = class_head(D)                                            K + 1 of them; D: `decoder` (D8)
    (K2) p_k       = e^z_k / Σ_j e^z_j
    (K3) logit_k   = ln( p_k/(1 − p_k) ) = z_k − ln Σ_{j≠k} e^z_j             of the classes, k < K

By (K3), σ(logit_k) = p_k: whoever reads scores or a match cost from logits need not know how the model scores.

DETR's class term of the loss (classification="softmax" in `losses`) is a cross-entropy over all K + 1, as a weighted mean
over the queries, and so is not divided by the number of boxes:

    (K4) c_n       = the class of the object that query n is matched to, else K
    (K5) v_n       = 1 where query n is matched, else the weight of "no object", 0.1
    (K6) class/l   = w_class · Σ v_n·( ln Σ_k e^z_nk − z_n,c_n ) / Σ v_n      both sums over images and queries n

The mean is over the images that are given. In training those are the images that a process has at a time, as in DETR.
Its match cost is (A4) of `matching`. Source: DETR, "Object detection set prediction loss"; the weighted mean is its code's.
"""

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from smca.reference.arrays import FloatArray, IntArray, require_shape

NO_OBJECT_WEIGHT = 0.1


def log_odds(z: FloatArray) -> FloatArray:
    """The logits of the classes, [..., K + 1] → [..., K]. Equation (K3).

    ln p − ln(1 − p) would lose it where one output has nearly all: 1 − p is 0 there.

    Against two others that are as likely, ½; then 2000 ahead of the others:

    >>> log_odds(np.array([0.0, 0.0, 0.0])).round(4).tolist()
    [-0.6931, -0.6931]
    >>> log_odds(np.array([1000.0, -1000.0, -1000.0])).round(4).tolist()
    [1999.3069, -2000.0]
    """
    others = [np.logaddexp.reduce(np.delete(z, k, axis=-1), axis=-1) for k in range(z.shape[-1] - 1)]
    result: FloatArray = z[..., :-1] - np.stack(others, axis=-1)
    return result


def softmax_loss(
    z: FloatArray, pairs: tuple[IntArray, IntArray], labels: IntArray, no_object_weight: float = NO_OBJECT_WEIGHT
) -> float:
    """The weighted cross-entropy of the queries of a layer. Equations (K4) to (K6), without w_class.

    Args:
        z: [B, N, K + 1].
        pairs: image and query of each matched pair, [P] each.
        labels: of its object, [P].
        no_object_weight: of a query without an object, > 0.

    Returns:
        A mean, ≥ 0.

    Raises:
        ValueError: a weight that is not a finite number > 0.

    Two queries and one class. The matched query gives its class p = ¾, the other gives "no object" ½: (ln 4/3 + 0.1·ln 2)/1.1.

    >>> z = np.array([[[np.log(3.0), 0.0], [0.0, 0.0]]])
    >>> round(softmax_loss(z, (np.array([0]), np.array([0])), np.array([0])), 4)
    0.3245
    """
    if not 0 < no_object_weight < np.inf:
        raise ValueError(f"no_object_weight: expected a finite number > 0, got {no_object_weight}.")
    no_object = z.shape[-1] - 1
    wanted = np.full(z.shape[:2], no_object)
    wanted[pairs] = labels  # (K4)
    weight = np.where(wanted == no_object, no_object_weight, 1.0)  # (K5)
    chosen = np.take_along_axis(z, wanted[..., None], axis=-1)[..., 0]
    cross_entropy = np.logaddexp.reduce(z, axis=-1) - chosen
    return float((weight * cross_entropy).sum() / weight.sum())  # (K6)


def class_logits_of(outputs: Mapping[str, npt.ArrayLike], logits: FloatArray) -> FloatArray:
    """z of a model's outputs, [M, B, N, K + 1], converted and checked against its logits [M, B, N, K].

    Raises:
        ValueError: outputs of a model that scores by sigmoids, or another shape.
    """
    if "class_logits" not in outputs:
        raise ValueError(
            "outputs['class_logits']: expected the K + 1 outputs of every query for classification=\"softmax\", got the keys "
            f'{sorted(outputs)}. Use a model with class_scores="softmax".'
        )
    z = np.asarray(outputs["class_logits"], dtype=np.float64)
    shape = (*logits.shape[:3], logits.shape[3] + 1)
    require_shape("outputs['class_logits']", z, shape, 'Give one more than logits has, the last one for "no object".')
    return z
