"""Slope ranges and enclosures against the truth: dense float64 search of f', closed forms and refusals."""

from __future__ import annotations
