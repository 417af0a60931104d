"""A run that begins with other weights: each parameter comes from where its table says, and a part can be trained."""

import dataclasses
import json

import jax
import numpy as np
import optax
import pytest
from PIL import Image
from safetensors.numpy import save_file

from gspn_jax import convert, models
from gspn_jax.config import ConfigError, DataConfig, ModelConfig
from gspn_jax.models.parameters import by_path
from gspn_jax.parallel import sharding
from gspn_jax.runs import checkpoints
from gspn_jax.state_dict import WeightsError
from gspn_jax.training import start
from gspn_jax.training.diffusion import DiffusionTask
from gspn_jax.training.state import abstract_state
from gspn_jax.training.train import train
from gspn_jax.training.weights import class_rows
from tests.models.numpy_dit import random_state_dict
from tests.runs import saved
from tests.training import tiny

CLASSES = ("7", "new", "3")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run on digits, whose averages are the parameters plus their decays."""
    config = tiny.config(tmp_path_factory.mktemp("start") / "run", ema_decays=(0.01, 0.02))
    saved.save(config, 4)
    return config


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder of random images of three classes, two of which the run knows."""
    root, random = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for name in CLASSES:
        (root / name).mkdir()
        for i in range(8):
            Image.fromarray(random.integers(256, size=(8, 8), dtype=np.uint8)).save(root / name / f"{i}.png")
    return root


def average_of(config, step=None, **values):
    """The first average of a run's checkpoint, by path, from one device."""
    step, found = checkpoints.read_config(config.run_dir, step)
    return by_path(jax.device_get(checkpoints.restore_params(config.run_dir, step, found, saved.mesh_of(), **values)))


def begun(config, mesh):
    """(parameters in their own shapes, {path: its line}) of a new run of `config`."""
    task = DiffusionTask(config)
    given = task.given()
    lines = start.plan(given, task.shapes)
    params = start.begin(task, given, lines, mesh)
    wanted = sharding.stored(task.shapes, mesh)
    assert all(
        jax.tree.leaves(jax.tree.map(lambda a, s: (a.shape, a.sharding) == (s.shape, s.sharding), params, wanted))
    )
    own = jax.tree.map(lambda a, s: np.asarray(a)[tuple(map(slice, s.shape))], params, task.shapes)
    return by_path(own), {line.path: line for line in lines}


def test_rows_of_classes_go_by_name_or_by_number():
    def rows(theirs, ours, fingerprint="f"):
        return class_rows({"class_names": theirs, "fingerprint": fingerprint}, ours)

    assert rows(["a", "b"], ["b", "c", "a"]).there == (1, None, 0, 2)
    assert rows(["0", "1", "2"], ["0", "1", "2", "3"]).there == (0, 1, 2, None, 3)  # grown
    assert rows(["0", "1", "2"], ["2"]).there == (2, 3)  # shrunk
    assert rows(["0", "1"], ["5", "6"]).there == (None, None, 2)  # replaced
    assert rows(["0", "1"], ["cat", "dog"], "unknown").there == (0, 1, 2)  # an import knows no names
    said = "0 of 2 classes and the null class copied, 2 anew ('5', '6')"
    assert rows(["3", "4"], ["5", "6"]).said == said


@pytest.mark.parametrize("mesh", [(1, 1, 1), (1, 8, 1)])
def test_other_classes_another_mixer_and_another_size_keep_what_they_share(run, images, mesh):
    config = dataclasses.replace(
        run,
        run_dir="unused",
        init_from=run.run_dir,
        model=dataclasses.replace(run.model, mixer="gspn", heads=None),
        data=DataConfig(source="folder", path=str(images), image_size=16, channels=1, num_classes=3, in_memory=True),
    )
    found, lines = begun(config, saved.mesh_of(*mesh))
    theirs, fresh = average_of(run), by_path(jax.device_get(models.init(config, jax.random.key(0))))
    for path, value in found.items():
        if path == "label_embed/embedding":
            wanted = np.stack([theirs[path][3], theirs[path][7], value[2], theirs[path][10]])
            drawn = (fresh[path] - fresh[path].mean()) / fresh[path].std()
            wider = np.sqrt(value.shape[1] / 10)  # eleven rows differ in ten directions
            assert wider > 1.2
            around = theirs[path].mean(0) + wider * theirs[path].std(0) * drawn[2]
            np.testing.assert_allclose(value[2], around, rtol=1e-4, atol=1e-6)
            assert lines[path].why == "2 of 3 classes and the null class copied, 1 anew ('new')"
        elif "mixer" in path:
            np.testing.assert_allclose(wanted := value, fresh[path], rtol=1e-6)
            assert lines[path] == (path, "anew", "mixer gspn, attention there")
        else:
            wanted = theirs[path]
            assert lines[path] == (path, "copied", "")
        np.testing.assert_array_equal(value, wanted, err_msg=path)


