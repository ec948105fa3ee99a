"""What a layer keeps in its forward pass for its backward pass, in bytes, by formulas.

The formulas are of the layers that this project builds: attention on fused kernels (queries, keys,
values, the output and one number per head and token), norms that keep their input, activations that
keep theirs. A test holds them against what autograd really keeps of a layer of each kind.

Legend: T vectors of this rank, n those after sequence parallelism has cut them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from megatron.mimo.layers.gated_delta_net.layer import GatedDeltaNet
from megatron.mimo.layers.layer_scale import ScaledAdd

__all__ = ["Kernels", "Load", "Saved", "layer_saved", "linear_saved", "norm_saved"]

_FP32 = 4
_GATED_FUSED = (torch.nn.functional.silu,)


@dataclass(frozen=True, kw_only=True)
class Kernels:
    """The libraries whose kernels compute.

    Attributes:
        on_gpu: PyTorch's RMSNorm on a CPU keeps what it has normed, beside its input.
        engine: Transformer Engine's, whose norms keep their input in its own dtype.
    """

    on_gpu: bool = False
    engine: bool = False


@dataclass(frozen=True, kw_only=True)
class Load:
    """The input of a layer.

    Attributes:
        vectors: T.
        cut: of sequence parallelism: n = T / cut.
        size: bytes of an element.
        rotates: the layer turns its queries and keys.
        kernels: that compute it.
    """

    vectors: float
    cut: int = 1
    size: int = 4
    rotates: bool = False
    kernels: Kernels = field(default_factory=Kernels)

    @property
    def cut_vectors(self) -> float:
        """N: this rank's after sequence parallelism."""
        return self.vectors / self.cut


@dataclass(kw_only=True)
class Saved:
    """Bytes that a layer keeps, by what recomputation can take off.

    Attributes:
        norms: inputs of its norms, the residual stream.
        beyond: of ``norms``, what is more than the inputs of those that are recomputed.
        normed: outputs of its norms, which are inputs of linear layers.
        attention: queries, keys, values and the output.
        sums: the logarithms that fused attention keeps.
        inner: between the linear layers of its MLP.
        experts: of its experts, the inputs of their first layer included.
        activated: outputs of the experts' activation, which are part of ``experts``.
        shared: of its shared experts.
        input: what it is given.
    """

    norms: float = 0.0
    beyond: float = 0.0
    normed: float = 0.0
    attention: float = 0.0
    sums: float = 0.0
    inner: float = 0.0
    experts: float = 0.0
    activated: float = 0.0
    shared: float = 0.0
    input: float = 0.0

    @property
    def whole(self) -> float:
        """All bytes, without recomputation."""
        inside = self.norms + self.normed + self.attention + self.sums
        return inside + self.inner + self.experts + self.shared

    def after(self, modules: set[str]) -> float:
        """The bytes that are left with these ``--recompute-modules``."""
        kept = self.whole
        kept -= self.sums if "core_attn" in modules else 0.0
        kept -= self.inner if "mlp" in modules else 0.0
        kept -= self.normed + self.beyond if "layernorm" in modules else 0.0
        kept -= self.shared if modules & {"moe", "shared_experts"} else 0.0
        if "moe" in modules:
            return kept - self.experts
        return kept - (self.activated if "moe_act" in modules else 0.0)


def norm_saved(norm: nn.Module | None, vectors: float, load: Load) -> float:
    """What a norm keeps: its input, one or two numbers per vector, perhaps what it has normed."""
    weight = getattr(norm, "weight", None)
    if weight is None:
        return 0.0
    plain = isinstance(norm, nn.LayerNorm) or getattr(norm, "bias", None) is not None
    # RMSNorms of language models are computed in fp32.
    size = load.size if plain or load.kernels.engine else _FP32
    copies = 1 if plain or load.kernels.on_gpu or not weight.requires_grad else 2
    numbers = 2 * load.size if plain else _FP32
    return vectors * (copies * size * weight.numel() + numbers)


def linear_saved(linear: nn.Module, vectors: float, size: int) -> float:
    """The input of a linear layer whose weight, or whose adapter, is trained."""
    adapter: Any = getattr(linear, "adapter", None)
    weights = [one for name, one in linear.named_parameters(recurse=False) if _is_matrix(name, one)]
    kept = 0.0
    if adapter is not None:
        kept += vectors * size * adapter.up.size(-1)
    if adapter is not None or any(weight.requires_grad for weight in weights):
        kept += vectors * size * weights[0].size(-1)
    return kept


def layer_saved(layer: Any, load: Load) -> Saved:
    """What a transformer layer keeps, when its input needs a gradient."""
    kept, config = Saved(), layer.config
    hidden = config.hidden_size
    kept.input = load.cut_vectors * hidden * load.size
    norms = ("input_layernorm", "post_self_attn_layernorm", "pre_mlp_layernorm")
    for name in (*norms, "post_mlp_layernorm"):
        norm = getattr(layer, name, None)
        own = norm_saved(norm, load.cut_vectors, load)
        kept.norms += own
        if own and not name.startswith("post_"):
            kept.beyond += own - kept.input
    scaled = (getattr(layer, name, None) for name in ("self_attn_bda", "mlp_bda"))
    kept.norms += kept.input * sum(isinstance(one, ScaledAdd) for one in scaled)
    lean = getattr(layer, "is_lean", False)
    _keep_attention(layer.self_attention, load, kept, lean=lean)
    mlp = layer.mlp
    if hasattr(mlp, "router"):
        _keep_experts(mlp, load, kept)
    elif hasattr(mlp, "linear_fc1"):
        kept.normed += linear_saved(mlp.linear_fc1, load.cut_vectors, load.size)
        kept.inner += _mlp_inner(mlp, load, lean=lean)
    return kept


