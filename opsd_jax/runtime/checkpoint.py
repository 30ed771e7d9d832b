"""Checkpoints of a run that survive kill -9, a full disk and another mesh.

<workdir>/checkpoints/<step>/state    the training pytree {params, ema?, opt, step} to continue from
<workdir>/checkpoints/<step>/params   the weights to infer with (the EMA, if any), which eval loads;
                                      at the run's start these alone
+ JSON metadata                       format, stage, step, config, digests of data and tokenizer,
                                      versions

Only this module uses Orbax (its v1 interface is young: the version is pinned). A folder gets the
name `<step>` only when it is complete (see `checkpoint_folders`). `Checkpoints` is for the one
process group that trains (see `locks`): it deletes old and half-written folders. The functions
`restore`, `restore_params` and `metadata` only read and may be used during a run.
"""

from __future__ import annotations

import contextlib
import os
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from absl import logging
from etils import epath
from jax.experimental import multihost_utils

from opsd_jax.inputs import checks, json_files, paths
from opsd_jax.runtime import allocator, run_folder
from opsd_jax.runtime import checkpoint_folders as folders
from opsd_jax.runtime.checkpoint_folders import (
    CheckpointError,
    CheckpointGoneError,
    CheckpointNotFoundError,
    resolve,
)

FORMAT = 1  # raise it when the layout above changes
_PIECE_BYTES = 1 << 25  # of an array in a checkpoint that `save` writes
_ALONE = 1 << 30  # bytes of an array from which on it is read alone, see `_in_turn`
_DETAILS = {"format": int, "stage": str, "step": int, "config": dict, "versions": dict}


class CheckpointMismatchError(ValueError):
    """The checkpoint's arrays are not those that the program expects."""


# ---------------------------------------------------------------------------- writing


