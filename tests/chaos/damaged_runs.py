"""Damage to every file of a checkpoint, and to the tracker beside it."""

from __future__ import annotations

import shutil
import tempfile
import time
from pathlib import Path
from random import Random

from tests.chaos.damage import DAMAGES, TRACKERS
from tests.chaos.faults import printed, require_success
from tests.chaos.tally import Tally
from tests.distributed.training.launch import losses, train
from tests.rank_pool import RankPool

__all__ = ["damage_checkpoints"]


def damage_checkpoints(
    ranks: RankPool, *, seed: int, seconds: float, at_most: int | None = None
) -> Tally:
    """Damage to any file of the newest checkpoint, or the tracker: the run continues exactly."""
    tally = Tally(kind="damage")
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="chaos-", ignore_cleanup_errors=True) as name:
        whole = Path(name) / "whole"
        require_success(train(ranks, whole, "dp2"))
        while time.monotonic() - begin < seconds and (at_most is None or tally.cases < at_most):
            random = Random(f"{seed}/damage/{tally.cases}")
            output = Path(name) / "broken"
            shutil.copytree(whole, output)
            (output / "metrics.json").unlink()
            root = output / "checkpoints"
            what, damage = random.choice([*DAMAGES, *TRACKERS])
            folder = root / "iter_0000006" if (what, damage) in DAMAGES else root
            label = f"damage --seed {seed} --case {tally.cases} ({what})"
            try:
                damage(folder, random)
                exits = train(ranks, output, "dp2")
                assert "Traceback" not in printed(exits), printed(exits)[-2000:]
                require_success(exits)
                assert losses(output) == losses(whole), "other losses"
                tally.outcomes["continued exactly"] += 1
            except AssertionError as error:
                tally.fail(f"{label}: {error}")
            shutil.rmtree(output, ignore_errors=True)
    tally.seconds = time.monotonic() - begin
    return tally
