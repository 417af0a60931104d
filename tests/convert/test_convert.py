"""python -m gspn_jax.convert: a DiT comes in and draws what the original does, ours goes out and comes back."""

import dataclasses
import functools
import json
import pickle
import re
import shutil

import jax
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from scipy.linalg import lstsq
from scipy.optimize import brentq

import sample
import train_dit
from gspn_jax import convert, models
from gspn_jax.config import DataConfig, MeshConfig, to_dict
from gspn_jax.data import make_source
from gspn_jax.data.latents import write_synthetic
from gspn_jax.evaluate import report
from gspn_jax.parallel import sharding
from gspn_jax.runs import checkpoints, weight_files
from gspn_jax.runs.digest import digest_of
from gspn_jax.runs.saving import Checkpoints
from gspn_jax.runs.weight_files import HEADER, dit_config
from gspn_jax.sampling.sampler import Sampler
from gspn_jax.training.diffusion import DiffusionTask
from gspn_jax.training.state import create_state
from tests.autoencoder import numpy_vae
from tests.foreign import Foreign
from tests.models import numpy_modern
from tests.models.numpy_dit import denoise, random_state_dict
from tests.training import tiny

SIZES = {"hidden": 16, "depth": 2, "patch": 2, "channels": 4, "out_channels": 8, "num_classes": 5, "grid": 2}
STEPS = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """dit.safetensors in the original's names, its run in dit/; ours/, a GSPN on latents; vae.safetensors."""
    folder = tmp_path_factory.mktemp("convert")
    save_file(random_state_dict(**SIZES), folder / "dit.safetensors")
    convert.main(
        [
            "import",
            "--weights",
            str(folder / "dit.safetensors"),
            "--heads",
            "2",
            "--null-row",
            "last",
            "--step",
            "7",
            "--output",
            str(folder / "dit"),
        ]
    )
    write_synthetic(folder / "set", records=16, latent_shape=(4, 4, 4), num_classes=5)
    data = DataConfig(source="latents", path=str(folder / "set"), image_size=4, channels=4, num_classes=5, flip=True)
    config = dataclasses.replace(tiny.config(folder / "ours", gspn=True), data=data)
    state = create_state(DiffusionTask(config), sharding.make_mesh(config.mesh, jax.devices()[:1]))
    rng = np.random.default_rng(0)  # a final layer of zeros would draw noise whatever the rest
    random = [
        jax.tree.map(lambda leaf: leaf + 0.1 * rng.standard_normal(leaf.shape, np.float32), state.params)
        for _ in range(3)
    ]
    state = dataclasses.replace(state, params=random[0], ema=dict(zip(state.ema, random[1:], strict=True)))
    with Checkpoints(config, make_source(data).fingerprint, [f"class {i}" for i in range(5)]) as saver:
        saver.save(3, state)
    save_file(numpy_vae.random_state_dict(), folder / "vae.safetensors")
    return folder


def drawn(folder, run, output, *flags) -> np.ndarray:
    sample.main(
        [
            "--run",
            str(run),
            "--vae",
            str(folder / "vae.safetensors"),
            "--num-samples",
            "3",
            "--batch-size",
            "8",
            "--output",
            str(output),
            *flags,
        ]
    )
    with np.load(output) as samples:
        return samples["arr_0"]


def test_a_dit_of_elsewhere_becomes_a_run_with_the_diffusion_it_was_trained_with(folder):
    step, config = checkpoints.read_config(folder / "dit")
    assert step == 7 and checkpoints.newest_whole(folder / "dit") == (7, {})
    assert (config.diffusion.objective, config.diffusion.timesteps, config.diffusion.beta_schedule) == (
        "ddpm",
        1000,
        "linear",
    )
    assert models.learns_sigma(config) and config.data.image_size == 4 and config.data.num_classes == 5
    assert (config.sampler.name, config.sampler.steps, config.sampler.guidance_channels) == ("ddpm", 250, "first3")
    assert config.train.ema_decays == (0.9999,) and config.run_dir == str(folder / "dit")


