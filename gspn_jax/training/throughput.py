"""Images per second and model FLOP utilisation, with time that is not training kept out."""

import contextlib
import time
from collections.abc import Iterator

PEAK_FLOPS = {
    "A100": 312e12,
    "H100": 989e12,
    "H200": 989e12,
    "GH200": 989e12,
    "B200": 2250e12,
    "GB200": 2250e12,
    "L4": 121e12,
    "L40S": 362e12,
    "A10": 125e12,
    "V100": 125e12,
    "RTX 5090": 209e12,
    "RTX 4090": 165e12,
    "RTX 4080": 97e12,
    "RTX 3090": 71e12,
    "RTX A6000": 155e12,
    "RTX 6000 Ada": 364e12,
}
"""Dense bfloat16 (V100: float16) operations per second, from NVIDIA's data sheets."""


def peak_flops(device_kind: str) -> float | None:
    """The device's dense bfloat16 peak in operations per second; None for one not in the table (such as a CPU)."""
    words = device_kind.replace("-", " ")
    found = [name for name in PEAK_FLOPS if f" {name} " in f" {words} "]
    return PEAK_FLOPS[max(found, key=len)] if found else None


class Throughput:
    """Counts images against the clock; `pause` stops the clock (evaluation, saving, compilation)."""

    def __init__(self, flops_per_image: float, peak: float | None):
        self._flops, self._peak = flops_per_image, peak
        self._images, self._seconds, self._waited = 0, 0.0, 0.0
        self._since = time.perf_counter()

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        self._seconds += time.perf_counter() - self._since
        try:
            yield
        finally:
            self._since = time.perf_counter()

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Time spent waiting for data: part of the step time, reported beside it."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._waited += time.perf_counter() - start

    def add(self, images: int) -> None:
        self._images += images

    def read(self) -> dict[str, float]:
        """images/s, share of time spent waiting for data and (on a known device) MFU since the last call.

        MFU counts the model's own operations, three forward passes a step, not those that remat repeats.
        """
        with self.pause():
            pass
        rate = self._images / max(self._seconds, 1e-9)
        metrics = {"images_per_second": rate, "data_wait": self._waited / max(self._seconds, 1e-9)}
        if self._peak:
            metrics["mfu"] = 3 * self._flops * rate / self._peak
        self._images, self._seconds, self._waited = 0, 0.0, 0.0
        return metrics
