"""The device mesh and the two layouts of the parameters. No other module names a mesh axis.

Mesh axes: `data` (copies of the model; the only axis that may span TPU slices), `fsdp` (parameters
and batch are divided along it), `tensor` (heads, mlp and vocabulary are divided along it).

  train layout     parameters divided along fsdp and tensor, gathered layer by layer when used
  rollout layout   parameters divided along tensor only: with weights divided along fsdp, decoding
                   would gather each layer's weights again for every token

Training has two meshes of the same devices: one for the update, one for the sampler (`regrouped`).
"""

import contextlib
import functools
import glob
import importlib.util
import math
import os
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Shaped

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


@functools.cache
def start_devices() -> None:
    """Starts JAX's devices, without what libtpu writes to stderr where there is no TPU.

    libtpu is installed without a TPU to compile for one (`python -m opsd_jax.plan`). It then prints
    warnings about variables that nobody has to set. If JAX finds no device, its messages appear.
    With several processes, `jax.distributed.initialize` comes first.
    """
    has_tpu = glob.glob("/dev/accel[0-9]*") + glob.glob("/dev/vfio/[0-9]*")
    if has_tpu or not importlib.util.find_spec("libtpu"):
        jax.devices()
        return
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with tempfile.TemporaryFile() as written:
            os.dup2(written.fileno(), 2)  # libtpu writes to the descriptor, not to sys.stderr
            try:
                jax.devices()
            except BaseException:
                written.seek(0)
                os.write(kept, written.read())
                raise
            finally:
                os.dup2(kept, 2)
    finally:
        os.close(kept)


