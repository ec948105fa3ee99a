"""Every combination of device and packages: its defaults, its refusals, what is hidden on it."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from megatron.core.models.mimo.errors import ConfigError
from megatron.mimo.backend import Capabilities, capabilities, select_backend
from megatron.mimo.backend import capabilities as ask
from megatron.mimo.backend.capabilities import (
    APEX_EXTENSIONS,
    hide,
    hide_cuda_packages,
    usable_transformer_engine,
)
from megatron.mimo.backend.defaults import argument_defaults
from megatron.mimo.backend.patching import PROCESS
from megatron.mimo.recipes import load_recipe, recipe_names
from tests.tiers import crossed

HOPPER: dict[str, Any] = {"device": "cuda", "card": "NVIDIA H200", "compute_capability": (9, 0)}
APEX = frozenset(APEX_EXTENSIONS)
MACHINES = {
    "cpu": Capabilities(device="cpu"),
    "cuda": Capabilities(**HOPPER),
    "cuda te": Capabilities(**HOPPER, transformer_engine="2.20.2"),
    "cuda te apex": Capabilities(**HOPPER, transformer_engine="2.20.2", apex=APEX),
    "cuda apex": Capabilities(**HOPPER, apex=APEX),
    "cuda apex without extensions": Capabilities(**HOPPER, apex=frozenset({"amp_C"})),
    "cuda te of long ago": Capabilities(**HOPPER, transformer_engine="1.3.0"),
}
DEFAULTS = {
    # transformer_impl, gradient_accumulation_fusion, apply_rope_fusion, no_persist_layer_norm,
    # masked_softmax_fusion
    "cpu": ("local", False, False, True, False),
    "cuda": ("local", False, False, True, False),
    "cuda te": ("transformer_engine", False, True, True, False),
    "cuda te apex": ("transformer_engine", True, True, False, True),
    "cuda apex": ("local", True, False, False, True),
    "cuda apex without extensions": ("local", False, False, True, False),
    "cuda te of long ago": ("transformer_engine", False, False, True, False),
}
TINY = [name for name in recipe_names() if name.endswith("_tiny") or name == "digits"]
NEEDS_ENGINE = (
    "--transformer-impl transformer_engine",
    "--fp8-format hybrid",
    "--tp-comm-overlap",
    "--moe-router-fusion",
    "--moe-permute-fusion",
    "--te-rng-tracker",
    "--use-precision-aware-optimizer",
    "--attention-backend fused",
    "--cross-entropy-loss-fusion --cross-entropy-fusion-impl te",
)


def parse(recipe: str, machine: Capabilities, *flags: str, **config: object) -> Any:
    from megatron.mimo.arguments.command_line import parse_arguments

    select_backend("cpu")
    return parse_arguments(
        load_recipe(recipe), machine=machine, config=config, argv=["--no-output", *flags]
    )


@pytest.mark.parametrize("name", MACHINES)
def test_defaults_follow_from_the_machine(name: str) -> None:
    machine = MACHINES[name]
    defaults = argument_defaults(machine)
    assert tuple(defaults.values())[1:6] == DEFAULTS[name]
    assert defaults["distributed_backend"] == ("gloo" if name == "cpu" else "nccl")
    assert ("use_cpu_initialization" in defaults) == (name == "cpu")


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "name"), crossed(TINY, list(MACHINES), whole=["llava_tiny"]))
def test_every_tiny_recipe_has_arguments_and_a_configuration(
    recipe: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Megatron's own checks pass: they, and its layers, are what ended runs on other machines."""
    from megatron.core.models.common.embeddings import rope_utils
    from megatron.training.argument_utils import core_transformer_config_from_args

    machine = MACHINES[name]
    if machine.has_transformer_engine("1.4"):
        monkeypatch.setattr(rope_utils, "fused_apply_rotary_pos_emb", lambda *_, **__: None)
    args = parse(recipe, machine)
    config = core_transformer_config_from_args(args)
    assert config.bf16 == (machine.device == "cuda")
    has_wgrad = machine.has_apex("fused_weight_gradient_mlp_cuda")
    assert config.gradient_accumulation_fusion == has_wgrad  # else every linear layer raises
    # Its images are spans of tokens that see each other, which Transformer Engine does not have.
    local = {"gemma3_tiny": "local"}
    wanted = local.get(recipe, argument_defaults(machine)["transformer_impl"])
    assert config.transformer_impl == wanted


