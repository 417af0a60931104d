"""gpu_check.sh: the next step follows whatever became of the last, the table says what; it ends on a bare machine."""

import json
import os
import subprocess
import sys
import tarfile

import pytest

from tests.benchmarks import scripts
from tests.training.bare import BARE

gpu_table = scripts.load("gpu_table")

SCRIPT = scripts.FOLDER / "gpu_check.sh"
STEPS = ("doctor", "values", "speed", "training", "sampling", "run")
FILES = {
    "table.txt",
    "values.json",
    "speed.json",
    "training.json",
    "sampling.json",
    "run.json",
    "samples.png",
    "logs.tar.gz",
}


def check(out, *flags, **environment):
    return subprocess.run(
        ["bash", str(SCRIPT), *flags],
        text=True,
        capture_output=True,
        timeout=1800,
        env=os.environ | {"OUT": str(out), "PYTHON": sys.executable} | environment,
    )


def logs(out):
    with tarfile.open(out / "logs.tar.gz") as tar:
        return {
            os.path.basename(member.name): tar.extractfile(member).read().decode() for member in tar if member.isfile()
        }


def outcomes(out):
    lines = [line.split() for line in (out / "table.txt").read_text().splitlines() if not line.startswith(" ")]
    return {name: rest[0] for name, *rest in lines}


@pytest.mark.slow
def test_steps_that_fail_do_not_stop_the_next(tmp_path):
    out = tmp_path / "out"
    done = check(out, "--rehearse", *(flag for step in STEPS for flag in ("--fail", step)))
    assert done.returncode == 1
    assert outcomes(out) == dict.fromkeys(STEPS, "FAILED")
    assert (out / "table.txt").read_text() in done.stdout and "no results" in done.stdout
    assert logs(out) == {f"{step}.log": "made to fail by --fail\n" for step in STEPS}
    again = check(out, "--rehearse")
    assert again.returncode == 2 and "has results already" in again.stderr


def test_only_the_steps_that_are_asked_for_run(tmp_path):
    done = check(tmp_path / "out", "--rehearse", "--only", "speed", "--only", "run", "--fail", "speed", "--fail", "run")
    assert done.returncode == 1 and outcomes(tmp_path / "out") == {"speed": "FAILED", "run": "FAILED"}


@pytest.mark.slow
def test_a_step_that_hangs_is_stopped_and_one_without_time_is_not_begun(tmp_path):
    hangs = tmp_path / "python"  # in place of every script, except for the table
    hangs.write_text(f'#!/bin/sh\ncase $1 in *gpu_table.py) exec {sys.executable} "$@" ;; esac\nexec sleep 600\n')
    hangs.chmod(0o755)
    done = check(tmp_path / "out", "--rehearse", "--fail", "run", PYTHON=str(hangs), SECONDS_IN_ALL="137")
    assert done.returncode == 1
    table = (tmp_path / "out/table.txt").read_text()
    assert outcomes(tmp_path / "out") == dict.fromkeys(STEPS, "OUT") | {"run": "FAILED"}
    assert "doctor     OUT OF TIME" in table
    assert logs(tmp_path / "out")["sampling.log"] == "no time was left for it\n"


