"""Shapes and types of arrays, checked at run time: `conftest` has jaxtyping put `checked` around all of the package.

beartype checks what a signature says of arrays, with one size for one letter within a call; the rest is left to the
type checker (`make lint`). A NumPy array counts as one of JAX, a number as one without axes. Constructors are left out:
JAX builds dataclasses that are trees of whatever there is in place of their arrays.
"""

import functools
import operator
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Union, get_args, get_origin

import beartype
import jax
import numpy as np

ARRAYS = (jax.Array, np.ndarray, jax.ShapeDtypeStruct)
CONTAINERS = (tuple, list, dict, Sequence, Mapping)


def checked(function: Callable) -> Callable:
    """The typechecker that jaxtyping is given: beartype, for arrays only."""
    if function.__name__ == "__init__":
        return function
    function.__annotations__ = {name: _arrays_of(hint) for name, hint in function.__annotations__.items()}
    return beartype.beartype(function)


def _arrays_of(hint: Any) -> Any:
    """A hint with anything allowed where no array is."""
    if isinstance(hint, type) and hasattr(hint, "dim_str"):
        allowed = functools.reduce(operator.or_, (hint.dtype[array, hint.dim_str] for array in ARRAYS))
        return allowed if hint.dim_str else allowed | int | float | np.number
    if hint in (None, types.NoneType, ...):
        return hint
    origin, parts = get_origin(hint), [_arrays_of(part) for part in get_args(hint)]
    if all(part is Any or part in (None, types.NoneType, ...) for part in parts):
        return Any
    if origin in (Union, types.UnionType):
        return Any if Any in parts else functools.reduce(operator.or_, parts)
    return origin.__class_getitem__(tuple(parts)) if origin in CONTAINERS else Any
