"""Memory traffic and collectives of a compiled program, read from its text.

The text of an optimised HLO module has computations of one instruction per line:

  %name = bf16[2,64]{1,0:T(8,128)S(1)} all-gather(%operand, ...), channel_id=2, replica_groups=...

S(1) marks an array in on-chip memory. Loops are `while` instructions that name two computations.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Mapping

COLLECTIVES = ("all-gather", "reduce-scatter", "all-reduce", "collective-permute", "all-to-all")
# Bytes per element of the types whose name does not say their bits.
_SIZES = {"pred": 1, "bf16": 2, "f16": 2, "f32": 4, "f64": 8, "c64": 8, "token": 0}
# Calls of XLA:GPU into libraries. Their first result is an array, the others are scratch memory.
_LIBRARY = re.compile(r'custom_call_target="__(cublas|cudnn)')
_ARRAY = re.compile(r"\b(pred|token|bf16|c64|[suf]\d+|f8\w*)\[([\d,]*)\](\{[^}]*\})?")
# Instructions that read and write nothing.
_FREE = {
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "after-all",
    "partition-id",
    "iota",
    "optimization-barrier",
}


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    shape: shape of the result, as text. operands: their names. rest: the text from the parenthesis
    of the operands on. root: whether it is the result of its computation.
    """

    name: str
    shape: str
    op: str
    operands: tuple[str, ...]
    rest: str
    root: bool = False

    def named(self, *keys) -> list[str]:
        """Computations that it names under the keys: body=%name, branch_computations={%a, %b}."""
        return [
            name
            for key in keys
            for found in re.findall(rf"\b{key}=(\{{[^}}]*\}}|%?[\w.\-]+)", self.rest)
            for name in re.findall(r"[\w.\-]+", found)
        ]


# Inside of a fused operation: another shape, or another layout of what is read.
_VIEWS = ("bitcast", "copy")

Computation = Mapping[str, Instruction]  # by the instruction's name
Module = Mapping[str, Computation]  # by the computation's name


def read_hlo(text: str) -> tuple[Module, str]:
    """({computation: {instruction name: Instruction}}, name of the entry)."""
    computations, current, entry = {}, None, ""
    for line in text.splitlines():
        head = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line)
        if head:
            current = computations.setdefault(head[2], {})
            entry = head[2] if head[1] else entry
        elif line == "}":
            current = None
        elif current is not None and (found := re.match(r"\s+(ROOT )?%?([\w.\-]+) = (.*)$", line)):
            root, name, rest = found.groups()
            shape, rest = _cut(rest) if rest.startswith("(") else rest.split(" ", 1)
            op, _, rest = rest.strip().partition("(")
            operands, rest = _cut("(" + rest)
            current[name] = Instruction(
                name,
                shape,
                op,
                tuple(re.findall(r"%([\w.\-]+)", operands)),
                operands + rest,
                bool(root),
            )
    return computations, entry


def _cut(text: str) -> tuple[str, str]:
    """Cuts after the parenthesis that closes the first one."""
    depth = 0
    for at, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if not depth:
            return text[: at + 1], text[at + 1 :]
    return text, ""


def _arrays(shape: str, hbm_only: bool = False) -> list[int]:
    """Bytes of each array in the text of a shape; hbm_only: without those in on-chip memory."""
    found = []
    for kind, sizes, layout in _ARRAY.findall(shape):
        if not (hbm_only and re.search(r"S\([1-9]", layout)):
            bits = int(re.search(r"\d+", kind)[0]) if kind not in _SIZES else 8 * _SIZES[kind]
            found.append(math.prod(map(int, sizes.split(","))) * bits // 8 if sizes else bits // 8)
    return found


def _group(rest: str, devices: int) -> int:
    """Number of devices of a collective's group, however HLO writes replica_groups.

    devices: number of devices of the program, which are one group if none is written.
    """
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\] *\{([^}]*)\}", rest):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", found[1]))
        return math.prod(
            int(part or sizes[name])
            for name, part in re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", found[2])
        )
    if found := re.search(r"replica_groups=\[\d+,(\d+)\]", rest):
        return int(found[1])
    if found := re.search(r"replica_groups=\{\{([\d, ]*)\}", rest):
        return len(found[1].split(","))
    return devices


