"""The command behind ``examples/mimo/generate.py``: one question to a checkpoint."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from megatron.core.models.mimo.errors import ConfigError, MimoError
from megatron.mimo.data.media.source import MediaLimits, require_file
from megatron.mimo.inference.rules import Rules
from megatron.mimo.inference.sampling import SamplingOptions
from megatron.mimo.process.failure import refuse
from megatron.mimo.process.launcher import LaunchError, join_job, set_threads
from megatron.mimo.process.quiet import quiet_imports, stdout, warnings_shown
from megatron.mimo.recipes.media_flags import add_media_arguments, media_limits

__all__ = ["main"]

_MEDIA = ("image", "video", "audio")


def main(argv: Sequence[str] | None = None) -> int:
    """Answer on the terminal, as the tokens come.

    Args:
        argv: without the program's name; None for the process's own.

    Returns:
        The exit code; 2 where the arguments, the checkpoint or the media are at fault.
    """
    arguments = _parser().parse_args(argv)
    try:
        join_job()
    except LaunchError as error:
        return refuse(ConfigError(str(error)), 0)
    set_threads()
    rank = int(os.environ["RANK"])
    sizes = (arguments.tensor_model_parallel_size, arguments.pipeline_model_parallel_size)
    try:
        if min(sizes) < 1:
            raise ConfigError(f"parallel sizes are {sizes}; expected at least 1 each")
        with quiet_imports():
            # Megatron, once all flags are known to be right
            from megatron.mimo.arguments.standalone import process_groups
        with (
            warnings_shown(shown=False),
            process_groups(tp_size=sizes[0], pp_size=sizes[1]) as device,
        ):
            _answer(arguments, device, rank)
    except MimoError as error:
        return refuse(error, rank)
    return 0


def _answer(arguments: argparse.Namespace, device: object, rank: int) -> None:
    with quiet_imports():
        import torch

        # Megatron, once all flags are known to be right
        from megatron.mimo.data.conversation import ContentPart, Conversation, Turn
        from megatron.mimo.inference.assistant import open_assistant

    assert isinstance(device, torch.device)
    default = torch.float32 if device.type == "cpu" else torch.bfloat16
    names = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    _options(arguments, SamplingOptions(temperature=1.0))  # errors before anything is loaded
    limits = media_limits(arguments)
    media = [
        ContentPart(kind=kind, value=_read_early(kind, Path(file), limits))
        for kind in _MEDIA
        for file in getattr(arguments, kind)
    ]
    with stdout(shown=False):
        assistant = open_assistant(
            Path(arguments.checkpoint),
            device=device,
            tp_size=arguments.tensor_model_parallel_size,
            pp_size=arguments.pipeline_model_parallel_size,
            dtype=names.get(arguments.dtype, default),
            iteration=arguments.iteration,
            hf=None if arguments.hf is None else Path(arguments.hf),
            keep_special_tokens=arguments.keep_special_tokens,
            video_fps=arguments.video_fps,
            limits=limits,
            hashes=arguments.hashes,
        )
    options = _options(arguments, assistant.defaults)
    said = Turn(role="user", content=(*media, ContentPart(kind="text", value=arguments.prompt)))
    turns = [said]
    if arguments.system is not None:
        turns.insert(
            0, Turn(role="system", content=(ContentPart(kind="text", value=arguments.system),))
        )

    def show(_: int, piece: str) -> None:
        if rank == 0:
            sys.stdout.write(piece)
            sys.stdout.flush()

    assistant(
        [Conversation(name="the prompt", turns=tuple(turns))],
        options.ended_by(assistant.stop_tokens),
        stop_texts=arguments.stop,
        on_text=show,
    )
    show(0, "\n")


def _options(arguments: argparse.Namespace, defaults: SamplingOptions) -> SamplingOptions:
    """The model's own options where no flag says otherwise."""
    given = {
        name: getattr(arguments, name)
        for name in ("max_new_tokens", "temperature", "top_p", "top_k", "min_p", "seed")
        if getattr(arguments, name) is not None
    }
    if given.get("temperature") == 0:  # greedy: what narrows a draw has to be a flag as well
        given = {"top_p": 1.0, "top_k": 0, "min_p": 0.0} | given
    penalty = arguments.repetition_penalty
    if penalty is not None:
        rules = defaults.rules or Rules()
        given["rules"] = replace(rules, repetition_penalty=penalty)
    return replace(defaults, **given)


def _read_early(kind: str, path: Path, limits: MediaLimits) -> object:
    """A decoded image; the path of others, which are read as the model wants them."""
    # Pillow and torch, where there is a picture
    from megatron.mimo.data.media.files import load_image

    if kind == "image":
        return load_image(path, limits=limits)
    require_file(path, kind, limits, folder=kind == "video")
    return path


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="generate.py", description="Ask a checkpoint about images, videos and recordings."
    )
    parser.add_argument(
        "--checkpoint",
        required=True,
        metavar="ROOT",
        help="imported or trained checkpoint, with its folder hf",
    )
    parser.add_argument("--prompt", required=True, help="what is asked, behind the media")
    parser.add_argument("--system", metavar="TEXT", help="what is said before the question")
    for kind in _MEDIA:
        parser.add_argument(
            f"--{kind}", nargs="+", action="extend", default=[], metavar="FILE", help=f"{kind}s"
        )
    add_media_arguments(parser, video_fps=None)
    parser.add_argument("--hf", metavar="DIR", help="processor and tokenizer (default: ROOT/hf)")
    parser.add_argument("--iteration", type=int, metavar="N", help="default: the newest")
    parser.add_argument(
        "--no-checkpoint-hashes",
        action="store_false",
        dest="hashes",
        help="do not compare the checkpoint's files with the hashes written with them",
    )
    answer = parser.add_argument_group(
        "answer", "by default as the model's generation_config.json says"
    )
    answer.add_argument("--max-new-tokens", type=int, metavar="N", help="or 256")
    answer.add_argument(
        "--temperature", type=float, metavar="X", help="0: always the most probable token"
    )
    answer.add_argument("--top-p", type=float, metavar="X")
    answer.add_argument("--top-k", type=int, metavar="N")
    answer.add_argument("--min-p", type=float, metavar="X")
    answer.add_argument("--repetition-penalty", type=float, metavar="X", help="1: none")
    answer.add_argument("--seed", type=int, default=0)
    answer.add_argument(
        "--keep-special-tokens",
        action="store_true",
        help="as text, but for those that end the answer: boxes of a grounding model, say",
    )
    answer.add_argument(
        "--stop", nargs="+", default=[], metavar="TEXT", help="end the answer before these words"
    )
    layout = parser.add_argument_group("layout", "with torchrun --nproc-per-node")
    layout.add_argument("--tensor-model-parallel-size", type=int, default=1, metavar="N")
    layout.add_argument("--pipeline-model-parallel-size", type=int, default=1, metavar="N")
    layout.add_argument(
        "--dtype", choices=("fp32", "bf16", "fp16"), help="default: bf16, on CPU fp32"
    )
    return parser
