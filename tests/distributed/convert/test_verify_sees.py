"""``verify`` fails on each thing that could be wrong: what it does not look at, it says so."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.convert.models import make_and_import
from tests.rank_pool import RankPool
from tests.time_limits import HANG

CHANGES: dict[str, dict[str, Any]] = {
    "text_config.rms_norm_eps": {"text": {"rms_norm_eps": 0.1}},
    "text_config.rope_parameters.rope_theta": {"rope": 50.0},
    "image_token_index": {"whole": {"image_token_index": 11}},
    "tie_word_embeddings": {"whole": {"tie_word_embeddings": True}},
    "vision_feature_layer": {"whole": {"vision_feature_layer": -3}},
    "of_its_own": {"whole": {"of_its_own": 1}},
}


def verify_changed_configs(folder: Path) -> dict[str, dict[str, str]]:
    """The checkpoint's own configuration changes: what training and generation read."""
    from megatron.mimo.convert.verify import verify_checkpoint

    make_and_import("llava", folder)
    path = folder / "mimo" / "hf" / "config.json"
    whole = path.read_text()
    found = {}
    for name, change in CHANGES.items():
        content = json.loads(whole)
        content.update(change.get("whole", {}))
        content["text_config"].update(change.get("text", {}))
        if "rope" in change:
            content["text_config"]["rope_parameters"]["rope_theta"] = change["rope"]
        path.write_text(json.dumps(content))
        findings = verify_checkpoint(folder / "hf", folder / "mimo", weights_only=True)
        found[name] = {one.title: str(one) for one in findings if not one.equal}
    return found


def test_every_field_of_the_checkpoints_configuration(ranks: RankPool, tmp_path: Path) -> None:
    (found,) = ranks(1)(verify_changed_configs, tmp_path)
    for name, wrong in found.items():
        assert wrong.keys() == {"config"}, name
        assert f"{name}: " in wrong["config"]


def verify_changed_weights(folder: Path) -> list[dict[str, str]]:
    """A weight that our model does without; then the sign of a zero."""
    import shutil

    from safetensors.torch import load_file, save_file

    from megatron.mimo.convert.importing import import_model
    from megatron.mimo.convert.verify import verify_checkpoint

    make_and_import("llava", folder)
    tensors: dict[str, Any] = {}
    for path in (folder / "hf").glob("*.safetensors*"):
        if path.suffix == ".safetensors":
            tensors |= load_file(path)
        path.unlink()
    found = []

    def verify() -> None:
        save_file(tensors, folder / "hf/model.safetensors", metadata={"format": "pt"})
        findings = verify_checkpoint(folder / "hf", folder / "mimo", weights_only=True)
        found.append({one.title: str(one) for one in findings if not one.equal})

    carried, bias = "vision_tower.post_layernorm.weight", "multi_modal_projector.linear_1.bias"
    tensors[carried] += 1
    verify()
    kept = tensors.pop(carried)
    verify()
    tensors[carried], tensors[bias] = kept, torch.zeros_like(tensors[bias])
    save_file(tensors, folder / "hf/model.safetensors", metadata={"format": "pt"})
    shutil.rmtree(folder / "mimo")
    import_model(folder / "hf", folder / "mimo", shown=False)
    tensors[bias] = -tensors[bias]
    verify()
    return found


def test_every_bit_of_every_weight(ranks: RankPool, tmp_path: Path) -> None:
    ((changed, missing, zeros),) = ranks(1)(verify_changed_weights, tmp_path)
    assert [*map(list, (changed, missing, zeros))] == [["weights"]] * 3
    assert "vision_tower.post_layernorm.weight: largest difference 1.00" in changed["weights"]
    assert "vision_tower.post_layernorm.weight: only in mimo_carried" in missing["weights"]
    assert "multi_modal_projector.linear_1.bias" in zeros["weights"]


LAYER = "language_model.model.layers.1."
HEAD = 16  # features of a head of the tiny model


def swap_heads(rows_RC: torch.Tensor) -> torch.Tensor:
    heads = list(rows_RC.split(HEAD))
    heads[1], heads[2] = heads[2], heads[1]
    return torch.cat(heads)


