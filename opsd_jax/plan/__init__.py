"""Memory and time of a training step on a TPU topology you do not have.

The command is `python -m opsd_jax.plan`.
"""
