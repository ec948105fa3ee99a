"""The benchmark of the host's work takes what layers are called with."""

from __future__ import annotations

from benchmarks.host_overhead import _cut


def test_a_packed_row_is_cut_to_documents_of_two_tokens() -> None:
    from megatron.core.models.mimo.partition.packing import packed_params

    row = packed_params({"cu_seqlens_q": [0, 5, 12]}, tokens=12)
    found = _cut(row, 12, 6)
    assert type(found) is type(row)
    assert found.cu_seqlens_q.tolist() == found.cu_seqlens_kv.tolist() == [0, 2, 4, 6]
    assert found.max_seqlen_q == 2
