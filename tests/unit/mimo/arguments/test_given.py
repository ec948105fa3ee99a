"""A flag that the user gives wins over the recipe's rival of it, or is refused by name."""

from __future__ import annotations

import pytest

from megatron.core.models.mimo.errors import ConfigError
from tests.unit.mimo.arguments.test_command_line import _parse, _recipe

WARM = {"lr_warmup_iters": 3, "global_batch_size": 8, "train_iters": 20}


def test_a_fraction_wins_over_a_recipes_iterations_and_the_reverse() -> None:
    args = _parse("--lr-warmup-fraction", "0.1", recipe=_recipe(**WARM))
    assert (args.lr_warmup_fraction, args.lr_warmup_iters) == (0.1, 0)
    recipe = _recipe(lr_warmup_fraction=0.03)
    args = _parse("--lr-warmup-iters", "2", recipe=recipe)
    assert (args.lr_warmup_fraction, args.lr_warmup_iters) == (None, 2)
    args = _parse(config={"lr_warmup_iters": 2}, recipe=recipe)
    assert (args.lr_warmup_fraction, args.lr_warmup_iters) == (None, 2)


def test_a_length_in_samples_takes_the_recipes_schedule_along() -> None:
    recipe = _recipe(**WARM, lr_decay_iters=10, lr_wsd_decay_iters=2, lr_decay_style="WSD")
    args = _parse("--train-samples", "400", recipe=recipe)
    assert (args.train_iters, args.train_samples) == (None, 400)
    assert (args.lr_warmup_iters, args.lr_warmup_samples) == (0, 24)
    assert (args.lr_decay_iters, args.lr_decay_samples) == (None, 80)
    assert (args.lr_wsd_decay_iters, args.lr_wsd_decay_samples) == (None, 16)
    args = _parse("--train-samples", "400", "--global-batch-size", "16", recipe=recipe)
    assert args.lr_warmup_samples == 48
    args = _parse("--train-samples", "400", "--lr-warmup-samples", "7", recipe=recipe)
    assert (args.lr_warmup_iters, args.lr_warmup_samples) == (0, 7)


def test_a_length_in_iterations_wins_over_a_recipes_samples() -> None:
    recipe = _recipe(train_iters=None, train_samples=400, lr_warmup_samples=20, global_batch_size=8)
    assert _parse(recipe=recipe).train_samples == 400
    args = _parse("--train-iters", "30", recipe=recipe)
    assert (args.train_iters, args.train_samples) == (30, None)
    assert (args.lr_warmup_iters, args.lr_warmup_samples) == (3, 0)


