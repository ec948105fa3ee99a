"""The language model of Qwen3-VL: a Qwen3 with deepstack and interleaved multimodal RoPE."""

from __future__ import annotations

from typing import Any

from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.mimo.layers.deepstack import TakesLevels, deepstack_layers
from megatron.mimo.models.common.language.interleaved import InterleavedGPT, interleaved_spec
from megatron.mimo.models.common.place import Place
from megatron.mimo.models.common.settings import LanguageSettings

__all__ = ["DeepstackGPT", "deepstack_spec"]


class DeepstackGPT(TakesLevels, InterleavedGPT):
    """A GPTModel with interleaved multimodal RoPE whose layers add levels of rows."""


def deepstack_spec(settings: LanguageSettings, place: Place, text: Any) -> ModuleSpec:
    """The language model, for ``MimoModelConfig.language_model_spec``.

    Args:
        settings: what it is built of.
        place: of the language model.
        text: its Hugging Face configuration.

    Raises:
        ConfigError: see :func:`deepstack_layers`.
    """
    spec = interleaved_spec(settings, place, text)
    layers = deepstack_layers(spec.params["transformer_layer_spec"], settings.transformer)
    return ModuleSpec(module=DeepstackGPT, params={**spec.params, "transformer_layer_spec": layers})
