"""Lower bounds: difference quotients attained between pairs of points."""