def test_a_table_without_a_null_class_keeps_its_last_class(folder, tmp_path):
    to = ["--heads", "2", "--null-row", "none", "--output", str(tmp_path / "run")]
    convert.main(["import", "--weights", str(folder / "dit.safetensors"), *to])
    step, config = checkpoints.read_config(tmp_path / "run")
    assert config.data.num_classes == 6 and config.diffusion.label_dropout == 0
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    table = checkpoints.restore_params(tmp_path / "run", step, config, mesh)["label_embed"]["embedding"]
    truth = load_file(folder / "dit.safetensors")["y_embedder.embedding_table.weight"]
    np.testing.assert_array_equal(np.asarray(table)[:6], truth)
    assert not np.asarray(table)[6:].any()


def test_a_sit_becomes_a_run_of_flow_matching(folder, tmp_path, capsys):
    to = ["--heads", "2", "--null-row", "last", "--objective", "flow", "--output", str(tmp_path / "run")]
    convert.main(["import", "--weights", str(folder / "dit.safetensors"), *to])
    config = checkpoints.read_config(tmp_path / "run")[1]
    assert (config.diffusion.objective, config.sampler.name) == ("flow", "heun") and models.learns_sigma(config)
    assert capsys.readouterr().out.startswith("a network of width 16, depth 2, patch 2 (")  # not DiT-S/2


def ddpm(state_dict, noise, label) -> np.ndarray:
    """DDPM of STEPS steps with learned variance in float64 (arXiv 2102.09672), on one latent [C, H, W].

    `noise` gives the start, and then one draw for each step but the last."""
    kept = np.round(np.linspace(0, 999, STEPS)).astype(int)
    survived = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))[kept]
    before = np.append(1.0, survived[:-1])
    beta = 1 - survived / before
    posterior = beta * (1 - before) / (1 - survived)
    x = noise[0]
    for i in reversed(range(STEPS)):
        out = denoise(state_dict, x, float(kept[i]), label, heads=2, patch=2)
        epsilon, share = out[:4], (out[4:] + 1) / 2
        x0 = (x - np.sqrt(1 - survived[i]) * epsilon) / np.sqrt(survived[i])
        x = (np.sqrt(before[i]) * beta[i] * x0 + np.sqrt(1 - beta[i]) * (1 - before[i]) * x) / (1 - survived[i])
        if i:
            x = x + np.exp((share * np.log(beta[i]) + (1 - share) * np.log(posterior[i])) / 2) * noise[STEPS - i]
    return x


def test_its_samples_are_those_of_the_original_network_and_diffusion(folder):
    """The whole way by file, run directory and sampler, against float64 NumPy with the same noise."""
    step, config = checkpoints.read_config(folder / "dit")
    config = dataclasses.replace(config, sampler=dataclasses.replace(config.sampler, steps=STEPS))
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    params = checkpoints.restore_params(folder / "dit", step, config, mesh)
    found = Sampler(config, mesh, decode=lambda latents: latents)(params, [3], [9])[0]
    noise = [
        np.asarray(
            jax.random.normal(jax.random.fold_in(jax.random.fold_in(jax.random.key(0), 9), i), (4, 4, 4)), np.float64
        )
        for i in range(STEPS)
    ]
    truth = ddpm(random_state_dict(**SIZES), [draw.transpose(2, 0, 1) for draw in noise], 3).transpose(1, 2, 0)
    assert np.abs(found - truth).max() < 1e-4 * np.abs(truth).max()  # float32, as one call of the network


def released(run, tmp_path, *flags):
    """(the release, the run that it is imported as)."""
    convert.main(["export", "--run", str(run), "--output", str(tmp_path / "release"), *flags])
    convert.main(
        ["import", "--weights", str(tmp_path / "release/model.safetensors"), "--output", str(tmp_path / "back")]
    )
    return tmp_path / "release", tmp_path / "back"


def test_a_dit_that_goes_out_again_has_its_names_and_draws_the_same_images(folder, tmp_path):
    release, back = released(folder / "dit", tmp_path, "--dit-names")
    np.testing.assert_array_equal(
        drawn(folder, folder / "dit", tmp_path / "before.npz", "--sampler.steps", "4"),
        drawn(folder, back, tmp_path / "after.npz", "--sampler.steps", "4"),
    )
    original, written = load_file(folder / "dit.safetensors"), load_file(release / "model.safetensors")
    assert written.keys() == original.keys()
    for name, value in original.items():  # positions are computed anew
        np.testing.assert_allclose(written[name], value, atol=1e-6 if name == "pos_embed" else 0, err_msg=name)


