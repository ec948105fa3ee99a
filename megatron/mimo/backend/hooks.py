"""What the layers above the backend replace: in Megatron's training loop, and in single objects.

The stand-ins are where they are needed; ``replaced`` and ``replace_in`` put them in place.
"""

from __future__ import annotations

from megatron.mimo.backend.patch import Patch, Scope

__all__ = ["ADAM", "HOOKS"]

_LOOP = "megatron.training.training"


def _of_loop(name: str, reason: str) -> Patch:
    return Patch(name=name, target=f"{_LOOP}:{name}", reason=reason, scope=Scope.RUN)


TRAIN = _of_loop("train", "the clock starts; a last iteration that was skipped is saved")
TRAINING_LOG = _of_loop("training_log", "the progress line and the loss curve")
EVALUATION = _of_loop(
    "evaluate_and_print_results", "the clock pauses; the same weights are evaluated once"
)
EVALUATE = _of_loop("evaluate", "what an evaluation has found is said, on all pipeline stages")
SAVE = _of_loop(
    "save_checkpoint", "an atomic end, an error that helps, and old checkpoints are removed"
)
LOAD = _of_loop("load_checkpoint", "why a checkpoint cannot be loaded; where the run goes on")
OPTIMIZER = _of_loop(
    "get_megatron_optimizer",
    "rates by part of the model; state that is whole in every checkpoint",
)
WRAP = _of_loop(
    "wrap_model_chunks_with_ddp", "modules with grids of their own are wrapped one by one"
)
SCHEDULE = _of_loop(
    "get_forward_backward_func", "encoders on grids of their own run around the schedule"
)
MODEL_PARALLEL = Patch(
    name="initialize_model_parallel",
    target="megatron.core.parallel_state:initialize_model_parallel",
    reason="modules on ranks of their own have Megatron's global groups of their own",
    scope=Scope.RUN,
)
LOADERS = _of_loop(
    "build_train_valid_test_data_loaders",
    "ranks of encoders alone take part chunk by chunk, as interleaved stages do",
)
RANDOM_STATE = Patch(
    name="random state of a rank",
    target="megatron.training.checkpointing:get_rng_state",
    reason="ranks of encoders alone have no generator that a checkpoint would keep",
    scope=Scope.RUN,
)
RERUN_MACHINE = Patch(
    name="rerun machine",
    target="megatron.core.rerun_state_machine:RerunStateMachine",
    reason="where a value that is not finite came from; a run that ends by one can go on",
    scope=Scope.RUN,
)
FINALIZE = _of_loop("finalize_model_grads", "--profile names what reduces the gradients")
BACKWARD = Patch(
    name="backward of a micro-batch",
    target="megatron.core.pipeline_parallel.schedules:backward_step",
    reason="--profile names it",
    scope=Scope.RUN,
)
PROFILER = Patch(
    name="profiler",
    target="torch.profiler:profile",
    reason="what Megatron makes of it counts steps from the start of the process, and only traces",
    scope=Scope.RUN,
)
STEP = Patch(
    name="step of the optimizer",
    target="megatron.core.optimizer.optimizer:MegatronOptimizer.step",
    reason="--profile names it",
    scope=Scope.OBJECT,
)
TRACKER_NAME = Patch(
    name="tracker file",
    target="megatron.training.checkpointing:get_checkpoint_tracker_filename",
    reason="a checkpoint's number is written beside its place, and moved there when it is whole",
    scope=Scope.CALL,
)
ASYNC_SAVE = Patch(
    name="asynchronous save",
    target="megatron.core.dist_checkpointing:save",
    reason="its writers hash what they have written, and the manifest is there before the tracker",
    scope=Scope.CALL,
)
RESULTS_QUEUE = Patch(
    name="results queue",
    target="megatron.core.dist_checkpointing.strategies.filesystem_async:_results_queue",
    reason="each rank's first save spawns a process that holds the queue; writers here are threads",
    scope=Scope.CALL,
)
ARGUMENTS = Patch(
    name="command line",
    target="sys:argv",
    reason="Megatron's parser reads no other, and a run can be given one",
    scope=Scope.CALL,
)
PIXELS = Patch(
    name="pixels of a picture",
    target="PIL.Image:MAX_IMAGE_PIXELS",
    reason="Pillow's limit warns or raises before this project's says what to do",
    scope=Scope.CALL,
)
LAYERS_APART = Patch(
    name="state of partly frozen stacks",
    target="megatron.core.optimizer.optimizer:MegatronOptimizer.sharded_state_dict",
    reason="a stack is one tensor with a layer axis, and one with gaps is refused",
    scope=Scope.OBJECT,
)
ZERO_STATE = Patch(
    name="state of an optimizer",
    target="megatron.core.optimizer.optimizer:MegatronOptimizer.init_state_fn",
    reason="None for SGD, and of Transformer Engine's precision-aware Adam without an argument: "
    "TypeError on loading a checkpoint",
    scope=Scope.OBJECT,
)
EXPERTS_STATE = Patch(
    name="state of experts",
    target="megatron.core.optimizer.optimizer:ChainedOptimizer.load_state_dict",
    reason="experts that are divided over ranks have an optimizer of their own, others have not",
    scope=Scope.OBJECT,
)
EXIT = Patch(
    name="os._exit",
    target="os:_exit",
    reason="code that leaves a rank so is named, by file and line, in the job's last line",
    scope=Scope.PROCESS,
)
PARSER_ERROR = Patch(
    name="errors of the parser",
    target="argparse:ArgumentParser.error",
    reason="ends the process; every rank has to refuse alike, with the nearest flag named",
    scope=Scope.OBJECT,
)
ADAPTED = Patch(
    name="layers with an adapter",
    target="torch.nn:Module.__class__",
    reason="a layer that has an adapter stays the layer it is; merging gives it its class back",
    scope=Scope.OBJECT,
)

