"""smca.reference.encoder: which cell learns of which, and that padding and the sizes of the maps do not matter."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from smca.reference.encoder import attend_across_levels, attend_within_levels, encoder, encoder_block
from smca.reference.encoder_conv import exchange, fit, pyramid_exchange, stretch
from smca.reference.position import Grid, key_padding_mask

IMAGE = (33, 47)  # pixels: 5 × 6, 3 × 3 and 2 × 2 cells at strides 8, 16 and 32
STRIDES = (8, 16, 32)
C = 4


def grids_of(valid_sizes: Any, padded: tuple[int, int] = IMAGE, strides: Any = STRIDES, seed: int = 0) -> list[Grid]:
    """Levels of a batch of images, with random positions instead of the sine encoding."""
    rng, valid_sizes, grids = np.random.default_rng(seed), np.asarray(valid_sizes, dtype=float), []
    for stride in strides:
        size = (-(-padded[0] // stride), -(-padded[1] // stride))
        valid_cells = valid_sizes / stride
        position = rng.normal(size=(len(valid_sizes), size[0] * size[1], C))
        grids.append(Grid(size, stride, valid_cells, key_padding_mask(valid_cells, size), position))
    return grids


def cells_of(grids: list[Grid], seed: int = 1, value: float | None = None) -> list[Any]:
    rng = np.random.default_rng(seed)
    shapes = [(len(grid.valid_cells), grid.size[0] * grid.size[1], C) for grid in grids]
    return [rng.normal(size=shape) if value is None else np.full(shape, value) for shape in shapes]


def params_of(seed: int = 2) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    shapes: dict[str, tuple[int, ...]] = {f"a.{x}_proj.weight": (C, C) for x in ("q", "k", "v", "out")}
    shapes |= {f"a.{x}_proj.bias": (C,) for x in ("q", "k", "v", "out")}
    shapes |= {f"a.{x}.weight": (C, 1, 3, 3) for x in ("own", "finer", "coarser")}
    return {key: rng.normal(size=shape) for key, shape in shapes.items()}


def params_of_the_authors(seed: int = 2) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    kernels = ("own.0", "own.1", "own.2", "finer", "coarser")
    shapes: dict[str, tuple[int, ...]] = {f"a.{x}.weight": (C, 1, 7, 7) for x in kernels}
    shapes |= {f"a.{x}_proj.weight": (C, C) for x in ("in", "out")}
    shapes |= {f"a.{x}.bias": (C,) for x in (*kernels, "in_proj", "out_proj")}
    return {key: rng.normal(size=shape) for key, shape in shapes.items()}


def impulse_reaches(
    level: int, row: int, column: int, strides: Any = STRIDES, *, authors: bool = False, side: int = 64
) -> list[Any]:
    """Where a change of one cell of one level shows after one exchange: a set of (row, column) for each level."""
    mixed, params = (exchange, params_of_the_authors()) if authors else (pyramid_exchange, params_of())
    grids = grids_of([[side, side]], (side, side), strides)
    levels = cells_of(grids)
    before = mixed(levels, grids, params, "a")
    levels[level][0, row * grids[level].size[1] + column] += 1.0
    after = mixed(levels, grids, params, "a")
    changed = [
        np.abs(a - b).max(axis=-1)[0].reshape(g.size) > 1e-9 for a, b, g in zip(after, before, grids, strict=True)
    ]
    return [{(int(r), int(c)) for r, c in np.argwhere(each)} for each in changed]


def block(rows: Any, columns: Any) -> set[tuple[int, int]]:
    return {(r, c) for r in rows for c in columns}


def test_pyramid_exchange_reaches_neighbouring_cells_of_neighbouring_levels() -> None:
    """Levels of 8 × 8, 4 × 4 and 2 × 2 cells. A coarse cell a reads fine cells 2a − 1 to 2a + 1, a fine cell a the
    coarse cells around ⌊a/2⌋."""
    fine = impulse_reaches(0, 3, 4)
    assert fine == [block((2, 3, 4), (3, 4, 5)), block((1, 2), (2,)), set()]
    middle = impulse_reaches(1, 1, 2)
    assert middle == [block(range(6), range(2, 8)), block((0, 1, 2), (1, 2, 3)), block((0, 1), (1,))]
    coarse = impulse_reaches(2, 0, 0)
    assert coarse == [set(), block(range(4), range(4)), block((0, 1), (0, 1))]


def test_pyramid_exchange_over_a_ratio_of_four() -> None:
    assert impulse_reaches(0, 3, 4, (8, 32)) == [block((2, 3, 4), (3, 4, 5)), block((1,), (1,))]
    assert impulse_reaches(1, 0, 0, (8, 32)) == [block(range(8), range(8)), block((0, 1), (0, 1))]


@pytest.mark.parametrize("valid_size", [IMAGE, (33, 16), (8, 47), (1, 1), (40, 48)])
def test_pyramid_exchange_does_not_depend_on_padding(valid_size: tuple[int, int]) -> None:
    """Levels that do not nest: alone, and in batches padded to other sizes with other junk, an image gives the same."""
    params = params_of()
    alone_grids = grids_of([valid_size], valid_size)
    alone = cells_of(alone_grids)
    want = pyramid_exchange(alone, alone_grids, params, "a")
    for padded in ((40, 48), (41, 64), (65, 97)):
        grids = grids_of([valid_size, padded], padded)
        levels = cells_of(grids, value=np.nan)
        for j, grid in enumerate(grids):
            rows, columns = alone_grids[j].size
            inside = levels[j].reshape(2, *grid.size, C)
            inside[0, :rows, :columns] = alone[j].reshape(rows, columns, C)
            inside[1] = 5.0
        got = pyramid_exchange(levels, grids, params, "a")
        for j, grid in enumerate(grids):
            rows, columns = alone_grids[j].size
            inner = got[j].reshape(2, *grid.size, C)[0, :rows, :columns].reshape(1, -1, C)
            np.testing.assert_allclose(inner, want[j], rtol=1e-12, atol=1e-13)


def test_pyramid_exchange_moves_with_the_image() -> None:
    """Moved by whole cells of the coarsest level, the content gives the moved result (away from the edges)."""
    grids = grids_of([[128, 192]], (128, 192))
    params, rng = params_of(), np.random.default_rng(3)
    levels, moved = cells_of(grids, value=0.0), cells_of(grids, value=0.0)
    for j, grid in enumerate(grids):
        step = 32 // grid.stride
        spot = rng.normal(size=(2 * step, 2 * step, C))
        levels[j].reshape(*grid.size, C)[step : 3 * step, step : 3 * step] = spot
        moved[j].reshape(*grid.size, C)[step : 3 * step, 2 * step : 4 * step] = spot
    before, after = pyramid_exchange(levels, grids, params, "a"), pyramid_exchange(moved, grids, params, "a")
    for j, grid in enumerate(grids):
        step = 32 // grid.stride
        left, right = before[j].reshape(*grid.size, C), after[j].reshape(*grid.size, C)
        np.testing.assert_allclose(right[:, step:], left[:, : left.shape[1] - step], rtol=1e-12, atol=1e-13)


def test_pyramid_exchange_takes_maps_that_lack_or_exceed_a_cell() -> None:
    """A backbone that rounds down has 4 × 5, 2 × 2 and 1 × 1 cells of the same image: missing cells are 0."""
    grids = []
    for stride, size in zip(STRIDES, ((4, 5), (2, 2), (1, 1)), strict=True):
        valid_cells = np.array([IMAGE]) / stride
        grids.append(Grid(size, stride, valid_cells, key_padding_mask(valid_cells, size), np.zeros(1)))
    levels = cells_of(grids)
    out = pyramid_exchange(levels, grids, params_of(), "a")
    assert [x.shape for x in out] == [x.shape for x in levels]
    for size in ((3, 3), (6, 7), (3, 7)):
        x = np.arange(1.0, 21.0).reshape(1, 1, 4, 5)
        rows, columns = min(size[0], 4), min(size[1], 5)
        fitted = fit(x, size)
        np.testing.assert_array_equal(fitted[..., :rows, :columns], x[..., :rows, :columns])
        assert fitted.shape[2:] == size
        assert fitted.sum() == x[..., :rows, :columns].sum()


def test_the_authors_exchange_reaches_seven_cells_and_those_of_the_levels_beside() -> None:
    """Levels of 16 × 16, 8 × 8 and 4 × 4 cells, and a cell in the corner: "own" takes it to cells 0 to 3, from there "finer" to the
    coarse cells whose 7 around cell 2a reach 3; "coarser" takes 0 to 3 to 0 to 6, and the stretched map lies over the fine one."""
    fine, middle, coarse = impulse_reaches(0, 0, 0, authors=True, side=128)
    assert (fine, middle, coarse) == (block(range(4), range(4)), block(range(4), range(4)), set())
    fine, middle, coarse = impulse_reaches(1, 0, 0, authors=True, side=128)
    within = range(15)  # fine cell a is coarse 7a/15: up to a = 14 it has a share of coarse cell 6
    assert (fine, middle, coarse) == (block(within, within), block(range(4), range(4)), block(range(4), range(4)))


def test_stretch_equals_torchs_interpolation_with_aligned_corners() -> None:
    rng = np.random.default_rng(5)
    for of, size in (
        ((3, 4), (5, 8)),
        ((1, 2), (2, 3)),
        ((1, 1), (1, 2)),
        ((5, 7), (10, 13)),
        ((4, 4), (4, 4)),
        ((3, 3), (1, 6)),
    ):
        x = rng.normal(size=(2, 3, *of))
        want = functional.interpolate(torch.from_numpy(x), size, mode="bilinear", align_corners=True)
        np.testing.assert_allclose(stretch(x, size), want.numpy(), rtol=1e-12, atol=1e-14)


def test_the_authors_exchange_tells_levels_and_places_apart() -> None:
    """By kernels of their own, and by the positions, which also go to the other levels."""
    grids, params = grids_of([IMAGE]), params_of_the_authors()
    levels = cells_of(grids)
    want = exchange(levels, grids, params, "a")
    for change, reached in (("a.own.2.weight", [0, 1, 1]), ("a.own.2.bias", [0, 1, 1]), ("a.finer.bias", [0, 1, 1]),
                            ("a.coarser.bias", [1, 1, 0]), ("a.in_proj.bias", [1, 1, 1])):  # fmt: skip
        got = exchange(levels, grids, {**params, change: params[change] + 1.0}, "a")
        assert [bool(np.abs(a - b).max() > 1e-9) for a, b in zip(got, want, strict=True)] == list(map(bool, reached))
    moved = [grids[0], grids[1], grids[2]._replace(position=grids[2].position + 1.0)]
    got = exchange(levels, moved, params, "a")
    assert [bool(np.abs(a - b).max() > 1e-9) for a, b in zip(got, want, strict=True)] == [False, True, True]


def test_padded_cells_enter_the_authors_encoder_as_0() -> None:
    for pre_norm in (False, True):
        config, params, _, _ = encoder_example(encoder="conv", pre_norm=pre_norm)
        grids = grids_of([(20, 30), IMAGE])
        levels = cells_of(grids)
        padded = [grid.key_padding_mask[..., None] for grid in grids]
        assert padded[0].any()
        want = encoder([np.where(pad, 0.0, x) for x, pad in zip(levels, padded, strict=True)], grids, params, config)
        got = encoder([np.where(pad, np.nan, x) for x, pad in zip(levels, padded, strict=True)], grids, params, config)
        for a, b in zip(got, want, strict=True):
            np.testing.assert_array_equal(a, b)


def test_attention_across_levels_is_over_one_sequence() -> None:
    grids = grids_of([IMAGE, (20, 30)])
    levels, params = cells_of(grids), params_of()
    out = attend_across_levels(levels, grids, params, "a", 2)
    order = [1, 2, 0]
    turned = attend_across_levels([levels[j] for j in order], [grids[j] for j in order], params, "a", 2)
    for place, j in enumerate(order):
        np.testing.assert_allclose(turned[place], out[j], rtol=1e-11, atol=1e-13)
    (alone,) = attend_across_levels(levels[:1], grids[:1], params, "a", 2)
    np.testing.assert_array_equal(alone, attend_within_levels(levels[:1], grids[:1], params, "a", 2)[0])
    assert np.abs(alone - out[0]).max() > 0.01


def encoder_example(**change: Any) -> tuple[Any, dict[str, Any], list[Grid], list[Any]]:
    values = {"encoder": "attention", "encoder_layers": 3, "cross_level_blocks": (), "num_heads": 2, "pre_norm": False}
    config, rng = SimpleNamespace(**(values | change)), np.random.default_rng(4)
    params: dict[str, Any] = {"encoder.norm.weight": np.ones(C), "encoder.norm.bias": np.zeros(C)}
    for index in range(3):
        name = f"encoder.layers.{index}"
        convolved = params_of_the_authors(index) if config.encoder == "conv" else params_of(index)
        params |= {f"{name}.self_attn{key[1:]}": value for key, value in params_of(index).items()}
        params |= {f"{name}.conv{key[1:]}": value for key, value in convolved.items()}
        for norm in ("norm1", "norm2"):
            params[f"{name}.{norm}.weight"], params[f"{name}.{norm}.bias"] = np.ones(C), rng.normal(size=C)
        params[f"{name}.linear1.weight"], params[f"{name}.linear1.bias"] = rng.normal(size=(6, C)), rng.normal(size=6)
        params[f"{name}.linear2.weight"], params[f"{name}.linear2.bias"] = rng.normal(size=(C, 6)), rng.normal(size=C)
    grids = grids_of([IMAGE])
    return config, params, grids, cells_of(grids)


@pytest.mark.parametrize(
    ("change", "reached"),
    [
        ({}, [True, False, False]),
        ({"cross_level_blocks": (1,)}, [True, True, True]),
        ({"encoder": "conv", "encoder_layers": 1}, [True, True, False]),
        ({"encoder": "conv", "encoder_layers": 2}, [True, True, True]),
        ({"encoder": "pyramid_conv", "encoder_layers": 1}, [True, True, False]),
        ({"encoder": "pyramid_conv", "encoder_layers": 2}, [True, True, True]),
    ],
)
@pytest.mark.parametrize("pre_norm", [False, True])
def test_which_levels_learn_of_a_change_in_the_finest(change: Any, reached: list[bool], pre_norm: bool) -> None:
    config, params, grids, levels = encoder_example(pre_norm=pre_norm, **change)
    before = encoder(levels, grids, params, config)
    after = encoder([levels[0] + np.linspace(0, 1, C), *levels[1:]], grids, params, config)
    assert [bool(np.abs(a - b).max() > 1e-9) for a, b in zip(after, before, strict=True)] == reached


@pytest.mark.parametrize("name", ["attention", "conv", "pyramid_conv"])
def test_levels_share_the_parameters(name: str) -> None:
    """A level by itself gives what it gives in company, if the others say nothing to it (and its own kernel is the first's)."""
    config, params, grids, levels = encoder_example(encoder=name)
    for key in params:
        if "finer" in key or "coarser" in key:
            params[key] = np.zeros_like(params[key])
        if ".own.1" in key or ".own.2" in key:
            params[key] = params[key.replace(".own.1", ".own.0").replace(".own.2", ".own.0")]
    together = encoder_block(levels, grids, params, 0, config)
    for x, grid, want in zip(levels, grids, together, strict=True):
        np.testing.assert_allclose(encoder_block([x], [grid], params, 0, config)[0], want, rtol=1e-12, atol=1e-14)
