"""How many micro-batches the first stage of Megatron's schedules has begun and not finished."""

from __future__ import annotations

from megatron.core.transformer.transformer_config import TransformerConfig


def most_in_flight(config: TransformerConfig, count: int) -> int:
    """The most micro-batches that have passed the first chunk forward, and not backward.

    Without pipelining, in 1F1B, and interleaved.

    Args:
        config: configuration of the language model.
        count: micro-batches in a step.
    """
    stages = config.pipeline_model_parallel_size
    chunks = config.virtual_pipeline_model_parallel_size or 1
    if chunks == 1:
        return min(stages, count)
    group = config.microbatch_group_size_per_vp_stage or stages
    order = [
        chunk
        for start in range(0, count, group)
        for chunk in range(chunks)
        for _ in range(start, min(start + group, count))
    ]
    warm = (stages - 1) * 2 + (chunks - 1) * group
    warm += bool(config.overlap_moe_expert_parallel_comm)
    held = most = 0
    for number, chunk in enumerate(order):
        held += chunk == 0
        most = max(most, held)
        if number >= warm:  # its backward, from the last chunk to the first
            held -= order[number - warm] == chunks - 1
    return most
