"""A set of shards made once, shard by shard, by any number of hosts: a killed run loses the shard that it was writing,
and the same command goes on and ends in the same bytes.

Beside each shard lies a note until the metadata of the whole has what it says, and in the folder the settings that it
was begun with.
"""

import concurrent.futures
import contextlib
import dataclasses
import json
import logging
import pathlib
import shutil
import time
from collections.abc import Callable, Sequence
from typing import Any

from gspn_jax.config import ConfigError
from gspn_jax.data.ahead import Record, read_ahead
from gspn_jax.data.source import Source
from gspn_jax.files import claim, remove_leftovers, replacing, sha256_of
from gspn_jax.prepare.hosts import check_share
from gspn_jax.prepare.images import ReadFlags
from gspn_jax.small_files import DamagedFile, read_as

log = logging.getLogger(__name__)

_SPARE_RATIO, _SPARE_BYTES = 1.01, 2**18
"""Bytes that array_record adds to the records, and to each shard."""
_NOTE = {"skipped": int, "bytes": int, "sha256": str}
"""Entries of the note of every shard."""

Note = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShardFlags(ReadFlags):
    """Flags of a set that is written in shards, and of who writes which."""

    output: str
    """The folder to write, which a training run then takes as data.path."""
    shard_size: int = 4096
    """Images a file; a killed run loses at most the file it was writing."""
    num_hosts: int = 1
    """Number of hosts that do not know one another; those of one job (docs/launch) need neither this nor `host`."""
    host: int = 0
    """Number of this host among `num_hosts`; 0 writes the metadata at the end."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_positive("shard_size", "num_hosts")
        check_share(self.host, self.num_hosts)


class Shards:
    """The shards of a set, of which each host makes its own: `begin`, `fill`, and where `is_last` says so `finish`."""

    def __init__(self, flags: ShardFlags, settings: dict[str, Any], *, count: int, stem: str, noted: dict[str, Any]):
        """`settings` decide the bytes of a set of `count` records; `noted` are the fields of a note by their types.

        Every host must make one. Raises ConfigError where hosts of one job do not do the same.
        """
        import jax

        from gspn_jax.data.record_files import shard_name
        from gspn_jax.runs import same_hosts

        self.output = pathlib.Path(flags.output)
        self.output.mkdir(parents=True, exist_ok=True)
        same_hosts.check_values(settings | {"output": flags.output})
        self._together = jax.process_count() > 1
        self._host, self._num_hosts = flags.host, flags.num_hosts
        if self._together:
            self._host, self._num_hosts = jax.process_index(), jax.process_count()
        self._flags, self._settings, self._stem, self._noted = flags, settings, stem, _NOTE | noted
        self._parts = [
            range(start, min(start + flags.shard_size, count)) for start in range(0, count, flags.shard_size)
        ]
        self.paths = [self.output / shard_name(stem, number, len(self._parts)) for number in range(len(self._parts))]
        self._mine: list[int] = []

    # --- what is there already
    def begin(self, record_bytes: int) -> None:
        """Finds what this host has to make. Raises ConfigError for a set that was begun with other settings and for a
        disk without room for records of so many bytes."""
        from gspn_jax.parallel.agreement import meet

        self._check_settings()
        mine = range(self._host, len(self._parts), self._num_hosts)
        self._mine = [number for number in mine if not self._is_done(self.paths[number])]
        self._check_disk(record_bytes)
        with replacing(self._settings_path(self._host)) as temporary:
            temporary.write_text(json.dumps(self._settings))
        meet(self._stem)

    def _settings_path(self, host: int | str) -> pathlib.Path:
        return self.output / f"preparation-{host}.json"

    def _is_done(self, shard: pathlib.Path) -> bool:
        """Tells whether a shard is there as its note has it, which is written after it; else both are made again."""
        try:
            note = read_as(_note_path(shard), self._noted)
            if shard.stat().st_size == note["bytes"] and sha256_of(shard) == note["sha256"]:
                return True
            log.warning("%s has changed since it was written and is encoded again", shard)
        except FileNotFoundError:
            return False
        except DamagedFile as error:
            log.warning("%s: the shard is encoded again", error)
        return False

    def _check_settings(self) -> None:
        """Raises ConfigError for other settings than it began with: shards would not belong together."""
        for path in self.output.glob(self._settings_path("*").name):
            try:
                before = read_as(path, dict)
            except DamagedFile as error:
                raise ConfigError(
                    f"{self.output} must say with which settings it was begun, but {error}: choose another --output, "
                    "or delete it"
                ) from error
            changed = [name for name in self._settings if before.get(name) != self._settings[name]]
            if changed:
                raise ConfigError(
                    f"{self.output} was begun with other settings ({', '.join(changed)}): repeat them, choose "
                    "another --output, or delete it"
                )

    def _check_disk(self, record_bytes: int) -> None:
        count = sum(len(self._parts[number]) for number in self._mine)
        needed = int(_SPARE_RATIO * count * record_bytes) + _SPARE_BYTES * len(self._mine)
        free = shutil.disk_usage(self.output).free
        if free < needed:
            raise ConfigError(
                f"the {self._stem} of {count:,} images need {needed / 1e9:.1f} GB in {self.output}, found "
                f"{free / 1e9:.1f} GB free"
            )

    # --- this host's shards that are not there yet
    def fill(
        self,
        source: Source,
        encode: Callable[[Sequence[Record]], Any],
        write: Callable[[pathlib.Path, list[Any]], Note],
    ) -> None:
        """Each shard: its images decoded by threads that work ahead, encoded batch by batch, and written whole.

        `encode` makes a batch of up to `batch_size` records, and `write` a shard of such batches: it returns what its
        note says. Raises DataError for an image that must not be left out, and where all of a shard are.
        """
        from tqdm import tqdm

        flags, numbers = self._flags, self._mine
        reading = _Reading(flags.bad_images)
        start, done = time.perf_counter(), 0
        indices = [index for number in numbers for index in self._parts[number]]
        ahead = 4 * max(flags.batch_size, flags.threads)
        claims = contextlib.ExitStack()
        for number in numbers[:1]:  # before there is a bar
            claims.enter_context(claim(self.paths[number]))
        with (
            claims,
            tqdm(total=len(indices), unit="image", dynamic_ncols=True, desc="encoding") as bar,
            concurrent.futures.ThreadPoolExecutor(flags.threads) as pool,
            contextlib.closing(read_ahead(pool, source, indices, ahead)) as decoded,
        ):
            for number in numbers:
                path, part = self.paths[number], self._parts[number]
                if number != numbers[0]:
                    claims.enter_context(claim(path))
                batches, skipped = [], reading.skipped
                for first in range(0, len(part), flags.batch_size):
                    size = min(flags.batch_size, len(part) - first)
                    records = reading.take(decoded, size)
                    if records:
                        batches.append(encode(records))
                    done += size
                    bar.update(size)
                    share = reading.waited / (time.perf_counter() - start)
                    bar.set_postfix_str(f"{share:.0%} waiting for decoding", refresh=False)
                if not batches:
                    from gspn_jax.data import DataError

                    raise DataError(
                        f"none of {len(part)} images in a row can be used, from number {part[0]} of the set"
                    )
                note = write(path, batches) | {
                    "skipped": reading.skipped - skipped,
                    "bytes": path.stat().st_size,
                    "sha256": sha256_of(path),
                }
                with replacing(_note_path(path)) as temporary:  # last: a shard counts once its note is there
                    temporary.write_text(json.dumps(note))
                claims.close()
        if done:
            seconds = time.perf_counter() - start
            print(
                f"{done:,} images in {seconds:.0f} s, {done / seconds:.1f} images/s, {reading.waited / seconds:.0%} of "
                "the time waiting for decoding"
            )

    # --- the metadata of the whole
    def is_last(self, metadata: pathlib.Path) -> bool:
        """Tells whether this host is to write `metadata`, after waiting for others of its job; says what is missing
        where it is not."""
        from gspn_jax.prepare.hosts import wait_until

        if self._together and self._host:
            wait_until(metadata.exists, "the first host, which writes the metadata")
            return False
        if self._together:
            wait_until(lambda: all(_note_path(path).exists() for path in self.paths), "the shards of other hosts")
        missing = sum(not _note_path(path).exists() for path in self.paths)
        if not self._host and not missing:
            return True
        print(
            f"host {self._host} is done"
            + (
                f"; {missing} of {len(self.paths)} shards of other hosts are missing: "
                "run the command of host 0 again when they are there"
                if missing
                else ""
            )
        )
        return False

    def finish(self, metadata: pathlib.Path, write: Callable[[list[Note]], str]) -> None:
        """Writes `metadata` by `write` of the notes on each shard, which are then removed; prints what that returns.
        Raises ClaimedError when another process does."""
        with claim(metadata):
            if metadata.exists():
                return  # that process has just ended
            notes = [read_as(_note_path(path), self._noted) for path in self.paths]
            said = write(notes)
            self.remove_notes()
        skipped = sum(note["skipped"] for note in notes)
        print(said + (f"; bad images left out: {skipped:,}" if skipped else ""))

    def refuse_changed(self, changed: Sequence[str]) -> None:
        """Raises ConfigError for a complete set where something has `changed`."""
        if changed:
            raise ConfigError(
                f"{self.output} is complete, with other settings ({', '.join(changed)}): choose another --output, or "
                "delete it"
            )

    def remove_notes(self) -> None:
        """Removes what a complete set does not need: notes, settings, and what kills left beside the shards."""
        for path in self.paths:
            remove_leftovers(path)
        for pattern in (self._settings_path("*").name, f"{self._stem}-*.json"):
            for path in self.output.glob(pattern):
                path.unlink(missing_ok=True)


def _note_path(shard: pathlib.Path) -> pathlib.Path:
    return shard.with_suffix(".json")


class _Reading:
    """Records as they come from threads, without bad ones; counts those and the seconds waited for them."""

    def __init__(self, bad_images: str):
        self._stops = bad_images == "error"
        self.skipped, self.waited = 0, 0.0

    def take(self, decoded, count: int) -> list[Record]:
        from gspn_jax.data import DataError

        records, before = [], time.perf_counter()
        for _ in range(count):
            try:
                records.append(next(decoded)())
            except DataError as error:
                if self._stops:
                    raise
                self.skipped += 1
                log.warning("%s; it is left out", error)
        self.waited += time.perf_counter() - before
        return records
