"""Replacements of functions of megatron-core 0.19 and torch that fail or are unsafe anywhere."""

from __future__ import annotations

from megatron.mimo.backend import job, pickles, stock
from megatron.mimo.backend.capabilities import capabilities
from megatron.mimo.backend.defaults import argument_defaults
from megatron.mimo.backend.patch import Patch, Scope

__all__ = ["DEFECTS"]

DEFECTS: tuple[Patch, ...] = (
    Patch(
        name="jit warm-up",
        target="megatron.training.initialize:_warmup_jit_function",
        reason="compiles what lean layers do not call, before every run; draws from the generator "
        "of the initial weights, how much depends on batch and TP",
        replacement=stock.left_out,
        scope=Scope.PROCESS,
    ),
    Patch(
        name="state of layers for FP8",
        target="megatron.training.checkpointing:_build_sharded_state_dict_metadata",
        reason="a checkpoint says nothing where it need not: Transformer Engine's layers look for "
        "state that megatron-core's never save, and a run cannot move from CPU to GPU",
        replacement=stock.without_extra_state,
        scope=Scope.PROCESS,
    ),
    Patch(
        name="argument defaults",
        target="megatron.training.arguments:parse_args",
        reason="the parser's defaults are for CUDA with Transformer Engine and apex",
        replacement=stock.with_default_arguments(lambda: argument_defaults(capabilities())),
        scope=Scope.PROCESS,
    ),
    Patch(
        name="recomputation without Transformer Engine",
        target="megatron.core.tensor_parallel.random:CheckpointWithoutOutput.__init__",
        reason="its default asks for Transformer Engine's FP8 state, a NameError where it is not",
        replacement=stock.without_fp8_state,
        scope=Scope.PROCESS,
    ),
    Patch(
        name="token count of auxiliary losses",
        target="megatron.core.transformer.moe.router:get_tokens_per_expert_and_token_count",
        reason="with padding, the count of the whole group stands for this rank's, under TP or CP",
        replacement=stock.counting_tokens_of_the_group,
        scope=Scope.PROCESS,
    ),
    Patch(
        name="checkpoint results",
        target="megatron.core.dist_checkpointing.strategies.torch:TorchDistSaveShardedStrategy.save",
        reason="each rank's first save spawns a process that imports torch: seconds and memory",
        replacement=stock.collecting_in_process,
        scope=Scope.PROCESS,
    ),
    Patch(
        name="index of a checkpoint",
        target="torch.distributed.checkpoint.filesystem:FileSystemReader.read_metadata",
        reason="unpickles whatever .metadata holds: who wrote a checkpoint runs code here",
        replacement=pickles.reading_index,
        scope=Scope.PROCESS,
    ),
    Patch(
        name="objects of a checkpoint",
        target="torch.distributed.checkpoint.default_planner:DefaultLoadPlanner.load_bytes",
        reason="unpickles whatever the files hold beside tensors, with weights_only=False",
        replacement=pickles.loading_objects,
        scope=Scope.PROCESS,
    ),
    Patch(
        name="dataset helper",
        target="megatron.training.initialize:_compile_dependencies",
        reason="runs make in a folder whose Makefile the wheel does not ship, and exits",
        replacement=stock.skip_compiling_what_imports,
        scope=Scope.PROCESS,
    ),
    Patch(
        name="checkpoint strides",
        target="megatron.core.dist_checkpointing.strategies.torch"
        ":TorchDistLoadShardedStrategy.load_tensors_metadata",
        reason="passes strides, a tensor property since torch 2.15, to torch.empty: TypeError",
        replacement=stock.without_strides,
        scope=Scope.PROCESS,
    ),
    *(
        Patch(
            name=f"{module}.barrier",
            target=f"{module}:barrier",
            reason="NCCL guesses the device from the rank, and can hang where the guess is wrong",
            replacement=job.naming_the_device,
            scope=Scope.PROCESS,
        )
        for module in ("torch.distributed.distributed_c10d", "torch.distributed")
    ),
    *(
        Patch(
            name=f"leaves in {method}",
            target="megatron.core.optimizer.distrib_optimizer:DistributedOptimizer"
            f".load_parameter_state_from_{method}",
            reason="copies fp32 weights into leaves of the autograd graph, and raises",
            replacement=stock.without_gradients,
            scope=Scope.PROCESS,
        )
        for method in ("dp_reshardable", "dp_zero", "dp_zero_legacy")
    ),
    *(
        Patch(
            name=f"empty state of {kind}",
            target=f"megatron.core.optimizer.optimizer:{kind}.load_state_dict",
            reason="an optimizer without parameters, of a stage that trains nothing, has a state "
            "that is empty, and that a checkpoint leaves out: KeyError",
            replacement=stock.taking_no_state_as_empty,
            scope=Scope.PROCESS,
        )
        for kind in ("Float16OptimizerWithFloat16Params", "FP32Optimizer")
    ),
)
"""What :func:`megatron.mimo.backend.cpu.apply_defect_patches` puts in place, in this order."""
