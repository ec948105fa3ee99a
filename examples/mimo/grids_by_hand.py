"""A MimoModel whose encoder and language model have grids of their own, put together by hand.

Four encoders, each with half of the images of one of two language models that are cut in two:

    torchrun --nproc-per-node 4 examples/mimo/grids_by_hand.py

It needs nothing but the installation, and runs with megatron-core's own MIMO as well.
"""

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
from megatron.core.pipeline_parallel.schedules import forward_backward_no_pipelining
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.mimo.backend import select_backend

IMAGE, PATCHES, PIXELS, SEQUENCE, HIDDEN = 99, 4, 12, 16, 32


def make_grid(tp: int, dp: int) -> HyperCommGrid:
    """A grid over all ranks, and its groups."""
    grid = HyperCommGrid([tp, 1, dp, 1], ["tp", "cp", "dp", "pp"])
    for axes in ("tp", "cp", "dp", "pp", ["dp", "cp"], ["tp", "pp"], ["tp", "cp", "dp", "pp"]):
        grid.create_pg(axes)
    grid.register_view("expert", [tp, 1, dp, 1], ["expt_tp", "ep", "expt_dp", "pp"])
    for axes in ("ep", "expt_dp", ["expt_tp", "ep", "pp"]):
        grid.create_pg(axes, view="expert")
    return grid


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
    """Micro-batch ``number`` of both language models: tokens [4, S], patches [16, pixels]."""
    generator = torch.Generator().manual_seed(number)
    tokens = torch.randint(0, IMAGE, (4, SEQUENCE), generator=generator)
    tokens[:, 1 : 1 + PATCHES] = IMAGE
    return tokens, torch.rand(4 * PATCHES, PIXELS, generator=generator)


def forward_step(
    numbers: Iterator[int], model: Any, language: ProcessGroupCollection, device: str
) -> tuple[torch.Tensor, Any]:
    """One micro-batch: two samples of the language model's, one of the encoder's."""
    tokens, patches = (tensor.to(device) for tensor in samples(next(numbers)))
    replica, encoder = language.dp.rank(), dist.get_rank()
    mine = tokens[2 * replica : 2 * replica + 2]
    losses, _ = model(
        input_ids=mine,
        position_ids=torch.arange(SEQUENCE, device=device).expand(2, -1),
        labels=mine.roll(-1, dims=1).clamp(max=IMAGE - 1),
        modality_inputs={
            "images": {"patches": {"input": patches[encoder * PATCHES : (encoder + 1) * PATCHES]}}
        },
    )
    return losses, lambda output: (
        output.sum(),
        torch.tensor(output.numel(), dtype=torch.int, device=device),
        {"loss": output.detach().mean()},
    )


def finalize(
    _: Any, num_tokens: torch.Tensor, *, modules: list[Any], language: Any, **__: Any
) -> None:
    """Reduce each module's gradients over its own ranks; divide all by the tokens of the batch."""
    dist.all_reduce(num_tokens, group=language.dp_cp)
    for module in modules:
        module.finish_grad_sync()
        module.scale_gradients(1.0 / num_tokens.item())


def build(grids: dict[str, HyperCommGrid], language: ProcessGroupCollection) -> MimoModel:
    """The model, with the same weights wherever a module is."""
    modules: list[Any] = []  # wrapped, once they are
    config = TransformerConfig(
        num_layers=2,
        hidden_size=HIDDEN,
        num_attention_heads=4,
        tensor_model_parallel_size=2,
        calculate_per_token_loss=True,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cpu_initialization=True,
        gradient_accumulation_fusion=False,
        finalize_model_grads_func=partial(finalize, modules=modules, language=language),
    )
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
                    "pg_collection": language,
                },
            ),
            modality_submodules_spec={
                "images": ModuleSpec(VisionModalitySubmodules, submodules=parts)
            },
            special_token_ids={"images": IMAGE},
            module_to_grid_map=grids,
        ),
        cp_group=language.cp,
        tp_group=language.tp,
    )
    model.model_type = ModelType.encoder_or_decoder
    ddp = DistributedDataParallelConfig()
    model.language_model = DistributedDataParallel(
        config, ddp, model.language_model, pg_collection=language
    )
    model.modality_submodules["images"] = DistributedDataParallel(
        config, ddp, model.modality_submodules["images"], pg_collection=groups_of(grids["images"])
    )
    modules += [model.language_model, *model.modality_submodules.values()]
    return model


def main() -> None:
    """Three steps, and what each of them gave."""
    device = select_backend()
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group({"cuda": "nccl", "cpu": "gloo"}[device])
    grids = {"images": make_grid(tp=1, dp=4), "language": make_grid(tp=2, dp=2)}
    language = groups_of(grids["language"])
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=2)  # for its buffers
    torch.manual_seed(1)
    model_parallel_cuda_manual_seed(1)
    model = build(grids, language).to(device)
    optimizer = get_mimo_optimizer(model, OptimizerConfig(optimizer="adam", lr=1e-2, clip_grad=0.5))
    for step in range(3):
        model.zero_grad_buffer()
        optimizer.zero_grad()
        reports = forward_backward_no_pipelining(
            forward_step_func=partial(forward_step, language=language, device=device),
            data_iterator=iter([2 * step, 2 * step + 1]),
            model=[model],
            num_microbatches=2,
            seq_length=SEQUENCE,
            micro_batch_size=2,
            pg_collection=language,
        )
        _, norm, _ = optimizer.step()
        loss = torch.stack([report["loss"] for report in reports]).mean()
        dist.all_reduce(loss, op=dist.ReduceOp.SUM)
        if dist.get_rank() == 0:
            print(f"step {step}: loss {loss.item() / 4:.5f}, gradient norm {float(norm):.5f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
