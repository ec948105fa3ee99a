"""Freezing parts of a model by name."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from torch import nn

from megatron.core.distributed import DistributedDataParallel
from megatron.core.models.mimo.config import MIMO_LANGUAGE_MODULE_KEY
from megatron.core.models.mimo.errors import ConfigError
from megatron.core.transformer.spec_utils import ModuleSpec

_PROJECTIONS = "projections"
_PARTS = ("encoders", "decoders", "input_projections", "output_projections")


def part_names(modality_specs: Mapping[str, ModuleSpec]) -> list[str]:
    """Every name that can be frozen, in all stages of the model."""
    names = [MIMO_LANGUAGE_MODULE_KEY]
    for modality, spec in modality_specs.items():
        names += [modality, f"{modality}.{_PROJECTIONS}"]
        for part in _PARTS:
            names.append(f"{modality}.{part}")
            inner = (spec.submodules or {}).get(part)
            if isinstance(inner, Mapping):
                names += [f"{modality}.{part}.{name}" for name in inner]
    return names


def modules_of(
    name: str,
    language_model: nn.Module | None,
    modality_submodules: nn.ModuleDict,
    known: Iterable[str],
) -> Iterator[nn.Module]:
    """The modules behind a name on this rank; none where another stage holds them.

    Raises:
        ConfigError: no stage of the model has such a part, or data parallelism holds it already.
    """
    if name not in known:
        raise ConfigError(f"cannot freeze {name!r}: no such part; this model has {list(known)}")
    if name == MIMO_LANGUAGE_MODULE_KEY:
        if language_model is not None:
            yield _bare(name, language_model)
        return
    modality, _, part = name.partition(".")
    if modality not in modality_submodules:
        return
    submodules = _bare(name, modality_submodules[modality])
    if part == _PROJECTIONS:
        yield submodules.get_submodule("input_projections")
        yield submodules.get_submodule("output_projections")
    else:
        yield submodules.get_submodule(part)


def _bare(name: str, module: nn.Module) -> nn.Module:
    if isinstance(module, DistributedDataParallel):
        raise ConfigError(
            f"cannot freeze {name!r}: it is wrapped for data parallelism, whose buffers are laid "
            "out; freeze before wrapping"
        )
    return module
