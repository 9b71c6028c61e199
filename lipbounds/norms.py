"""Proved upper bounds of matrix norms, rounding included: the public face of `lipbounds._norms`."""

from lipbounds._norms.enclosures import Enclosure, enclosure_norm
from lipbounds._norms.matrices import (
    frobenius_norm,
    induced_norm,
    pairwise_row_norms,
    row_norms,
    verified_norm,
)

__all__ = [
    "Enclosure",
    "enclosure_norm",
    "frobenius_norm",
    "induced_norm",
    "pairwise_row_norms",
    "row_norms",
    "verified_norm",
]
