"""The answers of one call, as they grow, and the rule by which they end."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from megatron.mimo.inference.sampling import SamplingOptions

__all__ = ["Answers", "OnToken"]

OnToken = Callable[[int, int], bool | None]


class Answers:
    """Tokens of each prompt's answer.

    Args:
        prompt_lengths: tokens of each prompt.
        options: with the longest answer and the stop tokens.
        max_length: tokens that the model reads, of prompt and answer together; None for any
            number. The last token of an answer is not read.
        on_token: told each token; True ends the answer.

    Attributes:
        tokens: of each answer, without the stop token.
    """

    def __init__(
        self,
        prompt_lengths: Sequence[int],
        options: SamplingOptions,
        max_length: int | None,
        on_token: OnToken | None,
    ) -> None:
        self.tokens: list[list[int]] = [[] for _ in prompt_lengths]
        self._most = [
            options.max_new_tokens
            if max_length is None
            else min(options.max_new_tokens, max_length - length + 1)
            for length in prompt_lengths
        ]
        self._stop = frozenset(options.stop_tokens)
        self._on_token = on_token
        self._ended: set[int] = set()

    def is_open(self, prompt: int) -> bool:
        """Whether the answer to this prompt goes on."""
        return prompt not in self._ended

    def take(self, prompt: int, token: int) -> None:
        """Add the next token; nothing happens to an answer that has ended."""
        if prompt in self._ended:
            return
        if token in self._stop:
            self._ended.add(prompt)
            return
        self.tokens[prompt].append(token)
        asked_to_end = self._on_token is not None and self._on_token(prompt, token)
        if asked_to_end or len(self.tokens[prompt]) >= self._most[prompt]:
            self._ended.add(prompt)