@pytest.mark.parametrize("flags, sentence", [
    (["--fail", "nothing"], "--fail must be one of doctor values speed training sampling run, found 'nothing'"),
    (["--images", "/no/such"], "--images must be a folder or an archive, found '/no/such'"),
    (["--quick"], "the options are --images CIFAR, --rehearse, --only STEP and --fail STEP, found '--quick'"),
])  # fmt: skip
def test_wrong_flags_get_a_sentence(tmp_path, flags, sentence):
    done = check(tmp_path / "out", *flags)
    assert done.returncode == 2 and sentence in done.stderr and not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_rehearsal_ends_on_a_bare_machine(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(BARE)
    out = tmp_path / "out"
    done = check(out, "--rehearse", PYTHONPATH=str(tmp_path))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert outcomes(out) == dict.fromkeys(STEPS, "ok")
    assert {path.name for path in out.iterdir()} == FILES
    assert logs(out).keys() == {f"{step}.log" for step in STEPS}
    assert "tensorboardX is not installed" in logs(out)["run.log"]  # nothing of it can be imported
    run = json.loads((out / "run.json").read_text())
    assert run["steps"] == 4 and run["judge"]["num_samples"] == 40 and run["curve"][-1]["step"] == 4
    training = json.loads((out / "training.json").read_text())["results"]
    assert [row["attention"] for row in training.values()] == [None, "xla"]


def write(folder, steps, **files):
    (folder / "steps.tsv").write_text("".join("\t".join(step) + "\n" for step in steps))
    for name, found in files.items():
        (folder / f"{name}.json").write_text(found if isinstance(found, str) else json.dumps(found))


def shown(folder, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu_table.py", str(folder), str(folder / "steps.tsv")])
    with pytest.raises(SystemExit) as stopped:
        gpu_table.main()
    return int(stopped.value.code), capsys.readouterr().out


def test_the_table_says_what_was_found(tmp_path, monkeypatch, capsys):
    about = {"device": "1 x NVIDIA H200", "jax": "0.11.2", "date": "2026-12-01"}
    right = {"case": "propagate 1", "correct": True, "errors": {"forward": 1e-7}}
    model = {
        "parameters": 692e6,
        "remat": "full",
        "scans": "mosaic_gpu",
        "attention": None,
        "train_ms": 188.0,
        "images_per_second": 340.4,
        "mfu": 0.361,
        "peak_bytes": 48.3e9,
        "train_kernels": [
            {"kernel": kernel, "ms": ms}
            for kernel, ms in [
                ("line_scan_forward_mosaic_gpu_kernel", 90.0),
                ("loop_add_fusion", 7.5),
                ("nvjet_sm90_tss", 20.5),
                ("nvjet_sm90_tst_128x160", 60.0),
                ("conv2d_c1_k1_nhwc_specialized", 9.0),
                ("loop_convert_fusion", 1.0),
                ("MemcpyD2D", 0.5),
            ]
        ],
    }
    write(
        tmp_path,
        [
            ("doctor", "0", "9", "60"),
            ("values", "0", "50", "100"),
            ("training", "0", "90", "170"),
            ("run", "0", "100", "120"),
        ],
        values=about | {"cases": [right, right]},
        training=about | {"results": {"GSPN-XL/2": model, "DiT-XL/2": model | {"attention": "cudnn"}}},
        run=about
        | {
            "model": "GSPN-S/2",
            "parameters": 18.9e6,
            "steps": 900,
            "images_seen": 230400,
            "last_loss": 0.1234,
            "images_per_second": 4321.0,
            "mfu": 0.1,
            "judge": {
                "num_samples": 2000,
                "conditional_accuracy": 0.5,
                "classifier_accuracy": 0.8,
                "frechet": 12.0,
                "frechet_floor": 0.3,
            },
        },
    )
    code, text = shown(tmp_path, monkeypatch, capsys)
    assert code == 0
    for said in (
        "values     ok           50 s of 100",
        "on 1 x NVIDIA H200, jax 0.11.2, 2026-12-01",
        "2 of 2 variants of the kernel agree with float64",
        "GSPN-XL/2 (692M, remat full, scans by mosaic_gpu), 188 ms a step, 340.4 images/s, 36.1% MFU, 48.3 GB",
        "DiT-XL/2 (692M, remat full, scans by mosaic_gpu), attention by cudnn, 188 ms",
        "a step, by kind: scans 90 ms, products 80.5 ms, convolutions 9 ms, the rest 8.5 ms, copies 0.5 ms",
        "GSPN-S/2 (18.9M): 900 steps, 230,400 images, loss 0.1234, 4321 images/s, MFU 10.0%",
        "2000 samples: the class asked for 0.500",
        "Frechet distance 12 (held-out images 0.3)",
    ):
        assert said in text
    assert text.count("1 x NVIDIA H200") == 1


def test_the_table_says_what_is_wrong_or_missing(tmp_path, monkeypatch, capsys):
    wrong = {"case": "propagate 2", "correct": False, "errors": {"forward": 1.1}}
    write(
        tmp_path,
        [
            ("values", "1", "50", "100"),
            ("speed", "124", "110", "110"),
            ("training", "1", "3", "170"),
            ("sampling", "137", "90", "90"),
            ("run", "no images were named", "0", "0"),
        ],
        values={"cases": [wrong, {"case": "propagate 3", "correct": None}]},
        speed={"values": "0 of 2 right", "blocks_error": "Traceback ...\nRuntimeError: out of memory\n"},
        training='{"results": {',
        sampling={"results": {"DiT-XL/2": {"error": "no answer in 50 s"}}},
    )
    code, text = shown(tmp_path, monkeypatch, capsys)
    assert code == 1
    for said in (
        "values     FAILED (1)",
        "0 of 2 variants",
        "NOT RIGHT propagate 2: forward 1.1e+00",
        "NOT RIGHT propagate 3: no answer",
        "speed      OUT OF TIME  110 s of 110",
        "values of the kernel that is timed: 0 of 2 right",
        "ERROR in blocks: RuntimeError: out of memory",
        "training.json cannot be read: JSONDecodeError",
        "DiT-XL/2: no answer in 50 s",
        "run        NOT RUN (no images were named)",
        "no results",
    ):
        assert said in text
