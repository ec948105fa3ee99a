"""Samples that are bad, too long or too slow: stopped at, left out, cut; never a hang."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron.core.models.mimo.errors import ConfigError, InputError
from megatron.mimo.data.bad_samples import BadSample, BadSampleLog, BadSamplePolicy
from megatron.mimo.data.formats import RawRecord, ReadingOptions
from megatron.mimo.data.global_batches.forming import GlobalBatches
from megatron.mimo.data.global_batches.measures import MeasuresHere
from megatron.mimo.data.global_batches.planned_batches import (
    LEFT_OUT,
    PlannedBatches,
    SampleSources,
)
from megatron.mimo.data.micro_batches.collate import SampleCollator
from megatron.mimo.data.reading.sample_measurer import SampleMeasurer
from megatron.mimo.data.reading.sample_reader import SampleReader
from megatron.mimo.data.reading.timed import Timed
from megatron.mimo.data.sample import Sample
from megatron.mimo.data.sources import Mixture, MixtureSpec, SourceSpec
from tests.time_limits import HANG
from tests.unit.mimo.data.chats import chat_of

DATA = Path(__file__).parents[5] / "examples/data"


def record(value: Any, place: str = "line 1") -> RawRecord:
    return RawRecord(value=value, file=DATA / "a.jsonl", place=place)


def reader(*, seq_length: int = 512, learn: str = "all", **policy: Any) -> SampleReader:
    return SampleReader(
        chat=chat_of("llava"),
        seq_length=seq_length,
        options=ReadingOptions(learn=learn),
        policy=BadSamplePolicy(**policy),
    )


def chat(*pairs: tuple[str, str], images: int = 0) -> RawRecord:
    messages = [
        {"role": role, "content": text}
        for pair in pairs
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]
    return record({"messages": messages, "images": ["media/cat.png"] * images})


def text_of(sample: Any) -> str:
    assert isinstance(sample, Sample)
    return str(chat_of("llava").processor.tokenizer.decode(sample.token_ids))


MISSING = record({"image": "media/none.png", "caption": "a"}, "line 4")


def test_a_bad_sample_stops_or_is_left_out() -> None:
    with pytest.raises(InputError, match=r"line 4: image .*none.png does not exist") as told:
        reader()(MISSING)
    bad = reader(on_bad_sample="skip")(MISSING)
    assert bad == BadSample(
        file=str(DATA / "a.jsonl"),
        place="line 4",
        medium=str(DATA / "media/none.png"),
        kind="bad",
        reason=str(told.value),
    )
    malformed = reader(on_bad_sample="skip")(record({"a": 1}))
    assert isinstance(malformed, BadSample)
    assert malformed.medium is None


def test_bad_samples_are_written_down_and_limited(tmp_path: Path) -> None:
    policy = BadSamplePolicy(on_bad_sample="skip", max_bad_samples=2)
    log = BadSampleLog(policy, tmp_path / "bad_samples.jsonl")
    bad = reader(on_bad_sample="skip")(MISSING)
    long = reader(seq_length=4, on_too_long="skip")(chat(("Hi", "Hello!")))
    assert isinstance(bad, BadSample)
    assert isinstance(long, BadSample)
    for one in (bad, long, long, bad):  # what is too long is no fault of the data
        log.add(one)
    again = BadSampleLog(policy, tmp_path / "bad_samples.jsonl")
    again.load_state_dict(log.state_dict())
    with pytest.raises(
        InputError, match=r"^3 samples were bad, more than --max-bad-samples 2; .*4"
    ):
        again.add(bad)
    written = [json.loads(line) for line in (tmp_path / "bad_samples.jsonl").open()]
    assert [one["kind"] for one in written] == ["bad", "too long", "too long", "bad", "bad"]
    assert written[0] == {
        "file": str(DATA / "a.jsonl"),
        "place": "line 4",
        "medium": bad.medium,
        "kind": "bad",
        "reason": bad.reason,
    }
    assert again.state_dict() == {"bad": 3, "too long": 2, "too slow": 0, "cut": 0}


LONG = [("one two three", "four"), ("five six seven", "eight"), ("nine ten", "eleven")]


@pytest.mark.parametrize(
    ("on_too_long", "images", "kept", "gone"),
    [
        ("cut-front", 0, "USER: nine ten ASSISTANT: eleven</s>", "one|five"),
        ("cut-end", 0, "USER: one two three ASSISTANT: four</s>", "five|nine"),
    ],
)
def test_whole_turns_are_cut(on_too_long: str, images: int, kept: str, gone: str) -> None:
    sample = reader(seq_length=40, on_too_long=on_too_long)(chat(*LONG, images=images))
    assert text_of(sample) == f"<s>{kept}"
    assert sample.cut_turns == 4  # type: ignore[union-attr]


def test_samples_that_are_cut_are_named_beside_their_batch(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    long, short = chat(*LONG).value, chat(("Hi", "Hello!")).value
    file.write_text("".join(json.dumps(one) + "\n" for one in (long, short, long)))
    read = reader(seq_length=40, on_too_long="cut-end")
    spec = MixtureSpec(sources=[SourceSpec(name="data", paths=[str(file)])])
    mixture = Mixture(spec, index_folder=tmp_path / "index", seed=1, buffer=1)
    sources = SampleSources(mixture=mixture, read=read, measure=SampleMeasurer(reader=read))
    formed = GlobalBatches(mixture, MeasuresHere(sources.measured))
    settings = {"seq_length": 40, "vocab_size": 512, "pad_id": 0}
    collate = SampleCollator(**settings, special_token_ids={}, media_formats={})  # type: ignore[arg-type]
    batch = PlannedBatches(sources, collate)[formed.form(3).items]
    log = BadSampleLog(BadSamplePolicy(max_bad_samples=0), tmp_path / "bad_samples.jsonl")
    for one in batch[LEFT_OUT]:
        log.add(one)
    assert log.state_dict() == {"cut": 2}
    written = [json.loads(line) for line in (tmp_path / "bad_samples.jsonl").open()]
    assert sorted(one["place"] for one in written) == ["record 1", "record 3"]
    assert re.search(r"a.jsonl, line [13]: 4 turns were cut away", written[0]["reason"])


def test_media_are_never_cut() -> None:
    pictured = [("<image>one", "two"), *LONG[1:]]
    sample = reader(seq_length=64, on_too_long="cut-front")(chat(*pictured, images=1))
    told = text_of(sample)
    assert told.count("<image>") == 9
    assert "five" not in told
    assert len(sample.token_ids) <= 64  # type: ignore[union-attr]
    bad = reader(seq_length=12, on_too_long="cut-end")(chat(*pictured, images=1))
    assert isinstance(bad, BadSample)
    assert bad.kind == "too long"
    last = reader(seq_length=40, on_too_long="cut-end", learn="last")(chat(*LONG))
    assert isinstance(last, BadSample)  # the turn that is learned would be gone


def test_documents_lose_text_at_one_end() -> None:
    words = " ".join(f"word{number}" for number in range(40))
    front = reader(seq_length=32, on_too_long="cut-front")(record({"text": words}))
    assert text_of(front).startswith("<s>")
    assert text_of(front).endswith("word39</s>")
    end = reader(seq_length=32, on_too_long="cut-end")(record({"text": words}))
    assert text_of(end).startswith("<s>word0 word1")
    assert not text_of(end).endswith("</s>")  # a text that goes on has no end to learn
    assert 28 <= len(end.token_ids) <= 32  # type: ignore[union-attr]
    captions = record({"caption": words, "image": "media/cat.png"})
    cut = reader(seq_length=32, on_too_long="cut-end")(captions)
    assert text_of(cut).startswith("<s>" + 9 * "<image>" + "word0")
    assert isinstance(reader(seq_length=32, on_too_long="cut-front")(captions), BadSample)


def test_words_and_numbers_of_the_policy_are_checked() -> None:
    for changes, flag in (
        ({"on_bad_sample": "hide"}, "--on-bad-sample is 'hide'; expected stop or skip"),
        ({"on_too_long": "cut"}, "--on-too-long is 'cut'; expected stop or skip or cut-front"),
        ({"max_bad_samples": -1}, "--max-bad-samples is -1"),
        ({"sample_timeout": -1.0}, "--sample-timeout is -1.0"),
    ):
        with pytest.raises(ConfigError, match=flag):
            BadSamplePolicy(**changes)  # type: ignore[arg-type]


def test_samples_come_back_whole_from_the_process_that_decodes() -> None:
    alone, timed = reader(), reader(sample_timeout=HANG)
    pictured = chat(("<image>What?", "A cat."), images=1)
    for _ in range(3):
        one, two = alone(pictured), timed(pictured)
        assert isinstance(one, Sample)
        assert isinstance(two, Sample)
        assert torch.equal(one.token_ids, two.token_ids)
        [[left], [right]] = [
            [item.inputs["pixel_values"] for item in sample.media] for sample in (one, two)
        ]
        assert torch.equal(left, right)
        assert left.dtype == right.dtype
        right.add_(1)  # it is the caller's own
    with pytest.raises(InputError, match=r"line 4: image .*none.png does not exist"):
        timed(MISSING)


def act(what: Any) -> Any:
    if what == "hang":
        time.sleep(10 * HANG)
    if what == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if what == "fail":
        raise KeyError("unnamed")
    return what, torch.arange(3), os.getpid()


def test_a_decoder_that_hangs_is_killed_and_one_that_crashes_is_replaced() -> None:
    timed = Timed(act, 1.0)
    _, _, first = timed("a", "a")
    assert first != os.getpid()
    assert timed("b", "b")[2] == first  # one process for all calls
    begin = time.monotonic()
    with pytest.raises(TimeoutError, match=r"^line 3: takes more than --sample-timeout 1 s"):
        timed("hang", "line 3")
    assert time.monotonic() - begin < HANG
    with pytest.raises(ProcessLookupError):
        os.kill(first, 0)
    with pytest.raises(InputError, match=r"^line 4: the process that reads it died of SIGSEGV"):
        timed("crash", "line 4")
    with pytest.raises(InputError, match=r"KeyError: 'unnamed'"):
        timed("fail", "line 5")
    value, numbers, _ = timed("c", "c")
    assert value == "c"
    assert numbers.tolist() == [0, 1, 2]


def test_a_sample_that_takes_too_long_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.mimo.data.chat import chat as chats

    monkeypatch.setattr(chats, "read_medium", lambda *_, **__: time.sleep(10 * HANG))
    slow = chat(("<image>What?", "A cat."), images=1)
    bad = reader(sample_timeout=1.0, on_bad_sample="skip")(slow)
    assert isinstance(bad, BadSample)
    assert (bad.kind, bad.place) == ("too slow", "line 1")
    with pytest.raises(InputError, match=r"takes more than --sample-timeout 1 s"):
        reader(sample_timeout=1.0)(slow)
    assert isinstance(reader(sample_timeout=1.0)(chat(("Hi", "Hello!"))), Sample)


def test_thoughts_are_learned_context_or_gone() -> None:
    thought = record(
        {
            "messages": [
                {"role": "user", "content": "2 and 3?"},
                {"role": "assistant", "content": "<think>2 + 3</think>\n\n5"},
            ]
        }
    )
    told = {}
    for thinking in ("keep", "context", "drop"):
        read = SampleReader(
            chat=chat_of("llava"), seq_length=99, options=ReadingOptions(thinking=thinking)
        )
        sample = read(thought)
        assert isinstance(sample, Sample)
        learned = sample.token_ids[sample.is_label]
        told[thinking] = text_of(sample), chat_of("llava").processor.tokenizer.decode(learned)
    whole = "<s>USER: 2 and 3? ASSISTANT: <think>2 + 3</think>\n\n5</s>"
    assert told["keep"] == (whole, " <think>2 + 3</think>\n\n5</s>")
    assert told["context"][0] == whole
    assert told["context"][1].strip() == "5</s>"
    assert told["drop"] == ("<s>USER: 2 and 3? ASSISTANT: 5</s>", " 5</s>")
