"""How many latents a second the loader gives, from files in the page cache and without any training.

python benchmarks/latent_loader.py                    a synthetic set of 8,192 records of 32x32x4 in a temporary folder
python benchmarks/latent_loader.py --cores 2 --out result.json

`--cores` restricts the process to that many cores, so that results of different machines compare.
"""

import argparse
import datetime
import json
import os
import pathlib
import platform
import statistics
import tempfile
import time


def measure(folder: str, batch_size: int, batches: int, repeats: int) -> list[dict[str, float]]:
    """Records a second and CPU microseconds a record of each repetition; the first, which fills caches, is left out."""
    from gspn_jax.config import DataConfig
    from gspn_jax.data import make_loader, make_source

    config = DataConfig(source="latents", path=folder, image_size=32, channels=4, num_classes=1000, flip=True)
    rows = []
    with make_loader(config, make_source(config), batch_size=batch_size, seed=0) as loader:
        for _ in range(repeats + 1):
            start, cpu = time.perf_counter(), time.process_time()
            for _ in range(batches):
                next(loader)
            seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
            records = batch_size * batches
            rows.append({"records_per_second": records / seconds, "cpu_us_per_record": 1e6 * cpu / records})
    return rows[1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=8192)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--batches", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--out", help="write the results as JSON to this file")
    arguments = parser.parse_args()

    available = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, available[: arguments.cores])  # before any thread is started
    from gspn_jax.data.latents import write_synthetic

    with tempfile.TemporaryDirectory() as folder:
        write_synthetic(pathlib.Path(folder), records=arguments.records, shards=8)
        rows = measure(folder, arguments.batch_size, arguments.batches, arguments.repeats)
    rates = [row["records_per_second"] for row in rows]
    cpu = [row["cpu_us_per_record"] for row in rows]
    print(
        f"{statistics.median(rates):,.0f} records/s (from {min(rates):,.0f} to {max(rates):,.0f}), "
        f"{statistics.median(cpu):.0f} us of CPU a record, {min(arguments.cores, len(available))} cores, "
        f"load of the machine {os.getloadavg()[0]:.1f}"
    )
    if arguments.out:
        about = {
            "machine": platform.machine(),
            "python": platform.python_version(),
            "load": os.getloadavg(),
            "date": datetime.date.today().isoformat(),
        }
        pathlib.Path(arguments.out).write_text(
            json.dumps(about | {"arguments": vars(arguments), "results": rows}, indent=1)
        )


if __name__ == "__main__":
    main()
