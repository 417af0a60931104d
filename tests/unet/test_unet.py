"""The U-Net is the published one: its function, sizes and files; and errors that name the tensor or the option."""

import functools
import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from gspn_jax.config import ConfigError
from gspn_jax.models.attention import attention as flash_or_not
from gspn_jax.state_dict import WeightsError
from gspn_jax.unet import (
    SDXL,
    STABLE_DIFFUSION_1,
    STABLE_DIFFUSION_2,
    Added,
    Execution,
    UNetConfig,
    apply,
    attention,
    expected_shapes,
    from_state_dict,
    load_unet,
    self_attention,
    split_prediction,
)
from tests.unet import numpy_unet
from tests.unet.numpy_unet import CONVOLUTIONS, LINEAR, random_state_dict
from tests.unet.unet_cases import TIMESTEPS, as_json, random_inputs

TOLERANCE = 1e-4  # largest error over the largest output, float32 against float64


_apply = jax.jit(apply, static_argnums=1)


def relative_error(found, truth) -> float:
    return np.abs(np.asarray(found, np.float64) - truth).max() / np.abs(truth).max()


@pytest.mark.parametrize(
    ("config", "size"), [(CONVOLUTIONS, (5, 8)), (LINEAR, (3, 6))], ids=["convolutions", "linear, added"]
)  # odd and even sizes
def test_outputs_are_the_published_ones(config, size):
    weights = random_state_dict(config)
    x, context, added = random_inputs(config, *size)
    found = _apply(from_state_dict(weights, config), config, x, TIMESTEPS, context, added)
    assert found.shape == (3, *size, config.out_channels)
    for i in range(3):
        more = () if added is None else (added.pooled[i], added.sizes[i])
        truth = numpy_unet.apply(weights, config, x[i].transpose(2, 0, 1), TIMESTEPS[i], context[i], *more)
        assert relative_error(found[i], truth.transpose(1, 2, 0)) < TOLERANCE


def test_dilated_convolutions_see_as_far_in_a_larger_map():
    weights = random_state_dict(LINEAR)
    x, context, added = random_inputs(LINEAR, 7, 10)
    run = jax.jit(apply, static_argnums=1, static_argnames="execution")
    found = run(from_state_dict(weights, LINEAR), LINEAR, x, TIMESTEPS, context, added, execution=Execution(dilation=2))
    truth = numpy_unet.apply(
        weights, LINEAR, x[0].transpose(2, 0, 1), TIMESTEPS[0], context[0], added.pooled[0], added.sizes[0], dilation=2
    )
    assert relative_error(found[0], truth.transpose(1, 2, 0)) < TOLERANCE


@pytest.mark.slow
def test_pieces_and_skips_on_the_host_change_memory_alone():
    params = from_state_dict(random_state_dict(CONVOLUTIONS), CONVOLUTIONS)
    x, context, _ = random_inputs(CONVOLUTIONS, 5, 8)
    run = jax.jit(apply, static_argnums=1, static_argnames="execution")
    plain = np.asarray(_apply(params, CONVOLUTIONS, x, TIMESTEPS, context))
    for execution in (Execution(pieces=3), Execution(pieces=16, skips_on_host=True)):
        found = run(params, CONVOLUTIONS, x, TIMESTEPS, context, execution=execution)
        assert relative_error(found, plain) < 1e-5
    program = str(jax.make_jaxpr(lambda x: apply(params, CONVOLUTIONS, x, TIMESTEPS, context, execution=execution))(x))
    assert program.count("MemorySpace.Host") == program.count("MemorySpace.Device") == 9  # every skip, there and back


