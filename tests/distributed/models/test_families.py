"""Families' tiny models equal transformers' under every layout: logits, every gradient, training.

Every family that is known gets these tests.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace

import pytest

from megatron.mimo.data import MediaFormat
from megatron.mimo.models import family_names, load_family
from tests.distributed.models.expected import Expected, compute_expected
from tests.distributed.models.packed import packed_logits
from tests.distributed.models.ranks import Layout, compare, train, waits
from tests.distributed.models.text_kinds import take_all_experts
from tests.rank_pool import RankPool
from tests.tiers import crossed, some

LAYOUTS = {"one": Layout(), "tp2": Layout(tp=2), "pp2": Layout(pp=2), "cp2": Layout(cp=2)}
LOGITS, GRADIENTS, LOSSES = 1e-4, 1e-3, 1e-3


@pytest.fixture(scope="module")
def expected(ranks: RankPool) -> Callable[[str], Expected]:
    known: dict[str, Expected] = {}

    def of(name: str) -> Expected:
        if name not in known:
            (known[name],) = ranks(1)(compute_expected, name, samples=5, text_only=True)
        return known[name]

    return of


def check(ranks: RankPool, name: str, layout: Layout, wanted: Expected) -> None:
    """Compare logits, loss and gradients, and that the ranks together have every parameter."""
    deviations = ranks(layout.world_size)(compare, name, layout, wanted)
    logits = [deviation.logits for deviation in deviations if deviation.logits is not None]
    assert logits
    assert max(logits) < LOGITS
    compared: set[str] = set()
    for rank, deviation in enumerate(deviations):
        assert deviation.loss == pytest.approx(wanted.loss, rel=1e-4)
        wrong = {key: error for key, error in deviation.gradients.items() if not error < GRADIENTS}
        assert not wrong, f"rank {rank}: relative errors {wrong}"
        compared |= deviation.gradients.keys()
    assert compared - _copies(wanted) == wanted.trained_parameters


def _copies(wanted: Expected) -> set[str]:
    """The last stage holds a copy of a tied embedding, with the same gradient."""
    tied = getattr(wanted.config, "tie_word_embeddings", False)
    return {"language_model.output_layer.weight"} if tied else set()


def item_sizes(name: str, expected: Expected) -> list[list[tuple[str, int]]]:
    """Modality and rows of every item of each sample."""
    from megatron.mimo.models import load_family

    family = load_family(name)
    samples = [family.sample(expected.config, example) for example in expected.examples]
    return [[(item.modality, item.rows) for item in sample.media] for sample in samples]


@pytest.mark.parametrize("name", family_names())
def test_samples_differ_in_all_that_data_do(
    ranks: RankPool, expected: Callable[[str], Expected], name: str
) -> None:
    """Several items in a sample, none in others; items of different sizes, where there are any."""
    wanted = expected(name)
    (samples,) = ranks(1)(item_sizes, name, wanted)
    counts = {len(items) for items in samples}
    assert 0 in counts
    assert max(counts) > 1
    assert len({len(logits_LV) for logits_LV in wanted.logits}) > 3  # so that batches are padded
    sizes: dict[str, set[int]] = {}
    for modality, rows in itertools.chain(*samples):
        sizes.setdefault(modality, set()).add(rows)
    media = load_family(name).media(wanted.config)
    assert sizes.keys() == media.special_token_ids.keys()
    for modality, given in media.formats.items():
        formats = [given] if isinstance(given, MediaFormat) else given
        shapes = [shape for one in formats for _, shape in one.inputs.values()]
        if any(None in shape for shape in shapes):
            assert len(sizes[modality]) > 1


@pytest.mark.parametrize(
    ("name", "cut"), crossed(family_names(), ("tp2", "pp2", "cp2"), whole=["llava"], wide=["one"])
)
def test_equals_transformers(
    ranks: RankPool, expected: Callable[[str], Expected], name: str, cut: str
) -> None:
    wanted, layout = expected(name), LAYOUTS[cut]
    if layout.tp > 1 and hasattr(wanted.config.get_text_config(), "num_experts"):
        # Without it Megatron trains no experts under tensor parallelism.
        layout = replace(layout, changes={"sequence_parallel": True})
    check(ranks, name, layout, wanted)


def test_equals_transformers_under_sequence_parallelism(
    ranks: RankPool, expected: Callable[[str], Expected]
) -> None:
    layout = Layout(tp=2, changes={"sequence_parallel": True})
    check(ranks, "llava_next", layout, expected("llava_next"))


@pytest.mark.parametrize("cp", [pytest.param(1, marks=pytest.mark.wide), 2])
@pytest.mark.parametrize("name", family_names())
def test_a_packed_row_has_the_logits_of_its_samples(
    ranks: RankPool, expected: Callable[[str], Expected], name: str, cp: int
) -> None:
    wanted = expected(name)
    for distances in ranks(cp)(packed_logits, name, wanted, cp):
        assert distances
        assert max(distances) < LOGITS


@pytest.mark.parametrize("name", some(family_names(), "llava_avlm"))
def test_trains_as_a_plain_loop_does(ranks: RankPool, name: str) -> None:
    """The tiny twins of all families learn, in layouts too: ``recipes/test_tiny_twins``."""
    (wanted,) = ranks(1)(
        compute_expected, name, take_all_experts, samples=5, text_only=True, train=True
    )
    assert wanted.trained[-1] < 0.8 * wanted.trained[0]
    for losses in ranks(2)(train, name, Layout(dp=2), wanted):
        assert losses == pytest.approx(wanted.trained, rel=LOSSES)


@pytest.mark.parametrize("name", family_names())
def test_nothing_waits_for_the_device(ranks: RankPool, name: str) -> None:
    allowed: dict[str, int] = {}
    if name.endswith("_moe"):
        # Megatron's dispatcher selects the tokens of a layer's experts by a mask, on every rank.
        layers = load_family(name).tiny().text_config.num_hidden_layers
        allowed = {"aten::masked_select": layers, "aten::_local_scalar_dense": layers}
    for padded, packed in ranks(2)(waits, name, Layout(cp=2)):
        assert padded == allowed
        assert packed == allowed