def _keep_attention(attention: Any, load: Load, kept: Saved, *, lean: bool) -> None:
    """Queries, keys and values before and after they turn, the output, and what is of no size."""
    if isinstance(attention, GatedDeltaNet):
        _keep_delta_net(attention, load, kept)
        return
    if not hasattr(attention, "linear_qkv"):
        _keep_unknown(attention, load, kept)
        return
    config, size, vectors = attention.config, load.size, load.vectors
    tp = config.tensor_model_parallel_size
    heads, width = config.num_attention_heads / tp, config.kv_channels
    groups = max((config.num_query_groups or config.num_attention_heads) / tp, 1)
    queries, keys = heads * width, groups * width
    kept.normed += linear_saved(attention.linear_qkv, load.cut_vectors, size)
    # As they are projected; a lean layer without norms of heads copies the values out of that.
    is_copied = lean and load.rotates and attention.q_layernorm is None
    kept.attention += vectors * size * (keys if is_copied else queries + 2 * keys)
    if getattr(config, "attention_output_gate", False):  # its logits, what it is, and what it lets
        kept.attention += 3 * vectors * size * queries
    for name, numbers in (("q_layernorm", queries), ("k_layernorm", keys)):
        norm: Any = getattr(attention, name, None)
        if getattr(norm, "weight", None) is None:
            continue
        own = norm_saved(norm, vectors * numbers / norm.weight.numel(), load)
        is_view = name == "k_layernorm" and size == _FP32  # of what is projected
        kept.attention += own - (vectors * numbers * size if is_view else 0.0)
    core = attention.core_attention
    if load.rotates or hasattr(core, "inner"):
        kept.attention += vectors * size * (queries + keys)
    kept.attention += vectors * size * queries  # the output, which the projection is given
    kept.sums += vectors * heads * _FP32
    kept.attention += linear_saved(attention.linear_proj, vectors, size) - (
        vectors * size * queries if _keeps_input(attention.linear_proj) else 0.0
    )


def _keep_delta_net(net: GatedDeltaNet, load: Load, kept: Saved) -> None:
    """What is projected, what is convolved, and the output before its gate and behind it."""
    sizes, tp = net.sizes, net.config.tensor_model_parallel_size
    heads = sizes.key_heads * sizes.values_per_key / tp
    convolved = 2 * sizes.key_heads * sizes.key / tp + heads * sizes.value
    projected = net.in_proj.weight.size(0)
    kept.normed += linear_saved(net.in_proj, load.cut_vectors, load.size)
    inside = projected + convolved + heads * sizes.value
    kept.attention += load.vectors * (load.size * inside + 2 * heads * _FP32)
    kept.attention += linear_saved(net.out_proj, load.vectors, load.size)


def _mlp_inner(mlp: Any, load: Load, *, lean: bool = False) -> float:
    """Inputs of the activation, and of the second linear layer."""
    first, config = mlp.linear_fc1.weight, mlp.config
    vectors, size = load.vectors, load.size
    kept = vectors * size * first.size(0)
    is_quick = getattr(config.activation_func, "__name__", "") == "quick_gelu"
    if config.gated_linear_unit and not lean and not _is_fused(config):
        kept += vectors * size * first.size(0)  # what is gated, and by what
    if is_quick and not lean and not load.kernels.on_gpu:
        kept += vectors * size * first.size(0)  # its two factors; compiled, it keeps one
    return kept + linear_saved(mlp.linear_fc2, vectors, size)


def _keep_experts(mlp: Any, load: Load, kept: Saved) -> None:
    """Tokens that are spread evenly: each rank of a group gets as many as it sends."""
    config, size = mlp.config, load.size
    etp = config.expert_tensor_parallel_size or config.tensor_model_parallel_size
    chosen, experts = config.moe_router_topk, config.num_moe_experts
    arrived = load.cut_vectors * chosen * etp
    kept.normed += load.cut_vectors * config.hidden_size * size  # the router's
    kept.experts += load.cut_vectors * (chosen * (16 + _FP32) + experts * (1 + size))
    inner = config.moe_ffn_hidden_size / etp
    trained = any(one.requires_grad for one in mlp.experts.parameters())
    gates = 2 if config.gated_linear_unit else 1
    kept.activated = arrived * inner * size if trained else 0.0
    rows = arrived * config.hidden_size * size if trained else 0.0
    kept.experts += rows + arrived * (gates * inner + 1) * size + kept.activated
    shared = getattr(mlp, "shared_experts", None)
    if shared is not None:
        kept.shared += _mlp_inner(shared, load)


def _keep_unknown(module: nn.Module, load: Load, kept: Saved) -> None:
    """Roughly, of an attention of another kind: what its linear layers are given, and give."""
    for one in module.modules():
        for name, weight in one.named_parameters(recurse=False):
            if _is_matrix(name, weight):
                kept.attention += load.vectors * load.size * (weight.size(0) + weight.size(-1))


def _is_fused(config: Any) -> bool:
    return config.activation_func in _GATED_FUSED and bool(config.bias_activation_fusion)


def _keeps_input(linear: nn.Module) -> bool:
    weights = [one for name, one in linear.named_parameters(recurse=False) if _is_matrix(name, one)]
    return hasattr(linear, "adapter") or any(weight.requires_grad for weight in weights)


def _is_matrix(name: str, parameter: nn.Parameter) -> bool:
    return name.startswith("weight") and parameter.dim() > 1