@pytest.mark.parametrize(
    ("config", "tensors", "count"),
    [(STABLE_DIFFUSION_1, 686, 859_520_964), (STABLE_DIFFUSION_2, 686, 865_910_724), (SDXL, 1680, 2_567_463_684)],
    ids=["1", "2", "XL"],
)
def test_full_sizes_are_those_of_stable_diffusion(config, tensors, count):
    shapes = expected_shapes(config)
    assert len(shapes) == tensors and sum(int(np.prod(shape)) for shape in shapes.values()) == count
    assert len(shapes["mid_block.attentions.0.proj_in.weight"]) == (4 if config is STABLE_DIFFUSION_1 else 2)
    assert UNetConfig.from_json(as_json(config)) == config

    def struct(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16)

    params = {name: struct(*(shape[2:] + shape[1::-1])) for name, shape in shapes.items()}
    added = None if config.added_width is None else Added(struct(2, 1280), struct(2, 6))
    found = jax.eval_shape(
        functools.partial(apply, config=config),
        params,
        x=struct(2, 64, 96, 4),
        timesteps=struct(2),
        context=struct(2, 77, config.context_width),
        added=added,
    )
    assert found == struct(2, 64, 96, 4)


def write_folder(folder, config, weights):
    (folder / "config.json").write_text(json.dumps(as_json(config)))
    save_file(weights, folder / "diffusion_pytorch_model.safetensors")
    return folder


@pytest.mark.parametrize("config", [CONVOLUTIONS, LINEAR], ids=["convolutions", "linear"])
def test_folders_load_and_bfloat16_stays(config, tmp_path):
    weights = {name: value.astype(ml_dtypes.bfloat16) for name, value in random_state_dict(config).items()}
    params, found = load_unet(write_folder(tmp_path, config, weights))
    assert found == config and {value.dtype for value in params.values()} == {jnp.bfloat16.dtype}
    truth = from_state_dict({name: value.astype(np.float32) for name, value in weights.items()}, config)
    for name, value in load_unet(tmp_path, jnp.float32)[0].items():
        np.testing.assert_array_equal(value, truth[name], err_msg=name)


def test_bfloat16_latents_are_computed_in_bfloat16_and_near_float32():
    params = from_state_dict(random_state_dict(LINEAR), LINEAR)
    x, context, added = random_inputs(LINEAR, 3, 6)
    truth = np.asarray(_apply(params, LINEAR, x, TIMESTEPS, context, added))
    half = _apply(params, LINEAR, x.astype(jnp.bfloat16), TIMESTEPS, context, added)
    error = np.asarray(half, np.float32) - truth
    assert half.dtype == jnp.bfloat16 and 0 < np.square(error).mean() < 0.15**2 * np.square(truth).mean()


def test_a_mixer_takes_the_place_of_every_self_attention():
    params = from_state_dict(random_state_dict(CONVOLUTIONS), CONVOLUTIONS)
    x, context, _ = random_inputs(CONVOLUTIONS, 6, 4)
    heads, seen = dict(zip(CONVOLUTIONS.channels, CONVOLUTIONS.heads, strict=True)), {}

    def same(name, tokens):
        seen[name] = tokens.shape[1:]
        return self_attention(params, name, tokens, heads[tokens.shape[-1]])

    def program(mixer):
        return str(jax.make_jaxpr(lambda x: apply(params, CONVOLUTIONS, x, TIMESTEPS, context, mixer=mixer))(x))

    assert program(same) == program(None)
    assert len(seen) == 12 and seen["mid_block.attentions.0.transformer_blocks.1.attn1"] == (2, 1, 16)
    assert seen["up_blocks.2.attentions.2.transformer_blocks.0.attn1"] == (6, 4, 8)
    cross_attentions = program(lambda name, tokens: tokens).count("reduce_max")
    assert cross_attentions == 12 and program(None).count("reduce_max") == 24


def test_attention_that_chooses_flash_attention_fits_both_attentions():
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((2, tokens, 3, 8), np.float32) for tokens in (7, 5, 5))
    truth = np.empty_like(q)
    for b, head in np.ndindex(2, 3):
        scores = np.exp(q[b, :, head] @ k[b, :, head].T / np.sqrt(8))
        truth[b, :, head] = scores @ v[b, :, head] / scores.sum(1, keepdims=True)
    for attend in (attention, flash_or_not):
        assert relative_error(attend(*map(jnp.asarray, (q, k, v))), truth) < TOLERANCE


