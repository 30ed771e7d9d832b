"""runtime.profile: which steps a trace holds, and what becomes of it when a run stops."""

import gzip
import json

import jax
import jax.numpy as jnp
import pytest

from opsd_jax.runtime.clock import Clock
from opsd_jax.runtime.profile import Profile


def events(path) -> list:
    """What the profiler recorded."""
    planes = jax.profiler.ProfileData.from_file(str(path)).planes
    return [event for plane in planes for line in plane.lines for event in line.events]


def traces(workdir) -> dict[str, list[int]]:
    """{name of a trace: the steps that are marked in it}; checks what else XProf reads."""
    found = {}
    for path in sorted((workdir / "profile" / "plugins" / "profile").glob("*/*.xplane.pb")):
        assert path.parent.name not in found, "one process writes one file"
        found[path.parent.name] = sorted(
            dict(event.stats)["step_num"] for event in events(path) if event.name == "train"
        )
        (other,) = path.parent.glob("*.trace.json.gz")
        assert other.name.partition(".trace")[0] == path.name.partition(".xplane")[0] != ""
        with gzip.open(other) as file:
            assert json.load(file)["traceEvents"]
    assert not list(workdir.glob("profile/*.tmp"))
    return found


def take(profile, begin, end, stop_after=None):
    """Steps of a stage; an exception after one of them."""
    with profile:
        for step in profile.steps(begin, end):
            jax.block_until_ready(jnp.ones(3) + step)
            if step + 1 == stop_after:
                raise SystemExit(42)


def test_the_steps_that_are_named_are_traced(tmp_path):
    taken = []
    with Profile(str(tmp_path / "profile"), (2, 3)) as profile:
        for step in profile.steps(0, 5):
            taken.append(step)
            if step >= 3:  # the trace is written when its last step ends, not at the end of the run
                assert traces(tmp_path) == {"000002-000003": [2, 3]}
    assert taken == [0, 1, 2, 3, 4] and traces(tmp_path) == {"000002-000003": [2, 3]}


def test_the_phases_of_a_step_are_in_the_trace(tmp_path):
    """Of Python only them: its calls would be nearly all that the trace holds."""
    clock = Clock()
    with Profile(str(tmp_path / "profile"), (1, 1)) as profile:
        for _ in profile.steps(0, 2):
            with clock("update"):
                jax.block_until_ready(jnp.ones(3) + 1)
    (path,) = (tmp_path / "profile").rglob("*.xplane.pb")
    found = events(path)
    (step,) = (event for event in found if event.name == "train")
    (update,) = (event for event in found if event.name == "update")
    assert step.start_ns <= update.start_ns < update.end_ns <= step.end_ns
    assert not [event.name for event in found if event.name.startswith("$")]


def test_the_last_step_of_a_run(tmp_path):
    take(Profile(str(tmp_path / "profile"), (5, 5)), 0, 5)
    assert traces(tmp_path) == {"000005-000005": [5]}


def test_nothing_is_traced_unless_it_is_asked_for(tmp_path):
    take(Profile(str(tmp_path / "profile"), ()), 0, 5)
    assert not (tmp_path / "profile").exists()


def test_steps_of_two_stages_are_two_traces(tmp_path):
    profile = Profile(str(tmp_path / "profile"), (2, 4))
    take(profile, 0, 2)
    assert traces(tmp_path) == {"000002-000002": [2]}
    take(profile, 2, 6)
    assert traces(tmp_path) == {"000002-000002": [2], "000003-000004": [3, 4]}


def test_a_stop_ends_the_trace_and_the_continuation_traces_the_rest(tmp_path, caplog):
    folder = tmp_path / "profile"
    with pytest.raises(SystemExit):
        take(Profile(str(folder), (2, 5)), 0, 6, stop_after=3)
    assert traces(tmp_path) == {"000002-000003": [2, 3]}
    with caplog.at_level("INFO"):
        take(Profile(str(folder), (2, 5), done=3), 3, 6)
    assert traces(tmp_path) == {"000002-000003": [2, 3], "000004-000005": [4, 5]}
    assert "steps up to 3 are done: the trace begins with the next" in caplog.text
    assert f"steps 4 to 5 are traced: xprof --logdir={folder}" in caplog.text


@pytest.mark.parametrize(
    "done, said", [(None, False), (0, False), (1, False), (5, True), (6, True)]
)
def test_steps_that_are_done_already_are_said_to_be(tmp_path, caplog, done, said):
    with caplog.at_level("INFO"):
        Profile(str(tmp_path / "profile"), (2, 5), done=done)
    text = f"config.log.profile_steps: step {done} is done: nothing is traced"
    assert (text in caplog.text) == said and (said or not caplog.records)


def test_what_a_killed_process_left_is_removed(tmp_path):
    left = tmp_path / "profile" / "process0.tmp" / "plugins" / "profile" / "x"
    left.mkdir(parents=True)
    (left / "old.xplane.pb").write_bytes(b"torn")
    take(Profile(str(tmp_path / "profile"), (1, 1)), 0, 1)
    assert traces(tmp_path) == {"000001-000001": [1]}


def test_a_trace_that_cannot_be_written_does_not_end_the_run(tmp_path, caplog, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("os.replace", full)
        take(Profile(str(tmp_path / "profile"), (1, 2)), 0, 5)
    assert "the trace of steps 1 to 2 is not written: [Errno 28] No space" in caplog.text
    assert traces(tmp_path) == {}


def test_after_a_trace_that_the_profiler_could_not_write_there_is_no_other(
    tmp_path, caplog, monkeypatch
):
    """JAX then takes its trace for one that still goes on, and refuses to start another."""
    stop = jax.profiler.stop_trace

    def fail():
        stop()
        raise jax.errors.JaxRuntimeError("FAILED_PRECONDITION: not a directory")

    monkeypatch.setattr(jax.profiler, "stop_trace", fail)
    profile = Profile(str(tmp_path / "profile"), (1, 3))
    take(profile, 0, 2)
    assert "steps 1 to 2 is not written: FAILED_PRECONDITION" in caplog.text
    monkeypatch.undo()
    take(profile, 2, 5)  # the next stage
    assert traces(tmp_path) == {}
