"""The loss that balances experts, as transformers defines it, as one of a model's ``Losses``.

Over the E experts of L layers, f_e is the share of a micro-batch's tokens that choose expert e (an
average over layers; k choices a token), and p_e(t, l) the router's probability for token t in
layer l. The loss of a token is ``E / L * sum_le f_e p_e(t, l)``, and its mean over the tokens of
one micro-batch is ``load_balancing_loss_func`` of transformers with an attention mask: padding
counts nowhere. f_e has no gradient, so that the loss is linear in the probabilities and needs no
more from a layer than two sums for each expert. f_e is that of a micro-batch, on all the ranks that
share it (tensor and context parallel) and all pipeline stages: the product of two means over a
global batch is not a sum over micro-batches.

The sums go from stage to stage behind the hidden states, as further rows of the message. Backward
brings the loss's slope by each expert's sum the same way, which each router then spreads over its
tokens; so layers are called, recomputed and freed as ever.

Legend: S sequence, B micro-batch, T tokens, E experts, H hidden, M rows of a message, K of them
for sums.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any
from weakref import WeakValueDictionary

import torch
import torch.distributed as dist
from torch import nn

from megatron.core.models.mimo.alignment.cut import SequenceCut
from megatron.core.models.mimo.errors import ConfigError, InputError
from megatron.core.models.mimo.model.batch.forward_inputs import ForwardInputs
from megatron.core.models.mimo.model.language.heads import Loss
from megatron.core.models.mimo.partition.utils import PartitionAdapter
from megatron.core.tensor_parallel.mappings import reduce_from_tensor_model_parallel_region
from megatron.core.utils import unwrap_model

EXPERT_BALANCE = "expert balance"


@dataclass(frozen=True, kw_only=True)
class BalancedPart:
    """The experts in a part of the language model.

    Attributes:
        weight: weight of the loss in the sum that is trained.
        layers: L, how many have experts, over all parts.
        experts: E.
        best: how many a token chooses.
        is_first, is_last: of the parts.

    Raises:
        ConfigError: a weight that is not above zero, or a model without experts.
    """

    weight: float
    layers: int
    experts: int
    best: int
    is_first: bool = True
    is_last: bool = True

    def __post_init__(self) -> None:
        if not (self.weight > 0 and self.layers and self.experts):
            raise ConfigError(
                f"a loss of weight {self.weight} for {self.experts} experts in {self.layers} "
                "layers; expected a weight above 0 and experts: leave the loss out"
            )


@dataclass(kw_only=True, eq=False)
class Tally:
    """What the routers of a part of the language model say of a micro-batch.

    Attributes:
        part: the part of the language model that has the routers.
        padding_BS: bool [B, S_local], of this rank, and of this micro-batch alone: routers know
            the micro-batch by it, when they are recomputed too.
        layers: layer -> float32 [2, E]: choices, and summed probabilities, of each expert.
        arrived_2E: the same of all parts before, for each token of this rank.
        slope_E: of the loss by the summed probabilities, once backward has come to this part.
    """

    part: BalancedPart
    padding_BS: torch.Tensor
    layers: dict[int, torch.Tensor] = field(default_factory=dict)
    arrived_2E: torch.Tensor | None = None
    slope_E: torch.Tensor | None = None

    @property
    def tokens(self) -> torch.Tensor:
        """Tokens of this rank without padding: 0-d float32."""
        return (~self.padding_BS).sum().float()

    def received(self, message_M1H: torch.Tensor) -> torch.Tensor:
        """A message of the part before without its sums, [M - K, 1, H]; these are kept here.

        Raises:
            InputError: a message that is too short to hold them.
        """
        experts, width = self.part.experts, message_M1H.size(-1)
        rows = -(-2 * experts * _pieces(message_M1H.dtype) // width)
        places = self.padding_BS.numel()
        if message_M1H.size(1) != 1 or message_M1H.size(0) < places + rows:
            raise InputError(
                f"hidden states with sums of experts have arrived as {list(message_M1H.shape)}; "
                f"expected at least {places + rows} rows: give every stage the same micro-batch"
            )
        rest_M1H, sums_K1H = torch.split(message_M1H, [message_M1H.size(0) - rows, rows])
        self.arrived_2E = _FromRows.apply(sums_K1H, experts)
        return rest_M1H

    def joined(self, output: torch.Tensor) -> tuple[torch.Tensor, Counted]:
        """The part's output, and the sums up to here.

        In backward the gradient of the sums has then come before that of any router's logits.
        """
        sums_2E = torch.zeros(2, self.part.experts, device=output.device)
        sums_2E = sum(self.layers.values(), start=sums_2E)
        output, own_2E = _Joined.apply(output, sums_2E, self)
        tokens, arrived_2E = self.tokens, self.arrived_2E
        if arrived_2E is not None:
            own_2E = own_2E + arrived_2E * tokens
        return output, Counted(part=self.part, sums_2E=own_2E, tokens=tokens)


@dataclass(frozen=True, kw_only=True, eq=False)
class Counted:
    """The sums of a micro-batch over all parts up to one.

    Attributes:
        part: the part of the language model that this is.
        sums_2E: choices and, with gradient, probabilities, over the tokens of this rank.
        tokens: how many these are, 0-d float32.
    """

    part: BalancedPart
    sums_2E: torch.Tensor
    tokens: torch.Tensor

    @property
    def leaves(self) -> bool:
        """True where they go on to another part."""
        return not self.part.is_last

    def message(self, output: torch.Tensor) -> torch.Tensor:
        """What goes to the next part: [M, 1, H]; sums as means, which every dtype can hold."""
        rows_M1H = output.flatten(0, 1).unsqueeze(1)
        means_2E = self.sums_2E / self.tokens.clamp(min=1.0)
        return torch.cat([rows_M1H, _ToRows.apply(means_2E, output.size(-1), output.dtype)])

    def loss(self, adapter: PartitionAdapter | None) -> Loss:
        """The loss over this context-parallel rank's tokens, on the last stage.

        Ranks that share the micro-batch take part: those of sequence parallelism in all-reduces of
        E and E + 1 numbers, those of context parallelism in one of E + 1; in forward alone.
        """
        choices_E, scores_E = self.sums_2E.unbind()
        tokens = self.tokens
        if adapter is not None and adapter.cfg.seq_parallel:
            group = adapter.cfg.tp_group
            scores_E = reduce_from_tensor_model_parallel_region(scores_E, group=group)
            choices_E, tokens = _summed(choices_E, tokens, group)
        choices_E, everywhere = choices_E.detach(), tokens
        if adapter is not None and adapter.cfg.use_cp:
            choices_E, everywhere = _summed(choices_E, tokens, adapter.cfg.cp_group)
        shares_E = choices_E / (self.part.layers * everywhere.clamp(min=1.0))
        total = (shares_E * scores_E).sum() * (self.part.experts / self.part.layers)
        return Loss(sum=total, count=tokens, weight=self.part.weight)


class ExpertBalance:
    """Knows the tally of each micro-batch that is on its way through a part of the language model.

    Args:
        part: the part of the language model that this is.
    """

    def __init__(self, part: BalancedPart) -> None:
        self.part = part
        self._tallies: WeakValueDictionary[int, Tally] = WeakValueDictionary()

    def begin(self, inputs: ForwardInputs, cut: SequenceCut) -> Tally | None:
        """The tally of a micro-batch, to be held until it is joined; None in generation.

        Raises:
            InputError: nothing says how many tokens there are.
        """
        if inputs.inference_context is not None:
            return None
        padding_BS = inputs.padding_mask_BS
        if padding_BS is None:
            given = (inputs.input_ids_BS, inputs.position_ids, inputs.labels_BS)
            known = next((one for one in given if one is not None), None)
            if known is None:
                raise InputError(
                    "the loss that balances experts counts tokens, and this pipeline stage got "
                    "neither padding_mask, input_ids, position_ids nor labels; give it one of them"
                )
            padding_BS = torch.zeros(known.shape[-2:], dtype=torch.bool, device=known.device)
        tally = Tally(part=self.part, padding_BS=cut.rank_share(padding_BS).clone())
        self._tallies[_place(tally.padding_BS)] = tally
        return tally

    def counted(
        self, logits_SBE: torch.Tensor, padding_SB: torch.Tensor | None, *, layer: int
    ) -> torch.Tensor:
        """A router's logits, counted; in backward the loss's gradient is added to theirs.

        Args:
            logits_SBE: of this rank's tokens.
            padding_SB: what the language model was given as its padding mask, transposed; nothing
                is counted of a micro-batch that was not begun here.
            layer: number of the layer.
        """
        tally = None if padding_SB is None else self._tallies.get(_place(padding_SB))
        if padding_SB is None or tally is None:
            return logits_SBE
        kept_SB1 = (~padding_SB).unsqueeze(-1).float()
        with torch.no_grad():
            scores_SBE = torch.softmax(logits_SBE, dim=-1, dtype=torch.float32)
            chosen_SBk = torch.topk(scores_SBE, self.part.best, dim=-1).indices
            choices_SBE = torch.zeros_like(scores_SBE).scatter_(-1, chosen_SBk, 1.0)
            both = torch.stack([choices_SBE * kept_SB1, scores_SBE * kept_SB1])
            tally.layers[layer] = both.flatten(1, 2).sum(dim=1)
        counted_SBE: torch.Tensor = _Counted.apply(logits_SBE, kept_SB1, tally)
        return counted_SBE


def count_tokens(padding_BS: torch.Tensor | None, labels_BS: torch.Tensor) -> torch.Tensor:
    """Tokens of a whole micro-batch that the loss counts: 0-d float32."""
    if padding_BS is None:
        return torch.tensor(float(labels_BS.numel()), device=labels_BS.device)
    return (~padding_BS).sum().float()


def balance_of(language_model: nn.Module) -> ExpertBalance | None:
    """What balances the experts of a language model: its attribute ``expert_balance``.

    Where it has several pipeline stages, messages have lengths of their own: its
    ``config.variable_seq_lengths`` is switched on, by which Megatron's schedules exchange shapes.
    """
    bare: Any = unwrap_model(language_model)
    balance: ExpertBalance | None = getattr(bare, "expert_balance", None)
    if balance is not None and not (balance.part.is_first and balance.part.is_last):
        bare.config.variable_seq_lengths = True
    return balance


def _place(tensor: torch.Tensor) -> int:
    """Address of a tensor's data: its views and what recomputation saves of it have the same."""
    return tensor.untyped_storage().data_ptr()


