"""Every field of every configuration that a family takes: with another value our model computes
what transformers computes, or refuses it by name; or transformers computes the same as before."""

from __future__ import annotations

import copy
import functools
from dataclasses import replace
from typing import Any

import pytest
import torch

from megatron.core.models.mimo.errors import ConfigError, MimoError, UnsupportedError
from megatron.mimo.models import family_names, load_family
from megatron.mimo.models.common.config_fields import (
    ASIDE,
    Only,
    Rules,
    check_fields,
    defaults_of,
)
from megatron.mimo.models.common.tiny import TINY_TEXT, TINY_VISION
from tests.distributed.models.field_values import OTHERS
from tests.distributed.models.text_kinds import KINDS, use_text
from tests.rank_pool import RankPool
from tests.time_limits import HANG

# Fields of Whisper's other half, which no part of a model reads.
UNREAD = {
    *("vocab_size", "decoder_layerdrop", "decoder_start_token_id", "init_std"),
    *("max_target_positions", "pad_token_id", "bos_token_id", "eos_token_id", "suppress_tokens"),
    *("begin_suppress_tokens", "classifier_proj_size", "mask_time_prob", "mask_time_length"),
    *("mask_time_min_masks", "mask_feature_prob", "mask_feature_length"),
    *("mask_feature_min_masks", "median_filter_width"),
}
PARTS = ("vision_config", "audio_config", "text_config")


@functools.cache
def rules() -> dict[str, Rules]:
    """The rules of every class that is supported, by its ``model_type``."""
    found: dict[str, Rules] = {}
    for name in family_names():
        fields = load_family(name).fields
        found[name] = fields.rules
        for kinds in fields.parts.values():
            found |= kinds
    return found


def every_class_has(name: str) -> bool:
    """Whether a field is one of ``PreTrainedConfig``."""
    return name != "model_type" and all(name in one for one in rules().values())


def bases() -> list[Any]:
    """Configurations in which every class that is supported stands once."""
    from transformers import Qwen2Config, SiglipVisionConfig

    several = [load_family(name).tiny() for name in family_names()]
    other = load_family("llava").tiny().to_dict()
    small = {key: value for key, value in TINY_VISION.items() if key != "initializer_range"}
    other |= {
        "vision_config": SiglipVisionConfig(**small).to_dict(),
        "vision_feature_select_strategy": "full",
        "text_config": Qwen2Config(**TINY_TEXT).to_dict(),
    }
    others = [type(load_family("llava").tiny()).from_dict(other)]
    for name in KINDS:
        config: Any = load_family("llava").tiny()
        use_text(name, config)
        others.append(config)
    return [*several, *others]


def walk() -> list[tuple[Any, str, str, str]]:
    """(whole configuration, path of a part, its type, field), each class and field once."""
    seen: set[tuple[str, str]] = set()
    found = []
    for config in bases():
        for path in ("", *PARTS):
            part = getattr(config, path, None) if path else config
            if part is None:
                continue
            for name in rules()[part.model_type]:
                if (part.model_type, name) not in seen and name not in (*PARTS, "model_type"):
                    seen.add((part.model_type, name))
                    found.append((config, path, part.model_type, name))
    assert {kind for kind, _ in seen} == rules().keys()
    return found


def test_every_field_of_every_class_has_a_rule() -> None:
    for config in bases():
        for part in (config, *(getattr(config, name, None) for name in PARTS)):
            if part is not None:
                unknown = defaults_of(type(part)).keys() - rules()[part.model_type].keys()
                assert not unknown, f"{type(part).__name__}: {sorted(unknown)}"
        check_fields(config, load_family(config.model_type).fields)


def test_every_field_has_other_values_to_try() -> None:
    for kind, known in rules().items():
        tried = {
            name
            for name, rule in known.items()
            if name not in (*PARTS, "model_type")
            and not (rule is ASIDE and every_class_has(name))
            and not (kind == "whisper" and name in UNREAD)
        }
        missing = sorted(tried - OTHERS.get(kind, {}).keys())
        assert not missing, f"field_values.py has no other values of {kind}'s {missing}; add some"


