"""What the model reads of its configuration, and which values it may have.

The production model's configuration has these fields and many more; this package asks for no class, only for the
fields (a `typing.Protocol`), so that it depends on nobody.
"""

from typing import Protocol

CHOICES = {
    "cross_attention": ("smca", "dense"),
    "prior_scale": ("fixed", "single", "independent"),
    "query_init": ("random", "grid"),
}


class ModelConfig(Protocol):
    """The fields that `model.forward` reads. Whatever has them will do."""

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
    def encoder_layers(self) -> int:
        """Layers of the encoder, ≥ 0."""
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
        """ "fixed" (r = 1), "single" (one r a head for both axes) or "independent" (one for each axis)."""
        ...

    @property
    def prior_sigma_px(self) -> float:
        """Standard deviation of the Gaussian at r = 1, in pixels of the network's input. β = 2·(this/stride)²."""
        ...

    @property
    def query_init(self) -> str:
        """ "random", or "grid": a learned centre a query, which starts on a grid, is added to the centre head's."""
        ...

    @property
    def box_refinement(self) -> bool:
        """Each layer's box logits are the reference of the next layer's (True), or all share the first (False)."""
        ...

    @property
    def stride(self) -> int:
        """Pixels of the network's input a cell."""
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
    for field in ("prior_sigma_px", "stride"):
        if not getattr(config, field) > 0:
            raise ValueError(f"config.{field}: expected a number of pixels > 0, got {getattr(config, field)}.")


def uses_prior(config: ModelConfig) -> bool:
    """Whether the cross-attention is modulated, so that centre, offset and scale heads exist."""
    return config.cross_attention == "smca"
