"""A short packed row through two sets of kernels: what a process does before it relies on one.

A package's kernels are compiled on the machine where they run, for the sizes of the layer.

Legend: as ``delta_rule``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megatron.core.packed_seq_params import PackedSeqParams
from megatron.mimo.layers.gated_delta_net.documents import Documents, documents_of
from megatron.mimo.layers.gated_delta_net.sizes import Sizes

if TYPE_CHECKING:
    from megatron.mimo.layers.gated_delta_net.kernels import Kernels

__all__ = ["why_not_equal"]

_BORDERS = (0, 70, 71, 200)
_HEADS = 2
_ALLOWED = 0.05  # relative, of half precision


def why_not_equal(
    kernels: Kernels, trusted: Kernels, *, sizes: Sizes, dtype: torch.dtype, device: torch.device
) -> str | None:
    """Why ``kernels`` cannot stand in for ``trusted``; None where they can.

    Waits for the device.

    Args:
        kernels: on trial: forward and backward.
        trusted: what they are compared with.
        sizes: of the layer; two of its key heads are tried.
        dtype: of the projections.
        device: where.
    """
    sums = torch.tensor(_BORDERS, dtype=torch.int32)
    packed = PackedSeqParams(qkv_format="thd", cu_seqlens_q=sums, cu_seqlens_kv=sums)
    documents = documents_of(packed, tokens=_BORDERS[-1], device=device)
    expected = _outcome(trusted, sizes, dtype, device, documents)
    try:
        found = {
            name: one.cpu().float()
            for name, one in _outcome(kernels, sizes, dtype, device, documents).items()
        }
    except Exception as error:  # noqa: BLE001 - a compiler can fail in any way
        reason = (str(error).strip() or "no reason given").splitlines()[0]
        return f"{type(error).__name__}: {reason}"
    for name, one in found.items():
        other = expected[name].cpu().float()
        apart = ((one - other).norm() / other.norm()).item()
        if not apart <= _ALLOWED:
            return f"{name} differs from PyTorch's by {apart:.1e}, relatively"
    return None


def _outcome(
    kernels: Kernels,
    sizes: Sizes,
    dtype: torch.dtype,
    device: torch.device,
    documents: Documents | None,
) -> dict[str, Tensor]:
    """The outputs of the three steps, once of documents and once of pieces with states before them,
    and the gradients of what goes in.
    """
    generator = torch.Generator().manual_seed(1)
    T, G, R, K, V = _BORDERS[-1], _HEADS, sizes.values_per_key, sizes.key, sizes.value
    features = 2 * K + R * V

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    leaves = {
        "the input": drawn(1, T, G, features).to(dtype),
        "the convolution's weight": drawn(G, features, sizes.taps).to(dtype),
        "the decay": -drawn(1, T, G, R).exp(),
        "the strength": drawn(1, T, G, R).sigmoid(),
        "the gate": drawn(1, T, G, R, V).to(dtype),
        "the norm's weight": drawn(V).to(dtype),
        "the states": drawn(1, len(_BORDERS) - 1, G, R, K, K + V),
    }
    leaves = {name: one.to(device).requires_grad_() for name, one in leaves.items()}
    x, weight, decay, strength, gate, norm, states = leaves.values()
    with torch.enable_grad():
        convolved = kernels.convolve(x, weight, documents)
        q, k, v = convolved.split([K, K, R * V], dim=-1)
        tokens = (q, k, v.unflatten(-1, (R, V)), decay, strength)
        mixed, _ = kernels.delta_rule(*tokens, documents)
        of_pieces, behind = kernels.delta_rule_of_pieces(*tokens, _BORDERS, states)
        outputs = {
            "the output": kernels.norm(mixed, gate, norm, 1e-6),
            "the output of pieces": of_pieces,
            "the states behind": behind,
        }
        weights = [drawn(*out.shape).to(out) for out in outputs.values()]
        found = torch.autograd.grad([*outputs.values()], [*leaves.values()], weights)
    gradients = {f"the gradient of {name}": one for name, one in zip(leaves, found, strict=True)}
    return {name: out.detach() for name, out in outputs.items()} | gradients
