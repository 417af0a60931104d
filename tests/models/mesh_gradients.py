"""Gradients of a denoiser's loss over meshes, for tests."""

import jax
import numpy as np

from gspn_jax.parallel import fsdp, sharding
from gspn_jax.training.diffusion import DiffusionTask
from gspn_jax.training.step import make_gradient


def gradient_on(mesh, config, params, batch):
    """(loss, gradients in their own shapes) on as many devices as the mesh has."""
    task, devices = (
        DiffusionTask(config),
        sharding.make_mesh(mesh, jax.devices()[: mesh.data * mesh.fsdp * mesh.tensor]),
    )
    where = sharding.param_shardings(task.shapes, devices)

    def gradient(params, batch):
        with fsdp.sharded_blocks(devices, "float32"):
            return make_gradient(task, devices)(params, batch, jax.random.key(1))

    stored = jax.jit(lambda params: sharding.pad(params, task.shapes, devices), out_shardings=where)(params)
    (loss, _), found = jax.jit(gradient, in_shardings=(where, sharding.batch_sharding(devices)))(stored, batch)
    return float(loss), jax.tree.map(lambda a, s: np.asarray(a)[tuple(map(slice, s.shape))], found, task.shapes)
