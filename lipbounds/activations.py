"""Proved slope ranges of elementwise functions: the public face of `lipbounds._activations`."""

from lipbounds._activations.activations import evaluate, piecewise_linear_slopes, slope_range

__all__ = ["evaluate", "piecewise_linear_slopes", "slope_range"]