class Checkpoints:
    """The checkpoints of a run that trains; a context manager, closed (and waited for) at the end.

    Opening it removes half-written folders that a killed run left, and says so. In a multi-process
    run every process makes the same calls in the same order.

    Args:
      directory: the folder of the step folders, `<workdir>/checkpoints`; made if missing.
      keep_latest: how many of the newest stay; at least 1.
      keep_steps: steps that are never deleted, such as the last of each stage.
      timeout: seconds that a save may take to be written; after them it counts as failed.
    """

    def __init__(
        self,
        directory,
        *,
        keep_latest: int = 2,
        keep_steps: Iterable[int] = (),
        timeout: int = 1200,
    ):
        if keep_latest < 1:
            raise ValueError(
                f"keep_latest={keep_latest}: with none kept, a crash would lose the run"
            )
        self.directory = folders.absolute(directory)
        self._keep = keep_latest, tuple(int(step) for step in keep_steps)
        self._timeout = timeout
        with _explained(f"opening the checkpoints folder {self.directory}"):
            self._open()

    def _open(self) -> None:
        from orbax.checkpoint import v1 as ocp

        folders.remove_half_written(self.directory)
        # Orbax keeps all: it would delete older ones before the new one has been opened, see
        # `_settle`
        context = ocp.Context()
        context.async_options.timeout_secs = self._timeout
        self._checkpointer = ocp.training.Checkpointer(
            self.directory, cleanup_tmp_directories=True, context=context
        )
        # Orbax asks for preemption with its own numbers, from threads too. The processes would
        # agree on one of those instead of a number of `stopping.StopRequest`, which then never
        # comes: SIGTERM would be ignored.
        self._checkpointer._manager.reached_preemption = lambda step: False
        self._newest = self.latest()  # complete or being written
        # (step, outline of what was saved) of a save that nobody has waited for
        self._unverified: tuple[int, Any] | None = None
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
        wait: bool = False,
    ) -> bool:
        """Starts writing a checkpoint; returns once the arrays are copied to host memory.

        After it returns, `state` may be donated to the next update. An earlier save that is still
        being written is waited for first; when it can be opened, older ones are deleted.

        Args:
          step: position of the run: updates done so far, over all stages.
          state: the training pytree, any shardings; None for a checkpoint of weights alone, from
            which a stage can start and no stage can continue.
          params: the weights to infer with; the caller chooses (the EMA, if there is one).
          stage: the stage of the run, of `config.STAGES`.
          config: settings as plain JSON types, see `config.to_json`.
          digests: checksums of what the run reads, see `config_check.check_digests`.
          wait: returns only when the checkpoint is complete.

        Returns:
          False if this very step is already saved or being written (so a last save after a loop
          needs no special case), otherwise True.

        Raises:
          CheckpointError: this save, or the one before it, could not be written; names the folder.
          ValueError: there is a newer checkpoint already.
        """
        step = int(step)
        details = _details(step, stage, config, digests)
        if self._failed:  # Orbax no longer knows what is on disk
            self._open()
        if self._newest is not None and step < self._newest:
            raise ValueError(
                f"checkpoint {step} is older than checkpoint {self._newest} under "
                f"{self.directory}, which a resume would take: use another --workdir, or delete "
                "the newer folders"
            )
        self.wait()
        fresh, items = step != self._newest, _items(state, params)
        if fresh:
            with self._writing(step):
                self._checkpointer.save_checkpointables_async(
                    step, items, custom_metadata=details, force=True
                )
                self._newest = step
                self._unverified = step, jax.tree.map(_outline, items)
        if wait:
            self.wait()
        return fresh

    def wait(self) -> None:
        """Blocks until the save in flight is complete and was opened.

        Raises:
          CheckpointError: it failed; raised once.
        """
        if (
            not self._failed
        ):  # else it was raised already; Orbax would raise the same error at every call
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

    def discard(self, step: int) -> None:
        """Deletes the checkpoint of a step, which nothing else may use."""
        self.wait()
        several = jax.process_count() > 1
        if several:
            multihost_utils.sync_global_devices("all processes have read the checkpoint")
        if jax.process_index() == 0:
            folders.delete(self.directory / str(step))
        if several:
            multihost_utils.sync_global_devices("it is deleted")
        self._checkpointer.close()
        self._open()

    def _settle(self) -> None:
        """Opens the checkpoint that was just written, and only then deletes older ones."""
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
        for old in folders.complete(self.directory)[:-keep_latest]:
            if old not in keep_steps:
                folders.delete(self.directory / str(old))

    def _check_kept(self) -> None:
        """Raises CheckpointError, once, if the newest checkpoint is gone.

        Orbax would make its folder again and continue.
        """
        if self._newest is None or jax.process_index():
            return
        if not folders.is_complete(self.directory / str(self._newest)):
            self._failed = True
            raise CheckpointError(
                f"{self.directory}/{self._newest} was complete, or about to be, and is gone: the "
                "folder was deleted or replaced while the run was writing there. Still complete: "
                f"{folders.complete(self.directory) or 'none'}. Start the run again, and keep the "
                "folder until it ends"
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
                "The folder is gone: it was deleted or moved while the run was writing there. Put "
                "it back if it was moved, start the run again, and keep the folder until it ends"
            )
        return (
            f"Complete and usable: {folders.complete(self.directory) or 'none'}. Is the disk full, "
            "or the folder read-only? Fix that and start again"
        )

    def latest(self) -> int | None:
        """The newest complete step, or None; one that is still being written does not count."""
        return max(folders.complete(self.directory), default=None)

    def restore(self, step: int, abstract_state: Any) -> Any:
        """The training pytree of `step`; see the function `restore`."""
        self.wait()
        return restore(self.directory / str(step), abstract_state)

    def metadata(self, step: int) -> dict:
        """The JSON metadata of `step`; see the function `metadata`."""
        self.wait()
        return metadata(self.directory / str(step))


def save(
    directory,
    state: Any,
    params: Any,
    *,
    step: int = 0,
    stage: str = "",
    config: Mapping = types.MappingProxyType({}),
) -> None:
    """Writes one checkpoint into the folder `directory` itself and waits for it.

    Arrays are stored in pieces of at most 32 MiB, so that each of several processes that read the
    folder later reads the pieces that its devices hold. By default Orbax makes one piece of what a
    device holds, here the whole array, and each process would read and unpack all of it.

    Args:
      directory: the folder to make; it must not exist, or be empty.
      state: the training pytree, or None when there are weights only (an imported release).
      params, step, stage, config: as in `Checkpoints.save`.

    Raises:
      FileExistsError: the folder is not empty. CheckpointError: it could not be written.
    """
    from orbax.checkpoint import v1 as ocp

    directory = folders.absolute(directory)
    details = _details(step, stage, config)
    if directory.exists():
        if not directory.is_dir() or any(directory.iterdir()):
            raise FileExistsError(
                f"{directory} exists and is not empty: choose another folder, or delete it"
            )
        directory.rmdir()  # Orbax wants to be the one that makes it
    items = _items(state, params)
    context = ocp.Context()
    context.memory.write_concurrent_bytes = _in_flight(items)
    context.array.saving.storage_options.chunk_byte_size = _PIECE_BYTES
    with context, _explained(f"writing the checkpoint {directory}"):
        ocp.save_checkpointables(directory, items, custom_metadata=details)
    _verify(directory, jax.tree.map(_outline, items))


