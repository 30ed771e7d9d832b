"""launch/tpu_vm.sh with a stand-in for gcloud: what it asks for, refuses and starts again."""

import contextlib
import importlib.util
import io
import itertools
import os
import re
import shlex
import subprocess
import sys
import tarfile
import time
import types
from unittest import mock

import pytest

from opsd_jax.plan import topology
from opsd_jax.runtime import distributed
from stand_ins import COMMAND, LAUNCH, bash, calls, environment, stand_in

sys.path.insert(0, str(LAUNCH))  # as it is for a script of this folder
spec = importlib.util.spec_from_file_location("tpu_vm_script", LAUNCH / "tpu_vm.py")
script = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = script  # dataclasses look their module up
spec.loader.exec_module(script)

PLACE = ["--zone=us-west4-a", "--project=p"]
DESCRIBE = ["queued-resources", "describe", "opsd", *PLACE, "--format=value(state.state)"]
DELETE = ["queued-resources", "delete", "opsd", *PLACE, "--force", "--quiet"]
GIVEN_BACK = [DELETE, DESCRIBE]
VERBS = [
    ["create"],
    ["setup"],
    ["run", "--", *COMMAND],
    ["status"],
    ["logs"],
    ["ssh"],
    ["ssh", "--", "df", "-h"],
    ["wait"],
    ["wait", "--delete"],
    ["stop"],
    ["delete"],
    ["job", "--", *COMMAND],
]


def tpu_vm(
    tmp_path, *arguments, states=("ACTIVE",), reports=(), fails="", times=99, limits=(), **variables
):
    """tpu_vm.sh with a stand-in for gcloud.

    states: that it tells one after another; the last one stays. "" is "no such resource", until
    one is created; deleting goes on with the next "". "auth": it cannot say.
    reports: states of the run on the workers, in the same way. "silent": ssh fails. "hangs": ssh
    does not end, nor does what it has started.
    fails: commands that fail, so many `times`; after "hangs " those that do not end.
    limits: (name, value) of constants of the script.
    """
    for name, lines in (("states", states), ("reports", reports)):
        (tmp_path / name).write_text("".join(line + "\n" for line in lines))
    path = stand_in(
        tmp_path / "bin",
        "gcloud",
        f"""
        hang() {{
          sleep 60 &
          echo $! >> {tmp_path}/hanging
          wait
        }}
        if [[ -n "{fails}" && "$*" == *"{fails.removeprefix("hangs ")}"* ]]; then
          echo >> {tmp_path}/failed
          if [[ $(wc -l < {tmp_path}/failed) -le {times} ]]; then
            [[ "{fails}" != hangs* ]] || hang
            exit 1
          fi
        fi
        next() {{
          read -r line < $1
          [[ $(wc -l < $1) == 1 || $1 == */states && -z $line ]] || sed -i 1d $1
        }}
        case "$*" in
          *describe*)
            next {tmp_path}/states
            [[ $line != auth ]] || {{ echo "ERROR: cannot refresh your auth tokens" >&2; exit 1; }}
            [[ -n $line ]] || {{ echo "ERROR: NOT_FOUND: no opsd" >&2; exit 1; }}
            echo "$line" ;;
          *"queued-resources create"*) sed -i '/./,$!d' {tmp_path}/states ;;
          *"queued-resources delete"*)
            sed -n '/^$/,$p' {tmp_path}/states > {tmp_path}/left
            [[ -s {tmp_path}/left ]] || echo > {tmp_path}/left
            mv {tmp_path}/left {tmp_path}/states ;;
          *"tpu_worker.sh status"*)
            next {tmp_path}/reports
            [[ $line != silent ]] || exit 255
            [[ $line != hangs ]] || hang
            tr , '\\n' <<< "$line" | sed 's/^/worker t1v-n-1-w-0 /' ;;
          *alpha*) ;;
          *scp*) cp "$5" {tmp_path}/pack.tar.gz ;;
        esac""",
    )
    variables = {"PROJECT": "p", "BUCKET": "b", "POLL_S": 0} | variables
    found = environment(PATH=path, **variables)
    said = {"stdout": io.StringIO(), "stderr": io.StringIO()}
    with (
        mock.patch.dict(os.environ, found, clear=True),
        mock.patch.dict(vars(script), limits),
        contextlib.redirect_stdout(said["stdout"]),
        contextlib.redirect_stderr(said["stderr"]),
    ):
        code = script.main(list(arguments))
    result = types.SimpleNamespace(
        returncode=code, **{name: text.getvalue() for name, text in said.items()}
    )
    return result, [call[3:] for call in calls(tmp_path / "bin")]  # without gcloud compute tpus


