"""Measures the throughput of a run: real tokens, the model's FLOPs, padding, waiting for data.

Each data-parallel rank counts on the host what its own micro-batches hold; the sums are brought
together when a line of the log is due.
"""

from __future__ import annotations

import resource
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from megatron.core.models.mimo.errors import UnsupportedError
from megatron.mimo.backend import capabilities
from megatron.mimo.backend.cards import dense_bf16_tflops
from megatron.mimo.data.micro_batches.batch import LENGTHS, Batch, batch_device
from megatron.mimo.models.common.flops import (
    language_amounts,
    media_amounts,
    operations,
    span_lengths,
)
from megatron.mimo.process.console import format_count
from megatron.mimo.training.model_costs import encoders_are_apart, model_costs

if TYPE_CHECKING:
    from megatron.core.models.mimo import MimoModel

__all__ = ["Throughput", "ThroughputMeter", "write_scalars"]


@dataclass(frozen=True, kw_only=True)
class Throughput:
    """Figures of some iterations, over all ranks.

    Attributes:
        tokens_per_iteration: real tokens of a global batch, placeholders included.
        padding: share of the positions that hold no token.
        flops_per_iteration: forward and backward, as :mod:`models.common.flops` counts them; None
            where a part of the model does not say what it does.
        waiting: share of the time spent waiting for data, on the rank that waited longest.
        peak_memory: bytes on the rank that used most: of the device, or of the process on CPU.
    """

    tokens_per_iteration: float
    padding: float
    flops_per_iteration: float | None
    waiting: float
    peak_memory: float

    def rates(self, seconds_per_iteration: float) -> dict[str, float]:
        """Rates at a speed: tokens/s, and where they are known TFLOP/s of a device and MFU."""
        if not seconds_per_iteration:
            return {}
        found = {"tokens_per_second": self.tokens_per_iteration / seconds_per_iteration}
        if self.flops_per_iteration is not None:
            each = self.flops_per_iteration / seconds_per_iteration / dist.get_world_size()
            found["tflops_per_device"] = each / 1e12
            peak = dense_bf16_tflops(capabilities().card)
            if peak is not None:
                found["mfu"] = each / 1e12 / peak
        return found

    def texts(self, seconds_per_iteration: float) -> list[str]:
        """For the progress line; shares below one per cent are left out."""
        rates = self.rates(seconds_per_iteration)
        texts = []
        if "tokens_per_second" in rates:
            texts.append(f"{format_count(rates['tokens_per_second'])} tokens/s")
        if "tflops_per_device" in rates:
            each = " per device" if dist.get_world_size() > 1 else ""
            texts.append(f"{_flops_per_second(rates['tflops_per_device'] * 1e12)}{each}")
        shares = {"MFU": rates.get("mfu"), "padding": self.padding, "data wait": self.waiting}
        texts += [f"{name} {share:.0%}" for name, share in shares.items() if share and share > 0.01]
        return [*texts, f"peak {self.peak_memory / 1e9:.1f} GB"]

    def metrics(self, seconds_per_iteration: float) -> dict[str, float]:
        """For ``metrics.json`` and TensorBoard."""
        rates = self.rates(seconds_per_iteration)
        flops = self.flops_per_iteration
        return {
            **{name: float(f"{rate:.4g}") for name, rate in rates.items()},
            "tokens_per_iteration": round(self.tokens_per_iteration, 1),
            **({} if flops is None else {"tflop_per_iteration": float(f"{flops / 1e12:.6g}")}),
            "padding_share": round(self.padding, 4),
            "data_wait_share": round(self.waiting, 4),
            "peak_memory_gb": round(self.peak_memory / 1e9, 3),
        }


