"""What is decided while a model is built: refusals and the sequence's partition."""

from __future__ import annotations

import inspect
from typing import Any

from torch.distributed import ProcessGroup

from megatron.core.models.mimo.config import MimoModelConfig
from megatron.core.models.mimo.errors import ConfigError, UnsupportedError
from megatron.core.models.mimo.partition.utils import PartitionAdapter, PartitionConfig
from megatron.core.transformer.transformer_config import TransformerConfig


def language_config(mimo_config: MimoModelConfig) -> TransformerConfig:
    """The language model's ``TransformerConfig``, from its spec.

    Raises:
        ConfigError: the spec holds none.
    """
    params = mimo_config.language_model_spec.params or {}
    if "config" not in params:
        raise ConfigError(
            "language_model_spec.params has no 'config'; expected the language model's "
            f"TransformerConfig beside {sorted(params)}"
        )
    config: TransformerConfig = params["config"]
    return config


def accepts(function: Any, name: str) -> bool:
    """True where ``function`` takes a keyword argument of that name."""
    parameters = inspect.signature(function).parameters
    return name in parameters or any(
        parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()
    )


def is_replaced(model: object, owner: type, *names: str) -> bool:
    """True where a subclass, or the instance, has put its own in place of a method of ``owner``."""
    return any(
        name in vars(model) or getattr(type(model), name) is not getattr(owner, name)
        for name in names
    )


def refuse_grids(mimo_config: MimoModelConfig) -> None:
    """Raise ``UnsupportedError`` for layouts in which modules have process grids of their own."""
    grids = mimo_config.module_to_grid_map
    if grids is not None:
        raise UnsupportedError(
            f"module_to_grid_map gives {sorted(grids)} process grids of their own; this release "
            "runs the uniform layout, in which all modules share Megatron's groups. Pass None, or "
            "set MEGATRON_MIMO_OVERLAY=0 to use megatron-core's own MIMO for module grids"
        )


def refuse_multi_token_prediction(mimo_config: MimoModelConfig) -> None:
    """Raise ``UnsupportedError`` where the language model would look up tokens by itself."""
    layers = getattr(language_config(mimo_config), "mtp_num_layers", None)
    if layers:
        raise UnsupportedError(
            f"mtp_num_layers = {layers}: multi-token prediction embeds input_ids inside the "
            "language model, where placeholders have no embedding; set it to None"
        )


def build_partition_adapter(
    mimo_config: MimoModelConfig, cp_group: ProcessGroup | None, tp_group: ProcessGroup | None
) -> PartitionAdapter | None:
    """What cuts the sequence for this rank; None where nothing does."""
    config = language_config(mimo_config)
    params = mimo_config.language_model_spec.params
    if config.context_parallel_size <= 1 and not config.sequence_parallel:
        return None
    return PartitionAdapter(
        PartitionConfig.from_mp_config(
            config,
            max_seq_len=params.get("max_sequence_length", 4096),
            kv_format=mimo_config.kv_format,
            cp_group=cp_group,
            tp_group=tp_group,
        )
    )
