"""Nothing waits for the device with a plan, and CUDA graphs find the layers to capture."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

from tests.distributed.core.layouts import Layout, build_chunks, model_inputs, wrap_chunks
from tests.distributed.core.reference import Design, make_batches
from tests.rank_pool import RankPool, model_parallel
from tests.tiers import some

# Of one family each; packed sequences are in test_documents_refusals.
FAMILIES = {
    "one-rank": (Layout(), Design()),
    "tp": (Layout(tp=2), Design(tied=True)),
    "tp-sp": (Layout(tp=2, sequence_parallel=True), Design(learned_positions=True)),
    "cp": (Layout(cp=2), Design()),
    "cp-tp-sp-mrope": (Layout(cp=2, tp=2, sequence_parallel=True), Design(mrope=True)),
    "spans": (Layout(cp=2), Design(spans=True)),
    "recomputed-layers": (Layout(recompute="uniform"), Design()),
    "recomputed-projections": (Layout(tp=2, recompute="projections"), Design()),
    "frozen": (Layout(dp=2), Design(frozen=("language", "images.encoders"))),
    "bf16": (Layout(dp=2), Design(bf16=True)),
}


def waits(layout: Layout, design: Design) -> list[Counter[str]]:
    """What waits in forward and backward of micro-batches with images, sounds, both, neither."""
    from megatron.core.models.mimo.partition.utils import sequence_cut
    from tests.distributed.core.device_waits import DeviceWaits

    groups = model_parallel(tp=layout.tp, cp=layout.cp)
    (model,) = build_chunks(layout, design, groups)
    (wrapped,) = wrap_chunks(layout, design, [model])
    batch = make_batches()[0]
    counts = []
    for number in range(0, len(batch), layout.micro_batch):
        inputs = model_inputs(
            batch[number : number + layout.micro_batch],
            layout,
            design,
            dtype=model.config.params_dtype,
            plan=True,
        )
        if model.partition_adapter is not None:  # as the training layer does, on the host
            inputs["alignment_plan"] = sequence_cut(model.partition_adapter, None).share_of_plan(
                inputs["alignment_plan"]
            )
        with DeviceWaits() as counter:
            losses_BS, mask_BS = wrapped(**inputs)
            total = (losses_BS * mask_BS).sum()
            if total.requires_grad:
                total.backward()
        counts.append(counter.counts)
    return counts


@pytest.mark.parametrize(
    "family",
    some(FAMILIES, "tp-sp", "cp-tp-sp-mrope", "spans", "recomputed-layers", "frozen", "bf16"),
)
def test_nothing_waits_for_the_device(ranks: RankPool, family: str) -> None:
    layout, design = FAMILIES[family]
    for counts in ranks(layout.world_size)(waits, layout, design):
        assert counts == [Counter()] * len(counts)
        assert len(counts) == 4


def find_layers(layout: Layout, design: Design) -> tuple[list[int], list[list[int]]]:
    """Layers that capture finds in each chunk, and the micro-batch that replay tells them."""
    from megatron.core.transformer.cuda_graphs import TECudaGraphHelper, set_current_microbatch

    groups = model_parallel(tp=layout.tp, pp=layout.pp, vpp=layout.vpp)
    chunks = build_chunks(layout, design, groups)
    wrapped = wrap_chunks(layout, design, chunks)
    helper: Any = object.__new__(TECudaGraphHelper)  # its constructor asks for Transformer Engine
    helper.model, helper.config = wrapped, chunks[0].config
    helper.tp_group, helper.dp_cp_group = groups.tp, groups.dp_cp
    helper._discover_layers()
    told = []
    for number, (chunk, wrapper) in enumerate(zip(chunks, wrapped, strict=True)):
        set_current_microbatch(wrapper, number + 5)
        told.append([layer.current_microbatch for layer in chunk.language_model.decoder.layers])
    for chunk in helper.chunks_with_decoder:  # what capture asks for the inputs of a layer
        assert chunk.position_embedding_type == "rope"
        assert chunk.rotary_pos_emb(16).size(0) == 16
        assert not hasattr(chunk, "mtp")
        hidden_SBH = torch.zeros(16, 1, 16)
        length = chunk.rotary_pos_emb.get_rotary_seq_len(
            None, chunk.decoder, hidden_SBH, chunk.config, None
        )
        assert length == 16
    return helper.num_layers_per_chunk, told


@pytest.mark.parametrize(
    ("layout", "design", "layers"),
    [(Layout(), Design(), [2]), (Layout(pp=2, vpp=2), Design(layers=8), [2, 2])],
    ids=["one-rank", "pp-vpp"],
)
def test_capture_finds_the_layers(
    ranks: RankPool, layout: Layout, design: Design, layers: list[int]
) -> None:
    for found, told in ranks(layout.world_size)(find_layers, layout, design):
        assert found == layers
        assert told == [[number + 5] * count for number, count in enumerate(layers)]
