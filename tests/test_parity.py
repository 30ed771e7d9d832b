"""Replays of golden data of the official implementation; the tests are in tests/parity, one module
per golden set.

`--goldens=DIR` takes any sizes, seeds and numbers of cases: sizes, settings and names come from the
files. A set that the folder lacks is skipped by name, except in the default copy, where it is an
error. Tolerances are those that the goldens' README suggests.
"""

import ast
import pathlib

import parity
from parity.carried_copy import *
from parity.checkpoint import *
from parity.conftest import *
from parity.gen_image import *
from parity.generate import *
from parity.grads import *
from parity.jsd import *
from parity.opsd_steps import *
from parity.other_sizes import *
from parity.preprocess import *
from parity.schedule import *
from parity.text_forward import *
from parity.und_forward import *
from parity.vae import *
from parity.vit import *


def test_every_parity_test_is_collected():
    """A module that is not imported above, or two tests of one name, would go unnoticed."""
    found = {}
    for path in pathlib.Path(parity.__file__).parent.glob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                assert node.name not in found, f"{path.name} and {found[node.name]}: {node.name}"
                found[node.name] = path.name
    assert found and found.keys() <= globals().keys()
