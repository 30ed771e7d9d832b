"""Memory traffic and collectives of a compiled program, read from its text."""

import collections
import dataclasses
import math
import re

#
# The text of an optimised HLO module: computations of one instruction a line,
#   %name = bf16[2,64]{1,0:T(8,128)S(1)} all-gather(%operand, ...), channel_id=2, replica_groups=..., dimensions={0}
# S(1) marks what lies in on-chip memory. Loops are `while` instructions that name two computations.

COLLECTIVES = ("all-gather", "reduce-scatter", "all-reduce", "collective-permute", "all-to-all")
_SIZES = {"pred": 1, "bf16": 2, "f16": 2, "f32": 4, "f64": 8, "c64": 8, "token": 0}
_ARRAY = re.compile(r"\b(pred|token|bf16|c64|[suf]\d+|f8\w*)\[([\d,]*)\](\{[^}]*\})?")
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
    """name, shape (text), op, operands (names), everything from their parenthesis on (text), and whether it is the
    result of its computation."""

    name: str
    shape: str
    op: str
    operands: tuple[str, ...]
    rest: str
    root: bool = False

    def named(self, *keys) -> list[str]:
        """Computations that it names under one of the keys: body=%name, branch_computations={%a, %b}."""
        return [
            name
            for key in keys
            for found in re.findall(rf"\b{key}=(\{{[^}}]*\}}|%?[\w.\-]+)", self.rest)
            for name in re.findall(r"[\w.\-]+", found)
        ]


def read_hlo(text: str) -> tuple[dict[str, dict[str, Instruction]], str]:
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


def _cut(text):
    """Cuts behind the parenthesis that closes the first one."""
    depth = 0
    for at, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if not depth:
            return text[: at + 1], text[at + 1 :]
    return text, ""