def test_what_does_not_fit_is_said_and_what_can_begin_anew_does(run):
    def lines(**changes):
        config = dataclasses.replace(run, init_from=run.run_dir, **changes)
        task = DiffusionTask(config)
        return {line.path: line for line in start.plan(task.given(), task.shapes)}

    with pytest.raises(WeightsError, match=r"found .* of shape \(\d.*step 4, EMA 0.01, where the config has \(.*36"):
        lines(model=dataclasses.replace(run.model, hidden=36))
    flow = lines(diffusion=dataclasses.replace(run.diffusion, objective="ddpm"))
    assert flow["final/linear/kernel"].why == "objective ddpm, flow there"
    patch = lines(model=dataclasses.replace(run.model, patch=4))
    assert patch["patch_embed/proj/kernel"].why == "of shape (4, 32) there"
    heads = lines(model=dataclasses.replace(run.model, heads=8))
    assert heads["trunk/blocks/mixer/qkv/kernel"].why == "8 heads, 4 there"
    mean = lines(diffusion=dataclasses.replace(run.diffusion, objective="mean_flow"))
    assert mean["time_embed/fc1/kernel"].why == "times in another unit"
    assert (mean["span_embed/fc1/kernel"].origin, mean["label_embed/embedding"].origin) == ("anew", "copied")
    modern = lines(model=dataclasses.replace(run.model, mlp="swiglu", norm="rms", rope=True))
    assert modern["trunk/blocks/mlp/fc2/kernel"].why == "mlp swiglu, gelu there"
    assert modern["trunk/blocks/norm1/scale"].origin == "anew"
    assert modern["trunk/blocks/mixer/qkv/kernel"].origin == "copied"
    paper = lines(model=ModelConfig(preset="GSPN-S/2", hidden=32, depth=2))
    assert {line.origin for path, line in paper.items() if path.startswith("trunk")} == {"anew"}
    assert paper["time_embed/fc1/kernel"].origin == "copied"


@pytest.fixture
def one_device(monkeypatch):
    """Runs have one device, for which they compile sooner."""
    make = sharding.make_mesh
    monkeypatch.setattr(sharding, "make_mesh", lambda config, devices=None: make(config, devices or jax.devices()[:1]))


@pytest.mark.usefixtures("one_device")
def test_a_run_begins_with_it_and_trains_a_part(run, tmp_path):
    config = tiny.config(
        tmp_path / "run", steps=2, log_every=1, save_every=1, keep_every=1, ema_decays=(0.5,), only="mixer"
    )
    config = dataclasses.replace(config, init_from=run.run_dir)
    train(config)
    table = (tmp_path / "run" / start.TABLE).read_text()
    assert table.splitlines()[0] == f"beginning with the weights of {run.run_dir}, step 4, EMA 0.01"
    assert len(table.splitlines()) == 1 + len(jax.tree.leaves(DiffusionTask(config).shapes))

    theirs, ours, average = average_of(run), average_of(config, ema_decay=0.0), average_of(config)
    for path, value in ours.items():
        same = value.tobytes() == theirs[path].tobytes()
        assert same == ("mixer" not in path), path  # frozen to the bit, in the average too
        assert same == (average[path].tobytes() == theirs[path].tobytes()), path
    qkv = "trunk/blocks/mixer/qkv/kernel"  # avg <- avg + 9/10 (params - avg) at the first step, from the loaded weights
    one = average_of(config, 1, ema_decay=0.0)[qkv].astype(np.float64)
    np.testing.assert_allclose(average_of(config, 1)[qkv], 0.1 * theirs[qkv] + 0.9 * one, rtol=1e-6)
    state = abstract_state(DiffusionTask(config), saved.mesh_of())
    moments = optax.tree_utils.tree_get(state.opt_state, "mu")
    assert set(by_path(moments)) == {path for path in ours if "mixer" in path}  # and no moments of the rest

    with pytest.raises(checkpoints.CheckpointError, match=r"was started with train\.only 'mixer', found None"):
        train(dataclasses.replace(config, train=dataclasses.replace(config.train, steps=4, only=None)))


