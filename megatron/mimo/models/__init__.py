"""Model families, by name. A family's module is loaded when it is asked for."""

from __future__ import annotations

import difflib
import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron.core.models.mimo.errors import ConfigError, UnsupportedError
from megatron.mimo.backend.packages import require_hugging_face
from megatron.mimo.models.common.folder import check_links

if TYPE_CHECKING:
    from megatron.mimo.models.common.family import Family

__all__ = ["family_names", "family_of", "load_family", "read_hf_config"]

# Each module megatron.mimo.models.<name>.model has a constant FAMILY. The architectures are what
# config.json calls its models; they stand here so that finding a family imports no other.
_ARCHITECTURES = {
    "gemma3": ("Gemma3ForConditionalGeneration",),
    "internvl": ("InternVLForConditionalGeneration",),
    "llava": ("LlavaForConditionalGeneration",),
    "llava_avlm": ("LlavaAvlmForConditionalGeneration",),
    "llava_next": ("LlavaNextForConditionalGeneration",),
    "qwen2_5_vl": ("Qwen2_5_VLForConditionalGeneration",),
    "qwen2_audio": ("Qwen2AudioForConditionalGeneration",),
    "qwen3_5": ("Qwen3_5ForConditionalGeneration",),
    "qwen3_5_moe": ("Qwen3_5MoeForConditionalGeneration",),
    "qwen3_vl": ("Qwen3VLForConditionalGeneration",),
    "qwen3_vl_moe": ("Qwen3VLMoeForConditionalGeneration",),
}

# Families that stand in another one's folder.
_MODULES = {"qwen3_5_moe": "qwen3_5.moe", "qwen3_vl_moe": "qwen3_vl.moe"}

# Relatives of these families with layers that none of them has.
_NOT_HERE = {
    "MiniCPMV4_6ForConditionalGeneration": "its vision encoder merges windows of patches between "
    "its layers, and slices images (its language model is that of qwen3_5)",
    "Qwen4ExpForConditionalGeneration": "its language model has sparse attention, embeddings of "
    "n-grams and several residual streams",
}

_COUNTS = (
    *("num_attention_heads", "num_heads", "num_key_value_heads", "encoder_attention_heads"),
    *("patch_size", "temporal_patch_size", "spatial_merge_size", "num_channels", "in_channels"),
    *("num_mel_bins", "in_chans"),
)
_LONG = 500  # characters of another's message, which may hold a whole file's content


def family_names() -> tuple[str, ...]:
    """The names ``load_family`` knows, sorted."""
    return tuple(sorted(_ARCHITECTURES))


def load_family(name: str) -> Family:
    """The family of this name.

    Raises:
        ConfigError: unknown, or transformers is not installed.
    """
    if name not in _ARCHITECTURES:
        near = difflib.get_close_matches(name, _ARCHITECTURES, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ConfigError(
            f"unknown model family {name!r}; {hint}known families: {', '.join(family_names())}"
        )
    require_hugging_face("models of Hugging Face")
    module = _MODULES.get(name, f"{name}.model")
    family: Family = importlib.import_module(f"{__name__}.{module}").FAMILY
    return family


def family_of(config: Any) -> Family:
    """The family of a Hugging Face configuration, by its ``architectures``.

    Raises:
        UnsupportedError: no family has them; the message says which there are.
    """
    given = getattr(config, "architectures", None) or []
    wanted = given if isinstance(given, list | tuple) else [given]
    wanted = [name[:_LONG] if isinstance(name, str) else repr(name)[:_LONG] for name in wanted]
    for name, architectures in _ARCHITECTURES.items():
        if set(wanted) & set(architectures):
            return load_family(name)
    for name in wanted:
        if name in _NOT_HERE:
            raise UnsupportedError(
                f"the model's architecture is {name}, which is not supported: {_NOT_HERE[name]}. "
                "docs/adding_a_model.md says how to add one"
            )
    supported = sorted(one for several in _ARCHITECTURES.values() for one in several)
    near = difflib.get_close_matches(wanted[0], supported, n=1) if wanted else []
    hint = f" (the nearest is {near[0]})" if near else ""
    raise UnsupportedError(
        f"the model's architecture is {', '.join(wanted) or 'not given in config.json'}, which is "
        f"not supported{hint}; supported: {', '.join(supported)}. docs/adding_a_model.md says how "
        "to add one"
    )


def read_hf_config(folder: Path) -> Any:
    """The configuration of a Hugging Face directory, or of a checkpoint's ``hf`` folder.

    Raises:
        ConfigError: transformers is not installed, there is no such folder, or no config.json in
            it that can be read without running Python of the folder's own; symbolic links lead
            out of the folder.
        UnsupportedError: its weights are quantised.
    """
    require_hugging_face("models of Hugging Face")
    from transformers import AutoConfig

    if not folder.is_dir():
        raise ConfigError(f"{folder}: there is no such folder; correct the path")
    if not (folder / "config.json").is_file():
        raise ConfigError(f"{folder} has no config.json; expected a Hugging Face model's directory")
    check_links(folder)
    try:
        kind = json.loads((folder / "config.json").read_text()).get("model_type")
        if kind in _ARCHITECTURES:
            load_family(kind)  # one that transformers does not have registers its configuration
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # of whatever kind, for whatever value is wrong in it
        reason = " ".join(line.strip() for line in str(error).partition("\n\n")[0].splitlines())
        reason = reason if len(reason) < _LONG else f"{reason[:_LONG]} ..."
        raise ConfigError(
            f"{folder / 'config.json'} cannot be read: {reason or type(error).__name__}; correct "
            "it, or fetch it again"
        ) from error
    _refuse_quantised(config, folder)
    _check_counts(config.to_dict(), folder, within="")
    return config


def _check_counts(fields: Mapping[str, Any], folder: Path, *, within: str) -> None:
    """Refuse numbers of heads, patches and channels that are none, in every part."""
    for name, value in fields.items():
        if isinstance(value, dict):
            _check_counts(value, folder, within=f"{within}{name}.")
        elif name in _COUNTS and value is not None and not _counts(value):
            raise ConfigError(
                f"{folder / 'config.json'}: {within}{name} is {str(value)[:_LONG]}; expected a "
                "number from 1 on: correct it, or fetch it again"
            )


def _counts(value: object) -> bool:
    """Whether it is a number from 1 on, or such numbers (height and width)."""
    several = value if isinstance(value, list | tuple) and value else [value]
    return all(type(one) is int and one >= 1 for one in several)


def _refuse_quantised(config: Any, folder: Path) -> None:
    for part in (config, config.get_text_config()):
        quantised = getattr(part, "quantization_config", None)
        if quantised:
            kind = quantised.get("quant_method") if isinstance(quantised, dict) else quantised
            raise UnsupportedError(
                f"{folder} holds quantised weights ({kind}), which cannot be trained or converted; "
                "take the model as it was before: its weights in float32, bfloat16 or float16, and "
                "a config.json without quantization_config"
            )
