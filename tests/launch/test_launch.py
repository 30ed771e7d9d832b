"""Launch files: read, run with stand-ins for cloud commands, and run for real on CPU."""

import ast
import importlib.util
import json
import math
import os
import re
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import time

import pytest
import yaml

import xla_flags
from opsd_jax import config as config_lib
from opsd_jax.run import checks
from opsd_jax.runtime import distributed
from stand_ins import COMMAND, LAUNCH, ROOT, bash, calls, environment, stand_in, wait_for

SCRIPTS = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")])
SLICES = sorted(path.parent.name for path in LAUNCH.glob("gke/*/kustomization.yaml"))


# --- scripts --------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_parse(script):
    assert script.stat().st_mode & stat.S_IXUSR, f"{script} is not executable"
    found = subprocess.run(["bash", "-n", script], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="no shellcheck here")
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck(script):
    found = subprocess.run(
        ["shellcheck", "--severity=warning", script], capture_output=True, text=True
    )
    assert found.returncode == 0, found.stdout


@pytest.mark.parametrize(
    "code, restarts, requeued",
    [(0, 0, 0), (1, 0, 0), (42, 0, 1), (43, 3, 1), (134, 0, 1), (143, 0, 1), (42, 20, 0)],
)
def test_slurm_starts_the_command_and_continues_what_can_be_continued(
    tmp_path, code, restarts, requeued
):
    (tmp_path / "venv/bin").mkdir(parents=True)
    (tmp_path / "venv/bin/activate").write_text("")
    path = stand_in(tmp_path / "bin", "srun", f'echo "timeout $OPSD_TIMEOUT_S"; exit {code}')
    stand_in(tmp_path / "bin", "scontrol", "")
    result = bash(
        "slurm.sbatch",
        *COMMAND,
        cwd=tmp_path,
        PATH=path,
        SLURM_JOB_ID=7,
        SLURM_RESTART_COUNT=restarts,
    )
    assert result.returncode == code and "timeout 600" in result.stdout
    made = calls(tmp_path / "bin")
    assert made[0] == ["srun", "--kill-on-bad-exit=0", "--label", *COMMAND]
    assert made[1:] == [["scontrol", "requeue", "7"]] * requeued


def test_slurm_asks_for_one_process_for_each_gpu_of_whole_nodes():
    options = dict(
        re.findall(
            r"^#SBATCH --([\w-]+)=?(.*)$", (LAUNCH / "slurm.sbatch").read_text(), flags=re.MULTILINE
        )
    )
    assert options["ntasks-per-node"] == options["gpus-per-node"]
    assert "exclusive" in options and "gpus-per-task" not in options
    assert options["signal"].startswith("TERM@")  # to the processes; "B:" would be the batch shell


def test_xpk_gets_the_command_word_by_word():
    place = {"CLUSTER": "c", "PROJECT": "p", "ZONE": "z", "IMAGE": "i"}
    result = bash("xpk.sh", "try", "--", *COMMAND, DRY_RUN=1, STORAGE="s", **place)
    words = shlex.split(result.stdout)
    assert words[:3] == ["xpk", "workload", "create"]
    assert {
        "--workload=try",
        "--restart-on-exit-codes=43",
        "--num-slices=1",
        "--tpu-type=v5litepod-16",
        "--max-restarts=10",
        "--termination-grace-period-seconds=300",
    } <= set(words)
    assert shlex.split(words[-1].removeprefix("--command=")) == ["exec", *COMMAND]
    assert "STORAGE is not set" in bash("xpk.sh", "try", "--", "x", **place).stderr


# --- GKE ------------------------------------------------------------------------------------------

MOUNT_OPTIONS = [
    "metadata-cache-ttl-secs=0",
    "metadata-cache-negative-ttl-secs=0",
    "write-global-max-blocks=1600",
]
CHIPS_PER_HOST = {
    "tpu-v5-lite-podslice": 4,
    "tpu-v5p-slice": 4,
    "tpu-v6e-slice": 4,
}  # in slices of several hosts


