"""Reference statistics of a set of images: moments of all, pool features of some; a killed run goes on.

The images are taken in parts. The sums of a part do not depend on what is computed where, and the first host adds them
up in order: so the result is the same to the byte, however often it was begun and on however many hosts.
"""

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import json
import logging
import pathlib
import re
import shutil
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from jaxtyping import Array, UInt8

from gspn_jax.config import ConfigError
from gspn_jax.data.ahead import read_ahead
from gspn_jax.data.decoding import Fit
from gspn_jax.data.flat_folder import FlatFolder
from gspn_jax.data.source import Source
from gspn_jax.files import claim_new, replacing, sha256_of
from gspn_jax.prepare.images import ImageFlags
from gspn_jax.small_files import DamagedFile, parse, typed

if TYPE_CHECKING:
    from gspn_jax.metrics.networks import Weights

log = logging.getLogger(__name__)

PARTIAL = ".gspn-partial"
"""End of an output's name for the folder of what is known so far."""
_OURS = re.compile(r"state\.npz|part-\d{5,}\.npz")
_SEAL = "sha256"
"""The array of a file of sums that holds the digest of the others."""
_PARTS = {"inception": ("pool", "spatial"), "dinov2": ("dinov2",)}
"""Features of a network whose moments are kept: fields of a `Reference`."""
_STATE_BYTES = {"inception": 8 * (2048**2 + 2023**2), "dinov2": 8 * 1536**2}
"""The sums of a part; as much room have the sums so far, those that replace them, and the result."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stats(ImageFlags):
    """Reference statistics for FID, sFID, KID, precision and recall, and with --dinov2 for FD-DINOv2: give --images,
    --tars, --tfds or --npz."""

    KINDS: ClassVar[tuple[str, ...]] = (*ImageFlags.KINDS, "npz")

    images: str | None = None
    """A folder of images, in class folders or not."""
    inception: str | None = None
    """Weights of Inception-v3 (.pth or .safetensors), or clean:FILE for statistics of clean-fid; may be left out with
    --dinov2."""
    dinov2: str | None = None
    """A folder of DINOv2 as transformers writes it, or a file of its weights (ViT-L/14 in published numbers)."""
    output: str
    """The .npz to write, which training takes as eval.reference and `gspn_jax.evaluate` as --reference."""
    npz: str | None = None
    """An .npz with images as arr_0, of the size that they have there."""
    image_size: int | None = None
    """Side of the square that each image is scaled and cropped to, as `fit` says: the size of the samples."""
    fit: Fit = "adm"
    """How: as ADM does, or the largest square in the centre by a Lanczos filter, as is usual with COCO."""
    keep: int = 10_000
    """Number of images, spread evenly over the set, of which single features are kept for KID, precision and recall."""
    keep_images: bool = False
    """Keep those images too, so that the ADM evaluator can read the file (2 GB for 10,000 of 256 pixels)."""
    save_every: int = 10_000
    """Images of a part: a killed run loses at most so many of each host."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_positive("save_every")
        if self.keep < 0:
            raise ConfigError(f"--keep must be 0 or more, found {self.keep}")
        if bool(self.npz) == (self.image_size is not None):
            raise ConfigError(
                "--image-size must be given, as the size of the samples, unless the images are those of "
                f"--npz, found --image-size {self.image_size}"
            )
        if self.image_size is not None:
            self.check_positive("image_size")
        if self.fit != "adm" and not self.images:
            raise ConfigError(f"--fit {self.fit} is for the images of --images, found others")
        if pathlib.Path(self.output).suffix != ".npz":
            raise ConfigError(f"--output must end in .npz, found {self.output!r}")

    def source(self, image_size: int) -> Source:
        """As `ImageFlags.source`, but images need not lie in class folders."""
        if not self.images:
            return super().source(image_size)
        return FlatFolder(self.images, image_size, skip_bad=self.bad_images == "skip", fit=self.fit)


