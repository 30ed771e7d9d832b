"""What a step takes on a TPU slice that is not there: `python -m opsd_jax.plan --config=C --topology=v5p:2x2x2`.

  settings -> shapes of state, contexts and trajectory, cut over the mesh -> `rollout.sample` and `distill.update`,
  traced and compiled for the slice as the run would -> bill

The compiler for TPUs (libtpu) runs on any Linux machine and assigns real buffers, so a program that does not fit
fails here as it would there. What this does not tell: numerics, measured speed, and what the runtime keeps for
itself. `--topology=cpu:8` compiles for eight devices that the CPU plays, anywhere; its temporary memory says little
about a TPU.

While the student samples, the whole training state lies in memory beside the program and is added to its peak; the
copy of the parameters that sampled is gone when the update begins (see `train.train_stage`).

Letters: n devices of a collective's group.
"""

import collections
import dataclasses
import functools
import importlib.metadata
import importlib.util
import math
import os
import re
import sys
import time
import types

from absl import app, flags

from opsd_jax import (  # train defines --config
    cli,
    config as config_lib,
    distributed,
    files,
    paths,
    train,
)

GIB = 2**30
UTILIZATION = 0.5  # share of the peak that matrix products are assumed to reach
PLANNED = ("warmup", "opsd", "sft", "offline")  # stages whose programs are planned
STEP = (
    "sample",
    "update",
)  # the programs of a step on the policy; supervised stages have "update" alone

flags.DEFINE_string("topology", "", "v5p:2x2x2, a name such as v5e-64, or cpu:8.")
flags.DEFINE_integer("slices", 1, "Slices of that topology, joined by the data-centre network.")
flags.DEFINE_enum("only", "", ["", *STEP], "Compile this program alone.")
flags.DEFINE_string(
    "stage", "", "Stage of the config (default: opsd if it has one, else its first)."
)
flags.DEFINE_integer("bucket", -1, "Which of config.data.buckets; -1 is the largest.")
flags.DEFINE_float("hbm", 0, "GiB a device, in place of the chip's own.")
flags.DEFINE_bool(
    "quick", False, "Compile with less effort: three times faster, peaks some 5 % off."
)
flags.DEFINE_string("out", "", "Also write the bill to this JSON file.")


# --- topologies ------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Chip:
    """A generation of TPUs, for each device that JAX sees (half a chip on tpu7x).

    hbm: GiB that libtpu lets a program have. flops: bfloat16 peak a second. bandwidth: HBM, bytes a second.
    link: one ICI link one way, bytes a second. axes: of the torus. counted: what a name like v5p-16 counts for each
    chip. devices: of a chip. Sources: Google's pages of the generations; hbm as libtpu 0.0.42 enforces it.
    """

    hbm: float
    flops: float
    bandwidth: float
    link: float
    axes: int
    counted: int = 1
    devices: int = 1


CHIPS = {
    "v4": Chip(30.75, 275e12, 1.2e12, 4.5e10, 3, counted=2),
    "v5e": Chip(15.75, 197e12, 8.1e11, 4.5e10, 2),
    "v5p": Chip(95.74, 459e12, 2.77e12, 9e10, 3, counted=2),
    "v6e": Chip(31.25, 918e12, 1.64e12, 9e10, 2),
    "tpu7x": Chip(94.75, 1153e12, 3.69e12, 9e10, 3, counted=2, devices=2),
}
DCN = 6.25e9  # bytes a second and chip between slices
_OTHER_NAMES = {"v5litepod": "v5e", "7x": "tpu7x", "v7x": "tpu7x"}


@dataclasses.dataclass(frozen=True)
class Topology:
    """One or several equal slices. family: a key of CHIPS, or "cpu". grid: chips along each axis of a slice."""

    family: str
    grid: tuple[int, ...]
    slices: int = 1

    @property
    def name(self) -> str:
        return f"{self.family}:{'x'.join(map(str, self.grid))}"

    @property
    def chips(self) -> int:
        return math.prod(self.grid) * self.slices

    @property
    def devices(self) -> int:
        return self.chips * (CHIPS[self.family].devices if self.family in CHIPS else 1)

    @property
    def hbm(self) -> float | None:
        """GiB a device; None for a CPU, which has no bound of its own."""
        return CHIPS[self.family].hbm if self.family in CHIPS else None

    @property
    def wrap(self) -> tuple[bool, ...]:
        """Which axes of the torus are closed: full cubes of 4 in three dimensions, 16 in two."""
        closed = (
            CHIPS[self.family].axes == 3 and all(n % 4 == 0 for n in self.grid)
        ) or self.grid == (16, 16)
        return (closed,) * len(self.grid) + (False,) * (3 - len(self.grid))


