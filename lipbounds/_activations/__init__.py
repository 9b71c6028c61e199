"""Slopes of elementwise functions: proved ranges, on the whole line and on intervals."""
