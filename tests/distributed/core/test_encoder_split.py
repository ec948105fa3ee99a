"""Encoder work divided over ranks with equal inputs: the loss and gradients of one process."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from tests.distributed.core.split_model import (
    CLIPS,
    Cell,
    Result,
    build,
    micro_batches,
    run,
    watch_encoder,
)
from tests.rank_pool import RankPool, model_parallel
from tests.tiers import some

TOLERANCE = 1e-5  # of the norm of each parameter's gradient, and of the loss

CELLS = {
    "tp2": Cell(tp=2),
    "tp4": Cell(tp=4),
    "cp2": Cell(cp=2),
    "cp4": Cell(cp=4),
    "tp2-sp": Cell(tp=2, sequence_parallel=True),
    "tp2-cp2": Cell(tp=2, cp=2),
    "tp2-sp-cp2": Cell(tp=2, cp=2, sequence_parallel=True),
    "tp2-sp-dp2-overlap": Cell(tp=2, dp=2, sequence_parallel=True, overlap=True),
    "cp2-dp2-overlap": Cell(cp=2, dp=2, overlap=True),
    "tp2-cp2-only-cp": Cell(tp=2, cp=2, split="cp"),
    "tp2-cp2-only-tp": Cell(tp=2, cp=2, split="tp"),
    "tp2-cp2-never": Cell(tp=2, cp=2, split="never"),
    "tp2-cp2-frozen-encoder": Cell(tp=2, cp=2, frozen=("images.encoders",)),
    "tp2-cp2-frozen-images": Cell(tp=2, cp=2, frozen=("images",)),
    "tp2-cp2-frozen-language": Cell(tp=2, cp=2, frozen=("language",)),
    "cp2-vit": Cell(cp=2, encoder="vit"),
    "tp2-sp-cp2-vit": Cell(tp=2, cp=2, sequence_parallel=True, encoder="vit"),
}
# Clips that each rank encodes in each micro-batch, where ranks differ; a rank without clips
# encodes one in order to take part. The micro-batch without clips is not among them.
SEEN = {
    "tp2": [[1, 1, 1, 2, 2], [2, 1, 1, 2, 2]],
    "tp4": [[1, 1, 1, 1, 1], [2, 1, 1, 1, 1], [1, 1, 1, 1, 2], [1, 1, 1, 1, 1]],
    "tp2-cp2": [[1, 1, 1, 1, 1]] * 4,
    "tp2-cp2-never": [[3, 1, 2, 4, 4]] * 4,
}


@pytest.fixture(scope="module")
def reference(ranks: RankPool) -> Callable[[str], Result]:
    known: dict[str, Result] = {}

    def outcome(encoder: str) -> Result:
        if encoder not in known:
            (known[encoder],) = ranks(1)(run, Cell(encoder=encoder))
        return known[encoder]

    return outcome


@pytest.mark.parametrize(
    "name",
    some(
        CELLS,
        "tp4",
        "tp2-cp2",
        "tp2-sp-dp2-overlap",
        "tp2-cp2-only-cp",
        "tp2-cp2-only-tp",
        "tp2-cp2-never",
        "tp2-cp2-frozen-images",
        "tp2-sp-cp2-vit",
    ),
)
def test_equals_one_process(ranks: RankPool, reference: Callable[[str], Result], name: str) -> None:
    cell = CELLS[name]
    expected = reference(cell.encoder)
    results = ranks(cell.world_size)(run, cell, expected.weights)
    trained = {key for key in expected.gradients if not _is_frozen(key, cell.frozen)}
    for rank, result in enumerate(results):
        assert result.loss == pytest.approx(expected.loss, rel=TOLERANCE)
        assert set(result.gradients) == trained
        errors = {}
        for key, (where, gradient) in result.gradients.items():
            _, whole = expected.gradients[key]
            errors[key] = ((gradient - whole[where]).norm() / whole.norm()).item()
        wrong = {key: error for key, error in errors.items() if not error < TOLERANCE}
        assert not wrong, f"rank {rank}: relative errors {wrong}"
    if name in SEEN:
        assert [result.seen for result in results] == SEEN[name]


def _is_frozen(key: str, frozen: tuple[str, ...]) -> bool:
    prefixes = {
        "language": "language_model.",
        "images": "modality_submodules.images.",
        "images.encoders": "modality_submodules.images.encoders.",
    }
    return any(key.startswith(prefixes[name]) for name in frozen)


def test_dropout_leaves_default_generators_equal(
    ranks: RankPool, reference: Callable[[str], Result]
) -> None:
    weights = reference("clips").weights
    results = ranks(2)(run, Cell(tp=2), weights, dropout=0.5)
    assert results[0].seen != results[1].seen
    assert torch.equal(results[0].generator, results[1].generator)


def count_host_waits(cell: Cell) -> int:
    from megatron.mimo.backend.host_sync import HostSyncCounter

    model = build(cell, model_parallel(tp=cell.tp, cp=cell.cp))
    # Megatron's fork of a generator compares states on the host, which the counter takes for a
    # wait; in evaluation nothing is forked.
    model.eval()
    inputs = micro_batches(cell.encoder)[0]["modality_inputs"]
    with HostSyncCounter() as counter:
        rows_NH = model._forward_encoders(None, inputs, None)["images"]
        rows_NH.backward(torch.ones_like(rows_NH))
    return counter.total


@pytest.mark.parametrize(
    "cell", [Cell(tp=2, cp=2), Cell(cp=2, encoder="vit")], ids=["clips", "vit"]
)
def test_never_waits_for_the_device(ranks: RankPool, cell: Cell) -> None:
    assert ranks(cell.world_size)(count_host_waits, cell) == [0] * cell.world_size


def refusals(encoder: str, split: str) -> str:
    groups = model_parallel(tp=2, cp=2)
    with pytest.raises(ValueError, match="cannot be split over") as caught:
        build(Cell(tp=2, cp=2, encoder=encoder, split=split), groups)
    return str(caught.value)


def test_refuses_an_encoder_that_is_tensor_parallel(ranks: RankPool) -> None:
    for message in ranks(4)(refusals, "vit", "tp-cp"):
        assert "parallel over these ranks itself (tensor_model_parallel is set on" in message
        assert "change encoder_split = 'tp-cp'" in message


def with_own_wrapper(split: str) -> list[int]:
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    model = build(Cell(tp=2, split=split), model_parallel(tp=2))
    model.modality_submodules["images"] = DistributedDataParallel(
        model.config, DistributedDataParallelConfig(), model.modality_submodules["images"]
    )
    seen = watch_encoder(model.modality_submodules["images"].module)
    if split == "auto":
        model(**micro_batches("clips")[0])
        return seen
    with pytest.raises(RuntimeError, match="wrap the model as a whole"):
        model(**micro_batches("clips")[0])
    return seen


def test_own_wrapper_is_not_split_over_tensor_parallel_ranks(ranks: RankPool) -> None:
    assert ranks(2)(with_own_wrapper, "auto") == [[len(CLIPS[0])]] * 2
    assert ranks(2)(with_own_wrapper, "tp") == [[]] * 2


def wrong_rows() -> str:
    model = build(Cell(cp=2), model_parallel(cp=2))
    encoder = model.modality_submodules["images"].encoders["encoder"]
    encoder.rows_per_item = lambda clips, lengths: [length + 1 for length in lengths]
    with pytest.raises(ValueError, match="announced") as caught:
        model(**micro_batches("clips")[0])
    return str(caught.value)


def test_rows_that_were_not_announced(ranks: RankPool) -> None:
    messages = ranks(2)(wrong_rows)
    assert "gave 3 rows for items 0 to 0, and its rows_per_item announced 4" in messages[0]
