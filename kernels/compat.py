"""What differs between the versions of JAX that we support; the only module that may look into `jax._src`.

Seen by running 0.10.2, 0.11.2 and 0.12.0: the form of `plgpu.load`, where the interpreter's parameters live, and what
the interpreter cannot do (layouts, before 0.11).
"""

import contextlib
import contextvars
import inspect
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

try:
    from jax.experimental.pallas.mosaic_gpu import InterpretGPUParams
except ImportError:  # JAX 0.10
    from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

_interpreting = contextvars.ContextVar("interpreting", default=None)
_LOAD_TAKES_INDEX = "idx" in inspect.signature(plgpu.load).parameters and jax.__version_info__ < (0, 11)


@contextlib.contextmanager
def interpreted(*, detect_races: bool = True) -> Iterator[None]:
    """Kernels traced inside run on the CPU in Pallas' interpreter, which reports a race as `races_found`."""
    token = _interpreting.set(InterpretGPUParams(detect_races=detect_races))
    try:
        yield
    finally:
        _interpreting.reset(token)


def interpreting() -> bool:
    """Whether kernels traced now are interpreted."""
    return _interpreting.get() is not None


def races_found() -> bool:
    """Whether the interpreter saw a data race in the last kernel it ran."""
    from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call

    return bool(interpret_pallas_call.get_races().races_found)


def reset_interpreter() -> None:
    """Must be called after an exception inside an interpreted kernel."""
    from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call

    interpret_pallas_call.reset_gpu_interpret_mode_state()


def kernel(body: Any, **options: Any) -> Any:
    """`plgpu.kernel` with warpgroup lowering (0.10 would choose another), interpreted inside `interpreted()`."""
    parameters = plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup)
    interpret = _interpreting.get()
    if interpret is not None:
        options["interpret"] = interpret
    return plgpu.kernel(body, compiler_params=parameters, **options)


def load(ref: Any, index: tuple, layout: Any) -> Array:
    """`ref[index]`, spread over the threads of the warpgroup as `layout` says."""
    if interpreting():
        return ref[index]
    if _LOAD_TAKES_INDEX:
        return plgpu.load(ref, index, layout=layout, optimized=False)
    return plgpu.load(ref.at[index], layout=layout, optimized=False)


def store(ref: Any, index: tuple, value: Array) -> None:
    """`ref[index] = value` in device memory, in the type of `ref`, whatever the strides."""
    value = value.astype(ref.dtype)
    if hasattr(plgpu, "store") and not interpreting():  # JAX 0.12, where an assignment insists on aligned strides
        plgpu.store(ref.at[index], value, optimized=False)
    else:
        ref[index] = value


def iota(shape: tuple[int, ...], dimension: int, layout: Any) -> Array:
    """int32 positions along `dimension`, spread as `layout` says."""
    if interpreting():
        return jax.lax.broadcasted_iota("int32", shape, dimension)
    return plgpu.broadcasted_iota("int32", shape, dimension, layout=layout)


def zeros(shape: tuple[int, ...], layout: Any) -> Array:
    """float32 zeros, spread as `layout` says."""
    array = jnp.zeros(shape, jnp.float32)
    return array if interpreting() else plgpu.layout_cast(array, layout)
