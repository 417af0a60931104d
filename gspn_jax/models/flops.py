"""The analytic operation count of a denoiser, the numerator of MFU."""

from gspn_jax.models.blocks import MLP_RATIO
from gspn_jax.models.embeddings import TIME_FREQUENCIES
from gspn_jax.models.presets import Architecture


def forward_flops(arch: Architecture, channels: int, height: int, width: int) -> float:
    """Operations of one forward pass of one image [height, width, channels]: 2 per multiply-add.

    Counts the linears, the mixers (`MixerOptions.flops`) and depthwise convolutions; leaves out norms, activations,
    softmax and the normalisation of the propagation weights, which are below a percent. `learn_sigma` None counts as
    True.
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
        block = mixer + 2 * linear(hidden, MLP_RATIO * hidden) + linear(hidden, 6 * hidden, times=1)
        joins = 0.0
    else:
        block = mixer + 2.0 * tokens * hidden * 3 * 3 + linear(hidden, hidden)
        joins = arch.depth // 2 * linear(2 * hidden, hidden)
    patches = linear(patch_area * channels, hidden) + linear(hidden, patch_area * outputs)
    time = linear(TIME_FREQUENCIES, hidden, times=1) + linear(hidden, hidden, times=1)
    final_modulation = linear(hidden, 2 * hidden, times=1)
    return arch.blocks * block + joins + patches + time + final_modulation
