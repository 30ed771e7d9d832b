"""Where a run is kept: checkpoints that survive kill -9, a full disk and another mesh.

    <workdir>/checkpoints/<step>/state    the training pytree {params, ema?, opt, step}: what continues a run
    <workdir>/checkpoints/<step>/params   the weights to infer with (the EMA, if any): what eval loads
    + JSON metadata                       format, stage, step, config, digests of data and tokenizer, metrics, versions

Orbax is known to this file alone (its v1 interface is young: the version is pinned). A folder
becomes visible under the name `<step>` only when complete; before, it is `<step>.orbax-checkpoint-tmp`.
`Checkpoints` is for the one process group that trains (see `locks`): it deletes old and half-written folders. The
functions `restore`, `restore_params` and `metadata` only read and are safe beside a run.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from absl import logging
from etils import epath
from jax.experimental import multihost_utils

from opsd_jax.inputs import checks, json_files, paths

FORMAT = 1  # raise it when the layout above changes
_DETAILS = {
    "format": int,
    "stage": str,
    "step": int,
    "config": dict,
    "metrics": dict,
    "versions": dict,
}
_TMP = ".orbax-checkpoint-tmp"
_OLD = ".being-deleted"  # renamed before it is deleted: a reader finds a checkpoint whole or not at all
_COMMITTED = "commit_success.txt"  # Orbax writes it last of all, on object stores too


class CheckpointNotFoundError(FileNotFoundError):
    """There is no complete checkpoint where one was asked for."""


class CheckpointMismatchError(ValueError):
    """The checkpoint's arrays are not those that the program expects."""


class CheckpointError(OSError):
    """A checkpoint could not be written or read."""


class CheckpointGoneError(CheckpointNotFoundError):
    """A checkpoint was deleted by the run that wrote it, which keeps only its newest ones."""


