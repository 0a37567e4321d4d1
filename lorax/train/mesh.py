"""Packed trials on a mesh of devices: lanes over `trial`, batch rows over `data` and `fsdp`.

A lane is one trial of a pack. `map_lanes` is manual over `trial` (`jax.shard_map`), so no
collective can cross trials. XLA's partitioner handles `data` and `fsdp` and shards batch rows
over both. A large frozen base is sharded along `fsdp`; `gather` marks where the shards are
gathered. Without a mesh, these functions give the plain program of one device.

Every process has the same host arrays and calls the same functions in the same order.

Shapes in docs: K lanes, B batch rows of a lane, D the devices of `data` x `fsdp`.
"""

import math
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from lorax.errors import LoraxError

AXES = ("trial", "data", "fsdp")
ROWS = ("data", "fsdp")
LANES = PartitionSpec("trial")
REPLICATED = PartitionSpec()
SMALLEST_SHARDED = 2**16  # elements; for smaller leaves a collective costs too much for the memory


def make_mesh(trial: int | None = None, data: int = 1, fsdp: int = 1) -> Mesh:
    """The mesh over all devices of all processes.

    `trial` is the outermost axis: links between processes are slow, and different trials need
    no communication.

    Args:
      trial: groups of devices that train different lanes; None takes all remaining devices.
      data: devices that share the rows of a lane's batch, each with the whole base.
      fsdp: devices that share rows, each with a shard of the base.

    Raises:
      LoraxError: the product of the sizes is not the number of devices.
    """
    count, inner = jax.device_count(), data * fsdp
    if min(data, fsdp, 1 if trial is None else trial) < 1:
        raise LoraxError(f"mesh sizes trial={trial}, data={data}, fsdp={fsdp}: each is at least 1")
    if trial is None and count % inner:
        raise LoraxError(f"data={data} x fsdp={fsdp} does not divide the {count} devices")
    trial = count // inner if trial is None else trial
    if trial * inner != count:
        raise LoraxError(
            f"trial={trial} x data={data} x fsdp={fsdp} is {trial * inner}, but there are {count} "
            "devices; hide some (CUDA_VISIBLE_DEVICES) or change a size"
        )
    return jax.make_mesh((trial, data, fsdp), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def padded(lanes: int, mesh: Mesh) -> int:
    """Number of lanes of a pack on the mesh: `lanes`, padded to a multiple of the `trial` axis."""
    return math.ceil(lanes / mesh.shape["trial"]) * mesh.shape["trial"]


def fsdp_spec(shape: tuple[int, ...], size: int) -> PartitionSpec:
    """How a leaf of the base is sharded: along its longest axis that `size` divides.

    Small leaves, and those without such an axis, are replicated.

    >>> fsdp_spec((1024, 4096), 8), fsdp_spec((30522, 384), 8), fsdp_spec((4096,), 8)
    (P(None, 'fsdp'), P(None, 'fsdp'), P())
    """
    axes = [axis for axis, length in enumerate(shape) if length % size == 0]
    if size == 1 or not axes or math.prod(shape) < SMALLEST_SHARDED:
        return REPLICATED
    longest = max(axes, key=lambda axis: shape[axis])
    return PartitionSpec(*[None] * longest, "fsdp")


@cache
def base_shardings(mesh: Mesh) -> Callable[[tuple[int, ...]], NamedSharding]:
    """A function from the shape of a leaf of the base to its sharding; one function per mesh."""
    return lambda shape: NamedSharding(mesh, fsdp_spec(shape, mesh.shape["fsdp"]))


def shard_base(params: Any, mesh: Mesh) -> Any:
    """The frozen base on the mesh, each leaf sharded by `fsdp_spec`; None stays None.

    Leaves that were loaded with this sharding (`base_shardings`) are not copied.
    """
    shardings = base_shardings(mesh)

    def put(x: Any) -> jax.Array:
        sharding = shardings(np.shape(x))
        is_there = isinstance(x, jax.Array) and x.sharding == sharding
        return x if is_there else _put(x, mesh, sharding.spec)

    return jax.tree.map(put, params)


def shard_lanes(tree: Any, mesh: Mesh) -> Any:
    """Leaves (K, ...) sharded over `trial`: (padded K, ...), with the last lane repeated."""
    return jax.tree.map(lambda x: _put(_pad(x, mesh), mesh, LANES), tree)


def replicate(tree: Any, mesh: Mesh) -> Any:
    """Leaves replicated on every device."""
    return jax.tree.map(lambda x: _put(x, mesh, REPLICATED), tree)


def _put(x: Any, mesh: Mesh, spec: PartitionSpec) -> jax.Array:
    """A global array from one that every process has; unlike `device_put`, it does not check."""
    x = np.asarray(x)
    sharding = NamedSharding(mesh, spec)
    return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])