def replace(jobset: dict, changes: list[dict]) -> None:
    """What the replacements of a JSON patch do."""
    for change in changes:
        assert change["op"] == "replace"
        *way, last = [int(key) if key.isdigit() else key for key in change["path"].split("/")[1:]]
        place = jobset
        for key in way:
            place = place[key]
        assert last in place, f"{change['path']} is replaced, but does not exist"
        place[last] = change["value"]


def overlaid(name: str) -> dict:
    """gke_jobset.yaml as launch/gke/<name> changes it: its patches are replacements, and its
    images.
    """
    folder = LAUNCH / "gke" / name
    overlay = yaml.safe_load((folder / "kustomization.yaml").read_text())
    (base,) = overlay["resources"]
    jobset = yaml.safe_load((folder / base).read_text())
    for patch in overlay["patches"]:
        replace(jobset, yaml.safe_load(patch["patch"]))
    (image,) = overlay["images"]
    for container in pod_of(jobset)["containers"]:
        assert container["image"] == image["name"]
        container["image"] = f"{image['newName']}:{image['newTag']}"
    return jobset


def job_of(jobset) -> dict:
    (replicated,) = jobset["spec"]["replicatedJobs"]
    return replicated["template"]["spec"]


def pod_of(jobset) -> dict:
    return job_of(jobset)["template"]["spec"]


