"""Samples by the thousand in one .npz of the ADM layout, written so that a kill or a full disk loses nothing."""

import json
import os
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Int, UInt8

from gspn_jax.config import ConfigError
from gspn_jax.files import replacing

Draw = Callable[[np.ndarray, np.ndarray], np.ndarray]


def write_npz(
    path: pathlib.Path,
    draw: Draw,
    labels: Int[np.ndarray, " N"],
    seeds: Int[np.ndarray, " N"],
    *,
    shape: tuple[int, int, int],
    batch_size: int,
    settings: dict[str, Any],
    done: Callable[[int], None] = lambda count: None,
) -> None:
    """Draws N images batch by batch into `path`: `arr_0` uint8 [N, H, W, C], `arr_1` int64 labels [N], and `settings`
    as JSON text, which say how the images were made.

    Finished batches lie in `<path>.partial/` until the whole is there; a second call with the same `settings` (JSON
    values) goes on behind them. `done` is called with the number of images that exist.
    Raises ConfigError when `path` exists, when a partial result has other settings, or when the disk is too small.
    """
    if path.exists():
        raise ConfigError(f"{path} exists already: choose another output, or delete it")
    partial = path.with_name(path.name + ".partial")
    pixels, state, total = partial / "images.bin", partial / "state.json", len(labels)
    image_bytes = int(np.prod(shape))
    count = 0
    if state.exists():
        saved = json.loads(state.read_text())
        if saved["settings"] != settings:
            changed = [k for k in settings if saved["settings"].get(k) != settings[k]]
            raise ConfigError(
                f"{partial} was begun with other settings ({', '.join(changed)}): repeat them, choose "
                "another output, or delete it"
            )
        count = saved["images"]
    free, needed = shutil.disk_usage(path.parent).free, (2 * total - count) * image_bytes
    if free < needed:
        raise ConfigError(
            f"{total} images of {'x'.join(map(str, shape))} need {needed / 1e9:.2f} GB on the disk of "
            f"{path.parent} while they are written, found {free / 1e9:.2f} GB free"
        )
    partial.mkdir(exist_ok=True)
    done(count)
    with open(pixels, "r+b" if pixels.exists() else "w+b") as file:
        file.truncate(count * image_bytes)  # what a kill left behind the last finished batch
        file.seek(count * image_bytes)
        while count < total:
            batch = slice(count, min(count + batch_size, total))
            images = draw(labels[batch], seeds[batch])
            file.write(images.tobytes())
            file.flush()
            os.fsync(file.fileno())
            count = batch.stop
            with replacing(state) as temporary:
                temporary.write_text(json.dumps({"images": count, "settings": settings}))
            done(count)
    images: UInt8[np.ndarray, "N H W C"] = np.memmap(pixels, np.uint8, "r", shape=(total, *shape))
    with replacing(path) as temporary, open(temporary, "wb") as file:  # to a name, savez would append ".npz"
        np.savez(file, arr_0=images, arr_1=labels.astype(np.int64), settings=np.array(json.dumps(settings)))
    del images
    shutil.rmtree(partial)
