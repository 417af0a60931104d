"""What safety costs: step time with saving on against off, and the time from the start to the first step.

python benchmarks/safety.py saving [--hidden 384 --depth 12 --batch-size 8 --save-every 100 --turns 10 --repeat 1]
python benchmarks/safety.py start [--presets GSPN-XL/2 DiT-B/4 ...]           all presets by default

Each call is added to benchmarks/results/saving_DEVICE.json or start_DEVICE.json with all its runs and their median.

`saving` trains the same model in turns of --save-every steps, with a save at the start of a turn or without, and prints
the ratio of their times, also of neighbours in pairs, and of the CPU seconds that the process took, which other work on
the machine changes less; what a save costs shrinks with the distance between saves, and `save_alone` is the time of one
beside which nothing is trained. `start` starts a process per
preset that imports, traces, lowers and compiles initialisation and the step for 256-pixel latents (without running
them: that is the device's time), first with an empty compilation cache, then with the one that is left.
"""

import argparse
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).parents[1]
ALONE = 5
"""Saves beside which nothing is trained."""

START = """
import sys, time
start = time.perf_counter()
from gspn_jax import cli
cli.setup()
import jax, numpy as np
from gspn_jax.config import Config, DataConfig, ModelConfig, TrainConfig
from gspn_jax.parallel import sharding
from gspn_jax.training import state, step
from gspn_jax.training.diffusion import DiffusionTask
config = Config("unused", model=ModelConfig(preset=sys.argv[1]), train=TrainConfig(batch_size=8),
                data=DataConfig(source="latents", path="unused", image_size=32, channels=4, num_classes=1000))
mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
task = DiffusionTask(config)
target = state.abstract_state(task, mesh)
jax.jit(lambda: state.create_state(task, mesh)).lower().compile()
rows = sharding.batch_sharding(mesh)
batch = {"image": jax.ShapeDtypeStruct((8, 32, 32, 4), np.float32, sharding=rows),
         "label": jax.ShapeDtypeStruct((8,), np.int32, sharding=rows)}
step.make_step(task, mesh).lower(target, batch).compile()
print(time.perf_counter() - start)
"""


def measure_start(presets: list[str]) -> dict:
    """Seconds to a compiled first step by preset, cold and warm."""
    rows = {}
    with tempfile.TemporaryDirectory() as cache:
        env = os.environ | {"XDG_CACHE_HOME": cache, "PYTHONPATH": str(ROOT)}
        env.pop("JAX_COMPILATION_CACHE_DIR", None)
        for preset in presets:
            cold, warm = (
                float(
                    subprocess.run(
                        [sys.executable, "-c", START, preset], env=env, check=True, text=True, stdout=subprocess.PIPE
                    ).stdout
                )
                for _ in range(2)
            )
            rows[preset] = {"cold_seconds": cold, "warm_seconds": warm}
            print(f"{preset:12} cold {cold:6.1f} s   warm {warm:6.1f} s", flush=True)
    return {"presets": rows, "slowest_warm_seconds": max(row["warm_seconds"] for row in rows.values())}


def measure_saving(hidden: int, depth: int, batch_size: int, save_every: int, turns: int) -> dict:
    """Seconds a step with a save in each turn and without, in turns; what a save holds up, and what a restore takes."""
    import jax
    import numpy as np

    from gspn_jax.config import Config, DataConfig, ModelConfig, TrainConfig
    from gspn_jax.parallel import sharding
    from gspn_jax.runs.saving import Checkpoints
    from gspn_jax.training.diffusion import DiffusionTask
    from gspn_jax.training.state import abstract_state, create_state
    from gspn_jax.training.step import make_step

    with tempfile.TemporaryDirectory() as run_dir:
        config = Config(
            run_dir,
            model=ModelConfig(preset="GSPN-S/2", hidden=hidden, depth=depth),
            data=DataConfig(),
            train=TrainConfig(batch_size=batch_size),
        )
        mesh = sharding.make_mesh(config.mesh)
        batch = {"image": np.zeros((batch_size, 8, 8, 1), np.uint8), "label": np.zeros(batch_size, np.int32)}
        batch = jax.device_put(batch, sharding.batch_sharding(mesh))
        task = DiffusionTask(config)
        state, step = create_state(task, mesh), make_step(task, mesh)
        state, _ = jax.block_until_ready(step(state, batch))
        bytes_saved = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        seconds, cpu, blocked, number = {True: [], False: []}, {True: [], False: []}, [], 0
        with Checkpoints(config, "f", ["0"] * 10) as saver:
            for turn in range(2 * turns + 2):
                saving = turn % 2 == 0
                saver.wait()  # a turn pays for its own save only
                start, cpu_start = time.perf_counter(), time.process_time()
                if saving:
                    number += 1
                    saver.save(number, state)
                    held_up = time.perf_counter() - start
                for _ in range(save_every):
                    state, _ = jax.block_until_ready(step(state, batch))
                if turn >= 2:  # the first of each kind warms up
                    seconds[saving].append((time.perf_counter() - start) / save_every)
                    cpu[saving].append((time.process_time() - cpu_start) / save_every)
                    blocked += [held_up] if saving else []
            saver.wait()
            start, cpu_start = time.perf_counter(), time.process_time()
            for save in range(1, ALONE + 1):
                saver.save(number + save, state)
                saver.wait()
            alone, cpu_alone = (time.perf_counter() - start) / ALONE, (time.process_time() - cpu_start) / ALONE
            start = time.perf_counter()
            saver.restore(abstract_state(DiffusionTask(config), mesh))
            restore = time.perf_counter() - start
    on, off = (statistics.median(seconds[saving]) for saving in (True, False))
    pairs, cpu_pairs = ([a / b for a, b in zip(taken[True], taken[False], strict=True)] for taken in (seconds, cpu))
    return {
        "ratio": on / off,
        "ratio_of_pairs": statistics.median(pairs),
        "cpu_ratio_of_pairs": statistics.median(cpu_pairs),
        "all_pairs": pairs,
        "all_cpu_pairs": cpu_pairs,
        "checkpoint_mb": bytes_saved / 1e6,
        "step_ms_saving": 1e3 * on,
        "step_ms_not_saving": 1e3 * off,
        "save_blocks_ms": 1e3 * statistics.median(blocked),
        "save_alone_seconds": alone,
        "save_alone_cpu_seconds": cpu_alone,
        "restore_seconds": restore,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("saving", "start"))
    parser.add_argument("--presets", nargs="+")
    parser.add_argument("--hidden", type=int, default=384)
    parser.add_argument("--depth", type=int, default=12)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--save-every", type=int, default=100)
    parser.add_argument("--turns", type=int, default=10, help="of either kind")
    parser.add_argument("--repeat", type=int, default=1, help="runs of this call")
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path(__file__).parent / "results")
    arguments = parser.parse_args()
    import jax
    from record import measure_and_append

    from gspn_jax.models.presets import PRESETS

    path = arguments.output / f"{arguments.what}_{jax.default_backend()}.json"
    if arguments.what == "start":
        presets = arguments.presets or list(PRESETS)
        measure_and_append(path, {"presets": presets}, arguments.repeat, lambda: measure_start(presets))
    else:
        settings = {name: getattr(arguments, name) for name in ("hidden", "depth", "batch_size", "save_every", "turns")}
        measure_and_append(path, settings, arguments.repeat, lambda: measure_saving(**settings))


if __name__ == "__main__":
    main()