def _summed(
    choices_E: torch.Tensor, tokens: torch.Tensor, group: dist.ProcessGroup | None
) -> tuple[torch.Tensor, torch.Tensor]:
    both = torch.cat([choices_E.detach(), tokens[None]])
    dist.all_reduce(both, group=group)
    return both[:-1], both[-1]


def _pieces(dtype: torch.dtype) -> int:
    """How many numbers of a dtype hold one of float32."""
    return 1 if dtype in (torch.float32, torch.float64) else 3


def _as_rows(values_2E: torch.Tensor, width: int, dtype: torch.dtype) -> torch.Tensor:
    """[2, E] as rows [K, 1, H]: each number as a sum of numbers that the dtype has."""
    pieces, rest = [], values_2E.float().flatten()
    for _ in range(_pieces(dtype)):
        pieces.append(rest.to(dtype))
        rest = rest - pieces[-1].float()
    flat = torch.cat(pieces)
    rows = torch.nn.functional.pad(flat, (0, -flat.numel() % width))
    return rows.view(-1, 1, width)


def _as_values(rows_K1H: torch.Tensor, experts: int) -> torch.Tensor:
    """The opposite of ``_as_rows``: float32 [2, E]."""
    pieces = _pieces(rows_K1H.dtype)
    flat = rows_K1H.flatten()[: 2 * experts * pieces]
    return flat.float().view(pieces, 2, experts).sum(dim=0)


