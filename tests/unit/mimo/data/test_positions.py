from __future__ import annotations

import pytest
import torch

from megatron.core.models.mimo.errors import InputError
from megatron.mimo.data import MediaFormat, MediaItem, Sample, SampleCollator, grid_positions


def test_the_example_of_the_qwen2_vl_paper() -> None:
    """Three tokens, a clip of 2 frames of 2 x 3, two tokens: counted by hand."""
    is_media_L = torch.tensor([False] * 3 + [True] * 12 + [False] * 2)
    frames, lines, columns = grid_positions(is_media_L, [(2, 2, 3)]).tolist()
    assert frames == [0, 1, 2, *[3] * 6, *[4] * 6, 6, 7]
    assert lines == [0, 1, 2, 3, 3, 3, 4, 4, 4, 3, 3, 3, 4, 4, 4, 6, 7]
    assert columns == [0, 1, 2, 3, 4, 5, 3, 4, 5, 3, 4, 5, 3, 4, 5, 6, 7]


def test_items_that_follow_each_other_and_time_steps() -> None:
    is_media_L = torch.tensor([True] * 4 + [False])
    assert grid_positions(is_media_L, [(1, 1, 2), (1, 2, 1)]).tolist() == [
        [0, 0, 2, 2, 4],
        [0, 0, 2, 3, 4],
        [0, 1, 2, 2, 4],
    ]
    assert grid_positions(is_media_L[:3], [(3, 1, 1)], time_step=5)[0].tolist() == [0, 5, 10]
    text = grid_positions(torch.zeros(3, dtype=torch.bool), [])
    assert text.tolist() == [[0, 1, 2]] * 3


def test_each_item_has_its_time_step_rounded_down() -> None:
    is_media_L = torch.tensor([True] * 5 + [False] + [True] * 2 + [False])
    frames, lines, _ = grid_positions(
        is_media_L, [(3, 1, 1), (2, 1, 1), (1, 2, 1)], time_step=[1.5, 0.4, 9.0]
    ).tolist()
    assert frames == [0, 1, 3, 4, 4, 5, 6, 6, 8]
    assert lines == [0, 0, 0, 4, 4, 5, 6, 7, 8]


def test_text_goes_on_behind_lines_and_columns_where_frames_do_not_count() -> None:
    is_media_L = torch.tensor([False] + [True] * 6 + [False] * 2)
    positions = grid_positions(is_media_L, [(3, 2, 1)], time_step=4, count_frames=False).tolist()
    assert positions == [
        [0, 1, 1, 5, 5, 9, 9, 3, 4],
        [0, 1, 2, 1, 2, 1, 2, 3, 4],
        [0, 1, 1, 1, 1, 1, 1, 3, 4],
    ]


def test_grids_that_do_not_fit_are_refused() -> None:
    is_media_L = torch.tensor([True, False, True])
    with pytest.raises(InputError, match="2 placeholders for grids"):
        grid_positions(is_media_L, [(1, 1, 3)])
    with pytest.raises(InputError, match="begins at token 0 and is interrupted"):
        grid_positions(is_media_L, [(1, 1, 2)])
    with pytest.raises(InputError, match="3 time steps for 2 grids"):
        grid_positions(is_media_L, [(1, 1, 1), (1, 1, 1)], time_step=[1, 2, 3])


def test_a_batch_counts_on_behind_a_sample() -> None:
    formats = {"images": MediaFormat(encoder="e", inputs={"x": (torch.float32, (1,))})}
    collate = SampleCollator(
        seq_length=6,
        vocab_size=8,
        pad_id=0,
        special_token_ids={"images": 9},
        media_formats=formats,
        mrope=True,
    )
    ids_L = torch.tensor([9, 9, 9, 1])
    one = Sample(
        name="s",
        token_ids=ids_L,
        is_label=ids_L < 8,
        media=(MediaItem(modality="images", encoder="e", inputs={"x": torch.ones(1)}, rows=3),),
        position_ids=grid_positions(ids_L == 9, [(1, 1, 3)]),
    )
    positions = collate([one])["position_ids"]
    assert positions.tolist() == [[[0, 0, 0, 3, 4, 5]], [[0, 0, 0, 3, 4, 5]], [[0, 1, 2, 3, 4, 5]]]
    assert one.prompt().position_ids.shape == (3, 3)
    bad = Sample(
        name="b", token_ids=ids_L, is_label=ids_L < 8, media=one.media, position_ids=ids_L[:2]
    )
    with pytest.raises(InputError, match=r"sample b: position_ids are torch.int64 \[2\]"):
        collate([bad])
