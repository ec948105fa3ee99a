from __future__ import annotations

import gzip
import json
import os
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from megatron.core.models.mimo.errors import InputError
from megatron.mimo.data.sources import files_of, open_file
from tests.unit.mimo.data.sources.records import (
    numbered,
    write_arrow,
    write_lines,
    write_parquet,
    write_tar,
)

RECORDS = [{**one, "text": 'a "quoted]} {[, \\" text'} for one in numbered(23)]


def saved(path: Path, records: Sequence[Any]) -> Path:
    import datasets

    datasets.disable_progress_bars()
    datasets.Dataset.from_list(list(records)).save_to_disk(path)
    return path


def as_list(path: Path, records: Sequence[Any]) -> Path:
    path.write_text(json.dumps(list(records), indent=2))
    return path


WRITERS: dict[str, Callable[..., Path]] = {
    **dict.fromkeys(("a.jsonl", "a.jsonl.gz", "a.jsonl.zst"), write_lines),
    "a.json": as_list,
    "a.parquet": write_parquet,
    "a.arrow": write_arrow,
    "saved": saved,
    **dict.fromkeys(("a.tar", "a.tar.gz"), write_tar),
}
PLACES = {"json": "entry 8", "parquet": "row 8", "arrow": "row 8", "tar": "key folder/00007"}


@pytest.mark.parametrize("name", WRITERS)
def test_every_container_gives_the_same_records(name: str, tmp_path: Path) -> None:
    written = WRITERS[name](tmp_path / name, RECORDS)
    (path,) = files_of([written])
    file = open_file(path, tmp_path / "index")
    assert [file[number].value for number in range(len(file))] == RECORDS
    assert sum(file.shard_sizes) == len(file) == 23
    kind = path.name.split(".")[1]
    assert file[7].name == f"{path}, {PLACES.get(kind, 'line 8')}"
    again = pickle.loads(pickle.dumps(file))
    assert again[22].value == RECORDS[22]
    # the index is used from now on; what was unpacked is there
    assert open_file(path, tmp_path / "index")[22].value == RECORDS[22]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.jsonl.gz", "records"])
@pytest.mark.parametrize("lines", [True, False])
def test_lines_and_lists_are_told_apart_whatever_the_name(
    name: str, lines: bool, tmp_path: Path
) -> None:
    text = "".join(f"{json.dumps(one)}\n" for one in RECORDS) if lines else json.dumps(RECORDS)
    data = b"\xef\xbb\xbf" + text.encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    assert [one.value for one in _records(tmp_path / name, tmp_path)] == RECORDS


def test_braces_name_shards(tmp_path: Path) -> None:
    for name in ("s-008.jsonl", "s-009.jsonl", "s-010.jsonl", "t-010.jsonl"):
        write_lines(tmp_path / name, RECORDS[:1])
    found = [one.name for one in files_of([tmp_path / "s-{008..010}.jsonl"])]
    assert found == ["s-008.jsonl", "s-009.jsonl", "s-010.jsonl"]
    assert len(files_of([tmp_path / "{s,t}-010.*"])) == 2
    with pytest.raises(InputError, match=r"s-011.jsonl cannot be read: No such file"):
        files_of([tmp_path / "s-{010..011}.jsonl"])


@pytest.mark.parametrize(
    ("names", "splits"),
    [
        (("train-00000-of-00001.parquet", "test-00000-of-00001.parquet"), "test, train"),
        (("train_sft-00000-of-00001.parquet", "train_gen-00000-of-00001.parquet"), "train_gen"),
        (("train.jsonl", "val.jsonl"), "train, val"),
        (("train-00000-of-00002.parquet", "train-00001-of-00002.parquet"), None),
        (("a.jsonl", "training.jsonl"), None),
    ],
)
def test_splits_are_not_mixed(names: Sequence[str], splits: str | None, tmp_path: Path) -> None:
    for name in names:
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / "data" / name).touch()
    if splits is None:
        assert len(files_of([tmp_path / "data"])) == 2
    else:
        with pytest.raises(InputError, match=rf"holds the splits .*{splits}.*; name the files of"):
            files_of([tmp_path / "data"])
    with pytest.raises(InputError, match=rf"its folders do: give one, such as {tmp_path}/data"):
        files_of([tmp_path])


