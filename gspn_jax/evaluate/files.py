"""Evaluation of images that are there: an .npz of the ADM layout, or a folder."""

import collections
import concurrent.futures
import contextlib
import dataclasses
import logging
import os
import pathlib
import time
from collections.abc import Iterator
from typing import Any, Literal

import jax
import numpy as np
from jaxtyping import Int, UInt8
from tqdm import tqdm

from gspn_jax.config import ConfigError, MeshConfig
from gspn_jax.data.ahead import read_ahead
from gspn_jax.data.captions import caption_of, prompt_in, read_captions
from gspn_jax.data.decoding import DataError, Fit
from gspn_jax.data.flat_folder import FlatFolder
from gspn_jax.data.listing import describe, kind_of
from gspn_jax.evaluate.scoring import ScoreFlags, Scorer, finish
from gspn_jax.files import sha256_of
from gspn_jax.metrics import npz
from gspn_jax.metrics.reference import FEWEST
from gspn_jax.metrics.scores import captioned
from gspn_jax.parallel import sharding
from gspn_jax.runs import same_hosts

log = logging.getLogger(__name__)

CHUNK = 64
"""Images that are read at a time."""
_SETTINGS, _OF_SAMPLER = {"step", "ema_decay", "sampler", "seed", "labels"}, {"name", "steps", "guidance_scale"}
"""Fields of what sample.py writes beside its images."""
_FILTERS = {"adm": "ADM's", "lanczos": "a Lanczos"}
_LOSSY = (".jpg", ".jpeg", ".webp", ".gif")


