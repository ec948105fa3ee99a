"""The loss of a micro-batch: its sum, its count, what is reported."""

from __future__ import annotations

import torch

from megatron.mimo.training.forward_step import LOSS, losses_by_source, sum_loss


def test_the_loss_is_the_sum_over_label_positions() -> None:
    losses_BS = torch.tensor([[1.0, 2.0, 4.0], [8.0, 16.0, 32.0]], requires_grad=True)
    loss_mask_BS = torch.tensor([[0.0, 1.0, 1.0], [1.0, 0.0, 0.0]])
    total, count, report = sum_loss(loss_mask_BS, losses_BS)
    assert total.item() == 14.0
    assert count.item() == 3
    assert count.dtype == torch.int32
    assert report[LOSS].tolist() == [14.0, 3.0]
    assert not report[LOSS].requires_grad
    total.backward()
    assert losses_BS.grad is not None
    assert torch.equal(losses_BS.grad, loss_mask_BS)


def test_a_micro_batch_without_labels_gives_zero() -> None:
    losses_BS = torch.ones(1, 2, requires_grad=True)
    total, count, _ = sum_loss(torch.zeros(1, 2), losses_BS)
    total.backward()
    assert (total.item(), count.item()) == (0.0, 0)
    assert losses_BS.grad is not None
    assert not losses_BS.grad.any()


def test_losses_of_sources_are_those_of_their_positions() -> None:
    ids_BS = torch.tensor([[0, 0, 1, 2], [1, 2, 2, 2]])  # 2 is none
    mask_BS = torch.tensor([[0.0, 1, 1, 1], [1, 0, 1, 0]])
    losses_BS = torch.tensor([[5.0, 1, 2, 4], [8, 16, 32, 64]])
    found = losses_by_source(["a", "b"], ids_BS, mask_BS, losses_BS)
    assert {name: pair.tolist() for name, pair in found.items()} == {
        "loss of source a": [1.0, 1.0],
        "loss of source b": [10.0, 2.0],
    }
    empty = losses_by_source(["a", "b"], torch.full((1, 4), 2), mask_BS[:1], losses_BS[:1])
    assert all(pair.tolist() == [0.0, 0.0] for pair in empty.values())
