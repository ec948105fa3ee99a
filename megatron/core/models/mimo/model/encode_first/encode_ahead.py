"""What frozen encoders encode in one step for the next.

Their weights do not change between the two. The next step's media are encoded in the calls in which
they would be then, so that every bit is the same, and a run that stops between the two goes on as
one that does not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from megatron.core.models.mimo.model.encode_first.step_batches import StepBatches


@dataclass(frozen=True, kw_only=True, eq=False)
class NextStep:
    """A step, and what frozen encoders have done of it in the step before.

    Attributes:
        given: its micro-batches as the data iterator gives them.
        batches: the same, with what is known of them.
        by_modality: what has been done of it, for modalities whose encoders are frozen.
    """

    given: Sequence[Mapping[str, Any]]
    batches: StepBatches
    by_modality: Mapping[str, Any]

    def is_of(self, given: Sequence[Mapping[str, Any]]) -> bool:
        """True where ``given`` are its micro-batches, and not those of a step that is repeated."""
        return len(given) == len(self.given) and all(
            one is other for one, other in zip(given, self.given, strict=True)
        )

    def forget(self) -> None:
        """Tell encoders on ranks of their own that this step does not come next."""
        for begun in self.by_modality.values():
            if hasattr(begun, "confirm"):
                begun.confirm(False)


def peeked(iterator: Any, count: int) -> list[Mapping[str, Any]]:
    """The next micro-batches of an iterator that has ``peek``; [] where it has not, or not enough.

    Args:
        iterator: gives a step's micro-batches; may be within Megatron's that can repeat them.
        count: how many micro-batches are wanted.
    """
    peek: Callable[[int], list[Mapping[str, Any]]] | None = getattr(
        iterator, "peek", getattr(getattr(iterator, "iterable", None), "peek", None)
    )
    found = [] if peek is None or not count else peek(count)
    return found if len(found) == count else []


def draws(module: nn.Module) -> bool:
    """True where a module may draw random numbers: anything with "drop" in its name is above 0."""
    for one in module.modules():
        for holder in (one, getattr(one, "config", None)):
            settings = getattr(holder, "__dict__", {})
            if any("drop" in key and _is_above_zero(value) for key, value in settings.items()):
                return True
        if isinstance(one, nn.modules.dropout._DropoutNd) and one.p > 0:
            return True
    return False


def _is_above_zero(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0
