"""Samples that cannot be read, are too long or take too long to decode: policy, count and log."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron.core.models.mimo.errors import ConfigError, InputError

__all__ = ["BadSample", "BadSampleLog", "BadSamplePolicy"]

_LOG = logging.getLogger(__name__)
_KINDS = ("bad", "too long", "too slow", "cut")


@dataclass(frozen=True, kw_only=True)
class BadSample:
    """Why a record gave no sample. Can be pickled.

    Attributes:
        file: that holds the record.
        place: where in it: "line 3", "row 17".
        medium: that is at fault; None where no single one is.
        kind: "bad", "too long" or "too slow"; "cut" of a sample that was not left out but lost
            turns, so as to fit.
        reason: the whole message, as training would have ended with it.
    """

    file: str
    place: str
    medium: str | None
    kind: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class BadSamplePolicy:
    """What a run does with bad samples; the flags of the same names.

    Attributes:
        on_bad_sample: "stop" or "skip".
        max_bad_samples: a run ends at the sample that exceeds this; None for no limit.
        sample_timeout: seconds that reading one sample may take; None for no limit.
        on_too_long: "stop", "skip", "cut-front" or "cut-end".

    Raises:
        ConfigError: other words or numbers.
    """

    on_bad_sample: str = "stop"
    max_bad_samples: int | None = None
    sample_timeout: float | None = None
    on_too_long: str = "stop"

    @property
    def leaves_out(self) -> bool:
        """Whether any sample may be left out, or cut."""
        return (self.on_bad_sample, self.on_too_long) != ("stop", "stop")

    def __post_init__(self) -> None:
        _one_of("on_bad_sample", self.on_bad_sample, ("stop", "skip"))
        _one_of("on_too_long", self.on_too_long, ("stop", "skip", "cut-front", "cut-end"))
        if self.max_bad_samples is not None and self.max_bad_samples < 0:
            raise ConfigError(f"--max-bad-samples is {self.max_bad_samples}; expected at least 0")
        if self.sample_timeout is not None and not self.sample_timeout > 0:
            raise ConfigError(f"--sample-timeout is {self.sample_timeout}; expected more than 0 s")


class BadSampleLog:
    """Counts samples that were left out, and writes each into a file.

    Global batches call ``add`` once for each bad sample that they consume, in order. The counts
    are part of the data's state, so that the limit holds over restarts.

    Args:
        policy: with the limit.
        file: ``bad_samples.jsonl`` of the run; None on ranks that do not write.
        warns: log the first, the 10th, the 100th ... of each kind.
    """

    def __init__(
        self, policy: BadSamplePolicy, file: Path | None = None, *, warns: bool = True
    ) -> None:
        self._policy = policy
        self._warns = warns
        self._file = file
        self.counts: Counter[str] = Counter()

    def add(self, bad: BadSample) -> None:
        """Count one and write it down.

        Raises:
            InputError: there are more than ``max_bad_samples`` now. Samples that are too long or
                were cut do not count towards that limit: the data are not at fault.
        """
        self.counts[bad.kind] += 1
        if self._file is not None:
            with self._file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(bad), ensure_ascii=False) + "\n")
        count = self.counts[bad.kind]
        if self._warns and str(count).strip("0") == "1":
            done = "cut" if bad.kind == "cut" else f"left out, {bad.kind}"
            _LOG.warning("%s (%d so far): %s", done, count, bad.reason)
        broken, most = self.counts["bad"] + self.counts["too slow"], self._policy.max_bad_samples
        if most is not None and bad.kind in ("bad", "too slow") and broken > most:
            raise InputError(
                f"{broken} samples were bad, more than --max-bad-samples {most}; the last: "
                f"{bad.reason}"
            )

    def state_dict(self) -> dict[str, int]:
        """The counts."""
        return dict(self.counts)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from counts."""
        self.counts = Counter({kind: int(state.get(kind, 0)) for kind in _KINDS})


def _one_of(name: str, value: str, expected: tuple[str, ...]) -> None:
    if value not in expected:
        flag = name.replace("_", "-")
        raise ConfigError(f"--{flag} is {value!r}; expected {' or '.join(expected)}")
