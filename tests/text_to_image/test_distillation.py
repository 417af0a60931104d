"""Distillation: the loss is that of its parts, gradients are of the layers alone, runs go on to the bit on any mesh,
and what is exported is read; mistakes get a sentence before anything is trained."""

import dataclasses
import itertools
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from gspn_jax import cli, doctor, text_to_image, unet
from gspn_jax.config import ConfigError, MeshConfig
from gspn_jax.data.set_metadata import METADATA
from gspn_jax.diffusion.scheduler_config import SchedulerConfig, alphas_cumprod
from gspn_jax.parallel import sharding
from gspn_jax.runs import checkpoints
from gspn_jax.runs.checkpoints import CheckpointError
from gspn_jax.text_to_image import distillation, gspn_layers, layer_files
from gspn_jax.text_to_image.config import LayersConfig, LossConfig
from gspn_jax.text_to_image.distillation import LayersTask
from gspn_jax.text_to_image.folder import load_folder
from gspn_jax.text_to_image.gspn_layers import LayerOptions
from gspn_jax.training import start
from gspn_jax.training.loop import Interrupted
from gspn_jax.training.signals import Stop
from gspn_jax.training.state import abstract_state
from gspn_jax.training.step import make_gradient
from tests.text_to_image import distilling
from tests.text_to_image.tiny_folder import XL

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module", autouse=True)
def small():
    """One device, unless a test takes more."""
    make = sharding.make_mesh
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "make_mesh", lambda config, devices=None: make(config, devices or jax.devices()[:1]))
        yield make


def distill(config: LayersConfig) -> None:
    """Optax mixes types that JAX would promote."""
    with jax.numpy_dtype_promotion("standard"):
        distillation.distill(config)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return distilling.write_set(tmp_path_factory.mktemp("distilling"))


@pytest.fixture(scope="module")
def run(prepared, tmp_path_factory) -> LayersConfig:
    """The config of a finished run of four steps."""
    config = distilling.config(tmp_path_factory.mktemp("distilled") / "run", *prepared)
    distill(config)
    return config


def lines(run_dir):
    return [json.loads(line) for line in (pathlib.Path(run_dir) / "metrics.jsonl").read_text().splitlines()]


def everything(config: LayersConfig):
    """All that the checkpoint of step 4 has: parameters, optimizer, averages."""
    mesh = sharding.make_mesh(config.mesh)
    target = abstract_state(LayersTask(config), mesh)
    return checkpoints.read_items(checkpoints.folder(config.run_dir) / "4", target.items())


def begun(task: LayersTask, mesh):
    """Parameters of step 0."""
    given = task.given()
    return start.begin(task, given, start.plan(given, task.shapes), mesh)


def batch_of(task: LayersTask, size: int = 2):
    with task.loader(task.source(), seed=1) as loader:
        return {name: jnp.asarray(value[:size]) for name, value in next(loader).items()}


