"""The mesh and the two layouts of the parameters. No mesh axis is named in any other file.

Mesh axes: `data` (copies of the model; the only one that may cross slices), `fsdp` (parameters and batch are cut
along it), `tensor` (heads, mlp and vocabulary are cut along it).

  train layout     parameters cut along fsdp and tensor; gathered layer by layer when used
  rollout layout   parameters cut along tensor only: decoding with fsdp-cut weights would gather each layer's
                   weights again for every token
"""

import math

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

from opsd_jax import params as params_lib

AXES = ("data", "fsdp", "tensor")
_BATCH = ("data", "fsdp")

# Logical axis of a parameter -> mesh axis.
_TRAIN = {"embed": "fsdp", "heads": "tensor", "kv": "tensor", "mlp": "tensor", "vocab": "tensor",
          "vit_embed": "fsdp", "vit_heads": "tensor", "vit_mlp": "tensor"}
_ROLLOUT = {logical: axis for logical, axis in _TRAIN.items() if axis == "tensor"}
LAYOUTS = {"train": _TRAIN, "rollout": _ROLLOUT}


def make_mesh(data: int = 1, fsdp: int = -1, tensor: int = 1, devices=None) -> Mesh:
    """A mesh over all devices; one size may be -1 (whatever is left). ValueError if the sizes do not fit."""
    devices = jax.devices() if devices is None else devices
    sizes = [data, fsdp, tensor]
    if sizes.count(-1) == 1:
        rest = math.prod(s for s in sizes if s != -1)
        sizes[sizes.index(-1)] = max(len(devices) // rest, 1)
    if math.prod(sizes) != len(devices):
        raise ValueError(f"mesh {dict(zip(AXES, [data, fsdp, tensor]))} does not cover {len(devices)} devices: "
                         "set config.mesh so that the product of its sizes is the number of devices")
    return Mesh(np.asarray(devices).reshape(sizes), AXES)


def batch_divisor(mesh: Mesh) -> int:
    """The batch size must be a multiple of this."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def replicated(mesh: Mesh) -> NamedSharding:
    """Whole on every device."""
    return NamedSharding(mesh, P())


def batch(mesh: Mesh) -> NamedSharding:
    """Arrays whose first axis is the batch."""
    return NamedSharding(mesh, P(_BATCH))


def accumulated_batch(mesh: Mesh) -> NamedSharding:
    """Arrays [micro steps, batch, ...]."""
    return NamedSharding(mesh, P(None, _BATCH))


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
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
                        tree_of_shapes, tree(mesh, tree_of_shapes, layout))


def rows(x):
    """x [B, ...] held to the layout of a batch where a program is traced under a mesh (see `distill.program`); x itself
    elsewhere. Without this the compiler may gather the rows of all devices instead of a layer's weights."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, P(_BATCH))


def put_batch(mesh: Mesh, host_batch):
    """This process's rows of the global batch -> global arrays on the mesh."""
    sharding = batch(mesh)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), host_batch)
