"""Blocks of the gain: the linear maps between activation layers, their matrices and the memory they take."""
