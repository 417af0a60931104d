"""Attention: values against float64, and which implementation runs where."""

import dataclasses
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from gspn_jax.kernels import compat, sharded
from gspn_jax.models import attention

TOLERANCE = {"float32": 2e-6, "bfloat16": 2e-2, "float16": 2e-3}
"""Relative to the largest value; about twice the rounding of an input, 2**-24, 2**-9 or 2**-12, times a few."""
DIT_XL = (8, 256, 16, 72)


@dataclasses.dataclass(frozen=True)
class Device:
    """What the choice asks of a jax.Device."""

    device_kind: str
    compute_capability: str
    platform: str = "gpu"


H100 = Device("NVIDIA H100", "9.0")


@pytest.fixture
def cudnn():
    """JAX finds a cuDNN, as on a machine that has one."""
    with compat.cudnn_found(91000):
        yield
    attention._why_not_cudnn.cache_clear()


def in_float64(q, k, v):
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    scores = np.einsum("bthd,bshd->bhts", q, k) / np.sqrt(q.shape[-1])
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("bhts,bshd->bthd", weights / weights.sum(-1, keepdims=True), v)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_values_agree_with_float64_to_the_rounding_of_the_type(dtype):
    q, k, v = (3 * jax.random.normal(jax.random.key(n), (2, 17, 3, 8), dtype) for n in range(3))
    found, truth = np.asarray(attention.attention(q, k, v), np.float64), in_float64(q, k, v)
    assert np.abs(found - truth).max() / np.abs(truth).max() < TOLERANCE[dtype]


def test_a_cpu_runs_xlas_and_a_log_line_says_so_once(caplog):
    attention._log.cache_clear()
    q = jnp.ones((1, 4, 1, 8))
    with caplog.at_level(logging.INFO, "gspn_jax"):
        attention.attention(q, q, q)
        attention.attention(q, q, q)
    assert [record.message for record in caplog.records] == [
        "Attention runs on the 'xla' implementation: cuDNN's flash attention needs an NVIDIA GPU of compute capability "
        "8.0 or newer, found cpu."
    ]
    assert attention.choose(q.shape, q.dtype).fair  # beside nothing better on a CPU


@pytest.mark.parametrize("shape", [DIT_XL, (2, 1024, 6, 64), (1, 66, 1, 128)])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_an_nvidia_gpu_runs_flash_attention(cudnn, shape, dtype):
    with attention.traced_for(H100):
        assert attention.choose(shape, dtype) == ("cudnn", "")
        assert attention.choose(shape, dtype).fair


@pytest.mark.parametrize(("device", "shape", "dtype", "reason"), [
    (H100, DIT_XL, "float32", "takes bfloat16 or float16, found float32"),
    (H100, (8, 256, 16, 100), "bfloat16", "cannot run here: The head dim must be <= 128 and a multiple of 8"),
    (H100, (8, 256, 16, 512), "bfloat16", "cannot run here: The head dim must be"),
    (H100, (8, 65, 16, 72), "bfloat16", "cannot run here: Unsupported sequence length Q 65, KV 65"),
    (Device("Tesla T4", "7.5"), DIT_XL, "float16", "of compute capability 8.0 or newer, found Tesla T4"),
    (Device("AMD Instinct MI300X", "gfx942"), DIT_XL, "bfloat16", "needs an NVIDIA GPU"),
])  # fmt: skip
def test_what_it_cannot_take_runs_on_xlas_and_is_no_fair_baseline(cudnn, device, shape, dtype, reason):
    with attention.traced_for(device):
        choice = attention.choose(shape, dtype)
        assert choice.implementation == "xla" and reason in choice.reason
        assert not choice.fair


def test_without_cudnn_the_reason_says_so():
    attention._why_not_cudnn.cache_clear()
    with compat.cudnn_found(None), attention.traced_for(H100):
        assert attention.choose(DIT_XL, "bfloat16") == ("xla", "cannot run here: cuDNN is not detected.")
    attention._why_not_cudnn.cache_clear()


@pytest.mark.parametrize(("heads", "a_device"), [(4, 2), (3, 3)])
def test_heads_are_split_whole_over_tensor_or_not_at_all(cudnn, heads, a_device):
    mesh = Mesh(np.asarray(jax.devices()[:4]).reshape(2, 2), ("data", "tensor"))
    q = jax.ShapeDtypeStruct((4, 16, heads, 8), jnp.bfloat16)
    with attention.traced_for(H100), sharded(mesh, batch=("data",), channels=("tensor",)):
        jaxpr = str(jax.make_jaxpr(attention.attention)(q, q, q))
    assert "dot_product_attention_fwd" in jaxpr
    assert f"bf16[2,16,{a_device},8]" in jaxpr.replace(" ", "")
