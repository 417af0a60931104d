"""Reference statistics: read in every dialect in use, completed from the images in them, and written.

Dialects: the ADM evaluator's (`arr_0` images, `mu`, `sigma`, `mu_s`, `sigma_s`), `ref_mu` and `ref_sigma`, `mu` and
`sigma` alone (pytorch-fid), and what `python -m gspn_jax.prepare stats` writes: ADM's names, and beside or in place of
the images `features`, their pool features, with `inception_sha256`, `num_images`, `image_size` and `source`; of
DINOv2's class tokens `mu_dinov2`, `sigma_dinov2` and `dinov2_sha256`.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, UInt8

from gspn_jax.config import ConfigError
from gspn_jax.files import replacing, sha256_of
from gspn_jax.metrics import npz
from gspn_jax.metrics.frechet import Gaussian
from gspn_jax.metrics.moments import Moments, on_host
from gspn_jax.metrics.neighbours import radii
from gspn_jax.tables import METRICS

if TYPE_CHECKING:
    from gspn_jax.metrics.inception import Features

FEWEST = 4
"""Images that all metrics need at least, of samples and of a reference."""
_SIZES = {"pool": 2048, "spatial": 2023}
"""Features of those networks that have one size."""
_DIALECTS = {
    "pool": (("mu", "sigma"), ("ref_mu", "ref_sigma")),
    "spatial": (("mu_s", "sigma_s"), ("ref_mu_s", "ref_sigma_s")),
    "dinov2": (("mu_dinov2", "sigma_dinov2"),),
}
_NETWORKS = {"dinov2": "dinov2"}
"""Parts of a reference that are not of Inception's features -> the network whose they are."""
_DIGESTS = ("inception_sha256", "dinov2_sha256")
_MISSING = {
    "pool": "mu and sigma (or ref_mu and ref_sigma)",
    "spatial": "mu_s and sigma_s",
    "dinov2": "mu_dinov2 and sigma_dinov2",
    "features": "arr_0 (images) or features",
    "images": "arr_0 (images)",
}

Extract = Callable[[UInt8[np.ndarray, "n H W 3"]], "tuple[Features, Bool[Array, ' m']]"]


