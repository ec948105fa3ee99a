"""Finds what differs between a command and the run that wrote the checkpoint that it loads.

Most of it is known from the arguments in the checkpoint before a model is built
(``check_command``). What is left, such as a recipe that builds another model now, is found when
loading has failed (``explain``): names and shapes of weights, on both sides.
"""

from __future__ import annotations

import re
import warnings
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron.core.models.mimo.errors import ConfigError

__all__ = ["check_command", "explain", "what_moved"]

# argument -> flag. Those of the model decide which weights there are, and their shapes.
_MODEL = {
    name: "--" + name.replace("_", "-")
    for name in (
        "num_layers",
        "hidden_size",
        "ffn_hidden_size",
        "num_attention_heads",
        "num_query_groups",
        "kv_channels",
        "vocab_size",
        "swiglu",
        "normalization",
        "add_qkv_bias",
        "qk_layernorm",
        "multi_latent_attention",
        "num_experts",
        "moe_ffn_hidden_size",
        "moe_shared_expert_intermediate_size",
        "moe_layer_freq",
        "mtp_num_layers",
        "untie_embeddings_and_output_weights",
    )
} | {"add_bias_linear": "--disable-bias-linear"}
_NEGATED = {"add_bias_linear"}  # the flag says the opposite of the argument
# Those of the optimizer decide which state there is, or are kept in it and would not change.
_OPTIMIZER = {
    name: "--" + name.replace("_", "-")
    for name in (
        "freeze",
        "optimizer",
        "use_distributed_optimizer",
        "fp16",
        "bf16",
        "use_precision_aware_optimizer",
        "lr",
        "min_lr",
        "decoupled_lr",
        "decoupled_min_lr",
        "module_lr",
        "module_wd",
    )
}
_OF_OPTIMIZER = {  # --optimizer -> what only it reads
    "adam": ("adam_beta1", "adam_beta2", "adam_eps"),
    "sgd": ("sgd_momentum",),
    "lion": ("lion_beta1", "lion_beta2"),
    "muon": ("muon_momentum", "adam_beta1", "adam_beta2", "adam_eps"),
}
_LAYOUT = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "data_parallel_size")
_ABSENT = object()
_SHOWN = 200  # characters of an error's text


def check_command(args: Namespace, saved: Namespace, folder: Path, *, goes_on: bool) -> str | None:
    """Compare the command with the one that wrote a checkpoint; may change ``args``.

    Args:
        args: parsed arguments.
        saved: those in the checkpoint.
        folder: the checkpoint's.
        goes_on: the run goes on with the checkpoint's optimizer and iteration, and does not only
            take its weights.

    Returns:
        A note for the user on a checkpoint that loads nevertheless, or None.

    Raises:
        ConfigError: naming what differs, and the flag that helps.
    """
    differing = _differences(args, saved, _MODEL)
    if differing:
        raise ConfigError(
            f"{_sentence(differing, f'the model in {folder}')}; give the same, or begin with "
            "another model: another --output, and no --load"
        )
    _check_format(args, saved, folder)
    if not goes_on:
        return None
    said = []
    if getattr(saved, "no_save_rng", False) and not args.no_load_rng:
        args.no_load_rng = True
        said.append(f"{folder} has no state of generators (--no-save-rng): they start anew")
    if not args.no_load_optim:
        said += _check_optimizer(args, saved, folder)
    return "; ".join(said) or None


def what_moved(args: Namespace, saved: Namespace) -> str | None:
    """Settings with which a run goes on differently than so far, though everything loads.

    Args:
        args: parsed arguments of a run that goes on.
        saved: those of the run so far.
    """
    said = []
    old, new = (getattr(of, "global_batch_size", None) for of in (saved, args))
    done = getattr(saved, "consumed_train_samples", 0)
    if old and new and old != new and args.train_samples is None:
        said.append(
            f"--global-batch-size is {new} and was {old}: the learning-rate schedule counts "
            f"samples, and goes on where iteration {done / new:g} of {args.train_iters} stands"
        )
    for name in ("seed", "seq_length", "pack", "data_path", "train_data_path"):
        ours, theirs = getattr(args, name, None), getattr(saved, name, _ABSENT)
        if theirs is not _ABSENT and ours != theirs:
            said.append(
                f"{_phrase(name, '--' + name.replace('_', '-'), ours, theirs)}: "
                "the samples that follow are not those that would have"
            )
    return "; ".join(said) or None


def explain(error: BaseException, chunks: Sequence[Any], folder: str | None) -> str:
    """Why a checkpoint was not loaded: what differs from the model, or the error in short.

    Args:
        error: what loading raised.
        chunks: this rank's part of the model, unwrapped.
        folder: the checkpoint's; None where it is not known.
    """
    found = None if folder is None else _differing_weights(chunks, folder)
    if found is not None:
        return found
    return (
        f"{_short(error)}; it is damaged or of another model: choose another one with "
        "--ckpt-step, or another --output"
    )


def _differences(
    args: Namespace, saved: Namespace, flags: Mapping[str, str]
) -> list[tuple[str, str, Any, Any]]:
    found = []
    for name, flag in flags.items():
        ours, theirs = _value(args, name), _value(saved, name)
        if ours is _ABSENT or theirs is _ABSENT:
            continue  # from before there was such an argument
        if isinstance(ours, list) and isinstance(theirs, list):
            ours, theirs = sorted(ours), sorted(theirs)
        if (ours or None) != (theirs or None):
            found.append((name, flag, ours, theirs))
    return found


