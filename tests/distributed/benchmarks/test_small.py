"""The benchmarks that have a GPU's sizes run on a CPU with small ones."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import torch

from tests.rank_pool import RankPool, model_parallel


def merge_small() -> dict[str, Any]:
    from benchmarks.alignment import AUDIO, IMAGE, compare, make_case

    model_parallel()
    sizes = {"batch": 2, "sequence": 64, "hidden": 16, "vocabulary": 32768, "repeats": 1}
    args = Namespace(device="cpu", dtype=torch.float32, **sizes)
    return compare(make_case({"images": (IMAGE, 2, 9), "audio": (AUDIO, 1, 9)}, args), args)


def test_merging(ranks: RankPool) -> None:
    (report,) = ranks(1)(merge_small)
    assert report["host_syncs_forward"] == report["host_syncs_backward"] == 0
    assert report["stock_host_syncs_forward"] > 0
    assert report["forward_speedup"] > 0
    assert report["modality_share"] == 27 / 64


def step_small() -> dict[str, Any]:
    from benchmarks import llava

    small = {
        "vision": (32, 64, 2, 2, 28, 14),
        "text": (32, 64, 1, 2, 1, 200),
        "lengths": (8, 20),
        "dtype": torch.float32,
    }
    llava.SIZES["small"] = small
    report = llava.measure_ours("small", 1, {"transformer_impl": "local"}, beside=True)
    llava.compare(report, report)
    return report


def test_a_step_of_llava(ranks: RankPool) -> None:
    (report,) = ranks(1)(step_small)
    assert report["same_loss"] < 1e-5
    assert (report["tokens"], report["padded_tokens"]) == (36, 48)
    assert all(report[name]["step_ms"] > 0 for name in ("transformers", "padded", "packed"))
    assert report["layers"] == "local"


def test_real_flops_of_one_layer() -> None:
    from benchmarks.llava_model import SIZES, configuration, real_flops

    SIZES["small"] = {"vision": (32, 64, 2, 2, 28, 14), "text": (32, 64, 1, 2, 1, 200)}
    try:
        config = configuration("small")
    finally:
        del SIZES["small"]
    # twice for a product and a sum, three times for forward and backward: 6 for every weight
    text = 6 * 10 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * 64 + 32 * 200)
    causal = 6 * 10 * 10 * 32
    vision = 6 * 5 * (4 * 32 * 32 + 2 * 32 * 64) + 12 * 5 * 5 * 32  # one of two layers is used
    projector = 6 * 4 * (32 * 32 + 32 * 32)
    assert real_flops(config, [10]) == text + causal + vision + projector


def hash_small(folder: Path) -> dict[str, Any]:
    from benchmarks.checkpoint_hashes import measure

    return measure(folder, 0.001, 1, cold=True)


def test_hashes_of_a_checkpoint(ranks: RankPool, tmp_path: Path) -> None:
    (report,) = ranks(1)(hash_small, tmp_path)
    assert report["gb_per_s"].keys() == {"crc32", "sha256", "blake2b"}
    assert min(report["gb_per_s"].values()) > 0
    assert report["percent_of_save"] > 0
    assert report["percent_of_load"] > 0
    assert not list(tmp_path.iterdir())