def test_what_is_exported_comes_back_and_draws_the_same_images(folder, tmp_path):
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    sampler = Sampler(checkpoints.read_config(folder / "ours")[1], mesh, decode=lambda latents: latents)

    def latents(run, decay=None):
        step, config = checkpoints.read_config(run)
        assert step == 3
        return sampler(checkpoints.restore_params(run, step, config, mesh, ema_decay=decay), [1, 4], [0, 1])

    found = []
    for decay in (0.9, 0.99, 0.0):
        where = tmp_path / str(decay)
        where.mkdir()
        back = released(folder / "ours", where, "--ema", str(decay))[1]
        found.append(latents(back))
        np.testing.assert_array_equal(found[-1], latents(folder / "ours", decay))
        before, after = (checkpoints.read_meta(path)[1] for path in (folder / "ours", back))
        assert after["config"]["train"].pop("ema_decays") == [decay]
        for name in ("fingerprint", "class_names"):
            assert before[name] == after[name]
        for name in ("model", "diffusion", "sampler"):
            assert before["config"][name] == after["config"][name]
    assert not (found[0] == found[1]).any() and not (found[0] == found[2]).any()


@pytest.mark.slow
def test_an_average_of_any_width_goes_out_and_comes_back(folder, tmp_path):
    """Made of four averages, random ones: the sum whose profile is nearest by numbers, not by the closed form."""
    widths, wanted = (0.05, 0.1), 0.07
    config = dataclasses.replace(checkpoints.read_config(folder / "ours")[1], run_dir=str(tmp_path / "run"))
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, snapshot_every=3, ema_widths=widths))
    state = create_state(DiffusionTask(config), sharding.make_mesh(config.mesh, jax.devices()[:1]))
    rng, stored = np.random.default_rng(0), {}
    with Checkpoints(config, "f", [f"class {i}" for i in range(5)]) as saver:
        for step in (3, 6):
            noisy = lambda leaf: leaf + rng.standard_normal(leaf.shape, np.float32)  # noqa: E731
            state = dataclasses.replace(state, ema={name: jax.tree.map(noisy, one) for name, one in state.ema.items()})
            stored |= {(step, width): jax.device_get(state.ema[f"width_{width}"]) for width in widths}
            saver.save(step, state)

    def profile(step: float, width: float) -> np.ndarray:
        time = (np.arange(60_000) + 0.5) / 10_000
        g = brentq(lambda g: (g + 1) / ((g + 2) ** 2 * (g + 3)) - width**2, 0, 1000)
        return np.where(time < step, (time / step) ** g, 0) * (g + 1) / step

    basis = np.stack([profile(*one) for one in stored], 1)
    rest = lstsq(basis[:, 1:] - basis[:, :1], profile(6, wanted) - basis[:, 0])[0]  # coefficients sum to 1
    coefficients = [1 - rest.sum(), *rest]
    release, back = released(tmp_path / "run", tmp_path, "--ema-width", str(wanted))
    found = dict(
        weight_files.named(weight_files.read(str(release / "model.safetensors"), weight_files.Origin()).params)
    )
    for name, value in found.items():
        each = [np.float64(dict(weight_files.named(one))[name]) for one in stored.values()]
        np.testing.assert_allclose(value, np.tensordot(coefficients, each, 1), rtol=1e-3, atol=1e-3, err_msg=name)
    card = (release / "README.md").read_text()
    assert "| weights | power-function average of width 0.07 (EDM2), made of 4 averages of snapshots, error " in card
    step, imported = checkpoints.read_config(back)
    assert step == 6 and imported.train.ema_decays == (0.0,)
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    params = dict(weight_files.named(checkpoints.restore_params(back, step, imported, mesh)))
    jax.tree.map(np.testing.assert_array_equal, found, jax.device_get(params))


