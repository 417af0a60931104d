"""One image file's bytes -> a square uint8 array, or a `DataError` that says what is wrong with it."""

import io
import struct
import zlib

import numpy as np
from jaxtyping import UInt8
from PIL import Image, UnidentifiedImageError

# What Pillow raises for files that are damaged in one way or another.
_DAMAGE = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


class DataError(ValueError):
    """An image that cannot be used; the message is one sentence naming the image and what is wrong with it."""


def decode_image(encoded: bytes, name: str, size: int | None, channels: int) -> UInt8[np.ndarray, "H W C"]:
    """Decodes a JPEG, PNG or other file that Pillow reads and fits it to [size, size, channels] (see `fit_image`).

    With `size` None it keeps its size. EXIF orientation is not applied, as in ADM and DiT, so that statistics stay
    comparable.

    Raises DataError, naming `name`, for a file that is empty, truncated, damaged, or not an image.
    """
    if not encoded:
        raise DataError(f"{name} is not a usable image: the file is empty")
    try:
        with Image.open(io.BytesIO(encoded)) as image:
            image.load()
            if size is None:
                image = _to_mode(image, "L" if channels == 1 else "RGB")
                return np.array(image).reshape(image.height, image.width, channels)
            return fit_image(image, size, channels)
    except UnidentifiedImageError as error:
        raise DataError(f"{name} is not a usable image: its format is not recognised") from error
    except _DAMAGE as error:
        raise DataError(f"{name} is not a usable image: {str(error) or type(error).__name__}") from error


def fit_image(image: Image.Image, size: int, channels: int) -> UInt8[np.ndarray, "S S C"]:
    """Converts to RGB (channels=3) or greyscale (channels=1), then scales and crops the centre as ADM does.

    The image is halved with a box filter while both sides are at least 2 * size, scaled with a bicubic filter until the
    short side is `size`, and cropped at the centre (openai/guided-diffusion, `center_crop_arr`).
    """
    image = _to_mode(image, "L" if channels == 1 else "RGB")
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    short = min(image.size)
    if short != size:
        width, height = (round(side * size / short) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    pixels = np.asarray(image).reshape(image.height, image.width, channels)
    return np.array(pixels[top : top + size, left : left + size])


def _to_mode(image: Image.Image, mode: str) -> Image.Image:
    if image.mode == mode and not image.has_transparency_data:
        return image
    if image.mode.startswith("I"):  # 16 bits a pixel, which Pillow would clip at 255 rather than scale
        levels = np.clip(np.asarray(image).astype(np.int64), 0, 65535)
        image = Image.fromarray(np.round(levels / 257).astype(np.uint8))
    elif image.mode == "F":
        raise ValueError("floating-point pixels have no known range")
    elif image.has_transparency_data:  # what is transparent shows white, not whatever colour lies beneath
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert(mode)
