"""ImageNet as it is published, and other sets in tar files: read in place, without unpacking them.

What a set of tars means is told by what lies in them: tars of a class each (ILSVRC2012_img_train.tar), class folders,
webdataset shards (an image and its `.cls` side by side), or else each tar is a class. What could be read in two ways is
refused with what was seen.
"""

import collections
import os
import pathlib
import re
from collections.abc import Iterable, Sequence

import numpy as np

from gspn_jax.config import ConfigError
from gspn_jax.data.decoding import DataError, decode_image
from gspn_jax.data.listing import KINDS, SPLITS, is_image_name, kind_of, refuse_splits, say_left_out
from gspn_jax.data.source import hash_of, shorten
from gspn_jax.data.tar_files import Member, content, list_tars, members

_MAX_LABEL_BYTES = 20
_LABELS_OF_OTHERS = (".json", ".txt", ".caption", ".cls2")
"""Files that webdataset keeps beside an image, whose labels are not read."""
_NUMBERED = re.compile(r"(.*?)(\d{3,})(-of-\d+)?")
_WORDNET = re.compile(r"n\d{8}")


class TarSource:
    """The images of a tar file, or of those in a folder: with classes as the module says, sorted by name.

    Only headers and the labels of webdataset are read to find the images. What is left out is logged.
    """

    def __init__(self, root: str, size: int | None, channels: int, *, num_classes: int | None = None):
        """With `num_classes`, what looks like shards or the parts of a set is taken for classes all the same.

        Raises ConfigError for a folder without such files, for validation and test archives, and for what could be
        read in two ways.
        """
        self._left_out: collections.Counter = collections.Counter()
        tars = list_tars(root, self._left_out)
        if num_classes is None:
            _refuse_other_parts(root, tars)
        images, labels, beside = [], {}, collections.Counter()
        for path in tars:
            for member in members(path, self._left_out):
                if is_image_name(member.name):
                    images.append(member)
                elif member.name.endswith(".cls"):
                    labels[member.tar, member.inner, member.name.removesuffix(".cls")] = member
                else:
                    kind = kind_of(member.name)
                    self._left_out[kind] += 1
                    beside[kind] += 1
        if not images:
            raise ConfigError(f"--tars must hold {KINDS} files, found none in {root!r}")
        classes = _classes(root, tars, images, labels, beside, num_classes)
        say_left_out(root, self._left_out)
        self.class_names = tuple(classes)
        self._images = [image for group in classes.values() for image in sorted(group)]
        self._labels = np.repeat(np.arange(len(classes), dtype=np.int32), [len(group) for group in classes.values()])
        self._size, self._channels = size, channels
        self.fingerprint = hash_of(["tars", *self.class_names, *(f"{i.name} {i.length}" for i in self._images)])

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> dict[str, np.ndarray | np.int32]:
        image = self._images[index]
        name = f"{image.name} in {image.tar}"
        try:
            encoded = content(image)
        except OSError as error:
            raise DataError(f"{name} cannot be read: {error.strerror}") from error
        return {"image": decode_image(encoded, name, self._size, self._channels), "label": self._labels[index]}


def _refuse_other_parts(root: str, tars: Sequence[pathlib.Path]) -> None:
    """Validation and test archives, which lie beside the training archive in the usual folder of downloads."""

    def part(path: pathlib.Path) -> str | None:
        return min(set(re.split(r"[^a-z]+", path.stem.lower())) & (SPLITS - {"train", "training"}), default=None)

    other = next((path for path in tars if part(path)), None)
    if other is not None:
        rest = [path for path in tars if not part(path)]
        way_out = f"give --tars {rest[0]}" if len(rest) == 1 else "move it elsewhere"
        raise ConfigError(
            f"the tars of {root!r} must be classes or parts of one training set, found {other.name}, whose name says "
            f"{part(other)!r}: {way_out}, or give --num-classes if it is a class"
        )


def _classes(
    root: str,
    tars: Sequence[pathlib.Path],
    images: Sequence[Member],
    labels: dict[tuple, Member],
    beside: collections.Counter,
    num_classes: int | None,
) -> dict[str, list[Member]]:
    """The images of each class, by name in order. Raises ConfigError for what could be read in two ways."""
    insist = num_classes is not None
    if labels:
        return _of_labels(root, images, labels, num_classes)
    inner = [image for image in images if image.inner]
    if inner:
        if len(inner) < len(images):
            other = next(image for image in images if not image.inner)
            raise ConfigError(
                f"--tars must hold either tars of a class each or images, found both in {root!r}: {inner[0].inner} and "
                f"{other.name} in {other.tar}"
            )
        folders = {str(pathlib.PurePosixPath(image.inner).parent) for image in inner}
        if len(folders) > 1 and not insist:
            raise ConfigError(
                f"the tars of classes in {root!r} must lie in one folder, found {shorten(sorted(folders))}: give "
                "--num-classes if they belong together"
            )
        if (twice := _in_two_tars(inner)) and not insist:
            raise ConfigError(
                f"each tar of a class in {root!r} must lie in one tar, found {twice[0]} in {twice[1]} and {twice[2]}: "
                "name the archive to read"
            )
        return _grouped((pathlib.PurePosixPath(image.inner).stem, image) for image in inner)
    return _of_folders(root, tars, images, beside, insist=insist)


