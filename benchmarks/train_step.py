"""Training and sampling cost of any presets and mixers, in one run on whatever devices there are.

python benchmarks/train_step.py                                   small models that a CPU can run
python benchmarks/train_step.py --models configs/gspn_xl_2.py configs/dit_xl_2.py --batch-size 64 --image-size 32 \
    --channels 4 --measure training sampling --out benchmarks/results/train_step_gpu.json

A model is a preset, optionally with overrides, "DiT-S/2:mixer=gspn,hidden=192,depth=4,heads=4", or a config file,
whose model it then is. Each is timed on the same synthetic batch, in a process of its own, so that the peak of its
memory is its own and its end not that of the others; results are written as they come. `--measure` says what:
"training" a step, "forward" one network evaluation compiled by itself, "sampling" one within a sampler, which casts
weights once. The ratio columns compare images/s with the first model of the list that has an answer by then. On a GPU
there is no ratio to a model whose attention is not flash attention, nor of one.
"""

import argparse
import contextlib
import dataclasses
import datetime
import fcntl
import json
import multiprocessing
import os
import pathlib
import platform
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from kernel_times import kernel_times

from gspn_jax import cli, models
from gspn_jax.config import (
    Config,
    DataConfig,
    DiffusionConfig,
    MeshConfig,
    ModelConfig,
    Remat,
    SamplerConfig,
    TrainConfig,
)
from gspn_jax.files import replacing
from gspn_jax.kernels import available_backends
from gspn_jax.models import attention
from gspn_jax.parallel import sharding
from gspn_jax.sampling.sampler import Sampler
from gspn_jax.training.diffusion import DiffusionTask
from gspn_jax.training.state import abstract_state, create_state
from gspn_jax.training.step import make_step
from gspn_jax.training.throughput import peak_flops

CPU_MODELS = (
    "DiT-S/2:hidden=192,depth=8,heads=3",
    "DiT-S/2:mixer=gspn,hidden=192,depth=8,heads=3",
    "GSPN-S/2:hidden=192,depth=12",
)


KINDS = ("training", "forward", "sampling")
CLASSES = 1000


def parse_model(text: str, remat: str | None) -> ModelConfig:
    """ "DiT-S/2:mixer=gspn,depth=4" or "configs/NAME.py" -> ModelConfig; `remat` None is "none", or the file's own."""
    if text.endswith(".py"):
        model = cli.load_config(text).model
        return model if remat is None else dataclasses.replace(model, remat=remat)
    preset, _, overrides = text.partition(":")
    fields = dict(item.split("=") for item in overrides.split(",")) if overrides else {}
    return ModelConfig(
        preset=preset,
        drop_path=0.0,
        remat=remat or "none",
        **{name: int(value) if value.isdigit() else value for name, value in fields.items()},
    )