def test_a_field_that_is_not_known_has_its_default() -> None:
    family = load_family("llava")
    config: Any = family.tiny()
    known = family.fields.parts["text_config"]["llama"]
    llama = {key: rule for key, rule in known.items() if key != "pretraining_tp"}
    fields = replace(family.fields, parts={**family.fields.parts, "text_config": {"llama": llama}})
    check_fields(config, fields)
    config.text_config.pretraining_tp = 2
    with pytest.raises(UnsupportedError, match=r"text_config\.pretraining_tp is 2.*default, 1"):
        check_fields(config, fields)


def changed(config: Any, path: str, name: str, value: Any) -> Any:
    """The same with another value, as a ``config.json`` would say it."""
    content = config.to_dict()
    part = content[path] if path else content
    part[name] = value
    if name == "num_hidden_layers":
        part.pop("layer_types", None)
    return type(config).from_dict(content)


def run_reference(config: Any, example: dict[str, Any], state: Any = None) -> tuple[Any, Any]:
    """transformers' model, with weights drawn anew or given, and its logits."""
    family = load_family(config.model_type)
    torch.manual_seed(1)
    model: Any = family.reference(copy.deepcopy(config)).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
        if state is not None:
            model.load_state_dict(state)
        return model, model(**example).logits[0]


def run_ours(config: Any, example: dict[str, Any], state: Any) -> Any:
    from megatron.mimo.arguments.standalone import build_model, model_settings, process_groups
    from megatron.mimo.checkpoints.weights import load_hugging_face
    from megatron.mimo.models.common.family import sample_collator

    family = load_family(config.model_type)
    with process_groups() as device:
        settings = model_settings(family, config)
        model = build_model(family, config, settings, device=device)
        load_hugging_face(model, state, family.keys(config))
        sample = family.sample(config, example)
        collate = sample_collator(
            family, config, seq_length=len(sample.token_ids), vocab_size=settings.tokens
        )
        batch = collate([sample])
        batch.pop("labels")
        with torch.no_grad():
            return model(**batch)[0][0][:, : settings.tokens]


def example_of(config: Any) -> dict[str, Any]:
    example: dict[str, Any] = load_family(config.model_type).example(
        config, torch.Generator().manual_seed(3)
    )
    return example


def compare(config: Any, path: str, name: str, value: Any) -> str | None:
    """What is wrong with the handling of one value; None for nothing."""
    try:
        other = changed(config, path, name, value)
    except Exception:  # noqa: BLE001 - transformers refuses it, with a class of its own
        return None
    family = load_family(other.model_type)
    try:
        family.arguments(other)
        example = example_of(other)
        model, want = run_reference(other, example)
        got = run_ours(other, example, model.state_dict())
    except MimoError as error:
        # Of a field with parts, the part is named; of sizes, what they no longer fit.
        named = (name, *(value if isinstance(value, dict) else ()), "activation", "mrope_section")
        known = any(word in str(error) for word in named)
        return None if known else f"refused without its name: {error}"
    except Exception as error:  # noqa: BLE001 - whatever transformers says of it
        return f"neither refused nor computed: {type(error).__name__}: {error}"
    worst = (got - want).abs().max().item()
    return None if worst < 1e-4 else f"differs by {worst:.1e}"


def check_used(classes: str) -> list[str]:
    """Fields that our model follows: each name in the first class that has it, or in all others."""
    wrong = []
    fields = [one for one in walk() if rules()[one[2]][one[3]] is not ASIDE]
    first = {name: kind for _, _, kind, name in reversed(fields)}
    for config, path, kind, name in fields:
        if (first[name] == kind) != (classes == "first"):
            continue
        for value in OTHERS[kind][name]:
            trouble = compare(config, path, name, value)
            if trouble is not None:
                wrong.append(f"{kind}.{name} = {value}: {trouble}")
    return wrong


@pytest.mark.wide
@pytest.mark.parametrize("classes", ["first", "others"])
def test_used_fields_are_followed_or_refused(ranks: RankPool, classes: str) -> None:
    assert ranks(1, timeout=HANG)(check_used, classes) == [[]]


