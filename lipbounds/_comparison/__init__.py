"""Comparison of methods, and brackets of a lower and an upper bound."""
