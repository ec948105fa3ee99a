"""What a model family is: all that differs between LLaVA, Qwen2.5-VL and others, as one value.

The description of a model is its Hugging Face configuration (a ``PreTrainedConfig`` of
transformers, such as ``LlavaConfig``). A family translates it: into Megatron's arguments and
modules, into a table of parameter names, and one conversation from the form that the Hugging Face
model takes into a ``Sample``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Generator, Tensor, nn

from megatron.mimo.data.chat.conversation_model import Media, ToSample
from megatron.mimo.data.media.image_sizes import Size
from megatron.mimo.data.micro_batches.collate import SampleCollator
from megatron.mimo.models.common.assembly import Assembly
from megatron.mimo.models.common.config_fields import ModelFields, check_fields
from megatron.mimo.models.common.language.kinds import expert_layers

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from megatron.core.models.mimo import MimoModelConfig
    from megatron.mimo.models.common.keys import KeyTable
    from megatron.mimo.models.common.place import Places
    from megatron.mimo.models.common.settings import LanguageSettings

__all__ = ["Family", "sample_collator", "transformers_model", "without_kernels"]

# What transformers calls in place of functions of its own, of the gated delta net and others.
_KERNELS = ("fla", "causal_conv1d")


def transformers_model(config: PreTrainedConfig) -> nn.Module:
    """The class of transformers that ``config.architectures`` names, with random weights.

    It computes in plain torch, on any device, also where kernels for a GPU are installed.
    """
    import transformers

    architecture = (config.architectures or [""])[0]
    with without_kernels():
        kind = getattr(transformers, architecture)
    model: nn.Module = kind(config)
    return model


@contextmanager
def without_kernels() -> Iterator[None]:
    """Hide packages of GPU kernels from what is imported in the block.

    transformers decides by them when a model is imported, and would call their kernels on a CPU.
    """
    found = {name: sys.modules[name] for name in _KERNELS if name in sys.modules}
    hidden: dict[str, Any] = dict.fromkeys(_KERNELS)
    sys.modules.update(hidden)
    try:
        yield
    finally:
        for name in _KERNELS:
            del sys.modules[name]
        sys.modules.update(found)


@dataclass(frozen=True, kw_only=True)
class Family:
    """A model family.

    Attributes:
        name: how commands call it ("llava").
        fields: what becomes of every field of its configurations.
        language: Megatron's arguments (by argparse destination) of the language model; it may
            refuse what no field alone tells.
        build: the model's configuration on one rank. The settings describe the language model,
            the places where each module lives, the configuration everything else.
        keys: names of the parameters in both formats.
        media: placeholders and formats of its media.
        sample: translates one conversation from Hugging Face's form.
        tiny: a configuration of this family that trains on a CPU in seconds: for tests, and to
            check an installation.
        example: one random conversation, in the form that ``sample`` takes, with other numbers
            and sizes of media at each call.
        reference: Hugging Face's model of a configuration, with random weights.
        assembly: how a model is put together from separate ones; None where it cannot be.
        box_units: from the processor and an image's size to the width and height of that image in
            the units of the model's boxes; None where the model has no such convention.
        placeholders: kind of medium -> its placeholder token in Hugging Face's conversations; None
            where they are the modalities.
    """

    name: str
    fields: ModelFields
    language: Callable[[Any], dict[str, object]]
    build: Callable[[Any, LanguageSettings, Places], MimoModelConfig]
    keys: Callable[[Any], KeyTable]
    media: Callable[[Any], Media]
    sample: ToSample
    tiny: Callable[[], Any]
    example: Callable[[Any, Generator], dict[str, Tensor]]
    reference: Callable[[Any], nn.Module] = transformers_model
    assembly: Assembly | None = None
    placeholders: Callable[[Any], Mapping[str, int]] | None = None
    box_units: Callable[[Any, Size], Size] | None = None

    def arguments(self, config: Any) -> dict[str, object]:
        """Megatron's arguments of a model; a recipe's defaults, so that flags win over them.

        Raises:
            ConfigError: values that do not fit each other.
            UnsupportedError: the configuration asks for what our model does not have.
        """
        check_fields(config, self.fields)
        return self.language(config)


def sample_collator(
    family: Family, config: Any, *, seq_length: int, vocab_size: int
) -> SampleCollator:
    """The collator of a model; it pads with the model's padding token.

    If there is none, or it stands for a medium, it pads with the first token that does not.

    Args:
        family: the model's.
        config: its configuration.
        seq_length: tokens of a row.
        vocab_size: tokens of the model, without padding.
    """
    media = family.media(config)
    taken = set(media.special_token_ids.values())
    pad_id = getattr(config.get_text_config(), "pad_token_id", None)
    if pad_id is None or pad_id in taken or not 0 <= pad_id < vocab_size:
        pad_id = next(token for token in range(vocab_size) if token not in taken)
    return SampleCollator(
        seq_length=seq_length,
        vocab_size=vocab_size,
        pad_id=pad_id,
        special_token_ids=media.special_token_ids,
        media_formats=media.formats,
        span_modalities=media.spans,
        mrope=media.mrope,
        plan_on_every_stage=media.plan_on_every_stage,
        marks_padding=bool(expert_layers(config.get_text_config())),
    )
