"""A training step for GPUs, lowered on a machine that has none: the kernel is in it, on every kind of mesh."""

import re

import jax
import numpy as np
import pytest

from gspn_jax.config import Config, DataConfig, MeshConfig, ModelConfig, TrainConfig
from gspn_jax.kernels import compat, devices
from gspn_jax.parallel import fsdp, sharding
from gspn_jax.training.diffusion import DiffusionTask
from gspn_jax.training.state import abstract_state
from gspn_jax.training.step import make_step


@pytest.mark.slow
@pytest.mark.parametrize("mesh_shape", [(2, 1, 1), (1, 2, 1), (1, 1, 2)], ids=str)
def test_the_step_has_the_kernel_that_expands_the_proxy(mesh_shape, monkeypatch):
    monkeypatch.setattr(fsdp, "uses_tensor_cores", lambda mesh: mesh.shape["tensor"] == 1)
    monkeypatch.setattr(fsdp, "unrolls", lambda mesh: True)
    config = Config(
        "unused",
        mesh=MeshConfig(*mesh_shape),
        model=ModelConfig(preset="GSPN-S/2", hidden=128, depth=2, remat="names"),
        data=DataConfig(source="latents", path="unused", image_size=32, channels=4, num_classes=10),
        train=TrainConfig(batch_size=16),
    )
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:2])
    rows = sharding.batch_sharding(mesh)
    batch = {
        "image": jax.ShapeDtypeStruct((16, 32, 32, 4), np.float32, sharding=rows),
        "label": jax.ShapeDtypeStruct((16,), np.int32, sharding=rows),
    }
    with devices.for_device("9.0"):
        step = make_step(DiffusionTask(config), mesh).trace(abstract_state(DiffusionTask(config), mesh), batch)
        text = step.lower(lowering_platforms=("cuda",)).as_text()
    calls = [line for line in text.splitlines() if "custom_call @mosaic_gpu" in line]
    assert len(calls) >= 2  # one forward, one backward; more where stacks of blocks differ
    arguments = [line.rpartition(" : (")[2].partition(") -> ")[0] for line in calls]
    reads_logits = any("x16x16x4x3x" in types for types in arguments)
    assert reads_logits != compat.HAS_MMA  # without it XLA expands the proxy where chunk is not 2
    assert not re.search(r"x16x16x4x3x\d+xf32", text)  # what they get is bfloat16
