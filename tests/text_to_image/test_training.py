"""Training of a U-Net: the loss is that of its parts, with captions dropped; a run begins with the folder's weights or
afresh, and its folder draws. Models without an autoencoder are of pixels."""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from gspn_jax import cli, text_to_image, unet
from gspn_jax.autoencoder import PIXELS, Autoencoder, TiledAutoencoder
from gspn_jax.config import ConfigError, MeshConfig, OptimizerConfig, TrainConfig
from gspn_jax.diffusion.scheduler_config import SchedulerConfig, alphas_cumprod
from gspn_jax.parallel import sharding
from gspn_jax.runs import checkpoints
from gspn_jax.text_to_image.conditions import null_condition
from gspn_jax.text_to_image.config import CaptionsConfig, LayersConfig, NetworkConfig, NoiseConfig, UNetTrainingConfig
from gspn_jax.text_to_image.folder import load_folder
from gspn_jax.text_to_image.training import UNetTask, shapes_of, train
from gspn_jax.training.step import make_gradient
from tests.text_to_image import distilling
from tests.text_to_image.tiny_folder import write_folder, write_json

ROOT = pathlib.Path(__file__).parents[2]
ONE_DEVICE = MeshConfig()
OF_PIXELS = (dataclasses.replace(distilling.SMALL, in_channels=3, out_channels=3), distilling.TINY[1])


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """One device, unless a test takes more."""
    make = sharding.make_mesh
    monkeypatch.setattr(sharding, "make_mesh", lambda config, devices=None: make(config, devices or jax.devices()[:1]))
    return make


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """(folder of a model of pixels, its set of captions)."""
    return distilling.write_set(tmp_path_factory.mktemp("training"), OF_PIXELS, without_vae)


def without_vae(folder: pathlib.Path) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    write_json(folder / "model_index.json", index | {"vae": [None, None]})
    for path in (folder / "vae").iterdir():
        path.unlink()
    (folder / "vae").rmdir()


def config_of(run_dir, prepared, *, start="folder", dropout=0.5, mesh=ONE_DEVICE, **train_) -> UNetTrainingConfig:
    settings = {
        "steps": 2,
        "batch_size": 2,
        "precision": "params=float32,compute=float32",
        "ema_decays": (0.5,),
        "log_every": 1,
        "save_every": 2,
    }
    return UNetTrainingConfig(
        run_dir=str(run_dir),
        model=NetworkConfig(str(prepared[0]), start),
        data=CaptionsConfig(str(prepared[1])),
        diffusion=NoiseConfig(dropout),
        optimizer=OptimizerConfig(learning_rate=1e-3, final_learning_rate=1e-3),
        mesh=mesh,
        train=TrainConfig(**settings | train_),
    )


def batch_of(task: UNetTask, size: int):
    with task.loader(task.source(), seed=1) as loader:
        return {name: jnp.asarray(value[:size]) for name, value in next(loader).items()}


@pytest.mark.slow
def test_the_loss_is_that_of_noised_images_some_of_whose_captions_are_dropped(prepared):
    """Put together in float64 around `unet.apply`; which are dropped, timesteps and noise are those of the key."""
    task = UNetTask(config_of("r", prepared, batch_size=6))
    model = load_folder(prepared[0])
    (null,) = task.frozen(sharding.make_mesh(MeshConfig()))
    batch, key = batch_of(task, 6), jax.random.key(5)
    loss, _ = jax.jit(task.loss)(model.unet, batch, key, null)

    drop_key, time_key, noise_key = jax.random.split(key, 3)
    dropped = np.asarray(jax.random.bernoulli(drop_key, 0.5, (6,)))
    assert 0 < dropped.sum() < 6
    times = np.asarray(jax.random.randint(time_key, (6,), 0, 1000))
    noise = np.asarray(jax.random.normal(noise_key, batch["image"].shape), np.float64)
    alpha = alphas_cumprod(SchedulerConfig.from_json(model.scheduler))[times][:, None, None, None]
    clean = np.asarray(batch["image"], np.float64)
    x = np.sqrt(alpha) * clean + np.sqrt(1 - alpha) * noise
    empty = null_condition(model.texts, None, zero=False)["context"]
    context = np.where(dropped[:, None, None], empty, np.asarray(batch["context"], np.float32))
    output = jax.jit(lambda x, context: unet.apply(model.unet, model.unet_config, x, times, context))(
        jnp.asarray(x, jnp.float32), jnp.asarray(context, jnp.float32)
    )
    target = np.sqrt(alpha) * noise - np.sqrt(1 - alpha) * clean  # the tiny folder is one of v-prediction
    # dropped states are rounded to the float16 of those that were prepared
    assert float(loss) == pytest.approx(np.square(np.asarray(output, np.float64) - target).mean(), rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [MeshConfig(2, 1, 1), MeshConfig(1, 2, 1)], ids=["data 2", "fsdp 2"])
def test_a_mesh_gives_the_same_gradient(small, prepared, mesh):
    found = []
    for own, count in ((MeshConfig(), 1), (mesh, 2)):
        where = small(own, jax.devices()[:count])
        task = UNetTask(config_of("r", prepared, mesh=own))
        frozen = task.frozen(where)
        params = sharding.put(dict(load_folder(prepared[0]).unet), task.shapes, where)
        batch = jax.device_put(batch_of(task, 2), sharding.batch_sharding(where))
        (loss, _), gradient = jax.jit(make_gradient(task, where))(params, batch, jax.random.key(3), *frozen)
        found.append((float(loss), jax.device_get(gradient)))
    (loss, truth), (again, gradient) = found
    assert again == pytest.approx(loss, rel=1e-5)
    for name, own in task.shapes.items():
        value = gradient[name][tuple(map(slice, own.shape))]
        assert np.abs(value - truth[name]).max() <= 1e-5 * max(np.abs(truth[name]).max(), 1e-2), name


