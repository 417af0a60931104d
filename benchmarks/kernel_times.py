"""What a call costs on the device, kernel by kernel, from a trace of the profiler."""

import collections
import pathlib
import re
import tempfile
from collections.abc import Callable, Iterator

import jax
from jax.profiler import ProfileData

SHOWN = 1e-3
"""Of all the time; kernels below it are summed up."""

KINDS = {
    "scans": "line_scan|local_scan",
    "convolutions": "conv|wgrad|depthwise",
    "attention": "sdpa|fmha|flash|attention",
    "products": "nvjet|gemm|cutlass|cublas|xmma",
    "copies": "(?i:memcpy|memset)",
}
"""Kinds of work, and what their kernels' names hold; the first that fits. The rest is elementwise work and sums, and
what is not shown."""


def kernel_events(data: ProfileData) -> Iterator[tuple[str, str, float]]:
    """Kernel, the operation of XLA that it belongs to ("" if the trace does not say), and nanoseconds. A GPU's trace
    has a line a stream; a CPU's has the operations themselves, in lines of threads."""
    planes = list(data.planes)
    devices = [plane for plane in planes if plane.name.startswith("/device:GPU")]
    for plane in devices or planes:
        for line in plane.lines:
            if devices and not line.name.startswith("Stream"):
                continue
            for event in line.events:
                stats = dict(event.stats)
                if devices or "hlo_op" in stats:
                    yield event.name, str(stats.get("hlo_op", "")), event.duration_ns


def kernel_times(call: Callable[[], object]) -> list[dict]:
    """Runs `call` under the profiler: milliseconds and launches of each kernel and operation, the slowest first; what
    takes less than `SHOWN` of the whole is one row, "others"."""
    found = collections.defaultdict(lambda: [0.0, 0])
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(call())
        for path in pathlib.Path(folder).rglob("*.xplane.pb"):
            for kernel, operation, nanoseconds in kernel_events(ProfileData.from_file(str(path))):
                entry = found[kernel, operation]
                entry[0] += nanoseconds / 1e6
                entry[1] += 1
    shown, total = collections.defaultdict(lambda: [0.0, 0]), sum(ms for ms, _ in found.values())
    for key, (ms, launches) in found.items():
        entry = shown[key if ms >= SHOWN * total else ("others", "")]
        entry[0] += ms
        entry[1] += launches
    return [
        {"kernel": kernel, "operation": operation, "ms": ms, "launches": launches}
        for (kernel, operation), (ms, launches) in sorted(shown.items(), key=lambda item: -item[1][0])
    ]


def by_kind(rows: list[dict]) -> dict[str, float]:
    """Milliseconds of each kind of work among what `kernel_times` found, the most first."""
    found = collections.Counter()
    for row in rows:
        names = re.sub("convert", "", row["kernel"])
        found[next((kind for kind, pattern in KINDS.items() if re.search(pattern, names)), "the rest")] += row["ms"]
    return dict(found.most_common())
