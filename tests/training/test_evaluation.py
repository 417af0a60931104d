"""Metrics while training goes on: from pixels to a logged number, the best checkpoint kept, mistakes found first."""

import collections
import dataclasses
import json
import pathlib
import shutil
import tarfile
import time
import types

import jax
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from gspn_jax import prepare, tables
from gspn_jax.config import ConfigError, DataConfig, EvalConfig, MeshConfig
from gspn_jax.data.latents import write_synthetic
from gspn_jax.metrics import inception
from gspn_jax.metrics.frechet import Gaussian
from gspn_jax.metrics.reference import Reference
from gspn_jax.parallel import sharding
from gspn_jax.runs import averages, checkpoints
from gspn_jax.runs.evaluations import Evaluations, Record
from gspn_jax.sampling.sampler import Sampler
from gspn_jax.training import throughput
from gspn_jax.training import train as page
from gspn_jax.training.diffusion import DiffusionTask
from gspn_jax.training.evaluation import SampleEvaluation
from gspn_jax.training.loop import Interrupted
from gspn_jax.training.state import create_state
from gspn_jax.training.train import train
from tests.autoencoder import numpy_vae
from tests.real_images import archive
from tests.training import tiny
from tests.training.small_extractor import SIDE, SIZES, SmallExtractor, use_small_extractor

METRICS = tuple(name for name, metric in tables.METRICS.items() if metric.network == "inception")