class _Counted(torch.autograd.Function):
    """Logits as they are; in backward with the gradient of the experts' loss."""

    @staticmethod
    def forward(
        ctx: Any, logits_SBE: torch.Tensor, kept_SB1: torch.Tensor, tally: Tally
    ) -> torch.Tensor:
        ctx.save_for_backward(logits_SBE, kept_SB1)
        ctx.tally = tally
        return logits_SBE.view_as(logits_SBE)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[Any, ...]:
        (grad_SBE,) = grad_outputs
        logits_SBE, kept_SB1 = ctx.saved_tensors
        slope_E = ctx.tally.slope_E
        assert slope_E is not None, "a router's backward comes after that of its part's output"
        scores_SBE = torch.softmax(logits_SBE, dim=-1, dtype=torch.float32)
        inner_SB1 = (scores_SBE * slope_E).sum(dim=-1, keepdim=True)
        own_SBE = scores_SBE * (slope_E - inner_SB1) * kept_SB1
        return grad_SBE + own_SBE.to(grad_SBE.dtype), None, None


class _Joined(torch.autograd.Function):
    """An output and sums as they are; backward keeps the sums' gradient for the routers."""

    @staticmethod
    def forward(
        ctx: Any, output: torch.Tensor, sums_2E: torch.Tensor, tally: Tally
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.tally = tally
        return output.view_as(output), sums_2E.view_as(sums_2E)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[Any, ...]:
        ctx.tally.slope_E = grad_outputs[1][1]
        return grad_outputs[0], None, None


class _ToRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values_2E: torch.Tensor, width: int, dtype: torch.dtype) -> torch.Tensor:
        ctx.experts = values_2E.size(1)
        return _as_rows(values_2E, width, dtype)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[Any, ...]:
        return _as_values(grad_outputs[0], ctx.experts), None, None


class _FromRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_K1H: torch.Tensor, experts: int) -> torch.Tensor:
        ctx.width, ctx.dtype = rows_K1H.size(-1), rows_K1H.dtype
        return _as_values(rows_K1H, experts)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[Any, ...]:
        return _as_rows(grad_outputs[0], ctx.width, ctx.dtype), None