@pytest.mark.slow
def test_the_loss_is_that_of_two_predictions_and_the_outputs_of_all_layers(prepared):
    """Put together of what `unet.apply` gives with and without a mixer; timesteps and noise are those of the key."""
    config = dataclasses.replace(distilling.config("r", *prepared), loss=LossConfig(0.9, 0.4, 0.3))
    task = LayersTask(config)
    params = jax.jit(task.init)(jax.random.key(0))
    (frozen,) = task.frozen(sharding.make_mesh(config.mesh))
    batch, key = batch_of(task), jax.random.key(5)
    loss, terms = jax.jit(task.loss)(params, batch, key, frozen)

    time_key, noise_key = jax.random.split(key)
    times = np.asarray(jax.random.randint(time_key, (2,), 0, 1000))
    noise = np.asarray(jax.random.normal(noise_key, batch["image"].shape), np.float64)
    model = load_folder(prepared[0])
    alpha = alphas_cumprod(SchedulerConfig.from_json(model.scheduler))[times][:, None, None, None]
    clean = np.asarray(batch["image"], np.float64)
    x = np.sqrt(alpha) * clean + np.sqrt(1 - alpha) * noise
    target = np.sqrt(alpha) * noise - np.sqrt(1 - alpha) * clean  # the tiny folder is one of v-prediction
    context = batch["context"].astype(jnp.float32)
    (teacher, attended), (student, mixed) = (
        jax.jit(
            lambda x, mixer=mixer: unet.apply_with_features(
                model.unet, model.unet_config, x, times, context, mixer=mixer
            )
        )(jnp.asarray(x, jnp.float32))
        for mixer in (None, gspn_layers.mixer(params, model.unet_config, config.model.gspn))
    )

    def mean_square(one, other):
        return np.square(np.asarray(one, np.float64) - np.asarray(other, np.float64)).mean()

    assert len(attended) == 2
    truth = {
        "noise": mean_square(student, target),
        "teacher": mean_square(student, teacher),
        "features": np.mean([mean_square(mixed[name], attended[name]) for name in attended]),
    }
    for name, value in truth.items():
        assert float(terms[name]) == pytest.approx(value, rel=1e-5), name
    weighted = 0.9 * truth["noise"] + 0.4 * truth["teacher"] + 0.3 * truth["features"]
    assert float(loss) == pytest.approx(weighted, rel=1e-5)


def test_a_run_trains_the_layers_alone_and_says_what_of(run, prepared, caplog):
    task = LayersTask(run)
    found = [line for line in lines(run.run_dir) if "loss" in line]
    assert [line["step"] for line in found] == [1, 2, 3, 4]
    for line in found:
        assert line["loss"] == pytest.approx(line["noise"] + 0.5 * line["teacher"] + 0.5 * line["features"], rel=1e-5)
        assert line["learning_rate"] == pytest.approx(1e-3)
    saved = everything(run)
    assert saved["params"].keys() == task.shapes.keys() and len(task.shapes) == 2 * 7
    first = begun(task, sharding.make_mesh(run.mesh))
    changed = [name for name in first if not np.array_equal(first[name], saved["params"][name])]
    assert set(changed) == task.shapes.keys()
    model = load_folder(prepared[0])
    table = (pathlib.Path(run.run_dir) / "init_from.txt").read_text()
    for name, value in first.items():
        taken = ".to_out." in name
        assert not taken or np.array_equal(value, model.unet[name])
        assert any(line.startswith(name) and line.endswith("copied") == taken for line in table.splitlines()), name


@pytest.mark.slow
def test_a_run_that_goes_on_ends_with_the_same_bits_and_knows_its_teacher(run, prepared, tmp_path, monkeypatch):
    """After a signal in step 3, with the model's folder and the captions elsewhere."""
    model, captions = (shutil.copytree(path, tmp_path / path.name) for path in prepared)
    part, calls = distilling.config(tmp_path / "part", *prepared), itertools.count(1)
    with monkeypatch.context() as patch, pytest.raises(Interrupted, match="saved at step 3"):
        patch.setattr(Stop, "asked", lambda self: "SIGTERM" if next(calls) == 3 else None)
        distill(part)
    moved = distilling.config(tmp_path / "part", model, captions)
    distill(moved)
    jax.tree.map(np.testing.assert_array_equal, everything(run), everything(moved))
    with pytest.raises(CheckpointError, match=r"was started with loss\.noise 1\.0, found 2\.0"):
        distill(dataclasses.replace(moved, loss=LossConfig(noise=2.0)))
    weights = model / "unet/diffusion_pytorch_model.safetensors"
    changed = bytearray(weights.read_bytes())
    changed[-1] ^= 1
    weights.write_bytes(changed)
    with pytest.raises(CheckpointError, match=r"was started with model\.unet_sha256 '[0-9a-f]{64}', found"):
        distill(moved)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [MeshConfig(2, 1, 1), MeshConfig(1, 2, 1)], ids=["data 2", "fsdp 2"])
