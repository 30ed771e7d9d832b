"""A command on a TPU slice of GKE, from your own machine: starts it, and waits until it has ended.

  launch/gke.sh NAME -- COMMAND...   starts the command as the JobSet NAME, or waits for it if it
                                     runs already; one of this name that has ended is replaced
  launch/gke.sh NAME                 waits for one that was started
  kubectl delete jobset NAME         its Pods save and stop; the same command continues

  launch/gke.sh doctor -- python -m opsd_jax.doctor --workdir=runs/doctor

The JobSet is that of the folder launch/gke/TYPE, with another name, image, bucket and command. As
on a TPU VM, the bucket is the folder runs/ of the checkout.

Variables of the environment:

  TYPE      a folder of launch/gke: v5p-16, v6e-16, ...
  IMAGE     of launch/Dockerfile, in a registry; :latest if it names no tag
  BUCKET    of the runs
  WAIT_S    how long it may wait for nodes (7200); it is deleted then, so that none come unseen
  MAX_S     how long it may take in all (86400); it is deleted then. The cluster ends it, too, if
            nothing waits for it here, but counts anew when it starts it again
  POLL_S    seconds between two questions for its state (30)
  DRY_RUN   1: prints the JobSet, and starts nothing

Exit codes: 0 done, 1 failed, 43 it was deleted by someone else, or no nodes came, 124 not done
within MAX_S; after the last two the same command continues.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pathlib
import re
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import Any

import calls
from calls import LaunchError

FAILED, LOST, OVER = calls.FAILED, 43, 124
FOLDER = pathlib.Path(__file__).resolve().parent / "gke"
_PATIENCE_S = 120  # for an answer of kubectl
_DELETE_S = 900  # for deleting a JobSet, whose Pods have 300 s to save
_TROUBLE_S = 600  # as long as containers may take to start, while their node is billed
_STARTING = ("ContainerCreating", "PodInitializing")
_LABEL = "jobset.sigs.k8s.io/jobset-name"
_JOB = "/spec/replicatedJobs/0/template/spec"
_POD = f"{_JOB}/template/spec"
_MOUNT = "/opsd/runs"  # runs/ in the working folder of launch/Dockerfile


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the environment asks for, checked; seconds as in the variables."""

    type: str
    image: str
    bucket: str
    wait_s: int
    max_s: int
    poll_s: int
    dry: bool


def read_settings(environment: Mapping[str, str], *, starts: bool) -> Settings:
    """The settings; LaunchError names the variable that is wrong, and what it may be.

    starts: a command is started, which needs TYPE, IMAGE and BUCKET.
    """
    place = {name: environment.get(name, "") for name in ("TYPE", "IMAGE", "BUCKET")}
    for name, value in place.items():
        if starts and not value:
            raise LaunchError(f"{name} is not set: {name}=... launch/gke.sh NAME -- COMMAND...")
    folders = sorted(path.parent.name for path in FOLDER.glob("*/kustomization.yaml"))
    if starts and place["TYPE"] not in folders:
        raise LaunchError(f"TYPE={place['TYPE']}: give a folder of {FOLDER}: {', '.join(folders)}")
    bucket = place["BUCKET"].removeprefix("gs://").rstrip("/")
    if not re.fullmatch(r"[\w.-]*", bucket):
        raise LaunchError(f"BUCKET={bucket}: give the name of a bucket alone")
    return Settings(
        type=place["TYPE"],
        image=place["IMAGE"],
        bucket=bucket,
        wait_s=calls.number(environment, "WAIT_S", 7200),
        max_s=calls.number(environment, "MAX_S", 86400, 1),
        poll_s=calls.number(environment, "POLL_S", 30),
        dry=environment.get("DRY_RUN", "0") == "1",
    )


def check_name(name: str) -> None:
    """Raises LaunchError for a name that Kubernetes, or the names of its Pods, do not allow."""
    if not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name) or len(name) > 40:
        raise LaunchError(
            f"NAME {name!r}: give small letters, digits and -, at most 40, a letter first"
        )


def hosts(folder: str) -> int:
    """Number of Pods of the JobSet of a folder of launch/gke, of all slices together."""
    text = (FOLDER / folder / "kustomization.yaml").read_text(encoding="utf-8")
    return math.prod(map(int, re.findall(r"/(?:replicas|parallelism), value: (\d+)}", text)))


def changes(settings: Settings, name: str, words: Sequence[str]) -> list[dict[str, Any]]:
    """What differs from the JobSet of the folder, as operations of a JSON patch."""
    container, image = f"{_POD}/containers/0", settings.image
    if "@" not in image and ":" not in image.rpartition("/")[2]:
        image += ":latest"
    values = {
        "/metadata/name": name,
        f"{_JOB}/activeDeadlineSeconds": settings.max_s,
        f"{container}/image": image,
        f"{container}/command": list(words),
        f"{container}/volumeMounts/0/mountPath": _MOUNT,
        f"{_POD}/volumes/0/csi/volumeAttributes/bucketName": settings.bucket,
    }
    return [{"op": "replace", "path": path, "value": value} for path, value in values.items()]


