"""Conversations and documents to samples, through a Hugging Face processor.

The processor's chat template writes the text, the processor reads the media and puts each one's
placeholders into the text, the family turns what the Hugging Face model would take into a
``Sample``. What the model learns to say is what the assistant says.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron.core.models.mimo.errors import ConfigError, InputError, MimoError
from megatron.mimo.data.chat.conversation_model import ConversationModel
from megatron.mimo.data.chat.document import document_text
from megatron.mimo.data.chat.expanded import ExpandedText, Replaced, split_text
from megatron.mimo.data.chat.media import as_planes, read_medium
from megatron.mimo.data.chat.outlines import Outlines
from megatron.mimo.data.chat.spans import Span
from megatron.mimo.data.chat.text import ChatText
from megatron.mimo.data.conversation import MEDIA_KINDS, ContentPart, Conversation, Document
from megatron.mimo.data.media.files import MediaLimits, Video
from megatron.mimo.data.media.source import EncodedMedium, MediumError, shown
from megatron.mimo.data.sample import Sample

__all__ = ["Chat"]

_READERS = {"image": "image_processor", "video": "video_processor", "audio": "feature_extractor"}
_ARGUMENTS = {"image": "images", "video": "videos", "audio": "audio"}


@dataclass(frozen=True, kw_only=True, eq=False)
class Chat:
    """Turns conversations into the samples of one model.

    Attributes:
        family: the model's family.
        config: its Hugging Face configuration.
        processor: its Hugging Face processor, with a fast tokenizer and a chat template.
        video_fps: frames per second that are kept of a video file, and that a folder of frames
            holds.
        end_tokens: ids that end an answer as the model's generation configuration says.
        limits: of media files.

    Raises:
        ConfigError: the processor has no fast tokenizer, no chat template, no patch size, no token
            for a modality's placeholder, or tokens that the model does not have.
    """

    family: ConversationModel
    config: Any
    processor: Any
    video_fps: float = 2.0
    end_tokens: Sequence[int] = ()
    limits: MediaLimits = field(default_factory=MediaLimits)

    def __post_init__(self) -> None:
        tokenizer = getattr(self.processor, "tokenizer", None)
        kind = type(self.processor).__name__
        if tokenizer is None or not getattr(tokenizer, "is_fast", False):
            raise ConfigError(
                f"the processor is a {kind} without a fast tokenizer, whose offsets tell which "
                "tokens the assistant says; give a directory with tokenizer.json"
            )
        if not _template_of(self.processor):
            raise ConfigError(
                f"the {kind} has no chat template, which says how a conversation is written; put "
                "a chat_template.jinja beside its tokenizer"
            )
        _check_settings(self.processor, self.config)
        placeholders = self.family.media(self.config).special_token_ids
        _check_vocabulary(tokenizer, self.config, set(placeholders.values()))
        for modality, token in placeholders.items():
            if token >= len(tokenizer):
                raise ConfigError(
                    f"the tokenizer has {len(tokenizer)} tokens and none for the placeholder of "
                    f"{modality} (id {token}); it is of another model, or the token has to be "
                    "added to it"
                )

    @cached_property
    def _marks(self) -> tuple[str, ...]:
        """Texts that stand for media: before the processor has expanded them, and after."""
        names = (getattr(self.processor, f"{kind}_token", None) for kind in MEDIA_KINDS)
        tokens = sorted(self.family.media(self.config).special_token_ids.values())
        placeholders = self.processor.tokenizer.convert_ids_to_tokens(tokens)
        return tuple(dict.fromkeys([*filter(None, names), *placeholders]))

    @cached_property
    def text(self) -> ChatText:
        """How conversations are written."""
        return ChatText(
            processor=self.processor,
            end_tokens=self.end_tokens,
            marks=self._marks,
            outlines=Outlines(_template_of(self.processor)),
        )

    def sample(self, conversation: Conversation | Document) -> Sample:
        """Read the media and translate: a conversation as the chat template writes it, a document
        as it stands.

        Raises:
            InputError: a medium is missing, does not decode or is of a kind that the model does
                not take; the processor or the family refuses the conversation. The message names
                the conversation.
        """
        text, spans = self._written(conversation)
        return self._translated(conversation, text, spans)

    def text_length(
        self,
        conversation: Conversation | Document,
        put_in: Callable[[str], str] = lambda text: text,
    ) -> int:
        """The number of tokens of its text, media not decoded.

        Args:
            conversation: or a document.
            put_in: gets the text, in which a mark stands for each medium, and returns the one that
                is tokenized.

        Raises:
            InputError: the template refuses it.
        """
        text = put_in(self._written(conversation)[0])
        tokens = self.processor.tokenizer(
            text, add_special_tokens=_adds_first_token(self.processor.tokenizer, text)
        )
        return len(tokens["input_ids"])

    def replacements(self, conversation: Conversation) -> Sequence[Replaced]:
        """The mark of each medium of a conversation, and what the processor writes in its place.

        Raises:
            InputError: as ``sample``.
        """
        _, expanded = self._features(self._written(conversation)[0], self._media(conversation))
        return expanded.replaced

    def prompt(self, conversation: Conversation) -> Sample:
        """A conversation whose next turn is the assistant's, up to where it begins to speak.

        Raises:
            InputError: as ``sample``.
        """
        return self._translated(conversation, self.text.asked(conversation), spans=())

    def _written(self, conversation: Conversation | Document) -> tuple[str, list[Span]]:
        if isinstance(conversation, Document):
            return document_text(conversation, self.text)
        return self.text.answered(conversation)

    def _translated(
        self, conversation: Conversation | Document, text: str, spans: Sequence[tuple[int, int]]
    ) -> Sample:
        """The sample of a conversation that is written as ``text``; ``spans`` are learned."""
        media = self._media(conversation)
        try:
            features, expanded = self._features(text, media)
            _refuse_lost(expanded, self._marks, conversation.name)
            return self.family.sample(
                self.config,
                features,
                is_label=expanded.is_said(text, spans),
                name=conversation.name,
            )
        except MimoError:
            raise
        except Exception as error:  # processors raise nearly every kind
            raise InputError(
                f"{conversation.name}: the processor refuses it: {type(error).__name__}: {error}"
            ) from error

    def _media(self, conversation: Conversation | Document) -> dict[str, list[Any]]:
        """The decoded media of each kind, in order."""
        media: dict[str, list[Any]] = {}
        for part in conversation.media:
            media.setdefault(part.kind, []).append(self._read(part, conversation.name))
        return media

    def _read(self, part: ContentPart, name: str) -> Any:
        if getattr(self.processor, _READERS[part.kind], None) is None:
            kinds = [kind for kind in MEDIA_KINDS if getattr(self.processor, _READERS[kind], None)]
            raise InputError(
                f"{name}: holds {part.kind}, which model family '{self.family.name}' does not "
                f"take; it takes {' and '.join(kinds)}"
            )
        try:
            return read_medium(part, self.processor, video_fps=self.video_fps, limits=self.limits)
        except InputError as error:
            named = isinstance(part.value, Path | EncodedMedium)
            medium = shown(part.value) if named else f"a decoded {part.kind}"
            raise MediumError(f"{name}: {error}", medium) from error

    def _features(
        self, text: str, media: Mapping[str, list[Any]]
    ) -> tuple[dict[str, Tensor], ExpandedText]:
        given: dict[str, Any] = {_ARGUMENTS[kind]: items for kind, items in media.items()}
        if "image" in media and _takes_planes(self.processor):
            given["images"] = [as_planes(one) for one in media["image"]]
        if "audio" in media:
            given["sampling_rate"] = self.processor.feature_extractor.sampling_rate
        if "video" in media:
            videos: list[Video] = media["video"]
            given["videos"] = [video.frames_THWC for video in videos]
            given["do_sample_frames"] = False
            given["video_metadata"] = [
                {
                    "total_num_frames": len(video.frames_THWC),
                    "fps": video.fps,
                    "frames_indices": list(range(len(video.frames_THWC))),
                }
                for video in videos
            ]
        # Tensors of media alone: some processors would make tensors of the text's offsets too.
        tensors = {"return_tensors": "pt"}
        names = self.family.media(self.config).image_settings
        given |= {"images_kwargs": tensors | _own_settings(self.processor, names)}
        given |= {"videos_kwargs": tensors, "audio_kwargs": tensors}
        features = self.processor(
            text=[text],
            add_special_tokens=_adds_first_token(self.processor.tokenizer, text),
            return_offsets_mapping=True,
            return_text_replacement_offsets=True,
            **given,
        )
        return split_text(features)


def _template_of(processor: Any) -> str:
    """The source of the chat template, or of all where there are several; empty without one."""
    found = getattr(processor, "chat_template", None) or processor.tokenizer.chat_template or ""
    return "".join(found.values()) if isinstance(found, Mapping) else str(found)


def _takes_planes(processor: Any) -> bool:
    """Whether the image processor computes with torch, on tensors [3, H, W]."""
    return getattr(processor.image_processor, "backend", None) == "torchvision"


def _own_settings(processor: Any, names: Sequence[str]) -> dict[str, Any]:
    """These settings of the image processor, as far as it has them."""
    reader = getattr(processor, "image_processor", None)
    found = {name: getattr(reader, name, None) for name in names}
    return {name: value for name, value in found.items() if value is not None}


def _adds_first_token(tokenizer: Any, text: str) -> bool:
    """Whether the tokenizer has to add its own first token: not where the template does."""
    return tokenizer.bos_token is None or not text.startswith(tokenizer.bos_token)


def _refuse_lost(expanded: ExpandedText, marks: Collection[str], name: str) -> None:
    """Refuse media in whose place the processor writes no placeholder."""
    for replaced in expanded.replaced:
        if not any(mark in replaced.by for mark in marks):
            raise InputError(
                f"{name}: a medium that stands as {replaced.mark!r} gives no row; "
                "it is too short or too small for this model: leave it out"
            )


def _check_settings(processor: Any, config: Any) -> None:
    """Refuse a processor that cannot say how many rows a picture has.

    Old ones lack settings that transformers once took from elsewhere.
    """
    vision = getattr(config, "vision_config", None)
    for name in ("patch_size", "vision_feature_select_strategy"):
        if hasattr(processor, name) and getattr(processor, name) is None:
            value = getattr(vision, name, getattr(config, name, None))
            given = "" if value is None else f", which is {json.dumps(value)} in config.json"
            raise ConfigError(
                f"the {type(processor).__name__} has no {name}; add it to processor_config.json "
                f"beside the tokenizer{given}"
            )


def _check_vocabulary(tokenizer: Any, config: Any, placeholders: Collection[int]) -> None:
    """Refuse a tokenizer whose tokens the model has no embedding for."""
    rows = config.get_text_config().vocab_size
    if len(tokenizer) <= rows:
        return
    beyond = {token for token in tokenizer.get_vocab().values() if token >= rows}
    if beyond - set(placeholders):
        raise ConfigError(
            f"the tokenizer has {len(tokenizer)} tokens, up to id {max(beyond)}, and the model "
            f"{rows} embeddings; give it more with model.resize_token_embeddings("
            f"{max(beyond) + 1}) of transformers and import it again, or take its own tokenizer"
        )