def test_a_mesh_gives_the_same_gradient_and_splits_the_teacher(small, prepared, mesh):
    config = dataclasses.replace(distilling.config("r", *prepared), mesh=mesh)
    batch, key = None, jax.random.key(3)
    found = []
    for devices in (1, 2):
        own = config if devices == 2 else dataclasses.replace(config, mesh=MeshConfig())
        task, where = LayersTask(own), small(own.mesh, jax.devices()[:devices])
        params, (frozen,) = begun(task, where), task.frozen(where)
        batch = batch_of(task) if batch is None else batch
        found.append(_gradient(task, where, params, frozen, batch, key))
    split = [value for value in frozen.values() if not value.sharding.is_fully_replicated]
    assert (len(split) > 2) == (mesh.fsdp == 2)
    (one, losses), (other, again) = found
    for name, own in LayersTask(config).shapes.items():
        value, truth = (np.asarray(part[name])[tuple(map(slice, own.shape))] for part in (other, one))
        assert np.abs(value - truth).max() <= 1e-5 * max(np.abs(truth).max(), 1e-3), name
    assert losses == pytest.approx(again, rel=1e-5)


def _gradient(task, mesh, params, frozen, batch, key):
    from gspn_jax.parallel import fsdp

    def gradient(params, batch, key, frozen):
        with fsdp.sharded_blocks(mesh, "float32"):
            return make_gradient(task, mesh)(params, batch, key, frozen)

    placed = jax.device_put(batch, sharding.batch_sharding(mesh))
    (loss, _), gradients = jax.jit(gradient)(params, placed, key, frozen)
    return gradients, float(loss)


def test_what_is_exported_is_read(run, tmp_path, capsys):
    output = tmp_path / "layers.safetensors"
    text_to_image.main(["export", "--run", run.run_dir, "--output", str(output)])
    assert "step 4, the parameters themselves, in" in capsys.readouterr().out
    layers = layer_files.load(output, distilling.SMALL)
    saved = everything(run)["params"]
    assert layers.options == run.model.gspn and layers.params.keys() == saved.keys()
    for name, value in saved.items():
        np.testing.assert_array_equal(layers.params[name], value)
    assert layers.about["step"] == 4 and layers.about["images_seen"] == 8 and len(layers.about["unet_sha256"]) == 64
    with pytest.raises(SystemExit):
        text_to_image.main(["export", "--run", run.run_dir, "--output", str(output)])
    assert "--output must be a new .safetensors file" in capsys.readouterr().err


@pytest.mark.slow
def test_layers_of_an_sdxl_are_distilled_exported_and_drawn_with(tmp_path, caplog):
    """From captions to an image, with two text towers, pooled states and sizes; and what is said of another U-Net."""
    model, captions = distilling.write_set(tmp_path, XL)
    options = LayerOptions(form="qkv", proxy_ratio=4, chunks=(2,))
    config = distilling.config(tmp_path / "run", model, captions, gspn=options, ema_decays=(0.9,))
    distill(config)
    logged = [line for line in lines(config.run_dir) if "loss" in line]
    assert [line["step"] for line in logged] == [1, 2, 3, 4]
    for line in logged:
        assert min(line["noise"], line["teacher"], line["features"]) > 0
    task = LayersTask(config)
    assert len(gspn_layers.attention_widths(task.unet_config)) == 2 * 3 + 2
    first, saved = begun(task, sharding.make_mesh(config.mesh)), everything(config)["params"]
    assert all(np.abs(saved[name] - first[name]).max() > 0 for name in first)
    taken = [name for name in first if any(part in name for part in ("to_q", "to_k", "to_v", "to_out"))]
    teacher = load_folder(model).unet
    assert len(taken) == 8 * 5 and all(np.array_equal(first[name], teacher[name]) for name in taken)

    layers = tmp_path / "layers.safetensors"
    text_to_image.main(["export", "--run", config.run_dir, "--output", str(layers)])
    half = shutil.copytree(model, tmp_path / "half")
    tensors = load_file(half / "unet/diffusion_pytorch_model.safetensors")
    save_file({name: value.astype(np.float16) for name, value in tensors.items()},
              half / "unet/diffusion_pytorch_model.safetensors")  # fmt: skip
    flags = f"--prompt dog --size 16 24 --steps 2 --sampler ddim --mixer gspn --gspn-layers {layers} --dtype float32"
    said = "were distilled from a U-Net of another file"
    for folder in (model, half):
        caplog.clear()
        text_to_image.main([*flags.split(), "--model", str(folder), "--output", str(tmp_path / f"{folder.name}.png")])
        assert (said in caplog.text) == (folder == half)
    one, other = (np.asarray(Image.open(tmp_path / f"{name}.png"), int) for name in ("model", "half"))
    assert one.shape == (16, 24, 3) and one.std() > 20
    assert np.abs(one - other).mean() < 1  # weights rounded to half precision; another model is tens of levels away


