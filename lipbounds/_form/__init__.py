"""The heart: the Lur'e form of a network, on which every method works."""
