"""The network. This is the only package that imports flax; `bagel` is its public API."""
