"""Levels of rows in the message from one part of a language model to the next.

Legend: S sequence, B micro-batch, H hidden, N rows.
"""

from __future__ import annotations

import pytest
import torch

from megatron.core.models.mimo.alignment import EncodedRows, build_alignment_plan
from megatron.core.models.mimo.alignment.cut import SequenceCut
from megatron.core.models.mimo.errors import InputError
from megatron.core.models.mimo.model.merging.level_route import LevelRoute
from megatron.core.models.mimo.model.merging.levels import LevelRows, place_levels

IMAGE, SOUND = 8, 9
IDS_BS = torch.tensor([[1, IMAGE, IMAGE, 2], [SOUND, 3, IMAGE, 4]])
LEVELS = {"images": 3, "sounds": 2}


def levels(cut: SequenceCut | None = None, ids_BS: torch.Tensor = IDS_BS) -> tuple[LevelRows, ...]:
    """Of three images' rows and a sound's, which need gradients; the rows of IDS_BS."""
    plan = build_alignment_plan(ids_BS, {"images": IMAGE, "sounds": SOUND})
    plan = (cut or SequenceCut()).share_of_plan(plan)
    generator = torch.Generator().manual_seed(1)
    encoded = {}
    for name, count in (("images", 3), ("sounds", 1)):
        rows = [torch.randn(count, 2, generator=generator).requires_grad_() for _ in range(4)]
        encoded[name] = EncodedRows(rows_NH=rows[0], levels=tuple(rows[1 : 1 + LEVELS[name]]))
    return place_levels(encoded, plan, hidden_size=2, tp_group=None)


def route(first: int, layers: int) -> LevelRoute:
    return LevelRoute(levels=LEVELS, first=first, layers=layers, is_first=first == 0, crosses=True)


@pytest.mark.parametrize("cut", [SequenceCut(), SequenceCut(cp_rank=1, cp_size=2)])
def test_levels_arrive_as_they_would_have_been_added(cut: SequenceCut) -> None:
    """Over two borders: the first layer adds level 0, the second level 1, the third level 2."""
    given = levels(cut)
    S_local = 4 // cut.cp_size
    hidden_SBH = torch.randn(S_local, 2, 2, requires_grad=True)
    wanted_SBH = hidden_SBH
    for level in given:
        wanted_SBH = level.add_to(2 * wanted_SBH)
    rows = [rows_NH for level in given for rows_NH in level.rows.values()]
    weights_SBH = torch.arange(wanted_SBH.numel()).view_as(wanted_SBH) + 1.0
    wanted = torch.autograd.grad((wanted_SBH * weights_SBH).sum(), [hidden_SBH, *rows])

    found_SBH, left, plan = hidden_SBH, given, given[0].plan
    for number in range(3):
        here = route(number, 1)
        if here.arrives:
            arrived = here.received(found_SBH, plan)
            found_SBH, left = arrived.hidden_SBH, arrived.levels
        (level,) = here.added(left)
        found_SBH = level.add_to(2 * found_SBH)
        found_SBH = here.message(found_SBH, left)
    assert found_SBH.shape == (S_local, 2, 2)
    torch.testing.assert_close(found_SBH, wanted_SBH)
    found = torch.autograd.grad((found_SBH * weights_SBH).sum(), [hidden_SBH, *rows])
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)


def test_a_message_holds_what_is_still_needed_here() -> None:
    given = levels(SequenceCut(cp_rank=1, cp_size=2))  # the positions in the middle
    hidden_SBH = torch.zeros(2, 2, 2)
    # Three of the images' rows and none of the sound's have a place on this rank.
    assert given[0].plan.streams["images"].rows_N.numel() == 3
    assert route(0, 1).message(hidden_SBH, given).shape == (4 + 3 + 3, 1, 2)
    assert route(0, 2).message(hidden_SBH, given).shape == (4 + 3, 1, 2)
    assert route(0, 3).message(hidden_SBH, given) is hidden_SBH
    assert route(1, 1).message_shape(given[0].plan, hidden_size=2) == [4 + 3 + 3, 1, 2]


def test_text_alone_sends_hidden_states_alone() -> None:
    plan = build_alignment_plan(torch.tensor([[1, 2, 3]]), {"images": IMAGE, "sounds": SOUND})
    message = route(0, 1).message(torch.ones(3, 1, 2), ())
    assert message.shape == (3, 1, 2)
    arrived = route(1, 1).received(message, plan)
    assert arrived.levels == ()
    assert arrived.hidden_SBH.shape == (3, 1, 2)


def test_a_plan_of_another_micro_batch_is_refused() -> None:
    message = route(0, 1).message(torch.zeros(4, 2, 2), levels())
    other = build_alignment_plan(torch.tensor([[1, 2, IMAGE, IMAGE]] * 2), {"images": IMAGE})
    with pytest.raises(InputError, match=r"arrived as \[15, 1, 2\]; expected \[16, 1, 2\]"):
        route(1, 1).received(message, other)
