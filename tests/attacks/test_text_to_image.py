"""Attacks on text to image (E2): flags, prompts, and folders of Stable Diffusion that are wrong.

The folder is of tiny networks with random weights (`tests.text_to_image.tiny_folder`).
"""

import json
import shutil

import numpy as np
from safetensors.numpy import load_file, save_file

from gspn_jax import text_to_image
from tests.attacks.attack import GOES_ON, Attack, flags, rows
from tests.attacks.given import write


def drawn(*arguments, prompt=("--prompt", "a dog"), model="{stable_diffusion}", output="{here}/x.png", before=None):
    return flags(text_to_image.main, "--model", model, *prompt, "--output", output, *arguments, before=before)


def prompts_of(content):
    return {"prompt": ("--prompts", "{here}/p.txt"), "before": write("p.txt", content)}


def folder(change):
    """{here}/sd, changed."""

    def before(given, here):
        change(shutil.copytree(given.stable_diffusion, here / "sd"))

    return {"model": "{here}/sd", "before": before}


def fields(name, **values):
    def change(at):
        (at / name).write_text(json.dumps(json.loads((at / name).read_text()) | values))

    return folder(change)


def content(name, data):
    def change(at):
        (at / name).write_bytes(data if isinstance(data, bytes) else data.encode())

    return folder(change)


def without(*names):
    def change(at):
        for name in names:
            shutil.rmtree(at / name) if (at / name).is_dir() else (at / name).unlink()

    return folder(change)


def other_tensors(name, change):
    return folder(lambda at: save_file(change(load_file(at / name)), at / name))


UNET, VAE = "unet/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors"
INDEX = "unet/diffusion_pytorch_model.safetensors.index.json"


def index(**shards):
    def change(at):
        (at / UNET).unlink()
        (at / INDEX).write_text(json.dumps(shards))

    return folder(change)


def nan(tensors):
    return tensors | {"conv_in.bias": np.full_like(tensors["conv_in.bias"], np.nan)}


SCHEDULER, POINTER = (
    "scheduler/scheduler_config.json",
    "version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n",
)

