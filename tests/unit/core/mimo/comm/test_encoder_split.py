"""How encoder work is divided, and what is refused."""

from __future__ import annotations

from itertools import combinations, pairwise

import pytest
import torch

from megatron.core.models.mimo import MimoModelConfig
from megatron.core.models.mimo.comm.encoder_split import cut_inputs, divide_items, rows_of_items
from megatron.core.transformer.spec_utils import ModuleSpec


def smallest_maximum(rows: list[int], size: int) -> int:
    """By trying every way to cut a list into ``size`` contiguous parts."""
    ends = range(len(rows) + 1)
    return min(
        max(sum(rows[a:b]) for a, b in pairwise([0, *cuts, len(rows)]))
        for cuts in combinations([*ends] * (size - 1), size - 1)
        if list(cuts) == sorted(cuts)
    )


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize(
    "rows", [[3, 1, 2], [1, 1], [1, 9, 1, 1], [2] * 5, [0, 4, 0, 4], [5, 4, 3, 2, 1], [1, 7]]
)
def test_parts_are_contiguous_and_as_even_as_can_be(rows: list[int], size: int) -> None:
    parts = divide_items(rows, size)
    assert parts is not None
    assert len(parts) == size
    assert sum(parts) == len(rows)
    bounds = [sum(parts[:rank]) for rank in range(size + 1)]
    assert max(sum(rows[a:b]) for a, b in pairwise(bounds)) == smallest_maximum(rows, size)


@pytest.mark.parametrize("rows", [[], [7], [0, 7], [0, 0]])
def test_nothing_is_divided_where_no_rank_would_do_less(rows: list[int]) -> None:
    assert divide_items(rows, 4) is None


def test_one_rank_divides_nothing() -> None:
    assert divide_items([1, 1], 1) is None


def test_cuts_tensors_and_lists_and_passes_the_rest_on() -> None:
    pixels = torch.arange(12).view(4, 3)
    scale = torch.tensor(2.0)
    inputs = {"pixels": pixels, "lengths": [4, 5, 6, 7], "scale": scale, "fast": True}
    held = cut_inputs("vit", inputs, 4, 1, 3)
    assert torch.equal(held["pixels"], pixels[1:3])
    assert held["lengths"] == [5, 6]
    assert held["scale"] is scale
    assert held["fast"] is True


def test_refuses_inputs_that_are_not_one_entry_per_item() -> None:
    with pytest.raises(ValueError, match=r"'patches' of encoder 'vit' has 9 .* announced 2 items"):
        cut_inputs("vit", {"patches": torch.zeros(9, 3)}, 2, 0, 1)


class Announces(torch.nn.Module):
    def rows_per_item(self, counts: list[int]) -> list[int]:
        return counts


@pytest.mark.parametrize("counts", [[1, -1], [torch.tensor(3)], [2.0], [True]])
def test_refuses_rows_that_are_not_host_integers(counts: list[int]) -> None:
    with pytest.raises(ValueError, match="expected one host integer of at least 0 per item"):
        rows_of_items("vit", Announces(), {"counts": counts})


def test_encoder_split_is_checked_and_chosen_by_modality() -> None:
    part = ModuleSpec(torch.nn.Identity)
    specs = {"images": part, "sounds": part}

    def config(value: object) -> MimoModelConfig:
        return MimoModelConfig(part, specs, encoder_split=value)

    assert config("cp").encoder_split_of("sounds") == "cp"
    assert config({"images": "never"}).encoder_split_of("images") == "never"
    assert config({"images": "never"}).encoder_split_of("sounds") == "auto"
    with pytest.raises(ValueError, match="encoder_split is 'dp'; expected one of"):
        config("dp")
    with pytest.raises(ValueError, match=r"names \['image'\], and the modalities are"):
        config({"image": "cp"})
