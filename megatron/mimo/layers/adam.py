"""Adam that keeps its step count in the parameter group, as Transformer Engine's and apex's do.

``torch.optim.AdamW`` keeps one count per parameter, and megatron-core 0.19's optimizer checkpoints
cannot put those back: resuming without Transformer Engine and apex fails, on CPU and on GPU. The
arithmetic is torch's own (``torch.optim.adam.adam``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim.adam import adam

from megatron.mimo.backend import capabilities
from megatron.mimo.backend.hooks import ADAM
from megatron.mimo.backend.patching import PROCESS

__all__ = ["Adam", "install_adam"]


def install_adam() -> bool:
    """Makes ``megatron.core.optimizer`` use :class:`Adam` where neither TE's nor apex's works.

    Call it before optimizers are built; a second call does nothing.

    Returns:
        Whether this project's Adam is in use.
    """
    machine = capabilities()
    if not machine.has_transformer_engine() and not machine.has_apex("amp_C"):
        values = (Adam, Adam, torch.optim.SGD, False, False, True, True)
        PROCESS.apply(
            replace(patch, replacement=partial(_taking, value))
            for patch, value in zip(ADAM, values, strict=True)
        )
    from megatron.core import optimizer

    return optimizer.Adam is Adam


def _taking(value: Any, _: Any) -> Any:
    """The value, whatever stood there."""
    return value


class Adam(torch.optim.Optimizer):
    """Adam (``adam_w_mode=False``: weight decay joins the gradient) or AdamW (decoupled decay).

    Equal to ``torch.optim.Adam`` and ``AdamW`` bit for bit as long as every parameter has a
    gradient at every step: the count is the group's, and grows at each ``step``.

    State of a parameter: ``exp_avg`` and ``exp_avg_sq``, in its shape and dtype. Each group has
    ``step``, the number of steps taken. Checkpoints written with torch's classes load.

    Args:
        params: parameters, or groups of them.
        lr: learning rate.
        betas: decay of the running averages of the gradient and of its square.
        eps: added to the denominator.
        weight_decay: per step, times the learning rate.
        adam_w_mode: decoupled weight decay.
        capturable: must be False: the step count stays on the host.

    Raises:
        ValueError: a value out of range, or ``capturable``.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        adam_w_mode: bool = True,
        capturable: bool = False,
    ) -> None:
        if capturable:
            raise ValueError(
                "capturing the optimizer in a CUDA graph (optimizer_cuda_graph) needs Transformer "
                "Engine, which is not installed; leave it out"
            )
        if not (lr >= 0 and eps >= 0 and weight_decay >= 0 and all(0 <= b < 1 for b in betas)):
            raise ValueError(
                f"Adam with lr={lr}, betas={betas}, eps={eps}, weight_decay={weight_decay}; "
                "expected none negative, and betas below 1"
            )
        self.adam_w_mode = adam_w_mode
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "step": 0}
        super().__init__(params, defaults)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Called with loaded state: moves torch's per-parameter counts into the groups."""
        super().__setstate__(state)
        for group in self.param_groups:
            states = [self.state[param] for param in group["params"] if param in self.state]
            steps = {int(state.pop("step")) for state in states if "step" in state}
            if len(steps) > 1:
                raise ValueError(
                    f"the loaded optimizer state counts {sorted(steps)} steps in one parameter "
                    "group; expected one count"
                )
            group["step"] = steps.pop() if steps else int(group.get("step", 0))

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Takes one step with the gradients at hand; parameters without one stay as they are."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            self._step_group(group)
            group["step"] += 1
        return loss

    def _step_group(self, group: dict[str, Any]) -> None:
        params: list[Tensor] = [param for param in group["params"] if param.grad is not None]
        for param in params:
            if not self.state[param]:
                self.state[param]["exp_avg"] = torch.zeros_like(param)
                self.state[param]["exp_avg_sq"] = torch.zeros_like(param)
        # torch counts each parameter's steps in a tensor of its own, in place.
        steps = torch.full((len(params),), float(group["step"])).unbind()
        adam(
            params,
            [param.grad for param in params if param.grad is not None],
            [self.state[param]["exp_avg"] for param in params],
            [self.state[param]["exp_avg_sq"] for param in params],
            [],
            list(steps),
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
            decoupled_weight_decay=self.adam_w_mode,
        )
