"""From a jax function to its Lur'e form, or one error that lists everything unsupported."""