@pytest.mark.slow
@pytest.mark.usefixtures("one_device")
def test_a_part_goes_on_to_the_bit(run, tmp_path, caplog):
    """From a checkpoint without moments of the rest, whatever init_from says by then."""

    def trained(name, steps, init_from):
        config = tiny.config(tmp_path / name, steps=steps, save_every=2, only="mixer")
        config = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, decay_steps=4))
        train(dataclasses.replace(config, init_from=init_from))
        return average_of(config)

    whole = trained("whole", 4, run.run_dir)
    trained("parts", 2, run.run_dir)
    parts = trained("parts", 4, "/gone")
    assert "has checkpoints and goes on from them: init_from is for a new run" in caplog.text
    jax.tree.map(np.testing.assert_array_equal, parts, whole)


@pytest.mark.parametrize("as_run", [False, True])
def test_an_import_and_a_file_of_a_dit_train_on(tmp_path, monkeypatch, as_run):
    sizes = {"hidden": 16, "depth": 2, "patch": 2, "channels": 1, "out_channels": 2, "num_classes": 1000, "grid": 4}
    monkeypatch.setitem(models.PRESETS, "DiT-tiny/2", models.Preset("dit", "attention", 16, 2, 2, 2))
    tensors = random_state_dict(**sizes)
    path = tmp_path / "dit.safetensors"
    save_file(tensors, path)
    if as_run:
        convert.main(["import", "--weights", str(path), "--output", str(tmp_path / "run")])
        path = tmp_path / "run"
    config = tiny.config()
    config = dataclasses.replace(
        config,
        init_from=str(path),
        model=ModelConfig(preset="DiT-tiny/2"),
        diffusion=dataclasses.replace(config.diffusion, objective="ddpm"),
    )
    found, lines = begun(config, saved.mesh_of())
    truth = tensors["blocks.1.mlp.fc1.weight"].T
    np.testing.assert_array_equal(found["trunk/blocks/mlp/fc1/kernel"][1], truth)
    np.testing.assert_array_equal(
        found["label_embed/embedding"], tensors["y_embedder.embedding_table.weight"][[*range(10), 1000]]
    )
    assert lines["label_embed/embedding"].why == "10 of 10 classes and the null class copied"
    if not as_run:  # a run says what it is
        flow = dataclasses.replace(config, diffusion=dataclasses.replace(config.diffusion, objective="flow"))
        with pytest.raises(ConfigError, match=r"a SiT has a DiT's names.*gspn_jax.convert import takes flags"):
            DiffusionTask(flow).given()


@pytest.mark.slow
def test_a_file_of_ours_is_what_its_run_was(run, tmp_path):
    convert.main(["export", "--run", run.run_dir, "--output", str(tmp_path / "out")])
    for path in (tmp_path / "out", tmp_path / "out" / "model.safetensors"):
        found, lines = begun(dataclasses.replace(run, init_from=str(path)), saved.mesh_of())
        assert {line.origin for line in lines.values()} == {"copied"}
        jax.tree.map(np.testing.assert_array_equal, found, average_of(run))


@pytest.mark.slow
@pytest.mark.usefixtures("one_device")
def test_a_folder_of_images_trains_without_classes(images, tmp_path):
    config = tiny.config(tmp_path / "run", steps=2, save_every=2)
    data = DataConfig(source="folder", path=str(images), channels=1, num_classes=77, unconditional=True, in_memory=True)
    config = dataclasses.replace(config, data=data)
    assert config.data.num_classes == 1
    train(config)
    _, meta = checkpoints.read_meta(config.run_dir)
    assert meta["class_names"] == [""] and checkpoints.read_config(config.run_dir)[1].data == data
    source = DiffusionTask(config).source()
    assert len(source) == 24 and source[23]["label"] == 0
    line = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    table = average_of(config)["label_embed/embedding"]
    assert table.shape == (2, 32) and np.isfinite(line["loss"])


def test_any_source_can_be_without_classes_and_then_has_no_guidance():
    config = dataclasses.replace(tiny.config(), data=DataConfig(unconditional=True))
    source = DiffusionTask(config).source()
    assert len(source) == 1797 and source[5]["label"] == 0 and source.class_names == ("",)
    with pytest.raises(ConfigError, match=r"guidance_scale must be 1 with data.unconditional.* found 2.0"):
        dataclasses.replace(config, sampler=dataclasses.replace(config.sampler, guidance_scale=2.0))
