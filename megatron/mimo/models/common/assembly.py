"""Models that are put together from parts which are published on their own.

A family that can begin from a language model and encoders of its user's choice, each in a Hugging
Face directory of its own, says here what it takes from them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

__all__ = ["AUDIO", "IMAGES", "LANGUAGE", "Assembly", "Part", "language_part"]

LANGUAGE, IMAGES, AUDIO = "language", "images", "audio"


@dataclass(frozen=True, kw_only=True)
class Part:
    """What a family takes from one directory.

    Attributes:
        kinds: ``model_type`` of the configurations that fit.
        prefixes: (beginning of a weight's name in the part's files, what stands there in the
            whole's names); the first that fits counts.
        unused: patterns (``*`` for anything) of weights, by their names in the part's files, that
            the whole does not have.
        reader: class of transformers that reads the part's tokenizer or processor.
        token: the placeholder of the part's media in a text; None for the language model.
    """

    kinds: tuple[str, ...]
    prefixes: tuple[tuple[str, str], ...]
    unused: tuple[str, ...]
    reader: str
    token: str | None = None

    def name_in_whole(self, name: str) -> str | None:
        """What a weight of the part is called in the whole; None where it is not used."""
        if any(fnmatchcase(name, pattern) for pattern in self.unused):
            return None
        for prefix, whole in self.prefixes:
            if name.startswith(prefix):
                return whole + name.removeprefix(prefix)
        return name


@dataclass(frozen=True, kw_only=True)
class Assembly:
    """How a family's model is put together.

    Attributes:
        parts: by name; one is ``LANGUAGE``, the others are the modalities.
        compose: the whole's Hugging Face configuration, from the parts' configurations by name and
            the placeholder token id of each modality. The language model's has the vocabulary of
            the whole.
        processor: the whole's processor, from its configuration, what each part's ``reader`` has
            read, and a chat template.
    """

    parts: Mapping[str, Part]
    compose: Callable[[Mapping[str, Any], Mapping[str, int]], Any]
    processor: Callable[[Any, Mapping[str, Any], str], Any]


def language_part(*kinds: str) -> Part:
    """A language model of these kinds, as all families that have ``language_model`` name it."""
    return Part(
        kinds=kinds,
        prefixes=(
            ("model.", "language_model.model."),
            ("lm_head.", "language_model.lm_head."),
            ("", "language_model.model."),  # a model that was saved without its output layer
        ),
        unused=("*.rotary_emb.inv_freq",),
        reader="AutoTokenizer",
    )
