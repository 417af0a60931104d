"""sample.py as a user calls it: a grid, thousands of images, the same image from the same seed, and wrong requests."""

import dataclasses
import json
import pathlib

import numpy as np
import pytest
from PIL import Image

import sample
from gspn_jax.config import ConfigError
from gspn_jax.parallel import sharding
from gspn_jax.runs import checkpoints
from gspn_jax.sampling.files import PARTIAL
from gspn_jax.sampling.sampler import Sampler
from gspn_jax.training.train import train
from tests.benchmarks import scripts
from tests.training import tiny


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    config = tiny.config(tmp_path_factory.mktemp("run"), steps=2, save_every=2)
    # a width that mesh.fsdp 8 does not divide
    return train(dataclasses.replace(config, model=dataclasses.replace(config.model, hidden=36)))


def test_a_grid_of_the_classes_asked_for(run_dir, tmp_path, capsys):
    path = tmp_path / "grid.png"
    sample.main(["--run", str(run_dir), "--classes", "3", "7", "--per-class", "2", "--output", str(path)])
    with Image.open(path) as image:
        assert image.width > 2 * 64
    assert f"4 images of step 2 in {path}" in capsys.readouterr().out


def test_each_grid_without_a_name_gets_a_file_of_its_own(run_dir):
    for _ in range(2):
        sample.main(["--run", str(run_dir), "--classes", "1", "--per-class", "1"])
    assert sorted(path.name for path in run_dir.glob("grid_*")) == ["grid_0.png", "grid_1.png"]


def test_a_benchmark_draws_what_the_command_draws(run_dir, tmp_path):
    path = tmp_path / "ten.npz"
    sample.main(["--run", str(run_dir), "--num-samples", "10", "--labels", "balanced", "--output", str(path)])
    config = dataclasses.replace(checkpoints.read_config(run_dir)[1], run_dir=str(run_dir))
    images, labels = scripts.load("gpu_run").draw(config, 10, 4)
    with np.load(path) as found:
        np.testing.assert_array_equal(labels, found["arr_1"])
        np.testing.assert_array_equal(images, found["arr_0"])


def test_thousands_go_to_an_adm_npz_and_a_kill_loses_nothing(run_dir, tmp_path, monkeypatch):
    command = ["--run", str(run_dir), "--num-samples", "20", "--batch-size", "8", "--labels", "balanced"]
    sample.main([*command, "--output", str(tmp_path / "whole.npz")])

    draws, call = [], Sampler.__call__

    def killed_at_the_second_batch(self, *arguments):
        draws.append(1)
        if len(draws) == 2:
            raise KeyboardInterrupt
        return call(self, *arguments)

    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="130"):
        patch.setattr(Sampler, "__call__", killed_at_the_second_batch)
        sample.main([*command, "--output", str(tmp_path / "again.npz")])
    assert json.loads((tmp_path / f"again.npz{PARTIAL}" / "batches.jsonl").read_text())[0] == 8
    sample.main([*command, "--output", str(tmp_path / "again.npz")])

    with np.load(tmp_path / "whole.npz") as whole, np.load(tmp_path / "again.npz") as again:
        assert whole["arr_0"].shape == (20, 8, 8, 1) and whole["arr_0"].dtype == np.uint8
        np.testing.assert_array_equal(whole["arr_1"], np.arange(20) % 10)
        np.testing.assert_array_equal(whole["arr_0"], again["arr_0"])
        assert len(np.unique(whole["arr_0"].reshape(20, -1), axis=0)) == 20


@pytest.mark.parametrize("mesh", [(1, 1, 1), (1, 8, 1), (2, 2, 2)], ids=str)
@pytest.mark.parametrize("batch", [1, 3, 12])
def test_an_image_is_its_seed_and_class_whatever_the_batch_and_mesh(run_dir, mesh, batch, reference={}):  # noqa: B006
    import jax

    from gspn_jax.config import MeshConfig

    step, config = checkpoints.read_config(run_dir)
    mesh = sharding.make_mesh(MeshConfig(*mesh), jax.devices()[: int(np.prod(mesh))])
    params = checkpoints.restore_params(run_dir, step, config, mesh)
    images = Sampler(config, mesh)(params, np.arange(batch) % 10, 5 + np.arange(batch))
    wanted = reference.setdefault("images", {})
    for i, image in enumerate(images):  # a level apart: truncation to uint8 may turn a rounding error into one level
        assert np.abs(image.astype(int) - wanted.setdefault(i, image).astype(int)).max() <= 1


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--classes", "12"], "--classes must be numbers in 0..9 or names (0, 1, 2, 3, 4, ...), found '12'"),
        (["--classes", "cat"], "--classes must be numbers in 0..9"),
        (["--step", "7"], "no checkpoint of step 7"),
        (["--vae", "x.bin"], "--vae is for a run on latents, found one with data.source 'digits'"),
        (["--ema", "0.5"], "must be one that the run kept"),
        (["--output", "x.jpg"], "--output must end in .png, found 'x.jpg'"),
        (["--num-samples", "5", "--output", "x.png"], "--output must end in .npz"),
        (["--output", "/no/such/folder/x.png"], "--output must lie in a folder that exists"),
        (["--image-size", "9", "9"], "must be a multiple of the patch (2), found 9x9"),
        (["--sampler.name", "ddpm"], "sampler.name must be one of ('heun', 'euler', 'sde', None)"),
        (["--mesh.data", "3"], "must be the 8 devices there are"),
        (["--per-class", "0"], "--per-class must be 1 or more, found 0"),
    ],
)
def test_a_wrong_request_gets_one_sentence_and_code_2(run_dir, flags, said, capsys):
    with pytest.raises(SystemExit) as stopped:
        sample.main(["--run", str(run_dir), *flags])
    assert stopped.value.code == 2
    shown = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert said in shown and "Traceback" not in shown


def test_a_folder_that_is_no_run_is_named(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        sample.main(["--run", str(tmp_path)])
    assert stopped.value.code == 2
    assert f"no checkpoint in {tmp_path / 'checkpoints'}" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "flags"), [("x.npz", ["--num-samples", "2"]), ("x.png", [])])
def test_a_result_is_never_overwritten(run_dir, tmp_path, capsys, name, flags):
    path = pathlib.Path(tmp_path / name)
    path.write_bytes(b"precious")
    with pytest.raises(SystemExit) as stopped:
        sample.main(["--run", str(run_dir), *flags, "--output", str(path)])
    assert stopped.value.code == 2 and path.read_bytes() == b"precious"
    assert "exists already" in capsys.readouterr().err


def test_a_class_is_meant_by_its_name_before_its_number():
    from gspn_jax.sample import _class

    names = sorted(map(str, range(12)))  # as folders are sorted: 0, 1, 10, 11, 2, ...
    assert [names[_class(name, names)] for name in ("10", "2", "0")] == ["10", "2", "0"]
    assert [_class(name, ["n01", "n02"]) for name in ("1", "n01")] == [1, 0]
    for name in ("2", "²", "-1", "1" * 5000):
        with pytest.raises(ConfigError, match=r"--classes must be numbers in 0\.\.1 or names"):
            _class(name, ["n01", "n02"])