@pytest.mark.parametrize("flags", NEEDS_ENGINE)
@pytest.mark.parametrize("name", ["cpu", "cuda", "cuda apex"])
def test_flags_of_transformer_engine_are_refused_without_it(flags: str, name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse("digits", MACHINES[name], *flags.split())
    text = str(caught.value)
    assert flags.split()[-2 if flags.count("--") > 1 or " " in flags else -1] in text
    assert "needs Transformer Engine" in text
    assert "pip install 'megatron-mimo[te]'" in text
    assert f"this process has: {MACHINES[name]}" in text


@pytest.mark.parametrize(
    ("config", "machine", "message"),
    [
        ({"apply_rope_fusion": True}, "cuda", r"apply_rope_fusion needs Transformer Engine 1\.4"),
        (
            {"gradient_accumulation_fusion": True},
            "cuda te",
            r"gradient_accumulation_fusion needs NVIDIA's apex built with "
            r"fused_weight_gradient_mlp_cuda \(from its source",
        ),
        ({"masked_softmax_fusion": True}, "cpu", r"masked_softmax_fusion needs NVIDIA's apex"),
        ({"fp4_format": "e2m1"}, "cuda te", r"--fp4-format needs a GPU of compute capability 10"),
        (
            {"fp8_format": "hybrid", "fp8_recipe": "mxfp8"},
            "cuda te",
            r"--fp8-recipe mxfp8 needs a GPU of compute capability 10",
        ),
        ({"use_flash_attn": True}, "cuda", r"--use-flash-attn needs flash-attn"),
        ({"cuda_graph_impl": "local"}, "cpu", r"--cuda-graph-impl needs a GPU"),
    ],
    ids=lambda value: value if isinstance(value, str) and " " not in value else "",
)
def test_what_cannot_work_is_refused_by_name(
    config: dict[str, object], machine: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        parse("digits", MACHINES[machine], **config)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            "--fp8-format hybrid --seq-length 30 --micro-batch-size 1 --global-batch-size 1",
            r"--fp8-format: 30 tokens of a micro-batch on each rank are not divisible by 8; change",
        ),
        (
            "--fp8-format hybrid --hidden-size 104 --num-attention-heads 4",
            r"--fp8-format: --hidden-size is 104; it has to be divisible by 16",
        ),
        ("--cuda-graph-impl full_iteration", r"full_iteration is not supported: .*; use local"),
        ("--cuda-graph-impl local --cuda-graph-modules mlp", r"whole layers are captured"),
        (
            "--cuda-graph-impl local --pack --micro-batch-size 1",
            r"with --pack is not supported: a graph replays fixed shapes",
        ),
        (
            "--cuda-graph-impl local --eval-iters 1 --eval-micro-batch-size 2 "
            "--eval-global-batch-size 2",
            r"--eval-micro-batch-size 2: a graph replays fixed shapes; use that of training, 16",
        ),
    ],
)
def test_low_precision_and_graphs_take_whole_blocks_of_one_shape(flags: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse("digits", MACHINES["cuda te"], *flags.split())


@pytest.mark.parametrize("flags", ["--fp8-format hybrid", "--cuda-graph-impl local"])
def test_encoders_stay_out_of_low_precision_and_graphs(flags: str) -> None:
    """Their rows are as many as the media of a micro-batch give."""
    from megatron.mimo.encoders.vit import encoder_config
    from megatron.training.argument_utils import core_transformer_config_from_args

    args = parse("digits", MACHINES["cuda te of long ago"], *flags.split())
    language = core_transformer_config_from_args(args)
    assert (language.fp8, language.cuda_graph_impl) != (None, "none")
    encoder = encoder_config(language, num_layers=1, hidden_size=32, num_attention_heads=2)
    assert (encoder.fp8, encoder.fp4, encoder.cuda_graph_impl) == (None, None, "none")


def test_the_opening_line_says_what_was_found() -> None:
    assert str(MACHINES["cpu"]) == "CPU"
    assert str(MACHINES["cuda te"]) == "NVIDIA H200, Transformer Engine 2.20.2, no apex"
    assert str(MACHINES["cuda apex"]) == "NVIDIA H200, no Transformer Engine, apex"


def test_this_process_computes_on_the_cpu_without_packages_of_cuda() -> None:
    select_backend("cpu")
    found = capabilities()
    assert found is ask()  # found out once
    assert found.device == "cpu"
    assert found.transformer_engine is None
    assert not found.apex
    assert {"query", "cu_seq_q"} <= found.varlen_arguments
    assert found.torch == torch.__version__


def test_versions_are_compared_as_numbers() -> None:
    assert MACHINES["cuda te"].has_transformer_engine("2.9")
    assert not MACHINES["cuda te"].has_transformer_engine("2.21")
    assert not MACHINES["cuda"].has_transformer_engine()


def test_an_engine_that_does_not_load_is_left_out_with_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one that was built for another torch: megatron-core would end with this error."""
    folder = tmp_path / "transformer_engine"
    folder.mkdir()
    (folder / "__init__.py").write_text('raise OSError("undefined symbol: _ZN3c10")')
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "transformer_engine", raising=False)
    with pytest.warns(UserWarning, match=r"cannot be used \(undefined symbol: _ZN3c10\)"):
        assert usable_transformer_engine.__wrapped__() is None
    with pytest.raises(ImportError):
        importlib.import_module("transformer_engine")
    monkeypatch.setitem(sys.modules, "transformer_engine", sys.modules["transformer_engine"])


def test_modules_that_asked_before_are_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU with Transformer Engine and apex installed: `import megatron.core` asks for both."""
    module = ModuleType("megatron.probe_of_packages")
    module.HAVE_TE, module.HAVE_APEX = True, True  # type: ignore[attr-defined]
    for name in ("transformer_engine", "transformer_engine.pytorch", "apex"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    hide_cuda_packages()
    select_backend("cpu")
    PROCESS.adapt(module)
    assert (vars(module)["HAVE_TE"], vars(module)["HAVE_APEX"]) == (False, False)
    for name in ("transformer_engine", "transformer_engine.pytorch", "apex"):
        with pytest.raises(ImportError):
            importlib.import_module(name)


def test_a_hidden_package_is_absent_though_it_was_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = "hidden_probe"
    (tmp_path / package).mkdir()
    (tmp_path / package / "__init__.py").touch()
    (tmp_path / package / "inner.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    importlib.import_module(f"{package}.inner")
    hide(package)
    for name in (package, f"{package}.inner"):
        with pytest.raises(ImportError):
            importlib.import_module(name)
    assert importlib.util.find_spec(package) is None
    for name in (package, f"{package}.inner"):
        del sys.modules[name]