def kinds(made) -> list[str]:
    """What the calls are for: describe, create, scp, delete, or what a worker is told to do."""
    found = []
    for call in made:
        worker = re.search(r"tpu_worker\.sh (\w+)", call[-1])
        found.append(worker[1] if worker else call[1])
    return found


# --- what it refuses ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "variables, message",
    [
        ({"PROJECT": ""}, "PROJECT is not set"),
        ({"SLICES": "two"}, "SLICES=two"),
        ({"SLICES": "0"}, "SLICES=0: give a whole number, at least 1"),
        ({"SLICES": "2", "NODE": "5"}, "NODE=5: with SLICES=2 nodes go from 0 to 1"),
        ({"NODE": "one"}, "NODE=one"),
        ({"WORKER": "4"}, "WORKER=4: a slice of v5litepod-16 has 0 to 3"),
        ({"TYPE": "v9-8"}, "TYPE=v9-8: give one such as v5e-16"),
        ({"TYPE": "v5e"}, "TYPE=v5e: give one"),
        ({"TYPE": "v5p-31"}, "TYPE=v5p-31: there are v5p-8, v5p-16, v5p-32, v5p-64, v5p-128"),
        ({"TYPE": "v5e-2"}, "TYPE=v5e-2: there are v5litepod-1, v5litepod-4"),
        ({"BUCKET": "gs://b/runs"}, "BUCKET=b/runs: give the name of a bucket alone"),
        ({"WAIT_S": "2h"}, "WAIT_S=2h"),
    ],
)
def test_wrong_variables_are_named(variables, message):
    with pytest.raises(script.LaunchError, match=re.escape(message)):
        script.read_settings({"PROJECT": "p"} | variables)


def test_refuses_before_it_calls_gcloud(tmp_path):
    result, made = tpu_vm(tmp_path, "create", TYPE="v5p-31")
    assert result.returncode == 1 and result.stderr.startswith("error: TYPE=v5p-31") and not made
    result, made = tpu_vm(tmp_path, "setup", BUCKET="")
    assert "BUCKET is not set: the 4 hosts of 1 x v5litepod-16" in result.stderr and not made
    result, made = tpu_vm(tmp_path, "delete", "now")
    assert "delete takes no now" in result.stderr and not made
    for command in ("python -m opsd_jax.convert import", "opsd data prepare"):
        result, made = tpu_vm(tmp_path, "run", "--", *command.split())
        assert "is a command of one process: WORKER=0" in result.stderr and not made
    result, made = tpu_vm(tmp_path, "run", "--", *"python -m opsd_jax.study --config=c".split())
    assert "on one machine, and here are 4 hosts: take a slice" in result.stderr and not made
    result, _ = tpu_vm(tmp_path, "fly")
    assert result.returncode == 1 and "tpu_vm.sh job -- COMMAND" in result.stderr


@pytest.mark.parametrize(
    "name, hosts",
    [("v5e-1", 1), ("v5e-8", 1), ("v5litepod-16", 4), ("v5e-256", 64), ("v6e-8", 1), ("v6e-64", 16)]
    + [("v5p-8", 1), ("v5p-16", 2), ("v5p-32", 4), ("v5p-4096", 512), ("v4-8", 1), ("v4-64", 8)],
)
def test_types_are_those_that_plan_compiles_for(name, hosts):
    api_name, family, found = script.read_type(name)
    parsed = topology.parse_topology(name)
    assert api_name == name.replace("v5e", "v5litepod") and found == hosts
    assert family.cores == parsed.chip.cores and parsed.chips in family.sizes


