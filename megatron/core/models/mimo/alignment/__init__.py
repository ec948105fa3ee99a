"""Placeholder positions -> plan -> merged embeddings.

Legend: S sequence, B micro-batch, H hidden, N rows of one stream (text or a modality), V
vocabulary; ``S_local`` after context/sequence sharding.

The rule: every occurrence of a modality's special token id in ``input_ids``, batch-major and left
to right, takes one row of that modality, in order. The plan states it as index tensors, made once
per micro-batch where ``input_ids`` are on the host; placing rows by a plan then never waits for
the device. Rows go straight to the decoder's layout [S, B, H]: one write per row, no zero
buffer, no mask of the merged size, no transposed copy.
"""

from megatron.core.models.mimo.alignment.cut import cut_plan
from megatron.core.models.mimo.alignment.encoded_rows import Encoded, EncodedRows
from megatron.core.models.mimo.alignment.from_ids import (
    build_alignment_plan,
    check_input_ids,
    plan_from_indices,
)
from megatron.core.models.mimo.alignment.plan import AlignmentPlan, RowOrder, Run, Stream
from megatron.core.models.mimo.alignment.row_index import with_row_index
from megatron.core.models.mimo.alignment.rows import place_rows, take_rows
from megatron.core.models.mimo.alignment.spans import media_span_ids

__all__ = [
    "AlignmentPlan",
    "Encoded",
    "EncodedRows",
    "RowOrder",
    "Run",
    "Stream",
    "build_alignment_plan",
    "check_input_ids",
    "cut_plan",
    "media_span_ids",
    "place_rows",
    "plan_from_indices",
    "take_rows",
    "with_row_index",
]
