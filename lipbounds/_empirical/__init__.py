"""Lower bounds: slopes attained between points of the input space or of data."""