def test_types_are_listed():
    result = bash("tpu_vm.sh", "types")
    assert re.search(r"^v5p-8 .*us-east5-a", result.stdout, flags=re.MULTILINE)
    result = bash("tpu_vm.sh", "create", PROJECT="")
    assert result.returncode == 1 and result.stderr.startswith("error: PROJECT is not set")


# --- the TPU --------------------------------------------------------------------------------------


def test_creates_and_waits(tmp_path):
    result, made = tpu_vm(
        tmp_path, "create", states=["", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]
    )
    assert result.returncode == 0, result.stderr
    create = [
        "queued-resources",
        "create",
        "opsd",
        "--node-id=opsd",
        *PLACE,
        "--accelerator-type=v5litepod-16",
        "--runtime-version=v2-alpha-tpuv5-lite",
        "--scopes=https://www.googleapis.com/auth/cloud-platform",
        "--valid-until-duration=7200s",
    ]
    assert made == [DESCRIBE, create, DESCRIBE, DESCRIBE, DESCRIBE]
    assert "opsd is ACTIVE" in result.stdout


@pytest.mark.parametrize(
    "variables, options",
    [
        (
            {"SLICES": 2, "SPOT": 1, "TYPE": "v6e-16"},
            {
                "--node-count=2",
                "--node-prefix=opsd",
                "--spot",
                "--accelerator-type=v6e-16",
                "--runtime-version=v2-alpha-tpuv6e",
                "--zone=us-east5-b",
            },
        ),
        ({"TYPE": "v5e-16"}, {"--accelerator-type=v5litepod-16", "--zone=us-west4-a"}),
        ({"TYPE": "v5p-8"}, {"--zone=us-east5-a", "--runtime-version=v2-alpha-tpuv5"}),
        (
            {"CREATE_ARGS": "--reserved --service-account=a@b", "VERSION": "v", "WAIT_S": 60},
            {
                "--reserved",
                "--service-account=a@b",
                "--runtime-version=v",
                "--valid-until-duration=60s",
            },
        ),
    ],
)
def test_creates_what_the_variables_say(tmp_path, variables, options):
    _, made = tpu_vm(tmp_path, "create", states=["", "ACTIVE"], **variables)
    assert options <= set(made[1])


def test_a_zone_that_lacks_the_type_is_noted(tmp_path):
    result, made = tpu_vm(tmp_path, "create", TYPE="v5p-8", ZONE="us-west4-a")
    assert result.returncode == 0 and "--zone=us-west4-a" in made[0]
    assert "v5p-8 is known in us-east5-a, us-central1-a, not in us-west4-a" in result.stderr


def test_goes_on_waiting_for_what_is_asked_for_already(tmp_path):
    result, made = tpu_vm(tmp_path, "create", states=["PROVISIONING", "PROVISIONING", "ACTIVE"])
    assert result.returncode == 0 and made == [DESCRIBE] * 3


@pytest.mark.parametrize(
    "states, variables, message",
    [
        (["", "FAILED"], {}, "opsd is FAILED"),
        (["", "WAITING_FOR_RESOURCES"], {"WAIT_S": 0}, "still WAITING_FOR_RESOURCES after 0 s"),
    ],
)
def test_says_why_it_gives_up(tmp_path, states, variables, message):
    result, _ = tpu_vm(tmp_path, "create", states=states, **variables)
    assert result.returncode == 1 and message in result.stderr


# --- the workers ----------------------------------------------------------------------------------


def test_sets_up_all_workers_of_all_slices(tmp_path):
    result, made = tpu_vm(tmp_path, "setup", SLICES=2, BUCKET="gs://b/", EXTRAS="wandb")
    assert result.returncode == 0, result.stderr
    assert [call[:2] for call in made] == [["tpu-vm", "scp"]] * 2 + [["tpu-vm", "ssh"]] * 2
    assert [call[3] for call in made[:2]] == ["opsd-0:opsd.tar.gz", "opsd-1:opsd.tar.gz"]
    assert sorted(call[2] for call in made[2:]) == ["opsd-0", "opsd-1"]
    assert all("--worker=all" in call for call in made)
    assert all(
        call[-1].endswith("EXTRAS=wandb bash opsd/launch/tpu_worker.sh setup b")
        for call in made[2:]
    )
    with tarfile.open(tmp_path / "pack.tar.gz") as pack:
        names = pack.getnames()
    assert {
        "opsd_jax/train.py",
        "launch/tpu_worker.sh",
        "setup.py",
        "constraints/py312.txt",
    } <= set(names)
    assert not [name for name in names if name.startswith((".git/", "tests/", "docs/"))]


