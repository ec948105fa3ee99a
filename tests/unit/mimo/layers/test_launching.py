"""What is compiled is launched again for arguments that it was compiled for, and for no others."""

from __future__ import annotations

from typing import Any

import torch


class Kernel:
    """Stands where ``triton.jit`` gives a kernel; writes down what is asked of it."""

    def __init__(self) -> None:
        self.asked: list[tuple[Any, ...]] = []
        self.launched: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: Any) -> Any:
        def launch(*given: Any, **options: int) -> Any:
            self.asked.append((grid, *given, options))
            return {grid: lambda *again: self.launched.append((grid, *again))}

        return launch


def test_what_a_kernel_is_compiled_for_is_asked_once() -> None:
    from megatron.mimo.layers.fused.launching import Launcher

    kernel = Kernel()
    launch = Launcher(kernel)
    one, other = torch.zeros(2, 64)
    grid = (3, 1, 1)
    launch(grid, (one,), (7, 1.0), (5, True), num_warps=4)
    assert kernel.asked == [(grid, one, 7, 1.0, 5, True, {"num_warps": 4})]
    launch(grid, (other,), (8, 2.0), (5, True), num_warps=4)
    assert kernel.launched == [(grid, other, 8, 2.0, 5, True)]
    launch(grid, (one,), (7, 1.0), (6, True))
    launch(grid, (one.bfloat16(),), (7, 1.0), (5, True))
    launch(grid, (one[1:],), (7, 1.0), (5, True))  # four bytes past where it was
    launch(grid, (one[1:],), (7, 1.0), (5, True))
    assert len(kernel.asked) == 5
    assert len(kernel.launched) == 1
