"""Times of kernels from the profiler's trace."""

import jax
import jax.numpy as jnp

from tests.benchmarks import scripts

kernel_times = scripts.load("kernel_times")


def test_a_trace_counts_the_operations_of_a_call_and_keeps_their_time(monkeypatch):
    @jax.jit
    def call(a):
        return jax.lax.fori_loop(0, 3, lambda _, b: jnp.tanh(b @ a), a)

    a = jnp.full((200, 200), 1e-3)
    call(a).block_until_ready()
    rows = kernel_times.kernel_times(lambda: call(a))
    products = [row for row in rows if row["operation"].startswith(("dot", "ynn", "loop_convolution"))]
    assert sum(row["launches"] for row in products) == 3, rows
    assert all(row["ms"] > 0 for row in rows)
    assert [row["ms"] for row in rows] == sorted((row["ms"] for row in rows), reverse=True)

    monkeypatch.setattr(kernel_times, "SHOWN", 2.0)  # nothing takes twice the whole
    assert [row["kernel"] for row in kernel_times.kernel_times(lambda: call(a))] == ["others"]