def test_runs_the_command_word_by_word(tmp_path):
    result, made = tpu_vm(tmp_path, "run", "--", *COMMAND, RESTARTS=3)
    assert result.returncode == 0 and len(made) == 1 and "--worker=all" in made[0]
    remote = made[0][-1].removeprefix("--command=")
    worker = ["RESTARTS=3", "bash", "opsd/launch/tpu_worker.sh", "run"]
    assert shlex.split(remote) == [*worker, *COMMAND]


def test_runs_a_command_of_one_process_on_one_worker(tmp_path):
    """Not on its TPU, which would wait for the processes of the other hosts."""
    command = ["python", "-m", "opsd_jax.convert", "import", "--target=runs/a b"]
    _, made = tpu_vm(tmp_path, "run", "--", *command, SLICES=2, NODE=1, WORKER=0)
    assert len(made) == 1 and made[0][2] == "opsd-1" and "--worker=0" in made[0]
    words = shlex.split(made[0][-1])
    assert words[-7:] == ["env", "JAX_PLATFORMS=cpu", "OPSD_NUM_PROCESSES=1", *command][-7:]
    _, made = tpu_vm(tmp_path, "run", "--", *command, TYPE="v5p-8")  # there is one process only
    assert shlex.split(made[-1][-1])[-len(command) - 1 :] == ["run", *command]


def test_one_worker_is_asked_and_stopped_alone(tmp_path):
    """The others know of no command."""
    for verb in ("status", "wait", "stop"):
        result, made = tpu_vm(tmp_path, verb, WORKER=2, SLICES=2, NODE=1, reports=["ended 0"])
        assert result.returncode == 0, result.stderr
    asked = [call for call in made if call[0] == "tpu-vm"]
    assert [(call[2], call[6]) for call in asked] == [("opsd-1", "--worker=2")] * 3
    result, _ = tpu_vm(tmp_path, "setup", WORKER=2)
    assert "setup is for all workers" in result.stderr


@pytest.mark.parametrize("verb", ["create", "setup", "run -- x", "stop", "logs", "wait", "delete"])
def test_lines_that_were_pasted_after_a_command_are_run(tmp_path, verb):
    """ssh reads its input to the end: a shell without bracketed paste would lose them."""
    path = stand_in(
        tmp_path / "bin", "gcloud", '[[ $* != *describe* ]] || echo ACTIVE\ncat > "$SWALLOWED"'
    )
    pasted = f"{LAUNCH}/tpu_vm.sh {verb}\necho the next line\n"
    swallowed = tmp_path / "swallowed"
    place = {"PROJECT": "p", "BUCKET": "b", "POLL_S": 0, "MAX_S": 1, "SWALLOWED": swallowed}
    limits = {"timeout": 60, "capture_output": True, "text": True}
    env = environment(PATH=path, **place)
    if verb == "delete":  # the stand-in's TPU would never be gone
        (tmp_path / "bin/gcloud").write_text(
            (tmp_path / "bin/gcloud")
            .read_text()
            .replace("echo ACTIVE", "{ echo NOT_FOUND >&2; exit 1; }")
        )
    result = subprocess.run(["bash"], input=pasted, env=env, **limits)
    assert "the next line" in result.stdout and swallowed.read_text() == ""
    if verb == "logs":  # a shell on a worker reads what is typed
        typed = f"{LAUNCH}/tpu_vm.sh ssh\nls\n"
        subprocess.run(["bash"], input=typed, env=env, **limits)
        assert swallowed.read_text() == "ls\n"


