"""What `toys` adds is trained, sampled and offered without a change of the product: on one device and on meshes."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

import sample
import train_dit
from gspn_jax import evaluate, models
from gspn_jax.config import Config, ConfigError, DiffusionConfig, EvalConfig, MeshConfig, ModelConfig, SamplerConfig
from gspn_jax.diffusion import objectives
from gspn_jax.diffusion import sample as draw
from gspn_jax.models.embeddings import NORMAL
from gspn_jax.models.parameters import logical
from gspn_jax.parallel import fsdp, sharding
from gspn_jax.runs import checkpoints
from gspn_jax.tables import FEATURE_NETWORKS, METRICS, MIXERS, OBJECTIVES, SAMPLERS, SOURCES
from gspn_jax.training.diffusion import DiffusionTask
from gspn_jax.training.step import make_gradient
from gspn_jax.training.train import train
from tests.seams import toys

ONE, FSDP, TENSOR = MeshConfig(1, 1, 1), MeshConfig(1, 4, 1), MeshConfig(1, 1, 2)
LINES = (
    (MIXERS, "roll", toys.RollOptions),
    (OBJECTIVES, "clean", toys.Clean()),
    (SAMPLERS, "small steps", toys.SMALL_STEPS),
    (SOURCES, "stripes", toys.STRIPES),
    (METRICS, "glare", toys.GLARE),
    (FEATURE_NETWORKS, "brightness", toys.Brightness()),
)


@pytest.fixture(scope="module", autouse=True)
def lines():
    with pytest.MonkeyPatch.context() as patch:
        for table, name, line in LINES:
            patch.setitem(table, name, line)
        yield


def made_of(mesh: MeshConfig):
    """The mesh over as many devices as it has."""
    return make_mesh(mesh, jax.devices()[: mesh.data * mesh.fsdp * mesh.tensor])


make_mesh = sharding.make_mesh


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """{mesh: run directory} of the toys on every mesh."""
    runs, files = {}, tmp_path_factory.mktemp("files")
    images = np.stack([np.repeat(toys.Stripes()[i]["image"], 3, axis=2) for i in range(6)])
    np.savez(files / "reference.npz", arr_0=images)
    evaluation = EvalConfig(
        every=4,
        num_samples=5,
        metrics=("glare",),
        reference=str(files / "reference.npz"),
        networks=("brightness=2",),
        batch_size=4,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "make_mesh", made_of)
        for mesh in (ONE, FSDP, TENSOR):
            config = toys.config(tmp_path_factory.mktemp("toys") / "run", mesh)
            runs[mesh] = train(dataclasses.replace(config, eval=evaluation))
    return runs


def test_toys_train_and_are_drawn_alike_on_every_mesh(trained):
    logged = {
        mesh: [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines() if '"loss"' in line]
        for mesh, run in trained.items()
    }
    grids = {mesh: np.asarray(Image.open(run / "samples" / "step_0000004.png"), int) for mesh, run in trained.items()}
    assert {"loss", "mse", "size"} <= logged[ONE][0].keys() and grids[ONE].std() > 10
    for mesh in (FSDP, TENSOR):
        for name in ("loss", "mse", "size", "grad_norm"):
            found, wanted = ([line[name] for line in logged[which]] for which in (mesh, ONE))
            np.testing.assert_allclose(found, wanted, rtol=1e-4)
        assert np.abs(grids[mesh] - grids[ONE]).max() <= 2  # 8-bit levels


def test_a_metric_of_another_network_is_scored_in_training_and_by_the_command(trained, tmp_path, monkeypatch):
    """Twice the difference of mean brightness, for the network's weight is 2; Inception is not asked for."""
    monkeypatch.setattr(sharding, "make_mesh", made_of)
    last = [json.loads((run / "metrics.jsonl").read_text().splitlines()[-1]) for run in trained.values()]
    np.testing.assert_allclose([line["eval/glare"] for line in last[1:]], last[0]["eval/glare"], atol=5e-3)
    config = checkpoints.read_config(trained[ONE])[1]
    drawn = ["--run", str(trained[ONE]), "--num-samples", "5", "--batch-size", "4", "--mesh.data", "1"]
    scored = ["--metrics", "glare", "--networks", "brightness=2", "--reference", config.eval.reference]
    evaluate.main([*drawn, *scored, "--output", str(tmp_path / "r.json"), "--save-samples", str(tmp_path / "s.npz")])
    with np.load(tmp_path / "s.npz") as samples, np.load(config.eval.reference) as reference:
        wanted = 2 * (samples["arr_0"].mean() - reference["arr_0"].mean()) / 255
    found = json.loads((tmp_path / "r.json").read_text())["metrics"]
    assert found == {"glare": pytest.approx(wanted, abs=1e-5)}
    assert last[0]["eval/glare"] == pytest.approx(wanted, abs=1e-5)  # of the same five images, none counted twice


