"""What LLaVA and LLaVA-NeXT say of names, tiles and conversations, against transformers."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from megatron.core.models.mimo.errors import InputError, UnsupportedError
from megatron.mimo.checkpoints.match import match_names
from megatron.mimo.models import family_of, load_family

LLAVA, NEXT = load_family("llava"), load_family("llava_next")


@pytest.mark.parametrize("family", [LLAVA, NEXT], ids=lambda family: family.name)
def test_names_in_every_spelling(family: Any, tmp_path: Any) -> None:
    from safetensors import safe_open

    config = family.tiny()
    assert family_of(config) is family
    model, table = family.reference(config), family.keys(config)
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        written = list(file.keys())
    wanted = {name for row in table.each() for name in row.hf}
    assert wanted < set(written)  # rows have the names that are written
    old = [name.replace("vision_tower.", "vision_tower.vision_model.") for name in written]
    old.append("vision_tower.vision_model.embeddings.position_ids")
    for names in (written, old, list(model.state_dict())):
        match = match_names(names, table, source="the file")
        assert match.given.keys() == wanted
        assert len(match.given) + len(match.carried) == len(names)
        assert any("encoder.layers.2." in name for name in match.carried)  # above the features


def numbered_rows(config: Any, size: tuple[int, int]) -> list[int]:
    """transformers' order of an image's rows, the newline -1."""
    model = NEXT.reference(config).model
    side = config.vision_config.image_size // config.vision_config.patch_size
    from megatron.mimo.models.llava_next.tiles import tiles_of

    tiles = 1 + tiles_of(config, size)[0] * tiles_of(config, size)[1]
    numbers = torch.arange(tiles * side**2).view(tiles, side**2, 1).float()
    (packed,), _ = model.pack_image_features(
        [numbers], torch.tensor([size]), "default", image_newline=torch.tensor([-1.0])
    )
    return packed.flatten().long().tolist()


def test_rows_are_in_the_order_of_transformers() -> None:
    from transformers.image_processing_utils import select_best_resolution
    from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

    from megatron.mimo.models.llava_next.tiles import best_resolution, row_sources, tiles_of

    config = NEXT.tiny()
    rng = random.Random(0)
    sizes = [(rng.randint(4, 150), rng.randint(4, 150)) for _ in range(60)]
    for size in [(24, 24), (48, 48), (24, 48), (1, 200), (200, 1), *sizes]:
        pinpoints = config.image_grid_pinpoints
        assert best_resolution(size, pinpoints) == tuple(select_best_resolution(size, pinpoints))
        rows, columns = tiles_of(config, size)
        assert rows * columns + 1 == image_size_to_num_patches(size, pinpoints, 24)
    for size in [(1, 200), (200, 1), (49, 147), *sizes[:12]]:  # 49: 1.9999999999999998 lines
        assert row_sources(config, size).tolist() == numbered_rows(config, size), size


def test_tiles_are_taken_padded_or_one_after_the_other() -> None:
    config = NEXT.tiny()
    features = NEXT.example(config, torch.Generator().manual_seed(0))
    padded = NEXT.sample(config, features)
    counts = [len(item.inputs["pixel_values"]) for item in padded.media]
    flat = torch.cat(
        [image[:count] for image, count in zip(features["pixel_values"], counts, strict=True)]
    )
    packed = NEXT.sample(config, {**features, "pixel_values": flat})
    for one, other in zip(padded.media, packed.media, strict=True):
        assert one.inputs["pixel_values"].equal(other.inputs["pixel_values"])
        assert one.rows == other.rows
    with pytest.raises(InputError, match="were they made with another image_grid_pinpoints"):
        NEXT.sample(config, {**features, "pixel_values": flat[:-1]}, name="a")
    with pytest.raises(InputError, match="sample a: expected pixel_values and image_sizes"):
        NEXT.sample(config, {"input_ids": features["input_ids"], "pixel_values": flat}, name="a")


def test_a_tile_has_to_give_one_row_per_patch() -> None:
    config = NEXT.tiny()
    config.vision_feature_select_strategy = "full"
    with pytest.raises(UnsupportedError, match=r"3 x 3 patches gives 10 rows; .* 'default' with"):
        NEXT.example(config, torch.Generator())


def test_samples() -> None:
    config = LLAVA.tiny()
    features = LLAVA.example(config, torch.Generator().manual_seed(0))
    tokens = features["input_ids"]
    sample = LLAVA.sample(config, {**features, "attention_mask": torch.ones_like(tokens)})
    assert sample.token_ids.equal(tokens[0])
    assert sample.is_label.equal(tokens[0] != config.image_token_index)
    assert [item.rows for item in sample.media] == [9] * len(features["pixel_values"])
    assert LLAVA.sample(config, {"input_ids": tokens[:, :1]}).media == ()
    flags = torch.zeros(tokens.size(1), dtype=torch.bool)
    assert not LLAVA.sample(config, features, is_label=flags).is_label.any()
    hidden = torch.ones_like(tokens)
    hidden[0, 0] = 0
    for changed, message in (
        ({"input_ids": tokens[0]}, r"sample x: input_ids are of shape \[\d+\]; expected one"),
        ({"input_ids": tokens.expand(2, -1)}, "expected one conversation"),
        ({"attention_mask": hidden}, "sample x: attention_mask hides tokens"),
        ({"input_features": tokens}, r"features \['input_features'\] are not known"),
    ):
        with pytest.raises(InputError, match=message):
            LLAVA.sample(config, {**features, **changed}, name="x")


def test_other_towers_are_refused() -> None:
    from transformers import ViTConfig

    config = LLAVA.tiny()
    config.vision_config = ViTConfig()
    with pytest.raises(UnsupportedError, match="model_type is 'vit'; expected one of clip_vision"):
        LLAVA.keys(config)
