import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gspn_jax import models
from gspn_jax.models.classifier import PRESETS, Classifier, count_multiply_adds, count_parameters, preset
from gspn_jax.models.hierarchy import Hierarchy, Stage, map_sizes
from gspn_jax.models.scan_mixer import GlobalResponseNorm, ScanOptions
from gspn_jax.parallel import fsdp, sharding
from tests.models import numpy_classifier
from tests.models.traced import traced_products

CLASSES = 5


def tiny(*blocks: tuple[int | None, ...], drop_path=0.0, **options) -> Hierarchy:
    """Stages of 16, 24, ... channels with these local scans."""
    mixer = ScanOptions(proxy=4, kernel=3, **options)
    return Hierarchy(tuple(Stage(16 + 8 * i, chunks, mixer) for i, chunks in enumerate(blocks)), drop_path)


def build(hierarchy, **settings):
    """(static part, parameters), drawn in one program, for drawing them one by one compiles many."""

    def make(seed):
        return Classifier(hierarchy, num_classes=CLASSES, rngs=nnx.Rngs(jax.random.key(seed)), **settings)

    return abstract(hierarchy, **settings)[0], jax.jit(lambda seed: models.split(make(seed))[1])(0)


def abstract(hierarchy, **settings):
    make = lambda: Classifier(hierarchy, num_classes=CLASSES, rngs=nnx.Rngs(0), **settings)  # noqa: E731
    return models.split(nnx.eval_shape(make))


def moved(params, seed=1, scale=0.2):
    """Parameters away from their start, where zeros and ones would hide what they multiply."""
    random = np.random.default_rng(seed)
    return jax.tree.map(lambda a: jnp.asarray(a + scale * random.standard_normal(a.shape), jnp.float32), params)


def images(height, width, batch=1, seed=2):
    return jnp.asarray(np.random.default_rng(seed).standard_normal((batch, height, width, 3)), jnp.float32)


def chunks(hierarchy):
    return [stage.chunks for stage in hierarchy.stages]


def error(found, expected):
    found, expected = (np.asarray(a, np.float64) for a in (found, expected))
    assert found.shape == expected.shape
    return np.abs(found - expected).max() / np.abs(expected).max()