def _trips(loop: Instruction, computations: Module) -> int | None:
    """How often a loop runs: what the compiler noted, or the bound if its condition is one
    comparison; None if it cannot be known."""
    if found := re.search(r'known_trip_count":\{"n":"(\d+)"', loop.rest):
        return int(found[1])
    seen, bounds = list(loop.named("condition")), []
    for name in seen:
        for i in computations.get(name, {}).values():
            seen += i.named("calls")
            if i.root and i.op not in ("compare", "fusion", "call"):
                return None
            if i.op == "constant" and i.shape.startswith(("s32[]", "u32[]", "s64[]")):
                bounds += map(int, re.findall(r"^\((\d+)\)", i.rest))
    return max(bounds, default=None)


def traffic(text: str, devices: int, trips: tuple[int, ...] = (1,)) -> dict:
    """What a device sends and reads when the module `text` runs once, loops unrolled.

    A reduce-scatter may also appear as an all-reduce that is cut afterwards.

    Args:
      devices: number of devices of the program.
      trips: trip counts of loops whose bound cannot be found, see `programs.Program`.
    Returns:
      {"collectives": {kind: {"count", "bytes"}}, "hbm_bytes"}.
      bytes: what each device sends in a ring, with S bytes of result in a group of n devices:
      all-gather and all-to-all S (n - 1) / n, reduce-scatter S (n - 1), all-reduce
      2 S (n - 1) / n, collective-permute and send S.
      hbm_bytes: operands and results of every fused operation that are in HBM; of an array that is
      only sliced, the slice. Both branches of a condition count.
    """
    computations, entry = read_hlo(text)
    counted = _Traffic(computations, devices)
    counted.visit(entry, 1, trips)
    return {
        "collectives": {
            kind: dict(counted.sent[kind])
            for kind in (*COLLECTIVES, "send")
            if kind in counted.sent
        },
        "hbm_bytes": int(counted.hbm_bytes),
    }


class _Traffic:
    """Adds up the traffic of the computations that it visits.

    sent: {kind of collective: {"count", "bytes"}}.
    """

    def __init__(self, computations: Module, devices: int):
        self._computations, self._devices = computations, devices
        self._seen = set()  # (computation, channel) of the collectives that are counted
        self.sent = collections.defaultdict(lambda: {"count": 0, "bytes": 0})
        self.hbm_bytes = 0

    def visit(self, name: str, times: int, trips: tuple[int, ...]) -> None:
        """Adds a computation that runs so many times, with the loops in it."""
        self._add_collectives(name, times, name)
        for i in self._computations[name].values():
            if i.op == "while":
                known = _trips(i, self._computations)
                runs = trips[0] if known is None else known
                inner = trips if known is not None else trips[1:] or trips
                for body in i.named("body", "condition"):
                    self.visit(body, times * runs, inner)
            elif i.op in ("call", "conditional"):
                for branch in i.named(
                    "to_apply", "branch_computations", "true_computation", "false_computation"
                ):
                    self.visit(branch, times, trips)
            else:
                touched = _touched(i, self._computations[name], self._computations)
                self.hbm_bytes += times * touched

    def _add_collectives(self, name: str, times: int, inside: str) -> None:
        """Adds those of a computation, which runs inside another one, and of what it fuses.

        A collective that is spread over several fusions of one computation, to overlap with their
        products, has one channel and counts once.
        """
        for i in self._computations[name].values():
            kind = i.op.removesuffix("-start")
            fused = i.named("calls")
            if kind in COLLECTIVES or kind == "send":
                channel = (inside, (re.search(r"channel_id=(\d+)", i.rest) or [i.name])[0])
                if name == inside or channel not in self._seen:
                    self._seen.add(channel)
                    started = kind == "send" or (i.op.endswith("-start") and kind != "all-reduce")
                    self._add(kind, _arrays(i.shape), times, i.rest, started)
            elif fused and "all-reduce-scatter" in fused[0]:
                inner = next(
                    (j for j in self._computations[fused[0]].values() if j.op == "all-reduce"), i
                )
                self._add("reduce-scatter", _arrays(i.shape), times, inner.rest)
            else:
                for other in fused:
                    self._add_collectives(other, times, inside)

    def _add(
        self, kind: str, arrays: list[int], times: int, rest: str, started: bool = False
    ) -> None:
        """Adds one collective.

        arrays: bytes of the arrays of the result. If `started`, operand and result are both among
        them, and the operand is left out.
        """
        n = _group(rest, self._devices)
        result = sum(arrays)
        if started:
            result = max(arrays) // (n if kind == "reduce-scatter" else 1)
        share = {
            "reduce-scatter": n - 1,
            "all-reduce": 2 * (n - 1) / n,
            "collective-permute": 1,
            "send": 1,
        }
        self.sent[kind]["count"] += times
        self.sent[kind]["bytes"] += int(times * result * share.get(kind, (n - 1) / n))


