from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from megatron.core.models.mimo.errors import ConfigError
from megatron.mimo.arguments.command_line import config_values, parse_arguments
from megatron.mimo.arguments.early import list_recipes, parse_early, read_config
from megatron.mimo.recipes import load_recipe, locate_recipe, recipe_names
from megatron.mimo.recipes.recipe import Recipe

UNBIASED = "--disable-bias-linear"
PP2 = ("--pipeline-model-parallel-size", "2")


def _recipe(**arguments: object) -> Recipe:
    def unused(*_: object) -> object:
        raise AssertionError("not part of parsing")

    sizes = {
        "num_layers": 4,
        "hidden_size": 16,
        "num_attention_heads": 4,
        "seq_length": 32,
        "max_position_embeddings": 32,
        "train_iters": 10,
        "lr": 1e-3,
        "vocab_size": 40,
    }
    return Recipe(
        name="paper",
        summary="",
        arguments=sizes | arguments,
        build_model=unused,  # type: ignore[arg-type]
        build_datasets=unused,  # type: ignore[arg-type]
        build_collator=unused,  # type: ignore[arg-type]
    )


def _parse(
    *argv: str, config: dict[str, object] | None = None, recipe: Recipe | None = None
) -> argparse.Namespace:
    from megatron.mimo.backend import capabilities, select_backend

    select_backend("cpu")
    return parse_arguments(
        recipe or _recipe(),
        machine=capabilities(),
        config=config or {},
        argv=argv,
    )


@pytest.fixture(autouse=True)
def _single(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")


def test_the_nearer_to_the_user_the_stronger() -> None:
    recipe = _recipe(lr=1e-3, min_lr=1e-5, weight_decay=0.5)
    args = _parse("--lr", "3e-3", config={"lr": 2e-3, "min_lr": "2e-5"}, recipe=recipe)
    assert args.lr == 3e-3  # command line
    assert args.min_lr == 2e-5  # configuration file
    assert args.weight_decay == 0.5  # recipe
    assert args.distributed_backend == "gloo"  # backend
    assert args.calculate_per_token_loss  # project
    assert args.adam_beta1 == 0.9  # Megatron


def test_a_backend_default_gives_way_to_a_recipe() -> None:
    assert _parse(recipe=_recipe(disable_jit_fuser=False)).disable_jit_fuser is False


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--hiden-size", "3"), "unknown flag --hiden-size; did you mean --hidden-size?"),
        (("--num-layers", "many"), "invalid int value: 'many'"),
        (("--num-attention-heads", "3"), "16 hidden size cannot be divided by attention heads 3"),
        (("--tensor-model-parallel-size", "2"), "1 processes cannot be divided into tp 2"),
        (("--seq-length", "64"), "sequence length 64 is larger than --max-position-embeddings 32"),
        (("--micro-batch-size", "3", "--global-batch-size", "4"), "is not divisible by micro"),
        (("--micro-batch-size", "0"), "--micro-batch-size 0: must be at least 1"),
        (("--dataloader-type", "cyclic"), "recipes bring their own data"),
        (("--fp32", "--bf16"), "--fp32 excludes"),
        (("--lr-warmup-iters", "10"), "warm-up of 10 iterations does not fit into 10"),
        (("--yaml-cfg", "x.yaml"), "use --config"),
    ],
)
def test_what_cannot_work_is_refused(argv: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("?", r"\?").replace("(", r"\(")):
        _parse(*argv)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ("--tensor-model-parallel-size", "8"),
            "4 attention heads cannot be divided by tensor-parallel size 8",
        ),
        (
            ("--pipeline-model-parallel-size", "8"),
            "pipeline-parallel size 8 is larger than the model's 4 layers",
        ),
        (
            ("--tensor-model-parallel-size", "2", "--sequence-parallel", "--seq-length", "31"),
            "sequence length 31 is not divisible by 2 (tp = 2); use --seq-length 32",
        ),
        (
            ("--context-parallel-size", "2", "--seq-length", "30"),
            "sequence length 30 is not divisible by 4 (2*cp = 4); use --seq-length 32",
        ),
        (
            (*PP2, "--num-layers-per-virtual-pipeline-stage", "3"),
            "4 layers on 2 pipeline stages are 2 each, which cannot be cut into chunks of 3; sizes "
            "that fit: 1",
        ),
        (
            ("--num-layers-per-virtual-pipeline-stage", "2"),
            "--num-layers-per-virtual-pipeline-stage 2 with pipeline-parallel size 1",
        ),
        (
            (*PP2, "--num-virtual-stages-per-pipeline-rank", "0"),
            "--num-virtual-stages-per-pipeline-rank 0: must be at least 1",
        ),
        (
            (
                *(*PP2, "--num-layers-per-virtual-pipeline-stage", "1"),
                *("--num-virtual-stages-per-pipeline-rank", "2"),
            ),
            "say the same in two ways",
        ),
        (
            (*PP2, "--num-virtual-stages-per-pipeline-rank", "2", "--no-overlap-p2p-communication"),
            "would be mistaken for each other",
        ),
        (
            (*PP2, "--num-virtual-stages-per-pipeline-rank", "2", "--global-batch-size", "12"),
            "3 micro-batches per step and data-parallel rank are not a multiple of 2 pipeline "
            "stages; use a --global-batch-size that is a multiple of 8",
        ),
        (("--expert-model-parallel-size", "2"), "size 2 without experts; give --num-experts"),
        (("--expert-model-parallel-size", "0"), "--expert-model-parallel-size 0: must be at least"),
        (
            ("--num-experts", "3", "--expert-model-parallel-size", "2"),
            "3 experts cannot be divided by expert-parallel size 2",
        ),
        (
            ("--num-experts", "16", "--expert-model-parallel-size", "16"),
            "the 8 processes of a pipeline stage cannot be divided by expert-parallel size 16 * "
            "expert tensor-parallel size 1 = 16",
        ),
        (
            ("--num-experts", "4", "--tensor-model-parallel-size", "2"),
            "experts with tensor-parallel size 2 need sequence parallelism; add "
            "--sequence-parallel",
        ),
        (("--num-experts", "4"), "experts with biases do not run on megatron-core's local layers"),
        (
            (
                *("--num-experts", "4", "--tensor-model-parallel-size", "2", UNBIASED),
                *("--sequence-parallel", "--moe-token-dispatcher-type", "alltoall"),
            ),
            "which gloo cannot; use --expert-tensor-parallel-size 1",
        ),
    ],
)
def test_layouts_that_cannot_work_are_refused(
    monkeypatch: pytest.MonkeyPatch, argv: tuple[str, ...], message: str
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "8")
    with pytest.raises(ConfigError) as refused:
        _parse(*argv)
    assert message in str(refused.value)


