"""Whatever file a data set holds, it becomes the RGB or grey square that a person would expect, or is named."""

import contextlib
import io
import math

import numpy as np
import pytest
from PIL import Image

from gspn_jax.data.decoding import DataError, decode_image, fit_image


def encode(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def smooth_image(width: int, height: int) -> Image.Image:
    """Detail at many scales within 40..215, so that no filter overshoots the range."""
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(x / 3.1 + y / 7.0), np.cos(x / 5.3 - y / 2.7), np.sin((x + 2 * y) / 11.0)]
    return Image.fromarray(np.stack([np.round(127.5 + 60 * wave) for wave in waves], -1).astype(np.uint8))


def resample(line: np.ndarray, size: int, kernel, support: float) -> np.ndarray:
    """Textbook antialiased resampling of the leading axis in float64: a weighted mean around each output centre."""
    scale = len(line) / size
    stretch = max(scale, 1.0)
    out = np.zeros((size, *line.shape[1:]))
    for i in range(size):
        center = (i + 0.5) * scale
        positions = np.arange(
            max(0, math.floor(center - support * stretch + 0.5)),
            min(len(line), math.floor(center + support * stretch + 0.5)),
        )
        weights = np.array([kernel((p + 0.5 - center) / stretch) for p in positions])
        out[i] = np.tensordot(weights / weights.sum(), line[positions], 1)
    return out


def box(x: float) -> float:
    return 1.0 if -0.5 < x <= 0.5 else 0.0


def bicubic(x: float) -> float:
    x = abs(x)
    if x < 1:
        return 1.5 * x**3 - 2.5 * x**2 + 1
    return -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2 if x < 2 else 0.0


def resize(image: np.ndarray, height: int, width: int, kernel, support: float) -> np.ndarray:
    image = resample(image, height, kernel, support)
    return resample(image.transpose(1, 0, 2), width, kernel, support).transpose(1, 0, 2)


