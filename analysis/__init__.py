"""The demo's experiment and its report."""

if not __name__.startswith("lipbounds."):
    raise ImportError("this folder is the package lipbounds.analysis: write `import lipbounds.analysis`")
