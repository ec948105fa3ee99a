"""The methods that scripts for stock MIMO call and override, and what is called of others.

Legend: S sequence, B micro-batch, H hidden, N rows of one modality.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.rank_pool import RankPool, model_parallel
from tests.unit.core.mimo.tiny import (
    IDS_BS,
    LENGTH,
    StoppedError,
    arguments_of_a_call_that_stops,
    build,
    config,
    inputs,
    merge_by_loop,
    seen_by_language_model,
)


def check_language_model_is_called_by_keyword() -> None:
    model, batch = build(), inputs()
    seen = seen_by_language_model(model)
    attention_mask = torch.zeros(2, 1, LENGTH, LENGTH, dtype=torch.bool)
    model(**batch, attention_mask=attention_mask)
    assert seen["input_ids"] is None
    assert seen["attention_mask"] is attention_mask
    assert seen["position_ids"] is batch["position_ids"]
    assert seen["labels"] is batch["labels"]
    assert seen["loss_mask"] is batch["loss_mask"]
    assert seen["packed_seq_params"] is None


def check_entry_points_of_old_scripts() -> None:
    model, batch = build(), inputs()
    text_NH = model.get_text_embeddings(IDS_BS, batch["position_ids"], model.special_token_ids)
    table_VH = model.language_model.embedding.word_embeddings.weight
    ids_N = [token for token in IDS_BS.view(-1).tolist() if token not in (30, -200)]
    assert torch.equal(text_NH, table_VH[ids_N])
    rows = {
        name: model.modality_submodules[name](batch["modality_inputs"][name])
        for name in ("images", "audio")
    }
    align = model.align_embeddings_by_token_positions
    merged_SBH = align({**rows, "text": text_NH}, IDS_BS, model.special_token_ids)
    assert torch.equal(merged_SBH, merge_by_loop(model, batch))
    with pytest.raises(ValueError, match="No modality embeddings"):
        align({}, IDS_BS, model.special_token_ids)
    with pytest.raises(ValueError, match=r"Number of text tokens \(10\) does not match"):
        align({**rows, "text": text_NH[1:]}, IDS_BS, model.special_token_ids)
    with pytest.raises(ValueError, match="No special token ID defined for modality video"):
        align({**rows, "text": text_NH, "video": rows["images"]}, IDS_BS, model.special_token_ids)
    with pytest.raises(ValueError, match=r"Number of audio tokens \(3\) does not match"):
        align({"images": rows["images"], "text": text_NH}, IDS_BS, model.special_token_ids)
    rows["images"] = rows["images"][:, :4]
    with pytest.raises(ValueError, match="hidden_size"):
        align({**rows, "text": text_NH}, IDS_BS, model.special_token_ids)


def check_text_lookup_takes_the_positions_of_text() -> None:
    model, batch = build(position_embedding_type="learned_absolute"), inputs()
    embedding = model.language_model.embedding
    expected_NH = torch.stack(
        [
            embedding.word_embeddings.weight[token] + embedding.position_embeddings.weight[s]
            for ids in IDS_BS.tolist()
            for s, token in enumerate(ids)
            if token not in (30, -200)
        ]
    )
    multimodal = torch.stack([batch["position_ids"], 0 * IDS_BS, 0 * IDS_BS])
    for position_ids in (batch["position_ids"], multimodal):
        text_NH = model.get_text_embeddings(IDS_BS, position_ids, model.special_token_ids)
        assert torch.equal(text_NH, expected_NH)


def check_overridden_methods_are_used() -> None:
    from megatron.core.models.mimo import MimoModel

    class Louder(MimoModel):
        def get_text_embeddings(self, *args: Any) -> torch.Tensor:
            return 2 * super().get_text_embeddings(*args)

    class Shifted(MimoModel):
        def align_embeddings_by_token_positions(self, rows: Any, *args: Any) -> torch.Tensor:
            assert set(rows) == {"images", "audio", "text"}
            return super().align_embeddings_by_token_positions(rows, *args) + 1

    class OtherRows(MimoModel):
        def _forward_encoders(self, *args: Any) -> dict[str, torch.Tensor]:
            return {name: -rows for name, rows in super()._forward_encoders(*args).items()}

    class OnlyThese(MimoModel):
        def _forward_language_module(
            self,
            input_ids: Any,
            position_ids: Any,
            attention_mask: Any,
            loss_mask: Any,
            labels: Any,
            input_tensors: Any,
            packing_kwargs: Any = None,
        ) -> Any:
            assert set(input_tensors) == {"images", "audio"}
            return "mine", loss_mask

    batch = inputs()
    is_text_SB1 = ((IDS_BS != 30) & (IDS_BS != -200)).t().unsqueeze(2)
    for kind, change in (
        (Louder, lambda merged: merged.where(~is_text_SB1, 2 * merged)),
        (Shifted, lambda merged: merged + 1),
        (OtherRows, lambda merged: merged.where(is_text_SB1, -merged)),
    ):
        model = build(kind=kind)
        seen = seen_by_language_model(model)
        model(**batch)[0].sum().backward()
        torch.testing.assert_close(seen["decoder_input"], change(merge_by_loop(model, batch)))
        assert all(parameter.grad is not None for parameter in model.parameters())
    assert build(kind=OnlyThese)(**batch)[0] == "mine"


def check_methods_replaced_on_the_instance_are_used() -> None:
    model, batch = build(), inputs()
    expected_SBH = merge_by_loop(model, batch)
    seen = seen_by_language_model(model)
    plain = model.align_embeddings_by_token_positions
    model.align_embeddings_by_token_positions = lambda *args: 3 * plain(*args)
    model(**batch)
    assert torch.equal(seen["decoder_input"], 3 * expected_SBH)
    model._forward_language_module = lambda *args: ("mine", len(args))
    assert model(**batch) == ("mine", 7)


def check_packing_arguments_become_packed_params() -> None:
    from megatron.mimo.layers import language_layer_spec

    model_parallel()
    model = build(transformer_layer_spec=language_layer_spec(config()))
    batch = inputs({"images": 2, "audio": 1}, ids_BS=IDS_BS[:1])
    cu_seqlens = torch.tensor([0, 4, 8])
    packing = {"cu_seqlens_q": cu_seqlens, "cu_seqlens_kv": cu_seqlens, "max_seqlen_q": 4}
    seen = arguments_of_a_call_that_stops(model)
    with pytest.raises(StoppedError):
        model(**batch, packing_kwargs=packing)
    packed = seen["packed_seq_params"]
    assert packed.qkv_format == "thd"
    assert packed.cu_seqlens_q.dtype == torch.int32
    assert packed.max_seqlen_q == 4
    assert packing["cu_seqlens_q"] is cu_seqlens  # the caller's dictionary is left alone


def check_children_wrapped_one_by_one() -> None:
    """What a training loop asks of the model reaches the wrappers whose option needs it."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    model, batch = build({"calculate_per_token_loss": True}), inputs()
    plain, _ = model(**batch)
    overlap = DistributedDataParallelConfig(overlap_grad_reduce=True)
    model.language_model = DistributedDataParallel(model.config, overlap, model.language_model)
    no_overlap = DistributedDataParallelConfig()
    model.modality_submodules["images"] = DistributedDataParallel(
        model.config, no_overlap, model.modality_submodules["images"]
    )
    model.zero_grad_buffer()
    with model.no_sync():
        groups = model.language_model.bucket_groups
        assert not any(group.is_last_microbatch for group in groups)
        wrapped, _ = model(**batch)
    assert all(group.is_last_microbatch for group in groups)
    assert torch.equal(plain, wrapped)
    wrapped.sum().backward()
    gradients = [parameter.main_grad for parameter in model.language_model.parameters()]
    assert all(gradient.any() for gradient in gradients)
    model.start_grad_sync()
    model.language_model.finish_grad_sync()
    model.zero_grad_buffer()
    assert not any(gradient.any() for gradient in gradients)
    for nothing_gathers in (
        model.enable_forward_pre_hook,
        model.disable_forward_pre_hook,
        model.start_param_sync,
        model.free_overlap_buffers,
    ):
        nothing_gathers()
    assert model.pre_process is True


CHECKS = [value for name, value in list(globals().items()) if name.startswith("check_")]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_entry_point(ranks: RankPool, check: Callable[[], None]) -> None:
    ranks(1)(check)
