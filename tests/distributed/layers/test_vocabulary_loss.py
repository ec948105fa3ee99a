"""The loss piece by piece is the plain one: value and gradients, over one rank and over several."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from megatron.mimo.layers.vocabulary_loss import _pieces
from tests.rank_pool import RankPool

TOKENS, WIDTH, WORDS = 37, 8, 50


def inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    hidden_TH = 3 * torch.randn(TOKENS, WIDTH, generator=generator)
    weight_VH = torch.randn(WORDS, WIDTH, generator=generator)
    labels_T = torch.randint(0, WORDS, (TOKENS,), generator=generator)
    weights_T = torch.rand(TOKENS, generator=generator)  # of the losses in their sum
    weights_T[::5] = 0.0
    return hidden_TH.to(dtype), weight_VH.to(dtype), labels_T, weights_T


def plain(given: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Losses and gradients in fp64, of values as ``given`` holds them."""
    hidden_TH, weight_VH, labels_T, weights_T = inputs(given)
    hidden_TH, weight_VH = hidden_TH.double(), weight_VH.double()
    hidden_TH.requires_grad_()
    weight_VH.requires_grad_()
    losses_T = F.cross_entropy(hidden_TH @ weight_VH.t(), labels_T, reduction="none")
    (losses_T * weights_T).sum().backward()
    assert hidden_TH.grad is not None
    assert weight_VH.grad is not None
    return losses_T.detach(), hidden_TH.grad, weight_VH.grad


def in_pieces(rows: int, borders: list[int], dtype: torch.dtype = torch.float32) -> Any:
    """Losses, the sum over ranks of the gradient of the inputs, and of the own words."""
    from megatron.mimo.layers.vocabulary_loss import chunked_cross_entropy

    hidden_TH, weight_VH, labels_T, weights_T = inputs(dtype)
    rank = dist.get_rank()
    own_VH = weight_VH[borders[rank] : borders[rank + 1]].clone().requires_grad_()
    hidden_TH.requires_grad_()
    losses_T = chunked_cross_entropy(
        hidden_TH,
        own_VH,
        labels_T,
        first=borders[rank],
        group=dist.group.WORLD,
        piece=own_VH.element_size() * rows * max(len(own_VH), 1),
    )
    (losses_T * weights_T).sum().backward()
    assert hidden_TH.grad is not None
    dist.all_reduce(hidden_TH.grad)
    return losses_T.detach(), hidden_TH.grad, own_VH.grad


