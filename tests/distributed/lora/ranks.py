"""A tiny family's model with adapters, in ours and in PEFT's hands, with the same values.

Legend: L tokens of one sample, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.distributed.models.expected import Expected, compute_expected, mean_loss
from tests.distributed.models.ranks import Layout, make_batches, run_step
from tests.rank_pool import model_parallel

Tensors = dict[str, Tensor]
RANK, ALPHA = 4, 6.0
TP2 = Layout(tp=2)


@dataclass(frozen=True, kw_only=True)
class Adapted:
    """What PEFT computes.

    Attributes:
        base: the model, without adapters; its logits and loss are those with adapters.
        before: logits [L, V] of the samples without adapters.
        gradients: of adapters, by the names of our parameters in a model that is not sharded.
    """

    base: Expected
    before: list[Tensor]
    gradients: Tensors


def settings(modules: tuple[str, ...], weights: Tensors) -> Any:
    """Of all linear layers; beside experts, which take no adapters, those of attention alone."""
    from megatron.mimo.lora import LoraSettings

    given: dict[str, Any] = {"modules": modules, "rank": RANK, "alpha": ALPHA}
    if any(".experts." in name for name in weights):
        given["targets"] = ("linear_qkv", "linear_proj")
        if any(".linear_attn." in name for name in weights):
            given["targets"] += ("in_proj", "out_proj")
    return LoraSettings(**given)


def build(name: str, expected: Expected, modules: tuple[str, ...], layout: Layout) -> Any:
    """This rank's part, with transformers' weights and new adapters."""
    from megatron.mimo.arguments.standalone import build_model, model_settings
    from megatron.mimo.checkpoints.weights import load_hugging_face
    from megatron.mimo.lora import add_adapters
    from megatron.mimo.models import load_family

    model_parallel(tp=layout.tp, pp=layout.pp)
    family = load_family(name)
    built_of = model_settings(
        family, expected.config, tp_size=layout.tp, pp_size=layout.pp, changes=layout.changes
    )
    model = build_model(family, expected.config, built_of, device=torch.device("cpu"))
    load_hugging_face(model, expected.weights, family.keys(expected.config))
    add_adapters(model, settings(modules, expected.weights))
    return model


def save(model: Any, folder: Path) -> None:
    from megatron.core import dist_checkpointing

    if torch.distributed.get_rank() == 0:
        folder.mkdir()
    torch.distributed.barrier()
    dist_checkpointing.save(model.sharded_state_dict(), str(folder))


def load(model: Any, folder: Path) -> None:
    from megatron.core import dist_checkpointing

    model.load_state_dict(dist_checkpointing.load(model.sharded_state_dict(), str(folder)))


def adapter_values(model: Any) -> Tensors:
    from megatron.mimo.lora import is_adapter

    return {
        name: parameter.detach().clone()
        for name, parameter in model.named_parameters()
        if is_adapter(name)
    }


def compute_adapted(
    name: str,
    modules: tuple[str, ...],
    folder: Path,
    change: Callable[[Any], None] | None = None,
) -> Adapted:
    """On one rank: adapters of random values, saved in ``folder``/ours and loaded by PEFT."""
    import peft

    from megatron.mimo.lora import adapted, export_adapters, module_names
    from megatron.mimo.models import load_family

    base = compute_expected(name, change)
    family, config = load_family(name), base.config
    model = build(name, base, modules, Layout())
    generator = torch.Generator().manual_seed(5)
    for _, layer in adapted(model):
        layer.adapter.up.data.normal_(std=0.2, generator=generator)
    save(model, folder / "ours")

    reference = family.reference(config).eval()
    reference.load_state_dict(base.weights)
    (folder / "peft").mkdir()
    table = family.keys(config)
    with torch.device("meta"):
        names = module_names(family.reference(config))
    told = settings(modules, base.weights)
    export_adapters(table, adapter_values(model), told, folder / "peft", names=names)
    with_adapters = peft.PeftModel.from_pretrained(reference, folder / "peft", is_trainable=True)
    labels = [family.sample(config, example).is_label for example in base.examples]
    loss, logits = mean_loss(with_adapters.eval(), base.examples, labels)
    loss.backward()
    grads = {
        key: parameter.grad
        for key, parameter in with_adapters.named_parameters()
        if parameter.grad is not None
    }
    return Adapted(
        base=replace(base, logits=logits, loss=loss.item()),
        before=base.logits,
        gradients=_as_ours(table, names, grads, model),
    )


def _as_ours(table: Any, names: dict[str, str], grads: Tensors, model: Any) -> Tensors:
    """Gradients of ``lora_A`` and ``lora_B``: one ``down`` has all of a row's, ``up`` its rows."""
    from megatron.mimo.lora import adapter_names

    ours: Tensors = {}
    own = adapter_values(model)
    for row in table.each():
        down, up = adapter_names(row.mimo)
        if down not in own:
            continue
        keys = [f"base_model.model.{names[hf].removesuffix('.weight')}.lora_" for hf in row.hf]
        ours[down] = torch.stack([grads.pop(f"{key}A.default.weight") for key in keys]).sum(dim=0)
        ours[up] = row.transform.to_mimo([grads.pop(f"{key}B.default.weight") for key in keys])
    assert not grads, f"PEFT trains more: {sorted(grads)}"
    assert set(ours) == set(own)
    return ours


