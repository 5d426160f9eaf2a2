"""Plausible bugs of the production model that leave what it computes as it is, and change what it learns: gradients that are cut or
halved on the way to a parameter, or that pass where a box is taken as given. Some more are in the other tables.

Left out because it changes nothing: keys of the decoder that teach no position, since all that learns of it is the level embedding,
which adds the same to all keys of a level.
"""

# ruff: noqa: E501 - a table: pieces of source and what they become, side by side

from __future__ import annotations

from smca.conformance.mutants.table import Mutant


def _halved(x: str) -> str:
    return f"(0.5 * ({x} + {x}.detach()))"


GRADIENTS: list[Mutant] = [
    Mutant(*entry)
    for entry in [
        ("learned centres learn nothing", "gpu", "model.decoder", "center_logits + self.query_center", "center_logits + self.query_center.detach()"),
        ("learned centres learn half", "gpu", "model.decoder", "center_logits + self.query_center", f"center_logits + {_halved('self.query_center')}"),
        ("query positions learn nothing from the queries", "gpu", "model.decoder", "return self.query_position.expand(len(", "return self.query_position.detach().expand(len("),
        ("query positions learn half", "gpu", "model.decoder", "return self.query_position.expand(len(", f"return {_halved('self.query_position')}.expand(len("),
        ("query positions learn nothing from the state", "gpu", "model.decoder", "self.state_norm(t + position)", "self.state_norm(t + position.detach())"),
        ("the state teaches its norm alone", "gpu", "model.decoder", "self.state_norm(t + position)", "self.state_norm((t + position).detach())"),
        ("refined boxes teach the layer before", "gpu", "model.decoder", "reference_logits = refined[-1][0].detach()", "reference_logits = refined[-1][0]"),
        ("refined boxes teach half of their own layer", "gpu", "model.decoder", "in_full_precision(self.box_heads[index], states[-1])",
         "in_full_precision(self.box_heads[index], 0.5 * (states[-1] + states[-1].detach()))"),
        ("box head learns, and nothing before it", "gpu", "model.decoder", "in_full_precision(self.box_heads[0], decoded)", "in_full_precision(self.box_heads[0], decoded.detach())"),
        ("class head learns, and nothing before it", "gpu", "model.decoder", "return self.class_head(decoded), ", "return self.class_head(decoded.detach()), "),
        ("only the last layer's scores teach", "gpu", "model.decoder", "decoded = torch.stack(states)", "decoded = torch.stack([*(s.detach() for s in states[:-1]), states[-1]])"),
        ("layers do not teach those before", "gpu", "model.decoder", "            entering = t\n", "            entering = t = t.detach()\n"),
        ("level embedding learns nothing", "gpu", "model.detector", "pos + self.level_embed[level]", "pos + self.level_embed[level].detach()"),
        ("level embedding learns half", "gpu", "model.detector", "pos + self.level_embed[level]", f"pos + {_halved('self.level_embed[level]')}"),
        ("keys teach no memory", "gpu", "model.decoder", "memory_pos = memory + pos", "memory_pos = memory.detach() + pos"),
        ("values teach no memory", "gpu", "model.decoder", "self.cross_attn.project(y + position, memory_pos, memory)", "self.cross_attn.project(y + position, memory_pos, memory.detach())"),
        ("made levels do not teach those before", "gpu", "model.levels", "if level == len(features) else maps[-1]", "if level == len(features) else maps[-1].detach()"),
        ("made levels learn half", "gpu", "model.levels", "level_map = projection(source)", "level_map = projection(source)\n        level_map = level_map if level < len(features) else 0.5 * (level_map + level_map.detach())"),
        ("the halved level does not teach the encoder", "gpu", "model.levels", "convolution(zero_padding(level_map, grid))", "convolution(zero_padding(level_map.detach(), grid))"),
        ("offsets do not teach the state", "gpu", "model.prior", "in_full_precision(self.offset_head, state)", "in_full_precision(self.offset_head, state.detach())"),
        ("offsets learn half", "gpu", "model.prior", "offsets[..., level, :]", "0.5 * (offsets + offsets.detach())[..., level, :]"),
        ("scales do not teach the state", "gpu", "model.prior", "in_full_precision(self.scale_head, state)", "in_full_precision(self.scale_head, state.detach())"),
        ("level weights do not teach the state", "gpu", "model.decoder", "self.level_head(state).softmax(dim=-1)", "self.level_head(state.detach()).softmax(dim=-1)"),
        ("the encoder's keys learn nothing of positions", "gpu", "model.encoder", "self.self_attn.project(x + pos, x + pos, x)", "self.self_attn.project(x + pos, x + pos.detach(), x)"),
        ("crossing levels learn half", "gpu", "model.encoder", "return self.self_attn.merge(torch.cat(each, dim=2))", "each = torch.cat(each, dim=2)\n        return self.self_attn.merge(0.5 * (each + each.detach()))"),
        ("self-attention of the queries does not teach who attends", "gpu", "model.decoder", "self.self_attn(y + position, y + position, y, sees=sees)", "self.self_attn((y + position).detach(), y + position, y, sees=sees)"),
    ]
]  # fmt: skip

BOXED: list[Mutant] = [
    Mutant(*entry)
    for entry in [
        ("content of anchored queries learns half", "gpu", "model.decoder", "return self.query_content.expand(", f"return {_halved('self.query_content')}.expand("),
        ("labels of noised queries learn nothing", "gpu", "model.decoder", "functional.embedding(further.labels, self.label_embed)", "functional.embedding(further.labels, self.label_embed.detach())"),
        ("positions of anchored queries learn half", "gpu", "model.decoder", "cast(Tensor, self.box_position(torch.cat([center, size], dim=-1)))", "0.5 * ((z := self.box_position(torch.cat([center, size], dim=-1))) + z.detach())"),
        ("cells do not teach the encoder", "gpu", "model.detector", "cells = self.dense_head(memory, grids)", "cells = self.dense_head(memory.detach(), grids)"),
    ]
]  # fmt: skip
"""The same of what only models with a box per query have."""
