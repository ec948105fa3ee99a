"""What data need to know of a model: its placeholders, its media's formats, its samples."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from megatron.mimo.data.media.image_sizes import Size
from megatron.mimo.data.media_format import MediaFormat
from megatron.mimo.data.sample import Sample

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

__all__ = ["ConversationModel", "Media", "ToSample"]


@dataclass(frozen=True, kw_only=True)
class Media:
    """The media of a model: their placeholders and formats.

    Attributes:
        special_token_ids: placeholder token id of each modality.
        formats: as ``SampleCollator.media_formats``.
        mrope: position ids have three axes.
        plan_on_every_stage: as ``SampleCollator.plan_on_every_stage``.
        spans: as ``SampleCollator.span_modalities``.
        image_settings: settings of the image processor that are passed to the processor in every
            call, because it would replace them by defaults of its own.
    """

    special_token_ids: Mapping[str, int]
    formats: Mapping[str, MediaFormat | Sequence[MediaFormat]]
    mrope: bool = False
    plan_on_every_stage: bool = False
    spans: Sequence[str] = ()
    image_settings: Sequence[str] = ()


class ToSample(Protocol):
    """Translates a conversation from the form that the Hugging Face model takes to a sample."""

    def __call__(
        self,
        config: PreTrainedConfig,
        features: Mapping[str, Tensor],
        *,
        is_label: Tensor | None = None,
        name: str = "sample",
    ) -> Sample:
        """Translate.

        Args:
            config: of the model.
            features: what the Hugging Face model's forward takes, for one conversation:
                ``input_ids`` int64 [1, L], in which every medium stands as all of its placeholder
                tokens, and the family's media arguments.
            is_label: bool [L], True where the model has to predict a token; None for every token
                that is not a placeholder.
            name: says which sample it is in errors.

        Raises:
            InputError: tokens and media do not fit each other.
        """


class ConversationModel(Protocol):
    """What ``Chat`` takes for a model: a model family, or anything with these attributes."""

    @property
    def name(self) -> str:
        """Its name in errors."""

    @property
    def box_units(self) -> Callable[[Any, Size], Size] | None:
        """From its processor and an image's size to the width and height by which it counts boxes;
        None where it has no convention for boxes.
        """

    @property
    def media(self) -> Callable[[Any], Media]:
        """From the model's configuration to its media."""

    @property
    def sample(self) -> ToSample:
        """Translates one conversation."""