def test_lines_are_counted_as_an_editor_does(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a": 1}\n\n  \t \r\n{"a": 2}\r\n            \n{"a": 3}')
    file = open_file(path, tmp_path / "index")
    assert [file[number].value["a"] for number in range(len(file))] == [1, 2, 3]
    assert [file[number].place for number in range(3)] == ["line 1", "line 4", "line 6"]


def test_a_file_that_changes_gets_a_new_index(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [{"a": 1}])
    assert len(open_file(path, tmp_path / "index")) == 1
    write_lines(path, [{"a": 1}, {"a": 2}])
    assert len(open_file(path, tmp_path / "index")) == 2
    text = path.read_text().replace("2", "3")
    path.write_text(text)
    os.utime(path, ns=(1, 1))
    assert open_file(path, tmp_path / "index")[1].value == {"a": 3}


def test_members_of_a_tar_come_with_their_record(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", RECORDS, {"jpg": b"jay", "1.png": b"pee"})
    record = open_file(path, tmp_path / "index")[3]
    assert record.members == {"jpg": b"jay", "1.png": b"pee"}
    assert record.value == RECORDS[3]


def test_a_null_column_is_not_there(tmp_path: Path) -> None:
    rows = [
        {"messages": [{"role": "user", "content": "a"}], "image": None},
        {"messages": [{"role": "user", "content": None}], "image": "b"},
    ]
    file = open_file(write_parquet(tmp_path / "a.parquet", rows), tmp_path / "index")
    assert file[0].value == {"messages": [{"role": "user", "content": "a"}]}
    assert file[1].value == {"messages": [{"role": "user"}], "image": "b"}


BROKEN: dict[str, tuple[bytes, str]] = {
    "a.jsonl": (b'{"a": 1}\n{"a" 2}\n', r"line 2: not valid JSON: Expecting ':' .*; repair"),
    "b.json": (b'{\n "a": [1]\n}', r"b.json: expected a list of records, .* object over several"),
    "c.json": (b'[{"a": 1}, {"b": ', r"c.json: not valid JSON at entry 2: the file ends before"),
    "d.json": (b'[{"a": 1},, 3]', r"d.json: not valid JSON at entry 2: there is nothing between"),
    "e.json": (b"[1] 2", r"e.json: not valid JSON at entry 1: text follows the list"),
    "f.csv": (b"image,text", r"f.csv: files of this kind are not read; expected .jsonl"),
    "u.jsonl": ('{"a": 1}'.encode("utf-16"), r"u.jsonl is UTF-16; expected UTF-8"),
    "g.jsonl.gz": (b"no gzip at all", r"g.jsonl.gz cannot be unpacked: .*; it is damaged"),
    "h.jsonl.zst": (b"no zstandard", r"h.jsonl.zst cannot be unpacked: .*; it is damaged"),
    "i.parquet": (b"PAR1 but nothing else", r"i.parquet: cannot be read: .*; it is damaged"),
    "j.arrow": (b"ARROW1 but nothing", r"j.arrow: cannot be read: .*; it is damaged"),
    "k.tar": (b"no tar" * 200, r"k.tar cannot be read as a tar: .*; it is damaged"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_named(name: str, tmp_path: Path) -> None:
    content, message = BROKEN[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        _ = [one.value for one in _records(tmp_path / name, tmp_path)]


def _records(path: Path, folder: Path) -> list[Any]:
    file = open_file(path, folder / "index")
    return [file[number] for number in range(len(file))]


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.tar", "a.parquet", "a.arrow", "a.tar.gz"])
def test_a_file_that_is_cut_off_is_named(name: str, tmp_path: Path) -> None:
    path = WRITERS[name](tmp_path / name, RECORDS)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 2 // 3 - (len(data) * 2 // 3) % 512 + 100])
    with pytest.raises(InputError, match=rf"{name}.* (damaged|cut off)"):
        _records(path, tmp_path)


def test_two_members_of_one_kind_are_refused(tmp_path: Path) -> None:
    import io
    import tarfile

    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for _ in range(2):
            tar.addfile(tarfile.TarInfo("0.json"), io.BytesIO())
    with pytest.raises(InputError, match=r"a.tar, key 0: has two members 'json'"):
        open_file(tmp_path / "a.tar", tmp_path / "index")


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    for given_path, message in (
        ("none.jsonl", "none.jsonl cannot be read: No such file"),
        ("*.tar", r"\*.tar matches no file; correct the pattern"),
        (".", "holds no file of records; expected .jsonl"),
    ):
        with pytest.raises(InputError, match=message):
            files_of([tmp_path / given_path])


def test_an_index_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [{}])
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"index of .*a.jsonl cannot .* --index-folder"):
        open_file(path, tmp_path / "file")


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.text(max_size=9),
            lambda inner: (
                st.lists(inner, max_size=3)
                | st.dictionaries(st.text(max_size=3), inner, max_size=3)
            ),
            max_leaves=8,
        ),
        max_size=9,
    ),
    st.sampled_from([None, 0, 1]),
    st.booleans(),
)
def test_any_json_is_found_again(
    tmp_path_factory: pytest.TempPathFactory, values: list[Any], indent: int | None, plain: bool
) -> None:
    assume(len(values) != 1 or not isinstance(values[0], list))  # one line would be the list
    folder = tmp_path_factory.mktemp("json")
    (folder / "a.json").write_text(json.dumps(values, indent=indent, ensure_ascii=plain))
    lines = "\n".join(json.dumps(value, ensure_ascii=plain) for value in values)
    (folder / "a.jsonl").write_text(lines)
    for name in ("a.json", "a.jsonl"):
        assert [one.value for one in _records(folder / name, folder)] == values


