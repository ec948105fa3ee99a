"""Answers conversations with a checkpoint: a root with weights and a folder ``hf``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megatron.mimo.arguments.standalone import build_model, model_settings
from megatron.mimo.checkpoints.assets import end_tokens, read_processor
from megatron.mimo.checkpoints.folders import ASSETS
from megatron.mimo.checkpoints.inspection import Inspector
from megatron.mimo.checkpoints.torch_dist import locate
from megatron.mimo.checkpoints.weights import load_weights
from megatron.mimo.data.chat.chat import Chat
from megatron.mimo.data.conversation import Conversation
from megatron.mimo.data.media.files import MediaLimits
from megatron.mimo.inference.generator import Generator
from megatron.mimo.inference.sampling import SamplingOptions
from megatron.mimo.inference.settings import read_settings
from megatron.mimo.inference.text_stream import TextStream
from megatron.mimo.lora import add_adapters, merge_adapters, saved_settings
from megatron.mimo.models import family_of, read_hf_config
from megatron.mimo.models.common.family import sample_collator
from megatron.mimo.process.ranks import running_job
from megatron.mimo.recipes.media_flags import kept_video_fps

__all__ = ["Assistant", "open_assistant"]


class Assistant:
    """Answers conversations in text.

    Args:
        chat: writes conversations as the model reads them.
        generator: of the model.
        stop_tokens: the model's own; with no others an answer ends there.
        defaults: the model's own options.
        keep_special_tokens: special tokens stay in the text of answers.
    """

    def __init__(
        self,
        chat: Chat,
        generator: Generator,
        stop_tokens: Sequence[int],
        *,
        defaults: SamplingOptions | None = None,
        keep_special_tokens: bool = False,
    ) -> None:
        self.stop_tokens = tuple(stop_tokens)
        self.defaults = defaults or SamplingOptions()
        self._keep_special_tokens = keep_special_tokens
        self._chat = chat
        self._generator = generator

    def __call__(
        self,
        conversations: Sequence[Conversation],
        options: SamplingOptions | None = None,
        *,
        stop_texts: Sequence[str] = (),
        on_text: Callable[[int, str], None] | None = None,
    ) -> list[str]:
        """The assistant's next turn in each conversation, whose last turn is the user's.

        Collective over all ranks, as ``Generator``.

        Args:
            conversations: their media are files, or decoded.
            options: the model's own by default; without stop tokens or rules, the model's own.
            stop_texts: an answer ends before the first of them.
            on_text: told the number of a conversation and the next piece of its answer, as it
                comes, on every rank that works on it.

        Raises:
            InputError: a medium cannot be read or is of a kind that the model does not take; a
                conversation is too long.
        """
        options = options or self.defaults
        if options.rules is None:
            options = replace(options, rules=self.defaults.rules)
        if not options.stop_tokens:
            options = options.ended_by(self.stop_tokens)

        def live_stream(number: int) -> TextStream:
            write = None if on_text is None else partial(on_text, number)
            return self._text(stop_texts, write)

        streams = [live_stream(number) for number in range(len(conversations))]
        answers = self._generator(
            [self._chat.prompt(conversation) for conversation in conversations],
            options,
            on_token=lambda number, token: streams[number].feed(token),
        )
        texts = []
        for tokens, live in zip(answers, streams, strict=True):
            live.close()
            # the answer may be another rank's
            whole = self._text(stop_texts, None)
            any(whole.feed(token) for token in tokens)
            texts.append(whole.close())
        return texts

    def _text(self, stop_texts: Sequence[str], write: Callable[[str], None] | None) -> TextStream:
        return TextStream(
            self._chat.processor.tokenizer,
            stop_texts=stop_texts,
            write=write,
            keep_special_tokens=self._keep_special_tokens,
        )


def open_assistant(
    checkpoint: Path,
    *,
    device: torch.device,
    tp_size: int = 1,
    pp_size: int = 1,
    dtype: torch.dtype = torch.float32,
    iteration: int | None = None,
    hf: Path | None = None,
    batch_size: int = 8,
    keep_special_tokens: bool = False,
    video_fps: float | None = None,
    limits: MediaLimits | None = None,
    hashes: bool = True,
) -> Assistant:
    """Load a checkpoint of any layout, imported or trained; adapters are merged.

    Call it on every rank, inside ``standalone.process_groups``.

    Args:
        checkpoint: a root with a folder ``hf``, or one of its iterations.
        device: as ``process_groups`` gives it.
        tp_size: tensor-parallel size, of the groups.
        pp_size: pipeline-parallel size, of the groups.
        dtype: of the parameters.
        iteration: another than the newest.
        hf: folder of the processor, and of what else a checkpoint without ``hf`` lacks; the
            checkpoint's ``hf`` by default.
        batch_size: conversations that are answered together.
        keep_special_tokens: special tokens that the model says stay in the text, but for those
            that end it: boxes of a grounding model, say.
        video_fps: frames per second that are kept of videos; as in training by default.
        limits: of media files.
        hashes: compare the checkpoint's files with the hashes that were written with them, each
            rank a share.

    Raises:
        ConfigError: no whole checkpoint, no ``hf`` folder, no processor, or one of another model.
        InputError: the checkpoint does not hold the model that ``hf`` describes.
    """
    described = hf is None or not (hf / "config.json").is_file()
    inspector = Inspector(running_job(), hashes=hashes)
    root, folder = locate(checkpoint, iteration=iteration, described=described, inspector=inspector)
    assets = root / ASSETS
    if hf is not None and not (assets / "config.json").is_file():
        assets = hf
    config = read_hf_config(assets)
    family = family_of(config)
    settings = read_settings(assets, config)  # refuses what is not supported, before all else
    chat = Chat(
        family=family,
        config=config,
        processor=read_processor(hf or assets),
        video_fps=video_fps or kept_video_fps(assets),
        end_tokens=end_tokens(assets),
        limits=limits or MediaLimits(),
    )
    # what training taught ends an answer too
    ends = {*settings.stop_tokens, chat.processor.tokenizer.eos_token_id, chat.text.turn_end}
    built = model_settings(
        family,
        config,
        tp_size=tp_size,
        pp_size=pp_size,
        dtype=dtype,
        changes={"transformer_impl": "local"},  # takes prompts of different lengths together
    )
    model = _load(build_model(family, config, built, device=device), folder)
    limit, vocab_size = built.max_positions, built.tokens
    collate = sample_collator(family, config, seq_length=limit, vocab_size=vocab_size)
    return Assistant(
        chat,
        Generator(model, collate, vocab_size=vocab_size, max_length=limit, batch_size=batch_size),
        sorted(ends - {None}),
        defaults=settings.options,
        keep_special_tokens=keep_special_tokens,
    )


def _load(model: Any, folder: Path) -> Any:
    """The model, filled with a checkpoint's weights, its adapters merged."""
    settings = saved_settings(folder)
    if settings is not None:
        add_adapters(model, settings)
    load_weights(model, folder)
    if settings is not None:
        merge_adapters(model)
    return model
