"""Files of records in every container, and sources that make samples of them without a model."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from megatron.mimo.data.bad_samples import BadSample, BadSamplePolicy
from megatron.mimo.data.formats import RawRecord
from megatron.mimo.data.global_batches.planned_batches import SampleSources
from megatron.mimo.data.measure import Measure
from megatron.mimo.data.sample import Sample
from megatron.mimo.data.sources import Mixture, MixtureSpec, SourceSpec

Records = Sequence[Mapping[str, Any]]


def write_lines(path: Path, records: Records) -> Path:
    text = "".join(json.dumps(record) + "\n" for record in records)
    if path.suffix == ".gz":
        with gzip.open(path, "wt") as packed:
            packed.write(text)
    elif path.suffix == ".zst":
        import zstandard

        path.write_bytes(zstandard.compress(text.encode()))
    else:
        path.write_text(text)
    return path


def write_parquet(path: Path, records: Records, group: int = 7) -> Path:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(list(records)), path, row_group_size=group)
    return path


def write_arrow(path: Path, records: Records) -> Path:
    import pyarrow

    table = pyarrow.Table.from_pylist(list(records))
    with (
        pyarrow.OSFile(str(path), "wb") as sink,
        pyarrow.ipc.new_file(sink, table.schema) as writer,
    ):
        writer.write_table(table, max_chunksize=5)
    return path


def write_tar(
    path: Path,
    records: Records,
    media: Mapping[str, bytes] | None = None,
    folder: str = "folder",
) -> Path:
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as tar:
        for number, record in enumerate(records):
            members = {"json": json.dumps(record).encode(), **(media or {})}
            for ending, content in members.items():
                member = tarfile.TarInfo(f"{folder}/{number:05d}.{ending}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return path


def numbered(count: int, prefix: str = "r") -> list[dict[str, Any]]:
    """Records with a name and a length; one in 20 is bad."""
    return [
        {
            "name": f"{prefix}{number}",
            "length": 3 + (number * 7919) % 29,
            "bad": number % 20 == 11,
        }
        for number in range(count)
    ]


def read_number(record: RawRecord) -> Sample | BadSample:
    if record.value["bad"]:
        return BadSample(
            file=str(record.file), place=record.place, medium=None, kind="bad", reason="is bad"
        )
    ids_L = torch.full((record.value["length"],), 1)
    return Sample(name=record.value["name"], token_ids=ids_L, is_label=ids_L > 0)


def measure_number(record: RawRecord) -> Measure | BadSample:
    sample = read_number(record)
    if isinstance(sample, BadSample):
        return sample
    return Measure(len(sample.token_ids))


def mixed(folder: Path, spec: MixtureSpec, *, seed: int | None = 1, buffer: int = 10) -> Mixture:
    return Mixture(spec, index_folder=folder / "index", seed=seed, buffer=buffer)


def two_sources(folder: Path) -> MixtureSpec:
    """A file of lines of which any may come, and two tars that are streamed."""
    folder.mkdir(exist_ok=True)
    if not (folder / "lines.jsonl").exists():
        write_lines(folder / "lines.jsonl", numbered(97))
        write_tar(folder / "0.tar", numbered(40, "s"))
        write_tar(folder / "1.tar", numbered(31, "t"))
    return MixtureSpec(
        sources=[
            SourceSpec(name="lines", paths=[str(folder / "lines.jsonl")], weight=2),
            SourceSpec(name="tars", paths=[str(folder / "*.tar")]),
        ],
        changes=[(4, {"lines": 1, "tars": 3})],
    )


def number_sources(folder: Path, **changes: Any) -> SampleSources:
    """Sources of the two, with bad samples skipped."""
    return SampleSources(
        mixture=mixed(folder, two_sources(folder)),
        read=read_number,
        measure=measure_number,
        policy=BadSamplePolicy(on_bad_sample="skip"),
        **({"look_ahead": 24} | changes),
    )
