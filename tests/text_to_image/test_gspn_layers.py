"""GSPN in the place of the U-Net's self-attentions: the function, counts, files, and images drawn with it."""

import dataclasses
import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from gspn_jax import text_to_image, unet
from gspn_jax.config import ConfigError
from gspn_jax.state_dict import WeightsError
from gspn_jax.text_to_image import command, gspn_layers, layer_files
from gspn_jax.text_to_image.folder import load_folder
from gspn_jax.text_to_image.gspn_layers import LayerOptions
from gspn_jax.unet import SDXL, STABLE_DIFFUSION_1, STABLE_DIFFUSION_2
from tests.text_to_image import numpy_gspn_layer
from tests.text_to_image.tiny_folder import XL, write_folder
from tests.unet.numpy_unet import CONVOLUTIONS, LINEAR, random_state_dict
from tests.unet.unet_cases import TIMESTEPS, random_inputs

TOLERANCE = 1e-5  # largest error over the largest value, float32 against float64
SMALL = dataclasses.replace(CONVOLUTIONS, layers=1, middle_depth=1)
WITH_ALL = LayerOptions(form="qkv", proxy_ratio=4, skip=True, chunks=(2, 0, 3))


def relative_error(found, truth) -> float:
    assert np.shape(found) == np.shape(truth)
    return np.abs(np.asarray(found, np.float64) - truth).max() / np.abs(truth).max()


def random_layers(config, options, seed=0):
    """Parameters under which every term of a layer matters."""
    rng = np.random.default_rng(seed)
    found = {}
    for name, own in gspn_layers.shapes(config, options).items():
        value = rng.standard_normal(own.shape, np.float32)
        found[name] = value if len(own.shape) == 1 else value / np.float32(math.sqrt(own.shape[0]))
    return found


@pytest.mark.parametrize("size", [(3, 5), (4, 2)], ids=str)
@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("form", ["pure", "qkv"])
def test_values_and_gradients_are_those_of_a_loop(form, skip, size):
    options, chunk = LayerOptions(form=form, proxy_ratio=2, skip=skip), (None if skip else 2)
    one = dataclasses.replace(LINEAR, channels=(6,), depths=(1,), heads=(1,), middle_depth=1)
    name, rng = "mid_block.attentions.0.transformer_blocks.0.attn1.", np.random.default_rng(1)
    params = {part.removeprefix(name): v for part, v in random_layers(one, options).items() if part.startswith(name)}
    x, cotangent = (rng.standard_normal((2, *size, 6)).astype(np.float32) for _ in range(2))
    exact = {part: value.astype(np.float64) for part, value in params.items()}

    def loss(params, x):
        y = gspn_layers.layer(params, options, x, chunk=chunk)
        return (y * cotangent).sum(), y

    (by_params, by_x), y = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(params, x)
    assert relative_error(y, numpy_gspn_layer.layer(exact, form, x.astype(np.float64), chunk)) < TOLERANCE
    expected, expected_x = numpy_gspn_layer.gradients(exact, form, x.astype(np.float64), chunk, cotangent)
    assert relative_error(by_x, expected_x) < TOLERANCE
    assert by_params.keys() == expected.keys()
    for part, value in expected.items():
        assert relative_error(by_params[part], value) < TOLERANCE, part


@pytest.mark.parametrize("form", ["pure", "qkv"])
def test_channels_are_scanned_in_pieces_to_the_same_result(form):
    options, name = (
        LayerOptions(form=form, proxy_ratio=4, skip=True),
        "mid_block.attentions.0.transformer_blocks.0.attn1.",
    )
    params = {part.removeprefix(name): v for part, v in random_layers(LINEAR, options).items() if part.startswith(name)}
    x = np.random.default_rng(0).standard_normal((2, 5, 3, 16)).astype(np.float32)
    whole = gspn_layers.layer(params, options, x, chunk=2)
    for channels in (16, 7, 1):
        found = gspn_layers.layer(params, options, x, chunk=2, channels=channels)
        assert relative_error(found, np.asarray(whole)) < TOLERANCE


