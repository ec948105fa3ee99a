"""What a command is told when it differs from the run whose checkpoint it loads."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from megatron.core.models.mimo.errors import ConfigError
from megatron.mimo.training.mismatch import check_command, explain, what_moved

FOLDER = Path("run/iter_0000003")
ARGUMENTS: dict[str, Any] = {
    "load": "run",
    "hidden_size": 32,
    "group_query_attention": False,
    "num_query_groups": 1,
    "add_bias_linear": True,
    "num_experts": None,
    "freeze": [],
    "optimizer": "adam",
    "use_distributed_optimizer": False,
    "fp16": False,
    "bf16": False,
    "lr": 1e-3,
    "module_lr": [],
    "adam_beta1": 0.9,
    "adam_beta2": 0.98,
    "adam_eps": 1e-8,
    "sgd_momentum": 0.9,
    "no_save_optim": None,
    "no_load_optim": None,
    "no_save_rng": None,
    "no_load_rng": None,
    "ckpt_format": "torch_dist",
    "auto_detect_ckpt_format": False,
    "tensor_model_parallel_size": 1,
    "pipeline_model_parallel_size": 1,
    "data_parallel_size": 2,
    "expert_model_parallel_size": 1,
    "train_iters": 20,
    "train_samples": None,
    "global_batch_size": 8,
    "consumed_train_samples": 32,
    "seed": 1,
    "pack": False,
}
NEW_OPTIMIZER = r"go on with the weights and a new optimizer: --no-load-optim, or .* --finetune"


def arguments(**changes: Any) -> Namespace:
    return Namespace(**(ARGUMENTS | changes))


def test_the_same_command_passes() -> None:
    built = arguments(num_query_groups=4)  # as Megatron leaves it in the arguments it saves
    assert check_command(arguments(), built, FOLDER, goes_on=True) is None
    assert what_moved(arguments(), built) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"freeze": ["images"]}, "--freeze is images and the optimizer in .* with not given"),
        ({"use_distributed_optimizer": True}, "--use-distributed-optimizer is on and .* with off"),
        ({"optimizer": "sgd"}, "--optimizer is sgd and the optimizer in .* was made with adam"),
        ({"fp16": True}, "--fp16 is on and the optimizer in .* was made with off"),
        ({"lr": 0.1}, "--lr is 0.1 and the optimizer in .* was made with 0.001"),
        ({"module_lr": [("images", 0.5)]}, "--module-lr is images=0.5 and .* with not given"),
        ({"adam_beta2": 0.9}, "--adam-beta2 is 0.9 and the optimizer in .* was made with 0.98"),
        ({"adam_eps": 1e-6}, "--adam-eps is 1e-06 and the optimizer in .* was made with 1e-08"),
        ({"freeze": ["a"], "lr": 0.1}, "--freeze is a and .*, --lr is 0.1 and was 0.001; give"),
    ],
)
def test_what_the_optimizer_was_made_with_has_to_be_the_same(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=f"{message}.*{NEW_OPTIMIZER}"):
        check_command(arguments(**changes), arguments(), FOLDER, goes_on=True)
    for harmless in (
        check_command(arguments(**changes), arguments(), FOLDER, goes_on=False),
        check_command(arguments(**changes, no_load_optim=True), arguments(), FOLDER, goes_on=True),
    ):
        assert harmless is None


def test_settings_count_for_the_optimizer_that_reads_them() -> None:
    both = arguments(optimizer="sgd"), arguments(optimizer="sgd", adam_eps=1.0)
    assert check_command(*both, FOLDER, goes_on=True) is None
    with pytest.raises(ConfigError, match=r"--sgd-momentum is 0\.9 and .* was made with 0\.5"):
        check_command(both[0], arguments(optimizer="sgd", sgd_momentum=0.5), FOLDER, goes_on=True)


@pytest.mark.parametrize(
    ("changes", "refused"),
    [
        ({}, False),
        ({"use_distributed_optimizer": True, "dist_ckpt_optim_fully_reshardable": True}, False),
        ({"use_distributed_optimizer": True, "dist_ckpt_optim_fully_reshardable": False}, True),
        ({"ckpt_format": "torch"}, True),
    ],
)
def test_experts_are_divided_otherwise_where_state_is_by_parameter(
    changes: dict[str, Any], refused: bool
) -> None:
    saved = arguments(num_experts=4, **changes)
    experts = arguments(num_experts=4, expert_model_parallel_size=2, **changes)
    if not refused:
        assert check_command(experts, saved, FOLDER, goes_on=True) is None
        return
    with pytest.raises(ConfigError, match="--expert-model-parallel-size is 2 and"):
        check_command(experts, saved, FOLDER, goes_on=True)


@pytest.mark.parametrize("goes_on", [True, False])
def test_another_model_is_refused_however_it_is_loaded(goes_on: bool) -> None:
    with pytest.raises(ConfigError, match=r"--hidden-size is 64 and the model in .* with 32; give"):
        check_command(arguments(hidden_size=64), arguments(), FOLDER, goes_on=goes_on)
    with pytest.raises(ConfigError, match=r"--disable-bias-linear is on and the model .* with off"):
        check_command(arguments(add_bias_linear=False), arguments(), FOLDER, goes_on=goes_on)


def test_a_checkpoint_without_optimizer_state() -> None:
    saved = arguments(no_save_optim=True, no_save_rng=True)
    with pytest.raises(ConfigError, match="written with --no-save-optim; add --no-load-optim"):
        check_command(arguments(), saved, FOLDER, goes_on=True)
    same = arguments(no_save_optim=True, no_save_rng=True)
    said = check_command(same, saved, FOLDER, goes_on=True)
    assert said is not None
    assert "optimizer and learning-rate schedule start anew" in said
    assert same.no_load_optim
    assert same.no_load_rng


def test_formats() -> None:
    torch = arguments(ckpt_format="torch")
    with pytest.raises(ConfigError, match=r"in the format torch; give --ckpt-format torch"):
        check_command(arguments(), torch, FOLDER, goes_on=True)
    with pytest.raises(ConfigError, match=r"--tensor-model-parallel-size is 2 and .* same layout"):
        check_command(
            arguments(ckpt_format="torch", tensor_model_parallel_size=2),
            torch,
            FOLDER,
            goes_on=False,
        )
    one = arguments(ckpt_format="torch", data_parallel_size=1)
    assert check_command(one, torch, FOLDER, goes_on=True) is None


def test_a_moved_schedule_is_told() -> None:
    said = what_moved(arguments(global_batch_size=16), arguments())
    assert said is not None
    assert "--global-batch-size is 16 and was 8" in said
    assert "goes on where iteration 2 of 20 stands" in said  # after 4 of 8 samples
    samples = arguments(global_batch_size=16, train_samples=160)
    assert what_moved(samples, arguments()) is None
    said = what_moved(arguments(seed=2), arguments())
    assert said == "--seed is 2 and was 1: the samples that follow are not those that would have"


def test_pages_of_keys_become_a_line() -> None:
    error = RuntimeError(
        "CheckpointException ranks:dict_keys([0])\nTraceback\n  KeyError: 'a " + "b" * 999
    )
    text = explain(error, [], None)
    assert text.startswith("RuntimeError: CheckpointException")
    assert len(text) < 350
    assert "it is damaged or of another model" in text