class Checkpoints:
    """The checkpoints of a run that trains; a context manager, closed (and waited for) at the end.

    Opening it removes half-written folders that a killed run left, and says so. In a multi-process
    run every process makes the same calls in the same order.

    Args:
      directory: the folder of the step folders, `<workdir>/checkpoints`; made if missing.
      keep_latest: how many of the newest stay; at least 1.
      keep_steps: steps that are never deleted, such as the last of each stage.
    """

    def __init__(self, directory, *, keep_latest: int = 2, keep_steps: Iterable[int] = ()):
        if keep_latest < 1:
            raise ValueError(
                f"keep_latest={keep_latest}: with none kept, a crash would lose the run"
            )
        self.directory = _absolute(directory)
        self._keep = keep_latest, tuple(int(step) for step in keep_steps)
        with _explained(f"opening the checkpoints folder {self.directory}"):
            self._open()

    def _open(self) -> None:
        from orbax.checkpoint import v1 as ocp

        _remove_half_written(self.directory)
        # Orbax keeps all: it would delete older ones before anybody has opened the new one, see `_settle`
        self._checkpointer = ocp.training.Checkpointer(self.directory, cleanup_tmp_directories=True)
        # Orbax asks for preemption with its own numbers, from threads too. The processes would agree on one of those
        # instead of a number of `Flag`, which then never comes: SIGTERM would be swallowed.
        self._checkpointer._manager.reached_preemption = lambda step: False
        self._newest = self.latest()  # complete or being written
        self._unverified = (
            None  # (step, what was given to be saved) of a save that nobody has waited for
        )
        self._failed = False

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind, error, trace) -> None:
        try:
            self.close()
        except CheckpointError:
            if kind is None:
                raise
            logging.exception(
                "while the run stopped with %s, its last checkpoint failed too", kind.__name__
            )

    def save(
        self,
        step: int,
        state: Any,
        params: Any,
        *,
        stage: str,
        config: Mapping,
        digests: Mapping | None = None,
        metrics: Mapping[str, float] | None = None,
        wait: bool = False,
    ) -> bool:
        """Starts writing a checkpoint; returns once the arrays are copied to host memory.

        After it returns, `state` may be donated to the next update. An earlier save that is still
        being written is waited for first; when it can be opened, those that are not to be kept are deleted.

        Args:
          step: position of the run: updates done so far, over all stages.
          state: the training pytree, any shardings.
          params: the weights to infer with; the caller chooses (the EMA, if there is one).
          stage: `warmup`, `opsd` or `sft`.
          config: settings as plain JSON types, see `config.to_json`.
          digests: checksums of what the run reads, see `config_check.check_digests`.
          metrics: numbers to keep beside the weights.
          wait: returns only when the checkpoint is complete.

        Returns:
          False when this very step is already saved or being written (so a last save at the end of
          a loop needs no case of its own), otherwise True.

        Raises:
          CheckpointError: this save, or the one before it, could not be written; names the folder.
          ValueError: a newer checkpoint is there already.
        """
        step = int(step)
        details = _details(step, stage, config, metrics, digests)
        if self._failed:  # Orbax no longer knows what is on disk
            self._open()
        if self._newest is not None and step < self._newest:
            raise ValueError(
                f"checkpoint {step} is older than checkpoint {self._newest} under "
                f"{self.directory}, which a resume would take: use another --workdir, or delete "
                "the newer folders"
            )
        self.wait()
        fresh = step != self._newest
        if fresh:
            with self._writing(step):
                self._checkpointer.save_checkpointables_async(
                    step, {"state": state, "params": params}, custom_metadata=details, force=True
                )
                self._newest = step
                self._unverified = step, jax.tree.map(_outline, {"state": state, "params": params})
        if wait:
            self.wait()
        return fresh

    def wait(self) -> None:
        """Blocks until the save in flight is complete and was opened. Raises CheckpointError, once, when it failed."""
        if not self._failed:  # else it was told already; Orbax would raise the same error for ever
            with self._writing(self._newest):
                self._checkpointer.wait()
            self._check_kept()
            self._settle()

    def close(self) -> None:
        """Waits, then frees Orbax's threads. Raises CheckpointError as `wait` does."""
        self.wait()
        if not self._failed:
            with self._writing(self._newest):
                self._checkpointer.close()

    def _settle(self) -> None:
        """Opens the checkpoint that was just written, and only then deletes the older ones that are not to be kept."""
        if self._unverified is None:
            return
        (step, given), self._unverified = self._unverified, None
        try:
            _verify(self.directory / str(step), given)
        except CheckpointError:
            self._failed = True
            raise
        if jax.process_index():
            return
        keep_latest, keep_steps = self._keep
        for old in _list(self.directory)[0][:-keep_latest]:
            if old not in keep_steps:
                _delete(self.directory / str(old))

    def _check_kept(self) -> None:
        """Raises CheckpointError, once, where the newest checkpoint is gone: Orbax would make its folder again and go on."""
        if self._newest is None or jax.process_index():
            return
        if not _is_committed(self.directory / str(self._newest)):
            self._failed = True
            raise CheckpointError(
                f"{self.directory}/{self._newest} was complete, or about to be, and is gone: the folder was deleted or "
                f"replaced while the run was writing there. Still complete: {_list(self.directory)[0] or 'none'}. Start the "
                "run again, and keep the folder until it ends"
            )

    @contextlib.contextmanager
    def _writing(self, step) -> Iterator[None]:
        try:
            with _explained(
                f"writing checkpoint {step} (or the one before it) under {self.directory}",
                self._why_not_written,
            ):
                yield
        except CheckpointError:
            self._failed = True
            raise

    def _why_not_written(self) -> str:
        if not self.directory.is_dir():
            return (
                "The folder is gone: it was deleted or moved while the run was writing there. Put it back if it was moved, "
                "start the run again, and keep the folder until it ends"
            )
        return (
            f"Complete and usable: {_list(self.directory)[0] or 'none'}. Is the disk full, or the folder read-only? Fix that "
            "and start again"
        )

    def latest(self) -> int | None:
        """The newest complete step; one that is still being written does not count. None if there is none."""
        return max(_list(self.directory)[0], default=None)

    def restore(self, step: int, abstract_state: Any) -> Any:
        """The training pytree of `step`; see the function `restore`."""
        self.wait()
        return restore(self.directory / str(step), abstract_state)

    def metadata(self, step: int) -> dict:
        """What was noted beside the weights of `step`; see the function `metadata`."""
        self.wait()
        return metadata(self.directory / str(step))


