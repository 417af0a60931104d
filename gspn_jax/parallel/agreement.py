"""Agreement between the hosts of a job: what one of them found or computed, on all of them."""

import json
from collections.abc import Callable, Mapping
from typing import TypeVar, cast

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Shaped

from gspn_jax.config import ConfigError

Numbers = TypeVar("Numbers")
Result = TypeVar("Result")


def agree(numbers: Numbers) -> Numbers:
    """The first host's numbers on all hosts, bit for bit; a host that went on with its own could wait for ever.

    `numbers` is a tree of Python numbers (int below 2**53, float), of the same structure on every host, all of which
    must call this at the same place.
    """
    if jax.process_count() == 1:
        return numbers
    leaves, structure = jax.tree.flatten(numbers)
    bits = np.array(leaves, np.float64).view(np.uint32)  # JAX would round float64
    agreed = np.asarray(multihost_utils.broadcast_one_to_all(bits)).view(np.float64).tolist()
    return jax.tree.unflatten(structure, [type(leaf)(value) for leaf, value in zip(leaves, agreed, strict=True)])


def texts(own: str) -> list[str]:
    """The text of each host, in their order, on all hosts, each of which must call this at the same place."""
    if jax.process_count() == 1:
        return [own]
    data = np.frombuffer(own.encode(), np.uint8)
    lengths = np.asarray(multihost_utils.process_allgather(np.array(len(data), np.int32))).reshape(-1)
    padded = np.asarray(multihost_utils.process_allgather(np.pad(data, (0, int(lengths.max()) - len(data)))))
    return [bytes(row[:length]).decode() for row, length in zip(padded, lengths, strict=True)]


def difference(own: Mapping[str, object]) -> str | None:
    """The first thing that hosts have differently, as a clause that is the same on every host; None if there is none.

    `own` has JSON values by the name of what they are; every host must call this at the same place.
    """
    hosts = [json.loads(text) for text in texts(json.dumps(own))]
    for name in dict.fromkeys(name for host in hosts for name in host):
        values = [json.dumps(host.get(name)) for host in hosts]
        odd = next((i for i, value in enumerate(values) if value != values[0]), None)
        if odd is not None:
            return f"{name} is {values[0]} on host 0 and {values[odd]} on host {odd}"
    return None


def on_first_host(action: Callable[[], Result], *failures: type[Exception]) -> Result | None:
    """Runs `action` on the first host: its result there, and None on the others, which wait for it.

    One of `failures` that it raises there is raised on the other hosts too, with the same message, as the first kind.
    Every host must call this at the same place.
    """
    result, failure = None, None
    if jax.process_index() == 0:
        try:
            result = action()
        except failures as error:
            failure = error
    said = texts("" if failure is None else str(failure))[0]
    if failure:
        raise failure
    if said:
        raise failures[0](f"the first host says: {said}")
    return result


def on_every_host(action: Callable[[], Result]) -> Result:
    """Runs `action` on every host: its result there. It must not call what all hosts call together.

    Where it fails on some of them, all raise: those what was raised there, the others a ConfigError that names the
    first of those hosts and what it says. Every host must call this at the same place. A process that has joined no
    others only runs it, without asking for devices.
    """
    if not jax.distributed.is_initialized():
        return action()
    result, failure = None, None
    try:
        result = action()
    except (Exception, SystemExit) as error:
        failure = error
    said = texts("" if failure is None else _said_by(failure))
    if failure:
        raise failure
    host = next((i for i, text in enumerate(said) if text), None)
    if host is not None:
        raise ConfigError(f"host {host} says: {said[host]}")
    return cast(Result, result)


def _said_by(failure: BaseException) -> str:
    if isinstance(failure, SystemExit):
        return "it has ended, see its own stderr"  # of flags that it does not know
    return str(failure) or type(failure).__name__


def meet(name: str) -> None:
    """Waits until every host is here: from then on files may change that all have read."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def gathered(array: Shaped[jax.Array | np.ndarray, "..."]) -> Shaped[np.ndarray, "..."]:
    """The whole of an array of which each host may have a part, on every host, all of which must call this."""
    if not getattr(array, "is_fully_addressable", True):
        array = multihost_utils.process_allgather(array, tiled=True)
    return np.asarray(array)