def _pad(x: Any, mesh: Mesh) -> np.ndarray:
    x = np.asarray(x)
    missing = padded(len(x), mesh) - len(x)
    return np.concatenate([x, np.repeat(x[-1:], missing, axis=0)]) if missing else x


def to_host(tree: Any, lanes: int) -> Any:
    """Leaves (padded K, ...) as NumPy arrays (K, ...), in every process.

    With several processes this is a collective: all of them must call it.
    """
    leaves = jax.tree.leaves(tree)
    if not all(leaf.is_fully_addressable for leaf in leaves):
        tree = _replicate(leaves[0].sharding.mesh)(tree)
    return jax.tree.map(lambda x: np.asarray(x)[:lanes], tree)


@cache
def _replicate(mesh: Mesh) -> Any:
    return jax.jit(lambda tree: tree, out_shardings=NamedSharding(mesh, REPLICATED))


def map_lanes(
    one: Callable[[Any, Any], Any],
    shared: Any,
    lanes: Any,
    *,
    mesh: Mesh | None = None,
    chunk: int | None = None,
) -> Any:
    """`one(shared, lane)` for every lane; to be compiled by `jit_lanes`.

    Args:
      one: a pure function of the shared part and of one lane.
      shared: no lane axis; of `shard_base` and `replicate`.
      lanes: leaves (K, ...); of `shard_lanes`.
      mesh: None for one device.
      chunk: lanes that a device computes at once, chunk after chunk; None for all. A number that
        does not divide a device's lanes compiles `one` twice.

    Returns:
      Leaves (K, ...).
    """
    run = partial(_run, one, chunk)
    if mesh is None:
        return run(shared, lanes)
    # check_vma: scans inside `one` may start from constants, which vary over no axis.
    return jax.shard_map(
        run,
        mesh=mesh,
        in_specs=(REPLICATED, LANES),
        out_specs=LANES,
        axis_names={"trial"},
        check_vma=False,
    )(shared, lanes)


def jit_lanes(function: Callable[..., Any], mesh: Mesh | None, **options: Any) -> Any:
    """`jax.jit` of a function that returns lanes: sharded over `trial`, replicated elsewhere.

    Otherwise XLA may shard a new state along `data` or `fsdp`, and the next call of the same
    executable would refuse it.
    """
    if mesh is None:
        return jax.jit(function, **options)
    return jax.jit(function, out_shardings=NamedSharding(mesh, LANES), **options)


def _run(one: Callable[[Any, Any], Any], chunk: int | None, shared: Any, lanes: Any) -> Any:
    count = len(jax.tree.leaves(lanes)[0])
    return jax.lax.map(partial(one, shared), lanes, batch_size=min(chunk or count, count))


def gather(params: Any) -> Any:
    """The base gathered from its shards, inside a function of `map_lanes`.

    Otherwise XLA may leave the weights sharded and move activations instead.
    """
    if not _is_fsdp():
        return params
    return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, REPLICATED), params)


def regather(loss: Callable[..., Any]) -> Callable[..., Any]:
    """`loss` with a backward pass that gathers the base again instead of keeping it whole."""
    return jax.checkpoint(loss, policy=_is_kept) if _is_fsdp() else loss


def _is_kept(primitive: Any, *_: Any, **__: Any) -> bool:
    return primitive.name not in ("sharding_constraint", "convert_element_type")


def on_every_device(tree: Any) -> Any:
    """Leaves that each device computes whole, so that no device sends them."""
    if jax.sharding.get_abstract_mesh().empty:
        return tree
    return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, REPLICATED), tree)


def spread_rows(batch: Any, axis: int) -> Any:
    """Rows along `axis` sharded over `data` and `fsdp`; needed after a reshape of rows."""
    if jax.sharding.get_abstract_mesh().empty:
        return batch
    spec = PartitionSpec(*[None] * axis, ROWS)
    return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, spec), batch)


def _is_fsdp() -> bool:
    return jax.sharding.get_abstract_mesh().shape.get("fsdp", 1) > 1
