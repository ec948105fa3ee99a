"""What the data side needs to know of a model: placeholders, forms of media, samples."""

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
    """Placeholders and forms of a model's media.

    Attributes:
        special_token_ids: placeholder token id of each modality.
        formats: as ``SampleCollator.media_formats``.
        mrope: position ids have three axes.
        plan_on_every_stage: as ``SampleCollator.plan_on_every_stage``.
        spans: modalities of whose items all rows see each other.
        image_settings: of the image processor, that count where they are set, though its
            processor has a default for them.
    """

    special_token_ids: Mapping[str, int]
    formats: Mapping[str, MediaFormat | Sequence[MediaFormat]]
    mrope: bool = False
    plan_on_every_stage: bool = False
    spans: Sequence[str] = ()
    image_settings: Sequence[str] = ()


class ToSample(Protocol):
    """From one conversation in Hugging Face's form to a sample."""

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
    """Whatever turns conversations of Hugging Face's form into samples, such as a model family."""

    @property
    def name(self) -> str:
        """What errors call it."""

    @property
    def box_units(self) -> Callable[[Any, Size], Size] | None:
        """From its processor and an image's size; None where boxes have no units of the model's."""

    @property
    def media(self) -> Callable[[Any], Media]:
        """From the model's configuration."""

    @property
    def sample(self) -> ToSample:
        """One conversation."""
