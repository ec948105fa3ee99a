"""Whose kernels compute the expensive steps: PyTorch's, or flash-linear-attention's on a GPU.

Legend: as ``delta_rule`` and ``token_functions``.
"""

from __future__ import annotations

import functools
import logging
import warnings
from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron.mimo.backend import capabilities
from megatron.mimo.layers.gated_delta_net.decoding import delta_step
from megatron.mimo.layers.gated_delta_net.delta_rule import delta_rule_of_pieces, gated_delta_rule
from megatron.mimo.layers.gated_delta_net.documents import Documents
from megatron.mimo.layers.gated_delta_net.fla_kernels import FlaKernels, is_usable
from megatron.mimo.layers.gated_delta_net.kernel_trial import why_not_equal
from megatron.mimo.layers.gated_delta_net.sizes import Sizes
from megatron.mimo.layers.gated_delta_net.token_functions import causal_convolution, gated_norm

_LOG = logging.getLogger(__name__)

__all__ = ["DeltaRule", "Kernels", "PyTorchKernels", "fast_kernels"]


class Kernels(Protocol):
    """The three steps, over whole rows."""

    def convolve(self, x_BTGF: Tensor, weight_GFJ: Tensor, documents: Documents | None) -> Tensor:
        """See ``causal_convolution``."""

    def delta_rule(
        self,
        q_BTGK: Tensor,
        k_BTGK: Tensor,
        v_BTGRV: Tensor,
        decay_BTGR: Tensor,
        strength_BTGR: Tensor,
        documents: Documents | None,
    ) -> tuple[Tensor, Tensor | None]:
        """See ``gated_delta_rule``; a state for rows that are not packed."""

    def delta_rule_of_pieces(
        self,
        q_BTGK: Tensor,
        k_BTGK: Tensor,
        v_BTGRV: Tensor,
        decay_BTGR: Tensor,
        strength_BTGR: Tensor,
        borders: tuple[int, ...],
        states_BPGRKU: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """See ``delta_rule.delta_rule_of_pieces``."""

    def norm(self, x_BTGRV: Tensor, gate_BTGRV: Tensor, weight_V: Tensor, epsilon: float) -> Tensor:
        """See ``gated_norm``."""


class PyTorchKernels:
    """On any device and in any dtype, in a fixed order of sums.

    Args:
        history_BJGF: what the convolution read before the rows.
        state_BGRKV: before the rows.
    """

    def __init__(
        self, history_BJGF: Tensor | None = None, state_BGRKV: Tensor | None = None
    ) -> None:
        self._history_BJGF = history_BJGF
        self._state_BGRKV = state_BGRKV

    def convolve(self, x_BTGF: Tensor, weight_GFJ: Tensor, documents: Documents | None) -> Tensor:
        """See ``causal_convolution``."""
        position_T = None if documents is None else documents.position_T
        return causal_convolution(
            x_BTGF, weight_GFJ, history_BJGF=self._history_BJGF, position_T=position_T
        )

    def delta_rule(
        self,
        q_BTGK: Tensor,
        k_BTGK: Tensor,
        v_BTGRV: Tensor,
        decay_BTGR: Tensor,
        strength_BTGR: Tensor,
        documents: Documents | None,
    ) -> tuple[Tensor, Tensor]:
        """See ``gated_delta_rule``; one token after others is the recurrence itself."""
        if self._state_BGRKV is not None and v_BTGRV.size(1) == 1:
            tokens = (q_BTGK, k_BTGK, v_BTGRV, decay_BTGR, strength_BTGR)
            q, k, v, decay, strength = (x.squeeze(1) for x in tokens)
            out_BGRV, state = delta_step(q, k, v, decay, strength, self._state_BGRKV)
            return out_BGRV.unsqueeze(1), state
        return gated_delta_rule(
            q_BTGK,
            k_BTGK,
            v_BTGRV,
            decay_BTGR,
            strength_BTGR,
            documents_T=None if documents is None else documents.number_T,
            state_BGRKV=self._state_BGRKV,
        )

    def delta_rule_of_pieces(self, *tokens_and_states: Any) -> tuple[Tensor, Tensor]:
        """See ``delta_rule.delta_rule_of_pieces``."""
        return delta_rule_of_pieces(*tokens_and_states)

    def norm(self, x_BTGRV: Tensor, gate_BTGRV: Tensor, weight_V: Tensor, epsilon: float) -> Tensor:
        """See ``gated_norm``."""
        return gated_norm(x_BTGRV, gate_BTGRV, weight_V, epsilon)


class DeltaRule(nn.Module):
    """The rule as a module of its own, for what counts operations or times modules.

    Attributes:
        operations_per_token: FLOPs of the forward pass, on all ranks that share the layer.
    """

    def __init__(self, operations_per_token: int) -> None:
        super().__init__()
        self.operations_per_token = operations_per_token

    def forward(self, rule: Callable[..., Any], *arguments: Any) -> Any:
        """``rule(*arguments)``, of some kernels."""
        return rule(*arguments)


def fast_kernels(
    dtype: torch.dtype, device: torch.device, *, sizes: Sizes, deterministic: bool
) -> Kernels:
    """flash-linear-attention's where it can be used on this process's GPU, else PyTorch's.

    Before the first use a short row goes through both; where they differ, or the package's fail, a
    warning says so, and PyTorch's are used.

    Args:
        dtype: of the projections; the package's kernels are for half precision.
        device: of the projections.
        sizes: of the layer.
        deterministic: only sums in a fixed order will do.
    """
    here = capabilities()
    on_gpu = here.device != "cpu" and here.flash_linear_attention is not None
    is_half = dtype in (torch.bfloat16, torch.float16)
    if on_gpu and is_half and not deterministic and is_usable() and _trial(sizes, dtype, device):
        return FlaKernels()
    return PyTorchKernels()


@functools.cache
def _trial(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> bool:
    if not dist.is_initialized() or dist.get_rank() == 0:
        _LOG.warning(
            "flash-linear-attention's kernels are tried; a machine that has not run them compiles "
            "them first, for some minutes"
        )
    reason = why_not_equal(FlaKernels(), PyTorchKernels(), sizes=sizes, dtype=dtype, device=device)
    if reason is not None:
        warnings.warn(
            f"flash-linear-attention's kernels were tried and are not used ({reason}): gated "
            "delta nets run on PyTorch's",
            stacklevel=3,
        )
    return reason is None