def test_the_card_says_what_a_stranger_must_know(folder, tmp_path):
    run = shutil.copytree(folder / "ours", tmp_path / "ours")
    convert.main(["export", "--run", str(run), "--output", str(tmp_path / "first")])
    with safe_open(tmp_path / "first/model.safetensors", "numpy") as file:
        header = json.loads(file.metadata()[HEADER])
    (run / "evaluation").mkdir()
    for name, sha256 in (("mine", header["parameters_sha256"]), ("other", "0" * 64)):
        report.keep(
            {
                "metrics": {"fid": 12.5 if name == "mine" else 99.5, "is": 3.25},
                "samples": {
                    "parameters_sha256": sha256,
                    "count": 50_000,
                    "labels": "random",
                    "sampler": {"name": "heun", "steps": 3, "guidance_scale": 1.5},
                },
            },
            run / f"evaluation/{name}.json",
        )
    convert.main(["export", "--run", str(run), "--license", "apache-2.0", "--output", str(tmp_path / "card")])
    card, first = ((tmp_path / name / "README.md").read_text() for name in ("card", "first"))
    config = checkpoints.read_config(run)[1]
    count = sum(value.size for value in load_file(tmp_path / "card/model.safetensors").values())
    for said in (
        'license: "apache-2.0"',
        "| license | apache-2.0 |",
        f"| parameters | {count:,} in float32 |",
        "| preset | GSPN-S/2 |",
        "width 32, depth 2, patch 2",
        "32x32: latents of 4x4x4",
        "| training | 3 steps of 16 images (48 seen) |",
        "| weights | exponential moving average, decay 0.9 |",
        "| data set | latents set, 5 classes, fingerprint ",
        "flow matching",
        "| FID 12.5, Inception score 3.25 | 50,000 samples, heun 3 steps, guidance 1.5, random labels |",
        "import --weights model.safetensors --output runs/card",
        "sample.py --run runs/card --vae",
    ):
        assert said in card, said
    assert "99.5" not in card and str(tmp_path) not in card and str(folder) not in card
    assert "| license | unknown: not stated by who exported |" in first and "None were measured" in first
    shown = json.loads(re.search(r"```json\n(.*?)```", card, re.S)[1])
    assert shown["model"] == json.loads(json.dumps(to_dict(config)["model"])) and shown["run_dir"] == "ours"


def test_the_digest_of_the_parameters_is_the_same_on_a_mesh_that_pads_them(folder):
    config = checkpoints.read_config(folder / "ours")[1]
    found = [
        checkpoints.restore_params(folder / "ours", 3, config, mesh)
        for mesh in (
            sharding.make_mesh(MeshConfig(), jax.devices()[:1]),
            sharding.make_mesh(MeshConfig(fsdp=7), jax.devices()[:7]),
        )
    ]
    one, seven = (sum(leaf.size for leaf in jax.tree.leaves(params)) for params in found)
    assert one < seven
    shapes = models.abstract(config)[1]
    assert digest_of(found[0], shapes) == digest_of(found[1], shapes)


def changed(folder, tmp_path, change, name="other.safetensors") -> str:
    """The DiT of the folder with another state_dict, as a file."""
    save_file(change(load_file(folder / "dit.safetensors")), tmp_path / name)
    return str(tmp_path / name)


def without(name):
    return lambda state_dict: {key: value for key, value in state_dict.items() if key != name}


def refused(capsys, *arguments) -> str:
    with pytest.raises(SystemExit) as stopped:
        convert.main([str(argument) for argument in arguments])
    assert stopped.value.code == 2
    shown = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert "Traceback" not in shown
    return shown


@pytest.mark.parametrize(
    ("change", "flags", "said"),
    [
        (lambda s: s, [], "--heads must be given for a DiT of width 16 and depth 2, which is no preset"),
        (lambda s: s, ["--heads", "3"], "model.heads must be a divisor of model.hidden (16), found 3"),
        (lambda s: s, ["--heads", "0"], "--heads must be 1 or more, found 0"),
        (lambda s: s, ["--heads", "2", "--step", "-1"], "--step must be 0 or more, found -1"),
        (without("pos_embed"), ["--heads", "2"], "--image-size must be given for a file without pos_embed"),
        (without("blocks.0.mlp.fc1.bias"), ["--heads", "2"], "the state_dict must have 'blocks.0.mlp.fc1.bias'"),
        (
            without("x_embedder.proj.weight"),
            ["--heads", "2"],
            "must be those of a DiT, as facebookresearch/DiT names them",
        ),
        (
            lambda s: s | {"final_layer.linear.weight": s["final_layer.linear.weight"][:-2]},
            ["--heads", "2"],
            "must give 4 or 8 channels, found 7",
        ),
        (
            lambda s: s | {"t_embedder.mlp.0.bias": np.full(16, np.nan, np.float32)},
            ["--heads", "2"],
            "t_embedder.mlp.0.bias must be finite",
        ),
    ],
)
def test_a_wrong_dit_gets_a_sentence(folder, tmp_path, capsys, change, flags, said):
    weights = changed(folder, tmp_path, change)
    flags = ["--null-row", "last", *flags]
    assert said in refused(capsys, "import", "--weights", weights, "--output", tmp_path / "run", *flags)
    assert [path.name for path in tmp_path.iterdir()] == ["other.safetensors"]


