"""What a compiled program exchanges between devices, read from its text: kind, shapes, bytes and how often."""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

from benchmarks.hlo import ITEM_BYTES

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{")
_COLLECTIVE = re.compile(rf"^\s*(?:ROOT )?%?[\w.\-]+ = (.*?) ({'|'.join(KINDS)})(-start)?\(")
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\]")
_CALLED = re.compile(r"(?:to_apply|calls|body|true_computation|false_computation)=%?([\w.\-]+)")
_TRIPS = re.compile(r'known_trip_count":\{"n":"(\d+)"')


class Collective(NamedTuple):
    """`shapes` of the result on one device; `times` a run of the program; `loops` around it; `group` of devices."""

    kind: str
    shapes: tuple[tuple[int, ...], ...]
    bytes: int
    group: int
    times: int
    loops: int

    @property
    def sent(self) -> int:
        """Bytes a device sends at one time, by the usual ring."""
        whole = self.bytes * self.group if self.kind == "reduce-scatter" else self.bytes
        passes = {"all-reduce": 2, "collective-permute": self.group / (self.group - 1)}.get(self.kind, 1)
        return round(passes * whole * (self.group - 1) / self.group)


def collectives(text: str, devices: int) -> Iterator[Collective]:
    """Those of `compiled.as_text()`, but for the ones within a group of one device, which move nothing.

    A loop whose number of turns the compiler does not know counts once.
    """
    computations: dict[str, list[str]] = {}
    entry = name = None
    for line in text.splitlines():
        begins = _COMPUTATION.match(line)
        if begins:
            name = begins[2]
            computations[name] = []
            entry = name if begins[1] else entry
        elif name:
            computations[name].append(line)

    def walk(name: str, times: int, loops: int) -> Iterator[Collective]:
        for line in computations[name]:
            found = _COLLECTIVE.match(line)
            if found:
                arrays = [
                    (item, tuple(map(int, filter(None, axes.split(","))))) for item, axes in _ARRAY.findall(found[1])
                ]
                # the shape of a start has its arguments and then its results; that of an all-reduce not always
                if found[3] and (found[2] != "all-reduce" or found[1].startswith("((")):
                    arrays = arrays[len(arrays) // 2 :]
                group = _group(line, devices)
                if group > 1:
                    yield Collective(
                        found[2],
                        tuple(shape for _, shape in arrays),
                        sum(ITEM_BYTES[item] * math.prod(shape) for item, shape in arrays),
                        group,
                        times,
                        loops,
                    )
                continue
            trips = _TRIPS.search(line)
            loop = " while(" in line
            for called in _CALLED.findall(line):
                if called in computations:
                    yield from walk(called, times * int(trips[1]) if loop and trips else times, loops + loop)

    yield from walk(entry, 1, 0)


def _group(line: str, devices: int) -> int:
    """Devices of one group: {{0,1},{2,3}}, [2,4]<=[8], mesh['data'=2,'fsdp'=4] {'fsdp'}, or {} for all."""
    listed = re.search(r"replica_groups=\{\{([\d,]*)\}", line)
    if listed:
        return listed[1].count(",") + 1
    named = re.search(r"replica_groups=mesh\[(.*?)\] \{(.*?)\}", line)
    if named:
        sizes = dict(re.findall(r"('\w+')=(\d+)", named[1]))
        return math.prod(int(sizes[axis]) for axis in named[2].split(","))
    counted = re.search(r"replica_groups=\[\d+,(\d+)\]", line)
    return int(counted[1]) if counted else devices
