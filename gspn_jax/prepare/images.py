"""The images to prepare from: the flags that name them."""

import dataclasses
import logging
import os
from typing import ClassVar, Literal

from gspn_jax.config import ConfigError, check_numbers
from gspn_jax.data.source import Source, shorten

log = logging.getLogger(__name__)

CHANNELS = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReadFlags:
    """Flags of how images are read."""

    bad_images: Literal["error", "skip"] = "error"
    """Effect of a corrupt image: stop with its name, or be left out with a warning."""
    batch_size: int = 64
    """Images at a time, over the devices of this host."""
    threads: int = os.cpu_count() or 1
    """Threads that decode images."""

    def __post_init__(self) -> None:
        check_numbers(self)
        self.check_positive("batch_size", "threads")

    def check_positive(self, *names: str) -> None:
        for name in names:
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name.replace('_', '-')} must be 1 or more, found {getattr(self, name)}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageFlags(ReadFlags):
    """Flags of the images, and of how they are read."""

    KINDS: ClassVar[tuple[str, ...]] = ("images", "tars", "tfds")
    """Flags of which one must be given."""

    images: str | None = None
    """A folder with one folder of images a class."""
    tars: str | None = None
    """ILSVRC2012_img_train.tar, another tar of class folders, or a folder with one tar a class or webdataset shards."""
    num_classes: int | None = None
    """How many classes the set has: another number is refused, and what is found is taken for classes even where it
    looks like the parts of a set (train, val) or like shards."""
    tfds: str | None = None
    """The name of a tensorflow-datasets set that is prepared as array_record, such as imagenet2012."""
    tfds_dir: str | None = None
    """Where tensorflow-datasets keeps its sets."""
    tfds_split: str = "train"

    def __post_init__(self) -> None:
        if sum(bool(getattr(self, kind)) for kind in self.KINDS) != 1:
            *first, last = (f"--{kind}" for kind in self.KINDS)
            found = " ".join(f"--{kind} {getattr(self, kind)}" for kind in self.KINDS)
            raise ConfigError(f"one of {', '.join(first)} and {last} must be given, found {found}")
        super().__post_init__()
        if self.num_classes is not None:
            self.check_positive("num_classes")

    def source(self, image_size: int | None) -> Source:
        """The images as RGB squares of that size; None keeps theirs. Raises ConfigError for a set it cannot read."""
        source = self._open(image_size)
        found = len(source.class_names)
        if self.num_classes not in (None, found):
            raise ConfigError(f"--num-classes is {self.num_classes:,}, but {described(source)} were found")
        log.info("found %s", described(source))
        return source

    def _open(self, image_size: int | None) -> Source:
        if self.images:
            from gspn_jax.data.folder import FolderSource

            return FolderSource(self.images, image_size, CHANNELS, insist=self.num_classes is not None)
        if self.tars:
            from gspn_jax.data.tar_source import TarSource

            return TarSource(self.tars, image_size, CHANNELS, num_classes=self.num_classes)
        from gspn_jax.data.tfds_source import TfdsSource

        return TfdsSource(self.tfds, self.tfds_dir, self.tfds_split, image_size, CHANNELS)


def described(source: Source) -> str:
    """Such as "1,281,167 images of 1,000 classes, first: n01440764, ..."."""
    count, classes = len(source), len(source.class_names)
    return (
        f"{count:,} {'image' if count == 1 else 'images'} of {classes:,} {'class' if classes == 1 else 'classes'}, "
        f"first: {shorten(source.class_names)}"
    )