@pytest.mark.slow
def test_layers_take_the_place_of_all_attentions_with_the_chunk_of_their_level():
    config, params = SMALL, unet.from_state_dict(random_state_dict(SMALL), SMALL)
    layers = random_layers(config, WITH_ALL)
    x, context, _ = random_inputs(config, 7, 10)
    seen = {}

    def truth(name, tokens):
        prefix = f"{name}."
        own = {part.removeprefix(prefix): np.asarray(value, np.float64)
               for part, value in layers.items() if part.startswith(prefix)}  # fmt: skip
        seen[name] = tokens.shape[1:]
        chunk = {(7, 10): 2, (4, 5): None, (2, 3): 3}[tokens.shape[1:3]]
        exact = functools.partial(numpy_gspn_layer.layer, own, "qkv", chunk=chunk)
        like = jax.ShapeDtypeStruct(tokens.shape, np.float32)
        return jax.pure_callback(lambda t: exact(np.asarray(t, np.float64)).astype(np.float32), like, tokens)

    rest = {name: value for name, value in params.items() if ".attn1." not in name}
    inputs = x, TIMESTEPS, context

    @jax.jit
    def both(layers):
        mixer = gspn_layers.mixer(layers, config, WITH_ALL)
        return (
            unet.apply_with_features(rest, config, *inputs, mixer=mixer),
            unet.apply_with_features(rest, config, *inputs, mixer=truth),
        )

    (found, features), (expected, expected_features) = both(layers)
    assert relative_error(found, np.asarray(expected)) < TOLERANCE
    assert features.keys() == seen.keys() == gspn_layers.attention_widths(config).keys() and len(seen) == 7
    for name, value in expected_features.items():
        assert relative_error(features[name], np.asarray(value)) < TOLERANCE, name


def test_features_are_the_outputs_of_the_attentions():
    config, params = SMALL, unet.from_state_dict(random_state_dict(SMALL), SMALL)
    x, context, _ = random_inputs(config, 4, 6)
    heads = dict(zip(config.channels, config.heads, strict=True))

    @jax.jit
    def both(params):
        told = {}

        def same(name, tokens):
            told[name] = unet.self_attention(params, name, tokens, heads[tokens.shape[-1]])
            return told[name]

        plain = unet.apply(params, config, x, TIMESTEPS, context, mixer=same)
        return unet.apply_with_features(params, config, x, TIMESTEPS, context), (plain, told)

    (found, features), (plain, told) = both(params)
    np.testing.assert_array_equal(found, plain)
    assert features.keys() == told.keys() == gspn_layers.attention_widths(config).keys()
    for name, value in told.items():
        np.testing.assert_array_equal(features[name], value, err_msg=name)


@pytest.mark.parametrize(
    ("config", "options", "layers", "whole"),
    [
        (STABLE_DIFFUSION_1, LayerOptions(skip=True), 51_122_944, 861_069_828),
        (SDXL, LayerOptions(form="qkv", proxy_ratio=32, skip=True), 489_683_480, 2_647_463_964),
        (SDXL, LayerOptions(skip=True), 422_483_480, 2_580_263_964),
        (STABLE_DIFFUSION_1, LayerOptions(), None, None),
        (STABLE_DIFFUSION_2, LayerOptions(form="qkv"), None, None),
    ],
    ids=["1, pure", "XL, qkv", "XL, pure", "1, without skip", "2, qkv without skip"],
)
def test_full_sizes_are_those_of_the_released_layers(config, options, layers, whole):
    widths = gspn_layers.attention_widths(config)
    assert len(widths) == (70 if config is SDXL else 16)
    terms, more = (25 if options.skip else 21) / options.proxy_ratio, 3 if options.form == "qkv" else 0
    by_formula = sum(d * d * (1 + terms + more) + d + 4 for d in widths.values())
    own = gspn_layers.shapes(config, options)
    count = sum(math.prod(shape.shape) for shape in own.values())
    rest = {name: shape for name, shape in unet.expected_shapes(config).items() if ".attn1." not in name}
    assert count == by_formula == (layers or by_formula)
    assert whole in (None, count + sum(math.prod(shape) for shape in rest.values()))

    drawn = jax.eval_shape(lambda: gspn_layers.init(config, options, jax.random.key(0)))
    assert {name: (value.shape, value.dtype) for name, value in drawn.items()} == {
        name: (value.shape, value.dtype) for name, value in own.items()
    }


