"""Shards of records of one size each, in array_record files, read in any order."""

import dataclasses
import pathlib
from collections.abc import Iterable, Sequence

import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource
from array_record.python.array_record_module import ArrayRecordWriter

from gspn_jax.config import ConfigError
from gspn_jax.data.decoding import DataError
from gspn_jax.files import replacing
from gspn_jax.small_files import DamagedFile, is_within

WRITER_OPTIONS = "group_size:1,uncompressed"
"""Moments hardly compress, and a record alone in its group is read without its neighbours."""


@dataclasses.dataclass(frozen=True)
class Shard:
    """A file of a set: its name, and how many records and bytes it holds."""

    name: str
    records: int
    bytes: int


def shard_name(stem: str, number: int, count: int) -> str:
    return f"{stem}-{number:05}-of-{count:05}.array_record"


def write(path: pathlib.Path, records: Iterable[bytes]) -> Shard:
    """Writes the records to `path` by way of a temporary file, so that a shard is whole or absent.

    Raises OSError for a disk that is full.
    """
    with replacing(path) as temporary:
        try:
            writer, count = ArrayRecordWriter(str(temporary), WRITER_OPTIONS), 0
            for record in records:
                writer.write(record)
                count += 1
            writer.close()
        except RuntimeError as error:  # what array_record raises for a full disk
            raise OSError(f"{path} cannot be written: {error}") from error
    return Shard(path.name, count, path.stat().st_size)


def check_names(shards: Sequence[Shard], name: str) -> None:
    """Raises DamagedFile, speaking of the metadata `name`, for a shard that is no path within its folder."""
    outside = next((shard.name for shard in shards if not is_within(shard.name)), None)
    if outside is not None:
        raise DamagedFile(f"{name} names the shard {outside!r}, which is no path within the folder")


class RecordFiles:
    """Records of all shards in a folder, in the order of the shards; readable from several threads and picklable."""

    def __init__(self, folder: pathlib.Path, shards: Sequence[Shard], record: np.dtype):
        """Raises ConfigError, before anything is read, for missing or cut shards."""
        for shard in shards:
            path = folder / shard.name
            size = path.stat().st_size if path.is_file() else None
            if size != shard.bytes:
                raise ConfigError(
                    f"{path} must be a shard of {shard.bytes} bytes, found "
                    f"{'no such file' if size is None else f'{size} bytes'}"
                )
        self._shards, self._record = tuple(shards), record
        self._records = ArrayRecordDataSource(
            [_Instruction(str(folder / shard.name), 0, shard.records, shard.records) for shard in shards]
        )
        self._ends = np.cumsum([shard.records for shard in shards])

    def __getitem__(self, index: int) -> np.void:
        """Raises DataError for a damaged record."""
        try:
            record = self._records[index]
        except (RuntimeError, ValueError) as error:
            raise DataError(f"{self.name(index)} cannot be read: {error}") from error
        if len(record) != self._record.itemsize:
            raise DataError(f"{self.name(index)} must have {self._record.itemsize} bytes, found {len(record)}")
        return np.frombuffer(record, self._record)[0]

    def name(self, index: int) -> str:
        """Name of a record for a sentence, by its shard."""
        shard = int(np.searchsorted(self._ends, index, side="right"))
        start = self._ends[shard] - self._shards[shard].records
        return f"record {index - start} of {self._shards[shard].name}"


@dataclasses.dataclass(frozen=True)
class _Instruction:
    """What array_record calls a FileInstruction: with it, no shard is opened before a record of it is wanted."""

    filename: str
    skip: int
    take: int
    examples_in_shard: int
