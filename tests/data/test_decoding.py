"""Whatever file a data set holds, it becomes the RGB or grey square that a person would expect, or is named."""

import concurrent.futures
import contextlib
import io
import math
import multiprocessing
import os
import resource
import struct
import subprocess
import zlib

import numpy as np
import pytest
from PIL import Image

from gspn_jax.data import decoding
from gspn_jax.data.decoding import DataError, decode_image, fit_image, fit_square, read_image


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


def lanczos(x: float) -> float:
    return float(np.sinc(x) * np.sinc(x / 3)) if abs(x) < 3 else 0.0


@pytest.mark.parametrize(("width", "height"), [(91, 70), (40, 67), (16, 16), (20, 25), (7, 12)])
def test_squares_are_cropped_on_the_long_edge_before_a_lanczos_filter(width, height):
    image = smooth_image(width, height)
    short = min(width, height)
    left, top = (round((side - short) / 2) for side in (width, height))
    square = np.asarray(image, np.float64)[top : top + short, left : left + short]
    expected = square if short == 16 else resize(square, 16, 16, lanczos, 3)
    found = fit_square(image, 16, 3)
    assert found.shape == (16, 16, 3) and np.abs(found - expected).max() < 1.51  # levels are rounded on each axis
    np.testing.assert_array_equal(decode_image(encode(image), "x", 16, 3, "lanczos"), found)


@pytest.mark.parametrize(
    "width, height",
    [(91, 70), (40, 67), (33, 33), (20, 25), (3, 300), (301, 4), (16, 1100), (40, 2700)],  # the last four: over 64 to 1
)
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


@pytest.mark.parametrize("width, height", [(320, 325), (325, 320)])
def test_sides_are_rounded_as_adm_rounds_them(width, height):
    """`center_crop_arr` of openai/guided-diffusion for a size that is no power of two, where the order counts."""
    size, image = 224, smooth_image(width, height)
    scale = size / min(width, height)
    assert round(325 * scale) != round(325 * size / 320)
    scaled = np.asarray(image.resize((round(width * scale), round(height * scale)), Image.Resampling.BICUBIC))
    top, left = (scaled.shape[0] - size) // 2, (scaled.shape[1] - size) // 2
    np.testing.assert_array_equal(fit_image(image, size, 3), scaled[top : top + size, left : left + size])


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


