"""What an evaluation says besides numbers: unfair comparisons, wrong requests, the self-test, and pictures."""

import json
import sys

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from gspn_jax import prepare
from gspn_jax.config import MeshConfig
from gspn_jax.evaluate import main, plots, report
from gspn_jax.evaluate.scoring import ScoreFlags, Scorer
from gspn_jax.metrics import inception, npz, self_test
from gspn_jax.parallel import sharding


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "inception.safetensors"
    save_file(inception.random_state_dict(0), path)
    return path


def refused(capsys, *flags: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        main(list(flags))
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and "Traceback" not in said
    return said


# --- what would be unfair


def test_samples_sorted_by_class_are_told_from_shuffled_ones():
    classes = np.repeat(np.arange(10), 50)
    assert report.sorted_by_class(classes)
    assert report.sorted_by_class(np.roll(classes[::-1], 7))
    assert not report.sorted_by_class(np.random.default_rng(0).permutation(classes))
    assert not report.sorted_by_class(np.arange(500) % 10)
    assert not report.sorted_by_class(np.zeros(500, int))  # of one class
    # a classifier that is right of three images in four
    noisy = np.where(np.random.default_rng(1).random(500) < 0.75, classes, 3)
    assert report.sorted_by_class(noisy)


def test_each_unfair_comparison_is_named():
    def said(names=("fid", "is"), count=50_000, size=(256, 256), reference=(256, 256), classes=None) -> str:
        return " | ".join(report.unfair(names, count, size, reference, classes))

    assert said() == ""
    assert "10,000 samples, where published numbers are of 50,000" in said(count=10_000)
    assert said(names=("is",), count=10_000) == ""
    assert "the samples are 64x64 and the images of the reference 256x256" in said(size=(64, 64))
    assert said(size=(64, 64), reference=None) == ""
    assert "sorted by class" in said(classes=np.repeat(np.arange(10), 5))
    assert said(names=("fid",), classes=np.repeat(np.arange(10), 5)) == ""


def test_greyscale_images_are_read_as_three_equal_channels(tmp_path):
    grey = np.random.default_rng(0).integers(0, 256, (5, 4, 6, 1), np.uint8)
    np.savez(tmp_path / "grey.npz", arr_0=grey)
    images = np.concatenate(list(npz.StoredImages(tmp_path / "grey.npz", "--samples").batches(2)))
    np.testing.assert_array_equal(images, np.concatenate([grey] * 3, axis=3))


def test_by_default_all_metrics_that_the_reference_allows_are_computed(weights, tmp_path):
    np.savez(tmp_path / "full.npz", arr_0=np.zeros((4, 8, 8, 3), np.uint8))
    np.savez(tmp_path / "mu.npz", mu=np.zeros(2048), sigma=np.eye(2048))

    def names(**flags) -> tuple[str, ...]:
        return Scorer(ScoreFlags(inception=str(weights), **flags), sharding.make_mesh(MeshConfig())).names

    assert names(reference=str(tmp_path / "full.npz")) == ("fid", "sfid", "is", "kid", "precision", "recall")
    assert names(reference=str(tmp_path / "mu.npz")) == ("fid", "is")
    assert names() == ("is",)
    assert names(reference=str(tmp_path / "full.npz"), metrics=("kid", "fid")) == ("kid", "fid")


# --- wrong requests


def test_without_weights_one_sentence_says_which_where_and_how(tmp_path, capsys):
    np.savez(tmp_path / "s.npz", arr_0=np.zeros((4, 8, 8, 3), np.uint8))
    said = refused(capsys, "--samples", str(tmp_path / "s.npz"), "--metrics", "is")
    assert said.count("\n") == 1
    for part in (
        "--inception must be the Inception-v3 weights of 2015-12-05",
        "found no --inception",
        "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth",
    ):
        assert part in said
    said = refused(capsys, "--samples", str(tmp_path / "s.npz"), "--metrics", "is", "--inception", "/absent.pth")
    assert "found nothing at /absent.pth" in said


def test_wrong_requests_get_one_sentence(tmp_path, weights, capsys):
    good = tmp_path / "s.npz"
    np.savez(good, arr_0=np.zeros((4, 8, 8, 3), np.uint8))
    np.savez(tmp_path / "few.npz", arr_0=np.zeros((3, 8, 8, 3), np.uint8))
    np.savez(tmp_path / "mu.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "there.json").write_text("{}")

    def said(samples, *flags: str) -> str:
        return refused(capsys, "--samples", str(samples), "--inception", str(weights), *flags)

    assert "--samples must be an .npz file or a folder of images, found nothing" in said(tmp_path / "absent.npz")
    assert "found the run directory" in said(tmp_path / "run")
    assert "must be an .npz file" in said(tmp_path / "there.json")
    assert "--samples must hold 4 images or more, found 3" in said(tmp_path / "few.npz")
    assert "fid, kid need a --reference, found none" in said(good, "--metrics", "fid", "is", "kid")
    assert "Invalid choice" in said(good, "--metrics", "FID")
    assert "--reference must be an .npz file" in said(good, "--reference", "/absent.npz")
    lacking = said(good, "--reference", str(tmp_path / "mu.npz"), "--metrics", "fid", "precision")
    assert "for precision" in lacking and "mu.npz" in lacking
    assert "--output must be a new .json file" in said(good, "--output", str(tmp_path / "there.json"))
    assert "--image-size is for the images of a folder" in said(good, "--image-size", "8")
    assert "--batch-size must be 1 or more, found 0" in said(good, "--batch-size", "0")
    assert "no checkpoint in" in refused(capsys, "--run", str(tmp_path))
    assert "must be given, found --run and --samples" in refused(capsys, "--run", "x", "--samples", "y")
    assert "must be given, found none of them" in refused(capsys, "--metrics", "fid")
    assert "--record is of a file of weights" in refused(capsys, "--self-test", "--record", "x.npz")


# --- the self-test


def test_the_self_test_prints_each_check_and_its_exit_code_tells(weights, monkeypatch, capsys):
    passed = self_test.Check(True, "the machine is right")
    monkeypatch.setattr(self_test, "check_machine", lambda: passed)
    monkeypatch.setattr(
        self_test,
        "check_file",
        lambda path, record, compare: iter([self_test.Check(None, f"{path} {record} {compare}")]),
    )
    main(["--self-test", "--inception", str(weights), "--compare", "before.npz"])
    assert capsys.readouterr().out == f"ok     the machine is right\nnote   {weights} None before.npz\n"
    monkeypatch.setattr(self_test, "check_machine", lambda: passed._replace(passed=False))
    with pytest.raises(SystemExit) as stopped:
        main(["--self-test"])
    assert stopped.value.code == 1
    assert capsys.readouterr().out.splitlines()[0] == "FAILED the machine is right"


def test_weights_are_converted_once_to_what_needs_no_pytorch(weights, tmp_path, capsys):
    output = tmp_path / "w.safetensors"
    prepare.main(["inception", "--weights", str(weights), "--output", str(output)])
    assert f"472 tensors in {output}" in capsys.readouterr().out
    assert inception.digest(inception.read(output)) == inception.digest(inception.random_state_dict(0))
    with pytest.raises(SystemExit) as stopped:
        prepare.main(["inception", "--weights", str(weights), "--output", str(output)])
    assert stopped.value.code == 2 and "--output must be a new .safetensors file" in capsys.readouterr().err


# --- pictures


def result(fid: float, step: int, scale: float = 1.0, count: int = 50_000) -> dict:
    samples = {
        "run": "runs/a",
        "step": step,
        "images_seen": step * 256,
        "ema_decay": 0.9999,
        "count": count,
        "sampler": {"name": "ddpm", "steps": 250, "guidance_scale": scale},
    }
    return {"metrics": {"fid": fid, "is": 100 / fid}, "samples": samples}


@pytest.fixture
def run_dir(tmp_path):
    folder = tmp_path / "a" / "evaluation"
    folder.mkdir(parents=True)
    for number, (fid, step, scale) in enumerate([(30, 1000, 1.0), (12, 2000, 1.0), (9, 3000, 1.0), (4, 3000, 1.5)]):
        (folder / f"{number}.json").write_text(json.dumps(result(fid, step, scale)))
    return tmp_path / "a"


def drawn(monkeypatch) -> dict[str, list[tuple[float, float]]]:
    """The lines of each picture that is drawn from now on, by label, x and y."""
    from matplotlib.axes import Axes

    lines, plot = {}, Axes.plot

    def noted(self, x, y, **settings):
        lines.setdefault(settings["label"], []).append(list(zip(x, y, strict=True)))
        return plot(self, x, y, **settings)

    monkeypatch.setattr(Axes, "plot", noted)
    return lines


def test_an_average_of_a_width_is_named_so_in_the_table_and_in_pictures(run_dir, monkeypatch):
    of_width = result(5, 3000)
    of_width["samples"] |= {"ema_decay": None, "ema_width": 0.05, "image_size": [8, 8], "source": "runs/a"}
    of_width["samples"] |= {"seed": 0, "labels": "random", "guide": {"run": "runs/b", "step": 7, "ema_decay": 0.9}}
    shown = report.table(of_width | {"reference": None, "warnings": []})
    assert "step 3000, EMA width 0.05, ddpm 250 steps" in shown and "guided by runs/b, step 7, EMA 0.9" in shown
    (run_dir / "evaluation" / "w.json").write_text(json.dumps(of_width))
    lines = drawn(monkeypatch)
    main(["--plot", str(run_dir), "--output", str(run_dir / "fid.png")])
    assert lines["a, EMA width 0.05, ddpm 250 steps, guidance 1, 50,000 samples"] == [[(768_000, 5)]]


def test_fid_is_drawn_against_images_seen(run_dir, monkeypatch, capsys):
    lines, picture = drawn(monkeypatch), run_dir / "fid.png"
    main(["--plot", str(run_dir), "--output", str(picture)])
    assert lines == {
        "a, EMA 0.9999, ddpm 250 steps, guidance 1, 50,000 samples": [[(256_000, 30), (512_000, 12), (768_000, 9)]],
        "a, EMA 0.9999, ddpm 250 steps, guidance 1.5, 50,000 samples": [[(768_000, 4)]],
    }
    with Image.open(picture) as image:
        assert image.width > 500
    assert f"4 results drawn in {picture}" in capsys.readouterr().out
    assert "--output must be a new" in refused(capsys, "--plot", str(run_dir), "--output", str(picture))


def test_fid_and_inception_score_are_drawn_against_guidance(run_dir, monkeypatch):
    lines = drawn(monkeypatch)
    files = [str(run_dir / "evaluation" / f"{number}.json") for number in (3, 2)]
    main(["--plot", *files, "--against", "guidance", "--output", str(run_dir / "g.svg")])
    assert lines == {
        "a, step 3,000, EMA 0.9999, ddpm 250 steps, 50,000 samples": [[(1.0, 9), (1.5, 4)], [(1.0, 100 / 9), (1.5, 25)]]
    }


def test_without_fid_and_inception_score_other_metrics_are_drawn_against_guidance(tmp_path, monkeypatch):
    results = [result(9, 3000, scale) | {"metrics": {"kid": scale / 10, "recall": 0.5}} for scale in (1.0, 1.5)]
    lines = drawn(monkeypatch)
    assert plots.draw_results(results, "guidance", tmp_path / "g.png").startswith("2 results drawn in")
    assert list(lines.values()) == [[[(1.0, 0.1), (1.5, 0.15)], [(1.0, 0.5), (1.5, 0.5)]]]


def test_what_cannot_be_drawn_is_said(tmp_path, run_dir, monkeypatch, capsys):
    (tmp_path / "other.json").write_text("[]")
    assert "must be the result of an evaluation of a run's samples" in refused(
        capsys, "--plot", str(tmp_path / "other.json"), "--output", str(tmp_path / "x.png")
    )
    (tmp_path / "empty").mkdir()
    assert "found none in" in refused(capsys, "--plot", str(tmp_path / "empty"), "--output", str(tmp_path / "x.png"))
    assert "found nothing at" in refused(capsys, "--plot", "/absent", "--output", str(tmp_path / "x.png"))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "drawing needs matplotlib, which is not installed: pip install 'gspn-jax[plot]'" in refused(
        capsys, "--plot", str(run_dir), "--output", str(tmp_path / "x.png")
    )
