"""The network: the only room that imports flax. `bagel` is its door."""
