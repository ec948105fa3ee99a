"""The description of a multimodal model: validated once, here, on every rank."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from megatron.core.models.mimo.config.role import MIMO_LANGUAGE_MODULE_KEY
from megatron.core.models.mimo.errors import ConfigError
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig

if TYPE_CHECKING:
    from megatron.core.hyper_comm_grid import HyperCommGrid

KV_FORMATS = ("sbhd", "thd")
ENCODER_SPLITS = ("auto", "never", "cp", "tp", "tp-cp")
INPUTS_OF = ("encoders", "language")
HEADS = "heads"  # as a part of a model
TEXT = "text"  # the stream of ordinary tokens; no modality may take its name
_RESERVED_NAMES = (TEXT, MIMO_LANGUAGE_MODULE_KEY)


@dataclass(frozen=True, kw_only=True)
class HeadSpec:
    """A further head on the last pipeline stage, with a loss of its own.

    Attributes:
        module: spec of a module that is called with ``HeadInputs`` (``model/language/heads.py``)
            and gives its loss per position.
        weight: weight of its loss in the sum that is trained.
    """

    module: ModuleSpec
    weight: float = 1.0


@dataclass
class MimoModelConfig:
    """What a ``MimoModel`` is built from.

    The fields are positional for scripts written against megatron-core 0.19.

    Args:
        language_model_spec: spec of the language model; its ``params`` hold ``config``
            (a ``TransformerConfig``) and, under pipeline parallelism, ``pre_process`` and
            ``post_process``.
        modality_submodules_spec: modality name -> spec of its ``ModalitySubmodules``.
        special_token_ids: modality name -> placeholder token id. Any integer that is not a text
            token; negative ids (-200) are fine because placeholders are never looked up.
        module_to_grid_map: module name -> process grid, for layouts in which modules have
            grids of their own; None for the uniform layout.
        kv_format: "sbhd", or "thd" for packed sequences.
        encoder_split: over which ranks that hold the same encoder inputs the encoders' work is
            divided: "cp", "tp", "tp-cp", "never", or "auto", which is all that each encoder
            allows (see ``ModalitySubmodules``). One value for all modalities, or modality ->
            value, "auto" for those left out. What cannot be divided as asked is refused when the
            model is built.
        modality_inputs_of: with grids, to whose data-parallel replica the ``modality_inputs`` of a
            forward belong. "encoders": to that of each modality, as megatron-core's MIMO has it;
            rows are taken to the language model's layout in every forward. "language": every rank
            of a replica of the language model has the same inputs; the schedule ``EncodeFirst``
            deals the work out and trains.
        heads: name -> further head; a model that has any gives ``Losses`` in place of the loss
            per token.

    Raises:
        ConfigError: (a ``ValueError``) names that are reserved, placeholder ids that are shared
            or not integers, an unknown ``kv_format`` or ``encoder_split``, a grid map whose keys
            are not the modules, heads that are none.
    """

    language_model_spec: ModuleSpec = field(default_factory=ModuleSpec)
    modality_submodules_spec: dict[str, ModuleSpec] = field(default_factory=dict)
    special_token_ids: dict[str, int] = field(default_factory=dict)
    module_to_grid_map: dict[str, HyperCommGrid] | None = None
    kv_format: str = "sbhd"
    encoder_split: str | Mapping[str, str] = "auto"
    heads: Mapping[str, HeadSpec] = field(default_factory=dict)
    modality_inputs_of: str = "encoders"

    def __post_init__(self) -> None:
        for name, values in (("kv_format", KV_FORMATS), ("modality_inputs_of", INPUTS_OF)):
            if getattr(self, name) not in values:
                raise ConfigError(f"{name} is {getattr(self, name)!r}; expected one of {values}")
        for name in self.modality_submodules_spec:
            if name in _RESERVED_NAMES or not name or "." in name:
                raise ConfigError(
                    f"a modality cannot be called {name!r}: {', '.join(_RESERVED_NAMES)} are "
                    "reserved and a name has no dot; rename the key in modality_submodules_spec"
                )
        _check_special_token_ids(self.special_token_ids)
        if self.module_to_grid_map:
            _check_grid_names(self.module_to_grid_map, self.modality_submodules_spec)
        _check_encoder_split(self.encoder_split, self.modality_submodules_spec)
        _check_heads(self.heads, self.modality_submodules_spec)

    def encoder_split_of(self, modality: str) -> str:
        """The value of ``encoder_split`` for one modality."""
        if isinstance(self.encoder_split, str):
            return self.encoder_split
        return self.encoder_split.get(modality, "auto")


def language_config(mimo_config: MimoModelConfig) -> TransformerConfig:
    """The language model's ``TransformerConfig``, from its spec.

    Raises:
        ConfigError: the spec holds none.
    """
    params = mimo_config.language_model_spec.params or {}
    if "config" not in params:
        raise ConfigError(
            "language_model_spec.params has no 'config'; expected the language model's "
            f"TransformerConfig beside {sorted(params)}"
        )
    config: TransformerConfig = params["config"]
    return config


def _check_special_token_ids(special_token_ids: Mapping[str, int] | None) -> None:
    owner: dict[int, str] = {}
    for name, token_id in (special_token_ids or {}).items():
        if isinstance(token_id, bool) or not isinstance(token_id, int):
            raise ConfigError(
                f"special_token_ids[{name!r}] is {token_id!r} ({type(token_id).__name__}); "
                "expected an integer token id"
            )
        if token_id in owner:
            raise ConfigError(
                f"modalities {owner[token_id]!r} and {name!r} share the placeholder token id "
                f"{token_id}; give each modality an id of its own"
            )
        owner[token_id] = name


def _check_grid_names(grids: Mapping[str, object], modalities: Mapping[str, object]) -> None:
    expected = {*modalities, MIMO_LANGUAGE_MODULE_KEY}
    if set(grids) != expected:
        raise ConfigError(
            "module_to_grid_map keys must match the modality names and "
            f"{MIMO_LANGUAGE_MODULE_KEY!r}. Missing: {sorted(expected - set(grids))}, "
            f"Extra: {sorted(set(grids) - expected)}"
        )


def _check_heads(heads: Mapping[str, HeadSpec], modalities: Mapping[str, object]) -> None:
    if heads and HEADS in modalities:
        raise ConfigError(
            f"a modality is called {HEADS!r}, which names the heads of a model that has any; "
            "rename the key in modality_submodules_spec"
        )
    for name, head in heads.items():
        if name in _RESERVED_NAMES or not name or "." in name:
            raise ConfigError(
                f"a head cannot be called {name!r}: {', '.join(_RESERVED_NAMES)} are reserved and "
                "a name has no dot; rename the key in heads"
            )
        if not isinstance(head, HeadSpec) or not math.isfinite(head.weight):
            raise ConfigError(
                f"heads[{name!r}] is {head!r}; expected a HeadSpec of a module's spec and a finite "
                "weight"
            )


def _check_encoder_split(
    encoder_split: str | Mapping[str, str], modalities: Mapping[str, object]
) -> None:
    values = {"all": encoder_split} if isinstance(encoder_split, str) else encoder_split
    unknown = [] if isinstance(encoder_split, str) else sorted(set(values) - set(modalities))
    if unknown:
        raise ConfigError(
            f"encoder_split names {unknown}, and the modalities are {sorted(modalities)}"
        )
    for value in values.values():
        if value not in ENCODER_SPLITS:
            raise ConfigError(f"encoder_split is {value!r}; expected one of {ENCODER_SPLITS}")