def parse_topology(text: str, slices: int = 1) -> Topology:
    """v5p:2x2x2 (chips along each axis), v5p-16 (as clouds name it), cpu:8. ValueError that says what is possible.

    Names of v4, v5p and tpu7x count TensorCores, two a chip: v5p-16 is 8 chips. Names of v5e and v6e count chips.
    """
    choices = f"use FAMILY:GRID or FAMILY-COUNT with FAMILY of {', '.join(CHIPS)}, or cpu:N"
    match = re.fullmatch(r"(\w+)([:-])(\d+(?:x\d+)*)", text)
    if not match or slices < 1:
        raise ValueError(
            f"--topology={text!r} with --slices={slices}: {choices}, and at least one slice"
        )
    family, mark, sizes = match.groups()
    family = _OTHER_NAMES.get(family, family)
    grid = tuple(map(int, sizes.split("x")))
    if family == "cpu" and len(grid) == 1 and grid[0] > 0 and slices == 1:
        return Topology("cpu", grid)
    if family not in CHIPS:
        raise ValueError(
            f"--topology={text!r}: {choices}{'; a CPU has one slice' if family == 'cpu' else ''}"
        )
    chip = CHIPS[family]
    if mark == ":":
        if len(grid) != chip.axes or min(grid) < 1:
            raise ValueError(
                f"--topology={text!r}: {family} has a grid of {chip.axes} axes, such as "
                f"{family}:{'x'.join(['2'] * chip.axes)}"
            )
        return Topology(family, grid, slices)
    chips = grid[0] / chip.counted
    if len(grid) > 1 or chips not in _sizes(chip.axes):
        names = ", ".join(f"{family}-{n * chip.counted}" for n in sorted(_sizes(chip.axes)))
        raise ValueError(
            f"--topology={text!r}: {family} comes as {names}"
            f"{' (TensorCores, two a chip)' if chip.counted > 1 else ''}; or name its grid, {family}:..."
        )
    return Topology(family, _sizes(chip.axes)[int(chips)], slices)


@functools.cache
def _sizes(axes: int) -> dict[int, tuple[int, ...]]:
    """Chips of a slice -> its usual grid: each doubling makes the shortest axis longer, the last one first."""
    grid = [1] * axes if axes == 2 else [2, 2, 1]
    largest = 256 if axes == 2 else 4096
    found = {math.prod(grid): tuple(grid)}
    while math.prod(grid) < largest:
        shortest = max(n for n in range(axes) if grid[n] == min(grid))
        grid[shortest] *= 2
        found[math.prod(grid)] = tuple(grid)
    found.pop(2, None)
    return found


