"""The command: big recipes without weights, what does not fit and what would, refusals."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.distributed.planner.test_measured import HERE
from tests.rank_pool import RankExit, RankPool
from tests.time_limits import HANG

BIG = (
    *("--recipe", "qwen3_vl_30b_a3b", "--world-size", "32", "--use-distributed-optimizer"),
    *("--tensor-model-parallel-size", "2", "--sequence-parallel"),
    *("--pipeline-model-parallel-size", "4", "--expert-model-parallel-size", "4"),
)
ONE = ("--recipe", "qwen3_vl_4b", "--card", "h100")


def planned(ranks: RankPool, *flags: str) -> RankExit:
    argv = [HERE / "plan_script.py", *flags]
    (exit_,) = ranks.start_script(1, argv, timeout=HANG).wait()
    return exit_


@pytest.mark.wide
def test_a_big_recipe_in_a_layout(ranks: RankPool) -> None:
    flags = ("--pack", "--samples", "512+2*640x480", "1024", "--card", "h100", "--json")
    exit_ = planned(ranks, *BIG, *flags)
    assert exit_.exit_code == 0, exit_.stdout + exit_.stderr
    found: dict[str, Any] = json.loads(exit_.stdout)
    parameters = found["parameters"]
    assert sum(part["total"] for part in parameters.values()) == pytest.approx(31.07e9, rel=1e-3)
    assert parameters["images.encoders"]["trained"] == 0
    # 300 rows of a 640x480 image: 20 x 15 squares of 32 pixels; 1112 + 1024 + 1112 tokens a row.
    assert found["tokens_per_step"] == 128 * 3248
    # What 3.3 billion active parameters need, and attention.
    assert found["flops_per_step"] == pytest.approx(6 * 3.3e9 * found["tokens_per_step"], rel=0.15)
    first, *_, last = found["memory"]
    assert [rank["micro_batches_under_way"] for rank in found["memory"]] == [4, 3, 2, 1]
    assert first["activations"] > 3 * last["activations"]
    assert found["memory_all_recomputed"][0] < first["all"]
    rate = found["card"]["tflops"] * 1e12 * found["achieved_share"] * 32
    seconds = found["flops_per_step"] / rate * (1 + 3 / 32)
    assert found["seconds_per_step"] == pytest.approx(seconds)


def test_what_does_not_fit_and_what_would(ranks: RankPool) -> None:
    exit_ = planned(ranks, *ONE)
    assert exit_.exit_code == 1, exit_.stdout + exit_.stderr
    *_, verdict, first, second = exit_.stdout.splitlines()
    assert "of a card with 80 GB" in verdict
    assert "the largest part: optimizer state, 49.6 GB" in verdict
    assert first.startswith("  --stage lora: ")
    assert first.endswith(" GB, fits")
    assert second.startswith("  --tensor-model-parallel-size 2 on 2 ranks: ")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--card", "h999"), "--card h999 is not in the table; it has A100"),
        (("--samples", "12x"), "--samples 12x: expected TOKENS"),
        (("--samples", "9000"), "more than --seq-length"),
        (("--tensor-model-parallel-size", "3"), "tensor-parallel size 3"),
        (("--component", "language=tp=1", "audio=tp=1"), "--component is given for ['audio'"),
        (
            ("--component", "language=tp=1,rank_offset=2", "images=dp=1,pp=2"),
            "plan images with pp=1",
        ),
        (("--no-such-flag",), "unknown flag --no-such-flag"),
    ],
)
def test_refused(ranks: RankPool, flags: tuple[str, ...], message: str) -> None:
    exit_ = planned(ranks, "--recipe", "llava_1_5_7b", *flags)
    assert exit_.exit_code == 2
    assert message in exit_.stderr


def test_layouts_of_their_own_and_context_parallelism(ranks: RankPool) -> None:
    """Encoders on all ranks take less of each; half a sequence keeps half."""
    small = ("--recipe", "llava_1_5_7b", "--world-size", "8", "--json")
    uniform = json.loads(planned(ranks, *small, "--tensor-model-parallel-size", "4").stdout)
    flags = ("--component", "images=dp=8", "language=tp=4,dp=2")
    apart = json.loads(planned(ranks, *small, *flags).stdout)
    assert apart["flops_per_step"] == uniform["flops_per_step"]
    assert apart["memory"][0]["weights"] > uniform["memory"][0]["weights"]
    half = json.loads(planned(ranks, *small, *_CUT).stdout)
    assert half["memory"][0]["activations"] == pytest.approx(
        uniform["memory"][0]["activations"] / 2, rel=0.02
    )


def test_modules_on_ranks_of_their_own(ranks: RankPool) -> None:
    """Each rank holds its module alone, and together they hold what one rank holds."""
    small = ("--recipe", "digits", "--json", "--card", "h100")
    (whole,) = json.loads(planned(ranks, *small, "--world-size", "1").stdout)["memory"]
    flags = ("--component", "images=dp=1,rank_offset=1", "language=dp=1")
    plan = json.loads(planned(ranks, *small, "--world-size", "2", *flags).stdout)
    language, images = plan["memory"]
    assert (language["ranks"], images["ranks"]) == ("language", "images")
    for name in ("weights", "gradients", "optimizer"):
        assert language[name] + images[name] == whole[name]
    assert min(language["activations"], images["activations"]) > 0
    assert plan["seconds_per_step"] is None  # they wait for each other


_CUT = ("--tensor-model-parallel-size", "4", "--context-parallel-size", "2")