@dataclasses.dataclass(frozen=True)
class Reference:
    """Statistics that samples are compared with. `pool`, `spatial` and `dinov2`: the Gaussians of FID, sFID and
    FD-DINOv2. `features`: pool features of single images, for KID, precision and recall. `images`: those that a file
    holds in place of what is missing."""

    path: str
    sha256: str
    """SHA-256 of the file."""
    pool: Gaussian | None = None
    spatial: Gaussian | None = None
    features: Float32[np.ndarray, "M pool"] | None = None
    images: npz.StoredImages | None = None
    num_images: int | None = None
    """How many images the statistics are of, where the file says so."""
    image_size: tuple[int, int] | None = None
    """Height and width of the images that the statistics are of, where the file says so or holds images."""
    inception_sha256: str | None = None
    """SHA-256 of the weights behind the statistics (`inception.digest`), where the file says so."""
    dinov2: Gaussian | None = None
    dinov2_sha256: str | None = None
    """The same of `dinov2`."""
    kept: dict[str, Any] = dataclasses.field(default_factory=dict, compare=False)
    """Parts of the images that metrics which need `images` keep (`scores.Metric.keeps`), once `complete`."""
    _radii: dict[bool, np.ndarray] = dataclasses.field(default_factory=dict, repr=False, compare=False)

    @property
    def allowed(self) -> tuple[str, ...]:
        """The metrics that can be computed against this reference, of images without captions."""
        return tuple(name for name, metric in METRICS.items() if self._has(metric.needs) and not metric.captions)

    def _has(self, part: str | None) -> bool:
        return part is None or self.images is not None or getattr(self, part) is not None

    def _part_of(self, needed: str | None) -> str | None:
        """The part of the file that gives what a metric needs."""
        return needed if needed is None or getattr(self, needed) is not None else "images"

    def check(self, names: Sequence[str]) -> None:
        """Raises ConfigError, naming what the file lacks, unless all metrics `names` can be computed."""
        for part in ("features", "images"):
            used, found = [name for name in names if self._part_of(METRICS[name].needs) == part], getattr(self, part)
            if used and found is not None and len(found) < FEWEST:
                raise ConfigError(
                    f"the reference {self.path} must be of {FEWEST} images or more for {_listed(used)}, found "
                    f"{len(found)} in its {part}"
                )
        lacking = [name for name in names if not self._has(METRICS[name].needs)]
        if lacking:
            parts = dict.fromkeys(METRICS[name].needs for name in lacking)
            wanted = [
                f"{_MISSING[part]} for {_listed(name for name in lacking if METRICS[name].needs == part)}"
                for part in parts
            ]
            raise ConfigError(
                f"the reference {self.path} must have {', and '.join(wanted)}; found what allows "
                f"{_listed(self.allowed)} only"
            )

    def check_weights(self, network: str, sha256: str) -> None:
        """Raises ConfigError when the file says that its statistics come from other weights of a network than these."""
        found = {"inception": self.inception_sha256, "dinov2": self.dinov2_sha256}.get(network)
        if found not in (None, sha256):
            label = {"inception": "Inception", "dinov2": "DINOv2"}[network]
            raise ConfigError(
                f"the reference {self.path} must be of the {label} weights in use ({sha256[:12]}...), found statistics "
                f"of {found[:12]}..."
            )

    def complete(self, names: Sequence[str], extract: Mapping[str, Extract], batch_size: int) -> "Reference":
        """With what the metrics `names` need computed from the images, `batch_size` at a time, where the file has no
        more than those. `extract` has the feature networks by name. Raises ConfigError as `check`."""
        self.check(names)
        missing = {part for name in names if (part := METRICS[name].needs) and getattr(self, part) is None}
        own = {METRICS[name].keeps: METRICS[name] for name in names if METRICS[name].needs == "images"}
        kept = {keeps: metric.keep() for keeps, metric in own.items() if keeps not in self.kept}
        if not missing and not kept:
            return self
        from tqdm import tqdm

        moments, features = {part: Moments() for part in _DIALECTS}, []
        networks = {_NETWORKS.get(part, "inception") for part in missing}
        with tqdm(
            total=len(self.images),
            unit="image",
            desc="reference images",
            dynamic_ncols=True,
            disable=jax.process_index() > 0,
        ) as bar:
            for images in self.images.batches(batch_size):
                found = {name: extract[name](images) for name in networks}
                for part in missing & moments.keys():
                    seen, mask = found[_NETWORKS.get(part, "inception")]
                    moments[part].add(seen if part in _NETWORKS else getattr(seen, part), mask)
                if "features" in missing:
                    seen, mask = found["inception"]
                    features.append(on_host(seen.pool)[on_host(mask)])
                for keeps, one in kept.items():
                    one.add(*extract[own[keeps].network](images))
                bar.update(len(images))
        new = {part: moments[part].gaussian() for part in missing & moments.keys()}
        if "features" in missing:
            new["features"] = np.concatenate(features)
        return dataclasses.replace(self, **new, kept=self.kept | kept)

    def radii(self, *, float16: bool) -> Float32[np.ndarray, " M"]:
        """Those of `features` for precision and recall, computed once."""
        if float16 not in self._radii:
            self._radii[float16] = radii(self.features, float16=float16)
        return self._radii[float16]

    def write(
        self, path: str | pathlib.Path, *, source: str, images: UInt8[np.ndarray, "M H W 3"] | None = None
    ) -> None:
        """Writes everything but `images`, of which those given take the place, in ADM's names; whole or not at all."""
        arrays = {"source": np.array(source)}
        if self.num_images is not None:
            arrays["num_images"] = np.array(self.num_images)
        if self.image_size:
            arrays["image_size"] = np.array(self.image_size)
        for name in _DIGESTS:
            if digest := getattr(self, name):
                arrays[name] = np.array(digest)
        for part in _DIALECTS:
            if gaussian := getattr(self, part):
                arrays |= dict(zip(_DIALECTS[part][0], (gaussian.mean, gaussian.cov), strict=True))
        if self.features is not None:
            arrays["features"] = self.features
        if images is not None:
            arrays["arr_0"] = images
        with replacing(pathlib.Path(path)) as temporary, open(temporary, "wb") as file:
            np.savez(file, **arrays)


