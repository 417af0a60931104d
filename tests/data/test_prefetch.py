"""Host batches become global arrays, in order, spread over the mesh, without implicit transfers."""

import itertools

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from gspn_jax.config import DataConfig
from gspn_jax.data import make_loader, make_source, prefetch_to_device


@pytest.fixture
def sharding() -> NamedSharding:
    mesh = jax.make_mesh((4, 2), ("data", "fsdp"))
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


class Batches:
    def __init__(self, count: int):
        self.taken, self.closed, self._count = 0, False, count

    def __iter__(self):
        return self

    def __next__(self) -> dict:
        if self.taken == self._count:
            raise StopIteration
        self.taken += 1
        return {"image": np.full((16, 2, 2, 1), self.taken, np.uint8), "label": np.arange(16, dtype=np.int32)}

    def close(self) -> None:
        self.closed = True


def test_batches_arrive_in_order_sharded_over_the_devices(sharding):
    with prefetch_to_device(Batches(5), sharding) as batches, jax.transfer_guard("disallow"):
        arrived = list(batches)
    assert len(arrived) == 5
    for step, batch in enumerate(arrived, 1):
        assert batch["image"].shape == (16, 2, 2, 1) and batch["image"].dtype == np.uint8
        assert batch["image"].sharding.is_equivalent_to(sharding, 4)
        assert len(batch["label"].addressable_shards) == 8
        np.testing.assert_array_equal(batch["image"], step)
        np.testing.assert_array_equal(batch["label"], np.arange(16))


def test_size_batches_are_ahead_and_closing_closes_the_source(sharding):
    source = Batches(10)
    batches = prefetch_to_device(source, sharding, size=3)
    assert source.taken == 0
    next(batches)
    assert source.taken == 3
    next(batches)
    assert source.taken == 4
    batches.close()
    assert source.closed
    with pytest.raises(ValueError, match="closed"):
        next(batches)
    with pytest.raises(ValueError, match="size must be 1 or more, found 0"):
        prefetch_to_device(source, sharding, size=0)


def test_the_loaders_batches_reach_the_devices_unchanged(sharding):
    data = DataConfig()
    source = make_source(data)
    with make_loader(data, source, batch_size=16, seed=0) as loader:
        expected = list(itertools.islice(loader, 6))
    with prefetch_to_device(make_loader(data, source, batch_size=16, seed=0), sharding) as batches:
        for batch, other in zip(batches, expected, strict=False):
            np.testing.assert_array_equal(batch["image"], other["image"])
            np.testing.assert_array_equal(batch["label"], other["label"])
