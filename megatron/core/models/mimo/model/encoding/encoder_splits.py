"""Which encoders' work is divided, and over which ranks; decided when the model is built."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import nn
from torch.distributed import ProcessGroup

from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.models.mimo.comm.encoder_split import EncoderSplit, Gradients, Sharers
from megatron.core.models.mimo.config import MimoModelConfig
from megatron.core.models.mimo.config.base_configs import language_config
from megatron.core.models.mimo.errors import ConfigError, UnsupportedError
from megatron.core.models.mimo.submodules.base import ModalitySubmodules

_GRADIENTS: Mapping[str, Gradients] = {"cp": "shares", "tp": "copies"}


def split_encoders(
    submodules: nn.ModuleDict,
    mimo_config: MimoModelConfig,
    cp_group: ProcessGroup | None,
    tp_group: ProcessGroup | None,
) -> None:
    """Let encoders run on a part of their inputs, as ``mimo_config.encoder_split`` says.

    Parameters of an encoder that is split over tensor-parallel ranks get Megatron's mark that
    ``finalize_model_grads`` has to average their gradients over these.

    Args:
        submodules: modality -> ``ModalitySubmodules``.
        mimo_config: what the model is built from.
        cp_group: context-parallel ranks; None for Megatron's global group.
        tp_group: tensor-parallel ranks; None for Megatron's global group.

    Raises:
        ConfigError: an encoder that cannot be split as ``encoder_split`` names it.
    """
    config = language_config(mimo_config)
    groups = {}
    if config.context_parallel_size > 1:
        groups["cp"] = cp_group or parallel_state.get_context_parallel_group()
    if config.tensor_model_parallel_size > 1:
        groups["tp"] = tp_group or parallel_state.get_tensor_model_parallel_group()
    for modality, submodule in submodules.items():
        mode = mimo_config.encoder_split_of(modality)
        if mode == "never" or not isinstance(submodule, ModalitySubmodules):
            continue
        for name, encoder in submodule.encoders.items():
            sharers = _choose(mode, modality, name, submodule, groups)
            if sharers:
                submodule.encoder_calls[name] = EncoderSplit(sharers=sharers)
            if any(map(_needs_averaging, sharers)):
                for parameter in encoder.parameters():
                    parameter.average_gradients_across_tp_domain = True  # type: ignore[attr-defined]


def _choose(
    mode: str,
    modality: str,
    name: str,
    submodule: ModalitySubmodules,
    groups: Mapping[str, ProcessGroup],
) -> tuple[Sharers, ...]:
    """The groups over which one encoder is split, the outer one first."""
    sharers = []
    for group_name, group in groups.items():
        if mode != "auto" and group_name not in mode.split("-"):
            continue
        reason = _why_not(submodule, submodule.encoders[name], group_name)
        if reason is None:
            sharers.append(Sharers(group=group, gradients=_GRADIENTS[group_name]))
        elif mode != "auto":
            raise ConfigError(
                f"encoder {name!r} of {modality!r} cannot be split over {group_name}: {reason}; "
                f"change encoder_split = {mode!r} in MimoModelConfig"
            )
    return tuple(sharers)


def leave_out_unreduced_ranks(modality: str, submodule: nn.Module, config: MimoModelConfig) -> None:
    """Split over tensor-parallel ranks only where their gradients are averaged afterwards.

    ``finalize_model_grads`` of the whole model does that. A modality that has a data-parallel
    wrapper of its own is finalised by the script, which may not: "auto" then leaves these ranks
    out.

    Raises:
        UnsupportedError: the split was asked for by name.
    """
    if not isinstance(submodule, DistributedDataParallel):
        return
    inner = submodule.module
    for name, call in getattr(inner, "encoder_calls", {}).items():
        if not isinstance(call, EncoderSplit):
            continue
        kept = tuple(entry for entry in call.sharers if not _needs_averaging(entry))
        trained = any(parameter.requires_grad for parameter in inner.encoders[name].parameters())
        if len(kept) == len(call.sharers) or not trained:
            continue
        mode = config.encoder_split_of(modality)
        if mode != "auto":
            raise UnsupportedError(
                f"encoder {name!r} of {modality!r} is split over tensor-parallel ranks "
                f"(encoder_split = {mode!r}) and trained in a data-parallel wrapper of its own, "
                "which does not sum gradients over them; wrap the model as a whole, or use 'cp', "
                "'auto' or 'never'"
            )
        inner.encoder_calls[name] = replace(call, sharers=kept)


def _needs_averaging(sharers: Sharers) -> bool:
    return sharers.gradients == "copies"


def _why_not(submodule: ModalitySubmodules, encoder: nn.Module, group_name: str) -> str | None:
    """Why an encoder cannot be split over a group; None where it can."""
    if type(submodule).encode is not ModalitySubmodules.encode:
        return f"{type(submodule).__name__} has an encode of its own"
    if not hasattr(encoder, "rows_per_item"):
        return f"{type(encoder).__name__} has no rows_per_item, which tells the rows of each item"
    if group_name == "cp":
        size = getattr(getattr(encoder, "config", None), "context_parallel_size", 1)
        return None if size == 1 else f"its own context_parallel_size is {size}"
    for name, parameter in encoder.named_parameters():
        for mark in ("tensor_model_parallel", "sequence_parallel"):
            if getattr(parameter, mark, False):
                return f"it is parallel over these ranks itself ({mark} is set on {name})"
    return None
