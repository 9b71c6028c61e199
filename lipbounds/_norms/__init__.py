"""Proved upper bounds of matrix norms in floating point."""

from lipbounds._norms.factorised import inverse, inverse_factor
from lipbounds._norms.matrices import as_matrix
from lipbounds._norms.rounding import finite, gamma, mul_up, unscale_up

__all__ = ["as_matrix", "finite", "gamma", "inverse", "inverse_factor", "mul_up", "unscale_up"]
