"""Local Lipschitz constants on balls, and the search for radii with them."""

from lipbounds._local.forward import logits

__all__ = ["logits"]
