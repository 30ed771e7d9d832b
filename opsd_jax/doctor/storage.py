"""Checks of the file system that holds the workdir.

A run relies on four things that mounted buckets may lack: a file is there under its name once it
is closed, a folder lists it at once, a rename replaces a file or moves a folder in one piece, and
fsync does not fail. The checks work in a new folder of the workdir.
"""

import contextlib
import os
import pathlib
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator

from opsd_jax.doctor.result import OK, Result, judge
from opsd_jax.plan import budget
from opsd_jax.runtime import files

_SIZE = 2**16  # bytes of the files whose names and contents are checked
_RENAMES = 20  # how often a file is replaced while another thread reads it


def disk(workdir: str, needed: int) -> Iterator[Result]:
    """Free space at the workdir against what the checkpoints of a run take.

    needed: bytes of the checkpoints that the run holds when they take most.
    """
    free = shutil.disk_usage(workdir).free
    values = {"free_gb": free / 1e9, "checkpoints_gb": needed / 1e9}
    said = f"{_gb(free)} free at {workdir}, the run's checkpoints take up to {_gb(needed)}"
    yield judge("disk", free >= needed, said, f"{said}: give a larger disk or bucket", values)


def _gb(count: int) -> str:
    return f"{count / 1e9:,.1f} GB" if count >= 1e8 else f"{count / 1e6:,.2f} MB"


def semantics(workdir: str, size: int) -> Iterator[Result]:
    """All checks of what the file system does, and how fast it writes and reads.

    size: bytes of the file that is timed.
    """
    with _probe(workdir) as folder:
        yield closing(folder)
        yield listing(folder)
        yield replacing(folder)
        yield moving(folder)
        yield throughput(folder, size)


@contextlib.contextmanager
def _probe(workdir: str) -> Iterator[pathlib.Path]:
    """A new folder in the workdir, removed at the end."""
    folder = tempfile.mkdtemp(prefix=".doctor-", dir=workdir)
    try:
        yield pathlib.Path(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def closing(folder: pathlib.Path) -> Result:
    """A file that was written, synchronised and closed is there under its name, complete."""
    content, path = os.urandom(_SIZE), folder / "closed"
    start = time.perf_counter()
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    seconds = time.perf_counter() - start
    there = os.path.exists(path) and path.read_bytes() == content
    return judge(
        "files/close",
        there,
        f"a file is complete after close; write and fsync took {1e3 * seconds:.1f} ms",
        f"{path} was closed, but is missing or has other content: use another mount",
        {"write_fsync_seconds": seconds},
    )


def listing(folder: pathlib.Path) -> Result:
    """A folder lists a new file at once, and a removed one no more."""
    path = folder / "listed"
    path.write_bytes(b"x")
    appears = path.name in os.listdir(folder)
    os.remove(path)
    vanishes = path.name not in os.listdir(folder)
    wrong = "lists a file that was removed" if appears else "does not list a file that was written"
    return judge(
        "files/list",
        appears and vanishes,
        "a folder lists what was written and not what was removed",
        f"{folder} {wrong}: switch off the mount's caches of listings",
        {"appears": appears, "vanishes": vanishes},
    )


def replacing(folder: pathlib.Path) -> Result:
    """A rename replaces a file in one piece, while another thread reads it.

    The files are written as every file of a run (`runtime.files`).
    """
    path, stop, bad = folder / "replaced", threading.Event(), []

    def read() -> None:
        while not stop.is_set():
            try:
                content = path.read_bytes()
            except OSError as error:
                bad.append(f"it was missing for a moment ({type(error).__name__})")
                return
            if len(content) != _SIZE or len(set(content)) != 1:
                bad.append(f"a reader found {len(content)} of {_SIZE} bytes, or a mixture")
                return

    files.write(path, bytes([0]) * _SIZE)
    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    start = time.perf_counter()
    try:
        for n in range(1, _RENAMES + 1):
            files.write(path, bytes([n]) * _SIZE)
    finally:
        seconds = (time.perf_counter() - start) / _RENAMES
        stop.set()
        reader.join()
    if not bad and path.read_bytes() != bytes([_RENAMES]) * _SIZE:
        bad.append("it has an old content after the last rename")
    if not bad and (left := [name for name in os.listdir(folder) if name.endswith(".tmp")]):
        bad.append(f"{left[0]} is still listed after its rename")
    return judge(
        "files/rename",
        not bad,
        f"a rename replaces a file in one piece; one write took {1e3 * seconds:.1f} ms",
        f"{path} was replaced {_RENAMES} times, and {''.join(bad[:1])}: a run would lose files "
        "here; of buckets, use one with hierarchical namespace",
        {"seconds": seconds, "replaced": _RENAMES},
    )


def moving(folder: pathlib.Path) -> Result:
    """A folder with files is renamed in one piece, as checkpoints are when they are complete."""
    source, target = folder / "unfinished", folder / "finished"
    (source / "inner").mkdir(parents=True)
    names = [f"inner/{n}" for n in range(8)]
    for name in names:
        (source / name).write_bytes(name.encode())
    start = time.perf_counter()
    os.rename(source, target)
    seconds = time.perf_counter() - start
    missing = [
        name
        for name in names
        if not (target / name).exists() or (target / name).read_bytes() != name.encode()
    ]
    gone = not source.exists() and source.name not in os.listdir(folder)
    return judge(
        "files/folder",
        gone and not missing,
        f"a folder is renamed with its files, in {1e3 * seconds:.1f} ms",
        f"{source} was renamed to {target.name}, and "
        f"{f'{missing[0]} is missing there' if missing else 'the old name still exists'}: "
        "checkpoints would be incomplete; of buckets, use one with hierarchical namespace",
        {"seconds": seconds},
    )


def throughput(folder: pathlib.Path, size: int) -> Result:
    """How fast one large file is written, with fsync, and read again.

    The system may read it from memory. size: bytes.
    """
    path, block = folder / "large", os.urandom(min(size, 2**24))
    count = size // len(block)
    start = time.perf_counter()
    with open(path, "wb") as file:
        for _ in range(count):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    writing = time.perf_counter() - start
    start = time.perf_counter()
    with open(path, "rb") as file:
        whole = all(file.read(len(block)) == block for _ in range(count)) and not file.read(1)
    reading = time.perf_counter() - start
    speeds = {
        "written_gb_per_second": count * len(block) / writing / 1e9,
        "read_gb_per_second": count * len(block) / reading / 1e9,
    }
    if not whole:
        message = f"{path} did not read back as it was written: use another disk"
        return judge("files/speed", False, "", message, speeds)
    summary = (
        f"{speeds['written_gb_per_second']:.2f} GB/s written, "
        f"{speeds['read_gb_per_second']:.2f} read; plan assumes "
        f"--write_speed={budget.WRITE_SPEED:g}"
    )
    return Result("files/speed", OK, summary, speeds)
