"""What the model reads of its configuration, and which values it may have."""

from dataclasses import dataclass

CHOICES = {
    "encoder": ("attention", "conv", "pyramid_conv"),
    "cross_attention": ("smca", "dense"),
    "prior_scale": ("fixed", "single", "independent"),
    "prior_heads": ("independent", "shared"),
    "prior_unit": ("pixels", "box"),
    "prior_state": ("attended", "entering"),
    "position_encoding": ("centers", "detr"),
    "padding_cells": ("covered", "nearest"),
    "query_init": ("random", "grid", "anchors", "selected"),
    "class_scores": ("sigmoid", "softmax"),
}


@dataclass(frozen=True)
class ModelConfig:
    """As published, over one level, unless said otherwise; each value is checked when it is made.

    The rows of the method's ablation are other values of these fields, and no further code: a prior or none
    (`cross_attention`), what the prior predicts (`prior_scale`), whether each head has its own (`prior_heads`), one
    level or several (`strides`), what the encoder exchanges between them (`encoder`, `cross_level_blocks`), and whether
    a query weighs them (`scale_selection`). The production model has these fields, with these defaults, and more.
    """

    num_classes: int = 80
    """K, classes of object; "no object" is none of them."""
    class_scores: str = "sigmoid"
    """"sigmoid": each class by itself; or "softmax", as DETR: over K + 1 outputs, of which the last one is "no object"."""
    hidden_dim: int = 256
    """C, channels of a cell and of a query: a multiple of num_heads and of 4."""
    num_heads: int = 8
    """h, attention heads, in the encoder and in both attentions of the decoder."""
    num_queries: int = 300
    """N, object queries: the most objects that can be found in one image."""
    strides: tuple[int, ...] = (32,)
    """Pixels of the network's input per cell, for each of the J levels, finest first. Published also: (16, 32, 64)."""
    encoder: str = "attention"
    """"attention"; or depthwise convolutions, with exchange between neighbouring levels in every block: "conv", the
    authors' own, or beyond the paper "pyramid_conv", to which it is all the same how far an image is padded."""
    encoder_layers: int = 6
    """Blocks of the encoder, ≥ 0; all levels share their parameters."""
    cross_level_blocks: tuple[int, ...] = ()
    """Blocks (from 0) in which the cells of all levels attend to each other; in the others each level attends to itself.
    Published with three levels: (2,) of 5. Empty for any other encoder."""
    halve_finest: bool = False
    """Behind the encoder, a convolution of stride 2 halves the finest level. Published with encoder="conv" and strides
    (8, 16, 32, 64): the decoder reads strides 16, 16, 32 and 64."""
    decoder_layers: int = 6
    """M, layers of the decoder, ≥ 1. Each gives logits and boxes."""
    feedforward_dim: int = 2048
    """F, hidden channels of the feed-forward networks."""
    pre_norm: bool = False
    """Normalise what enters a sublayer (True) or the sum that leaves it (False)."""
    cross_attention: str = "smca"
    """"smca", or "dense": DETR's plain attention, without any prior."""
    prior_scale: str = "independent"
    """"fixed" (r = 1), "single" (one r for both axes) or "independent" (one for each axis)."""
    prior_heads: str = "independent"
    """"independent" (offset and scale for each head and level) or "shared" (one of each per level, for all heads)."""
    prior_sigma_px: float | tuple[float, ...] = 64.0
    """Standard deviation of the Gaussian at r = 1, in pixels of the network's input: in every level, or one for each.
    β = 2·(this/stride)². Published for strides of 16, 32, 64: (√2·32, 64, √2·64), neither one width nor one β."""
    prior_state: str = "attended"
    """O is made of a query after its layer's self-attention ("attended"), or as it enters the layer ("entering"), as in
    the authors' code."""
    position_encoding: str = "centers"
    """Where a cell is, in the sine encoding: at its centre in the unpadded image ("centers"); or its number among the
    cells that are not padded, as in DETR's code ("detr")."""
    padding_cells: str = "covered"
    """Which cells are padded: those that no pixel of the image is in ("covered"); or those whose nearest pixel of the
    padded image is padding, as in DETR's code ("nearest")."""
    scale_selection: bool = True
    """Each query weighs the levels by a head of its own (True), or every level weighs 1/J (False)."""
    query_init: str = "random"
    """"random"; or "grid": a learned centre per query, which starts on a grid, is added to the centre head's. Beyond the
    paper: "anchors", a learned box per query, from which its position is made; or "selected", the box of a cell."""
    box_refinement: bool = False
    """Each layer's box logits are the reference of the next layer's (True), or all share the first (False)."""
    prior_unit: str = "pixels"
    """Unit of the Gaussians' widths and offsets: "pixels" (prior_sigma_px), or "box", the sides of the query's own box.
    Beyond the paper; needs a box per query: query_init "anchors" or "selected"."""
    dense_head: bool = False
    """Every cell of the encoder classifies and regresses. Beyond the paper; query_init="selected" needs it."""
    denoising_groups: int = 0
    """In training, this many groups of noised objects are queries as well. Beyond the paper; needs a box per query."""

    def __post_init__(self) -> None:
        """Raise a ValueError that names the field unless every value is one that the model can have."""
        for field, allowed in CHOICES.items():
            if getattr(self, field) not in allowed:
                raise ValueError(f"config.{field}: expected one of {list(allowed)}, got {getattr(self, field)!r}.")
        for field in ("num_classes", "hidden_dim", "num_heads", "num_queries", "decoder_layers", "feedforward_dim"):
            if getattr(self, field) < 1:
                raise ValueError(f"config.{field}: expected at least 1, got {getattr(self, field)}.")
        if self.encoder_layers < 0:
            raise ValueError(f"config.encoder_layers: expected at least 0, got {self.encoder_layers}.")
        if self.hidden_dim % self.num_heads != 0 or self.hidden_dim % 4 != 0:
            raise ValueError(
                f"config.hidden_dim: expected a multiple of num_heads = {self.num_heads} and of 4, got "
                f"{self.hidden_dim}. Every head gets the same number of channels, and the position encoding a quarter "
                "each for sine and cosine of y and x."
            )
        if isinstance(self.prior_sigma_px, tuple) and len(self.prior_sigma_px) != len(self.strides):
            raise ValueError(
                f"config.prior_sigma_px: expected one number of pixels, or one for each of {len(self.strides)} levels, got "
                f"{self.prior_sigma_px}."
            )
        sigmas = self.prior_sigma_px if isinstance(self.prior_sigma_px, tuple) else (self.prior_sigma_px,)
        if not all(sigma > 0 for sigma in sigmas):
            raise ValueError(f"config.prior_sigma_px: expected a number of pixels > 0, got {self.prior_sigma_px}.")
        _check_boxes_of_queries(self)
        _check_levels(self)


