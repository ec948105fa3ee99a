from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megatron.core.models.mimo import VisionModalitySubmodules
from megatron.core.models.mimo.alignment import EncodedRows
from megatron.core.models.mimo.errors import ConfigError
from megatron.mimo.data.micro_batches.batch import keep_for_stage
from megatron.mimo.data.row_cache.cache import RowCache
from megatron.mimo.data.row_cache.lookup import look_up
from megatron.mimo.training.encoder_cache import CachedEncoder, refuse_trained


class Encoder(nn.Module):
    """An item [n, 4] gives n rows, and one level of them."""

    num_levels = 1

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 6), requires_grad=False)
        self.items = 0

    def rows_per_item(self, pixels: list[Tensor]) -> list[int]:
        return [len(one) for one in pixels]

    def forward(self, pixels: list[Tensor]) -> EncodedRows:
        self.items += len(pixels)
        rows_NH = torch.cat(pixels) @ self.weight
        return EncodedRows(rows_NH=rows_NH, levels=(rows_NH * 2,))


def submodule_of(encoder: nn.Module) -> VisionModalitySubmodules:
    return VisionModalitySubmodules(encoders={"tiny": encoder})


def encoded(submodule: VisionModalitySubmodules, cache: RowCache | None, *items: Tensor) -> Any:
    batch = {"modality_inputs": {"images": {"tiny": {"pixels": list(items)}}}}
    if cache is not None:
        cache.refresh()
        batch = look_up(batch, {("images", "tiny"): cache})
        batch = keep_for_stage(batch, pre_process=True, post_process=True, dtype=torch.float32)
    return submodule.encode(batch["modality_inputs"]["images"])[0]


def test_rows_are_those_of_the_encoder_in_bfloat16(tmp_path: Path) -> None:
    encoder, cache = Encoder(), RowCache(tmp_path)
    submodule = submodule_of(encoder)
    items = [torch.randn(size, 4) for size in (3, 1, 2, 5)]
    plain = encoded(submodule, None, *items)
    call = CachedEncoder(cache, writes=True)
    submodule.encoder_calls["tiny"] = call
    encoder.items = 0
    for order in ((0, 1), (2, 1, 3, 0), (3, 2), (0, 1, 2, 3)):
        found = encoded(submodule, cache, *(items[number] for number in order))
        wanted = encoded_parts(plain, items, order)
        assert torch.equal(found.rows_NH, wanted[0].bfloat16().float())
        assert torch.equal(found.levels[0], wanted[1].bfloat16().float())
        assert found.rows_NH.dtype == torch.float32
        call.finish()
    assert encoder.items == 4  # each once
    assert call.counts == (8, 4, 4)


def encoded_parts(plain: EncodedRows, items: list[Tensor], order: tuple[int, ...]) -> list[Tensor]:
    sizes = [len(one) for one in items]
    return [
        torch.cat([tensor.split(sizes)[number] for number in order]) for tensor in plain.tensors
    ]


def test_a_rank_that_does_not_write_computes(tmp_path: Path) -> None:
    encoder, cache = Encoder(), RowCache(tmp_path)
    submodule = submodule_of(encoder)
    call = submodule.encoder_calls["tiny"] = CachedEncoder(cache, writes=False)
    encoded(submodule, cache, torch.ones(2, 4))
    call.finish()
    assert call.counts == (0, 1, 0)
    assert len(RowCache(tmp_path)) == 0


def test_encoders_whose_rows_change_are_refused() -> None:
    def model(encoder: nn.Module) -> Any:
        return SimpleNamespace(modality_submodules={"images": submodule_of(encoder)})

    trained = Encoder()
    refuse_trained(model(trained))
    trained.weight.requires_grad = True
    with pytest.raises(ConfigError, match=r"'tiny' of images is trained.*--freeze images.encoders"):
        refuse_trained(model(trained))
    drops = Encoder()
    drops.add_module("drop", nn.Dropout(0.1))
    with pytest.raises(ConfigError, match=r"'tiny' of images has dropout 0.1"):
        refuse_trained(model(drops))
    with pytest.raises(ConfigError, match=r"'tiny' of images has no rows_per_item"):
        refuse_trained(model(nn.Identity()))