def make_mesh(data: int = 1, fsdp: int = -1, tensor: int = 1, devices=None) -> Mesh:
    """A mesh over all devices. One size may be -1: all remaining devices.

    On TPUs, neighbours in the mesh are neighbours in the torus. With several slices, only `data`
    spans the data-centre network.

    Args:
      data, fsdp, tensor: size of each axis. devices: default `jax.devices()`.
    Raises:
      ValueError: the sizes do not fit the devices.
    """
    if devices is None:
        start_devices()
        devices = jax.devices()
    sizes = [data, fsdp, tensor]
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise ValueError(
            f"mesh {dict(zip(AXES, sizes))}: config.mesh takes positive sizes, and -1 for one of "
            "them"
        )
    if sizes.count(-1) == 1:
        rest = math.prod(s for s in sizes if s != -1)
        sizes[sizes.index(-1)] = max(len(devices) // rest, 1)
    if math.prod(sizes) != len(devices):
        raise ValueError(
            f"mesh {dict(zip(AXES, [data, fsdp, tensor]))} does not cover {len(devices)} devices: "
            "set config.mesh so that the product of its sizes is the number of devices"
        )
    slices = _slices(devices)
    if sizes[0] % slices:
        raise ValueError(
            f"config.mesh.data is {sizes[0]} for {slices} slices: make it a multiple of them, "
            "since fsdp and tensor would wait for the network between slices at every layer"
        )
    if slices > 1:
        inside = (sizes[0] // slices, *sizes[1:])
        grid = mesh_utils.create_hybrid_device_mesh(
            inside, (slices, 1, 1), devices, allow_split_physical_axes=True
        )
    else:
        grid = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    return Mesh(grid, AXES)


def _slices(devices) -> int:
    """Number of TPU slices that the devices belong to."""
    if devices[0].platform != "tpu":
        return 1
    return len({getattr(device, "slice_index", 0) for device in devices})


def inference_mesh(tensor: int, devices=None) -> Mesh:
    """A mesh for answering questions: copies of the model, each divided over `tensor` devices.

    In the rollout layout nothing is divided along `fsdp`, so it is a second axis of copies, inside
    a slice; `data` has one copy of it for each slice.

    Args:
      tensor: devices of a copy. devices: default `jax.devices()`.
    Raises:
      ValueError: `tensor` does not divide the devices of a slice.
    """
    devices = jax.devices() if devices is None else devices
    slices = _slices(devices)
    if tensor < 1 or (len(devices) // slices) % tensor:
        raise ValueError(
            f"--tensor={tensor}: a copy of the model is divided over so many devices, and there "
            f"are {len(devices)}{f' in {slices} slices' if slices > 1 else ''}: give a divisor of "
            f"{len(devices) // slices}"
        )
    return make_mesh(slices, -1, tensor, devices)


def regrouped(mesh: Mesh, tensor: int) -> Mesh:
    """The same devices in the same order, `tensor` neighbours for each copy of the weights.

      update    fsdp 8, tensor 1    0 | 1 | 2 | 3 | 4 | 5 | 6 | 7
      sampler   fsdp 2, tensor 4    0 1 2 3 | 4 5 6 7

    One program can take arrays on one of the meshes and return them on the other, because the order
    of the devices is the same.

    Raises:
      ValueError: `tensor` does not divide the devices of a slice.
    """
    if tensor == mesh.shape["tensor"]:
        return mesh
    within = devices_of_slice(mesh)
    if within % tensor:
        raise ValueError(
            f"config.rollout.tensor={tensor} must divide the number of devices of a slice, here "
            f"{within}: give a divisor of it, or 0 for the default"
        )
    return Mesh(mesh.devices.reshape(mesh.devices.size // within, -1, tensor), AXES)


def devices_of_slice(mesh: Mesh) -> int:
    """Number of the mesh's devices that one TPU slice has."""
    return mesh.devices.size // _slices(mesh.devices.reshape(-1))


def batch_divisor(mesh: Mesh | AbstractMesh) -> int:
    """Number of batch shards of the mesh. The batch size must be a multiple of it."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def devices_per_copy(mesh: Mesh | AbstractMesh) -> int:
    """Number of devices that a copy of the weights is divided over in the rollout layout."""
    return mesh.shape["tensor"]


def replicated(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """Sharding of arrays that are whole on every device."""
    return NamedSharding(mesh, P())


def batch(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """Sharding of arrays whose first axis is the batch."""
    return NamedSharding(mesh, P(_BATCH))


def parameter(mesh: Mesh | AbstractMesh, path: str, shape, layout: str = "train") -> NamedSharding:
    """Sharding of one parameter by its path. An axis that its mesh axis does not divide stays
    whole on every device.

    layout: "train" or "rollout".
    """
    rules, spec = LAYOUTS[layout], []
    for size, logical in zip(shape, params_lib.fact(path).axes, strict=True):
        axis = rules.get(logical) if logical else None
        spec.append(axis if axis and size % mesh.shape[axis] == 0 else None)
    return NamedSharding(mesh, P(*spec))


def tree_shardings(mesh: Mesh | AbstractMesh, abstract, layout: str = "train"):
    """Shardings of any pytree of arrays.

    A leaf whose path ends like a parameter's is divided like it (so Adam's moments and the EMA
    follow their parameter); everything else is replicated.
    """

    def leaf(path, x):
        names = [str(key.key) for key in path if hasattr(key, "key")]
        for start in range(len(names)):
            name = "/".join(names[start:])
            if params_lib.find(name):
                return parameter(mesh, name, x.shape, layout)
        return replicated(mesh)

    return jax.tree_util.tree_map_with_path(leaf, abstract)


def abstract(mesh: Mesh | AbstractMesh, tree_of_shapes, layout: str = "train"):
    """ShapeDtypeStructs with the shardings of a layout, as needed to restore a checkpoint."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        tree_of_shapes,
        tree_shardings(mesh, tree_of_shapes, layout),
    )


def abstract_cache(mesh: Mesh | AbstractMesh, tree_of_shapes):
    """ShapeDtypeStructs of keys and values [L, B, S, K, h], as programs that fill a cache cut it:
    by sequences, and by heads where `tensor` divides them.
    """

    def cut(x):
        heads = "tensor" if x.shape[3] % mesh.shape["tensor"] == 0 else None
        spec = P(None, _BATCH, None, heads)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree.map(cut, tree_of_shapes)


def mesh_context(mesh: Mesh | None):
    """A context manager that makes the mesh known to programs traced inside it.

    `constrain_batch` and `shard_map_batch` need it, and so does the "flash" attention kernel, which
    XLA cannot divide over devices by itself. It does not change where arrays are placed. None: no
    mesh.
    """
    return (
        jax.sharding.use_abstract_mesh(mesh.abstract_mesh)
        if mesh is not None
        else contextlib.nullcontext()
    )


# CPUs have no products of bfloat16: XLA converts the operands to float32. This pass would move the
# conversion of all weights before the loop over layers or tokens, where they take twice their size
# in addition: 30 GiB of a 7B model.
_BFLOAT16_ON_CPU = {"xla_disable_hlo_passes": "while-loop-invariant-code-motion"}


def jit_on_mesh(**options) -> Callable[[Callable], "OnMesh"]:
    """Decorator: a function that is jitted with these options of `jax.jit`, as `OnMesh`."""
    return functools.partial(OnMesh, **options)


class OnMesh:
    """A jitted function that is called and traced inside `mesh_context`.

    The mesh is that of the first argument, a tree of arrays or ShapeDtypeStructs. Inside an outer
    trace the outer context applies.

    `jax.set_mesh` around every command would take fewer lines here. A call outside of it, from a
    notebook or a test, would then run without the constraints and say nothing.

    Args:
      options: of `jax.jit`.
    """

    def __init__(self, function, **options):
        functools.update_wrapper(self, function)
        self._jitted = jax.jit(function, **options)
        self._jitted_for_cpu = jax.jit(function, **options, compiler_options=_BFLOAT16_ON_CPU)

    def __call__(self, tree, *arguments, **named):
        with self._context(tree):
            return self._program(tree)(tree, *arguments, **named)

    def trace(self, tree, *arguments, **named):
        """Like `trace` of a jitted function."""
        with self._context(tree):
            return self._program(tree).trace(tree, *arguments, **named)

    def _cache_size(self) -> int:
        """Number of compiled programs, which tests count."""
        programs: Any = (self._jitted, self._jitted_for_cpu)  # JAX does not declare the method
        return sum(program._cache_size() for program in programs)

    def _program(self, tree):
        """The jitted function for these arguments. Inside an outer trace, that one is compiled."""
        leaves = jax.tree.leaves(tree)
        traced = isinstance(leaves[0], jax.core.Tracer)
        if traced or not any(leaf.dtype == jnp.bfloat16 for leaf in leaves):
            return self._jitted
        place = getattr(leaves[0], "sharding", None)
        device, *_ = place.device_set if place else jax.devices()
        return self._jitted_for_cpu if device.platform == "cpu" else self._jitted

    def lower(self, *arguments, **named):
        """Like `lower` of a jitted function."""
        return self.trace(*arguments, **named).lower()

    def _context(self, tree):
        leaf = jax.tree.leaves(tree)[0]
        traced = isinstance(leaf, jax.core.Tracer)
        return (
            contextlib.nullcontext()
            if traced
            else mesh_context(getattr(getattr(leaf, "sharding", None), "mesh", None))
        )


def update_program(step, state, config):
    """`step(state, ..., config=config)` jitted for states with the layout of this one.

    The state is donated, and every leaf is returned with the sharding that it had. XLA would choose
    other shardings for some leaves, and the next step would compile again.

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
        with mesh_context(mesh):
            return step(*arguments, config=config)

    return jax.jit(under_mesh, donate_argnums=0, out_shardings=(shardings, None))


def constrain_batch(x: Shaped[Array, "B ..."]) -> Shaped[Array, "B ..."]:
    """x [B, ...] constrained to the layout of a batch, under `mesh_context`.

    Returns x itself without a mesh, and where the devices do not divide B. Without the constraint
    the compiler may gather the batch entries of all devices instead of a layer's weights.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or x.shape[0] % batch_divisor(mesh):
        return x
    return jax.lax.with_sharding_constraint(x, P(_BATCH))


def shard_map_batch(function, whole, *batches):
    """function(whole, *batches) -> tree of [B, ...], computed by each device on its batch entries.

    For loops over parts of a sequence: `whole` is gathered once before the loop, and its gradient
    is reduced once after it. Otherwise XLA may do both in every iteration, or gather the batch
    entries of all devices. Along `tensor`, arrays are divided as the compiler chooses. Falls back
    to a plain call without a mesh (`mesh_context`), and where the devices do not divide B.

    Args:
      whole: tree of arrays without a batch axis. batches: trees of arrays [B, ...].
    """
    mesh, size = jax.sharding.get_abstract_mesh(), jax.tree.leaves(batches)[0].shape[0]
    if mesh.empty or batch_divisor(mesh) == 1 or size % batch_divisor(mesh):
        return function(whole, *batches)
    return jax.shard_map(
        function,
        in_specs=(P(), *[P(_BATCH)] * len(batches)),
        out_specs=P(_BATCH),
        axis_names=set(_BATCH),
        check_vma=False,
    )(whole, *batches)


def local_batch_indices(mesh: Mesh, size: int) -> list[int]:
    """Batch entries that this process's devices hold, in ascending order; `put_batch` takes these.

      mesh 4 x 2 of two processes, size 8     devices 0 0 | 0 0 | 1 1 | 1 1   process 0: 0 1 2 3
      mesh 2 x 4, `tensor` across processes   devices 0 0 1 1 | 0 0 1 1       both: all entries

    Args:
      size: number of batch entries of all processes together.
    Raises:
      ValueError: the batch shards of the mesh do not divide `size`.
    """
    shards = batch_divisor(mesh)
    if size % shards:
        raise ValueError(
            f"{size} sequences do not divide into the {shards} batch shards of the mesh (data x "
            "fsdp): change the batch size, or give devices to config.mesh.tensor"
        )
    found = batch(mesh).addressable_devices_indices_map((size,))
    parts = [index[0] for index in found.values() if index]
    return sorted({n for part in parts for n in range(*part.indices(size))})


def put_batch(mesh: Mesh, host_batch):
    """Global arrays [B, ...] from this process's entries of the batch (see `local_batch_indices`).

    host_batch: tree of arrays, the first axis being this process's entries.
    """
    sharding, shards = batch(mesh), batch_divisor(mesh)
    # A batch with one entry per shard tells how many shards this process holds.
    factor = shards // len(local_batch_indices(mesh, shards))

    def put(x):
        x = np.asarray(x)
        return jax.make_array_from_process_local_data(
            sharding, x, (x.shape[0] * factor, *x.shape[1:])
        )

    return jax.tree.map(put, host_batch)


def move_batch(mesh: Mesh, tree):
    """Arrays [B, ...] cut as a batch on `mesh`, from another mesh of the same devices in order.

    Arrays that are on `mesh` are returned as they are.
    """
    wanted = batch(mesh)
    if all(x.sharding == wanted for x in jax.tree.leaves(tree)):
        return tree
    return _identity(wanted)(tree)


@functools.cache
def _identity(wanted: NamedSharding):
    return jax.jit(lambda tree: tree, out_shardings=wanted)


def gather_to_host(tree):
    """NumPy arrays of the whole batch on every process, in the order of the mesh.

    tree: global arrays [B, ...].
    """
    return multihost_utils.process_allgather(tree, tiled=True)


def relayout_program(
    mesh: Mesh, abstract: dict, layout: str, cast: Callable[[dict], dict] = lambda tree: tree
):
    """A function that casts a tree of parameters and moves it to a layout.

    Leaves whose dtype and sharding do not change are returned as they are; all others are made in
    one compiled program. One program, because processes that start one transfer per leaf may start
    them in different orders and then wait for each other forever.

    Args:
      mesh: has the devices of the tree's mesh in the same order.
      abstract: the tree, as arrays or ShapeDtypeStructs with shardings.
      layout: "train" or "rollout".
      cast: maps the tree to one that may have more leaves. A leaf that keeps its path and dtype
        keeps its values.
    """
    shapes = jax.eval_shape(cast, abstract)
    before, wanted = params_lib.flatten(abstract), params_lib.flatten(shapes)
    places = params_lib.flatten(tree_shardings(mesh, shapes, layout))

    def stays(path):
        x = before.get(path)
        return (
            x is not None
            and x.dtype == wanted[path].dtype
            and getattr(x.sharding, "mesh", None) == mesh
            and x.sharding.is_equivalent_to(places[path], x.ndim)
        )

    moved = [path for path in wanted if not stays(path)]
    read = [path for path in before if not (path in wanted and stays(path))]

    def program(some):
        # zeros that are not used are not computed
        whole = {path: jnp.zeros(x.shape, x.dtype) for path, x in before.items()}
        cast_leaves = params_lib.flatten(cast(params_lib.unflatten(whole | some)))
        return {path: cast_leaves[path] for path in moved}

    program = jax.jit(program, out_shardings={path: places[path] for path in moved})

    def apply(arrays):
        flat = params_lib.flatten(arrays)
        made = program({path: flat[path] for path in read}) if moved else {}
        found = {path: made[path] if path in made else flat[path] for path in wanted}
        return params_lib.unflatten(found)

    return apply
