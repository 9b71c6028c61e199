"""Local Lipschitz constants on balls, and certified radii."""