def _touched(i: Instruction, around: Computation, computations: Module) -> int:
    """Bytes of HBM that an instruction of the computation `around` reads and writes."""
    if i.op == "custom-call" and _LIBRARY.search(i.rest):
        results = _arrays(i.shape, hbm_only=True)[:1]
        return sum(results) + sum(_in_hbm(around[o].shape) for o in i.operands if o in around)
    kernel = '"tpu_custom_call"' in i.rest  # other calls allocate and assume
    if i.op in _FREE or i.op.endswith("-done") or (i.op == "custom-call" and not kernel):
        return 0
    result = _in_hbm(i.shape)
    if i.op in ("dynamic-slice", "gather", "slice"):
        return 2 * result
    if i.op in ("dynamic-update-slice", "scatter"):
        return 2 * _in_hbm(around[i.operands[-1 if i.op == "scatter" else 1]].shape)
    if i.op in ("copy-start", "slice-start"):
        return _in_hbm(i.shape)
    if i.op != "fusion":
        return result + sum(_in_hbm(around[o].shape) for o in i.operands if o in around)
    inside = computations[i.named("calls")[0]]
    parameters = _parameters(inside)
    read = sum(
        _read(parameters[n], inside, computations)
        for n, o in enumerate(i.operands)
        if _in_hbm(around[o].shape)
    )
    root = next(j for j in inside.values() if j.root)
    return read + (min(result, _written(root, inside, computations)) if result else 0)


def _in_hbm(shape: str) -> int:
    """Bytes of the arrays in the text of a shape that are in HBM."""
    return sum(_arrays(shape, hbm_only=True))


def _parameters(inside: Computation) -> dict[int, str]:
    """{number of a parameter: its name}."""
    return {
        int(i.rest[1 : i.rest.index(")")]): i.name for i in inside.values() if i.op == "parameter"
    }


def _read(name: str, inside: Computation, computations: Module) -> int:
    """Bytes that a fused computation reads of one of its values, only slices if it is sliced."""
    whole, total = sum(_arrays(inside[name].shape)), 0
    for user in inside.values():
        for n in (n for n, operand in enumerate(user.operands) if operand == name):
            if n == 0 and user.op in ("dynamic-slice", "slice", "gather"):
                total += sum(_arrays(user.shape))
            elif user.op in _VIEWS:
                total += _read(user.name, inside, computations)
            elif user.op == "fusion":
                inner = computations[user.named("calls")[0]]
                total += _read(_parameters(inner)[n], inner, computations)
                if _is_view(inner, _parameters(inner)[n]):  # then it is used where the result is
                    total += _read(user.name, inside, computations)
            elif n or user.op != "dynamic-update-slice":  # that leaves the rest of it in place
                total += whole
    return min(total, whole)


def _is_view(inside: Computation, parameter: str) -> bool:
    """Whether the result of a fused computation is a parameter, in another shape or layout."""
    found = next(i for i in inside.values() if i.root)
    while found.op in _VIEWS:
        found = inside[found.operands[0]]
    return found.name == parameter


def _written(root: Instruction, inside: Computation, computations: Module) -> int:
    """Bytes that a fused computation writes; of an array that is updated in place, the update."""
    if root.op == "dynamic-update-slice":
        return sum(_arrays(inside[root.operands[1]].shape))
    if root.op in ("bitcast", "tuple"):
        return sum(_written(inside[o], inside, computations) for o in root.operands)
    if root.op == "fusion":
        inner = computations[root.named("calls")[0]]
        return _written(next(i for i in inner.values() if i.root), inner, computations)
    return sum(_arrays(root.shape))
