"""Conversion against plain safetensors: rate and memory.

    python benchmarks/convert.py --json
    python benchmarks/convert.py --gigabytes 4 --folder /a/fast/disk

A LLaVA-like model with random bf16 weights is written as a Hugging Face directory of several
files. "plain" reads every file with ``safetensors.torch.load_file`` and writes it with
``save_file``, file by file, and brings it to the disk as the conversion does. Each of plain, import
and export runs in a process of its own, ``--repeats`` times in turn; rates are medians. Memory is
the process's largest resident size beyond what it had before the first byte of a weight was read.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

SHARDS = 5  # files of the directory


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=1.5)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where to write; default: a temporary one")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="mimo-convert-", dir=given.folder) as name:
        result = measure(Path(name), given.gigabytes, given.repeats)
    if given.json:
        print(json.dumps(result))
        return
    for title in ("plain", "import", "export"):
        one = result[title]
        ratio = f"{one['ratio']:.2f} of plain, " if title != "plain" else ""
        print(f"{title:<7} {one['gb_per_s']:.2f} GB/s, {ratio}{one['memory_mb']:.0f} MB beyond")
    print(f"{result['gigabytes']} GB; largest file {result['largest_file_mb']:.0f} MB")


def measure(folder: Path, gigabytes: float, repeats: int) -> dict[str, Any]:
    """All figures."""
    made = folder / "hf"
    _in_process(_make, made, gigabytes)
    files = [path.stat().st_size for path in made.glob("*.safetensors")]
    runs: dict[str, list[tuple[float, float]]] = {"plain": [], "import": [], "export": []}
    for _ in range(repeats):
        for title, work, source in (
            ("plain", _plain, made),
            ("import", _import, made),
            ("export", _export, folder / "import"),
        ):
            shutil.rmtree(folder / title, ignore_errors=True)
            runs[title].append(_in_process(work, source, folder / title))
    result: dict[str, Any] = {
        "gigabytes": round(sum(files) / 1e9, 2),
        "largest_file_mb": round(max(files) / 1e6, 1),
        "repeats": repeats,
        "cpus": os.cpu_count(),
    }
    seconds = {
        title: statistics.median(one[0] for one in several) for title, several in runs.items()
    }
    for title, several in runs.items():
        result[title] = {
            "seconds": round(seconds[title], 3),
            "gb_per_s": round(sum(files) / 1e9 / seconds[title], 3),
            "ratio": round(seconds["plain"] / seconds[title], 3),
            "memory_mb": round(max(one[1] for one in several), 1),
        }
    return result


def _make(folder: Path, gigabytes: float) -> None:
    """A LLaVA of about the size, made one file at a time by the project's own writer."""
    import torch
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

    from megatron.mimo.convert.weights import INDEX_FILE, WeightsFile, make_header
    from megatron.mimo.models import load_family

    width, layer_gigabytes = 2048, 0.1
    layers = max(2, round((gigabytes - 0.3) / layer_gigabytes))
    text = LlamaConfig(
        hidden_size=width,
        intermediate_size=5504,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=16,
        vocab_size=32064,
    )
    config = LlavaConfig(
        text_config=text, vision_config=CLIPVisionConfig(), image_token_index=32000
    )
    config.architectures = ["LlavaForConditionalGeneration"]
    family = load_family("llava")
    with torch.device("meta"):
        described = family.reference(config).state_dict()
    table = family.keys(config)
    names = {table.canonical(name): tensor.shape for name, tensor in described.items()}
    folder.mkdir()
    config.save_pretrained(folder)
    shards: list[list[str]] = [[] for _ in range(SHARDS)]
    for number, name in enumerate(names):
        shards[number * SHARDS // len(names)].append(name)
    mapped = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{SHARDS:05d}.safetensors"
        kinds = [(name, torch.bfloat16, tuple(names[name])) for name in shard]
        writer = WeightsFile(folder / file, make_header(kinds))
        for name in shard:
            writer.write(name, torch.randn(names[name], dtype=torch.bfloat16))
            mapped[name] = file
        writer.close()
    (folder / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": mapped}))


def _plain(source: Path, target: Path) -> tuple[float, float]:
    import torch  # noqa: F401 - safetensors.torch would import it within the measured time
    from safetensors.torch import load_file, save_file

    def work() -> None:
        target.mkdir()
        for path in sorted(source.glob("*.safetensors")):
            save_file(load_file(path), target / path.name, metadata={"format": "pt"})
            with (target / path.name).open("rb+") as file:
                os.fsync(file.fileno())

    return _timed(work)


def _import(source: Path, target: Path) -> tuple[float, float]:
    from megatron.mimo.arguments.standalone import process_groups
    from megatron.mimo.convert import importing

    with process_groups():  # what every command needs before a byte is read
        _warm_up(source)
        return _timed(lambda: importing.import_model(source, target, shown=False))


def _export(source: Path, target: Path) -> tuple[float, float]:
    from megatron.mimo.arguments.standalone import process_groups
    from megatron.mimo.convert import exporting

    with process_groups():
        _warm_up(source / "hf")
        return _timed(lambda: exporting.export_model(source, target, shown=False))


def _warm_up(folder: Path) -> None:
    """Import what the conversion imports: the rate is that of bytes."""
    from megatron.mimo.convert.importing import meta_model
    from megatron.mimo.models import family_of, read_hf_config

    config = read_hf_config(folder)
    with meta_model(family_of(config), config):
        pass


def _timed(work: Callable[[], Any]) -> tuple[float, float]:
    """Seconds, and megabytes beyond those at the start."""
    before = _resident()
    peak, ended = before, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not ended.wait(0.005):
            peak = max(peak, _resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    began = time.perf_counter()
    work()
    seconds = time.perf_counter() - began
    ended.set()
    watcher.join()
    return seconds, (peak - before) / 1e6


def _resident() -> int:
    """Bytes of this process in memory; pages of mapped files count."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def _in_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """The result of a function in a new process."""
    with multiprocessing.get_context("spawn").Pool(1, initializer=_silence) as pool:
        return pool.apply(function, arguments)


def _silence() -> None:
    import logging
    import warnings

    warnings.simplefilter("ignore")
    logging.disable(logging.ERROR)
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - for the life of the process


if __name__ == "__main__":
    main()