# ---------------------------------------------------------------------------- reading


def restore(directory, abstract_state: Any, *, partial: bool = False) -> Any:
    """The training pytree, each array laid out as `abstract_state` says, on any number of devices.

    Args:
      directory: a step folder; or a checkpoints folder or workdir, of which the newest is taken.
      abstract_state: pytree of jax.ShapeDtypeStruct with sharding. Without a sharding a leaf goes
        to the first device (single-process runs only).
      partial: arrays that `abstract_state` lacks are left on disk; otherwise they are an error.

    Raises:
      CheckpointNotFoundError: nothing complete there.
      CheckpointMismatchError: paths, shapes or dtypes differ; lists all of them.
      CheckpointError: the files cannot be read.
    """
    return of_newest(
        directory, lambda folder: _load(folder, "state", abstract_state, partial=partial)
    )


def restore_params(directory, abstract_params: Any, *, partial: bool = False) -> Any:
    """The weights to infer with, without touching the rest of the training state.

    Args:
      directory: as in `restore`.
      abstract_params: as in `restore`; arrays are converted to its floating dtypes.
      partial: weights of the checkpoint that `abstract_params` lacks are left on disk (an expert
        that is not used); otherwise they are an error.

    Raises: as `restore`.
    """
    return of_newest(
        directory,
        lambda folder: _load(folder, "params", abstract_params, convert=True, partial=partial),
    )


def metadata(directory) -> dict:
    """`{format, stage, step, config, digests, versions}` of a checkpoint.

    Args:
      directory: as in `restore`.
    """
    return of_newest(directory, _read_metadata)[1]


def contents(directory) -> dict[str, dict[str, jax.ShapeDtypeStruct]]:
    """{item: {path: shape and dtype}} of a checkpoint, whose items are "params" and maybe "state".

    Args:
      directory: as in `restore`.
    """
    return {
        item: {
            path: jax.ShapeDtypeStruct(tuple(leaf.shape), np.dtype(leaf.dtype))
            for path, leaf in _paths(tree).items()
        }
        for item, tree in of_newest(directory, _read_metadata)[0].items()
    }


def is_begun(workdir: str | os.PathLike) -> bool:
    """Whether a run has a complete checkpoint, from which it continues."""
    return bool(folders.complete(folders.absolute(run_folder.checkpoints(workdir))))


def is_of_run(checkpoint: str | os.PathLike, workdir: str | os.PathLike) -> bool:
    """Whether a checkpoint is a step folder of the run in a workdir."""
    steps = os.path.realpath(run_folder.checkpoints(workdir))
    return os.path.realpath(os.path.dirname(os.path.normpath(checkpoint))) == steps


def of_newest(directory, work: Callable[[epath.Path], Any]) -> Any:
    """Does `work` with the step folder that `directory` (as in `restore`) means; returns its
    result.

    A run that continues deletes its older checkpoints. If it deletes this one in between, the work
    is done again with the newest one.

    Raises:
      CheckpointGoneError: the step was deleted, and `directory` names this step.
    """
    while True:
        folder = resolve(directory)
        try:
            return work(folder)
        except (CheckpointError, CheckpointMismatchError, CheckpointNotFoundError) as error:
            if folders.is_complete(folder):
                raise
            if folder == folders.absolute(directory):
                raise CheckpointGoneError(
                    f"{folder} was deleted while it was being read, probably by the run that wrote "
                    "it, which keeps its newest ones (checkpoint.keep_latest): take a later step, "
                    "or leave the step out for the newest"
                ) from error
            if folder == resolve(directory):
                raise
            logging.warning(
                "%s was deleted while it was being read: going on with the newest checkpoint",
                folder,
            )