class _Set:
    """The images in order, whatever they come from."""

    def __init__(self, arguments: Stats):
        self._arguments = arguments
        if arguments.npz:
            from gspn_jax.metrics.npz import StoredImages

            self._stored = StoredImages(arguments.npz, "--npz")
            self.size, self.side = len(self._stored), self._stored.shape[1:3]
            self.fingerprint = sha256_of(arguments.npz)
        else:
            self._source = arguments.source(arguments.image_size)
            self.size, self.side = len(self._source), (arguments.image_size,) * 2
            self.fingerprint = self._source.fingerprint
        self.name = next(getattr(arguments, kind) for kind in arguments.KINDS if getattr(arguments, kind))

    def read(self, indices: range | np.ndarray) -> Iterator[UInt8[np.ndarray, "H W 3"] | None]:
        """The images of ascending indices; None for one that is bad and left out.

        Raises DataError for a bad image that must not be left out.
        """
        from gspn_jax.data import DataError

        if (arguments := self._arguments).npz:
            wanted, start = set(indices), int(indices[0])
            for batch in self._stored.batches(arguments.batch_size, start):
                for number, image in enumerate(batch, start):
                    if number in wanted:
                        yield image
                    if number == indices[-1]:
                        return
                start += len(batch)
            return
        ahead = 4 * max(arguments.batch_size, arguments.threads)
        with (
            concurrent.futures.ThreadPoolExecutor(arguments.threads) as pool,
            contextlib.closing(read_ahead(pool, self._source, indices, ahead)) as records,
        ):
            for record in records:
                try:
                    yield record()["image"]
                except DataError as error:
                    if arguments.bad_images == "error":
                        raise
                    log.warning("%s; it is left out", error)
                    yield None


def prepare_stats(arguments: Stats) -> None:
    """Writes the statistics that `arguments` ask for. The same arguments go on behind a killed run's last save, and
    end in the same file.

    Raises ConfigError, WeightsError or DataError with one sentence for what cannot be used; OSError for a full disk.
    """
    from gspn_jax.parallel.agreement import on_first_host

    output = pathlib.Path(arguments.output)
    with contextlib.ExitStack() as stack:
        on_first_host(lambda: stack.enter_context(claim_new(output)), ConfigError, OSError)
        _prepare(arguments, output)


def _prepare(arguments: Stats, output: pathlib.Path) -> None:
    """The statistics into `output`, which the first host has claimed."""
    import jax
    from tqdm import tqdm

    from gspn_jax.metrics.extractor import Extractor
    from gspn_jax.metrics.reference import Reference
    from gspn_jax.parallel.agreement import meet
    from gspn_jax.prepare.hosts import wait_until
    from gspn_jax.runs import same_hosts

    # --- what can be wrong is found first
    networks = _networks(arguments)
    images = _Set(arguments)
    chosen = np.unique(np.linspace(0, images.size - 1, min(arguments.keep, images.size)).astype(int))
    kept_bytes = len(chosen) * (3 * 4 * 2048 + arguments.keep_images * 3 * int(np.prod(images.side)))
    needed = (3 + jax.process_count()) * sum(_STATE_BYTES[name] for name in networks) + kept_bytes
    if (free := shutil.disk_usage(output.parent).free) < needed:
        raise ConfigError(
            f"the statistics need {needed / 1e9:.1f} GB in {output.parent}, found {free / 1e9:.1f} GB free"
        )
    extractors = {
        name: Extractor(one.params, batch_size=arguments.batch_size, network=one.network)
        for name, one in networks.items()
    }
    batch_size = next(iter(extractors.values())).batch_size
    parts_kept = [part for name in networks for part in _PARTS[name]]
    digests = {f"{name}_sha256": one.digest for name, one in networks.items()}
    settings = digests | {
        "images": images.fingerprint,
        "image_size": list(images.side),
        "keep": len(chosen),
        "bad_images": arguments.bad_images,
        "batch_size": batch_size,
        "save_every": arguments.save_every,
    }
    if arguments.fit != "adm":  # states from before there was a choice say nothing of it
        settings["fit"] = arguments.fit
    same_hosts.check_values(settings | {"output": arguments.output})

    # --- this host's parts that are not there yet
    progress = _Progress(output.with_name(output.name + PARTIAL), settings, parts_kept)
    parts = [
        range(start, min(start + arguments.save_every, images.size))
        for start in range(0, images.size, arguments.save_every)
    ]
    mine = [
        number for number in range(jax.process_index(), len(parts), jax.process_count()) if not progress.has(number)
    ]
    first_host = jax.process_index() == 0
    meet("statistics")
    with tqdm(
        total=sum(len(parts[number]) for number in mine), unit="image", desc="features", dynamic_ncols=True
    ) as bar:
        for number in mine:
            before, computed = bar.n, _Sums(parts_kept)
            usable = (
                (index, image)
                for index, image in zip(parts[number], images.read(parts[number]), strict=True)
                if image is not None
            )
            for batch in _batches(usable, batch_size):
                indices = [index for index, _ in batch]
                features, mask = _features(extractors, np.stack([image for _, image in batch]))
                computed.add(features, mask, np.isin(indices, chosen))
                bar.update(before + indices[-1] + 1 - parts[number].start - bar.n)
            progress.save(number, computed)
            bar.update(before + len(parts[number]) - bar.n)
            if first_host:
                progress.take_in()
    if not first_host:
        wait_until(output.exists, "the first host, which writes the statistics")
        return
    wait_until(lambda: progress.take_in() == len(parts), "the parts of other hosts")

    # --- the result
    sums = progress.sums
    count = sums.moments[parts_kept[0]].count
    if count < 2:
        raise ConfigError(f"statistics need at least 2 images that can be used, found {count} of {images.size}")
    reference = Reference(
        str(output),
        "",
        **{part: sums.moments[part].gaussian() for part in parts_kept},
        features=sums.features() if len(chosen) and "inception" in networks else None,
        num_images=count,
        image_size=images.side,
        **digests,
    )
    kept = None
    if arguments.keep_images and len(chosen):
        kept = np.stack([image for image in images.read(chosen) if image is not None])
    reference.write(output, source=images.name, images=kept)
    progress.remove()
    left_out = images.size - count
    print(
        f"statistics of {count:,} images of {images.side[0]}x{images.side[1]} in {output}"
        + (f"; bad images left out: {left_out:,}" if left_out else "")
        + f"; they allow {', '.join(reference.allowed)}"
    )