def _in_two_tars(images: Sequence[Member]) -> tuple[str, str, str] | None:
    """(inner tar, tar, another tar), such as of ImageNet's training archive and that of its third task."""
    home: dict[str, str] = {}
    for image in images:
        if (first := home.setdefault(image.inner, image.tar)) != image.tar:
            return image.inner, first, image.tar
    return None


def _of_folders(
    root: str, tars: Sequence[pathlib.Path], images: Sequence[Member], beside: collections.Counter, *, insist: bool
) -> dict[str, list[Member]]:
    """Class folders below the folders that all have in common; a class a tar if no tar has several of them."""
    depth = _common(image.folders for image in images)
    of_tar = collections.defaultdict(set)
    for image in images:
        of_tar[image.tar].add(image.folders[depth : depth + 1])
    if all(len(found) == 1 for found in of_tar.values()):
        if not insist:
            _refuse_shards(root, tars, len(images), beside)
        return _grouped((pathlib.PurePath(image.tar).stem, image) for image in images)
    if (outside := next((image for image in images if len(image.folders) == depth), None)) is not None:
        raise ConfigError(
            f"the images of {root!r} must all lie in class folders, or none, found {outside.name} of {outside.tar} "
            f"beside the folder {next(image.folders[depth] for image in images if len(image.folders) > depth)!r}"
        )
    if not insist:
        names = {image.folders[depth] for image in images}
        deeper = any(len(image.folders) > depth + 1 for image in images)
        refuse_splits(repr(root), names, deeper, "make a tar of one of them, or give --num-classes if they are classes")
    return _grouped((image.folders[depth], image) for image in images)


def _common(paths: Iterable[tuple[str, ...]]) -> int:
    """How many folders at the beginning all paths have in common."""
    first, *others = set(paths)
    return next((k for k in range(len(first)) if any(first[: k + 1] != other[: k + 1] for other in others)), len(first))


def _refuse_shards(root: str, tars: Sequence[pathlib.Path], count: int, beside: collections.Counter) -> None:
    """Tars that look like shards of one set, whose labels are not in them or not as `.cls`."""
    for ending in _LABELS_OF_OTHERS:
        if 2 * beside[ending] >= count:
            raise ConfigError(
                f"the tars of {root!r} must tell classes by folders, by tars or as .cls, found {beside[ending]:,} "
                f"{ending} files beside {count:,} images, whose labels are not read: give --num-classes if each tar is "
                "a class"
            )
    found = [_NUMBERED.fullmatch(path.stem) for path in tars]
    if len(tars) < 2 or not all(found) or all(_WORDNET.fullmatch(path.stem) for path in tars):
        return
    numbers = sorted(int(match[2]) for match in found)
    if len({(match[1], match[3]) for match in found}) == 1 and numbers == list(range(numbers[0], numbers[-1] + 1)):
        raise ConfigError(
            f"the tars of {root!r} are numbered like shards of one set ({tars[0].name} to {tars[-1].name}) and hold no "
            "class folders or .cls labels: give --num-classes if each is a class"
        )


def _of_labels(
    root: str, images: Sequence[Member], labels: dict[tuple, Member], num_classes: int | None
) -> dict[str, list[Member]]:
    """Classes by number, as webdataset tells them; every number below the largest is one, found or not."""
    numbers = []
    for image in images:
        label = labels.get((image.tar, image.inner, os.path.splitext(image.name)[0]))
        text = content(label)[: _MAX_LABEL_BYTES + 1].strip() if label else b""
        if not re.fullmatch(rb"[0-9]{1,9}", text):
            found = f"{text!r} in {label.name}" if label else "none"
            raise ConfigError(f"{image.name} in {image.tar} must have a number as .cls beside it, found {found}")
        numbers.append(int(text))
    count = num_classes or max(numbers) + 1
    if max(numbers) >= count:
        raise ConfigError(f"--num-classes is {count:,}, but the labels of {root!r} go up to {max(numbers):,}")
    if (missing := count - len(set(numbers))) and num_classes is None:
        raise ConfigError(
            f"the labels of {root!r} go up to {max(numbers):,} without {missing:,} of the numbers below it: give "
            f"--num-classes, such as {count}, if that is right"
        )
    groups = {str(number): [] for number in range(count)}
    for number, image in zip(numbers, images, strict=True):
        groups[str(number)].append(image)
    return groups


def _grouped(named: Iterable[tuple[str, Member]]) -> dict[str, list[Member]]:
    groups = collections.defaultdict(list)
    for name, image in named:
        groups[name].append(image)
    return {name: groups[name] for name in sorted(groups)}
