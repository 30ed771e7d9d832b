"""The mesh and the two layouts of the parameters. No mesh axis is named in any other file.

Mesh axes: `data` (copies of the model; the only one that may cross slices), `fsdp` (parameters and batch are cut
along it), `tensor` (heads, mlp and vocabulary are cut along it).

  train layout     parameters cut along fsdp and tensor; gathered layer by layer when used
  rollout layout   parameters cut along tensor only: decoding with fsdp-cut weights would gather each layer's
                   weights again for every token
"""

import contextlib
import functools
import math

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from opsd_jax import params as params_lib

AXES = ("data", "fsdp", "tensor")
_BATCH = ("data", "fsdp")

# Logical axis of a parameter -> mesh axis.
_TRAIN = {
    "embed": "fsdp",
    "heads": "tensor",
    "kv": "tensor",
    "mlp": "tensor",
    "vocab": "tensor",
    "vit_embed": "fsdp",
    "vit_heads": "tensor",
    "vit_mlp": "tensor",
}
_ROLLOUT = {logical: axis for logical, axis in _TRAIN.items() if axis == "tensor"}
LAYOUTS = {"train": _TRAIN, "rollout": _ROLLOUT}


def make_mesh(data: int = 1, fsdp: int = -1, tensor: int = 1, devices=None) -> Mesh:
    """A mesh over all devices; one size may be -1 (whatever is left).

    On TPUs neighbours in the mesh are neighbours in the torus, and of several slices `data` alone goes across, over the
    data-centre network. ValueError if the sizes do not fit.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [data, fsdp, tensor]
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise ValueError(
            f"mesh {dict(zip(AXES, sizes))}: config.mesh takes positive sizes, and -1 for one of them"
        )
    if sizes.count(-1) == 1:
        rest = math.prod(s for s in sizes if s != -1)
        sizes[sizes.index(-1)] = max(len(devices) // rest, 1)
    if math.prod(sizes) != len(devices):
        raise ValueError(
            f"mesh {dict(zip(AXES, [data, fsdp, tensor]))} does not cover {len(devices)} devices: "
            "set config.mesh so that the product of its sizes is the number of devices"
        )
    slices = (
        len({getattr(d, "slice_index", 0) for d in devices}) if devices[0].platform == "tpu" else 1
    )
    if sizes[0] % slices:
        raise ValueError(
            f"config.mesh.data is {sizes[0]} for {slices} slices: make it a multiple of them, since fsdp and "
            "tensor would wait for the network between slices at every layer"
        )
    if slices > 1:
        inside = (sizes[0] // slices, *sizes[1:])
        grid = mesh_utils.create_hybrid_device_mesh(
            inside, (slices, 1, 1), devices, allow_split_physical_axes=True
        )
    else:
        grid = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    return Mesh(grid, AXES)


def batch_divisor(mesh: Mesh) -> int:
    """The batch size must be a multiple of this."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def replicated(mesh: Mesh) -> NamedSharding:
    """Whole on every device."""
    return NamedSharding(mesh, P())


def batch(mesh: Mesh) -> NamedSharding:
    """Arrays whose first axis is the batch."""
    return NamedSharding(mesh, P(_BATCH))


def parameter(mesh: Mesh, path: str, shape, layout: str = "train") -> NamedSharding:
    """Sharding of one parameter. An axis that its mesh axis does not divide stays whole."""
    rules, spec = LAYOUTS[layout], []
    for size, logical in zip(shape, params_lib.fact(path).axes, strict=True):
        axis = rules.get(logical)
        spec.append(axis if axis and size % mesh.shape[axis] == 0 else None)
    return NamedSharding(mesh, P(*spec))


def tree(mesh: Mesh, abstract, layout: str = "train"):
    """Shardings of any pytree of arrays: a leaf whose path ends like a parameter's is cut like it (so Adam
    moments and EMA follow their parameter), everything else is replicated."""

    def leaf(path, x):
        names = [str(key.key) for key in path if hasattr(key, "key")]
        for start in range(len(names)):
            name = "/".join(names[start:])
            if params_lib.find(name):
                return parameter(mesh, name, x.shape, layout)
        return replicated(mesh)

    return jax.tree_util.tree_map_with_path(leaf, abstract)


def abstract(mesh: Mesh, tree_of_shapes, layout: str = "train"):
    """ShapeDtypeStructs with shardings, what restoring a checkpoint asks for."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        tree_of_shapes,
        tree(mesh, tree_of_shapes, layout),
    )


def known(mesh: Mesh | None):
    """A context in which programs are traced that ask for their mesh: `rows` does, and the kernel of `model.attention`
    "flash", which XLA cannot cut over several devices by itself. Where arrays go does not change. None: no mesh."""
    return (
        jax.sharding.use_abstract_mesh(mesh.abstract_mesh)
        if mesh is not None
        else contextlib.nullcontext()
    )


class on_mesh:
    """Decorates a jitted function: called and traced inside `known`, with the mesh that its first argument, a tree of
    arrays or ShapeDtypeStructs, lies on. Inside another program that one's context holds."""

    def __init__(self, jitted):
        functools.update_wrapper(self, jitted)
        self._cache_size = jitted._cache_size  # what `metrics.CompileGuard` counts

    def __call__(self, tree, *arguments, **named):
        with self._context(tree):
            return self.__wrapped__(tree, *arguments, **named)

    def trace(self, tree, *arguments, **named):
        """As that of what `jax.jit` returns; `lower`, too."""
        with self._context(tree):
            return self.__wrapped__.trace(tree, *arguments, **named)

    def lower(self, *arguments, **named):
        return self.trace(*arguments, **named).lower()

    def _context(self, tree):
        leaf = jax.tree.leaves(tree)[0]
        traced = isinstance(leaf, jax.core.Tracer)
        return (
            contextlib.nullcontext()
            if traced
            else known(getattr(getattr(leaf, "sharding", None), "mesh", None))
        )


