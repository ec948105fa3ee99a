"""The recipe's parts together: model, collation, metric, final test and report."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron.mimo.backend import Capabilities
from megatron.mimo.data import Sample, decode_image


def arguments(**changes: Any) -> Namespace:
    """The recipe's arguments as a CPU run without flags has them."""
    from megatron.mimo.arguments.command_line import parse_arguments
    from megatron.mimo.backend import capabilities
    from megatron.mimo.recipes.digits import digits

    parsed = parse_arguments(digits(), machine=capabilities(), config={}, argv=["--no-output"])
    vars(parsed).update({"padded_vocab_size": 40} | changes)
    return parsed


def build(args: Namespace) -> tuple[Any, Any, Any]:
    from megatron.core.models.mimo import MimoModel
    from megatron.mimo.models.common.place import Place, Places
    from megatron.mimo.recipes.digits import digits
    from tests.rank_pool import model_parallel

    groups = model_parallel()
    place = Place(groups=groups)
    recipe = digits()
    datasets = recipe.build_datasets(args, (64, 64, 0))
    return (
        MimoModel(recipe.build_model(args, Places(language=place))),
        datasets,
        recipe.build_collator(args),
    )


def gradients() -> dict[str, Any]:
    model, datasets, collate = build(arguments())
    batch = collate([datasets.train[index] for index in range(16)])
    losses_BS, mask_BS = model(**batch)
    ((losses_BS * mask_BS).sum() / mask_BS.sum()).backward()
    return {
        "loss": float((losses_BS * mask_BS).sum() / mask_BS.sum()),
        "without gradient": [
            name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()
        ],
        "parameters": sum(p.numel() for p in model.parameters()),
        "test dataset": datasets.test,
    }


def test_every_parameter_learns_from_one_batch(ranks: Any) -> None:
    [result] = ranks(1)(gradients)
    assert result["without gradient"] == []
    assert 2 < result["loss"] < 8  # near log(33) = 3.5, as nothing is known yet
    assert result["parameters"] < 1_000_000
    assert result["test dataset"] is None


def memorise(steps: int) -> tuple[float, float]:
    """Loss on one batch before and after ``steps`` of plain Adam on it."""
    model, datasets, collate = build(arguments())
    batch = collate([datasets.train[index] for index in range(16)])
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(steps):
        losses_BS, mask_BS = model(**batch)
        loss = (losses_BS * mask_BS).sum() / mask_BS.sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses[0], losses[-1]


@pytest.mark.slow
def test_the_model_can_memorise_a_batch(ranks: Any) -> None:
    [(before, after)] = ranks(1)(memorise, 25)
    assert after < 0.4 * before


def metric_and_loop() -> tuple[list[int], list[int]]:
    from megatron.mimo.data.digits import scanned as data
    from megatron.mimo.recipes.digits import task_metric

    _, datasets, collate = build(arguments())
    samples = [datasets.valid[index] for index in range(64)]
    batch = collate(samples)
    logits_BSV = torch.randn(64, 32, 40, generator=torch.Generator().manual_seed(0))
    for row in range(0, 64, 2):  # every second sample is answered right
        for at in range(31):
            logits_BSV[row, at, batch["input_ids"][row, at + 1]] = 9
    right = count = 0
    for row, sample in enumerate(samples):
        for at in range(1, len(sample.token_ids)):
            token = int(sample.token_ids[at])
            if sample.media and sample.is_label[at] and token != data.END:
                right += int(logits_BSV[row, at - 1].argmax()) == token
                count += 1
    [(got_right, got_count)] = task_metric(logits_BSV, batch).values()
    return [int(got_right), int(got_count)], [right, count]


def test_task_metric_equals_a_loop_over_tokens(ranks: Any) -> None:
    [(got, expected)] = ranks(1)(metric_and_loop)
    assert got == expected
    assert 0 < expected[0] < expected[1]


def finish(output: Path | None, mistakes: int) -> dict[str, Any]:
    """The end of a run whose model errs in ``mistakes`` of the questions."""
    from megatron.mimo.data.digits import scanned as data
    from megatron.mimo.recipes.digits import TEST_SAMPLES, digits
    from megatron.mimo.recipes.recipe import FinishedRun

    def generate(samples: list[Sample], max_new_tokens: int, stop: int | None) -> list[list[int]]:
        assert (len(samples), max_new_tokens, stop) == (TEST_SAMPLES, data.MAX_DIGITS + 1, data.END)
        truth = [sample.token_ids[sample.is_label].tolist()[:-1] for sample in samples]
        return [[]] * mistakes + truth[mistakes:]

    run = FinishedRun(
        arguments=arguments(),
        model=[],
        generate=generate,
        train_seconds=12.345,
        samples_per_second=678.94,
        loss_curve=[(1, 3.0), (2, 0.5)],
        output=output,
    )
    return digits().finish(run)


@pytest.mark.slow
def test_finish_scores_and_draws(ranks: Any, tmp_path: Path) -> None:
    [metrics] = ranks(1)(finish, tmp_path, 0)
    assert metrics == {
        "digit_accuracy": 1.0,
        "exact_match": 1.0,
        "text_exact_match": 1.0,
        "test_samples": 1000,
        "train_seconds": 12.35,
        "samples_per_second": 678.9,
    }
    right = decode_image(tmp_path / "report.png")
    [metrics] = ranks(1)(finish, tmp_path, 3)
    assert 0.99 < metrics["exact_match"] < 1
    wrong = decode_image(tmp_path / "report.png")
    assert wrong.shape[1] > right.shape[1]  # a section for mistakes
    assert [path.name for path in tmp_path.iterdir()] == ["report.png"]


def test_finish_without_a_run_directory(ranks: Any) -> None:
    [metrics] = ranks(1)(finish, None, 0)
    assert metrics["exact_match"] == 1.0


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_sizes_fit_tensor_and_pipeline_parallelism(tp: int) -> None:
    from megatron.mimo.recipes.digits import ARGUMENTS

    assert int(str(ARGUMENTS["num_attention_heads"])) % tp == 0
    assert int(str(ARGUMENTS["num_layers"])) % tp == 0
    assert int(str(ARGUMENTS["seq_length"])) % (2 * tp) == 0


@pytest.mark.parametrize(
    ("device", "ranks", "given", "expected"),
    [
        ("cpu", 2, {}, 16),
        ("cuda", 1, {}, 128),
        ("cuda", 8, {}, 16),
        ("cuda", 8, {"tensor_model_parallel_size": 2, "global_batch_size": 64}, 16),
        ("cuda", 3, {}, 16),  # 128 is not dealt out to three ranks: refused as with any other size
    ],
)
def test_a_micro_batch_on_a_gpu_is_what_a_rank_has(
    monkeypatch: pytest.MonkeyPatch,
    device: str,
    ranks: int,
    given: dict[str, int],
    expected: int,
) -> None:
    from megatron.mimo.recipes.digits import micro_batch_size

    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    assert micro_batch_size(Namespace(**given), device) == expected


@pytest.mark.parametrize(("device", "workers"), [("cpu", 0), ("cuda", 4)])
def test_a_gpu_does_not_wait_for_digits(
    monkeypatch: pytest.MonkeyPatch, device: str, workers: int
) -> None:
    from megatron.mimo.recipes import digits as recipe

    monkeypatch.setattr(recipe, "capabilities", lambda: Capabilities(device=device))
    assert recipe.describe(Namespace())["num_workers"] == workers
