"""A dataset of conversations, in an order that depends on the seed alone."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
from torch.utils.data import Dataset

from megatron.core.models.mimo.errors import InputError
from megatron.mimo.data.chat.chat import Chat
from megatron.mimo.data.conversation import Conversation
from megatron.mimo.data.sample import Sample

__all__ = ["ChatDataset"]

_LOG = logging.getLogger(__name__)


class ChatDataset(Dataset[Sample]):
    """Samples of conversations; sample i is a function of i, the seed and the files alone.

    Args:
        conversations: what is read.
        chat: how.
        seq_length: tokens that a sample may have.
        count: samples; more than conversations are read over and over. None for one pass.
        seed: of a new order in each pass; None for the order of the files.
        on_too_long: with "skip" a conversation that is longer gives its place to the next one in
            order that fits, with a warning; with "stop" it is an error.
    """

    def __init__(
        self,
        conversations: Sequence[Conversation],
        *,
        chat: Chat,
        seq_length: int,
        count: int | None = None,
        seed: int | None = None,
        on_too_long: str = "stop",
    ) -> None:
        self._conversations = conversations
        self._chat = chat
        self._seq_length = seq_length
        self._count = len(conversations) if count is None else count
        self._seed = seed
        self._skips = on_too_long == "skip"
        self._skipped: set[int] = set()
        self._order: tuple[int, np.ndarray] | None = None

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Sample:
        """Read sample ``index``.

        Raises:
            InputError: as ``Chat.sample``; it is too long, or where these are left out, all are.
        """
        total = len(self._conversations)
        # The rest of this pass and the whole next one, in which each conversation stands once.
        for at in range(index, (index // total + 2) * total):
            number = self._number(at)
            if number in self._skipped:
                continue
            sample = self._chat.sample(self._conversations[number])
            length = len(sample.token_ids)
            if length <= self._seq_length:
                return sample
            if not self._skips:
                raise InputError(
                    f"{sample.name}: {length} tokens, {length - self._seq_length} more than "
                    f"--seq-length {self._seq_length}; raise it, shorten the conversation, or "
                    "leave such ones out with --on-too-long skip (media are never cut)"
                )
            self._skip(number, sample.name, length)
        raise InputError(
            f"all {total} conversations are longer than --seq-length {self._seq_length}; raise it"
        )

    def _number(self, index: int) -> int:
        """Which conversation stands at this place of the passes."""
        turn, place = divmod(index, len(self._conversations))
        if self._seed is None:
            return place
        if self._order is None or self._order[0] != turn:
            generator = np.random.default_rng((self._seed, turn))
            self._order = turn, generator.permutation(len(self._conversations))
        return int(self._order[1][place])

    def _skip(self, number: int, name: str, length: int) -> None:
        self._skipped.add(number)
        count = len(self._skipped)
        if str(count).strip("0") == "1":  # 1, 10, 100 ...
            _LOG.warning(
                "%s has %d tokens, more than --seq-length %d, and is left out; %d of %d "
                "conversations so far",
                name,
                length,
                self._seq_length,
                count,
                len(self._conversations),
            )