class Timing(NamedTuple):
    """How a model is timed: `lock` names the file that gives the device to one process at a time."""

    repeats: int
    lock: str
    trace: bool


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
    choice = attention.choose(
        (arguments.batch_size, tokens, arch.options.heads, arch.hidden // arch.options.heads), dtype
    )
    no_ratio = None if choice.fair else f"attention is XLA's: cuDNN's flash attention {choice.reason}"
    return {"attention": choice.implementation, "no_ratio": no_ratio}


def ratio(row: dict, first: dict, name: str) -> float | None:
    """How many times `first`'s value the row's is; None where the attention of either makes that no fair comparison."""
    return None if row["no_ratio"] or first["no_ratio"] else row[name] / first[name]


def make_config(model: ModelConfig, arguments: argparse.Namespace) -> Config:
    compute = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return Config(
        run_dir="unused",
        model=model,
        diffusion=DiffusionConfig(objective="flow"),
        mesh=MeshConfig(),
        sampler=SamplerConfig(name="euler", steps=arguments.sampler_steps),
        data=DataConfig(image_size=arguments.image_size, channels=arguments.channels, num_classes=CLASSES),
        train=TrainConfig(batch_size=arguments.batch_size, precision=f"params=float32,compute={compute}"),
    )


@contextlib.contextmanager
def device_to_itself(lock: str) -> Iterator[None]:
    """Waits until no other process that names the same file is inside; one that is killed is not."""
    with open(lock, "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def measure_training(config: Config, mesh: jax.sharding.Mesh, timing: Timing) -> dict[str, Any]:
    """Milliseconds, images/s, bytes and MFU of a train step. What needs the host alone is done before the device is
    asked for."""
    size, count = (config.data.image_size, config.data.image_size, config.data.channels), config.train.batch_size
    rng = np.random.default_rng(0)
    batch = {
        "image": rng.integers(0, 256, (count, *size), np.uint8),
        "label": rng.integers(0, CLASSES, count, np.int32),
    }
    start = time.perf_counter()
    task = DiffusionTask(config)
    lowered = make_step(task, mesh).lower(abstract_state(task, mesh), batch)
    lowered_seconds = time.perf_counter() - start
    with device_to_itself(timing.lock):
        start = time.perf_counter()
        step = lowered.compile()
        compiled = time.perf_counter() - start
        memory = step.memory_analysis()
        batch, holder = jax.device_put(batch, sharding.batch_sharding(mesh)), [create_state(task, mesh)]

        def train() -> None:
            holder[0], metrics = step(holder[0], batch)
            jax.block_until_ready(metrics)

        train_seconds = seconds(train, timing.repeats)
        print(f"{config.model.preset}: {1e3 * train_seconds:.1f} ms a step", flush=True)  # if the trace ends in a crash
        traced = {"train_kernels": kernel_times(train)} if timing.trace else {}
    rate = count / train_seconds
    flops = models.forward_flops(models.resolve(config.model), size[2], *size[:2])
    peak = peak_flops(jax.devices()[0].device_kind)
    return {
        "lower_seconds": lowered_seconds,
        "compile_seconds": compiled,
        "train_ms": 1e3 * train_seconds,
        "images_per_second": rate,
        "mfu": 3 * flops * rate / (peak * jax.device_count()) if peak else None,
        "peak_bytes": (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use"),
        "compiled_bytes": memory.temp_size_in_bytes + memory.argument_size_in_bytes if memory else None,
    } | traced


def measure_forward(config: Config, mesh: jax.sharding.Mesh, timing: Timing) -> dict[str, float]:
    """Milliseconds and images/s of one network evaluation."""
    size, count = (config.data.image_size, config.data.image_size, config.data.channels), config.train.batch_size
    graphdef, _ = models.abstract(config)
    forward = jax.jit(lambda params, x, t, y: models.apply(graphdef, params, x, t, y))
    x, t, labels = jnp.zeros((count, *size)), jnp.zeros(count), jnp.zeros(count, jnp.int32)
    with device_to_itself(timing.lock):
        params = create_state(DiffusionTask(config), mesh).params
        elapsed = seconds(lambda: jax.block_until_ready(forward(params, x, t, labels)), timing.repeats)
    return {"forward_ms": 1e3 * elapsed, "forward_images_per_second": count / elapsed}


def measure_sampling(config: Config, mesh: jax.sharding.Mesh, timing: Timing) -> dict[str, float]:
    """Milliseconds an evaluation and images/s of Euler's sampler without guidance, and its compilation."""
    count = config.train.batch_size
    sampler = Sampler(config, mesh)
    lowered = sampler.lower(count)
    with device_to_itself(timing.lock):
        start = time.perf_counter()
        draw = lowered.compile()
        compiled = time.perf_counter() - start
        labels, numbers = jax.device_put(
            (np.arange(count, dtype=np.int32) % CLASSES, np.arange(count, dtype=np.uint32)),
            sharding.batch_sharding(mesh),
        )
        seed = jax.device_put(np.zeros(2, np.uint32), sharding.replicated(mesh))
        params = create_state(DiffusionTask(config), mesh).params
        elapsed = seconds(lambda: jax.block_until_ready(draw(params, labels, numbers, seed)), timing.repeats)
        print(f"{config.model.preset}: {1e3 * elapsed / sampler.evaluations:.2f} ms an evaluation", flush=True)
        traced = {"sampler_kernels": kernel_times(lambda: draw(params, labels, numbers, seed))} if timing.trace else {}
    return traced | {
        "sampler_compile_seconds": compiled,
        "sampler_evaluations": sampler.evaluations,
        "evaluation_ms": 1e3 * elapsed / sampler.evaluations,
        "sampled_images_per_second": count / elapsed,
    }


MEASURES = dict(zip(KINDS, (measure_training, measure_forward, measure_sampling), strict=True))


def measure(text: str, arguments: argparse.Namespace, lock: str) -> dict[str, Any]:
    """All that is asked for of one model."""
    model = parse_model(text, arguments.remat)
    config = make_config(model, arguments)
    mesh = sharding.make_mesh(config.mesh)
    flops = models.forward_flops(models.resolve(model), arguments.channels, *(arguments.image_size,) * 2)
    row = {
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "remat": model.remat,
        "scans": model.backend or available_backends()[0],
        **attention_of(model, arguments, config.train.precision.split("=")[-1]),
        "parameters": models.count_parameters(config),
        "gflops_per_image": flops / 1e9,
    }
    for kind in arguments.measure:
        row |= MEASURES[kind](config, mesh, Timing(arguments.repeats, lock, arguments.trace))
    return row


def measure_apart(text: str, arguments: argparse.Namespace, lock: str, answer: Connection) -> None:
    """What a process runs."""
    try:
        cli.setup()  # what runs, attention and scans, is said in log lines
        answer.send(measure(text, arguments, lock))
    except Exception as error:  # of any kind: the other models are worth having
        traceback.print_exc()
        answer.send({"error": f"{type(error).__name__}: {str(error)[:300]}"})


class Running(NamedTuple):
    """A process that measures a model, what its answer comes through, and when it is too late for it."""

    model: str
    process: multiprocessing.Process
    answer: Connection
    end: float | None

    def left(self) -> float | None:
        return None if self.end is None else max(0.0, self.end - time.monotonic())

    def receive(self) -> dict[str, Any]:
        """Receives what the process has sent; it is gone afterwards."""
        try:
            return self.answer.recv() if self.answer.poll() else {"error": "out of time"}
        except EOFError:
            self.process.join()
            return {"error": f"ended with code {self.process.exitcode}"}
        finally:
            self.process.kill()
            self.process.join()


def start(model: str, arguments: argparse.Namespace, lock: str) -> Running:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=measure_apart, args=(model, arguments, lock, theirs), daemon=True)
    process.start()
    theirs.close()
    return Running(model, process, ours, None if arguments.limit is None else time.monotonic() + arguments.limit)


def measured(arguments: argparse.Namespace) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each model and what was found, as it comes; {"error": ...} if its process failed or took longer than `--limit`.

    With `--together` all processes are started at once; each has the device to itself when it needs it.
    """
    models = list(dict.fromkeys(arguments.models))
    groups = [models] if arguments.together else [[model] for model in models]
    with tempfile.NamedTemporaryFile() as lock:
        for group in groups:
            running = [start(model, arguments, lock.name) for model in group]
            while running:
                ready = wait([one.answer for one in running], running[0].left())
                ended = [one for one in running if one.answer in ready or one.left() == 0]
                for one in ended:
                    running.remove(one)
                    yield one.model, one.receive()


COLUMNS = {
    "train_ms": ("train ms", "9.1f"),
    "images_per_second": ("img/s", "8.1f"),
    "mfu": ("MFU", "6.1%"),
    "forward_ms": ("forward ms", "10.1f"),
    "forward_images_per_second": ("img/s", "8.1f"),
    "evaluation_ms": ("evaluation ms", "13.2f"),
    "sampled_images_per_second": ("img/s", "8.1f"),
    "lower_seconds": ("lower s", "7.1f"),
    "compile_seconds": ("compile s", "9.1f"),
}
"""What is printed of a row, and how."""


def table_line(text: str, row: dict, first: dict) -> str:
    """The columns that the row has, rates with their ratio to the first model's; no ratio to an unfair attention."""
    parts = [f"{text:46} {row['parameters'] / 1e6:7.1f}M {row['gflops_per_image']:8.2f} GFLOP"]
    for name, (title, form) in COLUMNS.items():
        if row.get(name) is None:
            continue
        shown = f"{title} {row[name]:{form}}"
        if name.endswith("images_per_second") and name in first:
            compared = ratio(row, first, name)
            shown += f" ({'no ratio' if compared is None else f'{compared:.2f}x'})"
        parts.append(shown)
    return ", ".join(parts) + f", {(row.get('peak_bytes') or row.get('compiled_bytes') or 0) / 1e6:.0f} MB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=CPU_MODELS)
    parser.add_argument("--measure", nargs="+", default=["training", "forward"], choices=KINDS)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--channels", type=int, default=3)
    parser.add_argument("--remat", choices=get_args(Remat), help="none by default, or what a config file says")
    parser.add_argument("--sampler-steps", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--limit", type=float, help="seconds for each model from its start; it is stopped then")
    parser.add_argument(
        "--together",
        action="store_true",
        help="start all at once: what the host does for one hides "
        "behind the others, and each has the device to itself while it is compiled and timed",
    )
    parser.add_argument(
        "--trace",
        action="store_true",
        help="run once more under the profiler: times of each kernel, "
        "of a step and of a call of the sampler, is among the results",
    )
    parser.add_argument("--out", type=pathlib.Path, help="a JSON file for the results, written after each model")
    arguments = parser.parse_args()

    print(
        f"jax {jax.__version__}, batch {arguments.batch_size}, "
        f"{arguments.image_size}x{arguments.image_size}x{arguments.channels}"
    )
    about = {
        "jax": jax.__version__,
        "python": platform.python_version(),
        "date": datetime.date.today().isoformat(),
        "arguments": {
            name: str(value) if isinstance(value, pathlib.Path) else value for name, value in vars(arguments).items()
        },
    }
    rows: dict[str, dict] = {}
    if arguments.together:  # before JAX looks for devices: a process takes the memory that it needs
        os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    for text, row in measured(arguments):
        rows[text] = row
        about["device"] = row.pop("device", about.get("device"))
        rows = {name: rows[name] for name in arguments.models if name in rows}  # in the order of the list
        first = next((found for found in rows.values() if "error" not in found), row)
        print(f"{text:46} {row['error']}" if "error" in row else table_line(text, row, first), flush=True)
        if row.get("no_ratio"):
            print(f"  no ratio: {row['no_ratio']}")
        if arguments.out:
            with replacing(arguments.out) as temporary:
                temporary.write_text(json.dumps(about | {"results": rows}, indent=1) + "\n")
    print(about["device"])
    sys.exit(any("error" in row for row in rows.values()))


if __name__ == "__main__":
    main()