@dataclasses.dataclass(frozen=True, kw_only=True)
class FileFlags(ScoreFlags):
    """Scores images that are there; the result goes beside them unless --output says where."""

    samples: str
    """An .npz with uint8 images [N, H, W, 3] as arr_0, or a folder of images."""
    image_size: int | None = None
    """Scale and crop the images of a folder to a square of this size; by default they are not touched."""
    fit: Fit = "adm"
    """How: as ADM does, or the largest square in the centre by a Lanczos filter, as is usual with COCO."""
    captions: str | None = None
    """A file of the captions of a folder's images for --metrics clip: .parquet, .jsonl, or .json such as COCO's. By
    default the prompts that gspn_jax.text_to_image wrote into its images."""
    threads: int = os.cpu_count() or 1
    """Threads that decode the images of a folder."""
    bad_images: Literal["error", "skip"] = "error"
    """Effect of a corrupt image of a folder: stop with its name, or be left out with a warning."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("image_size", "threads"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ConfigError(f"--{name.replace('_', '-')} must be 1 or more, found {value}")
        if self.fit != "adm" and self.image_size is None:
            raise ConfigError(f"--fit {self.fit} needs --image-size, found none")
        if self.captions and not captioned(self.metrics):
            raise ConfigError(f"--captions is for --metrics clip, found {', '.join(self.metrics) or 'no --metrics'}")


@dataclasses.dataclass(frozen=True)
class _Samples:
    size: tuple[int, int]
    count: int
    labels: Int[np.ndarray, " N"] | None
    about: dict[str, Any]
    """Entries of a result that tell of them."""
    warnings: list[str]
    chunks: Iterator[UInt8[np.ndarray, "n H W 3"]]
    captions: list[str] = dataclasses.field(default_factory=list)
    """Of the images that `chunks` has given so far, where metrics need them."""


def evaluate_files(flags: FileFlags) -> dict[str, Any]:
    """Scores `flags.samples`, prints the table and writes the JSON; returns what it wrote."""
    same_hosts.check_flags(flags)
    same_hosts.check_files(flags.files() | {"--samples": flags.samples, "--captions": flags.captions})
    with flags.claimed():
        return _evaluate(flags)


def _evaluate(flags: FileFlags) -> dict[str, Any]:
    path = pathlib.Path(flags.samples)
    if not path.exists():
        raise ConfigError(f"--samples must be an .npz file or a folder of images, found nothing at {flags.samples!r}")
    samples = _folder(flags, path) if path.is_dir() else _npz(flags, path)
    if samples.count < FEWEST:
        raise ConfigError(f"--samples must hold {FEWEST} images or more, found {samples.count}")
    scorer = Scorer(flags, sharding.make_mesh(MeshConfig()))
    start = time.perf_counter()
    scorer.prepare()
    with (
        contextlib.closing(samples.chunks) as chunks,
        tqdm(
            total=samples.count, unit="image", desc="scoring", dynamic_ncols=True, disable=jax.process_index() > 0
        ) as bar,
    ):
        result = scorer.score(
            _counted(chunks, bar),
            labels=samples.labels,
            captions=samples.captions,
            warnings=samples.warnings,
            samples=samples.about | {"source": str(path), "count": samples.count, "image_size": list(samples.size)},
        )
    result["environment"]["seconds"] = time.perf_counter() - start
    whole = path.resolve()  # "." has no name
    beside = whole.with_name((whole.name if whole.is_dir() else whole.stem) + ".json")
    finish(result, flags, beside)
    return result


def _counted(chunks: Iterator[np.ndarray], bar: tqdm) -> Iterator[np.ndarray]:
    for chunk in chunks:
        yield chunk
        bar.update(len(chunk))


def _npz(flags: FileFlags, path: pathlib.Path) -> _Samples:
    if flags.image_size is not None:
        raise ConfigError("--image-size is for the images of a folder, found an .npz, which is scored as it is")
    if wanted := captioned(flags.metrics):
        raise ConfigError(f"--metrics {', '.join(wanted)} is of a folder of images with captions, found an .npz")
    images = npz.StoredImages(path, "--samples")
    found = npz.names(path, "--samples")
    labels = None
    if "arr_1" in found:
        claimed = npz.header(path, "arr_1")
        if claimed.shape == (len(images),) and claimed.dtype.kind in "iu":  # else another program keeps something there
            labels = npz.read(path, "arr_1")
    about = _settings(npz.read_text(path, "settings")) if "settings" in found else {}
    return _Samples(
        size=images.shape[1:3],
        count=len(images),
        labels=labels,
        about=about | {"sha256": sha256_of(path)},
        warnings=[],
        chunks=images.batches(CHUNK),
    )


def _settings(about: dict[str, Any]) -> dict[str, Any]:
    """Settings that the file tells of its samples; nothing where it names a sampler in another way than sample.py
    does."""
    if "sampler" not in about:
        return about
    sampler = about["sampler"]
    if not isinstance(sampler, dict) or _SETTINGS - about.keys() or _OF_SAMPLER - sampler.keys():
        return {}
    ema = about["ema_decay"] if about["ema_decay"] is not None else about.get("ema_width")
    numbers = (ema, sampler["guidance_scale"])
    return about if all(isinstance(number, float | int) for number in numbers) else {}


def _folder(flags: FileFlags, path: pathlib.Path) -> _Samples:
    if (path / "checkpoints").is_dir():
        raise ConfigError(
            f"--samples must be an .npz file or a folder of images, found the run directory {path}: give it as --run"
        )
    folder = FlatFolder(path, flags.image_size, skip_bad=flags.bad_images == "skip", fit=flags.fit)
    texts, told = _captions(flags, folder) if captioned(flags.metrics) else ([], {})
    # files are often sorted by class, which would be the end of the Inception score
    order = np.random.default_rng(0).permutation(len(folder))

    def chunks() -> Iterator[UInt8[np.ndarray, "n H W 3"]]:
        with (
            concurrent.futures.ThreadPoolExecutor(flags.threads) as pool,
            contextlib.closing(read_ahead(pool, folder, order, 2 * max(CHUNK, flags.threads))) as decoded,
        ):
            waiting, bad = [], 0
            for number, record in zip(order, decoded, strict=True):
                try:
                    waiting.append(record()["image"])
                    captions.extend(texts[number : number + 1])
                except DataError as error:
                    if flags.bad_images == "error":
                        raise
                    log.warning("%s; it is left out", error)
                    bad += 1
                if len(waiting) == CHUNK:
                    yield np.stack(waiting)
                    waiting = []
            if waiting:
                yield np.stack(waiting)
            if len(folder) - bad < FEWEST:
                raise DataError(
                    f"--samples must hold {FEWEST} images or more that can be read, found {len(folder) - bad}"
                )
            if bad:
                warnings.append(f"{bad:,} of the {len(folder):,} files could not be read and were left out")

    captions: list[str] = []
    warnings = [f"left out of the folder: {folder.left_out}"] if folder.left_out else []
    if flags.image_size is not None:
        told["fit"] = flags.fit
        warnings.append(
            f"the images were scaled and cropped to {flags.image_size}x{flags.image_size} here, by "
            f"{_FILTERS[flags.fit]} filter: another filter gives another FID"
        )
    lossy = collections.Counter(kind_of(name) for name in folder.files if kind_of(name) in _LOSSY)
    if lossy:
        warnings.append(
            f"{describe(lossy)} of the samples are files of lossy compression: what it took away counts against them"
        )
    return _Samples(
        size=folder.shape[:2],
        count=len(folder),
        labels=None,
        about=told,
        warnings=warnings,
        chunks=chunks(),
        captions=captions,
    )


def _captions(flags: FileFlags, folder: FlatFolder) -> tuple[list[str], dict[str, Any]]:
    """The caption of every image of a folder, in order, the first where there are several; and what a result tells of
    them. Raises ConfigError for an image without one."""
    if flags.captions:
        captions = read_captions(flags.captions)
        names = [os.path.relpath(path, folder.root) for path in folder.files]
        found = [next(iter(caption_of(name, captions)), None) for name in names]
        told = {"captions": {"path": flags.captions, "sha256": sha256_of(flags.captions)}}
    else:
        found = [prompt_in(path) for path in folder.files]
        told = {"captions": "the prompts in the images"}
    missing = [path for path, caption in zip(folder.files, found, strict=True) if caption is None]
    if missing:
        where = f"in {flags.captions}" if flags.captions else "in it as a prompt, or in a file --captions"
        raise ConfigError(
            f"every image must have a caption {where} for --metrics clip, found none of {len(missing):,}, such as "
            f"{missing[0]}"
        )
    return [caption for caption in found if caption is not None], told
