"""What the language model is called with: this rank's share of everything that tokens bring.

Legend: S sequence, B micro-batch, H hidden, T packed tokens; ``S_local`` after
context/sequence sharding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from megatron.core.models.gpt import GPTModel
from megatron.core.models.mimo.alignment.cut import SequenceCut
from megatron.core.models.mimo.errors import UnsupportedError
from megatron.core.models.mimo.model.batch.checks import check_padding_mask
from megatron.core.models.mimo.model.batch.forward_inputs import ForwardInputs
from megatron.core.models.mimo.model.batch.labels import LabelShare, labels_in_vocabulary
from megatron.core.models.mimo.model.language.attention_support import AttentionSupport
from megatron.core.models.mimo.model.language.label_rows import LabelRows, loss_of_label_rows
from megatron.core.models.mimo.model.language.rotary import (
    leave_cutting_to_the_model,
    positions_to_rotate_by,
)
from megatron.core.models.mimo.model.merging.level_route import untaken_levels
from megatron.core.models.mimo.model.merging.levels import LevelRows
from megatron.core.models.mimo.partition.packing import check_one_row, packed_params
from megatron.core.models.mimo.signatures import accepts, names_argument
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.utils import unwrap_model


@dataclass(frozen=True, kw_only=True)
class LanguageCall:
    """How a language model is called; asked once, when it has been built.

    Attributes:
        attention: what its attention can do.
        rotates_by_axes: it has multimodal RoPE.
        takes_loss_mask: its ``forward`` has a ``loss_mask``.
        takes_level_rows: its ``forward`` has ``level_rows``, a tuple of ``LevelRows``. It calls
            ``level_rows[l].add_to(hidden)`` on the output of the layer l of this pipeline stage;
            it is called without the argument where a micro-batch has no levels for it.
        takes_label_rows: it is a GPTModel, whose ``output_processor`` can compute the loss.
    """

    attention: AttentionSupport
    rotates_by_axes: bool
    takes_loss_mask: bool
    takes_level_rows: bool
    takes_label_rows: bool

    @classmethod
    def of(cls, language_model: torch.nn.Module) -> LanguageCall:
        """Ask a language model; its multimodal RoPE leaves the cutting of positions to us."""
        return cls(
            attention=AttentionSupport.of(language_model),
            rotates_by_axes=leave_cutting_to_the_model(language_model),
            takes_loss_mask=accepts(language_model.forward, "loss_mask"),
            takes_level_rows=names_argument(language_model.forward, "level_rows"),
            takes_label_rows=isinstance(language_model, GPTModel)
            and accepts(language_model.forward, "output_processor"),
        )

    def packed_row(
        self, inputs: ForwardInputs, *, config: Any, device: torch.device
    ) -> PackedSeqParams | None:
        """The documents of a packed sequence; None for rows that are not packed.

        Args:
            inputs: inputs of the micro-batch.
            config: configuration of the language model.
            device: device of the model.

        Raises:
            InputError: boundaries that do not fit each other, the row or context parallelism.
            UnsupportedError: an attention that takes no packed sequences.
        """
        if inputs.packing_kwargs is None:
            return None
        self.attention.check_packing()
        # The fused rotation reads boundaries on the device, whatever attention does.
        on_host = self.attention.reads_lengths_on_host and not config.apply_rope_fusion
        return packed_params(
            inputs.packing_kwargs,
            tokens=check_one_row(
                input_ids=inputs.input_ids_BS,
                position_ids=inputs.position_ids,
                labels=inputs.labels_BS,
            ),
            cp_size=config.context_parallel_size,
            device=None if on_host else device,
            bounds_device=device,
        )

    def check_masks(self, inputs: ForwardInputs, *, context_parallel: bool) -> None:
        """Refuse masks and span numbers that the language model's attention cannot follow.

        Raises:
            InputError: span numbers that are no integers [B, S], or that come with a mask.
            UnsupportedError: a mask under context parallelism; an attention without spans.
        """
        if inputs.attention_mask is not None and context_parallel:
            raise UnsupportedError(
                "context parallelism requires attention_mask=None: a dense mask does not follow "
                "the sequence's cut; use the causal mask type or packing_kwargs"
            )
        if inputs.span_ids_BS is not None:
            self.attention.check_span_ids(inputs.span_ids_BS, inputs.attention_mask)

    def arguments(
        self,
        language_model: torch.nn.Module,
        inputs: ForwardInputs,
        label_share: LabelShare,
        *,
        decoder_input: torch.Tensor | None,
        level_rows: tuple[LevelRows, ...],
        cut: SequenceCut,
        packed: PackedSeqParams | None,
        padding_BS: torch.Tensor | None = None,
    ) -> dict[str, Any]:
        """Keyword arguments of the language model's ``forward``.

        Args:
            language_model: maybe wrapped.
            inputs: inputs of the micro-batch, uncut.
            label_share: this rank's share of its labels.
            decoder_input: what the decoder reads, on the first pipeline stage: [S_local, B, H].
            level_rows: what its layers on this stage add.
            cut: how its sequences are cut.
            packed: the documents of a packed sequence.
            padding_BS: this rank's padding, [B, S_local], where it was cut already.

        Raises:
            UnsupportedError: levels or label rows for a language model that takes none.
        """
        position_ids, mask = inputs.position_ids, inputs.attention_mask
        if self.rotates_by_axes:
            position_ids = positions_to_rotate_by(language_model, position_ids, cut)
        if inputs.span_ids_BS is not None:
            mask = cut.context_share(inputs.span_ids_BS)
        arguments = {
            "input_ids": None,
            "position_ids": position_ids,
            "decoder_input": decoder_input,
            "labels": label_share.labels_BS,
            "attention_mask": mask,
            "packed_seq_params": packed,
        }
        if level_rows:
            if not self.takes_level_rows:
                names = sorted({name for level in level_rows for name in level.rows})
                raise untaken_levels(names, len(level_rows), _class_of(language_model))
            arguments["level_rows"] = level_rows
        if inputs.label_rows_K is not None and label_share.labels_BS is not None:
            self._check_label_rows(language_model)
            arguments["output_processor"] = loss_of_label_rows
            arguments["output_processor_context"] = LabelRows(rows_K=inputs.label_rows_K)
        if self.takes_loss_mask:
            arguments["loss_mask"] = label_share.loss_mask_BS
        if inputs.inference_context is not None:
            arguments["inference_context"] = inputs.inference_context
            arguments["runtime_gather_output"] = True
        if inputs.padding_mask_BS is not None:
            check_padding_mask(language_model, inputs.padding_mask_BS)
            arguments["padding_mask"] = cut.rank_share(inputs.padding_mask_BS)
        if padding_BS is not None:
            arguments["padding_mask"] = padding_BS
        return arguments

    def _check_label_rows(self, language_model: torch.nn.Module) -> None:
        if not self.takes_label_rows:
            raise UnsupportedError(
                f"label_rows with a {_class_of(language_model)}, which computes the loss of all "
                "positions; leave them out, or use a GPTModel whose forward takes an "
                "output_processor"
            )


def _class_of(language_model: torch.nn.Module) -> str:
    return type(unwrap_model(language_model)).__name__


def share_of_labels(
    inputs: ForwardInputs, cut: SequenceCut, language_model: torch.nn.Module
) -> LabelShare:
    """Labels and loss mask of this rank's positions, checked against the vocabulary.

    Raises:
        InputError: labels on the host that are outside of the vocabulary and not masked.
    """
    labels_BS, mask_BS = inputs.labels_BS, inputs.loss_mask_BS
    labels_BS = None if labels_BS is None else cut.context_share(labels_BS)
    mask_BS = None if mask_BS is None else cut.context_share(mask_BS)
    vocab_size = getattr(unwrap_model(language_model), "vocab_size", None)
    labels_BS, mask_BS, without_BS = labels_in_vocabulary(labels_BS, mask_BS, vocab_size)
    return LabelShare(labels_BS=labels_BS, loss_mask_BS=mask_BS, without_label_BS=without_BS)
