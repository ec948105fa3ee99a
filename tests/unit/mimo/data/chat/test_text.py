"""Where an answer ends follows from the template and the model's configuration; nothing is lost."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from megatron.core.models.mimo.errors import ConfigError, InputError
from megatron.mimo.data.chat.chat import Chat
from megatron.mimo.recipes.tiny import processors
from megatron.mimo.recipes.tiny.tokenizer import tiny_tokenizer
from tests.unit.mimo.data.chats import chat_of, parse, talk

TURNS = """{% for m in messages %}<|h|>{{ m['role'] }}
{% for part in m['content'] %}{{ part['text'] }}{% endfor %}<|eot_id|>{% endfor %}
{%- if add_generation_prompt %}<|h|>assistant
{% endif %}"""


def said(chat: Chat, *turns: str) -> list[str]:
    """The tokens that are learned of turns of user and assistant."""
    roles = ("user", "assistant")
    told = talk(*((roles[number % 2], [text]) for number, text in enumerate(turns)))
    sample = chat.sample(told)
    tokens: list[str] = chat.processor.tokenizer.convert_ids_to_tokens(
        sample.token_ids[sample.is_label].tolist()
    )
    return tokens


def with_boxes() -> Chat:
    """LLaVA with special tokens of its own; its template writes no end."""
    known = chat_of("llava")
    processor = processors.llava_processor(known.config)
    processor.tokenizer.add_special_tokens(
        {"additional_special_tokens": ["<seg>", "</box>"]}, replace_extra_special_tokens=False
    )
    return Chat(family=known.family, config=known.config, processor=processor)


def like_llama(template: str, **more: Any) -> Chat:
    """A tokenizer whose end is <|end_of_text|>, while turns end as the template says."""
    known = chat_of("llava")
    processor = processors.llava_processor(known.config)
    names = ("<pad>", "<bos>", "<|end_of_text|>", "<|eot_id|>", "<image>", "<|h|>")
    ids = {name: number for number, name in enumerate(names)}
    ids["<image>"] = known.config.image_token_index
    made = tiny_tokenizer(
        ids, vocab_size=400, texts=["hello"], bos="<bos>", eos="<|end_of_text|>", pad="<pad>"
    )
    processor.tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made.backend_tokenizer,
        bos_token="<bos>",
        eos_token=more.pop("eos", "<|end_of_text|>"),
        pad_token="<pad>",
    )
    processor.chat_template = template
    return Chat(family=known.family, config=known.config, processor=processor, **more)


@pytest.mark.parametrize("answer", ["it is here", "it is <seg>", "1 2</box>", "1 2</box>."])
def test_every_answer_ends_whatever_its_last_token(answer: str) -> None:
    tokens = said(with_boxes(), "Where?", answer, "And?", answer)
    assert tokens[-1] == "</s>"
    assert tokens.count("</s>") == 2


def test_a_template_that_ends_turns_needs_no_second_end() -> None:
    chat = like_llama(TURNS)
    tokens = said(chat, "a", "yes", "b", "no")
    assert [token for token in tokens if token.startswith("<|")] == ["<|eot_id|>"] * 2
    assert tokens[-1] == "<|eot_id|>"
    assert chat.text.turn_end == 3  # where generation has to stop
    assert chat_of("llava").text.turn_end is None
    qwen = chat_of("qwen2_5_vl")
    assert qwen.text.turn_end == qwen.processor.tokenizer.eos_token_id


def test_what_stands_behind_the_end_is_not_learned() -> None:
    behind = TURNS.replace("<|eot_id|>", "<|eot_id|>\n[next]\n")
    tokens = said(like_llama(behind), "a", "yes", "b", "no")
    assert tokens[-1] == "<|eot_id|>"
    assert "[" not in "".join(tokens)


def test_the_end_between_turns_is_not_written_twice() -> None:
    between = TURNS.replace("<|eot_id|>", "{% if not loop.last %}<|end_of_text|>{% endif %}")
    between = between.replace(
        "{%- if add", "{%- if add_generation_prompt %}<|end_of_text|>{% endif %}{% if add"
    )
    chat = like_llama(between)
    told = talk(("user", ["a"]), ("assistant", ["yes"]), ("user", ["b"]), ("assistant", ["no"]))
    tokens = chat.processor.tokenizer.convert_ids_to_tokens(chat.sample(told).token_ids.tolist())
    ends = [number for number, token in enumerate(tokens) if token == "<|end_of_text|>"]
    assert len(ends) == 4  # one behind each turn
    assert all(right - left > 1 for left, right in itertools.pairwise(ends))


def test_the_generation_configuration_says_what_ends() -> None:
    plain = TURNS.replace("<|eot_id|>", " ")
    assert said(like_llama(plain), "a", "yes")[-1] == "<|end_of_text|>"
    assert said(like_llama(plain, end_tokens=(3,)), "a", "yes")[-1] == "<|eot_id|>"
    assert said(like_llama(plain, end_tokens=(3, 2)), "a", "yes")[-1] == "<|end_of_text|>"
    assert said(like_llama(plain, end_tokens=(3,), eos=None), "a", "yes")[-1] == "<|eot_id|>"
    with pytest.raises(ConfigError, match=r"neither the chat template .* name one as eos_token"):
        said(like_llama(plain, eos=None), "a", "yes")


FULL = """{% if tools %}<|im_start|>system
Tools: {{ tools | tojson }}<|im_end|>
{% endif %}{% for m in messages %}<|im_start|>{{ m['role'] }}
{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}
{%- for c in m['content'] %}{{ c['text'] }}{% endfor %}
{%- if m.tool_calls %}<call>{{ m.tool_calls | tojson }}</call>{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
CALL = [{"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}]
HI = {"role": "user", "content": "Hi"}
WRITTEN: dict[str, tuple[dict[str, Any], str]] = {
    "tools": ({"tools": CALL, "messages": [HI, {"role": "assistant", "content": "x"}]}, "weather"),
    "tool_calls": (
        {"messages": [HI, {"role": "assistant", "content": None, "tool_calls": CALL}]},
        "Oslo",
    ),
    "reasoning_content": (
        {"messages": [HI, {"role": "assistant", "content": "4", "reasoning_content": "2, 2"}]},
        "2, 2",
    ),
}


@pytest.mark.parametrize("key", WRITTEN)
def test_what_a_template_can_write_is_written_or_refused(key: str) -> None:
    known = chat_of("qwen2_5_vl")
    entry, word = WRITTEN[key]
    conversation = parse(entry, "line 7")
    processor = processors.qwen2_5_vl_processor(known.config)
    processor.chat_template = FULL
    chat = Chat(family=known.family, config=known.config, processor=processor)
    sample = chat.sample(conversation)
    text = chat.processor.tokenizer.decode(sample.token_ids)
    learned = chat.processor.tokenizer.decode(sample.token_ids[sample.is_label])
    assert word in text
    assert (word in learned) == (key != "tools")
    assert learned.endswith("<|im_end|>")
    with pytest.raises(InputError, match=rf"a.jsonl, line 7.*: .* does not write '{key}'"):
        known.sample(conversation)


def test_a_turn_that_is_not_learned_is_context() -> None:
    chat = chat_of("llava")
    for key, no in (("weight", 0), ("loss", False), ("train", False), ("trainable", False)):
        bad = {"role": "assistant", "content": "BAD", key: no}
        entry = {"messages": [HI, bad, HI, {"role": "assistant", "content": "good", key: 1}]}
        sample = chat.sample(parse(entry))
        decode = chat.processor.tokenizer.decode
        assert "BAD" in decode(sample.token_ids)
        assert decode(sample.token_ids[sample.is_label]).strip() == "good</s>"