def _arrays(shape: str, hbm_only: bool = False) -> list[int]:
    """Bytes of each array in the text of a shape."""
    found = []
    for kind, sizes, layout in _ARRAY.findall(shape):
        if not (hbm_only and re.search(r"S\([1-9]", layout)):
            bits = int(re.search(r"\d+", kind)[0]) if kind not in _SIZES else 8 * _SIZES[kind]
            found.append(math.prod(map(int, sizes.split(","))) * bits // 8 if sizes else bits // 8)
    return found


def _group(rest: str, devices: int) -> int:
    """Devices of a collective's group, from any of the ways that HLO writes replica_groups."""
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


def _trips(loop: Instruction, computations) -> int | None:
    """How often a loop runs: what the compiler noted, or the bound if its condition is one comparison; else None."""
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

    Args:
      trips: of loops whose bound cannot be found, see Program.
    Returns:
      {"collectives": {kind: {"count", "bytes"}}, "hbm_bytes"}. bytes: what each device sends in a ring, with S bytes
      of result in a group of n: all-gather and all-to-all S (n - 1) / n, reduce-scatter S (n - 1), all-reduce
      2 S (n - 1) / n, collective-permute and send S. A reduce-scatter may also appear as an all-reduce that is cut
      afterwards. hbm_bytes: operands and results of every fused operation that lie in HBM; of an array that is only
      sliced, the slice. Both branches of a condition count.
    """
    computations, entry = read_hlo(text)
    found = collections.defaultdict(lambda: {"count": 0, "bytes": 0})
    hbm, seen = 0, set()

    def send(kind, arrays, times, rest, started=False):
        """arrays: bytes of the result; if `started`, operand and result are among them, and the operand is left out."""
        n = _group(rest, devices)
        result = sum(arrays)
        if started:
            result = max(arrays) // (n if kind == "reduce-scatter" else 1)
        share = {
            "reduce-scatter": n - 1,
            "all-reduce": 2 * (n - 1) / n,
            "collective-permute": 1,
            "send": 1,
        }
        found[kind]["count"] += times
        found[kind]["bytes"] += int(times * result * share.get(kind, (n - 1) / n))

    def collectives(name, times, inside):
        """Those of a computation and of what it fuses. A collective that is spread over several fusions of one
        computation, to overlap with their products, has one channel and counts once."""
        for i in computations[name].values():
            kind = i.op.removesuffix("-start")
            fused = i.named("calls")
            if kind in COLLECTIVES or kind == "send":
                channel = (inside, (re.search(r"channel_id=(\d+)", i.rest) or [i.name])[0])
                if name == inside or channel not in seen:
                    seen.add(channel)
                    started = kind == "send" or (i.op.endswith("-start") and kind != "all-reduce")
                    send(kind, _arrays(i.shape), times, i.rest, started)
            elif fused and "all-reduce-scatter" in fused[0]:
                inner = next(
                    (j for j in computations[fused[0]].values() if j.op == "all-reduce"), i
                )
                send("reduce-scatter", _arrays(i.shape), times, inner.rest)
            else:
                for other in fused:
                    collectives(other, times, inside)

    def visit(name, times, trips):
        nonlocal hbm
        collectives(name, times, name)
        for i in computations[name].values():
            if i.op == "while":
                known = _trips(i, computations)
                for body in i.named("body", "condition"):
                    visit(
                        body,
                        times * (trips[0] if known is None else known),
                        trips if known is not None else trips[1:] or trips,
                    )
            elif i.op in ("call", "conditional"):
                for branch in i.named(
                    "to_apply", "branch_computations", "true_computation", "false_computation"
                ):
                    visit(branch, times, trips)
            else:
                hbm += times * _touched(i, computations[name], computations)

    visit(entry, 1, trips)
    return {
        "collectives": {
            kind: dict(found[kind]) for kind in (*COLLECTIVES, "send") if kind in found
        },
        "hbm_bytes": int(hbm),
    }


def _touched(i: Instruction, around, computations) -> int:
    """Bytes of HBM that an instruction reads and writes."""
    kernel = '"tpu_custom_call"' in i.rest  # other calls allocate and assume
    if i.op in _FREE or i.op.endswith("-done") or (i.op == "custom-call" and not kernel):
        return 0
    here = lambda shape: sum(_arrays(shape, hbm_only=True))
    result = here(i.shape)
    if i.op in ("dynamic-slice", "gather", "slice"):
        return 2 * result
    if i.op in ("dynamic-update-slice", "scatter"):
        return 2 * here(around[i.operands[-1 if i.op == "scatter" else 1]].shape)
    if i.op in ("copy-start", "slice-start"):
        return here(i.shape)
    if i.op != "fusion":
        return result + sum(here(around[o].shape) for o in i.operands if o in around)
    inside = computations[i.named("calls")[0]]
    parameters = _parameters(inside)
    read = sum(
        _read(parameters[n], inside, computations)
        for n, o in enumerate(i.operands)
        if here(around[o].shape)
    )
    root = next(j for j in inside.values() if j.root)
    return read + (min(result, _written(root, inside, computations)) if result else 0)


def _parameters(inside) -> dict[int, str]:
    return {
        int(i.rest[1 : i.rest.index(")")]): i.name for i in inside.values() if i.op == "parameter"
    }


def _read(name, inside, computations) -> int:
    """Bytes that a fused computation reads of one of its values: where it is only sliced, the slices."""
    whole, total = sum(_arrays(inside[name].shape)), 0
    for user in inside.values():
        for n in (n for n, operand in enumerate(user.operands) if operand == name):
            if n == 0 and user.op in ("dynamic-slice", "slice", "gather"):
                total += sum(_arrays(user.shape))
            elif user.op == "bitcast":
                total += _read(user.name, inside, computations)
            elif user.op == "fusion":
                inner = computations[user.named("calls")[0]]
                total += _read(_parameters(inner)[n], inner, computations)
            elif (
                n or user.op != "dynamic-update-slice"
            ):  # which leaves the rest of its operand in place
                total += whole
    return min(total, whole)


def _written(root: Instruction, inside, computations) -> int:
    """Bytes that a fused computation writes: of an array that is updated in place, the update."""
    if root.op == "dynamic-update-slice":
        return sum(_arrays(inside[root.operands[1]].shape))
    if root.op in ("bitcast", "tuple"):
        return sum(_written(inside[o], inside, computations) for o in root.operands)
    if root.op == "fusion":
        inner = computations[root.named("calls")[0]]
        return _written(next(i for i in inner.values() if i.root), inner, computations)
    return sum(_arrays(root.shape))
