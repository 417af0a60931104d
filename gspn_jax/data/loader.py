"""The one loader: a source -> endless batches whose content depends on the seed and the step only.

The stream is the same for any number of worker processes, the global batch the same for any number of hosts, and a
loader that starts at step n gives what another gives after n steps; so there is no iterator state to save. Images kept
in memory (`memory`) give the same stream as those that Grain reads (`grain_loader`).
"""

from typing import Protocol, Self

import numpy as np
from jaxtyping import Float32, Int32, UInt8

from gspn_jax import extras
from gspn_jax.config import ConfigError, DataConfig
from gspn_jax.data.image_batches import Augment, ImageBatches
from gspn_jax.data.memory import MemoryLoader, MemorySource
from gspn_jax.data.source import Source, Views
from gspn_jax.data.thread_loader import ThreadLoader

Batch = dict[str, UInt8[np.ndarray, "B S S C"] | Float32[np.ndarray, "B S S C"] | Int32[np.ndarray, "B"]]


class Loader(Protocol):
    """An endless iterator of batches. Close it, or use it in a `with` statement."""

    bad_images: set[str]
    """The messages of the distinct bad images met so far."""

    def __iter__(self) -> Self: ...

    def __next__(self) -> Batch: ...

    def close(self) -> None:
        """Ends threads and processes; a second call does nothing."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *exception) -> None: ...


def make_loader(
    config: DataConfig,
    source: Source,
    *,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    num_hosts: int = 1,
    host: int = 0,
    augment: Augment | None = None,
    features: Views | None = None,
) -> Loader:
    """An endless iterator of {"image": uint8 [b, S, S, C], "label": int32 [b]}, b = batch_size / num_hosts.

    For config.source "latents", "image" is float32: a posterior sample of each latent, scaled, drawn anew each epoch.

    Every epoch visits every image once in an order of its own; a batch may span two epochs, so none is left out. Host h
    gets the h-th block of the rows of the global batch: the global array does not depend on how many hosts share it.
    `host` counts groups of processes that read different data; processes that hold shards of the same rows pass the
    same number. `config.flip` mirrors each image with probability 1/2, drawn anew each epoch. With
    `config.workers` > 0 the script needs the usual `if __name__ == "__main__":` guard.

    With `augment` the source's images are of any size, and each is what that makes of it in its epoch, a function of
    (seed, epoch, index of the image): threads of this process do it, or with `config.workers` Grain's processes.

    With `features` of the same images a batch has "features" float16 [b, h, w, D] too, of the view that is shown.

    Iterating raises DataError for an image that cannot be decoded if `config.bad_images` is "error"; "skip" replaces it
    by the next image that can and logs one warning a file, with the count, to the logger "gspn_jax.data". With
    `config.in_memory` both happen when the source is made (`memory.MemorySource`).
    """
    if batch_size % num_hosts:
        raise ConfigError(
            f"train.batch_size must be a multiple of the number of hosts ({num_hosts}), found {batch_size}"
        )
    if not 0 <= host < num_hosts:
        raise ValueError(f"host must be in [0, {num_hosts}), found {host}")
    # Batch k of size b is rows k*b .. (k+1)*b of the stream: step s of host h is batch s * num_hosts + h.
    place = {
        "batch_size": batch_size // num_hosts,
        "seed": seed,
        "first": start_step * num_hosts + host,
        "stride": num_hosts,
    }
    if augment is not None and not config.workers:
        batches = ImageBatches(config, source, batch_size=place["batch_size"], seed=seed, augment=augment)
        return ThreadLoader(batches, first=place["first"], stride=num_hosts)
    if config.in_memory:
        source = source if isinstance(source, MemorySource) else MemorySource(source, config)
        return MemoryLoader(source, flip=config.flip, **place, features=features)
    extras.require("train", "grain", by="reading images while training (all but data.in_memory)")
    from gspn_jax.data.grain_loader import GrainLoader  # the only one that needs Grain

    return GrainLoader(config, source, **place, augment=augment, features=features)
