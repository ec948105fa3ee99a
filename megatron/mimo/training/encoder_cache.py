"""--cache-encoder: rows of frozen encoders are computed once, for all epochs and runs.

The cache of an encoder lies in a folder that is named after its weights. Rows are kept and used in
bfloat16, even those that were just computed: a run gives the same with a full and an empty cache.

Legend: N rows of one encoder, H features.
"""

from __future__ import annotations

import hashlib
import queue
import threading
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron.core.models.mimo import MimoModel
from megatron.core.models.mimo.alignment import Encoded, EncodedRows
from megatron.core.models.mimo.comm.encoder_split import EncoderSplit
from megatron.core.models.mimo.errors import ConfigError
from megatron.core.models.mimo.submodules.base import EncoderCall
from megatron.mimo.data.row_cache.cache import RowCache
from megatron.mimo.data.row_cache.lookup import BESIDE, COUNTS, KEYS, ROWS, SHARED, take_items

__all__ = ["CachedEncoder", "EncoderCaches", "refuse_trained", "weights_name"]

_WAITING = 8  # micro-batches whose rows are still to be written


class EncoderCaches:
    """The caches of a run's encoders, by modality and encoder; none without the flag.

    Args:
        args: with ``cache_encoder``.
        chunks: of the model, those of this rank.
    """

    def __init__(self, args: Namespace, chunks: Sequence[MimoModel] = ()) -> None:
        self._args = args
        self._chunks = chunks
        self._caches: dict[tuple[str, str], RowCache] = {}
        self._calls: list[CachedEncoder] = []

    def opened(self) -> Mapping[tuple[str, str], RowCache]:
        """The caches, and the model made to use them, once its weights are loaded.

        Collective over the tensor-parallel ranks.

        Raises:
            ConfigError: as ``refuse_trained``.
        """
        if self._caches or not getattr(self._args, "cache_encoder", None):
            return self._caches
        from megatron.core import mpu

        writes = not (mpu.get_tensor_model_parallel_rank() or mpu.get_context_parallel_rank())
        for chunk in self._chunks:
            refuse_trained(chunk)
            for modality, name, submodule in _encoders(chunk):
                encoder = submodule.encoders[name]
                named = weights_name(encoder, mpu.get_tensor_model_parallel_group())
                folder = Path(self._args.cache_encoder) / f"{modality}.{name}.{named}"
                cache = RowCache(folder)
                divided = submodule.encoder_calls.get(name)
                call = CachedEncoder(cache, writes=writes, divided=divided)
                submodule.encoder_calls[name] = call
                self._caches[modality, name] = cache
                self._calls.append(call)
        return self._caches

    def report(self) -> list[str]:
        """The counts of media found, computed and written, in words; empty without the flag.

        Collective over all ranks. Media of a batch that ranks share count once.
        """
        if not getattr(self._args, "cache_encoder", None):
            return []
        for call in self._calls:
            call.finish()
        mine = [call.counts for call in self._calls if call.writes]
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, mine)
        figures = [counts for of_rank in everyone for counts in of_rank]
        found, computed, written = (sum(column) for column in zip((0, 0, 0), *figures, strict=True))
        return [
            f"encoder cache: rows of {found} of {found + computed} media were there "
            f"({100 * found / max(found + computed, 1):.1f} %), {written} were written"
        ]