def devices_of(topology: Topology) -> list:
    """Devices to compile for, slice by slice. They hold no arrays. Needs a process without a started JAX backend."""
    import jax

    # Nothing here runs on an accelerator, and a program must not be held up by one that is in use.
    jax.config.update("jax_platforms", "cpu")
    if topology.family == "cpu":
        _start_cpu(topology.devices)
        return jax.devices()[: topology.devices]
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError(missing_libtpu())
    quiet = {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "TPU_LOG_DIR": "disabled",
        "TPU_STDERR_LOG_LEVEL": "3",
        "TPU_MIN_LOG_LEVEL": "3",
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
    for key, value in quiet.items():
        os.environ.setdefault(key, value)
    # A program compiled for absent devices can be written to the cache but not be read back.
    jax.config.update("jax_enable_compilation_cache", False)
    from jax.experimental import topologies

    options = {"wrap": topology.wrap, "num_slices": topology.slices}
    if topology.family in ("v4", "v5p"):
        options["chip_config_name"] = "megacore"  # two TensorCores as one device
    if math.prod(topology.grid) == 1:
        options["chips_per_host_bounds"] = (1, 1, 1)
    try:
        found = topologies.get_topology_desc(
            platform="tpu", topology_name=topology.name, **options
        ).devices
    except Exception as error:  # libtpu raises its own types
        raise ValueError(
            f"libtpu knows no slice {topology.name}: {str(error).splitlines()[0]}"
        ) from error
    return sorted(found, key=lambda device: (getattr(device, "slice_index", 0), device.id))


def _start_cpu(count):
    import jax

    try:
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError:  # the backend is there already
        pass
    if len(jax.devices()) < count:
        raise ValueError(
            f"--topology=cpu:{count} needs a process of its own: JAX already runs with "
            f"{len(jax.devices())} devices"
        )


def missing_libtpu() -> str:
    """What to install to compile for a TPU."""
    wanted = [
        r.split(";")[0] for r in importlib.metadata.requires("jax") or () if r.startswith("libtpu")
    ]
    wants = wanted[0] if wanted else "libtpu"
    return (
        "compiling for a TPU needs its compiler, libtpu, which is not installed here. No TPU is needed:\n"
        f"    pip install '{wants}'\n"
        f"is the version that jax {importlib.metadata.version('jax')} asks for (Linux x86-64, some 200 MB). "
        "Without it, --topology=cpu:8 compiles for fake devices."
    )


# --- programs --------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Program:
    """One jitted program of a step, traced and not compiled.

    kinds: {kind: pytree of ShapeDtypeStructs} of its arguments. beside: the same of what else lies in memory.
    trips: how often its `while` loops without a fixed length run at most, from the outermost inwards.
    cache: shape of its keys, [L, B, S, K, h].
    """

    name: str
    traced: object
    kinds: dict
    beside: dict
    trips: tuple[int, ...] = (1,)
    cache: object = None


def programs(config, stage: str, mesh, bucket: int = -1, only: str = "") -> list[Program]:
    """The programs of one step of a stage, from shapes alone, with settings that are checked."""
    import jax
    import jax.numpy as jnp

    from opsd_jax import context, distill, offline, params as params_lib, rollout, sharding
    from opsd_jax.model import bagel

    if stage not in PLANNED or config_lib.draws(config, stage):
        raise ValueError(
            f"--stage={stage}: plan knows the programs of {', '.join(PLANNED)} without drawing"
        )
    train.check_batch(config, stage, sharding.batch_divisor(mesh))
    size = config[stage].batch_size
    ends = types.SimpleNamespace(bos=0, eos=1)  # any two ids: they are constants of the program
    model, own = config_lib.model(config), config_lib.distill(config, stage, ends)
    whole = lambda tree: jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding.batch(mesh)), tree
    )

    def array(*shape, dtype=jnp.int32):
        return jax.ShapeDtypeStruct((size, *shape), dtype, sharding=sharding.batch(mesh))

    def packed(slots, patches, dtype=jnp.uint8):
        row, patch = array(slots), array(patches)
        return context.Context(
            tokens=row,
            positions=row,
            limit=row,
            segment=row,
            patches=array(patches, model.vit.patch_dim, dtype=dtype),
            patch_positions=patch,
            patch_image=patch,
            patch_slots=patch,
            length=array(),
            next_position=array(),
        )

    params = jax.eval_shape(functools.partial(bagel.init, config=model), jax.random.key(0))
    state = sharding.abstract(mesh, jax.eval_shape(lambda p: distill.init_state(p, own), params))
    teacher = {name: state[name] for name in ("ema", "teacher") if name in state}
    held = {"params": state["params"], "optimizer": state["opt"], "teacher": teacher}

    buckets = config.data.buckets
    if not -len(buckets.student) <= bucket < len(buckets.student):
        raise ValueError(f"--bucket={bucket}: config.data.buckets has {len(buckets.student)}")
    if stage != "opsd":
        if only == "sample":
            raise ValueError(
                f"--only=sample: stage {stage} samples nothing, choose another --stage or none"
            )
        slots, patches, targets = buckets.trace[bucket]
        batch = context.Supervised(
            packed(slots, patches), array(targets), array(targets), array(targets, dtype=jnp.bool_)
        )
        step = distill.sft_step
        if stage == "offline":
            kept, half, step = offline.kept_entries(config), jnp.float16, offline.step
            batch = offline.Cached(
                batch,
                array(targets),
                array(targets, kept, dtype=half),
                array(targets, kept),
                array(targets, dtype=half),
            )
        traced = distill.program(step, state, own).trace(state, batch)
        return [Program("update", traced, held | {"batch": batch}, {})]

    noise = config.teacher.visual_thoughts == "noise"  # drawn as floats
    batch = context.Batch(
        packed(*buckets.student[bucket]),
        packed(*buckets.teacher[bucket], dtype=jnp.float32 if noise else jnp.uint8),
    )
    # The table of a marker is a constant of the program: only its size matters, as long as it is not all zeros.
    marker = rollout.Marker.build([bytes([n]) for n in range(256)], model.llm.vocab_size)
    sampling = config_lib.rollout(config, ends, marker, shards=sharding.batch_divisor(mesh))
    sampler = sharding.abstract(
        mesh,
        jax.eval_shape(
            lambda p: params_lib.in_compute_dtype(distill.understanding(p), model.dtype), params
        ),
        "rollout",
    )
    key = jax.eval_shape(lambda: jax.random.key(0))
    key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=sharding.replicated(mesh))
    # Leaves that both layouts cut alike are one array; the others lie in memory twice.
    same = lambda a, b: a.dtype == b.dtype and a.sharding.is_equivalent_to(b.sharding, a.ndim)
    sampled = params_lib.flatten(sampler)
    trained_only = {
        path: leaf
        for path, leaf in params_lib.flatten(state["params"]).items()
        if path not in sampled or not same(leaf, sampled[path])
    }
    found = []
    if only != "update":
        slots = batch.student.slots + sampling.max_new_tokens
        held_rows = min(sampling.slots or size, size)
        cache = jax.eval_shape(lambda: bagel.init_cache(held_rows, slots, config=model))
        traced = rollout.sample.trace(sampler, batch.student, key, config=sampling)
        beside = held | {"params": trained_only, "batch": batch.teacher}
        found.append(
            Program(
                "sample",
                traced,
                {"params": sampler, "batch": batch.student},
                beside,
                trips=_sampler_trips(sampling, size),
                cache=cache["k"],
            )
        )
    if only != "sample":
        drawn = whole(
            jax.eval_shape(
                lambda *a: rollout.sample(*a, config=sampling), params, batch.student, key
            )
        )
        traced = distill.program(distill.update_step, state, own).trace(state, batch, drawn)
        found.append(Program("update", traced, held | {"batch": (batch, drawn)}, {}))
    return found


