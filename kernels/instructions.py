"""Operations that take a GPU one instruction each, where what Pallas makes of the usual ones takes several.

Each takes the layout of its arrays, which says how they are spread over the threads of a warpgroup.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental.mosaic.gpu import FragmentedArray
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import arith, vector
from jaxtyping import Array, Float, UInt32

from gspn_jax.kernels import compat

if _moved := [name for name in ("_pointwise", "_lift_fast_instr") if not hasattr(FragmentedArray, name)]:
    raise ImportError(f"cannot use {', '.join(map(repr, _moved))} of {FragmentedArray.__qualname__!r}")


def reciprocal(value: Float[Array, "*axes"], layout: Any) -> Float[Array, "*axes"]:
    """1 / value in float32, where neither is below 2**-126 in size: numbers that are cost six instructions more."""
    if compat.interpreting():
        return 1.0 / value
    return _inline(lambda array: array._lift_fast_instr("rcp.approx.ftz.f32"), jnp.float32, layout, value)


def widened(value: Float[Array, "*axes"], layout: Any) -> Float[Array, "*axes"]:
    """The same in float32. Of two bfloat16 in a register the upper one takes ptxas two instructions otherwise."""
    if compat.interpreting() or value.dtype != jnp.bfloat16 or layout.to_mgpu().vector_length % 2:
        return value.astype(jnp.float32)
    return _inline(lambda _: _widen, jnp.float32, layout, value)


def packed(low: Float[Array, "*axes"], high: Float[Array, "*axes"], layout: Any) -> UInt32[Array, "*axes"]:
    """Words of two numbers rounded to bfloat16, `low` in the lower half."""
    if compat.interpreting():
        halves = [lax.bitcast_convert_type(half.astype(jnp.bfloat16), jnp.uint16) for half in (low, high)]
        return halves[0].astype(jnp.uint32) | halves[1].astype(jnp.uint32) << 16
    return _inline(lambda _: _pack, jnp.uint32, layout, low, high)


def _inline(instruction: Callable[[FragmentedArray], Callable], dtype: Any, layout: Any, *arrays: Array) -> Array:
    """`instruction(array)` of each register of arrays of one shape."""

    def apply(_: Any, array: FragmentedArray, *others: FragmentedArray) -> FragmentedArray:
        signed = False if dtype == jnp.uint32 else None
        return array._pointwise(instruction(array), *others, output_is_signed=signed)

    found = plgpu.ShapeDtypeStruct(arrays[0].shape, dtype, layout=layout)
    return plgpu.inline_mgpu(arg_types=(layout,) * len(arrays), return_type=found)(apply)(*arrays)


def _widen(pairs: ir.Value) -> ir.Value:
    """A register of float32 from one of bfloat16, pairs of which are words: the lower half first."""
    word, count = ir.IntegerType.get_signless(32), ir.VectorType(pairs.type).shape[0]
    found = []
    for bits in _elements(vector.bitcast(ir.VectorType.get((count // 2,), word), pairs)):
        found.append(arith.shli(bits, arith.constant(word, 16)))
        found.append(arith.andi(bits, arith.constant(word, -(1 << 16))))
    return vector.bitcast(ir.VectorType.get((count,), ir.F32Type.get()), _register(found))


def _pack(low: ir.Value, high: ir.Value) -> ir.Value:
    """A register of words from one of each half."""
    words = []
    for halves in zip(_elements(low), _elements(high), strict=True):
        rounded = arith.truncf(ir.VectorType.get((2,), ir.BF16Type.get()), _register(halves))
        words += _elements(vector.bitcast(ir.VectorType.get((1,), ir.IntegerType.get_signless(32)), rounded))
    return _register(words)


def zero() -> ir.Value:
    """0 in float32."""
    return arith.constant(ir.F32Type.get(), 0.0)


def crossed(first: ir.Value, second: ir.Value) -> list[ir.Value]:
    """Registers of the first elements of two, and of their second ones."""
    return list(map(_register, zip(_elements(first), _elements(second), strict=True)))


def _elements(register: ir.Value) -> list[ir.Value]:
    count = ir.VectorType(register.type).shape[0]
    return [vector.extract(register, dynamic_position=[], static_position=[n]) for n in range(count)]


def _register(elements: Any) -> ir.Value:
    elements = list(elements)
    return vector.from_elements(ir.VectorType.get((len(elements),), elements[0].type), elements)
