"""Whatever happens to a checkpoint: the one before is loaded, or a sentence says what is wrong."""

from __future__ import annotations

import shutil
from argparse import Namespace
from pathlib import Path
from random import Random
from zlib import crc32

import pytest
import torch

from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.models.mimo.errors import ConfigError
from megatron.mimo.checkpoints.folders import RELEASE, TRACKER, choose, newest
from megatron.mimo.checkpoints.hashed_saving import hash_checkpoint
from megatron.mimo.checkpoints.hashes import MANIFEST, list_files, share
from megatron.mimo.checkpoints.inspection import Inspector, problem
from megatron.mimo.checkpoints.torch_dist import (
    CheckpointFile,
    CheckpointReader,
    finish_checkpoint,
    locate,
)
from megatron.mimo.checkpoints.tracker import Tracker, iteration_name
from tests.chaos.damage import DAMAGES, TRACKERS, Damage, flip, zero

WEIGHTS = ("first", "second")


def write(root: Path, number: int | None) -> Path:
    """A checkpoint of two tensors in two files; None is what an import writes."""
    (root / RELEASE).mkdir(parents=True)
    files = []
    for place, key in enumerate(WEIGHTS):
        file = CheckpointFile(root / RELEASE, place)
        data = torch.randn(64, 32, generator=torch.Generator().manual_seed(place))
        file.write(ShardedTensor.from_rank_offsets(key, data))
        file.close()
        files.append(file)
    finish_checkpoint(root, files, [])
    if number is None:
        return root / RELEASE
    (root / RELEASE).rename(root / iteration_name(number))
    (root / TRACKER).write_text(str(number))
    return root / iteration_name(number)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with iterations 3 and 6, to be copied."""
    root = tmp_path_factory.mktemp("two") / "checkpoints"
    write(root, 3)
    write(root, 6)
    return root


@pytest.fixture
def root(two: Path, tmp_path: Path) -> Path:
    """One to damage."""
    return Path(shutil.copytree(two, tmp_path / "checkpoints"))


def arguments(root: Path, ckpt_step: int | None = None) -> Namespace:
    """What ``choose`` reads."""
    return Namespace(
        load=str(root), ckpt_step=ckpt_step, explicit_load=False, pretrained_checkpoint=None
    )


def test_a_whole_one_is_loaded_without_a_word(root: Path) -> None:
    assert choose(arguments(root), repair=True) == (6, None)
    assert problem(root / "iter_0000006") is None
    assert sorted([*list_files(root / "iter_0000006"), MANIFEST]) == sorted(
        path.name for path in (root / "iter_0000006").iterdir()
    )


@pytest.mark.parametrize(("name", "damage"), DAMAGES, ids=[name for name, _ in DAMAGES])
def test_damage_of_every_file_falls_back(root: Path, name: str, damage: Damage) -> None:
    file = damage(root / "iter_0000006", Random(f"{name}"))
    with pytest.raises(ConfigError, match=r"iteration 6 was asked for: .*; available: 3") as said:
        choose(arguments(root, ckpt_step=6), repair=True)
    assert file in str(said.value)
    before = choose(arguments(root), repair=False)
    inspector = Inspector()
    assert newest(root, inspector=inspector) == root / "iter_0000003"
    assert file in inspector.said[0]
    start, warning = choose(arguments(root), repair=True)
    assert (start, warning) == before
    assert start == 3
    assert warning is not None
    assert f"{root}/iter_0000006 is damaged: " in warning
    assert file in warning
    assert warning.endswith("; using the newest complete one, iteration 3")
    assert choose(arguments(root), repair=True) == (3, None)


@pytest.mark.parametrize("seed", range(40))
def test_no_bit_flips_unseen(root: Path, seed: int) -> None:
    rng = Random(seed)
    folder = root / "iter_0000006"
    file = rng.choice(list_files(folder))
    written = (folder / file).read_bytes()
    flip(folder / file, rng)
    trouble = Inspector().problem(folder)
    assert trouble is not None
    assert file in trouble
    if file.endswith(".distcp"):
        hashes = (crc32((folder / file).read_bytes()), crc32(written))
        assert trouble == (
            f"{file} has the hash {hashes[0]:08x}, expected {hashes[1]:08x}: its bytes have "
            "changed since it was written"
        )


@pytest.mark.parametrize(("name", "damage"), TRACKERS, ids=[name for name, _ in TRACKERS])
def test_odd_trackers_are_put_right(root: Path, name: str, damage: Damage) -> None:
    hit = damage(root, Random(name))
    expected = 3 if hit == "iter_0000006" else 6
    start, warning = choose(arguments(root), repair=True)
    assert start == expected
    assert warning is not None
    assert f"{root}/{hit if name != 'release without one' else RELEASE} is " in warning
    assert (root / TRACKER).read_text() == str(expected)
    assert choose(arguments(root), repair=False) == (expected, None)


@pytest.mark.parametrize(("name", "damage"), TRACKERS, ids=[name for name, _ in TRACKERS])
def test_a_step_is_loaded_whatever_the_tracker_is(root: Path, name: str, damage: Damage) -> None:
    damage(root, Random(name))
    if name == "release without one":
        with pytest.raises(ConfigError, match=r"says 'release', .*; write 3 into it"):
            choose(arguments(root, ckpt_step=3), repair=True)
        return
    assert choose(arguments(root, ckpt_step=3), repair=True) == (3, None)
    if (root / TRACKER).exists():  # Megatron reads it
        assert Tracker.read(root).iteration in (3, 6)


def test_all_damaged_is_refused_with_all_that_is_wrong(root: Path) -> None:
    for number in (3, 6):
        flip(root / iteration_name(number) / "__1_0.distcp", Random(number))
    for look in (lambda: choose(arguments(root), repair=True), lambda: newest(root)):
        with pytest.raises(ConfigError, match="no complete checkpoint is left") as said:
            look()
        assert str(said.value).count("__1_0.distcp has the hash") == 2
    (root / TRACKER).unlink()  # a start from scratch would write over them
    with pytest.raises(ConfigError, match="no complete checkpoint is left"):
        choose(arguments(root), repair=True)
    for path in root.glob("*/hashes.json"):  # of an older version
        path.unlink()
        zero(path.with_name("__0_0.distcp"), Random(0))
    with pytest.raises(ConfigError, match="no complete checkpoint is left"):
        choose(arguments(root), repair=True)


def test_without_hashes_it_is_loaded_and_said(root: Path) -> None:
    folder = root / "iter_0000006"
    (folder / MANIFEST).unlink()
    start, warning = choose(arguments(root), repair=True)
    assert start == 6
    assert warning == (
        f"{folder} has no hashes.json (it is older, or was written without): its bytes are "
        "unchecked"
    )
    assert choose(arguments(root), repair=True, inspector=Inspector(hashes=False)) == (6, None)
    zero(folder / "__0_0.distcp", Random(1))
    start, warning = choose(arguments(root), repair=True)
    assert start == 3
    assert warning is not None
    assert "__0_0.distcp holds no tensor at byte" in warning


def test_hashes_can_be_left_alone(root: Path) -> None:
    flip(root / "iter_0000006/__0_0.distcp", Random(0))
    assert choose(arguments(root), repair=True, inspector=Inspector(hashes=False)) == (6, None)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "hashes.json cannot be read"),
        ("[]", "hashes.json cannot be read"),
        ('{"algorithm": "crc32", "files": {}}', "hashes.json does not name .metadata"),
        ('{"algorithm": "md4", "files": {}}', "hashes.json has hashes of 'md4', expected 'crc32'"),
        (
            '{"algorithm": "crc32", "files": {"../x": {"size": 1, "hash": "0"}}}',
            "names the file '../x'",
        ),
        ("[" * 100_000, "hashes.json cannot be read"),
    ],
)
def test_a_damaged_manifest_is_told(root: Path, content: str, said: str) -> None:
    (root / "iter_0000006" / MANIFEST).write_text(content)
    assert said in str(problem(root / "iter_0000006"))


def test_an_import_is_hashed_and_gives_way_to_nothing(tmp_path: Path) -> None:
    folder = write(tmp_path, None)
    assert choose(arguments(tmp_path), repair=True) == (0, None)
    written = (folder / MANIFEST).read_text()  # hashed on the way
    hash_checkpoint(folder)
    assert (folder / MANIFEST).read_text() == written
    flip(folder / "__0_0.distcp", Random(0))
    with pytest.raises(ConfigError, match=r"release is damaged: __0_0.distcp has the hash"):
        choose(arguments(tmp_path), repair=True)
    with pytest.raises(ConfigError, match=r"release cannot be used: __0_0.distcp has the hash"):
        locate(folder, described=False)


def test_a_lost_tracker_of_an_import_is_written_again(tmp_path: Path) -> None:
    write(tmp_path, None)
    (tmp_path / TRACKER).unlink()
    start, warning = choose(arguments(tmp_path), repair=True)
    assert start == 0
    assert warning is not None
    assert warning.endswith("using the newest complete one, the imported weights")
    assert (tmp_path / TRACKER).read_text() == RELEASE


def test_reading_damaged_weights_names_the_file(root: Path) -> None:
    """Where nobody has compared hashes."""
    folder = root / "iter_0000006"
    (folder / "__0_0.distcp").write_bytes(bytes((folder / "__0_0.distcp").stat().st_size))
    with pytest.raises(ValueError, match=r"__0_0.distcp is damaged: first cannot be read from it"):
        CheckpointReader(folder).read("first", (0, 0), (64, 32))


def test_every_file_is_read_by_one_rank_and_by_the_one_that_wrote_it() -> None:
    names = [".metadata", "__0_0.distcp", "__1_0.distcp", "__2_0.distcp", "metadata.json"]
    for size in (1, 2, 3, 5):
        shares = [share(names, rank=rank, size=size) for rank in range(size)]
        assert sorted(name for mine in shares for name in mine) == names
    assert "__2_0.distcp" in share(names, rank=2, size=3)


def test_hashes_are_those_of_zlib_in_any_number_of_threads(tmp_path: Path) -> None:
    rng = Random(4)
    sizes = (0, 1, 8 * 2**20, 8 * 2**20 + 1, 20_000_000)
    for number, size in enumerate(sizes):
        (tmp_path / f"__{number}_0.distcp").write_bytes(rng.randbytes(size))
    hash_checkpoint(tmp_path)
    from megatron.mimo.checkpoints.hashes import read_manifest

    found = read_manifest(tmp_path)
    assert found is not None
    for number, size in enumerate(sizes):
        one = found[f"__{number}_0.distcp"]
        content = (tmp_path / f"__{number}_0.distcp").read_bytes()
        assert (one.size, one.hash) == (size, f"{crc32(content):08x}")
