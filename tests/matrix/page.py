"""Writes ``docs/parallelism.md`` from the verdicts of a run and from what the code refuses."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
from collections.abc import Mapping, Sequence

from tests.distributed.core.recompute import RECOMPUTED
from tests.matrix.cells import LISTED, Values
from tests.matrix.refusals import FLAGS
from tests.matrix.runner import BF16, FP32, Verdict

REFUSED = "## Refused"
# Cells that have a table of their own: their value of the axis "layers" -> title, what they are.
SECTIONS: dict[str, tuple[str, tuple[str, ...]]] = {
    "deepstack": (
        "## Levels of rows (deepstack)",
        (
            "Three levels of image rows are added behind the first three decoder layers, on",
            "whatever stages these are. Listed and not drawn; none of them is counted above.",
        ),
    ),
    "linear": (
        "## Linear layers (gated delta nets)",
        (
            "Every other layer of the language model is a gated delta net, in the first of the",
            "cells above that go with it. Context parallelism exchanges heads or passes states,",
            "whichever moves less. None of these is counted above.",
        ),
    ),
}
# Column of the table -> axis, and the values of it that count.
FEATURES: dict[str, tuple[str, tuple[object, ...]]] = {
    "TP": ("tp", (2, 4)),
    "SP": ("sp", (True,)),
    "CP": ("cp", (2, 4)),
    "PP": ("pp", (2, 4)),
    "VPP": ("vpp", (2,)),
    "uneven": ("stages", ("uneven", "embedding-alone")),
    "DP": ("dp", (2, 4)),
    "MoE": ("experts", ("allgather", "alltoall")),
    "EP": ("ep", (2, 4)),
    "overlap": ("reduction", ("overlap", "distributed-overlap")),
    "dist.opt": ("reduction", ("distributed", "distributed-overlap")),
    "select": ("recompute", ("selective",)),
    "full": ("recompute", ("uniform", "block")),
    "project": ("recompute", ("projections",)),
    "modules": ("recompute", LISTED),
    "layers": ("layers", ("no-biases", "shared-experts", "latent")),
    "learned": ("positions", ("learned",)),
    "mRoPE": ("positions", ("mrope",)),
    "packed": ("packing", ("packed",)),
    "spans": ("attention", ("spans",)),
    "tied": ("embeddings", ("tied",)),
    "bf16": ("precision", ("bf16",)),
    "frozen": ("frozen", ("encoders", "language", "all-but-projection", "first-half")),
    "no media": ("media", ("none",)),
}
MEANING = {
    "TP": "tensor parallelism, 2 or 4",
    "SP": "sequence parallelism, on top of TP",
    "CP": "context parallelism, 2 or 4, zigzag",
    "PP": "pipeline parallelism, 2 or 4 stages",
    "VPP": "interleaved schedule, 2 chunks on each stage",
    "uneven": "`--pipeline-model-parallel-layout`; with the embedding alone on the first stage too",
    "DP": "data parallelism, 2 or 4; ranks without images beside ranks with some",
    "MoE": "4 experts in each layer; all-gather and all-to-all dispatchers",
    "EP": "expert parallelism, 2 or 4, experts cut by TP or not",
    "overlap": "reductions (and parameter gathers) overlapped with computation",
    "dist.opt": "distributed optimizer",
    "select": "recomputed core attention",
    "full": "recomputed layers, methods uniform and block",
    "project": "recomputed projections",
    "modules": "recomputed modules, one by one and together",
    "layers": "dense layers without biases, shared experts, multi-latent attention",
    "learned": "learned absolute positions (others: RoPE, multimodal RoPE)",
    "mRoPE": "multimodal RoPE, 3-D positions",
    "packed": "a micro-batch is one row of documents",
    "spans": "tokens of an image see each other in both directions",
    "tied": "input and output embeddings are one",
    "bf16": "bf16 weights, fp32 main weights, fp32 gradients",
    "frozen": "encoders, language model, all but the projection, or the first half of the model",
    "no media": "a global batch without any image or sound",
}


def page(verdicts: Sequence[Verdict], refused: Mapping[str, str]) -> str:
    """The page: verdicts are those of a full run, all of which passed.

    Args:
        verdicts: of ``all_cells`` and of the cells of ``SECTIONS``.
        refused: what is refused, and in which words.
    """
    sections = [line for layers in SECTIONS for line in layers_section(layers, verdicts)]
    verdicts = [one for one in verdicts if one.values["layers"] not in SECTIONS]
    return "\n".join(
        (
            *_opening(verdicts),
            *_feature_table(verdicts),
            *_pair_table(verdicts),
            *_recomputation(verdicts),
            *sections,
            *_refusals(refused),
            *_running(),
            "",
        )
    )


def with_section(page: str, lines: Sequence[str]) -> str:
    """The page with one section written anew, whose title is the first line."""
    before, found, behind = page.partition(f"{lines[0]}\n")
    if not found:
        before, _, behind = page.partition(REFUSED)
        behind = f"\n{REFUSED}{behind}"
    _, _, behind = behind.partition("\n## ")
    return "\n".join([before.rstrip("\n"), "", *lines, f"## {behind}"])


def section_of(page: str, title: str) -> str:
    """What a section of the page says below its title."""
    _, _, text = page.partition(f"{title}\n")
    text, _, _ = text.partition("\n## ")
    return text


def _opening(verdicts: Sequence[Verdict]) -> list[str]:
    def worst(precision: str) -> str:
        errors = [one.error for one in verdicts if one.values["precision"] == precision]
        return f"{max(errors, default=0.0):.1e} in {len(errors)} cells"

    return [
        "# Parallelism: what is supported, and how that is known",
        "",
        '<!-- Generated by `make matrix ARGS="--write-docs docs/parallelism.md"`; do not edit. -->',
        "",
        "What this project claims of parallelism it shows in a matrix that anybody can run on a",
        "laptop. A cell trains a small model of text, images and sounds for three steps under a",
        "parallel layout, with Megatron's own schedules, wrappers and optimizer, and compares the",
        "loss of each step, **every parameter's gradient** of the first step and all weights after",
        "the third with a run on one process: loops over tokens, one sample at a time, AdamW.",
        "",
        passed(verdicts),
        "",
        "| precision | gradients, relative | weights | loss, first norm | later norms | largest "
        "deviation seen |",
        "|---|---|---|---|---|---|",
        *(
            f"| {name} | {bound.gradient:.0e} | {bound.weights:.0e} | {bound.scalar:.0e} | "
            f"{bound.later_norm:.0e} | {worst(name)} |"
            for name, bound in (("fp32", FP32), ("bf16", BF16))
        ),
        "",
        "One process in bf16 rounds elsewhere, hence the tolerance: its norms after two steps move",
        "by up to 7 %, and weights that begin at 0 by 20 %, where a rounding moves each first",
        "(`tests/matrix/test_rounding.py`).",
        "Deviations are norms of differences over the norm of the whole parameter's tensor.",
        "",
    ]


def passed(verdicts: Sequence[Verdict]) -> str:
    """How many passed, when, on what."""
    mean = sum(one.seconds for one in verdicts) / len(verdicts)
    versions = ", ".join(
        f"{name} {importlib.metadata.version(name)}" for name in ("torch", "megatron-core")
    )
    today = datetime.datetime.now(tz=datetime.UTC).date().isoformat()
    return (
        f"**{len(verdicts)} cells passed, 0 failed** on {today}: {versions}, Python "
        f"{platform.python_version()}, CPU and gloo, {os.cpu_count()} cores, 1 to 8 ranks, "
        f"{mean:.1f} s per cell on average."
    )


def layers_section(layers: str, verdicts: Sequence[Verdict]) -> list[str]:
    """One of ``SECTIONS``."""
    title, words = SECTIONS[layers]
    own = [one for one in verdicts if one.values["layers"] == layers]
    lines = [
        *(title, "", *words, "", passed(own), ""),
        "| cell | ranks | seconds | gradients, relative |",
        "|---|---|---|---|",
    ]
    for one in own:
        name = one.name.replace(f"layers:{layers}", "").strip("-") or "one rank"
        lines.append(f"| {name} | {one.ranks} | {one.seconds:.1f} | {one.error:.1e} |")
    return [*lines, ""]


def _feature_table(verdicts: Sequence[Verdict]) -> list[str]:
    lines = [
        "## Features",
        "",
        "| feature | what it is | cells | ranks | seconds per cell | largest fp32 deviation |",
        "|---|---|---|---|---|---|",
    ]
    for name in FEATURES:
        having = [one for one in verdicts if _has(one.values, name)]
        ranks = sorted({one.ranks for one in having})
        exact = [one.error for one in having if one.values["precision"] == "fp32"]
        deviation = f"{max(exact):.1e}" if exact else "see above"
        seconds = sum(one.seconds for one in having) / max(len(having), 1)
        lines.append(
            f"| {name} | {MEANING[name]} | {len(having)} | {', '.join(map(str, ranks))} | "
            f"{seconds:.1f} | {deviation} |"
        )
    return [*lines, ""]


def _pair_table(verdicts: Sequence[Verdict]) -> list[str]:
    names = list(FEATURES)
    lines = [
        "## Pairs of features",
        "",
        "How many cells have both; · where they exclude each other or are one thing.",
        "",
        f"| | {' | '.join(names)} |",
        "|---" * (len(names) + 1) + "|",
    ]
    for row in names:
        counts = [
            sum(_has(one.values, row) and _has(one.values, column) for one in verdicts)
            for column in names
        ]
        shown = [
            str(count) if count and row != column else "·"
            for column, count in zip(names, counts, strict=True)
        ]
        lines.append(f"| **{row}** | {' | '.join(shown)} |")
    return [*lines, ""]


def _recomputation(verdicts: Sequence[Verdict]) -> list[str]:
    lines = [
        "## Recomputed modules",
        "",
        "`--recompute-granularity selective --recompute-modules ...`; what is not here is refused.",
        "",
        "| modules | cells |",
        "|---|---|",
    ]
    for name, modules in RECOMPUTED.items():
        cells = [one for one in verdicts if one.values["recompute"] == name]
        shown = ", ".join(f"`{one.name}`" for one in cells) if name in LISTED else len(cells)
        lines.append(f"| {' '.join(modules)} | {shown} |")
    return [*lines, ""]


def _refusals(refused: Mapping[str, str]) -> list[str]:
    lines = [
        REFUSED,
        "",
        "What cannot work is refused before any work is done, on every rank, in these words.",
        "",
    ]
    for what, message in refused.items():
        flags = f" (`{' '.join(FLAGS[what])}` on 8 processes)" if what in FLAGS else ""
        lines += [f"- **{what}**{flags}", f"  > {message}"]
    return [*lines, ""]


def _running() -> list[str]:
    return [
        "## Running it",
        "",
        "```",
        "make matrix                       # all cells; exits with 1 where one fails",
        'make matrix ARGS="tp2 cp2 packed" # cells that have all of these in their names',
        'make matrix ARGS="--list"         # the names',
        'make matrix ARGS="--max-ranks 2"  # small ones only',
        'make matrix ARGS="--deepstack"    # those with levels of rows; --write-docs: their table',
        'make matrix ARGS="--linear"       # those with linear layers; likewise',
        'make matrix ARGS="--grids"        # modules on grids of their own; likewise',
        "make test                         # with a subset in which every value stands",
        "make test-all                     # with one in which every pair of values meets",
        "```",
        "",
        "The cells are drawn from all valid combinations of the axes in `tests/matrix/cells.py`,",
        "the same on every machine: first so that every valid pair of values meets (sizes 1 and",
        "2), then for as many new triples per rank as possible.",
        "",
        "Not compared here: dropout, which draws elsewhere under another layout. In bf16 every",
        "expert is chosen, because rounding would otherwise decide which ones are. Auxiliary",
        "losses of experts with and without padding, several encoders of one modality, and",
        "documents of unequal lengths have tests of their own in `tests/distributed/core`.",
    ]


def _has(values: Values, feature: str) -> bool:
    axis, counted = FEATURES[feature]
    return values[axis] in counted
