"""megatron-core's own MIMO and this one, side by side: equal losses, gradients and state."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.rank_pool import RankPool, model_parallel
from tests.unit.core.mimo import tiny

LIBRARY = "megatron.core.models.mimo"


@contextmanager
def library(*, stock: bool) -> Iterator[Path]:
    """Imports inside find stock's library, or this one; gives the folder it lies in."""
    found = {name: sys.modules.pop(name) for name in [*sys.modules] if name.startswith(LIBRARY)}
    os.environ["MEGATRON_MIMO_OVERLAY"] = "0" if stock else "1"
    try:
        module = importlib.import_module(LIBRARY)
        assert module.__file__ is not None
        yield Path(module.__file__).parent
    finally:
        for name in [*sys.modules]:
            if name.startswith(LIBRARY):
                del sys.modules[name]
        sys.modules.update(found)


def run(batch: dict[str, Any], state: dict[str, Any] | None, **params: Any) -> tuple[Any, ...]:
    """Losses, gradients and state of a model of whichever library is imported."""
    model = tiny.build(**params)
    if state is not None:
        model.load_state_dict(state, strict=True)
    losses_BS, mask_BS = model(**batch)
    (losses_BS * batch["loss_mask"]).sum().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return losses_BS.detach(), mask_BS, gradients, model.state_dict()


def compare(case: str) -> None:
    model_parallel()
    images_only = tiny.IDS_BS.where(tiny.IDS_BS != tiny.AUDIO, 3)
    batch, params = {
        "two modalities": (tiny.inputs(), {}),
        "one modality": (tiny.inputs({"images": 3}, ids_BS=images_only), {}),
        "text": (tiny.inputs({}, ids_BS=torch.ones_like(images_only)), {}),
        "tied": (tiny.inputs(), {"share_embeddings_and_output_weights": True}),
        "3-D positions": (tiny.inputs(), {}),
    }[case]
    if case == "3-D positions":
        batch["position_ids"] = batch["position_ids"].repeat(3, 1, 1)
    with library(stock=True) as folder:
        assert "site-packages" in folder.parts
        theirs = run(batch, None, **params)
    with library(stock=False) as folder:
        assert folder.parents[3] == Path(__file__).resolve().parents[4]
        ours = run(batch, theirs[3], **params)
    torch.testing.assert_close(ours[0], theirs[0], rtol=0, atol=0)
    assert ours[1] is theirs[1] is batch["loss_mask"]
    assert set(ours[3]) == set(theirs[3])
    for name, gradient in theirs[2].items():
        if gradient is None:  # stock leaves the parameters of an absent modality out
            assert not ours[2][name].any(), name
        else:
            torch.testing.assert_close(ours[2][name], gradient, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    "case", ["two modalities", "one modality", "text", "tied", "3-D positions"]
)
def test_results_equal_stocks(ranks: RankPool, case: str) -> None:
    ranks(1)(compare, case)