def test_what_megatron_refuses_is_our_error_too() -> None:
    with pytest.raises(
        ConfigError, match=r"Megatron refuses these arguments: .*start_weight_decay"
    ):
        _parse(
            "--weight-decay-incr-style", "linear"
        )  # a bare assert in Megatron: its source line is shown


def test_a_recipe_that_misspells_an_argument_is_refused() -> None:
    with pytest.raises(ConfigError, match="has no argument 'hidden_sise'; did you mean"):
        _parse(recipe=_recipe(hidden_sise=3))


def test_output_folders_follow_the_recipe_and_the_flags() -> None:
    args = _parse("--recipe", "some.module:paper")
    assert (args.save, args.load) == ("runs/paper/checkpoints",) * 2
    assert args.tensorboard_dir == "runs/paper/tensorboard"
    assert not args.explicit_load
    args = _parse("--output", "here", "--load", "there")
    assert (args.save, args.load, args.explicit_load) == ("here/checkpoints", "there", True)
    args = _parse("--no-output")
    assert (args.output, args.save, args.tensorboard_dir) == (None, None, None)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", type=int, default=1)
    parser.add_argument("--kind", choices=["a", "b"])
    parser.add_argument("--names", nargs="+", default=[])
    parser.add_argument("--on", action="store_true")
    parser.add_argument("--no-fusion", action="store_false", dest="fusion")
    return parser


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"size": 3}, {"size": 3}),
        ({"size": -3}, {"size": -3}),
        ({"size": "3"}, {"size": 3}),
        ({"size": None}, {"size": None}),
        ({"kind": "b"}, {"kind": "b"}),
        ({"names": ["x", "y"]}, {"names": ["x", "y"]}),
        ({"names": "x"}, {"names": ["x"]}),
        ({"on": True}, {"on": True}),
        ({"on": False}, {"on": False}),
        ({"no_fusion": True}, {"fusion": False}),
        ({"no_fusion": False}, {"fusion": True}),
        ({"fusion": False}, {"fusion": False}),
        ({"fusion": True}, {"fusion": True}),
    ],
)
def test_configuration_entries_become_argument_values(
    config: dict[str, object], expected: dict[str, object]
) -> None:
    assert config_values(_parser(), config) == expected


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"sise": 3}, "unknown key 'sise'; did you mean 'size'"),
        ({"on": "yes"}, "'on' is a switch: true or false, got 'yes'"),
    ],
)
def test_configuration_entries_that_do_not_fit(config: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config_values(_parser(), config)


def test_a_configuration_value_of_the_wrong_type_names_its_flag() -> None:
    with pytest.raises(ConfigError, match="--num-layers: invalid int value"):
        _parse(config={"num_layers": "many"})


def test_configuration_files(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("hidden-size: 8\nnum_layers: 2\nrecipe: paper\n")
    assert read_config(path) == {"hidden_size": 8, "num_layers": 2, "recipe": "paper"}
    assert parse_early(["--config", str(path)]).recipe == "paper"
    assert parse_early(["--config", str(path), "--recipe", "mine"]).recipe == "mine"
    assert parse_early([]).recipe == "digits"
    for text, message in (
        ("- a\n- b\n", "expected a mapping"),
        ("a: [", "not valid YAML: [^\n]*$"),
        ("\xff", "not valid YAML: [^\n]*$"),
        ("num-layers: 1\nnum_layers: 2\n", "given twice"),
    ):
        path.write_text(text, encoding="latin-1")
        with pytest.raises(ConfigError, match=message):
            read_config(path)
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        read_config(tmp_path / "none.yaml")


def test_recipes_are_found_by_name() -> None:
    assert "digits" in recipe_names()
    assert load_recipe("digits").name == "digits"
    assert list_recipes().startswith("digits  ")
    with pytest.raises(ConfigError, match="unknown recipe 'digit'; did you mean 'digits'"):
        locate_recipe("digit")
    with pytest.raises(ConfigError, match="no module named 'nowhere'"):
        load_recipe("nowhere:recipe")
    with pytest.raises(ConfigError, match="has no 'other'"):
        load_recipe("megatron.mimo.recipes.digits:other")
