"""Local Lipschitz constants on balls, and certified radii."""

from lipbounds._local.forward import logits

__all__ = ["logits"]
