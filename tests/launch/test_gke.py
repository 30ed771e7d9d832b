"""launch/gke.sh with a stand-in for kubectl: the JobSet it makes, and how it waits for it."""

import contextlib
import importlib.util
import io
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import types
from unittest import mock

import pytest
import yaml
from test_jobset_schema import PINNED, errors
from test_launch import SLICES, overlaid, pod_of, replace

from stand_ins import COMMAND, LAUNCH, bash, calls, environment, stand_in

sys.path.insert(0, str(LAUNCH))  # as it is for a script of this folder
spec = importlib.util.spec_from_file_location("gke_script", LAUNCH / "gke.py")
script = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = script  # dataclasses look their module up
spec.loader.exec_module(script)

PLACE = {"TYPE": "v5p-16", "IMAGE": "reg/opsd", "BUCKET": "b"}
GET = ["get", "jobset", "try", "--output=json"]
DELETE = ["delete", "jobset", "try", "--ignore-not-found"]


def found(state: str, command=COMMAND) -> str:
    """A JobSet as kubectl shows it: "waits", "runs", "again" (started again), Completed, Failed."""
    status = {"restarts": int(state == "again")}
    status["replicatedJobsStatus"] = [{"name": "slice", "ready": int(state in ("runs", "again"))}]
    if state in ("Completed", "Failed"):
        status["terminalState"] = state
        status["conditions"] = [{"type": state, "message": f"because {state}"}]
    pod = {"spec": {"containers": [{"name": "train", "command": command}]}}
    jobs = [{"replicas": 1, "template": {"spec": {"template": pod}}}]
    return json.dumps({"spec": {"replicatedJobs": jobs}, "status": status})


def pods(reason: str, kind="containerStatuses") -> str:
    """Two Pods, the second of which has a node, where its container waits for a reason.

    "no nodes": neither has one. "": no container is reported yet.
    """
    items = [
        {"metadata": {"name": f"try-{n}"}, "spec": {}, "status": {"phase": "Pending"}}
        for n in range(2)
    ]
    if reason != "no nodes":
        items[1]["spec"]["nodeName"] = "tpu-1"
    if reason not in ("no nodes", ""):
        items[1]["status"][kind] = [
            {"state": {"running": {}}},
            {"state": {"waiting": {"reason": reason}}},
        ]
    return json.dumps({"items": items})


def gke(tmp_path, *arguments, states, why="no nodes", limits=(), command=COMMAND, **more):
    """launch/gke.sh with a kubectl that tells these states one after another; the last one stays.

    "" is "no such JobSet", until one is applied; deleting goes on with the next "". "cut off": it
    cannot say. why: the reason for which a container waits, as of `pods`.
    """
    kinds = ("waits", "runs", "again", "Completed", "Failed")
    for state in kinds:
        (tmp_path / f"{state}.json").write_text(found(state, command))
    (tmp_path / "pods.json").write_text(pods(why))
    (tmp_path / "states").write_text("".join(state + "\n" for state in states))
    path = stand_in(
        tmp_path / "bin",
        "kubectl",
        f"""
        cd {tmp_path}
        case "$1 $2" in
          "get jobset")
            read -r line < states
            [[ $(wc -l < states) == 1 || -z $line ]] || sed -i 1d states
            [[ $line != "cut off" ]] || {{ echo "Unable to connect to the server" >&2; exit 1; }}
            [[ -n $line ]] || {{ echo 'Error from server (NotFound): no "try"' >&2; exit 1; }}
            cat "$line.json" ;;
          "get pods") cat pods.json ;;
          "get events") echo "try-1 FailedMount: bucket b: not found" ;;
          "delete jobset")
            sed -n '/^$/,$p' states > left
            [[ -s left ]] || echo > left
            mv left states ;;
          "apply -f") cat > applied; sed -i '/./,$!d' states; echo applied ;;
          kustomize*) cat "${{@: -1}}/kustomization.yaml" ;;
          logs*) echo "[pod/try] the last line" ;;
        esac""",
    )
    place = environment(PATH=path, **({"POLL_S": 0} | PLACE | more))
    said = {"stdout": io.StringIO(), "stderr": io.StringIO()}
    with (
        mock.patch.dict(os.environ, place, clear=True),
        mock.patch.dict(vars(script), limits),
        contextlib.redirect_stdout(said["stdout"]),
        contextlib.redirect_stderr(said["stderr"]),
    ):
        code = script.main(list(arguments))
    text = {name: value.getvalue() for name, value in said.items()}
    return types.SimpleNamespace(returncode=code, **text), [
        call[1:] for call in calls(tmp_path / "bin")
    ]


