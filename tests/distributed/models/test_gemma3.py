"""Gemma 3 beyond its tiny configuration: blocks of image tokens, ties, windows, refusals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from megatron.core.models.mimo.errors import InputError, UnsupportedError
from megatron.mimo.models import load_family
from tests.distributed.models.expected import compute_expected
from tests.distributed.models.ranks import Layout
from tests.distributed.models.test_families import check
from tests.rank_pool import RankPool

FAMILY = load_family("gemma3")


def as_published(config: Any) -> None:
    """Tied, with scaled positions, five layers in windows for one without."""
    text = config.text_config
    config.tie_word_embeddings = True
    text.num_hidden_layers = 6
    text.layer_types = [*["sliding_attention"] * 5, "full_attention"]
    text.rope_parameters["full_attention"] = {
        "rope_type": "linear",
        "rope_theta": 500_000.0,
        "factor": 8.0,
    }


def with_larger_blocks(config: Any) -> None:
    """Images as long as the window, which a row between two ranks cuts through."""
    config.mm_tokens_per_image, config.text_config.sliding_window = 16, 16


@pytest.mark.parametrize(
    ("change", "layout"),
    [
        (as_published, Layout(tp=2, changes={"sequence_parallel": True})),
        (as_published, Layout(pp=2)),
        (with_larger_blocks, Layout(cp=2)),
        (with_larger_blocks, Layout(tp=2, cp=2)),
    ],
    ids=["published-tp2-sp", "published-pp2", "blocks-cp2", "blocks-tp2-cp2"],
)
def test_other_configurations(
    ranks: RankPool, change: Callable[[Any], None], layout: Layout
) -> None:
    (expected,) = ranks(1)(compute_expected, "gemma3", change)
    check(ranks, "gemma3", layout, expected)


def test_the_reference_lets_image_tokens_see_each_other() -> None:
    """So that what is compared above is not causal on both sides."""
    config = FAMILY.tiny()
    torch.manual_seed(1)
    model: Any = FAMILY.reference(config).eval()
    example = FAMILY.example(config, torch.Generator().manual_seed(2))
    with torch.no_grad():
        seeing, blind = (
            model(**example | {"token_type_ids": types}).logits
            for types in (example["token_type_ids"], torch.zeros_like(example["token_type_ids"]))
        )
    assert (seeing - blind).abs().max() > 0.1


@pytest.mark.parametrize(
    ("part", "name", "value", "message"),
    [
        ("", "mm_tokens_per_image", 9, r"mm_tokens_per_image is 9, and an image has 4 x 4"),
        ("", "mm_tokens_per_image", 8, "mm_tokens_per_image is 8"),
        ("", "mm_tokens_per_image", 0, "mm_tokens_per_image is 0"),
        ("text_config", "sliding_window", 3, r"sliding_window is 3; expected at least mm_tokens"),
        ("text_config", "model_type", "llama", r"text_config\.model_type is 'llama'"),
        (
            "text_config",
            "final_logit_softcapping",
            3.0,
            r"final_logit_softcapping is 3\.0; expected",
        ),
        ("text_config", "use_bidirectional_attention", True, "use_bidirectional_attention is True"),
    ],
)
def test_what_it_does_not_have_is_refused(part: str, name: str, value: Any, message: str) -> None:
    config: Any = FAMILY.tiny()
    setattr(getattr(config, part) if part else config, name, value)
    with pytest.raises(UnsupportedError, match=message):
        FAMILY.arguments(config)


def test_a_short_window_without_layers_that_slide_is_none() -> None:
    config: Any = FAMILY.tiny()
    config.text_config.sliding_window = 3
    config.text_config.layer_types = ["full_attention"] * 2
    assert "window_size" not in FAMILY.arguments(config)


def given(tokens: list[int], images: int, types: list[int] | None) -> dict[str, torch.Tensor]:
    features = {"input_ids": torch.tensor([tokens])}
    if images:
        features["pixel_values"] = torch.zeros(images, 3, 32, 32)
    if types is not None:
        features["token_type_ids"] = torch.tensor([types])
    return features


def test_tokens_of_images_and_types_have_to_fit() -> None:
    config, image = FAMILY.tiny(), [4] * 4
    one = [9, 5, *image, 6, 9]
    types = [int(token == 4) for token in one]
    sample = FAMILY.sample(config, given(one, 1, types))
    assert [item.rows for item in sample.media] == [4]
    assert sample.is_label.tolist() == [token != 4 for token in one]
    assert FAMILY.sample(config, given([9, 9], 0, None)).media == ()
    for tokens, images, wrong, message in (
        (one, 1, None, "token_type_ids are missing; expected 1 at tokens that are"),
        (one, 1, [0] * len(one), "token_type_ids are others; expected 1"),
        (one, 2, types, r"runs of \[4\] image tokens for 2 images"),
        ([*image, *image], 2, [1] * 8, r"runs of \[8\] image tokens for 2 images"),
        ([9, 9], 1, [0, 0], r"runs of \[\] image tokens for 1 images"),
    ):
        with pytest.raises(InputError, match=message):
            FAMILY.sample(config, given(tokens, images, wrong))
