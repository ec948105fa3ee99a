"""Full disks, and ranks that stand still."""

from __future__ import annotations

import shutil
import tempfile
import time
from pathlib import Path
from random import Random

from tests.chaos.tally import Tally
from tests.distributed.training.launch import losses, train
from tests.rank_pool import RankExit, RankPool

__all__ = ["fill_disks", "printed", "require_success", "stand_still"]

_LARGE = ("--hidden-size", "128")  # whose checkpoint does not fit below the limit


def fill_disks(ranks: RankPool, *, seed: int, seconds: float, at_most: int | None = None) -> Tally:
    """A disk that is full from some sample on: the earlier checkpoint stays, the run continues."""
    tally = Tally(kind="full disks")
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="chaos-", ignore_cleanup_errors=True) as name:
        whole = Path(name) / "whole"
        require_success(train(ranks, whole, "dp2", *_LARGE))
        while time.monotonic() - begin < seconds and (at_most is None or tally.cases < at_most):
            label = f"full disks --seed {seed} --case {tally.cases}"
            random = Random(f"{seed}/full disks/{tally.cases}")
            output = Path(name) / "broken"
            sample = str(random.randrange(48))
            try:
                exits = train(ranks, output, "dp2", *_LARGE, "--tiny-disk-full-from", sample)
                assert all(exit_.stopped != "timeout" for exit_ in exits), "the ranks hang"
                assert all(exit_.exit_code for exit_ in exits), "a full disk was not noticed"
                text = printed(exits)
                assert "could not be written" in text or "disk is full" in text, text[-2000:]
                require_success(train(ranks, output, "dp2", *_LARGE))
                assert losses(output) == losses(whole), "other losses"
                tally.outcomes["noticed, continued exactly"] += 1
            except AssertionError as error:
                tally.fail(f"{label}: {error}")
            shutil.rmtree(output, ignore_errors=True)
    tally.seconds = time.monotonic() - begin
    return tally


def stand_still(ranks: RankPool, *, seed: int, seconds: float, at_most: int | None = None) -> Tally:
    """A rank that sleeps or is stopped: warned of within 30 s, ended, named; the run continues."""
    tally = Tally(kind="stand-still")
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="chaos-", ignore_cleanup_errors=True) as name:
        whole = Path(name) / "whole"
        require_success(train(ranks, whole, "dp2"))
        while time.monotonic() - begin < seconds and (at_most is None or tally.cases < at_most):
            label = f"stand-still --seed {seed} --case {tally.cases}"
            random = Random(f"{seed}/stand-still/{tally.cases}")
            output = Path(name) / "broken"
            how, sample = random.choice(["sleep", "stop"]), random.randrange(48)
            rank = sample // 2 % 2  # micro-batches of two, in turn
            try:
                flags = ("--tiny-end", f"{how}:{sample}", "--stall-timeout", "28")
                started = time.monotonic()
                exits = train(ranks, output, "dp2", *flags)
                took = time.monotonic() - started
                text = printed(exits)
                assert f"warning: rank {rank} on " in text, text[-2000:]
                assert "reading data" in text, text[-2000:]
                assert f"stacks of rank {rank}, which stood still" in text, text[-2000:]
                assert took < 120, f"it took {took:.0f} s"
                require_success(train(ranks, output, "dp2"))
                assert losses(output) == losses(whole), "other losses"
                tally.outcomes[f"{how}: noticed, ended, continued exactly"] += 1
            except AssertionError as error:
                tally.fail(f"{label}: {error}")
            shutil.rmtree(output, ignore_errors=True)
    tally.seconds = time.monotonic() - begin
    return tally


def require_success(exits: list[RankExit]) -> None:
    """Raise ``AssertionError``, with what was printed, unless every rank ended well."""
    assert all(exit_.exit_code == 0 for exit_ in exits), printed(exits)[-2000:]


def printed(exits: list[RankExit]) -> str:
    """All that the ranks have printed."""
    return "".join(exit_.stdout + exit_.stderr for exit_ in exits)
