"""Descriptions of models that cannot work: refused before any module is built."""

from __future__ import annotations

from megatron.core.models.mimo.config import MimoModelConfig
from megatron.core.models.mimo.config.base_configs import language_config
from megatron.core.models.mimo.errors import ConfigError, UnsupportedError
from megatron.core.models.mimo.model.grids.refusals import refuse_grids
from megatron.core.models.mimo.model.language.attention_support import refuse_attention
from megatron.core.models.mimo.model.language.rotary import refuse_mrope


def refuse_description(mimo_config: MimoModelConfig) -> None:
    """Refuse what the description of a model alone shows not to work.

    Raises:
        ConfigError: no language configuration; a multimodal rotary embedding or module grids that
            do not fit; an interleaved schedule that would mix up messages.
        UnsupportedError: module grids that no layout runs, multi-token prediction, an attention
            that cannot do its job.
    """
    refuse_grids(mimo_config)
    refuse_multi_token_prediction(mimo_config)
    refuse_attention(mimo_config)
    refuse_mrope(mimo_config)
    refuse_mixed_up_messages(mimo_config)


def refuse_mixed_up_messages(mimo_config: MimoModelConfig) -> None:
    """Raise ``ConfigError`` for an interleaved schedule whose loss would silently be wrong.

    Between two stages messages go in both directions and both wrap around: sent one by one, each
    is told from the others by its order, which megatron-core keeps where it overlaps them.
    """
    config = language_config(mimo_config)
    interleaved = getattr(config, "virtual_pipeline_model_parallel_size", None) is not None
    if interleaved and config.pipeline_model_parallel_size == 2 and not config.overlap_p2p_comm:
        raise ConfigError(
            "overlap_p2p_comm is False with virtual_pipeline_model_parallel_size = "
            f"{config.virtual_pipeline_model_parallel_size} on 2 pipeline stages: messages between "
            "the same two ranks would be mistaken for each other; set overlap_p2p_comm=True and "
            "batch_p2p_comm=False"
        )


def refuse_multi_token_prediction(mimo_config: MimoModelConfig) -> None:
    """Raise ``UnsupportedError`` where the language model would look up tokens by itself."""
    layers = getattr(language_config(mimo_config), "mtp_num_layers", None)
    if layers:
        raise UnsupportedError(
            f"mtp_num_layers = {layers}: multi-token prediction embeds input_ids inside the "
            "language model, where placeholders have no embedding; set it to None"
        )