def jobset(settings: Settings, name: str, words: Sequence[str]) -> str:
    """The JobSet as YAML, built by `kubectl kustomize`."""
    with tempfile.TemporaryDirectory() as folder:
        here = os.path.realpath(folder)
        kustomization = {
            "apiVersion": "kustomize.config.k8s.io/v1beta1",
            "kind": "Kustomization",
            "resources": [os.path.relpath(FOLDER / settings.type, here)],  # no absolute path
            "patches": [
                {
                    "target": {"kind": "JobSet"},
                    "patch": json.dumps(changes(settings, name, words)),
                }
            ],
        }
        path = os.path.join(here, "kustomization.yaml")
        with open(path, "w", encoding="utf-8") as file:
            json.dump(kustomization, file)  # JSON is YAML
        return _kubectl("kustomize", "--load-restrictor", "LoadRestrictionsNone", here)


def command_of(found: Mapping[str, Any]) -> list[str]:
    """The command of a JobSet as the cluster has it."""
    job = found["spec"]["replicatedJobs"][0]["template"]["spec"]
    return job["template"]["spec"]["containers"][0]["command"]


def runs(found: Mapping[str, Any]) -> bool:
    """Whether all Pods of a JobSet run, or have run."""
    wanted = sum(job["replicas"] for job in found["spec"]["replicatedJobs"])
    status = found.get("status", {}).get("replicatedJobsStatus", [])
    return sum(job.get("ready", 0) for job in status) >= wanted


def troubles(pods: Mapping[str, Any]) -> dict[str, str]:
    """{reason: name of a Pod}: why containers that have a node do not run, as ImagePullBackOff.

    ContainerCreating is one, too: images are pulled then, and the bucket is mounted, or cannot be.
    """
    found: dict[str, str] = {}
    for pod in pods["items"]:
        status = pod.get("status", {})
        if status.get("phase") != "Pending" or not pod["spec"].get("nodeName"):
            continue
        containers = [status.get(f"{kind}Statuses", []) for kind in ("initContainer", "container")]
        states = [container.get("state", {}) for container in sum(containers, [])]
        reasons = [state["waiting"]["reason"] for state in states if "waiting" in state]
        for reason in reasons or _STARTING[:1]:
            found.setdefault(reason, pod["metadata"]["name"])
    return found


