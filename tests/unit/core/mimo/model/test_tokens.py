"""What a batch says of its tokens is checked where it is on the host; -100 is no label."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron.core.models.mimo.errors import InputError
from megatron.core.models.mimo.model.batch import checks, labels
from tests.rank_pool import RankPool
from tests.unit.core.mimo.tiny import IDS_BS, VOCABULARY, build, inputs

LABELS_BS = torch.tensor([[1, 2, 3], [4, 5, 6]])


@pytest.mark.parametrize("label", [-1, -101, 8, 99, 10**9])
def test_a_label_outside_of_the_vocabulary_is_refused_unless_it_is_masked(label: int) -> None:
    labels_BS, mask_BS = LABELS_BS.clone(), torch.ones(2, 3)
    labels_BS[1, 2] = label
    for mask in (mask_BS, None):
        with pytest.raises(InputError, match=rf"labels\[1, 2\] is {label}; expected .* in 0..7"):
            labels.labels_in_vocabulary(labels_BS, mask, 8)
    mask_BS[1, 2] = 0
    mask_BS = mask_BS.bfloat16()
    found_BS, _, is_none_BS = labels.labels_in_vocabulary(labels_BS, mask_BS, 8)
    assert found_BS is not None
    assert is_none_BS is not None
    assert found_BS.tolist() == [[1, 2, 3], [4, 5, 0]]
    assert is_none_BS.nonzero().tolist() == [[1, 2]]


def test_labels_that_are_all_there_are_left_alone() -> None:
    mask_BS = torch.ones(2, 3)
    assert labels.labels_in_vocabulary(LABELS_BS, mask_BS, 8) == (LABELS_BS, mask_BS, None)
    assert labels.labels_in_vocabulary(None, mask_BS, 8) == (None, mask_BS, None)


def test_minus_100_is_no_label() -> None:
    labels_BS = LABELS_BS.clone()
    labels_BS[0, 1] = -100
    found_BS, mask_BS, is_none_BS = labels.labels_in_vocabulary(labels_BS, torch.ones(2, 3), 8)
    assert found_BS is not None
    assert mask_BS is not None
    assert (found_BS[0, 1], mask_BS.sum()) == (0, 5)
    assert labels.zero_without_label(torch.ones(2, 3), is_none_BS).tolist() == [
        [1, 0, 1],
        [1, 1, 1],
    ]


SHAPES: dict[str, tuple[dict[str, Any], str]] = {
    "short mask": ({"loss_mask": torch.ones(2, 2)}, r"loss_mask has shape \[2, 2\]; .* \[2, 3\]"),
    "flat mask": ({"loss_mask": torch.ones(6)}, r"loss_mask has shape \[6\]"),
    "labels": ({"labels": LABELS_BS[:1]}, r"labels has shape \[1, 3\]; expected \[2, 3\], as inp"),
    "labels of floats": ({"labels": LABELS_BS.float()}, r"labels are torch.float32; expected"),
    "positions": ({"position_ids": LABELS_BS[:, :2]}, r"position_ids are torch.int64 \[2, 2\]; "),
    "positions of floats": ({"position_ids": LABELS_BS.float()}, r"position_ids are torch.float32"),
    "two axes": ({"position_ids": LABELS_BS.expand(2, 2, 3)}, r"position_ids are .*\[2, 2, 3\]"),
}


@pytest.mark.parametrize(("change", "message"), SHAPES.values(), ids=SHAPES)
def test_all_that_tokens_have_is_of_one_shape(change: dict[str, Any], message: str) -> None:
    whole: dict[str, Any] = dict.fromkeys(("input_ids", "position_ids", "labels"), LABELS_BS)
    whole["loss_mask"] = torch.ones(2, 3)
    checks.check_shapes(**whole)
    checks.check_shapes(**(whole | {"position_ids": LABELS_BS.expand(3, 2, 3)}))
    checks.check_shapes(**(whole | {"position_ids": LABELS_BS[:1], "input_ids": None}))
    with pytest.raises(InputError, match=message):
        checks.check_shapes(**(whole | change))


def same_shape_other_ids() -> None:
    from megatron.core.models.mimo.alignment import build_alignment_plan

    model, batch = build(), inputs()
    mine = build_alignment_plan(IDS_BS, model.special_token_ids)
    model(**batch, alignment_plan=mine)
    moved = IDS_BS.roll(1, dims=1)
    text = IDS_BS.where(IDS_BS != 9, 8)
    for other_BS, place in ((moved, r"\[0, 3\]"), (text, r"\[1, 6\]")):
        plan = build_alignment_plan(other_BS, model.special_token_ids)
        with pytest.raises(InputError, match=rf"plan was made from other ids: .* at {place}"):
            model(**batch, alignment_plan=plan)


def wrong_types() -> None:
    model, batch = build(), inputs()
    for name, value, message in (
        ("input_ids", "text", "input_ids is str; expected a tensor"),
        ("input_ids", [[1, 2]], "input_ids is list; expected a tensor"),
        ("labels", [[1, 2]], "labels is list; expected a tensor"),
        ("loss_mask", 1.0, "loss_mask is float; expected a tensor"),
        ("position_ids", "0", "position_ids is str; expected a tensor"),
        ("attention_mask", [1], "attention_mask is list; expected a tensor"),
        ("modality_inputs", [1], "modality_inputs is list; expected a mapping"),
        ("modality_inputs", {"images": [1]}, r"modality_inputs\['images'\] is list; expected {enc"),
        ("modality_inputs", {"images": {"plain": 1}}, r"\['images'\]\['plain'\] is int; expected"),
        ("packing_kwargs", "x", "packing_kwargs is str; expected a mapping"),
        ("modality_token_indices", {"text": [1]}, r"indices\['text'\] is list; expected a tensor"),
        ("alignment_plan", {"a": 1}, "alignment_plan is dict; expected what build_alignment_plan"),
    ):
        with pytest.raises(InputError, match=message):
            model(**(batch | {name: value}))


def a_token_without_a_label() -> None:
    model, batch = build(), inputs()
    assert model.language_model.vocab_size == VOCABULARY

    def loss_and_gradients(**changes: Any) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
        model.zero_grad()
        loss_BS, mask_BS = model(**(batch | changes))
        (loss_BS * mask_BS).sum().backward()
        return loss_BS, mask_BS, [parameter.grad.clone() for parameter in model.parameters()]

    masked_BS, labels_BS = batch["loss_mask"].clone(), batch["labels"].clone()
    masked_BS[0, 0], labels_BS[0, 0] = 0, -100
    loss_BS, mask_BS, gradients = loss_and_gradients(labels=labels_BS)
    expected_BS, _, expected = loss_and_gradients(loss_mask=masked_BS)
    assert torch.equal(mask_BS, masked_BS)
    assert torch.equal(loss_BS, expected_BS * masked_BS)
    for one, other in zip(gradients, expected, strict=True):
        assert torch.equal(one, other)
    labels_BS[0, 0] = VOCABULARY
    with pytest.raises(InputError, match=rf"labels\[0, 0\] is {VOCABULARY}"):
        model(**(batch | {"labels": labels_BS}))


CHECKS = [same_shape_other_ids, wrong_types, a_token_without_a_label]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_model(ranks: RankPool, check: Any) -> None:
    ranks(1)(check)
