"""A language model with interleaved multimodal RoPE: axes alternate among a head's frequencies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.mimo.layers.multimodal_rope import InterleavedRotaryEmbedding
from megatron.mimo.models.common.language.gpt import LanguageGPT
from megatron.mimo.models.common.language.model import language_spec
from megatron.mimo.models.common.place import Place
from megatron.mimo.models.common.settings import LanguageSettings

__all__ = ["InterleavedGPT", "interleaved_spec"]


class InterleavedGPT(LanguageGPT):
    """A GPTModel with interleaved multimodal RoPE.

    Args:
        section: how many frequencies of a head belong to time, height and width.
        rotary_percent: GPTModel's.
        rotary_base: GPTModel's.
        arguments: LanguageGPT's.
    """

    def __init__(
        self,
        *,
        section: Sequence[int],
        rotary_percent: float,
        rotary_base: float,
        **arguments: Any,
    ) -> None:
        rotary: dict[str, Any] = {"rotary_percent": rotary_percent, "rotary_base": rotary_base}
        super().__init__(**rotary, **arguments)
        config: Any = self.config
        self.rotary_pos_emb = InterleavedRotaryEmbedding(
            section=section, kv_channels=config.kv_channels, **rotary
        )


def interleaved_spec(settings: LanguageSettings, place: Place, text: Any) -> ModuleSpec:
    """The language model, for ``MimoModelConfig.language_model_spec``.

    Args:
        settings: what it is built of.
        place: of the language model.
        text: its Hugging Face configuration.
    """
    spec = language_spec(settings, place, text)
    section = {"section": settings.transformer.mrope_section}
    return ModuleSpec(module=InterleavedGPT, params={**spec.params, **section})
