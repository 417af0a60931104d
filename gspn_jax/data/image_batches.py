"""Batches of images as a function of their number in the stream, and what becomes of images that are bad."""

import logging
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Int, Shaped, UInt8

from gspn_jax.config import DataConfig
from gspn_jax.data import order
from gspn_jax.data.decoding import DataError
from gspn_jax.data.source import MAX_BAD_IN_A_ROW, Source, Views

logger = logging.getLogger("gspn_jax.data")

Augment = Callable[..., UInt8[np.ndarray, "S S C"]]
"""augment(image, seed=, epoch=, index=): the image that is number `index` of the set, of any size, as an epoch shows
it (`augment.host.HostAugmentation`)."""

_PERMUTED_WHOLE = 2**16
"""Images, at the most. The cipher's block is no smaller: of a small set, Grain's function for one index goes through it
for up to a millisecond before it is back in the set."""


class ImageBatches:
    """batches(k): batch k of the endless stream, {"image": uint8 [b, S, S, C], "label": int32 [b]} and two more [b].

    A bad image is not an exception here but a "problem" beside the image that replaces it, or beside one that is not
    "usable": an exception would come from whichever thread or process fails first; a problem is met at its place.
    With `augment` images are of any size, and `config.flip` is left to it. With `features` there is "features" float16
    [b, h, w, D] of the view that is shown; bad images have none that could take their place.
    """

    def __init__(
        self,
        config: DataConfig,
        source: Source,
        *,
        batch_size: int,
        seed: int,
        augment: Augment | None = None,
        features: Views | None = None,
    ):
        self._source, self._batch_size, self._seed, self._augment = source, batch_size, seed, augment
        self._features = features
        self._flip = config.flip and augment is None
        self._tries = 1 if config.bad_images == "error" else min(len(source), MAX_BAD_IN_A_ROW)
        self._shape = config.image_size, config.image_size, config.channels

    def __call__(self, batch: int) -> dict[str, np.ndarray]:
        places = range(batch * self._batch_size, (batch + 1) * self._batch_size)
        images, labels = np.empty((len(places), *self._shape), np.uint8), np.empty(len(places), np.int32)
        mirrored = order.flips(places, self._seed) if self._flip else np.zeros(len(places), bool)
        usable, problems = np.empty(len(places), bool), []
        shown = self._images(places)
        for row, (place, index) in enumerate(zip(places, shown, strict=True)):
            record, problem = self._record(index)
            usable[row], labels[row] = record is not None, record["label"] if record else 0
            problems.append(problem)
            if record is None:
                images[row] = 0
            elif self._augment is None:
                _write(record["image"], mirrored[row], images[row])
            else:
                epoch = place // len(self._source)
                images[row] = self._augment(record["image"], seed=self._seed, epoch=epoch, index=index)
        batch = {"image": images, "label": labels, "problem": np.array(problems), "usable": usable}
        return batch | beside(self._features, shown, mirrored)

    def _images(self, places: range) -> list[int]:
        """The image at each place. A large set is not permuted as a whole, in every worker, for the sake of a batch,
        where Grain is installed."""
        length = len(self._source)
        index_shuffle = None if length <= _PERMUTED_WHOLE else _index_shuffle()
        if index_shuffle is None:
            return order.places_to_images(places, length, self._seed).tolist()
        return [
            index_shuffle(
                place % length,
                max_index=length - 1,
                rounds=order.ROUNDS,
                seed=order.epoch_seed(place // length, self._seed),
            )
            for place in places
        ]

    def _record(self, index: int) -> tuple[dict | None, str]:
        """The first usable record from `index` on, or None, and the messages of those before it."""
        problems = []
        for attempt in range(self._tries):
            try:
                return self._source[(index + attempt) % len(self._source)], "\n".join(problems)
            except DataError as error:
                problems.append(str(error))
        return None, "\n".join(problems)


def beside(
    features: Views | None, images: Sequence[int] | Int[np.ndarray, " b"], mirrored: Shaped[np.ndarray, " b"]
) -> dict[str, np.ndarray]:
    """{"features": float16 [b, h, w, D]} of images, or of their mirror images; nothing without a set of them."""
    if features is None:
        return {}
    views = zip(images, mirrored, strict=True)
    return {"features": np.stack([features.view(int(index), bool(mirror)) for index, mirror in views])}


def report_problems(batch: dict[str, np.ndarray], known: set[str]) -> dict[str, np.ndarray]:
    """A batch of `ImageBatches` without its two last entries; logs problems that are not `known` yet, and adds them.

    Raises DataError for an image that is not usable. Batches without those entries, such as latents, are returned.
    """
    problems, usable = batch.pop("problem", np.array("")), batch.pop("usable", None)
    for i in np.flatnonzero(problems != ""):
        found = str(problems[i]).split("\n")
        if not usable[i]:
            raise DataError(
                found[0] if len(found) == 1 else f"{len(found)} images in a row cannot be used; the first: {found[0]}"
            )
        for problem in found:
            if problem not in known:
                known.add(problem)
                logger.warning("%s; another image takes its place (bad images so far: %d)", problem, len(known))
    return batch


def _index_shuffle() -> Callable[..., int] | None:
    try:
        from grain.experimental import index_shuffle
    except ImportError:
        return None
    return index_shuffle


def _write(image: UInt8[np.ndarray, "H W C"], mirrored: bool, row: UInt8[np.ndarray, "H W C"]) -> None:
    """Copies, left and right exchanged a channel at a time: twice as fast as a copy of pixels of a few bytes."""
    if not mirrored:
        row[...] = image
        return
    for channel in range(image.shape[2]):
        row[..., channel] = image[:, ::-1, channel]
