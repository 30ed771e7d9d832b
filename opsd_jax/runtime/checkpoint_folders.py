"""Folders of checkpoints: which are complete, which one a path means, and how one is removed.

A folder has the name `<step>` only when the checkpoint in it is complete. While it is written it is
`<step>.orbax-checkpoint-tmp`; before it is deleted it is renamed to `<step>.being-deleted`, so that
a reader finds a whole checkpoint or none.
"""

import contextlib
import os
import time

import jax
from absl import logging
from etils import epath

from opsd_jax.inputs import paths

_HALF_WRITTEN = ".orbax-checkpoint-tmp"
_HALF_DELETED = ".being-deleted"
_COMMITTED = "commit_success.txt"  # Orbax writes it last of all, on object stores too


class CheckpointError(OSError):
    """A checkpoint could not be written or read."""


class CheckpointNotFoundError(FileNotFoundError):
    """There is no complete checkpoint where one was asked for."""


class CheckpointGoneError(CheckpointNotFoundError):
    """A checkpoint was deleted by the run that wrote it, which keeps only its newest ones."""


def absolute(directory: str | os.PathLike) -> epath.Path:
    """The whole path of a folder, checked. Raises ValueError for paths that Orbax cannot use."""
    paths.check_given("checkpoint folder", directory, orbax=True)
    return epath.Path(directory).resolve()


def is_complete(directory: epath.Path) -> bool:
    """Whether a step folder holds a complete checkpoint."""
    return (directory / _COMMITTED).exists()


def complete(directory: epath.Path) -> list[int]:
    """The complete steps in a checkpoints folder, sorted; [] if it does not exist."""
    return _found(directory)[0]


def resolve(directory: str | os.PathLike) -> epath.Path:
    """The step folder that a path means.

    Args:
      directory: a step folder; or a checkpoints folder or a workdir, of which the newest complete
        step is taken.

    Raises:
      CheckpointNotFoundError: nothing complete there. CheckpointGoneError: the step is absent and
        older than those that exist.
    """
    directory = absolute(directory)
    if is_complete(directory):
        return directory
    if directory.name.isdigit() and not (directory / "checkpoints").is_dir():
        _check_beside(directory)  # a step by name: no other will do
    folder = directory / "checkpoints" if (directory / "checkpoints").is_dir() else directory
    steps, half = _found(folder)
    if steps:
        if half:
            logging.warning(
                "%s: the save %s was interrupted or is under way; using step %d, the newest "
                "complete one",
                folder,
                ", ".join(half),
                steps[-1],
            )
        return folder / str(steps[-1])
    if half:
        raise CheckpointNotFoundError(
            f"{folder}: the only save there was interrupted ({', '.join(half)}) and "
            "there is no complete checkpoint: start the run again"
        )
    if not folder.exists():
        raise CheckpointNotFoundError(
            f"{folder}: there is no such folder: give a workdir, its checkpoints or one step"
        )
    names = sorted(path.name for path in folder.iterdir())
    there = ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")
    raise CheckpointNotFoundError(
        f"{folder}: no checkpoint there (it holds: {there or 'nothing'}). Give a "
        "workdir, its checkpoints folder or one step"
    )


def set_aside(directory: epath.Path) -> epath.Path:
    """Renames a step folder that cannot be used to the name of a half-written one; returns that."""
    aside = directory.parent / f"{directory.name}{_HALF_WRITTEN}"
    if jax.process_index() == 0 and directory.exists():
        directory.rename(aside)
    return aside


def delete(directory: epath.Path) -> None:
    """Deletes a checkpoint.

    What cannot be deleted stays under a name that nothing loads, and the next run tries again.
    """
    old = directory.parent / f"{directory.name}{_HALF_DELETED}"
    try:
        directory.rename(old)
        old.rmtree()
    except OSError as error:
        logging.warning("%s: an old checkpoint cannot be deleted (%s)", directory, error)


def remove_half_written(directory: epath.Path) -> None:
    """Removes what interrupted saves and deletions left, until it stays away.

    When a save fails in a process that continues (a notebook on a full disk), the writers of its
    other arrays run on for a moment and make their folders again. Orbax's own removal gives up at
    the first of them, and the next save fails with it.

    Raises:
      CheckpointError: it comes back for 10 seconds.
    """

    def half():
        names = [path.name for path in directory.iterdir()] if directory.is_dir() else []
        return sorted(n for n in names if _HALF_WRITTEN in n or _HALF_DELETED in n)

    if not half():
        return
    logging.warning(
        "removing half-written checkpoints of an interrupted run, or half-deleted ones, under %s: "
        "%s",
        directory,
        ", ".join(half()),
    )
    if jax.process_index():
        return
    for _ in range(100):
        for name in half():
            with contextlib.suppress(OSError):  # something was written into it in between
                (directory / name).rmtree(missing_ok=True)
        time.sleep(0.1)
        if not half():
            return
    raise CheckpointError(
        f"{directory}: {', '.join(half())} cannot be removed, or comes back: does another run "
        "write there? Stop it, or delete the folder"
    )


def _found(directory: epath.Path) -> tuple[list[int], list[str]]:
    """(complete steps, names of half-written folders), both sorted."""
    names = [path.name for path in directory.iterdir()] if directory.is_dir() else []
    half = [
        name
        for name in names
        if _HALF_WRITTEN in name or (name.isdigit() and not is_complete(directory / name))
    ]
    return sorted(int(name) for name in names if name.isdigit() and name not in half), sorted(half)


def _check_beside(directory: epath.Path) -> None:
    """CheckpointNotFoundError that lists the other steps, where a step was asked for by its
    name."""
    steps, half = _found(directory.parent)
    if any(name.split(".")[0] == directory.name for name in half):
        raise CheckpointNotFoundError(
            f"{directory}: this save was interrupted and cannot be used. Complete "
            f"steps beside it: {steps or 'none'}"
        )
    if steps:
        error = CheckpointGoneError if steps[-1] > int(directory.name) else CheckpointNotFoundError
        raise error(f"{directory}: no such checkpoint. Complete steps beside it: {steps}")
