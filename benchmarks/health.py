"""A long run with everything on: does host memory, the number of open files or of threads grow?

python benchmarks/health.py [--steps 2000 --repeat 1]

Trains a small GSPN on the digits, saving every 100 steps, sampling every 200 and evaluating (Inception score by random
weights, which cost what real ones do) every 400, and looks at the process once a second. The first third is warm-up:
compilation, caches and pools fill. Growth is the median of the last third less that of the middle third. Each call is
added to benchmarks/results/health_DEVICE.json with all its runs and their median.

Resident memory holds what malloc keeps after it was freed, much of it from compilation, which glibc hands back when it
sees fit: in a run of 6,000 steps 0.5 GB went at once near step 5,300, and in one of 460 malloc_trim took it from 1,427
to 963 MB, a garbage collection after it nothing. So `heap_mb`, what malloc has given out and not got back, is what
tells a leak; `rss_mb_trimmed` is resident memory at the end, after malloc_trim.
"""

import argparse
import ctypes
import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import threading

import numpy as np

from gspn_jax import cli
from gspn_jax.config import EvalConfig, ModelConfig, SamplerConfig, TrainConfig

PAGE = os.sysconf("SC_PAGE_SIZE")


class Mallinfo2(ctypes.Structure):
    """glibc's, of all arenas."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in (
            "arena",
            "ordblks",
            "smblks",
            "hblks",
            "hblkhd",
            "usmblks",
            "fsmblks",
            "uordblks",
            "fordblks",
            "keepcost",
        )
    )


LIBC = ctypes.CDLL(None)
LIBC.mallinfo2.restype = Mallinfo2


def look() -> dict[str, float]:
    """Of this process: resident memory and what malloc has given out, in MB; open files; threads."""
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    info = LIBC.mallinfo2()
    return {
        "rss_mb": pages * PAGE / 2**20,
        "heap_mb": (info.uordblks + info.hblkhd) / 2**20,
        "files": len(os.listdir("/proc/self/fd")),
        "threads": len(os.listdir("/proc/self/task")),
    }


def run(steps: int) -> dict:
    """One run in this process, whose memory nothing else has filled."""
    cli.setup()
    from safetensors.numpy import save_file

    from gspn_jax.metrics import inception
    from gspn_jax.training.train import train

    with tempfile.TemporaryDirectory() as folder:
        weights = pathlib.Path(folder) / "inception.safetensors"
        save_file(inception.random_state_dict(0), weights)
        run_dir = pathlib.Path(folder) / "run"
        base = cli.load_config(pathlib.Path(__file__).parents[1] / "configs" / "digits.py")
        config = dataclasses.replace(
            base,
            run_dir=str(run_dir),
            optimizer=dataclasses.replace(base.optimizer, warmup_steps=0),
            model=ModelConfig(preset="GSPN-S/2", hidden=32, depth=2),
            sampler=SamplerConfig(steps=4),
            train=TrainConfig(
                steps=steps, batch_size=32, log_every=20, save_every=100, sample_every=200, ema_decays=(0.99,)
            ),
            eval=EvalConfig(every=400, num_samples=8, batch_size=8, metrics=("is",), inception=str(weights)),
        )
        seen, done = [], threading.Event()

        def watch() -> None:
            while not done.wait(1):
                log = run_dir / "metrics.jsonl"
                lines = log.read_text().split("\n")[:-1] if log.exists() else []  # the last line may be half there
                seen.append({"step": json.loads(lines[-1])["step"] if lines else 0} | look())

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            train(config)
        finally:
            done.set()
            watcher.join()
    LIBC.malloc_trim(0)
    middle, last = (
        [row for row in seen if low <= row["step"] / steps <= high] for low, high in ((1 / 3, 2 / 3), (2 / 3, 1))
    )
    names = [name for name in seen[0] if name != "step"]
    middle, last = ({name: float(np.median([row[name] for row in part])) for name in names} for part in (middle, last))
    return (
        {f"growth_{name}": last[name] - middle[name] for name in names}
        | {f"last_third_{name}": last[name] for name in names}
        | {f"peak_{name}": max(row[name] for row in seen) for name in names}
        | {"rss_mb_trimmed": look()["rss_mb"], "seen": seen[:: max(1, len(seen) // 50)]}
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path(__file__).parent / "results")
    parser.add_argument("--run-to", type=pathlib.Path, help=argparse.SUPPRESS)  # one run, into this file
    arguments = parser.parse_args()
    if arguments.run_to:
        arguments.run_to.write_text(json.dumps(run(arguments.steps)))
        return

    def measure() -> dict:
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder) / "run.json"
            subprocess.run([sys.executable, __file__, "--steps", str(arguments.steps), "--run-to", path], check=True)
            return json.loads(path.read_text())

    import jax
    from record import measure_and_append

    path = arguments.output / f"health_{jax.default_backend()}.json"
    measure_and_append(path, {"steps": arguments.steps}, arguments.repeat, measure)


if __name__ == "__main__":
    main()
