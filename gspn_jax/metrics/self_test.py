"""Checks of this machine's Inception features and of a file of weights, and what these checks cannot tell.

The machine is checked with random weights whose features an independent PyTorch implementation computed in float64
(`known_features`). A file is checked for its structure, for what must hold whatever the weights are, and against
recorded features where there are some.
"""

import pathlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import AxisType
from jaxtyping import Float, UInt8

from gspn_jax.config import ConfigError
from gspn_jax.files import replacing, sha256_of
from gspn_jax.metrics import inception, npz
from gspn_jax.metrics.extractor import Extractor
from gspn_jax.metrics.inception import Features
from gspn_jax.metrics.known_features import KNOWN_FEATURES, KNOWN_FILES, STRIDE

TOLERANCE = 1e-4
"""Relative L2; TF32 is 5e-4 away, bfloat16 or another resize 2e-3 and more."""

RANDOM_SEED = 0
"""Seed of the random weights in `known_features`."""


class Check(NamedTuple):
    """`passed` None: a note, which says what is not checked."""

    passed: bool | None
    text: str


def fixed_images() -> list[UInt8[np.ndarray, "1 H W 3"]]:
    """Three images of integer formulas, the same everywhere: noise 32x32, slopes with edges 64x96, rings 256x256."""

    def pixels(height: int, width: int, formula: Callable) -> np.ndarray:
        y, x, c = np.meshgrid(np.arange(height), np.arange(width), np.arange(3), indexing="ij")
        return (formula(y, x, c) % 256).astype(np.uint8)[None]

    return [
        pixels(32, 32, lambda y, x, c: (7 * y + 13 * x + 29 * c) ** 2 // 5),
        pixels(64, 96, lambda y, x, c: 4 * y * (c + 1) + 2 * x + 90 * (x // 24)),
        pixels(256, 256, lambda y, x, c: ((y - 100) ** 2 + (x - 128 + 20 * c) ** 2) // 32),
    ]


def extract(extractor: Extractor, images: list[np.ndarray]) -> dict[str, Float[np.ndarray, "N D"]]:
    """Features by name, one row an image."""
    found = [extractor(image) for image in images]
    return {
        name: np.concatenate([np.asarray(getattr(features, name))[np.asarray(mask)] for features, mask in found])
        for name in Features._fields
    }


def distance(found: Float[np.ndarray, "..."], truth: Float[np.ndarray, "..."]) -> float:
    """Relative L2; infinite for what is not finite."""
    value = float(np.linalg.norm(found - truth) / np.linalg.norm(truth))
    return value if np.isfinite(value) else float("inf")


def check_machine() -> Check:
    """Tells whether this machine computes what the network is."""
    weights = inception.random_state_dict(RANDOM_SEED)
    found = extract(_on_one_device(inception.from_state_dict(weights)), fixed_images())
    return compare_known(found, inception.digest(weights), "random weights, on this machine")


def compare_known(found: dict[str, np.ndarray], digest: str, what: str) -> Check:
    """Against the features in `known_features`; a note where there are none of these weights."""
    if digest not in KNOWN_FEATURES:
        return Check(
            None,
            f"no features of {what} are stored in this program: that their values are right cannot be "
            "vouched for; the published self-check in docs/evaluation.md can",
        )
    errors = {
        name: distance(found[name][:, ::STRIDE], np.array(values)) for name, values in KNOWN_FEATURES[digest].items()
    }
    return _compared(errors, f"features of {what} against stored ones")


def check_file(
    path: str | pathlib.Path, *, record: str | pathlib.Path | None = None, compare: str | pathlib.Path | None = None
) -> Iterator[Check]:
    """Tells whether `path` is a file of usable weights, the published one, with the features of `compare`.

    `record` writes its features to an .npz that `compare` takes, on another machine or with another version.
    Raises WeightsError, ConfigError or OSError for files that cannot be used.
    """
    if record is not None and pathlib.Path(record).exists():
        raise ConfigError(f"{record} exists already: choose another file, or delete it")
    recorded = _read_record(compare) if compare is not None else None
    state_dict = inception.read(path)
    values = sum(value.size for value in state_dict.values())
    yield Check(
        values == inception.VALUES, f"{len(state_dict)} tensors, {values:,} values, all of the right shape and finite"
    )
    variances = np.concatenate([value for name, value in state_dict.items() if name.endswith("running_var")])
    yield Check(bool((variances > 0).all()), f"variances positive, the smallest {variances.min():.3g}")

    sha256, digest = sha256_of(path), inception.digest(state_dict)
    yield Check(None, f"SHA-256 of the file {sha256}, of its tensors {digest}")
    yield _known_file(path, sha256)

    params, images = inception.from_state_dict(state_dict), fixed_images()
    extractor = _on_one_device(params)
    found = extract(extractor, images)
    yield Check(all(np.isfinite(value).all() for value in found.values()), "features of three fixed images are finite")
    apart = min(distance(found["pool"][i], found["pool"][j]) for i, j in ((0, 1), (0, 2), (1, 2)))
    yield Check(apart > 0.01, f"features tell the images apart: relative L2 at least {apart:.2g}")
    spread = Extractor(params, batch_size=2)
    beside = extract(spread, [np.resize(np.concatenate([images[0], 255 - images[0]]), (spread.batch_size, 32, 32, 3))])
    yield _compared(
        {name: distance(beside[name][:1], found[name][:1]) for name in found},
        f"an image alone on one device against among others on {jax.local_device_count()}",
    )
    changed = distance(extract(extractor, [_half_pixel(images[0])])["pool"], found["pool"][:1])
    yield Check(changed > 10 * TOLERANCE, f"another resize (half-pixel centres) would show: relative L2 {changed:.2g}")

    yield compare_known(found, digest, "these weights")
    if recorded is not None:
        yield Check(recorded["tensors_sha256"] == digest, f"the weights are those of {compare}")
        yield _compared(
            {name: distance(found[name], recorded[name]) for name in found},
            f"features against {compare} ({recorded['made_by']})",
        )
    if record is not None:
        made_by = f"JAX {jax.__version__}, {jax.devices()[0].device_kind}"
        with replacing(pathlib.Path(record)) as temporary, open(temporary, "wb") as file:
            np.savez(file, tensors_sha256=np.array(digest), made_by=np.array(made_by), **found)
        yield Check(None, f"recorded in {record}: --compare {record} checks another machine or version against it")


def _on_one_device(params: inception.Params) -> Extractor:
    mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,), devices=jax.local_devices()[:1])
    return Extractor(params, batch_size=1, mesh=mesh)


def _compared(errors: dict[str, float], what: str) -> Check:
    listed = ", ".join(f"{name} {error:.1e}" for name, error in errors.items())
    return Check(max(errors.values()) <= TOLERANCE, f"{what}: relative L2 {listed} (at most {TOLERANCE:.0e})")


def _known_file(path: str | pathlib.Path, sha256: str) -> Check:
    if name := KNOWN_FILES.get(sha256[:8]):
        return Check(True, f"the first 8 digits are those of {name}; the other 56 are not known to this program")
    if pathlib.Path(path).suffix == ".safetensors":
        from safetensors import safe_open

        with safe_open(path, "np") as file:
            source = (file.metadata() or {}).get("source_sha256", "")
        if name := KNOWN_FILES.get(source[:8]):
            return Check(
                None,
                f"the file says that it was converted from {name}, which is not "
                "proof: run --self-test on that file too",
            )
    return Check(
        None,
        "this is no file that this program knows: whether these are the weights behind published FIDs "
        "cannot be vouched for",
    )


def _half_pixel(images: UInt8[np.ndarray, "N H W 3"]) -> UInt8[np.ndarray, "N 299 299 3"]:
    """Wrongly resized, to the size that the network takes as it is."""
    shape = (len(images), inception.SIZE, inception.SIZE, 3)
    return (
        np.asarray(jax.image.resize(images.astype(np.float32), shape, "bilinear", antialias=False))
        .round()
        .astype(np.uint8)
    )


def _read_record(path: str | pathlib.Path) -> dict[str, np.ndarray | str]:
    wanted = ("tensors_sha256", "made_by", *Features._fields)
    found = npz.names(path, "--compare")
    if missing := [name for name in wanted if name not in found]:
        raise ConfigError(f"--compare must be a file that --record wrote, found no {', '.join(missing)} in {path}")
    values = {name: npz.read(path, name) for name in wanted}
    return {name: str(value) if value.ndim == 0 else value for name, value in values.items()}
