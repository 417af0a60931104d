"""Images with captions: a folder with .txt or .json beside the images or one file of captions for it, and webdataset
tars.

Captions of one file are read when a set is opened, those beside images with their image. An image without a caption,
and a caption without an image, is left out and counted.
"""

import collections
import json
import os
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
from PIL import Image

from gspn_jax import extras
from gspn_jax.config import ConfigError
from gspn_jax.data.decoding import DataError, corner_of, decode_image, read_file, size_of
from gspn_jax.data.listing import KINDS, describe, is_image_name, kind_of, list_images, say_left_out
from gspn_jax.data.source import hash_of
from gspn_jax.data.tar_files import Member, content, list_tars, members
from gspn_jax.small_files import DamagedFile, parse, shown

ENDINGS = (".txt", ".json")
"""Ends of the names of captions beside an image; the first is read."""
FILES = (".parquet", ".json", ".jsonl")
"""Ends of the names of files of many captions."""
CAPTION_FIELDS = ("caption", "text", "prompt")
NAME_FIELDS = ("file_name", "filename", "image_path", "path", "image", "key")
"""Fields of captions and of the names of their images, in JSON and in columns; the first that is there is read."""

_CHANNELS = 3
_SIZES_IN_FINGERPRINT = 1024
_LARGEST_CAPTION = 2**20
"""Bytes of a file beside an image."""

Captions = dict[str, tuple[str, ...]]
"""Name of an image -> its captions."""
File = TypeVar("File", str, Member)


class _Pair(NamedTuple, Generic[File]):
    """An image and where its caption is: a file, or the text itself."""

    image: File
    caption: File | None
    text: str = ""