@pytest.mark.slow
def test_a_run_begins_with_the_folder_and_its_folder_draws_pixels(prepared, tmp_path, capsys):
    config = config_of(tmp_path / "run", prepared)
    with jax.numpy_dtype_promotion("standard"):  # Optax mixes types
        train(config)
    assert "copied" in (tmp_path / "run/init_from.txt").read_text()
    output = tmp_path / "trained"
    text_to_image.main(["export", "--run", config.run_dir, "--output", str(output)])
    assert "step 2, EMA 0.5, in" in capsys.readouterr().out
    before, after = load_folder(prepared[0]), load_folder(output)
    mesh = sharding.make_mesh(MeshConfig())
    saved = checkpoints.restore_average(config.run_dir, 2, (0.5,), shapes_of(before.unet_config), mesh)
    assert after.unet.keys() == saved.keys()
    for name, value in saved.items():
        np.testing.assert_array_equal(after.unet[name], value)
        assert 0 < np.abs(after.unet[name] - before.unet[name]).max() < 2.1e-3, name  # two steps of AdamW
    about = json.loads((output / "unet/gspn_jax.json").read_text())
    assert about["images_seen"] == 4 and about["start"] == "folder"
    with pytest.raises(SystemExit):
        text_to_image.main(["export", "--run", config.run_dir, "--output", str(output)])
    assert "--output must be a new folder in a folder that exists" in capsys.readouterr().err

    flags = f"--model {output} --prompt dog --size 16 24 --steps 2 --sampler ddim --output {tmp_path / 'dog.png'}"
    text_to_image.main(flags.split())
    assert np.asarray(Image.open(tmp_path / "dog.png")).shape == (16, 24, 3)


def test_fresh_weights_predict_nothing_and_files_have_them_in_their_layout(prepared):
    task = UNetTask(config_of("r", prepared, start="fresh"))
    assert task.given() is None
    params = jax.jit(task.init)(jax.random.key(0))
    assert {name: value.shape for name, value in params.items()} == unet.shapes(task.unet_config)
    assert not any(params[name].any() for name in ("conv_out.weight", "mid_block.resnets.0.conv2.weight"))
    drawn = np.asarray(params["mid_block.resnets.0.conv1.weight"])
    assert drawn.std() == pytest.approx(1 / np.sqrt(3 * np.prod(drawn.shape[:3])), rel=0.05)
    again = unet.from_state_dict(unet.to_state_dict(params), task.unet_config)
    for name, value in params.items():
        np.testing.assert_array_equal(again[name], value)


def test_without_autoencoder_latents_are_pixels():
    images = np.random.default_rng(0).integers(0, 256, (3, 5, 7, 3), np.uint8)
    one = Autoencoder({}, PIXELS, batch_size=2, devices=jax.devices()[:1])
    moments = one.encode(images)
    np.testing.assert_allclose(moments[..., :3], images / 127.5 - 1, atol=1e-6)
    assert (moments[..., 3:] == -30).all()
    np.testing.assert_array_equal(one.decode(moments[..., :3]), images)
    np.testing.assert_array_equal(one.decode(moments[..., :3].astype(np.float16)), images)  # as a set keeps them
    tiled = TiledAutoencoder({}, PIXELS, 4, jax.devices()[0])
    np.testing.assert_array_equal(tiled.decode(tiled.encode(images[0])), images[0])


def test_a_mistake_gets_one_sentence(prepared, tmp_path, capsys):
    given = {"model.folder": prepared[0], "data.path": prepared[1], "run-dir": tmp_path / "run"}
    for changes, said in (
        ({"diffusion.caption-dropout": 1}, "diffusion.caption_dropout must be in [0, 1), found 1"),
        ({"model.folder": "absent"}, "absent/unet"),
        ({"mesh.tensor": 2}, "mesh.tensor must be 1 for a U-Net, found 2"),
        ({"init-from": "elsewhere"}, "init_from must be None for the task 'text-to-image U-Net', found 'elsewhere'"),
    ):
        words = [f"--{name}={value}" for name, value in (given | changes).items()]
        with pytest.raises(SystemExit) as stopped:
            text_to_image.main(["train", "--config", str(ROOT / "configs/unet_cifar10.py"), *words])
        found = " ".join(capsys.readouterr().err.replace("│", " ").split())
        assert stopped.value.code == 2 and said in found, found


def test_text_towers_must_see_as_many_tokens(tmp_path):
    from tests.text_to_image.tiny_folder import XL

    first, second = XL[1]
    folder = write_folder(tmp_path / "xl", XL[0], (dataclasses.replace(first, length=16), second))
    with pytest.raises(ConfigError, match="text towers must see as many tokens, found 16 and 77"):
        load_folder(folder)


def test_the_configs_of_the_small_run_belong_together():
    teacher = cli.load_config(ROOT / "configs/unet_cifar10.py", UNetTrainingConfig)
    layers = cli.load_config(ROOT / "configs/gspn_unet_cifar10.py", LayersConfig)
    assert teacher.run_dir == "runs/unet_cifar10" and layers.run_dir == "runs/gspn_unet_cifar10"
    assert teacher.data == layers.data and teacher.model.start == "fresh"
