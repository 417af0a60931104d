"""The sources by name, and the one that a config asks for."""

from collections.abc import Callable
from typing import NamedTuple

from gspn_jax import extras
from gspn_jax.config import ConfigError, DataConfig
from gspn_jax.data.memory import MemorySource
from gspn_jax.data.source import Source, shorten


class Kind(NamedTuple):
    """A kind of source: how it is made, and what it is called in an error."""

    make: Callable[[DataConfig], Source]
    describe: Callable[[DataConfig], str]


def _digits(config: DataConfig) -> Source:
    extras.require("train", "sklearn", by="data.source digits")
    from gspn_jax.data.digits import DigitsSource

    return DigitsSource(config.image_size, config.channels)


def _folder(config: DataConfig) -> Source:
    from gspn_jax.data.folder import FolderSource

    return FolderSource(config.path, config.image_size, config.channels)


def _latents(config: DataConfig) -> Source:
    extras.require("train", "array_record", "grain", "scipy", by="data.source latents")
    from gspn_jax.data.latents import LatentSource

    return LatentSource(config)


def _tfds(config: DataConfig) -> Source:
    extras.require("train", "tensorflow_datasets", by="data.source tfds")
    from gspn_jax.data.tfds_source import TfdsSource

    return TfdsSource(config.name, config.path, config.split, config.image_size, config.channels)


SOURCES: dict[str, Kind] = {
    "digits": Kind(_digits, lambda config: "the digits set"),
    "folder": Kind(_folder, lambda config: f"the folder {config.path!r}"),
    "tfds": Kind(_tfds, lambda config: config.name),
    "latents": Kind(_latents, lambda config: f"the set of latents {config.path!r}"),
}
"""What `data.source` can name. Modules are imported when a source is made: each needs packages that others do without.
"""


def make_source(config: DataConfig) -> Source:
    """The source that `config` names, its images fitted to `image_size` and `channels`.

    Latents are of the size they were prepared in; `LatentSource` gives their moments in place of an image. With
    `config.in_memory` all images are decoded here (`memory.MemorySource`, which says what that raises).
    Raises ConfigError for a set that is missing, empty, prepared in another format, or has other classes than
    `config.num_classes`.
    """
    if not config.latents and config.channels not in (1, 3):
        raise ConfigError(f"data.channels must be 1 (greyscale) or 3 (RGB) for images, found {config.channels}")
    kind = SOURCES[config.source]
    source = kind.make(config)
    found = len(source.class_names)
    if found != config.num_classes:
        raise ConfigError(
            f"data.num_classes is {config.num_classes}, but {kind.describe(config)} has {found} "
            f"{'class' if found == 1 else 'classes'} ({shorten(source.class_names)})"
        )
    return MemorySource(source, config) if config.in_memory else source
