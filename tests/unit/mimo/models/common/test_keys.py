"""Tables of parameter names: transforms against plain loops, rows, spellings, refusals."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron.core.models.mimo.errors import ConfigError, InputError
from megatron.mimo.models.common.keys import (
    Concatenated,
    FusedQKV,
    KeyEntry,
    KeyTable,
    PaddedVocabulary,
    Reshaped,
    Same,
    Transform,
)

HEADS, GROUPS, SIZE, WIDTH = 6, 2, 4, 5


def numbered(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("transform", "shapes"),
    [
        (Same(), [(3, 2)]),
        (Concatenated(2), [(4, 3), (4, 3)]),
        (Concatenated(3), [(2,), (2,), (2,)]),
        (FusedQKV(heads=6, groups=2, head_size=4), [(24, 5), (8, 5), (8, 5)]),
        (FusedQKV(heads=6, groups=6, head_size=4), [(24,), (24,), (24,)]),
        (FusedQKV(heads=6, groups=6, head_size=4, missing=("k",)), [(24,), (24,)]),
        (PaddedVocabulary(10, 16), [(10, 3)]),
        (PaddedVocabulary(10), [(10, 3)]),
        (Reshaped((4, 12), (4, 3, 2, 2)), [(4, 3, 2, 2)]),
    ],
)
def test_there_and_back_is_bit_exact(transform: Transform, shapes: list[tuple[int, ...]]) -> None:
    parts = [numbered(*shape) for shape in shapes]
    ours = transform.to_mimo(parts)
    back = transform.to_hf(ours)
    assert ours.dtype == torch.bfloat16
    assert [tuple(part.shape) for part in back] == shapes
    for part, again in zip(parts, back, strict=True):
        assert torch.equal(part, again)


def test_fused_qkv_is_ordered_group_by_group() -> None:
    q, k, v = numbered(HEADS * SIZE, WIDTH), numbered(GROUPS * SIZE, WIDTH), numbered(8, WIDTH)
    ours = FusedQKV(heads=HEADS, groups=GROUPS, head_size=SIZE).to_mimo([q, k, v])
    expected = []
    for group in range(GROUPS):
        for head in range(group * HEADS // GROUPS, (group + 1) * HEADS // GROUPS):
            expected += [q[head * SIZE + i] for i in range(SIZE)]
        for part in (k, v):
            expected += [part[group * SIZE + i] for i in range(SIZE)]
    assert torch.equal(ours, torch.stack(expected))


def test_missing_key_bias_is_zero() -> None:
    q, v = numbered(8), numbered(8)
    ours = FusedQKV(heads=2, groups=2, head_size=4, missing=("k",)).to_mimo([q, v])
    assert torch.equal(ours.reshape(2, 3, 4)[:, 1], torch.zeros(2, 4, dtype=torch.bfloat16))


def test_padding_is_zero() -> None:
    ours = PaddedVocabulary(10, 16).to_mimo([numbered(10, 3)])
    assert ours.shape == (16, 3)
    assert not ours[10:].any()


def test_entries_of_layers() -> None:
    row = KeyEntry(
        mimo="a.{i}.w", hf=("b.{i}.q", "b.{i}.k"), transform=Concatenated(2), layers=range(2)
    )
    assert [(one.mimo, one.hf) for one in row.each()] == [
        ("a.0.w", ("b.0.q", "b.0.k")),
        ("a.1.w", ("b.1.q", "b.1.k")),
    ]


@pytest.mark.parametrize("hf", [("b.w",), ("b.{i}.w", "b.w")])
def test_a_row_without_number_on_one_side_is_refused(hf: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match=r"expected '\{i\}' in all of its names"):
        KeyEntry(mimo="a.{i}.w", hf=hf, layers=range(2))


@pytest.mark.parametrize(
    ("rows", "named"),
    [
        ((KeyEntry(mimo="a", hf=("x",)), KeyEntry(mimo="a", hf=("y",))), "parameter 'a'"),
        ((KeyEntry(mimo="a", hf=("x",)), KeyEntry(mimo="b", hf=("x",))), "Hugging Face weight 'x'"),
    ],
)
def test_a_name_in_two_rows_is_refused(rows: tuple[KeyEntry, ...], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        KeyTable(entries=rows)


def test_spellings_follow_each_other() -> None:
    table = KeyTable(
        entries=(KeyEntry(mimo="a", hf=("tower.w",)),),
        aliases=(("model.", ""), ("tower.vision_model.", "tower.")),
        carried=("tower.layers.23.*", "tower.post.weight"),
    )
    assert table.canonical("model.tower.vision_model.w") == "tower.w"
    assert table.canonical("tower.w") == "tower.w"
    assert table.is_carried("tower.layers.23.mlp.weight")
    assert not table.is_carried("tower.layers.2.mlp.weight")


def test_shapes_of_a_row() -> None:
    transform = FusedQKV(heads=HEADS, groups=GROUPS, head_size=SIZE)
    row = KeyEntry(mimo="a", hf=("q", "k", "v"), transform=transform)
    table = KeyTable(entries=(row,))
    assert table.hf_shapes(row, (40, 5)) == {"q": (24, 5), "k": (8, 5), "v": (8, 5)}
    with pytest.raises(InputError, match=r"a of shape \[41, 5\] does not fit FusedQKV"):
        table.hf_shapes(row, (41, 5))
