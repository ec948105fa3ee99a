"""Lookup and merge: values and gradients against torch and closed forms; what the host waits for.

Legend: S sequence, B micro-batch, H hidden, N rows of one stream, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from tests.rank_pool import RankPool, model_parallel
from tests.unit.core.mimo.tiny import IDS_BS, TOKENS, VOCABULARY, build, config, inputs


def table(vocabulary: int = VOCABULARY, hidden: int = 16) -> Any:
    """Megatron's word embedding [V, H], filled with random numbers."""
    from megatron.core.tensor_parallel import VocabParallelEmbedding

    groups = model_parallel()
    return VocabParallelEmbedding(
        vocabulary, hidden, init_method=torch.nn.init.normal_, config=config(), tp_group=groups.tp
    )


def check_lookup_equals_torchs_embedding() -> None:
    from megatron.core.models.mimo.alignment import build_alignment_plan
    from megatron.core.models.mimo.model.merging.lookup import look_up_text

    module = table()
    for ids_BS in (IDS_BS, torch.full((2, 8), 3), torch.full((2, 3), 30)):  # repeats, no text
        plan = build_alignment_plan(ids_BS, TOKENS)
        weights_NH = torch.randn(plan.text_ids_N.numel(), 16)
        plain_VH = module.weight.detach().clone().requires_grad_()
        expected_NH = F.embedding(plan.text_ids_N, plain_VH)
        (expected_NH * weights_NH).sum().backward()
        calls: list[Any] = []
        for observed in (False, True):
            if observed:  # another path: only a call of the module runs its hooks
                handle = module.register_forward_hook(lambda *_, calls=calls: calls.append(1))
            module.weight.grad = None
            text_NH = look_up_text(module, plan)
            assert torch.equal(text_NH, expected_NH)
            (text_NH * weights_NH).sum().backward()
            torch.testing.assert_close(module.weight.grad, plain_VH.grad)
            assert len(calls) == observed
        handle.remove()


def check_gradient_of_a_frequent_token_in_bf16() -> None:
    """Summed in fp32 and rounded once, whether hooks observe the table or not."""
    from megatron.core.models.mimo.alignment import build_alignment_plan
    from megatron.core.models.mimo.model.merging.lookup import look_up_text

    module = table().bfloat16()
    plan = build_alignment_plan(torch.randint(0, 2, (4, 1024)), TOKENS)
    gradient_NH = (torch.rand(4096, 16) + 0.5).bfloat16()
    sums_VH = torch.zeros(VOCABULARY, 16, dtype=torch.float64)
    sums_VH.index_add_(0, plan.text_ids_N, gradient_NH.double())
    for register in (None, module.register_forward_pre_hook, module.register_full_backward_hook):
        calls: list[Any] = []
        handle = register(lambda *_, calls=calls: calls.append(1)) if register else None
        module.weight.grad = None
        look_up_text(module, plan).backward(gradient_NH)
        assert torch.equal(module.weight.grad, sums_VH.bfloat16())
        assert len(calls) == bool(handle)
        if handle:
            handle.remove()


def check_a_hook_may_fill_the_table() -> None:
    """As gathering parameters does: the weights are read after it."""
    from megatron.core.models.mimo.alignment import build_alignment_plan
    from megatron.core.models.mimo.model.merging.lookup import look_up_text

    module = table()
    gathered_VH = torch.randn_like(module.weight)

    def gather(*_: Any) -> None:
        module.weight.data.copy_(gathered_VH)

    module.register_forward_pre_hook(gather)
    plan = build_alignment_plan(IDS_BS, TOKENS)
    assert torch.equal(look_up_text(module, plan), gathered_VH[plan.text_ids_N])
    assert "forward" not in vars(module)


def check_lookup_of_a_frozen_table() -> None:
    from megatron.core.models.mimo.alignment import build_alignment_plan
    from megatron.core.models.mimo.model.merging.lookup import look_up_text

    module = table().requires_grad_(False)
    plan = build_alignment_plan(IDS_BS, TOKENS)
    assert not look_up_text(module, plan).requires_grad


def check_merge_against_numerical_gradients() -> None:
    from megatron.core.models.mimo.alignment import build_alignment_plan, cut_plan
    from megatron.core.models.mimo.model.merging.merge import merge_streams

    long_BS = torch.full((2, 20), 1).index_fill(1, torch.arange(2, 18), 30)  # copied as blocks
    for ids_BS in (IDS_BS, long_BS):
        plan = build_alignment_plan(ids_BS, TOKENS)
        for held in (plan, cut_plan(plan, torch.arange(ids_BS.size(1))[1::2])):
            names = [name for name in ("images", "audio") if plan.counts[name]]
            rows = [
                torch.randn(count, 3, dtype=torch.float64, requires_grad=True)
                for count in (held.text_ids_N.numel(), *(plan.counts[name] for name in names))
            ]

            def merge(*rows: torch.Tensor, held: Any = held, names: Any = names) -> torch.Tensor:
                return merge_streams(held, dict(zip(("text", *names), rows, strict=True)))

            assert torch.autograd.gradcheck(merge, rows)