def save(
    directory,
    state: Any,
    params: Any,
    *,
    step: int = 0,
    stage: str = "",
    config: Mapping = {},
    metrics: Mapping[str, float] | None = None,
) -> None:
    """Writes one checkpoint into the folder `directory` itself and waits for it.

    Args:
      directory: the folder to make; it must not exist, or be empty.
      state: the training pytree, or None when there are weights only (an imported release).
      params, step, stage, config, metrics: as in `Checkpoints.save`.

    Raises:
      FileExistsError: the folder is not empty. CheckpointError: it could not be written.
    """
    from orbax.checkpoint import v1 as ocp

    directory = _absolute(directory)
    details = _details(step, stage, config, metrics)
    if directory.exists():
        if not directory.is_dir() or any(directory.iterdir()):
            raise FileExistsError(
                f"{directory} exists and is not empty: choose another folder, or delete it"
            )
        directory.rmdir()  # Orbax wants to be the one that makes it
    items = {"params": params} if state is None else {"state": state, "params": params}
    context = ocp.Context()
    context.memory.write_concurrent_bytes = _in_flight(items)
    with context, _explained(f"writing the checkpoint {directory}"):
        ocp.save_checkpointables(directory, items, custom_metadata=details)
    _verify(directory, jax.tree.map(_outline, items))


def _outline(leaf) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)


def _verify(directory: epath.Path, given: Mapping[str, Any]) -> None:
    """Opens a checkpoint that Orbax has called complete, and compares its arrays with those that were given to it.

    Raises CheckpointError where they differ; the folder then has the name of a half-written one, which nothing loads.
    """
    try:
        stored = _read_metadata(directory)[0]
        for item, tree in given.items():
            _check_structure(
                directory, item, stored.get(item, {}), tree, convert=False, partial=False
            )
    except (CheckpointError, CheckpointMismatchError) as error:
        aside = directory.parent / f"{directory.name}{_TMP}"
        if jax.process_index() == 0 and directory.exists():
            directory.rename(aside)
        raise CheckpointError(
            f"checkpoint {directory} was written but cannot be opened: {error}\nIt was renamed to {aside.name} and does not "
            f"count. Complete and usable: {_list(directory.parent)[0] or 'none'}. Does the disk, or the mount, keep what is "
            "written to it? Start again, with another folder if this comes back"
        ) from error


def _delete(directory: epath.Path) -> None:
    """Deletes a checkpoint. What cannot be deleted stays under a name that nothing loads, and the next run tries again."""
    old = directory.parent / f"{directory.name}{_OLD}"
    try:
        directory.rename(old)
        old.rmtree()
    except OSError as error:
        logging.warning("%s: an old checkpoint cannot be deleted (%s)", directory, error)


def restore(directory, abstract_state: Any, *, partial: bool = False) -> Any:
    """The training pytree, each array laid out as `abstract_state` says, on any number of devices.

    Args:
      directory: a step folder; or a checkpoints folder or workdir, of which the newest is taken.
      abstract_state: pytree of jax.ShapeDtypeStruct with sharding. Without a sharding a leaf goes
        to the first device (single-process runs only).
      partial: arrays that `abstract_state` lacks are left on disk; otherwise they are an error.

    Raises:
      CheckpointNotFoundError: nothing complete there. CheckpointMismatchError: paths, shapes or dtypes
      differ; lists all of them. CheckpointError: the files cannot be read.
    """
    return of_newest(
        directory, lambda folder: _load(folder, "state", abstract_state, partial=partial)
    )


def restore_params(directory, abstract_params: Any, *, partial: bool = False) -> Any:
    """The weights to infer with, without touching the rest of the training state.

    Args:
      directory: as in `restore`.
      abstract_params: as in `restore`; another floating dtype than the saved one is converted to.
      partial: weights of the checkpoint that `abstract_params` lacks are left on disk (an expert
        that is not used); otherwise they are an error.

    Raises: as `restore`.
    """
    return of_newest(
        directory,
        lambda folder: _load(folder, "params", abstract_params, convert=True, partial=partial),
    )