def test_a_tar_that_is_damaged_in_the_middle_is_named(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", RECORDS)
    data = bytearray(path.read_bytes())
    data[1024:1200] = b"x" * 176  # the header of the second member
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"a.tar is damaged at byte 1024: no header"):
        open_file(path, tmp_path / "index")


def test_a_prepared_energon_dataset_is_read_through_its_package(tmp_path: Path) -> None:
    prepare = pytest.importorskip("megatron.energon.flavors.webdataset.prepare")
    from megatron.energon.epathlib import EPath  # type: ignore[import-not-found]

    folder = tmp_path / "prepared"
    folder.mkdir()
    for shard in range(2):
        records = RECORDS[shard * 10 :][:10]
        write_tar(folder / f"{shard}.tar", records, {"jpg": b"jay"}, folder=f"s{shard}")
    prepare.WebdatasetPreparator.prepare_dataset(
        EPath(str(folder)), ["0.tar", "1.tar"], split_parts_ratio=[("train", 1.0)], workers=1
    )
    (path,) = files_of([folder])
    file = pickle.loads(pickle.dumps(open_file(path, tmp_path / "index")))
    values = [file[number].value for number in range(len(file))]
    assert sorted(one["name"] for one in values) == sorted(one["name"] for one in RECORDS[:20])
    assert file.shard_sizes == [10, 10]
    assert file[3].members == {"jpg": b"jay"}
    split = folder / ".nv-meta" / "split.yaml"
    split.write_text(split.read_text().replace("exclude: []", "exclude: [0.tar/s0/00003]"))
    assert len(open_file(path, tmp_path / "index")) == 19
    described = folder / ".nv-meta" / "dataset.yaml"
    described.write_text("field_map:\n  image: jpg\n  caption: json[name]\n")
    file = open_file(path, tmp_path / "index")
    mapped = [file[number].value for number in range(len(file))]
    kept = [one["name"] for one in RECORDS[:20] if one != RECORDS[3]]
    assert sorted(one["caption"] for one in mapped) == sorted(kept)
    assert all(one.keys() == {"image", "caption"} and one["image"] == b"jay" for one in mapped)
    described.write_text("sample_loader: loader.py:load\n")
    with pytest.raises(InputError, match=r"sample_loader is 'loader.py:load', code that is not"):
        open_file(path, tmp_path / "index")


def test_energon_without_its_package_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "megatron.energon.epathlib", None)
    (tmp_path / ".nv-meta").mkdir()
    (path,) = files_of([tmp_path])
    with pytest.raises(InputError, match=r"Energon dataset, .*: pip install megatron-energon"):
        open_file(path, tmp_path / "index")