def _sampler_trips(sampling, rows: int) -> tuple[int, ...]:
    """Of the sampler's loops, if all rows use up the budget: steps; with a queue refills, and steps between two."""
    if not sampling.slots or sampling.slots >= rows:
        return (sampling.max_new_tokens,)
    refills = -(-rows // sampling.group)
    return refills, -(-sampling.max_new_tokens * -(-rows // sampling.slots) // refills)


def bytes_per_device(tree) -> int:
    """Bytes that one device holds of a pytree of arrays or ShapeDtypeStructs with shardings."""
    import jax

    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
    )


def matmul_flops(jaxpr, trips: tuple[int, ...] = (1,)) -> int:
    """Floating point operations of all matrix products and convolutions of a jaxpr, on all devices together.

    A scan counts its body as often as it runs, a kernel its body for every block of its grid (also those that it
    skips), a `while` loop `trips` times (see Program); of the branches of a condition the largest counts. Recomputation counts,
    because it is in the jaxpr.
    """
    total = 0
    for eqn in jaxpr.eqns:
        name, inner = eqn.primitive.name, []
        deeper = trips[1:] or trips if name == "while" else trips
        for value in eqn.params.values():
            for item in value if isinstance(value, (tuple, list)) else (value,):
                item = getattr(item, "jaxpr", item)  # of a closed one
                if hasattr(item, "eqns"):
                    inner.append(matmul_flops(item, deeper))
        if name == "dot_general":
            contracted = eqn.params["dimension_numbers"][0][0]
            total += (
                2
                * math.prod(eqn.outvars[0].aval.shape)
                * math.prod(eqn.invars[0].aval.shape[axis] for axis in contracted)
            )
        elif name == "conv_general_dilated":
            kernel = eqn.invars[1].aval.shape
            features = kernel[eqn.params["dimension_numbers"].rhs_spec[0]]
            total += 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(kernel) // features
        times = {"scan": eqn.params.get("length", 1), "while": trips[0]}.get(name, 1)
        if name == "shard_map":  # its body is what one device does along these axes
            times = math.prod(
                eqn.params["mesh"].shape[axis] for axis in eqn.params["newly_manual_axes"]
            )
        if name == "pallas_call":  # one turn of its grid
            times = math.prod(eqn.params["grid_mapping"].grid)
        total += times * (max(inner, default=0) if name == "cond" else sum(inner))
    return total


# --- what the compiled program does ----------------------------------------------------------------------------
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


# --- the bill --------------------------------------------------------------------------------------------------

# Two ways in which libtpu says how much a program wants, arguments and all.
_NEEDS = re.compile(
    r"(?:Used |HLO temporaries \()([\d.]+)([KMGT])(?: of [\d.]+[KMGT] hbm|\) exceeds)"
)
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def bill(program: Program, topology: Topology, hbm: float | None = None) -> dict:
    """Compiles a program and tells what it takes of each device; see docs/scaling.md for every entry.

    hbm: GiB a device, None for no bound. A program that does not fit even alone comes back with `fits` False and
    what the compiler said it needs; other errors of the compiler are raised.
    """
    import jax

    inside = {kind: bytes_per_device(tree) for kind, tree in program.kinds.items()}
    beside = sum(bytes_per_device(tree) for tree in program.beside.values())
    flops = matmul_flops(program.traced.jaxpr.jaxpr, program.trips) // topology.devices
    found = {
        "program": program.name,
        "fits": None,
        "hbm_gib": hbm,
        "needs_gib": None,
        "peak_gib": None,
        "beside_gib": beside / GIB,
        "bytes": inside | {"beside": beside},
        "flops": {"traced": flops, "cost_analysis": None},
        "hbm_bytes": None,
        "collectives": None,
        "seconds": None,
    }
    platform = "cpu" if topology.family == "cpu" else "tpu"
    started = time.perf_counter()
    try:
        compiled = program.traced.lower(lowering_platforms=(platform,)).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        said = _NEEDS.search(str(error))
        needs = float(said[1]) * _UNITS[said[2]] if said else 0
        return found | {
            "fits": False,
            "needs_gib": (max(needs, sum(inside.values())) + beside) / GIB,
            "compile_seconds": time.perf_counter() - started,
        }
    seconds = time.perf_counter() - started
    memory, text = compiled.memory_analysis(), compiled.as_text()
    cost = compiled.cost_analysis() or {}
    taken = traffic(text, topology.devices, program.trips)
    if platform == "tpu":
        peak = memory.peak_memory_in_bytes
    else:  # a CPU's leaves the temporaries out
        peak = (
            memory.argument_size_in_bytes
            + memory.output_size_in_bytes
            - memory.alias_size_in_bytes
            + memory.temp_size_in_bytes
        )
    cache = _cache_bytes(program, text)
    kinds = inside | {
        "padding": max(memory.argument_size_in_bytes - sum(inside.values()), 0),
        "kv_cache": cache,
        "activations": memory.temp_size_in_bytes - cache,
        "code": memory.generated_code_size_in_bytes,
        "beside": beside,
    }
    needs = (peak + beside) / GIB
    return found | {
        "fits": hbm is None or needs <= hbm,
        "needs_gib": needs,
        "peak_gib": peak / GIB,
        "bytes": kinds,
        "flops": {"traced": flops, "cost_analysis": cost.get("flops")},
        **taken,
        "seconds": step_seconds(flops, taken, topology),
        "compile_seconds": seconds,
    }


def _cache_bytes(program, text) -> int:
    """What a device holds of the KV cache, read off the compiled program: the compiler chooses how it is cut."""
    if program.cache is None:
        return 0
    layers, rows, slots, heads, width = program.cache.shape
    cuts = [
        tuple(map(int, cut)) for cut in re.findall(rf"\[{layers},(\d+),{slots},(\d+),(\d+)\]", text)
    ]
    largest = max(
        (b * k * h for b, k, h in cuts if b <= rows and k <= heads and h <= width), default=0
    )
    return 2 * layers * slots * largest * program.cache.dtype.itemsize  # keys and values


def step_seconds(flops: int, taken: dict, topology: Topology) -> dict | None:
    """A model of how long a program runs: {"compute", "hbm", "network", "overlapped", "serial"}; None for a CPU.

    compute: products at UTILIZATION of the peak. hbm: its traffic at full bandwidth. network: collectives along one
    axis of the torus, both directions, at full speed, and what crosses slices at DCN. overlapped: the longest of the
    three; serial: the longer of compute and hbm, then the network. The truth should lie between, or beyond where
    operations are small.
    """
    if topology.family not in CHIPS:
        return None
    chip, moved = (
        CHIPS[topology.family],
        {kind: c["bytes"] for kind, c in taken["collectives"].items()},
    )
    compute, hbm = flops / (chip.flops * UTILIZATION), taken["hbm_bytes"] / chip.bandwidth
    across = moved.pop("send", 0)
    network = sum(moved.values()) / (2 * chip.link) + across / (DCN / chip.devices)
    return {
        "compute": compute,
        "hbm": hbm,
        "network": network,
        "overlapped": max(compute, hbm, network),
        "serial": max(compute, hbm) + network,
    }


def advice(found: dict, config, stage: str, mesh) -> list[str]:
    """What to change where a program does not fit: settings by name, the cheapest first."""
    from opsd_jax import sharding

    lines, size = [], found["bytes"]
    if found["program"] == "update":
        s, shards = config[stage], sharding.batch_divisor(mesh)
        if config.model.remat == "none":
            lines.append("config.model.remat=full recomputes activations instead of keeping them")
        if config.model.attention == "dense":
            if not config.model.query_block:
                lines.append(
                    "config.model.query_block=512 computes attention for 512 queries at a time"
                )
            lines.append("config.model.attention=flash keeps no attention scores in memory (TPU)")
        rows = s.batch_size // s.accumulation // shards
        if rows > 1:
            lines.append(
                f"config.{stage}.accumulation={s.batch_size // shards} takes one row a device at a time "
                f"instead of {rows}"
            )
        if config.divergence.chunk > 32:
            lines.append(
                f"config.divergence.chunk={config.divergence.chunk // 2} halves the logits that exist at once"
            )
        if not config.lora.rank:
            lines.append(
                "config.lora.rank=64 trains adapters alone: no moments, gradients or EMA of the weights"
            )
    else:
        lines.append(
            f"smaller config.{stage}.batch_size or config.rollout.max_new_tokens"
            + (
                f": the KV cache takes {size['kv_cache'] / GIB:.1f} GiB"
                if "kv_cache" in size
                else ""
            )
        )
    if stage == "opsd":
        if config.teacher.kind != "self":
            lines.append("config.teacher.kind=self keeps no second set of weights")
    if found["program"] == "sample":
        tensor = mesh.devices.size // sharding.batch_divisor(mesh)
        if not config.rollout.slots and config[stage].batch_size > sharding.batch_divisor(mesh):
            lines.append(
                f"config.rollout.slots={sharding.batch_divisor(mesh)} keeps the cache of one row a device at a time"
            )
        lines.append(
            f"config.mesh.tensor={2 * tensor} halves the sampler's own copy of the weights "
            f"({size['params'] / GIB:.1f} GiB), which mesh.fsdp does not cut"
        )
    lines.append(
        "config.mesh.fsdp: twice as many devices hold half of parameters, moments and EMA each"
    )
    if len(config.data.buckets.student) > 1:
        lines.append(
            "--bucket=0 shows the smaller bucket: config.data.buckets without the largest one, with "
            "config.data.on_too_long=skip, leaves its rows out"
        )
    return lines


def table(report: dict) -> str:
    """The bill for people."""
    several = f"{report['slices']} slices of " if report["slices"] > 1 else ""
    lines = [
        f"{several}{report['topology']}: {report['chips']} chips, {report['devices']} devices"
        + (f" of {report['hbm_gib']:g} GiB" if report["hbm_gib"] else "")
        + f"; mesh {', '.join(f'{axis} {n}' for axis, n in report['mesh'].items())}",
        "parameters: " + ", ".join(f"{group} {n:,}" for group, n in report["parameters"].items()),
    ]
    for p in report["programs"]:
        lines += [
            "",
            f"{p['program']}, for each device"
            + (f" (compiled in {p['compile_seconds']:.0f} s)" if p["peak_gib"] is not None else ""),
        ]
        lines += [
            f"  {kind:<18} {n / GIB:>9.3f} GiB"
            for kind, n in p["bytes"].items()
            if n or kind == "params"
        ]
        bound = f" of {p['hbm_gib']:g} GiB" if p["hbm_gib"] else ""
        if p["peak_gib"] is not None:
            lines.append(
                f"  {'peak':<18} {p['peak_gib']:>9.3f} GiB"
                + (f", with what lies beside {p['needs_gib']:.3f} GiB" if p["beside_gib"] else "")
            )
        lines.append(
            f"  {'fits' if p['fits'] else 'does not fit'}: needs {'' if p['peak_gib'] else 'at least '}"
            f"{p['needs_gib']:.2f} GiB{bound}"
        )
        lines += [f"    {line}" for line in p["advice"]]
        if p["collectives"] is not None:
            lines += [
                f"  {kind:<18} {c['bytes'] / 1e9:>9.3f} GB sent in {c['count']:,} calls"
                for kind, c in p["collectives"].items()
            ]
            lines.append(f"  {'HBM traffic':<18} {p['hbm_bytes'] / 1e9:>9.1f} GB")
        counted = p["flops"]["cost_analysis"]
        lines.append(
            f"  {'matrix products':<18} {p['flops']['traced'] / 1e12:>9.3f} TFLOP"
            + (
                f" (cost analysis, loop bodies once: {counted / 1e12:.3f})"
                if counted is not None
                else ""
            )
        )
        if p["seconds"]:
            s = p["seconds"]
            lines.append(
                f"  {'modelled':<18} {s['overlapped']:>9.3f} to {s['serial']:.3f} s: "
                f"compute {s['compute']:.3f} (at {UTILIZATION:.0%} of peak), HBM {s['hbm']:.3f}, "
                f"network {s['network']:.3f}"
            )
    return "\n".join(lines)


def plan(
    config,
    topology: Topology,
    *,
    stage: str = "",
    only: str = "",
    bucket: int = -1,
    hbm: float = 0,
    quick: bool = False,
) -> dict:
    """The whole report, what --out writes: topology, mesh, parameters by group, one bill a program."""
    import jax

    from opsd_jax import params as params_lib, sharding

    cli.check_precision()
    config_lib.check(config)
    stage = stage or ("opsd" if "opsd" in config.stages else config.stages[0])
    if stage not in config_lib.STAGES:
        raise ValueError(f"--stage={stage!r}: choose from {config_lib.STAGES}")
    bound = hbm or topology.hbm
    mesh = sharding.make_mesh(**config.mesh, devices=devices_of(topology))
    made = programs(config, stage, mesh, bucket, only)
    if quick:
        jax.config.update("jax_optimization_level", "O1")
    found = [bill(program, topology, bound) for program in made]
    for one in found:
        one["advice"] = [] if one["fits"] else advice(one, config, stage, mesh)
    version = lambda name: (
        importlib.metadata.version(name) if importlib.util.find_spec(name) else None
    )
    return {
        "topology": topology.name,
        "slices": topology.slices,
        "chips": topology.chips,
        "devices": topology.devices,
        "hbm_gib": bound,
        "mesh": dict(mesh.shape),
        "stage": stage,
        "bucket": bucket,
        "parameters": params_lib.count(made[0].kinds["params"]),
        "fits": all(one["fits"] for one in found),
        "programs": found,
        "versions": {"jax": jax.__version__, "libtpu": version("libtpu")},
        "quick": quick,
    }


def main(argv) -> None:
    """The command; exit code 3 where something does not fit."""
    cli.start()
    f = flags.FLAGS
    if f.config is None or not f.topology:
        raise app.UsageError("give --config=configs/visual_opsd.py and --topology=v5p:2x2x2")
    try:
        if f.out:  # what cannot be written shows before minutes of compiling
            paths.check("--out", f.out)
            if os.path.isdir(f.out):
                raise ValueError(
                    f"--out={f.out} is a folder: name a file, such as {os.path.join(f.out, 'plan.json')}"
                )
            paths.check_writable("--out", os.path.dirname(os.path.abspath(f.out)))
            os.makedirs(os.path.dirname(os.path.abspath(f.out)), exist_ok=True)
        report = plan(
            f.config,
            parse_topology(f.topology, f.slices),
            stage=f.stage,
            only=f.only,
            bucket=f.bucket,
            hbm=f.hbm,
            quick=f.quick,
        )
    except (ValueError, OSError) as error:
        distributed.end_with_error(error)
    print(table(report))
    if f.out:
        files.write_json(f.out, report)
    sys.exit(0 if report["fits"] else 3)


if __name__ == "__main__":
    app.run(main, flags_parser=train.parse_flags)
