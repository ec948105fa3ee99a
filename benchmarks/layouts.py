"""What encoders on every rank cost and save: bytes between ranks, balance, the busiest rank.

    python benchmarks/layouts.py          # a table
    python benchmarks/layouts.py --json   # one JSON object

Four processes train a step of a small vision-language model whose encoder is about half of the
work: in the uniform layout, where the encoder runs on the first of two pipeline stages; colocated,
where it runs on every rank; and disjoint, with two ranks for the encoder and two for the language
model.

- ``encoder_share``: of the model's floating-point operations, those of the encoder.
- ``step_ratio``: wall-clock time of a step, uniform over each layout. ``allowed`` is the same as
  the ranks' processor times allow with a number of cores: a step takes as long as its busiest rank,
  and as all ranks' work divided by the cores. Where cores are fewer than ranks, spreading work over
  ranks gains nothing.
- ``bytes_ratio``: bytes that rows and their gradients take between ranks over the least there can
  be: every row that its reader has not encoded itself, once there and its gradient once back.
- ``balance``: for areas of photographs, cost of the busiest owner over the mean.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from megatron.mimo.process.ports import held_port

WORLD, SEQUENCE, IMAGE, PATCHES = 4, 128, 99, 16
# Layout -> sizes of its modules; readers are the ranks of the first stage, each of which gets rows.
LAYOUTS: dict[str, dict[str, dict[str, int]]] = {
    "uniform": {"language": {"tp": 2, "pp": 2}},
    "colocated": {"images": {"dp": WORLD}, "language": {"tp": 2, "pp": 2}},
    "disjoint": {"images": {"dp": 2}, "language": {"pp": 2, "rank_offset": 2}},
}
GRIDS = ("colocated", "disjoint")
Figures = dict[str, float]


def balance(owners: int, items: int, seed: int) -> float:
    """Cost of the busiest owner over the mean, for photographs' areas (a factor of thirty)."""
    from megatron.core.models.mimo.comm.balance import deal_out

    chance = random.Random(seed)
    costs = [256 * chance.lognormvariate(0.0, 0.8) + 1 for _ in range(items * owners)]
    loads = [0.0] * owners
    for cost, owner in zip(costs, deal_out(costs, owners), strict=True):
        loads[owner] += cost
    return max(loads) * owners / sum(loads)


def language_config(hidden: int, tp: int) -> Any:
    """Of the language model, in two stages."""
    from megatron.core.distributed import finalize_model_grads
    from megatron.core.transformer.transformer_config import TransformerConfig

    return TransformerConfig(
        num_layers=4,
        hidden_size=hidden,
        num_attention_heads=4,
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=2,
        pipeline_dtype=torch.float32,
        calculate_per_token_loss=True,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cpu_initialization=True,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        finalize_model_grads_func=finalize_model_grads,
    )


def encoder_spec(config: Any, layers: int, place: Any) -> Any:
    """A ViT as wide as the language model."""
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.mimo.encoders import VisionTransformer, encoder_config
    from megatron.mimo.layers import encoder_layer_spec
    from megatron.mimo.models.common.place import Place, config_at

    vision = encoder_config(
        config_at(config, Place(groups=place)),
        num_layers=layers,
        hidden_size=config.hidden_size,
        num_attention_heads=4,
    )
    params = {
        "config": vision,
        "transformer_layer_spec": encoder_layer_spec(vision),
        "image_size": (16, 16),
        "patch_size": 4,
        "channels": 3,
        "pg_collection": place,
    }
    return ModuleSpec(VisionTransformer, params)


def model_on(args: argparse.Namespace, tp: int, groups: Any, grids: Any) -> Any:
    """The model of one rank, wrapped."""
    from megatron.core import parallel_state
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.enums import ModelType
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.mimo import MimoModel, MimoModelConfig, VisionModalitySubmodules
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.mimo.layers import language_layer_spec

    config = language_config(args.hidden, tp)
    place = groups if grids is None else grids.groups["images"]
    encoders = {"vit": encoder_spec(config, args.encoder_layers, place)}
    language = {
        "config": config,
        "transformer_layer_spec": language_layer_spec(config),
        "vocab_size": 128,
        "max_sequence_length": SEQUENCE,
        "pre_process": parallel_state.is_pipeline_first_stage(),
        "post_process": parallel_state.is_pipeline_last_stage(),
        "pg_collection": groups,
        "position_embedding_type": "rope",
        "scatter_embedding_sequence_parallel": False,
    }
    images = ModuleSpec(VisionModalitySubmodules, submodules={"encoders": encoders})
    described = MimoModelConfig(
        ModuleSpec(GPTModel, language),
        {"images": images},
        {"images": IMAGE},
        module_to_grid_map=None if grids is None else dict(grids.by_module),
        modality_inputs_of="language",
    )
    model = MimoModel(described, cp_group=groups.cp, tp_group=groups.tp)
    model.model_type = ModelType.encoder_or_decoder
    ddp = DistributedDataParallelConfig()
    if grids is None:
        return DistributedDataParallel(config, ddp, model)
    if model.language_model is not None:
        model.language_model = DistributedDataParallel(config, ddp, model.language_model)
    for name, module in model.modality_submodules.items():
        model.modality_submodules[name] = DistributedDataParallel(
            config, ddp, module, pg_collection=place
        )
    return model