def step_folder(flag: str, given: str, workdir: str) -> str:
    """The step folder that a flag of a command on a run names.

    Args:
      flag: its name, for messages. given: a step folder, or the number of a step of the run; or a
        checkpoints folder or a workdir, of which the newest step is taken; "" for the run's own.
      workdir: of the run.
    Raises CheckpointNotFoundError, which lists the steps of the run where there is no such folder.
    """
    if not given:
        return newest(workdir)
    if given.isdigit() and not os.path.exists(given):
        own = run_folder.checkpoint(workdir, int(given))
        given = own if os.path.isdir(own) else given
    by_number = is_of_run(given, workdir) and os.path.basename(os.path.normpath(given)).isdigit()
    if not os.path.isdir(given) and not by_number:
        steps = folders.complete(folders.absolute(run_folder.checkpoints(workdir)))
        found = f"and {workdir} has no complete checkpoint: start its training again"
        if steps:
            found = (
                f"the run in {workdir} has the steps {', '.join(map(str, steps))}: give "
                f"{flag}={run_folder.checkpoint(workdir, steps[-1])}"
            )
        raise CheckpointNotFoundError(f"{flag}={given}: {paths.absent(given)}; {found}")
    if folders.is_complete(folders.absolute(given)):
        return given
    folder = os.path.normpath(given)
    if os.path.basename(folder) == os.path.basename(run_folder.checkpoints(folder)):
        folder = os.path.dirname(folder) or "."
    if os.path.isdir(run_folder.checkpoints(folder)):
        return newest(folder)
    return str(resolve(given))


def newest(workdir: str) -> str:
    """The step folder of a run's newest checkpoint.

    All processes get the one that the first process finds.
    """
    try:
        step, error = metadata(workdir)["step"], None
    except (CheckpointError, CheckpointMismatchError, CheckpointNotFoundError) as found:
        step, error = -1, found
    if jax.process_count() > 1:  # training may save another one before the next process looks
        step = int(multihost_utils.broadcast_one_to_all(np.int32(step)))
    if step < 0:
        raise error or CheckpointNotFoundError(
            f"{workdir}: the first process finds no checkpoint there; its message says more"
        )
    return run_folder.checkpoint(workdir, step)


def retry_if_gone(work: Callable[[], Any], *, given: str) -> Any:
    """Calls `work`, again if the run deletes the newest checkpoint before the work has read it.

    Several processes do not try again: some of them may have read it all, and would continue alone.

    Args:
      work: reads the newest checkpoint of a run if none is `given`.
      given: the checkpoint that the user named; "" for none.
    """
    while True:
        try:
            return work()
        except CheckpointGoneError as error:
            if given or jax.process_count() > 1:
                raise
            logging.warning("%s Going on with the newest checkpoint", error)


# ---------------------------------------------------------------------------- Orbax


def _details(step: int, stage: str, config: Mapping, digests: Mapping | None = None) -> dict:
    """The JSON metadata of a checkpoint."""
    import orbax.checkpoint

    return {
        "format": FORMAT,
        "stage": stage,
        "step": int(step),
        "config": dict(config),
        "digests": dict(digests or {}),
        "metrics": {},  # earlier versions of the package ask for it
        "versions": {"jax": jax.__version__, "orbax": orbax.checkpoint.__version__},
    }


def _items(state: Any, params: Any) -> dict[str, Any]:
    """What a checkpoint stores, by name."""
    return {"params": params} if state is None else {"state": state, "params": params}


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
            f"{directory}/_CHECKPOINT_METADATA: {', '.join(faulty)} of custom_metadata cannot be "
            f"read. {_if_damaged(directory)}"
        )
    # Orbax only logs an error about such items.
    if lost := [item for item, tree in found.metadata.items() if not _paths(tree)]:
        raise CheckpointError(
            f"{directory}: no array of {lost[0]!r} can be opened, its files are incomplete or "
            f"damaged. {_if_damaged(directory)}"
        )
    return found.metadata, details


