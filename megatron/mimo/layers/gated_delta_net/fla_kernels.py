"""The same steps on flash-linear-attention's Triton kernels, for half precision on a GPU.

The package (``pip install megatron-mimo[linear-attention]``) is imported where it is first used:
it brings Triton, and a checkout without it has to import this module.

Legend: as ``kernels``.
"""

from __future__ import annotations

import functools
import importlib
import warnings
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from megatron.mimo.layers.gated_delta_net.documents import Documents

__all__ = ["FlaKernels", "is_usable"]

_PARTS = {
    "fla.modules.causal_conv1d": "causal_conv1d",
    "fla.modules.norm.fused_norm_gate": "rms_norm_gated",
    "fla.ops.gated_delta_rule": "chunk_gated_delta_rule",
}


@functools.cache
def is_usable() -> bool:
    """Whether the installed package has what is called here, and does not refuse this machine.

    Warns where it does not load, or refuses.
    """
    try:
        if not all(hasattr(importlib.import_module(part), name) for part, name in _PARTS.items()):
            return False
        reason = _refusal()
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    if reason is not None:
        warnings.warn(
            f"flash-linear-attention is installed and cannot be used ({reason}): gated delta nets "
            "run on PyTorch's kernels",
            stacklevel=2,
        )
    return reason is None


def _refusal() -> str | None:
    """Why the package refuses a step of its backward pass here, which it says first of all.

    In a backward pass it would say so behind minutes in which the steps before are compiled.
    """
    try:
        step = importlib.import_module("fla.ops.common.chunk_o").chunk_bwd_dqkwg
    except (ImportError, AttributeError):
        return None
    nothing = torch.empty(0)
    try:
        step(*[nothing] * 6, g=nothing)
    except RuntimeError as error:
        message = str(error).strip().splitlines()
        return message[0] if message and "Triton" in message[0] else None
    except Exception:  # noqa: BLE001 - it went on, and found nothing to work on
        return None
    return None


class FlaKernels:
    """flash-linear-attention's. Sums over tokens of a chunk are in half precision's products."""

    def convolve(self, x_BTGF: Tensor, weight_GFJ: Tensor, documents: Documents | None) -> Tensor:
        """See ``causal_convolution``."""
        out_BTD: Tensor
        out_BTD, _ = _function("fla.modules.causal_conv1d")(
            x_BTGF.flatten(2),
            weight_GFJ.flatten(0, 1),
            activation="silu",
            **_borders(documents),
        )
        return out_BTD.unflatten(2, x_BTGF.shape[2:])

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
        out_BTHV, state_BHKV = _function("fla.ops.gated_delta_rule")(
            q_BTGK.contiguous(),
            k_BTGK.contiguous(),
            v_BTGRV.flatten(2, 3),
            decay_BTGR.flatten(2),
            strength_BTGR.flatten(2),
            output_final_state=documents is None,
            use_qk_l2norm_in_kernel=True,
            **_borders(documents),
        )
        heads = v_BTGRV.shape[2:4]
        state = None if state_BHKV is None else state_BHKV.unflatten(1, heads)
        return out_BTHV.unflatten(2, heads), state

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
        """See ``delta_rule.delta_rule_of_pieces``; the pieces of all rows are one packed row."""
        device, host = _sums_of_pieces(borders, q_BTGK.size(0), q_BTGK.device)
        values = F.pad(v_BTGRV, (0, states_BPGRKU.size(-1) - v_BTGRV.size(-1)))
        tokens = (q_BTGK, k_BTGK, values.flatten(2, 3), decay_BTGR.flatten(2))
        out, states = _function("fla.ops.gated_delta_rule")(
            *(one.flatten(0, 1).unsqueeze(0) for one in (*tokens, strength_BTGR.flatten(2))),
            initial_state=states_BPGRKU.flatten(2, 3).flatten(0, 1),
            output_final_state=True,
            use_qk_l2norm_in_kernel=True,
            cu_seqlens=device,
            cu_seqlens_cpu=host,
        )
        return out.view(values.shape), states.view(states_BPGRKU.shape)

    def norm(self, x_BTGRV: Tensor, gate_BTGRV: Tensor, weight_V: Tensor, epsilon: float) -> Tensor:
        """See ``gated_norm``."""
        normed: Tensor = _function("fla.modules.norm.fused_norm_gate")(
            x_BTGRV, gate_BTGRV, weight_V, None, activation="swish", eps=epsilon
        )
        return normed


def _function(part: str) -> Any:
    return getattr(importlib.import_module(part), _PARTS[part])


def _borders(documents: Documents | None) -> dict[str, Tensor]:
    if documents is None:
        return {}
    device, host = documents.filled_sums
    return {"cu_seqlens": device, "cu_seqlens_cpu": host}


@functools.lru_cache(maxsize=8)
def _sums_of_pieces(
    borders: tuple[int, ...], rows: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Summed lengths of the pieces of all rows in one: on the device and on the host."""
    tokens = borders[-1]
    sums = [0, *(row * tokens + border for row in range(rows) for border in borders[1:])]
    host = torch.tensor(sums)
    return host.to(device, non_blocking=True), host
