"""Products of matrices in shared memory by `mma.sync`, as Pallas makes them: small programs, beside the kernels.

python -m tests.ptx.products 8.0       # all of them for GPUs of compute capability 8.0
"""

import dataclasses
import os
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from gspn_jax.kernels import compat
from tests.ptx import cases, emulation, toolchain

ROWS = 64
"""Of a: four warps of 16."""
LIMIT = 1e-7
"""Of norm errors: products of bfloat16 are summed in float32, of which a rounding is 3.4e-8."""


@dataclasses.dataclass(frozen=True)
class Product:
    """a [64, depth] by b [depth, columns], both bfloat16; threads copy them to shared memory and load fragments."""

    depth: int
    columns: int
    transposed: bool
    """Whether b lies as [columns, depth]."""
    meets: bool = True
    """Whether the threads meet between their stores and their loads, without which they race."""

    def __str__(self) -> str:
        return f"{ROWS}x{self.depth}x{self.columns}" + "-transposed" * self.transposed

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of b as it lies in memory."""
        return (self.columns, self.depth) if self.transposed else (self.depth, self.columns)

    def program(self) -> Callable[[Array, Array], Array]:
        left, right, total = (
            layout(jnp.bfloat16) for layout in (plgpu.Layout.MMA_LHS, plgpu.Layout.MMA_RHS, plgpu.Layout.MMA_ACC)
        )

        def body(a_in, b_in, out, a, b):
            for source, target in ((a_in, a), (b_in, b)):
                compat.store(target, (), plgpu.load(source, layout=plgpu.Layout.WGMMA, optimized=False))
            if self.meets:
                compat.warpgroup_barrier()
            zeros = compat.zeros((ROWS, self.columns), total)
            found = plgpu.mma(
                zeros, plgpu.load(a, layout=left), plgpu.load(b.T if self.transposed else b, layout=right)
            )
            compat.store(out, (), found)

        def call(a, b):
            scratch = [plgpu.SMEM(shape, jnp.bfloat16) for shape in ((ROWS, self.depth), self.shape)]
            return compat.kernel(body, (self,), (a, b), out_type=self.output, scratch_types=scratch)

        return call

    @property
    def output(self) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((ROWS, self.columns), jnp.float32)

    def arrays(self) -> list[jax.Array]:
        rng = np.random.default_rng(0)
        return [jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for shape in ((ROWS, self.depth), self.shape)]

    def truth(self) -> Float[np.ndarray, "rows columns"]:
        a, b = (np.asarray(array, np.float64) for array in self.arrays())
        return a @ (b.T if self.transposed else b)

    def run(self, **options: Any) -> tuple[float, emulation.Run]:
        """(norm error relative to float64, what ran); `options` are those of `emulation.emulate`."""
        (found,), (ran,) = emulation.call(self.program(), self.arrays(), [self.output], **options)
        return cases.norm_error(found, self.truth()), ran


PRODUCTS = [Product(64, 40, False), Product(48, 64, True), Product(16, 64, True)]


def main(capability: str) -> None:
    wrong = []
    with toolchain.for_device(capability):
        for product in PRODUCTS:
            error, ran = product.run()
            print(f"{product}: norm error {error:.1e}", ran)
            if not error < LIMIT or ran.faults:
                wrong.append(str(product))
    sys.exit(f"wrong: {', '.join(wrong)}" if wrong else None)


if __name__ == "__main__":
    os.environ["JAX_PLATFORMS"] = "cpu"
    main(*sys.argv[1:])
