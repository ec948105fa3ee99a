"""``python -m tests.matrix``: run the cells of the equivalence matrix. ``--help`` says more."""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path

from tests.matrix.cells import Values, all_cells, name_of, pair_cells, ranks_of
from tests.matrix.deepstack_cells import deepstack_cells
from tests.matrix.grid_cells import grid_cells
from tests.matrix.grids_page import GRIDS, grids_section
from tests.matrix.linear_cells import linear_cells
from tests.matrix.page import layers_section, page, section_of, with_section
from tests.matrix.refusals import messages_of_flags, messages_of_library
from tests.matrix.runner import Verdict, run
from tests.rank_pool import RankPool


def main() -> int:
    """Run, report, and give the exit code: 0 where every cell passed."""
    parser = argparse.ArgumentParser(prog="python -m tests.matrix", description=__doc__)
    parser.add_argument(
        "filter", nargs="*", help="parts of cell names, all of which have to occur: tp2 cp2 packed"
    )
    parser.add_argument("--pairs", action="store_true", help="the set that make test-all runs")
    parser.add_argument(
        "--grids", action="store_true", help="the set whose modules have grids of their own"
    )
    parser.add_argument(
        "--deepstack", action="store_true", help="the set with levels of rows (deepstack)"
    )
    parser.add_argument(
        "--linear", action="store_true", help="the set whose models have linear layers"
    )
    parser.add_argument("--list", action="store_true", help="name the cells and run none")
    parser.add_argument("--max-ranks", type=int, default=8, help="leave out larger cells")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all verdicts")
    parser.add_argument("--verdicts", type=Path, metavar="FILE", help="read them, and run none")
    parser.add_argument(
        "--write-docs",
        type=Path,
        metavar="FILE",
        help="write the page, if all cells passed; with --deepstack, --linear or --grids, its "
        "section of these alone",
    )
    asked = parser.parse_args()
    cells = [
        values
        for values in _chosen(asked)
        if all(part in name_of(values) for part in asked.filter)
        and ranks_of(values) <= asked.max_ranks
    ]
    if asked.list:
        print("\n".join(name_of(values) for values in cells))
        return 0
    if not cells:
        print(f"no cell has all of {asked.filter} in its name; --list names them", file=sys.stderr)
        return 2
    if asked.verdicts:
        verdicts = [Verdict(**entry) for entry in json.loads(asked.verdicts.read_text())]
    else:
        verdicts = run_with_progress(cells)
    failed = [verdict for verdict in verdicts if verdict.failure]
    if asked.json:
        text = json.dumps([asdict(verdict) for verdict in verdicts], indent=1)
        asked.json.write_text(text + "\n")
    if asked.write_docs and not failed:
        _write(asked, verdicts)
    print(f"{len(verdicts) - len(failed)} passed, {len(failed)} failed")
    return 1 if failed else 0


def _chosen(asked: argparse.Namespace) -> list[Values]:
    if asked.pairs:
        return pair_cells()
    if asked.grids:
        return grid_cells()
    if asked.linear:
        return linear_cells()
    if asked.deepstack:
        return deepstack_cells()
    return [*all_cells(), *deepstack_cells(), *linear_cells()]


def _write(asked: argparse.Namespace, verdicts: list[Verdict]) -> None:
    path: Path = asked.write_docs
    before = path.read_text()
    if asked.grids:
        written = with_section(before, grids_section(verdicts))
    elif asked.deepstack or asked.linear:
        layers = "deepstack" if asked.deepstack else "linear"
        written = with_section(before, layers_section(layers, verdicts))
    else:
        of_grids = [GRIDS, *section_of(before, GRIDS).split("\n")]
        written = with_section(page(verdicts, all_refusals()), of_grids)
    path.write_text(written)


def all_refusals() -> dict[str, str]:
    """What is refused, by what it is about."""
    pool = RankPool()
    try:
        pool.start()
        return messages_of_flags() | messages_of_library(pool)
    finally:
        pool.close()


def run_with_progress(cells: list[Values]) -> list[Verdict]:
    """Verdicts of all cells; failures are printed as they come."""
    pool = RankPool()
    shows = sys.stdout.isatty()
    verdicts: list[Verdict] = []
    work = sum(map(_cost, cells))
    done = 0.0
    try:
        pool.start()
        start = time.monotonic()
        for verdict in run(cells, pool):
            verdicts.append(verdict)
            done += _cost(verdict.values)
            if verdict.failure:
                clear = "\r\033[K" if shows else ""
                print(f"{clear}FAILED {verdict.name}\n    {verdict.failure[:4000]}", flush=True)
            spent = time.monotonic() - start
            line = (
                f"{len(verdicts)}/{len(cells)} cells, "
                f"{sum(bool(one.failure) for one in verdicts)} failed, {spent:.0f} s, "
                f"{spent * (work - done) / done:.0f} s to go"
            )
            if shows:
                print(f"\r\033[K{line}", end="", flush=True)
            elif len(verdicts) % 20 == 0:
                print(line, flush=True)
    finally:
        pool.close()
        if shows:
            print()
    return verdicts


def _cost(values: Values) -> float:
    return 1.0 + ranks_of(values)


if __name__ == "__main__":
    sys.exit(main())