@pytest.mark.parametrize(
    ("config", "options"),
    [
        pytest.param(STABLE_DIFFUSION_1, LayerOptions(skip=True), id="1"),
        pytest.param(STABLE_DIFFUSION_2, LayerOptions(form="qkv"), id="2", marks=pytest.mark.slow),
        pytest.param(SDXL, LayerOptions(form="qkv", proxy_ratio=32, skip=True), id="XL", marks=pytest.mark.slow),
    ],
)
def test_full_sizes_fit_together_at_any_aspect_ratio(config, options):
    def struct(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16)

    params = {
        name: struct(*(shape[2:] + shape[1::-1]))
        for name, shape in unet.expected_shapes(config).items()
        if ".attn1." not in name
    }
    added = None if config.added_width is None else unet.Added(struct(1, 1280), struct(1, 6))

    def run(params, layers, x, context, added):
        mixer = gspn_layers.mixer(layers, config, options)
        return unet.apply_with_features(params, config, x, np.zeros(1), context, added, mixer=mixer)

    layers = gspn_layers.shapes(config, options)
    x, context = struct(1, 40, 72, 4), struct(1, 77, config.context_width)  # neither square nor 1 : 2
    found, features = jax.eval_shape(run, params, layers, x, context, added)
    assert found == x
    assert {name: value.shape[-1] for name, value in features.items()} == gspn_layers.attention_widths(config)


def test_layers_start_from_the_attentions_they_replace():
    teacher = unet.from_state_dict(random_state_dict(LINEAR), LINEAR)
    options = LayerOptions(form="qkv", proxy_ratio=4)
    fresh = gspn_layers.init(LINEAR, options, jax.random.key(1))
    for own in fresh.values():
        assert own.ndim < 2 or 0 < np.abs(own).max() <= math.sqrt(6 / (own.shape[0] + math.prod(own.shape[1:])))
    begun = gspn_layers.started_from(fresh, teacher)
    assert begun.keys() == fresh.keys()
    copied = {name for name in begun if name in teacher}
    assert len(copied) == 5 * len(gspn_layers.attention_widths(LINEAR)) and not any("proxy" in name for name in copied)
    for name, value in begun.items():
        np.testing.assert_array_equal(value, teacher.get(name, fresh[name]), err_msg=name)


def test_a_file_holds_the_layers_alone_and_says_what_they_are(tmp_path):
    path, params = tmp_path / "layers.safetensors", random_layers(CONVOLUTIONS, WITH_ALL)
    layer_files.save(path, params, CONVOLUTIONS, WITH_ALL, {"steps": 3})
    found = layer_files.load(path, CONVOLUTIONS)
    assert found.options == WITH_ALL and found.about == {"steps": 3}
    assert load_file(path).keys() == params.keys() == found.params.keys()
    for name, value in params.items():
        np.testing.assert_array_equal(found.params[name], value, err_msg=name)
    said = json.loads((tmp_path / "layers.json").read_text())
    assert said["parameters"] == sum(value.size for value in params.values()) and said["options"]["chunks"] == [2, 0, 3]
    with pytest.raises(ConfigError, match=r"layers\.json exists already"):
        layer_files.save(path, params, CONVOLUTIONS, WITH_ALL)
    with pytest.raises(ConfigError, match=r"must end in \.safetensors, found"):
        layer_files.save(tmp_path / "layers", params, CONVOLUTIONS, WITH_ALL)


