"""A feature network that compiles in no time: the pixels of each patch, as `prepare features` and its users need."""

import dataclasses
import hashlib
from typing import Any

import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class ToyNetwork:
    """Features of the tokens of a square of `grid` patches: mean and spread of each channel, times the weight."""

    grid: int = 4

    def tokens(self, side: int) -> "ToyNetwork":
        return dataclasses.replace(self, grid=side)

    def require(self, path: str | None, flag: str) -> str:
        assert path and flag == "--weights"
        return path

    def read(self, path: str) -> dict[str, np.ndarray]:
        return {"weight": np.float32(path)}

    def digest(self, state_dict: dict[str, np.ndarray]) -> str:
        return hashlib.sha256(state_dict["weight"].tobytes()).hexdigest()

    def from_state_dict(self, state_dict: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return state_dict

    def resize(self, images: Any) -> Any:
        return images.astype(jnp.float32) / 255

    def network(self, params: dict, images: Any) -> Any:
        side = images.shape[1] // self.grid
        x = images.reshape(len(images), self.grid, side, self.grid, side, 3)
        return params["weight"] * jnp.concatenate([x.mean((2, 4)), x[:, :, 0, :, 0] - x[:, :, -1, :, -1]], axis=-1)


TOY = ToyNetwork()
