"""What becomes of every field of a Hugging Face configuration.

Each field of a class is used by our model, or has to have one of some values, or decides nothing
that our model computes. A field without a rule, as a later transformers may bring one, has to have
its default. Entries of a ``config.json`` that are no fields of its class are read by no model of
transformers either, and pass.

A family says this of its own configuration (``ModelFields``). The rules of language models and
towers that several families are made of stand here.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from megatron.core.models.mimo.errors import ConfigError, UnsupportedError

__all__ = [
    "ASIDE",
    "USED",
    "ModelFields",
    "Only",
    "Rule",
    "Rules",
    "check_fields",
    "defaults_of",
    "field_rules",
    "parts_of",
]

USED: Literal["used"] = "used"
"""Our model follows it, or refuses the values that it cannot follow."""
ASIDE: Literal["aside"] = "aside"
"""It decides nothing that the model computes: how it is initialised, called or described."""


@dataclass(frozen=True)
class Only:
    """The values that our model has.

    Attributes:
        values: of the field.
    """

    values: tuple[object, ...]


Rule = Literal["used", "aside"] | Only
Rules = Mapping[str, Rule]
"""Field of a class of configurations -> what becomes of it."""


@dataclass(frozen=True, kw_only=True)
class ModelFields:
    """What a family takes of a Hugging Face configuration.

    Attributes:
        rules: of the whole model's own fields.
        parts: the configurations within it: field ("text_config") -> each ``model_type`` that may
            stand there -> the rules of its fields.
    """

    rules: Rules
    parts: Mapping[str, Mapping[str, Rules]]


# Of PreTrainedConfig, as every class has them: what a call returns, labels of classifiers, names.
_COMMON = (
    "transformers_version",
    "architectures",
    "output_hidden_states",
    "output_attentions",
    "return_dict",
    "dtype",
    "chunk_size_feed_forward",
    "is_encoder_decoder",
    "id2label",
    "label2id",
    "problem_type",
    "_name_or_path",
    "use_cache",
    "initializer_range",
)


def field_rules(
    used: str, *, aside: str = "", only: Mapping[str, tuple[object, ...]] | None = None
) -> dict[str, Rule]:
    """The rules of a class; those of fields that every class has are added.

    Args:
        used: names of fields that our model follows, separated by spaces.
        aside: names of fields that decide nothing.
        only: fields that have to have one of these values.
    """
    rules: dict[str, Rule] = dict.fromkeys((*_COMMON, *aside.split()), ASIDE)
    rules |= dict.fromkeys(("model_type", *used.split()), USED)
    return rules | {name: Only(values) for name, values in (only or {}).items()}


# Tokens that begin and end a text are the tokenizer's and generation's; the position that a model
# was trained to bounds a run's sequence length.
_TEXT = (
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads "
    "num_key_value_heads hidden_act rms_norm_eps rope_parameters attention_dropout pad_token_id "
    "max_position_embeddings"
)
_TOKENS = "bos_token_id eos_token_id"
_WINDOW = "use_sliding_window sliding_window max_window_layers layer_types"
_EXPERTS = (
    "decoder_sparse_step mlp_only_layers moe_intermediate_size num_local_experts "
    "num_experts_per_tok norm_topk_prob router_aux_loss_coef output_router_logits"
)
_IMAGES = (
    "hidden_size intermediate_size num_hidden_layers num_attention_heads num_channels image_size "
    "patch_size hidden_act layer_norm_eps attention_dropout"
)
_AUDIO = (
    "num_mel_bins encoder_layers encoder_attention_heads encoder_ffn_dim d_model "
    "activation_function attention_dropout max_source_positions"
)
_NO_DROPOUT: dict[str, tuple[object, ...]] = dict.fromkeys(
    ("dropout", "activation_dropout", "encoder_layerdrop"), (0, None)
)
_LINEAR = (
    "layer_types linear_conv_kernel_dim linear_key_head_dim linear_value_head_dim "
    "linear_num_key_heads linear_num_value_heads head_dim attention_bias tie_word_embeddings"
)

_PARTS: dict[str, Rules] = {
    # Language models. Whether they tie is the whole model's to say.
    "llama": field_rules(
        _TEXT + " head_dim attention_bias mlp_bias tie_word_embeddings",
        aside=_TOKENS + " pretraining_tp",
    ),
    "mistral": field_rules(_TEXT + " head_dim sliding_window tie_word_embeddings", aside=_TOKENS),
    "qwen2": field_rules(f"{_TEXT} {_WINDOW} tie_word_embeddings", aside=_TOKENS),
    "qwen3": field_rules(
        f"{_TEXT} {_WINDOW} head_dim attention_bias tie_word_embeddings", aside=_TOKENS
    ),
    "qwen3_moe": field_rules(
        f"{_TEXT} {_EXPERTS} head_dim use_sliding_window sliding_window attention_bias "
        "tie_word_embeddings",
        aside=_TOKENS,
    ),
    "gemma3_text": field_rules(
        _TEXT.replace("hidden_act ", "hidden_activation ")
        + " head_dim attention_bias query_pre_attn_scalar sliding_window layer_types "
        "use_bidirectional_attention tie_word_embeddings",
        aside=_TOKENS + " _sliding_window_pattern",  # which layer_types was made of
        # Whole models of transformers take no notice of these.
        only=dict.fromkeys(("final_logit_softcapping", "attn_logit_softcapping"), (None,)),
    ),
    "qwen2_5_vl_text": field_rules(f"{_TEXT} {_WINDOW} tie_word_embeddings", aside=_TOKENS),
    "qwen3_vl_text": field_rules(
        _TEXT + " head_dim attention_bias tie_word_embeddings", aside=_TOKENS
    ),
    "qwen3_vl_moe_text": field_rules(
        f"{_TEXT} {_EXPERTS} head_dim attention_bias tie_word_embeddings".replace(
            " norm_topk_prob", ""
        ),
        aside=_TOKENS + " sliding_window",  # which it sets to None, whatever is given
    ),
    "qwen3_5_text": field_rules(f"{_TEXT} {_LINEAR}", aside=_TOKENS),
    "qwen3_5_moe_text": field_rules(
        f"{_TEXT} {_LINEAR} moe_intermediate_size shared_expert_intermediate_size num_experts "
        "num_experts_per_tok router_aux_loss_coef output_router_logits".replace(
            " intermediate_size ", " ", 1
        ),
        aside=_TOKENS,
    ),
    # Towers. Nothing is computed from the pooled output of CLIP and SigLIP.
    "clip_vision_model": field_rules(_IMAGES, aside="projection_dim initializer_factor"),
    "siglip_vision_model": field_rules(_IMAGES, aside="vision_use_head"),
    # Their encoders read scale_embedding and scale nothing; the rest is of Whisper's decoder, its
    # classifier and its augmentation, none of which is there.
    "whisper": field_rules(
        _AUDIO,
        aside="scale_embedding vocab_size decoder_layers decoder_attention_heads decoder_ffn_dim "
        "decoder_layerdrop decoder_start_token_id init_std max_target_positions pad_token_id "
        "bos_token_id eos_token_id suppress_tokens begin_suppress_tokens use_weighted_layer_sum "
        "classifier_proj_size apply_spec_augment mask_time_prob mask_time_length "
        "mask_time_min_masks mask_feature_prob mask_feature_length mask_feature_min_masks "
        "median_filter_width tie_word_embeddings",
        only=_NO_DROPOUT,
    ),
    "qwen2_audio_encoder": field_rules(_AUDIO, aside="scale_embedding", only=_NO_DROPOUT),
}


def parts_of(*kinds: str) -> dict[str, Rules]:
    """The rules of language models and towers that stand here, by their ``model_type``."""
    return {kind: _PARTS[kind] for kind in kinds}


def check_fields(config: Any, fields: ModelFields) -> None:
    """Refuse a configuration that asks for what our model does not have.

    Args:
        config: of a whole model.
        fields: what its family takes.

    Raises:
        UnsupportedError: names the field, its value and what is expected.
        ConfigError: a placeholder is no token.
    """
    _check_part(config, "", fields.rules)
    for name, kinds in fields.parts.items():
        part = getattr(config, name)
        if part.model_type not in kinds:
            raise UnsupportedError(
                f"config.json: {name}.model_type is {_shown(part.model_type)}; expected "
                f"{_one_of(tuple(kinds))}, of which a {config.model_type} is made"
            )
        _check_part(part, f"{name}.", kinds[part.model_type])
    _check_placeholders(config)


def _check_placeholders(config: Any) -> None:
    tokens = config.text_config.vocab_size
    for name in ("image_token_index", "audio_token_index", "image_token_id", "video_token_id"):
        token = config.to_dict().get(name, 0)
        if not 0 <= token < tokens:
            raise ConfigError(
                f"config.json: {name} is {_shown(token)}; expected a token of the vocabulary, 0 to "
                f"{tokens - 1} (text_config.vocab_size is {tokens})"
            )


def _check_part(part: Any, prefix: str, rules: Rules) -> None:
    kind: Any = type(part)
    for name, default in defaults_of(kind).items():
        value, rule = getattr(part, name, default), rules.get(name)
        if isinstance(rule, Only) and value not in rule.values:
            raise UnsupportedError(
                f"config.json: {prefix}{name} is {_shown(value)}; expected {_one_of(rule.values)}"
            )
        if rule is None and value != default:
            raise UnsupportedError(
                f"config.json: {prefix}{name} is {_shown(value)}, a field that is not known here; "
                f"expected its default, {default!r}"
            )


def _one_of(values: tuple[Any, ...]) -> str:
    shown = [repr(value) for value in values if value is not None] or ["None"]
    return shown[0] if len(shown) == 1 else f"one of {', '.join(shown)}"


@functools.cache
def defaults_of(kind: type) -> dict[str, Any]:
    """Every field of a class of configurations, with its default."""
    defaults: dict[str, Any] = kind().to_dict()
    return defaults


def _shown(value: object) -> str:
    """A value for a message, not more of it than helps."""
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]} ..."


_SHOWN = 200