def update_program(step, state, config):
    """`step(state, ..., config=config)` jitted for states with the layout of this one.

    The state is donated, and every leaf is returned with the sharding it came with: XLA would choose others for
    some, and the next step would compile again.

    Args:
      step: function of (state, ..., *, config) -> (state, metrics).
      state: arrays, or ShapeDtypeStructs with shardings. config: hashable.
    """
    leaves, structure = jax.tree.flatten(jax.tree.map(lambda x: x.sharding, state))
    return _update_program(step, config, structure, tuple(leaves))


@functools.cache
def _update_program(step, config, structure, leaves):
    shardings = jax.tree.unflatten(structure, leaves)
    mesh = getattr(leaves[0], "mesh", None)  # None on a single device

    def under_mesh(*arguments):
        with known(mesh):
            return step(*arguments, config=config)

    return jax.jit(under_mesh, donate_argnums=0, out_shardings=(shardings, None))


def rows(x):
    """x [B, ...] held to the layout of a batch where a program is traced inside `known`; x itself elsewhere, and where
    the devices do not divide B. Without this the compiler may gather the rows of all devices instead of a layer's
    weights."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or x.shape[0] % batch_divisor(mesh):
        return x
    return jax.lax.with_sharding_constraint(x, P(_BATCH))


def by_rows(function, whole, *rows):
    """function(whole, *rows) -> tree of [B, ...], each device at its own rows, exchanging nothing in between.

    For loops over pieces of a row: `whole`, a tree of arrays without a batch, is gathered once before and its gradient
    summed up once after. Left to itself the compiler does both in each turn of the loop, or gathers the rows of all
    devices. Along `tensor` arrays are cut as the compiler likes. The plain call where nothing is `known` of the mesh, and
    where the devices do not divide B.

    Args:
      rows: trees of arrays [B, ...].
    """
    mesh, size = jax.sharding.get_abstract_mesh(), jax.tree.leaves(rows)[0].shape[0]
    if mesh.empty or batch_divisor(mesh) == 1 or size % batch_divisor(mesh):
        return function(whole, *rows)
    return jax.shard_map(
        function,
        in_specs=(P(), *[P(_BATCH)] * len(rows)),
        out_specs=P(_BATCH),
        axis_names=set(_BATCH),
        check_vma=False,
    )(whole, *rows)


def local_rows(mesh: Mesh, size: int) -> list[int]:
    """Which rows of a batch of `size` this process's devices hold, ascending: what `put_batch` wants of it.

        mesh 4 x 2 of two processes, size 8      devices   0 0 | 0 0 | 1 1 | 1 1     process 0: rows 0 1 2 3
        mesh 2 x 4, `tensor` across processes    devices   0 0 1 1 | 0 0 1 1         both: all rows

    ValueError where the batch shards of the mesh do not divide `size`.
    """
    shards = batch_divisor(mesh)
    if size % shards:
        raise ValueError(
            f"{size} rows do not divide into the {shards} batch shards of the mesh (data x fsdp): change the "
            "batch size, or give devices to config.mesh.tensor"
        )
    found = batch(mesh).addressable_devices_indices_map((size,))
    return sorted({n for (rows,) in found.values() for n in range(*rows.indices(size))})


def put_batch(mesh: Mesh, host_batch):
    """This process's rows of the global batch (see `local_rows`) -> global arrays on the mesh."""
    sharding, shards = batch(mesh), batch_divisor(mesh)
    # with one row a shard, as many rows as this process holds shards
    factor = shards // len(local_rows(mesh, shards))

    def put(x):
        x = np.asarray(x)
        return jax.make_array_from_process_local_data(
            sharding, x, (x.shape[0] * factor, *x.shape[1:])
        )

    return jax.tree.map(put, host_batch)


def fetch(tree):
    """Global arrays -> NumPy arrays of the whole batch, on every process, in the order of the mesh."""
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(tree, tiled=True)


def move(mesh: Mesh, abstract, layout: str, cast=lambda tree: tree):
    """A function that casts a tree of arrays and lays it out: leaves that stay what and where they are go through
    untouched, all others in one compiled program.

    One program, because processes that start a transfer for each leaf may start them in different orders, and wait for
    each other for ever.

    Args:
      abstract: the tree, arrays or ShapeDtypeStructs with shardings. cast: pytree -> pytree of the same structure.
    """
    leaves, structure = jax.tree.flatten(abstract)
    wanted = jax.tree.leaves(jax.eval_shape(cast, abstract))
    places = jax.tree.leaves(tree(mesh, abstract, layout))
    moved = [
        n
        for n, (x, y, place) in enumerate(zip(leaves, wanted, places))
        if x.dtype != y.dtype or not x.sharding.is_equivalent_to(place, x.ndim)
    ]

    def program(some):
        whole = [
            jax.numpy.zeros(x.shape, x.dtype) for x in leaves
        ]  # those that are not used are not computed
        for n, x in zip(moved, some):
            whole[n] = x
        cast_leaves = jax.tree.leaves(cast(jax.tree.unflatten(structure, whole)))
        return [cast_leaves[n] for n in moved]

    program = jax.jit(program, out_shardings=[places[n] for n in moved])

    def apply(arrays):
        flat = jax.tree.leaves(arrays)
        for n, x in zip(moved, program([flat[n] for n in moved]) if moved else ()):
            flat[n] = x
        return jax.tree.unflatten(structure, flat)

    return apply