REARRANGED: dict[str, tuple[str, Any, str]] = {
    "a perturbed weight": ("mlp.down_proj.weight", lambda one: one.index_fill(0, ROW, 0.5), ""),
    "two heads of queries swapped": (
        "self_attn.q_proj.weight",
        swap_heads,
        "; rows 16-31 and 32-47 are exchanged",
    ),
    "two heads of the output swapped": (
        "self_attn.o_proj.weight",
        lambda one: swap_heads(one.T).T.contiguous(),
        "; columns 16-31 and 32-47 are exchanged",
    ),
    "a square matrix transposed": (
        "self_attn.o_proj.weight",
        lambda one: one.T.contiguous(),
        "; it is transposed",
    ),
    "all heads moved on by one": (
        "self_attn.q_proj.weight",
        lambda one: one.roll(HEAD, dims=0),
        "; rows are in another order: 0-47 are the directory's 16-63, "
        "48-63 are the directory's 0-15",
    ),
    "rows shuffled": (
        "mlp.gate_proj.weight",
        lambda one: one[torch.randperm(len(one), generator=torch.Generator().manual_seed(1))],
        "; rows are in another order: ",
    ),
}
ROW = torch.tensor([3])


def verify_rearranged(folder: Path) -> dict[str, dict[str, str]]:
    """One weight at a time is changed in the directory that a checkpoint was made of."""
    from safetensors.torch import load_file, save_file

    from megatron.mimo.convert.verify import verify_checkpoint

    make_and_import("llava", folder)
    found = {}
    for title, (name, change, _) in REARRANGED.items():
        (path,) = (
            one
            for one in (folder / "hf").glob("*.safetensors")
            if f"{LAYER}{name}" in load_file(one)
        )
        whole = path.read_bytes()
        tensors = load_file(path)
        tensors[LAYER + name] = change(tensors[LAYER + name])
        save_file(tensors, path, metadata={"format": "pt"})
        findings = verify_checkpoint(folder / "hf", folder / "mimo", weights_only=True)
        found[title] = {one.title: str(one) for one in findings if not one.equal}
        path.write_bytes(whole)
    return found


def test_what_was_done_to_a_weight_is_named(ranks: RankPool, tmp_path: Path) -> None:
    (found,) = ranks(1)(verify_rearranged, tmp_path)
    for title, (name, _, words) in REARRANGED.items():
        assert found[title].keys() == {"weights"}, title
        first, line = found[title]["weights"].splitlines()  # no other weight is named
        assert first.startswith("FAIL")
        assert line.strip().startswith(f"{LAYER}{name}: largest difference ")
        assert words in line
        assert words or ";" not in line


def carried_types(folder: Path) -> set[torch.dtype]:
    from safetensors.torch import load_file

    from megatron.mimo.convert.importing import import_model

    make_and_import("llava", folder)
    import_model(folder / "hf", folder / "half", dtype=torch.bfloat16, shown=False)
    tensors = load_file(folder / "half" / "hf" / "mimo_carried.safetensors")
    return {tensor.dtype for tensor in tensors.values()}


def test_a_dtype_is_that_of_carried_weights_too(ranks: RankPool, tmp_path: Path) -> None:
    assert ranks(1)(carried_types, tmp_path) == [{torch.bfloat16}]


def verify_broken_audio() -> dict[str, str]:
    from megatron.mimo.convert.verify import verify_tiny
    from megatron.mimo.models.common import audio_tower

    kept = audio_tower._KINDS["whisper"]
    audio_tower._KINDS["whisper"] = (False, 1)  # as if Whisper did not attend to silence
    try:
        return {one.title: str(one) for one in verify_tiny("llava_avlm") if not one.equal}
    finally:
        audio_tower._KINDS["whisper"] = kept


def verify_broken_images() -> dict[str, str]:
    from megatron.mimo.convert.verify import verify_tiny
    from megatron.mimo.models.common import visuals

    kept = visuals._visuals

    def negated(given: Any, pixels: str, *rest: Any) -> Any:
        if pixels == "pixel_values" and pixels in given:
            given = {**given, pixels: -given[pixels]}
        return kept(given, pixels, *rest)

    visuals._visuals = negated
    try:
        return {one.title: str(one) for one in verify_tiny("qwen2_5_vl") if not one.equal}
    finally:
        visuals._visuals = kept


