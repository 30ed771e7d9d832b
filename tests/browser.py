"""Report pages in headless chromium: how they look, and whether they fit a width."""

import html
import pathlib
import re
import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or ""
needs_browser = pytest.mark.skipif(not CHROMIUM, reason="needs chromium")
_FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-sync",
    "--disable-background-networking",
    "--disable-component-update",
    "--hide-scrollbars",
)


def _browse(page: pathlib.Path, tmp_path: pathlib.Path, *flags: str) -> bytes:
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    command = [CHROMIUM, *_FLAGS, profile, *flags, page.as_uri()]
    return subprocess.run(command, check=True, timeout=120, capture_output=True).stdout


def screenshot(page: pathlib.Path, tmp_path: pathlib.Path, width: int, height: int) -> np.ndarray:
    """Grey values [height, width] of the top of a page in a window of that size."""
    shot = tmp_path / "page.png"
    _browse(page, tmp_path, f"--window-size={width},{height}", f"--screenshot={shot}")
    return np.asarray(Image.open(shot).convert("L")).astype(int)


def scroll_width(page: pathlib.Path, tmp_path: pathlib.Path, width: int) -> int:
    """Width of the contents of a page, all samples open, in a window of that width.

    More than `width` means that the page scrolls sideways.
    """
    inside = page.read_text().replace("<details ", "<details open ")
    # The page itself forbids scripts; the one that measures is of the page around it.
    around = tmp_path / "around.html"
    around.write_text(
        f'<iframe id="f" width="{width}" height="900" style="border:0" '
        f'srcdoc="{html.escape(inside)}"></iframe><p id="found"></p><script>'
        "document.getElementById('f').onload = function () { "
        "document.getElementById('found').textContent = "
        "'width ' + this.contentDocument.documentElement.scrollWidth; };</script>"
    )
    dom = _browse(around, tmp_path, "--window-size=1400,1000", "--dump-dom").decode()
    found = re.search(r'<p id="found">width (\d+)</p>', dom)
    assert found, "the page did not load"
    return int(found[1])
