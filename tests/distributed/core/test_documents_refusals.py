"""What cannot be packed, spanned or rotated is refused by name, on every rank alike; what can is
done without waiting for the device."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.distributed.core.documents import (
    SEQUENCE,
    Kind,
    Sizes,
    batches,
    build_model,
    language_spec,
)
from tests.rank_pool import RankPool, model_parallel

PACKED, DENSE = Kind(), Kind(packed=False)
MROPE = Kind(positions="mrope")


def refusals_at_construction(sizes: Sizes) -> list[str]:
    """``class: message`` of each model that cannot be built."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.mimo import MimoModel, MimoModelConfig
    from megatron.core.models.mimo.errors import MimoError

    groups = model_parallel(tp=sizes.tp, cp=sizes.cp)
    found = []

    def attempt(
        kind: Kind,
        kv_format: str,
        *,
        stock: bool = False,
        one_layer: bool = False,
        fused: bool = False,
        **changes: Any,
    ) -> None:
        spec = language_spec(kind, sizes, groups, stock_attention=stock)
        spec.params["config"] = replace(spec.params["config"], **changes)
        spec.params["config"].apply_rope_fusion = fused  # megatron-core wants TE for it
        if one_layer:
            spec.params["transformer_layer_spec"] = get_gpt_layer_local_spec()
        config = MimoModelConfig(language_model_spec=spec, kv_format=kv_format)
        try:
            MimoModel(config, cp_group=groups.cp, tp_group=groups.tp)
        except MimoError as error:
            found.append(f"{type(error).__name__}: {error}")
        else:
            found.append("built")

    attempt(PACKED, "thd")
    attempt(MROPE, "thd")
    attempt(PACKED, "thd", stock=True)
    attempt(PACKED, "sbhd", one_layer=True)
    attempt(MROPE, "sbhd", mrope_section=[2, 2, 2])
    attempt(MROPE, "sbhd", mrope_section=[2, 2])
    attempt(MROPE, "sbhd", mrope_section=None)
    attempt(MROPE, "sbhd", rotary_interleaved=True)
    attempt(MROPE, "thd", fused=True)
    return found


@pytest.mark.parametrize("sizes", [Sizes(), Sizes(cp=2)], ids=["one", "cp2"])
def test_what_is_refused_at_construction(ranks: RankPool, sizes: Sizes) -> None:
    first, *others = ranks(sizes.world_size)(refusals_at_construction, sizes)
    assert all(other == first for other in others)
    in_parallel = "UnsupportedError: context_parallel_size = 2 with megatron-core's DotProductAtt"
    packed = "UnsupportedError: kv_format = 'thd' with megatron-core's DotProductAttention"
    beginnings = [
        "built",
        "built",
        in_parallel if sizes.cp > 1 else packed,
        in_parallel if sizes.cp > 1 else "built",
        "ConfigError: mrope_section [2, 2, 2] sums up to 6; expected three numbers (time, height, "
        "width) that sum up to 4, half of the rotated head size 8 = kv_channels 8 * rotary_perce",
        "ConfigError: mrope_section [2, 2] sums up to 4; expected three numbers",
        "ConfigError: mrope_section is None; expected three numbers",
        "ConfigError: rotary_interleaved is set with position_embedding_type 'mrope'",
        "ConfigError: kv_format = 'thd' with multimodal RoPE and apply_rope_fusion",
    ]
    for message, beginning in zip(first, beginnings, strict=True):
        assert message.startswith(beginning)


def refusals_of_batches(sizes: Sizes, stock: bool) -> list[str]:
    from megatron.core.models.mimo.errors import MimoError

    kind = replace(MROPE, packed=not stock)
    groups = model_parallel(tp=sizes.tp, cp=sizes.cp)
    model = build_model(kind, sizes, groups, stock_attention=stock)
    dense = next(iter(batches(replace(kind, packed=False), sizes)))
    packed = next(iter(batches(replace(kind, packed=True), sizes)))
    spans_BS = torch.zeros(2, SEQUENCE, dtype=torch.int32)
    mask = torch.zeros(1, 1, SEQUENCE, SEQUENCE, dtype=torch.bool)
    found = []
    for batch in (
        dense | {"packing_kwargs": packed["packing_kwargs"]},
        packed | {"packing_kwargs": {"cu_seqlens_q": (0, 6, SEQUENCE)}},
        packed | {"packing_kwargs": packed["packing_kwargs"] | {"cp_group": groups.cp}},
        dense | {"position_ids": None},
        dense | {"position_ids": torch.zeros(2, 2, SEQUENCE, dtype=torch.int64)},
        dense | {"span_ids": spans_BS, "attention_mask": None if sizes.cp > 1 else mask},
        dense | {"span_ids": spans_BS.float()},
        dense | {"span_ids": spans_BS},
        dense | {"attention_mask": mask},
    ):
        try:
            model(**batch)
            found.append("done")
        except MimoError as error:
            found.append(f"{type(error).__name__}: {error}")
    return found