class CaptionedImages(Generic[File]):
    """Random access to {"image": uint8 [S, S, 3], "sizes": int32 [6], "caption": str}, in the order of names.

    Images are scaled and cropped to squares of `image_size` as ADM does. "sizes" are the height and width of the
    original, top and left of the crop in the scaled image, height and width aimed at, in pixels (SDXL's conditions).
    `left_out` counts what is in the set and not in it, by what it is; it is logged.
    """

    class_names = ("",)

    def __init__(
        self,
        pairs: Sequence[_Pair[File]],
        image_size: int,
        *,
        read: Callable[[File], bytes],
        name: Callable[[File], str],
        field: str | None,
        fingerprint: str,
        left_out: Mapping[str, int],
    ):
        self._pairs, self._image_size, self._field = pairs, image_size, field
        self._read, self._name = read, name
        self.fingerprint, self.left_out = fingerprint, dict(left_out)

    def __len__(self) -> int:
        return len(self._pairs)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Raises DataError for an image that cannot be decoded, and for a caption that is no text, or empty."""
        pair, size = self._pairs[index], self._image_size
        name = self._name(pair.image)
        encoded = self._read(pair.image)
        image = decode_image(encoded, name, size, _CHANNELS)
        original = size_of(encoded, name)
        return {
            "image": image,
            "sizes": np.array([*original, *corner_of(*original, size), size, size], np.int32),
            "caption": self._caption(pair),
        }

    def _caption(self, pair: _Pair[File]) -> str:
        if pair.caption is None:
            return pair.text
        name, encoded = self._name(pair.caption), self._read(pair.caption)
        if len(encoded) > _LARGEST_CAPTION:
            raise DataError(f"{name} is not a usable caption: it has {len(encoded):,} bytes")
        path = pair.caption.name if isinstance(pair.caption, Member) else pair.caption
        if path.lower().endswith(".json"):
            text = _of_json(encoded, name, self._field)
        else:
            try:
                text = encoded.decode("utf-8-sig")
            except UnicodeDecodeError as error:
                raise DataError(f"{name} is not a usable caption: it is no text in UTF-8") from error
        if not text.strip():
            raise DataError(f"{name} is not a usable caption: it is empty")
        return text.strip()


def open_folder(
    root: str, image_size: int, *, field: str | None = None, captions: str | None = None
) -> CaptionedImages[str]:
    """The images anywhere below `root` with the captions beside them, or those of a file (`read_captions`).

    `field` is that of captions in JSON or columns. Raises ConfigError for a folder without images that have captions.
    """
    if not os.path.isdir(root):
        raise ConfigError(f"--images must be a folder of images with captions, found none at {root!r}")
    listing = list_images(root, also=() if captions else ENDINGS)
    if captions:
        pairs, left_out, said = _of_file(listing.files, read_captions(captions, field))
    else:
        pairs, left_out = _beside((name, name) for name in listing.files)
        said = []
    pairs = [pair._replace(image=os.path.join(root, pair.image)) for pair in pairs]
    pairs = [pair._replace(caption=pair.caption and os.path.join(root, pair.caption)) for pair in pairs]
    left_out += listing.left_out
    _check_some(pairs, root, left_out, captions)
    names = [os.path.relpath(pair.image, root) for pair in pairs]
    return CaptionedImages(
        pairs,
        image_size,
        read=read_file,
        name=str,
        field=field,
        fingerprint=hash_of(["captioned folder", *names, *said, field or "", repr(_some_sizes(pairs))]),
        left_out=left_out,
    )


def open_tars(root: str, image_size: int, *, field: str | None = None) -> CaptionedImages[Member]:
    """The images of webdataset tars, a file or a folder of them, with the .txt or .json of the same name.

    Raises ConfigError for what holds no tars, or no images with captions.
    """
    left_out: collections.Counter = collections.Counter()
    pairs: list[_Pair[Member]] = []
    for path in list_tars(root, left_out):
        found, without = _beside(((one.inner, one.name), one) for one in members(path, left_out))
        pairs += found
        left_out += without
    _check_some(pairs, root, left_out, None)
    parts = [f"{one.name} {one.length}" for pair in pairs for one in (pair.image, pair.caption)]
    return CaptionedImages(
        pairs,
        image_size,
        read=_read_member,
        name=lambda member: f"{member.name} in {member.tar}",
        field=field,
        fingerprint=hash_of(["captioned tars", *parts, field or ""]),
        left_out=left_out,
    )


def read_captions(path: str | pathlib.Path, field: str | None = None) -> Captions:
    """Captions by the names of their images, from a .parquet with a column of each, a .jsonl with an object a line, or
    a .json: COCO's (images and annotations), {name: caption or captions}, or a list of objects.

    Captions are stripped, empty ones dropped. Raises ConfigError for other files, and MissingExtra for a .parquet
    without pyarrow.
    """
    path = pathlib.Path(path)
    if not path.is_file() or path.suffix.lower() not in FILES:
        raise ConfigError(f"--captions must be a file of {', '.join(FILES)}, found {str(path)!r}")
    read = _of_parquet if path.suffix.lower() == ".parquet" else _of_text
    found: dict[str, list[str]] = collections.defaultdict(list)
    for name, caption in read(path, field):
        if caption.strip():
            found[name].append(caption.strip())
    if not found:
        raise ConfigError(f"--captions must hold captions, found none in {path}")
    return {name: tuple(captions) for name, captions in found.items()}


def caption_of(name: str, captions: Captions) -> tuple[str, ...]:
    """Captions of the image file `name`: under its path, its name, or either without its ending; () for none."""
    last = name.rpartition("/")[2]
    keys = (name, last, os.path.splitext(name)[0], os.path.splitext(last)[0])
    return next((captions[key] for key in keys if key in captions), ())


def prompt_in(path: str) -> str | None:
    """The prompt that `python -m gspn_jax.text_to_image` wrote into a PNG; None for another file."""
    try:
        with Image.open(path, formats=("PNG",)) as image:
            found = getattr(image, "text", {}).get("prompt")
    except (OSError, ValueError, SyntaxError):
        return None
    return found.strip() or None if isinstance(found, str) else None


def _of_file(names: Iterable[str], captions: Captions) -> tuple[list[_Pair[str]], collections.Counter, list[str]]:
    """Images with the first of their captions, what is left out, and all captions that are taken."""
    pairs, left_out = [], collections.Counter()
    for name in names:
        found = caption_of(name, captions)
        if not found:
            left_out["images without a caption"] += 1
            continue
        left_out["further captions of an image"] += len(found) - 1
        pairs.append(_Pair(name, None, found[0]))
    if (without := len(captions) - len(pairs)) > 0:
        left_out["captions without an image"] += without
    return pairs, +left_out, [pair.text for pair in pairs]


def _beside(named: Iterable[tuple[Any, File]]) -> tuple[list[_Pair[File]], collections.Counter]:
    """Images with the captions of the same name beside them, and what is left out."""
    images, others = [], {}
    left_out: collections.Counter = collections.Counter()
    for key, file in named:
        stem, ending = _split(key)
        if is_image_name(ending):
            images.append((stem, key, file))
        elif ending in ENDINGS:
            others[stem, ending] = file
        else:
            left_out[kind_of(ending)] += 1
    pairs, taken = [], set()
    for stem, _, file in sorted(images, key=lambda image: image[:2]):
        caption = next((others[stem, ending] for ending in ENDINGS if (stem, ending) in others), None)
        if caption is None:
            left_out["images without a caption"] += 1
            continue
        pairs.append(_Pair(file, caption))
        taken.add(stem)
    left_out["captions without an image"] += len({stem for stem, _ in others} - taken)
    return pairs, +left_out


def _split(key: Any) -> tuple[Any, str]:
    """The name of a file without its ending, within its tar, and the ending."""
    if isinstance(key, tuple):
        stem, ending = os.path.splitext(key[1])
        return (key[0] or "", stem), ending.lower()
    stem, ending = os.path.splitext(key)
    return stem, ending.lower()


def _check_some(pairs: Sequence[_Pair], root: str, left_out: collections.Counter, captions: str | None) -> None:
    """Says what is left out. Raises ConfigError for a set without an image that has a caption."""
    if not pairs:
        where = f"in {captions}" if captions else "as .txt or .json beside them"
        raise ConfigError(
            f"{root!r} must hold {KINDS} files with captions {where}, found none "
            f"({describe(left_out) or 'it is empty'})"
        )
    say_left_out(root, left_out)


def _some_sizes(pairs: Sequence[_Pair[str]]) -> list[int]:
    """Bytes of about 1,000 images and captions, spread evenly."""
    spread = np.linspace(0, len(pairs) - 1, min(len(pairs), _SIZES_IN_FINGERPRINT)).astype(int)
    paths = [path for i in spread for path in (pairs[i].image, pairs[i].caption) if path]
    return [os.path.getsize(path) for path in paths]


def _read_member(member: Member) -> bytes:
    try:
        return content(member)
    except OSError as error:
        raise DataError(f"{member.name} in {member.tar} cannot be read: {error.strerror}") from error


def _of_json(encoded: bytes, name: str, field: str | None) -> str:
    """The caption in a JSON object beside an image."""
    try:
        about = parse(encoded, name, nan=True, large=True)
    except DamagedFile as error:
        raise DataError(f"{name} is not a usable caption: {error}") from error
    fields = (field,) if field else CAPTION_FIELDS
    found = next((about[one] for one in fields if one in about), None) if isinstance(about, dict) else None
    if not isinstance(found, str):
        raise DataError(
            f"{name} is not a usable caption: it has no text as {' or '.join(fields)}, found {shown(found)}"
        )
    return found


def _of_text(path: pathlib.Path, field: str | None) -> list[tuple[str, str]]:
    """(name, caption) of a .json or .jsonl."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            if path.suffix.lower() == ".jsonl":
                return [_of_object(json.loads(line), path, field) for line in file if line.strip()]
            about = json.load(file)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"--captions must be a file of JSON in UTF-8, {path} cannot be read: {error}") from error
    if isinstance(about, list):
        return [_of_object(one, path, field) for one in about]
    if isinstance(about, dict) and {"images", "annotations"} <= about.keys():
        return _of_coco(about, path, field)
    if isinstance(about, dict):
        several = [(name, one if isinstance(one, list) else [one]) for name, one in about.items()]
        if all(isinstance(caption, str) for _, captions in several for caption in captions):
            return [(name, caption) for name, captions in several for caption in captions]
    raise ConfigError(
        f"--captions must be COCO's JSON, captions by the names of images, or a list of objects, found {shown(about)} "
        f"in {path}"
    )


