"""Messages of rows where encoders are on ranks that the language model has not.

Rows travel by Megatron's pipeline schedule (``MultiModulePipelineCommunicator``), one message for
each modality and micro-batch: [N, W], the levels of a row beside it.

Legend: N rows of one modality, H hidden, W the width of a row with its levels, B micro-batch,
S sequence.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from megatron.core.models.mimo.alignment import Encoded
from megatron.core.models.mimo.config import MIMO_LANGUAGE_MODULE_KEY, MimoModelConfig, RankRole
from megatron.core.models.mimo.config.base_configs import language_config
from megatron.core.models.mimo.config.grids import Geometry
from megatron.core.models.mimo.config.role import ModuleLayout
from megatron.core.models.mimo.errors import InputError
from megatron.core.models.mimo.model.encoding.idle import take_part
from megatron.core.models.mimo.model.grids.wide_rows import join_levels, split_levels
from megatron.core.utils import unwrap_model


class DisjointRows:
    """The messages of rows that leave this rank's encoders or arrive at its language model.

    Args:
        mimo_config: description of a model whose modules are on ranks of their own.
    """

    def __init__(self, mimo_config: MimoModelConfig) -> None:
        grids = mimo_config.module_to_grid_map or {}
        geometries = {name: Geometry.of(name, grid) for name, grid in grids.items()}
        self._dp = {name: geometry.sizes["dp"] for name, geometry in geometries.items()}
        self._token_ids = dict(mimo_config.special_token_ids or {})
        config = language_config(mimo_config)
        self._hidden_size, self._dtype = config.hidden_size, config.params_dtype

    @classmethod
    def of(cls, mimo_config: MimoModelConfig, role: RankRole) -> DisjointRows | None:
        """The messages of a model; None where modules are not on ranks of their own."""
        return cls(mimo_config) if role.mode is ModuleLayout.NON_COLOCATED else None

    def outgoing(
        self,
        rows: Mapping[str, Encoded],
        submodules: nn.ModuleDict,
        arrived: Mapping[str, torch.Tensor] | None,
        input_ids_BS: torch.Tensor | None,
    ) -> dict[str, torch.Tensor]:
        """What this rank's encoders send on: modality -> a tensor, [0, ...] where it is idle.

        Args:
            rows: modality -> rows that they gave.
            submodules: modality -> ``ModalitySubmodules``, those of this rank.
            arrived: what stages before this one have sent.
            input_ids_BS: of this encoder replica's samples; where it serves several replicas of
                the language model, they say how many rows are each one's.
        """
        sent = {}
        for name, submodule in submodules.items():
            own: Any = unwrap_model(submodule)
            before = (arrived or {}).get(name)
            given = rows.get(name)
            if not own.is_last_stage:
                sent[name] = self._hidden_states(given, before, submodule)
                continue
            like_H = self._like_row(submodule)
            wide_NW = join_levels(given, own.num_levels, like_H)
            if before is not None and not before.numel():
                wide_NW = take_part(wide_NW, [before])
            if wide_NW._base is not None:  # Megatron frees what it has sent, but no view
                wide_NW = wide_NW.clone()
            self._share_out(name, wide_NW, input_ids_BS)
            sent[name] = wide_NW
        return sent

    def incoming(
        self,
        arrived: Mapping[str, torch.Tensor] | None,
        input_ids_BS: torch.Tensor | None,
        cp_group: dist.ProcessGroup | None,
    ) -> dict[str, Encoded]:
        """Modality -> rows, from what has arrived at the language model's first stage.

        Context-parallel ranks get the same rows and place some each; in backward they sum the
        gradients of all, so that any of them has what goes back to the encoders.

        Args:
            arrived: modality -> [N, W], with gradient.
            input_ids_BS: of this replica's samples; where several replicas of an encoder serve
                it, they say how many rows are each one's.
            cp_group: this rank's context-parallel group; None without.
        """
        rows = {}
        for name, wide_NW in (arrived or {}).items():
            if wide_NW.dim() != 2 or wide_NW.size(1) % self._hidden_size:
                raise InputError(
                    f"{name}: rows have arrived as {list(wide_NW.shape)}; the language model's "
                    f"hidden_size is {self._hidden_size}, so [N, {self._hidden_size}] is expected: "
                    "let the projection end in that width"
                )
            self._share_out_gradient(name, wide_NW, input_ids_BS)
            if cp_group is not None and wide_NW.numel():
                wide_NW = _SumOfGradients.apply(wide_NW, cp_group)
            rows[name] = split_levels(wide_NW, wide_NW.size(1) // self._hidden_size - 1)
        return rows

    def _like_row(self, submodule: nn.Module) -> torch.Tensor:
        device = next((one.device for one in submodule.parameters()), None)
        return torch.empty(self._hidden_size, dtype=self._dtype, device=device)

    def _hidden_states(
        self, given: Encoded | None, before: torch.Tensor | None, submodule: nn.Module
    ) -> torch.Tensor:
        if given is None:
            like_H = self._like_row(submodule)
            given = like_H.new_empty(0, like_H.numel())
        assert torch.is_tensor(given), "encoders of several stages have no levels"
        if before is not None and not before.numel():
            given = take_part(given, [before])
        return given if given._base is None else given.clone()

    def _share_out(
        self, name: str, wide_NW: torch.Tensor, input_ids_BS: torch.Tensor | None
    ) -> None:
        """Say which rows go to which replica of the language model, where there are several."""
        parts = self._dp[MIMO_LANGUAGE_MODULE_KEY] // self._dp[name]
        shares = self._shares(name, parts, input_ids_BS)
        if shares is not None and sum(shares) == wide_NW.size(0):
            _tell_bridge(wide_NW, shares)

    def _share_out_gradient(
        self, name: str, wide_NW: torch.Tensor, input_ids_BS: torch.Tensor | None
    ) -> None:
        """Say which gradients go to which replica of an encoder, where there are several."""
        parts = self._dp[name] // self._dp[MIMO_LANGUAGE_MODULE_KEY]
        shares = self._shares(name, parts, input_ids_BS)
        if shares is None or not wide_NW.requires_grad or sum(shares) != wide_NW.size(0):
            return
        if wide_NW.grad_fn is not None:  # joined from messages, whose gradients nobody asks for
            wide_NW.detach_().requires_grad_()

        def say(tensor: torch.Tensor) -> None:
            _tell_bridge(tensor.grad, shares)

        wide_NW.register_post_accumulate_grad_hook(say)  # type: ignore[no-untyped-call]

    def _shares(self, name: str, parts: int, input_ids_BS: torch.Tensor | None) -> list[int] | None:
        if parts < 2 or input_ids_BS is None or name not in self._token_ids:
            return None
        samples = input_ids_BS.size(0)
        if samples % parts:
            raise InputError(
                f"{name}: a micro-batch of {samples} samples cannot be shared out to {parts} "
                "replicas; give a micro-batch that their number divides"
            )
        counts_B = (input_ids_BS == self._token_ids[name]).sum(dim=1)
        shares: list[int] = counts_B.view(parts, -1).sum(dim=1).tolist()
        return shares


def named_output(model: Any, output: tuple[Any, Any]) -> tuple[Any, Any]:
    """A language model's output; where a schedule for several modules sends it on, by name.

    Args:
        model: a ``MimoModel``.
        output: what its language model gave, and the loss mask.
    """
    by_name = model.disjoint_rows is not None and (
        model.mimo_config.modality_inputs_of == "encoders"
    )
    if not by_name or model.role.is_last_stage(MIMO_LANGUAGE_MODULE_KEY):
        return output
    return {MIMO_LANGUAGE_MODULE_KEY: output[0]}, output[1]


def _tell_bridge(wide_NW: Any, shares: list[int]) -> None:
    """Let Megatron's bridge know how many of the rows go to each of its peers."""
    wide_NW._mimo_bridge_split_sizes = shares


class _SumOfGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, wide_NW: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        return wide_NW.view_as(wide_NW)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor, None]:
        grad_NW = grad_outputs[0].clone()
        dist.all_reduce(grad_NW, group=ctx.group)
        return grad_NW, None
