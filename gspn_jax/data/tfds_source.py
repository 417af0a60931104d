"""A tensorflow-datasets image classification set prepared as array_record, read without TensorFlow."""

import contextlib
import os
import re
from collections.abc import Iterator

import numpy as np
import tensorflow_datasets as tfds

from gspn_jax.config import ConfigError
from gspn_jax.data.decoding import DataError, decode_image
from gspn_jax.data.source import hash_of

MOST_CLASSES = 10**6
"""Those of ImageNet-21k are 21,843; names of more are not made up."""
_OWN_FEATURES = "tensorflow_datasets.core.features."


class TfdsSource:
    """`split` ("train", "train[:90%]", ...) of the set `name`, found in `data_dir` (None: ~/tensorflow_datasets).

    Images stay encoded until they are asked for. Raises ConfigError, with the command that helps, for a set that is
    unknown, not prepared, prepared in a format without random access (TFRecord), or not of labelled images.
    """

    def __init__(self, name: str, data_dir: str | None, split: str, size: int | None, channels: int):
        builder = _prepared_builder(name, data_dir)
        features = dict(builder.info.features.items())
        keys = builder.info.supervised_keys
        image_key, label_key = keys if keys and len(keys) == 2 else ("image", "label")
        if not (
            isinstance(features.get(image_key), tfds.features.Image)
            and isinstance(features.get(label_key), tfds.features.ClassLabel)
        ):
            raise ConfigError(
                f"data.name must be a set of images with one class label each, found {name!r} with "
                f"{', '.join(features)}"
            )
        try:
            self._records = builder.as_data_source(split, decoders={image_key: tfds.decode.SkipDecoding()})
        except (ValueError, KeyError) as error:
            raise ConfigError(
                f"data.split must be a split of {name!r} ({', '.join(builder.info.splits)}) or a "
                f"slice of one with images in it, found {split!r}"
            ) from error
        self._name, self._size, self._channels = f"{builder.info.name} {split}", size, channels
        self._image_key, self._label_key = image_key, label_key
        label = features[label_key]
        if not 0 < (label.num_classes or 0) <= MOST_CLASSES:
            raise ConfigError(
                f"{name!r} must have from 1 to {MOST_CLASSES:,} classes, found {label.num_classes} in its features.json"
            )
        _check_shards(builder, split)
        self.class_names = tuple(label.names or map(str, range(label.num_classes)))
        self.fingerprint = hash_of(
            [
                "tfds",
                builder.info.full_name,
                split,
                *self.class_names,
                *(f"{part.name} {part.num_bytes} {part.shard_lengths}" for part in builder.info.splits.values()),
            ]
        )

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict[str, np.ndarray | np.int32]:
        name = f"image {index} of {self._name}"
        try:
            record = self._records[index]
        except (RuntimeError, ValueError) as error:
            raise DataError(f"{name} cannot be read: {_said_by(error)}") from error
        return {
            "image": decode_image(record[self._image_key], name, self._size, self._channels),
            "label": np.int32(record[self._label_key]),
        }


def _check_shards(builder: tfds.core.DatasetBuilder, split: str) -> None:
    """Raises ConfigError unless the files of a split are there, in the folder of the set."""
    folder = os.path.abspath(os.fspath(builder.data_dir))
    for file in getattr(builder.info.splits[split], "filepaths", ()):
        path = os.path.abspath(os.fspath(file))
        if os.path.commonpath([folder, path]) != folder or not os.path.isfile(path):
            raise ConfigError(f"the shards of {split!r} must be files in {folder}, found none at {os.fspath(file)}")


def _said_by(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


class _ForeignClassError(Exception):
    """A features.json names a class that is not tensorflow-datasets' own."""


@contextlib.contextmanager
def _own_features_only() -> Iterator[None]:
    """Inside, a features.json builds features of tensorflow-datasets only, which otherwise imports whatever module the
    file names, and so runs it. Raises _ForeignClassError for another."""
    base = tfds.features.FeatureConnector
    theirs = base.__dict__["cls_from_name"]

    def checked(cls: type, python_class_name: str) -> type:
        if not str(python_class_name).startswith(_OWN_FEATURES):
            raise _ForeignClassError(python_class_name)
        return theirs.__get__(None, cls)(python_class_name)

    base.cls_from_name = classmethod(checked)
    try:
        yield
    finally:
        base.cls_from_name = theirs


def _prepared_builder(name: str, data_dir: str | None) -> tfds.core.DatasetBuilder:
    if re.search(r":(?![\d*])", name):
        raise ConfigError(
            f"data.name must be a set of tensorflow-datasets or one prepared in data.path, found {name!r}, whose "
            "description is code from elsewhere"
        )
    try:
        with _own_features_only():
            builder = tfds.builder(name, data_dir=data_dir)
    except _ForeignClassError as error:
        raise ConfigError(
            f"the features of {name!r} in data.path={data_dir!r} must be tensorflow-datasets' own, found the class "
            f"{str(error)!r} in features.json, whose code is not run"
        ) from error
    except ValueError as error:  # DatasetNotFoundError, a malformed name, an unknown config
        raise ConfigError(
            f"data.name must be a tensorflow-datasets name or a set prepared in data.path, found "
            f"{name!r} with data.path={data_dir!r}"
        ) from error
    except (OSError, ConfigError):
        raise
    except ImportError as error:
        raise ConfigError(
            f"data.name must be a set that tensorflow-datasets describes without TensorFlow, found "
            f"{name!r} ({str(error).rsplit(': ', 1)[-1]})"
        ) from error
    except Exception as error:  # of its own reader, or of what that does with other types than it expects
        raise ConfigError(
            f"features.json and dataset_info.json of {name!r} in data.path={data_dir!r} must be as tensorflow-datasets "
            f"wrote them, found: {type(error).__name__}: {_said_by(error)}"
        ) from error
    if not builder.is_prepared():
        where = f", data_dir={os.fspath(data_dir)!r}" if data_dir else ""
        by_hand = os.path.join(os.fspath(data_dir or "~/tensorflow_datasets"), "downloads/manual")
        first = f"download its archives by hand into {by_hand!r}, and " if builder.MANUAL_DOWNLOAD_INSTRUCTIONS else ""
        raise ConfigError(
            f"{name!r} is not prepared in {os.fspath(builder.data_dir)!r}; {first}prepare it once, where tensorflow is "
            f'installed too if the set needs it, with: python -c "import tensorflow_datasets as tfds; '
            f"tfds.builder({name!r}{where}, file_format='array_record').download_and_prepare()\""
        )
    formats = [builder.info.file_format, *(builder.info.alternative_file_formats or [])]
    if tfds.core.FileFormat.ARRAY_RECORD not in formats:
        found = ", ".join(kind.value for kind in formats if kind)
        raise ConfigError(
            f"{name!r} must be prepared as array_record to be read in random order, found {found} in "
            f"{os.fspath(builder.data_dir)!r}; add array_record files to it once, where tensorflow and apache-beam "
            f'are installed too, with: python -c "from tensorflow_datasets.scripts.cli.convert_format_utils import '
            f"convert_dataset; convert_dataset(dataset_version_dir={os.fspath(builder.data_dir)!r}, out_dir=None, "
            f"out_file_format='array_record')\""
        )
    return builder
