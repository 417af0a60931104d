"""How many images a second the loader gives: from memory (`data.in_memory`), and by Grain, from the same folder.

python benchmarks/image_loader.py --images CIFAR/train                     one folder of images a class
python benchmarks/image_loader.py                                          5,000 made-up JPEGs of 32x32
python benchmarks/image_loader.py --images CIFAR/train --out benchmarks/results/image_loader_cpu.json

Both sides give the same batches, flips drawn, in turns in this process; their first batches are compared. `--cores`
restricts the process to that many cores, so that results of different machines compare.
"""

import argparse
import contextlib
import dataclasses
import os
import pathlib
import tempfile
import time
from collections.abc import Iterator

import numpy as np
from PIL import Image


def make_images(root: str | pathlib.Path, size: int, count: int) -> None:
    """Made-up photographs of ten classes: noise, enlarged, as JPEG."""
    rng = np.random.default_rng(0)
    for i in range(count):
        path = pathlib.Path(root, f"class {i % 10}", f"{i:05}.jpg")
        path.parent.mkdir(parents=True, exist_ok=True)
        noise = Image.fromarray(rng.integers(256, size=(8, 8, 3), dtype=np.uint8))
        noise.resize((size, size), Image.Resampling.BICUBIC).save(path)


@contextlib.contextmanager
def folder_of(images: str | None, size: int) -> Iterator[str]:
    """`images`, or a temporary folder of 5,000 that are made up."""
    if images:
        yield images
        return
    with tempfile.TemporaryDirectory() as root:
        make_images(root, size, 5000)
        yield root


def measure(folder: str, size: int, batch_size: int, seconds: float) -> dict[str, float]:
    """Images/s of either loader, their ratio, and what decoding into memory takes."""
    from gspn_jax.config import DataConfig
    from gspn_jax.data import make_loader, make_source

    classes = sum(entry.is_dir() for entry in os.scandir(folder))
    grain = DataConfig(source="folder", path=folder, image_size=size, channels=3, num_classes=classes, flip=True)
    memory = dataclasses.replace(grain, in_memory=True)
    start = time.perf_counter()
    source = make_source(memory)
    found = {
        "images": len(source),
        "decode_seconds": time.perf_counter() - start,
        "megabytes": source.images.nbytes / 1e6,
    }
    with (
        make_loader(grain, make_source(grain), batch_size=batch_size, seed=0) as read,
        make_loader(memory, source, batch_size=batch_size, seed=0) as kept,
    ):
        for _ in range(5):
            one, other = next(read), next(kept)
            if not all(np.array_equal(one[name], other[name]) for name in one):
                raise SystemExit("the two loaders differ")
        for name, loader in (("grain", read), ("memory", kept)):
            start, cpu, count = time.perf_counter(), time.process_time(), 0
            while time.perf_counter() - start < seconds:
                next(loader)
                count += batch_size
            found[f"{name}_images_per_second"] = count / (time.perf_counter() - start)
            found[f"{name}_cpu_us_per_image"] = 1e6 * (time.process_time() - cpu) / count
    return found | {"ratio": found["memory_images_per_second"] / found["grain_images_per_second"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", help="a folder of images, one folder a class")
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--seconds", type=float, default=5, help="of either loader, each time")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--out", type=pathlib.Path, help="a JSON file that the results are added to")
    arguments = parser.parse_args()

    available = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, available[: arguments.cores])  # before any thread is started
    from record import measure_and_append

    settings = {
        "images": arguments.images and pathlib.Path(arguments.images).name,
        "size": arguments.image_size,
        "batch_size": arguments.batch_size,
        "cores_used": min(arguments.cores, len(available)),
    }
    with folder_of(arguments.images, arguments.image_size) as folder, tempfile.TemporaryDirectory() as unused:
        out = arguments.out or pathlib.Path(unused, "result.json")
        measure_and_append(
            out,
            settings,
            arguments.repeat,
            lambda: measure(folder, arguments.image_size, arguments.batch_size, arguments.seconds),
        )


if __name__ == "__main__":
    main()
