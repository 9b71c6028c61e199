"""Bounds by the triangle inequality: the naive product and LipLT."""
