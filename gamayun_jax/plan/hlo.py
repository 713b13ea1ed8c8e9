"""What a compiled program moves between devices, read from its optimised HLO text.

XLA's own cost analysis counts a loop's body once; here the call graph is walked with
each loop's number of trips. A collective that the TPU compiler runs beside other work
appears in several fusions, one for each step of it, and is counted once.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

ITEM_BYTES = {
    "pred": 1, "s8": 1, "u8": 1, "f8e4m3fn": 1, "f8e5m2": 1, "s16": 2, "u16": 2,
    "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8,
}  # fmt: skip
KINDS = (
    "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute",
    "collective-broadcast",
)  # fmt: skip

COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
COLLECTIVE = re.compile(rf" = (.*?) ({'|'.join(KINDS)})(-start)?\(")
LOOP = re.compile(r" while\(.*condition=%?([\w.\-]+), body=%?([\w.\-]+)")
CALLED = re.compile(r"(?:to_apply|calls|called_computations=\{|branch_computations=\{)")
CONSTANT = re.compile(r"= [su]\d+\[\]\S* constant\((\d+)\)")
NO_CYCLES = 2**40  # the compiler writes such numbers where it has no estimate


@dataclass(frozen=True)
class Collective:
    """One collective operation of a program, as often as a run executes it."""

    kind: str
    axes: tuple[str, ...]  # of the mesh, along which it communicates
    group: int  # devices that take part together
    count: int  # executions in one run of the program
    result_bytes: int  # of one execution, on one device (a reduce-scatter's operand)
    dtype: str = ""

    @property
    def moved_bytes(self) -> float:
        """Bytes that a device sends in one run, by the best ring algorithm."""
        share = (self.group - 1) / self.group
        if self.kind == "all-reduce":
            share *= 2
        elif self.kind.startswith("collective-"):
            share = 1.0
        return self.count * self.result_bytes * share


def array_bytes(text: str) -> list[int]:
    """Size of each array in a type such as "(bf16[2,3]{1,0}, f32[])"."""
    return [
        ITEM_BYTES[dtype] * math.prod(int(n) for n in dims.split(",") if n)
        for dtype, dims in re.findall(r"\b([a-z]\w*)\[([\d,]*)\]", text)
        if dtype in ITEM_BYTES
    ]


def replica_groups(line: str, devices: int) -> np.ndarray:
    """Device numbers [groups, devices of a group] of a collective's line.

    XLA writes them as lists {{0,1},{2,3}}, as [2,2]<=[4]T(1,0), or by the axes of a
    mesh; permutations name pairs of source and target.
    """
    iota = r"\[([\d,]+)\](?:T\(([\d,]+)\))?"

    def order(dims: str, transpose: str | None) -> np.ndarray:
        ids = np.arange(devices).reshape([int(n) for n in dims.split(",")])
        if transpose:
            ids = ids.transpose([int(n) for n in transpose.split(",")])
        return ids.reshape(-1)

    if m := re.search(r"source_target_pairs=\{(\{[\d,{}]*\})\}", line):
        return np.array(re.findall(r"\{(\d+),(\d+)\}", m[1]), int)
    if m := re.search(r"replica_groups=\{(\{[\d,{}]*\})\}", line):
        rows = re.findall(r"\{([\d,]+)\}", m[1])
        return np.array([row.split(",") for row in rows], int)
    if m := re.search(rf"replica_groups=\[([\d,]+)\]<={iota}", line):
        return order(m[2], m[3]).reshape([int(n) for n in m[1].split(",")])
    mesh = (
        rf"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\({iota}\))? *\{{([^}}]*)\}}"
    )
    if m := re.search(mesh, line):
        sizes = {k: int(n) for k, n in re.findall(r"'([^']+)'=(\d+)", m[1])}
        along = re.findall(r"'([^']+)'", m[4])
        names = list(sizes)
        ids = order(m[2] or str(devices), m[3]).reshape(list(sizes.values()))
        last = [names.index(k) for k in along]
        first = [i for i in range(len(names)) if i not in last]
        count = math.prod(ids.shape[i] for i in last)
        return ids.transpose(first + last).reshape(-1, count)
    return np.arange(devices)[None]


def group_axes(groups: np.ndarray, mesh_shape: Mapping[str, int]) -> tuple[str, ...]:
    """The mesh axes along which the members of the groups differ."""
    sizes = tuple(mesh_shape.values())
    places = np.stack(np.unravel_index(groups, sizes), axis=-1)
    differ = (places != places[:, :1]).any(axis=(0, 1))
    return tuple(k for k, d in zip(mesh_shape, differ, strict=True) if d)


class Program:
    """A compiled module, read from its text.

    Attributes:
      lines: computation -> its lines.
      executed: (computation, line, executions) of every line that a run executes.
      unknown: loops whose number of trips cannot be read; what they hold counts once.
    """

    def __init__(self, text: str):
        self.lines: dict[str, list[str]] = {}
        self.entry = ""
        self.executed: list[tuple[str, str, int]] = []
        self.unknown: set[str] = set()
        name = None
        for line in text.splitlines():
            if m := COMPUTATION.match(line):
                name = m[2]
                self.lines[name] = []
                if m[1]:
                    self.entry = name
            elif line.rstrip() == "}":
                name = None
            elif name is not None and " = " in line:
                self.lines[name].append(line)
        if not self.entry:
            raise ValueError("no ENTRY computation: this is not the text of an HLO")
        self._execute(self.entry, 1)

    def trips(self, line: str, condition: str, body: str) -> int | None:
        """How often a while loop runs, as XLA notes it or as its counter tells.

        The counter is compared with a constant, and the body adds a constant to it: a
        product that the partitioner splits to run beside its own transfers (a
        "windowed" one) may count in twos. It starts at 0, as all that XLA and JAX
        make. None for any other loop.
        """
        if m := re.search(r'known_trip_count"?:\{"n":"(\d+)"', line):
            return int(m[1])
        test, update = self.values(condition), self.values(body)
        m = re.search(r"compare\((\S+), (\S+)\), direction=LT", test["ROOT"])
        if not m:
            return None
        counter = re.search(r"get-tuple-element\(.*index=(\d+)", test.get(m[1], ""))
        end = CONSTANT.search(test.get(m[2], ""))
        results = re.search(r" tuple\(([^)]*)\)", update["ROOT"])
        if not (counter and end and results):
            return None
        new = results[1].split(", ")[int(counter[1])]
        added = re.search(r" add\((\S+), (\S+)\)", update.get(new, ""))
        terms = added.groups() if added else ()
        found = [m for x in terms if (m := CONSTANT.search(update.get(x, "")))]
        if len(found) != 1 or not int(found[0][1]):
            return None
        return math.ceil(int(end[1]) / int(found[0][1]))

    def values(self, name: str) -> dict[str, str]:
        """Name -> line of each value of a computation, and ROOT -> its result's."""
        found = {"ROOT": ""}
        for line in self.lines[name]:
            line = re.sub(r"/\*index=\d+\*/", "", line)
            words = line.split()
            if words[0] == "ROOT":
                found["ROOT"] = line
                words = words[1:]
            found[words[0]] = line
        return found

    def _execute(self, name: str, times: int) -> None:
        for line in self.lines[name]:
            self.executed.append((name, line, times))
            if m := LOOP.search(line):
                trips = self.trips(line, m[1], m[2])
                if trips is None:
                    self.unknown.add(m[2])
                self._execute(m[2], times * (1 if trips is None else trips))
            elif m := CALLED.search(line):
                rest = line[m.end() :].split("metadata=")[0]
                callee = re.findall(r"%?([\w.\-]+)", rest.split(")")[0])
                for called in callee:
                    # Reductions' scalar functions hold nothing of interest.
                    if called in self.lines and called != name:
                        self._execute(called, times)
                        if "branch_computations" not in line:
                            break


