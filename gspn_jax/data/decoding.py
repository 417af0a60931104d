"""One image file -> a square uint8 array, or a `DataError` that says what is wrong with it.

Pillow opens the formats named here and no other: what a file is called decides nothing. Memory is bounded by the size
asked for and by `MAX_PIXELS`, whatever a file claims to hold.
"""

import io
import os
import stat
import struct
import warnings
import zlib
from typing import Literal

import numpy as np
from jaxtyping import UInt8
from PIL import Image, UnidentifiedImageError

from gspn_jax.state_dict import LFS_POINTER

Fit = Literal["adm", "lanczos"]
"""How images become squares: `fit_image` or `fit_square`."""

EXTENSIONS = {
    "JPEG": (".jpg", ".jpeg"),
    "PNG": (".png",),
    "WEBP": (".webp",),
    "BMP": (".bmp",),
    "GIF": (".gif",),
    "TIFF": (".tif", ".tiff"),
}
"""Formats that are read, as Pillow calls them (of several frames the first), and how their files' names end."""
FORMATS = tuple(EXTENSIONS)

MAX_PIXELS = 89_478_485
"""Pixels of an image that is decoded whole, as Pillow warns (256 MB in RGB); a larger JPEG is decoded at a fraction of
it."""
MAX_BYTES = 2**30
"""Bytes of an image file that is read."""

_LONGEST = 64
"""Times its width that an image is scaled as a whole; of a longer one, only what is kept is computed."""
_BICUBIC_REACH = 2
_BAND = 2**20
"""Pixels that are laid over white at a time."""

# What Pillow raises for files that are damaged in one way or another.
_DAMAGE = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    AttributeError,
    OverflowError,
    MemoryError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,  # where warnings are errors
)

# `MAX_PIXELS` says it, in a sentence that names the file.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


class DataError(ValueError):
    """An image that cannot be used; the message is one sentence naming the image and what is wrong with it."""


def read_image(
    path: str | os.PathLike, size: int | None, channels: int, fit: Fit = "adm"
) -> UInt8[np.ndarray, "H W C"]:
    """Decodes the image file at `path` as `decode_image` does. Raises DataError also as `read_file`."""
    return decode_image(read_file(path), os.fspath(path), size, channels, fit)


def read_file(path: str | os.PathLike) -> bytes:
    """The bytes of an image file. Raises DataError for what cannot be read, is no regular file (a pipe, a device) or is
    larger than `MAX_BYTES`."""
    name = os.fspath(path)
    try:
        # a pipe would otherwise be waited for, for ever
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise DataError(f"{name} is not a usable image: it is no regular file")
            if status.st_size > MAX_BYTES:
                raise DataError(f"{name} is not a usable image: it has {status.st_size:,} bytes, not at most 1 GiB")
            return file.read()
    except OSError as error:
        raise DataError(f"{name} cannot be read: {error.strerror}") from error


def size_of(encoded: bytes, name: str) -> tuple[int, int]:
    """Height and width of an image file that `decode_image` has decoded."""
    try:
        with Image.open(io.BytesIO(encoded), formats=FORMATS) as image:
            return image.height, image.width
    except (*_DAMAGE, UnidentifiedImageError) as error:
        raise DataError(f"{name} is not a usable image: {str(error) or type(error).__name__}") from error


def corner_of(height: int, width: int, size: int) -> tuple[int, int]:
    """Top and left of the square that `fit_image` keeps of an image, in pixels of the scaled image."""
    while min(height, width) >= 2 * size:
        height, width = height // 2, width // 2
    scale = size / min(height, width)
    return (round(height * scale) - size) // 2, (round(width * scale) - size) // 2


def decode_image(
    encoded: bytes, name: str, size: int | None, channels: int, fit: Fit = "adm"
) -> UInt8[np.ndarray, "H W C"]:
    """Decodes a file of one of `FORMATS` and fits it to [size, size, channels] (see `fit_image`).

    With `size` None it keeps its size. EXIF orientation is not applied, as in ADM and DiT, so that statistics stay
    comparable. What is transparent shows white.

    Raises DataError, naming `name`, for a file that is empty, truncated, damaged, too large, or not an image.
    """
    if not encoded:
        raise DataError(f"{name} is not a usable image: the file is empty")
    try:
        with Image.open(io.BytesIO(encoded), formats=FORMATS) as image:
            _bound(image, size)
            if image.format == "PNG":
                _correct_transparency(image, bit_depth=encoded[24])
            image.load()
            if size is None:
                image = _to_mode(image, "L" if channels == 1 else "RGB")
                return np.array(image).reshape(image.height, image.width, channels)
            return (fit_image if fit == "adm" else fit_square)(image, size, channels)
    except UnidentifiedImageError as error:
        reason = "its format is not recognised"
        if encoded.startswith(LFS_POINTER):
            reason = "it is a Git LFS pointer (git lfs pull fetches the file)"
        raise DataError(f"{name} is not a usable image: {reason}") from error
    except _DAMAGE as error:
        raise DataError(f"{name} is not a usable image: {str(error) or type(error).__name__}") from error


