"""What differs between the versions of JAX that we support; the only module that may look into `jax._src`.

Seen by running 0.10.2, 0.11.2 and 0.12.0: the form of `plgpu.load`, where the interpreter's parameters live, and what
the interpreter cannot do (layouts, before 0.11).
"""

import contextlib
import contextvars
import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import warpgroup_barrier as mosaic_barrier
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

PALLAS_NAMES = (
    "ACC",
    "Barrier",
    "CompilerParams",
    "Layout",
    "LoweringSemantics",
    "SMEM",
    "ShapeDtypeStruct",
    "SwizzleTransform",
    "Tiling",
    "TilingTransform",
    "barrier_arrive",
    "barrier_wait",
    "broadcasted_iota",
    "commit_smem",
    "copy_gmem_to_smem",
    "inline_mgpu",
    "kernel",
    "layout_cast",
    "load",
    "wgmma",
)
"""What the kernels use of Pallas' Mosaic GPU dialect, an experimental interface."""

if _moved := [name for name in PALLAS_NAMES if not hasattr(plgpu, name)]:
    raise ImportError(f"cannot import name {', '.join(map(repr, _moved))} from {plgpu.__name__!r}")

_interpreting = contextvars.ContextVar("interpreting", default=None)
_LOAD_TAKES_INDEX = "idx" in inspect.signature(plgpu.load).parameters and jax.__version_info__ < (0, 11)


@contextlib.contextmanager
def interpreted(*, detect_races: bool = True) -> Iterator[None]:
    """Kernels traced inside run on the CPU in Pallas' interpreter, which reports a race as `races_found`."""
    _let_devices_end_apart()
    if jax.__version_info__ < (0, 11):
        _compile_once()
    token = _interpreting.set(_interpret_parameters()(detect_races=detect_races))
    try:
        yield
    finally:
        _interpreting.reset(token)


def _interpret_parameters() -> type:
    if hasattr(plgpu, "InterpretGPUParams"):
        return plgpu.InterpretGPUParams
    from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams  # JAX 0.10

    return InterpretGPUParams


def _let_devices_end_apart() -> None:
    """A device that is done asserts that no barrier is left, those of devices that are still at work included: then
    it fails and the others wait for it for ever. All versions do."""
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

    gpu_callbacks._assert_no_barriers_allocated = lambda token: token


def _compile_once() -> None:
    """The interpreter of 0.10 compiles what a thread does for every thread of every block again, for want of one
    function that all of them name; 0.11 has it."""
    from jax._src.pallas.mosaic.interpret import thread_map

    def run(jaxpr, consts, *arguments):
        _evaluate.trace(jaxpr, consts, *arguments).lower().compile()(consts, *arguments)

    thread_map._run_jaxpr = run


@functools.partial(jax.jit, static_argnums=0)
def _evaluate(jaxpr: Any, consts: Any, *arguments: Any) -> None:
    jax.core.eval_jaxpr(jaxpr, consts, *arguments)


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


@contextlib.contextmanager
def cudnn_found(version: int | None) -> Iterator[None]:
    """Inside, JAX finds cuDNN of this version, 91000 for 9.10, or none, whatever this machine has. For tests."""
    from jax._src.cudnn import fused_attention_stablehlo as attention

    def check() -> int:
        if version is None:
            raise RuntimeError("cuDNN is not detected.")
        return version

    kept, attention.check_cudnn_version = attention.check_cudnn_version, check
    try:
        yield
    finally:
        attention.check_cudnn_version = kept


def lower_for(capability: Callable[[], tuple[int, int] | None]) -> None:
    """From now on Pallas lowers for the compute capability that this gives, or, if that is None, the default device's.

    Pallas has no argument for it. Raises AttributeError under a JAX whose Pallas asks otherwise.
    """
    from jax.experimental.mosaic.gpu import core, utils

    module = core if hasattr(core, "_infer_arch") else utils  # JAX 0.10, and since 0.11.2
    infer = getattr(module._infer_arch, "default_device", module._infer_arch)

    def infer_arch() -> tuple[int, int]:
        return capability() or infer()

    infer_arch.default_device = infer
    module._infer_arch = infer_arch


_built: dict[tuple, Callable] = {}


def kernel(body: Callable, made_of: tuple, arrays: Sequence[Array], **options: Any) -> Any:
    """`plgpu.kernel` on `arrays` with warpgroup lowering (0.10 would choose another), interpreted in `interpreted()`.

    `made_of`, the options and the arrays' types say all that `body` depends on: a program that calls a kernel in
    several places has it once, as a function, for lowering one takes a second or two.
    Pallas would put a barrier before and after each store. Our kernels have their own: see `warpgroup_barrier`.
    """
    interpret = _interpreting.get()
    if interpret is not None:
        options["interpret"] = interpret
    key = (*made_of, repr(options), *((a.shape, a.dtype) for a in arrays))
    if key not in _built:
        parameters = plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup, unsafe_no_auto_barriers=True
        )
        _built[key] = jax.jit(plgpu.kernel(body, compiler_params=parameters, **options))
    return _built[key](*arrays)


