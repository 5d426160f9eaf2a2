"""SMCA-DETR: images in, class logits and boxes out.

    images → backbone → one projection per level → encoder → decoder (Gaussian-modulated cross-attention) → heads
                                                           (→ the finest level halved)

    model = SMCADETR.from_pretrained("runs/demo/model")
    detections = model.predict([PIL.Image.open("photo.jpg")])

The same parameters, exported with ``state_dict()``, drive ``smca.reference.model.forward``.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from smca.datasets import Augmentation, Sample, Targets, collate
from smca.datasets.images import to_rgb
from smca.gpu.config import ModelConfig
from smca.gpu.config_json import cut
from smca.gpu.files import SavedModel, open_model, write_model
from smca.gpu.model.backbone import Backbone, rows_by_size
from smca.gpu.model.decoder import Decoder
from smca.gpu.model.denoising import FurtherQueries, draw_noise, noised_queries
from smca.gpu.model.dense_head import DenseHead, select_queries
from smca.gpu.model.detections import Detections, decode
from smca.gpu.model.encoded import EncodedImage, evaluating
from smca.gpu.model.encoder import Encoder
from smca.gpu.model.explanation import Explanation
from smca.gpu.model.layers import Attention, Grid, log_odds, map_of_tokens, split_levels, tokens_of_map
from smca.gpu.model.levels import Extent, halved, projected, projections
from smca.gpu.model.position import counted_position_encoding, sine_position_encoding


class SMCADETR(nn.Module):
    """The detector. ``config.cross_attention="dense"`` makes it DETR, with everything else unchanged."""

    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(self, config: ModelConfig, *, attention_backend: str = "auto", download: bool = True) -> None:
        """Build the network with fresh weights (the backbone's published ones, if its config names some).

        Args:
            config: what to build.
            attention_backend: backend of ``smca.gpu.attention.smca_attention``.
            download: False leaves published backbone weights out, for a model whose weights are loaded next.
        """
        super().__init__()
        self.config = config
        self.backbone = Backbone(config.backbone, config.strides, download=download)
        self.input_proj = projections(self.backbone.channels, config)
        # Only the encoder reads it: in the decoder it adds the same to all keys of a softmax, which changes nothing.
        levels, read = len(config.strides), config.encoder != "pyramid_conv" and config.encoder_layers > 0
        self.level_embed = nn.Parameter(torch.zeros(levels, config.hidden_dim)) if levels > 1 and read else None
        self.encoder, self.decoder = Encoder(config), Decoder(config, attention_backend)
        dim = config.hidden_dim
        self.halve = nn.Conv2d(dim, dim, kernel_size=3, stride=2, padding=1) if config.halve_finest else None
        self.dense_head = DenseHead(config) if config.dense_head else None
        self.register_buffer("pixel_mean", torch.tensor(config.pixel_mean)[:, None, None], persistent=False)
        self.register_buffer("pixel_std", torch.tensor(config.pixel_std)[:, None, None], persistent=False)
        published = config.initialization == "published"
        for part in (self.encoder, None if published else self.halve, self.decoder, self.dense_head):
            for parameter in part.parameters() if part is not None else ():
                if parameter.dim() > 1:
                    nn.init.xavier_uniform_(parameter)
        if published:
            if self.level_embed is not None:
                nn.init.normal_(self.level_embed)
            for module in self.modules():
                if isinstance(module, Attention):
                    module.reset_as_published()
        self.decoder.reset_parameters()
        if self.dense_head is not None:
            self.dense_head.reset_parameters()

    def forward(
        self,
        images: Tensor,
        padding_mask: Tensor | None = None,
        targets: Targets | None = None,
        seeds: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Detect in a batch of padded images.

        Args:
            images: [B, 3, H, W] RGB, uint8 or float in [0, 1], each image in the top left corner.
            padding_mask: [B, H, W] bool, True = padded; None = no padding anywhere. In evaluation mode, what is detected in an
                image does not depend on it, nor on the other images (to rounding).
            targets: the objects, of which training with denoising_groups makes noised queries; not read otherwise.
            seeds: [B] int64, from which the noise of each image follows; None = from PyTorch's generator.

        Returns:
            "logits" [M, B, N, K], one sigmoid per class; "boxes" [M, B, N, 4] (cx, cy, w, h) in 0–1 of the unpadded image;
            both after each of the M decoder layers, the last layer last. With class_scores="softmax" the logits are log-odds, whose
            sigmoid is the softmax of "class_logits" [M, B, N, K + 1], the last one "no object". With noised queries,
            "further_logits" and "further_boxes" likewise. With a dense head "cell_logits" [B, ΣL, K], "cell_boxes" and
            "cell_anchors" [B, ΣL, 4] (cxcywh, likewise) and "cell_padding" [B, ΣL] bool, of the cells of all levels. Not so with
            encoder="conv" in evaluation mode: then of an image in a padded batch there are logits and boxes alone.
        """
        further = None
        if self.training and self.config.denoising_groups and targets is not None:
            if seeds is None:
                seeds = torch.randint(2**63 - 1, images.shape[:1], device=images.device)
            noise = draw_noise(seeds, targets.labels, self.config.denoising_groups, self.config.num_classes)
            further = noised_queries(targets, noise)
        pixels = self.normalize(images, padding_mask)
        batch, _, height, width = images.shape
        if padding_mask is None:
            # Filled on the device: copying a tensor made from a list would wait for the GPU.
            valid_sizes = torch.stack(
                [images.new_full((batch,), side, dtype=torch.int64) for side in (height, width)], -1
            )
            return self.detect(self.backbone(pixels), valid_sizes, further, padded=False)
        valid_sizes = valid_sizes_of(padding_mask)
        if not self.training:
            if self.config.encoder == "conv":
                return self._each_size_alone(pixels, valid_sizes)
            return self.detect(self.backbone.each_alone(pixels, valid_sizes), valid_sizes, further)
        # In training, where nothing may wait for the device, the backbone sees the padding.
        return self.detect(self.backbone(pixels), valid_sizes, further, padded_size=(height, width))

    def normalize(self, images: Tensor, padding_mask: Tensor | None) -> Tensor:
        """Pixels in the backbone's input range; padding becomes 0, whatever it held."""
        scale = 1 / 255 if images.dtype == torch.uint8 else 1.0
        pixels = (images.to(self.pixel_mean.dtype) * scale - self.pixel_mean) / self.pixel_std
        return pixels if padding_mask is None else pixels.masked_fill(padding_mask[:, None], 0.0)

    def _each_size_alone(self, pixels: Tensor, valid_sizes: Tensor) -> dict[str, Tensor]:
        """Images of one size together, without their padding, on which an encoder that masks nothing would depend. Waits for the
        device."""
        rows_of = rows_by_size(valid_sizes)
        parts = [
            self.detect(self.backbone(pixels[rows, :, :height, :width]), valid_sizes[rows], padded=False)
            for (height, width), rows in rows_of.items()
        ]
        order = [row for rows in rows_of.values() for row in rows]
        back = sorted(range(len(order)), key=order.__getitem__)
        return {name: torch.cat([part[name] for part in parts], dim=1)[:, back] for name in ("logits", "boxes")}

    def detect(
        self,
        features: Sequence[Tensor],
        valid_sizes: Tensor,
        further: FurtherQueries | None = None,
        *,
        padded: bool = True,
        padded_size: tuple[int, int] | None = None,
    ) -> dict[str, Tensor]:
        """The part that ``smca.reference.model.forward`` specifies: backbone features to logits and boxes.

        Args:
            features: from the backbone, [B, channels, H, W] for each level that it has.
            valid_sizes: [B, 2] (height, width) of the unpadded images in pixels of the network's input.
            further: queries beside the model's own.
            padded: False promises that no cell is padding, so that masks are not needed.
            padded_size: (height, width) in pixels that all images were padded to; None = to be treated as if each were alone.
                Read with padding_cells="nearest" only.
        """
        # Positions and boxes stay in at least float32 under autocast; in a float64 model all is float64.
        valid_sizes = valid_sizes.to(self.decoder.norm.weight.dtype)
        nearest = self.config.padding_cells == "nearest"
        extent = Extent(valid_sizes, padded, padded_size if nearest else None)
        maps, grids = projected(features, self.input_proj, self.config.strides, extent)
        x = torch.cat([tokens_of_map(level_map) for level_map in maps], dim=1)
        positions = [self._position(level, grid) for level, grid in enumerate(grids)]
        pos = torch.cat(positions, dim=1)
        memory = self.encoder(x, pos, grids)
        if self.halve is not None:
            finest, *others = split_levels(memory, grids)
            half, grids[0] = halved(
                map_of_tokens(finest, grids[0]), grids[0], self.halve, self.config.decoder_strides[0], extent
            )
            memory = torch.cat([tokens_of_map(half), *others], dim=1)
            pos = torch.cat([self._position(0, grids[0]), *positions[1:]], dim=1)
        outputs, selected = {}, None
        if self.dense_head is not None:
            cells = self.dense_head(memory, grids)
            outputs = {"cell_logits": cells.logits, "cell_boxes": cells.box_logits.sigmoid()}
            outputs |= {"cell_anchors": cells.anchors, "cell_padding": cells.padding}
            if self.config.query_init == "selected":
                selected = select_queries(cells, grids, self.config.num_queries)
        logits, boxes = self.decoder(memory, pos, grids, selected, further)
        n = self.config.num_queries
        if self.config.class_scores == "softmax":
            outputs["class_logits"] = logits[:, :, :n]
            logits = log_odds(logits)
        if further is not None:
            outputs |= {"further_logits": logits[:, :, n:], "further_boxes": boxes[:, :, n:]}
        return {"logits": logits[:, :, :n], "boxes": boxes[:, :, :n], **outputs}

    def _position(self, level: int, grid: Grid) -> Tensor:
        """[B, L, C], what tells a level's cells their place."""
        channels = self.config.hidden_dim
        if self.config.position_encoding == "detr":
            mask, dtype = grid.key_padding_mask, grid.valid_cells.dtype
            if mask is None:
                mask = grid.valid_cells.new_zeros(len(grid.valid_cells), grid.cells, dtype=torch.bool)
            pos = counted_position_encoding(mask, grid.size, channels, dtype=dtype)
        else:
            pos = sine_position_encoding(grid.size, grid.valid_cells, channels)
        return pos if self.level_embed is None else pos + self.level_embed[level]

    @torch.inference_mode()
    def predict(
        self,
        images: Sequence[Image.Image | np.ndarray[Any, Any]],
        *,
        max_detections: int = 100,
        where: tuple[float, float, float] | None = None,
    ) -> list[Detections]:
        """Detect in images of any size.

        Args:
            images: PIL images of any mode, turned as their EXIF orientation says, or arrays [H, W, 3] (RGB) or [H, W] (grey) of
                8 or 16 bits or of fractions (``smca.datasets.images.to_rgb``).
            max_detections: how many of the best to return for each.
            where: "look here": x, y, radius in pixels of each image. One query starts on that place, its Gaussians around it, and
                the others are not there: what it sees is the result, one box with the score of each class.

        Returns:
            One result per image, boxes in pixels of that image as a viewer shows it. No threshold is applied. It depends on the
            image alone, not on the others (to rounding).

        Raises:
            ValueError: an image that is of no known kind, a network whose output is not finite, or a place to look at that is
                outside of an image.
        """
        if not images:
            return []
        if where is not None:
            return [self.encode(image).look(where, max_detections) for image in images]
        images_on_device, padding_mask, original_sizes = self._prepared(images)
        with evaluating(self):
            outputs = self(images_on_device, padding_mask)
        scores = self.config.class_scores
        return decode(outputs["logits"][-1], outputs["boxes"][-1], original_sizes, max_detections, class_scores=scores)

    def _prepared(self, images: Sequence[Image.Image | np.ndarray[Any, Any]]) -> tuple[Tensor, Tensor | None, Tensor]:
        """Images [B, 3, H, W] of the network's size on its device, their padding mask if any is padded, and sizes [B, 2] (height,
        width) of the originals. One image or more.

        Raises:
            ValueError: an image that is of no known kind.
        """
        resize = Augmentation.evaluation(self.config.image_short_side, self.config.image_max_size)
        rng = np.random.default_rng(0)  # the evaluation transform draws nothing
        samples = []
        for index, image in enumerate(images):
            try:
                pixels = to_rgb(image)
            except ValueError as error:
                raise ValueError(f"image {index}: {error}") from error
            sample = Sample(
                image=pixels,
                boxes_xyxy=np.zeros((0, 4)),
                labels=np.zeros(0, dtype=np.int64),
                image_id=index,
                original_size=(pixels.shape[0], pixels.shape[1]),
            )
            samples.append(resize(sample, rng))
        host_batch = collate(samples)
        batch = host_batch.to(self.pixel_mean.device)
        mask = batch.padding_mask if host_batch.padding_mask.any() else None
        return batch.images, mask, batch.original_sizes

    @torch.inference_mode()
    def explain(
        self,
        image: Image.Image | np.ndarray[Any, Any],
        *,
        queries: Sequence[int] | None = None,
        most: int = 10,
        maps: bool = True,
    ) -> Explanation:
        """Why the model says what it says of an image: where each query looked, in every layer, and what it made of it.

        Args:
            image: as for ``predict``.
            queries: which of the model's queries, by number; None = those of the best scores.
            most: how many of the best, one query each.
            maps: False leaves the maps of attention out, which take memory: M·Q·h·H·W numbers for each level, twice.

        Raises:
            ValueError: an image that is of no known kind, or a query that the model does not have.
        """
        return self.encode(image).explain(queries=queries, most=most, maps=maps)

    def encode(self, image: Image.Image | np.ndarray[Any, Any]) -> EncodedImage:
        """An image up to the decoder, to ask what the decoder makes of it, as it is or with something changed.

        Raises:
            ValueError: an image that is of no known kind.
        """
        return EncodedImage.of(self, *self._prepared([image]))

    def save_pretrained(self, directory: str | Path, *, state_dict: Mapping[str, Tensor] | None = None) -> None:
        """Write config.json and model.safetensors into `directory`.

        Args:
            directory: made if there is none.
            state_dict: the weights, if they are not to be the model's own: of one that is divided over processes it has but a part.

        Raises:
            OSError: a file could not be written; says why, and how much space is left.
        """
        config = dataclasses.replace(self.config, backbone=self.backbone.resolved(self.config.backbone))
        write_model(Path(directory), config, self.state_dict() if state_dict is None else state_dict)

    @classmethod
    def from_pretrained(cls, name: str | Path, *, attention_backend: str = "auto") -> SMCADETR:
        """Rebuild a saved model, in evaluation mode. Nothing is downloaded where the files are at hand, and no code in them is run.

        Args:
            name: folder written by ``save_pretrained``; folder of a run (its model if it is complete, otherwise its checkpoint); a
                checkpoint (the moving average of its weights, if it has one); or a repository on the Hugging Face hub that holds
                the two files of ``save_pretrained``.
            attention_backend: backend of ``smca.gpu.attention.smca_attention``.

        Raises:
            ValueError: files missing, damaged or somebody else's, or weights that do not fit the configuration (names file and
                keys).
        """
        saved = open_model(name)
        config = check_saved(saved)  # no memory is taken before the weights are known to fit
        weights = saved.read()
        model = cls(config, attention_backend=attention_backend)
        model.load_state_dict(weights)
        return model.eval()


def check_saved(saved: SavedModel) -> ModelConfig:
    """What to build a saved model from: its configuration without published weights of the backbone, which are in the saved ones
    and would be downloaded.

    Raises:
        ValueError: no model can be built from it, or the weights beside it are not those of one.
    """
    config = dataclasses.replace(saved.config, backbone=dataclasses.replace(saved.config.backbone, weights=None))
    try:
        with torch.device("meta"):
            blank = SMCADETR(config, attention_backend="eager")
    except Exception as error:  # transformers refuses options with errors of any type
        raise ValueError(f"{saved.config_source}: no model can be built from it: {cut(error, 300)}") from error
    check_fit(blank, saved)
    return config


def check_fit(model: nn.Module, saved: SavedModel) -> None:
    """Compare every name, shape and kind of number; the ValueError lists what does not fit."""
    own = {k: (tuple(v.shape), v.is_floating_point()) for k, v in model.state_dict().items()}
    missing, extra = sorted(own.keys() - saved.layout.keys()), sorted(saved.layout.keys() - own.keys())
    differing = [
        f"{k} is {_described(saved.layout[k])}, the model needs {_described(own[k])}"
        for k in sorted(own.keys() & saved.layout.keys())
        if own[k] != saved.layout[k]
    ]
    if not (missing or extra or differing):
        return
    kinds = {"missing": missing, "unknown": extra, "of another shape or kind": differing}
    problems = [f"{len(found)} {kind}: {cut(found[0], 150)}" for kind, found in kinds.items() if found]
    if extra and not (missing or differing) and all(name.startswith("backbone.") for name in extra):
        remedy = "An earlier version saved it, with stages of the backbone that are no longer kept: train it anew"
    elif any(name.endswith(".conv.own.weight") for name in extra) or (
        not (missing or extra) and all(re.match(r"input_proj\.\d+\.weight is \(", line) for line in differing)
    ):
        remedy = "An earlier version saved it, with another convolutional encoder or level beyond the backbone: train it anew"
    elif saved.config_source != saved.weights_source:
        remedy = f"Take {saved.config_source} and the weights from the same run"
    else:
        remedy = (
            "It is damaged, or its configuration left to published weights what the backbone is: give the run's model"
        )
    raise ValueError(f"{saved.weights_source} does not fit its configuration: {'; '.join(problems)}. {remedy}")


def _described(layout: tuple[tuple[int, ...], bool]) -> str:
    shape, floats = layout
    return str(shape) if floats else f"{shape} of whole numbers"


def valid_sizes_of(padding_mask: Tensor) -> Tensor:
    """[B, H, W] bool, True = padded → [B, 2] (height, width) of the unpadded images in pixels."""
    valid = ~padding_mask
    return torch.stack([valid[:, :, 0].sum(1), valid[:, 0, :].sum(1)], dim=-1)