@dataclasses.dataclass(frozen=True)
class Job:
    """The JobSet of a name."""

    settings: Settings
    name: str

    def start(self, words: Sequence[str]) -> None:
        """Applies the JobSet, unless it runs already. LaunchError if it runs another command."""
        kind = self.settings.type
        calls.refuse_on_several_hosts(
            words,
            hosts(kind),
            f"{kind} has {hosts(kind)} hosts. Start it on one machine, and copy what it made into "
            "the bucket (docs/guides/reproduce-paper.md, step 5)",
        )
        if self.settings.dry:
            print(jobset(self.settings, self.name, words), end="")
            return
        found = self.get()
        if found and not found.get("status", {}).get("terminalState"):
            if command_of(found) != list(words):
                raise LaunchError(
                    f"{self.name} runs another command: kubectl delete jobset {self.name}, which "
                    "saves and stops it, or take another NAME"
                )
            print(f"{self.name} runs already", flush=True)
            return
        text = jobset(self.settings, self.name, words)
        if found:
            self.delete()
        print(_kubectl("apply", "-f", "-", given=text), end="", flush=True)

    def wait(self) -> int:
        """Waits until the command has ended: 0, FAILED, LOST or OVER, which the last line says."""
        s, start = self.settings, time.monotonic()
        end, ran, fine, said = start + s.max_s, start, start, ""
        while True:
            try:
                found = self.get()
            except LaunchError as error:  # this machine may be cut off
                now, found = f"cannot be asked ({error})", None
                ran = fine = time.monotonic()
            else:
                if found is None:
                    self._say("no longer exists: it was deleted by someone else")
                    return LOST
                if ended := found.get("status", {}).get("terminalState"):
                    self._print_log()
                    self._say(_how(found))
                    return 0 if ended == "Completed" else FAILED
                trouble = {} if runs(found) else self._troubles()
                now = self._progress(found, trouble)
                ran = time.monotonic() if runs(found) else ran
                fine = time.monotonic() if not trouble else fine
            if now != said:
                self._say(now)
                said = now
            if found and time.monotonic() - fine > _TROUBLE_S:
                self._print_warnings(sorted(set(trouble.values())))
                self._print_log()
                reasons = ", ".join(sorted(trouble))
                return self._end(f"has not started within {_TROUBLE_S} s ({reasons})", FAILED)
            if found and time.monotonic() - ran > s.wait_s:
                return self._end(f"has not started within WAIT_S={s.wait_s} s", LOST)
            if time.monotonic() > end:
                return self._end(f"has not ended within MAX_S={s.max_s} s", OVER)
            time.sleep(s.poll_s)

    def get(self) -> dict[str, Any] | None:
        """The JobSet as the cluster has it, or None. LaunchError if kubectl cannot say."""
        answer = _ask("get", "jobset", self.name, "--output=json")
        if answer.code == 0:
            return json.loads(answer.out)
        if "(NotFound)" in answer.err:
            return None
        raise LaunchError((answer.err.strip().splitlines() or ["kubectl said nothing"])[-1])

    def delete(self) -> None:
        """Deletes the JobSet, asking again until there is none; LaunchError if there still is."""
        end = time.monotonic() + 3600
        while True:
            answer = _ask("delete", "jobset", self.name, "--ignore-not-found", limit_s=_DELETE_S)
            if answer.code == 0:
                return
            if time.monotonic() > end:
                raise LaunchError(
                    f"STILL BILLED: {self.name} could not be deleted within an hour "
                    f"({answer.err.strip()}): kubectl delete jobset {self.name}"
                )
            self._say(f"could not be deleted ({answer.err.strip()}); trying again")
            time.sleep(self.settings.poll_s)

    def _end(self, why: str, code: int) -> int:
        self._say(f"{why}: deleting it, so that nothing is billed")
        self.delete()
        return code

    def _say(self, what: str) -> None:
        print(f"{self.name} {what}", flush=True)

    def _progress(self, found: Mapping[str, Any], trouble: Mapping[str, str]) -> str:
        restarts = found.get("status", {}).get("restarts", 0)
        again = f", started again {restarts} times" if restarts else ""
        if failing := sorted(set(trouble) - set(_STARTING)):
            return f"does not start: {', '.join(failing)}{again}"
        if trouble:
            return f"has nodes; its containers are created{again}"
        if not runs(found):
            return f"waits for nodes and Pods{again}"
        log = f"kubectl logs -f -l {_LABEL}={self.name} -c train --prefix --tail=-1"
        return f"runs{again}; its log: {log} --max-log-requests=64"

    def _troubles(self) -> dict[str, str]:
        answer = _ask("get", "pods", f"--selector={_LABEL}={self.name}", "--output=json")
        return troubles(json.loads(answer.out)) if answer.code == 0 else {}

    def _print_warnings(self, pods: Sequence[str]) -> None:
        """What the cluster says of Pods that do not start, such as a missing bucket."""
        lines = '{range .items[*]}{.involvedObject.name} {.reason}: {.message}{"\\n"}{end}'
        for pod in pods:
            which = f"--field-selector=involvedObject.name={pod},type=Warning"
            answer = _ask("get", "events", which, f"--output=jsonpath={lines}")
            print(answer.out or answer.err, end="", flush=True)

    def _print_log(self) -> None:
        """The last lines of each Pod, where there is one."""
        options = ["--container=train", "--prefix", "--tail=20", "--max-log-requests=64"]
        answer = _ask("logs", f"--selector={_LABEL}={self.name}", *options)
        print(answer.out or answer.err, end="", flush=True)


def _how(found: Mapping[str, Any]) -> str:
    """How a JobSet ended, in words."""
    status = found["status"]
    reasons = [
        condition.get("message", "")
        for condition in status.get("conditions", [])
        if condition["type"] == status["terminalState"]
    ]
    return " ".join(["is", status["terminalState"] + ":", *reasons])


def _ask(*words: str, limit_s: float = _PATIENCE_S, given: str | None = None) -> calls.Answer:
    (answer,) = calls.answers([["kubectl", *words]], capture=True, limit_s=limit_s, given=given)
    return answer


def _kubectl(*words: str, given: str | None = None) -> str:
    """What kubectl prints; LaunchError if it fails."""
    answer = _ask(*words, given=given)
    if answer.code:
        raise LaunchError(f"kubectl {words[0]}: {answer.err.strip()}")
    return answer.out


def main(words: Sequence[str]) -> int:
    """The command; its exit code."""
    goes_on = (
        "what was started goes on, and is billed (launch/gke.sh NAME waits for it, kubectl delete "
        "jobset NAME ends it)"
    )
    return calls.ended(_main, words, goes_on)


def _main(words: Sequence[str]) -> int:
    name, *rest = words or [""]
    if not name or name.startswith("-") or (rest and (rest[0] != "--" or len(rest) < 2)):
        raise LaunchError(f"usage:\n{__doc__}")
    check_name(name)
    job = Job(read_settings(os.environ, starts=bool(rest)), name)
    if rest:
        job.start(rest[1:])
    elif not job.settings.dry and job.get() is None:
        raise LaunchError(f"there is no JobSet {name}: launch/gke.sh {name} -- COMMAND...")
    return 0 if job.settings.dry else job.wait()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
