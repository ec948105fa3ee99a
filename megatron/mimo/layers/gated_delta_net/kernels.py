"""The convolution and the rule over whole rows, in PyTorch or by ``fla`` on a GPU's kernels.

Legend: as ``delta_rule`` and ``token_functions``.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from megatron.mimo.backend import capabilities
from megatron.mimo.layers.gated_delta_net.delta_rule import gated_delta_rule
from megatron.mimo.layers.gated_delta_net.documents import Documents
from megatron.mimo.layers.gated_delta_net.token_functions import causal_convolution, gated_norm

__all__ = ["Kernels", "PyTorchKernels", "kernels_here"]


class Kernels(Protocol):
    """Ways to compute the three expensive steps of the layer."""

    def convolve(
        self,
        x_BTGF: Tensor,
        weight_GFJ: Tensor,
        *,
        history_BJGF: Tensor | None,
        documents: Documents | None,
    ) -> Tensor:
        """See ``causal_convolution``."""

    def delta_rule(
        self,
        q_BTGK: Tensor,
        k_BTGK: Tensor,
        v_BTGRV: Tensor,
        decay_BTGR: Tensor,
        strength_BTGR: Tensor,
        *,
        documents: Documents | None,
        state_BGRKV: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """See ``gated_delta_rule``; no state is given back for packed rows."""

    def norm(self, x_BTGRV: Tensor, gate_BTGRV: Tensor, weight_V: Tensor, epsilon: float) -> Tensor:
        """See ``gated_norm``."""


class PyTorchKernels:
    """On any device, in a fixed order of sums."""

    def convolve(
        self,
        x_BTGF: Tensor,
        weight_GFJ: Tensor,
        *,
        history_BJGF: Tensor | None,
        documents: Documents | None,
    ) -> Tensor:
        """See ``causal_convolution``."""
        position_T = None if documents is None else documents.position_T
        return causal_convolution(
            x_BTGF, weight_GFJ, history_BJGF=history_BJGF, position_T=position_T
        )

    def delta_rule(
        self,
        q_BTGK: Tensor,
        k_BTGK: Tensor,
        v_BTGRV: Tensor,
        decay_BTGR: Tensor,
        strength_BTGR: Tensor,
        *,
        documents: Documents | None,
        state_BGRKV: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """See ``gated_delta_rule``."""
        return gated_delta_rule(
            q_BTGK,
            k_BTGK,
            v_BTGRV,
            decay_BTGR,
            strength_BTGR,
            documents_T=None if documents is None else documents.number_T,
            state_BGRKV=state_BGRKV,
        )

    def norm(self, x_BTGRV: Tensor, gate_BTGRV: Tensor, weight_V: Tensor, epsilon: float) -> Tensor:
        """See ``gated_norm``."""
        return gated_norm(x_BTGRV, gate_BTGRV, weight_V, epsilon)


def kernels_here(*, deterministic: bool) -> Kernels:
    """flash-linear-attention's where the package can be used on this process's GPU, else PyTorch's.

    Args:
        deterministic: only sums in a fixed order will do.
    """
    if capabilities().device != "cpu" and not deterministic:
        from megatron.mimo.layers.gated_delta_net import fla

        if fla.is_usable():
            return fla.FlaKernels()
    return PyTorchKernels()