@pytest.mark.parametrize(
    ("blocks", "options"),
    [
        pytest.param(((2, 2), (None, 2)), {}, marks=pytest.mark.slow),
        (((None, None),), {"skip": True, "groups": 1}),
        pytest.param(((None, None),), {"skip": True, "released": True}, marks=pytest.mark.slow),
    ],
    ids=["local and global", "skip and shared weights", "released"],
)
def test_logits_maps_and_gradients_are_those_of_a_loop_in_float64(blocks, options):
    """A gradient by its product with a random direction in every parameter, from differences of the loop."""
    hierarchy = tiny(*blocks, **options)
    graphdef, params = build(hierarchy)
    params, x = moved(params), images(18, 13)
    random = np.random.default_rng(3)
    cotangent = random.standard_normal(CLASSES).astype(np.float32)

    def loss(params, x):
        model = nnx.merge(graphdef, params)
        logits, maps = model(x), model(x, features=True)
        return logits[0] @ cotangent, (logits, maps)

    gradients, (logits, maps) = jax.jit(jax.grad(loss, (0, 1), has_aux=True))(params, x)
    exact = jax.tree.map(lambda a: np.asarray(a, np.float64), (params, x[0]))

    def loop(inputs):
        return numpy_classifier.classify(*inputs, chunks(hierarchy), "released" in options)

    expected, expected_maps = loop(exact)
    assert error(logits[0], expected) < 1e-5
    for found, truth in zip(maps, expected_maps, strict=True):
        assert error(found[0], truth) < 1e-5

    leaves, tree = jax.tree.flatten(exact)
    step = 1e-5
    assert all(np.linalg.norm(gradient) > 0 for gradient in jax.tree.leaves(gradients))
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(exact)]
    for i, (name, gradient) in enumerate(zip(names, jax.tree.leaves((gradients[0], gradients[1][0])), strict=True)):
        direction = random.standard_normal(leaves[i].shape)
        ahead, behind = (
            loop(jax.tree.unflatten(tree, [*leaves[:i], leaves[i] + sign * step * direction, *leaves[i + 1 :]]))[0]
            for sign in (1, -1)
        )
        slope = (ahead - behind) @ cotangent.astype(np.float64) / (2 * step)
        gradient = np.asarray(gradient, np.float64)
        assert abs((gradient * direction).sum() - slope) < 1e-5 * np.linalg.norm(gradient), name


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("name", PRESETS)
def test_parts_have_the_parameters_of_the_closed_form(name, skip):
    """That of the reference, which equals the released configs tensor by tensor (with their skip term)."""
    hierarchy, classes = preset(name, skip=skip), 1000
    expected, first = {}, hierarchy.stages[0].width
    for i, stage in enumerate(hierarchy.stages, start=1):
        d, s = stage.width, stage.mixer.proxy
        expected[f"stage{i}"] = len(stage.chunks) * (11 * d * d + 88.5 * d + (37.5 if skip else 31.5) * d * s + 4)
        if i > 1:
            expected[f"down{i}"] = 18 * (d // 2) ** 2 + 6 * (d // 2)
    expected |= {"stem": 4.5 * first**2 + 18 * first, "head": 16 * first + 8 * first * classes + classes}
    found = count_parameters(hierarchy, num_classes=classes)
    assert found == expected
    totals = {
        "GSPN-T": (31_279_868, 31_510_268),
        "GSPN-S": (50_037_218, 50_773_346),
        "GSPN-B": (92_462_068, 93_061_108),
    }
    assert sum(found.values()) == totals[name][skip]


@pytest.mark.parametrize(
    ("name", "total", "with_scans", "stages"),
    [
        ("GSPN-T", 5.24, 5.30, (0.864, 0.750, 2.425, 0.664)),
        ("GSPN-S", 11.89, 12.01, (3.16, 2.59, 4.60, 0.86)),
        ("GSPN-B", 15.71, 15.85, (2.56, 2.27, 7.99, 2.06)),
    ],
)
def test_work_is_that_of_the_released_configs(name, total, with_scans, stages):
    """In 1e9 multiply-adds at 224 px, of the reference's table: to 0.5 % or the last digit it prints."""
    counts = count_multiply_adds(preset(name, skip=True), num_classes=1000, height=224, width=224)
    found = {part: count / 1e9 for part, count in counts.items()}
    assert sum(found.values()) == pytest.approx(with_scans, rel=0.005)
    assert sum(found.values()) - found["scans"] == pytest.approx(total, rel=0.005)
    assert [found[f"stage{i}"] for i in (1, 2, 3, 4)] == pytest.approx(stages, rel=0.005, abs=0.005)


def test_work_in_products_is_that_of_the_traced_program():
    hierarchy, height, width = tiny((2,), (None,) * 3, skip=True, groups=3), 21, 30
    graphdef, params = abstract(hierarchy)
    jaxpr = jax.make_jaxpr(lambda p, x: nnx.merge(graphdef, p)(x))(params, images(height, width)).jaxpr
    counts = count_multiply_adds(hierarchy, num_classes=CLASSES, height=height, width=width)
    convolutions = {"stem": 9 * (11 * 15 * 3 * 8 + 6 * 8 * 8 * 16), "down2": 9 * 3 * 4 * 16 * 24}
    assert {name: counts[name] for name in convolutions} == convolutions
    pointwise = (9 + 4) * (48 * 24 + 3 * 12 * 36)  # depthwise 3x3 and merge on the scanned channels
    products = sum(counts.values()) - counts["scans"] - sum(convolutions.values()) - pointwise
    assert 2 * products == pytest.approx(traced_products(jaxpr), rel=1e-9)


def test_any_image_size_gives_logits_features_and_the_maps_of_all_stages():
    hierarchy = tiny((2,), (None,), (2,))
    for classes, height, width in ((CLASSES, 33, 96), (0, 1, 7)):
        x = jax.ShapeDtypeStruct((2, height, width, 1), jnp.bfloat16)
        model = nnx.eval_shape(
            lambda classes=classes: Classifier(
                hierarchy, num_classes=classes, channels=1, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)
            )
        )
        out, maps = jax.eval_shape(lambda model, x: (model(x), model(x, features=True)), model, x)
        assert (out.shape, out.dtype) == ((2, classes or 32), jnp.float32)
        expected = [(2, -(-height // r), -(-width // r), d) for r, d in ((4, 16), (8, 24), (16, 32))]
        assert [m.shape for m in maps] == expected
        assert map_sizes(hierarchy, height, width) == [shape[1:3] for shape in expected]


def test_programs_do_not_grow_with_the_depth():
    def equations(blocks):
        hierarchy = tiny((2,) * blocks, (None,) * blocks)
        graphdef, params = abstract(hierarchy)
        return str(jax.make_jaxpr(lambda p, x: nnx.merge(graphdef, p)(x))(params, images(16, 16))).count("\n")

    assert equations(2) == equations(9)


def test_last_blocks_are_dropped_most_and_the_first_never():
    graphdef, params = build(tiny((None, None), drop_path=0.999999))
    params = moved(params)
    alone = jax.tree_util.tree_map_with_path(
        lambda path, a: a[:1] if "blocks" in jax.tree_util.keystr(path) else a, params
    )
    x, key = images(9, 9, batch=3), jax.random.key(0)
    (found,) = jax.jit(lambda p: nnx.merge(graphdef, p)(x, features=True, drop_path_key=key))(params)
    (expected,) = jax.jit(nnx.merge(build(tiny((None,)))[0], alone), static_argnames="features")(x, features=True)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_starts_of_ours_and_of_the_release():
    ours, released = (
        build(tiny((None,), **options))[1]["backbone"]["stage1"]["blocks"]["mixer"]
        for options in ({}, {"skip": True, "released": True})
    )
    np.testing.assert_array_equal(ours["merge"], np.full((1, 4), 0.25))
    assert "skip" not in ours and released["skip"]["kernel"].shape == (1, 4, 4, 24)
    assert 0.01 < np.abs(released["merge"]).max() <= 0.5 and np.unique(released["merge"]).size == 4
    for mixer in (ours, released):
        for name, fan_in in (("conv", 9), ("proxy", 24), ("gates", 4), ("lam", 4), ("out_gate", 4)):
            largest = np.abs(mixer[name]["kernel"]).max()
            assert 0.85 < largest * fan_in**0.5 <= 1, name
        assert np.std(mixer["in_proj"]["kernel"]) == pytest.approx(0.02, rel=0.2)
        assert not mixer["grn"]["gamma"].any() and not mixer["grn"]["beta"].any()


def test_an_empty_channel_has_a_gradient():
    """A norm's slope at zero is taken as zero; that of a square root is infinite."""
    norm = GlobalResponseNorm(2, rngs=nnx.Rngs(0))
    norm.gamma[...] = jnp.ones(2)
    x = jnp.stack([jnp.zeros((1, 2, 2)), jnp.ones((1, 2, 2))], axis=-1)
    assert np.isfinite(jax.grad(lambda x: norm(x).sum())(x)).all()


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match=r"preset must be one of GSPN-T, GSPN-S, GSPN-B, GSPN-mini, found 'GSPN-XL/2'"):
        preset("GSPN-XL/2")
    with pytest.raises(ValueError, match=r"at least one block, found \[1, 0\] blocks"):
        tiny((2,), ())
    with pytest.raises(ValueError, match=r"drop_path must be at least 0 and below 1, found 1\.0"):
        preset("GSPN-T", drop_path=1.0)
    with pytest.raises(ValueError, match=r"first stage must be even, .*, found 15"):
        Hierarchy((Stage(15, (None,), ScanOptions(4)),))
    model = nnx.eval_shape(lambda: Classifier(tiny((2,)), num_classes=2, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match=r"images must have shape \[B, H, W, 3\] .*, found \[1, 8, 8, 1\]"):
        jax.eval_shape(lambda model, x: model(x), model, jnp.zeros((1, 8, 8, 1)))


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"skip": True, "released": True}], ids=["ours", "released"])
def test_over_a_mesh_logits_and_gradients_are_those_of_one_device(options):
    hierarchy = tiny((2, 2), (None, None), drop_path=0.3, **options)
    graphdef, params = build(hierarchy)
    params, x, key = moved(params), images(17, 22, batch=8), jax.random.key(4)
    cotangent = jnp.asarray(np.random.default_rng(3).standard_normal((8, CLASSES)), jnp.float32)

    def loss(params, x):
        logits = nnx.merge(graphdef, params)(x, drop_path_key=key)
        return (logits * cotangent).sum(), logits

    gradients, logits = jax.jit(jax.grad(loss, has_aux=True))(params, x)
    mesh = jax.make_mesh((1, 4, 2), sharding.AXES, axis_types=(jax.sharding.AxisType.Auto,) * 3)
    _, shapes = models.abstract_of(lambda rngs: Classifier(hierarchy, num_classes=CLASSES, rngs=rngs))
    where = sharding.param_shardings(shapes, mesh)
    specs = {jax.tree_util.keystr(path): s.spec for path, s in jax.tree_util.tree_leaves_with_path(where)}
    assert sum("tensor" in spec and "fsdp" in spec for spec in specs.values()) >= 6
    by_image = sharding.batch_sharding(mesh)

    def sharded(stored, x):
        return loss(fsdp.outside_blocks(shapes, mesh, stored), x)

    with fsdp.sharded_blocks(mesh, jnp.float32):
        run = jax.jit(jax.grad(sharded, has_aux=True), in_shardings=(where, by_image), out_shardings=(where, by_image))
        found, found_logits = run(sharding.pad(params, shapes, mesh), x)
    found = jax.tree.map(lambda a, whole: a[tuple(slice(size) for size in whole.shape)], found, params)
    assert error(found_logits, logits) < 1e-5
    for name, gradient, expected in zip(specs, jax.tree.leaves(found), jax.tree.leaves(gradients), strict=True):
        assert error(gradient, expected) < 1e-5, name


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["dots", "names", "full"])
def test_rematerialisation_changes_no_gradient(remat):
    x = images(9, 9)

    def gradients(hierarchy):
        graphdef, params = build(hierarchy)
        return jax.jit(jax.grad(lambda p: jnp.square(nnx.merge(graphdef, p)(x)).sum()))(moved(params))

    plain = tiny((2,), (None, None))
    found = gradients(dataclasses.replace(plain, remat=remat))
    for got, expected in zip(jax.tree.leaves(found), jax.tree.leaves(gradients(plain)), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_bfloat16_stays_near_float32():
    hierarchy, x = tiny((2,), (None, None)), images(17, 22, batch=2)
    params = moved(build(hierarchy)[1])
    exact, rounded = (
        np.asarray(jax.jit(nnx.merge(build(hierarchy, dtype=dtype)[0], params))(x))
        for dtype in (jnp.float32, jnp.bfloat16)
    )
    assert rounded.dtype == np.float32
    assert 1e-6 < error(rounded, exact) < 0.03
