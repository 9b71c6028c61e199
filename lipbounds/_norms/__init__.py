"""Proved upper bounds of matrix norms in floating point."""