def _load(
    directory: epath.Path, item: str, abstract: Any, *, convert: bool = False, partial: bool = False
) -> Any:
    """One item of a checkpoint; see `restore` and `restore_params`."""
    from orbax.checkpoint import v1 as ocp

    stored = _read_metadata(directory)[0]
    if item not in stored:
        raise CheckpointMismatchError(
            f"{directory} holds no {item!r}, only {sorted(stored)}: it has weights to "
            "start from or to evaluate, not a run to continue"
        )
    abstract = jax.tree.map(_placed, abstract)
    _check_structure(directory, item, stored[item], abstract, convert, partial)
    found = abstract
    for part in [abstract] if partial else _in_turn(abstract):  # Orbax takes one of both
        context = ocp.Context()
        context.pytree.loading.partial_load = partial
        context.memory.read_concurrent_bytes = _in_flight(part)
        with (
            context,
            allocator.returning_blocks(_PIECE_BYTES // 2),
            _explained(
                f"reading {item!r} of checkpoint {directory}", lambda: _if_damaged(directory)
            ),
        ):
            read = ocp.load_checkpointables(directory, {item: part})[item]
        found = jax.tree.map(lambda old, new: old if new is ... else new, found, read)
    return found


def _in_turn(tree: Any) -> list[Any]:
    """The tree with some of its arrays each time; `...`, which Orbax leaves out, for the others.

    Large arrays come alone, the largest first, then all others. Orbax holds an array a second time
    while it reads it: so the largest ones are read while there is room for that.
    """
    leaves, structure = jax.tree.flatten(tree)
    sizes = [leaf.size * leaf.dtype.itemsize for leaf in leaves]
    large = sorted((n for n, size in enumerate(sizes) if size >= _ALONE), key=lambda n: -sizes[n])
    others = [n for n in range(len(leaves)) if n not in large]
    return [
        structure.unflatten([leaf if n in read else ... for n, leaf in enumerate(leaves)])
        for read in [*([n] for n in large), others]
        if read
    ] or [tree]


def _verify(directory: epath.Path, given: Mapping[str, Any]) -> None:
    """Opens a checkpoint that Orbax has called complete, and compares its arrays with the given
    ones.

    Raises CheckpointError if they differ; the folder then has the name of a half-written one, which
    nothing loads.
    """
    try:
        stored = _read_metadata(directory)[0]
        for item, tree in given.items():
            _check_structure(
                directory, item, stored.get(item, {}), tree, convert=False, partial=False
            )
    except (CheckpointError, CheckpointMismatchError) as error:
        aside = folders.set_aside(directory)
        raise CheckpointError(
            f"checkpoint {directory} was written but cannot be opened: {error}\nIt was renamed to "
            f"{aside.name} and does not count. Complete and usable: "
            f"{folders.complete(directory.parent) or 'none'}. Does the disk, or the mount, keep "
            "what is written to it? Start again, with another folder if this comes back"
        ) from error


@contextlib.contextmanager
def _explained(doing: str, fix: Callable[[], str] = str) -> Iterator[None]:
    """Turns any error of Orbax into a CheckpointError that names the folder and keeps the cause."""
    try:
        yield
    except Exception as error:
        reason = error
        while reason.__cause__ is not None:  # Orbax wraps the system's own message several times
            reason = reason.__cause__
        raise CheckpointError(f"{doing} failed: {str(reason)[:500]}. {fix()}".strip()) from error


def _if_damaged(directory: epath.Path) -> str:
    """What to do about a step folder whose files may be damaged."""
    others = [step for step in folders.complete(directory.parent) if str(step) != directory.name]
    if not others:
        return (
            "If its files are damaged, copy them again, or delete that folder and start anew: no "
            "other checkpoint beside it is complete"
        )
    return (
        "If its files are damaged, commands that only read the run take another one, "
        f"--checkpoint={directory.parent}/{others[-1]}; or delete that folder: the newest of the "
        f"others is used then ({', '.join(map(str, others))})"
    )


def _in_flight(tree) -> int:
    """Bytes that Orbax may hold in addition to the arrays.

    By default it copies all arrays at once; with less than the largest array it fails.
    """
    return (1 << 28) + max(
        (leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree) if leaf is not ...),
        default=0,
    )


# ---------------------------------------------------------------------------- pytrees


def _check_structure(
    directory: epath.Path, item: str, stored: Any, abstract: Any, convert: bool, partial: bool
) -> None:
    """Raises CheckpointMismatchError with every path that differs; Orbax would stop at the first.

    Args:
      item: "state" or "params".
      stored, abstract: pytrees of what is on disk and of what is expected.
      convert: whether floating dtypes may differ.
      partial: whether `stored` may hold more.
    """
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
            "Use the model and optimizer settings that it was saved with (they are in its "
            "metadata, under config), or another checkpoint or --workdir"
        )


def _placed(leaf) -> jax.ShapeDtypeStruct:
    """The shape and dtype of a leaf with a sharding: its own, or the first device."""
    sharding = getattr(leaf, "sharding", None)
    if sharding is None:
        if jax.process_count() > 1:
            raise ValueError(
                "an abstract leaf without sharding in a multi-process run: where should it go? "
                "Give jax.ShapeDtypeStruct(shape, dtype, sharding=...)"
            )
        sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _outline(leaf) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)


def _paths(tree) -> dict[str, Any]:
    """{"opt/0/mu/kernel": leaf}; named tuples, lists and dicts have equal paths, as in Orbax."""
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: hasattr(x, "shape"))
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
