"""Errors of the library; one message lists all operations that have no bound.

All errors about an input are `ValueError`s, so one `except ValueError` catches every refusal.
`GuaranteeError` is not: it means that two results contradict each other.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Unsupported:
    """One operation without a Lipschitz bound.

    primitive  name of the operation as JAX calls it ("mul", "dot_general", "argmax", ...)
    path       where it is called ("Block/attention/mul"); "" when it is the function itself
    shape      shape of its result
    reason     why there is no bound, in words
    remedy     what to do about it, in words
    """

    primitive: str
    path: str
    shape: tuple[int, ...]
    reason: str
    remedy: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(int(n) for n in self.shape))

    def __str__(self) -> str:
        where = f" at {self.path}" if self.path else ""
        return f"{self.primitive}{where}, shape {self.shape}: {sentence(self.reason)} Remedy: {sentence(self.remedy)}"


def sentence(text: str) -> str:
    """The text with a full stop at its end."""
    return text if text.endswith((".", "!", "?")) else f"{text}."


class UnsupportedError(ValueError):
    """The function holds operations without a Lipschitz bound.

    `.items` is the tuple of all of them (`Unsupported` records), in the order of the program; the
    message lists every one with primitive, call path, shape, reason and remedy.

    Example:
        >>> import jax.numpy as jnp
        >>> import lipbounds as lb
        >>> try:
        ...     lb.trace(lambda x: x * x, jnp.zeros(3))
        ... except lb.UnsupportedError as error:
        ...     error.items[0].primitive, error.items[0].reason
        ('mul', 'its slope is unbounded: it grows like x**2')
    """

    def __init__(self, items: Iterable[Unsupported]) -> None:
        self.items: tuple[Unsupported, ...] = tuple(items)
        if not self.items:
            raise TypeError("UnsupportedError needs at least one item")
        super().__init__(self.items)  # the constructor's argument, so that pickle and copy work

    def __str__(self) -> str:
        n = len(self.items)
        head = "1 operation of this function has" if n == 1 else f"{n} operations of this function have"
        lines = [f"{head} no Lipschitz bound here:"]
        for number, item in enumerate(self.items, 1):
            where = f" at {item.path}" if item.path else ""
            lines += [
                f"  {number}. {item.primitive}{where}, shape {item.shape}",
                f"     why:    {item.reason}",
                f"     remedy: {item.remedy}",
            ]
        return "\n".join(lines)


class UnitsWarning(UserWarning):
    """The values of images suggest other units than those that an eps in pixels is meant for.

    `input_range=(low, high)` of the call that warns says which units are meant.

    Example:
        >>> import warnings
        >>> import numpy as np
        >>> import lipbounds as lb
        >>> form = lb.from_weights([np.ones((2, 64), np.float32)])
        >>> pixels = np.full((1, 64), 200.0)
        >>> with warnings.catch_warnings(record=True) as seen:
        ...     warnings.simplefilter("always")
        ...     radii = lb.certified_radius(form, pixels, [0])
        >>> [w.category.__name__ for w in seen]
        ['UnitsWarning']
        >>> radii = lb.certified_radius(form, pixels, [0], input_range=(0, 255))
    """


class CertificateError(ValueError):
    """A stored certificate does not prove what it claims for this form; the message says why.

    Example:
        >>> import pathlib, tempfile
        >>> import lipbounds as lb
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder) / "certificate"
        ...     size = path.write_bytes(b"something else")
        ...     lb.verify_certificate(path, lb.from_weights([[[1.0]]]))
        Traceback (most recent call last):
        lipbounds.errors.CertificateError: it is not a safetensors file
    """


class GuaranteeError(RuntimeError):
    """A lower bound exceeds an upper bound: one of them is wrong.

    Either the user declared something false (slopes of a registered activation) or this library
    has a bug. No result is returned.
    """
