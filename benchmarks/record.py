"""The results file of a benchmark: every call is kept, with all of its runs, their median and the machine's load."""

import datetime
import json
import os
import pathlib
import statistics
import sys
from collections.abc import Callable
from typing import Any

from gspn_jax.files import replacing


def measure_and_append(
    path: pathlib.Path, settings: dict[str, Any], repeat: int, measure: Callable[[], dict[str, Any]]
) -> dict[str, Any]:
    """Adds a call of `repeat` runs to {"calls": [...]} in `path`, and returns it; a run is what `measure` returns.

    The median is over the runs of this call, of each number that a run has. The load is that of the minute before the
    first run: on a machine that does nothing else it is below 1.
    """
    import jax

    calls = json.loads(path.read_text())["calls"] if path.exists() else []
    about = {
        "date": datetime.datetime.now().isoformat(" ", "minutes"),
        "load_before": round(os.getloadavg()[0], 1),
        "cores": os.cpu_count(),
        "python": sys.version.split()[0],
        "jax": jax.__version__,
        "settings": settings,
    }
    runs = [measure() for _ in range(repeat)]
    numbers = [name for name, value in runs[0].items() if isinstance(value, (int, float))]
    call = about | {
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "median": {name: statistics.median(run[name] for run in runs) for name in numbers},
        "runs": runs,
    }
    with replacing(path) as temporary:
        temporary.write_text(json.dumps({"calls": [*calls, call]}, indent=1) + "\n")
    shown = {name: value for name, value in call.items() if name != "runs"}
    shown["runs"] = [{name: run[name] for name in numbers} for run in runs]
    print(json.dumps(shown, indent=1))
    return call
