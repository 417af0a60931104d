"""Settings of the images of a run."""

import dataclasses
from typing import TYPE_CHECKING, Literal

from gspn_jax.config.checks import check_numbers, put_homes, require, require_one_of, require_positive
from gspn_jax.tables import SOURCES, Choice

if TYPE_CHECKING:
    SourceName = str
else:  # the command line offers the table's names as they are when it reads its flags

    class SourceName(Choice):
        table = SOURCES


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Source of the images: "digits" (scikit-learn's, embedded), "folder" (one folder a class), "tfds", "records"
    (decoded images that `gspn_jax.prepare images` wrote), or "latents" (VAE moments that `gspn_jax.prepare latents`
    wrote; `image_size` and `channels` are then those of the latents)."""

    source: SourceName = "digits"
    path: str | None = None
    """The folder of images, records or latents, or the data_dir of tensorflow-datasets."""
    name: str | None = None
    """The tensorflow-datasets name, such as "imagenet2012"."""
    split: str = "train"
    image_size: int = 8
    channels: int = 1
    num_classes: int = 10
    flip: bool = False
    bad_images: Literal["error", "skip"] = "error"
    """Effect of a corrupt image: stop with its name, or be replaced by another one and counted in a warning."""
    workers: int = 0
    """Grain worker processes; 0 decodes in threads of the main process."""
    unconditional: bool = False
    """Trains without classes: `path` of a "folder" is then any folder of images, and `num_classes` is 1, whatever it
    is set to. There is nothing to guide by."""
    in_memory: bool = False
    """Decodes all images once, before training, and keeps them in the memory of every host: for small sets, which then
    feed fast devices. The batches are the same; Grain is not needed."""

    def __post_init__(self) -> None:
        check_numbers(self, "data")
        put_homes(self, "path")
        if self.unconditional:
            object.__setattr__(self, "num_classes", 1)
        require_one_of("data.source", self.source, SOURCES)
        require_one_of("data.bad_images", self.bad_images, ("error", "skip"))
        require_positive(self, "data", "image_size", "channels", "num_classes")
        require(self.workers >= 0, "data.workers", "0 or more", self.workers)
        if self.source == "folder":
            require(bool(self.path), "data.path", "the image folder when data.source is 'folder'", self.path)
        if self.source == "records":
            require(bool(self.path), "data.path", "the folder of records when data.source is 'records'", self.path)
        if self.latents:
            require(bool(self.path), "data.path", "the folder of latents when data.source is 'latents'", self.path)
            require(
                not self.in_memory,
                "data.in_memory",
                "False when data.source is 'latents', which are not decoded",
                self.in_memory,
            )
        require(
            not (self.in_memory and self.workers),
            "data.workers",
            "0 with data.in_memory, which leaves nothing to decode while training",
            self.workers,
        )
        if self.source == "tfds":
            require(bool(self.name), "data.name", "a tensorflow-datasets name when data.source is 'tfds'", self.name)

    @property
    def latents(self) -> bool:
        """Tells whether images are latents of an autoencoder: floats in their final scale, looked at once decoded."""
        return self.source == "latents"
