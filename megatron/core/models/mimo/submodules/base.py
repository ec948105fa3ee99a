"""One modality: encoders -> combine -> project. Legend: N rows of the modality, H features."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from megatron.core.models.mimo.alignment import Encoded, EncodedRows
from megatron.core.models.mimo.errors import ConfigError, InputError
from megatron.core.models.mimo.submodules.encoder_output import (
    as_rows,
    levels_of,
    run_encoder,
    run_stage,
)
from megatron.core.models.mimo.submodules.state import Offsets, descended_state
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group

PROJECTIONS = ("input_projections", "level_projections", "output_projections")
PARTS = ("encoders", "decoders", *PROJECTIONS)

# (name, encoder, what gives its rows [n, H] for arguments, arguments) -> rows [N, H]
EncoderCall = Callable[
    [str, nn.Module, Callable[[Mapping[str, Any]], Encoded], Mapping[str, Any]], Encoded
]


class ModalitySubmodules(nn.Module):
    """The encoders of one modality and the projection into the language model's width.

    An encoder is any module. It is called with the keyword arguments of its entry in
    ``encoder_inputs`` and returns rows [N, H], or [B, S, H], or a tuple that starts with one of
    these. It may say more about itself:

    - ``output_layout = "sbh"``: it returns [S, B, H] (a ``TransformerBlock`` is known to). The
      shape alone cannot tell, and a wrong guess would mix samples.
    - ``num_levels``: it gives so many further levels of its rows (deepstack), and returns an
      ``EncodedRows``.
    - ``blank_inputs()``: the arguments of the smallest call that it takes. A micro-batch without
      this modality then runs it all the same and drops its rows, so that overlapped data-parallel
      collectives come in the same order on every rank, however the encoder is built.
    - ``rows_per_item(**inputs)``: for the arguments of a call, as host integers, the rows of each
      item (image, clip). It promises that every tensor or list among them holds items along
      dimension 0, and that an item's rows do not depend on other items. Ranks that have the same
      items may then encode some each and exchange the rows.

    Args:
        encoders, decoders: name -> module.
        input_projections, output_projections: at most one module each.
        level_projections: one module for each level, in place of the input projection; none where
            levels have the language model's width already.
        is_first_stage, is_last_stage: this rank's pipeline stage within the modality.
        pg_collection: the modality's process groups; None for Megatron's global ones.

    Attributes:
        encoder_calls: encoder name -> what runs it in place of a plain call.

    Raises:
        ConfigError: (a ``ValueError``) several projections, arguments that are not known.
    """

    def __init__(
        self,
        encoders: Mapping[str, nn.Module] | None = None,
        decoders: Mapping[str, nn.Module] | None = None,
        input_projections: Iterable[nn.Module] | None = None,
        output_projections: Iterable[nn.Module] | None = None,
        is_first_stage: bool = True,
        is_last_stage: bool = True,
        pg_collection: Any = None,
        recompute_projections: bool = False,
        level_projections: Iterable[nn.Module] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        if kwargs:
            raise ConfigError(
                f"{type(self).__name__} got unknown arguments {sorted(kwargs)}; a subclass that "
                "takes more keeps them in its own __init__"
            )
        self.encoders = nn.ModuleDict(encoders or {})
        self.decoders = nn.ModuleDict(decoders or {})
        self.input_projections = nn.ModuleList(input_projections or [])
        self.level_projections = nn.ModuleList(level_projections or [])
        self.output_projections = nn.ModuleList(output_projections or [])
        for part in ("input_projections", "output_projections"):
            count = len(getattr(self, part))
            if count > 1:
                raise ConfigError(
                    f"{type(self).__name__} got {count} {part}; rows go through one, so chain "
                    "them in a torch.nn.Sequential"
                )
        if self.level_projections and self.encoders:
            self._check_levels(self.num_levels)
        self.pg_collection = pg_collection
        self.recompute_projections = recompute_projections
        self._is_first_stage = is_first_stage
        self._is_last_stage = is_last_stage
        self.encoder_calls: dict[str, EncoderCall] = {}

    @classmethod
    def from_spec(
        cls, module_spec: ModuleSpec, is_first_stage: bool = True, is_last_stage: bool = True
    ) -> ModalitySubmodules:
        """Build from a spec whose ``submodules`` hold specs under the names of its parts.

        Input and level projections are built on the last stage, output projections on the first;
        the spec's ``params`` go to the constructor.
        """
        specs = module_spec.submodules or {}
        unknown = sorted(set(specs) - set(PARTS))
        if unknown:
            raise ConfigError(
                f"the spec of {cls.__name__} has submodules {unknown}; expected {list(PARTS)}"
            )
        wanted = {
            "encoders": True,
            "decoders": True,
            "input_projections": is_last_stage,
            "level_projections": is_last_stage and "level_projections" in specs,
            "output_projections": is_first_stage,
        }
        parts = {name: _build_part(specs.get(name)) for name in PARTS if wanted[name]}
        return cls(
            **parts,
            is_first_stage=is_first_stage,
            is_last_stage=is_last_stage,
            **(module_spec.params or {}),
        )

    @property
    def is_first_stage(self) -> bool:
        """True where this rank holds the modality's first stage."""
        return self._is_first_stage

    @property
    def is_last_stage(self) -> bool:
        """True where this rank holds the modality's last stage."""
        return self._is_last_stage

    @property
    def num_levels(self) -> int:
        """How many further levels of rows the encoders give; all give as many.

        Raises:
            ConfigError: encoders whose rows have different numbers of levels.
        """
        levels = {name: levels_of(encoder) for name, encoder in self.encoders.items()}
        if len(set(levels.values())) > 1:
            raise ConfigError(
                f"the encoders of one modality give {levels} levels of their rows; expected the "
                "same number, because their rows are concatenated: give each a modality of its own"
            )
        return max(levels.values(), default=0)

    def encode(self, encoders_data_batch: Mapping[str, Mapping[str, Any]]) -> list[Encoded]:
        """Run every encoder on its inputs: a list of rows [N, H], in the order of ``encoders``.

        Rows come as tensors, and as ``EncodedRows`` where they have levels.

        Raises:
            InputError: inputs for an encoder that does not exist, none for one that does, or an
                encoder output that is not rows.
        """
        if not encoders_data_batch:
            return []
        unknown = sorted(set(encoders_data_batch) - set(self.encoders))
        if unknown:
            raise InputError(
                f"inputs were given for encoders {unknown}, which do not exist; this modality "
                f"has {sorted(self.encoders)}"
            )
        rows = []
        for name, encoder in self.encoders.items():
            if name not in encoders_data_batch:
                raise InputError(
                    f"No inputs found for encoder '{name}'; got inputs for "
                    f"{sorted(encoders_data_batch)}"
                )
            encode = partial(run_encoder, name, encoder)
            inputs, call = encoders_data_batch[name], self.encoder_calls.get(name)
            rows.append(encode(inputs) if call is None else call(name, encoder, encode, inputs))
        return rows

    def combine_embeddings(self, embeddings: list[Encoded]) -> Encoded:
        """Concatenate the encoders' rows: [N_1, H], [N_2, H] ... -> [N_1 + N_2 + ..., H].

        Their levels likewise, level by level.
        """
        if not embeddings:
            raise InputError("Cannot combine empty list of embeddings; give at least one tensor")
        if len(embeddings) == 1:
            return embeddings[0]
        encoded = [EncodedRows.of(rows) for rows in embeddings]
        widths = [rows.rows_NH.size(-1) for rows in encoded]
        if len(set(widths)) > 1:
            raise InputError(
                f"the encoders gave rows of widths {widths}, which cannot be concatenated; "
                "override combine_embeddings or give each encoder its own projection"
            )
        rows_NH, *levels = (
            torch.cat(tensors) for tensors in zip(*(rows.tensors for rows in encoded), strict=True)
        )
        return EncodedRows(rows_NH=rows_NH, levels=tuple(levels)).simplest()

    def project_embeddings(self, embeddings: list[Encoded], is_input: bool = True) -> Encoded:
        """Combine and project: [N, H_encoder] -> [N, H]; unchanged without a projection.

        Each level goes through the projection of its own.

        Args:
            embeddings: as ``combine_embeddings`` takes them.
            is_input: use the input projection, else the output projection.
        """
        combined = EncodedRows.of(self.combine_embeddings(embeddings))
        rows_NH, levels = combined.rows_NH, combined.levels
        for projection in self.input_projections if is_input else self.output_projections:
            rows_NH = _project(projection, rows_NH)
        if levels and self.level_projections:
            self._check_levels(len(levels))
            levels = tuple(map(_project, self.level_projections, levels))
        return EncodedRows(rows_NH=rows_NH, levels=levels).simplest()

    def decode(self, embeddings: torch.Tensor, data_batch: Mapping[str, Any]) -> torch.Tensor:
        """Turn rows [N, H] back into the modality's data; for subclasses that generate it."""
        raise NotImplementedError(
            f"{type(self).__name__} has no decode; subclass it to generate this modality"
        )

    def forward(
        self,
        encoder_inputs: Mapping[str, Mapping[str, Any]] | None = None,
        hidden_states: Encoded | None = None,
    ) -> Encoded | None:
        """Rows [N, H] of this modality, None where there is nothing to encode.

        They come as a tensor, and as ``EncodedRows`` where they have levels.

        Args:
            encoder_inputs: encoder name -> keyword arguments of its call; read on the first
                stage only.
            hidden_states: [N, H_encoder] rows that were encoded already; on a later stage what the
                stage before has given, from which this one's layers go on.
        """
        if encoder_inputs is not None and hidden_states is not None:
            raise InputError("encoder_inputs and hidden_states are mutually exclusive; give one")
        if not (self.is_first_stage and self.is_last_stage):
            return _stage(self, encoder_inputs, hidden_states)
        if hidden_states is not None:
            combined = hidden_states
        elif encoder_inputs:
            combined = self.combine_embeddings(self.encode(encoder_inputs))
        else:
            return None
        return _projected(self, combined)

    def _check_levels(self, levels: int) -> None:
        if levels != len(self.level_projections):
            raise ConfigError(
                f"{type(self).__name__} has {len(self.level_projections)} level_projections for "
                f"{levels} levels of its encoders' rows; give one for each level, or none"
            )

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: Offsets = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Sharded state of everything in this module, what a subclass added included."""
        tp_group = None
        if self.pg_collection is not None:
            metadata = {**(metadata or {}), "dp_cp_group": self.pg_collection.dp_cp}
            tp_group = self.pg_collection.tp
        metadata = ensure_metadata_has_dp_cp_group(metadata)
        return descended_state(self, prefix, sharded_offsets, metadata, tp_group=tp_group)


def _stage(
    modality: ModalitySubmodules,
    encoder_inputs: Mapping[str, Mapping[str, Any]] | None,
    hidden_states: Encoded | None,
) -> Encoded | None:
    """One of several stages: the next one's hidden states, or on the last stage the rows."""
    if len(modality.encoders) != 1:
        raise ConfigError(
            f"{type(modality).__name__} is cut into pipeline stages and has the encoders "
            f"{sorted(modality.encoders)}; expected one: give others a modality of their own"
        )
    ((name, encoder),) = modality.encoders.items()
    if modality.is_first_stage:
        if not encoder_inputs:
            return None
        return run_stage(name, encoder, encoder_inputs[name], None)
    if hidden_states is None:
        return None
    assert torch.is_tensor(hidden_states), "encoders of several stages have no levels"
    hidden = run_stage(name, encoder, {}, hidden_states)
    if not modality.is_last_stage:
        return hidden
    return _projected(modality, as_rows(name, encoder, hidden))


def _projected(modality: ModalitySubmodules, combined: Encoded) -> Encoded:
    if modality.recompute_projections and torch.is_grad_enabled():
        projected: Encoded = checkpoint(
            modality.project_embeddings, [combined], use_reentrant=False
        )
        return projected
    return modality.project_embeddings([combined])


def _project(projection: nn.Module, rows_NH: torch.Tensor) -> torch.Tensor:
    projected = projection(rows_NH)
    if isinstance(projected, tuple):  # Megatron's linear layers: output and bias
        output_NH, bias_H = projected[0], projected[1]
        projected = output_NH if bias_H is None else output_NH + bias_H
    assert torch.is_tensor(projected), "a projection gives one tensor, or an output and a bias"
    return projected


def _build_part(specs: Any) -> Any:
    if isinstance(specs, Mapping):
        return {name: build_module(spec) for name, spec in specs.items()}
    return [build_module(spec) for spec in specs or []]
