"""Wrong arguments to ``MimoModel.forward``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from random import Random
from typing import Any

from tests.chaos.fuzz import Case, alternatives

__all__ = ["arguments"]

IMAGE, VOCABULARY, WIDTH = 63, 64, 12


def _model() -> Any:
    import torch

    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.mimo import (
        MimoModel,
        MimoModelConfig,
        VisionModalitySubmodules,
    )
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.transformer_config import TransformerConfig
    from megatron.mimo.backend import select_backend

    select_backend("cpu")
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1)
    encoder = ModuleSpec(torch.nn.Linear, params={"in_features": WIDTH, "out_features": 16})
    parts = {"encoders": {"patches": encoder}}
    language = {
        "config": TransformerConfig(num_layers=1, hidden_size=16, num_attention_heads=2),
        "transformer_layer_spec": get_gpt_layer_local_spec(),
        "vocab_size": VOCABULARY,
        "max_sequence_length": 16,
        "position_embedding_type": "rope",
    }
    return MimoModel(
        MimoModelConfig(
            language_model_spec=ModuleSpec(GPTModel, params=language),
            modality_submodules_spec={
                "images": ModuleSpec(VisionModalitySubmodules, submodules=parts)
            },
            special_token_ids={"images": IMAGE},
        )
    )


def _right() -> dict[str, Any]:
    import torch

    tokens = torch.arange(16).view(2, 8)
    tokens[0, 1:4] = IMAGE
    return {
        "input_ids": tokens,
        "position_ids": torch.arange(8).expand(2, -1).contiguous(),
        "attention_mask": None,
        "labels": torch.arange(16).view(2, 8),
        "loss_mask": torch.ones(2, 8),
        "modality_inputs": {"images": {"patches": {"input": torch.rand(3, WIDTH)}}},
    }


def _other_tensor(value: Any, random: Random) -> Any:
    """A tensor that is wrong in shape, type or content."""
    import torch

    if value.is_meta or value.layout != torch.strided or not value.dim():
        return None  # a second change of what is changed already
    changes: list[Any] = [
        lambda: value.float() if not value.is_floating_point() else value.long(),
        lambda: value.bool(),
        lambda: value.to(random.choice([torch.int8, torch.int32, torch.float16, torch.float64])),
        lambda: value.reshape(-1),
        lambda: value[None],
        lambda: value[:1],
        lambda: value[:0],
        lambda: value[..., :-1],
        lambda: value[..., :0],
        lambda: torch.cat([value, value]),
        lambda: torch.cat([value, value], dim=-1),
        lambda: value.transpose(0, -1) if value.dim() else value,
        lambda: value + random.choice([1, -1, 70, 10**6]),
        lambda: torch.full_like(value, random.choice([-1, IMAGE, 63, 64, 127])),
        lambda: (
            torch.full_like(value, -100) if value.dtype == torch.int64 else value * float("nan")
        ),
        lambda: value.to("meta"),
        lambda: value.to_sparse(),
        lambda: value.numpy(),
        lambda: value.tolist(),
        lambda: tuple(value),
    ]
    return random.choice(changes)()


def _disturb(value: Any, random: Random) -> Any:
    import torch

    if isinstance(value, dict) and value and random.random() < 0.85:
        name = random.choice(list(value))
        what = random.random()
        if what < 0.1:
            return {key: part for key, part in value.items() if key != name}
        if what < 0.25:
            new = random.choice(["image", "pictures", "", "input_ids", "inputs", 3, None])
            return {(new if key == name else key): part for key, part in value.items()}
        return {**value, name: _disturb(value[name], random)}
    if isinstance(value, torch.Tensor) and random.random() < 0.8:
        return _other_tensor(value, random)
    return next(alternatives(random))


@contextmanager
def arguments() -> Iterator[Case]:
    """Cases: a forward pass with one to three arguments that are wrong."""
    model = _model()

    def case(random: Random) -> None:
        given = _right()
        for _ in range(random.choice([1, 1, 1, 2, 3])):
            name = random.choice(list(given))
            given[name] = _disturb(given[name], random)
        if random.random() < 0.05:
            del given[random.choice([name for name in given if name != "input_ids"])]
        model(**given)

    yield case
