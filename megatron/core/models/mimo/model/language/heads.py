"""Further heads on the last pipeline stage, and the losses that a model gives with them.

A loss is the sum of its per-position losses over its valid positions, divided once by the number
of its valid positions in the global batch; several are a weighted sum of such quotients. A model
with heads gives sums and numbers of its share of a micro-batch, which add up over micro-batches,
data- and context-parallel ranks. They are equal on all tensor-parallel ranks.

Legend: S sequence, B micro-batch, H hidden; ``S_local`` after context/sequence sharding.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from megatron.core.models.mimo.alignment.cut import SequenceCut
from megatron.core.models.mimo.config.base_configs import TEXT, HeadSpec
from megatron.core.models.mimo.errors import InputError, UnsupportedError
from megatron.core.models.mimo.model.batch.checks import HeadTargets
from megatron.core.models.mimo.model.batch.labels import NO_LABEL, LabelShare
from megatron.core.models.mimo.partition.utils import PartitionAdapter
from megatron.core.tensor_parallel.mappings import reduce_from_tensor_model_parallel_region
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from megatron.core.transformer.spec_utils import build_module
from megatron.core.utils import unwrap_model

MASK = "mask"  # of a head's targets: where its loss counts


@dataclass(frozen=True, kw_only=True, eq=False)
class HeadInputs:
    """What a head is called with: the positions whose hidden states this rank holds.

    Attributes:
        hidden_SBH: [S_local, B, H], what the decoder gives, after its last norm.
        labels_BS: long [B, S_local]; 0 where there is none.
        mask_BS: float32 [B, S_local], where the head's loss counts.
        targets: the head's own, [B, S_local, ...] each.
    """

    hidden_SBH: torch.Tensor
    labels_BS: torch.Tensor
    mask_BS: torch.Tensor
    targets: Mapping[str, torch.Tensor]


@dataclass(frozen=True, kw_only=True, eq=False)
class Loss:
    """One loss over this data- and context-parallel rank's share of a micro-batch.

    Attributes:
        sum: 0-d float32 with gradient, over valid positions.
        count: 0-d float32 without gradient, the number of valid positions.
        weight: weight of the loss in the sum that is trained.
    """

    sum: torch.Tensor
    count: torch.Tensor
    weight: float


class Losses(dict[str, Loss]):
    """The losses of a micro-batch by name: "text", each head's, and that of experts' balance.

    Args:
        losses: by name.
        text_BS: losses of the text's tokens, [B, S / cp].
    """

    def __init__(self, losses: Mapping[str, Loss], *, text_BS: torch.Tensor) -> None:
        super().__init__(losses)
        self.text_BS = text_BS

    def total(
        self, counts: Mapping[str, float | torch.Tensor], *, unit: str = TEXT
    ) -> torch.Tensor:
        """What to run backward on, and to divide by ``counts[unit]`` once it is added up.

        The sum over all micro-batches and ranks, divided so, is the weighted sum of the losses,
        each divided by the number of its own positions: Megatron's division of summed gradients
        by the number of text labels is the only one.

        Args:
            counts: the number of valid positions of each loss in the global batch, as
                ``count_positions`` finds them, added up; as tensors, nothing waits for them.
            unit: the loss by whose number everything is divided afterwards.

        Returns:
            0-d float32. A loss without any position in the global batch adds nothing.
        """
        parts = []
        for name, loss in self.items():
            own = torch.as_tensor(counts[name]).clamp(min=1.0)
            parts.append(loss.sum * (loss.weight * counts[unit] / own))
        return torch.stack(parts).sum()


class Heads(nn.ModuleDict):
    """The heads of a model by name; empty on all but the last pipeline stage.

    A head is any module. ``head(HeadInputs)`` gives its loss per position, [B, S_local].

    Args:
        specs: name -> spec.
        language_model: whose decoder's output the heads read.
        adapter: how sequences are cut.

    Raises:
        UnsupportedError: a language model without a ``decoder``.
    """

    def __init__(
        self,
        specs: Mapping[str, HeadSpec],
        language_model: nn.Module,
        adapter: PartitionAdapter | None,
    ) -> None:
        super().__init__({name: build_module(spec.module) for name, spec in specs.items()})
        self.weights = {name: spec.weight for name, spec in specs.items()}
        if specs and not hasattr(language_model, "decoder"):
            raise UnsupportedError(
                f"heads {sorted(specs)} read the output of the language model's decoder, and "
                f"{type(language_model).__name__} has no module of that name; leave the heads out"
            )
        if adapter is not None and adapter.cfg.seq_parallel:
            # Each rank of the group reads other positions: Megatron adds these gradients up.
            for parameter in self.parameters():
                if not getattr(parameter, "tensor_model_parallel", False):
                    parameter.sequence_parallel = True  # type: ignore[attr-defined]

    @contextmanager
    def reading(self, language_model: nn.Module) -> Iterator[list[torch.Tensor]]:
        """A list that holds the decoder's output after a call of ``language_model``."""
        seen: list[torch.Tensor] = []
        if not len(self):
            yield seen
            return

        def keep(_: nn.Module, __: Any, output: torch.Tensor) -> None:
            seen.append(output)

        hook = unwrap_model(language_model).decoder.register_forward_hook(keep)
        try:
            yield seen
        finally:
            hook.remove()

    def losses(
        self,
        hidden_SBH: torch.Tensor | None,
        text_BS: torch.Tensor,
        labels: LabelShare,
        targets: HeadTargets | None,
        *,
        cut: SequenceCut,
        tp_group: dist.ProcessGroup | None,
    ) -> Losses:
        """All losses of a micro-batch, the text's among them.

        Under sequence parallelism the ranks of ``tp_group`` take part in two all-reduces of one
        number for each head, forward only.

        Args:
            hidden_SBH: the decoder's output, [S_local, B, H]; None where there are no heads.
            text_BS: losses of the text's tokens, [B, S / cp].
            labels: labels of this context-parallel rank.
            targets: targets of each head, uncut: [B, S, ...].
            cut: how sequences are cut.
            tp_group: ranks that hold other positions each; read under sequence parallelism.

        Raises:
            InputError: a head that gives anything but [B, S_local].
        """
        assert labels.labels_BS is not None, "heads run where there are labels"
        mask_BS = _text_mask(labels.labels_BS, labels.loss_mask_BS, labels.without_label_BS)
        text_sum = (text_BS.float() * mask_BS).sum()
        text = Loss(sum=text_sum, count=mask_BS.sum(), weight=1.0)
        found = Losses({TEXT: text}, text_BS=text_BS)
        own_labels_BS = cut.sequence_share(labels.labels_BS, dim=1)
        own_mask_BS = cut.sequence_share(mask_BS, dim=1)
        is_cut = cut.tp_size > 1
        for name, head in self.items():
            assert hidden_SBH is not None, "heads have seen the decoder's output"
            held = {
                key: cut.rank_share(whole, dim=1)
                for key, whole in ((targets or {}).get(name) or {}).items()
            }
            head_mask_BS = held.pop(MASK, own_mask_BS).float()
            inputs = HeadInputs(
                hidden_SBH=hidden_SBH, labels_BS=own_labels_BS, mask_BS=head_mask_BS, targets=held
            )
            # Ranks with other positions draw other dropout masks; with the same ones, the same.
            with get_cuda_rng_tracker().fork() if is_cut and self.training else nullcontext():
                losses_BS = head(inputs)
            _check_losses(name, losses_BS, head_mask_BS)
            total, count = (losses_BS.float() * head_mask_BS).sum(), head_mask_BS.sum()
            if is_cut:
                total = reduce_from_tensor_model_parallel_region(total, group=tp_group)
                dist.all_reduce(count, group=tp_group)
            found[name] = Loss(sum=total, count=count, weight=self.weights[name])
        return found


