"""The defect of JAX that docs/kernel_code.md reports is there, and the repair it suggests helps."""

import numpy as np
import pytest
from jax.experimental.mosaic.gpu import layout_inference
from jax.experimental.pallas import mosaic_gpu as plgpu

from tests.ptx import emulation, repro_swizzle

pytestmark = pytest.mark.ptx


def wrong_values(*transforms):
    (y,), runs = emulation.call(repro_swizzle.shift_rows(*transforms), [repro_swizzle.X], [repro_swizzle.X])
    assert not runs[0].faults
    return int((np.asarray(y) != repro_swizzle.EXPECTED).sum())


def test_as_jax_infers_values_come_from_other_columns():
    """If this fails, JAX was repaired: docs/kernel_code.md and shared_memory.row_major may then be shorter."""
    assert wrong_values() == 960


def test_row_major_they_are_right():
    assert wrong_values(plgpu.TilingTransform((64,))) == 0


def test_with_the_repair_they_are_right(monkeypatch):
    conjure = layout_inference._conjure_transforms_for_smem_ref

    def whole_patterns_only(*arguments):
        return ((tiling, swizzle) for tiling, swizzle in conjure(*arguments) if min(tiling) % 8 == 0)

    monkeypatch.setattr(layout_inference, "_conjure_transforms_for_smem_ref", whole_patterns_only)
    assert wrong_values() == 0
