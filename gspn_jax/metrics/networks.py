"""Feature networks: what metrics see of images. `tables.FEATURE_NETWORKS` has them by name; `inception` is one."""

import dataclasses
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

from jaxtyping import Array, Float32, PyTree, UInt8

from gspn_jax.config import ConfigError
from gspn_jax.tables import FEATURE_NETWORKS, METRICS


class FeatureNetwork(Protocol):
    """A line of `tables.FEATURE_NETWORKS`: a module with these functions, or an object.

    Where files hold networks of several sizes, the line has `require` and `configured(path)`, which gives the network
    of a file. A network whose tokens training can be aligned with has `tokens(side)`: a network of features [N, side,
    side, D]. A network of images with captions has `embed_captions(captions)`: arrays [N, ...] too.
    """

    def require(self, path: str | None, flag: str) -> Any:
        """`path` if its weights are there; else ConfigError says what `flag` needs."""
        ...

    def read(self, path: Any) -> Mapping[str, Any]:
        """The tensors of a file of weights. Raises WeightsError, OSError."""
        ...

    def digest(self, state_dict: Mapping[str, Any]) -> str:
        """Digest that tells those weights from others."""
        ...

    def from_state_dict(self, state_dict: Mapping[str, Any]) -> Mapping[str, Any]:
        """Parameters, arrays by name."""
        ...

    def resize(self, images: UInt8[Array, "N H W 3"]) -> Float32[Array, "N h w 3"]:
        """Images as the network takes them, of one size."""
        ...

    def network(self, params: Mapping[str, Any], images: Float32[Array, "N h w 3"]) -> PyTree[Array]:
        """Features: a tree of arrays [N, ...]."""
        ...


@dataclasses.dataclass(frozen=True)
class Weights:
    """A feature network with its weights."""

    network: FeatureNetwork
    path: Any
    digest: str
    params: Mapping[str, Any]


def choose(name: str, path: str | None, where: str) -> tuple[FeatureNetwork, str]:
    """(the network of a line of `FEATURE_NETWORKS` for the weights in `path`, `path`). Raises ConfigError, which speaks
    of `where`, WeightsError or OSError."""
    network = FEATURE_NETWORKS[name]
    path = network.require(path, where)
    configured = getattr(network, "configured", None)
    return configured(path) if configured else network, path


def read_network(name: str, path: str | None, where: str) -> Weights:
    """A network with its weights. Raises as `choose`."""
    network, path = choose(name, path, where)
    tensors = network.read(path)
    return Weights(network, path, network.digest(tensors), network.from_state_dict(tensors))


def networks_of(metrics: Iterable[str]) -> tuple[str, ...]:
    """The networks whose features these metrics need."""
    return tuple(dict.fromkeys(METRICS[name].network for name in metrics))


def read_networks(
    metrics: Iterable[str], inception: str | None, others: Sequence[str], flag: str
) -> dict[str, Weights]:
    """The networks that `metrics` need, by name: `inception` is the file of that one, `others` are NAME=FILE.

    `flag` begins the flags in errors, such as "--eval.". Raises ConfigError, WeightsError or OSError.
    """
    files = {"inception": inception}
    for entry in others:
        name, _, file = entry.partition("=")
        if name not in FEATURE_NETWORKS or not file:
            known = ", ".join(f"{name}=FILE" for name in FEATURE_NETWORKS)
            raise ConfigError(f"{flag}networks must be some of {known}, found {entry!r}")
        files[name] = os.path.expanduser(file)
    found = {}
    for name in networks_of(metrics):
        where = f"{flag}inception" if name == "inception" else f"{flag}networks {name}=FILE"
        found[name] = read_network(name, files.get(name), where)
    return found