def config_file(path):
    """The module of a config file."""
    spec = importlib.util.spec_from_file_location("config_file", ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def config_of(command):
    """The settings that a training command gives."""
    (path,) = (word.removeprefix("--config=") for word in command if word.startswith("--config="))
    path, _, preset = path.partition(":")
    config = config_file(path).get_config(*[preset] if preset else [])
    for key, value in re.findall(r"--config\.([\w.]+)=(\S+)", " ".join(command)):
        is_text = isinstance(config_lib.settings()[key].default, str)
        config.update_from_flattened_dict({key: value if is_text else ast.literal_eval(value)})
    return config


def test_there_are_slices():
    assert {"v5e-16", "v5p-8"} <= set(SLICES)


@pytest.mark.parametrize("name", SLICES)
def test_jobset_fits_its_slice(name):
    jobset = overlaid(name)
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    job, pod = job_of(jobset), pod_of(jobset)
    (container,) = pod["containers"]
    accelerator = pod["nodeSelector"]["cloud.google.com/gke-tpu-accelerator"]
    topology = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
    chips = container["resources"]["limits"]["google.com/tpu"]
    assert chips == CHIPS_PER_HOST[accelerator]
    assert job["completions"] == job["parallelism"]
    assert job["completions"] * chips == math.prod(map(int, topology.split("x")))
    kind, cores = re.match(r"(v\w+)-(\d+)", name).groups()
    assert int(cores) == job["completions"] * chips * (
        2 if kind == "v5p" else 1
    )  # v5p names count cores
    slices = jobset["spec"]["replicatedJobs"][0]["replicas"]
    assert slices == int((re.search(r"-x(\d+)$", name) or [0, 1])[1])
    assert (f"--config.mesh.data={slices}" in container["command"]) == (slices > 1)
    assert len(jobset["metadata"]["name"]) + len("-slice-0-0-xxxxx") <= 63
    config = config_of(container["command"])
    devices = job["completions"] * chips * slices
    assert -1 in config.mesh.values() or math.prod(config.mesh.values()) == devices
    for stage in config.stages:
        checks.check_batch(config, stage, shards=devices // config.mesh.tensor)


def test_every_slice_with_a_preset_of_the_paper_has_a_folder():
    """Its command is the paper's run with that preset; the other folders run the miniature."""
    path = "configs/visual_opsd.py"
    presets = config_file(path).SLICES
    commands = {name: pod_of(overlaid(name))["containers"][0]["command"] for name in SLICES}
    runs_paper = [
        name for name, command in commands.items() if f"--config={path}:{name}" in command
    ]
    assert sorted(presets) == runs_paper
    # one run may continue on any of them, and on TPU VMs
    paths = {tuple(word for word in commands[name] if "=runs/" in word) for name in runs_paper}
    assert len(paths) == 1 and len(*paths) == 4
    assert all("--config=configs/mini.py" in commands[name] for name in {*SLICES} - {*runs_paper})


@pytest.mark.parametrize("name", SLICES)
def test_jobset_restarts_what_can_be_continued(name):
    jobset = overlaid(name)
    job, pod = job_of(jobset), pod_of(jobset)
    assert (
        job["completionMode"] == "Indexed" and job["backoffLimit"] == 0
    )  # a lost host restarts the whole set
    assert pod["restartPolicy"] == "Never"  # a podFailurePolicy needs it
    ((rule,), (policy, limit)) = (
        job["podFailurePolicy"]["rules"],
        jobset["spec"]["failurePolicy"]["rules"],
    )
    assert rule["action"] == "FailJob" and rule["onExitCodes"]["operator"] == "In"
    assert not {0, 42, distributed.EXIT_PEER_LOST, 134, 137} & set(rule["onExitCodes"]["values"])
    assert rule["onExitCodes"]["containerName"] in [
        container["name"] for container in pod["containers"]
    ]
    assert (policy["action"], policy["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])
    assert (limit["action"], limit["onJobFailureReasons"]) == ("FailJobSet", ["DeadlineExceeded"])
    assert job["activeDeadlineSeconds"] == 86400
    assert jobset["spec"]["failurePolicy"]["maxRestarts"] == 10
    assert pod["terminationGracePeriodSeconds"] == 300


@pytest.mark.parametrize("name", SLICES)
def test_pods_may_use_the_tpu_and_the_bucket(name):
    jobset = overlaid(name)
    (container,) = pod_of(jobset)["containers"]
    assert container["securityContext"] == {"privileged": True}
    annotations = job_of(jobset)["template"]["metadata"]["annotations"]
    for limit in ("cpu", "memory", "ephemeral-storage"):
        assert annotations[f"gke-gcsfuse/{limit}-limit"] == "0"  # none


def test_all_places_mount_with_the_same_options():
    """TPU VMs, XPK in the guide; GKE in `test_pods_find_each_other_and_their_folder`."""
    worker = (LAUNCH / "tpu_worker.sh").read_text()
    assert re.findall(r"--([\w-]+=\d+)", worker[worker.index("  gcsfuse --") :]) == MOUNT_OPTIONS
    guide = (ROOT / "docs/guides/several-machines.md").read_text()
    assert f"--mount-options={','.join(MOUNT_OPTIONS)}" in guide


def test_all_places_restart_after_the_same_codes():
    for script in ("tpu_worker.sh", "slurm.sbatch"):
        (codes,) = re.findall(r"^\s*(42 \|[\d |]+)\)", (LAUNCH / script).read_text(), re.MULTILINE)
        assert codes.split(" | ") == ["42", "43", "134", "137", "143"]


@pytest.mark.parametrize("name", SLICES)
def test_pods_find_each_other_and_their_folder(name, monkeypatch):
    jobset = overlaid(name)
    job, pod = job_of(jobset), pod_of(jobset)
    (container,) = pod["containers"]
    assert jobset["spec"]["network"] == {
        "enableDNSHostnames": True,
        "publishNotReadyAddresses": True,
    }
    given = {item["name"]: item["value"] for item in container["env"]}
    assert (
        not {"OPSD_COORDINATOR", "OPSD_PROCESS_ID"} & given.keys()
    )  # the same in all Pods: JAX finds them
    assert all(isinstance(value, str) for value in given.values())
    # what GKE adds to the environment of such Pods
    slices, hosts = jobset["spec"]["replicatedJobs"][0]["replicas"], job["completions"]
    given["TPU_WORKER_HOSTNAMES"] = ",".join(
        f"{jobset['metadata']['name']}-slice-0-{n}" for n in range(hosts)
    )
    if slices > 1:
        given["MEGASCALE_NUM_SLICES"] = str(slices)
    for variable in [
        v for v in os.environ if v.startswith(("OPSD_", "SLURM_", "TPU_", "JAX_PLATFORMS"))
    ]:
        monkeypatch.delenv(variable)
    for variable, value in given.items():
        monkeypatch.setenv(variable, value)
    monkeypatch.setattr(distributed.importlib.util, "find_spec", lambda name: name)
    assert distributed.cluster_size() == hosts * slices
    # the workdir is in the mounted bucket
    (volume,), (mount,) = pod["volumes"], container["volumeMounts"]
    assert (
        volume["name"] == mount["name"] and volume["csi"]["driver"] == "gcsfuse.csi.storage.gke.io"
    )
    assert job["template"]["metadata"]["annotations"]["gke-gcsfuse/volumes"] == "true"
    assert (
        volume["csi"]["volumeAttributes"]["mountOptions"].split(",") == MOUNT_OPTIONS
    )  # others write there too
    workdir = next(word for word in container["command"] if word.startswith("--workdir="))
    (checkout,) = re.findall(r"^WORKDIR (.*)$", (LAUNCH / "Dockerfile").read_text(), re.MULTILINE)
    workdir = os.path.join(checkout, workdir.removeprefix("--workdir="))
    assert workdir.startswith(mount["mountPath"] + "/")
    assert container["command"][:3] == [
        "python",
        "-m",
        "opsd_jax.train",
    ]  # no shell: it gets SIGTERM itself


@pytest.mark.skipif(not shutil.which("kubectl"), reason="no kubectl here")
@pytest.mark.parametrize("name", SLICES)
def test_kustomize_reads_it_as_these_tests_do(name):
    built = subprocess.run(
        [
            "kubectl",
            "kustomize",
            "--load-restrictor",
            "LoadRestrictionsNone",
            LAUNCH / "gke" / name,
        ],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert built.returncode == 0, built.stderr
    assert yaml.safe_load(built.stdout) == overlaid(name)


def test_gke_base_alone_is_a_v5e_16():
    base = yaml.safe_load((LAUNCH / "gke_jobset.yaml").read_text())
    same = overlaid("v5e-16")
    for jobset in (base, same):  # what each user sets
        pod = pod_of(jobset)
        del (
            jobset["metadata"]["name"],
            pod["containers"][0]["image"],
            pod["containers"][0]["command"],
        )
        del pod["volumes"][0]["csi"]["volumeAttributes"]["bucketName"]
    assert base == same


# --- Docker ---------------------------------------------------------------------------------------


def test_dockerfile_names_what_there_is():
    lines = (LAUNCH / "Dockerfile").read_text().replace("\\\n", " ").splitlines()
    copied = [source for line in lines if line.startswith("COPY ") for source in line.split()[1:-1]]
    assert {"opsd_jax", "configs", "setup.py", "constraints"} == set(copied)
    assert all((ROOT / source).exists() for source in copied)
    sent = (ROOT / ".dockerignore").read_text().splitlines()[1:]
    assert sent[0] == "*" and {line[1:] for line in sent if line[0] == "!"} == set(copied)
    version = re.search(r"^FROM python:3\.(\d+)", "\n".join(lines), flags=re.MULTILINE)[1]
    (constraints,) = re.findall(r"-c (\S+)", "\n".join(lines))
    assert constraints == f"constraints/py3{version}.txt" and (ROOT / constraints).exists()
    (extra,) = re.findall(r"^ARG EXTRA=(\w+)$", "\n".join(lines), flags=re.MULTILINE)
    assert f'"{extra}": [' in (ROOT / "setup.py").read_text()
    command = json.loads(lines[-1].removeprefix("CMD "))
    assert command[:3] == ["python", "-m", "opsd_jax.train"]


# --- who belongs to the run -----------------------------------------------------------------------


@pytest.fixture
def alone(monkeypatch):
    """No trace of a cluster; jax.distributed must not be called."""
    for name in list(os.environ):
        if name.startswith(("OPSD_", "SLURM_", "TPU_WORKER", "TPU_PROCESS", "MEGASCALE_")):
            monkeypatch.delenv(name)
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    called = []
    monkeypatch.setattr("jax.distributed.initialize", lambda **kwargs: called.append(kwargs))
    yield monkeypatch
    assert called == []


def test_a_single_process_joins_nothing(alone):
    assert distributed.initialize() is False


def test_one_process_by_name_looks_for_no_cluster(alone):
    alone.setenv("OPSD_NUM_PROCESSES", "1")
    alone.setattr(distributed, "cluster_size", lambda: pytest.fail("looked for a cluster"))
    assert distributed.initialize() is False


@pytest.mark.parametrize(
    "given, message",
    [
        ({"OPSD_COORDINATOR": "h:1"}, "OPSD_NUM_PROCESSES, OPSD_PROCESS_ID not"),
        ({"OPSD_NUM_PROCESSES": "2"}, "OPSD_COORDINATOR, OPSD_PROCESS_ID not"),
        (
            {"OPSD_COORDINATOR": "h", "OPSD_NUM_PROCESSES": "2", "OPSD_PROCESS_ID": "0"},
            "give HOST:PORT",
        ),
        (
            {"OPSD_COORDINATOR": "h:1", "OPSD_NUM_PROCESSES": "2", "OPSD_PROCESS_ID": "2"},
            "from 0 to 1",
        ),
        (
            {"OPSD_COORDINATOR": "h:1", "OPSD_NUM_PROCESSES": "two", "OPSD_PROCESS_ID": "0"},
            "OPSD_NUM_PROCESSES=two",
        ),
        ({"OPSD_TIMEOUT_S": "0"}, "OPSD_TIMEOUT_S=0"),
    ],
)
def test_wrong_environment_is_named(alone, given, message):
    for name, value in given.items():
        alone.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        distributed.initialize()


def test_slurm_is_found_in_a_step_only(alone):
    for name, value in {"SLURM_NTASKS": "16", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}.items():
        alone.setenv(name, value)
    assert distributed.cluster_size() == 1  # the batch script
    alone.setenv("SLURM_STEP_NODELIST", "node[1-2]")
    assert distributed.cluster_size() == 16


@pytest.mark.parametrize(
    "endpoints, slices, size",
    [
        ("a,b,c,d", "", 4),
        ("a", "", 1),
        ("", "", 1),
        ("a,b", "ZONE: 'z'\nMEGASCALE_NUM_SLICES: '3'\n", 6),
    ],
)
def test_tpu_vms_ask_their_metadata(alone, endpoints, slices, size):
    alone.setattr(distributed.importlib.util, "find_spec", lambda name: name)
    alone.setattr(
        distributed, "_metadata", {"worker-network-endpoints": endpoints, "tpu-env": slices}.get
    )
    alone.setattr(distributed.glob, "glob", lambda pattern: [])
    assert distributed.cluster_size() == 1  # no chips
    alone.setattr(
        distributed.glob, "glob", lambda pattern: ["/dev/accel0"] if "accel" in pattern else []
    )
    assert distributed.cluster_size() == size
    alone.setenv("JAX_PLATFORMS", "cpu")
    assert distributed.cluster_size() == 1


def test_a_lost_peer_is_told_from_an_error():
    import jax

    lost = jax.errors.JaxRuntimeError(
        "UNAVAILABLE: Gloo all-reduce failed: Connection closed by peer"
    )
    wrapped = OSError("writing checkpoint 3 failed")
    wrapped.__cause__ = lost
    assert distributed.peer_is_lost(lost) and distributed.peer_is_lost(wrapped)
    assert not distributed.peer_is_lost(
        jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")
    )
    assert not distributed.peer_is_lost(ValueError("connection reset"))


# --- really several processes ---------------------------------------------------------------------

SUM = """
from opsd_jax.runtime import distributed
assert distributed.initialize()
import jax, sys, time
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import numpy as np
mesh = Mesh(np.array(jax.devices()), "d")
mine = np.arange(2.0) + 10 * jax.process_index()
rows = jax.make_array_from_process_local_data(NamedSharding(mesh, PartitionSpec("d")), mine)
add = jax.jit(jax.shard_map(lambda x: jax.lax.psum(x, "d"), mesh=mesh, in_specs=PartitionSpec("d"),
                            out_specs=PartitionSpec()))
# a line of its own: Gloo's threads write theirs to the same stdout, in pieces
devices = jax.local_device_count(), jax.device_count()
print("\\nsum", jax.process_index(), *devices, float(add(rows)[0]))
"""


def local(count, program, **variables):
    started = time.monotonic()
    result = bash("local_multiprocess.sh", count, "--", sys.executable, "-c", program, **variables)
    return result, time.monotonic() - started


def test_two_processes_with_two_devices_each_agree_on_a_sum():
    result, _ = local(2, SUM)
    assert result.returncode == 0, result.stdout + result.stderr
    said = [line for line in result.stdout.splitlines() if re.match(r"\[\d\] sum ", line)]
    assert sorted(said) == ["[0] sum 0 2 4 22.0", "[1] sum 1 2 4 22.0"]


def test_one_that_fails_ends_the_others():
    program = SUM + "if jax.process_index(): raise KeyError('my own mistake')\ntime.sleep(60)"
    result, seconds = local(2, program)
    assert result.returncode == 1 and seconds < 40, result.stdout
    assert "[1] KeyError: 'my own mistake'" in result.stdout
    assert re.search(
        r"^\[1\] process 1 of 2 on \S+: failed by itself", result.stdout, flags=re.MULTILINE
    )
    assert "process 1 of 2 ended with code 1" in result.stderr


def test_wrong_arguments_of_one_end_it_at_once():
    """It does not wait to leave together with those that wait for it."""
    program = (
        SUM + "if jax.process_index(): distributed.end_with_error(ValueError('no such row'))\n"
        "time.sleep(60)"
    )
    result, seconds = local(2, program)
    assert result.returncode == 1 and seconds < 40, result.stdout
    assert "[1] error: no such row\n" in result.stdout


def test_one_that_waits_for_another_says_so():
    command = [sys.executable, "-c", SUM]
    given = {
        "OPSD_COORDINATOR": "127.0.0.1:19",
        "OPSD_NUM_PROCESSES": 2,
        "OPSD_PROCESS_ID": 1,
        "OPSD_TIMEOUT_S": 1,
    }
    result = subprocess.run(
        command, env=environment(**given), capture_output=True, text=True, timeout=60
    )
    assert result.returncode == distributed.EXIT_PEER_LOST
    assert re.search(
        r"process 1 of 2 on \S+ waited 1 s .* \(coordinator 127.0.0.1:19\)", result.stderr
    )


def test_launcher_hands_sigterm_on():
    program = (
        "import signal, sys, time; signal.signal(15, lambda *_: "
        "sys.exit(42)); print('up'); time.sleep(60)"
    )
    process = subprocess.Popen(
        ["bash", LAUNCH / "local_multiprocess.sh", "2", "--", sys.executable, "-c", program],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert sorted(process.stdout.readline() for _ in range(2)) == ["[0] up\n", "[1] up\n"]
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 42
    process.stdout.close()


TRAIN = """
import sys
from absl import flags
flags.FLAGS.mark_as_parsed()
from opsd_jax.runtime import distributed
distributed.initialize()
print("joined", flush=True)
sys.path.insert(0, {tests!r})
import small_run
from opsd_jax import train
train.train(small_run.config(stages=("warmup",), warmup__steps=120, eval__every=0,
                             eval__final_split="", checkpoint__every={every}), {workdir!r})
"""


def two_processes(workdir, tmp_path_factory, every, **variables):
    """A run of two processes with two devices each, begun: ([processes], program, environment of
    both).
    """
    import small_run

    program = TRAIN.format(tests=str(ROOT / "tests"), workdir=str(workdir), every=every)
    given = environment(
        **{
            k: v for k, v in small_run.environment(tmp_path_factory).items() if k.startswith("JAX_")
        },
        XLA_FLAGS=xla_flags.devices(2),
        OPSD_NUM_PROCESSES=2,
        OPSD_COORDINATOR=f"127.0.0.1:{20000 + os.getpid() % 20000}",
        **variables,
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program],
            env=given | {"OPSD_PROCESS_ID": str(n)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for n in range(2)
    ]
    return processes, program, given


def finish_alone(workdir, program, given, devices):
    """One process continues a run of two to its end."""
    alone = given | {
        "OPSD_NUM_PROCESSES": "1",
        "XLA_FLAGS": xla_flags.devices(devices),
    }
    del alone["OPSD_COORDINATOR"]
    result = subprocess.run(
        [sys.executable, "-c", program], env=alone, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr[-3000:]
    rows = (workdir / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in rows] == list(range(1, 121))


@pytest.mark.slow
def test_sigterm_to_one_process_saves_the_same_step_in_all(tmp_path, tmp_path_factory):
    """And one process alone, on as many devices, finishes what two have begun."""
    workdir = tmp_path / "run"
    processes, program, given = two_processes(
        workdir, tmp_path_factory, every=1000, OPSD_TIMEOUT_S=120
    )
    rows = workdir / "metrics.jsonl"
    wait_for(
        lambda: (
            (rows.exists() and rows.read_text().count("\n") >= 2)
            or any(p.poll() for p in processes)
        ),
        300,
    )
    processes[1].send_signal(signal.SIGTERM)
    said = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [42, 42], said
    (step,) = [
        int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit()
    ]
    assert 2 <= step < 120
    # continued, and stopped again before its first step
    processes, _, _ = two_processes(workdir, tmp_path_factory, every=1000, OPSD_TIMEOUT_S=120)
    assert any("joined" in line for line in processes[1].stdout)
    processes[1].send_signal(signal.SIGTERM)
    said = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [42, 42], said
    assert (
        max(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit())
        <= step + 2
    )
    finish_alone(workdir, program, given, devices=4)


COMMANDS = """
import sys, time
from opsd_jax import eval as eval_command
from opsd_jax.diagnose import __main__ as diagnose

def batches(*args):
    for n in range(600):
        args[-1]()  # before each batch
        print("batch", n, flush=True)
        time.sleep(0.05)

eval_command.evaluate.evaluate = diagnose._run = batches
module, *arguments = {"eval": [eval_command], "diagnose": [diagnose, "kl"]}[sys.argv[1]]
module.main([*arguments, "--workdir=w"])
"""


@pytest.mark.slow
@pytest.mark.parametrize("command", ["eval", "diagnose"])
def test_sigterm_to_one_process_stops_all_of_a_command(command):
    """After the same batch; JAX has the handler of the signal, and the commands ask it."""
    given = environment(
        OPSD_NUM_PROCESSES=2, OPSD_COORDINATOR=f"127.0.0.1:{20000 + os.getpid() % 20000}"
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", COMMANDS, command],
            env=given | {"OPSD_PROCESS_ID": str(n)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for n in range(2)
    ]
    assert any("batch" in line for line in processes[1].stdout)
    processes[1].send_signal(signal.SIGTERM)
    said = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [42, 42], said
    done = [int(re.findall(r"batch (\d+)", text)[-1]) for text in said]
    assert done[0] == done[1] < 599
    assert all("stopped as asked; the same command" in text for text in said)


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_is_missed_in_time_and_the_run_goes_on(tmp_path, tmp_path_factory, victim):
    """The other one ends with a message and a code that says so; one process on one device finishes
    the run.
    """
    workdir, timeout = tmp_path / "run", 20
    processes, program, given = two_processes(
        workdir, tmp_path_factory, every=4, OPSD_TIMEOUT_S=timeout
    )

    def steps():
        return [
            int(path.name)
            for path in (workdir / "checkpoints").glob("[0-9]*")
            if path.name.isdigit()
        ]

    wait_for(lambda: steps() or any(p.poll() for p in processes), 300)
    processes[victim].kill()
    started = time.monotonic()
    said = processes[1 - victim].communicate(timeout=300)[0]
    assert time.monotonic() - started < timeout + 30
    assert processes[victim].wait() == -signal.SIGKILL
    code = processes[1 - victim].returncode
    assert code in (distributed.EXIT_PEER_LOST, -signal.SIGABRT), said[-3000:]
    assert re.search(
        r"another process is gone|task.*(unhealthy|heartbeat)|leader|coordination", said
    ), said[-3000:]
    assert max(steps()) < 120
    finish_alone(workdir, program, given, devices=1)
