"""The proofs of a card, one after the other, on a pool of ranks; each is a test's own function."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tests.cards.configurations import change_of
from tests.cards.conversion import there_and_back, train_with_a_stop
from tests.distributed.inference.test_families import answer_by_transformers, generate
from tests.distributed.lora import ranks as lora
from tests.distributed.models.expected import Expected, compute_expected
from tests.distributed.models.packed import packed_logits
from tests.distributed.models.ranks import Deviation, Layout, compare, train
from tests.distributed.models.text_kinds import take_all_experts
from tests.rank_pool import RankPool

__all__ = ["PROOFS", "Verdict", "prove"]

LOGITS, RELATIVE = 1e-4, 1e-3
_LORA = ("language",)
_SP = {"sequence_parallel": True}


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What came of one proof of one configuration.

    Attributes:
        number: of the configuration.
        proof: a key of ``PROOFS``.
        deviation: the largest seen; None where all is equal or nothing.
        failure: what went wrong; "" for nothing.
        refused: the words in which it is refused, by name; "" where it is not.
        seconds: it took.
        when: the day and the versions, where it was proved for an earlier page; "" for now.
    """

    number: int
    proof: str
    deviation: float | None
    failure: str = ""
    refused: str = ""
    seconds: float = 0.0
    when: str = ""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A configuration of a family, and what transformers computes of it."""

    name: str
    number: int
    expected: Expected
    pool: Any

    @property
    def has_experts(self) -> bool:
        """Whether layers are mixtures of experts, which tensor parallelism cuts with SP only."""
        return any(".experts." in name for name in self.expected.weights)


def _layout(layout: Layout) -> Callable[[Subject], dict[str, float]]:
    def proof(subject: Subject) -> dict[str, float]:
        seen = subject.pool(layout.world_size)(compare, subject.name, layout, subject.expected)
        return _largest(seen)

    return proof


def _interleaved(subject: Subject) -> dict[str, float]:
    change = partial(_of_four_layers, change_of(subject.name, subject.number))
    (expected,) = subject.pool(1)(compute_expected, subject.name, change, samples=5, text_only=True)
    layout = Layout(pp=2, vpp=2)
    return _largest(subject.pool(2)(compare, subject.name, layout, expected))


def _of_four_layers(change: Callable[[Any], None], config: Any) -> None:
    """The changed configuration, with a decoder that has a layer for each of four chunks."""
    change(config)
    content = config.to_dict()
    content["text_config"]["num_hidden_layers"] = 4
    content["text_config"].pop("layer_types", None)
    config.__dict__.update(type(config).from_dict(content).__dict__)


def _largest(seen: list[Deviation]) -> dict[str, float]:
    return {
        "logits": max(one.logits for one in seen if one.logits is not None),
        "gradients": max(error for one in seen for error in one.gradients.values()),
    }


def _steps(subject: Subject) -> dict[str, float]:
    change = partial(_with_all_experts, change_of(subject.name, subject.number))
    (expected,) = subject.pool(1)(
        compute_expected, subject.name, change, samples=5, text_only=True, train=True
    )
    losses = subject.pool(2)(train, subject.name, Layout(dp=2), expected)
    return {"losses": _furthest(losses, expected.trained)}


def _with_all_experts(change: Callable[[Any], None], config: Any) -> None:
    """The changed configuration, with every token at every expert."""
    change(config)
    take_all_experts(config)


def _resume(subject: Subject) -> dict[str, float]:
    layout = Layout(dp=2)
    wanted = subject.pool(2)(train, subject.name, layout, subject.expected)[0]
    with tempfile.TemporaryDirectory() as folder:
        losses = subject.pool(2)(
            train_with_a_stop, subject.name, layout, subject.expected, Path(folder) / "saved"
        )
    return {"exact": _furthest(losses, wanted)}


def _furthest(several: list[list[float]], wanted: list[float]) -> float:
    return max(
        abs(one - other) / other
        for losses in several
        for one, other in zip(losses, wanted, strict=True)
    )


def _tokens(subject: Subject) -> dict[str, float]:
    change = change_of(subject.name, subject.number)
    (reference,) = subject.pool(1)(answer_by_transformers, subject.name, change)
    subject.pool(2)(generate, subject.name, reference)  # asserts that every token is the same
    return {}


def _packed(cp: int) -> Callable[[Subject], dict[str, float]]:
    def proof(subject: Subject) -> dict[str, float]:
        seen = subject.pool(cp)(packed_logits, subject.name, subject.expected, cp)
        return {"logits": max(distance for distances in seen for distance in distances)}

    return proof


def _adapters(subject: Subject) -> dict[str, float]:
    name, change = subject.name, change_of(subject.name, subject.number)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (wanted,) = subject.pool(1)(lora.compute_adapted, name, _LORA, folder, change)
        layout = Layout(tp=2, changes=_SP if subject.has_experts else {})
        off = subject.pool(2)(lora.first_logits, name, layout, _LORA, wanted)
        on = subject.pool(2)(lora.compare, name, layout, _LORA, wanted, folder)
        merged = subject.pool(2)(lora.merged_logits, name, _LORA, wanted, folder, layout)
    return {"logits": max(*off, *merged, *(difference for _, difference in on))}


def _export(subject: Subject) -> dict[str, float]:
    change = change_of(subject.name, subject.number)
    with tempfile.TemporaryDirectory() as folder:
        (wrong,) = subject.pool(1)(there_and_back, subject.name, change, Path(folder))
    assert not wrong, "; ".join(wrong)
    return {}


PROOFS: dict[str, tuple[str, Callable[[Subject], dict[str, float]]]] = {
    "one process": ("logits and every gradient", _layout(Layout())),
    "TP 2": ("the same, tensor parallel", _layout(Layout(tp=2))),
    "TP 2, SP": ("the same, with sequence parallelism", _layout(Layout(tp=2, changes=_SP))),
    "PP 2": ("the same, on two pipeline stages", _layout(Layout(pp=2))),
    "PP 2, VPP 2": ("the same of four layers, two chunks on each stage", _interleaved),
    "CP 2": ("the same, context parallel", _layout(Layout(cp=2))),
    "EP 2": ("the same, experts on two ranks", _layout(Layout(dp=2, ep=2))),
    "packed": ("one row of all samples", _packed(1)),
    "packed, CP 2": ("the same row, context parallel", _packed(2)),
    "ten steps": ("AdamW, losses of each step, data parallel; tokens at all experts", _steps),
    "32 tokens": ("greedy, uneven prompts together, under DP 2, TP 2 and PP 2", _tokens),
    "LoRA": ("off, on and merged against PEFT, TP 2; of attention alone beside experts", _adapters),
    "export": ("import and export, byte for byte", _export),
    "resume": ("five steps, a checkpoint, five more; against ten", _resume),
}
"""Title -> (what is compared, the proof). A proof gives its largest deviations, or raises."""


def prove(
    pool: RankPool, name: str, number: int, proofs: list[str] | None = None
) -> Iterator[Verdict]:
    """The verdicts of one configuration, in the order of ``PROOFS``."""
    (expected,) = pool(1)(
        compute_expected, name, change_of(name, number), samples=5, text_only=True
    )
    subject = Subject(name=name, number=number, expected=expected, pool=pool)
    for title in proofs or PROOFS:
        begun = time.monotonic()
        refused, failure, found = _refused(subject, title), "", {}
        if not refused:
            try:
                found = PROOFS[title][1](subject)
            except Exception as error:  # noqa: BLE001 - of whatever kind: it is the verdict
                failure = str(error) or type(error).__name__
        failure = failure or "; ".join(
            f"{what} off by {error:.1e}"
            for what, error in found.items()
            if not error <= {"logits": LOGITS, "exact": 0.0}.get(what, RELATIVE)
        )
        yield Verdict(
            number=number,
            proof=title,
            deviation=max(found.values(), default=None),
            failure=failure,
            refused=refused,
            seconds=time.monotonic() - begun,
        )


def _refused(subject: Subject, title: str) -> str:
    """In which words, where the code refuses it, or why there is nothing to prove."""
    if title == "EP 2" and not subject.has_experts:
        return "no experts"
    if title == "TP 2" and subject.has_experts:
        return "experts need SP with TP"
    return ""
