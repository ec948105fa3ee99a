"""Refuses what interleaved pipelines cannot do, before any work is done.

Part of ``layout``: the same message on every rank, in the first second.
"""

from __future__ import annotations

from argparse import Namespace

from megatron.core.models.mimo.errors import ConfigError

__all__ = ["check_interleaving"]


def check_interleaving(args: Namespace) -> None:
    """Check the chunks of an interleaved pipeline against stages, layers and micro-batches.

    Raises:
        ConfigError: naming the sizes that do not fit.
    """
    per_chunk = args.num_layers_per_virtual_pipeline_stage
    per_stage = args.num_virtual_stages_per_pipeline_rank
    pp = args.pipeline_model_parallel_size
    if per_chunk is None and per_stage is None:
        return
    flag = "--num-layers-per-virtual-pipeline-stage"
    if per_chunk is not None and per_stage is not None:
        raise ConfigError(
            f"{flag} {per_chunk} and --num-virtual-stages-per-pipeline-rank {per_stage} say the "
            "same in two ways; give one of them"
        )
    if per_chunk is None:
        flag = "--num-virtual-stages-per-pipeline-rank"
    given = f"{flag} {per_stage if per_chunk is None else per_chunk}"
    if (per_stage if per_chunk is None else per_chunk) < 1:
        raise ConfigError(f"{given}: must be at least 1")
    if pp == 1:
        raise ConfigError(
            f"{given} with pipeline-parallel size 1: chunks are interleaved over pipeline stages; "
            "use --pipeline-model-parallel-size 2 or more, or leave the flag away"
        )
    if per_chunk is not None and args.num_layers and args.num_layers % pp == 0:
        layers = args.num_layers // pp
        if layers % per_chunk:
            fits = ", ".join(str(size) for size in range(1, layers) if layers % size == 0) or "none"
            raise ConfigError(
                f"{given}: {args.num_layers} layers on {pp} pipeline stages are {layers} each, "
                f"which cannot be cut into chunks of {per_chunk}; sizes that fit: {fits}"
            )
    if pp == 2 and not args.overlap_p2p_comm:
        raise ConfigError(
            f"{given} with pipeline-parallel size 2 and --no-overlap-p2p-communication: messages "
            "in both directions between the same two ranks would be mistaken for each other; "
            "leave --no-overlap-p2p-communication away"
        )
    _check_micro_batches(args, given, pp)


def _check_micro_batches(args: Namespace, given: str, pp: int) -> None:
    sizes = args.tensor_model_parallel_size * pp * args.context_parallel_size
    each = args.micro_batch_size * (args.world_size // sizes)
    group = args.microbatch_group_size_per_vp_stage
    if not args.global_batch_size or args.global_batch_size % each or group not in (None, pp):
        return
    count = args.global_batch_size // each
    if count % pp:
        raise ConfigError(
            f"{given}: {count} micro-batches per step and data-parallel rank are not a multiple of "
            f"{pp} pipeline stages; use a --global-batch-size that is a multiple of {each * pp}"
        )