def test_other_files_and_places_get_a_sentence(folder, tmp_path, capsys):
    (tmp_path / "text.safetensors").write_text("hello" * 10)
    (tmp_path / "foreign.pt").write_bytes(pickle.dumps({"a": Foreign(tmp_path / "unpickled")}, protocol=2))
    to = ["--output", tmp_path / "run"]
    assert "text.safetensors must be a safetensors file" in refused(
        capsys, "import", "--weights", tmp_path / "text.safetensors", *to
    )
    assert "the weights must be a file, found nothing at" in refused(capsys, "import", "--weights", "/absent.pt", *to)
    assert "foreign.pt" in refused(capsys, "import", "--weights", tmp_path / "foreign.pt", *to)
    assert not (tmp_path / "unpickled").exists()
    assert "exists already" in refused(
        capsys, "import", "--weights", folder / "dit.safetensors", "--heads", 2, "--output", folder / "ours"
    )
    assert "exists already" in refused(capsys, "export", "--run", folder / "ours", "--output", folder / "dit")
    assert "must lie in a folder that exists" in refused(
        capsys, "export", "--run", folder / "ours", "--output", tmp_path / "no/where"
    )
    assert "no checkpoint in" in refused(capsys, "export", "--run", tmp_path, *to)
    assert "no checkpoint of step 9" in refused(capsys, "export", "--run", folder / "ours", "--step", 9, *to)
    assert "one that the run kept" in refused(capsys, "export", "--run", folder / "ours", "--ema", 0.5, *to)
    width = ("--ema-width", 0.07)
    assert "made of power-function averages" in refused(capsys, "export", "--run", folder / "ours", *width, *to)
    assert "are one average, found" in refused(capsys, "export", "--run", folder / "ours", "--ema", 0.9, *width, *to)
    assert "must be a DiT with attention" in refused(capsys, "export", "--run", folder / "ours", "--dit-names", *to)
    assert "gspn_jax.convert can: import, export, found 'eat'" in refused(capsys, "eat")
    assert not (tmp_path / "run").exists()