@pytest.mark.parametrize("width, height", [(91, 70), (40, 67), (33, 33), (20, 25)])
def test_crop_is_adms(width, height):
    # Halve with a box filter while both sides reach 2 * size, scale bicubically to the short side, crop the centre.
    size = 16
    image = smooth_image(width, height)
    expected = np.asarray(image, np.float64)
    while min(expected.shape[:2]) >= 2 * size:
        expected = resize(expected, expected.shape[0] // 2, expected.shape[1] // 2, box, 0.5)
    scale = size / min(expected.shape[:2])
    expected = resize(expected, round(expected.shape[0] * scale), round(expected.shape[1] * scale), bicubic, 2.0)
    top, left = (expected.shape[0] - size) // 2, (expected.shape[1] - size) // 2
    expected = expected[top : top + size, left : left + size]
    # Pillow rounds to uint8 after each of up to six passes.
    np.testing.assert_allclose(fit_image(image, size, 3), expected, atol=2.5)


def test_an_image_of_the_right_size_is_not_touched():
    image = smooth_image(24, 24)
    np.testing.assert_array_equal(decode_image(encode(image), "x", 24, 3), np.asarray(image))
    wide = smooth_image(30, 24)
    np.testing.assert_array_equal(decode_image(encode(wide), "x", 24, 3), np.asarray(wide)[:, 3:27])


def solid(mode: str, color) -> Image.Image:
    return Image.new(mode, (8, 8), color)


def palette_image() -> Image.Image:
    image = solid("P", 1)
    image.putpalette([0, 0, 0, 200, 100, 50])
    return image


@pytest.mark.parametrize(
    "encoded, expected",
    [
        (encode(solid("L", 77)), (77, 77, 77)),
        (encode(solid("1", 1)), (255, 255, 255)),
        (encode(palette_image()), (200, 100, 50)),
        (encode(palette_image(), transparency=1), (255, 255, 255)),
        (encode(palette_image(), transparency=0), (200, 100, 50)),
        (encode(solid("RGBA", (200, 100, 50, 255))), (200, 100, 50)),
        (encode(solid("RGBA", (200, 100, 50, 0))), (255, 255, 255)),
        (encode(solid("RGBA", (255, 55, 155, 51))), (255, 215, 235)),  # 0.2 of the colour, 0.8 of white
        (encode(solid("LA", (55, 51))), (215, 215, 215)),
        (encode(solid("RGB", (9, 8, 7)), transparency=(9, 8, 7)), (255, 255, 255)),
        (encode(Image.fromarray(np.full((8, 8), 77 * 257, np.uint16))), (77, 77, 77)),
        (encode(Image.fromarray(np.full((8, 8), 77 * 257, np.int32)), "TIFF"), (77, 77, 77)),
        (
            encode(solid("CMYK", (0, 255, 255, 0)), "JPEG", quality=100),
            (255, 0, 0),
        ),  # no cyan, all magenta and yellow: red
    ],
    ids=[
        "grey",
        "bilevel",
        "palette",
        "palette-transparent",
        "palette-opaque",
        "alpha-opaque",
        "alpha-transparent",
        "alpha-half",
        "grey-alpha",
        "colour-key",
        "16-bit",
        "32-bit",
        "cmyk",
    ],
)
def test_every_pixel_format_becomes_the_colour_one_sees(encoded, expected):
    # 1 level: rounding of alpha and of the CMYK conversion
    np.testing.assert_allclose(decode_image(encoded, "x", 8, 3), np.broadcast_to(expected, (8, 8, 3)), atol=1)


def test_one_channel_is_luma():
    image = decode_image(encode(solid("RGB", (200, 100, 50))), "x", 8, 1)
    assert image.shape == (8, 8, 1)
    np.testing.assert_allclose(image, 0.299 * 200 + 0.587 * 100 + 0.114 * 50, atol=1)  # ITU-R 601


def test_exif_orientation_is_ignored_as_adm_does():
    image = smooth_image(16, 16)
    exif = Image.Exif()
    exif[0x0112] = 6  # "rotate by 90 degrees to show"
    np.testing.assert_array_equal(decode_image(encode(image, exif=exif), "x", 16, 3), np.asarray(image))


JPEG, PNG = encode(smooth_image(64, 64), "JPEG"), encode(smooth_image(64, 64))
NOISE = encode(Image.fromarray(np.random.default_rng(0).integers(0, 256, (200, 200, 3), np.uint8)))
LAST_DATA = NOISE.rindex(b"IDAT")  # of several


@pytest.mark.parametrize(
    "encoded, reason",
    [
        (b"", "empty"),
        (b"<html>404 not found</html>", "not recognised"),
        (JPEG[:20], "not recognised"),
        (JPEG[:-200], "truncated"),
        (PNG[:-200], "truncated"),
        (PNG[:60] + bytes(40) + PNG[100:], "not a usable image"),
        (NOISE[:LAST_DATA] + bytes(4) + NOISE[LAST_DATA + 4 :], "broken PNG file"),
        (encode(solid("F", 0.5), "TIFF"), "floating-point"),
    ],
    ids=["empty", "text", "header-only", "truncated-jpeg", "truncated-png", "damaged-png", "damaged-chunk", "float"],
)
def test_a_bad_image_is_named_with_the_reason(encoded, reason):
    with pytest.raises(DataError, match=rf"^class/file\.jpg .*{reason}"):
        decode_image(encoded, "class/file.jpg", 32, 3)


@pytest.mark.parametrize("encoded", [JPEG, PNG], ids=["jpeg", "png"])
def test_damaged_bytes_give_an_image_or_a_data_error_and_nothing_else(encoded):
    rng = np.random.default_rng(0)
    for _ in range(150):
        damaged = bytearray(encoded)
        for position in rng.integers(len(damaged), size=3):
            damaged[position] = rng.integers(256)
        with contextlib.suppress(DataError):
            assert decode_image(bytes(damaged), "x", 8, 3).shape == (8, 8, 3)
