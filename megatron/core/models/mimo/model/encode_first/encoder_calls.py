"""The calls of a modality's module on one rank in a step, and their backward.

Legend: N rows, H hidden, W the width of a row with its levels beside it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from megatron.core.distributed import DistributedDataParallel
from megatron.core.models.mimo.alignment import Encoded, EncodedRows
from megatron.core.models.mimo.comm.pools import Pool
from megatron.core.models.mimo.errors import InputError
from megatron.core.models.mimo.model.encode_first.media_units import Call
from megatron.core.models.mimo.model.encoding.idle import idle_rows
from megatron.core.models.mimo.model.grids.wide_rows import join_levels
from megatron.core.models.mimo.ranges import named_range
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from megatron.core.utils import unwrap_model


@dataclass(frozen=True, kw_only=True, eq=False)
class Modality:
    """A modality of the model, and the ranks that share its work.

    Attributes:
        name: its name.
        submodule: this rank's module, maybe wrapped; None where it is on other ranks.
        pool: the ranks that share its inputs with this one.
        like_H: a vector with the size, dtype and device of a row.
        recompute: forget activations after forward, and encode once more in backward.
        levels: how many further levels every row has.
        trainable: for each stage of the modality, whether anything of it is trained.
        stage: this rank's pipeline stage; None where the modality is on other ranks.
        goes_ahead: its encoders may encode a step in the one before: they are not trained and draw
            no random numbers. On ranks of encoders alone nothing else may be trained either, for
            these wait for gradients.
    """

    name: str
    submodule: nn.Module | None
    pool: Pool
    like_H: torch.Tensor
    recompute: bool
    levels: int
    trainable: tuple[bool, ...]
    stage: int | None
    goes_ahead: bool

    @property
    def trains(self) -> bool:
        """True where gradients of its rows are wanted now."""
        return any(self.trainable) and torch.is_grad_enabled()

    @property
    def is_last(self) -> bool:
        """This rank has its last stage, which gives rows."""
        return self.stage == len(self.trainable) - 1

    def trains_before(self, stage: int) -> bool:
        """True where a stage before this one is trained now."""
        return any(self.trainable[:stage]) and torch.is_grad_enabled()


@dataclass(kw_only=True, eq=False)
class Called:
    """A call that has run forward, as its backward needs it.

    Attributes:
        number: number of the call in this step.
        call: None for an idle one.
        hidden: what the call was given: hidden states of the stage before, which have their
            gradient once backward has run; or what frozen encoders have given, to be projected.
        states: states of the random generators when it began.
        output: with its graph, where that is kept.
        like: the output's shape and dtype, on "meta".
    """

    number: int
    call: Call | None
    hidden: Encoded | None
    states: Mapping[str, Any]
    output: torch.Tensor | None = None
    like: torch.Tensor | None = None


class EncoderCalls:
    """Runs the calls of one step.

    Args:
        modality: a modality with a module on this rank.
        seed: for the random numbers of the encoders; None where they draw none, or from the
            generators as they are.

    Attributes:
        seed: as given; may be set before the first ``forward``.
    """

    def __init__(self, modality: Modality, seed: int | None = None) -> None:
        assert modality.submodule is not None, "this rank encodes"
        assert modality.stage is not None, "this rank encodes"
        self.seed = seed
        self._modality, self._number = modality, 0
        self._submodule: nn.Module = modality.submodule
        self._trains = modality.trains_before(modality.stage + 1)

    def encode(self, call: Call) -> Encoded:
        """Run frozen encoders for a call; what they give goes to ``forward``, which projects it."""
        bare: Any = unwrap_model(self._submodule)
        with torch.no_grad(), named_range(f"encode {self._modality.name}"):
            encoded: Encoded = bare.combine_embeddings(bare.encode(call.inputs))
        return encoded

    def forward(
        self, call: Call | None, hidden: Encoded | None = None
    ) -> tuple[torch.Tensor, Called]:
        """Rows [n, W], or hidden states for the next stage, without their graph.

        Args:
            call: None keeps this rank in step with those that have some.
            hidden: what the stage before has given, or ``encode``; None for neither.
        """
        stage = self._modality.stage
        if stage and torch.is_tensor(hidden):
            hidden.requires_grad_(self._modality.trains_before(stage))
        called = Called(
            number=self._number,
            call=call,
            hidden=hidden,
            states=get_cuda_rng_tracker().get_states(),
        )
        self._number += 1
        keeps = self._trains and not self._modality.recompute
        with nullcontext() if keeps else torch.no_grad():
            output = self._encode(called)
        called.output = output if keeps else None
        called.like = torch.empty_like(output, device="meta")
        return output.detach(), called

    def backward(self, called: Called, grad: torch.Tensor, *, last: bool) -> torch.Tensor | None:
        """Backward of a call; the gradient of ``hidden``, where a stage before is trained.

        Args:
            called: what ``forward`` gave.
            grad: gradient of its output.
            last: no other backward follows in this step: reductions may start.
        """
        if not self._trains:
            return None
        with _held_back(self._submodule, not last):
            output = called.output
            if output is None:
                output = self._encode_again(called)
            called.output = None
            if output.requires_grad:
                with named_range("backward"):
                    torch.autograd.backward(output, grad)
        hidden = called.hidden
        return hidden.grad if self._modality.stage and torch.is_tensor(hidden) else None

    def _encode(self, called: Called) -> torch.Tensor:
        modality, call = self._modality, called.call
        with named_range(f"encode {modality.name}"), self._drawing(called.number):
            if call is None:
                encoded = idle_rows(self._submodule, modality.like_H.numel())
            elif called.hidden is None:
                encoded = self._submodule(encoder_inputs=call.inputs)
            else:
                encoded = self._submodule(hidden_states=called.hidden)
        if not modality.is_last and encoded is not None:
            return EncodedRows.of(encoded).rows_NH
        if call is not None:
            self._check(call, encoded)
        return join_levels(encoded, modality.levels, modality.like_H)

    def _encode_again(self, called: Called) -> torch.Tensor:
        tracker = get_cuda_rng_tracker()
        now = tracker.get_states()
        tracker.set_states(dict(called.states))
        try:
            with torch.enable_grad():
                return self._encode(called)
        finally:
            tracker.set_states(now)

    def _check(self, call: Call, encoded: Encoded | None) -> None:
        got = 0 if encoded is None else EncodedRows.of(encoded).num_rows
        name, width = self._modality.name, self._modality.like_H.numel()
        if got != call.rows:
            raise InputError(
                f"{name}: the encoders gave {got} rows for inputs of which {call.rows} were "
                "expected, by the placeholders or by rows_per_item; the batch lacks inputs or "
                "placeholders, or rows_per_item is wrong"
            )
        if encoded is not None and EncodedRows.of(encoded).rows_NH.size(1) != width:
            raise InputError(
                f"{name}: the rows are {EncodedRows.of(encoded).rows_NH.size(1)} wide; the "
                f"language model's hidden_size is {width}: let the projection end in that width"
            )

    @contextmanager
    def _drawing(self, number: int) -> Iterator[None]:
        """Encoders draw from a generator of their own: ranks encode different items.

        The generators that are equal on tensor-parallel ranks have to stay so.
        """
        if self.seed is None:
            yield
            return
        device = self._modality.like_H.device
        devices = [] if device.type == "cpu" else [device]
        owner = self._modality.pool.owner_of(dist.get_rank())
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(self.seed + 1009 * owner + number)
            yield


@contextmanager
def _held_back(submodule: nn.Module, wanted: bool) -> Iterator[None]:
    """No reductions of gradients begin within this context, where that is wanted."""
    if wanted and isinstance(submodule, DistributedDataParallel):
        with submodule.no_sync():
            yield
    else:
        yield
