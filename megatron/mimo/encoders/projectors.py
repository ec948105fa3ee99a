"""Projectors: from an encoder's rows to rows of the language model's width.

Shape legend: N rows, I input width, H output width, G = s * s rows of a square of s x s.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from torch import Tensor, nn

from megatron.core.models.mimo.errors import ConfigError, InputError
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.mimo.encoders.plain import activation_function
from megatron.mimo.layers.norm import Norm

__all__ = ["PooledProjector", "Projector", "SquareProjector", "join_squares"]


class Projector(MegatronModule):
    """One linear layer, or several with an activation between them, tensor-parallel.

    Layers are ``linear_fc1``, ``linear_fc2`` ...: the odd ones are split over their outputs, the
    even ones over their inputs; the last of an odd number gathers its outputs.

    Args:
        config: of the language model: precision, initialisation, tensor parallelism.
        input_size: I.
        output_size: H; also the width between layers, unless ``hidden_size`` says otherwise.
        num_layers: linear layers.
        activation: between layers, by its name in Hugging Face's configurations.
        bias: whether layers have one.
        hidden_size: width between layers.
        pg_collection: Megatron's process groups; the global ones by default.

    Raises:
        ConfigError: sizes that are not positive, or that tensor parallelism does not divide.
        UnsupportedError: unknown activation.
    """

    def __init__(
        self,
        config: TransformerConfig,
        *,
        input_size: int,
        output_size: int,
        num_layers: int = 2,
        activation: str = "gelu",
        bias: bool = True,
        hidden_size: int | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        # Rows of media are not spread over the tensor-parallel group, as a sequence is.
        alone = {"sequence_parallel": False, "tp_comm_overlap": False}
        super().__init__(replace(config, variable_seq_lengths=False, **alone))
        if pg_collection is None:
            pg_collection = ProcessGroupCollection.use_mpu_process_groups()
        self.tp_group = pg_collection.tp
        self.activation = activation_function(activation)
        self.num_layers = num_layers
        hidden_size = output_size if hidden_size is None else hidden_size
        widths = [input_size, *[hidden_size] * (num_layers - 1), output_size]
        if num_layers < 1 or min(widths) < 1:
            raise ConfigError(
                f"a projector of {num_layers} layers with widths {widths}; expected positive "
                "numbers"
            )
        # What is split: the output of every odd layer.
        if any(width % self.tp_group.size() for width in widths[1::2]):
            raise ConfigError(
                f"a projector with widths {widths} is split over {self.tp_group.size()} "
                f"tensor-parallel ranks at {widths[1::2]}; expected multiples"
            )
        for number in range(1, num_layers + 1):
            layer = self._layer(number, widths[number - 1], widths[number], bias=bias)
            self.add_module(f"linear_fc{number}", layer)

    def _layer(
        self, number: int, inputs: int, outputs: int, *, bias: bool
    ) -> ColumnParallelLinear | RowParallelLinear:
        given = {
            "config": self.config,
            "init_method": self.config.init_method,
            "bias": bias,
            "skip_bias_add": False,
            "tp_group": self.tp_group,
        }
        if number % 2:
            is_last = number == self.num_layers
            return ColumnParallelLinear(inputs, outputs, gather_output=is_last, **given)
        return RowParallelLinear(inputs, outputs, input_is_parallel=True, **given)

    def forward(self, rows_NI: Tensor) -> Tensor:
        """[N, I] -> [N, H]; N may be 0."""
        rows = rows_NI
        for number in range(1, self.num_layers + 1):
            rows, _ = self.get_submodule(f"linear_fc{number}")(rows)
            if number < self.num_layers:
                rows = self.activation(rows)
        return rows


def join_squares(rows_NI: Tensor, *, grid: tuple[int, int], side: int) -> Tensor:
    """Put the rows of each square of neighbours side by side.

    Args:
        rows_NI: items one after the other, each a grid of rows, line by line.
        grid: height and width of an item's grid.
        side: s, which divides both.

    Returns:
        [N / G, G * I], squares line by line; within a square its rows line by line.
    """
    height, width = grid[0] // side, grid[1] // side
    split = rows_NI.reshape(-1, height, side, width, side, rows_NI.shape[-1])
    return split.transpose(2, 3).reshape(-1, side * side * rows_NI.shape[-1])


class SquareProjector(MegatronModule):
    """Joins the rows of each square of neighbours and projects them: a quarter of the rows for 2.

    What is called a patch merger (``norm="rows"``) or a pixel shuffle (``norm="squares"``).

    Args:
        config: of the language model, as for :class:`Projector`.
        grid: height and width of every item's grid of rows.
        side: s, of a square.
        input_size: I, of a row.
        output_size: H.
        norm: LayerNorm of "rows" before they are joined, of "squares" after it, or "none".
        layernorm_epsilon: of this norm.
        num_layers: as for :class:`Projector`.
        activation: as for :class:`Projector`.
        bias: as for :class:`Projector`.
        hidden_size: as for :class:`Projector`.
        pg_collection: as for :class:`Projector`.

    Raises:
        ConfigError: a grid that is not divisible into squares; see also :class:`Projector`.
        UnsupportedError: unknown activation.
    """

    def __init__(
        self,
        config: TransformerConfig,
        *,
        grid: tuple[int, int],
        side: int,
        input_size: int,
        output_size: int,
        norm: Literal["rows", "squares", "none"] = "squares",
        layernorm_epsilon: float = 1e-6,
        num_layers: int = 2,
        activation: str = "gelu",
        bias: bool = True,
        hidden_size: int | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__(config)
        _check_squares(grid, side)
        normed = {"rows": input_size, "squares": input_size * side**2, "none": 0}
        if norm not in normed:
            raise ConfigError(f"norm is {norm!r}; expected one of {', '.join(normed)}")
        self.grid, self.side, self.norm_of = grid, side, norm
        # Replicated over the tensor-parallel group, with equal inputs and so equal gradients.
        self.norm = nn.LayerNorm(normed[norm], layernorm_epsilon) if normed[norm] else None
        self.projector = Projector(
            config,
            input_size=input_size * side**2,
            output_size=output_size,
            num_layers=num_layers,
            activation=activation,
            bias=bias,
            hidden_size=hidden_size,
            pg_collection=pg_collection,
        )

    def rows_of(self, rows: int) -> int:
        """Rows that so many are joined to."""
        return rows // self.side**2

    def forward(self, rows_NI: Tensor) -> Tensor:
        """[N, I] -> [N / G, H]; N may be 0.

        Raises:
            InputError: rows that are not whole items.
        """
        _check_items(rows_NI, self.grid)
        if self.norm is not None and self.norm_of == "rows":
            rows_NI = self.norm(rows_NI)
        joined = join_squares(rows_NI, grid=self.grid, side=self.side)
        if self.norm is not None and self.norm_of == "squares":
            joined = self.norm(joined)
        projected: Tensor = self.projector(joined)
        return projected


class PooledProjector(MegatronModule):
    """Averages the rows of each square of neighbours, norms what comes out, and projects it.

    The norm is RMSNorm times 1 + weight, as Gemma's.

    Args:
        config: of the language model, as for :class:`Projector`.
        grid: height and width of every item's grid of rows.
        side: of a square.
        input_size: I.
        output_size: H.
        layernorm_epsilon: of the norm.
        pg_collection: as for :class:`Projector`.

    Raises:
        ConfigError: a grid that is not divisible into squares; see also :class:`Projector`.
    """

    def __init__(
        self,
        config: TransformerConfig,
        *,
        grid: tuple[int, int],
        side: int,
        input_size: int,
        output_size: int,
        layernorm_epsilon: float,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__(config)
        _check_squares(grid, side)
        self.grid, self.side = grid, side
        # Replicated over the tensor-parallel group, with equal inputs and so equal gradients.
        gemma = replace(
            config,
            normalization="RMSNorm",
            layernorm_zero_centered_gamma=True,
            memory_efficient_layer_norm=False,
            sequence_parallel=False,
            tp_comm_overlap=False,
        )
        self.norm = Norm(gemma, input_size, layernorm_epsilon)
        self.projector = Projector(
            config,
            input_size=input_size,
            output_size=output_size,
            num_layers=1,
            bias=False,
            pg_collection=pg_collection,
        )

    def rows_of(self, rows: int) -> int:
        """Rows that so many are averaged to."""
        return rows // self.side**2

    def forward(self, rows_NI: Tensor) -> Tensor:
        """[N, I] -> [N / G, H]; N may be 0.

        Raises:
            InputError: rows that are not whole items.
        """
        _check_items(rows_NI, self.grid)
        joined = join_squares(rows_NI, grid=self.grid, side=self.side)
        pooled = joined.unflatten(-1, (self.side**2, rows_NI.size(-1))).mean(dim=-2)
        projected: Tensor = self.projector(self.norm(pooled))
        return projected


def _check_squares(grid: tuple[int, int], side: int) -> None:
    if side < 1 or min(grid) < 1 or any(length % side for length in grid):
        raise ConfigError(
            f"a grid of {grid[0]} x {grid[1]} rows is not divisible into squares of "
            f"{side} x {side}; change the side, or the size of images"
        )


def _check_items(rows_NI: Tensor, grid: tuple[int, int]) -> None:
    per_item = grid[0] * grid[1]
    if len(rows_NI) % per_item:
        raise InputError(
            f"{len(rows_NI)} rows; expected a multiple of {per_item}, as every item is a grid "
            f"of {grid[0]} x {grid[1]}"
        )
