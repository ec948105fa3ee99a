"""Replacements for functions of megatron-core and megatron.training."""

from __future__ import annotations

import copy
import functools
import importlib
import queue
from argparse import ArgumentParser
from collections.abc import Callable, Mapping
from types import FunctionType
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from megatron.mimo.backend import torch_view
from megatron.mimo.backend.hooks import RESULTS_QUEUE
from megatron.mimo.backend.patching import replaced


def left_out(_: Any) -> Callable[..., None]:
    """In the place of a function: nothing."""
    return do_nothing


def undecorated(function: Any) -> Any:
    """A decorator that returns the function as it is."""
    return function


def call_now(callback: Callable[[], None], **_: object) -> None:
    """``torch.cuda._lazy_call`` without an initialisation to wait for."""
    callback()


def do_nothing(*_: object, **__: object) -> None:
    """Accepts anything."""


def taken_from(source: str) -> Callable[[Any], Any]:
    """What stands at ``module:name``, whatever the original is."""

    def replacement(_: Any) -> Any:
        module, _, name = source.partition(":")
        return getattr(importlib.import_module(module), name)

    return replacement


class _TypesOfCuda(TorchFunctionMode):
    """Within it ``Tensor.type()`` says of a tensor on the CPU what it says of one on CUDA."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.Tensor.type and isinstance(result, str):
            return result.replace("torch.", "torch.cuda.", 1)
        return result


def naming_types_of_cuda(original: Callable[..., Any]) -> Callable[..., Any]:
    """``original``, to which every tensor's type is one of ``torch.cuda``.

    Of all functions of torch that it calls none returns anything else than before.
    """

    @functools.wraps(original)
    def function(*args: Any, **keywords: Any) -> Any:
        with _TypesOfCuda():
            return original(*args, **keywords)

    return function


def uncompiled(value: Any) -> Any:
    """What ``torch.compile`` was given, of a function that it returned; else ``value`` itself."""
    if isinstance(value, FunctionType):
        return getattr(value, "_torchdynamo_orig_callable", value)
    return value


def uncompiled_in_megatron(original: Callable[..., Any]) -> Callable[..., Any]:
    """``torch.compile``, which gives a function of Megatron back as it is; models are compiled."""

    @functools.wraps(original)
    def compile_others(model: Any = None, **options: Any) -> Any:
        if model is None:
            return functools.partial(compile_others, **options)
        if isinstance(model, FunctionType) and model.__module__.startswith(
            ("megatron.core.", "megatron.training.")
        ):
            return model
        return original(model, **options)

    return compile_others


def without_gradients(original: Callable[..., Any]) -> Callable[..., Any]:
    """``original`` under ``torch.no_grad``."""
    return torch.no_grad()(original)


def taking_no_state_as_empty(original: Callable[[Any, Any], None]) -> Callable[[Any, Any], None]:
    """An optimizer's ``load_state_dict`` to which a state that is not there is an empty one."""

    @functools.wraps(original)
    def load_state_dict(self: Any, state_dict: Any) -> None:
        for level in (state_dict, state_dict.get("optimizer")):
            if isinstance(level, dict) and "param_groups" in level:
                level.setdefault("state", {})
        original(self, state_dict)

    return load_state_dict


