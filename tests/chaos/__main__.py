"""``python -m tests.chaos``: try to break what docs/reliability.md promises; see ``--help``."""

from __future__ import annotations

import argparse
import secrets
import sys
from collections.abc import Callable, Mapping

from tests.chaos.arguments import arguments
from tests.chaos.conversations import conversations
from tests.chaos.damaged_runs import damage_checkpoints
from tests.chaos.faults import fill_disks, stand_still
from tests.chaos.folders import folders
from tests.chaos.fuzz import Kind, run_cases
from tests.chaos.media import media
from tests.chaos.runs import kill_launchers, kill_runs
from tests.chaos.tally import Tally
from tests.rank_pool import RankPool

INPUTS: Mapping[str, Kind] = {
    "conversations": conversations,
    "media": media,
    "folders": folders,
    "arguments": arguments,
}
RUNS: Mapping[str, Callable[..., Tally]] = {
    "kills": kill_runs,
    "launchers": kill_launchers,
    "disks": fill_disks,
    "stand-still": stand_still,
    "damage": damage_checkpoints,
}


def main() -> int:
    """Run, print counts and failures, and give the exit code: 0 where no promise was broken."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--seed", type=int, help="of all random choices (default: a new one)")
    parser.add_argument("--minutes", type=float, default=10.0, help="for all kinds together")
    parser.add_argument(
        "--only", nargs="+", choices=[*INPUTS, *RUNS], help="these kinds (default: all)"
    )
    parser.add_argument("--cases", type=int, help="at most so many of each kind")
    parser.add_argument("--case", type=int, help="this one case of malformed inputs")
    asked = parser.parse_args()
    seed = secrets.randbelow(10**6) if asked.seed is None else asked.seed
    kinds = asked.only or [*INPUTS, *RUNS]
    seconds = 60 * asked.minutes / len(kinds)
    print(f"seed {seed}, {asked.minutes:g} minutes: {' '.join(kinds)}", flush=True)
    failed = 0
    pool = RankPool()
    try:
        for kind in kinds:
            if kind in RUNS:
                tally = RUNS[kind](pool, seed=seed, seconds=seconds, at_most=asked.cases)
            else:
                tally = run_cases(
                    kind,
                    INPUTS[kind],
                    seed=seed,
                    seconds=seconds,
                    first=asked.case or 0,
                    at_most=asked.cases if asked.case is None else 1,
                )
            print("\n".join([str(tally), *tally.failures]), flush=True)
            failed += len(tally.failures)
    finally:
        pool.close()
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