def test_notices_a_worker_that_fails(tmp_path):
    result, made = tpu_vm(tmp_path, "run", "--", *COMMAND, SLICES=2, fails="opsd-1")
    assert result.returncode == 1 and "the command on a worker" in result.stderr and len(made) == 2


def test_logs_ssh_stop_delete(tmp_path):
    for arguments in (["logs"], ["ssh"], ["ssh", "--", "df -h | head"], ["delete"], ["stop"]):
        worker = {} if arguments == ["stop"] else {"WORKER": 3}
        result, made = tpu_vm(tmp_path, *arguments, SLICES=2, NODE=1, **worker)
        assert result.returncode == 0, result.stderr
    logs, shell, command, delete, _, *stop = made
    for call in (logs, shell, command):
        assert call[2] == "opsd-1" and "--worker=3" in call
    assert shell[-1] == "--worker=3" and command[-1] == "--command=df -h | head"
    assert delete == DELETE
    # All of them: a supervisor that was not told would start the command again.
    assert sorted(call[2] for call in stop) == ["opsd-0", "opsd-1"]
    assert all("--worker=all" in call for call in stop)
    result, _ = tpu_vm(tmp_path, "ssh", WORKER="all")
    assert result.returncode == 1 and "a shell is on one worker" in result.stderr


def test_ssh_through_a_proxy(tmp_path):
    """Options go to ssh and scp; one of them only the alpha track knows."""
    for options in ("--internal-ip --ssh-key-file=k", "--tunnel-through-iap"):
        tpu_vm(tmp_path, "setup", SSH_ARGS=options)
    plain, _, alpha, _ = made = calls(tmp_path / "bin")
    assert {"--internal-ip", "--ssh-key-file=k"} <= set(plain) & set(made[1])
    assert alpha[:4] == made[3][:4] == ["gcloud", "alpha", "compute", "tpus"]


def test_ssh_notices_that_its_host_is_gone(tmp_path):
    """Unless the user says otherwise: ssh takes the first value of an option."""
    own = "--ssh-flag=-oServerAliveInterval=5"
    _, (scp, setup) = tpu_vm(tmp_path, "setup", SSH_ARGS=own)
    assert "--scp-flag=-oServerAliveInterval=30" in scp
    assert setup.index(own) < setup.index("--ssh-flag=-oServerAliveInterval=30")


def test_files_that_are_no_code_are_not_copied_to_the_hosts(tmp_path):
    root, target = tmp_path / "checkout", tmp_path / "pack.tar.gz"
    root.mkdir()
    for repository in (root, root / "other"):
        subprocess.run(["git", "init", "-q", repository], check=True)
    (root / "train.py").write_text("")
    script._pack(root, target)
    with tarfile.open(target) as pack:
        assert "train.py" in pack.getnames()
    for name in ("weights", "other/data"):
        with open(root / name, "wb") as file:
            file.truncate(40 * 10**6)
    with pytest.raises(script.LaunchError, match=r"80 MB .*weights \(40 MB\)") as error:
        script._pack(root, target)
    assert "other/ (40 MB)" in str(error.value)


def test_what_the_guide_downloads_and_makes_is_ignored():
    names = ("ThinkMorph-7B", "thinkmorph", "parquet", "prepared", "tables", "venv", "checkpoints")
    names += ("runs", "samples", "tb", "eval", "eval-thinkmorph", "visual-opsd-7b")
    found = subprocess.run(
        ["git", "-C", LAUNCH.parent, "check-ignore", *(f"{name}/file" for name in names)],
        capture_output=True,
        text=True,
    )
    assert found.stdout.split() == [f"{name}/file" for name in names]
    tracked = subprocess.run(
        ["git", "-C", LAUNCH.parent, "ls-files", "--cached", "--ignored", "--exclude-standard"],
        capture_output=True,
        text=True,
    )
    assert tracked.stdout == ""


# --- waiting, and starting again ------------------------------------------------------------------


