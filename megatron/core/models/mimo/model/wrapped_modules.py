"""What Megatron's schedules and training loops ask of the outermost module.

It answers for the language model, and for modules that carry data-parallel wrappers of their own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from megatron.core.distributed import DistributedDataParallel
from megatron.core.utils import unwrap_model

# What schedules, gradient finalisation and CUDA graph capture look up on the outermost module.
_ASKED_OF_LANGUAGE_MODEL = frozenset(
    {
        "decoder",
        "mtp",
        "position_embedding_type",
        "post_process",
        "pre_process",
        "rotary_pos_emb",
        "share_embeddings_and_output_weights",
        "shared_embedding_or_output_weight",
    }
)


def name_wrapped_modules(model: Any, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Hook of ``load_state_dict``: keys of the unwrapped model become those of the wrapped one.

    A wrapper leaves its name out of ``state_dict``, and torch looks for it when loading.
    """
    modules = {} if model.language_model is None else {"language_model": model.language_model}
    for name, submodule in model.modality_submodules.items():
        modules[f"modality_submodules.{name}"] = submodule
    for path, module in modules.items():
        inside, own = "", unwrap_model(module)
        while module is not own:
            inside, module = f"{inside}module.", module.module
        if not inside:
            continue
        start = f"{prefix}{path}."
        for key in [key for key in state_dict if key.startswith(start)]:
            if not key.startswith(start + inside):
                state_dict[start + inside + key.removeprefix(start)] = state_dict.pop(key)


class WrappedModules(nn.Module):
    """Passes on what Megatron asks of the outermost module; a mixin of ``MimoModel``.

    A data-parallel call reaches only wrappers whose overlap option needs it, and is a no-op for a
    model wrapped as a whole.
    """

    language_model: Any  # any Megatron language model; a wrapper of one once a script wraps it
    modality_submodules: nn.ModuleDict

    def __getattr__(self, name: str) -> Any:
        """Answer for the language model where Megatron asks the outermost module."""
        if name in _ASKED_OF_LANGUAGE_MODEL:
            language_model = super().__getattr__("language_model")
            if language_model is None:  # on a rank of encoders alone
                raise AttributeError(f"no language model on this rank has {name!r}")
            return getattr(unwrap_model(language_model), name)
        return super().__getattr__(name)

    def _wrapped(self, option: str | None = None) -> Iterator[Any]:
        for module in (self.language_model, *self.modality_submodules.values()):
            if isinstance(module, DistributedDataParallel) and (
                option is None or getattr(module.ddp_config, option)
            ):
                yield module

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Hold back overlapped gradient reductions, as for all but the last micro-batch."""
        with ExitStack() as stack:
            for module in self._wrapped("overlap_grad_reduce"):
                stack.enter_context(module.no_sync())
            yield

    def enable_forward_pre_hook(self) -> None:
        """Wait for gathered parameters in the forward pass."""
        for module in self._wrapped("overlap_param_gather"):
            module.enable_forward_pre_hook()

    def disable_forward_pre_hook(self, param_sync: bool = True) -> None:
        """Stop waiting for gathered parameters; with ``param_sync``, gather them now."""
        for module in self._wrapped("overlap_param_gather"):
            module.disable_forward_pre_hook(param_sync=param_sync)

    def start_param_sync(
        self, *_: Any, force_sync: bool = False, force_dispatch: bool = False
    ) -> None:
        """Begin to gather parameters; positional arguments of the hook's caller are not needed."""
        for module in self._wrapped("overlap_param_gather"):
            module.start_param_sync(force_sync=force_sync, force_dispatch=force_dispatch)

    def start_grad_sync(self, *_: Any) -> None:
        """Begin to reduce gradients; positional arguments of the hook's caller are not needed."""
        for module in self._wrapped("overlap_grad_reduce"):
            module.start_grad_sync()

    def free_overlap_buffers(self) -> None:
        """Release the buffers of parameter gathering."""
        for module in self._wrapped("overlap_param_gather"):
            module.free_overlap_buffers()

    def zero_grad_buffer(self) -> None:
        """Zero every wrapped module's gradient buffer."""
        for module in self._wrapped():
            module.zero_grad_buffer()
