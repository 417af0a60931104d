"""The analytic operation count of a denoiser, the numerator of MFU."""

from gspn_jax.models.blocks import MLP_RATIO
from gspn_jax.models.embeddings import TIME_FREQUENCIES
from gspn_jax.models.mixers import DIRECTIONS, MIXER_KERNEL, NEIGHBOURS
from gspn_jax.models.presets import Architecture


def forward_flops(arch: Architecture, channels: int, height: int, width: int) -> float:
    """Operations of one forward pass of one image [height, width, channels]: 2 per multiply-add.

    Counts the linears, attention, depthwise convolutions and line scans; leaves out norms, activations, softmax and
    the normalisation of the propagation weights, which are below a percent. `learn_sigma` None counts as True.
    A training step costs three times as much (backward is two forwards), without recomputation by remat.
    """
    tokens = (height // arch.patch) * (width // arch.patch)
    hidden = arch.hidden
    patch_area = arch.patch**2
    outputs = channels if arch.learn_sigma is False else 2 * channels

    def linear(inputs: int, features: int, times: int = tokens) -> float:
        return 2.0 * times * inputs * features

    mixer = _attention(hidden, tokens) if arch.mixer == "attention" else _gspn(arch, tokens)
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


def _attention(hidden: int, tokens: int) -> float:
    """qkv and output linears, and two products of [tokens, tokens] with the heads."""
    return 2.0 * tokens * hidden * 4 * hidden + 2 * 2.0 * tokens * tokens * hidden


def _gspn(arch: Architecture, tokens: int) -> float:
    hidden, proxy = arch.hidden, arch.proxy
    expanded = DIRECTIONS * (NEIGHBOURS * arch.groups + (3 if arch.skip else 2) * hidden)
    linears = 2 * hidden * hidden + hidden * proxy + proxy * expanded
    # Of each channel in each direction: lam * x, three neighbours plus x, out_gate * h, times merge and sum; skip * x.
    scan = DIRECTIONS * (1 + 2 * NEIGHBOURS + 1 + 2 + (2 if arch.skip else 0))
    return tokens * (2.0 * linears + hidden * (2.0 * MIXER_KERNEL**2 + scan))