@pytest.fixture
def small_extractor(monkeypatch):
    use_small_extractor(monkeypatch)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Random weights of Inception, and 40 pictures of two classes with their statistics."""
    root = tmp_path_factory.mktemp("files")
    save_file(inception.random_state_dict(0), root / "inception.safetensors")
    random = np.random.default_rng(0)
    for i in range(40):
        path = root / "images" / f"class {i % 2}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (SIDE, SIDE, 3), np.uint8)).save(path)
    for name, sizes in (("small", list(SIZES.values())), ("reference", (2048, 2023))):
        target = Reference(
            "",
            "",
            *(Gaussian(random.uniform(0, 1, size), np.eye(size)) for size in sizes),
            features=random.uniform(0, 1, (30, sizes[0])).astype(np.float32),
            num_images=30,
        )
        target.write(root / f"{name}.npz", source="random")
    return root


def config(files, run_dir, *, target="small", metrics=METRICS, every=4, **train):
    built = tiny.config(run_dir, **{"steps": 6, "log_every": 2, "save_every": 3} | train)
    return dataclasses.replace(
        built,
        data=DataConfig(source="folder", path=str(files / "images"), image_size=SIDE, channels=3, num_classes=2),
        eval=EvalConfig(
            every=every,
            num_samples=11,
            metrics=metrics,
            batch_size=8,
            steps=2,
            ema=0.99,
            reference=str(files / f"{target}.npz"),
            inception=str(files / "inception.safetensors"),
        ),
    )


def log_of(run_dir):
    return [json.loads(line) for line in (pathlib.Path(run_dir) / "metrics.jsonl").read_text().splitlines()]


def images_of(settings):
    """What an evaluation must score, drawn one image at a time through the public sampler."""
    settings = dataclasses.replace(settings, sampler=dataclasses.replace(settings.sampler, steps=settings.eval.steps))
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    step, _ = checkpoints.read_config(settings.run_dir)
    params = checkpoints.restore_params(settings.run_dir, step, settings, mesh, ema_decay=settings.eval.ema)
    labels = np.random.default_rng(0).integers(settings.data.num_classes, size=settings.eval.num_samples)
    sampler = Sampler(settings, mesh)
    return np.concatenate([sampler(params, labels[i : i + 1], [i]) for i in range(len(labels))])


EVALUATING = 1e6  # seconds that pass on the clock of the throughput while an evaluation runs


@pytest.fixture(scope="module")
def whole(files, tmp_path_factory):
    """A run of six steps, evaluated after every four and the last."""
    settings, away = config(files, tmp_path_factory.mktemp("whole") / "run"), [0.0]

    def call(self, *arguments, call=SampleEvaluation.__call__):
        away[0] += EVALUATING
        return call(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        use_small_extractor(patch)
        patch.setattr(SampleEvaluation, "__call__", call)
        patch.setattr(throughput, "time", types.SimpleNamespace(perf_counter=lambda: time.perf_counter() + away[0]))
        train(settings)
    return settings


def evaluations(settings):
    return {line["step"]: line for line in log_of(settings.run_dir) if "eval/fid" in line}


def test_a_run_logs_the_metrics_of_its_samples(files, whole):
    found = evaluations(whole)
    assert list(found) == [4, 6]
    for line in found.values():
        assert {f"eval/{name}" for name in (*METRICS, "seconds")} <= line.keys()
    images = images_of(whole)
    truth = np.asarray(SmallExtractor({}, batch_size=16)(images)[0].pool[:11], np.float64)
    target = Gaussian(np.load(files / "small.npz")["mu"], np.eye(SIZES["pool"]))
    fid = target.distance(Gaussian(truth.mean(0), np.cov(truth, rowvar=False)))
    assert found[6]["eval/fid"] == pytest.approx(fid, rel=1e-5)  # float32 sums in another order
    events = (pathlib.Path(whole.run_dir) / "tensorboard").iterdir()
    assert b"eval/precision" in next(events).read_bytes()


def test_time_spent_on_evaluations_is_no_training_time(whole):
    lines = [line for line in log_of(whole.run_dir) if "loss" in line]
    assert [line["step"] for line in lines] == [2, 3, 4, 6]
    # one or two steps of 16 images; with the evaluation at 4, it would be at most 32 in EVALUATING seconds at 6
    assert all(line["images_per_second"] > 32 / EVALUATING for line in lines)


def stop_at(monkeypatch, call):
    """A signal comes at the so-manieth time that the run asks for one: after each step and each batch of samples."""

    class Stop:
        calls = 0

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def asked(self):
            Stop.calls += 1
            return "SIGTERM" if Stop.calls == call else None

    monkeypatch.setattr(page, "Stop", Stop)


@pytest.mark.usefixtures("small_extractor")
def test_the_best_checkpoint_is_kept_beside_the_latest(files, tmp_path, monkeypatch):
    fids = iter([5.0, 3.0, 4.0, float("nan"), 3.0])

    def call(self, step, *_):
        return {"fid": next(fids)}

    monkeypatch.setattr(SampleEvaluation, "__call__", call)
    settings = config(files, tmp_path / "run", every=1, save_every=1)
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        stop_at(patch, 5)
        train(settings)
    assert list(fids) == [3.0]  # the fifth step was stopped before its evaluation
    assert checkpoints.steps(settings.run_dir) == [2, 4, 5]
    assert Record.read(settings.run_dir) == Record(4, 2, 3.0)
    train(dataclasses.replace(settings, eval=EvalConfig()))
    assert checkpoints.steps(settings.run_dir) == [2, 5, 6]  # also by a run that evaluates no more
    shutil.rmtree(tmp_path / "run/checkpoints/2")
    assert Record.read(settings.run_dir) == Record(4, None, None)


def test_a_run_that_goes_back_forgets_what_was_evaluated_after(tmp_path):
    """So that the step is evaluated when it comes again, and a checkpoint that is no more is not the best."""
    for step in (2, 4):
        (tmp_path / "checkpoints" / str(step)).mkdir(parents=True)
    for found, left in (((5, 4, 3.0), (3, None, None)), ((5, 2, 3.0), (3, 2, 3.0)), ((2, 2, 3.0), (2, 2, 3.0))):
        Record(*found).write(tmp_path)
        evaluations = Evaluations(tmp_path)
        evaluations.rewind(3)
        assert evaluations.record == Record.read(tmp_path) == Record(*left)


@pytest.mark.usefixtures("small_extractor")
def test_a_signal_stops_an_evaluation_and_the_run_goes_on_with_it(whole, tmp_path, monkeypatch):
    settings = dataclasses.replace(whole, run_dir=str(tmp_path / "run"))
    with monkeypatch.context() as patch, pytest.raises(Interrupted, match="stopped by SIGTERM and saved at step 4"):
        stop_at(patch, 6)  # four steps, two batches
        train(settings)
    assert not evaluations(settings) and checkpoints.steps(settings.run_dir)[-1] == 4
    with monkeypatch.context() as patch, pytest.raises(Interrupted, match="while evaluating step 4"):
        stop_at(patch, 1)
        train(settings)
    train(settings)
    for name in METRICS:
        assert [line[f"eval/{name}"] for line in evaluations(settings).values()] == [
            line[f"eval/{name}"] for line in evaluations(whole).values()
        ]


def scores_on(devices, settings):
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:devices])
    return SampleEvaluation(settings, mesh)(4, create_state(DiffusionTask(settings), mesh))


@pytest.mark.usefixtures("small_extractor")
def test_any_number_of_devices_gives_the_same_metrics(files, tmp_path):
    (tmp_path / "run").mkdir()
    settings = config(files, tmp_path / "run")
    one, eight = scores_on(1, settings), scores_on(8, settings)
    for name in settings.eval.metrics:  # samples may round to another grey level here and there
        assert one[name] == pytest.approx(eight[name], rel=1e-3), name


@pytest.mark.slow
def test_inception_on_eight_devices_gives_the_fid_of_one(files, tmp_path):
    (tmp_path / "run").mkdir()
    settings = config(files, tmp_path / "run", target="reference")
    one, eight = scores_on(1, settings), scores_on(8, settings)
    assert one["fid"] == pytest.approx(eight["fid"], rel=1e-3) and one["is"] == pytest.approx(eight["is"], rel=1e-3)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """200 photographs of CIFAR-10, 20 of each class, one folder a class."""
    cifar10 = archive("cifar10_images.tar.gz")
    root, counts = tmp_path_factory.mktemp("cifar10"), collections.Counter()
    with tarfile.open(cifar10) as tar:
        for member in tar:
            split, name, file = pathlib.Path(member.name).parts[-3:] if member.isfile() else ("",) * 3
            if split == "train" and counts[name] < 20:
                counts[name] += 1
                (root / name).mkdir(exist_ok=True)
                (root / name / file).write_bytes(tar.extractfile(member).read())
    assert sorted(counts.values()) == [20] * 10
    return root


@pytest.mark.slow
def test_a_run_on_photographs_from_pixels_to_fid_on_eight_devices_as_on_one(files, photographs, tmp_path):
    """Nothing stands in: CIFAR-10, Inception (random weights), statistics that `prepare stats` made, the training loop;
    then the metrics of the trained parameters once more on one device."""
    weights, statistics = str(files / "inception.safetensors"), str(tmp_path / "cifar10.npz")
    prepare.main(
        ["stats", "--images", str(photographs), "--image-size", "32", "--inception", weights, "--output", statistics]
    )
    base = config(files, tmp_path / "run", metrics=("fid", "is"), steps=2, every=2)
    settings = dataclasses.replace(
        base,
        data=dataclasses.replace(base.data, path=str(photographs), image_size=32, num_classes=10),
        eval=dataclasses.replace(base.eval, reference=statistics),
    )
    train(settings)
    (line,) = (line for line in log_of(tmp_path / "run") if "eval/fid" in line)
    assert line["eval/fid"] > 0 and 1 <= line["eval/is"] < 1008
    assert Record.read(tmp_path / "run") == Record(2, 2, line["eval/fid"])

    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    average = checkpoints.restore_params(settings.run_dir, 2, settings, mesh, ema_decay=settings.eval.ema)
    state = types.SimpleNamespace(params=None, ema={averages.name(settings.eval.ema): average})
    one = SampleEvaluation(settings, mesh)(2, state)
    assert one["fid"] == pytest.approx(line["eval/fid"], rel=1e-3)
    assert one["is"] == pytest.approx(line["eval/is"], rel=1e-3)


@pytest.mark.slow
@pytest.mark.usefixtures("small_extractor")
def test_latents_are_decoded_and_grey_images_repeated(files, tmp_path, monkeypatch):
    """What reaches Inception is what the public sampler and autoencoder give, in RGB."""
    seen = []
    monkeypatch.setattr(
        SmallExtractor,
        "__call__",
        lambda self, images, call=SmallExtractor.__call__: seen.append(np.asarray(images)) or call(self, images),
    )
    save_file(numpy_vae.random_state_dict(), tmp_path / "vae.safetensors")
    write_synthetic(tmp_path / "latents", records=4, latent_shape=(4, 4, 4), num_classes=2)
    base = config(files, tmp_path / "run", metrics=("fid",))
    (tmp_path / "run").mkdir()
    latents = dataclasses.replace(
        base,
        data=DataConfig(source="latents", path=str(tmp_path / "latents"), image_size=4, channels=4, num_classes=2),
        eval=dataclasses.replace(base.eval, vae=str(tmp_path / "vae.safetensors")),
    )
    grey = dataclasses.replace(base, data=DataConfig())
    from gspn_jax.sampling.decoding import load_autoencoder

    for settings in (latents, grey):
        seen.clear()
        scores_on(8, settings)
        mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
        vae = load_autoencoder(settings.eval.vae, settings)
        sampling = dataclasses.replace(settings, sampler=dataclasses.replace(settings.sampler, steps=2))
        labels = np.random.default_rng(0).integers(settings.data.num_classes, size=11)
        truth = Sampler(sampling, mesh, decode=vae and vae.decode)(
            create_state(DiffusionTask(settings), mesh).params, labels, np.arange(11)
        )
        truth = np.broadcast_to(truth, (*truth.shape[:3], 3))
        assert np.abs(np.concatenate(seen)[:11].astype(int) - truth).max() <= 1  # rounded to another level


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"inception": None}, "--eval.inception must be the Inception-v3 weights of 2015-12-05"),
        ({"inception": "/absent.pth"}, "found nothing at /absent.pth"),
        ({"reference": "/absent.npz"}, "eval.reference must be an .npz file, found nothing at '/absent.npz'"),
        (
            {"reference": "moments.npz", "metrics": ("fid", "sfid", "kid")},
            "must have mu_s and sigma_s for sfid, and arr_0 (images) or features for kid; "
            "found what allows fid and is only",
        ),
        ({"reference": "other.npz", "metrics": ("fid",)}, "must be of the Inception weights in use"),
    ],
)
def test_files_that_cannot_be_used_are_found_before_anything_is_written(files, tmp_path, monkeypatch, changes, said):
    monkeypatch.chdir(tmp_path)
    moments = {"mu": np.zeros(2048), "sigma": np.eye(2048)}
    np.savez("moments.npz", **moments)
    np.savez("other.npz", inception_sha256="0" * 64, **moments)
    settings = config(files, tmp_path / "run", target="reference")
    with pytest.raises(ConfigError) as error:
        train(dataclasses.replace(settings, eval=dataclasses.replace(settings.eval, **changes)))
    assert said in str(error.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"every": -1}, "eval.every must be 0 or more, found -1"),
        ({"num_samples": 3}, "eval.num_samples must be 4 or more, found 3"),
        ({"metrics": ()}, "eval.metrics must be some metrics, each once, found ()"),
        (
            {"metrics": ("fd",)},
            "eval.metrics must be one of 'fid', 'sfid', 'is', 'kid', 'precision', 'recall', 'fd_dinov2', 'clip', found "
            "'fd'",
        ),
        ({"batch_size": 0}, "eval.batch_size must be greater than 0, found 0"),
        ({"ema": 0.5}, "eval.ema must be None, 0 or one of train.ema_decays (0.9, 0.99), found 0.5"),
        ({"guidance_scale": -1.0}, "eval.guidance_scale must be 0 or more, or None, found -1.0"),
        ({"steps": 0}, "eval.steps must be greater than 0, or None, found 0"),
        ({"labels": "sorted"}, "eval.labels must be one of 'random', 'balanced', found 'sorted'"),
        ({"reference": None}, "eval.reference must be a file of reference statistics for eval.metrics"),
        ({"vae": "vae.safetensors"}, "eval.vae must be None for a run on pixels, found 'vae.safetensors'"),
    ],
)
def test_settings_that_cannot_be_used_get_a_sentence(files, changes, said):
    settings = config(files, "unused")
    with pytest.raises(ConfigError) as error:
        dataclasses.replace(settings, eval=dataclasses.replace(settings.eval, **changes))
    assert said in str(error.value)