class CachedEncoder:
    """Runs an encoder on the media that the cache lacks, and takes the rows of others from it.

    An ``EncoderCall`` of ``ModalitySubmodules``. Media were looked up where the batch was read. The
    tensor-parallel ranks get one batch, and divide the missing media among them. The
    context-parallel ranks read for themselves, and divide those that, as the batch says, all miss.

    Args:
        cache: where rows are written to.
        writes: write them.
        divided: runs the encoder on a part of its items on each rank that has the same inputs, and
            returns the rows of all; None where each rank encodes all missing media itself.

    Attributes:
        found, computed, written: media.
    """

    def __init__(
        self, cache: RowCache, *, writes: bool, divided: EncoderCall | None = None
    ) -> None:
        self.found = self.computed = self.written = 0
        self._cache = cache
        self.writes = writes
        self._divided = divided
        self._divided_here = _among_tensor_parallel(divided)
        self._waiting: queue.Queue[tuple[list[bytes], Tensor, list[int]] | None] = queue.Queue(
            _WAITING
        )
        self._writer: threading.Thread | None = None

    def __call__(
        self, name: str, encoder: nn.Module, encode: Any, inputs: Mapping[str, Any]
    ) -> Encoded:
        """Rows [N, H] of all items, in order, with their levels.

        Args:
            name: the encoder's, for errors.
            encoder: has ``rows_per_item(**inputs)``.
            encode: runs it.
            inputs: keyword arguments of its call, with what ``look_up`` has put beside them;
                without that, nothing is looked up.
        """
        if COUNTS not in inputs:
            return _run(self._divided_here, name, encoder, encode, inputs)
        counts, there = list(inputs[COUNTS]), inputs.get(ROWS)
        self.found += sum(count >= 0 for count in counts)
        known = [] if there is None else list(there.split([n for n in counts if n >= 0], dim=1))
        fresh = self._computed(name, encoder, encode, inputs) if inputs[KEYS] else []
        dtype = (fresh or known)[0].dtype
        parts = iter(known), iter(fresh)
        rows = torch.cat([next(parts[count < 0]).to(dtype) for count in counts], dim=1)
        return EncodedRows(rows_NH=rows[0], levels=tuple(rows[1:])).simplest()

    def _computed(
        self, name: str, encoder: Any, encode: Any, inputs: Mapping[str, Any]
    ) -> list[Tensor]:
        """Rows [tensors, n, H] of each medium that is missing, rounded as the cache keeps them."""
        missing = {key: value for key, value in inputs.items() if key not in BESIDE}
        counts = list(encoder.rows_per_item(**missing))
        shared = list(inputs.get(SHARED, ()))
        alone = [item for item in range(len(counts)) if item not in set(shared)]
        parts: dict[int, Tensor] = {}
        for items, divided in ((shared, self._divided), (alone, self._divided_here)):
            if not items:
                continue
            with torch.no_grad():
                some = take_items(missing, items)
                encoded = EncodedRows.of(_run(divided, name, encoder, encode, some))
            sizes = [counts[item] for item in items]
            parts |= zip(items, torch.stack(encoded.tensors).split(sizes, dim=1), strict=True)
        rows = torch.cat([parts[item] for item in range(len(counts))], dim=1)
        rounded = rows.bfloat16()
        self.computed += len(counts)
        self._write(inputs[KEYS], rounded, counts)
        return list(rounded.to(rows.dtype).split(counts, dim=1))

    @property
    def counts(self) -> tuple[int, int, int]:
        """Media that were found, computed, written."""
        return self.found, self.computed, self.written

    def finish(self) -> None:
        """Wait until all is written."""
        if self._writer is not None:
            self._waiting.put(None)
            self._writer.join()
            self._writer = None

    def _write(self, keys: Sequence[str], rows: Tensor, counts: list[int]) -> None:
        if not self.writes:
            return
        if self._writer is None:
            self._writer = threading.Thread(target=self._write_all, daemon=True)
            self._writer.start()
        self._waiting.put(([bytes.fromhex(key) for key in keys], rows, counts))

    def _write_all(self) -> None:
        """Write rows in a thread of its own, so that the step does not wait for the device."""
        while (waiting := self._waiting.get()) is not None:
            keys, rows, counts = waiting
            parts = rows.cpu().split(counts, dim=1)
            self.written += self._cache.put(dict(zip(keys, parts, strict=True)))


def _run(
    divided: EncoderCall | None,
    name: str,
    encoder: nn.Module,
    encode: Any,
    inputs: Mapping[str, Any],
) -> Encoded:
    return encode(inputs) if divided is None else divided(name, encoder, encode, inputs)


def _among_tensor_parallel(call: EncoderCall | None) -> EncoderSplit | None:
    """The part of a split among ranks that find the same media in a cache; None for none."""
    if not isinstance(call, EncoderSplit):
        return None
    sharers = tuple(one for one in call.sharers if one.gradients == "copies")
    return replace(call, sharers=sharers) if sharers else None


def refuse_trained(model: MimoModel) -> None:
    """Refuse encoders whose rows change during training, or cannot be assigned to media.

    Raises:
        ConfigError: one is trained, draws random numbers, or does not say which rows are whose.
    """
    for modality, name, submodule in _encoders(model):
        encoder = submodule.encoders[name]
        where = f"--cache-encoder: encoder '{name}' of {modality}"
        if any(parameter.requires_grad for parameter in encoder.parameters()):
            raise ConfigError(
                f"{where} is trained, so that its rows change with every step; freeze it "
                f"(--freeze {modality}.encoders), or leave --cache-encoder out"
            )
        if not hasattr(encoder, "rows_per_item"):
            raise ConfigError(
                f"{where} has no rows_per_item, which says which rows are of which medium; "
                "give it one, or leave --cache-encoder out"
            )
        draws = [one.p for one in encoder.modules() if isinstance(one, nn.Dropout) and one.p]
        if draws:
            raise ConfigError(
                f"{where} has dropout {max(draws)}, so that its rows are never the same; set "
                "it to 0, or leave --cache-encoder out"
            )


def _encoders(model: MimoModel) -> list[tuple[str, str, Any]]:
    """Modality and name of each encoder, and the submodule that has it."""
    submodules: dict[str, Any] = dict(model.modality_submodules.items())
    return [(modality, name, one) for modality, one in submodules.items() for name in one.encoders]


def weights_name(encoder: nn.Module, tp_group: dist.ProcessGroup) -> str:
    """A name for an encoder's weights, equal on all ranks that hold a part of them.

    Collective over ``tp_group``.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(encoder.state_dict().items()):
        if isinstance(tensor, Tensor):
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)} ".encode())
            content = tensor.detach().cpu().contiguous().reshape(-1)
            digest.update(content.view(torch.uint8).numpy())
    parts: list[Any] = [None] * tp_group.size()
    dist.all_gather_object(parts, digest.hexdigest(), group=tp_group)
    distinct = sorted(set(parts))
    return hashlib.sha256(" ".join(distinct).encode()).hexdigest()[:16]