def test_noise_and_clean_latents_come_back_from_both_predictions():
    rng = np.random.default_rng(0)
    x0, noise = rng.standard_normal((2, 3, 2, 2, 4))
    alpha_bar = np.array([0.9, 0.1, 0.005]).reshape(-1, 1, 1, 1)
    x = np.sqrt(alpha_bar) * x0 + np.sqrt(1 - alpha_bar) * noise
    v = np.sqrt(alpha_bar) * noise - np.sqrt(1 - alpha_bar) * x0
    for kind, output in (("epsilon", noise), ("v_prediction", v)):
        found = split_prediction(kind, output, x, alpha_bar)
        np.testing.assert_allclose(found, (x0, noise), atol=1e-12)
    with pytest.raises(ConfigError, match="prediction_type must be 'epsilon' or 'v_prediction', found 'sample'"):
        split_prediction("sample", v, x, alpha_bar)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda w: {k: v for k, v in w.items() if k != "up_blocks.0.upsamplers.0.conv.bias"},
            r"the weights of the U-Net must have 'up_blocks\.0\.upsamplers\.0\.conv\.bias', found \d+ other tensors",
        ),
        (lambda w: w | {"extra": np.ones(3, np.float32)}, r"must belong to the U-Net of this config, found 'extra'"),
        (
            lambda w: w | {"mid_block.attentions.0.proj_in.weight": np.ones((16, 16, 1, 1), np.float32)},
            r"'mid_block\.attentions\.0\.proj_in\.weight' must have shape \(16, 16\), found \(16, 16, 1, 1\)",
        ),
        (
            lambda w: w | {"conv_out.bias": np.full(5, np.nan, np.float32)},
            r"'conv_out\.bias' must be finite, found NaN",
        ),
    ],
)
def test_other_weights_get_a_sentence(tmp_path, change, message):
    with pytest.raises(WeightsError, match=message):
        load_unet(write_folder(tmp_path, LINEAR, change(random_state_dict(LINEAR))))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("act_fn", "gelu", r"act_fn must be 'silu', found 'gelu'"),
        (
            "class_embed_type",
            "timestep",
            r"class_embed_type must be left out, as in Stable Diffusion, found 'timestep'",
        ),
        ("down_block_types", ["DownBlock2D", "AttnDownBlock2D"], r"must be of .*, found 'AttnDownBlock2D'"),
        ("up_block_types", ["UpBlock2D", "UpBlock2D"], r"down_block_types and up_block_types must mirror each other"),
        ("block_out_channels", [8, 18], r"channels must be multiples of its heads, found 18 and 4"),
        ("attention_head_dim", [8], r"attention_head_dim must have 2 entries as block_out_channels, found \[8\]"),
        ("cross_attention_dim", [20, 24], r"cross_attention_dim must be the same at every level, found \(20, 24\)"),
        ("cross_attention_dim", None, r"cross_attention_dim must be a list with an entry for each level, found None"),
        ("addition_embed_type", "image", r"addition_embed_type must be None or 'text_time', found 'image'"),
        ("addition_time_embed_dim", None, r"addition_time_embed_dim must be an integer, found None"),
        ("projection_class_embeddings_input_dim", 48, r"must be greater than the 48 numbers of the sizes, found 48"),
    ],
)
def test_other_configs_get_a_sentence(field, value, message):
    content = as_json(LINEAR) | {"attention_head_dim": [2, 4]}
    with pytest.raises(ConfigError, match=message):
        UNetConfig.from_json(content | {field: value})


@pytest.mark.wrong_shapes
def test_other_inputs_get_a_sentence():
    params = from_state_dict(random_state_dict(LINEAR), LINEAR)
    x, context, added = random_inputs(LINEAR, 4, 4)
    for inputs, message in [
        ((x[..., :2], context, added), r"latents must be \[B, H, W, 3\], found \[3, 4, 4, 2\]"),
        ((x, context[:2], added), r"text states must be \[3, N, 20\], found \[2, 5, 20\]"),
        ((x, context, None), r"takes pooled text and sizes, found none"),
        ((x, context, Added(added.pooled[:, :4], added.sizes)), r"must be \[3, 10\] and \[3, 6\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            apply(params, LINEAR, inputs[0], TIMESTEPS, *inputs[1:])