def micro_batches(count: int) -> list[dict[str, Any]]:
    """Of the one replica: sequences with one to six images."""
    chance = torch.Generator().manual_seed(0)
    batches = []
    for number in range(count):
        images = 1 + number % 6
        tokens = torch.randint(0, IMAGE, (1, SEQUENCE), generator=chance)
        tokens[0, : images * PATCHES] = IMAGE
        batches.append(
            {
                "input_ids": tokens,
                "position_ids": torch.arange(SEQUENCE)[None],
                "labels": tokens.roll(-1, dims=1).clamp(max=IMAGE - 1),
                "loss_mask": torch.ones(1, SEQUENCE),
                "modality_inputs": {
                    "images": {
                        "vit": {"pixel_values": torch.rand(images, 3, 16, 16, generator=chance)}
                    }
                },
            }
        )
    return batches


def forward_step(batches: Any, model: Any) -> tuple[Any, Any]:
    """The loss, summed over tokens."""
    losses, _ = model(**next(batches))
    return losses, lambda output: (
        output.sum(),
        torch.tensor(output.numel(), dtype=torch.int),
        {"loss": output.detach().sum()},
    )


def measure(layout: str, args: argparse.Namespace) -> Figures:
    """Seconds of a step, of this rank's processor, and bytes that this rank sends."""
    from megatron.core import parallel_state
    from megatron.core.models.mimo.model.encode_first import EncodeFirst
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.mimo.topology import Component, build_grids
    from megatron.mimo.training.module_ranks import are_apart, global_groups

    components = {name: Component(name=name, **own) for name, own in LAYOUTS[layout].items()}
    initialize = parallel_state.initialize_model_parallel
    if are_apart(components):
        initialize = global_groups(components)(initialize)
    tp = components["language"].tp
    initialize(tensor_model_parallel_size=tp, pipeline_model_parallel_size=2)
    model_parallel_cuda_manual_seed(1)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    grids = build_grids(components) if layout in GRIDS else None
    model = model_on(args, tp, groups, grids)
    schedule = get_forward_backward_func() if grids is None else EncodeFirst([model])
    first = parallel_state.is_pipeline_first_stage()
    with counted_bytes() as sent:
        best = timed(model, schedule, sent, args, encodes=first or grids is not None)
    if grids is not None:
        schedule.destroy()
        grids.destroy()
    parallel_state.destroy_model_parallel()
    return {**best, "sent": float(sum(sent))}


def timed(
    model: Any, schedule: Any, sent: list[int], args: argparse.Namespace, *, encodes: bool
) -> dict[str, float]:
    """Seconds of the fastest step, on the wall and of this rank's processor."""
    best = {"wall": float("inf"), "processor": float("inf")}
    for repeat in range(args.repeats + 1):
        model.zero_grad_buffer()
        batches = micro_batches(args.micro_batches)
        for batch in batches if not encodes else ():
            batch["modality_inputs"] = None
        sent.clear()
        dist.barrier()
        start = time.perf_counter(), time.process_time()
        schedule(
            forward_step_func=forward_step,
            data_iterator=iter(batches),
            model=[model],
            num_microbatches=args.micro_batches,
            seq_length=SEQUENCE,
            micro_batch_size=1,
            forward_only=False,
        )
        dist.barrier()
        if repeat:  # the first warms up
            best["wall"] = min(best["wall"], time.perf_counter() - start[0])
            best["processor"] = min(best["processor"], time.process_time() - start[1])
    return best


