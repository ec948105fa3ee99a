from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron.mimo.data.row_cache.cache import KEY_BYTES, RowCache
from megatron.mimo.data.row_cache.lookup import COUNTS, KEYS, ROWS, look_up


def key(number: int) -> bytes:
    return number.to_bytes(KEY_BYTES, "little")


def rows(number: int) -> Tensor:
    generator = torch.Generator().manual_seed(number)
    return torch.randn(1 + number % 2, 1 + number % 5, 8, generator=generator).bfloat16()


def test_rows_are_found_again(tmp_path: Path) -> None:
    cache = RowCache(tmp_path / "cache")
    assert cache.get(key(1)) is None
    assert cache.put({key(number): rows(number) for number in range(10)}) == 10
    assert cache.put({key(number): rows(number) for number in range(5, 12)}) == 2
    for reader in (cache, RowCache(tmp_path / "cache")):
        assert len(reader) == 12
        for number in range(12):
            found = reader.get(key(number))
            assert found is not None
            assert torch.equal(found, rows(number))


def test_what_another_writes_is_seen(tmp_path: Path) -> None:
    mine, other = RowCache(tmp_path), RowCache(tmp_path)
    other.put({key(1): rows(1)})
    assert mine.get(key(1)) is None  # it looks every few seconds
    mine.refresh()
    assert mine.get(key(1)) is not None


@pytest.mark.parametrize("cut", [1, 30, 43, 44, 45])
def test_a_record_that_was_cut_off_is_passed_over(cut: int, tmp_path: Path) -> None:
    RowCache(tmp_path).put({key(number): rows(number) for number in range(3)})
    (index,) = tmp_path.glob("*.index")
    index.write_bytes(index.read_bytes()[:-cut])
    cache = RowCache(tmp_path)
    left = 2 if cut <= 44 else 1
    assert len(cache) == left
    assert cache.put({key(number): rows(number) for number in range(3)}) == 3 - left
    assert all(cache.get(key(number)) is not None for number in range(3))


def test_rows_that_are_damaged_are_written_again(tmp_path: Path) -> None:
    RowCache(tmp_path).put({key(number): rows(number) for number in range(3)})
    (data,) = tmp_path.glob("*.rows")
    content = bytearray(data.read_bytes())
    content[0] ^= 1
    data.write_bytes(content)
    cache = RowCache(tmp_path)
    assert cache.get(key(0)) is None
    assert cache.get(key(1)) is not None
    assert cache.put({key(0): rows(0)}) == 1
    found = cache.get(key(0))
    assert found is not None
    assert torch.equal(found, rows(0))


def write_all(folder: Path, seed: int, written: Any) -> None:
    cache, order = RowCache(folder), list(range(150))
    random.Random(seed).shuffle(order)
    for at in range(0, 150, 5):
        count = cache.put({key(number): rows(number) for number in order[at : at + 5]})
        with written.get_lock():
            written.value += count


def test_several_writers_write_each_medium_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    written = context.Value("i", 0)
    writers = [context.Process(target=write_all, args=(tmp_path, n, written)) for n in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert written.value == 150
    assert len(RowCache(tmp_path)) == 150


def test_a_writer_that_is_killed_harms_nobody(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    generator = random.Random(2)
    for turn in range(6):
        written = context.Value("i", 0)
        writer = context.Process(target=write_all, args=(tmp_path, turn, written))
        writer.start()
        time.sleep(generator.random() * 0.05)
        assert writer.pid is not None
        os.kill(writer.pid, signal.SIGKILL)
        writer.join()
        cache = RowCache(tmp_path)
        for number in range(150):
            found = cache.get(key(number))
            assert found is None or torch.equal(found, rows(number))
    last = context.Value("i", 0)
    write_all(tmp_path, 9, last)
    assert all(RowCache(tmp_path).get(key(number)) is not None for number in (0, 77, 149))


def batch_of(*values: int) -> dict[str, Any]:
    pixels = [torch.full((2, 3), float(value)) for value in values]
    arguments = {"pixels": pixels, "sizes": [(2, value) for value in values]}
    stacked = {"whole": torch.stack(pixels)} if pixels else {"whole": torch.empty(0, 2, 3)}
    return {"modality_inputs": {"images": {"list": arguments, "tensor": stacked}}, "other": 1}


@pytest.mark.parametrize("encoder", ["list", "tensor"])
def test_inputs_of_media_that_are_there_give_way_to_their_rows(
    encoder: str, tmp_path: Path
) -> None:
    caches = {("images", encoder): RowCache(tmp_path)}
    looked = look_up(batch_of(1, 2, 3), caches)["modality_inputs"]["images"]
    other = looked["tensor" if encoder == "list" else "list"]
    assert COUNTS not in other
    assert looked[encoder][COUNTS] == [-1, -1, -1]
    assert ROWS not in looked[encoder]
    second = bytes.fromhex(looked[encoder][KEYS][1])
    caches["images", encoder].put({second: rows(3)})
    found = look_up(batch_of(3, 2, 2), caches)["modality_inputs"]["images"][encoder]
    assert found[COUNTS] == [-1, 4, 4]
    assert torch.equal(found[ROWS], torch.cat([rows(3), rows(3)], dim=1))
    assert found[KEYS] == [looked[encoder][KEYS][2]]
    kept = found["pixels"] if encoder == "list" else list(found["whole"])
    assert [float(one[0, 0]) for one in kept] == [3.0]
    if encoder == "list":
        assert found["sizes"] == [(2, 3)]


def test_a_batch_without_media_stays_as_it_is(tmp_path: Path) -> None:
    caches = {("images", "list"): RowCache(tmp_path), ("audio", "any"): RowCache(tmp_path)}
    empty = batch_of()
    assert look_up(empty, caches)["modality_inputs"] == empty["modality_inputs"]
