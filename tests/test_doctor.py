"""The doctor finds nothing wrong where nothing is, and says in words what would not work."""

import dataclasses
import importlib.metadata

import numpy as np
import pytest

from gspn_jax import doctor, kernels
from gspn_jax.config import ConfigError
from gspn_jax.kernels import api
from gspn_jax.models import attention
from gspn_jax.runs import checkpoints
from tests.runs.saved import save
from tests.training import tiny

TINY = "from tests.training import tiny\nimport dataclasses\nconfig = tiny.config({!r})\n"


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(doctor, "WRITTEN_BYTES", 2**16)
    monkeypatch.setattr(doctor, "REDUCED_VALUES", 2**10)


def look(tmp_path, capsys, *flags):
    """(exit code, what is printed) for a tiny run."""
    path = tmp_path / "c.py"
    path.write_text(TINY.format(str(tmp_path / "run")))
    code = 0
    try:
        doctor.main(["--config", str(path), *flags])
    except SystemExit as stopped:
        code = stopped.code
    return code, capsys.readouterr().out


def test_a_machine_and_a_run_in_order(tmp_path, capsys):
    code, shown = look(tmp_path, capsys)
    assert code == 0 and "PROBLEM" not in shown
    for said in (
        "JAX ",
        "8 cpu",
        "the 'scan' backend agrees with a float64 loop",
        "an all-reduce of 0 MB over 8 devices is right",
        "the state takes",
        "is written at",
        "checkpoints of",
        "1,797 images of 10 classes",
        "images/s",
        "nothing was found that would stop a run",
    ):
        assert said in shown
    assert not (tmp_path / "run").exists()  # it only looks


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--mesh.fsdp", "3"], "must be the 8 devices there are"),
        (["--train.batch-size", "12"], "train.batch_size must be a multiple of 8"),
        (["--data.source", "folder", "--data.path", "/no/such/folder"], "/no/such/folder"),
        (["--run-dir", "/proc/run"], "run_dir /proc/run cannot be written"),
        (["--eval.every", "5", "--eval.metrics", "is", "--eval.inception", "/no/such/file"], "/no/such/file"),
    ],
)
def test_what_would_not_work_is_said_in_words(flags, said, tmp_path, capsys):
    code, shown = look(tmp_path, capsys, *flags)
    assert code == 1 and said in shown.rsplit("would stop the run", 1)[1]


def test_weights_to_begin_with_are_looked_at(tmp_path):
    config = tiny.config(tmp_path / "run", ema_decays=(0.9,))
    save(config, 3)
    begun = dataclasses.replace(config, init_from=config.run_dir, model=dataclasses.replace(config.model, heads=8))
    (finding,) = doctor.beginning(begun)
    assert finding.works and "run, step 3, EMA 0.9: 17 tensors fit, 4 begin anew" in finding.text
    with pytest.raises(ConfigError, match="which is in none of final/linear/bias"):
        list(doctor.beginning(dataclasses.replace(begun, train=dataclasses.replace(begun.train, only="head"))))


def test_a_kernel_with_wrong_values_is_found(monkeypatch, capsys):
    scan = api._BACKENDS["scan"]
    monkeypatch.setitem(
        api._BACKENDS, "scan", scan._replace(line_scan=lambda x, *rest: scan.line_scan(x * np.float32(1.01), *rest))
    )
    finding, *_ = list(doctor.kernels())
    assert finding.works is False and "agrees with a float64 loop to 1" in finding.text


@pytest.mark.slow
def test_every_operator_of_another_backend_is_held_against_the_scan(monkeypatch):
    scan = api._BACKENDS["scan"]
    monkeypatch.setitem(api._BACKENDS, "mosaic_gpu", scan)  # as if it were the kernel
    _, *found, convolution = doctor.kernels()
    names = ["line_scan", "propagate", "propagate_low_rank", "propagate_low_rank, chunk=2,"]
    assert [finding.text.split(" by")[0] for finding in found] == names
    assert all(finding.works for finding in found)
    assert convolution.text.startswith("depthwise convolutions are XLA's: our kernel needs an NVIDIA GPU")
    monkeypatch.setitem(
        api._BACKENDS,
        "mosaic_gpu",
        scan._replace(propagate=lambda x, *rest: scan.propagate(x * x.dtype.type(1.1), *rest)),
    )
    _, *found, _ = doctor.kernels()
    assert [finding.works for finding in found] == [True, False, False, False]