@pytest.mark.parametrize(
    "reports, ended",
    [
        (["ended 0", "ended 0"], 0),
        (["ended 42", "ended 42"], 42),
        (["ended 0", "running"], None),
        (["running", "running"], None),
        (["ended 1", "running"], 1),  # its own error; the others wait for it in vain
        (["ended 43", "ended 43"], 1),  # no restarts are left
        (["ended 1", "lost"], 1),
        (["lost", "running"], 43),
        (["idle", "running"], 43),
        ([], 43),
    ],
)
def test_outcome(reports, ended):
    assert script.outcome(reports) == ended


def test_codes_are_those_of_a_run():
    assert (script.STOPPED, script.LOST) == (
        distributed.EXIT_STOPPED,
        distributed.EXIT_PEER_LOST,
    )


@pytest.mark.parametrize(
    "states, reports, code",
    [
        (["ACTIVE"], ["running,running", "ended 0,running", "ended 0,ended 0"], 0),
        (["ACTIVE"], ["running,running", "ended 1,running"], 1),
        (["ACTIVE"], ["ended 42,ended 42"], 42),
        (["ACTIVE"], ["running,lost"], 43),
        (["ACTIVE", "ACTIVE", "SUSPENDING"], ["running", "silent"], 43),
        (["ACTIVE"], ["running", "silent"], 43),
    ],
)
def test_waits_and_gives_the_tpu_back(tmp_path, states, reports, code):
    result, made = tpu_vm(tmp_path, "wait", "--delete", states=states, reports=reports)
    assert result.returncode == code, result.stderr
    assert kinds(made)[:2] == ["describe", "status"] and made[-2:] == GIVEN_BACK
    assert made.count(DELETE) == 1 and len(made) <= 2 * 11 + 2