@contextmanager
def counted_bytes() -> Iterator[list[int]]:
    """Bytes that this rank sends to others within the context, exchange by exchange."""
    from megatron.core.models.mimo.model.encode_first import modality_pass, row_stream

    sent: list[int] = []
    originals = modality_pass.exchange_rows, row_stream._send

    def exchanged(rows_NH: Any, routes: Any, group: Any) -> Any:
        rank = 0 if group is None else dist.get_rank(group)
        sent.append(routes.rows_sent(rank) * rows_NH.size(1) * rows_NH.element_size())
        return originals[0](rows_NH, routes, group)

    def streamed(messages: Any, rows_NW: Any, routes: Any, pool: Any, number: int) -> None:
        rows = sum(index_n.numel() for index_n in routes.give)
        sent.append(rows * rows_NW.size(1) * rows_NW.element_size())
        originals[1](messages, rows_NW, routes, pool, number)

    modality_pass.exchange_rows, row_stream._send = exchanged, streamed
    try:
        yield sent
    finally:
        modality_pass.exchange_rows, row_stream._send = originals


def run_rank(rank: int, port: int, args: argparse.Namespace, results: Any) -> None:
    """One of the processes."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(WORLD), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    from megatron.mimo.backend import select_backend

    select_backend("cpu")
    dist.init_process_group("gloo")
    found = {layout: measure(layout, args) for layout in LAYOUTS}
    everyone: list[Any] = [None] * WORLD
    dist.all_gather_object(everyone, found)
    if rank == 0:
        results.put(everyone)
    dist.barrier()
    dist.destroy_process_group()


def least_bytes(layout: str, args: argparse.Namespace) -> int:
    """Every row once to each of the ranks that place it, and its gradient once back.

    Where each rank encodes a quarter of the rows, a reader need not receive its own.
    """
    rows = sum(PATCHES * (1 + number % 6) for number in range(args.micro_batches))
    readers = LAYOUTS[layout]["language"].get("tp", 1)
    own = rows * readers // WORLD if layout == "colocated" else 0
    return (readers * rows - own + rows - own) * args.hidden * 4


def encoder_share(args: argparse.Namespace) -> float:
    """Of the model's operations: products and attention of its layers, and the logits."""

    def of_layers(layers: int, length: int) -> int:
        return layers * length * (24 * args.hidden**2 + 4 * length * args.hidden)

    images = sum(1 + number % 6 for number in range(args.micro_batches)) / args.micro_batches
    encoder = images * of_layers(args.encoder_layers, PATCHES + 1)
    language = of_layers(4, SEQUENCE) + 2 * SEQUENCE * 128 * args.hidden
    return encoder / (encoder + language)


def allowed(ranks: list[Figures], cores: int) -> float:
    """Seconds of a step that the ranks' processor times allow."""
    times = [one["processor"] for one in ranks]
    return max(max(times), sum(times) / cores)


def report(args: argparse.Namespace) -> dict[str, Any]:
    """All figures."""
    context = mp.get_context("spawn")
    results = context.SimpleQueue()
    with held_port() as port:
        ranks = [
            context.Process(target=run_rank, args=(rank, port, args, results))
            for rank in range(WORLD)
        ]
        for one in ranks:
            one.start()
        everyone = results.get()
        for one in ranks:
            one.join()
    of = {layout: [one[layout] for one in everyone] for layout in LAYOUTS}
    wall = {layout: max(one["wall"] for one in ranks) for layout, ranks in of.items()}
    return {
        "encoder_share": encoder_share(args),
        "step_ratio": {layout: wall["uniform"] / wall[layout] for layout in GRIDS},
        "allowed": {
            f"{cores} cores": {
                layout: allowed(of["uniform"], cores) / allowed(of[layout], cores)
                for layout in GRIDS
            }
            for cores in (2, 4)
        },
        "seconds": wall,
        "processor_seconds": {
            layout: [round(one["processor"], 3) for one in ranks] for layout, ranks in of.items()
        },
        "bytes_ratio": {
            layout: sum(one["sent"] for one in of[layout]) / least_bytes(layout, args)
            for layout in GRIDS
        },
        "balance": {
            str(owners): max(balance(owners, 16, seed) for seed in range(20))
            for owners in (2, 4, 8, 16)
        },
        "cores": len(os.sched_getaffinity(0)),
    }


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--encoder-layers", type=int, default=10)
    parser.add_argument("--micro-batches", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    figures = report(args)
    if args.json:
        print(json.dumps(figures))
        return
    for name, value in figures.items():
        print(f"{name:20} {value}")


if __name__ == "__main__":
    main()
