"""The analytic operation count of a denoiser, the numerator of MFU."""

from gspn_jax.models.blocks import MLP_RATIO, swiglu_width
from gspn_jax.models.embeddings import TIME_FREQUENCIES
from gspn_jax.models.presets import Architecture


def forward_flops(arch: Architecture, channels: int, height: int, width: int) -> float:
    """Operations of one forward pass of one image [height, width, channels]: 2 per multiply-add.

    Counts the linears, the mixers (`MixerOptions.flops`) and depthwise convolutions; leaves out norms, activations,
    rotary positions, softmax and the normalisation of the propagation weights, which are below a percent.
    `learn_sigma` None counts as True; the embedding of a second time (mean_flow) is left out.
    A training step costs three times as much (backward is two forwards), without recomputation by remat.
    """
    tokens = (height // arch.patch) * (width // arch.patch)
    hidden = arch.hidden
    patch_area = arch.patch**2
    outputs = channels if arch.learn_sigma is False else 2 * channels

    def linear(inputs: int, features: int, times: int = tokens) -> float:
        return 2.0 * times * inputs * features

    mixer = arch.options.flops(hidden, tokens)
    if arch.layout == "dit":
        linears, wide = {"gelu": (2, MLP_RATIO * hidden), "swiglu": (3, swiglu_width(hidden))}[arch.mlp]
        block = mixer + linears * linear(hidden, wide) + linear(hidden, 6 * hidden, times=1)
        joins = 0.0
    else:
        block = mixer + 2.0 * tokens * hidden * 3 * 3 + linear(hidden, hidden)
        joins = arch.depth // 2 * linear(2 * hidden, hidden)
    pixels = patch_area * channels
    embedded = (
        linear(pixels, arch.bottleneck) + linear(arch.bottleneck, hidden) if arch.bottleneck else linear(pixels, hidden)
    )
    patches = embedded + linear(hidden, patch_area * outputs)
    time = linear(TIME_FREQUENCIES, hidden, times=1) + linear(hidden, hidden, times=1)
    final_modulation = linear(hidden, 2 * hidden, times=1)
    return arch.blocks * block + joins + patches + time + final_modulation
