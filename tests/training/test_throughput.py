"""MFU counts the model's operations against the device's peak, and pauses are no training time."""

import time

import pytest

from gspn_jax.training.throughput import Throughput, peak_flops


def test_peaks_of_the_devices_that_jax_names():
    assert peak_flops("NVIDIA H200") == 989e12
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_flops("NVIDIA A100-SXM4-40GB") == 312e12
    assert peak_flops("NVIDIA L40S") == 362e12
    assert peak_flops("cpu") is None


def test_rate_and_mfu_leave_pauses_out():
    meter = Throughput(flops_per_image=1e9, peak=1e12)
    start = time.perf_counter()
    meter.add(100)
    time.sleep(0.05)
    with meter.pause():
        time.sleep(0.2)
    with meter.waiting():
        time.sleep(0.05)
    read = meter.read()
    whole = time.perf_counter() - start
    assert 100 / (whole - 0.2) <= read["images_per_second"] <= 100 / 0.1
    assert read["mfu"] == pytest.approx(3e9 * read["images_per_second"] / 1e12)
    assert 0.05 / (whole - 0.2) <= read["data_wait"] <= 0.55
    assert "mfu" not in Throughput(1e9, None).read()