def _networks(arguments: Stats) -> "dict[str, Weights]":
    """The networks that are asked for, by name. Raises ConfigError, WeightsError or OSError."""
    from gspn_jax.metrics.networks import read_network

    found = {}
    if arguments.inception or not arguments.dinov2:
        found["inception"] = read_network("inception", arguments.inception, "--inception")
    if arguments.dinov2:
        found["dinov2"] = read_network("dinov2", arguments.dinov2, "--dinov2")
    return found


def _features(
    extractors: Mapping[str, Any], images: UInt8[np.ndarray, "n H W 3"]
) -> tuple[dict[str, Array], Array | np.ndarray]:
    """Features of images by part, and the mask of all."""
    found, mask = {}, np.zeros(0, bool)
    for name, extractor in extractors.items():
        features, mask = extractor(images)
        found |= {name: features} if name in _PARTS[name] else {part: getattr(features, part) for part in _PARTS[name]}
    return found, mask


def _batches(items: Iterator, size: int) -> Iterator[list]:
    batch = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


class _Sums:
    """Moments of images, and the pool features of those among them that are kept."""

    def __init__(self, parts: Sequence[str] = _PARTS["inception"]):
        from gspn_jax.metrics.moments import Moments

        self.moments = {part: Moments() for part in parts}
        self._features: list[np.ndarray] = []

    def add(self, features: Mapping[str, Array], mask, chosen: np.ndarray) -> None:
        """Adds a batch, and keeps the pool features of the rows that are `chosen`."""
        for part, moments in self.moments.items():
            moments.add(features[part], mask)
        if chosen.any() and "pool" in features:
            self._features.append(np.asarray(features["pool"])[: len(chosen)][chosen])

    def merge(self, path: pathlib.Path) -> None:
        """Adds the sums that were written to `path`. Raises DamagedError, having added nothing, for a damaged file."""
        found = _read(path)
        if len(found["features"]):
            self._features.append(found["features"])
        for part, moments in self.moments.items():
            moments.merge(
                {name.removeprefix(f"{part}."): array for name, array in found.items() if name.startswith(f"{part}.")}
            )

    def features(self) -> np.ndarray:
        return np.concatenate(self._features) if self._features else np.zeros((0, 0), np.float32)

    def write(self, path: pathlib.Path, **about) -> None:
        arrays = {
            f"{part}.{name}": array for part, moments in self.moments.items() for name, array in moments.state().items()
        }
        arrays |= {"features": self.features()} | {name: np.asarray(value) for name, value in about.items()}
        with replacing(path) as temporary, open(temporary, "wb") as file:
            np.savez(file, **arrays, **{_SEAL: np.array(_digest(arrays))})