def test_a_run_of_toys_is_sampled_by_the_command(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sharding, "make_mesh", made_of)
    arguments = ["--run", str(trained[ONE]), "--num-samples", "4", "--mesh.data", "1"]
    sample.main([*arguments, "--output", str(tmp_path / "s.npz"), "--sampler.name", "euler"])
    with np.load(tmp_path / "s.npz") as file:
        assert file["arr_0"].shape == (4, 8, 8, 1)
    with pytest.raises(SystemExit):
        sample.main([*arguments, "--output", str(tmp_path / "t.npz"), "--sampler.name", "ddim"])
    assert "ddim" in capsys.readouterr().err


def test_help_offers_the_lines_of_the_tables_as_they_are(capsys):
    with pytest.raises(SystemExit):
        train_dit.main(["--config", "configs/digits.py", "--help"])
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "--model.mixer {None,attention,gspn,compressed_gspn," in shown and ",gated_linear_attention,roll}" in shown
    assert "--diffusion.objective {ddpm,flow,x_prediction,mean_flow,clean}" in shown
    assert "--data.source {digits,folder,records,tfds,latents,stripes}" in shown
    assert "euler,heun,sde,mean_flow,small steps}" in shown and "precision,recall,fd_dinov2,clip,glare}" in shown
    with pytest.raises(ConfigError, match=r"sampler.name must be one of \('small steps', 'euler', 'heun', 'sde', None"):
        Config("r", diffusion=DiffusionConfig(objective="clean"), sampler=SamplerConfig(name="ddpm"))
    with pytest.raises(ConfigError, match=r"mixer_options must be some of shift=INT .*, found 'shift=x'"):
        models.resolve(ModelConfig(preset="DiT-S/2", mixer="roll", mixer_options=("shift=x",)))


@pytest.mark.parametrize("layout", ["dit", pytest.param("paper", marks=pytest.mark.slow)])
def test_a_float32_parameter_stays_so_where_blocks_compute_in_bfloat16(layout):
    """Of a mixer under fsdp, in either layout: `toys.Roll` looks."""
    task = DiffusionTask(toys.config("r", FSDP, precision=toys.BFLOAT16, layout=layout))
    mesh = made_of(FSDP)
    batch = {"image": jnp.zeros((8, 8, 8, 1), jnp.uint8), "label": jnp.zeros(8, jnp.int32)}

    def gradient(params):
        with fsdp.sharded_blocks(mesh, "bfloat16"):
            return make_gradient(task, mesh)(params, batch, jax.random.key(0))

    text = jax.jit(gradient).lower(sharding.stored(task.shapes, mesh)).as_text()
    gathered = [line for line in text.splitlines() if "all_gather" in line and "stablehlo" in line]
    assert any("f32" in line and "bf16" not in line for line in gathered) and any("bf16" in line for line in gathered)


class Distillation(DiffusionTask):
    """The output and the last tokens of a frozen teacher of another width."""

    @property
    def teacher(self):
        return dataclasses.replace(self.config, model=dataclasses.replace(self.config.model, hidden=64))

    def frozen(self, mesh):
        return (fsdp.placed(lambda: models.init(self.teacher, 7), models.abstract(self.teacher)[1], mesh),)

    def loss(self, params, batch, key, teacher):
        x = jax.random.normal(key, batch["image"].shape)
        t, y = jnp.full(len(x), 500.0), batch["label"]
        found, tokens = models.apply(self._abstract[0], params, x, t, y, features=(1,))
        wanted, others = models.apply(models.abstract(self.teacher)[0], teacher, x, t, y, features=(1,))
        near = jnp.square(tokens[1] - others[1][..., : tokens[1].shape[-1]]).mean()
        return jnp.square(found - wanted).mean() + near, {"near": near}


