"""What a run replaces in megatron-core is undone when it ends."""

from __future__ import annotations

import json
from pathlib import Path

from tests.distributed.training.launch import EVALUATE, RECIPE
from tests.rank_pool import RankPool
from tests.time_limits import HANG

SCRIPT = Path(__file__).with_name("hooks_script.py")


def test_a_run_leaves_megatron_as_it_was(ranks: RankPool, tmp_path: Path) -> None:
    """A run that trains by parts, evaluates, saves, and watches values that are not finite."""
    flags = ("--train-iters", "3", "--module-lr", "images=1e-3", *EVALUATE)
    argv = [SCRIPT, *RECIPE, "--output", tmp_path, *flags]
    (exit_,) = ranks.start_script(1, argv, timeout=HANG).wait()
    assert exit_.exit_code == 0, exit_.stdout + exit_.stderr
    assert "iteration 3" in exit_.stdout
    names, changed = json.loads(exit_.stdout.splitlines()[-1])
    assert names > 1000
    assert changed == ["megatron.core.jit:jit_fuser"]  # Megatron's own, by --disable-jit-fuser