class DamagedError(ConfigError):
    """A file of sums that is not as it was written."""


def _read(path: pathlib.Path) -> dict[str, np.ndarray]:
    """The arrays of a file of sums. Raises DamagedError for one that is not as it was written."""
    try:
        with np.load(path, allow_pickle=False) as file:
            found = {name: file[name] for name in file.files}
        seal = str(found.pop(_SEAL))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise DamagedError(f"{path} cannot be read ({type(error).__name__})") from error
    if _digest(found) != seal:
        raise DamagedError(f"{path} has changed since it was written")
    return found


def _digest(arrays: dict[str, np.ndarray]) -> str:
    total = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        total.update(f"{name} {array.dtype} {array.shape}".encode())
        total.update(array.tobytes())
    return total.hexdigest()


class _Progress:
    """What is known of the images so far: `sums` of the first `parts`, as the state in `folder`, where further parts
    lie as files of their own until the first host has taken them in."""

    def __init__(self, folder: pathlib.Path, settings: dict, parts: Sequence[str] = _PARTS["inception"]):
        """`parts` are the features whose sums are kept."""
        self.folder, self._settings = folder, settings
        self.sums, self.parts = _Sums(parts), 0
        folder.mkdir(exist_ok=True)
        others = [path for path in folder.iterdir() if not (path.name.startswith(".") or _OURS.fullmatch(path.name))]
        if others:
            raise ConfigError(
                f"{folder} must be the unfinished statistics of an earlier call, found {others[0].name} in it: move it "
                "away, or choose another --output"
            )
        for path in self._files():
            try:
                before = typed(parse(str(_read(path)["settings"]), f"settings in {path}"), dict, f"settings in {path}")
                if before.get("file") != path.name:
                    raise DamagedError(f"{path} is {before.get('file')} under another name")
            except (DamagedError, DamagedFile) as error:
                log.warning("%s: it is computed again", error)
                path.unlink(missing_ok=True)
                continue
            changed = [name for name in settings if before.get(name) != settings[name]]
            if changed:
                raise ConfigError(
                    f"{folder} was begun with other settings ({', '.join(changed)}): repeat them, choose "
                    "another --output, or delete it"
                )
        if self._state.exists():
            self.sums.merge(self._state)
            self.parts = int(_read(self._state)["parts"])

    def _files(self) -> list[pathlib.Path]:
        return [path for path in self.folder.iterdir() if _OURS.fullmatch(path.name)]

    def remove(self) -> None:
        """Removes what is ours."""
        for path in self._files():
            path.unlink()
        with contextlib.suppress(OSError):
            self.folder.rmdir()

    @property
    def _state(self) -> pathlib.Path:
        return self.folder / "state.npz"

    def _part(self, number: int) -> pathlib.Path:
        return self.folder / f"part-{number:05}.npz"

    def has(self, number: int) -> bool:
        """Whether a part need not be computed."""
        return number < self.parts or self._part(number).exists()

    def save(self, number: int, computed: _Sums) -> None:
        computed.write(self._part(number), settings=self._about(self._part(number)))

    def _about(self, path: pathlib.Path) -> str:
        return json.dumps(self._settings | {"file": path.name})

    def take_in(self) -> int:
        """Adds the parts that are next, notes it, removes their files; returns how many parts are in. For one host."""
        done = self.parts
        while self._part(self.parts).exists():
            self.sums.merge(self._part(self.parts))
            self.parts += 1
        if self.parts > done:
            self.sums.write(self._state, settings=self._about(self._state), parts=self.parts)
        for path in self.folder.glob("part-*.npz"):  # also what a kill left between the state and its removal
            if int(path.stem.removeprefix("part-")) < self.parts:
                path.unlink(missing_ok=True)
        return self.parts