def read_reference(path: str | pathlib.Path, what: str = "the reference") -> Reference:
    """The statistics in a file of any dialect; `what` names the setting in errors.

    Raises ConfigError for what is no .npz, holds none of the known names, or has them in other shapes.
    """
    found = npz.names(path, what)
    count = int(npz.read(path, "num_images", kinds="iu", shape=())) if "num_images" in found else None
    if count is not None and count < FEWEST:
        raise ConfigError(f"'num_images' in {path} must be {FEWEST} or more, found {count}")
    parts = {part: _gaussian(path, found, part, count) for part in _DIALECTS} | {"num_images": count}
    if "features" in found:
        features = npz.read(path, "features", kinds="fiu", shape=(None, _SIZES["pool"]))
        if not np.isfinite(features).all():
            raise ConfigError(f"'features' in {path} must be finite, found NaN or infinity")
        parts["features"] = features.astype(np.float32)
    if "arr_0" in found:
        parts["images"] = npz.StoredImages(path, what)
    if not any(value is not None for name, value in parts.items() if name != "num_images"):
        raise ConfigError(
            f"{what} must have mu and sigma, ref_mu and ref_sigma, or images as arr_0, found "
            f"{', '.join(found) or 'nothing'} in {path}"
        )
    for name in set(found) & set(_DIGESTS):
        parts[name] = str(npz.read(path, name, kinds="U", shape=()))
    if "image_size" in found:
        parts["image_size"] = tuple(npz.read(path, "image_size", kinds="iu", shape=(2,)).tolist())
        if min(parts["image_size"]) < 1:
            raise ConfigError(f"'image_size' in {path} must be greater than 0, found {parts['image_size']}")
    elif parts.get("images"):
        parts["image_size"] = parts["images"].shape[1:3]
    return Reference(str(path), sha256_of(path), **parts)


def _is_covariance(matrix: Float[np.ndarray, "D D"]) -> bool:
    """Tells whether a matrix can be one, as far as single entries show it; up to the rounding of float32."""
    if not matrix.size:
        return False
    deviations = np.sqrt(np.clip(np.diag(matrix), 0, None))
    slack = 1e-3 * (deviations.max() ** 2 + np.finfo(np.float32).tiny)
    within = np.abs(matrix) <= np.outer(deviations, deviations) + slack
    with np.errstate(over="ignore"):
        return bool(within.all() and np.allclose(matrix, matrix.T, rtol=1e-3, atol=slack))


def _listed(names: Iterable[str]) -> str:
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last


def _gaussian(path: str | pathlib.Path, found: Sequence[str], part: str, count: int | None) -> Gaussian | None:
    for mean_name, cov_name in _DIALECTS[part]:
        if mean_name in found and cov_name in found:
            mean_shape, cov_shape = (npz.header(path, name).shape for name in (mean_name, cov_name))
            size = _SIZES.get(part) or (mean_shape[0] if len(mean_shape) == 1 else 0)
            if (mean_shape, cov_shape) != ((size,), (size, size)):
                raise ConfigError(
                    f"{mean_name!r} and {cov_name!r} in {path} must be of {size or 'as many'} features, found "
                    f"{list(mean_shape)} and {list(cov_shape)}"
                )
            mean, cov = (npz.read(path, name, kinds="fiu") for name in (mean_name, cov_name))
            if not (np.isfinite(mean).all() and np.isfinite(cov).all()):
                raise ConfigError(f"{mean_name!r} and {cov_name!r} in {path} must be finite, found NaN or infinity")
            cov = cov.astype(np.float64)
            if not _is_covariance(cov):
                raise ConfigError(
                    f"{cov_name!r} in {path} must be a covariance (symmetric, no entry beyond the variances of its row "
                    "and its column), found another matrix"
                )
            return Gaussian(mean.astype(np.float64), cov, count)
    return None
