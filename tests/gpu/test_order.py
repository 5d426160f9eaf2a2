"""Which images make which step, and which numbers it draws."""

from __future__ import annotations

from itertools import chain

import pytest
import torch
from torch.utils.data import DistributedSampler

from smca.gpu.training.order import GlobalBatches, seed_step


@pytest.mark.parametrize("length", [8, 12, 15, 17, 40])
def test_a_step_has_the_same_images_on_any_number_of_processes(length: int) -> None:
    for epoch in (0, 3):
        steps = {}
        for world in (1, 2, 4):
            parts = [GlobalBatches(length, 8, rank, world, seed=5) for rank in range(world)]
            for part in parts:
                part.start_at(epoch)
            assert {len(part) for part in parts} == {length // 8}
            steps[world] = [sorted(chain(*shares)) for shares in zip(*parts, strict=True)]
            assert {len(share) for part in parts for share in part} == {8 // world}
        assert steps[1] == steps[2] == steps[4]
        seen = list(chain(*steps[1]))
        assert len(seen) == len(set(seen)) == length // 8 * 8, "no image twice in an epoch"


def test_epochs_differ_and_go_on_from_any_batch() -> None:
    whole, rest = GlobalBatches(20, 4, seed=1), GlobalBatches(20, 4, seed=1)
    epochs = []
    for epoch in range(2):
        whole.start_at(epoch)
        epochs.append(list(whole))
        rest.start_at(epoch, 3)
        assert list(rest) == epochs[-1][3:]
    assert epochs[0] != epochs[1]
    assert list(GlobalBatches(20, 4, seed=2)) != epochs[0]
    # The order that runs had before batches could be resumed.
    before: DistributedSampler[int] = DistributedSampler(range(20), 1, 0, shuffle=True, seed=1)  # type: ignore[arg-type]
    assert list(chain(*epochs[0])) == list(before)


def test_fewer_images_than_a_batch_are_one_batch_of_which_every_process_has_as_many() -> None:
    assert [sorted(batch) for batch in GlobalBatches(3, 8)] == [[0, 1, 2]]
    shares = [list(GlobalBatches(3, 8, rank, 2)) for rank in range(2)]
    assert [[len(batch) for batch in share] for share in shares] == [[2], [2]]
    assert {index for share in shares for index in share[0]} == {0, 1, 2}
    shares = [list(GlobalBatches(1, 8, rank, 4)) for rank in range(4)]
    assert shares == [[[0]]] * 4
    with pytest.raises(ValueError, match="batch_size = 6 images per step cannot be split over 4 processes"):
        GlobalBatches(12, 6, 0, 4)


def test_parts_of_a_step_are_taken_one_after_the_other() -> None:
    for length in (17, 3):
        whole = GlobalBatches(length, 8, seed=3)
        for world, parts in ((1, 4), (2, 2), (4, 1)):
            shares = [list(GlobalBatches(length, 8, rank, world, 3, parts)) for rank in range(world)]
            for step, indices in enumerate(whole):
                taken = [share[step * parts + part] for share in shares for part in range(parts)]
                assert len({len(part) for part in taken}) == 1
                assert set(chain(*taken)) == set(indices)
    message = "batch_size = 8 images per step cannot be split over 2 processes, which each take them in 3 parts .* multiple of 6"
    with pytest.raises(ValueError, match=message):
        GlobalBatches(12, 8, 0, 2, parts=3)


def test_a_step_draws_by_where_it_stands() -> None:
    def drawn(*where: int) -> list[float]:
        seed_step(torch.device("cpu"), *where)
        return torch.rand(4).tolist()  # type: ignore[no-any-return]

    first = drawn(0, 7, 0)
    torch.rand(100)
    assert drawn(0, 7, 0) == first
    others = [drawn(*where) for where in ((1, 7, 0), (0, 8, 0), (0, 7, 1), (7, 0, 0))]
    assert len({tuple(values) for values in [first, *others]}) == 5