def test_other_files_get_a_sentence(tmp_path):
    path = tmp_path / "layers.safetensors"
    layer_files.save(path, random_layers(CONVOLUTIONS, WITH_ALL), CONVOLUTIONS, WITH_ALL)
    with pytest.raises(
        ConfigError, match=r"layers\.safetensors: the GSPN layers must be those of a U-Net of .*\[8, 16\]"
    ):
        layer_files.load(path, LINEAR)
    with pytest.raises(FileNotFoundError, match="the GSPN layers must be a file, found nothing"):
        layer_files.load(tmp_path / "none.safetensors", LINEAR)
    released = {f"3.{part}.weight": np.ones((2, 8, 1, 1), np.float32) for part in ("x_conv_down", "w_conv_up")}
    tensors = load_file(path)
    for content, metadata, message in (
        (released, None, "a checkpoint of the released code is not read, as its layers are another function"),
        (tensors, None, "must be a file that this project wrote .* tensors without it"),
        (tensors, {layer_files.HEADER: '{"version": 7}'}, "must be a file that this project wrote .* with another"),
        (tensors, {layer_files.HEADER: '{"version": 1, "options": {"a": 1}}'}, "the options of GSPN layers must be"),
        (
            tensors,
            {layer_files.HEADER: '{"version": 1, "options": {"chunks": 4}}'},
            "the options of GSPN layers must be",
        ),
    ):
        save_file(content, tmp_path / "other.safetensors", metadata=metadata)
        with pytest.raises(WeightsError, match=rf"other\.safetensors: .*{message}"):
            layer_files.load(tmp_path / "other.safetensors", CONVOLUTIONS)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"form": "both"}, "the form of GSPN layers must be one of pure, qkv, found 'both'"),
        ({"proxy_ratio": 0}, "the proxy_ratio of GSPN layers must be 1 or more, found 0"),
        ({"chunks": ()}, "the chunks of GSPN layers must be numbers of lines from 0"),
        ({"chunks": (4, -1, 4)}, "the chunks of GSPN layers must be numbers of lines from 0"),
        ({"chunks": (4, 4)}, "must be one number, or one for each of the 3 levels of the U-Net, found 2"),
        (
            {"proxy_ratio": 3},
            "the proxy_ratio of GSPN layers must divide the widths of the U-Net, found 3 for a layer of 8",
        ),
    ],
)
def test_options_that_do_not_fit_get_a_sentence(changes, message):
    with pytest.raises(ConfigError, match=message):
        gspn_layers.shapes(CONVOLUTIONS, LayerOptions(**{"proxy_ratio": 4} | changes))


def content_of(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.slow
def test_the_command_draws_with_layers_of_a_file(tmp_path):
    folder = write_folder(tmp_path / "XL", *XL)
    before, options = content_of(folder), LayerOptions(form="qkv", proxy_ratio=4, chunks=(2, 0))
    layer_files.save(tmp_path / "layers.safetensors", random_layers(XL[0], options), XL[0], options)
    flags = f"--model {folder} --prompt dog --size 16 24 --steps 1 --sampler euler --mixer gspn"
    flags += f" --gspn-layers {tmp_path / 'layers.safetensors'} --output {tmp_path / 'dog.png'}"
    text_to_image.main(flags.split())
    image = Image.open(tmp_path / "dog.png")
    assert image.size == (24, 16) and image.text["mixer"] == "gspn" and content_of(folder) == before
    said = json.loads(image.text["gspn"])
    assert said["chunks"] == [2, 0] and said["layers"].endswith("layers.safetensors")


def test_layers_without_a_file_are_untrained_and_say_so(tmp_path, caplog):
    model = load_folder(write_folder(tmp_path, *XL))
    options = LayerOptions(form="qkv", proxy_ratio=4)
    given = command.Arguments(model="folder", prompt=("dog",), output="dog.png", mixer="gspn", gspn=options)
    with caplog.at_level("WARNING", "gspn_jax"):
        found = command.read_layers(given, model)
    assert "the GSPN layers are untrained" in caplog.text and found.options == options
    fresh = gspn_layers.init(XL[0], options, jax.random.key(0))
    for name, value in gspn_layers.started_from(fresh, model.unet).items():
        np.testing.assert_array_equal(found.params[name], value, err_msg=name)


def test_flags_that_contradict_get_a_sentence():
    given = {"model": "folder", "prompt": ("dog",), "output": "dog.png", "gspn_layers": "a.safetensors"}
    with pytest.raises(ConfigError, match=r"--gspn\.\* are for untrained layers, .* found both"):
        command.Arguments(**given, mixer="gspn", gspn=LayerOptions(skip=True))
    with pytest.raises(ConfigError, match="--gspn-layers is for --mixer gspn, found --mixer attention"):
        command.Arguments(**given)
