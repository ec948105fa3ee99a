"""A tiny MimoModel on one process, with plain encoders; for functions that run in the rank pool.

Legend: S sequence, B micro-batch, H hidden, N rows of one modality, F features, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from tests.rank_pool import model_parallel

HIDDEN, VOCABULARY, LENGTH, FEATURES = 16, 32, 8, 5
IMAGE, AUDIO = 30, -200
TOKENS = {"images": IMAGE, "audio": AUDIO}
IDS_BS = torch.tensor([[1, 30, 30, 2, -200, 3, 4, 5], [30, 6, 7, -200, 8, -200, 9, 1]])
COUNTS = {"images": 3, "audio": 3}


class Encoder(nn.Module):
    """[N, F] to [N, width]."""

    def __init__(self, width: int = HIDDEN, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.linear = nn.Linear(FEATURES, width, dtype=dtype)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.linear(features.to(self.linear.weight.dtype))
        return out


def config(**changes: Any) -> Any:
    from megatron.core.transformer.transformer_config import TransformerConfig

    settings: dict[str, Any] = {
        "num_layers": 1,
        "hidden_size": HIDDEN,
        "num_attention_heads": 2,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "use_cpu_initialization": True,
        "gradient_accumulation_fusion": False,
        "masked_softmax_fusion": False,
        "persist_layer_norm": False,
        "pipeline_dtype": torch.float32,
    }
    return TransformerConfig(**(settings | changes))


def language_spec(changes: Mapping[str, Any] | None = None, **params: Any) -> Any:
    """Spec of a one-layer GPT; ``changes`` are the configuration's."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.spec_utils import ModuleSpec

    settings: dict[str, Any] = {
        "config": config(**(changes or {})),
        "transformer_layer_spec": get_gpt_layer_local_spec(),
        "vocab_size": VOCABULARY,
        "max_sequence_length": LENGTH,
        "position_embedding_type": "rope",
    }
    return ModuleSpec(module=GPTModel, params=settings | params)


def modality_spec(kind: str = "VisionModalitySubmodules", **encoder: Any) -> Any:
    """Spec of a modality with one plain encoder; ``encoder`` holds its arguments."""
    from megatron.core.models import mimo
    from megatron.core.transformer.spec_utils import ModuleSpec

    return ModuleSpec(
        module=getattr(mimo, kind),
        submodules={"encoders": {"plain": ModuleSpec(module=Encoder, params=encoder)}},
    )


def mimo_config(
    changes: Mapping[str, Any] | None = None,
    *,
    modalities: Mapping[str, Any] | None = None,
    tokens: Mapping[str, int] | None = None,
    **params: Any,
) -> Any:
    from megatron.core.models.mimo import MimoModelConfig

    return MimoModelConfig(
        language_spec(changes, **params),
        dict(
            modalities
            or {"images": modality_spec(), "audio": modality_spec("AudioModalitySubmodules")}
        ),
        dict(TOKENS if tokens is None else tokens),
    )


def build(
    changes: Mapping[str, Any] | None = None, *, kind: type | None = None, **rest: Any
) -> Any:
    """A model of class ``kind`` (MimoModel); initialises Megatron's groups where needed."""
    from megatron.core import parallel_state
    from megatron.core.models.mimo import MimoModel

    if not parallel_state.model_parallel_is_initialized():
        model_parallel()
    return (kind or MimoModel)(mimo_config(changes, **rest))


def inputs(counts: Mapping[str, int] = COUNTS, *, ids_BS: torch.Tensor = IDS_BS) -> dict[str, Any]:
    """Arguments of ``MimoModel.forward`` with ``counts`` rows per modality."""
    generator = torch.Generator().manual_seed(3)
    batch, length = ids_BS.shape
    return {
        "input_ids": ids_BS,
        "position_ids": torch.arange(length).repeat(batch, 1),
        "labels": torch.randint(0, 9, (batch, length), generator=generator),
        "loss_mask": torch.ones(batch, length),
        "modality_inputs": {
            name: {"plain": {"features": torch.randn(count, FEATURES, generator=generator)}}
            for name, count in counts.items()
        },
    }


def seen_by_language_model(model: Any) -> dict[str, Any]:
    """A dictionary that the next call of the language model fills with its arguments."""
    seen: dict[str, Any] = {}

    def look(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        assert args == ()
        seen.update(kwargs)

    model.language_model.register_forward_pre_hook(look, with_kwargs=True)
    return seen


def merge_by_loop(model: Any, batch: Mapping[str, Any]) -> torch.Tensor:
    """Merged embeddings [S, B, H], token by token."""
    ids_BS = batch["input_ids"]
    rows = {
        token: list(
            model.modality_submodules[name].encoders["plain"](
                batch["modality_inputs"][name]["plain"]["features"]
            )
        )
        for name, token in TOKENS.items()
        if name in batch["modality_inputs"]
    }
    table_VH = model.language_model.embedding.word_embeddings.weight
    samples = [
        torch.stack([rows[token].pop(0) if token in rows else table_VH[token] for token in ids])
        for ids in ids_BS.tolist()
    ]
    return torch.stack(samples, dim=1)


class StoppedError(Exception):
    """Ends a call before the language model's layers are run."""


def arguments_of_a_call_that_stops(model: Any) -> dict[str, Any]:
    seen: dict[str, Any] = {}

    def stop(_: nn.Module, __: Any, kwargs: dict[str, Any]) -> None:
        seen.update(kwargs)
        raise StoppedError

    model.language_model.register_forward_pre_hook(stop, with_kwargs=True)
    return seen