def test_a_repa_is_known_by_its_projectors(folder, tmp_path):
    tensors = load_file(folder / "dit.safetensors")
    final = {name: value[: len(value) // 2] for name, value in tensors.items() if name.startswith("final_layer.linear")}
    repa = tensors | final | {"projectors.0.0.weight": np.zeros((3, 16), np.float32)}
    save_file(repa, tmp_path / "repa.safetensors")
    to = ["--heads", "2", "--null-row", "last", "--output"]
    convert.main(["import", "--weights", str(tmp_path / "repa.safetensors"), *to, str(tmp_path / "run")])
    config = checkpoints.read_config(tmp_path / "run")[1]
    assert config.diffusion.objective == "flow" and not models.learns_sigma(config)


def lightning_dit(seed: int = 3) -> dict[str, np.ndarray]:
    """Random weights under the names and in the shapes of hustvl/LightningDiT, of width 16, depth 2 and patch 2."""
    state_dict = random_state_dict(
        hidden=16, depth=2, patch=2, channels=4, out_channels=4, num_classes=7, grid=4, seed=seed
    )
    rng, wide = np.random.default_rng(seed), 2 * 4 * 16 // 3
    for i in range(2):
        for name in ("fc1", "fc2"):
            for kind in ("weight", "bias"):
                del state_dict[f"blocks.{i}.mlp.{name}.{kind}"]
        state_dict |= {
            f"blocks.{i}.mlp.w12.weight": rng.standard_normal((2 * wide, 16)) / 4,
            f"blocks.{i}.mlp.w12.bias": 0.2 * rng.standard_normal(2 * wide),
            f"blocks.{i}.mlp.w3.weight": rng.standard_normal((16, wide)) / 6,
            f"blocks.{i}.mlp.w3.bias": 0.2 * rng.standard_normal(16),
        }
        state_dict |= {f"blocks.{i}.norm{n}.weight": 1 + 0.3 * rng.standard_normal(16) for n in (1, 2)}
        state_dict |= {f"blocks.{i}.attn.{n}_norm.weight": 1 + 0.3 * rng.standard_normal(8) for n in "qk"}
    state_dict["final_layer.norm_final.weight"] = 1 + 0.3 * rng.standard_normal(16)
    state_dict["feat_rope.freqs_cos"] = np.ones((16, 8))  # a buffer, which is not read
    return {name: np.asarray(value, np.float32) for name, value in state_dict.items()}


def by_hand(state_dict: dict[str, np.ndarray]) -> dict:
    """The tree that `numpy_modern` reads, from the names of LightningDiT."""

    def linear(name):
        return {"kernel": np.float64(state_dict[f"{name}.weight"]).T, "bias": np.float64(state_dict[f"{name}.bias"])}

    def stack(*parts):
        return {
            name: stack(*(part[name] for part in parts))
            if isinstance(leaf, dict)
            else np.stack([p[name] for p in parts])
            for name, leaf in parts[0].items()
        }

    def scale(name):
        return {"scale": np.float64(state_dict[f"{name}.weight"])}

    def block(i):
        at = f"blocks.{i}"
        return {
            "modulation": {"linear": linear(f"{at}.adaLN_modulation.1")},
            "norm1": scale(f"{at}.norm1"),
            "norm2": scale(f"{at}.norm2"),
            "mixer": {
                "qkv": linear(f"{at}.attn.qkv"),
                "proj": linear(f"{at}.attn.proj"),
                "q_norm": scale(f"{at}.attn.q_norm"),
                "k_norm": scale(f"{at}.attn.k_norm"),
            },
            "mlp": {"fc1": linear(f"{at}.mlp.w12"), "fc2": linear(f"{at}.mlp.w3")},
        }

    conv = np.float64(state_dict["x_embedder.proj.weight"])
    patches = {"kernel": conv.transpose(2, 3, 1, 0).reshape(-1, 16), "bias": state_dict["x_embedder.proj.bias"]}
    return {
        "patch_embed": {"proj": patches},
        "time_embed": {"fc1": linear("t_embedder.mlp.0"), "fc2": linear("t_embedder.mlp.2")},
        "label_embed": {"embedding": np.float64(state_dict["y_embedder.embedding_table.weight"])},
        "trunk": {"blocks": stack(block(0), block(1))},
        "final": {
            "modulation": {"linear": linear("final_layer.adaLN_modulation.1")},
            "linear": linear("final_layer.linear"),
            "norm": scale("final_layer.norm_final"),
        },
    }


def test_a_lightning_dit_computes_what_it_did(tmp_path, capsys):
    """Against float64 NumPy of its own weights, with its time, from 0 (noise) to 1, and the sign of its velocity."""
    state_dict = lightning_dit()
    save_file(state_dict, tmp_path / "lightning.safetensors")
    to = ["--weights", tmp_path / "lightning.safetensors", "--null-row", "last", "--heads", "2"]
    assert "must be flow for a file of Lightning" in refused(
        capsys, "import", *to, "--objective", "ddpm", "--output", tmp_path / "no"
    )
    convert.main(["import", *map(str, to), "--output", str(tmp_path / "run")])
    step, config = checkpoints.read_config(tmp_path / "run")
    arch = models.resolve(config.model)
    assert (arch.mlp, arch.norm, arch.options.rope, arch.options.qk_norm) == ("swiglu", "rms", True, True)
    assert config.diffusion.objective == "flow"
    params = checkpoints.restore_params(tmp_path / "run", step, config, sharding.make_mesh(config.mesh))
    rng = np.random.default_rng(0)
    x, t = rng.standard_normal((2, 8, 8, 4)).astype(np.float32), np.array([0.3, 0.9], np.float32)
    found = jax.jit(functools.partial(models.apply, models.abstract(config)[0]))(params, x, 1000 * t, np.array([1, 7]))
    settings = {"heads": 2, "patch": 2, "rope": True, "swiglu": True}
    wanted = [
        -numpy_modern.denoise(by_hand(state_dict), image, 1 - time, y, **settings)
        for image, time, y in zip(x, t, (1, 7), strict=True)
    ]
    np.testing.assert_allclose(found, wanted, atol=1e-5 * np.abs(wanted).max())


def test_what_was_exported_must_be_whole(folder, tmp_path, capsys):
    convert.main(["export", "--run", str(folder / "ours"), "--output", str(tmp_path / "release")])
    path = tmp_path / "release/model.safetensors"
    tensors = load_file(path)
    with safe_open(path, "numpy") as file:
        metadata = file.metadata()
    header = json.loads(metadata[HEADER])

    def said(tensors=tensors, *flags, **values) -> str:
        save_file(tensors, path, metadata=metadata | {HEADER: json.dumps(header | values)})
        return refused(capsys, "import", "--weights", path, "--output", tmp_path / "run", *flags)

    name = "patch_embed.proj.bias"
    assert "their SHA-256 has changed" in said(tensors | {name: tensors[name] + 1})
    assert f"found '{name}' on one side only" in said(without(name)(tensors))
    assert f"'{name}' must have shape (32,), found (31,)" in said(tensors | {name: tensors[name][1:]})
    assert "must be of format version 1 with its fields, found version 2" in said(version=2)
    assert "5 names of classes" in said(class_names=["a"])
    assert "config.colour must be one of" in said(config=header["config"] | {"colour": 1})
    assert "--step is for a DiT of elsewhere" in said(tensors, "--step", "3")


def test_an_imported_run_is_not_trained_on(folder, tmp_path, capsys):
    run = shutil.copytree(folder / "dit", tmp_path / "run")
    (tmp_path / "config.py").write_text(
        "import dataclasses\nfrom gspn_jax.runs.checkpoints import read_config\n"
        f"config = read_config({str(run)!r})[1]\nconfig = dataclasses.replace(config, run_dir={str(run)!r}, "
        f"data=dataclasses.replace(config.data, path={str(folder / 'set')!r}))\n"
    )
    with pytest.raises(SystemExit) as stopped:
        train_dit.main(["--config", str(tmp_path / "config.py"), "--train.steps", "9"])
    assert stopped.value.code == 2 and "choose another run_dir to start a new run" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stopped:
        train_dit.main(["--config", str(tmp_path / "config.py"), "--train.steps", "9", "--train.allow-change", "data"])
    assert stopped.value.code == 2 and "to train on from it, and has no params, opt_state" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stopped:
        sample.main(["--run", str(run), "--ema", "0"])
    assert stopped.value.code == 2 and "must hold the parameters asked for (--ema 0)" in capsys.readouterr().err


@pytest.mark.torch
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_torch_file_gives_the_run_of_its_safetensors(folder, tmp_path, wrapped):
    import torch

    tensors = {name: torch.tensor(value) for name, value in load_file(folder / "dit.safetensors").items()}
    other = {name: torch.zeros_like(value) for name, value in tensors.items()}
    torch.save({"model": other, "ema": tensors} if wrapped else tensors, tmp_path / "dit.pt")
    to = ["--heads", "2", "--null-row", "last", "--output", str(tmp_path / "run")]
    convert.main(["import", "--weights", str(tmp_path / "dit.pt"), *to])
    steps = ["--sampler.steps", "4"]
    np.testing.assert_array_equal(
        drawn(folder, tmp_path / "run", tmp_path / "a.npz", *steps),
        drawn(folder, folder / "dit", tmp_path / "b.npz", *steps),
    )


def test_the_published_sizes_are_known():
    for grid, side in ((16, 32), (32, 64)):
        shapes = {
            "x_embedder.proj.weight": (1152, 4, 2, 2),
            "y_embedder.embedding_table.weight": (1001, 1152),
            "final_layer.linear.weight": (32, 1152),
            "pos_embed": (1, grid * grid, 1152),
            **{f"blocks.{i}.attn.qkv.bias": (3456,) for i in range(28)},
        }
        config = dit_config({name: np.broadcast_to(np.float32(0), shape) for name, shape in shapes.items()})
        assert config.model.preset == "DiT-XL/2" and config.data.image_size == side
        assert models.count_parameters(config) == pytest.approx(675e6, rel=0.01) and models.learns_sigma(config)
