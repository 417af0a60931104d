"""A long run with everything on: does host memory, the number of open files or of threads grow?

python benchmarks/health.py [--steps 2000 --output benchmarks/results]

Trains a small GSPN on the digits, saving every 100 steps, sampling every 200 and evaluating (Inception score by random
weights, which cost what real ones do) every 400, and looks at the process once a second. The first third is warm-up:
compilation, caches and pools fill. Growth is the median of the last third less that of the middle third.
"""

import argparse
import dataclasses
import datetime
import json
import os
import pathlib
import sys
import tempfile
import threading

import numpy as np

from gspn_jax import cli
from gspn_jax.config import EvalConfig, ModelConfig, SamplerConfig, TrainConfig

PAGE = os.sysconf("SC_PAGE_SIZE")


def look() -> dict[str, float]:
    """Of this process: resident memory in MB, open files, threads."""
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    return {"rss_mb": pages * PAGE / 2**20, "files": len(os.listdir("/proc/self/fd")),
            "threads": len(os.listdir("/proc/self/task"))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path(__file__).parent / "results")
    arguments = parser.parse_args()
    cli.setup()
    import jax
    from safetensors.numpy import save_file

    from gspn_jax.metrics import inception
    from gspn_jax.training.loop import train

    with tempfile.TemporaryDirectory() as folder:
        weights = pathlib.Path(folder) / "inception.safetensors"
        save_file(inception.random_state_dict(0), weights)
        run_dir = pathlib.Path(folder) / "run"
        config = dataclasses.replace(
            cli.load_config(pathlib.Path(__file__).parents[1] / "configs" / "digits.py"), run_dir=str(run_dir),
            model=ModelConfig(preset="GSPN-S/2", hidden=32, depth=2), sampler=SamplerConfig(steps=4),
            train=TrainConfig(steps=arguments.steps, batch_size=32, log_every=20, save_every=100, sample_every=200,
                              ema_decays=(0.99,)),
            eval=EvalConfig(every=400, num_samples=8, batch_size=8, metrics=("is",), inception=str(weights)))
        config = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, warmup_steps=0))
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
    middle, last = ([row for row in seen if low <= row["step"] / arguments.steps <= high]
                    for low, high in ((1 / 3, 2 / 3), (2 / 3, 1)))
    growth = {name: float(np.median([row[name] for row in last]) - np.median([row[name] for row in middle]))
              for name in ("rss_mb", "files", "threads")}
    result = {"device": jax.devices()[0].device_kind, "jax": jax.__version__, "python": sys.version.split()[0],
              "date": datetime.date.today().isoformat(), "steps": arguments.steps, "growth": growth,
              "median_of_the_last_third": {name: float(np.median([row[name] for row in last])) for name in growth},
              "peak": {name: max(row[name] for row in seen) for name in growth},
              "seen": seen[::max(1, len(seen) // 50)]}
    path = arguments.output / f"health_{jax.default_backend()}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({name: value for name, value in result.items() if name != "seen"}, indent=1))


if __name__ == "__main__":
    main()
