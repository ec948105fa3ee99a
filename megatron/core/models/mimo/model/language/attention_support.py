"""What a language model's attention can do, and the refusal of what it cannot.

A core attention says what it supports by class attributes, absent ones meaning no:
``takes_span_ids``: an integer ``attention_mask`` [B, S] is read as span numbers;
``reads_lengths_on_host``: boundaries of packed documents may be host tensors.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.models.mimo.config import MimoModelConfig
from megatron.core.models.mimo.config.base_configs import language_config
from megatron.core.models.mimo.errors import InputError, UnsupportedError
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.spec_utils import ModuleSpec

_NOT_SPECS = (type, ModelParallelConfig, ProcessGroupCollection)
_REMEDY = (
    "use megatron.mimo.layers.CoreAttention (language_layer_spec does) or Transformer Engine's "
    "attention"
)


def refuse_attention(mimo_config: MimoModelConfig) -> None:
    """Raise ``UnsupportedError`` where the specs name an attention that cannot do its job."""
    config = language_config(mimo_config)
    specs = mimo_config.language_model_spec.params or {}
    if not any(part is DotProductAttention for part in _parts(list(specs.values()))):
        return
    if config.context_parallel_size > 1:
        raise UnsupportedError(
            f"context_parallel_size = {config.context_parallel_size} with megatron-core's "
            f"DotProductAttention, which sees one rank's keys only; {_REMEDY}"
        )
    if mimo_config.kv_format == "thd":
        raise UnsupportedError(
            "kv_format = 'thd' with megatron-core's DotProductAttention, which cannot tell packed "
            f"documents apart; {_REMEDY}"
        )


@dataclass(frozen=True, kw_only=True)
class AttentionSupport:
    """What the core attention of all layers of this rank can do.

    Attributes:
        takes_packed_rows: none is megatron-core's ``DotProductAttention``.
        reads_lengths_on_host: borders of packed documents may be host tensors.
        without_span_ids: classes that do not know span numbers.
    """

    takes_packed_rows: bool
    reads_lengths_on_host: bool
    without_span_ids: tuple[str, ...]

    @classmethod
    def of(cls, language_model: nn.Module) -> AttentionSupport:
        """Ask each layer's ``core_attention``."""
        found = (getattr(module, "core_attention", None) for module in language_model.modules())
        layers = [module for module in found if isinstance(module, nn.Module)]
        on_host = all(getattr(layer, "reads_lengths_on_host", False) for layer in layers)
        deaf = {type(one).__name__ for one in layers if not getattr(one, "takes_span_ids", False)}
        return cls(
            takes_packed_rows=not any(isinstance(one, DotProductAttention) for one in layers),
            reads_lengths_on_host=bool(layers) and on_host,
            without_span_ids=tuple(sorted(deaf)),
        )

    def check_packing(self) -> None:
        """Raise ``UnsupportedError`` where a layer's attention takes no packed sequences."""
        if not self.takes_packed_rows:
            raise UnsupportedError(
                "packing_kwargs were given, and megatron-core's DotProductAttention cannot tell "
                f"packed documents apart; {_REMEDY}"
            )

    def check_span_ids(
        self, span_ids_BS: torch.Tensor, attention_mask: torch.Tensor | None
    ) -> None:
        """Refuse span numbers that no layer could honour.

        Raises:
            InputError: they are not integers [B, S], or an attention mask is given as well.
            UnsupportedError: an attention that does not know them, by name.
        """
        if span_ids_BS.dim() != 2 or span_ids_BS.dtype not in (torch.int32, torch.int64):
            raise InputError(
                f"span_ids are {span_ids_BS.dtype} of shape {list(span_ids_BS.shape)}; expected "
                "int32 or int64 [B, S], 0 where a token is in no span"
            )
        if attention_mask is not None:
            raise InputError(
                "both span_ids and attention_mask were given; put the spans into the mask, or "
                "leave the mask out"
            )
        if self.without_span_ids:
            raise UnsupportedError(
                f"span_ids were given, and {', '.join(self.without_span_ids)} does not know them; "
                "use megatron.mimo.layers.CoreAttention (--transformer-impl local), or, without "
                "context parallelism and packing, pass the spans as a bool attention_mask "
                "[B, 1, S, S]"
            )


def _parts(value: Any) -> Iterator[Any]:
    """Everything named in a tree of specs, submodules and containers."""
    yield value
    if isinstance(value, list | tuple):
        members = list(value)
    elif isinstance(value, ModuleSpec):
        members = [value.module, value.submodules, *(value.params or {}).values()]
    elif dataclasses.is_dataclass(value) and not isinstance(value, _NOT_SPECS):
        members = [getattr(value, field.name) for field in dataclasses.fields(value)]
    else:
        return
    for member in members:
        yield from _parts(member)