def fit_image(image: Image.Image, size: int, channels: int) -> UInt8[np.ndarray, "S S C"]:
    """Converts to RGB (channels=3) or greyscale (channels=1), then scales and crops the centre as ADM does.

    The image is halved with a box filter while both sides are at least 2 * size, scaled with a bicubic filter until the
    short side is `size`, and cropped at the centre (openai/guided-diffusion, `center_crop_arr`). Sides are rounded as
    there: `side * (size / short)`, which at a size that is no power of two differs from `side * size / short`.
    """
    image = _to_mode(image, "L" if channels == 1 else "RGB")
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    short = min(image.size)
    if max(image.size) > _LONGEST * short:
        image = _scaled_centre(image, size)
    elif short != size:
        scale = size / short
        width, height = (round(side * scale) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    pixels = np.asarray(image).reshape(image.height, image.width, channels)
    return np.array(pixels[top : top + size, left : left + size])


def fit_square(image: Image.Image, size: int, channels: int) -> UInt8[np.ndarray, "S S C"]:
    """Converts to RGB or greyscale, crops the largest square at the centre and scales that with a Lanczos filter, as
    text-to-image papers do with COCO (GigaGAN's evaluation, `CenterCropLongEdge`)."""
    image = _to_mode(image, "L" if channels == 1 else "RGB")
    short = min(image.size)
    left, top = (round((side - short) / 2) for side in image.size)
    square = image.crop((left, top, left + short, top + short)).resize((size, size), Image.Resampling.LANCZOS)
    return np.array(square).reshape(size, size, channels)


def _scaled_centre(image: Image.Image, size: int) -> Image.Image:
    """The centre of a very long image, [size, size], scaled as the whole would be: to the rounding of positions."""
    scale = size / min(image.size)
    whole = [round(side * scale) for side in image.size]
    first, length = [], []  # of what is kept, in pixels of the image, along its width and its height
    for side, scaled in zip(image.size, whole, strict=True):
        first.append((scaled - size) // 2 * side / scaled)
        length.append(size * side / scaled)
    reach = _BICUBIC_REACH * max(1.0, 1 / scale) + 1
    low = [max(0, int(start - reach)) for start in first]
    high = [
        min(side, int(start + extent + reach) + 1)
        for start, extent, side in zip(first, length, image.size, strict=True)
    ]
    near = image.crop((*low, *high))
    left, top = (start - before for start, before in zip(first, low, strict=True))
    box = (left, top, min(left + length[0], near.width), min(top + length[1], near.height))
    return near.resize((size, size), Image.Resampling.BICUBIC, box=box)


def _bound(image: Image.Image, size: int | None) -> None:
    """Raises ValueError for an image too large to be decoded, after a JPEG was told to be decoded at a fraction."""
    if image.width * image.height > MAX_PIXELS and size is not None:
        image.draft(None, (2 * size, 2 * size))  # does nothing unless it is a JPEG
    if (found := image.width * image.height) > MAX_PIXELS:
        raise ValueError(f"it claims {image.width}x{image.height} pixels ({found:,}), not at most {MAX_PIXELS:,}")


def _correct_transparency(image: Image.Image, bit_depth: int) -> None:
    """The transparent colour in the levels of the decoded pixels: Pillow leaves it in those of the PNG file."""
    colour = image.info.get("transparency")
    if image.mode == "L" and isinstance(colour, int) and bit_depth in (2, 4):
        image.info["transparency"] = colour * 255 // (2**bit_depth - 1)
    elif image.mode == "RGB" and isinstance(colour, tuple) and bit_depth == 16:
        image.info["transparency"] = tuple(level >> 8 for level in colour)


def _to_mode(image: Image.Image, mode: str) -> Image.Image:
    if image.mode == mode and not image.has_transparency_data:
        return image
    if image.mode.startswith("I"):  # 16 bits a pixel, which Pillow would clip at 255 rather than scale
        return _from_16_bits(image).convert(mode)
    if image.mode == "F":
        raise ValueError("floating-point pixels have no known range")
    return (_over_white(image) if image.has_transparency_data else image).convert(mode)


def _from_16_bits(image: Image.Image) -> Image.Image:
    """Greyscale of 8 bits, level / 257 rounded, and white where it is transparent."""
    levels = np.clip(np.asarray(image), 0, 65535).astype(np.uint16)
    grey = (levels // 257).astype(np.uint8)
    grey += levels % 257 > 128
    if isinstance(transparent := image.info.get("transparency"), int):
        grey[levels == transparent] = 255
    return Image.fromarray(grey)


def _over_white(image: Image.Image) -> Image.Image:
    """The image in RGB: what is transparent shows white, not whatever colour lies beneath."""
    rgb = Image.new("RGB", image.size)
    rows = max(1, _BAND // image.width)
    for top in range(0, image.height, rows):
        band = image.crop((0, top, image.width, min(top + rows, image.height))).convert("RGBA")
        white = Image.new("RGBA", band.size, "white")
        rgb.paste(Image.alpha_composite(white, band).convert("RGB"), (0, top))
    return rgb