@pytest.mark.parametrize(
    ("sizes", "stock"),
    [(Sizes(), False), (Sizes(), True), (Sizes(cp=2), False)],
    ids=["one", "stock", "cp2"],
)
def test_what_is_refused_in_a_batch(ranks: RankPool, sizes: Sizes, stock: bool) -> None:
    first, *others = ranks(sizes.world_size)(refusals_of_batches, sizes, stock)
    assert all(other == first for other in others)
    deaf = "UnsupportedError: packing_kwargs were given, and megatron-core's DotProductAttention"
    cp = sizes.cp > 1
    beginnings = [
        deaf if stock else "InputError: input_ids has shape [2, 64] with packing_kwargs",
        deaf
        if stock
        else "InputError: document 0 of the packed sequence takes 6 tokens, not divisible by "
        "2*cp = 4"
        if cp
        else "done",
        deaf if stock else "UnsupportedError: packing_kwargs have ['cp_group']",
        "InputError: position_ids are None; multimodal RoPE takes [3, B, S]",
        "InputError: position_ids are torch.int64 [2, 2, 64]; expected torch.int64 [2, 64], as "
        "input_ids has, or [3, 2, 64] for multimodal RoPE",
        "done" if cp else "InputError: both span_ids and attention_mask were given",
        "InputError: span_ids are torch.float32 of shape [2, 64]",
        "UnsupportedError: span_ids were given, and DotProductAttention does not know them"
        if stock
        else "done",
        "UnsupportedError: context parallelism requires attention_mask=None" if cp else "done",
    ]
    for message, beginning in zip(first, beginnings, strict=True):
        assert message.startswith(beginning)


def waits(kind: Kind, sizes: Sizes) -> dict[str, int]:
    """What waits for the device in forward and backward, with a plan cut on the host."""
    from megatron.core.models.mimo.partition.packing import packed_params
    from megatron.core.models.mimo.partition.utils import sequence_cut
    from tests.distributed.core.device_waits import DeviceWaits

    class Counter(DeviceWaits):
        """Leaves out borders of documents too: they are on the host with a GPU too."""

        def __init__(self) -> None:
            super().__init__()
            self.borders: set[int] = set()

        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            first = args[0] if args else None
            if (
                isinstance(first, torch.Tensor)
                and first.untyped_storage().data_ptr() in self.borders
            ):
                return func(*args, **(kwargs or {}))
            return super().__torch_dispatch__(func, types, args, kwargs)

    model = build_model(kind, sizes, model_parallel(tp=sizes.tp, cp=sizes.cp))
    counter = Counter()

    def note_borders(_: Any, __: Any, kwargs: Any) -> None:
        packed = kwargs["packed_seq_params"]
        for borders in (packed.cu_seqlens_q, packed.cu_seqlens_q_padded):
            if borders is not None:
                counter.borders.add(borders.untyped_storage().data_ptr())

    model.language_model.register_forward_pre_hook(note_borders, with_kwargs=True)
    batch = next(iter(batches(kind, sizes)))
    if model.partition_adapter is not None:
        packed = packed_params(batch["packing_kwargs"], cp_size=sizes.cp)
        plan = sequence_cut(model.partition_adapter, packed).share_of_plan(batch["alignment_plan"])
        batch["alignment_plan"] = plan
    with counter:
        losses, _ = model(**batch)
        losses.sum().backward()
    assert counter.borders
    return dict(counter.counts)


@pytest.mark.parametrize("sizes", [Sizes(), Sizes(cp=2), Sizes(tp=2, cp=2)], ids=str)
@pytest.mark.parametrize("kind", [PACKED, Kind(positions="mrope", spans=True)], ids=str)
def test_packed_rows_do_not_wait_for_the_device(ranks: RankPool, kind: Kind, sizes: Sizes) -> None:
    assert ranks(sizes.world_size)(waits, kind, sizes) == [{}] * sizes.world_size