def check_merge_gradient_in_closed_form() -> None:
    from megatron.core.models.mimo.alignment import build_alignment_plan
    from megatron.core.models.mimo.model.merging.merge import merge_streams

    plan = build_alignment_plan(IDS_BS, TOKENS)
    counts = {"text": plan.text_ids_N.numel(), **plan.counts}
    rows = {name: torch.randn(count, 4, requires_grad=True) for name, count in counts.items()}
    grad_SBH = torch.randn(8, 2, 4)
    merge_streams(plan, rows).backward(grad_SBH)
    for name, rows_NH in rows.items():
        token = TOKENS.get(name)
        where = [
            (s, b)
            for b, ids in enumerate(IDS_BS.tolist())
            for s, this in enumerate(ids)
            if this == token or (token is None and this not in TOKENS.values())
        ]
        assert torch.equal(rows_NH.grad, torch.stack([grad_SBH[s, b] for s, b in where]))
    frozen = {name: rows_NH.detach() for name, rows_NH in rows.items()}
    assert not merge_streams(plan, frozen).requires_grad
    one = frozen | {"images": torch.zeros(3, 4, requires_grad=True)}
    merge_streams(plan, one).sum().backward()
    assert torch.equal(one["images"].grad, torch.ones(3, 4))


def check_idle_rows_reach_every_parameter() -> None:
    from megatron.core.models.mimo.model.encoding.idle import idle_rows, take_part

    module = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 4).requires_grad_(False))
    rows_NH = idle_rows(module, 16)
    assert rows_NH is not None
    assert rows_NH.shape == (0, 16)
    hidden_SBH = torch.randn(2, 2, 16, requires_grad=True)
    passed_SBH = take_part(hidden_SBH, [rows_NH])
    assert torch.equal(passed_SBH, hidden_SBH)
    (3 * passed_SBH).sum().backward()
    assert torch.equal(hidden_SBH.grad, torch.full((2, 2, 16), 3.0))
    assert torch.equal(module[0].weight.grad, torch.zeros(3, 2))
    assert torch.equal(module[0].bias.grad, torch.zeros(3))
    assert module[1].weight.grad is None
    assert take_part(hidden_SBH, []) is hidden_SBH
    assert idle_rows(module.requires_grad_(False), 16) is None
    with torch.no_grad():
        assert idle_rows(torch.nn.Linear(2, 2), 16) is None


def waits(step: Callable[[], torch.Tensor]) -> tuple[dict[str, int], dict[str, int]]:
    """What the host waits for in forward and in backward of ``step``."""
    from megatron.mimo.backend.host_sync import HostSyncCounter

    with HostSyncCounter() as forward:
        loss = step()
    with HostSyncCounter() as backward:
        loss.backward()
    return dict(forward.counts), dict(backward.counts)


def check_plan_spares_the_host_every_wait() -> None:
    from megatron.core.models.mimo.alignment import build_alignment_plan

    model, batch = build(position_embedding_type="learned_absolute"), inputs()
    text_BS = torch.ones_like(IDS_BS)
    text_only = inputs({}, ids_BS=text_BS)
    for given, ids_BS in ((batch, IDS_BS), (text_only, text_BS)):
        plan = build_alignment_plan(ids_BS, TOKENS)
        found = waits(lambda given=given, plan=plan: model(**given, alignment_plan=plan)[0].sum())
        assert found == waits(lambda: language_model_alone(model, batch)), found


def language_model_alone(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    """Megatron itself looks at the host's generator in its attention, once per layer."""
    merged_SBH = torch.randn(8, 2, 16, requires_grad=True)
    losses: torch.Tensor = model.language_model(
        input_ids=None,
        position_ids=None,
        attention_mask=None,
        decoder_input=merged_SBH,
        labels=batch["labels"],
    )
    return losses.sum()


def check_counter_sees_the_waits_of_stocks_way() -> None:
    """The same counter on boolean masks, and on a model without a plan: it can fail."""
    model, batch = build(), inputs()
    forward, _ = waits(lambda: model(**batch)[0].sum())
    assert forward["aten::nonzero"] > 0

    def merge_by_masks() -> torch.Tensor:
        merged_BSH = torch.zeros(*IDS_BS.shape, 16)
        rows_NH = model.modality_submodules["images"](batch["modality_inputs"]["images"])
        mask_BS = IDS_BS.eq(TOKENS["images"])
        assert mask_BS.sum().item() == rows_NH.size(0)
        mask_BSH = mask_BS.unsqueeze(-1).expand_as(merged_BSH)
        return merged_BSH.masked_scatter_(mask_BSH, rows_NH.flatten())[mask_BS].sum()

    forward, backward = waits(merge_by_masks)
    assert forward["aten::_local_scalar_dense"] == 1
    assert forward["aten::index"] == 1
    assert backward


CHECKS = [value for name, value in list(globals().items()) if name.startswith("check_")]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_embedding(ranks: RankPool, check: Callable[[], None]) -> None:
    ranks(1)(check)