def forget_kernels() -> None:
    """Builds kernels anew from now on; for who has changed what they are made of."""
    _built.clear()


def warpgroup_barrier() -> None:
    """All threads of this warpgroup are here: what one of them wrote before, all of them read afterwards.

    ptxas moves no load across it. The interpreter has one thread for a warpgroup, which needs none.
    """
    if not interpreting():
        plgpu.inline_mgpu()(lambda _: mosaic_barrier())()


def load(ref: Any, index: tuple, layout: Any) -> Array:
    """`ref[index]`, spread over the threads of the warpgroup as `layout` says."""
    if interpreting():
        return ref[index]
    if _LOAD_TAKES_INDEX:
        return plgpu.load(ref, index, layout=layout, optimized=False)
    return plgpu.load(ref.at[index], layout=layout, optimized=False)


STORES_ANY_LAYOUT = hasattr(plgpu, "store")
"""True where shared memory takes a tile however it is spread: before 0.12 some of 8 or 16 channels do not lower."""


def store(ref: Any, index: tuple, value: Array) -> None:
    """`ref[index] = value` in the type of `ref`, whatever the strides and the layout."""
    value = value.astype(ref.dtype)
    if STORES_ANY_LAYOUT and not interpreting():  # JAX 0.12, where an assignment insists on what it can do best
        plgpu.store(ref.at[index], value, optimized=False)
    else:
        ref[index] = value


RESHAPES_REFERENCES = jax.__version_info__ >= (0, 11)
"""Whether shared memory can be read and written in another shape: the lowering of 0.10 fails."""


def load_reshaped(ref: Any, shape: tuple[int, ...], layout: Any) -> Array:
    """All of `ref`, which is in shared memory, in another shape. The interpreter cannot reshape references."""
    whole = (slice(None),) * len(shape)
    return ref[...].reshape(shape) if interpreting() else load(ref.reshape(*shape), whole, layout)


def store_reshaped(ref: Any, value: Array) -> None:
    """Fills `ref`, which is in shared memory, with a value of another shape."""
    if interpreting():
        ref[...] = value.reshape(ref.shape)
    else:
        ref.reshape(*value.shape)[...] = value


def iota(shape: tuple[int, ...], dimension: int, layout: Any) -> Array:
    """int32 positions along `dimension`, spread as `layout` says."""
    if interpreting():
        return jax.lax.broadcasted_iota("int32", shape, dimension)
    return plgpu.broadcasted_iota("int32", shape, dimension, layout=layout)


def wgmma(total: Any, a: Any, b: Any) -> None:
    """total += a @ b.T on tensor cores, where `total` is an accumulator and a and b are in shared memory."""
    if jax.__version_info__ >= (0, 11):
        plgpu.wgmma(total, a, b.transpose((1, 0)))
    elif not interpreting():
        plgpu.wgmma(total, a, plgpu.transpose_ref(b, (1, 0)))
    else:  # the interpreter of 0.10 multiplies what lies in memory
        _copy_transposed(b, lambda b: plgpu.wgmma(total, a, b))


HAS_MMA = hasattr(plgpu, "mma")
"""Whether tensor cores can be had that take registers: since JAX 0.11.2."""


def multiplies_registers() -> bool:
    """Whether kernels traced now may use `mma`."""
    return HAS_MMA or interpreting()


def mma(total: Array, a: Array, b: Array) -> Array:
    """total + a @ b on tensor cores, all of them in registers, in the layouts of `plgpu.mma`."""
    if interpreting():
        return total + jnp.dot(a, b, preferred_element_type=total.dtype, precision="highest")
    return plgpu.mma(total, a, b)


def load_transposed(ref: Any, index: tuple, layout: Any) -> Array:
    """The transpose of `ref[index]`, which is in shared memory; `layout` is that of the result."""
    if interpreting():
        return ref[index].T
    return load(ref.at[index].transpose((1, 0)), (slice(None),) * 2, layout)


def layout_cast(value: Array, layout: Any) -> Array:
    """The same, spread over the threads of the warpgroup as `layout` says."""
    return value if interpreting() else plgpu.layout_cast(value, layout)


def _copy_transposed(ref: Any, do: Any) -> None:
    """Calls `do` with a copy of this warpgroup's own, its axes exchanged; all warpgroups must come here."""

    def with_copies(copies):
        copy = copies.at[jax.lax.axis_index("warpgroup")]
        copy[...] = ref[...].T
        do(copy)

    shape = jax.lax.axis_size("warpgroup"), *ref.shape[::-1]
    pl.run_scoped(with_copies, plgpu.SMEM(shape, ref.dtype), collective_axes=("warpgroup",))


def zeros(shape: tuple[int, ...], layout: Any) -> Array:
    """float32 zeros, spread as `layout` says."""
    return layout_cast(jnp.zeros(shape, jnp.float32), layout)