def sigma_of_levels(config: ModelConfig) -> tuple[float, ...]:
    """Standard deviation of the Gaussian at r = 1 on each level, in pixels."""
    sigma = config.prior_sigma_px
    return sigma if isinstance(sigma, tuple) else (sigma,) * len(config.strides)


def class_outputs(config: ModelConfig) -> int:
    """Outputs of the class head per query: K, or K + 1 with one for "no object"."""
    return config.num_classes + (config.class_scores == "softmax")


def uses_prior(config: ModelConfig) -> bool:
    """Whether the cross-attention is modulated, so that centre, offset and scale heads exist."""
    return config.cross_attention == "smca"


def has_anchors(config: ModelConfig) -> bool:
    """Whether a query has a box from the start, from which its position is made."""
    return config.query_init in ("anchors", "selected")


def selects_scales(config: ModelConfig) -> bool:
    """Whether queries weigh the levels, so that level heads exist."""
    return config.scale_selection and len(config.strides) > 1


def embeds_levels(config: ModelConfig) -> bool:
    """Whether a learned embedding tells the encoder which level a cell is of.

    Only the encoder reads it. In the decoder it adds the same to all logits of a softmax, which is over one level, and
    so changes nothing; "pyramid_conv" uses no position encoding.
    """
    return len(config.strides) > 1 and config.encoder != "pyramid_conv" and config.encoder_layers > 0


def decoder_strides(config: ModelConfig) -> tuple[int, ...]:
    """Pixels per cell of each level that decoder and dense head read.

    >>> decoder_strides(ModelConfig(strides=(8, 16, 32, 64), encoder="conv", halve_finest=True))
    (16, 16, 32, 64)
    """
    finest = config.strides[0] * (2 if config.halve_finest else 1)
    return (finest, *config.strides[1:])


def _check_boxes_of_queries(config: ModelConfig) -> None:
    if config.denoising_groups < 0:
        raise ValueError(f"config.denoising_groups: expected at least 0, got {config.denoising_groups}.")
    if not has_anchors(config) and (config.prior_unit == "box" or config.denoising_groups):
        raise ValueError(
            'config.query_init: expected "anchors" or "selected" with prior_unit="box" or denoising_groups > 0, which need '
            f"a box per query, got {config.query_init!r}."
        )
    if config.denoising_groups and config.class_scores == "softmax":
        raise ValueError(
            f'config.denoising_groups: expected 0 with class_scores="softmax", got {config.denoising_groups}. The loss of '
            "noised queries is not defined for it."
        )
    if config.prior_unit == "box" and not uses_prior(config):
        raise ValueError('config.prior_unit: expected "pixels" with cross_attention="dense", which has no prior.')
    if config.query_init == "selected" and not config.dense_head:
        raise ValueError('config.dense_head: expected True with query_init="selected", whose queries are cells.')


def _check_levels(config: ModelConfig) -> None:
    strides, blocks = config.strides, config.cross_level_blocks
    if not strides or strides[0] < 1 or any(strides[j] <= strides[j - 1] for j in range(1, len(strides))):
        raise ValueError(f"config.strides: expected pixels per cell for each level, finest first, got {strides}.")
    if len(set(blocks) & set(range(config.encoder_layers))) != len(blocks):
        raise ValueError(
            f"config.cross_level_blocks: expected different indices of {config.encoder_layers} encoder_layers, got "
            f"{blocks}."
        )
    if config.encoder != "attention" and blocks:
        raise ValueError(
            f'config.cross_level_blocks: expected () with encoder="{config.encoder}", which exchanges in every block, got '
            f"{blocks}."
        )
    ratios = [strides[j] / strides[j - 1] for j in range(1, len(strides))]
    if config.encoder == "conv" and any(ratio != 2 for ratio in ratios):
        raise ValueError(
            f'config.strides: expected each twice the one before with encoder="conv", whose kernels between levels have '
            f'a stride of 2, got {strides}. encoder="pyramid_conv" takes multiples of one another, encoder="attention" '
            "any strides."
        )
    if config.encoder == "pyramid_conv" and any(ratio % 1 for ratio in ratios):
        raise ValueError(
            f'config.strides: expected multiples of one another with encoder="pyramid_conv", got {strides}. A coarse cell '
            'covers whole cells of the next finer level; encoder="attention" takes any strides.'
        )
