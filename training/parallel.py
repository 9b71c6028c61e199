"""Data-parallel training over all devices of one or several processes, with `jax.sharding`.

The state and the data set are replicated, the rows of a batch are spread over the devices; what is summed over the
batch is summed across devices by XLA. Every process runs the same program (`jax.distributed`).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

_AXIS = "batch"


@dataclass(frozen=True)
class Devices:
    """Devices of a run."""

    mesh: Mesh

    @property
    def count(self) -> int:
        """Number of devices."""
        return int(self.mesh.devices.size)

    @property
    def platform(self) -> str:
        """The platform of the devices: "cpu", "gpu" or "tpu"."""
        return str(self.mesh.devices.flat[0].platform)

    @property
    def replicated(self) -> NamedSharding:
        """The sharding of arrays that every device holds whole."""
        return NamedSharding(self.mesh, PartitionSpec())

    @property
    def leads(self) -> bool:
        """Whether this process writes files and prints."""
        return jax.process_index() == 0

    def check_batch(self, batch_size: int) -> None:
        """ValueError unless the devices can share a batch of this size."""
        if batch_size % self.count:
            raise ValueError(
                f"batch_size {batch_size} cannot be spread over {self.count} devices: choose a multiple of {self.count}"
            )

    def spread(self, rows: jax.Array) -> jax.Array:
        """The rows of a batch, a share of them on every device."""
        if self.count == 1:
            return rows
        return jax.lax.with_sharding_constraint(rows, NamedSharding(self.mesh, PartitionSpec(_AXIS)))

    def put(self, tree: Any) -> Any:
        """Host arrays, the same in every process, as replicated device arrays of the same types."""
        sharding = self.replicated

        def one(value: Any) -> jax.Array:
            host = np.asarray(value)
            return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

        with jax.enable_x64(True):  # else float64 would become float32
            return jax.tree.map(one, tree)


def devices(count: int | None = None) -> Devices:
    """All devices of all processes, or the first `count`. ValueError if there are not so many."""
    found = jax.devices()
    if count is not None and not 1 <= count <= len(found):
        raise ValueError(f"{count} devices were asked for, and there are {len(found)}")
    return Devices(Mesh(np.array(found[:count]), (_AXIS,)))


def host(tree: Any) -> Any:
    """Replicated device arrays as NumPy arrays, in every process."""
    return jax.tree.map(lambda a: np.asarray(a.addressable_data(0)), tree)


def local(tree: Any) -> Any:
    """Replicated device arrays as arrays of the same types on this process's first device."""
    with jax.enable_x64(True):
        return jax.tree.map(jnp.asarray, host(tree))


def agree(value: int, what: str) -> None:
    """ValueError unless all processes have the same value; they wait for each other here."""
    if len(set(everyone(value))) > 1:
        raise ValueError(f"the processes of this run disagree about {what}")


def everyone(record: Any) -> list[Any]:
    """What each process hands in, plain data for JSON, in the order of the processes; all of them have to call it."""
    if jax.process_count() == 1:
        return [record]
    text = np.frombuffer(json.dumps(record).encode(), np.uint8)
    sizes = np.asarray(multihost_utils.process_allgather(np.int32(text.size))).reshape(-1)
    padded = np.zeros(int(sizes.max()), np.uint8)
    padded[: text.size] = text
    rows = np.asarray(multihost_utils.process_allgather(padded))
    return [json.loads(bytes(row[:size])) for row, size in zip(rows, sizes, strict=True)]


def leave() -> None:
    """Disconnect from the other processes, if any, after the last common step."""
    if jax.process_count() > 1:
        jax.distributed.shutdown()


def join(coordinator: str | None, processes: int | None, index: int | None) -> None:
    """Join the processes of one run before JAX touches a device (`jax.distributed.initialize`).

    Nothing happens without a coordinator ("host:port" of process 0). ValueError where some of the three are missing.
    """
    if coordinator is None and processes is None and index is None:
        return
    if coordinator is None or processes is None or index is None or not 0 <= index < processes:
        raise ValueError(
            "several processes need all of coordinator (host:port), number of processes and own index (from 0)"
        )
    jax.distributed.initialize(coordinator, num_processes=processes, process_id=index)
