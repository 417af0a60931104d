"""Training: the loss is that of its formula, runs go on to the bit, and evaluations are those of the weights."""

import contextlib
import dataclasses
import io
import itertools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gspn_jax.classify import main, weights
from gspn_jax.classify.compare import compare
from gspn_jax.classify.config import AugmentConfig, ClassifyConfig
from gspn_jax.classify.network import Network
from gspn_jax.classify.task import ClassificationTask
from gspn_jax.config import ConfigError, MeshConfig
from gspn_jax.data.augment.crops import evaluation_crop
from gspn_jax.data.folder import FolderSource
from gspn_jax.models.classifier import MIXERS
from gspn_jax.models.scan_mixer import ScanOptions
from gspn_jax.parallel import sharding
from gspn_jax.runs import checkpoints
from gspn_jax.runs.checkpoints import CheckpointError
from gspn_jax.state_dict import WeightsError
from gspn_jax.training import start
from gspn_jax.training.loop import Interrupted
from gspn_jax.training.signals import Stop
from gspn_jax.training.state import abstract_state
from gspn_jax.training.train import train_task
from tests.classify import tiny

EVALUATION_BATCHES = 3
"""Of 8 of 21 images; each asks for signals once."""


@pytest.fixture(scope="module", autouse=True)
def small():
    make = sharding.make_mesh
    with pytest.MonkeyPatch.context() as patch:
        tiny.use(patch)
        patch.setattr(sharding, "make_mesh", lambda config, devices=None: make(config, devices or jax.devices()[:1]))
        yield make


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The config of a finished run of four steps."""
    root = tmp_path_factory.mktemp("classify")
    images, validation = (tiny.make_images(root / name, each, each) for name, each in (("train", 5), ("val", 7)))
    config = tiny.config(root / "run", images, validation)
    train_task(ClassificationTask(config))
    return config


def one_device():
    return sharding.make_mesh(MeshConfig(), jax.devices()[:1])


def everything(config):
    """All that the checkpoint of step 4 has: parameters, optimizer, averages."""
    target = abstract_state(ClassificationTask(config), one_device())
    return checkpoints.read_items(checkpoints.folder(config.run_dir) / "4", target.items())


def begun(task, mesh):
    """(parameters that a new run begins with, where each comes from)."""
    given = task.given()
    origins = start.plan(given, task.shapes)
    return start.begin(task, given, origins, mesh), origins


def lines(run_dir):
    return [json.loads(line) for line in (pathlib.Path(run_dir) / "metrics.jsonl").read_text().splitlines()]


def test_the_loss_is_the_cross_entropy_of_smoothed_targets(run):
    plain = AugmentConfig(erasing=0.0, mix_probability=0.0, smoothing=0.1, rand_layers=0)
    model = dataclasses.replace(run.model, drop_path=0.0)
    task = ClassificationTask(dataclasses.replace(run, augment=plain, model=model))
    params = task.init(jax.random.key(0))
    random = np.random.default_rng(0)
    batch = {
        "image": jnp.asarray(random.integers(256, size=(4, 8, 8, 3), dtype=np.uint8)),
        "label": jnp.asarray([0, 2, 1, 2]),
    }
    loss, _ = jax.jit(task.loss)(params, batch, jax.random.key(1))
    x = (np.asarray(batch["image"]) / 255 - np.array(plain.mean)) / np.array(plain.deviation)
    logits = np.asarray(jax.jit(task.network.apply)(params, jnp.asarray(x, jnp.float32)), np.float64)
    logs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    targets = 0.9 * np.eye(3)[[0, 2, 1, 2]] + 0.1 / 3
    assert float(loss) == pytest.approx(-(targets * logs).sum(1).mean(), rel=1e-5)


def test_a_run_that_goes_on_ends_with_the_same_bits(run, tmp_path, monkeypatch):
    """After a signal in step 3, between two evaluations and within the second epoch."""
    part, calls = dataclasses.replace(run, run_dir=str(tmp_path / "part")), itertools.count(1)
    with monkeypatch.context() as patch, pytest.raises(Interrupted, match="saved at step 3"):
        patch.setattr(Stop, "asked", lambda self: "SIGTERM" if next(calls) == 3 + EVALUATION_BATCHES else None)
        train_task(ClassificationTask(part))
    train_task(ClassificationTask(part))
    jax.tree.map(np.testing.assert_array_equal, everything(run), everything(part))
    scores = [
        [{name: value for name, value in line.items() if name.startswith("eval/") and "seconds" not in name}
         for line in lines(one.run_dir) if "eval/top1" in line] for one in (run, part)
    ]  # fmt: skip
    assert scores[0] == scores[1] and len(scores[0]) == 2
    with pytest.raises(CheckpointError, match=r"was started with augment.erasing 0.25, found 0.5"):
        train_task(ClassificationTask(dataclasses.replace(part, augment=AugmentConfig((0.5, 1.0), erasing=0.5))))


def test_both_weights_are_scored_at_each_evaluation_and_the_best_step_is_noted(run):
    evaluations = [line for line in lines(run.run_dir) if "eval/top1" in line]
    assert [line["step"] for line in evaluations] == [2, 4]
    assert {"eval/top1", "eval/top5", "eval/loss", "eval/top1_ema_0.9", "eval/top5_ema_0.9"} <= evaluations[0].keys()
    best = max(line["eval/top1_ema_0.9"] for line in evaluations)
    record = json.loads((pathlib.Path(run.run_dir) / "evaluation.json").read_text())
    assert record["best"] == best


@pytest.fixture(scope="module")
def result(run):
    """Output of `classify evaluate`, which is in the run directory since."""
    with contextlib.redirect_stdout(io.StringIO()) as shown:
        main(["evaluate", "--run", run.run_dir, "--images", run.eval.path, "--batch-size", "16", "--ema", "0.9"])
    return json.loads(shown.getvalue())


def test_evaluate_prints_what_a_loop_over_the_images_finds(run, result, capsys):
    validation = run.eval.path
    trained, source = weights.read(run.run_dir, one_device(), decays=(0.9,)), FolderSource(validation, None, 3)
    (params,) = trained.sets.values()
    images = np.stack([evaluation_crop(source[i]["image"], 8, 0.875) for i in range(21)]) / 255
    x = (images - np.array(run.augment.mean)) / np.array(run.augment.deviation)
    logits = np.asarray(jax.jit(Network(run).apply)(params, jnp.asarray(x, jnp.float32)))
    (scores,) = result["scores"]
    assert scores["top1"] == pytest.approx(100 * (logits.argmax(1) == np.arange(21) // 7).mean())
    assert scores["top5"] == 100 and scores["weights"] == "ema_0.9"
    assert result["how"] == {
        "images": 21, "image_size": 8, "crop": 0.875, "interpolation": "bicubic, antialiased", "dtype": "float32"
    }  # fmt: skip
    assert result["model"]["parameters"] == sum(leaf.size for leaf in jax.tree.leaves(params))
    evaluation = [line for line in lines(run.run_dir) if "eval/top1" in line][-1]
    assert evaluation["eval/top1_ema_0.9"] == pytest.approx(scores["top1"])
    assert evaluation["eval/loss_ema_0.9"] == pytest.approx(scores["loss"], rel=1e-4)

    main(["predict", "--run", run.run_dir, "--images", validation, "--json", "--top", "2"])
    predicted = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    names = [one["classes"][0]["name"] for one in predicted]
    assert names == [tiny.CLASSES[i] for i in logits.argmax(1)]
    assert predicted[0]["classes"][0]["probability"] >= predicted[0]["classes"][1]["probability"]


@pytest.mark.usefixtures("result")
def test_weights_go_out_with_a_card_and_come_back(run, tmp_path, capsys):
    main(["export", "--run", run.run_dir, "--output", str(tmp_path / "released"), "--license", "apache-2.0"])
    ours, theirs = (weights.read(path, one_device(), decays=decays) for path, decays in
                    ((run.run_dir, (0.9,)), (str(tmp_path / "released"), None)))  # fmt: skip
    jax.tree.map(np.testing.assert_array_equal, ours.sets, theirs.sets)
    assert theirs.class_names == tiny.CLASSES and theirs.step == 4
    card = (tmp_path / "released" / "README.md").read_text()
    assert "| license | apache-2.0 |" in card and "top-1" in card and str(tmp_path) not in card
    with pytest.raises(ConfigError, match="choose from a run directory"):
        weights.read(str(tmp_path / "released"), one_device(), step=4)


def test_a_run_begins_with_the_weights_of_another_with_other_classes_and_size(run, tmp_path):
    data = dataclasses.replace(run.data, num_classes=2, image_size=12)
    config = dataclasses.replace(run, run_dir=str(tmp_path), data=data, init_from=run.run_dir)
    task, mesh = ClassificationTask(config), one_device()
    params, lines = begun(task, mesh)
    assert {line.path: line.why for line in lines if line.origin == "anew"} == {
        "head/linear/bias": "of shape (3,) there",
        "head/linear/kernel": "of shape (16, 3) there",
    }
    (theirs,) = weights.read(run.run_dir, mesh, decays=(0.9,)).sets.values()
    jax.tree.map(np.testing.assert_array_equal, params["backbone"], theirs["backbone"])
    np.testing.assert_array_equal(params["head"]["norm"]["scale"], theirs["head"]["norm"]["scale"])
    assert params["head"]["linear"]["kernel"].shape == (16, 2)
    same, _ = begun(ClassificationTask(dataclasses.replace(run, init_from=run.run_dir)), mesh)
    jax.tree.map(np.testing.assert_array_equal, same, theirs)


def test_weights_of_another_network_and_of_the_release_are_refused(run, tmp_path):
    from safetensors.numpy import save_file

    grey = dataclasses.replace(run.data, channels=1)
    augment = dataclasses.replace(run.augment, mean=(0.5,), deviation=(0.2,))
    config = dataclasses.replace(run, data=grey, augment=augment, init_from=run.run_dir)
    with pytest.raises(WeightsError, match=r"init_from must have parameters .*stage1/down/conv1/kernel of shape"):
        begun(ClassificationTask(config), one_device())
    save_file({name: np.zeros((2, 2), np.float32) for name in weights.RELEASED}, tmp_path / "released.safetensors")
    with pytest.raises(WeightsError, match="named as in the authors' released code, which are refused"):
        weights.read(str(tmp_path / "released.safetensors"), one_device())
    save_file({"a": np.zeros(2, np.float32)}, tmp_path / "other.safetensors")
    with pytest.raises(WeightsError, match="found 1 tensors of another origin"):
        weights.read(str(tmp_path / "other.safetensors"), one_device())


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["evaluate", "--run", "RUN", "--images", "/nowhere"], "found nothing at '/nowhere'"),
        (
            ["evaluate", "--run", "RUN", "--images", "ROOT/few"],
            "must have the 3 classes that the network is trained on",
        ),
        (["evaluate", "--run", "RUN", "--images", "ROOT/empty"], "found no JPEG, PNG"),
        (["evaluate", "--run", "ROOT/few", "--images", "ROOT/val"], "no checkpoint in"),
        (["evaluate", "--run", "RUN", "--images", "ROOT/val", "--ema", "0.5"], "must be one that the run kept"),
        (["predict", "--run", "RUN", "--images", "/nowhere"], "found nothing at '/nowhere'"),
        (["train", "--config", "digits"], "must define `config = ClassifyConfig"),
        (["fly"], "can: train, evaluate"),
    ],
)
def test_what_is_wrong_is_one_sentence(run, command, said, capsys):
    root = pathlib.Path(run.run_dir).parent
    tiny.make_images(root / "few", 1, 0)
    for path in (root / "few" / "red").glob("*"):
        path.unlink()
    if (root / "few" / "red").exists():
        (root / "few" / "red").rmdir()
    (root / "empty" / "red").mkdir(parents=True, exist_ok=True)
    with pytest.raises(SystemExit) as stopped:
        main([word.replace("RUN", run.run_dir).replace("ROOT", str(root)) for word in command])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and said in error and len(error.strip().splitlines()) == 1, error


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [MeshConfig(), MeshConfig(fsdp=4, tensor=2)], ids=["data 8", "fsdp 4, tensor 2"])
def test_a_mesh_trains_as_one_device_does(run, small, mesh, tmp_path):
    """To 1e-5 of the losses of four steps, and the same accuracy."""
    config = dataclasses.replace(run, run_dir=str(tmp_path), mesh=mesh)
    with pytest.MonkeyPatch.context() as patch:
        tiny.use(patch, ScanOptions(proxy=2, kernel=3))
        alone = dataclasses.replace(run, run_dir=str(tmp_path / "alone"), mesh=MeshConfig())
        train_task(ClassificationTask(alone))
        patch.setattr(sharding, "make_mesh", small)
        train_task(ClassificationTask(config))
    losses = [[line["loss"] for line in lines(path) if "loss" in line] for path in (tmp_path / "alone", tmp_path)]
    np.testing.assert_allclose(*losses, rtol=1e-5)


def test_the_default_config_is_that_of_imagenet():
    config = ClassifyConfig(run_dir="runs/x")
    assert (config.data.image_size, config.data.num_classes, config.model.preset) == (224, 1000, "GSPN-T")


@pytest.mark.slow
def test_throughput_and_a_comparison_say_what_they_did(run, tmp_path, capsys):
    main(["throughput", "--image-size", "8", "--batch-size", "8", "--num-classes", "3", "--seconds", "0.1"])
    found = json.loads(capsys.readouterr().out)
    assert found["training_images_per_second"] > 0 and found["inference_images_per_second"] > 0
    results = compare(dataclasses.replace(run, run_dir=str(tmp_path / "compared")))
    assert set(results) == set(MIXERS)
    written = json.loads((tmp_path / "compared" / "results.json").read_text())
    for mixer, result in results.items():
        assert (tmp_path / "compared" / f"confusion_{mixer}.png").stat().st_size > 1000
        assert result["images_seen"] == 32 and [point["images_seen"] for point in result["curve"]] == [16, 32]
        assert result["top1"] == pytest.approx(result["curve"][-1]["top1_ema_0.9"])
        assert np.sum(result["confusion"]) == 21 and np.trace(result["confusion"]) == round(0.21 * result["top1"])
        assert written[mixer]["top1"] == result["top1"]
    assert (tmp_path / "compared" / "curve.png").stat().st_size > 1000
    with pytest.raises(ConfigError, match="every must be greater than 0 for a comparison"):
        compare(dataclasses.replace(run, eval=dataclasses.replace(run.eval, every=0)))
