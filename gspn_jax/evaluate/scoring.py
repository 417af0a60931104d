"""Parts that every evaluation shares: its flags, and images in, metrics out."""

import contextlib
import dataclasses
import logging
import pathlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int, UInt8

from gspn_jax.config import ConfigError, MetricName, check_numbers
from gspn_jax.evaluate import report
from gspn_jax.files import claim_new, sha256_of
from gspn_jax.metrics import inception
from gspn_jax.metrics.extractor import Extractor, in_batches
from gspn_jax.metrics.moments import on_host
from gspn_jax.metrics.networks import read_networks
from gspn_jax.metrics.reference import read_reference
from gspn_jax.metrics.scores import Collector, check_names
from gspn_jax.parallel.agreement import on_first_host
from gspn_jax.sampling.scoring import Draw, draw_and_score
from gspn_jax.tables import METRICS

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScoreFlags:
    """Flags of what is computed, and against what."""

    inception: str | None = None
    """The Inception-v3 weights of 2015: pytorch-fid's .pth, or .safetensors made of it by gspn_jax.prepare; clean:FILE
    scales images to it as clean-fid does, not as ADM."""
    reference: str | None = None
    """The reference statistics (.npz), such as VIRTUAL_imagenet256_labeled.npz; only the Inception score needs none."""
    networks: tuple[str, ...] = ()
    """NAME=FILE: weights of other feature networks."""
    metrics: tuple[MetricName, ...] = ()
    """By default all of Inception's features that the reference allows."""
    float16: bool = False
    """Round distances for precision and recall to float16, as the ADM evaluator does; where one overflows, its block of
    10,000 x 10,000 is of float32, as there. Ties then decide a part of the result, and sums in another order other
    ties: it is near the evaluator's, not equal to it."""
    output: str | None = None
    """The JSON file to write, which must not exist."""
    batch_size: int = 64
    """Images at a time, over all devices."""

    def __post_init__(self) -> None:
        check_numbers(self)
        if self.batch_size < 1:
            raise ConfigError(f"--batch-size must be 1 or more, found {self.batch_size}")
        if self.metrics:
            check_names(self.metrics, "--metrics")
        if self.output:
            path = pathlib.Path(self.output)
            if path.suffix != ".json" or not path.parent.is_dir() or path.exists():
                raise ConfigError(f"--output must be a new .json file in a folder that exists, found {self.output!r}")

    def files(self) -> dict[str, str | None]:
        """Files that decide a result, by the flags that name them."""
        others = (entry.partition("=") for entry in self.networks)
        return {"--inception": self.inception, "--reference": self.reference} | {
            f"--networks {name}": file for name, _, file in others
        }

    @contextlib.contextmanager
    def claimed(self) -> Iterator[None]:
        """The claim of --output, where it is given, while it is made. Every host must call this."""
        with contextlib.ExitStack() as stack:
            if self.output:
                on_first_host(lambda: stack.enter_context(claim_new(pathlib.Path(self.output))), ConfigError, OSError)
            yield


