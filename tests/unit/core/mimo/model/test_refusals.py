"""What MimoModel refuses, and in which words. Each check runs in the rank pool."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from tests.rank_pool import RankPool
from tests.unit.core.mimo.tiny import (
    HIDDEN,
    IDS_BS,
    VOCABULARY,
    build,
    inputs,
    language_spec,
    modality_spec,
)


def check_missing_and_superfluous_rows() -> None:
    from megatron.core.models.mimo.errors import PlaceholderMismatchError

    model = build()
    for counts, placeholders, rows in (({"audio": 3}, 3, 0), ({"images": 2, "audio": 3}, 3, 2)):
        with pytest.raises(
            PlaceholderMismatchError, match=r"Number of images tokens \(3\) does not match"
        ) as error:
            model(**inputs(counts))
        assert (error.value.placeholders, error.value.rows) == (placeholders, rows)
    with pytest.raises(PlaceholderMismatchError, match=r"audio tokens \(0\).*embeddings \(3\)"):
        model(**inputs(ids_BS=IDS_BS.where(IDS_BS != -200, 3)))
    with pytest.raises(PlaceholderMismatchError):
        model(**inputs({"images": 3, "audio": 4}))


def check_misspelt_names() -> None:
    model, batch = build(), inputs()
    image = batch["modality_inputs"].pop("images")
    batch["modality_inputs"]["image"] = image
    with pytest.raises(ValueError, match=r"name 'image', .* did you mean 'images'"):
        model(**batch)
    batch = inputs()
    batch["modality_inputs"]["images"]["clip"] = {}
    with pytest.raises(ValueError, match=r"encoders \['clip'\], which do not exist"):
        model(**batch)


def check_rows_that_do_not_fit() -> None:
    wide = {"images": modality_spec(width=2 * HIDDEN), "audio": modality_spec()}
    with pytest.raises(ValueError, match=rf"images embeddings .*hidden_size is {HIDDEN}"):
        build(modalities=wide)(**inputs())
    half = {"images": modality_spec(dtype=torch.bfloat16), "audio": modality_spec()}
    with pytest.raises(ValueError, match=r"images embeddings are torch\.bfloat16 .*float32"):
        build(modalities=half)(**inputs())


def check_ids_that_do_not_fit() -> None:
    model = build()
    for ids_BS, message in (
        (IDS_BS[0], r"expected \[batch, sequence\]"),
        (IDS_BS.where(IDS_BS != 9, VOCABULARY), rf"input_ids\[1, 6\] is {VOCABULARY}"),
        (IDS_BS.where(IDS_BS != 9, -7), r"input_ids\[1, 6\] is -7"),
        (IDS_BS.float(), "expected torch.int64"),
    ):
        with pytest.raises(ValueError, match=message):
            model(**(inputs() | {"input_ids": ids_BS}))
    with pytest.raises(ValueError, match="input_ids are None"):
        model(**(inputs() | {"input_ids": None}))


def check_plan_that_does_not_fit() -> None:
    from megatron.core.models.mimo.alignment import build_alignment_plan
    from megatron.core.models.mimo.errors import PlaceholderMismatchError

    model, batch = build(), inputs()
    other = build_alignment_plan(IDS_BS[:, :4], model.special_token_ids)
    with pytest.raises(ValueError, match=r"plan is for \[B, S\] = \[2, 4\] .*\[2, 8\]"):
        model(**batch, alignment_plan=other)
    without_audio = build_alignment_plan(IDS_BS.clamp(min=0), {"images": 30})
    with pytest.raises(PlaceholderMismatchError, match=r"audio tokens \(0\)"):
        model(**batch, alignment_plan=without_audio)


def check_unknown_special_token() -> None:
    model = build(tokens={"images": 30})
    with pytest.raises(ValueError, match="No special token ID defined for modality audio"):
        model(**inputs(ids_BS=IDS_BS.clamp(min=0)))
    batch = inputs({"images": 3}, ids_BS=IDS_BS.clamp(min=0))
    model(**batch)[0].sum().backward()  # a modality that is never used needs none
    assert all(parameter.grad is not None for parameter in model.parameters())


def check_constructions_that_are_refused() -> None:
    from megatron.core.models.mimo import MimoModel, MimoModelConfig
    from megatron.core.models.mimo.errors import ConfigError, UnsupportedError

    spec = language_spec()
    with pytest.raises(ConfigError, match=r"no grid for \['language'\], but None"):
        MimoModel(MimoModelConfig(spec, {}, {}, {"language": None}))
    with pytest.raises(UnsupportedError, match="mtp_num_layers = 1"):
        MimoModel(MimoModelConfig(language_spec({"mtp_num_layers": 1})))
    interleaved = {
        "num_layers": 4,
        "pipeline_model_parallel_size": 2,
        "virtual_pipeline_model_parallel_size": 2,
        "pipeline_dtype": torch.float32,
    }
    with pytest.raises(ConfigError, match="overlap_p2p_comm is False with virtual_pipeline"):
        MimoModel(MimoModelConfig(language_spec(interleaved)))
    spec.params.pop("config")
    with pytest.raises(ConfigError, match="has no 'config'"):
        MimoModel(MimoModelConfig(spec))


CHECKS = [value for name, value in list(globals().items()) if name.startswith("check_")]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_refusal(ranks: RankPool, check: Callable[[], None]) -> None:
    ranks(1)(check)
