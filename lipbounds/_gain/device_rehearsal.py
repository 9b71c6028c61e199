"""The programs of the proofs on an accelerator, compiled ahead from the shapes alone: nothing is computed there.

Where the shapes are new, compilation takes longer than the proofs. `rehearse` walks through `device_blocks` with shapes
in the place of arrays and compiles every program that it meets, so that the proofs of any form with the same steps
find theirs compiled. What it does not foresee is compiled when it is needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from lipbounds._gain.blocks import HostForm, Pair, TapScaling
from lipbounds._gain.device_blocks import Declined, DeviceForm, formed, sweeps
from lipbounds._norms import device as proofs
from lipbounds._text import device as places
from lipbounds._text.progress import alive


def rehearse(host: HostForm, pairs: Sequence[Pair], scalings: Sequence[TapScaling]) -> None:
    """Compile what `proved_on_device` runs for these blocks on the accelerator of the public call around this."""
    device = places.chosen()
    if device is None:
        return
    form = _Shapes(host, device)
    with proofs.exactly():
        for node, others, reverse in sweeps(host, pairs, proofs.free_bytes(device)):
            try:
                ends = formed(form, node, others, scalings, reverse)
            except Declined:
                continue
            for columns, _ in ends.values():
                form.tiles(columns[0].array)
            for program, shapes in proofs.programs(
                device, -(-host.node_size(node, source=not reverse) // proofs.TILE)
            ):
                form.call(program, *shapes)


class _Shapes(DeviceForm):
    """A form whose arrays are shapes, and whose programs are compiled in the place of a run."""

    def __init__(self, host: HostForm, device: Any) -> None:
        super().__init__(host, device)
        self.done: dict[Any, Any] = {}

    def put(self, x: Any) -> Any:
        return self.shape(np.shape(x), np.asarray(x).dtype)

    def shape(self, shape: tuple[int, ...], dtype: Any) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=jax.sharding.SingleDeviceSharding(self.device))

    def call(self, program: Any, *args: Any, **options: int) -> Any:
        known = [(np.shape(x), x.dtype) for x in jax.tree.leaves(args)]
        key = program, str(known), *options.items()
        if key not in self.done:
            alive()
            lowered = program.lower(*args, **options)
            lowered.compile()
            self.done[key] = jax.tree.map(lambda out: self.shape(out.shape, out.dtype), lowered.out_info)
        return self.done[key]

    def trusted(self) -> bool:
        return True

    def dense_tiles(self, a: np.ndarray) -> proofs.Tiles:
        rows, columns = (range(-(-n // proofs.TILE)) for n in a.shape)
        tile = self.shape((proofs.TILE, proofs.TILE), np.float64)
        return {(i, j): tile for i in rows for j in columns}

    def begins(self, width: int) -> range:
        return range(1)

    def number(self, x: jax.Array) -> float:
        return 1.0
