"""Generation with a cache, in batches and under every layout, against one prompt at a time."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron.core.models.mimo.errors import ConfigError, UnsupportedError
from megatron.mimo.inference import Generator, SamplingOptions
from megatron.mimo.inference.prompts import group_prompts
from tests.distributed.core.layouts import Layout, build_chunks, copy_weights
from tests.distributed.core.reference import (
    SEQUENCE,
    VOCABULARY,
    Design,
    build_model,
    transformer_config,
)
from tests.distributed.core.whole import Tensors, whole
from tests.distributed.inference.prompts import (
    CONTENTS,
    NEW_TOKENS,
    Expected,
    answer_by_loop,
    collator,
    make_prompts,
)
from tests.rank_pool import RankPool, model_parallel
from tests.tiers import some

GREEDY = SamplingOptions(max_new_tokens=NEW_TOKENS)
WARM = replace(GREEDY, temperature=1.3, top_p=0.9, seed=5)
FOUR = Design(layers=4)
LAYOUTS: dict[str, tuple[Layout, Design]] = {
    "tp2": (Layout(tp=2), Design()),
    "tp2 sequence parallel": (Layout(tp=2, sequence_parallel=True), Design(learned_positions=True)),
    "pp2": (Layout(pp=2), Design(tied=True)),
    "pp2 mrope": (Layout(pp=2), Design(mrope=True)),
    "pp2 interleaved": (Layout(pp=2, vpp=2), FOUR),
    "cp2": (Layout(cp=2), Design()),
    "cp2 mrope": (Layout(cp=2), Design(mrope=True)),
    "dp2": (Layout(dp=2), Design()),
    "ep2": (Layout(ep=2, dp=2), Design(experts=4)),
    "tp2 pp2 sequence parallel": (Layout(tp=2, pp=2, sequence_parallel=True), Design()),
}
DESIGNS = {
    "rope": Design(),
    "learned": Design(learned_positions=True),
    "mrope": Design(mrope=True),
    "spans": Design(spans=True),
}


def build_one(design: Design, **changes: Any) -> Any:
    groups = model_parallel()
    config = transformer_config(design, **changes)
    model = build_model(config, design, groups, first=True, last=True)
    return model.bfloat16() if design.bf16 else model


def one_process(design: Design) -> tuple[Tensors, Expected, list[list[int]]]:
    """Weights, the answers by plain loops, and sampled answers of the generator."""
    model = build_one(design)
    expected = answer_by_loop(model, design)
    warm = build_generator([model], design)(make_prompts(mrope=design.mrope), WARM)
    return whole(model, lambda parameter: parameter.data), expected, warm


def build_generator(chunks: list[Any], design: Design, **settings: Any) -> Generator:
    collate = collator(spans=design.spans, mrope=design.mrope)
    return Generator(
        chunks, collate, vocab_size=VOCABULARY, max_length=SEQUENCE, **{"batch_size": 8, **settings}
    )


def seen_logits(chunk: Any) -> list[torch.Tensor]:
    """Fills with the logits [B, V] of each step."""
    seen: list[torch.Tensor] = []
    if chunk.post_process:
        chunk.register_forward_hook(lambda *call: seen.append(call[-1][0][:, -1]))
    return seen


def check_logits(seen: list[torch.Tensor], expected: Expected, tolerance: float) -> None:
    """Compare those of one batch of all prompts, as far as each answer goes."""
    lengths = [len(prompt.token_ids) for prompt in make_prompts()]
    (order,) = group_prompts(lengths, 8, padded=True)
    compared = 0
    for step, logits_BV in enumerate(seen):
        for row, number in enumerate(order):
            if step < len(expected.logits[number]):
                torch.testing.assert_close(
                    logits_BV[row], expected.logits[number][step], rtol=0, atol=tolerance
                )
                compared += 1
    assert compared == sum(map(len, expected.tokens))


def generate(
    layout: Layout, design: Design, weights: Tensors, expected: Expected, warm: list[list[int]]
) -> None:
    groups = model_parallel(tp=layout.tp, pp=layout.pp, cp=layout.cp, ep=layout.ep, vpp=layout.vpp)
    chunks = build_chunks(layout, design, groups)
    copy_weights(chunks, weights)
    seen = seen_logits(chunks[-1])
    prompts = make_prompts(mrope=design.mrope)
    told: dict[int, list[int]] = {}
    generator = build_generator(chunks, design)
    chunks[0].train()
    answers = generator(
        prompts, GREEDY, on_token=lambda number, token: told.setdefault(number, []).append(token)
    )
    assert answers == expected.tokens
    assert all(answers[number] == tokens for number, tokens in told.items())
    if chunks[-1].post_process and groups.dp.size() == 1:
        check_logits(seen, expected, 1e-5)
    small = build_generator(chunks, design, batch_size=2)
    assert small(prompts, GREEDY) == answers
    assert small(prompts, WARM) == warm
    assert chunks[0].training
    assert (chunks[0].partition_adapter is None) == (
        layout.cp == 1 and not layout.sequence_parallel
    )
    # the model is as it was: it trains on cut sequences
    if layout.pp == 1:
        ids_BS = torch.ones(2, SEQUENCE, dtype=torch.long)
        losses, _ = chunks[0](ids_BS, torch.arange(SEQUENCE).expand(2, -1), labels=ids_BS)
        assert losses.shape == (2, SEQUENCE // layout.cp)
    dist.barrier()


@pytest.mark.parametrize(
    "name",
    some(
        LAYOUTS,
        "pp2 interleaved",
        "cp2 mrope",
        "dp2",
        "ep2",
        "tp2 pp2 sequence parallel",
    ),
)
def test_answers_of_a_layout_are_those_of_one_process(ranks: RankPool, name: str) -> None:
    layout, design = LAYOUTS[name]
    (reference,) = ranks(1)(one_process, design)
    ranks(layout.world_size)(generate, layout, design, *reference)


def generate_on_one(design: Design, changes: dict[str, Any], *, together: bool) -> None:
    model = build_one(design, **changes)
    expected = answer_by_loop(model, design)
    prompts = make_prompts(mrope=design.mrope)
    for use_cache in (True, False):
        seen = seen_logits(model)
        answers = build_generator([model], design, use_cache=use_cache)(prompts, GREEDY)
        assert answers == expected.tokens
        if together:
            check_logits(seen, expected, 1e-5)


def generate_in_bf16() -> None:
    """Rounding may choose another token; the logits of the first step are compared."""
    model = build_one(Design(bf16=True))
    expected = answer_by_loop(model, Design(bf16=True))
    first = Expected(
        tokens=[tokens[:1] for tokens in expected.tokens],
        logits=[logits[:1] for logits in expected.logits],
    )
    seen = seen_logits(model)
    answers = build_generator([model], Design(bf16=True))(make_prompts(), GREEDY)
    assert [len(answer) for answer in answers] == [len(tokens) for tokens in expected.tokens]
    assert seen[0].dtype == torch.bfloat16
    check_logits(seen, first, 0.05)


def test_bf16(ranks: RankPool) -> None:
    ranks(1)(generate_in_bf16)


@pytest.mark.parametrize("name", DESIGNS)
def test_one_process(ranks: RankPool, name: str) -> None:
    ranks(1)(generate_on_one, DESIGNS[name], {}, together=name != "spans")


@pytest.mark.parametrize(
    ("changes", "together"),
    [
        ({"num_query_groups": 2}, True),
        ({"window_size": (3, 0)}, True),
        ({"softmax_type": "off-by-one"}, False),  # megatron-core's own attention
    ],
    ids=["grouped queries", "window", "other attention"],
)
def test_kinds_of_attention(ranks: RankPool, changes: dict[str, Any], together: bool) -> None:
    ranks(1)(generate_on_one, Design(), changes, together=together)


def stop_in_several_ways() -> None:
    model = build_one(Design())
    prompts = make_prompts()
    generator = build_generator([model], Design())
    whole_answers = generator(prompts, GREEDY)
    stop = whole_answers[0][2]
    stopped = generator(prompts, replace(GREEDY, stop_tokens=(stop,)))
    assert stopped == [
        answer[: answer.index(stop)] if stop in answer else answer for answer in whole_answers
    ]
    assert stopped != whole_answers
    ended = generator(prompts, GREEDY, on_token=lambda number, token: number == 1 and token >= 0)
    assert [len(answer) for answer in ended] == [
        1 if number == 1 else len(answer) for number, answer in enumerate(whole_answers)
    ]
    warm = [generator(prompts, replace(WARM, seed=seed)) for seed in (1, 1, 2)]
    assert warm[0] == warm[1] != warm[2]
    one, other = generator([prompts[0], prompts[0]], WARM)
    assert one != other  # each draws its own
    model.config.multi_latent_attention = True
    with pytest.raises(UnsupportedError, match=r"multi-latent attention; give use_cache=False"):
        build_generator([model], Design())
    model.config.multi_latent_attention = False
    with pytest.raises(ConfigError, match="batch_size is 0; expected at least 1"):
        build_generator([model], Design(), batch_size=0)
    alone = generator(prompts[:1], replace(WARM, seed=1))
    assert alone[0] == warm[0][0]
    assert len(whole_answers) == len(CONTENTS)


def test_answers_end_and_are_drawn_again(ranks: RankPool) -> None:
    ranks(1)(stop_in_several_ways)
