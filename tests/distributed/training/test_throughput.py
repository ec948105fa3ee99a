"""What a run says of its throughput: sums that no layout changes, and what a batch really holds."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron.mimo.training.throughput import Throughput
from tests.distributed.models.ranks import Layout
from tests.rank_pool import RankPool, model_parallel
from tests.tiers import some

LAYOUTS = {
    "tp2": Layout(tp=2),
    "tp2-sp": Layout(tp=2, changes={"sequence_parallel": True}),
    "pp2": Layout(pp=2),
    "cp2": Layout(cp=2),
    "dp2": Layout(dp=2),
}
SEQ_LENGTH = 48


def measured(name: str, layout: Layout, frozen: tuple[str, ...] = (), rank: int = 0) -> Any:
    """Sums over one iteration of four micro-batches; runs on every rank."""
    from megatron.core import parallel_state
    from megatron.mimo.arguments.standalone import build_model, model_settings
    from megatron.mimo.data.micro_batches.counting import collate_and_count
    from megatron.mimo.lora import LoraSettings, add_adapters
    from megatron.mimo.models import load_family
    from megatron.mimo.models.common.family import sample_collator
    from megatron.mimo.training.throughput import ThroughputMeter

    model_parallel(tp=layout.tp, pp=layout.pp, cp=layout.cp)
    family = load_family(name)
    config = family.tiny()
    changes = {"context_parallel_size": layout.cp, **layout.changes}
    settings = model_settings(family, config, tp_size=layout.tp, pp_size=layout.pp, changes=changes)
    model = build_model(family, config, settings, device=torch.device("cpu"))
    model.freeze(*frozen)
    if rank:
        add_adapters(model, LoraSettings(modules=("language",), rank=rank))
    generator = torch.Generator().manual_seed(5)
    samples = [family.sample(config, family.example(config, generator)) for _ in range(4)]
    vocab_size = config.get_text_config().vocab_size
    collate = sample_collator(family, config, seq_length=SEQ_LENGTH * 2, vocab_size=vocab_size)
    own = samples[parallel_state.get_data_parallel_rank() :: layout.dp]
    batches = [collate_and_count(collate, [sample]) for sample in own]
    meter = ThroughputMeter([model])
    reading = meter.watched(lambda: iter(batches))()
    for _ in batches:
        next(reading)
    for _ in batches:
        meter.take()
    meter.step()
    return meter.read(), sum(len(sample.token_ids) for sample in samples)


@pytest.fixture(scope="module")
def one_process(ranks: RankPool) -> tuple[Throughput, int]:
    (found,) = ranks(1)(measured, "llava", Layout())
    return found


def test_counts_tokens_and_padding(one_process: tuple[Throughput, int]) -> None:
    found, tokens = one_process
    assert found.tokens_per_iteration == tokens
    assert found.padding == pytest.approx(1 - tokens / (4 * 2 * SEQ_LENGTH))
    assert found.flops_per_iteration is not None
    assert found.flops_per_iteration > 6 * tokens * 60_000


@pytest.mark.parametrize("layout", some(LAYOUTS, "tp2-sp", "pp2", "cp2"))
def test_sums_do_not_depend_on_the_layout(
    ranks: RankPool, one_process: tuple[Throughput, int], layout: str
) -> None:
    expected = one_process[0]
    for found, _ in ranks(LAYOUTS[layout].world_size)(measured, "llava", LAYOUTS[layout]):
        assert found.tokens_per_iteration == expected.tokens_per_iteration
        assert found.padding == pytest.approx(expected.padding)
        assert found.flops_per_iteration == pytest.approx(expected.flops_per_iteration, rel=1e-9)


def test_what_is_frozen_behind_what_is_trained_still_hands_gradients_on(ranks: RankPool) -> None:
    """The second stage holds no trained parameter, and its inputs have gradients."""
    frozen = ("language", "images.encoders")
    ((one, _),) = ranks(1)(measured, "llava", Layout(), frozen)
    for two, _ in ranks(2)(measured, "llava", Layout(pp=2), frozen):
        assert two.flops_per_iteration == pytest.approx(one.flops_per_iteration, rel=1e-9)


def test_adapters_cost_what_they_have_of_parameters(ranks: RankPool) -> None:
    """Beside the frozen language model: three products of each weight with each token."""
    ((plain, tokens),) = ranks(1)(measured, "llava", Layout(), ("language",))
    ((adapted, _),) = ranks(1)(measured, "llava", Layout(), (), 4)
    weights = _adapter_weights(rank=4)
    more = adapted.flops_per_iteration - plain.flops_per_iteration
    assert more == pytest.approx(3 * 2 * weights * tokens, rel=1e-9)
    for found, _ in ranks(2)(measured, "llava", Layout(tp=2), (), 4):
        assert found.flops_per_iteration == pytest.approx(adapted.flops_per_iteration, rel=1e-9)


def _adapter_weights(rank: int) -> int:
    """Of the four linear layers of each layer of the language model."""
    from megatron.mimo.models import load_family

    text = load_family("llava").tiny().text_config
    hidden, inner = text.hidden_size, text.intermediate_size
    keys = text.num_key_value_heads * text.head_dim
    sides = [(hidden, hidden + 2 * keys), (hidden, hidden), (hidden, 2 * inner), (inner, hidden)]
    return text.num_hidden_layers * rank * sum(inputs + outputs for inputs, outputs in sides)
