"""A picture of many images, with labels, that a person can look at."""

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

_MIN_CELL = 64
_MARGIN = 4
_FONT_SIZE = 14


def grid(
    images: UInt8[np.ndarray, "N H W C"], labels: Sequence[object] | None = None, columns: int = 10
) -> Image.Image:
    """Images (C = 1 or 3) row by row on white; small ones are enlarged, in whole steps, to at least 64 pixels.

    `labels` has one entry an image, written above it, or one entry a row of the grid, written at its left.
    """
    images = np.asarray(images)
    if images.ndim != 4 or images.dtype != np.uint8 or images.shape[-1] not in (1, 3) or not len(images):
        raise ValueError(
            f"images must be uint8 [N, H, W, C] with N >= 1 and C 1 or 3, found {images.dtype} {list(images.shape)}"
        )
    if columns < 1:
        raise ValueError(f"columns must be 1 or more, found {columns}")
    count, height, width, channels = images.shape
    columns = min(columns, count)
    rows = math.ceil(count / columns)
    texts = [str(label) for label in labels] if labels is not None else []
    if texts and len(texts) not in (count, rows):
        raise ValueError(f"labels must have an entry for each of {count} images or {rows} rows, found {len(texts)}")

    font = ImageFont.load_default(_FONT_SIZE)
    per_row = len(texts) == rows
    left = math.ceil(max(font.getlength(text) for text in texts)) + 2 * _MARGIN if per_row else _MARGIN
    above = 0 if per_row or not texts else _FONT_SIZE + _MARGIN
    zoom = max(1, math.ceil(_MIN_CELL / min(height, width)))
    cell_width, cell_height = width * zoom + _MARGIN, height * zoom + _MARGIN + above
    mode = "L" if channels == 1 else "RGB"
    canvas = Image.new(mode, (left + columns * cell_width, _MARGIN + rows * cell_height), "white")
    draw = ImageDraw.Draw(canvas)
    for i, image in enumerate(images):
        row, column = divmod(i, columns)
        x, y = left + column * cell_width, _MARGIN + row * cell_height
        if above:
            draw.text((x, y), _shorten(texts[i], width * zoom, font), fill="black", font=font)
        picture = Image.fromarray(image[..., 0] if channels == 1 else image)
        canvas.paste(picture.resize((width * zoom, height * zoom), Image.Resampling.NEAREST), (x, y + above))
    if per_row:
        for row, text in enumerate(texts):
            draw.text(
                (_MARGIN, _MARGIN + row * cell_height + height * zoom // 2), text, fill="black", font=font, anchor="lm"
            )
    return canvas


def _shorten(text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """Cuts text that would run into its neighbour's."""
    while text and font.getlength(text) > width:
        text = text[:-1]
    return text
