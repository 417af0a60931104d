"""Accuracy of a trained classifier on a folder of images, as JSON with all that a comparison needs."""

import contextlib
import dataclasses
import json
import pathlib
import time
from typing import Any, Literal

import jax

import gspn_jax
from gspn_jax.classify import weights
from gspn_jax.classify.config import check_view
from gspn_jax.classify.network import Network
from gspn_jax.classify.scoring import Scorer, check_classes
from gspn_jax.config import ConfigError, MeshConfig, check_numbers
from gspn_jax.data import Source
from gspn_jax.evaluate import report
from gspn_jax.files import claim_new
from gspn_jax.parallel import sharding
from gspn_jax.parallel.agreement import on_every_host, on_first_host
from gspn_jax.prepare.images import ImageFlags
from gspn_jax.runs import same_hosts
from gspn_jax.runs.digest import digest_of

INTERPOLATION = "bicubic, antialiased"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Score a run on labelled images: one folder a class, tensorflow-datasets, or records."""

    run: str
    """A run directory, or what `export` wrote."""
    images: str | None = None
    """A folder with one folder of images a class, whose names are those that were trained on."""
    records: str | None = None
    """A folder that `python -m gspn_jax.prepare images` wrote."""
    tfds: str | None = None
    """The name of a tensorflow-datasets set."""
    tfds_dir: str | None = None
    tfds_split: str = "validation"
    step: int | None = None
    """The checkpoint; the latest by default."""
    ema: tuple[float, ...] | None = None
    """EMA decays to score, 0 for the parameters themselves; all by default."""
    image_size: int | None = None
    """Side of the crop that is looked at; that of the config by default. Any size will do."""
    crop: float | None = None
    """The share of the shorter side that is looked at; that of the config by default."""
    batch_size: int = 128
    """Images at a time over all devices."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the computation."""
    output: str | None = None
    """A file for the JSON; by default evaluation/<set>.json of the run directory, so that model cards find it."""
    mesh: MeshConfig = MeshConfig()

    def __post_init__(self) -> None:
        check_numbers(self)
        given = [name for name in ("images", "records", "tfds") if getattr(self, name)]
        if len(given) != 1:
            raise ConfigError(f"one of --images, --records and --tfds must be given, found {given or 'none'}")
        if self.batch_size < 1:
            raise ConfigError(f"--batch-size must be 1 or more, found {self.batch_size}")
        check_view(self.image_size, self.crop)

    def source(self, channels: int) -> Source:
        if self.records:
            from gspn_jax.data.records import RecordSource

            return RecordSource(self.records, None, channels)
        if self.images:
            from gspn_jax.data.folder import FolderSource

            return FolderSource(self.images, None, channels)
        return ImageFlags(tfds=self.tfds, tfds_dir=self.tfds_dir, tfds_split=self.tfds_split).source(None)


def evaluate(arguments: Evaluate) -> dict[str, Any]:
    """Prints and writes the scores, and returns them; the first host does both.

    Raises ConfigError, CheckpointError, WeightsError or DataError with one sentence for what cannot be used.
    """
    same_hosts.check_flags(arguments)
    with contextlib.ExitStack() as stack:
        if arguments.output:
            path = pathlib.Path(arguments.output)
            on_first_host(lambda: stack.enter_context(claim_new(path)), ConfigError)
        return _evaluate(arguments)


def _evaluate(arguments: Evaluate) -> dict[str, Any]:
    mesh = sharding.make_mesh(arguments.mesh)
    source = on_every_host(lambda: _source(arguments))
    same_hosts.check_data(source.fingerprint, source.class_names)
    trained = weights.read(arguments.run, mesh, step=arguments.step, decays=arguments.ema)
    config = trained.config
    size, crop = arguments.image_size or config.validation.image_size, arguments.crop or config.eval.crop
    network = Network(config, arguments.dtype)
    scorer = Scorer(config, network, source, mesh, size=size, crop=crop, batch_size=arguments.batch_size)
    scorer.compile(next(iter(trained.sets.values())))
    rows = []
    for name, params in trained.sets.items():
        start = time.perf_counter()
        scores = scorer.score(params)
        seconds = time.perf_counter() - start
        rows.append(
            {
                "weights": name,
                "top1": scores.top1,
                "top5": scores.top5,
                "loss": scores.loss,
                "images_per_second": scores.images / seconds,
                "parameters_sha256": digest_of(params, network.shapes),
            }
        )
    result = {
        "run": trained.said,
        "set": _set_name(arguments),
        "set_fingerprint": source.fingerprint,
        "how": {
            "images": len(source),
            "image_size": size,
            "crop": crop,
            "interpolation": INTERPOLATION,
            "dtype": arguments.dtype,
        },
        "model": {
            "preset": config.model.preset,
            "mixer": config.model.mixer,
            "parameters": network.parameters,
            "gmac": network.multiply_adds(size) / 1e9,
            "gmac_with_scans": network.forward_flops(size) / 2e9,
            "classes": config.data.num_classes,
        },
        "machine": {
            "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
            "hosts": jax.process_count(),
            "jax": jax.__version__,
            "gspn_jax": gspn_jax.__version__,
        },
        "scores": rows,
    }
    if jax.process_index() == 0:
        with contextlib.suppress(OSError):  # nobody reads stdout any more
            print(json.dumps(result, indent=1), flush=True)
        _write(arguments, result)
    return result


def _source(arguments: Evaluate) -> Source:
    """The images, of the classes that the run was trained on."""
    config, names = weights.about(arguments.run, arguments.step)
    source = arguments.source(config.data.channels)
    check_classes(source, names, f"the images of {_set_name(arguments)}")
    return source


def _set_name(arguments: Evaluate) -> str:
    return arguments.images or arguments.records or f"{arguments.tfds} {arguments.tfds_split}"


def _write(arguments: Evaluate, result: dict[str, Any]) -> None:
    run = pathlib.Path(arguments.run)
    if arguments.output:
        report.keep(result, pathlib.Path(arguments.output), claimed=True)
    elif run.is_dir() and not (run / weights.WEIGHTS).is_file():
        name = pathlib.PurePath(_set_name(arguments)).name or "set"
        path = run / "evaluation" / f"classify_{name.replace(' ', '_')}.json"
        with contextlib.suppress(OSError):  # `keep` says where it is then
            path.parent.mkdir(exist_ok=True)
        report.keep(result, path)