def _value(args: Namespace, name: str) -> Any:
    if name == "num_query_groups" and not getattr(args, "group_query_attention", False):
        return None  # a value that Megatron fills in when it builds a model
    return getattr(args, name, _ABSENT)


def _check_format(args: Namespace, saved: Namespace, folder: Path) -> None:
    ours, theirs = args.ckpt_format, getattr(saved, "ckpt_format", args.ckpt_format)
    if ours != theirs and not args.auto_detect_ckpt_format:
        raise ConfigError(
            f"--ckpt-format is {ours} and {folder} is in the format {theirs}; give --ckpt-format "
            f"{theirs}"
        )
    if ours != "torch":
        return
    names = _LAYOUT if args.use_distributed_optimizer else _LAYOUT[:2]
    differing = _differences(args, saved, {n: "--" + n.replace("_", "-") for n in names})
    if differing:
        raise ConfigError(
            f"{_sentence(differing, f'the checkpoint {folder}')}; --ckpt-format torch goes on in "
            "the same layout only, torch_dist (the default) in any"
        )


def _check_optimizer(args: Namespace, saved: Namespace, folder: Path) -> list[str]:
    if getattr(saved, "no_save_optim", False):
        if not args.no_save_optim:
            raise ConfigError(
                f"{folder} has no state of the optimizer: it was written with --no-save-optim; "
                "add --no-load-optim, with which optimizer and learning-rate schedule start anew"
            )
        args.no_load_optim = True
        return [
            f"{folder} has no state of the optimizer (--no-save-optim): optimizer and "
            "learning-rate schedule start anew"
        ]
    own = _OF_OPTIMIZER.get(args.optimizer, ()) if args.optimizer == saved.optimizer else ()
    flags = _OPTIMIZER | {name: "--" + name.replace("_", "-") for name in own}
    if args.num_experts and not _reshards(args, saved):
        flags |= {"expert_model_parallel_size": "--expert-model-parallel-size"}
    differing = _differences(args, saved, flags)
    if differing:
        raise ConfigError(
            f"{_sentence(differing, f'the optimizer in {folder}')}; give the same, or go on with "
            "the weights and a new optimizer: --no-load-optim, or take the weights alone for "
            f"another run that begins at step 0: --finetune --load {args.load} --output ..."
        )
    return []


def _reshards(args: Namespace, saved: Namespace) -> bool:
    """Whether the optimizer's state is kept by parameter, and so loads in any layout."""
    by_buckets = saved.use_distributed_optimizer and not getattr(
        saved, "dist_ckpt_optim_fully_reshardable", False
    )
    return args.ckpt_format != "torch" and not by_buckets


def _sentence(differing: Sequence[tuple[str, str, Any, Any]], what: str) -> str:
    first, *rest = differing
    name, flag, ours, theirs = first
    text = f"{flag} is {_text(name, ours)} and {what} was made with {_text(name, theirs)}"
    return ", ".join([text, *(_phrase(*other) for other in rest)])


def _phrase(name: str, flag: str, ours: Any, theirs: Any) -> str:
    return f"{flag} is {_text(name, ours)} and was {_text(name, theirs)}"


def _text(name: str, value: Any) -> str:
    if isinstance(value, bool) or (value is None and name in _NEGATED):
        return "on" if bool(value) != (name in _NEGATED) else "off"
    if value is None or value == []:
        return "not given"
    if isinstance(value, list | tuple):
        return " ".join(f"{v[0]}={v[1]:g}" if isinstance(v, tuple) else str(v) for v in value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def _differing_weights(chunks: Sequence[Any], folder: str) -> str | None:
    """Compare this rank's weights with the checkpoint's; None where all fit, or none are known."""
    from megatron.core.dist_checkpointing import load_tensors_metadata

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs = load_tensors_metadata(folder)
        ours = {tensor.key: tensor for chunk in chunks for tensor in _tensors(chunk)}
    except Exception:  # noqa: BLE001 - damaged, or not a distributed checkpoint
        return None
    lacking = sorted(key for key in ours if key not in theirs)
    reshaped = sorted(
        key
        for key, tensor in ours.items()
        if key in theirs
        and not tensor.allow_shape_mismatch
        and tuple(tensor.global_shape) != tuple(theirs[key].global_shape)
    )
    said = []
    if lacking:
        said.append(f"{len(lacking)} weights of the model are not in it, such as {lacking[0]}")
    if reshaped:
        key = reshaped[0]
        said.append(
            f"{len(reshaped)} weights have other shapes, such as {key}: "
            f"{list(ours[key].global_shape)} here, {list(theirs[key].global_shape)} there"
        )
    if not said:
        return None
    return (
        f"it is of another model: {' and '.join(said)}; give the recipe and flags that it was "
        "trained with, or another --output"
    )


def _tensors(chunk: Any) -> list[Any]:
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

    state = {"model": chunk.sharded_state_dict()}
    apply_factories(state)
    return [value for value in nested_values(state) if isinstance(value, ShardedTensor)]


def _short(error: BaseException) -> str:
    """The error's last cause in one line: Megatron's own text is pages of keys."""
    causes = re.findall(r"^(\w*(?:Error|Exception): .*)$", str(error), flags=re.MULTILINE)
    text = causes[-1] if causes else f"{type(error).__name__}: {error}"
    text = " ".join(text.split())
    return text if len(text) <= _SHOWN else text[:_SHOWN] + " ..."
