"""What a call costs on the device, kernel by kernel, from a trace of the profiler."""

import collections
import pathlib
import tempfile
from collections.abc import Callable, Iterator

import jax
from jax.profiler import ProfileData


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
    """Runs `call` under the profiler: milliseconds and launches of each kernel and operation, the slowest first."""
    found = collections.defaultdict(lambda: [0.0, 0])
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(call())
        for path in pathlib.Path(folder).rglob("*.xplane.pb"):
            for kernel, operation, nanoseconds in kernel_events(ProfileData.from_file(str(path))):
                entry = found[kernel, operation]
                entry[0] += nanoseconds / 1e6
                entry[1] += 1
    return [{"kernel": kernel, "operation": operation, "ms": ms, "launches": launches}
            for (kernel, operation), (ms, launches) in sorted(found.items(), key=lambda item: -item[1][0])]
