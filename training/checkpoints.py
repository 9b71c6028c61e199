"""Checkpoints of a training state with orbax.

A checkpoint is written to a temporary folder and renamed when it is complete, and an older one is deleted only after
that, so that a failed write leaves the last complete one. Values are stored unchanged, so a resumed run
repeats an uninterrupted one bit for bit.
"""

from __future__ import annotations

import contextlib
import logging
import pathlib
import zlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from lipbounds.training.store import unlike

_KEPT = 2
# Named, because orbax guesses how to read an unnamed item from the newest checkpoint, which may be damaged.
_ITEM = "state"
_CHECKSUM = "checksum"  # orbax does not notice a changed byte


class CheckpointError(OSError):
    """A checkpoint could not be written or read; existing checkpoints are unchanged."""


class Checkpoints:
    """The checkpoints in one folder, by epoch. Use as a context manager."""

    def __init__(self, folder: pathlib.Path):
        self.folder = folder.absolute()
        own = jax.process_index()  # every process reads alone; only the first writes
        options = ocp.CheckpointManagerOptions(
            max_to_keep=None,  # `save` deletes
            enable_async_checkpointing=False,
            cleanup_tmp_directories=own == 0,
            multiprocessing_options=ocp.options.MultiprocessingOptions(
                primary_host=own, active_processes={own}, barrier_sync_key_prefix=f"process{own}"
            )
            if jax.process_count() > 1
            else ocp.options.MultiprocessingOptions(),
            create=jax.process_count() == 1,
        )
        self.folder.mkdir(parents=True, exist_ok=True)
        with _quiet():
            self._manager = ocp.CheckpointManager(self.folder, options=options)

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_: Any) -> None:
        with contextlib.suppress(Exception):  # nothing is in flight: saving is synchronous
            self._manager.close()

    def epochs(self) -> list[int]:
        """Epochs of which there is a complete checkpoint, in order."""
        return sorted(int(step) for step in self._manager.all_steps())

    def save(self, epoch: int, state: Any, best: int | None = None) -> None:
        """Write the state after `epoch`, then delete all but the last two and that of epoch `best`.

        CheckpointError if writing fails; older checkpoints are then kept.
        """
        named = {f"{i:05d}": np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(state))}
        leaves = {name: leaf for name, leaf in named.items() if leaf.size}  # orbax refuses empty arrays
        leaves[_CHECKSUM] = _checksum(leaves)
        try:
            try:
                self._write(epoch, leaves)
            except Exception:  # what an earlier write left behind may still have been on its way out
                self._write(epoch, leaves)
        except Exception as error:  # orbax and tensorstore raise many kinds
            kept = [e for e in self.epochs() if e != epoch]
            safe = f"the checkpoint of epoch {kept[-1]} is complete" if kept else "there is no earlier one"
            raise CheckpointError(
                f"the checkpoint of epoch {epoch} could not be written to {self.folder}: {_first_line(error)}; {safe}"
            ) from error
        for old in self.epochs()[:-_KEPT]:
            if old != best:
                with _quiet(), contextlib.suppress(Exception):  # one too many does no harm
                    self._manager.delete(old)

    def _write(self, epoch: int, leaves: dict[str, Any]) -> None:
        with _quiet():
            if epoch in self._manager.all_steps():  # one that `load` could not read
                self._manager.delete(epoch)
            args = ocp.args.Composite(**{_ITEM: ocp.args.StandardSave(leaves)})
            self._manager.save(epoch, args=args, force=True)

    def load(self, like: Any, only: int | None = None) -> tuple[int, Any]:
        """(epoch, state) of the newest checkpoint that can be read, in the structure, shapes and types of `like`.

        With `only`, that of this epoch. CheckpointError if there is none, or if the newest one does not fit `like`.
        """
        leaves, tree = jax.tree.flatten(like)
        empty = {f"{i:05d}": np.zeros(a.shape, a.dtype) for i, a in enumerate(leaves) if not a.size}
        wanted = {f"{i:05d}": jax.ShapeDtypeStruct(a.shape, a.dtype) for i, a in enumerate(leaves) if a.size}
        trouble: list[str] = []
        for epoch in reversed(self.epochs() if only is None else [only]):
            try:
                with _quiet():
                    args = ocp.args.Composite(**{_ITEM: ocp.args.StandardRestore()})
                    found = self._manager.restore(epoch, args=args)[_ITEM]
                _check(found, wanted)
            except Exception as error:
                trouble.append(f"epoch {epoch}: {_first_line(error)}")
                continue
            found |= empty
            return epoch, jax.tree.unflatten(tree, [np.asarray(found[name]) for name in sorted(found)])
        reason = "; ".join(trouble) or "there is no complete checkpoint"
        raise CheckpointError(f"nothing to resume in {self.folder}: {reason}")


def _checksum(leaves: dict[str, Any]) -> np.ndarray:
    total = 0
    for name in sorted(leaves):
        total = zlib.crc32(np.ascontiguousarray(leaves[name]).tobytes(), total)
    return np.array(total, np.uint32)


def _check(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    stored = found.pop(_CHECKSUM, None)
    if stored is None or stored != _checksum(found):
        raise ValueError("its checksum does not match its arrays")
    if set(found) != set(wanted):
        raise ValueError(f"it holds {len(found)} arrays, this configuration has {len(wanted)}")
    for name, is_, needed in unlike(found, wanted):
        raise ValueError(f"array {name} is {is_}, this configuration needs {needed}")


def _first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:300]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without orbax's log lines about its own internals."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)
