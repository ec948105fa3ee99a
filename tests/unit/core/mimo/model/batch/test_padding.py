"""Padding masks: which are refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from megatron.core.models.mimo.alignment.cut import SequenceCut
from megatron.core.models.mimo.errors import InputError
from megatron.core.models.mimo.model.batch.checks import check_padding_mask


class TakesNone(nn.Module):
    def forward(self, decoder_input: torch.Tensor) -> torch.Tensor:
        return decoder_input


class TakesOne(nn.Module):
    def forward(self, padding_mask: torch.Tensor) -> torch.Tensor:
        return padding_mask


def test_padding_masks_that_do_not_fit() -> None:
    mask_BS = torch.zeros(2, 4, dtype=torch.bool)
    check_padding_mask(TakesOne(), mask_BS)
    assert SequenceCut().rank_share(mask_BS) is mask_BS
    with pytest.raises(InputError, match=r"TakesNone does not take one; leave it out"):
        check_padding_mask(TakesNone(), mask_BS)
    for wrong in (mask_BS.float(), mask_BS[0]):
        with pytest.raises(InputError, match=r"expected torch\.bool \[B, S\], True where a token"):
            check_padding_mask(TakesOne(), wrong)
