"""Images a second of a classifier on made-up images: a training step, and inference."""

import dataclasses
import json
import time
from typing import Any, Literal

import jax
import numpy as np

from gspn_jax.classify.config import AugmentConfig, ClassifierConfig, ClassifyConfig, Mixer, Preset
from gspn_jax.classify.network import forward
from gspn_jax.classify.task import ClassificationTask
from gspn_jax.config import ConfigError, DataConfig, MeshConfig, Precision, TrainConfig, check_numbers
from gspn_jax.parallel import sharding
from gspn_jax.parallel.memory import check_fits
from gspn_jax.training.state import create_state
from gspn_jax.training.step import make_step

PRECISIONS: dict[str, Precision] = {
    "bfloat16": "params=float32,compute=bfloat16",
    "float32": "params=float32,compute=float32",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Throughput:
    """Time a preset: a whole training step (erasing, mixing, gradient, AdamW, average), and the forward pass alone."""

    preset: Preset = "GSPN-T"
    mixer: Mixer = "gspn"
    image_size: int = 224
    batch_size: int = 128
    """Images over all devices."""
    num_classes: int = 1000
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    remat: Literal["none", "dots", "names", "full"] = "none"
    seconds: float = 5.0
    """Seconds of each measurement, after compilation and two calls."""
    only: Literal["training", "inference"] | None = None
    mesh: MeshConfig = MeshConfig()

    def __post_init__(self) -> None:
        check_numbers(self)
        for name in ("image_size", "batch_size", "num_classes", "seconds"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"--{name.replace('_', '-')} must be greater than 0, found {getattr(self, name)}")


def throughput(arguments: Throughput) -> dict[str, Any]:
    """Prints and returns images/s of training and of inference, with what was timed."""
    config = ClassifyConfig(
        run_dir=".",
        model=ClassifierConfig(preset=arguments.preset, mixer=arguments.mixer, remat=arguments.remat),
        data=DataConfig(
            source="folder", path="unused", image_size=arguments.image_size, channels=3,
            num_classes=arguments.num_classes,
        ),
        augment=AugmentConfig(),
        train=TrainConfig(
            batch_size=arguments.batch_size, precision=PRECISIONS[arguments.dtype]
        ),
        mesh=arguments.mesh,
    )  # fmt: skip
    task, mesh = ClassificationTask(config), sharding.make_mesh(config.mesh)
    sharding.check_batch(config, mesh)
    split = sharding.batch_sharding(mesh)
    rows = arguments.batch_size // jax.process_count()
    bytes_an_image = 3 * arguments.image_size**2 * (1 + 4)  # 8 bits, and what a step makes of them
    check_fits(
        arguments.batch_size * bytes_an_image // mesh.size,
        mesh,
        f"a batch of {arguments.batch_size:,} images",
        "choose a smaller --batch-size or --image-size",
    )
    random = np.random.default_rng(jax.process_index())
    batch = {
        "image": random.integers(256, size=(rows, *2 * (arguments.image_size,), 3), dtype=np.uint8),
        "label": random.integers(arguments.num_classes, size=rows, dtype=np.int32),
    }
    batch = {name: jax.make_array_from_process_local_data(split, array) for name, array in batch.items()}
    state = create_state(task, mesh)
    found: dict[str, Any] = {}
    if arguments.only != "training":
        found |= _inference(config, task, mesh, state.params, batch["image"], arguments.seconds)
    if arguments.only != "inference":
        found |= _training(task, mesh, state, batch, arguments.seconds)
    device = jax.devices()[0]
    result = {
        "preset": arguments.preset,
        "mixer": arguments.mixer,
        "image_size": arguments.image_size,
        "batch_size": arguments.batch_size,
        "dtype": arguments.dtype,
        "remat": arguments.remat,
        "parameters": task.network.parameters,
        "gmac": task.network.multiply_adds(arguments.image_size) / 1e9,
        "devices": f"{jax.device_count()} x {device.device_kind}",
        "jax": jax.__version__,
    } | found
    if jax.process_index() == 0:
        print(json.dumps(result, indent=1))
    return result


def _inference(
    config: ClassifyConfig, task: ClassificationTask, mesh, params: Any, images: jax.Array, seconds: float
) -> dict[str, float]:
    logits = forward(config, task.network, mesh)
    classes = jax.jit(lambda params, images: logits(params, images).argmax(-1))

    def call() -> jax.Array:
        return classes(params, images)

    return _timed("inference", call, len(images), seconds)


def _training(task: ClassificationTask, mesh, state: Any, batch: dict, seconds: float) -> dict[str, float]:
    step, held = make_step(task, mesh), [state]

    def call() -> jax.Array:
        held[0], metrics = step(held[0], batch)
        return metrics["loss"]

    return _timed("training", call, len(batch["label"]), seconds)


def _timed(name: str, call, images: int, seconds: float) -> dict[str, float]:
    """Calls follow one another without waiting; the last one is waited for."""
    start = time.perf_counter()
    jax.block_until_ready(call())
    compiled = time.perf_counter() - start
    last = jax.block_until_ready(call())
    start, calls = time.perf_counter(), 0
    while calls == 0 or time.perf_counter() - start < seconds:
        last = call()
        calls += 1
        if calls % 4 == 0:
            jax.block_until_ready(last)
    jax.block_until_ready(last)
    rate = calls * images / (time.perf_counter() - start)
    return {f"{name}_images_per_second": rate, f"{name}_first_call_seconds": compiled}
