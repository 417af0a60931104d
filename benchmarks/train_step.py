"""Training and sampling cost of any presets and mixers, in one run on whatever devices there are.

python benchmarks/train_step.py                                   small models that a CPU can run
python benchmarks/train_step.py --models DiT-XL/2 GSPN-L/2 GSPN-XL/2 --batch-size 64 --image-size 32 --channels 4 \
    --remat full --out benchmarks/results/train_step_gpu.json

A model is a preset, optionally with overrides: "DiT-S/2:mixer=gspn,hidden=192,depth=4,heads=4". Each is timed on the
same synthetic batch, in a process of its own, so that the peak of its memory is its own; the ratio columns compare
images/s of training and of one network evaluation, which is what sampling costs, with the first model of the list. On a
GPU there is no ratio to a model whose attention is not flash attention, nor of one.
"""

import argparse
import concurrent.futures
import datetime
import json
import multiprocessing
import platform
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from gspn_jax import models
from gspn_jax.config import Config, DataConfig, DiffusionConfig, MeshConfig, ModelConfig, TrainConfig
from gspn_jax.models import attention
from gspn_jax.training import sharding
from gspn_jax.training.state import create_state
from gspn_jax.training.step import make_step
from gspn_jax.training.throughput import peak_flops

CPU_MODELS = ("DiT-S/2:hidden=192,depth=8,heads=3", "DiT-S/2:mixer=gspn,hidden=192,depth=8,heads=3",
              "GSPN-S/2:hidden=192,depth=12")


def parse_model(text: str, remat: str) -> ModelConfig:
    """ "DiT-S/2:mixer=gspn,depth=4" -> ModelConfig. """
    preset, _, overrides = text.partition(":")
    fields = dict(item.split("=") for item in overrides.split(",")) if overrides else {}
    return ModelConfig(preset=preset, drop_path=0.0, remat=remat,
                       **{name: int(value) if value.isdigit() else value for name, value in fields.items()})