ATTACKS = [
    Attack("E2", what, make, says)
    for what, make, says in (
        ("nothing is said to be drawn", drawn(prompt=()), "--prompt or --prompts FILE must say what to draw"),
        ("prompts of a file that is not there", drawn(prompt=("--prompts", "{here}/none.txt")), "{here}/none.txt"),
        ("prompts of a folder", drawn(prompt=("--prompts", "{here}")), "--prompts must be a text file, found a folder"),
        (
            "prompts of bytes that are no text",
            drawn(**prompts_of(b"\xff\xfe\0d")),
            "--prompts must be a text file in UTF-8",
        ),
        ("prompts of an empty file", drawn(**prompts_of("\n \n")), "a prompt on each line, found none"),
        ("a prompt of bytes that are no text", drawn(prompt=("--prompt", "a dog", "b\udcff")), "must be valid Unicode"),
        ("a negative prompt of bytes that are no text", drawn("--negative", "b\udcff"), "must be valid Unicode"),
        ("drawn into a .jpg", drawn(output="{here}/x.jpg"), "--output must end in .png"),
        (
            "drawn into a folder that is not there",
            drawn(output="{here}/none/x.png"),
            "must lie in a folder that exists",
        ),
        (
            "drawn onto a folder",
            drawn(before=lambda given, here: (here / "x.png").mkdir()),
            "{here}/x.png exists already",
        ),
        (
            "drawn onto a link to nothing",
            drawn(before=lambda given, here: (here / "x.png").symlink_to("none")),
            "{here}/x.png exists already",
        ),
        (
            "the second of two images is there",
            drawn("--images", "2", before=write("x_1.png", "mine")),
            "{here}/x_1.png exists already",
        ),
        ("drawn into a name of 300 letters", drawn(output="{here}/" + "x" * 300 + ".png"), "File name too long"),
        ("10**12 images", drawn("--images", str(10**12)), "--images must be"),
        ("no steps", drawn("--steps", "0"), "--steps must be 1 or more"),
        ("10**9 steps", drawn("--steps", str(10**9)), "steps"),
        ("a guidance of nan", drawn("--guidance", "nan"), "--guidance must be"),
        ("a size of 13 pixels", drawn("--size", "13", "13"), "--size must be multiples of"),
        ("a size of 10**6 pixels", drawn("--size", str(10**6), str(10**6)), "--size must be"),
        ("a sampler that is none", drawn("--sampler", "best"), "--sampler must be one of"),
        ("a seed of 2**64", drawn("--seed", str(2**64)), "--seed must be"),
        ("a model that is not there", drawn(model="{here}/none"), "{here}/none"),
        ("a model that is a run", drawn(model="{run}"), "{run}/model_index.json must exist"),
        ("a model that is a file", drawn(model="{other_weights}"), "model_index.json must exist"),
        ("a model without its unet and scheduler", drawn(**without("unet", "scheduler")), "unet, scheduler not found"),
        ("a model without the unet's config", drawn(**without("unet/config.json")), "unet/config.json must exist"),
        (
            "a model without the vae's weights",
            drawn(**without(VAE)),
            "vae must hold diffusion_pytorch_model.safetensors",
        ),
        ("a model without its merges", drawn(**without("tokenizer/merges.txt")), "merges.txt"),
        ("a model of Flux", drawn(**fields("model_index.json", _class_name="FluxPipeline")), "found 'FluxPipeline'"),
        ("a model of a list", drawn(**fields("model_index.json", _class_name=["a"])), "found ['a']"),
        ("a model_index.json that is empty", drawn(**content("model_index.json", "")), "model_index.json"),
        ("a model_index.json that nests", drawn(**content("model_index.json", "[" * 10**5)), "model_index.json"),
        (
            "weights that are cut",
            drawn(**folder(lambda at: (at / UNET).write_bytes((at / UNET).read_bytes()[:-9]))),
            "must be a safetensors file",
        ),
        ("weights that are a Git LFS pointer", drawn(**content(UNET, POINTER)), "is a Git LFS pointer"),
        ("weights with a NaN", drawn(**other_tensors(UNET, nan)), "'conv_in.bias' must be finite"),
        (
            "weights of float64",
            drawn(
                **other_tensors(UNET, lambda found: {name: value.astype(np.float64) for name, value in found.items()})
            ),
            "found F64",
        ),
        (
            "shards whose names are numbers",
            drawn(**index(weight_map={"a": 3, "b": "c"})),
            "must name safetensors files",
        ),
        ("shards outside of the folder", drawn(**index(weight_map={"a": "../../x.safetensors"})), "beside it"),
        ("a shard of a name with NUL", drawn(**index(weight_map={"a": "a\0.safetensors"})), "which is not there"),
        ("a vocabulary of texts", drawn(**content("tokenizer/vocab.json", '{"a": "b"}')), "tokenizer"),
        ("a vocabulary with a number below 0", drawn(**fields("tokenizer/vocab.json", a=-1)), "tokenizer"),
        ("a vocabulary with a number of 2**40", drawn(**fields("tokenizer/vocab.json", a=2**40)), "tokenizer"),
        ("merges that are binary", drawn(**content("tokenizer/merges.txt", b"\xff\xfe\n\xff")), "merges.txt"),
        (
            "a tokenizer.json without merges",
            drawn(
                **folder(
                    lambda at: [
                        (at / "tokenizer/vocab.json").rename(at / "tokenizer/old"),
                        (at / "tokenizer/tokenizer.json").write_text('{"model": {"type": "BPE", "vocab": {"a": 0}}}'),
                    ]
                )
            ),
            "a list of model.merges",
        ),
        ("a pad token that is a list", drawn(**fields("tokenizer/tokenizer_config.json", pad_token=[1])), "tokenizer"),
        ("a scheduler of 'sample'", drawn(**fields(SCHEDULER, prediction_type="sample")), "prediction_type"),
        ("a scheduler that predicts a list", drawn(**fields(SCHEDULER, prediction_type=["a"])), "prediction_type"),
        (
            "a scheduler of a class that is a list",
            drawn(**fields(SCHEDULER, _class_name=["a"])),
            "--sampler must be given",
        ),
        (
            "a scheduler of 10**13 timesteps",
            drawn(**fields(SCHEDULER, num_train_timesteps=10**13)),
            "num_train_timesteps",
        ),
        ("a scheduler of betas that are texts", drawn(**fields(SCHEDULER, beta_start="a")), "beta_start"),
        (
            "a unet whose channels are a text",
            drawn(**fields("unet/config.json", block_out_channels="abc")),
            "block_out_channels",
        ),
        ("a unet of no channels", drawn(**fields("unet/config.json", block_out_channels=[])), "block_out_channels"),
        (
            "a unet whose channels are negative",
            drawn(**fields("unet/config.json", block_out_channels=[-32, -64])),
            "unet",
        ),
        (
            "a unet whose heads are a text",
            drawn(**fields("unet/config.json", attention_head_dim="a")),
            "attention_head_dim",
        ),
        (
            "a unet of a sample size that is a text",
            drawn(**fields("unet/config.json", sample_size="64")),
            "sample_size is not a number",
        ),
        ("a unet of a sample size of 10**9", drawn(**fields("unet/config.json", sample_size=10**9)), "size"),
        ("a vae of scale nan", drawn(**content("vae/config.json", '{"scaling_factor": NaN}')), "vae"),
        ("a vae of scale true", drawn(**fields("vae/config.json", scaling_factor=True)), "scaling_factor"),
        ("a text tower of width 0", drawn(**fields("text_encoder/config.json", hidden_size=0)), "text_encoder"),
        (
            "a text tower whose heads are a text",
            drawn(**fields("text_encoder/config.json", num_attention_heads="a")),
            "text_encoder",
        ),
        (
            "a text tower of 10**15 words",
            drawn(**fields("text_encoder/config.json", vocab_size=10**15)),
            "text_encoder",
        ),
    )
] + [Attack("E2", "a model as it should be", drawn("--size", "16", "16"), "", GOES_ON)]


@rows(ATTACKS)
def test_a_drawing_says_what_is_wrong(attack, withstand):
    withstand(attack)