def _of_coco(about: dict[str, Any], path: pathlib.Path, field: str | None) -> list[tuple[str, str]]:
    """(name, caption) of "images" with ids and "annotations" with those ids."""
    try:
        names = {image["id"]: str(image["file_name"]) for image in about["images"]}
        return [(names[one["image_id"]], str(one[field or "caption"])) for one in about["annotations"]]
    except (KeyError, TypeError) as error:
        raise ConfigError(
            f"--captions must be COCO's, with id and file_name of images, image_id and {field or 'caption'} of "
            f"annotations, found an entry without {error} in {path}"
        ) from error


def _of_object(about: Any, path: pathlib.Path, field: str | None) -> tuple[str, str]:
    """(name, caption) of a JSON object."""
    name_field, caption_field = _fields(about if isinstance(about, dict) else {}, path, field)
    name, caption = about[name_field], about[caption_field]
    if not isinstance(name, str) or not isinstance(caption, str):
        raise ConfigError(f"{path} must have texts as {name_field} and {caption_field}, found {shown(about)}")
    return name, caption


def _of_parquet(path: pathlib.Path, field: str | None) -> list[tuple[str, str]]:
    """(name, caption) of each row."""
    extras.require("parquet", "pyarrow", by=f"reading {path.name}")
    import pyarrow
    from pyarrow import parquet

    try:
        names = parquet.read_schema(path).names
        columns = _fields(names, path, field)
        table = parquet.read_table(path, columns=list(columns))
    except (pyarrow.ArrowException, OSError) as error:
        raise ConfigError(f"--captions must be a .parquet file, {path} cannot be read: {error}") from error
    rows = zip(*(table.column(column).to_pylist() for column in columns), strict=True)
    found = [(name, caption) for name, caption in rows if name is not None and caption is not None]
    if not all(isinstance(name, str) and isinstance(caption, str) for name, caption in found):
        raise ConfigError(f"{path} must have texts in its columns {' and '.join(columns)}, found other values")
    return found


def _fields(names: Iterable[str], path: pathlib.Path, field: str | None) -> tuple[str, str]:
    """Fields of the name and of the caption."""
    names = list(names)
    name = next((one for one in NAME_FIELDS if one in names), None)
    caption = next((one for one in ((field,) if field else CAPTION_FIELDS) if one in names), None)
    if name is None or caption is None:
        raise ConfigError(
            f"{path} must have one of {', '.join(NAME_FIELDS)} and {field or ', '.join(CAPTION_FIELDS)}, found "
            f"{', '.join(map(str, names[:20])) or 'neither'}"
        )
    return name, caption