def clock(step):
    """Time that goes on by so many seconds whenever it is asked for."""
    ticks = itertools.count(0, step)
    return types.SimpleNamespace(monotonic=lambda: next(ticks), sleep=lambda seconds: None)


# --- what it makes --------------------------------------------------------------------------------


def jobset(name="try", folder="v5p-16", **more):
    """The JobSet of a folder with the changes of the script."""
    settings = script.read_settings(PLACE | {"TYPE": folder} | more, starts=True)
    made = overlaid(folder)
    replace(made, script.changes(settings, name, COMMAND))
    return made


@pytest.mark.parametrize("folder", SLICES)
def test_only_name_image_bucket_command_and_limit_differ_from_the_folder(folder):
    made, usual = jobset(folder=folder, MAX_S="60"), overlaid(folder)
    assert errors(json.loads(PINNED.read_text()), made) == []
    (container,), (volume,) = pod_of(made)["containers"], pod_of(made)["volumes"]
    assert made["metadata"]["name"] == "try" and container["image"] == "reg/opsd:latest"
    assert container["command"] == COMMAND
    assert volume["csi"]["volumeAttributes"]["bucketName"] == "b"
    (workdir,) = re.findall(r"^WORKDIR (.*)$", (LAUNCH / "Dockerfile").read_text(), re.MULTILINE)
    assert container["volumeMounts"][0]["mountPath"] == f"{workdir}/runs"
    (job,) = made["spec"]["replicatedJobs"]
    assert job["template"]["spec"]["activeDeadlineSeconds"] == 60
    for changed in (made, usual):
        (container,), (volume,) = pod_of(changed)["containers"], pod_of(changed)["volumes"]
        del changed["metadata"]["name"], container["image"], container["command"]
        del container["volumeMounts"][0]["mountPath"]
        del volume["csi"]["volumeAttributes"]["bucketName"]
        del changed["spec"]["replicatedJobs"][0]["template"]["spec"]["activeDeadlineSeconds"]
    assert made == usual


@pytest.mark.parametrize(
    "image, used",
    [
        ("reg/a", "reg/a:latest"),
        ("localhost:5000/a", "localhost:5000/a:latest"),
        ("reg/a:v1", "reg/a:v1"),
        ("reg/a@sha256:0", "reg/a@sha256:0"),
    ],
)
def test_an_image_without_a_tag_is_the_latest(image, used):
    (container,) = pod_of(jobset(IMAGE=image))["containers"]
    assert container["image"] == used


@pytest.mark.skipif(not shutil.which("kubectl"), reason="no kubectl here")
def test_kustomize_builds_it_so():
    result = bash("gke.sh", "try", "--", *COMMAND, DRY_RUN=1, **PLACE)
    assert result.returncode == 0, result.stderr
    assert yaml.safe_load(result.stdout) == jobset()


