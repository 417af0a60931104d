"""Inception weights as people have them -> a .safetensors file, which is read without PyTorch."""

import dataclasses
import pathlib

from gspn_jax.config import ConfigError
from gspn_jax.metrics import inception


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inception:
    """Convert the Inception-v3 weights of 2015; needs PyTorch, which evaluation then does not."""

    weights: str
    """pt_inception-2015-12-05-6726825d.pth of pytorch-fid, or torch-fidelity's file of the same tensors."""
    output: str
    """The .safetensors file to write, which must not exist."""

    def __post_init__(self) -> None:
        path = pathlib.Path(self.output)
        if path.suffix != ".safetensors" or not path.parent.is_dir() or path.exists():
            raise ConfigError(
                f"--output must be a new .safetensors file in a folder that exists, found {self.output!r}"
            )


def prepare_inception(arguments: Inception) -> None:
    """Raises ConfigError, WeightsError or ImportError with one sentence for weights that cannot be used."""
    inception.convert(inception.require(arguments.weights, "--weights"), arguments.output)
    print(
        f"{inception.TENSORS} tensors in {arguments.output}; check them: "
        f"python -m gspn_jax.evaluate --self-test --inception {arguments.output}"
    )
