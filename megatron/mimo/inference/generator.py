"""Batched generation with a cache of keys and values, under the model's own TP x PP x DP layout.

Media are encoded once, with the prompt; then every step is one token for each sequence. The caches
are megatron-core's static inference contexts, one for each micro-batch that is under way.

Legend: B prompts of a micro-batch, T tokens of an answer, S tokens of a step, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import batched
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron.core.models.mimo.errors import ConfigError, UnsupportedError
from megatron.mimo.inference.answers import Answers, OnToken
from megatron.mimo.inference.pipeline import Pipeline
from megatron.mimo.inference.prompts import (
    check_prompts,
    collate_prompts,
    group_prompts,
    on_device,
)
from megatron.mimo.inference.rules import apply_rules
from megatron.mimo.inference.running import Running
from megatron.mimo.inference.sampling import SamplingOptions, choose_tokens, draw_uniforms
from megatron.mimo.inference.whole_sequences import whole_sequences

if TYPE_CHECKING:
    from megatron.core.models.mimo import MimoModel
    from megatron.mimo.data.sample import Sample
    from megatron.mimo.recipes.recipe import Collator

__all__ = ["Generator"]


class Generator:
    """Continues prompts.

    Works with the model as it is in a training run: tensor, pipeline (also interleaved), data and
    expert parallelism. Under sequence and context parallelism it works on whole sequences.

    Args:
        chunks: this rank's part of the model, not wrapped, with ``pg_collection``.
        collate: as for training: pads on the right.
        vocab_size: tokens from here on are padding of the vocabulary, and no answer.
        max_length: tokens that the model reads, of prompt and answer together; None for any number.
        batch_size: prompts of a micro-batch; as many micro-batches as pipeline stages are under
            way at once.
        use_cache: False runs the whole sequence again for each token: slower, but without the
            memory of a cache.

    Raises:
        ConfigError: sizes below 1.
        UnsupportedError: a cache with multi-latent attention.
    """

    def __init__(
        self,
        chunks: MimoModel | Sequence[MimoModel],
        collate: Collator,
        *,
        vocab_size: int,
        max_length: int | None = None,
        batch_size: int = 8,
        use_cache: bool = True,
    ) -> None:
        self._chunks = list(chunks) if isinstance(chunks, Sequence) else [chunks]
        for name, number in (("vocab_size", vocab_size), ("batch_size", batch_size)):
            if number < 1:
                raise ConfigError(f"{name} is {number}; expected at least 1")
        self._collate = collate
        self._max_length = max_length
        self._batch_size = batch_size
        config = self._chunks[0].config
        if use_cache and config.multi_latent_attention:
            raise UnsupportedError(
                "a cache of keys and values with multi-latent attention; give use_cache=False, "
                "which runs whole sequences for each token"
            )
        self._use_cache = use_cache
        self._groups = self._chunks[0].pg_collection
        self._pipeline = Pipeline(self._chunks)
        language = self._chunks[0].language_model
        self._three_axes = language.position_embedding_type == "mrope"
        special = self._chunks[0].special_token_ids
        # A placeholder stands for an encoder's row and is never an answer.
        self._forbidden = torch.tensor(
            sorted({token for token in special.values() if token < vocab_size}),
            dtype=torch.int64,
            device=self._pipeline.device,
        )
        self._vocab_size = vocab_size

    @torch.no_grad()
    def __call__(
        self,
        prompts: Sequence[Sample],
        options: SamplingOptions | None = None,
        *,
        on_token: OnToken | None = None,
    ) -> list[list[int]]:
        """Continue prompts.

        Collective over all ranks: all call it with the same prompts and all get the answers.
        Data-parallel ranks share the prompts out; with expert parallelism each works on all.

        Args:
            prompts: token ids with the media of their placeholders; ``is_label`` has no meaning
                here (``Sample.prompt`` cuts a training sample before its first label).
            options: greedy by default.
            on_token: called with the number of a prompt and its next token, as soon as there is
                one, on every rank that works on this prompt, and not for stop tokens. An answer
                ends where it returns True, which it has to do on all these ranks.

        Returns:
            One list of token ids per prompt, without prompt and stop token.

        Raises:
            InputError: a prompt that is malformed, or leaves no room for a token.
        """
        options = options or SamplingOptions()
        check_prompts(prompts, self._max_length)
        lengths = [len(prompt.token_ids) for prompt in prompts]
        answers = Answers(lengths, options, self._max_length, on_token)
        share = self._share(len(prompts))
        groups = group_prompts(
            [lengths[number] for number in share], self._batch_size, padded=self._takes_padding()
        )
        with self._ready():
            for under_way in batched(groups, self._pipeline.group.size()):
                runs = [
                    self._start(prompts, [share[i] for i in group], options) for group in under_way
                ]
                self._work_on(runs, answers, options)
        if not self._is_shared_out:
            return answers.tokens
        gathered: list[Any] = [None] * self._groups.dp.size()
        mine = {number: answers.tokens[number] for number in share}
        dist.all_gather_object(gathered, mine, group=self._groups.dp)
        merged = {number: tokens for found in gathered for number, tokens in found.items()}
        return [merged[number] for number in range(len(prompts))]

    @property
    def _is_shared_out(self) -> bool:
        """Data-parallel ranks have prompts of their own: not where they share experts."""
        experts = getattr(self._groups, "ep", None)
        return self._groups.dp.size() > 1 and (experts is None or experts.size() == 1)

    def _share(self, count: int) -> list[int]:
        """Numbers of the prompts that this rank works on."""
        if not self._is_shared_out:
            return list(range(count))
        return list(range(self._groups.dp.rank(), count, self._groups.dp.size()))

    def _takes_padding(self) -> bool:
        """Prompts of different lengths may share a batch; collective over the pipeline."""
        if getattr(self._collate, "span_modalities", ()):
            return False
        cores = [
            module.core_attention
            for chunk in self._chunks
            for module in chunk.language_model.modules()
            if hasattr(module, "core_attention")
        ]
        able = all(getattr(core, "takes_padded_keys", False) for core in cores)
        answer = torch.tensor([int(able)], device=self._pipeline.device)
        dist.all_reduce(answer, dist.ReduceOp.MIN, group=self._pipeline.group)
        return bool(answer.item())

    def _start(
        self, prompts: Sequence[Sample], numbers: Sequence[int], options: SamplingOptions
    ) -> Running:
        special = self._chunks[0].special_token_ids
        batch = collate_prompts(
            [prompts[number] for number in numbers],
            self._collate,
            special_token_ids=special,
            answer_length=options.max_new_tokens,
            max_length=self._max_length,
            three_axes=self._three_axes,
        )
        draws = [draw_uniforms(options, number) for number in numbers]
        drawn = [draw for draw in draws if draw is not None]
        pipeline, dtype = self._pipeline, self._chunks[0].config.params_dtype
        return Running(
            numbers,
            [prompts[number].token_ids.tolist() for number in numbers],
            on_device(batch, pipeline.device, dtype, embeds=pipeline.is_first),
            uniforms_BT=torch.stack(drawn).to(self._pipeline.device) if drawn else None,
            special_token_ids=special,
            use_cache=self._use_cache,
            three_axes=self._three_axes,
        )

    def _work_on(self, runs: list[Running], answers: Answers, options: SamplingOptions) -> None:
        """Step by step until every answer has ended; each step waits for the device once."""
        while runs := [run for run in runs if any(map(answers.is_open, run.numbers))]:
            chosen = [self._step(run, answers, options) for run in runs]
            self._pipeline.finish_sending()
            own = [tokens_B for tokens_B in chosen if tokens_B is not None]
            sizes = [len(run.numbers) for run in runs]
            tokens_N = self._pipeline.share_tokens(torch.cat(own) if own else None, sum(sizes))
            read = iter(tokens_N.tolist())
            for run, tokens_B in zip(runs, tokens_N.split(sizes), strict=True):
                run.take(tokens_B)
                for number in run.numbers:
                    answers.take(number, next(read))

    def _step(self, run: Running, answers: Answers, options: SamplingOptions) -> Tensor | None:
        """The next tokens [B] of a micro-batch, on the last stage."""
        from megatron.core.inference.utils import InferenceMode
        from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

        first = run.embedding_inputs() if self._pipeline.needs_plan else {}
        with nullcontext() if run.context is None else InferenceMode.active():
            logits_BSV = self._pipeline.run(first, run.inputs(), run.shape)
        if logits_BSV is None:
            return None
        scores_BV = logits_BSV[:, -1]
        if run.context is None:
            scores_BV = gather_from_tensor_model_parallel_region(scores_BV, group=self._groups.tp)
        scores_BV = scores_BV.float()[:, : self._vocab_size]
        if options.rules is not None:
            scores_BV = apply_rules(
                scores_BV,
                options.rules,
                prompts=run.prompts,
                answers=[answers.tokens[number] for number in run.numbers],
                stop_tokens=options.stop_tokens,
            )
        scores_BV = scores_BV.index_fill(1, self._forbidden, -math.inf)
        return choose_tokens(scores_BV, options, run.draws)

    @contextmanager
    def _ready(self) -> Iterator[None]:
        """Evaluation mode, on whole sequences."""
        modes = [chunk.training for chunk in self._chunks]
        for chunk in self._chunks:
            chunk.eval()
        try:
            with whole_sequences(self._chunks):
                yield
        finally:
            for chunk, mode in zip(self._chunks, modes, strict=True):
                chunk.train(mode)
