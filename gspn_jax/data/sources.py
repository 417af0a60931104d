"""The kinds of sources, and the one that a config asks for."""

from collections.abc import Callable
from typing import NamedTuple

from gspn_jax import extras
from gspn_jax.config import ConfigError, DataConfig
from gspn_jax.data.memory import MemorySource
from gspn_jax.data.source import Source, Unlabelled, shorten
from gspn_jax.tables import SOURCES


class Kind(NamedTuple):
    """A kind of source, a line of `tables.SOURCES`: how it is made, with images fitted to squares of a size or as they
    are (None), and what it is called in an error.

    Modules are imported when a source is made: each needs packages that others do without.
    """

    make: Callable[[DataConfig, int | None], Source]
    describe: Callable[[DataConfig], str]


def _digits(config: DataConfig, size: int | None) -> Source:
    extras.require("train", "sklearn", by="data.source digits")
    from gspn_jax.data.digits import SIDE, DigitsSource

    return DigitsSource(size or SIDE, config.channels)


def _folder(config: DataConfig, size: int | None) -> Source:
    if config.unconditional:
        from gspn_jax.data.flat_folder import FlatFolder

        return FlatFolder(config.path, size, config.channels)
    from gspn_jax.data.folder import FolderSource

    return FolderSource(config.path, size, config.channels)


def _latents(config: DataConfig, size: int | None) -> Source:
    extras.require("train", "array_record", "grain", "scipy", by="data.source latents")
    from gspn_jax.data.latents import LatentSource

    return LatentSource(config)


def _records(config: DataConfig, size: int | None) -> Source:
    from gspn_jax.data.records import RecordSource

    return RecordSource(config.path, size, config.channels)


def _tfds(config: DataConfig, size: int | None) -> Source:
    extras.require("train", "tensorflow_datasets", by="data.source tfds")
    from gspn_jax.data.tfds_source import TfdsSource

    return TfdsSource(config.name, config.path, config.split, size, config.channels)


DIGITS = Kind(_digits, lambda config: "the digits set")
FOLDER = Kind(_folder, lambda config: f"the folder {config.path!r}")
RECORDS = Kind(_records, lambda config: f"the set of records {config.path!r}")
TFDS = Kind(_tfds, lambda config: config.name)
LATENTS = Kind(_latents, lambda config: f"the set of latents {config.path!r}")


def make_source(config: DataConfig, *, whole: bool = False) -> Source:
    """The source that `config` names, its images fitted to `image_size` and `channels`.

    With `whole` images keep their size, whatever it is, for an augmentation to crop, and are not kept in memory.

    With `config.unconditional` all of them are of one class, and a folder of images is read whatever its folders are.

    Latents are of the size they were prepared in; `LatentSource` gives their moments in place of an image. With
    `config.in_memory` all images are decoded here (`memory.MemorySource`, which says what that raises).
    Raises ConfigError for a set that is missing, empty, prepared in another format, or has other classes than
    `config.num_classes`.
    """
    if not config.latents and config.channels not in (1, 3):
        raise ConfigError(f"data.channels must be 1 (greyscale) or 3 (RGB) for images, found {config.channels}")
    kind = SOURCES[config.source]
    source = kind.make(config, None if whole else config.image_size)
    if config.unconditional:
        source = Unlabelled(source)
    found = len(source.class_names)
    if found != config.num_classes:
        raise ConfigError(
            f"data.num_classes is {config.num_classes}, but {kind.describe(config)} has {found} "
            f"{'class' if found == 1 else 'classes'} ({shorten(source.class_names)})"
        )
    return MemorySource(source, config) if config.in_memory and not whole else source
