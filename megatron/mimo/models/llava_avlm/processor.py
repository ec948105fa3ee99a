"""A processor for llava_avlm, of transformers' parts; importing this module registers it."""

from __future__ import annotations

from typing import Any

from transformers import AutoProcessor, ProcessorMixin

from megatron.mimo.models.llava_avlm.reference import LlavaAvlmConfig

__all__ = ["LlavaAvlmProcessor"]


class LlavaAvlmProcessor(ProcessorMixin):
    """Text with ``<image>`` and ``<audio>`` in it, images and clips to what the model takes.

    Args:
        image_processor: of CLIP.
        feature_extractor: of Whisper.
        tokenizer: has both placeholders as special tokens.
        patch_size: side of an image patch, in pixels; each patch is a row.
        chat_template: Jinja.
        image_token: stands for an image in the text.
        audio_token: stands for a clip.
    """

    def __init__(
        self,
        image_processor: Any = None,
        feature_extractor: Any = None,
        tokenizer: Any = None,
        patch_size: int | None = None,
        chat_template: str | None = None,
        image_token: str = "<image>",
        audio_token: str = "<audio>",
    ) -> None:
        self.patch_size = patch_size
        self.image_token, self.audio_token = image_token, audio_token
        self.image_token_id = tokenizer.convert_tokens_to_ids(image_token)
        self.audio_token_id = tokenizer.convert_tokens_to_ids(audio_token)
        super().__init__(image_processor, feature_extractor, tokenizer, chat_template=chat_template)

    @property
    def model_input_names(self) -> list[str]:
        """What the model's forward takes."""
        media = ["pixel_values", "input_features", "feature_attention_mask"]
        return [*self.tokenizer.model_input_names, *media]

    def replace_image_token(self, image_inputs: dict[str, Any], image_idx: int, **_: Any) -> str:
        """As many placeholders as the image has patches."""
        height, width = image_inputs["pixel_values"][image_idx].shape[-2:]
        assert self.patch_size is not None
        return self.image_token * ((height // self.patch_size) * (width // self.patch_size))

    def _process_audio(self, audio: Any, **kwargs: Any) -> tuple[Any, list[str]]:
        """Padded to Whisper's window; each two frames that are no silence are a row."""
        kwargs |= {"return_attention_mask": True, "padding": "max_length"}
        features = self.feature_extractor(audio, **kwargs)
        mask_NF = features.pop("attention_mask")
        features["feature_attention_mask"] = mask_NF
        counts = [(int(mask_F.sum()) + 1) // 2 for mask_F in mask_NF]
        return features, [self.audio_token * count for count in counts]


AutoProcessor.register(LlavaAvlmConfig, LlavaAvlmProcessor, exist_ok=True)