class ThroughputMeter:
    """Counts what this rank trains on.

    Micro-batches that do not say how long their documents are count as full.

    Args:
        chunks: the rank's chunks of the model; there by the time the first batch is seen.
    """

    def __init__(self, chunks: Sequence[MimoModel]) -> None:
        self._chunks = chunks
        self._amounts: Counter[str] = Counter()
        self._documents: Counter[int] = Counter()  # by length
        self._spans: Counter[int] = Counter()  # by length
        self._positions = self._iterations = self._labels = 0
        self._waited = 0.0
        self._ahead: deque[Batch] = deque()  # read, and not yet taken
        self._since = time.monotonic()
        self._costs: Mapping[str, float] | None = None
        self._uncounted = False

    def watched(self, batches: Callable[[], Iterator[Batch]]) -> Callable[[], Iterator[Batch]]:
        """The same micro-batches, with the time that reading takes; ``take`` counts them."""

        def opened() -> Iterator[Batch]:
            inner = batches()
            while True:
                begun = time.monotonic()
                try:
                    batch = next(inner)
                except StopIteration:
                    return
                self._waited += time.monotonic() - begun
                self._ahead.append(batch)
                yield batch

        return opened

    def take(self) -> None:
        """Count the next of the micro-batches that were read here: its step has come.

        It may have been read in the step before, for a copy to the device or frozen encoders.
        """
        if self._ahead:
            self._see(self._ahead.popleft())

    def step(self) -> None:
        """An iteration has ended."""
        self._iterations += 1

    def read(self) -> Throughput:
        """Figures since the last call. Collective over the whole job."""
        from megatron.core import mpu

        seconds = time.monotonic() - self._since
        if self._costs is None:
            known = model_costs(self._chunks)
            self._uncounted |= known is None
            self._costs = known or {}
        costs = self._costs
        # All ranks of a data-parallel replica have the same batch: one counts.
        ranks = (mpu.get_tensor_model_parallel_rank(), mpu.get_context_parallel_rank())
        counts = ranks == (0, 0) and mpu.is_pipeline_first_stage(ignore_virtual=True)
        own = [0.0, 0.0, 0.0]
        if counts:
            language = language_amounts(costs, self._documents, self._labels, spans=self._spans)
            flops = operations(costs, self._amounts) + operations(costs, language)
            tokens = sum(length * number for length, number in self._documents.items())
            own = [tokens, self._positions, flops]
        device = batch_device()
        sums = torch.tensor(own, dtype=torch.float64, device=device)
        dist.all_reduce(sums)
        most = [self._waited / max(seconds, 1e-9), _peak_memory(), float(self._uncounted)]
        largest = torch.tensor(most, dtype=torch.float64, device=device)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        tokens, positions, flops = sums.tolist()
        waiting, peak, uncounted = largest.tolist()
        steps = max(self._iterations, 1)
        self._forget()
        return Throughput(
            tokens_per_iteration=tokens / steps,
            padding=1 - tokens / positions if positions else 0.0,
            flops_per_iteration=None if uncounted else flops / steps,
            waiting=min(waiting, 1.0),
            peak_memory=peak,
        )

    def encoded(self, modality: str, inputs: Mapping[str, Mapping[str, Any]], rows: int) -> None:
        """This rank tells what encoders on ranks of their own make of a micro-batch's media."""
        if self._uncounted:
            return
        try:
            amounts = media_amounts(self._chunks[0], {modality: inputs})
        except UnsupportedError:
            self._uncounted = True
            return
        self._amounts.update({**amounts, f"{modality} rows": rows})

    def _see(self, batch: Batch) -> None:
        ids_BS = batch["input_ids"]
        lengths = batch.get(LENGTHS)
        if lengths is None:
            lengths = [ids_BS.size(1)] * ids_BS.size(0)
        self._documents.update(lengths)
        self._spans.update(span_lengths(batch))
        self._positions += ids_BS.numel()
        mask_BS = batch.get("loss_mask")
        if mask_BS is not None and self._chunks[0].takes_label_rows:
            self._labels += int(mask_BS.count_nonzero())
        else:
            self._labels += sum(lengths)
        encodes = self._chunks[0].role.is_first_stage("language") and not encoders_are_apart(
            self._chunks
        )
        if self._uncounted or not encodes:
            return
        try:
            inputs = batch.get("modality_inputs") or {}
            self._amounts.update(media_amounts(self._chunks[0], inputs))
        except UnsupportedError:
            self._uncounted = True

    def _forget(self) -> None:
        self._amounts.clear()
        self._documents.clear()
        self._spans.clear()
        self._positions = self._iterations = self._labels = 0
        self._waited, self._since = 0.0, time.monotonic()


def write_scalars(throughput: Throughput, seconds_per_iteration: float, iteration: int) -> None:
    """Put the figures into TensorBoard, on the rank that writes it."""
    from megatron.training.global_vars import get_tensorboard_writer

    writer = get_tensorboard_writer()
    if writer is not None:
        for name, value in throughput.metrics(seconds_per_iteration).items():
            writer.add_scalar(f"throughput/{name}", value, iteration)


def _flops_per_second(value: float) -> str:
    for factor, unit in ((1e12, "TFLOP/s"), (1e9, "GFLOP/s")):
        if value >= factor:
            return f"{format_count(value / factor)} {unit}"
    return f"{format_count(value / 1e6)} MFLOP/s"


def _peak_memory() -> float:
    if torch.cuda.is_initialized():
        return float(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0
