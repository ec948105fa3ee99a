"""Parts of a model by name: what the names are, which parameters they hold, and freezing them.

A name is a path of modules: ``language`` and the path inside the language model, or a modality and
the path inside it. Layers are numbered over the whole model, whatever stage holds them, and
``images.projections`` stands for the input, level and output projections.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import nn

from megatron.core.distributed import DistributedDataParallel
from megatron.core.models.mimo.config import MIMO_LANGUAGE_MODULE_KEY, MimoModelConfig
from megatron.core.models.mimo.config.base_configs import HEADS
from megatron.core.models.mimo.errors import ConfigError
from megatron.core.models.mimo.submodules.base import PARTS, PROJECTIONS
from megatron.core.transformer.transformer_block import TransformerBlock

_PROJECTIONS = "projections"
_LAYER = re.compile(r"(.*?\.layers\.\d+)(\..*|$)")


def part_names(mimo_config: MimoModelConfig) -> list[str]:
    """The names that the description of a model gives, in all of its stages."""
    names = [MIMO_LANGUAGE_MODULE_KEY]
    if mimo_config.heads:
        names += [HEADS, *(f"{HEADS}.{name}" for name in mimo_config.heads)]
    for modality, spec in mimo_config.modality_submodules_spec.items():
        names += [modality, f"{modality}.{_PROJECTIONS}"]
        for part in PARTS:
            if part == "level_projections" and part not in (spec.submodules or {}):
                continue  # few models have them
            names.append(f"{modality}.{part}")
            inner = (spec.submodules or {}).get(part)
            if isinstance(inner, Mapping):
                names += [f"{modality}.{part}.{name}" for name in inner]
    return names


def paths_of(model: Any, own: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    """Pair parameters or modules of a model with their paths: the names of parts that hold them.

    Args:
        model: a ``MimoModel``, its modules not wrapped.
        own: what ``named_parameters()`` or ``named_modules()`` of the model gives; what is
            outside of the language model, the modalities and the heads is left out.
    """
    numbers = {
        f"{name}.layers.{position}": f"{name}.layers.{layer.layer_number - 1}"
        for name, block in model.named_modules()
        if isinstance(block, TransformerBlock)
        for position, layer in enumerate(block.layers)
    }
    roots = {
        "language_model.": f"{MIMO_LANGUAGE_MODULE_KEY}.",
        "modality_submodules.": "",
        "heads.": f"{HEADS}.",
    }
    for name, found in own:
        for prefix, root in roots.items():
            if name.startswith(prefix):
                yield root + _renumbered(name, numbers).removeprefix(prefix), found


def paths_by_parameter(model: Any) -> dict[nn.Parameter, tuple[str, ...]]:
    """Map every parameter of a model to the paths by which a part that holds it may be named.

    That is one path, and two for a table that is both the embedding and the output layer.
    """
    paths: dict[nn.Parameter, tuple[str, ...]] = {
        parameter: (path,) for path, parameter in paths_of(model, list(model.named_parameters()))
    }
    language = model.language_model
    if getattr(language, "share_embeddings_and_output_weights", False):
        embedding = f"{MIMO_LANGUAGE_MODULE_KEY}.embedding.word_embeddings.weight"
        both = (embedding, f"{MIMO_LANGUAGE_MODULE_KEY}.output_layer.weight")
        for parameter, (path, *_) in paths.items():
            if path in both:
                paths[parameter] = both
    return paths


def selects(name: str, path: str) -> bool:
    """Whether ``path`` is that of the part called ``name``, or of something inside it."""
    spelled = [name]
    modality, dot, rest = name.partition(".")
    if dot and rest.partition(".")[0] == _PROJECTIONS:
        inner = rest.removeprefix(_PROJECTIONS)
        spelled = [f"{modality}.{part}{inner}" for part in PROJECTIONS]
    return any(path == one or path.startswith(f"{one}.") for one in spelled)


def no_such_part(doing: str, name: str, known: list[str], paths: Iterable[str]) -> ConfigError:
    """The error for a name that no stage has.

    Args:
        doing: "cannot freeze", say.
        name: the name.
        known: the names that ``part_names`` gives.
        paths: paths of parameters, among which similar names are looked for.
    """
    modules = {path.rsplit(".", n)[0] for path in paths for n in range(path.count(".") + 1)}
    near = difflib.get_close_matches(name, sorted(modules | set(known)), n=3)
    hint = f" did you mean {' or '.join(map(repr, near))}?" if near else ""
    return ConfigError(
        f"{doing} {name!r}: no such part;{hint} this model has {known} and the modules inside them"
    )


def freeze_parts(
    model: Any, names: Iterable[str], *, frozen: bool, doing: str = "cannot freeze"
) -> None:
    """Set what is trained; see ``MimoModel.freeze``, and ``no_such_part`` for ``doing``."""
    known = part_names(model.mimo_config)
    role = model.role
    language = MIMO_LANGUAGE_MODULE_KEY
    is_whole = role.is_first_stage(language) and role.is_last_stage(language)
    for name in names:
        _refuse_wrapped(model, name)
        paths = paths_by_parameter(model)
        selected = [
            parameter for parameter, own in paths.items() if any(selects(name, p) for p in own)
        ]
        if not selected and name not in known and (is_whole or not _may_be_elsewhere(name, known)):
            raise no_such_part(doing, name, known, (own[0] for own in paths.values()))
        for parameter in selected:
            parameter.requires_grad_(not frozen)


def _renumbered(name: str, numbers: Mapping[str, str]) -> str:
    match = _LAYER.match(name)
    if match is None or match[1] not in numbers:
        return name
    return numbers[match[1]] + match[2]


def _may_be_elsewhere(name: str, known: list[str]) -> bool:
    """Whether another pipeline stage may have a part that this one does not have."""
    parents = [known_name for known_name in known if name.startswith(f"{known_name}.")]
    if not parents:
        return False
    nearest = max(parents, key=len)
    return not any(other.startswith(f"{nearest}.") for other in known)


def _refuse_wrapped(model: Any, name: str) -> None:
    root = name.partition(".")[0]
    module = dict(model.modality_submodules.items()).get(root)
    if root == MIMO_LANGUAGE_MODULE_KEY:
        module = model.language_model
    if isinstance(module, DistributedDataParallel):
        raise ConfigError(
            f"cannot freeze {name!r}: it is wrapped for data parallelism, whose buffers are laid "
            "out; freeze before wrapping"
        )
