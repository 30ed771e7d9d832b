"""Memory and time of a training step on a TPU topology you do not have: `python -m opsd_jax.plan`."""