_OPTIMIZERS = "megatron.core.optimizer"
_DISTRIBUTED = "megatron.core.optimizer.distrib_optimizer"
_FLAG = (
    "without Transformer Engine and apex: together these say that Adam takes adam_w_mode and that "
    "its groups hold the step"
)


def _of_adam(target: str, reason: str) -> Patch:
    module, _, attribute = target.partition(":")
    name = f"{attribute} of {module.rpartition('.')[2]}"
    return Patch(name=name, target=target, reason=reason, scope=Scope.PROCESS)


ADAM = (
    _of_adam(
        f"{_OPTIMIZERS}:Adam",
        "without Transformer Engine and apex: torch's counts steps by parameter, and the "
        "distributed optimizer cannot put those back",
    ),
    _of_adam(f"{_DISTRIBUTED}:Adam", "the same, of the distributed optimizer"),
    _of_adam(
        f"{_OPTIMIZERS}:SGD",
        "without Transformer Engine and apex: what stands there else is theirs",
    ),
    _of_adam(f"{_DISTRIBUTED}:USING_TE_OPTIMIZER", _FLAG),
    _of_adam(f"{_OPTIMIZERS}:USING_PYTORCH_OPTIMIZER", _FLAG),
    _of_adam(f"{_DISTRIBUTED}:HAVE_APEX_OR_TE", _FLAG),
    _of_adam(f"{_DISTRIBUTED}:USING_APEX_OPTIMIZER", _FLAG),
)
"""What :func:`megatron.mimo.layers.install_adam` puts in place, without a kernel for Adam."""

HOOKS = (
    *(TRAIN, TRAINING_LOG, EVALUATION, EVALUATE, SAVE, LOAD, OPTIMIZER, WRAP, SCHEDULE),
    *(MODEL_PARALLEL, LOADERS, RANDOM_STATE, RERUN_MACHINE, FINALIZE, BACKWARD, PROFILER),
    *(TRACKER_NAME, ASYNC_SAVE, RESULTS_QUEUE, ARGUMENTS, PIXELS),
    *(LAYERS_APART, ZERO_STATE, EXPERTS_STATE, PARSER_ERROR, ADAPTED, STEP, EXIT),
)
"""What is in place for the time of a run or a call, or in one object."""
