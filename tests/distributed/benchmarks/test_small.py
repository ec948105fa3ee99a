"""The benchmarks that have a GPU's sizes run on a CPU with small ones."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.rank_pool import RankPool, model_parallel


def merge_small() -> dict[str, Any]:
    from benchmarks.alignment import AUDIO, IMAGE, compare, make_case

    model_parallel()
    sizes = {"batch": 2, "sequence": 64, "hidden": 16, "vocabulary": 32768, "repeats": 1}
    args = Namespace(device="cpu", dtype=torch.float32, row_kernels="torch", **sizes)
    return compare(make_case({"images": (IMAGE, 2, 9), "audio": (AUDIO, 1, 9)}, args), args)


def test_merging(ranks: RankPool) -> None:
    (report,) = ranks(1)(merge_small)
    assert report["host_syncs_forward"] == report["host_syncs_backward"] == 0
    assert report["stock_host_syncs_forward"] > 0
    assert report["forward_speedup"] > 0
    assert report["modality_share"] == 27 / 64


def step_small(family: str) -> dict[str, Any]:
    from dataclasses import replace

    from benchmarks import llava
    from benchmarks.step_cases import CASES

    case = CASES[family]
    case = replace(case, sizes={"tiny": replace(case.sizes["tiny"], lengths=(8, 20))})
    report = llava.measure_ours(
        case, "tiny", llava.Repeats(1, 1), {"transformer_impl": "local"}, beside=True
    )
    llava.compare(report, report)
    return report


@pytest.mark.parametrize(
    ("family", "tokens"), [("llava", (16 + 8, 16 + 20)), ("qwen3_vl", (4 + 8, 12 + 20))]
)
def test_a_step(ranks: RankPool, family: str, tokens: tuple[int, int]) -> None:
    (report,) = ranks(1)(step_small, family)
    assert report["same_loss"] < 1e-5
    assert (report["tokens"], report["padded_tokens"]) == (sum(tokens), 2 * max(tokens))
    assert all(report[name]["step_ms"] > 0 for name in ("transformers", "padded", "packed"))
    assert report["layers"] == "local"


def test_real_flops_of_llava() -> None:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

    from benchmarks.step_cases import CASES
    from benchmarks.step_sides import real_flops

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**sizes, num_hidden_layers=2, image_size=28, patch_size=14),
        text_config=LlamaConfig(
            **sizes, num_hidden_layers=1, num_key_value_heads=1, vocab_size=200
        ),
    )
    # twice for a product and a sum, three times for forward and backward: 6 for every weight
    text = 6 * 10 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * 64 + 32 * 200)
    causal = 6 * 10 * 10 * 32
    vision = 6 * 5 * (4 * 32 * 32 + 2 * 32 * 64) + 12 * 5 * 5 * 32  # one of two layers is used
    projector = 6 * 4 * (32 * 32 + 32 * 32)
    given = [{"input_ids": torch.zeros(1, 10)}]
    assert real_flops(CASES["llava"], config, given) == text + causal + vision + projector


def test_real_flops_of_qwen3_vl() -> None:
    from benchmarks.step_cases import CASES
    from benchmarks.step_sides import real_flops

    case = CASES["qwen3_vl"]
    config = case.configuration("tiny")
    (given,) = case.conversations(config, [6])  # 16 patches, 4 rows, 10 tokens
    text = 6 * 10 * (4 * (256 * (2 * 256 + 2 * 128) + 3 * 256 * 704) + 256 * 2000)
    causal = 6 * 4 * 256 * 10 * 10
    vision = 6 * 16 * (4 * (4 * 128 * 128 + 2 * 128 * 512) + 128 * 3 * 2 * 8 * 8)
    frames = 12 * 4 * 128 * 16 * 16
    mergers = 6 * 4 * 4 * (512 * 512 + 512 * 256)
    assert real_flops(case, config, [given]) == text + causal + vision + frames + mergers


def hash_small(folder: Path) -> dict[str, Any]:
    from benchmarks.checkpoint_hashes import measure

    return measure(folder, 0.001, 1, cold=True)


@pytest.mark.wide
def test_hashes_of_a_checkpoint(ranks: RankPool, tmp_path: Path) -> None:
    (report,) = ranks(1)(hash_small, tmp_path)
    assert report["gb_per_s"].keys() == {"crc32", "sha256", "blake2b"}
    assert min(report["gb_per_s"].values()) > 0
    assert report["percent_of_save"] > 0
    assert report["percent_of_load"] > 0
    assert not list(tmp_path.iterdir())
