"""Encoders on ranks of their own: a pipeline of modules, written for megatron-core's own MIMO.

    torchrun --nproc-per-node 4 examples/mimo/disjoint_by_hand.py

Ranks 0 and 1 encode images, data parallel; ranks 2 and 3 are the two pipeline stages of the
language model. Megatron's schedule runs both modules as one pipeline. A test holds that it prints
the same losses and gradient norms with megatron-core's own MIMO.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.enums import ModelType
from megatron.core.hyper_comm_grid import HyperCommGrid
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.mimo import (
    MimoModel,
    MimoModelConfig,
    VisionModalitySubmodules,
    get_mimo_optimizer,
)
from megatron.core.optimizer import OptimizerConfig
from megatron.core.pipeline_parallel.multimodule_communicator import MultiModulePipelineCommunicator
from megatron.core.pipeline_parallel.schedules import (
    forward_backward_pipelining_without_interleaving,
)
from megatron.core.process_groups_config import (
    MultiModuleProcessGroupCollection,
    ProcessGroupCollection,
)
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.mimo.backend import select_backend

IMAGE, PATCHES, PIXELS, SEQUENCE, HIDDEN, SAMPLES = 99, 4, 12, 16, 32, 4


def make_grid(offset: int, *, dp: int, pp: int) -> HyperCommGrid:
    """A grid from rank ``offset`` on, and its groups."""
    grid = HyperCommGrid([1, 1, dp, pp], ["tp", "cp", "dp", "pp"], rank_offset=offset)
    for axes in ("tp", "cp", "dp", "pp", ["dp", "cp"], ["tp", "pp"], ["tp", "cp", "dp", "pp"]):
        grid.create_pg(axes)
    grid.register_view("expert", [1, 1, dp, pp], ["expt_tp", "ep", "expt_dp", "pp"])
    for axes in ("ep", "expt_dp", ["expt_tp", "ep", "pp"]):
        grid.create_pg(axes, view="expert")
    return grid


def is_on(grid: HyperCommGrid) -> bool:
    """True where this rank is one of the grid's."""
    return bool(grid.rank_offset <= dist.get_rank() < grid.rank_offset + grid.size)


def groups_of(grid: HyperCommGrid) -> ProcessGroupCollection:
    """Its groups as Megatron's modules take them."""
    groups = ProcessGroupCollection(
        **{axis: grid.get_pg(axis) for axis in ("tp", "cp", "dp", "pp")},
        dp_cp=grid.get_pg(["dp", "cp"]),
        mp=grid.get_pg(["tp", "pp"]),
        ep=grid.get_pg("ep", view="expert"),
        expt_dp=grid.get_pg("expt_dp", view="expert"),
    )
    groups.embd = groups.pos_embd = groups.pp
    return groups