@pytest.mark.parametrize("factor", [1, 1.1])
def test_the_depthwise_kernel_is_held_against_a_convolution(factor, monkeypatch):
    right = kernels.depthwise_conv  # as if it were the kernel
    monkeypatch.setattr(kernels, "depthwise_conv", lambda x, taps: right(x, taps.astype("float32") * factor))
    refusals = iter([None])  # the first to ask is the doctor
    monkeypatch.setattr(kernels.depthwise, "refusal", lambda *arrays: next(refusals, "is not here"))
    finding = next(finding for finding in doctor.kernels() if finding.text.startswith("depthwise_conv by our kernel"))
    assert finding.works == (factor == 1)


@pytest.mark.parametrize("flags", [(), ("--data.path", "/no/such/folder")])
def test_a_run_that_trains_a_classifier(flags, tmp_path, capsys, monkeypatch):
    for check in ("kernels", "attention"):  # of the machine, which other tests look at
        monkeypatch.setattr(doctor, check, lambda: ())
    path = tmp_path / "c.py"
    path.write_text(
        "from gspn_jax.classify.config import AugmentConfig, ClassifierConfig, ClassifyConfig, ValidationConfig\n"
        "from gspn_jax.config import DataConfig, TrainConfig\n"
        "digits = DataConfig(source='digits', image_size=8, channels=1, num_classes=10)\n"
        "config = ClassifyConfig(run_dir='RUN', model=ClassifierConfig(preset='GSPN-mini'), data=digits,\n"
        "    augment=AugmentConfig(mean=(0.5,), deviation=(0.5,)), train=TrainConfig(steps=3, batch_size=16),\n"
        "    eval=ValidationConfig(every=3))\n".replace("RUN", str(tmp_path / "run"))
    )
    flags = ("--data.source", "folder", "--eval.every", "0", *flags) if flags else ()
    code = 0
    try:
        doctor.main(["--config", str(path), *flags])
    except SystemExit as stopped:
        code = stopped.code
    shown = capsys.readouterr().out
    if flags:
        assert code == 1 and "/no/such/folder" in shown.rsplit("would stop the run", 1)[1]
    else:
        assert code == 0 and "PROBLEM" not in shown
        for said in ("the state takes", "1,797 images of 10 classes", "images to evaluate on, of the same classes"):
            assert said in shown


def test_attention_with_wrong_values_is_found(monkeypatch):
    right = attention.attention
    *found, note = doctor.attention()
    assert all(finding.works for finding in found) and "flash attention needs an NVIDIA GPU" in note.text
    monkeypatch.setattr(attention, "attention", lambda q, k, v: right(q, k, v) * q.dtype.type(1.1))
    finding, *_ = doctor.attention()
    assert finding.works is False and finding.text.startswith("attention by 'xla' agrees with a float64 softmax")


def test_a_disk_that_is_too_small_is_found(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: type("usage", (), {"free": 1000}))
    found = list(doctor.disk(tiny.config(tmp_path / "run", keep_every=5)))
    assert [finding.works for finding in found] == [True, False]
    assert "7 checkpoints of" in found[1].text and "4 of them by train.keep_every" in found[1].text


def test_the_checkpoints_of_a_run_are_looked_at(tmp_path):
    config = tiny.config(tmp_path)
    save(config, 3, 6)
    (checkpoints.folder(tmp_path) / "6" / "manifest.json").unlink()
    *_, finding = doctor.disk(config)
    assert "goes on from step 3" in finding.text and "never finished" in finding.text
    assert checkpoints.steps(tmp_path) == [3, 6]  # nothing is moved


def test_without_a_config_the_machine_alone_is_looked_at(capsys):
    doctor.main([])
    shown = capsys.readouterr().out
    assert "kernels:" in shown and "disk:" not in shown and "--config CONFIG looks at one run" in shown
    assert "'mosaic_gpu' backend needs an NVIDIA GPU, and this machine's device is 'cpu'; 'scan' runs" in shown


def test_a_machine_without_grain_is_told_what_it_can_do(monkeypatch):
    def version(name, found=importlib.metadata.version):
        if name in ("grain", "optax"):
            raise importlib.metadata.PackageNotFoundError(name)
        return found(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    found = [(finding.works, finding.text) for finding in doctor.versions()]
    assert (None, "grain is not installed: what trains needs data.in_memory") in found
    assert (False, "optax is not installed") in found
    assert found[-1][0] is None and "jax" in found[-1][1]
