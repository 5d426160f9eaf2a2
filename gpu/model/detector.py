"""SMCA-DETR: images in, class logits and boxes out.

    images → backbone → one projection per level → encoder → decoder (Gaussian-modulated cross-attention) → heads

    model = SMCADETR.from_pretrained("runs/demo/model")
    detections = model.predict([PIL.Image.open("photo.jpg")])

The same parameters, exported with ``state_dict()``, drive ``smca.reference.model.forward``.
"""

from __future__ import annotations

import dataclasses
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
from smca.gpu.model.backbone import Backbone
from smca.gpu.model.decoder import Decoder
from smca.gpu.model.denoising import FurtherQueries, draw_noise, noised_queries
from smca.gpu.model.dense_head import DenseHead, select_queries
from smca.gpu.model.detections import Detections, decode
from smca.gpu.model.encoder import Encoder
from smca.gpu.model.layers import Grid, log_odds
from smca.gpu.model.position import sine_position_encoding


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
        self.input_proj = _projections(self.backbone.channels, config)
        # Only the encoder's attention reads it: in the decoder it would add the same to all keys of a softmax.
        levels, read = len(config.strides), config.encoder == "attention" and config.encoder_layers > 0
        self.level_embed = nn.Parameter(torch.zeros(levels, config.hidden_dim)) if levels > 1 and read else None
        self.encoder, self.decoder = Encoder(config), Decoder(config, attention_backend)
        self.dense_head = DenseHead(config) if config.dense_head else None
        self.register_buffer("pixel_mean", torch.tensor(config.pixel_mean)[:, None, None], persistent=False)
        self.register_buffer("pixel_std", torch.tensor(config.pixel_std)[:, None, None], persistent=False)
        for module in (self.encoder, self.decoder, self.dense_head):
            for parameter in module.parameters() if module is not None else ():
                if parameter.dim() > 1:
                    nn.init.xavier_uniform_(parameter)
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
            "cell_anchors" [B, ΣL, 4] (cxcywh, likewise) and "cell_padding" [B, ΣL] bool, of the cells of all levels.
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
        # In training, where nothing may wait for the device, the backbone sees the padding.
        features = self.backbone(pixels) if self.training else self.backbone.each_alone(pixels, valid_sizes)
        return self.detect(features, valid_sizes, further)

    def normalize(self, images: Tensor, padding_mask: Tensor | None) -> Tensor:
        """Pixels in the backbone's input range; padding becomes 0, whatever it held."""
        scale = 1 / 255 if images.dtype == torch.uint8 else 1.0
        pixels = (images.to(self.pixel_mean.dtype) * scale - self.pixel_mean) / self.pixel_std
        return pixels if padding_mask is None else pixels.masked_fill(padding_mask[:, None], 0.0)

    def detect(
        self,
        features: Sequence[Tensor],
        valid_sizes: Tensor,
        further: FurtherQueries | None = None,
        *,
        padded: bool = True,
    ) -> dict[str, Tensor]:
        """The part that ``smca.reference.model.forward`` specifies: backbone features to logits and boxes.

        Args:
            features: from the backbone, [B, channels, H, W] for each level that it has.
            valid_sizes: [B, 2] (height, width) of the unpadded images in pixels of the network's input.
            further: queries beside the model's own.
            padded: False promises that no cell is padding, so that masks are not needed.
        """
        # Positions and boxes stay in at least float32 under autocast; in a float64 model all is float64.
        valid_sizes = valid_sizes.to(self.decoder.norm.weight.dtype)
        grids, tokens, positions = [], [], []
        level_map = features[0]
        for level, (projection, stride) in enumerate(zip(self.input_proj, self.config.strides, strict=True)):
            # A level that the backbone lacks comes from the one before it, whose padded cells are zero by then.
            level_map = projection(features[level] if level < len(features) else level_map)
            size = (level_map.shape[-2], level_map.shape[-1])
            valid_cells = valid_sizes / stride
            mask = _key_padding_mask(valid_cells, size) if padded else None  # [B, H, W]
            if mask is not None:
                level_map = level_map.masked_fill(mask[:, None], 0.0)
            pos = sine_position_encoding(size, valid_cells, self.config.hidden_dim)
            grids.append(Grid(size, valid_cells, None if mask is None else mask.flatten(1)))
            tokens.append(level_map.flatten(2).transpose(1, 2))
            positions.append(pos if self.level_embed is None else pos + self.level_embed[level])
        x, pos = torch.cat(tokens, dim=1), torch.cat(positions, dim=1)
        memory = self.encoder(x, pos, grids)
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

    @torch.inference_mode()
    def predict(
        self, images: Sequence[Image.Image | np.ndarray[Any, Any]], *, max_detections: int = 100
    ) -> list[Detections]:
        """Detect in images of any size.

        Args:
            images: PIL images of any mode, turned as their EXIF orientation says, or arrays [H, W, 3] (RGB) or [H, W] (grey) of
                8 or 16 bits or of fractions (``smca.datasets.images.to_rgb``).
            max_detections: how many of the best to return for each.

        Returns:
            One result per image, boxes in pixels of that image as a viewer shows it. No threshold is applied. It depends on the
            image alone, not on the others (to rounding).

        Raises:
            ValueError: an image that is of no known kind, or a network whose output is not finite.
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
        if not samples:
            return []
        host_batch = collate(samples)
        batch = host_batch.to(self.pixel_mean.device)
        training = self.training
        self.eval()
        outputs = self(batch.images, batch.padding_mask if host_batch.padding_mask.any() else None)
        self.train(training)
        return decode(outputs["logits"][-1], outputs["boxes"][-1], batch.original_sizes, max_detections)

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
        # Published weights of the backbone are in the saved ones, and would be downloaded.
        config = dataclasses.replace(saved.config, backbone=dataclasses.replace(saved.config.backbone, weights=None))
        try:
            with torch.device("meta"):  # no memory is taken before the weights are known to fit
                blank = cls(config, attention_backend="eager")
        except Exception as error:  # transformers refuses options with errors of any type
            raise ValueError(f"{saved.config_source}: no model can be built from it: {cut(error, 300)}") from error
        check_fit(blank, saved)
        weights = saved.read()
        model = cls(config, attention_backend=attention_backend)
        model.load_state_dict(weights)
        return model.eval()


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


def _projections(channels: Sequence[int], config: ModelConfig) -> nn.ModuleList:
    """From each level's features to C channels: a 1×1 convolution. A level that the backbone lacks is made from the projected
    level before it by a 3×3 convolution of stride 2."""
    dim, missing = config.hidden_dim, len(config.strides) - len(channels)
    own = [nn.Conv2d(width, dim, kernel_size=1) for width in channels]
    return nn.ModuleList([*own, *(nn.Conv2d(dim, dim, kernel_size=3, stride=2, padding=1) for _ in range(missing))])


def valid_sizes_of(padding_mask: Tensor) -> Tensor:
    """[B, H, W] bool, True = padded → [B, 2] (height, width) of the unpadded images in pixels."""
    valid = ~padding_mask
    return torch.stack([valid[:, :, 0].sum(1), valid[:, 0, :].sum(1)], dim=-1)


def _key_padding_mask(valid_cells: Tensor, size: tuple[int, int]) -> Tensor:
    """[B, H, W] bool: a cell is padding if it holds no pixel of the image."""
    height, width = size
    rows = torch.arange(height, device=valid_cells.device) >= valid_cells[:, :1]
    columns = torch.arange(width, device=valid_cells.device) >= valid_cells[:, 1:]
    return rows[:, :, None] | columns[:, None, :]
