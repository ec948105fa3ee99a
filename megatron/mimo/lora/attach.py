"""Adapters on the parts of a model that are named."""

from __future__ import annotations

import re
from typing import Any

from megatron.core.models.mimo.config import MIMO_LANGUAGE_MODULE_KEY
from megatron.core.models.mimo.errors import ConfigError, UnsupportedError
from megatron.core.models.mimo.model.freezing import freeze_parts, paths_of, selects
from megatron.mimo.lora.adapter import adapt, adapted, is_adaptable, merge
from megatron.mimo.lora.settings import OF_DELTA_NETS, LoraSettings

__all__ = ["add_adapters", "merge_adapters", "require_adapters"]


def add_adapters(model: Any, settings: LoraSettings, *, seed: int = 1) -> list[str]:
    """Freeze the named parts of a ``MimoModel`` and put adapters beside their linear layers.

    Call it before the model is wrapped. The model computes what it did, until it is trained.

    Args:
        model: this rank's part of the model.
        settings: which layers.
        seed: of the adapters' values, equal on all ranks.

    Returns:
        The paths of this rank's layers that have an adapter now; see ``require_adapters``.

    Raises:
        ConfigError: no stage can have such a part, or it is a single layer.
        UnsupportedError: a layer that is asked for and takes no adapter.
    """
    for name in settings.modules:
        if re.search(r"\.layers(\.|$)", name):
            raise ConfigError(
                f"--lora {name}: adapters go beside all layers of a stack, which checkpoints keep "
                f"as one; name {name.partition('.layers')[0]!r}, and choose by --lora-targets"
            )
    freeze_parts(model, settings.modules, frozen=True, doing="--lora")
    found = []
    for path, module in paths_of(model, list(model.named_modules())):
        if path.rpartition(".")[2] not in settings.targets:
            continue
        if not any(selects(name, path) for name in settings.modules):
            continue
        if path.endswith(OF_DELTA_NETS) and not (
            settings.are_targets_chosen or is_adaptable(module)
        ):
            continue  # of a wrapped encoder, which has layers by these names too
        _refuse_others(model, path, module)
        adapt(module, settings, path=path, seed=seed)
        found.append(path)
    return found


def require_adapters(settings: LoraSettings, found: list[str]) -> None:
    """Refuse parts without any layer that takes an adapter.

    Args:
        settings: which were asked for.
        found: paths of layers with an adapter, of all ranks.

    Raises:
        ConfigError: naming the part, or the target that was asked for.
    """
    for name in settings.modules:
        if not any(selects(name, path) for path in found):
            raise ConfigError(
                f"--lora {name}: it has no layer called {', '.join(settings.targets)}; name a part "
                "that has, or other --lora-targets"
            )
    for target in settings.targets if settings.are_targets_chosen else ():
        if not any(path.endswith(f".{target}") for path in found):
            raise ConfigError(
                f"--lora-targets {target}: {', '.join(settings.modules)} has no such layer"
            )


def merge_adapters(model: Any) -> int:
    """Add every adapter to its layer's weight and take it off.

    The model computes the same, up to rounding, and has the parameters that it had without
    adapters. Call it on a model that is not wrapped, on every rank.

    Returns:
        How many adapters this rank merged.
    """
    layers = [layer for _, layer in adapted(model)]
    for layer in layers:
        merge(layer)
    return len(layers)


def _refuse_others(model: Any, path: str, module: Any) -> None:
    if not is_adaptable(module):
        raise UnsupportedError(
            f"{path} is a {type(module).__name__}; adapters go beside Megatron's column- and "
            "row-parallel linear layers: name other parts with --lora or --lora-targets"
        )
    is_output = path == f"{MIMO_LANGUAGE_MODULE_KEY}.output_layer"
    if is_output and model.language_model.share_embeddings_and_output_weights:
        raise UnsupportedError(
            f"{path} is the embedding, which takes no adapter; leave it out of --lora-targets"
        )