@pytest.mark.parametrize("rows", [1, 5, TOKENS, 1000])
def test_equals_the_plain_loss(ranks: RankPool, rows: int) -> None:
    (found,) = ranks(1)(in_pieces, rows, [0, WORDS])
    for one, expected in zip(found, plain(), strict=True):
        torch.testing.assert_close(one, expected.float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("borders", [[0, 25, 50], [0, 50, 50], [0, 1, 50]])
def test_equals_it_over_two_ranks(ranks: RankPool, borders: list[int]) -> None:
    losses_T, of_hidden_TH, of_weight_VH = plain()
    for rank, found in enumerate(ranks(2)(in_pieces, 4, borders)):
        own = of_weight_VH[borders[rank] : borders[rank + 1]]
        for one, expected in zip(found, (losses_T, of_hidden_TH, own), strict=True):
            torch.testing.assert_close(one, expected.float(), rtol=1e-5, atol=1e-6)


def test_sums_of_many_pieces_keep_their_digits_in_bf16(ranks: RankPool) -> None:
    """Gradients are as near to those of fp64 as those of one piece are."""
    expected = plain(torch.bfloat16)
    errors = []
    for rows in (1, TOKENS):
        (found,) = ranks(1)(in_pieces, rows, [0, WORDS], torch.bfloat16)
        errors.append(
            [
                float((one.double() - exact).norm() / exact.norm())
                for one, exact in zip(found, expected, strict=True)
            ]
        )
    for many, one in zip(*errors, strict=True):
        assert many < 1.5 * one + 1e-3
        assert many < 0.01


def largest_tensor(words: int) -> tuple[int, int]:
    """Most elements of a tensor that forward and backward make; and of the whole logits."""
    from megatron.mimo.layers.vocabulary_loss import chunked_cross_entropy

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            out = func(*args, **(kwargs or {}))
            for one in out if isinstance(out, tuple | list) else (out,):
                if isinstance(one, Tensor):
                    self.elements = max(self.elements, one.numel())
            return out

    tokens = 512
    hidden_TH = torch.randn(tokens, 4, requires_grad=True)
    weight_VH = torch.randn(words, 4, requires_grad=True)
    labels_T = torch.arange(tokens)
    with Largest() as seen:
        chunked_cross_entropy(
            hidden_TH, weight_VH, labels_T, first=0, group=dist.group.WORLD, piece=4 * 8 * words
        ).sum().backward()
    return seen.elements, tokens * words


def test_the_logits_are_never_whole(ranks: RankPool) -> None:
    ((most, whole),) = ranks(1)(largest_tensor, 4096)
    assert most == 8 * 4096
    assert most < whole / 60


def test_pieces_are_of_sizes_that_products_like() -> None:
    """Multiples of 64, where a piece has more than 64 rows."""
    for rows, width, piece, steps in (
        (300, 400, 80_000, [192, 108]),
        (100, 800, 80_000, [100]),
        (9, 3600, 7_200, [2, 2, 2, 2, 1]),
    ):
        pieces = [range(rows)[at] for at in _pieces(rows, width, piece)]
        assert [len(one) for one in pieces] == steps
        assert [number for one in pieces for number in one] == list(range(rows))


class _Casts(TorchDispatchMode):
    """Counts changes of type of tensors of this many numbers, or more."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.found = size, 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.found += func.name().startswith("aten::_to_copy") and args[0].numel() >= self.size
        return func(*args, **(kwargs or {}))


def test_no_pass_over_the_logits_changes_their_type_alone() -> None:
    """Neither in the fused operators' plain torch nor between them."""
    from megatron.mimo.layers.fused import cross_entropy

    hidden_TH, weight_VH, labels_T, weights_T = inputs(torch.bfloat16)
    logits_TV, sums_2T = hidden_TH @ weight_VH.t(), torch.empty(2, TOKENS)
    with _Casts(TOKENS * WORDS) as mode:
        cross_entropy._plain(logits_TV, labels_T, 0, WORDS, sums_2T)
        cross_entropy._plain_backward(logits_TV, labels_T, 0, WORDS, sums_2T[0], weights_T)
        chunked_in_one(torch.bfloat16)
    assert mode.found == 0


def chunked_in_one(dtype: torch.dtype, **piece: int) -> tuple[Tensor, ...]:
    """Losses and gradients in a group of one rank."""
    from megatron.mimo.layers.vocabulary_loss import chunked_cross_entropy

    hidden_TH, weight_VH, labels_T, weights_T = inputs(dtype)
    hidden_TH.requires_grad_()
    weight_VH.requires_grad_()
    losses_T = chunked_cross_entropy(
        hidden_TH, weight_VH, labels_T, first=0, group=dist.ProcessGroup(0, 1), **piece
    )
    first, second = (
        torch.autograd.grad((losses_T * weights_T).sum(), (hidden_TH, weight_VH), retain_graph=keep)
        for keep in (True, False)
    )
    for one, other in zip(first, second, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    return losses_T.detach(), *first


def test_logits_of_one_piece_are_computed_once() -> None:
    """And again by a second backward pass, with an equal result: two products more, and two."""
    product = 2 * TOKENS * WIDTH * WORDS
    for piece, products in (({}, 6), ({"piece": 4 * WORDS * 8}, 7)):
        with FlopCounterMode(display=False) as counter:
            chunked_in_one(torch.float32, **piece)
        assert counter.get_total_flops() == products * product
