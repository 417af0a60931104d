"""How many augmented images a second a classifier's loader gives from records, beside PIL in a PyTorch DataLoader.

python benchmarks/augmented_loader.py --images IMAGENET_PART          one folder of images a class
python benchmarks/augmented_loader.py                                 500 made-up photographs of 500x375
python benchmarks/augmented_loader.py --out benchmarks/results/augmented_loader_cpu.json

Ours: `python -m gspn_jax.prepare images`, then `make_loader` with RandomResizedCrop, flip and RandAugment, to 224
pixels, in threads of this process. Beside it the same crops, flips and operations, on Pillow images, in worker
processes of a DataLoader that decodes the JPEGs each time, as is usual; and, for what the records alone give, in a
DataLoader that reads the records. All in turns in this process, on `--cores` cores. Erasing and mixing are done on the
device and belong to the training step, on either side.
"""

import argparse
import os
import pathlib
import resource
import tempfile
import time
from collections.abc import Iterator

import numpy as np
from PIL import Image

SIZE = 224
WARM = 4
"""Batches that are not timed."""


def make_photographs(root: pathlib.Path, count: int) -> None:
    """Made-up photographs of 500x375, as JPEG: noise, enlarged, with finer noise on it."""
    rng = np.random.default_rng(0)
    for i in range(count):
        path = root / f"class {i % 10}" / f"{i:05}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        noise = Image.fromarray(rng.integers(256, size=(12, 16, 3), dtype=np.uint8)).resize((500, 375), 3)
        grain = np.asarray(noise).astype(int) + rng.integers(-8, 9, size=(375, 500, 1))
        Image.fromarray(grain.clip(0, 255).astype(np.uint8)).save(path, quality=90)


def cpu_seconds() -> float:
    """Of this process and of the children that have ended."""
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def rate(batches: Iterator, batch_size: int, seconds: float, ahead: int = 0) -> tuple[float, float]:
    """(images a second after the first batches, milliseconds of cores an image from start to end).

    Closes `batches`, so that processes behind it have ended; `ahead` is the number of batches that they had begun.
    """
    cpu = cpu_seconds()
    for _ in range(WARM):
        next(batches)
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        next(batches)
        count += batch_size
    found = count / (time.perf_counter() - start)
    batches.close()
    return found, 1e3 * (cpu_seconds() - cpu) / (count + (WARM + ahead) * batch_size)


class AugmentedSet:
    """A data set for PyTorch: an image of a source, augmented, and its label; the source so often that no epoch, at
    whose end a DataLoader's workers pause, ends while it is timed."""

    def __init__(self, source, augment):
        self.source, self.augment = source, augment

    def __len__(self) -> int:
        return len(self.source) * 1000

    def __getitem__(self, index: int):
        import torch

        record = self.source[index % len(self.source)]
        image = self.augment(record["image"], seed=0, epoch=0, index=index)
        return torch.from_numpy(image.copy()), int(record["label"])


def of_pytorch(source, augment, batch_size: int, workers: int) -> Iterator:
    import torch

    def batches():
        yield from torch.utils.data.DataLoader(
            AugmentedSet(source, augment), batch_size, shuffle=True, num_workers=workers, drop_last=True
        )

    return batches()


def measure(images: str, records: str, classes: int, batch_size: int, seconds: float, cores: int) -> dict[str, float]:
    """Images/s and milliseconds of cores an image of each side, and by how much ours is ahead, by either."""
    from gspn_jax.config import DataConfig
    from gspn_jax.data import make_loader, make_source
    from gspn_jax.data.augment.host import HostAugmentation

    augment = HostAugmentation(SIZE)
    folder, prepared = (
        DataConfig(source=kind, path=path, image_size=SIZE, channels=3, num_classes=classes)
        for kind, path in (("folder", images), ("records", records))
    )
    whole = {config.source: make_source(config, whole=True) for config in (folder, prepared)}
    found = {"images": len(whole["records"])}
    loader = make_loader(prepared, whole["records"], batch_size=batch_size, seed=0, augment=augment)
    sides = {"records": (loader, cores + 2)}  # batches that its threads have begun
    for kind, source in whole.items():
        sides[f"dataloader_{kind}"] = of_pytorch(source, augment, batch_size, cores), 2 * cores
    for name, (batches, ahead) in sides.items():
        found[f"{name}_images_per_second"], found[f"{name}_cpu_ms_per_image"] = rate(
            batches, batch_size, seconds, ahead
        )
    for unit, sign in (("images_per_second", 1), ("cpu_ms_per_image", -1)):
        for kind in whole:
            found[f"ratio_to_{kind}_by_{unit}"] = (
                found[f"records_{unit}"] / found[f"dataloader_{kind}_{unit}"]
            ) ** sign
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", help="a folder of images, one folder a class")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=6, help="of each side, each time")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--out", type=pathlib.Path, help="a JSON file that the results are added to")
    arguments = parser.parse_args()

    available = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, available[: arguments.cores])  # before any thread is started
    from record import measure_and_append

    from gspn_jax.prepare.records import Records, prepare_records

    with tempfile.TemporaryDirectory() as unused:
        images = arguments.images or f"{unused}/images"
        if not arguments.images:
            make_photographs(pathlib.Path(images), 500)
        prepare_records(Records(images=images, output=f"{unused}/records"))
        classes = sum(entry.is_dir() for entry in os.scandir(images))
        settings = {
            "images": arguments.images and pathlib.Path(arguments.images).name,
            "batch_size": arguments.batch_size,
            "cores_used": min(arguments.cores, len(available)),
        }
        measure_and_append(
            arguments.out or pathlib.Path(unused, "result.json"),
            settings,
            arguments.repeat,
            lambda: measure(
                images, f"{unused}/records", classes, arguments.batch_size, arguments.seconds, arguments.cores
            ),
        )


if __name__ == "__main__":
    main()