def test_a_schedule_of_batch_sizes_wins_over_a_recipes_batch_size() -> None:
    schedule = ("--step-batch-size-schedule", "0:4 640:8", "--train-samples", "400")
    args = _parse(*schedule, recipe=_recipe(global_batch_size=16))
    assert args.step_batch_size_schedule == "0:4 640:8"
    assert args.global_batch_size != 16


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--train-iters", "3", "--train-samples", "9"), "--train-iters and --train-samples excl"),
        (
            ("--lr-warmup-fraction", "0.1", "--lr-warmup-iters", "2"),
            "--lr-warmup-fraction and --lr-warmup-iters exclude each other",
        ),
        (
            ("--train-samples", "90", "--lr-warmup-iters", "2"),
            "--lr-warmup-iters does not go with --train-samples, .* give --lr-warmup-samples",
        ),
        (("--lr-decay-samples", "90"), "--lr-decay-samples does not go with --train-iters"),
        (
            ("--step-batch-size-schedule", "0:4", "--global-batch-size", "4"),
            "--global-batch-size and --step-batch-size-schedule exclude",
        ),
        # read by nobody
        (("--rampup-batch-size", "4", "4", "64"), "--rampup-batch-size has no effect: .*--step-b"),
        (("--freeze-all-layers",), "--freeze-all-layers has no effect: .*--freeze language"),
        (("--split", "9,1,0"), "--split has no effect: recipes bring their own data"),
        (("--mock-data",), "--mock-data has no effect"),
        (("--no-mmap-bin-files",), "--no-mmap-bin-files has no effect"),
        (("--eod-mask-loss",), "--eod-mask-loss has no effect"),
        (("--tokenizer-model", "x"), "--tokenizer-model has no effect: the tokenizer is the rec"),
        (("--tokenizer-type", "NullTokenizer"), "--tokenizer-type has no effect"),
        (("--spec", "a", "b"), "--spec has no effect: a recipe builds its model itself"),
        (("--img-h", "8"), "--img-h has no effect: encoders of images belong"),
        (("--checkpoint-activations",), "--checkpoint-activations has no effect"),
        (("--dist-ckpt-format", "zarr"), "--dist-ckpt-format has no effect: .*--ckpt-format"),
        (("--full-validation",), "--full-validation has no effect: .*--eval-iters"),
        # read by other recipes
        (("--data-path", "a.jsonl"), "--data-path has no effect: recipe 'paper' does not read it"),
        (("--valid-data-path", "a.jsonl"), "--valid-data-path has no effect: .* its own data"),
        (("--test-data-path", "a.jsonl"), "--test-data-path has no effect"),
        # without what they need
        (("--lr", "0", "--min-lr", "1e-5"), "--lr 0 is lower than --min-lr 1e-05"),
        (("--min-lr", "-1"), "--min-lr -1: must be 0 or more"),
        (("--lr-decay-style", "WSD"), "WSD needs --lr-wsd-decay-iters N"),
        (
            ("--lr-decay-style", "WSD", "--train-samples", "90"),
            "WSD needs --lr-wsd-decay-samples N",
        ),
        (("--profile", "--no-output"), "--profile writes beside the TensorBoard folder"),
        (("--use-pytorch-profiler",), "has no effect without --profile"),
        (("--profile", "--profile-step-start", "3", "--profile-step-end", "3"), "count from 1"),
        (("--profile", "--profile-ranks", "0", "7"), "--profile-ranks 7: the run has the ranks 0"),
        (("--record-memory-history",), "--record-memory-history needs a GPU"),
    ],
)
def test_refused(argv: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _parse(*argv)


def test_the_file_is_the_users_word_too() -> None:
    with pytest.raises(ConfigError, match="--freeze-all-layers has no effect"):
        _parse(config={"freeze_all_layers": True})
    with pytest.raises(ConfigError, match="exclude each other"):
        _parse("--train-iters", "3", config={"train_samples": 9})


def test_the_table_is_of_this_megatron() -> None:
    import argparse

    from megatron.mimo.arguments.without_effect import GROUPS, HARMLESS, NAMES
    from megatron.training.arguments import add_megatron_arguments

    parser = add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
    assert {*NAMES, *HARMLESS} <= {action.dest for action in parser._actions}
    assert set(GROUPS) <= {group.title for group in parser._action_groups}


def test_what_is_done_anyway_is_told() -> None:
    assert _parse().read_over == []
    args = _parse("--use-mcore-models")
    assert args.read_over == ["--use-mcore-models is read over: all models are of megatron-core"]


def test_what_megatron_takes_back_is_told() -> None:
    args = _parse("--no-weight-decay-cond-type", "apply_wd_to_qk_layernorm")
    assert len(args.read_over) == 1
    assert "--no-weight-decay-cond-type is deprecated" in args.read_over[0]


def test_a_recipe_reads_the_files_that_it_names() -> None:
    import dataclasses

    recipe = dataclasses.replace(_recipe(), data_flags=("data_path",))
    assert _parse("--data-path", "a.jsonl", recipe=recipe).data_path == ["a.jsonl"]
    with pytest.raises(ConfigError, match=r"does not read it: it reads --data-path \(Recipe"):
        _parse("--train-data-path", "a.jsonl", recipe=recipe)


def test_a_package_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"pip install 'megatron-mimo\[wandb\]'"):
        _parse("--wandb-project", "mine")


def test_ranks_of_encoders_alone_can_be_profiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks are the job's, where checks of sizes see the language model's alone."""
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    apart = ("--component", "images=dp=1,rank_offset=1", "language=dp=1")
    args = _parse("--profile", "--profile-ranks", "1", *apart)
    assert (args.profile_ranks, args.world_size) == ([1], 2)
