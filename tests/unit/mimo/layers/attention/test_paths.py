"""torch's ``varlen_attn`` with the signatures that it has had: grouped queries on each of them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron.core.packed_seq_params import PackedSeqParams
from megatron.mimo.backend import Capabilities
from megatron.mimo.layers.attention import paths as attention_paths
from megatron.mimo.layers.attention.paths import Rule, _packed_fused
from megatron.mimo.layers.attention.visibility import Visibility

LENGTHS = (3, 5)


def of_torch_2_11(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    return_aux: Any = None,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
) -> Tensor:
    assert query.size(1) == key.size(1) == value.size(1), "as the kernel of torch 2.11 wants it"
    return plain(query, key, value, cu_seq_q, scale, causal=window_size == (-1, 0))


def of_torch_2_14(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    *,
    return_aux: Any = None,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
    seqused_k: Tensor | None = None,
    block_table: Tensor | None = None,
    num_splits: int | None = None,
) -> Tensor:
    shared = query.size(1) // key.size(1)
    assert enable_gqa or shared == 1
    behind, ahead = window_size
    assert behind >= max_k, "cuDNN's kernel is taken where there is no window"
    assert ahead in (-1, 0)
    key, value = (tensor.repeat_interleave(shared, dim=1) for tensor in (key, value))
    return plain(query, key, value, cu_seq_q, scale, causal=ahead == 0)


def plain(
    q_THD: Tensor, k_THD: Tensor, v_THD: Tensor, bounds: Tensor, scale: Any, *, causal: bool
) -> Tensor:
    out = torch.empty_like(q_THD)
    for start, stop in zip(bounds.tolist(), bounds.tolist()[1:], strict=False):
        q, k, v = (tensor[start:stop].transpose(0, 1) for tensor in (q_THD, k_THD, v_THD))
        scores = (q @ k.transpose(1, 2)) * scale
        if causal:
            scores += torch.full_like(scores, -math.inf).triu(1)
        out[start:stop] = (scores.softmax(-1) @ v).transpose(0, 1)
    return out


@pytest.mark.parametrize("kernel", [of_torch_2_11, of_torch_2_14])
@pytest.mark.parametrize("ahead", [None, 0], ids=["all", "causal"])
@pytest.mark.parametrize("key_heads", [4, 2, 1])
def test_grouped_queries_on_every_signature(
    kernel: Any, key_heads: int, ahead: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    import inspect

    from torch.nn.attention import varlen

    names = frozenset(inspect.signature(kernel).parameters)
    machine = Capabilities(device="cuda", varlen_arguments=names)
    monkeypatch.setattr(attention_paths, "capabilities", lambda: machine)
    monkeypatch.setattr(varlen, "varlen_attn", kernel)
    generator = torch.Generator().manual_seed(3)
    T = sum(LENGTHS)
    q, k, v = (torch.randn(T, heads, 8, generator=generator) for heads in (4, key_heads, key_heads))
    bounds = torch.tensor([0, LENGTHS[0], T], dtype=torch.int32)
    packed = PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=bounds,
        cu_seqlens_kv=bounds,
        max_seqlen_q=max(LENGTHS),
        max_seqlen_kv=max(LENGTHS),
    )
    rule = Rule(visibility=Visibility(ahead=ahead), scale=1 / math.sqrt(8))
    got = _packed_fused(q, k, v, rule, packed)
    k, v = (tensor.repeat_interleave(4 // key_heads, dim=1) for tensor in (k, v))
    torch.testing.assert_close(got, plain(q, k, v, bounds, rule.scale, causal=ahead == 0))


def test_lengths_known_on_the_host_are_not_read_from_the_device() -> None:
    """Meta tensors have no values to read, like those of a device that must not be waited for."""
    import dataclasses

    from megatron.core.models.mimo.partition.packing import packed_params
    from megatron.mimo.layers.attention.packed_lengths import packed_documents
    from megatron.mimo.layers.gated_delta_net.documents import documents_of

    given = {"cu_seqlens_q": [0, 3, 5], "cu_seqlens_q_padded": [0, 4, 8]}
    row = packed_params(given, tokens=8, device=torch.device("cpu"))
    assert row is not None
    names = ("cu_seqlens_q", "cu_seqlens_kv", "cu_seqlens_q_padded", "cu_seqlens_kv_padded")
    moved = {name: getattr(row, name).to("meta") for name in names[::2]}
    moved |= {names[1]: moved[names[0]], names[3]: moved[names[2]]}
    there = dataclasses.replace(row, **moved)
    found = packed_documents(there, query_tokens=8, key_tokens=8)
    assert found == packed_documents(row, query_tokens=8, key_tokens=8)
    assert [(one.length, one.padded) for one in found[0]] == [(3, 4), (2, 4)]
    documents = documents_of(there, tokens=8, device=torch.device("meta"))
    assert documents is not None
    _, host = documents.filled_sums
    assert host.tolist() == [0, 4, 8]
