"""The JobSets of launch/gke against the schema of JobSet's custom resource definition.

jobset_schema.json has the part of it that these files use. To use another field or version:

  PYTHONPATH=.:tests python tests/launch/test_jobset_schema.py jobset.x-k8s.io_jobsets.yaml

with that file of https://github.com/kubernetes-sigs/jobset, config/components/crd/bases.
"""

import copy
import functools
import json
import pathlib
import sys

import pytest
import yaml
from test_launch import SLICES, overlaid

from stand_ins import ROOT

VERSION = "v0.12.0"  # of JobSet
PINNED = pathlib.Path(__file__).with_name("jobset_schema.json")
KEPT = ("type", "enum", "required", "additionalProperties")
TYPES = {"string": str, "integer": int, "boolean": bool, "object": dict, "array": list}


def used(schema: dict, value) -> dict:
    """The part of a schema that a value uses; KeyError names a field that the schema lacks."""
    found = {key: schema[key] for key in KEPT if key in schema}
    if schema.get("x-kubernetes-int-or-string"):
        found["type"] = ["integer", "string"]
    if isinstance(value, dict) and "properties" in schema:
        found["properties"] = {key: used(schema["properties"][key], value[key]) for key in value}
    elif isinstance(value, list):
        found["items"] = {}
        for item in value:
            merge(found["items"], used(schema["items"], item))
    return found


def merge(into: dict, other: dict) -> None:
    """Adds what another value uses."""
    for key, value in other.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            merge(into[key], value)
        else:
            into[key] = copy.deepcopy(value)


def errors(schema: dict, value, place: str = "") -> list[str]:
    """What the API server would refuse, unknown fields included."""
    kinds = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
    if not any(type(value) is TYPES[kind] for kind in kinds):
        return [f"{place}: {value!r} is no {' or '.join(kinds)}"]
    found = []
    if "enum" in schema and value not in schema["enum"]:
        found.append(f"{place}: {value!r} is none of {schema['enum']}")
    if isinstance(value, dict):
        found += [
            f"{place}: {key} is missing" for key in schema.get("required", []) if key not in value
        ]
        free = schema.get("additionalProperties")
        for key, item in value.items():
            inner = schema.get("properties", {}).get(key, free)
            if inner:
                found += errors(fix(inner), item, f"{place}/{key}")
            elif schema.get("properties") is not None:
                found.append(f"{place}/{key}: not in the pinned schema")
    elif isinstance(value, list):
        for n, item in enumerate(value):
            found += errors(schema["items"], item, f"{place}/{n}")
    return found


def fix(schema: dict) -> dict:
    """`type` of a quantity, which may be a number or a string."""
    if schema.get("x-kubernetes-int-or-string"):
        return schema | {"type": ["integer", "string"]}
    return schema


@functools.cache
def jobsets() -> dict[str, dict]:
    """{folder of launch/gke: its JobSet}."""
    return {name: overlaid(name) for name in SLICES}


def changed(jobset, place: str, value) -> dict:
    """A copy with another value, or without one (None)."""
    found = copy.deepcopy(jobset)
    *way, last = [int(key) if key.isdigit() else key for key in place.split("/")]
    parent = found
    for key in way:
        parent = parent[key]
    if value is None:
        del parent[last]
    else:
        parent[last] = value
    return found


@pytest.fixture(scope="module")
def schema():
    return json.loads(PINNED.read_text())


@pytest.mark.parametrize("name", sorted(jobsets()))
def test_a_jobset_is_valid(schema, name):
    assert errors(schema, jobsets()[name]) == []


def test_the_guide_installs_the_version_of_the_schema():
    guide = (ROOT / "docs/guides/several-machines.md").read_text(encoding="utf-8")
    assert f"/jobset/releases/download/{VERSION}/manifests.yaml" in guide


POD = "spec/replicatedJobs/0/template/spec/template/spec"


@pytest.mark.parametrize(
    "place, value, says",
    [
        ("spec/failurePolicy/maxRestart", 3, "maxRestart: not in the pinned schema"),
        ("spec/failurePolicy/restartStrategy", "Never", "'Never' is none of"),
        ("spec/replicatedJobs/0/replicas", "2", "'2' is no integer"),
        ("spec/replicatedJobs/0/name", None, "name is missing"),
        (f"{POD}/containers/0/securityContext/privileged", "true", "'true' is no boolean"),
        (f"{POD}/containers/0/env/0/value", 900, "900 is no string"),
        (f"{POD}/volumes/0/csi/driver", None, "driver is missing"),
    ],
)
def test_mistakes_are_found(schema, place, value, says):
    (found,) = errors(schema, changed(jobsets()["v5e-16"], place, value))
    assert says in found


def main(path: str) -> None:
    definition = yaml.safe_load(pathlib.Path(path).read_text())
    (version,) = definition["spec"]["versions"]
    whole, found = version["schema"]["openAPIV3Schema"], {}
    whole["properties"]["metadata"] = {  # of every object, which the definition leaves out
        "type": "object",
        "properties": {
            "name": {"type": "string"},
            "annotations": {"type": "object", "additionalProperties": {"type": "string"}},
        },
    }
    for jobset in jobsets().values():
        merge(found, used(whole, jobset))
    PINNED.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
