"""Refuses parallel layouts and sizes that cannot work, before any work is done.

Megatron checks many of these too, some of them only where a layer is built and some with a bare
``assert``. Here every rank gives the same message in the first second.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from typing import Any

from megatron.core.models.mimo.errors import ConfigError
from megatron.mimo.arguments.experts import check_experts
from megatron.mimo.arguments.interleaving import check_interleaving
from megatron.mimo.arguments.recomputation import check_recomputation

__all__ = ["check_layout", "check_model"]

# With any of these, stages need not have equally many layers.
_UNEVEN = (
    "decoder_first_pipeline_num_layers",
    "decoder_last_pipeline_num_layers",
    "pipeline_model_parallel_layout",
    "account_for_embedding_in_pipeline_split",
    "account_for_loss_in_pipeline_split",
)


def check_layout(args: Namespace) -> None:
    """Check the layout against the world size and the model's sizes.

    Raises:
        ConfigError: naming the sizes that do not fit.
    """
    _check_world(args)
    check_model(vars(args))
    _check_sequence(args)
    _check_batch(args)
    check_interleaving(args)
    check_experts(args)
    _check_low_precision(args)
    _check_graphs(args)
    check_recomputation(args)
    if not args.calculate_per_token_loss:
        raise ConfigError("calculate_per_token_loss must stay on: the loss is a sum over tokens")
    if args.dataloader_type != "external":
        raise ConfigError(
            f"--dataloader-type {args.dataloader_type} is not supported: recipes bring their own "
            "data; leave the flag away"
        )
    if args.keep_checkpoints < 0:
        raise ConfigError(f"--keep-checkpoints {args.keep_checkpoints}: must be 0 (all) or more")


def _check_world(args: Namespace) -> None:
    tp, pp, cp = (
        args.tensor_model_parallel_size,
        args.pipeline_model_parallel_size,
        args.context_parallel_size,
    )
    for flag, size in (
        ("--tensor-model-parallel-size", tp),
        ("--pipeline-model-parallel-size", pp),
        ("--context-parallel-size", cp),
    ):
        if size < 1:
            raise ConfigError(f"{flag} {size}: must be at least 1")
    if args.world_size % (tp * pp * cp):
        raise ConfigError(
            f"{args.world_size} processes cannot be divided into tp {tp} * pp {pp} * cp {cp} = "
            f"{tp * pp * cp}; start a multiple of {tp * pp * cp} processes "
            "(torchrun --nproc-per-node)"
        )


def check_model(values: Mapping[str, Any]) -> None:
    """Check a language model's sizes against its tensor- and pipeline-parallel sizes.

    Args:
        values: Megatron's arguments by destination; those that are absent are off.

    Raises:
        ConfigError: naming the sizes that do not fit.
    """
    tp, pp = values["tensor_model_parallel_size"], values["pipeline_model_parallel_size"]
    _divides(values["num_attention_heads"], tp, "attention heads", "tensor-parallel size")
    groups = values.get("num_query_groups")
    if values.get("group_query_attention") and groups and groups % tp and tp % groups:
        raise ConfigError(
            f"{groups} query groups and tensor-parallel size {tp}: one must divide the other"
        )
    is_local = values["transformer_impl"] == "local"
    if values.get("multi_latent_attention") and tp > 1 and is_local:
        raise ConfigError(
            f"--multi-latent-attention with tensor-parallel size {tp} on megatron-core's local "
            "layers: they do not sum the gradient of the keys' positions, which all heads share, "
            "over the ranks; use --tensor-model-parallel-size 1"
        )
    _divides(values["hidden_size"], tp, "hidden size", "tensor-parallel size")
    if values.get("ffn_hidden_size"):
        _divides(values["ffn_hidden_size"], tp, "feed-forward size", "tensor-parallel size")
    if values.get("kv_channels") is None:
        heads = values["num_attention_heads"]
        _divides(values["hidden_size"], heads, "hidden size", "attention heads")
    layers = values["num_layers"]
    if layers and not any(values.get(name) for name in _UNEVEN):
        if pp > layers:
            raise ConfigError(
                f"pipeline-parallel size {pp} is larger than the model's {layers} "
                f"layers; use at most {layers} stages"
            )
        _divides(layers, pp, "layers", "pipeline-parallel size")


def _check_sequence(args: Namespace) -> None:
    if not args.seq_length:
        return
    if args.max_position_embeddings and args.seq_length > args.max_position_embeddings:
        raise ConfigError(
            f"sequence length {args.seq_length} is larger than --max-position-embeddings "
            f"{args.max_position_embeddings}; lower --seq-length, or raise the latter"
        )
    cp, tp = args.context_parallel_size, args.tensor_model_parallel_size
    factor = (2 * cp if cp > 1 else 1) * (tp if args.sequence_parallel else 1)
    if args.seq_length % factor:
        padded = -(-args.seq_length // factor) * factor
        parts = [f"2*cp = {2 * cp}"] if cp > 1 else []
        parts += [f"tp = {tp}"] if args.sequence_parallel and tp > 1 else []
        raise ConfigError(
            f"sequence length {args.seq_length} is not divisible by {factor} "
            f"({' * '.join(parts)}); use --seq-length {padded}"
        )


def _check_batch(args: Namespace) -> None:
    for flag, size in (
        ("--micro-batch-size", args.micro_batch_size),
        ("--global-batch-size", args.global_batch_size),
        ("--train-iters", args.train_iters),
    ):
        if size is not None and size < 1:
            raise ConfigError(f"{flag} {size}: must be at least 1")
    decay = args.lr_decay_iters or args.train_iters
    if args.train_iters and args.lr_warmup_fraction is None and args.lr_warmup_iters >= decay:
        raise ConfigError(
            f"a learning-rate warm-up of {args.lr_warmup_iters} iterations does not fit into "
            f"{decay}; use --lr-warmup-iters {decay // 10}"
        )
    if args.train_iters is None and args.train_samples is None:
        raise ConfigError("how long to train is not set; give --train-iters or --train-samples")
    dp = args.world_size // (
        args.tensor_model_parallel_size
        * args.pipeline_model_parallel_size
        * args.context_parallel_size
    )
    sizes = [("", args.global_batch_size, args.micro_batch_size)]
    if args.eval_global_batch_size or args.eval_micro_batch_size:
        sizes.append(
            (
                "eval ",
                args.eval_global_batch_size or args.global_batch_size,
                args.eval_micro_batch_size or args.micro_batch_size,
            )
        )
    for kind, total, micro in sizes:
        if total and total % (micro * dp) and not args.decrease_batch_size_if_needed:
            raise ConfigError(
                f"{kind}global batch size {total} is not divisible by {kind}micro batch size "
                f"{micro} * data-parallel size {dp} = {micro * dp}"
            )


def _check_low_precision(args: Namespace) -> None:
    """Refuse tokens and widths that are no whole blocks, as FP8 and FP4 need them."""
    if not args.fp8 and not args.fp4:
        return
    flag = "--fp8-format" if args.fp8 else "--fp4-format"
    block = 32 if args.fp4 or args.fp8_recipe == "mxfp8" else 16
    tokens_in = 32 if block == 32 else 8
    tp = args.tensor_model_parallel_size
    cut = args.context_parallel_size * (tp if args.sequence_parallel else 1)
    tokens = (args.seq_length or 0) * args.micro_batch_size // cut
    if tokens % tokens_in:
        raise ConfigError(
            f"{flag}: {tokens} tokens of a micro-batch on each rank are not divisible by "
            f"{tokens_in}; change --seq-length {args.seq_length} or --micro-batch-size "
            f"{args.micro_batch_size}"
        )
    width = args.hidden_size
    inner = args.ffn_hidden_size or 4 * width
    for title, size in (("--hidden-size", width), ("--ffn-hidden-size / tp", inner // tp)):
        if size % block:
            raise ConfigError(f"{flag}: {title} is {size}; it has to be divisible by {block}")


def _check_graphs(args: Namespace) -> None:
    """Refuse CUDA graphs of anything but whole layers on padded rows, which have one shape."""
    impl = args.cuda_graph_impl
    if impl == "none":
        return
    flag = f"--cuda-graph-impl {impl}"
    if impl != "local":
        raise ConfigError(
            f"{flag} is not supported: encoders run uncaptured beside the language model's layers; "
            "use local"
        )
    if args.cuda_graph_modules:
        raise ConfigError(
            f"{flag} with --cuda-graph-modules is not supported: whole layers are captured; leave "
            "--cuda-graph-modules out"
        )
    if args.pack:
        raise ConfigError(
            f"{flag} with --pack is not supported: a graph replays fixed shapes, and the number of "
            "documents changes from row to row; leave one of the two out"
        )
    if args.eval_iters and (args.eval_micro_batch_size or 0) not in (0, args.micro_batch_size):
        raise ConfigError(
            f"{flag} with --eval-micro-batch-size {args.eval_micro_batch_size}: a graph replays "
            f"fixed shapes; use that of training, {args.micro_batch_size}"
        )


def _divides(total: int | None, part: int, what: str, by: str) -> None:
    if total is None:
        raise ConfigError(f"the {what} are not set; the recipe or a flag has to give them")
    if total % part:
        raise ConfigError(f"{total} {what} cannot be divided by {by} {part}")