def metadata(directory) -> dict:
    """`{format, stage, step, config, digests, metrics, versions}` of a checkpoint; `directory` as in `restore`."""
    return of_newest(directory, _read_metadata)[1]


def contents(directory) -> dict[str, dict[str, jax.ShapeDtypeStruct]]:
    """{item: {path: shape and dtype}} of a checkpoint; `directory` as in `restore`."""
    return {
        item: {
            path: jax.ShapeDtypeStruct(tuple(leaf.shape), np.dtype(leaf.dtype))
            for path, leaf in _paths(tree).items()
        }
        for item, tree in of_newest(directory, _read_metadata)[0].items()
    }


def of_newest(directory, work: Callable[[epath.Path], Any]) -> Any:
    """`work` done with the step folder that `directory` (as in `restore`) stands for.

    A run that goes on deletes its older checkpoints. Where it deletes this one meanwhile, the work is done again with the
    newest one; CheckpointGoneError if `directory` is that very step.
    """
    while True:
        folder = resolve(directory)
        try:
            return work(folder)
        except (CheckpointError, CheckpointMismatchError, CheckpointNotFoundError) as error:
            if _is_committed(folder):
                raise
            if folder == _absolute(directory):
                raise CheckpointGoneError(
                    f"{folder} was deleted while it was being read, probably by the run that wrote it, which keeps its newest "
                    "ones (checkpoint.keep_latest): take a later step, or leave the step out for the newest"
                ) from error
            if folder == resolve(directory):
                raise
            logging.warning(
                "%s was deleted while it was being read: going on with the newest checkpoint",
                folder,
            )


def newest(workdir: str) -> str:
    """The step folder of a run's newest checkpoint; in a run of several processes the one that the first process finds."""
    try:
        step, error = metadata(workdir)["step"], None
    except (CheckpointError, CheckpointMismatchError, CheckpointNotFoundError) as found:
        step, error = -1, found
    if jax.process_count() > 1:  # a run beside may save another one before the next process looks
        step = int(multihost_utils.broadcast_one_to_all(np.int32(step)))
    if step < 0:
        raise error or CheckpointNotFoundError(
            f"{workdir}: the first process finds no checkpoint there; its message says more"
        )
    return os.path.join(workdir, "checkpoints", str(step))


def retry_if_gone(work: Callable[[], Any], *, given: str) -> Any:
    """`work()`, which takes the newest checkpoint of a run where none is `given`: again with the then newest one, where the
    run deletes that one before the work has read it.

    Several processes do not begin again: some of them may have read it all, and would go on alone.
    """
    while True:
        try:
            return work()
        except CheckpointGoneError as error:
            if given or jax.process_count() > 1:
                raise
            logging.warning("%s Going on with the newest checkpoint", error)


def _details(step: int, stage: str, config: Mapping, metrics, digests=None) -> dict:
    import orbax.checkpoint

    return {
        "format": FORMAT,
        "stage": stage,
        "step": int(step),
        "config": dict(config),
        "digests": dict(digests or {}),
        "metrics": {key: float(value) for key, value in (metrics or {}).items()},
        "versions": {"jax": jax.__version__, "orbax": orbax.checkpoint.__version__},
    }