def png(depth: int, colour: int, row: bytes, transparent: bytes, width: int = 2) -> bytes:
    """A PNG of one row in a layout that Pillow does not write (W3C PNG specification, 11.2 and 11.3)."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, 1, depth, colour, 0, 0, 0)
    chunks = chunk(b"IHDR", header) + chunk(b"tRNS", transparent) + chunk(b"IDAT", zlib.compress(b"\0" + row))
    return b"\x89PNG\r\n\x1a\n" + chunks + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("encoded", "expected"),
    [
        (png(16, 0, struct.pack(">2H", 0, 77 * 257), struct.pack(">H", 0)), [[255] * 3, [77] * 3]),
        (png(16, 0, struct.pack(">2H", 257, 300 * 257 // 2), struct.pack(">H", 257)), [[255] * 3, [150] * 3]),
        (png(4, 0, bytes([0x80]), struct.pack(">H", 8)), [[255] * 3, [0] * 3]),
        (png(2, 0, bytes([0b10_01_0000]), struct.pack(">H", 2)), [[255] * 3, [85] * 3]),
        (png(1, 0, bytes([0b01_000000]), struct.pack(">H", 0)), [[255] * 3, [255] * 3]),
        (png(8, 0, bytes([5, 6]), struct.pack(">H", 5)), [[255] * 3, [6] * 3]),
        (
            png(
                16,
                2,
                struct.pack(">6H", *(257 * v for v in (200, 3, 7, 200, 3, 8))),
                struct.pack(">3H", 51400, 771, 1799),
            ),
            [[255] * 3, [200, 3, 8]],
        ),
        (png(8, 2, bytes([9, 8, 7, 9, 8, 6]), struct.pack(">3H", 9, 8, 7)), [[255] * 3, [9, 8, 6]]),
    ],
    ids=["grey-16-black", "grey-16", "grey-4", "grey-2", "grey-1", "grey-8", "rgb-16", "rgb-8"],
)
def test_the_transparent_colour_of_every_depth_shows_white(encoded, expected):
    np.testing.assert_array_equal(decode_image(encoded, "x", None, 3)[0], expected)


def test_transparency_of_a_large_image_is_laid_over_white_as_that_of_a_small_one(monkeypatch):
    rng = np.random.default_rng(0)
    image = encode(Image.fromarray(rng.integers(0, 256, (50, 7, 4), np.uint8), "RGBA"))
    whole = decode_image(image, "x", None, 3)
    monkeypatch.setattr(decoding, "_BAND", 20)
    np.testing.assert_array_equal(decode_image(image, "x", None, 3), whole)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF"])
def test_every_format_of_the_list_is_read(kind):
    assert np.abs(decode_image(encode(solid("RGB", (200, 100, 50)), kind), "x", 8, 3) - [200.0, 100, 50]).max() <= 3


@pytest.mark.parametrize("kind", ["GIF", "PNG", "TIFF", "WEBP"])
def test_of_several_frames_the_first_is_read(kind):
    frames = [solid("RGB", (level,) * 3) for level in (40, 200)]
    encoded = encode(frames[0], kind, save_all=True, append_images=frames[1:])
    assert np.abs(decode_image(encoded, "x", 8, 3) - 40.0).max() <= 3


@pytest.mark.parametrize("kind", ["PPM", "TGA", "PCX", "ICO", "EPS", "JPEG2000", "PDF"])
def test_no_other_format_is_opened_whatever_the_file_is_called(kind, monkeypatch):
    def run(*_, **__):
        raise AssertionError("a program was started")

    monkeypatch.setattr(subprocess, "Popen", run)  # Ghostscript, for an EPS
    with pytest.raises(DataError, match=r"x\.jpg is not a usable image: its format is not recognised"):
        decode_image(encode(smooth_image(16, 16), kind), "x.jpg", 8, 3)


def test_a_pointer_of_git_lfs_is_called_one():
    text = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n"
    with pytest.raises(DataError, match=r"x\.jpg is not a usable image: it is a Git LFS pointer"):
        decode_image(text, "x.jpg", 8, 3)


def claiming(encoded: bytes, width: int, height: int) -> bytes:
    """The PNG with another size in its header."""
    header = encoded[12:16] + struct.pack(">II", width, height) + encoded[24:29]
    return encoded[:12] + header + struct.pack(">I", zlib.crc32(header)) + encoded[33:]


def _decode_thin() -> int:
    """Bytes by which the largest memory of this process grows when a thin image becomes a square."""
    encoded = encode(Image.new("RGB", (1, 20000)))
    decode_image(PNG, "x", 8, 3)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert decode_image(encoded, "x", 256, 3).shape == (256, 256, 3)
    return 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)


def test_a_thin_image_takes_the_memory_of_what_is_asked_for():
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        assert pool.submit(_decode_thin).result() < 32e6  # 5.5 GB when the whole was scaled


def test_a_size_that_is_claimed_is_looked_at_before_it_is_decoded():
    for width, height in ((2**31 - 1, 1), (24, 5898244), (10_000, 8_948)):
        with pytest.raises(DataError, match=r"x is not a usable image: .*(exceeds limit|not at most 89,478,485)"):
            decode_image(claiming(PNG, width, height), "x", 256, 3)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_large_jpeg_is_decoded_at_a_fraction():
    gradient = np.broadcast_to(np.linspace(0, 255, 10_000)[:, None], (10_000, 9_600)).astype(np.uint8)
    encoded = encode(Image.fromarray(gradient), "JPEG")
    found = decode_image(encoded, "x", 16, 1)
    np.testing.assert_allclose(found, fit_image(Image.fromarray(gradient), 16, 1), atol=4)  # of the whole
    with pytest.raises(DataError, match="not at most 89,478,485"):
        decode_image(encoded, "x", None, 1)


def test_pipes_devices_folders_and_giants_are_no_images(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe.png")
    for path in (tmp_path / "pipe.png", "/dev/zero"):
        with pytest.raises(DataError, match="it is no regular file"):
            read_image(path, 8, 3)
    with pytest.raises(DataError, match=r"cannot be read: Is a directory|it is no regular file"):
        read_image(tmp_path, 8, 3)
    (tmp_path / "image.png").write_bytes(PNG)
    assert read_image(tmp_path / "image.png", 8, 3).shape == (8, 8, 3)
    monkeypatch.setattr(decoding, "MAX_BYTES", 100)
    with pytest.raises(DataError, match="bytes, not at most"):
        read_image(tmp_path / "image.png", 8, 3)
