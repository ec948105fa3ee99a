"""llava_avlm for transformers: a configuration and a model of its own CLIP, Whisper and LLaMA.

Importing this module registers both, so that ``AutoConfig`` and ``AutoModelForCausalLM`` (and
``AutoModelForMultimodalLM``) load an exported directory::

    import megatron.mimo.models.llava_avlm.reference
    model = transformers.AutoModelForCausalLM.from_pretrained("exported")

Shape legend: L tokens, M mel bins, F frames, N rows of one modality, H hidden.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    GenerationMixin,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.activations import ACT2FN
from transformers.configuration_utils import SubConfigSpec
from transformers.models.whisper.modeling_whisper import WhisperEncoder

__all__ = ["LlavaAvlmConfig", "LlavaAvlmForConditionalGeneration"]


class LlavaAvlmConfig(PreTrainedConfig):
    """A LLaVA that also hears.

    Attributes:
        vision_config, audio_config, text_config: of CLIP's vision model, Whisper, LLaMA.
        image_token_index, audio_token_index: placeholder tokens; one for each row.
        vision_feature_layer, vision_feature_select_strategy: as ``LlavaConfig``'s.
        projector_hidden_act, multimodal_projector_bias: of both projectors.
    """

    model_type = "llava_avlm"
    attribute_map = {  # noqa: RUF012 - the base class wants a plain dict
        "image_token_id": "image_token_index",
        "audio_token_id": "audio_token_index",
    }
    sub_configs_defaults = {  # noqa: RUF012
        "vision_config": SubConfigSpec(config_class=AutoConfig, model_type="clip_vision_model"),
        "audio_config": SubConfigSpec(config_class=AutoConfig, model_type="whisper"),
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="llama"),
    }

    vision_config: dict | PreTrainedConfig | None = None
    audio_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    image_token_index: int = 32000
    audio_token_index: int = 32001
    vision_feature_layer: int | list[int] = -2
    vision_feature_select_strategy: str = "default"
    projector_hidden_act: str = "gelu"
    multimodal_projector_bias: bool = True
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        # A language model that ties does so within another model too, as LLaVA's own configuration
        # takes it over.
        text: Any = self.text_config
        self.tie_word_embeddings |= bool(text.tie_word_embeddings)


class Projector(nn.Module):
    """Two linear layers."""

    def __init__(self, inputs: int, outputs: int, *, activation: str, bias: bool) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(inputs, outputs, bias=bias)
        self.act = ACT2FN[activation]
        self.linear_2 = nn.Linear(outputs, outputs, bias=bias)

    def forward(self, rows_NH: Tensor) -> Tensor:
        """[N, inputs] -> [N, outputs]."""
        output_NH: Tensor = self.linear_2(self.act(self.linear_1(rows_NH)))
        return output_NH


class LlavaAvlmForConditionalGeneration(PreTrainedModel, GenerationMixin):
    """Images through CLIP, audio through Whisper, rows of both in the place of their tokens."""

    config_class = LlavaAvlmConfig
    main_input_name = "input_ids"
    input_modalities = ["image", "audio", "text"]  # noqa: RUF012
    _tied_weights_keys = {  # noqa: RUF012
        "language_model.lm_head.weight": "language_model.model.embed_tokens.weight"
    }
    _supports_sdpa = True
    _supports_flash_attn = True
    supports_gradient_checkpointing = True

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        text, layers = config.text_config, config.vision_feature_layer
        given = {
            "activation": config.projector_hidden_act,
            "bias": config.multimodal_projector_bias,
        }
        self.vision_tower = AutoModel.from_config(config.vision_config)
        self.multi_modal_projector = Projector(
            config.vision_config.hidden_size * (1 if isinstance(layers, int) else len(layers)),
            text.hidden_size,
            **given,
        )
        self.audio_tower = WhisperEncoder(config.audio_config)
        self.audio_projector = Projector(config.audio_config.d_model, text.hidden_size, **given)
        self.language_model = LlamaForCausalLM(text)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The language model's."""
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Set the language model's."""
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        """The language model's output layer."""
        return self.language_model.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Set the language model's output layer."""
        self.language_model.set_output_embeddings(new_embeddings)

    def get_image_rows(self, pixel_values: Tensor) -> Tensor:
        """Rows [N, H] of images [images, C, height, width]."""
        states = self.vision_tower(pixel_values, output_hidden_states=True).hidden_states
        layers = self.config.vision_feature_layer
        layers = [layers] if isinstance(layers, int) else layers
        first = 1 if self.config.vision_feature_select_strategy == "default" else 0
        features = torch.cat([states[layer][:, first:] for layer in layers], dim=-1)
        return self.multi_modal_projector(features.flatten(0, 1))

    def get_audio_rows(self, input_features: Tensor, feature_attention_mask: Tensor) -> Tensor:
        """Rows [N, H] of clips [clips, M, F], of their frames that the mask [clips, F] counts."""
        features = self.audio_tower(input_features.to(self.dtype)).last_hidden_state
        counts = (feature_attention_mask.sum(dim=1) + 1) // 2
        kept = torch.arange(features.size(1), device=features.device) < counts[:, None]
        return self.audio_projector(features[kept])

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        input_features: Tensor | None = None,
        feature_attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run the model.

        Args:
            input_ids: [B, L]; each row of an image or clip stands as one placeholder token.
            pixel_values: [images, C, height, width].
            input_features: [clips, M, F], padded to Whisper's window.
            feature_attention_mask: [clips, F], 1 in front for frames that are no silence.
            inputs_embeds: [B, L, H] in place of ``input_ids`` and media.
            kwargs: of ``LlamaForCausalLM.forward``.

        Raises:
            ValueError: placeholders and rows differ in number.
        """
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
            media = []
            if pixel_values is not None:
                rows_NH = self.get_image_rows(pixel_values.to(self.dtype))
                media.append(("image", self.config.image_token_index, rows_NH))
            if input_features is not None:
                if feature_attention_mask is None:
                    raise ValueError(
                        "feature_attention_mask is None beside input_features; give 1 for each "
                        "frame that is no silence"
                    )
                rows_NH = self.get_audio_rows(input_features, feature_attention_mask)
                media.append(("audio", self.config.audio_token_index, rows_NH))
            for kind, token, rows_NH in media:
                places_BL1 = (input_ids == token)[..., None]
                if int(places_BL1.sum()) != len(rows_NH):
                    raise ValueError(
                        f"{int(places_BL1.sum())} {kind} tokens and {len(rows_NH)} rows; expected "
                        "one token for each row"
                    )
                rows_NH = rows_NH.to(inputs_embeds)
                inputs_embeds = inputs_embeds.masked_scatter(places_BL1, rows_NH)
        return self.language_model(inputs_embeds=inputs_embeds, **kwargs)


AutoConfig.register(LlavaAvlmConfig.model_type, LlavaAvlmConfig, exist_ok=True)
for _auto in (AutoModelForCausalLM, AutoModelForMultimodalLM):
    _auto.register(LlavaAvlmConfig, LlavaAvlmForConditionalGeneration, exist_ok=True)
