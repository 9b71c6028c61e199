"""Architectures, data, a plain training loop and checkpoints for the demo and the benchmarks.

Nothing in `lipbounds` needs this package: bounds are computed for any JAX function.
"""

if not __name__.startswith("lipbounds."):
    raise ImportError("this folder is the package lipbounds.training: write `import lipbounds.training`")
