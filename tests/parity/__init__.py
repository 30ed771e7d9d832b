"""Replays of golden data of the official implementation, one module per golden set.

tests/test_parity.py collects the tests of all modules. A single set runs with, for example,
`pytest tests/parity/jsd.py`.
"""