Change = tuple[str, str, Any]  # path of a part, field, value


def changes_aside() -> list[tuple[Any, list[Change]]]:
    """Configurations, and changes to them that decide nothing: one of each field, then one more of
    those that have several, and so on."""
    fields: dict[int, tuple[Any, list[tuple[str, str, list[Any]]]]] = {}
    for config, path, kind, name in walk():
        unread = every_class_has(name) or (kind == "whisper" and name in UNREAD)
        if rules()[kind][name] is ASIDE and not unread:
            fields.setdefault(id(config), (config, []))[1].append((path, name, OTHERS[kind][name]))
    return [
        (config, [(path, name, values[turn]) for path, name, values in of if turn < len(values)])
        for config, of in fields.values()
        for turn in range(max(len(values) for *_, values in of))
    ]


def check_aside() -> list[str]:
    """All of a configuration at once; where that changes anything one by one, to name it."""
    wrong = []
    for config, changes in changes_aside():
        example = example_of(config)
        model, want = run_reference(config, example)
        state = {key: tensor for key, tensor in model.state_dict().items() if ".head." not in key}
        if _difference(config, changes, example, state, want) is not None:
            for one in changes:
                said = _difference(config, [one], example, state, want)
                wrong += [f"{config.model_type}, {one}: {said}"] if said else []
    return wrong


def _difference(
    config: Any, changes: list[Change], example: dict[str, Any], state: Any, want: torch.Tensor
) -> str | None:
    """What transformers' model says of changes to its configuration; None if its logits stay."""
    for change in changes:
        config = changed(config, *change)
    try:
        _, got = run_reference(config, example, state)
    except RuntimeError as error:
        return str(error)
    return None if torch.equal(got, want) else "differs"


def test_fields_that_decide_nothing_decide_nothing(ranks: RankPool) -> None:
    assert ranks(1, timeout=HANG)(check_aside) == [[]]


@pytest.mark.parametrize(
    ("family", "path", "name", "value"),
    [
        ("llava_avlm", "text_config", "model_type", "qwen2"),
        ("qwen2_audio", "audio_config", "model_type", "whisper"),
        ("llava", "text_config", "model_type", "qwen2_5_vl_text"),
    ],
)
def test_parts_of_another_kind_are_refused(family: str, path: str, name: str, value: str) -> None:
    config = load_family(family).tiny()
    setattr(getattr(config, path), name, value)
    with pytest.raises(UnsupportedError, match=rf"{path}\.{name} is '{value}'"):
        load_family(family).arguments(config)


@pytest.mark.parametrize("name", ["llava", "llava_avlm", "qwen2_audio", "qwen2_5_vl", "qwen3_vl"])
def test_a_placeholder_outside_of_the_vocabulary_is_refused(name: str) -> None:
    family = load_family(name)
    for field in family.tiny().to_dict():
        if field in ("image_token_index", "audio_token_index", "image_token_id", "video_token_id"):
            config: Any = family.tiny()
            setattr(config, field, 500)
            with pytest.raises(ConfigError, match=rf"{field} is 500; expected .* 0 to 499"):
                family.arguments(config)


@pytest.mark.parametrize(
    "extra", [{"use_sliding_window": False}, {"layer_types": ["full_attention"] * 2}]
)
def test_what_mistral_does_not_read_turns_no_window_off(extra: dict[str, Any]) -> None:
    content = load_family("llava_next").tiny().to_dict()
    content["text_config"] |= {"sliding_window": 4, **extra}
    config = type(load_family("llava_next").tiny()).from_dict(content)
    assert load_family("llava_next").arguments(config)["window_attn_skip_freq"] == [1, 1]


def test_only_is_refused_by_name() -> None:
    for config, path, kind, name in walk():
        rule = rules()[kind][name]
        if isinstance(rule, Only):
            other = changed(config, path, name, OTHERS[kind][name][0])
            where = f"{path}." if path else ""
            with pytest.raises(UnsupportedError, match=rf"config\.json: {where}{name} is"):
                load_family(config.model_type).arguments(other)
