"""Derivatives in both modes for functions whose gradient is a program of its own.

`jax.custom_vjp` forbids forward mode, so this goes the other way round: `differentiable` is a `jax.custom_jvp` whose
tangent is one call of a linear function, and JAX transposes that call for reverse mode: forward mode runs plain JAX
code, reverse mode the program that was written for it, from the same saved arrays as under `jax.custom_vjp`.
`jax.custom_derivatives.linear_call` is such a call, but can neither be batched nor be differentiated a second time.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from gspn_jax.kernels.saved import named


def differentiable(
    function: Callable,
    *,
    plain: Callable,
    pull_back: Callable,
    save: Callable | None = None,
    saves_result: bool = False,
) -> Callable:
    """`function(arrays)`, a tree to an array, with derivatives of every order in both modes.

    plain: the same function in JAX code that JAX differentiates. Its tangents are those of `function`, and what is
        differentiated twice is it.
    pull_back: (arrays, saved, cotangent) -> cotangents of `arrays`, by the program that was written for it.
    save, saves_result: what `saved` is, under the name `SCAN_STATES`: of save(arrays) -> (result, saved), which then
        runs in place of `function`, or the result; else (). `plain` does without it.
    """

    @jax.custom_jvp
    def run(arrays: Any) -> Any:
        return function(arrays)

    @jax.custom_jvp
    def run_saving(arrays: Any) -> tuple[Any, Any]:
        return save(arrays)

    @jax.custom_jvp
    def pull(arrays: Any, saved: Any, cotangent: Any) -> Any:
        return pull_back(arrays, saved, cotangent)

    def run_for(arrays: Any) -> tuple[Any, Any]:
        """(result, saved) for the backward pass."""
        if save is not None:
            result, saved = run_saving(arrays)
            return result, named(saved)
        result = named(run(arrays)) if saves_result else run(arrays)
        return result, result if saves_result else ()

    def linearized(primals: Any, tangents: Any) -> tuple[Any, Any, Any]:
        """(result, saved, tangent of the result)"""
        (arrays,), (dots,) = primals, tangents
        result, saved = run_for(arrays)
        tree = jax.tree.structure(arrays)
        dots = tree.flatten_up_to(dots)
        moving = [i for i, dot in enumerate(dots) if not isinstance(dot, SymbolicZero)]

        def push_forward(residuals: Any, operands: list[Any]) -> Any:
            leaves = jax.tree.leaves(residuals[0])

            def of(values: list[Any]) -> Any:
                changed = dict(zip(moving, values, strict=True))
                return plain(tree.unflatten([changed.get(i, leaf) for i, leaf in enumerate(leaves)]))

            return jax.jvp(of, ([leaves[i] for i in moving],), (operands,))[1]

        def transpose(residuals: Any, cotangent: Any) -> list[Any]:
            found = jax.tree.leaves(pull(*residuals, cotangent))
            return [found[i] for i in moving]

        operands = [dots[i] for i in moving]
        return result, saved, linear_call(push_forward, transpose, (arrays, saved), operands, like=result)

    @functools.partial(run.defjvp, symbolic_zeros=True)
    def _(primals: Any, tangents: Any) -> tuple[Any, Any]:
        result, _, tangent = linearized(primals, tangents)
        return result, tangent

    @functools.partial(run_saving.defjvp, symbolic_zeros=True)
    def _(primals: Any, tangents: Any) -> tuple[Any, Any]:
        result, saved, tangent = linearized(primals, tangents)
        return (result, saved), (tangent, jax.tree.map(jnp.zeros_like, saved))

    @pull.defjvp
    def _(primals: Any, tangents: Any) -> tuple[Any, Any]:
        def plainly(arrays: Any, cotangent: Any) -> Any:
            return jax.vjp(plain, arrays)[1](cotangent)[0]

        (arrays, _, cotangent), (dots, _, dot_cotangent) = primals, tangents
        return pull(*primals), jax.jvp(plainly, (arrays, cotangent), (dots, dot_cotangent))[1]

    return run


def linear_call(function: Callable, transpose: Callable, residuals: Any, operands: Any, *, like: Any = None) -> Any:
    """`function(residuals, operands)`, linear in `operands`; `transpose(residuals, cotangent)` gives the cotangents of
    `operands`, in their types.

    `like`: arrays of the types of the result, where they are there: `function` is then traced only if it runs.
    Derivatives with respect to `residuals` are those of this code.
    """
    (residuals, residual_tree), (operands, operand_tree) = map(jax.tree.flatten, (residuals, operands))

    def flat_function(residuals, operands):
        return jax.tree.leaves(function(residual_tree.unflatten(residuals), operand_tree.unflatten(operands)))

    def flat_transpose(residuals, cotangents):
        return jax.tree.leaves(transpose(residual_tree.unflatten(residuals), result_tree.unflatten(cotangents)))

    if like is None:
        like = jax.eval_shape(function, residual_tree.unflatten(residuals), operand_tree.unflatten(operands))
        types = _types(flat_function, residuals, operands)
    else:
        types = tuple(map(jax.typeof, jax.tree.leaves(like)))
    result_tree = jax.tree.structure(like)
    found = _linear_call.bind(
        *residuals, *operands, function=flat_function, transpose=flat_transpose, count=len(residuals), types=types
    )
    return result_tree.unflatten(found)


_linear_call = Primitive("linear_call_with_transpose")
"""Call on flat lists: `count` residuals, then operands; `types` are those of the results."""
_linear_call.multiple_results = True


def _types(function: Callable, residuals: list, operands: list) -> tuple:
    return tuple(jax.make_jaxpr(function)(residuals, operands).out_avals)


@_linear_call.def_impl
def _run(*arrays, function, transpose, count, types):
    return function(list(arrays[:count]), list(arrays[count:]))


@_linear_call.def_abstract_eval
def _result_types(*arrays, function, transpose, count, types):
    return types


def _jvp(primals, tangents, *, function, transpose, count, types):
    """Linear in the operands; what residuals add is the derivative of the code of `function`."""
    residuals, operands = list(primals[:count]), list(primals[count:])

    def bind(operands):
        return _linear_call.bind(
            *residuals, *operands, function=function, transpose=transpose, count=count, types=types
        )

    terms = []
    if any(type(dot) is not ad.Zero for dot in tangents[count:]):
        terms.append(bind(list(map(ad.instantiate_zeros, tangents[count:]))))
    moving = {i: dot for i, dot in enumerate(tangents[:count]) if type(dot) is not ad.Zero}
    if moving:

        def of(changed):
            return function([changed.get(i, residual) for i, residual in enumerate(residuals)], operands)

        terms.append(jax.jvp(of, ({i: residuals[i] for i in moving},), (moving,))[1])
    return bind(operands), [sum(term[1:], term[0]) for term in zip(*terms, strict=True)]


def _transpose(cotangents, *arrays, function, transpose, count, types):
    """Operands that are known are constants: they get nothing."""
    found = transpose(list(arrays[:count]), list(map(ad.instantiate_zeros, cotangents)))
    asked = map(ad.is_undefined_primal, arrays[count:])
    return [None] * count + [grad if wanted else None for grad, wanted in zip(found, asked, strict=True)]


def _batch(arrays, axes, *, function, transpose, count, types):
    """Residuals that are the same for the whole batch stay as they are."""
    size = next(a.shape[axis] for a, axis in zip(arrays, axes, strict=True) if axis is not None)

    def lead(array, axis):
        return jnp.broadcast_to(array, (size, *array.shape)) if axis is None else jnp.moveaxis(array, axis, 0)

    residuals = [a if axis is None else lead(a, axis) for a, axis in zip(arrays[:count], axes[:count], strict=True)]
    operands = list(map(lead, arrays[count:], axes[count:]))
    where = [None if axis is None else 0 for axis in axes[:count]], 0
    function, transpose = jax.vmap(function, where), jax.vmap(transpose, where)
    types = _types(function, residuals, operands)
    found = _linear_call.bind(*residuals, *operands, function=function, transpose=transpose, count=count, types=types)
    return found, [0] * len(found)


ad.primitive_jvps[_linear_call] = _jvp
ad.primitive_transposes[_linear_call] = _transpose
batching.primitive_batchers[_linear_call] = _batch
mlir.register_lowering(_linear_call, mlir.lower_fun(_run, multiple_results=True))