class Scorer:
    """Reads weights and reference once, and scores any number of sets of images against them."""

    def __init__(self, flags: ScoreFlags, mesh: Mesh):
        """Raises ConfigError or WeightsError for what is missing or does not go together, before device work."""
        if not flags.metrics:
            inception.require(flags.inception, "--inception")
        self._reference = read_reference(flags.reference, "--reference") if flags.reference else None
        allowed = self._reference.allowed if self._reference else ("is",)
        self.names = flags.metrics or tuple(name for name in allowed if METRICS[name].network == "inception")
        needing = [name for name in self.names if METRICS[name].needs]
        if self._reference:
            self._reference.check(self.names)
        elif needing:
            raise ConfigError(f"{', '.join(needing)} need a --reference, found none")
        self._weights = read_networks(self.names, flags.inception, flags.networks, "--")
        own = self._weights.get("inception")
        self.inception: dict[str, str] | None = None
        if own:
            file = sha256_of(inception.file_of(own.path))
            self.inception = {"path": str(own.path), "sha256": file, "tensors_sha256": own.digest}
        if self._reference:
            for name, one in self._weights.items():
                self._reference.check_weights(name, one.digest)
        self._flags, self._mesh = flags, mesh
        self.batch_size = -(-flags.batch_size // mesh.size) * mesh.size  # as the extractor rounds it up
        self._extractors: dict[str, Extractor] = {}

    @property
    def reference(self) -> dict[str, Any] | None:
        """Description of the reference in a result, as JSON values."""
        if self._reference is None:
            return None
        return {
            "path": self._reference.path,
            "sha256": self._reference.sha256,
            "num_images": self._reference.num_images,
            "image_size": self._reference.image_size and list(self._reference.image_size),
        }

    def settings(self) -> dict[str, Any]:
        """Settings that decide a result beside the samples."""
        reference = self.reference
        return {
            "reference_sha256": reference and reference["sha256"],
            "float16": self._flags.float16,
            "inception_tensors_sha256": self.inception and self.inception["tensors_sha256"],
        } | {f"{name}_sha256": one.digest for name, one in self._weights.items() if name != "inception"}

    def prepare(self) -> None:
        """Puts the networks onto the devices and computes what the reference has as images only, both once."""
        if self._extractors:
            return
        for name, one in self._weights.items():
            self._extractors[name] = Extractor(
                one.params, batch_size=self.batch_size, mesh=self._mesh, network=one.network
            )
        if self._reference:
            size = next(iter(self._extractors.values())).batch_size
            self._reference = self._reference.complete(self.names, self._extractors, size)

    def score(
        self,
        images: Iterable[UInt8[np.ndarray, "n H W 3"]],
        *,
        samples: dict[str, Any],
        labels: Int[np.ndarray, " N"] | None = None,
        captions: Sequence[str] = (),
        warnings: Iterable[str] = (),
    ) -> dict[str, Any]:
        """The result, as JSON values, of images that come in chunks of any size.

        `samples` tells what they are, with "count" and "image_size"; `labels` are their classes, where known;
        `captions`, which metrics may need, may grow with the images that have come.
        """
        self.prepare()
        collector, predicted = Collector(self.names, float16=self._flags.float16), []
        size = next(iter(self._extractors.values())).batch_size
        for number, batch in enumerate(in_batches(images, size)):
            for name, extractor in self._extractors.items():
                features, mask = extractor(batch)
                if embed := getattr(self._weights[name].network, "embed_captions", None):
                    texts = embed(captions[number * size : number * size + len(batch)])
                    features = features, np.pad(texts, ((0, size - len(texts)), (0, 0)))
                collector.add(features, mask, name)
                if labels is None and "is" in self.names and name == "inception":
                    predicted.append(on_host(features.logits.argmax(1))[on_host(mask)])
        return self._result(collector, np.concatenate(predicted) if predicted else labels, samples, warnings)

    def score_drawn(
        self,
        draw: Draw,
        labels: Int[np.ndarray, " N"],
        numbers: Int[np.ndarray, " N"],
        *,
        samples: dict[str, Any],
        warnings: Iterable[str] = (),
        done: Callable[[int], None] = lambda count: None,
    ) -> dict[str, Any]:
        """The result of images that `draw` makes of labels and numbers, `batch_size` at a time, as `score` gives it."""
        self.prepare()
        collector = Collector(self.names, float16=self._flags.float16)
        draw_and_score(draw, labels, numbers, self._extractors, collector.add, done=done)
        return self._result(collector, labels, samples, warnings)

    def _result(
        self,
        collector: Collector,
        classes: Int[np.ndarray, " N"] | None,
        samples: dict[str, Any],
        warnings: Iterable[str],
    ) -> dict[str, Any]:
        log.info("%s images are scored; computing %s", f"{collector.count:,}", ", ".join(self.names))
        reference, samples = self.reference, samples | {"count": collector.count}
        said = [
            *warnings,
            *report.unfair(
                self.names,
                collector.count,
                tuple(samples["image_size"]),
                reference and reference["image_size"],
                classes,
            ),
        ]
        return {
            "metrics": collector.scores(self._reference),
            "samples": samples,
            "reference": reference,
            "inception": self.inception,
            "settings": self.settings(),
            "warnings": said,
            "environment": report.environment(),
        }


def finish(result: dict[str, Any], flags: ScoreFlags, default: pathlib.Path) -> pathlib.Path | None:
    """Prints the result, then writes it to --output, which is claimed, or to `default` or a free name beside it, and
    returns where; on the first host. Raises ConfigError when it had to be kept elsewhere."""
    if jax.process_index():
        return None
    with contextlib.suppress(OSError):  # nobody reads stdout any more
        print(f"\n{report.table(result)}", flush=True)
    path = pathlib.Path(flags.output) if flags.output else default
    kept = report.keep(result, path, claimed=bool(flags.output))
    print(f"written to {kept}")
    return kept