@pytest.mark.parametrize("broken", [verify_broken_audio, verify_broken_images])
def test_every_kind_of_medium(ranks: RankPool, broken: Any) -> None:
    (wrong,) = ranks(1)(broken)
    assert {"logits", "gradients"} <= wrong.keys()


def verify_with_a_near_base() -> dict[str, str]:
    from megatron.mimo.convert.verify import verify_tiny

    changes = {"rotary_base": 10030}  # of 10,000: a difference of 20 tokens is within the tolerance
    return {one.title: str(one) for one in verify_tiny("llava", changes=changes) if not one.equal}


def test_long_positions(ranks: RankPool) -> None:
    (wrong,) = ranks(1)(verify_with_a_near_base)
    assert {"logits", "gradients"} <= wrong.keys()


def verify_other_padding(folder: Path) -> list[str]:
    """The padding token ends texts as well, and token 0 begins them."""
    from megatron.mimo.convert.importing import import_model
    from megatron.mimo.convert.verify import verify_checkpoint
    from megatron.mimo.models import load_family

    family = load_family("llava")
    config: Any = family.tiny()
    config.text_config.pad_token_id = config.text_config.eos_token_id = 2
    config.text_config.bos_token_id = 0
    torch.manual_seed(5)
    model: Any = family.reference(config)
    model.save_pretrained(folder / "hf")
    import_model(folder / "hf", folder / "mimo", shown=False)
    return [str(one) for one in verify_checkpoint(folder / "hf", folder / "mimo")]


def test_no_alarm_where_padding_is_another_token(ranks: RankPool, tmp_path: Path) -> None:
    (lines,) = ranks(1)(verify_other_padding, tmp_path)
    assert all(line.startswith("ok") for line in lines), lines
    assert any("the padding token, the first token, the end token" in line for line in lines)


def coverage_without(what: str) -> str:
    """What coverage says of conversations that lack something."""
    from megatron.mimo.convert.conversations import covering_examples
    from megatron.mimo.convert.reference import compute_expected
    from megatron.mimo.convert.verify import _coverage
    from megatron.mimo.models import load_family

    family = load_family("llava_avlm")
    config: Any = family.tiny()
    torch.manual_seed(5)
    model = family.reference(config).eval()
    if what == "a gradient":
        for parameter in model.audio_projector.parameters():  # type: ignore[union-attr]
            parameter.register_hook(torch.zeros_like)
    expected = compute_expected(model, family, config, samples=1, seed=2)
    examples = covering_examples(family, config, samples=1, seed=2)
    if what == "audio":
        examples = [one for one in examples if "input_features" not in one]
    if what == "the end token":
        for one in examples:
            one["input_ids"][one["input_ids"] == config.text_config.eos_token_id] = 77
    if what == "length":
        examples = [{**one, "input_ids": one["input_ids"][:, :100]} for one in examples]
    return str(_coverage(family, config, replace(expected, examples=examples)))


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("nothing", "ok  "),
        ("audio", "no conversation holds audio"),
        ("the end token", "no text holds the end token, 2"),
        ("length", "tokens, expected 208"),
        ("a gradient", "audio_projector.linear_1.weight has no gradient"),
    ],
)
def test_coverage_is_part_of_the_verdict(ranks: RankPool, what: str, words: str) -> None:
    (line,) = ranks(1)(coverage_without, what)
    assert words in line
    assert line.startswith("ok" if what == "nothing" else "FAIL")


def verify_on_three() -> str:
    from megatron.core.models.mimo.errors import ConfigError
    from megatron.mimo.convert.verify import verify_tiny

    try:
        verify_tiny("llava", tp_size=3)
    except ConfigError as error:
        return str(error)
    return "not refused"


@pytest.mark.wide  # it starts three interpreters
def test_a_layout_that_does_not_fit_is_one_sentence(ranks: RankPool) -> None:
    (words,) = ranks(1, timeout=HANG)(verify_on_three)
    assert "Traceback" not in words
    assert "\n" not in words
    assert "3" in words
