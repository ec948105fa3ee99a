"""Forms global batches: which samples, in which sequences; the same on every rank.

Each draw is measured before it is used: how many tokens and rows its sample has, or that it gives
none. Measures come from worker processes and from the other data-parallel ranks, while earlier
batches are trained on (``measures``). Measured draws wait in the look-ahead buffer. What a batch
holds depends on the draws and their measures alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from megatron.core.models.mimo.errors import InputError
from megatron.mimo.data.bad_samples import BadSample
from megatron.mimo.data.global_batches.best_fit import fill_sequence
from megatron.mimo.data.measure import Measure
from megatron.mimo.data.sources import Draw, Mixture

__all__ = ["GlobalBatch", "GlobalBatches", "Measures", "Packing", "Planned"]


@dataclass(frozen=True)
class Planned:
    """A sample that is to be read, and its measure; None where nothing depends on measures."""

    draw: Draw
    measure: Measure | None


Item = tuple[Planned, ...]  # the samples of one sequence; without packing, one


@dataclass(frozen=True)
class GlobalBatch:
    """What an iteration trains on.

    Attributes:
        number: of the iteration, from 1.
        items: one for each sequence.
    """

    number: int
    items: tuple[Item, ...]


@dataclass(frozen=True, kw_only=True)
class Packing:
    """How samples are put into sequences.

    Attributes:
        capacity: places of a sequence.
        multiple: each sample takes a multiple of so many places.
        look_ahead: samples in the buffer when a sequence is filled.
    """

    capacity: int
    multiple: int = 1
    look_ahead: int = 256


class Measures(Protocol):
    """Measures draws."""

    def submit(self, draws: Sequence[Draw]) -> None:
        """Begin to measure these draws; returns at once."""
        ...

    def collect(self) -> Sequence[Measure | BadSample | None]:
        """The measures of all draws submitted since the last call, in order; None where nothing
        depends on them.

        Raises:
            InputError: a record is bad, and the policy is to stop.
        """
        ...


class GlobalBatches:
    """Forms one global batch after the other.

    Args:
        mixture: what is drawn from.
        measures: of its draws.
        packing: None for one sample in each sequence.
        left_out: called with each bad sample that is passed over, in order.
        late: bad samples that were found only when batches were read, on any rank; emptied here.
    """

    def __init__(
        self,
        mixture: Mixture,
        measures: Measures,
        *,
        packing: Packing | None = None,
        left_out: Callable[[BadSample], None] = lambda _: None,
        late: list[BadSample] | None = None,
    ) -> None:
        self._mixture = mixture
        self._measures = measures
        self._packing = packing
        self._left_out = left_out
        self._late: list[BadSample] = [] if late is None else late
        self._formed = 0
        self._known: list[Planned] = []  # measured, in the order of the draws
        self._asked: list[Draw] = []  # being measured
        self._ended = False

    def form(self, size: int) -> GlobalBatch:
        """The next global batch, of ``size`` sequences.

        Raises:
            InputError: all sources are used up before it is full; as ``Measures.collect``.
        """
        step = self._formed + 1
        self._collect()
        used_before = len(self._known)
        needed = 1 if self._packing is None else self._packing.look_ahead
        items: list[Item] = []
        while len(items) < size:
            while len(self._known) < needed and not self._ended:
                ask = needed if self._packing else size - len(items)
                self._ask(ask - len(self._known), step)
                self._collect()
            if not self._known:
                raise InputError(
                    f"the data end within iteration {step}: all sources have given the epochs and "
                    "samples that they are to give; train for fewer iterations, or give them more"
                )
            items.append(self._take())
        used = max(used_before - len(self._known), sum(map(len, items)))
        self._formed = step
        spare = len(self._known) - (needed if self._packing else 0)
        self._ask(used - spare, step + 1)  # about what the next batch will take
        return GlobalBatch(number=step, items=tuple(items))

    def state_dict(self) -> dict[str, Any]:
        """The position behind the last batch that was formed, as JSON can hold it."""
        return {
            "formed": self._formed,
            "ended": self._ended,
            "mixture": self._mixture.state_dict(),
            "asked": [list(draw) for draw in (*self._unmeasured(), *self._asked)],
            "known": [
                [*one.draw, one.measure.length, [list(medium) for medium in one.measure.media]]
                for one in self._known
                if one.measure is not None
            ],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there.

        Raises:
            ConfigError: as ``Mixture.load_state_dict``.
        """
        self._mixture.load_state_dict(state["mixture"])
        self._formed, self._ended = int(state["formed"]), bool(state["ended"])
        self._known = [
            Planned(
                Draw(*draw),
                Measure(length, tuple((name, rows) for name, rows in media)),
            )
            for *draw, length, media in state["known"]
        ]
        self._asked = [Draw(*draw) for draw in state["asked"]]
        self._measures.submit(self._asked)

    def _unmeasured(self) -> list[Draw]:
        """Draws in the buffer without a measure, which a run that goes on from here may need."""
        return [one.draw for one in self._known if one.measure is None]

    def _ask(self, count: int, step: int) -> None:
        draws = []
        for _ in range(count):
            draw = self._mixture.draw(step)
            if draw is None:
                self._ended = True
                break
            draws.append(draw)
        self._asked += draws
        self._measures.submit(draws)

    def _collect(self) -> None:
        """Take what was asked for into the buffer; bad samples are consumed here."""
        found = self._measures.collect()
        assert len(found) == len(self._asked), "a measure for each draw"
        for draw, one in zip(self._asked, found, strict=True):
            if isinstance(one, BadSample):
                self._left_out(one)
            else:
                self._known.append(Planned(draw, one))
        self._asked = []
        late, self._late[:] = list(self._late), []
        for bad in late:
            self._left_out(bad)

    def _take(self) -> Item:
        if self._packing is None:
            return (self._known.pop(0),)
        multiple, capacity = self._packing.multiple, self._packing.capacity
        at_hand = self._known[: self._packing.look_ahead]
        lengths = [-(-_length(one) // multiple) * multiple for one in at_hand]
        taken = fill_sequence(lengths, capacity)
        gone = set(taken)
        self._known = [one for number, one in enumerate(self._known) if number not in gone]
        return tuple(at_hand[number] for number in taken)


def _length(planned: Planned) -> int:
    assert planned.measure is not None, "what is packed is measured"
    return planned.measure.length
