"""``python -m tests.cards FAMILY ...``: prove model families and write their cards."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

from tests.cards.configurations import DRAWN
from tests.cards.page import page, verdicts_of
from tests.cards.proofs import PROOFS, Verdict, prove
from tests.cards.sizes import full_sizes
from tests.rank_pool import RankPool


def main() -> int:
    """Prove, report, and give the exit code: 0 where every proof passed."""
    from megatron.mimo.models import family_names

    parser = argparse.ArgumentParser(prog="python -m tests.cards", description=__doc__)
    parser.add_argument("family", nargs="*", help=f"of {', '.join(family_names())}; all by default")
    parser.add_argument("--number", type=int, help=f"one configuration, 0 to {DRAWN}; no page")
    parser.add_argument("--proof", action="append", choices=list(PROOFS), help="no page then")
    parser.add_argument(
        "--folder", type=Path, default=Path("docs/models"), help="where pages are written"
    )
    parser.add_argument(
        "--verdicts", type=Path, metavar="FILE", help="keep them there, and prove only the rest"
    )
    parser.add_argument(
        "--add", action="store_true", help="prove only what a page does not have yet, and add it"
    )
    asked = parser.parse_args()
    unknown = set(asked.family) - set(family_names())
    if unknown:
        parser.error(f"unknown family {', '.join(sorted(unknown))}; see --help")
    failed = sum(run(name, asked) for name in asked.family or family_names())
    return 1 if failed else 0


def run(name: str, asked: argparse.Namespace) -> int:
    """Prove a family, and write its page where all of it was asked for and passed.

    Returns:
        How many proofs failed.
    """
    numbers = range(DRAWN + 1) if asked.number is None else [asked.number]
    titles = asked.proof or list(PROOFS)
    kept = _Kept(asked.verdicts, name)
    if asked.add:
        kept.verdicts += verdicts_of((asked.folder / f"{name}.md").read_text())
    pool = RankPool()
    try:
        pool.start()
        for number in numbers:
            done = {one.proof for one in kept.verdicts if one.number == number}
            missing = [title for title in titles if title not in done]
            for verdict in prove(pool, name, number, missing) if missing else ():
                _tell(name, verdict)
                kept.add(verdict)
        wrong = sum(bool(one.failure) for one in kept.verdicts)
        if not wrong and asked.number is None and not asked.proof:
            asked.folder.mkdir(exist_ok=True)
            text = page(name, kept.verdicts, full_sizes(pool, name))
            (asked.folder / f"{name}.md").write_text(text)
    finally:
        pool.close()
    refused = sum(bool(one.refused) for one in kept.verdicts)
    passed = len(kept.verdicts) - wrong - refused
    print(f"{name}: {passed} passed, {wrong} failed, {refused} refused by name", flush=True)
    return wrong


class _Kept:
    """A family's verdicts, also in a file where one is given; failures are not kept there."""

    def __init__(self, path: Path | None, name: str) -> None:
        self._path, self._name = path, name
        known = (Verdict(**entry) for entry in self._read().get(name, []))
        self.verdicts = [one for one in known if one.proof in PROOFS]

    def add(self, verdict: Verdict) -> None:
        """One more."""
        self.verdicts.append(verdict)
        if self._path is not None:
            passed = [asdict(one) for one in self.verdicts if not one.failure]
            content = self._read() | {self._name: passed}
            self._path.write_text(json.dumps(content, indent=1) + "\n")

    def _read(self) -> dict[str, list[dict[str, object]]]:
        if self._path is None or not self._path.is_file():
            return {}
        content: dict[str, list[dict[str, object]]] = json.loads(self._path.read_text())
        return content


def _tell(name: str, verdict: Verdict) -> None:
    state = "FAILED" if verdict.failure else "-" if verdict.refused else "ok"
    deviation = "" if verdict.deviation is None else f" {verdict.deviation:.1e}"
    title = f"{name} {verdict.number} {verdict.proof}"
    print(f"{state:7}{title}{deviation} {verdict.seconds:.1f} s", flush=True)
    if verdict.failure:
        print(f"    {verdict.failure[:4000]}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