def count_positions(
    labels_BS: torch.Tensor,
    loss_mask_BS: torch.Tensor | None,
    targets: HeadTargets | None,
    heads: Mapping[str, HeadSpec],
) -> dict[str, torch.Tensor]:
    """The number of valid positions of each loss in a whole micro-batch: 0-d float32, by name.

    It needs the batch alone, so that a training loop knows the numbers of the global batch, added
    up over micro-batches and data-parallel ranks, before the first backward pass.

    Args:
        labels_BS: long [B, S], uncut.
        loss_mask_BS: [B, S] or None.
        targets: targets of each head, as ``MimoModel.forward`` takes them.
        heads: as ``MimoModelConfig`` holds them.
    """
    text = _text_mask(labels_BS, loss_mask_BS, labels_BS == NO_LABEL).sum()
    counts = {TEXT: text}
    for name in heads:
        mask_BS = ((targets or {}).get(name) or {}).get(MASK)
        counts[name] = text if mask_BS is None else mask_BS.float().sum()
    return counts


def _text_mask(
    labels_BS: torch.Tensor, loss_mask_BS: torch.Tensor | None, without_BS: torch.Tensor | None
) -> torch.Tensor:
    """Where the text's loss counts: float32 [B, S]."""
    if loss_mask_BS is None:
        loss_mask_BS = torch.ones_like(labels_BS, dtype=torch.float32)
    mask_BS = loss_mask_BS.float()
    return mask_BS if without_BS is None else mask_BS.masked_fill(without_BS, 0)


def _check_losses(name: str, losses_BS: Any, mask_BS: torch.Tensor) -> None:
    if not torch.is_tensor(losses_BS) or losses_BS.shape != mask_BS.shape:
        got = list(losses_BS.shape) if torch.is_tensor(losses_BS) else type(losses_BS).__name__
        raise InputError(
            f"head {name!r} gave {got}; expected its loss at every position that this rank holds, "
            f"{list(mask_BS.shape)}"
        )