def first_logits(name: str, layout: Layout, modules: tuple[str, ...], wanted: Adapted) -> float:
    """How far logits are from those without adapters, before anything is trained."""
    model = build(name, wanted.base, modules, layout)
    without = replace(wanted.base, logits=wanted.before)
    return _step(name, layout, model, without)[1]


def compare(
    name: str, layout: Layout, modules: tuple[str, ...], wanted: Adapted, folder: Path
) -> tuple[float, float]:
    """One step from the saved adapters; saves gradients as if they were adapters.

    Returns:
        The loss, and the largest difference of logits that this rank sees.
    """
    from megatron.core import parallel_state
    from megatron.mimo.lora import is_adapter

    model = build(name, wanted.base, modules, layout)
    load(model, folder / "ours")
    loss, difference = _step(name, layout, model, wanted.base)
    for key, parameter in model.named_parameters():
        assert not is_adapter(key) or parameter.requires_grad
        if parameter.requires_grad:
            parameter.data.copy_(parameter.main_grad)
    group = parallel_state.get_tensor_model_parallel_group()
    for key, parameter in model.named_parameters():
        if is_adapter(key) and not getattr(parameter, "tensor_model_parallel", False):
            copies = [torch.empty_like(parameter) for _ in range(group.size())]
            torch.distributed.all_gather(copies, parameter.data, group=group)
            assert all(torch.equal(copy, copies[0]) for copy in copies), key
    save(model, folder / f"gradients-{layout.tp}-{layout.pp}-{len(layout.changes)}")
    return loss, difference


def read_adapters(name: str, modules: tuple[str, ...], base: Expected, folder: Path) -> Tensors:
    """Adapters of a checkpoint, whole; on one rank."""
    model = build(name, base, modules, Layout())
    load(model, folder)
    return adapter_values(model)


def merged_logits(
    name: str,
    modules: tuple[str, ...],
    wanted: Adapted,
    folder: Path,
    layout: Layout = TP2,
) -> float:
    """How far logits are from PEFT's when adapters are merged."""
    from megatron.mimo.lora import adapted, merge_adapters

    model = build(name, wanted.base, modules, layout)
    load(model, folder / "ours")
    assert merge_adapters(model) == len(wanted.gradients) // 2
    assert not list(adapted(model))
    assert not adapter_values(model)
    model.freeze("language", *model.modality_submodules, frozen=False)
    return _step(name, layout, model, wanted.base)[1]


def _step(name: str, layout: Layout, model: Any, expected: Expected) -> tuple[float, float]:
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )
    from megatron.core.enums import ModelType

    model.model_type = ModelType.encoder_or_decoder
    model.config.finalize_model_grads_func = finalize_model_grads
    wrapped = DistributedDataParallel(model.config, DistributedDataParallelConfig(), model)
    wrapped.train()
    wrapped.zero_grad_buffer()
    batches = make_batches(name, layout, expected)
    loss, differences = run_step(layout, expected, [wrapped], batches)
    return loss, max(differences, default=0.0)
