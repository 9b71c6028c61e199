"""Bounds by the triangle inequality: the naive product and LipLT."""

from lipbounds._triangle.rehearsal import compile_ahead, on_accelerator

__all__ = ["compile_ahead", "on_accelerator"]
