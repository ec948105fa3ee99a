"""Reads ``generation_config.json``: a model's own settings of generation."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from megatron.core.models.mimo.errors import ConfigError, UnsupportedError
from megatron.mimo.inference.rules import Rules
from megatron.mimo.inference.sampling import SamplingOptions

__all__ = ["FILE", "Settings", "read_rules", "read_settings"]

FILE = "generation_config.json"

_LENGTH = 256  # tokens of an answer where nothing is said
# What transformers fills in where a model samples and its file does not say how.
_SAMPLING: dict[str, Any] = {"temperature": 1.0, "top_p": 1.0, "top_k": 50, "min_p": 0.0}
# Other ways to search or to change scores, and the values with which they do nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("num_beams", "num_beam_groups", "typical_p", "guidance_scale"), (None, 1)),
    **dict.fromkeys(("encoder_repetition_penalty", "num_return_sequences"), (None, 1)),
    **dict.fromkeys(("diversity_penalty", "epsilon_cutoff", "eta_cutoff"), (None, 0)),
    **dict.fromkeys(("encoder_no_repeat_ngram_size", "min_length"), (None, 0)),
    **dict.fromkeys(("penalty_alpha", "forced_bos_token_id", "forced_eos_token_id"), (None,)),
    **dict.fromkeys(("sequence_bias", "exponential_decay_length_penalty"), (None,)),
    **dict.fromkeys(("force_words_ids", "constraints", "watermarking_config"), (None,)),
    **dict.fromkeys(("dola_layers", "prompt_lookup_num_tokens", "top_h"), (None,)),
    **dict.fromkeys(("stop_strings", "forced_decoder_ids", "max_time"), (None,)),
}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """A model's own settings of generation, for what the user does not say.

    Attributes:
        options: with rules, without stop tokens.
        stop_tokens: that end an answer.
    """

    options: SamplingOptions
    stop_tokens: tuple[int, ...]


def read_settings(folder: Path, config: Any) -> Settings:
    """The settings of a folder; those of its config.json if it has no file of settings.

    Args:
        folder: a Hugging Face directory, or a checkpoint's ``hf``.
        config: the model's Hugging Face configuration.

    Raises:
        ConfigError: the file is no JSON object, or a value is out of its range.
        UnsupportedError: it asks for beams, or another search that is not here; names it.
    """
    given = _read(folder)
    if given is None:
        return Settings(
            options=SamplingOptions(max_new_tokens=_LENGTH, rules=Rules()),
            stop_tokens=_tokens(_of_config(config)),
        )
    for name, neutral in _NEUTRAL.items():
        if given.get(name) not in neutral:
            raise UnsupportedError(
                f"{folder / FILE}: {name} is {given[name]!r}, which is not supported; expected "
                f"{neutral[-1]!r}: remove it there, or generate with transformers"
            )
    sampling: dict[str, Any] = {"temperature": 0.0}
    if given.get("do_sample"):
        sampling = {name: _or(given.get(name), value) for name, value in _SAMPLING.items()}
    options = SamplingOptions(
        max_new_tokens=_or(given.get("max_new_tokens"), _LENGTH), rules=_rules(given), **sampling
    )
    return Settings(options=options, stop_tokens=_tokens(given.get("eos_token_id")))


def read_rules(folder: Path) -> Rules:
    """The rules alone, whatever else the folder's generation settings ask for."""
    return _rules(_read(folder) or {})


def _read(folder: Path) -> Mapping[str, Any] | None:
    file = folder / FILE
    if not file.is_file():
        return None
    try:
        content = json.loads(file.read_text())
    except ValueError as error:
        raise ConfigError(f"{file} is not JSON: {error}; repair or delete it") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{file} holds a {type(content).__name__}; expected a JSON object")
    return content


def _rules(given: Mapping[str, Any]) -> Rules:
    names = {
        one.name: "bad_words_ids" if one.name == "bad_words" else one.name for one in fields(Rules)
    }
    values = {name: given[key] for name, key in names.items() if given.get(key) is not None}
    for name in ("suppress_tokens", "begin_suppress_tokens"):
        if name in values:
            values[name] = tuple(values[name])
    if "bad_words" in values:
        values["bad_words"] = tuple(tuple(words) for words in values["bad_words"])
    return Rules(**values)


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value


def _of_config(config: Any) -> Any:
    """The settings in config.json, which transformers takes if there is no file of settings."""
    from transformers import GenerationConfig

    return GenerationConfig.from_model_config(config).eos_token_id


def _tokens(given: Any) -> tuple[int, ...]:
    several = given if isinstance(given, list) else [given]
    return tuple(sorted({token for token in several if token is not None}))
