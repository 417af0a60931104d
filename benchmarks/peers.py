"""This project beside PyTorch on the same machine: training, sampling, metrics and reading data.

    python benchmarks/peers.py [--cases train_dit fid_moments ...] [--rounds 2] [--out results.json]

Both sides take turns, each in a process of its own, so that threads and peak memory are its own; a process makes one
call that is not timed and then calls for about `--seconds`. The rate of a side is that of its best call; of readers it
is that of the median, for they read ahead. A ratio above 1: this project is faster. The peers are torch-fidelity's own
functions, and where the published program is not a package, modules of the same structure written for this
(`peers_torch.py` says which). Needs PyTorch and torch-fidelity, as `make peers` installs them. Nothing else should run
on the machine: the load before is recorded, and PyTorch's threads, which wait by spinning, suffer more from a busy one.
"""

import argparse
import datetime
import importlib
import importlib.metadata
import json
import os
import pathlib
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

HERE = pathlib.Path(__file__).resolve().parent
SIDES = {"ours": "peers_jax", "torch": "peers_torch"}
PACKAGES = ("jax", "jaxlib", "torch", "torch-fidelity", "numpy")
LEAST_CALLS = 3


class Case(NamedTuple):
    """A function of both side modules, which returns what is timed, and how many `unit` a call of it makes."""

    unit: str
    items: int
    arguments: dict[str, Any]
    files: str | None = None
    """The folder it reads: "images" or "latents"."""


DIT = {"hidden": 384, "depth": 6, "heads": 6, "batch_size": 8}
CASES = {
    "train_dit": Case("images", 8, DIT),
    "sample_dit": Case("evaluations of an image", 8 * 4, {**DIT, "steps": 4}),
    "train_gspn": Case("images", 8, {"hidden": 384, "depth": 6, "batch_size": 8}),
    "fid_moments": Case("rows", 5000, {"rows": 5000, "size": 2048, "batch_size": 64}),
    "fid_distance": Case("distances", 1, {"rows": 2000, "size": 1024}),
    "precision_recall": Case("rows", 4000, {"rows": 4000, "size": 2048}),
    "image_folder": Case("images", 4 * 32, {"size": 256, "batch_size": 32, "batches": 4, "workers": 2}, "images"),
    "latents": Case("records", 16 * 256, {"batch_size": 256, "batches": 16}, "latents"),
}


def run_side(side: str, name: str, seconds: float, folder: str) -> None:
    """Prints the seconds of every call of one side of a case, and the peak memory of this process, as JSON."""
    case = CASES[name]
    arguments = {**case.arguments, **({"folder": folder} if folder else {})}
    call = getattr(importlib.import_module(SIDES[side]), name)(**arguments)
    call()
    times, processor_times = [], []
    while len(times) < LEAST_CALLS or sum(times) < seconds:
        start, processor_start = time.perf_counter(), time.process_time()
        call()
        times.append(time.perf_counter() - start)
        processor_times.append(time.process_time() - processor_start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"seconds": times, "processor_seconds": processor_times, "peak_bytes": [peak]}), flush=True)
    os._exit(0)  # worker processes of either side are not waited for


def compare(name: str, rounds: int, seconds: float, folder: str) -> dict[str, Any]:
    """Both sides in turns, `rounds` times each."""
    found: dict[str, dict[str, list]] = {side: {} for side in SIDES}
    for _ in range(rounds):
        for side in SIDES:
            command = [sys.executable, __file__, "--side", side, "--cases", name, "--seconds", str(seconds)]
            command += ["--folder", folder] if folder else []
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                sys.exit(f"{name}, {side}: exit code {done.returncode}\n{done.stderr[-2000:]}")
            result = json.loads(done.stdout.splitlines()[-1])
            found[side] = {key: found[side].get(key, []) + values for key, values in result.items()}
    case = CASES[name]
    typical = statistics.median if case.files else min
    rates = {side: case.items / typical(of["seconds"]) for side, of in found.items()}
    peaks = {side: max(of["peak_bytes"]) for side, of in found.items()}
    processor = {side: typical(of["processor_seconds"]) for side, of in found.items()}
    # readers work in other processes, whose time this is not
    processor_ratio = None if case.files else processor["torch"] / processor["ours"]
    return {
        "unit": f"{case.unit}/s",
        "arguments": case.arguments,
        "ratio": rates["ours"] / rates["torch"],
        "processor_ratio": processor_ratio,
        "processor_seconds": processor,
        "memory_ratio": peaks["ours"] / peaks["torch"],
        "rate": rates,
        "peak_bytes": peaks,
        "calls": {side: len(of["seconds"]) for side, of in found.items()},
        "rounds": rounds,
        "date": datetime.datetime.now().isoformat(" ", "minutes"),
        "load_before": round(os.getloadavg()[0], 1),
    }


def write_files(kind: str | None, folder: pathlib.Path) -> str:
    """Images of 500x375 in four classes, or latents as both sides store them; returns the folder, "" for none."""
    if kind is None:
        return ""
    rng = np.random.default_rng(0)
    if kind == "images":
        for i in range(256):
            (folder / f"class{i % 4}").mkdir(exist_ok=True)
            coarse = Image.fromarray(rng.integers(0, 256, (24, 32, 3), np.uint8))
            coarse.resize((500, 375), Image.Resampling.BICUBIC).save(folder / f"class{i % 4}" / f"{i}.jpg", quality=90)
        return str(folder)
    from gspn_jax.data.latents import write_synthetic

    write_synthetic(folder / "ours", records=4096, shards=8)
    (folder / "torch").mkdir()
    for i in range(4096):
        np.save(folder / "torch" / f"{i}.npy", rng.standard_normal((4, 32, 32)).astype(np.float16))
    return str(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=[*CASES])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=4.0, help="of calls a process")
    parser.add_argument("--out", type=pathlib.Path, help="a JSON file; cases that are not measured now stay in it")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", default="", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        run_side(arguments.side, *arguments.cases, arguments.seconds, arguments.folder)

    from gspn_jax.files import replacing

    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    record = json.loads(arguments.out.read_text()) if arguments.out and arguments.out.exists() else {"cases": {}}
    print(f"{os.cpu_count()} cores, {', '.join(f'{name} {version}' for name, version in versions.items())}")
    for name in arguments.cases:
        with tempfile.TemporaryDirectory() as folder:
            files = write_files(CASES[name].files, pathlib.Path(folder))
            row = compare(name, arguments.rounds, arguments.seconds, files)
        print(
            f"{name:17s} {row['rate']['ours']:10.4g} {row['unit']}, PyTorch {row['rate']['torch']:10.4g}: "
            f"{row['ratio']:6.2f}x, processor time "
            f"{row['processor_ratio'] or float('nan'):5.2f}x, memory {row['memory_ratio']:5.2f}x",
            flush=True,
        )
        record |= {"device": processor(), "cores": os.cpu_count(), "python": platform.python_version()}
        record["cases"][name] = {**row, "versions": versions}
        if arguments.out:
            with replacing(arguments.out) as temporary:
                temporary.write_text(json.dumps(record, indent=1) + "\n")


def processor() -> str:
    """The name of the processor, as Linux tells it."""
    info = pathlib.Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    if "ours" in sys.argv:
        from gspn_jax.cli import huge_pages

        huge_pages.restart_with_them()  # as the project's commands do
    main()
