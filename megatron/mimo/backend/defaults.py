"""Megatron's arguments on this machine: defaults that work, and refusals by name.

Megatron's own defaults are for CUDA with Transformer Engine and apex, and end a run on any other
machine. Both tables below follow from :class:`Capabilities` alone, so that every combination of
device and packages can be looked at anywhere.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron.mimo.backend.capabilities import Capabilities

__all__ = ["argument_defaults", "check_arguments", "own_argument_defaults"]

_SOFTMAX = (
    "scaled_masked_softmax_cuda",
    "scaled_softmax_cuda",
    "scaled_upper_triang_masked_softmax_cuda",
)


def argument_defaults(machine: Capabilities) -> dict[str, object]:
    """Megatron arguments, by argparse destination, that differ from one machine to another.

    They are the weakest of all: what a recipe, a script or the command line sets wins.
    """
    with_te = machine.has_transformer_engine()
    defaults: dict[str, object] = {
        "distributed_backend": "nccl" if machine.device == "cuda" else "gloo",
        "transformer_impl": "transformer_engine" if with_te else "local",
        # Projectors and output layers are megatron-core's own, even among layers of TE.
        "gradient_accumulation_fusion": machine.has_apex("fused_weight_gradient_mlp_cuda"),
        "apply_rope_fusion": machine.has_transformer_engine("1.4"),
        "no_persist_layer_norm": not machine.has_apex("fast_layer_norm"),
        "masked_softmax_fusion": machine.has_apex(*_SOFTMAX),
    }
    if machine.device == "cpu":
        defaults |= {
            "use_cpu_initialization": True,
            "disable_jit_fuser": True,
            "num_workers": 0,  # the ranks have the cores already
        }
    return defaults


def own_argument_defaults(machine: Capabilities) -> dict[str, object]:
    """The same of this project's own arguments."""
    return {"row_kernels": "torch" if machine.triton is None else "triton"}


@dataclass(frozen=True, kw_only=True)
class _Need:
    """A value of an argument that works with a package alone.

    Attributes:
        flag: what the user gave.
        asked: whether arguments have the value.
        met: whether a machine has the package.
        package: its name, and how one gets it.
    """

    flag: str
    asked: Callable[[Any], bool]
    met: Callable[[Capabilities], bool]
    package: str


def _engine(flag: str, asked: Callable[[Any], bool], least: str = "0") -> _Need:
    version = "" if least == "0" else f" {least} or newer"
    return _Need(
        flag=flag,
        asked=asked,
        met=lambda machine: machine.has_transformer_engine(least),
        package=f"Transformer Engine{version} on a GPU (pip install 'megatron-mimo[te]')",
    )


def _engine_switch(flag: str, least: str = "0") -> _Need:
    name = flag.removeprefix("--").replace("-", "_")
    return _engine(flag, lambda args: bool(getattr(args, name)), least)


def _apex(flag: str, argument: str, *extensions: str) -> _Need:
    return _Need(
        flag=flag,
        asked=lambda args: bool(getattr(args, argument)),
        met=lambda machine: machine.has_apex(*extensions),
        package=f"NVIDIA's apex built with {', '.join(extensions)} (from its source: the apex of "
        "PyPI is another project)",
    )


def _generation(flag: str, asked: Callable[[Any], bool], major: int, minor: int = 0) -> _Need:
    return _Need(
        flag=flag,
        asked=asked,
        met=lambda machine: machine.has_compute_capability(major, minor),
        package=f"a GPU of compute capability {major}.{minor} or newer",
    )


def _flash(flag: str, asked: Callable[[Any], bool]) -> _Need:
    return _Need(
        flag=flag,
        asked=asked,
        met=lambda machine: machine.flash_attn is not None,
        package="flash-attn on a GPU (pip install flash-attn)",
    )


def _backend_of_engine(args: Any) -> bool:
    return getattr(args.attention_backend, "name", "auto") in ("flash", "fused", "unfused")


_NEEDS = (
    _engine(
        "--transformer-impl transformer_engine",
        lambda args: args.transformer_impl == "transformer_engine",
    ),
    _apex(
        "gradient_accumulation_fusion",
        "gradient_accumulation_fusion",
        "fused_weight_gradient_mlp_cuda",
    ),
    _apex("masked_softmax_fusion", "masked_softmax_fusion", *_SOFTMAX),
    _engine("apply_rope_fusion", lambda args: args.apply_rope_fusion, "1.4"),
    _engine("--fp8-format", lambda args: bool(args.fp8)),
    _generation("--fp8-format", lambda args: bool(args.fp8), 8, 9),
    _generation("--fp8-recipe blockwise", lambda a: a.fp8 and a.fp8_recipe == "blockwise", 9),
    _generation("--fp8-recipe mxfp8", lambda args: args.fp8 and args.fp8_recipe == "mxfp8", 10),
    _engine("--fp4-format", lambda args: bool(args.fp4), "2.7"),
    _generation("--fp4-format", lambda args: bool(args.fp4), 10),
    _engine_switch("--tp-comm-overlap"),
    _engine_switch("--delay-wgrad-compute", "2.3"),
    _engine_switch("--fused-residual-rmsnorm"),
    _engine_switch("--use-transformer-engine-op-fuser"),
    _engine_switch("--te-rng-tracker", "1.5"),
    _engine_switch("--use-precision-aware-optimizer"),
    _engine_switch("--moe-permute-fusion", "2.1"),
    _engine_switch("--moe-router-fusion", "2.7"),
    _engine_switch("--moe-grouped-gemm", "1.11"),
    _engine("--cpu-offloading-num-layers", lambda args: args.cpu_offloading_num_layers > 0),
    _engine(
        "--cross-entropy-fusion-impl te",
        lambda args: args.cross_entropy_loss_fusion and args.cross_entropy_fusion_impl == "te",
    ),
    _engine("--attention-backend flash, fused or unfused", _backend_of_engine),
    _Need(
        flag="--row-kernels triton",
        asked=lambda args: getattr(args, "row_kernels", None) == "triton",
        met=lambda machine: machine.triton is not None,
        package="Triton on a GPU (pip install triton)",
    ),
    _flash("--use-flash-attn", lambda args: args.use_flash_attn),
    _flash("--flash-decode", lambda args: args.flash_decode),
    _generation("--cuda-graph-impl", lambda args: args.cuda_graph_impl != "none", 7),
    _generation("--enable-cuda-graph", lambda args: args.enable_cuda_graph, 7),
    _generation("--external-cuda-graph", lambda args: args.external_cuda_graph, 7),
)


def check_arguments(args: Namespace, machine: Capabilities) -> None:
    """Refuse what ``machine`` cannot do, before Megatron meets it.

    Args:
        args: parsed, before Megatron's own validation.
        machine: as ``capabilities`` returns it.

    Raises:
        ConfigError: names the flag, the package or device that it needs, and what there is.
    """
    # what imports Megatron waits for the replacements, which are made before arguments are read
    from megatron.mimo.backend.own_library import ConfigError

    for need in _NEEDS:
        if need.asked(args) and not need.met(machine):
            raise ConfigError(
                f"{need.flag} needs {need.package}; this process has: {machine}. Leave it out, or "
                "install what it needs"
            )