def collectives(program: Program, mesh_shape: Mapping[str, int]) -> list[Collective]:
    """All collectives of a program that was compiled for a mesh.

    Those of one kind, group and size are added up.
    """
    devices = math.prod(mesh_shape.values())
    channels: dict[tuple[str, int], Collective] = {}
    for number, (computation, line, times) in enumerate(program.executed):
        m = COLLECTIVE.search(line)
        if not m:
            continue
        sizes = array_bytes(m[1])
        if m[3] and m[2] == "collective-permute":  # operand, result, two flags
            sizes = sizes[1:2]
        elif m[3] and m[2] != "all-reduce":  # a start returns its operands as well
            sizes = sizes[len(sizes) // 2 :]
        kind = m[2]
        size = sum(sizes)
        groups = replica_groups(line, devices)
        group = len(groups[0])
        if kind == "reduce-scatter":
            size *= group
        elif computation.startswith("all-reduce-scatter"):
            kind = "reduce-scatter"
        axes = group_axes(groups, mesh_shape)
        if group == 1 or not axes:
            continue
        dtype = re.search(r"\b(\w+)\[", m[1])
        found = Collective(kind, axes, group, times, size, dtype[1] if dtype else "")
        channel = re.search(r"channel_id=(\d+)", line)
        # The steps of one asynchronous collective share its channel.
        fused = re.match(r"(fused_computation|async_collective_fusion)", computation)
        key = ("channel", int(channel[1])) if channel and fused else ("line", number)
        former = channels.get(key)
        if former is None or former.count * former.result_bytes < times * size:
            channels[key] = found
    totals: Counter[Collective] = Counter()
    for c in channels.values():
        totals[dataclasses.replace(c, count=1)] += c.count
    return [dataclasses.replace(c, count=n) for c, n in totals.items()]


def estimated_cycles(program: Program) -> int:
    """The TPU compiler's own estimates of its operations, added over one run.

    Pallas kernels have none, so that attention by a kernel is not in the sum.
    """
    return sum(
        times * int(m[1])
        for _, line, times in program.executed
        if (m := re.search(r'"estimated_cycles":"(\d+)"', line))
        and int(m[1]) < NO_CYCLES
    )


def summarise(collectives: Sequence[Collective]) -> list[dict[str, Any]]:
    """Rows by kind, axes and dtype: executions and bytes, largest first."""
    rows: dict[Any, dict[str, Any]] = {}
    for c in collectives:
        row = rows.setdefault(
            (c.kind, c.axes, c.dtype),
            dict(kind=c.kind, axes=list(c.axes), dtype=c.dtype, count=0, bytes=0.0),
        )
        row["count"] += c.count
        row["bytes"] += c.moved_bytes
    return sorted(rows.values(), key=lambda row: -row["bytes"])
