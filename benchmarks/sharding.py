"""What one rank pays for embeddings and encoders, under context, tensor and sequence parallelism.

    python benchmarks/sharding.py --json      # these figures alone; parallel.py has them too

Ranks are processes on this machine, with one thread each.

Embedding path: from ``input_ids`` and encoder rows to this rank's [S / (cp*tp), B, H], this
project against megatron-core's MIMO on the same batch and language model, checked to be equal.
Peak bytes are what is in use at the highest point beyond the inputs, by the kernel's mark, of the
rank where the ratio is worst.

Encoders: forward and backward of a vision transformer, all images on every rank against a part
on each and an exchange of rows, checked to be equal. For tensor-parallel ranks the reduction of the
encoder's gradients, which Megatron does once per step, is counted in every repetition.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from alignment import IMAGE, build_model, import_library, make_case, median_ms, peak_extra_bytes
from torch import Tensor, nn

TP, CP = 2, 2  # of the embedding path


def on_ranks(part: str, world_size: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """The results of one of ``PARTS`` by rank, each in a process of its own."""
    import torch.multiprocessing as processes

    with tempfile.TemporaryDirectory() as folder:
        processes.spawn(_rank, (folder, part, world_size, args), nprocs=world_size)
        return [json.loads(Path(folder, str(rank)).read_text()) for rank in range(world_size)]


def _rank(rank: int, folder: str, part: str, world_size: int, args: argparse.Namespace) -> None:
    from megatron.mimo.backend import select_backend

    torch.set_num_threads(1)
    select_backend("cpu")
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size
    )
    result = PARTS[part](args)
    Path(folder, str(rank)).write_text(json.dumps(result))
    dist.barrier()
    dist.destroy_process_group()


def start_parallel(*, tp: int = 1, cp: int = 1) -> Any:
    """Megatron's groups and generators for the processes that run."""
    from megatron.core import parallel_state
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tp, context_parallel_size=cp
    )
    model_parallel_cuda_manual_seed(1)
    torch.manual_seed(0)
    return ProcessGroupCollection.use_mpu_process_groups()