def test_silence_counts_only_while_gcloud_can_say_what_there_is(tmp_path):
    """A machine that sleeps, or is cut off, tells nothing of a run."""
    result, made = tpu_vm(
        tmp_path,
        *("wait", "--delete"),
        states=["ACTIVE", *["auth"] * 12, "ACTIVE"],
        reports=[*["silent"] * 6, "running", *["silent"] * 6, "ended 0"],
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("cannot refresh your auth tokens; waiting until") == 1
    assert kinds(made).count("status") == 14 and made[-2:] == GIVEN_BACK


def hanging(tmp_path):
    """Processes that a stand-in has left behind."""
    found = (tmp_path / "hanging").read_text().split()
    asked = subprocess.run(["ps", "-o", "stat=", "-p", ",".join(found)], capture_output=True)
    return [state for state in asked.stdout.decode().split() if not state.startswith("Z")]


def test_a_host_that_hangs_is_lost(tmp_path):
    """Also if what gcloud has started keeps its output open."""
    started = time.monotonic()
    limits = [("_PATIENCE_S", 0.3), ("_SILENT", 2)]
    result, made = tpu_vm(tmp_path, "wait", "--delete", reports=["hangs"], limits=limits)
    assert result.returncode == 43 and time.monotonic() - started < 10
    assert "killed, as it did not end in time: gcloud compute tpus tpu-vm ssh" in result.stderr
    assert made[-2:] == GIVEN_BACK and not hanging(tmp_path)


def test_a_tpu_that_is_not_there_is_not_waited_for(tmp_path):
    result, made = tpu_vm(tmp_path, "wait", states=[""])
    assert result.returncode == 43 and made == [DESCRIBE]


def clock(step):
    """Time that goes on by so many seconds whenever it is asked for."""
    ticks = itertools.count(0, step)
    return types.SimpleNamespace(monotonic=lambda: next(ticks), sleep=lambda seconds: None)


@pytest.mark.parametrize("stops", [True, False], ids=["stops", "hangs"])
def test_what_takes_longer_than_max_s_is_stopped_and_given_back(tmp_path, stops):
    common = {"reports": ["running"], "MAX_S": 100}
    common["fails"] = "" if stops else "tpu_worker.sh stop"
    for number, arguments in enumerate((["wait", "--delete"], ["job", "--", *COMMAND])):
        folder = tmp_path / str(number)
        folder.mkdir()
        result, made = tpu_vm(folder, *arguments, limits=[("time", clock(30))], **common)
        assert result.returncode == 124 and "within MAX_S=100 s" in result.stdout
        assert kinds(made)[-3:] == ["stop", "delete", "describe"]
        assert 1 <= kinds(made).count("status") <= 4


def test_without_max_s_a_day_is_the_end():
    read = script.read_settings
    assert read({"PROJECT": "p"}).max_s == 86400
    assert script.Tpu(read({"PROJECT": "p", "MAX_S": "0"})).end_of_waiting() == float("inf")


def test_a_wait_alone_stops_nothing(tmp_path):
    result, made = tpu_vm(
        tmp_path, "wait", reports=["running"], MAX_S=100, limits=[("time", clock(30))]
    )
    assert result.returncode == 124 and {*kinds(made)} == {"describe", "status"}


def test_a_failure_of_one_worker_says_that_the_others_go_on(tmp_path):
    result, _ = tpu_vm(tmp_path, "wait", reports=["ended 1,running"])
    assert result.returncode == 1 and "tpu_vm.sh stop, before the next run" in result.stdout
    result, _ = tpu_vm(tmp_path, "wait", reports=["ended 1,ended 1"])
    assert result.returncode == 1 and "tpu_vm.sh stop" not in result.stdout


# --- giving it back -------------------------------------------------------------------------------


def test_deletes_until_it_is_gone(tmp_path):
    result, made = tpu_vm(
        tmp_path, "delete", states=["ACTIVE"], fails="queued-resources delete", times=2
    )
    assert result.returncode == 0 and made == GIVEN_BACK * 3
    assert result.stdout.count("opsd is ACTIVE, and may be billed") == 2
    assert "there is no opsd in us-west4-a now" in result.stdout


def test_a_tpu_that_is_being_deleted_is_waited_for(tmp_path):
    fails = {"fails": "queued-resources delete"}  # the stand-in would delete at once
    result, made = tpu_vm(tmp_path, "delete", states=["DELETING", "DELETING", ""], **fails)
    assert result.returncode == 0 and made == [DELETE, *[DESCRIBE] * 3]


@pytest.mark.parametrize("state", ["ACTIVE", "auth"])
def test_says_that_a_tpu_is_still_billed(tmp_path, state):
    result, made = tpu_vm(
        tmp_path,
        *("wait", "--delete"),
        states=["ACTIVE", state],
        reports=["ended 0"],
        fails="queued-resources delete",
        limits=[("_DELETE_S", 0)],
    )
    assert result.returncode == 1 and made[-2:] == GIVEN_BACK
    assert "STILL BILLED: opsd in us-west4-a is" in result.stderr
    assert ("auth tokens" in result.stderr) == (state == "auth")


def test_status(tmp_path):
    result, _ = tpu_vm(tmp_path, "status", reports=["running,ended 43"])
    assert "opsd is ACTIVE" in result.stdout and "worker t1v-n-1-w-0 ended 43" in result.stdout
    result, made = tpu_vm(tmp_path, "status", states=["SUSPENDED"])
    assert "opsd is SUSPENDED" in result.stdout and kinds(made)[-1] == "describe"


def without_waiting(made):
    """The calls of a job but those that ask for a state."""
    return [kind for kind in kinds(made) if kind not in ("describe", "status")]


def test_a_job_is_done_and_deleted(tmp_path):
    result, made = tpu_vm(
        tmp_path, "job", "--", *COMMAND, states=["", "", "ACTIVE"], reports=["running", "ended 0"]
    )
    assert result.returncode == 0, result.stderr
    assert without_waiting(made) == ["create", "scp", "setup", "run", "delete"]


def test_a_preempted_job_gets_another_tpu(tmp_path):
    result, made = tpu_vm(
        tmp_path,
        *("job", "--", *COMMAND),
        states=["", "ACTIVE", "ACTIVE", "SUSPENDED", "SUSPENDED", "", "ACTIVE"],
        reports=["running", "ended 0"],
    )
    assert result.returncode == 0, result.stderr
    once = ["create", "scp", "setup", "run", "delete"]
    assert without_waiting(made) == once + once
    first, second = (call for call in made if "tpu_worker.sh run" in call[-1])
    assert first == second  # which continues it


def test_a_rebooted_worker_starts_its_command_again(tmp_path):
    result, made = tpu_vm(
        tmp_path,
        *("job", "--", *COMMAND),
        states=["", "", "ACTIVE"],
        reports=["running,lost", "running,running", "ended 0"],
    )
    assert result.returncode == 0, result.stderr
    assert without_waiting(made) == ["create", "scp", "setup", "run", "run", "delete"]


def test_a_job_starts_again_a_bounded_number_of_times(tmp_path):
    result, made = tpu_vm(
        tmp_path,
        *("job", "--", *COMMAND),
        states=["", "", "ACTIVE"],
        reports=["lost"],
        RESTARTS=2,
    )
    assert result.returncode == 43
    assert kinds(made).count("run") == 3 and made[-2:] == GIVEN_BACK


@pytest.mark.parametrize(
    "states, deleted", [(["", "", "ACTIVE"], True), (["ACTIVE"], False)], ids=["its own", "found"]
)
def test_a_job_that_does_not_start_deletes_only_its_own_tpu(tmp_path, states, deleted):
    """On one that it found another command may run."""
    result, made = tpu_vm(tmp_path, "job", "--", *COMMAND, states=states, fails="tpu_worker.sh run")
    assert result.returncode == 1 and "the command on a worker" in result.stderr
    assert (DELETE in made) == deleted


def test_a_job_whose_tpu_does_not_come_leaves_no_request(tmp_path):
    result, made = tpu_vm(
        tmp_path, "job", "--", *COMMAND, states=["", "", "PROVISIONING"], WAIT_S=0
    )
    assert result.returncode == 1 and "still PROVISIONING after 0 s" in result.stderr
    assert made[-2:] == GIVEN_BACK and "scp" not in kinds(made)


def test_a_job_that_cannot_ask_begins_nothing(tmp_path):
    """What is there may run something else."""
    result, made = tpu_vm(tmp_path, "job", "--", *COMMAND, states=["auth", "ACTIVE"])
    assert result.returncode == 1 and made == [DESCRIBE]
    assert "the state of opsd cannot be asked: ERROR: cannot refresh" in result.stderr
    result, made = tpu_vm(tmp_path, "create", states=["auth", "ACTIVE"])
    assert result.returncode == 1 and made == [DESCRIBE] * 2


def test_a_job_gives_its_tpu_back_although_gcloud_failed(tmp_path):
    result, made = tpu_vm(
        tmp_path,
        *("job", "--", *COMMAND),
        states=["", "ACTIVE", "ACTIVE", "auth"],
        reports=["ended 0"],
        fails="queued-resources delete",
        times=1,
    )
    assert result.returncode == 0, result.stderr
    assert made[-4:] == GIVEN_BACK * 2


def test_a_job_waits_for_its_tpu_while_gcloud_cannot_say(tmp_path):
    """Neither while it comes, nor after it was lost, does that end the job."""
    result, made = tpu_vm(
        tmp_path,
        *("job", "--", *COMMAND),
        states=["", "PROVISIONING", "auth", "ACTIVE", "ACTIVE", "auth", "auth", "ACTIVE"],
        reports=["lost", "ended 0"],
    )
    assert result.returncode == 0, result.stderr
    assert without_waiting(made) == ["create", "scp", "setup", "run", "run", "delete"]


def test_a_command_of_a_job_that_hangs_ends(tmp_path):
    result, made = tpu_vm(
        tmp_path,
        *("job", "--", *COMMAND),
        states=["", "ACTIVE"],
        fails="hangs tpu_worker.sh setup",
        limits=[("_COMMAND_S", 0.3)],
    )
    assert result.returncode == 1 and made[-2:] == GIVEN_BACK and not hanging(tmp_path)


@pytest.mark.parametrize("arguments", VERBS, ids=" ".join)
def test_dry_run_prints_the_commands_and_calls_none(tmp_path, arguments):
    result, made = tpu_vm(tmp_path, *arguments, DRY_RUN=1)
    assert result.returncode == 0 and made == [], result.stderr
    lines = result.stdout.splitlines()
    assert lines and all(shlex.split(line)[:3] == ["gcloud", "compute", "tpus"] for line in lines)