def _read_metadata(directory: epath.Path) -> tuple[dict, dict]:
    """(item -> pytree of array metadata, our own JSON)."""
    from orbax.checkpoint import v1 as ocp

    try:  # Orbax would take a damaged file for an empty one
        json_files.read(os.path.join(directory, "_CHECKPOINT_METADATA"), fix="it is damaged")
    except (FileNotFoundError, ValueError) as error:
        raise CheckpointError(f"{error}. {_if_damaged(directory)}") from error
    with _explained(f"reading the metadata of {directory}", lambda: _if_damaged(directory)):
        found = ocp.checkpointables_metadata(directory)
    details = found.custom_metadata or {}
    if "format" not in details:
        raise CheckpointMismatchError(
            f"{directory} is an Orbax checkpoint, but not one of opsd_jax (its "
            "metadata has no format): use `python -m opsd_jax.convert import`"
        )
    if isinstance(details["format"], int) and details["format"] > FORMAT:
        raise CheckpointMismatchError(
            f"{directory} has format {details['format']}; this version of opsd_jax "
            f"reads up to {FORMAT}: update opsd_jax"
        )
    if faulty := [key for key, kind in _DETAILS.items() if not isinstance(details.get(key), kind)]:
        raise CheckpointError(
            f"{directory}/_CHECKPOINT_METADATA: {', '.join(faulty)} of custom_metadata cannot be read. "
            f"{_if_damaged(directory)}"
        )
    if lost := [
        item for item, tree in found.metadata.items() if not _paths(tree)
    ]:  # about which Orbax only logs an error
        raise CheckpointError(
            f"{directory}: no array of {lost[0]!r} can be opened, its files are incomplete or damaged. "
            f"{_if_damaged(directory)}"
        )
    return found.metadata, details


def _load(directory: epath.Path, item: str, abstract: Any, *, convert=False, partial=False) -> Any:
    from orbax.checkpoint import v1 as ocp

    stored = _read_metadata(directory)[0]
    if item not in stored:
        raise CheckpointMismatchError(
            f"{directory} holds no {item!r}, only {sorted(stored)}: it has weights to "
            "start from or to evaluate, not a run to continue"
        )
    abstract = jax.tree.map(_placed, abstract)
    _check_structure(directory, item, stored[item], abstract, convert, partial)
    context = ocp.Context()
    context.pytree.loading.partial_load = partial
    context.memory.read_concurrent_bytes = _in_flight(abstract)
    with (
        context,
        _explained(f"reading {item!r} of checkpoint {directory}", lambda: _if_damaged(directory)),
    ):
        return ocp.load_checkpointables(directory, {item: abstract})[item]


def _if_damaged(directory: epath.Path) -> str:
    return f"If its files are damaged, delete that folder: the newest of the others is used then ({_list(directory.parent)[0]})"


def _in_flight(tree) -> int:
    """Bytes that Orbax may hold beside the arrays: left to itself it copies all of them at once, and with less than
    the largest array it fails."""
    return (1 << 28) + max(
        (leaf.size * leaf.dtype.itemsize for leaf in _paths(tree).values()), default=0
    )


def _placed(leaf) -> jax.ShapeDtypeStruct:
    sharding = getattr(leaf, "sharding", None)
    if sharding is None:
        if jax.process_count() > 1:
            raise ValueError(
                "an abstract leaf without sharding in a multi-process run: where should it go? "
                "Give jax.ShapeDtypeStruct(shape, dtype, sharding=...)"
            )
        sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _check_structure(directory, item, stored, abstract, convert, partial) -> None:
    """Raises CheckpointMismatchError with every path that differs; Orbax would stop at the first."""
    stored = {
        path: (tuple(leaf.shape), np.dtype(leaf.dtype)) for path, leaf in _paths(stored).items()
    }
    wanted = {}
    for path, leaf in _paths(abstract).items():
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):  # stored as its uint32 words
            leaf = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))
        wanted[path] = tuple(leaf.shape), np.dtype(leaf.dtype)

    def agree(path):
        if path not in wanted:
            return partial
        if path not in stored or stored[path][0] != wanted[path][0]:
            return False
        saved, now = stored[path][1], wanted[path][1]
        floats = all(jax.dtypes.issubdtype(dtype, np.floating) for dtype in (saved, now))
        return saved == now or (convert and floats)

    def show(array):
        return f"{array[1].name}{list(array[0])}" if array else "absent"

    if bad := [path for path in sorted(stored.keys() | wanted.keys()) if not agree(path)]:
        rows = [("array", "in the checkpoint", "expected now")]
        rows += [(path, show(stored.get(path)), show(wanted.get(path))) for path in bad]
        raise CheckpointMismatchError(
            f"{directory}, item {item!r}: {len(bad)} of {len(stored | wanted)} arrays do not fit:\n"
            f"{checks.table(rows)}\n"
            "Use the model and optimizer settings that it was saved with (they are in its metadata, under "
            "config), or another checkpoint or --workdir"
        )