@pytest.mark.slow
def test_two_stacks_of_different_width_are_those_of_one_device():
    batch = {"image": jnp.zeros((8, 8, 8, 1), jnp.uint8), "label": jnp.arange(8) % 2}

    def run(config):
        task, mesh = Distillation(toys.config("r", config)), made_of(config)
        (teacher,) = task.frozen(mesh)

        def gradient(params, batch, teacher):
            with fsdp.sharded_blocks(mesh, "float32"):
                return make_gradient(task, mesh)(params, batch, jax.random.key(1), teacher)

        split = sharding.batch_sharding(mesh)
        where = sharding.param_shardings(task.shapes, mesh)
        params = jax.jit(lambda: sharding.pad(task.init(jax.random.key(0)), task.shapes, mesh), out_shardings=where)()
        (loss, _), grads = jax.jit(gradient, in_shardings=(where, split, None))(params, batch, teacher)
        own = jax.tree.map(lambda a, s: np.asarray(a)[tuple(map(slice, s.shape))], grads, task.shapes)
        return float(loss), own

    loss, gradients = run(ONE)
    for mesh in (FSDP, TENSOR):
        found, others = run(mesh)
        assert found == pytest.approx(loss, rel=1e-5)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), others, gradients)


class TwoParts(nnx.Module):
    """Embeds {"class": int [B], "size": float [B, 2]}."""

    def __init__(self, hidden: int, *, rngs: nnx.Rngs):
        self.rows = nnx.Param(NORMAL(rngs.params(), (3, hidden), jnp.float32), **logical(None, "embed"))
        self.linear = nnx.Linear(2, hidden, rngs=rngs)

    def __call__(self, condition):
        return self.rows[...][condition["class"]] + self.linear(condition["size"])


def test_a_condition_is_a_tree_that_the_network_embeds():
    """Guidance of scale 2 is twice the conditional output minus the unconditional one, of which the null is told."""
    config = toys.config("r", ONE)
    graphdef, _ = models.abstract(config, embedder=TwoParts)
    params = jax.tree.map(lambda a: a + 0.03, models.init(config, 0, embedder=TwoParts))
    condition = {"class": jnp.array([0, 1, 1]), "size": jnp.array([[1.0, 2.0], [3.0, 4.0], [0.0, 1.0]])}
    null = {"class": 2, "size": jnp.zeros(2)}

    def denoise(x, t, condition):
        return models.apply(graphdef, params, x, t, condition)

    keys = jax.random.split(jax.random.key(0), 3)
    settings = SamplerConfig(steps=1, guidance_scale=2.0, name="euler")
    run = functools.partial(draw, settings, config.diffusion, denoise, (8, 8, 1), null=null, learn_sigma=False)
    found = jax.jit(run)(condition, keys)
    x = jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, 0), (8, 8, 1)))(keys)
    nothing = {"class": jnp.full(3, 2), "size": jnp.zeros((3, 2))}
    told, untold = (jax.jit(denoise)(x, jnp.full(3, 1000.0), which) for which in (condition, nothing))
    np.testing.assert_allclose(found, 2 * told - untold, atol=2e-5)  # one step from t = 1 gives x_0
    dropped = objectives.drop_condition(jax.random.key(0), condition, 0.999999, null)
    jax.tree.map(np.testing.assert_array_equal, dropped, nothing)


@pytest.mark.parametrize("layout", ["paper", pytest.param("dit", marks=pytest.mark.slow)])
def test_features_are_the_tokens_after_a_block(layout):
    """The last of them are what the final layer is given; asking changes nothing."""
    config = toys.config("r", ONE, layout=layout)
    graphdef, _ = models.abstract(config)
    params = jax.tree.map(lambda a: a + 0.03, models.init(config, 0))
    inputs = jnp.ones((2, 8, 8, 1)), jnp.full(2, 300.0), jnp.array([0, 1])
    blocks = models.resolve(config.model).blocks
    apply = functools.partial(models.apply, graphdef)
    output, found = jax.jit(functools.partial(apply, features=(blocks - 1, 0)))(params, *inputs)
    np.testing.assert_allclose(output, jax.jit(apply)(params, *inputs), atol=1e-5)
    assert {i: tokens.shape for i, tokens in found.items()} == {0: (2, 4, 4, 32), blocks - 1: (2, 4, 4, 32)}
    model = nnx.merge(graphdef, params)
    condition = model.time_embed(inputs[1]) + model.label_embed(inputs[2])
    again = models.denoisers.unpatchify(model.final(found[blocks - 1], condition), 2)
    np.testing.assert_allclose(again, output, atol=1e-5)
    with pytest.raises(ValueError, match=r"features must be numbers of blocks in 0\.\."):
        models.apply(graphdef, params, *inputs, features=(blocks,))