def with_default_arguments(
    defaults: Callable[[], Mapping[str, object]],
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A ``parse_args`` whose parser has ``defaults()``; the script's own defaults and flags win."""

    def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def parse_args(
            extra_args_provider: Callable[[ArgumentParser], ArgumentParser] | None = None,
            ignore_unknown_args: bool = False,
        ) -> Any:
            def provider(parser: ArgumentParser) -> ArgumentParser:
                parser.set_defaults(**defaults())
                return extra_args_provider(parser) if extra_args_provider else parser

            return original(provider, ignore_unknown_args)

        return parse_args

    return wrap


def skip_compiling_what_imports(original: Callable[[], None]) -> Callable[[], None]:
    """A ``_compile_dependencies`` that runs ``make`` only when the dataset helper is missing.

    Collective: every rank leaves through one barrier of the whole job, as in the original.
    """

    @functools.wraps(original)
    def compile_dependencies() -> None:
        try:
            importlib.import_module("megatron.core.datasets.helpers_cpp")
        except ImportError:
            original()
        else:
            torch.distributed.barrier()

    return compile_dependencies


def without_strides(original: Callable[..., Any]) -> Callable[..., Any]:
    """A ``load_tensors_metadata`` whose tensor properties torch's factories accept."""

    @functools.wraps(original)
    def load_tensors_metadata(self: Any, checkpoint_dir: Any, metadata: Any = None) -> Any:
        if metadata is None:
            from megatron.core.dist_checkpointing.strategies.torch import _get_filesystem_reader

            metadata = _get_filesystem_reader(checkpoint_dir).read_metadata()
        metadata = copy.copy(metadata)
        metadata.state_dict_metadata = {
            key: _without_strides(entry) for key, entry in metadata.state_dict_metadata.items()
        }
        return original(self, checkpoint_dir, metadata)

    return load_tensors_metadata


def _without_strides(entry: Any) -> Any:
    if not hasattr(entry, "properties"):
        return entry
    entry = copy.copy(entry)
    entry.properties = copy.copy(entry.properties)
    vars(entry.properties).pop("strides", None)
    return entry


def without_extra_state(original: Callable[..., Any]) -> Callable[..., Any]:
    """A ``_build_sharded_state_dict_metadata`` that leaves extra state out without FP8 and FP4."""
    # what imports Megatron waits for the replacements, this module's among them
    from megatron.mimo.backend.own_library import WITHOUT_EXTRA_STATE

    @functools.wraps(original)
    def build_metadata(args: Any, *others: Any, **keywords: Any) -> Any:
        metadata = original(args, *others, **keywords)
        if not args.fp8 and not args.fp4:
            metadata[WITHOUT_EXTRA_STATE] = True
        return metadata

    return build_metadata


def collecting_in_process(original: Callable[..., Any]) -> Callable[..., Any]:
    """A synchronous ``save`` whose writers, threads, report through a queue of this process.

    The original's queue, made for asynchronous saves, lives in a process of its own.
    """

    @functools.wraps(original)
    def save(*args: Any, **keywords: Any) -> Any:
        with replaced({RESULTS_QUEUE: lambda _: queue.Queue()}):
            return original(*args, **keywords)

    return save


def as_numpy_on_cpu(original: Callable[..., Any]) -> Callable[..., Any]:
    """A ``maybe_move_tensor_to_cpu`` that honours ``as_numpy`` for a tensor that is there already.

    gloo takes split sizes as integers; a tensor's elements are none.
    """

    @functools.wraps(original)
    def maybe_move_tensor_to_cpu(
        tensor: Any, as_numpy: bool = False, record_stream: bool = False
    ) -> Any:
        if as_numpy and torch.is_tensor(tensor) and tensor.device.type == "cpu":
            return tensor.numpy()
        return original(tensor, as_numpy, record_stream)

    return maybe_move_tensor_to_cpu


def counting_tokens_of_the_group(original: Callable[..., Any]) -> Callable[..., Any]:
    """A ``get_tokens_per_expert_and_token_count`` that is right with padding.

    The original sums over the group in place and then takes the sum for this rank's own count, so
    that auxiliary losses weigh as many times more as the group has ranks. What it has to be is a
    rank's share of the group's tokens: padding need not be spread evenly.
    """

    @functools.wraps(original)
    def count(
        routing_map: Any, reduce_group: Any, topk: Any = None, with_padding_mask: bool = False
    ) -> Any:
        per_expert, local, total = original(routing_map, reduce_group, topk, with_padding_mask)
        if with_padding_mask:
            local = total / reduce_group.size()
        return per_expert, local, total

    return count


def without_fp8_state(original: Callable[..., None]) -> Callable[..., None]:
    """A ``CheckpointWithoutOutput.__init__`` that knows of FP8 only with Transformer Engine."""

    @functools.wraps(original)
    def initialise(self: Any, *args: Any, **keywords: Any) -> None:
        from megatron.core.tensor_parallel.random import HAVE_TE

        original(self, *args, **keywords)
        self.fp8 = self.fp8 and HAVE_TE

    return initialise


def refill_storage(emptied: torch.Tensor, recomputed: torch.Tensor) -> None:
    """Put what was recomputed into the storage that was emptied: one copy, unseen by autograd."""
    storage, source = emptied.untyped_storage(), recomputed.untyped_storage()
    storage.resize_(source.nbytes())
    storage.copy_(source)


def drawing_from_host(original: Callable[..., Any]) -> Callable[..., Any]:
    """``original`` with its random draws taken from the host's generator."""

    @functools.wraps(original)
    def function(*args: Any, **keywords: Any) -> Any:
        with torch_view.host_generator():
            return original(*args, **keywords)

    return function


def autocast_for_cpu(original: Any) -> Any:
    """An autograd function's ``forward`` or ``backward`` whose autocast device is the CPU.

    ``original`` was decorated with ``torch.amp.custom_fwd``/``custom_bwd(device_type="cuda")``.
    """
    function = original.__func__
    decorate = torch.amp.custom_bwd if function.__name__ == "backward" else torch.amp.custom_fwd
    return staticmethod(decorate(function.__wrapped__, device_type="cpu"))
