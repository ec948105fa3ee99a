"""Greedy decoding with the training model, under its own TP x PP x DP layout.

Every new token is a forward pass of the whole sequence through Megatron's pipeline schedule. That
suits the short answers of an evaluation at the end of training; there is no key-value cache.

Shape legend: B micro-batch, S sequence length, V vocabulary.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron.core.models.mimo.errors import InputError, UnsupportedError
from megatron.mimo.recipes.recipe import Batch, Collator
from megatron.mimo.training.broadcast import move
from megatron.mimo.training.data import stage_part, training_device
from megatron.mimo.training.step import model_inputs, whole_vocabulary

if TYPE_CHECKING:
    from megatron.core.models.mimo import MimoModel
    from megatron.mimo.data.sample import Sample

__all__ = ["GreedyGenerator"]

_MICRO_BATCHES_AT_ONCE = 8  # held in memory together on each data-parallel rank


class GreedyGenerator:
    """``FinishedRun.generate``."""

    def __init__(self, args: Namespace, chunks: Sequence[MimoModel], collate: Collator) -> None:
        self._args = args
        self._chunks = list(chunks)
        self._collate = collate

    @torch.no_grad()
    def __call__(
        self, samples: Sequence[Sample], max_new_tokens: int, stop_token: int | None
    ) -> list[list[int]]:
        """Continue each sample's prompt with the most probable tokens.

        Collective over all ranks: all call it with the same samples and all get the answer.

        Args:
            samples: what stands from the first label on is not shown to the model.
            max_new_tokens: longest answer, in tokens.
            stop_token: ends an answer, and is left out of it; None to always fill it up.

        Returns:
            One list of token ids per sample, without its prompt.

        Raises:
            InputError: a prompt leaves no room for a token within the sequence length.
            UnsupportedError: interleaved pipeline stages.
        """
        from megatron.core import mpu

        if len(self._chunks) > 1:
            raise UnsupportedError(
                "generation under interleaved pipeline stages is not supported; evaluate on a "
                "layout without them"
            )
        prompts = [sample.prompt() for sample in samples]
        for prompt in prompts:
            if len(prompt.token_ids) >= self._args.seq_length:
                raise InputError(
                    f"sample {prompt.name}: its prompt of {len(prompt.token_ids)} tokens leaves "
                    f"no room for an answer within --seq-length {self._args.seq_length}"
                )
        training = [chunk.training for chunk in self._chunks]
        for chunk in self._chunks:
            chunk.eval()
        dp_group = mpu.get_data_parallel_group()
        mine = range(dp_group.rank(), len(prompts), dp_group.size())
        answers = self._own_answers([prompts[i] for i in mine], max_new_tokens, stop_token)
        for chunk, mode in zip(self._chunks, training, strict=True):
            chunk.train(mode)
        gathered: list[Any] = [None] * dp_group.size()
        dist.all_gather_object(gathered, answers, group=dp_group)
        return [gathered[i % dp_group.size()][i // dp_group.size()] for i in range(len(prompts))]

    def _own_answers(
        self, prompts: Sequence[Sample], max_new_tokens: int, stop_token: int | None
    ) -> list[list[int]]:
        size = self._args.eval_micro_batch_size
        step = size * _MICRO_BATCHES_AT_ONCE
        answers: list[list[int]] = []
        for start in range(0, len(prompts), step):
            part = list(prompts[start : start + step])
            padded = part + [part[-1]] * (-len(part) % size)  # the schedule wants full batches
            found = self._decode(padded, max_new_tokens, stop_token)
            answers += found[: len(part)]
        return answers

    def _decode(
        self, prompts: Sequence[Sample], max_new_tokens: int, stop_token: int | None
    ) -> list[list[int]]:
        size = self._args.eval_micro_batch_size
        batches = [
            self._collate(prompts[start : start + size]) for start in range(0, len(prompts), size)
        ]
        lengths = torch.tensor([len(prompt.token_ids) for prompt in prompts])
        answers: list[list[int]] = [[] for _ in prompts]
        open_answers = set(range(len(prompts)))
        for _ in range(max_new_tokens):
            tokens = self._next_tokens(batches, lengths).tolist()
            for index in sorted(open_answers):
                token = tokens[index]
                if token == stop_token:
                    open_answers.remove(index)
                    continue
                answers[index].append(token)
                if lengths[index] == self._args.seq_length:
                    open_answers.remove(index)
                    continue
                batch, row = divmod(index, size)
                batches[batch]["input_ids"][row, lengths[index]] = token
                lengths[index] += 1
            if not open_answers:
                break
        return answers

    def _next_tokens(self, batches: Sequence[Batch], lengths: Tensor) -> Tensor:
        """The most probable next token of every sequence, int64 on the host, on every rank.

        Collective over the tensor-, context- and pipeline-parallel groups.
        """
        from megatron.core import mpu
        from megatron.core.pipeline_parallel import get_forward_backward_func

        size = self._args.eval_micro_batch_size
        pending = zip(batches, lengths.split(size), strict=True)

        def forward_step(data: Iterator[tuple[Batch, Tensor]], model: Any) -> tuple[Tensor, Any]:
            batch, length_B = next(data)
            output, _ = model(**model_inputs(self._inputs(batch), labels=None))
            return output, partial(self._choose, length_B)

        outputs = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=pending,
            model=self._chunks,
            num_microbatches=len(batches),
            seq_length=self._args.seq_length,
            micro_batch_size=size,
            forward_only=True,
            collect_non_loss_data=True,
        )
        pp_group = mpu.get_pipeline_model_parallel_group()
        device = training_device()
        last = pp_group.rank() == pp_group.size() - 1
        tokens = torch.cat(outputs) if last else torch.empty(len(lengths), dtype=torch.int64)
        tokens = tokens.to(device)
        if pp_group.size() > 1:
            dist.broadcast(tokens, group_src=pp_group.size() - 1, group=pp_group)
        return tokens.cpu()

    def _inputs(self, batch: Batch) -> Batch:
        from megatron.core import mpu
        from megatron.core.models.mimo.alignment import build_alignment_plan

        first = mpu.is_pipeline_first_stage()
        part = stage_part(
            batch, pre_process=first, post_process=False, dtype=self._args.params_dtype
        )
        if first:
            # the sequences have grown since they were collated; their media are the same
            old = batch["alignment_plan"]
            part["alignment_plan"] = build_alignment_plan(
                batch["input_ids"], self._chunks[0].special_token_ids, row_order=old.row_order()
            )
        moved: Batch = move(part, training_device())
        return moved

    def _choose(self, length_B: Tensor, logits_BSV: Tensor, *, non_loss_data: bool) -> Tensor:
        assert non_loss_data, "the schedule is asked for tokens, not for a loss"
        tp_group = self._chunks[0].pg_collection.tp
        rows = torch.arange(len(length_B), device=logits_BSV.device)
        last_B = (length_B - 1).to(logits_BSV.device)
        adapter = self._chunks[0].partition_adapter
        held_BS = None
        if adapter is not None and adapter.cfg.use_cp:
            # the last token is on one of the context-parallel ranks
            positions_S = adapter.positions(self._args.seq_length, None).to(last_B.device)
            held_BS = positions_S == last_B[:, None]
            last_B = held_BS.int().argmax(dim=1)
        last_B1V = logits_BSV[rows, last_B].unsqueeze(1)
        scores_BV = whole_vocabulary(last_B1V, self._args.padded_vocab_size, tp_group)
        scores_BV = scores_BV.squeeze(1).float()[:, : self._args.vocab_size]
        # a placeholder stands for an encoder's row and is never an answer
        special = [i for i in self._chunks[0].special_token_ids.values() if i < scores_BV.size(1)]
        if special:
            scores_BV[:, special] = float("-inf")
        tokens_B = scores_BV.argmax(dim=-1)
        if held_BS is not None and adapter is not None:
            tokens_B = tokens_B.where(held_BS.any(dim=1), -1)
            dist.all_reduce(tokens_B, dist.ReduceOp.MAX, group=adapter.cfg.cp_group)
        return tokens_B
