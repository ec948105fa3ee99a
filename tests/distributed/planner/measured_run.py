"""A program: a training run that writes what each rank holds into ``memory-RANK.json`` of --output.

Weights, gradient buffers, optimizer state, and the most that autograd kept at once in forward
steps.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.distributed.planner.saved_bytes import SavedBytes


def main() -> int:
    # As a run does it: the process is prepared before Megatron is imported.
    from megatron.mimo.backend import select_backend

    select_backend()
    from megatron.mimo.training import forward_step
    from megatron.mimo.training import main as train

    saved, chunks = SavedBytes(), dict[int, Any]()
    build = forward_step.build_forward_step

    def measured(*given: Any) -> Callable[..., Any]:
        step = build(*given)

        def watched(data: Any, model: Any) -> Any:
            chunks[id(model)] = model
            with saved.watching(model):
                return step(data, model)

        return watched

    forward_step.build_forward_step = measured
    code = train()
    output = Path(sys.argv[sys.argv.index("--output") + 1])
    report = state(list(chunks.values())) | {"activations": saved.peak}
    (output / f"memory-{os.environ['RANK']}.json").write_text(json.dumps(report))
    return code


def state(chunks: list[Any]) -> dict[str, int]:
    """Bytes between steps."""
    inner = [part for chunk in chunks for part in chunk.children()]
    tensors = [one for part in inner for one in (*part.parameters(), *part.buffers())]
    held = {one.data_ptr(): one.nbytes for one in tensors}
    wrapped = [chunk for chunk in chunks if hasattr(chunk, "expert_parallel_buffers")]
    gradients = sum(
        buffer.grad_data.nbytes
        for chunk in wrapped
        for buffer in (*vars(chunk)["buffers"], *chunk.expert_parallel_buffers)
    )
    kept: dict[int, int] = {}
    for optimizer in gc.get_objects():
        if not isinstance(optimizer, torch.optim.Optimizer):
            continue
        state = [value for one in optimizer.state.values() for value in one.values()]
        main = [one for group in optimizer.param_groups for one in group["params"]]
        for tensor in (*filter(torch.is_tensor, state), *main):
            if tensor.data_ptr() not in held:
                kept[tensor.data_ptr()] = tensor.nbytes
    return {
        "weights": sum(held.values()),
        "gradients": gradients,
        "optimizer": sum(kept.values()),
    }


if __name__ == "__main__":
    sys.exit(main())
