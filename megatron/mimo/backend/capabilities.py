"""What this machine can do: the one place that asks which device and which packages there are.

Defaults of Megatron's arguments (:mod:`megatron.mimo.backend.defaults`), layer specs, attention
paths, the optimizer and the opening line of a run follow from it. Packages that compute on CUDA
alone (Transformer Engine, apex) count as absent on the CPU, installed or not.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import inspect
import sys
import warnings
from dataclasses import dataclass
from types import ModuleType
from typing import cast

import torch
from packaging.version import Version

__all__ = ["Capabilities", "capabilities"]

_found: Capabilities | None = None

APEX_EXTENSIONS = (
    "amp_C",  # FusedAdam, norms of many tensors at once
    "fused_layer_norm_cuda",
    "fast_layer_norm",  # the persistent one
    "fused_weight_gradient_mlp_cuda",  # gradient accumulation fused into the matrix product
    "scaled_masked_softmax_cuda",
    "scaled_softmax_cuda",
    "scaled_upper_triang_masked_softmax_cuda",
)
"""The compiled modules of NVIDIA's apex that megatron-core 0.19 imports; each is built by a flag
of its own, so that an installed apex may lack any of them."""


@dataclass(frozen=True, kw_only=True)
class Capabilities:
    """What a process has to compute with.

    Attributes:
        device: "cpu" or "cuda".
        card: name of the CUDA device; None on the CPU.
        compute_capability: of the CUDA device, (9, 0) for Hopper; None on the CPU.
        torch: version of PyTorch.
        transformer_engine: its version; None where it is absent or cannot be used.
        apex: which of ``APEX_EXTENSIONS`` can be used.
        flash_attn: version of flash-attn, or None.
        flash_linear_attention: version of flash-linear-attention, or None.
        triton: version of Triton; None on the CPU, and where it is absent or does not load.
        varlen_arguments: names of the arguments of torch's ``varlen_attn``; empty without it.
    """

    device: str
    card: str | None = None
    compute_capability: tuple[int, int] | None = None
    torch: str = torch.__version__
    transformer_engine: str | None = None
    apex: frozenset[str] = frozenset()
    flash_attn: str | None = None
    flash_linear_attention: str | None = None
    triton: str | None = None
    varlen_arguments: frozenset[str] = frozenset()

    def has_transformer_engine(self, least: str = "0") -> bool:
        """Whether Transformer Engine can be used, in version ``least`` or a newer one."""
        engine = self.transformer_engine
        return engine is not None and Version(engine).release >= Version(least).release

    def has_apex(self, *extensions: str) -> bool:
        """Whether all these extensions of apex can be used."""
        return self.apex.issuperset(extensions)

    def has_compute_capability(self, major: int, minor: int = 0) -> bool:
        """Whether the device is of this generation or a newer one."""
        return self.compute_capability is not None and self.compute_capability >= (major, minor)

    def __str__(self) -> str:
        """For the opening line of a run: "NVIDIA H200, Transformer Engine 2.20.2, no apex"."""
        if self.device == "cpu":
            return "CPU"
        engine = self.transformer_engine
        parts = [
            self.card or "CUDA",
            f"Transformer Engine {engine}" if engine else "no Transformer Engine",
            "apex" if self.apex else "no apex",
        ]
        return ", ".join(parts)


def capabilities() -> Capabilities:
    """This process's; found out once, after ``select_backend`` (which this calls).

    Raises:
        RuntimeError: as ``select_backend`` does.
    """
    global _found
    if _found is None:
        # The package imports this module.
        from megatron.mimo.backend import select_backend

        _found = _find(select_backend())
    return _found


def _find(device: str) -> Capabilities:
    if device == "cpu":
        return Capabilities(
            device="cpu",
            flash_linear_attention=_version_of("flash-linear-attention"),
            varlen_arguments=_varlen_arguments(),
        )
    return Capabilities(
        device=device,
        card=torch.cuda.get_device_name(),
        compute_capability=torch.cuda.get_device_capability(),
        transformer_engine=usable_transformer_engine(),
        apex=frozenset(filter(_is_importable, APEX_EXTENSIONS)),
        flash_attn=_version_of("flash-attn"),
        flash_linear_attention=_version_of("flash-linear-attention"),
        triton=_triton(),
        varlen_arguments=_varlen_arguments(),
    )


def hide_cuda_packages() -> None:
    """Make what computes on CUDA alone look absent.

    Modules of Megatron that are loaded already have asked: their answers, and the names that they
    took from such a package, are patches of the CPU backend's table.
    """
    hide("transformer_engine", "transformer_engine_torch", "apex", *APEX_EXTENSIONS)


def hide(*packages: str) -> None:
    """Let every later ``import`` of these packages raise ``ModuleNotFoundError``."""
    for package in packages:
        loaded = [name for name in sys.modules if name.startswith(package + ".")]
        sys.modules.update(dict.fromkeys([package, *loaded], cast(ModuleType, None)))


@functools.cache
def usable_transformer_engine() -> str | None:
    """Its version, if its part for PyTorch loads: it is built for one torch and one CUDA.

    One that does not load is hidden from megatron-core, which would end with its error.
    """
    if importlib.util.find_spec("transformer_engine") is None:
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            importlib.import_module("transformer_engine.pytorch")
            module = importlib.import_module("transformer_engine")
    except (ImportError, OSError, RuntimeError, AssertionError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        hide("transformer_engine")
        warnings.warn(
            f"Transformer Engine is installed and cannot be used ({reason}): running without it",
            stacklevel=2,
        )
        return None
    return str(module.__version__)


def _is_importable(name: str) -> bool:
    if importlib.util.find_spec(name) is None:
        return False
    try:
        importlib.import_module(name)
    except (ImportError, OSError):
        return False
    return True


def _version_of(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _triton() -> str | None:
    if not _is_importable("triton"):  # its distribution has several names
        return None
    return str(importlib.import_module("triton").__version__)


def _varlen_arguments() -> frozenset[str]:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return frozenset()
    return frozenset(inspect.signature(varlen_attn).parameters)
