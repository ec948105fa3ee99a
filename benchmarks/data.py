"""How fast samples are read, how soon a run begins, how full sequences and how equal ranks are.

    python benchmarks/data.py             # a table
    python benchmarks/data.py --json      # one JSON object

Reading is compared with the loop that one would write by hand: for each sample Pillow opens the
image and the Hugging Face processor of LLaVA 1.5 (336 pixels) makes tensors, which torch joins.
Both read the same JPEG files of 640 x 480, on one thread per process; figures per core are of
processor time, and those of several processes need as many idle cores. Packing and balance are
computed on the distributions of ``data_lengths.py``.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.data_lengths import DISTRIBUTIONS, Distribution
from megatron.mimo.data.bad_samples import BadSampleLog, BadSamplePolicy
from megatron.mimo.data.global_batches.balance import CostModel, busiest_over_mean, divide
from megatron.mimo.data.global_batches.best_fit import fill_sequence, packing_efficiency
from megatron.mimo.data.global_batches.forming import GlobalBatches, Item, Measures
from megatron.mimo.data.global_batches.measures import Unmeasured
from megatron.mimo.data.global_batches.planned_batches import PlannedBatches, SampleSources
from megatron.mimo.data.measure import Measure
from megatron.mimo.data.reading.sample_measurer import SampleMeasurer
from megatron.mimo.data.reading.sample_reader import SampleReader
from megatron.mimo.data.sources import Mixture, MixtureSpec, SourceSpec
from megatron.mimo.models.common.family import sample_collator

MICRO_BATCH = 4
SIDE = 336
GOALS = {
    "of_by_hand_per_core": "at least 0.9",
    "two_workers_over_one": "at least 1.7, with two idle cores",
    "two_workers_over_one_on_idle_cores": "at least 1.7",
    "first_batch_seconds": "at most 5",
    "efficiency": "at least 0.95",
    "busiest_over_mean": "at most 1.05",
    "busiest_over_mean_unpacked": "at most 1.05",
}


def llava_chat(side: int = SIDE) -> Any:
    """LLaVA's processor at its real resolution, with a tokenizer of few words."""
    from megatron.mimo.data.chat.chat import Chat
    from megatron.mimo.models import load_family
    from megatron.mimo.recipes.tiny.processors import llava_processor

    family = load_family("llava")
    config = family.tiny()
    config.vision_config.image_size, config.vision_config.patch_size = side, 14
    config.image_seq_length = (side // 14) ** 2
    return Chat(family=family, config=config, processor=llava_processor(config))


def write_images(folder: Path, count: int) -> list[Path]:
    """JPEG files whose content compresses about as photographs do."""
    from PIL import Image

    generator, paths = np.random.default_rng(0), []
    for number in range(count):
        coarse = generator.integers(0, 256, (30, 40, 3), dtype=np.uint8)
        image = Image.fromarray(coarse).resize((640, 480), Image.Resampling.BICUBIC)
        noisy = np.asarray(image).astype(np.int16) + generator.normal(0, 6, (480, 640, 3))
        paths.append(folder / f"{number}.jpg")
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(paths[-1], quality=90)
    return paths


def write_records(path: Path, images: list[Path], count: int) -> None:
    """Conversations about one image each."""
    with path.open("w") as file:
        for number in range(count):
            asked = [
                {"type": "image", "path": images[number % len(images)].name},
                {"type": "text", "text": "What digits?"},
            ]
            turns = [
                {"role": "user", "content": asked},
                {"role": "assistant", "content": "1 2 3"},
            ]
            file.write(json.dumps({"messages": turns}) + "\n")


def sources_of(path: Path, chat: Any, seq_length: int, limit: float | None = None) -> SampleSources:
    """The file as training reads it, with a time limit for a sample or without."""
    spec = MixtureSpec(sources=[SourceSpec(name="data", paths=[str(path)])])
    policy = BadSamplePolicy(sample_timeout=limit)
    reader = SampleReader(chat=chat, seq_length=seq_length, policy=policy)
    mixture = Mixture(spec, index_folder=path.parent / "index", seed=1, buffer=1000)
    return SampleSources(mixture=mixture, read=reader, measure=SampleMeasurer(reader=reader))


def batches_of(
    sources: SampleSources, chat: Any, seq_length: int, workers: int, *, measured: bool = False
) -> Iterator[Any]:
    """Micro-batches as a rank of one reads them, ``workers`` processes ahead.

    Samples are measured where there are several ranks, packing, or samples that are left out.
    """
    from megatron.mimo.training.plans import DataPosition, RankPlan, measures_of
    from megatron.mimo.training.workers import read_batches

    collate = sample_collator(
        chat.family, chat.config, seq_length=seq_length, vocab_size=len(chat.processor.tokenizer)
    )
    args = Namespace(consumed_train_samples=0)
    measures: Measures = Unmeasured()
    if measured:
        measures = measures_of(sources.measured, workers=workers, group=None, late=[])

    def cost(item: Item) -> float:
        return float(sum(one.measure.length for one in item if one.measure is not None))

    plan = RankPlan(
        GlobalBatches(sources.mixture, measures),
        size_at=lambda _: 4 * MICRO_BATCH,
        start=0,
        dp_rank=0,
        dp_size=1,
        micro_batch=MICRO_BATCH,
        cost=cost,
        log=BadSampleLog(sources.policy),
        position=DataPosition(args),
    )
    return read_batches(PlannedBatches(sources, collate), plan, workers)


def by_hand(path: Path, chat: Any, seq_length: int) -> Iterator[dict[str, Any]]:
    """The plain loop: Pillow and the processor, micro-batch by micro-batch."""
    from PIL import Image

    processor = chat.processor
    with path.open() as file:
        lines = [json.loads(line) for line in file]
    for first in range(0, len(lines) - MICRO_BATCH + 1, MICRO_BATCH):
        samples = []
        for record in lines[first : first + MICRO_BATCH]:
            name = record["messages"][0]["content"][0]["path"]
            samples.append(
                processor(
                    text=processor.apply_chat_template(record["messages"]),
                    images=Image.open(path.parent / name).convert("RGB"),
                    return_tensors="pt", padding="max_length", max_length=seq_length,
                )
            )  # fmt: skip
        yield {key: torch.cat([one[key] for one in samples]) for key in samples[0]}


def rates(batches: Iterator[Any], count: int, warm_up: int) -> tuple[float, float]:
    """Samples per second, and per second of processor time, once the first micro-batches are there.

    Processor time is that of this process and of all that it has started: on a machine that others
    use, too, it says what the wall clock would on an idle one.
    """
    for _ in islice(batches, warm_up):
        pass
    start, used = time.perf_counter(), processor_seconds()
    read = sum(1 for _ in islice(batches, count)) * MICRO_BATCH
    seconds, used = time.perf_counter() - start, processor_seconds() - used
    return read / seconds, read / used


def processor_seconds() -> float:
    """Of this process and of those that it has started and that are running."""
    import psutil

    me = psutil.Process()
    times = [one.cpu_times() for one in (me, *me.children(recursive=True))]
    return sum(one.user + one.system for one in times)


def measure_reading(folder: Path, args: Namespace) -> dict[str, Any]:
    """Samples per second of both, and of 1 and 2 worker processes; memory of a worker."""
    import psutil

    torch.set_num_threads(1)
    chat, seq_length = llava_chat(args.side), (args.side // 14) ** 2 + 128
    path = folder / "records.jsonl"
    write_records(path, write_images(folder, args.images), args.samples * 40)
    count = args.samples // MICRO_BATCH

    def ours(
        workers: int, limit: float | None = None, *, measured: bool = False
    ) -> tuple[float, float]:
        sources = sources_of(path, chat, seq_length, limit)
        batches = batches_of(sources, chat, seq_length, workers, measured=measured)
        return rates(batches, count, warm_up=2 + 4 * workers)

    runs: dict[str, Callable[[], tuple[float, float]]] = {
        "by_hand": lambda: rates(by_hand(path, chat, seq_length), count, warm_up=2),
        "ours": lambda: ours(0),
        "measured": lambda: ours(0, measured=True),
        "with_time_limit": lambda: ours(0, 300.0),
        "one_worker": lambda: ours(1),
        "two_workers": lambda: ours(2),
    }
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for _ in range(args.repeats):
        for name, run in runs.items():
            found[name].append(run())
    wall, own = (
        {name: statistics.median(one[kind] for one in values) for name, values in found.items()}
        for kind in (0, 1)
    )
    batches = batches_of(sources_of(path, chat, seq_length), chat, seq_length, 1)
    next(batches)
    children = psutil.Process().children(recursive=True)
    memory = [child.memory_full_info().uss / 2**20 for child in children if child.is_running()]
    return {
        "samples_per_second": {name: round(value, 1) for name, value in wall.items()},
        "samples_per_processor_second": {name: round(value, 1) for name, value in own.items()},
        "of_by_hand_per_core": round(own["ours"] / own["by_hand"], 3),
        "of_by_hand_per_core_measured": round(own["measured"] / own["by_hand"], 3),
        "of_by_hand_per_core_with_time_limit": round(own["with_time_limit"] / own["by_hand"], 3),
        "two_workers_over_one": round(wall["two_workers"] / wall["one_worker"], 3),
        "two_workers_over_one_on_idle_cores": round(2 * own["two_workers"] / own["one_worker"], 3),
        "worker_own_mib": round(max(memory), 1),
    }


def measure_start(folder: Path, args: Namespace) -> dict[str, Any]:
    """Seconds to index a long file, and from then on to the first micro-batch of a fresh start."""
    chat, seq_length = llava_chat(args.side), (args.side // 14) ** 2 + 128
    images = write_images(folder, 1)
    path = folder / "long.jsonl"
    write_records(path, images, args.lines)
    start = time.perf_counter()
    sources_of(path, chat, seq_length)
    indexed = time.perf_counter()
    next(batches_of(sources_of(path, chat, seq_length), chat, seq_length, 1))
    return {
        "lines": args.lines,
        "index_seconds": round(indexed - start, 2),
        "first_batch_seconds": round(time.perf_counter() - indexed, 2),
    }


def measure_packing(distribution: Distribution, args: Namespace) -> dict[str, Any]:
    """How full sequences of four times the longest sample are, and how equal ranks' work is."""
    generator = random.Random(0)
    capacity = 4 * distribution.longest
    waiting = [distribution.draw(generator) for _ in range(args.look_ahead)]
    items: list[list[Measure]] = []
    while len(items) < args.batches * args.global_batch:
        taken = fill_sequence([one.length for one in waiting], capacity)
        items.append([waiting[number] for number in taken])
        gone = set(taken)
        waiting = [one for number, one in enumerate(waiting) if number not in gone]
        waiting += [distribution.draw(generator) for _ in taken]
    single = [[distribution.draw(generator)] for _ in items]
    lengths = [[one.length for one in item] for item in items]
    return {
        "longest": distribution.longest,
        "efficiency": round(packing_efficiency(lengths, capacity), 4),
        "efficiency_at_most": at_most(lengths, capacity),
        "busiest_over_mean": busiest(items, capacity, args, packed=True),
        "busiest_over_mean_unpacked": busiest(single, distribution.longest, args, packed=False),
        "in_order": busiest(single, distribution.longest, args, packed=False, balanced=False),
    }


def at_most(sequences: list[list[int]], capacity: int) -> float:
    """What no packing exceeds: as many samples of the mean length as fit of the shortest."""
    lengths = [*chain(*sequences)]
    return round(min(1.0, capacity // min(lengths) * statistics.mean(lengths) / capacity), 4)


def busiest(
    items: list[list[Measure]], places: int, args: Namespace, *, packed: bool, balanced: bool = True
) -> float:
    """The largest ratio of the busiest rank's work to the mean, over the global batches."""
    # Qwen2.5-VL 3B, all of it trained: operations of the language model for a place and a pair of
    # tokens, and of the encoder for a row, which is four patches, and a pair of rows
    costs = CostModel(per_token=1.9e10, per_pair=8.8e5, encoders={"images": (1.5e10, 1.0e6)})
    ratios = []
    for first in range(0, len(items) - args.global_batch + 1, args.global_batch):
        batch = items[first : first + args.global_batch]
        work = [costs.of(item, places, packed=packed) for item in batch]
        if balanced:
            shares = [[*chain(*share)] for share in divide(work, args.ranks, 1)]
        else:
            shares = [list(range(rank, len(batch), args.ranks)) for rank in range(args.ranks)]
        ratios.append(busiest_over_mean(work, shares))
    return round(max(ratios), 4)


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--samples", type=int, default=160, help="that are timed in each run")
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--side", type=int, default=SIDE, help="of an image, a multiple of 14")
    parser.add_argument("--repeats", type=int, default=5, help="rounds; medians are shown")
    parser.add_argument("--lines", type=int, default=1_000_000)
    parser.add_argument("--look-ahead", type=int, default=256)
    parser.add_argument("--global-batch", type=int, default=128)
    parser.add_argument("--batches", type=int, default=8)
    parser.add_argument("--ranks", type=int, default=8, help="data-parallel ranks")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        result: dict[str, Any] = {
            **measure_reading(Path(name), args),
            **measure_start(Path(name), args),
        }
    result["packing"] = {name: measure_packing(one, args) for name, one in DISTRIBUTIONS.items()}
    if args.json:
        print(json.dumps({**result, "goals": GOALS}))
        return
    print_figures(result)


def print_figures(figures: dict[str, Any], above: str = "") -> None:
    """A line for each, with its goal where there is one."""
    for name, value in figures.items():
        if isinstance(value, dict):
            print_figures(value, f"{above}{name} ")
            continue
        goal = f"({GOALS[name]})" if name in GOALS else ""
        print(f"{above + name:56} {value!s:10} {goal}".rstrip())


if __name__ == "__main__":
    main()