def seconds(call, repeats: int) -> float:
    """Median wall time of `call`, which blocks until its result is there; the first call is not counted."""
    call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def attention_of(model: ModelConfig, arguments: argparse.Namespace, dtype: str) -> dict[str, str | None]:
    """The implementation of attention that `model` runs with, if it has any, and why no ratio may be taken to it."""
    arch = models.resolve(model)
    if arch.mixer != "attention":
        return {"attention": None, "no_ratio": None}
    tokens = (arguments.image_size // arch.patch) ** 2
    choice = attention.choose((arguments.batch_size, tokens, arch.heads, arch.hidden // arch.heads), dtype)
    no_ratio = None if choice.fair else f"attention is XLA's: cuDNN's flash attention {choice.reason}"
    return {"attention": choice.implementation, "no_ratio": no_ratio}


def ratio(row: dict, first: dict, name: str) -> float | None:
    """How many times `first`'s value the row's is; None where the attention of either makes that no fair comparison."""
    return None if row["no_ratio"] or first["no_ratio"] else row[name] / first[name]


def measure(model: ModelConfig, arguments: argparse.Namespace) -> dict[str, float | str | None]:
    """Milliseconds, images/s, bytes and MFU of a train step, and milliseconds of one network evaluation."""
    compute = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    config = Config(
        run_dir="unused", model=model, diffusion=DiffusionConfig(objective="flow"), mesh=MeshConfig(),
        data=DataConfig(image_size=arguments.image_size, channels=arguments.channels, num_classes=1000),
        train=TrainConfig(batch_size=arguments.batch_size, precision=f"params=float32,compute={compute}"))
    mesh = sharding.make_mesh(config.mesh)
    rng = np.random.default_rng(0)
    size = (arguments.image_size, arguments.image_size, arguments.channels)
    batch = {"image": rng.integers(0, 256, (arguments.batch_size, *size), np.uint8),
             "label": rng.integers(0, 1000, arguments.batch_size, np.int32)}
    batch = jax.device_put(batch, sharding.batch_sharding(mesh))
    state = create_state(config, mesh)

    start = time.perf_counter()
    step = make_step(config, mesh).lower(state, batch).compile()
    compiled = time.perf_counter() - start
    memory = step.memory_analysis()
    holder = [state]

    def train() -> None:
        holder[0], metrics = step(holder[0], batch)
        jax.block_until_ready(metrics)

    train_seconds = seconds(train, arguments.repeats)
    stats = jax.devices()[0].memory_stats() or {}
    labels = jnp.zeros(arguments.batch_size, jnp.int32)
    graphdef, _ = models.abstract(config)
    forward = jax.jit(lambda params, x, t, y: models.apply(graphdef, params, x, t, y))
    x, t = jnp.zeros((arguments.batch_size, *size)), jnp.zeros(arguments.batch_size)
    forward_seconds = seconds(lambda: jax.block_until_ready(forward(holder[0].params, x, t, labels)), arguments.repeats)

    rate = arguments.batch_size / train_seconds
    flops = models.forward_flops(models.resolve(model), arguments.channels, *size[:2])
    peak = peak_flops(jax.devices()[0].device_kind)
    return {
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        **attention_of(model, arguments, compute),
        "parameters": models.count_parameters(config), "gflops_per_image": flops / 1e9, "compile_seconds": compiled,
        "train_ms": 1e3 * train_seconds, "images_per_second": rate,
        "mfu": 3 * flops * rate / (peak * jax.device_count()) if peak else None,
        "forward_ms": 1e3 * forward_seconds, "forward_images_per_second": arguments.batch_size / forward_seconds,
        "peak_bytes": stats.get("peak_bytes_in_use"),
        "compiled_bytes": memory.temp_size_in_bytes + memory.argument_size_in_bytes if memory else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=CPU_MODELS)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--channels", type=int, default=3)
    parser.add_argument("--remat", default="none", choices=("none", "dots", "full"))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", help="write the results as JSON to this file")
    arguments = parser.parse_args()

    print(f"jax {jax.__version__}, batch {arguments.batch_size}, "
          f"{arguments.image_size}x{arguments.image_size}x{arguments.channels}, remat {arguments.remat}")
    print(f"{'model':46} {'params':>8} {'GFLOP':>7} {'train ms':>9} {'img/s':>8} {'ratio':>6} {'MFU':>6} "
          f"{'forward ms':>10} {'ratio':>6} {'MB':>7} {'compile s':>9}")
    rows = {}
    for text in arguments.models:
        with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            row = process.submit(measure, parse_model(text, arguments.remat), arguments).result()
        rows[text], device = row, row.pop("device")
        first = rows[arguments.models[0]]
        mfu = f"{row['mfu']:.1%}" if row["mfu"] else "n/a"
        train_ratio, forward_ratio = (
            "none" if value is None else f"{value:.2f}"
            for value in (ratio(row, first, name) for name in ("images_per_second", "forward_images_per_second")))
        print(f"{text:46} {row['parameters'] / 1e6:7.1f}M {row['gflops_per_image']:7.2f} {row['train_ms']:9.1f} "
              f"{row['images_per_second']:8.1f} {train_ratio:>6} {mfu:>6} "
              f"{row['forward_ms']:10.1f} {forward_ratio:>6} "
              f"{(row['peak_bytes'] or row['compiled_bytes'] or 0) / 1e6:7.0f} {row['compile_seconds']:9.1f}",
              flush=True)
        if row["no_ratio"]:
            print(f"  no ratio: {row['no_ratio']}")
    print(device)
    if arguments.out:
        about = {"device": device, "jax": jax.__version__, "python": platform.python_version(),
                 "date": datetime.date.today().isoformat()}
        with open(arguments.out, "w") as file:
            json.dump(about | {"arguments": vars(arguments), "results": rows}, file, indent=1)


if __name__ == "__main__":
    main()
