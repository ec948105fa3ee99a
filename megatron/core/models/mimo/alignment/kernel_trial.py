"""A small merge by the kernels, compared with torch's: what a run does before it relies on them.

Triton compiles on the machine where it runs, with a compiler that may be missing there.
Legend: H hidden, L places, N rows of one stream, V vocabulary.
"""

from __future__ import annotations

import torch

from megatron.core.models.mimo.alignment.from_ids import build_alignment_plan
from megatron.core.models.mimo.alignment.row_index import LONGEST_SUM, kernels_for, with_row_index
from megatron.core.models.mimo.alignment.rows import place_rows, take_rows
from megatron.core.models.mimo.config.base_configs import TEXT

_WORDS, _IMAGE, _HIDDEN = 8, 8, 72


def why_no_kernels(device: torch.device, dtype: torch.dtype = torch.bfloat16) -> str | None:
    """Why rows cannot be placed by Triton's kernels on ``device``; None where they can.

    Waits for the device: not for a step.
    """
    ids_BS = torch.arange(4 * LONGEST_SUM).view(2, -1) % _WORDS
    ids_BS[:, : 2 * LONGEST_SUM - 40] = 3  # a long sum
    ids_BS[:, 5:9] = _IMAGE
    plan = with_row_index(build_alignment_plan(ids_BS, {"images": _IMAGE})).to(device)
    values = torch.linspace(-1, 1, (_WORDS + 8 + ids_BS.numel()) * _HIDDEN, device=device)
    values = values.to(dtype).view(-1, _HIDDEN)
    table_VH, rows_NH, grad_LH = torch.split(values, [_WORDS, 8, ids_BS.numel()])
    kernels = kernels_for(plan.index, values)
    if kernels is None or plan.index is None:
        return f"Triton is not there, does not load, or does not serve {dtype} on {device.type}"
    placed_LH, taken_NH = torch.empty_like(grad_LH), torch.empty_like(rows_NH)
    summed_VH = torch.zeros_like(table_VH)
    try:
        kernels.place(placed_LH, [table_VH, rows_NH], plan.index.sources_L, ids_N=plan.text_ids_N)
        kernels.gather_sums(grad_LH, plan.index, [summed_VH, taken_NH])
        found = [one.cpu() for one in (placed_LH, taken_NH, summed_VH)]
    except Exception as error:  # noqa: BLE001 - a compiler can fail in any way
        reason = (str(error).strip() or "no reason given").splitlines()[0]
        return f"{type(error).__name__}: {reason}"
    text, images = plan.streams[TEXT], plan.streams["images"]
    expected_SBH = torch.empty_like(grad_LH).view(ids_BS.size(1), 2, _HIDDEN)
    place_rows(expected_SBH, text, table_VH.index_select(0, plan.text_ids_N))
    place_rows(expected_SBH, images, rows_NH)
    sums_VH = torch.zeros(_WORDS, _HIDDEN, dtype=torch.float64)
    sums_VH.index_add_(0, plan.text_ids_N.cpu(), grad_LH[text.rows_N].cpu().double())
    exact = (expected_SBH.view_as(grad_LH), take_rows(grad_LH, images, 8))
    is_right = all(torch.equal(a, b.cpu()) for a, b in zip(found, exact, strict=False))
    is_right &= bool((found[2].double() - sums_VH).norm() < 1e-2 * sums_VH.norm())
    return None if is_right else "their results differ from torch's"