@pytest.mark.parametrize(
    "arguments, variables, message",
    [
        (["try", "--", "x"], {"BUCKET": ""}, "BUCKET is not set"),
        (["try", "--", "x"], {"IMAGE": ""}, "IMAGE is not set"),
        (["try", "--", "x"], {"TYPE": "v5p-64"}, "TYPE=v5p-64: give a folder of"),
        (["try", "--", "x"], {"BUCKET": "b/runs"}, "BUCKET=b/runs: give the name of a bucket"),
        (["try", "--", "x"], {"MAX_S": "12h"}, "MAX_S=12h: give a whole number"),
        (["try", "--", "x"], {"MAX_S": "0"}, "MAX_S=0: give a whole number, at least 1"),
        (["Try_1", "--", "x"], {}, "NAME 'Try_1': give small letters"),
        (["a" * 41, "--", "x"], {}, "at most 40"),
        (["try", "x"], {}, "usage:"),
        (["try", "--"], {}, "usage:"),
        ([], {}, "usage:"),
        (["try"], {}, "there is no JobSet try"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, arguments, variables, message):
    result, made = gke(tmp_path, *arguments, states=[""], **variables)
    assert result.returncode == 1 and message in result.stderr
    assert made in ([], [GET])


@pytest.mark.parametrize("folder", SLICES)
def test_a_command_of_one_process_is_refused_on_several_hosts(tmp_path, folder):
    (job,) = overlaid(folder)["spec"]["replicatedJobs"]
    count = job["replicas"] * job["template"]["spec"]["parallelism"]
    assert script.hosts(folder) == count
    for command, message in (
        ("python -m opsd_jax.convert import", f"is a command of one process: {folder} has {count}"),
        ("opsd study --config=c", f"on one machine, and here are {count} hosts"),
    ):
        place = {"states": ["", "Completed"], "TYPE": folder}
        result, made = gke(tmp_path, "try", "--", *command.split(), **place)
        assert (result.returncode, message in result.stderr) == (
            (1, True) if count > 1 else (0, False)
        )
        assert count == 1 or not made


# --- starting and waiting -------------------------------------------------------------------------


def test_starts_waits_and_says_how_it_ended(tmp_path):
    states = ["", "waits", "runs", "runs", "cut off", "again", "Completed"]
    result, made = gke(tmp_path, "try", "--", *COMMAND, states=states)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    log = "its log: kubectl logs -f -l jobset.sigs.k8s.io/jobset-name=try -c train --prefix"
    assert lines == [
        "applied",
        "try waits for nodes and Pods",
        f"try runs; {log} --tail=-1 --max-log-requests=64",
        "try cannot be asked (Unable to connect to the server)",
        f"try runs, started again 1 times; {log} --tail=-1 --max-log-requests=64",
        "[pod/try] the last line",
        "try is Completed: because Completed",
    ]
    applied = json.loads((tmp_path / "applied").read_text())
    (patch,) = applied["patches"]
    assert {"op": "replace", "path": "/metadata/name", "value": "try"} in json.loads(patch["patch"])
    assert not [call for call in made if call[0] == "delete"]


def test_a_failure_is_one(tmp_path):
    result, _ = gke(tmp_path, "try", "--", *COMMAND, states=["", "runs", "Failed"])
    assert result.returncode == 1 and result.stdout.endswith("try is Failed: because Failed\n")


def test_one_that_has_ended_is_replaced_and_one_that_runs_is_not(tmp_path):
    result, made = gke(tmp_path, "try", "--", *COMMAND, states=["Failed", "", "runs", "Completed"])
    assert result.returncode == 0 and made.index(DELETE) < made.index(["apply", "-f", "-"])
    (tmp_path / "b").mkdir()
    result, made = gke(tmp_path / "b", "try", "--", *COMMAND, states=["runs", "runs", "Completed"])
    assert result.returncode == 0 and "try runs already" in result.stdout
    assert not [call for call in made if call[0] in ("apply", "delete")]
    (tmp_path / "c").mkdir()
    result, made = gke(
        tmp_path / "c", "try", "--", *COMMAND, states=["runs"], command=["python", "other.py"]
    )
    assert result.returncode == 1 and "try runs another command" in result.stderr and made == [GET]


def test_waits_again_for_one_that_was_started(tmp_path):
    nothing = dict.fromkeys(PLACE, "")
    result, made = gke(tmp_path, "try", states=["runs", "Completed"], **nothing)
    assert result.returncode == 0 and made[:2] == [GET] * 2


def test_one_that_is_gone_is_not_waited_for(tmp_path):
    result, _ = gke(tmp_path, "try", states=["runs", "runs", ""])
    assert result.returncode == 43 and "no longer exists" in result.stdout


@pytest.mark.parametrize(
    "states, why, variables, code, message",
    [
        (["", "waits"], "no nodes", {"WAIT_S": 100}, 43, "within WAIT_S=100 s"),
        (["", "waits"], "ImagePullBackOff", {}, 1, "does not start: ImagePullBackOff"),
        (["", "waits"], "ContainerCreating", {}, 1, "within 600 s (ContainerCreating)"),
        (["", "waits"], "PodInitializing", {}, 1, "try-1 FailedMount: bucket b: not found"),
        (["", "waits"], "", {}, 1, "has nodes; its containers are created"),
        (["", "runs"], "no nodes", {"MAX_S": 100}, 124, "has not ended within MAX_S=100 s"),
    ],
    ids=["no nodes", "no image", "no bucket", "no bucket, a sidecar", "no kubelet", "too long"],
)
def test_what_costs_without_an_end_is_deleted(tmp_path, states, why, variables, code, message):
    limits = [("time", clock(20))]
    result, made = gke(
        tmp_path, "try", "--", *COMMAND, states=states, why=why, limits=limits, **variables
    )
    assert result.returncode == code and message in result.stdout, result.stdout
    assert made[-1] == DELETE


def test_the_cluster_is_asked_why_a_pod_does_not_start(tmp_path):
    limits = [("time", clock(20))]
    states, why = ["", "waits"], "ContainerCreating"
    result, made = gke(tmp_path, "try", "--", *COMMAND, states=states, why=why, limits=limits)
    (asked,) = [call for call in made if call[:2] == ["get", "events"]]
    assert asked[2] == "--field-selector=involvedObject.name=try-1,type=Warning"
    assert asked[3].startswith("--output=jsonpath=") and asked[3].endswith('{"\\n"}{end}')
    # The usual minutes of a start are no trouble yet.
    assert "does not start" not in result.stdout
    assert script.troubles(json.loads(pods("X", "initContainerStatuses"))) == {"X": "try-1"}
    ended = json.loads(pods("X"))
    ended["items"][1]["status"]["phase"] = "Succeeded"
    assert script.troubles(ended) == {}


def test_a_machine_that_is_cut_off_does_not_delete(tmp_path):
    """However long: nobody knows whether the command waits for nodes."""
    states = ["", "waits", *["cut off"] * 8, "runs", "Completed"]
    limits = [("time", clock(20))]
    result, made = gke(tmp_path, "try", "--", *COMMAND, states=states, WAIT_S=100, limits=limits)
    assert result.returncode == 0 and DELETE not in made


def test_it_is_said_while_it_cannot_be_deleted(tmp_path):
    job = script.Job(script.read_settings({"POLL_S": "0"}, starts=False), "try")
    answers = iter([(1, "no network"), (1, "no network"), (0, "")])
    with mock.patch.object(
        script, "_ask", lambda *words, **more: script.calls.Answer(*next(answers)[:1], err="e")
    ):
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            job.delete()
    assert out.getvalue().count("try could not be deleted (e); trying again") == 2


def test_interrupted(tmp_path):
    def interrupt(seconds):
        raise KeyboardInterrupt

    time = types.SimpleNamespace(monotonic=lambda: 0.0, sleep=interrupt)
    result, made = gke(tmp_path, "try", states=["runs"], limits=[("time", time)])
    assert result.returncode == 130 and "goes on, and is billed" in result.stderr
    assert DELETE not in made


def test_needs_no_package():
    """Any Python runs it: only the standard library and its own folder are imported."""
    code = f"import sys; sys.path.insert(0, {str(LAUNCH)!r}); import gke, tpu_vm"
    found = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