def _paths(tree) -> dict[str, Any]:
    """{"opt/0/mu/kernel": leaf}; named tuples, lists and dicts spell alike, as Orbax stores them."""
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: hasattr(x, "shape"))
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def _absolute(directory) -> epath.Path:
    paths.check_given("checkpoint folder", directory, orbax=True)
    return epath.Path(directory).resolve()


def _is_committed(directory: epath.Path) -> bool:
    return (directory / _COMMITTED).exists()


def _list(directory: epath.Path) -> tuple[list[int], list[str]]:
    """(complete steps, names of half-written folders), both sorted."""
    names = [path.name for path in directory.iterdir()] if directory.is_dir() else []
    half = [
        name
        for name in names
        if _TMP in name or (name.isdigit() and not _is_committed(directory / name))
    ]
    return sorted(int(name) for name in names if name.isdigit() and name not in half), sorted(half)


def _remove_half_written(directory: epath.Path) -> None:
    """Takes away what interrupted saves and deletions left, until it stays away.

    When a save fails in a process that goes on (a notebook on a full disk), the writers of its other arrays run on
    for a moment and make their folders again. Orbax's own removal gives up at the first of them, and the next save
    fails with it.
    """

    def half():
        names = [path.name for path in directory.iterdir()] if directory.is_dir() else []
        return sorted(name for name in names if _TMP in name or _OLD in name)

    if not half():
        return
    logging.warning(
        "removing half-written checkpoints of an interrupted run, or half-deleted ones, under %s: %s",
        directory,
        ", ".join(half()),
    )
    if jax.process_index():
        return
    for _ in range(100):
        for name in half():
            with contextlib.suppress(OSError):  # something was written into it meanwhile
                (directory / name).rmtree(missing_ok=True)
        time.sleep(0.1)
        if not half():
            return
    raise CheckpointError(
        f"{directory}: {', '.join(half())} cannot be removed, or comes back: does another run "
        "write there? Stop it, or delete the folder"
    )


def is_begun(workdir) -> bool:
    """Whether a run has a complete checkpoint, from which it goes on."""
    return bool(_list(_absolute(workdir) / "checkpoints")[0])


def resolve(directory) -> epath.Path:
    """The step folder that `directory` (step folder, checkpoints folder or workdir) stands for."""
    directory = _absolute(directory)
    if _is_committed(directory):
        return directory
    if (
        directory.name.isdigit() and not (directory / "checkpoints").is_dir()
    ):  # a step by name: no other will do
        steps, half = _list(directory.parent)
        if any(name.split(".")[0] == directory.name for name in half):
            raise CheckpointNotFoundError(
                f"{directory}: this save was interrupted and cannot be used. Complete "
                f"steps beside it: {steps or 'none'}"
            )
        if steps:
            error = (
                CheckpointGoneError if steps[-1] > int(directory.name) else CheckpointNotFoundError
            )
            raise error(f"{directory}: no such checkpoint. Complete steps beside it: {steps}")
    folder = directory / "checkpoints" if (directory / "checkpoints").is_dir() else directory
    steps, half = _list(folder)
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
            f"{folder}: no such folder. Give a workdir, its checkpoints or one step"
        )
    names = sorted(path.name for path in folder.iterdir())
    there = ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")
    raise CheckpointNotFoundError(
        f"{folder}: no checkpoint there (it holds: {there or 'nothing'}). Give a "
        "workdir, its checkpoints folder or one step"
    )


@contextlib.contextmanager
def _explained(doing: str, fix=lambda: "") -> Iterator[None]:
    """Turns whatever Orbax raises into one CheckpointError that names the folder and keeps the cause."""
    try:
        yield
    except Exception as error:
        reason = error
        while reason.__cause__ is not None:  # Orbax wraps the disk's own words several times
            reason = reason.__cause__
        raise CheckpointError(f"{doing} failed: {str(reason)[:500]}. {fix()}".strip()) from error
