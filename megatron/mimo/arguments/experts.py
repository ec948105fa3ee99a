"""Refuses what mixtures of experts cannot do, before any work is done.

Part of ``layout``: the same message on every rank, in the first second.
"""

from __future__ import annotations

from argparse import Namespace

from megatron.core.models.mimo.errors import ConfigError

__all__ = ["check_experts"]


def check_experts(args: Namespace) -> None:
    """Check experts against the expert-, tensor- and data-parallel sizes.

    Raises:
        ConfigError: naming the sizes that do not fit.
    """
    experts, ep = args.num_experts, args.expert_model_parallel_size
    if ep < 1:
        raise ConfigError(f"--expert-model-parallel-size {ep}: must be at least 1")
    if not experts:
        if ep > 1:
            raise ConfigError(
                f"--expert-model-parallel-size {ep} without experts; give --num-experts, a "
                f"multiple of {ep}"
            )
        return
    if experts % ep:
        raise ConfigError(
            f"{experts} experts cannot be divided by expert-parallel size {ep}; use a "
            "--num-experts that is a multiple of it"
        )
    tp, pp = args.tensor_model_parallel_size, args.pipeline_model_parallel_size
    etp = args.expert_tensor_parallel_size or tp
    across = args.world_size // pp
    if across % (ep * etp):
        raise ConfigError(
            f"the {across} processes of a pipeline stage cannot be divided by expert-parallel "
            f"size {ep} * expert tensor-parallel size {etp} = {ep * etp}; change either "
            "(--expert-tensor-parallel-size is the tensor-parallel size by default)"
        )
    if tp > 1 and not args.sequence_parallel:
        raise ConfigError(
            f"experts with tensor-parallel size {tp} need sequence parallelism; add "
            "--sequence-parallel"
        )
    if args.add_bias_linear and args.transformer_impl == "local":
        raise ConfigError(
            "experts with biases do not run on megatron-core's local layers; add "
            "--disable-bias-linear"
        )
    uneven = etp > 1 and args.moe_token_dispatcher_type == "alltoall"
    if uneven and args.distributed_backend == "gloo":
        raise ConfigError(
            f"--moe-token-dispatcher-type alltoall with expert tensor-parallel size {etp} gathers "
            "unequal parts, which gloo cannot; use --expert-tensor-parallel-size 1 or "
            "--moe-token-dispatcher-type allgather"
        )