def samples(number: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Micro-batch ``number``: tokens [SAMPLES, S], patches [SAMPLES * PATCHES, pixels]."""
    generator = torch.Generator().manual_seed(number)
    tokens = torch.randint(0, IMAGE, (SAMPLES, SEQUENCE), generator=generator)
    tokens[:, 1 : 1 + PATCHES] = IMAGE
    return tokens, torch.rand(SAMPLES * PATCHES, PIXELS, generator=generator)


def forward_step(
    numbers: Iterator[int], model: Any, images: HyperCommGrid, device: str
) -> tuple[Any, Any]:
    """One micro-batch: the language model has all its samples, an encoder replica its half."""
    tokens, patches = (tensor.to(device) for tensor in samples(next(numbers)))
    inputs = None
    if is_on(images):
        replica, share = images.get_pg("dp").rank(), SAMPLES // images.get_pg("dp").size()
        tokens = tokens[replica * share : (replica + 1) * share]
        mine = patches[replica * share * PATCHES : (replica + 1) * share * PATCHES]
        inputs = {"images": {"patches": {"input": mine}}}
    output, _ = model(
        input_ids=tokens,
        position_ids=torch.arange(SEQUENCE, device=device).expand(tokens.size(0), -1),
        labels=tokens.roll(-1, dims=1).clamp(max=IMAGE - 1),
        modality_inputs=inputs,
    )
    return output, lambda losses: (
        losses.sum(),
        torch.tensor(losses.numel(), dtype=torch.int, device=device),
        {"loss": losses.detach().mean()},
    )


def finalize(_: Any, num_tokens: torch.Tensor, *, modules: list[Any], **__: Any) -> None:
    """Reduce each module's gradients over its own ranks; divide all by the tokens of the batch.

    The language model's last stage has counted them; there is one rank of it here.
    """
    dist.all_reduce(num_tokens)
    for module in modules:
        module.finish_grad_sync()
        module.scale_gradients(1.0 / num_tokens.item())


def build(grids: dict[str, HyperCommGrid]) -> MimoModel:
    """This rank's modules, with the same weights on every rank that has them."""
    modules: list[Any] = []  # wrapped, once they are
    config = TransformerConfig(
        num_layers=2,
        hidden_size=HIDDEN,
        num_attention_heads=4,
        pipeline_model_parallel_size=2,
        pipeline_dtype=torch.float32,
        variable_seq_lengths=True,
        moe_token_dispatcher_type="alltoall",  # without experts too, variable lengths want it
        calculate_per_token_loss=True,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cpu_initialization=True,
        gradient_accumulation_fusion=False,
        finalize_model_grads_func=partial(finalize, modules=modules),
    )
    language: dict[str, Any] = {}
    if is_on(grids["language"]):
        stage = grids["language"].get_pg("pp").rank()
        language = {"pre_process": stage == 0, "post_process": stage == 1}
        language["pg_collection"] = groups_of(grids["language"])
    parts = {
        "encoders": {
            "patches": ModuleSpec(torch.nn.Linear, {"in_features": PIXELS, "out_features": 24})
        },
        "input_projections": [
            ModuleSpec(torch.nn.Linear, {"in_features": 24, "out_features": HIDDEN})
        ],
    }
    model = MimoModel(
        MimoModelConfig(
            language_model_spec=ModuleSpec(
                GPTModel,
                params={
                    "config": config,
                    "transformer_layer_spec": get_gpt_layer_local_spec(),
                    "vocab_size": 128,
                    "max_sequence_length": SEQUENCE,
                    "position_embedding_type": "rope",
                    **language,
                },
            ),
            modality_submodules_spec={
                "images": ModuleSpec(VisionModalitySubmodules, submodules=parts)
            },
            special_token_ids={"images": IMAGE},
            module_to_grid_map=grids,
        )
    )
    model.model_type = ModelType.encoder_or_decoder
    wrap(model, grids, modules)
    return model


def wrap(model: MimoModel, grids: dict[str, HyperCommGrid], modules: list[Any]) -> None:
    """Every module of this rank in a data-parallel wrapper of its own groups."""
    ddp = DistributedDataParallelConfig()
    if model.language_model is not None:
        model.language_model = DistributedDataParallel(
            model.config, ddp, model.language_model, pg_collection=groups_of(grids["language"])
        )
        modules.append(model.language_model)
    for name, submodule in model.modality_submodules.items():
        model.modality_submodules[name] = DistributedDataParallel(
            model.config, ddp, submodule, pg_collection=groups_of(grids[name])
        )
        modules.append(model.modality_submodules[name])


def main() -> None:
    """Three steps, and what each of them gave."""
    device = select_backend()
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group({"cuda": "nccl", "cpu": "gloo"}[device])
    grids = {"images": make_grid(0, dp=2, pp=1), "language": make_grid(2, dp=1, pp=2)}
    parallel_state.initialize_model_parallel()  # for its buffers
    torch.manual_seed(1)
    model_parallel_cuda_manual_seed(1)
    model = build(grids).to(device)
    communicator = MultiModulePipelineCommunicator(
        grids,
        {"images": ["language"], "language": []},
        model.config,
        dim_mapping={"s": 0, "b": 1, "h": 2},
        module_output_ndim={"images": 2},
    )
    held = {name: groups_of(grid) for name, grid in grids.items() if is_on(grid)}
    groups = MultiModuleProcessGroupCollection(held, "language" if "language" in held else None)
    optimizer = get_mimo_optimizer(model, OptimizerConfig(optimizer="adam", lr=1e-2, clip_grad=0.5))
    for step in range(3):
        model.zero_grad_buffer()
        optimizer.zero_grad()
        reports = forward_backward_pipelining_without_interleaving(
            forward_step_func=partial(forward_step, images=grids["images"], device=device),
            data_iterator=iter(range(4 * step, 4 * step + 4)),
            model=[model],
            num_microbatches=4,
            seq_length=SEQUENCE,
            micro_batch_size=SAMPLES,
            p2p_communicator=communicator,
            pg_collection=groups,
        )
        _, norm, _ = optimizer.step()
        loss = torch.zeros((), device=device)
        if reports:
            loss += torch.stack([report["loss"] for report in reports]).mean()
        dist.all_reduce(loss)  # the last stage has it
        if dist.get_rank() == 0:
            print(f"step {step}: loss {loss.item():.5f}, gradient norm {float(norm):.5f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