def language_spec(args: argparse.Namespace, *, tp: int = 1, cp: int = 1) -> Any:
    """A GPT of one layer: only its embedding takes part."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.transformer_config import TransformerConfig
    from megatron.mimo.layers import language_layer_spec

    config = TransformerConfig(
        num_layers=1,
        hidden_size=args.hidden,
        ffn_hidden_size=8,
        num_attention_heads=8,
        use_cpu_initialization=True,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        gradient_accumulation_fusion=False,
        tensor_model_parallel_size=tp,
        context_parallel_size=cp,
        sequence_parallel=tp > 1 and cp > 1,
    )
    params = {
        "config": config,
        "transformer_layer_spec": language_layer_spec(config),
        "vocab_size": args.vocabulary,
        "max_sequence_length": args.sequence,
        "position_embedding_type": "rope",
        "scatter_embedding_sequence_parallel": False,
    }
    return ModuleSpec(module=GPTModel, params=params)


def embedding_of_rank(args: argparse.Namespace) -> dict[str, Any]:
    """Peak bytes of this rank's embedding path, both libraries, forward and with backward."""
    start_parallel(tp=TP, cp=CP)
    case = make_case({"images": (IMAGE, 2, args.sequence * 9 // 32)}, args)
    spec = language_spec(args, tp=TP, cp=CP)
    stock = build_model(import_library(stock=True), spec, case)
    ours = build_model(import_library(stock=False), spec, case)
    ours.language_model = stock.language_model
    from megatron.core.models.mimo.alignment import build_alignment_plan
    from megatron.core.models.mimo.model.merging.merge import embed_streams
    from megatron.core.models.mimo.partition.utils import sequence_cut

    whole = build_alignment_plan(case.input_ids_BS, case.special_token_ids)
    plan = sequence_cut(ours.partition_adapter, None).share_of_plan(whole)

    def run_stock() -> Tensor:
        text = stock.get_text_embeddings(case.input_ids_BS, None, case.special_token_ids)
        merged_SBH = stock.align_embeddings_by_token_positions(
            {**case.rows, "text": text}, case.input_ids_BS, case.special_token_ids
        )
        held_SBH: Tensor = stock.partition_adapter.shard(
            embeddings=merged_SBH, labels=None, loss_mask=None, packed_seq_params=None
        )[0]
        return held_SBH

    def run_ours() -> Tensor:
        return embed_streams(ours.language_model.embedding, plan, case.rows, None)

    leaves = [stock.language_model.embedding.word_embeddings.weight, *case.rows.values()]
    check_forward(run_stock, run_ours)
    result: dict[str, Any] = {}
    for name, run in (("stock", run_stock), ("ours", run_ours)):
        result[name] = _peak(run)
        result[f"{name}_backward"] = _peak(_with_backward(run, leaves))
    return result


def check_forward(run_stock: Callable[[], Tensor], run_ours: Callable[[], Tensor]) -> None:
    """Refuse to measure two sides that do not compute the same."""
    torch.testing.assert_close(run_ours(), run_stock())


def _with_backward(run: Callable[[], Tensor], leaves: list[Tensor]) -> Callable[[], Tensor]:
    def both() -> Tensor:
        held_SBH = run()
        held_SBH.backward(torch.ones_like(held_SBH))
        for leaf in leaves:
            leaf.grad = None
        return held_SBH.detach()

    return both


def _peak(run: Callable[[], Tensor]) -> int | None:
    nbytes = run().nbytes
    extra = peak_extra_bytes(run)
    return None if extra is None else extra + nbytes


class PlainEncoder(nn.Module):
    """Knows nothing of Megatron: patches [images, P, E] to rows [images * P, H]."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)

    def rows_per_item(self, patches: Tensor) -> list[int]:
        """Rows of each image."""
        return [patches.size(1)] * len(patches)

    def forward(self, patches: Tensor) -> Tensor:
        """Encode images."""
        return self.layers(patches).flatten(0, 1)


def encoder_of_rank(args: argparse.Namespace, kind: str) -> dict[str, Any]:
    """Times of one rank's encoder, whole and split, over two ranks of ``kind`` (cp or tp)."""
    from megatron.core.models.mimo import MimoModel, MimoModelConfig, VisionModalitySubmodules
    from megatron.core.transformer.spec_utils import ModuleSpec

    groups = start_parallel(**{kind: 2})
    encoder = ModuleSpec(PlainEncoder, {"width": args.encoder_width, "layers": 4})
    images = ModuleSpec(VisionModalitySubmodules, submodules={"encoders": {"plain": encoder}})
    args = argparse.Namespace(**{**vars(args), "hidden": args.encoder_width, "vocabulary": 64})
    spec = language_spec(args, **{kind: 2})
    patches = torch.randn(args.images, args.patches, args.encoder_width)
    runs, frozen, rows = {}, {}, {}
    for split in ("never", "auto"):
        torch.manual_seed(0)
        model = MimoModel(
            MimoModelConfig(spec, {"images": images}, {"images": 63}, encoder_split=split)
        )

        def forward(model: Any = model) -> Tensor:
            inputs = {"images": {"plain": {"patches": patches}}}
            rows_NH: Tensor = model._forward_encoders(None, inputs, None)["images"]
            return rows_NH

        def both(model: Any = model, forward: Any = forward, split: str = split) -> None:
            model.zero_grad(set_to_none=True)
            rows_NH = forward()
            rows_NH.backward(torch.ones_like(rows_NH))
            if kind == "tp" and split == "auto":
                grads = [p.grad.flatten() for p in model.modality_submodules.parameters()]
                dist.all_reduce(torch.cat(grads), group=groups.tp)

        runs[split], rows[split] = both, forward().detach()
        frozen[split] = torch.no_grad()(forward)
    torch.testing.assert_close(rows["auto"], rows["never"], rtol=1e-4, atol=1e-4)
    return {
        "trained": median_ms(runs, args.encoder_repeats),
        "frozen": median_ms(frozen, args.encoder_repeats),
    }


def encoder_over_cp(args: argparse.Namespace) -> dict[str, Any]:
    """Two context-parallel ranks."""
    return encoder_of_rank(args, "cp")


def encoder_over_tp(args: argparse.Namespace) -> dict[str, Any]:
    """Two tensor-parallel ranks, the encoder replicated."""
    return encoder_of_rank(args, "tp")


PARTS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "embedding": embedding_of_rank,
    "cp": encoder_over_cp,
    "tp": encoder_over_tp,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this module's parts."""
    parser.add_argument("--embedding-batch", type=int, default=4)
    parser.add_argument("--embedding-hidden", type=int, default=1024)
    parser.add_argument("--vocabulary", type=int, default=32768)
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--patches", type=int, default=128)
    parser.add_argument("--encoder-width", type=int, default=256)
    parser.add_argument("--encoder-repeats", type=int, default=5)


def compare_sharding(args: argparse.Namespace) -> dict[str, Any]:
    """All figures of this module."""
    args = argparse.Namespace(
        **{**vars(args), "batch": args.embedding_batch, "hidden": args.embedding_hidden}
    )
    peaks = on_ranks("embedding", TP * CP, args)
    result: dict[str, Any] = {}
    for prefix, suffix in (("embedding", ""), ("embedding_backward", "_backward")):
        known = [rank for rank in peaks if rank["ours"] is not None]
        ratios = [rank[f"ours{suffix}"] / rank[f"stock{suffix}"] for rank in known]
        worst = known[ratios.index(max(ratios))] if known else None
        result |= {
            f"{prefix}_peak_ratio": max(ratios, default=None),
            f"{prefix}_peak_bytes": worst and worst[f"ours{suffix}"],
            f"stock_{prefix}_peak_bytes": worst and worst[f"stock{suffix}"],
        }
    for kind in ("cp", "tp"):
        ranks = on_ranks(kind, 2, args)
        for case in ("trained", "frozen"):
            whole, split = (max(rank[case][mode] for rank in ranks) for mode in ("never", "auto"))
            result |= {
                f"encoder_split_{kind}_{case}_speedup": whole / split,
                f"encoder_split_{kind}_{case}_ms": split,
                f"encoder_whole_{kind}_{case}_ms": whole,
            }
    speedups = [value for name, value in result.items() if name.endswith("_speedup")]
    return {**result, "encoder_split_speedup": min(speedups)}


def main() -> None:
    """Run and print all figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--sequence", type=int, default=2048)
    add_arguments(parser)
    args = parser.parse_args()
    result = compare_sharding(args)
    if args.json:
        print(json.dumps(result, indent=2))
        return
    for name, value in result.items():
        print(f"  {name:40s} {value if value is None else f'{value:14.3f}'}")


if __name__ == "__main__":
    main()
