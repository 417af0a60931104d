"""Forward mode through whole denoisers, with remat, the long skips and the gather of FSDP."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gspn_jax import models
from gspn_jax.config import MeshConfig
from gspn_jax.models import resolve
from gspn_jax.parallel import fsdp, sharding
from tests.models import numpy_gspn
from tests.models.model_cases import DIT_GSPN, PAPER, make_config, random_inputs, random_params, relative_error

STEP = 1e-5
PAPER_2 = dataclasses.replace(PAPER, depth=2, chunk=2)


def setting(model, **options):
    config = make_config(dataclasses.replace(model, **options), objective="flow")
    params, (x, t, y) = random_params(config), random_inputs(4, 8, 8)
    rng = np.random.default_rng(3)
    dots = jax.tree.map(lambda a: rng.standard_normal(a.shape).astype(np.float32), (params, x, t))
    return config, (params, x, t), dots, y


def denoiser(config, labels):
    graphdef, _ = models.abstract(config)
    return lambda params, x, t: models.apply(graphdef, params, x, t, labels)


def test_the_tangent_of_the_paper_layout_is_the_central_difference_of_the_float64_loops():
    config, primals, dots, labels = setting(PAPER_2, remat="names")
    arch = resolve(config.model)

    def loops(sign):
        params, x, t = jax.tree.map(lambda a, dot: np.float64(a) + sign * STEP * dot, primals, dots)
        return np.stack(
            [
                numpy_gspn.denoise(params, *sample, patch=arch.patch, chunks=arch.chunks)
                for sample in zip(x, t, labels, strict=True)
            ]
        )

    function = denoiser(config, labels)
    tangent = jax.jit(lambda primals, dots: jax.jvp(function, primals, dots)[1])(primals, dots)
    assert relative_error(tangent, (loops(1) - loops(-1)) / (2 * STEP)) < 1e-4


def inner(a, b):
    pairs = list(zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))
    pairs = [(np.asarray(a, np.float64).ravel(), np.asarray(b, np.float64).ravel()) for a, b in pairs]
    return sum(a @ b for a, b in pairs), sum(np.linalg.norm(a) * np.linalg.norm(b) for a, b in pairs)


@pytest.mark.slow
@pytest.mark.parametrize("model", [PAPER_2, dataclasses.replace(DIT_GSPN, chunk=2)], ids=["paper", "dit_gspn"])
@pytest.mark.parametrize("remat", ["names", "dots", "full"])
def test_forward_and_reverse_mode_agree(model, remat):
    config, primals, dots, labels = setting(model, remat=remat)
    function = denoiser(config, labels)
    v = np.random.default_rng(4).standard_normal(primals[1].shape).astype(np.float32)
    tangent = jax.jit(lambda primals, dots: jax.jvp(function, primals, dots)[1])(primals, dots)
    pulled = jax.jit(lambda primals: jax.vjp(function, *primals)[1](v))(primals)
    forward, scale = inner(v, tangent)
    assert abs(forward - inner(pulled, dots)[0]) < 1e-5 * scale


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [MeshConfig(1, 4, 1), MeshConfig(2, 2, 2)], ids=["fsdp4", "2x2x2"])
def test_over_a_mesh_tangents_are_those_of_one_device(mesh):
    config, (params, x, t), (dot_params, dot_x, dot_t), labels = setting(PAPER_2)
    function = denoiser(config, labels)
    expected = jax.jit(lambda *a: jax.jvp(function, a[:3], a[3:])[1])(params, x, t, dot_params, dot_x, dot_t)
    devices = sharding.make_mesh(mesh, jax.devices()[: mesh.data * mesh.fsdp * mesh.tensor])
    shapes = models.abstract(config)[1]

    def over_mesh(params, x, t):
        return function(fsdp.outside_blocks(shapes, devices, params), x, t)

    stored = [
        jax.device_put(sharding.pad(tree, shapes, devices), sharding.param_shardings(shapes, devices))
        for tree in (params, dot_params)
    ]
    with fsdp.sharded_blocks(devices, config.train.compute):
        run = jax.jit(lambda params, dots: jax.jvp(over_mesh, (params, x, t), (dots, dot_x, dot_t))[1])
        found = run(*jax.tree.map(jnp.asarray, stored))
    assert relative_error(found, np.asarray(expected, np.float64)) < 1e-5


@pytest.mark.slow
def test_a_gradient_through_a_tangent_as_mean_flow_takes_it():
    """Of |u - (v - t du/dt)|^2 with du/dt held fixed, and of du/dt itself, beside the plain scan."""
    config, (params, x, t), _, labels = setting(PAPER_2, remat="names")
    velocity = np.random.default_rng(5).standard_normal(x.shape).astype(np.float32)

    def gradient(backend):
        chosen = dataclasses.replace(config, model=dataclasses.replace(config.model, backend=backend))
        function = denoiser(chosen, labels)

        def loss(params):
            u, du = jax.jvp(lambda x, t: function(params, x, t), (x, t), (velocity, np.ones_like(t)))
            target = velocity - 0.1 * jax.lax.stop_gradient(du)
            return ((u - target) ** 2).mean() + 0.01 * (du**2).mean()

        return jax.jit(jax.grad(loss))(params)

    for found, right in zip(*map(jax.tree.leaves, (gradient("scan"), gradient("reference"))), strict=True):
        assert relative_error(found, np.asarray(right, np.float64)) < 1e-4