def test_a_mistake_gets_one_sentence_before_anything_is_trained(prepared, tmp_path, capsys, monkeypatch):
    model, captions = prepared
    other = shutil.copytree(captions, tmp_path / "other")
    about = json.loads((other / METADATA).read_text())
    about["files"]["vae/config.json"] = "0" * 64
    (other / METADATA).write_text(json.dumps(about))
    monkeypatch.chdir(tmp_path)
    given = {"model.folder": model, "data.path": captions, "run-dir": "run", "model.gspn.proxy-ratio": 4}
    for changes, said in (
        ({"model.folder": "absent"}, "absent/unet"),
        ({"data.path": "absent"}, "data.path must be a folder written by `python -m gspn_jax.prepare captions`"),
        ({"data.path": other}, "found a set that was made with another vae/config.json: prepare the captions again"),
        ({"model.gspn.proxy-ratio": 3}, "the proxy_ratio of GSPN layers must divide the widths of the U-Net, found 3"),
        ({"mesh.tensor": 2}, "mesh.tensor must be 1 for distillation, found 2"),
        ({"train.sample-every": 5}, "train.sample_every must be 0 for distillation, found 5"),
        ({"loss.noise": -1}, "loss.noise must be 0 or more, found -1"),
        ({"model.unet-sha256": "a"}, "model.unet_sha256 must be that of the U-Net in"),
    ):
        words = [f"--{name}={value}" for name, value in (given | changes).items()]
        with pytest.raises(SystemExit) as stopped:
            text_to_image.main(["distill", "--config", str(ROOT / "configs/gspn_sd15.py"), *words])
        found = " ".join(capsys.readouterr().err.replace("│", " ").split())
        assert stopped.value.code == 2 and said in found, found
        assert not pathlib.Path("run").exists()


def test_the_doctor_looks_at_a_distillation(prepared, tmp_path):
    config = distilling.config(tmp_path / "run", *prepared)
    assert isinstance(doctor.task_of(config), LayersTask)
    said = [finding.text for look in (doctor.beginning, doctor.files_of) for finding in look(config)]
    assert "4 tensors fit, 10 begin anew" in said[0] and "SHA-256" in said[1]


def test_the_recipe_is_the_references():
    config = cli.load_config(ROOT / "configs/gspn_sd15.py", LayersConfig)
    optimizer = config.optimizer
    assert (optimizer.learning_rate, optimizer.final_learning_rate, optimizer.weight_decay) == (1e-4, 1e-4, 0.0)
    assert (optimizer.b1, optimizer.b2, config.train.batch_size) == (0.9, 0.999, 96)
    assert dataclasses.astuple(config.loss) == (1.0, 0.5, 0.5) and config.train.compute == "bfloat16"
    shapes = gspn_layers.shapes(unet.STABLE_DIFFUSION_1, config.model.gspn)
    skips = 4 * sum(width**2 // 8 for width in gspn_layers.attention_widths(unet.STABLE_DIFFUSION_1).values())
    assert sum(int(np.prod(own.shape)) for own in shapes.values()) == 51_122_944 - skips  # the released form has them
    with pytest.raises(ConfigError, match="must define"):
        cli.load_config(ROOT / "configs/gspn_sd15.py")
