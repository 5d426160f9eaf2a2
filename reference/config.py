"""What the model reads of its configuration, and which values it may have.

The production model's configuration has these fields and many more; this package asks for no class, only for the
fields (a `typing.Protocol`), so that it depends on nobody.
"""

from typing import Protocol

CHOICES = {
    "encoder": ("attention", "conv"),
    "cross_attention": ("smca", "dense"),
    "prior_scale": ("fixed", "single", "independent"),
    "prior_heads": ("independent", "shared"),
    "query_init": ("random", "grid"),
}


class ModelConfig(Protocol):
    """The fields that `model.forward` reads. Whatever has them will do.

    The rows of the method's ablation are values of these fields, and no further code: a prior or none
    (`cross_attention`), what the prior predicts (`prior_scale`), whether each head has its own (`prior_heads`), one
    level or several (`strides`), what the encoder exchanges between them (`encoder`, `cross_level_blocks`), and whether
    a query weighs them (`scale_selection`).
    """

    @property
    def num_classes(self) -> int:
        """K, classes of object. There is no class for "no object"."""
        ...

    @property
    def hidden_dim(self) -> int:
        """C, channels of a cell and of a query: a multiple of num_heads and of 4."""
        ...

    @property
    def num_heads(self) -> int:
        """h, attention heads, in the encoder and in both attentions of the decoder."""
        ...

    @property
    def num_queries(self) -> int:
        """N, object queries: the most objects that can be found in one image."""
        ...

    @property
    def strides(self) -> tuple[int, ...]:
        """Pixels of the network's input a cell, of each of the J levels, finest first. Published: (32,) or (16, 32, 64)."""
        ...

    @property
    def encoder(self) -> str:
        """ "attention", or "conv": depthwise convolutions, with exchange between neighbouring levels in every block."""
        ...

    @property
    def encoder_layers(self) -> int:
        """Blocks of the encoder, ≥ 0; all levels share their parameters."""
        ...

    @property
    def cross_level_blocks(self) -> tuple[int, ...]:
        """Blocks (from 0) in which the cells of all levels attend to each other; in the others each level attends to itself.

        Published: (2,) of 5. Empty for encoder="conv".
        """
        ...

    @property
    def decoder_layers(self) -> int:
        """M, layers of the decoder, ≥ 1. Each gives logits and boxes."""
        ...

    @property
    def feedforward_dim(self) -> int:
        """F, hidden channels of the feed-forward networks."""
        ...

    @property
    def pre_norm(self) -> bool:
        """Normalise what enters a sublayer (True) or the sum that leaves it (False, as published)."""
        ...

    @property
    def cross_attention(self) -> str:
        """ "smca", or "dense": DETR's plain attention, without any prior."""
        ...

    @property
    def prior_scale(self) -> str:
        """ "fixed" (r = 1), "single" (one r for both axes) or "independent" (one for each axis)."""
        ...

    @property
    def prior_heads(self) -> str:
        """ "independent" (offset and scale a head) or "shared" (one offset and one scale for all heads), a level."""
        ...

    @property
    def prior_sigma_px(self) -> float:
        """Standard deviation of the Gaussian at r = 1, in pixels of the network's input, in every level. β = 2·(this/stride)²."""
        ...

    @property
    def scale_selection(self) -> bool:
        """Each query weighs the levels by a head of its own (True), or every level weighs 1/J (False)."""
        ...

    @property
    def query_init(self) -> str:
        """ "random", or "grid": a learned centre a query, which starts on a grid, is added to the centre head's."""
        ...

    @property
    def box_refinement(self) -> bool:
        """Each layer's box logits are the reference of the next layer's (True), or all share the first (False)."""
        ...


def check_config(config: ModelConfig) -> None:
    """Raise a ValueError that names the field unless every value is one that the model can have."""
    for field, allowed in CHOICES.items():
        if getattr(config, field) not in allowed:
            raise ValueError(f"config.{field}: expected one of {list(allowed)}, got {getattr(config, field)!r}.")
    for field in ("num_classes", "hidden_dim", "num_heads", "num_queries", "decoder_layers", "feedforward_dim"):
        if getattr(config, field) < 1:
            raise ValueError(f"config.{field}: expected at least 1, got {getattr(config, field)}.")
    if config.encoder_layers < 0:
        raise ValueError(f"config.encoder_layers: expected at least 0, got {config.encoder_layers}.")
    if config.hidden_dim % config.num_heads != 0 or config.hidden_dim % 4 != 0:
        raise ValueError(
            f"config.hidden_dim: expected a multiple of num_heads = {config.num_heads} and of 4, got "
            f"{config.hidden_dim}. Every head gets the same number of channels, and the position encoding a quarter "
            "each for sine and cosine of y and x."
        )
    if not config.prior_sigma_px > 0:
        raise ValueError(f"config.prior_sigma_px: expected a number of pixels > 0, got {config.prior_sigma_px}.")
    _check_levels(config)


def uses_prior(config: ModelConfig) -> bool:
    """Whether the cross-attention is modulated, so that centre, offset and scale heads exist."""
    return config.cross_attention == "smca"


def selects_scales(config: ModelConfig) -> bool:
    """Whether queries weigh the levels, so that level heads exist."""
    return config.scale_selection and len(config.strides) > 1


def embeds_levels(config: ModelConfig) -> bool:
    """Whether a learned embedding tells the encoder which level a cell is of.

    Only attention in the encoder reads it. In the decoder it would add the same to all logits of a softmax, which is
    over one level, and so change nothing; convolutions use no position encoding.
    """
    return len(config.strides) > 1 and config.encoder == "attention" and config.encoder_layers > 0


def _check_levels(config: ModelConfig) -> None:
    strides, blocks = tuple(config.strides), tuple(config.cross_level_blocks)
    if not strides or strides[0] < 1 or any(strides[j] <= strides[j - 1] for j in range(1, len(strides))):
        raise ValueError(f"config.strides: expected pixels a cell for each level, finest first, got {strides}.")
    if len(set(blocks) & set(range(config.encoder_layers))) != len(blocks):
        raise ValueError(
            f"config.cross_level_blocks: expected different indices of {config.encoder_layers} encoder_layers, got "
            f"{blocks}."
        )
    if config.encoder == "conv" and blocks:
        raise ValueError(
            f'config.cross_level_blocks: expected () with encoder="conv", which exchanges in every block, got {blocks}.'
        )
    if config.encoder == "conv" and any(strides[j] % strides[j - 1] for j in range(1, len(strides))):
        raise ValueError(
            f'config.strides: expected multiples of one another with encoder="conv", got {strides}. A coarse cell '
            'covers whole cells of the next finer level; encoder="attention" takes any strides.'
        )
