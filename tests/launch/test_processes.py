"""A run of two processes with four devices each computes what one process with one device does.

The processes exist as children only (this file, run by launch/local_multiprocess.sh): they join by
`distributed.initialize`, go through the meshes of `test_meshes.run`, every process with its own
rows, and assemble the batches of a small data set; the first leaves .npz files.
"""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

import small_run
import xla_flags

COUNT, DEVICES, STEPS = 2, 4, (0, 5)
# (data, fsdp, tensor): micro steps. Processes hold one half each of `fsdp`, of `data`, or of every
# row.
MESHES = {(1, 4, 2): 1, (2, 2, 2): 2, (1, 1, 8): 1}
BATCH = 8


def batches(data_dir, workdir, share=None, **changes):
    """data.Batches of the OPSD stage over the rows of small_run.py."""
    from opsd_jax import config as config_lib
    from opsd_jax import tokenizer
    from opsd_jax.data import batches as batches_lib
    from opsd_jax.data import packing
    from opsd_jax.data import workdir as workdir_lib

    config = small_run.config(data__dir=str(data_dir), opsd__batch_size=BATCH, **changes)
    tok = tokenizer.load(workdir_lib.tokenizer_folder(config.tokenizer, config.data.dir))
    rows = small_run.examples(config, tok)
    return batches_lib.Batches(
        config_lib.batches(config, "opsd"),
        str(workdir),
        rows,
        packing.Packer.from_config(config, tok),
        share=share,
    )


def main(folder, data_dir):
    import faulthandler

    from opsd_jax.runtime import distributed

    faulthandler.dump_traceback_later(
        800, exit=True
    )  # processes that wait for each other for ever say where
    distributed.initialize()
    import jax
    import test_meshes

    from opsd_jax import sharding

    me = jax.process_index()
    folder = pathlib.Path(folder)

    def leave(name, found):
        if me == 0:
            np.savez(folder / f"{name}.npz", **found)

    mesh = sharding.make_mesh(1, -1, 1)
    mine = batches(data_dir, folder, sharding.local_batch_indices(mesh, BATCH))
    for step in STEPS:
        batch = sharding.put_batch(mesh, mine.opsd(step)[0])
        leave(f"batch{step}", {f"{n}": x for n, x in enumerate(test_meshes.whole(mesh, batch))})
    for sizes, accumulation in MESHES.items():
        mesh = sharding.make_mesh(*sizes)
        found = test_meshes.run(
            mesh, accumulation, np.array(sharding.local_batch_indices(mesh, test_meshes.ROWS))
        )
        leave(
            test_meshes.name_of(sizes),
            jax.tree.map(np.asarray, found) | {"here": jax.local_device_count()},
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
    sys.exit()


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    from opsd_jax.data import procedural

    made = tmp_path_factory.mktemp("rows")
    procedural.make_procedural(str(made), small_run.config().data.make.to_dict())
    return made


# --- who reads which rows -------------------------------------------------------------------------


def half(process, processes):
    return range(process * BATCH // processes, (process + 1) * BATCH // processes)


@pytest.mark.parametrize("processes", [2, 4, BATCH])
def test_processes_share_the_batch_that_one_would_have(data_dir, tmp_path, processes):
    import jax

    one = batches(data_dir, tmp_path)
    parts = [batches(data_dir, tmp_path, half(n, processes)) for n in range(processes)]
    for step in STEPS:
        batch, rows = one.opsd(step)
        found = [part.opsd(step) for part in parts]
        pids = [[row.example.pid for row in prepared] for _, prepared in found]
        assert {len(names) for names in pids} == {BATCH // processes}
        assert sum(pids, []) == [row.example.pid for row in rows]
        assert len(set(sum(pids, []))) == BATCH  # the rows of two processes are never the same
        together = jax.tree.map(lambda *xs: np.concatenate(xs), *(part for part, _ in found))
        jax.tree.map(np.testing.assert_array_equal, together, batch)
    assert pids != [[row.example.pid for row in part.opsd(STEPS[0])[1]] for part in parts]


# --- really two processes -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two(data_dir, tmp_path_factory):
    """{file: what the processes found}."""
    here, folder = pathlib.Path(__file__).resolve(), tmp_path_factory.mktemp("two")
    env = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(("OPSD_", "SLURM_", "XLA_FLAGS"))
    }
    env |= {
        "DEVICES": str(DEVICES),
        "XLA_FLAGS": xla_flags.QUICK,
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "PYTHONPATH": os.pathsep.join(map(str, here.parents[1:3])),
    }
    launcher = here.parents[2] / "launch" / "local_multiprocess.sh"
    command = ["bash", launcher, str(COUNT), "--", sys.executable, here, folder, data_dir]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    return {path.stem: dict(np.load(path)) for path in folder.glob("*.npz")}


@pytest.fixture(scope="module")
def one():
    """The same in this process, on one device."""
    import jax
    import test_meshes

    import tiny
    from opsd_jax import sharding

    with tiny.quick_compiles():
        found = test_meshes.run(sharding.make_mesh(*test_meshes.ONE, devices=jax.devices()[:1]), 1)
    return jax.tree.map(np.asarray, found)


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("step", STEPS)
def test_two_processes_put_the_same_batch_on_their_devices(two, data_dir, tmp_path, step):
    import jax

    batch, _ = batches(data_dir, tmp_path).opsd(step)
    found = two[f"batch{step}"]
    for n, leaf in enumerate(jax.tree.leaves(batch)):
        np.testing.assert_array_equal(found[f"{n}"], leaf)


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("sizes", MESHES, ids=lambda sizes: "x".join(map(str, sizes)))
def test_two_processes_compute_what_one_does(two, one, sizes):
    found = two["x".join(map(str, sizes))]
    assert found["here"] == DEVICES < np.prod(sizes) == COUNT * DEVICES
    np.testing.assert_array_equal(found["rollout_tokens"], one["rollout_tokens"])
    np.testing.assert_allclose(found["losses"], one["losses"], rtol=0, atol=1e-5)
    assert found["resharded"] == 0 and found["deleted"] and found["update_programs"] == 1
    assert found.keys() >= one.keys() and sum(key.startswith("grad") for key in one) > 40
    for key in one:
        if key.startswith(("grad", "leaf")):
            atol = 1e-6 if key.startswith("grad") else 1e-5
            np.testing.assert_allclose(found[key], one[key], rtol=0, atol=atol, err_msg=key)


# --- whole commands -------------------------------------------------------------------------------


def module(name, *arguments, processes=1):
    """Runs `python -m opsd_jax.<name>` as one process with one device or as several with four
    each.
    """
    here = pathlib.Path(__file__).resolve().parents[2]
    env = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(("OPSD_", "SLURM_", "XLA_FLAGS"))
    }
    env |= {
        "DEVICES": str(DEVICES),
        "XLA_FLAGS": xla_flags.QUICK,
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "PYTHONPATH": str(here),
        "JAX_PLATFORMS": "cpu",
    }
    command = [sys.executable, "-m", f"opsd_jax.{name}", *map(str, arguments)]
    if processes > 1:
        command = [
            "bash",
            here / "launch" / "local_multiprocess.sh",
            str(processes),
            "--",
            *command,
        ]
    done = subprocess.run(command, env=env, cwd=here, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, (command, done.stdout[-4000:] + done.stderr[-4000:])


@pytest.fixture(scope="module")
def workdirs(tmp_path_factory):
    """{processes: workdir} of one run, trained by one process and by two."""
    folder, found = tmp_path_factory.mktemp("whole"), {}
    for processes in (1, COUNT):
        found[processes] = folder / f"{processes}"
        module(
            "train",
            *small_run.command(found[processes])[3:],
            "--config.run_arms=noise",
            "--config.log.profile_steps=3,4",
            "--config.data.screen.on=True",
            "--config.data.screen.margin=-10",  # keeps all examples, whatever is rounded
            processes=processes,
        )
    return found


@pytest.mark.long
@pytest.mark.slow
def test_a_whole_run_of_two_processes_is_that_of_one(workdirs):
    """Warm-up, sampling, updates, evaluations, checkpoints and a control arm.

    One process starts the arm as another one, two train it when the run is done.
    """
    from opsd_jax.runtime import metrics

    for of, steps in ((".", small_run.LAST), ("arms/noise", small_run.OPSD)):
        one, two = (metrics.read(str(workdirs[n] / of / "metrics.jsonl")) for n in (1, COUNT))
        assert [(row["step"], row["stage"]) for row in one] == [
            (row["step"], row["stage"]) for row in two
        ]
        assert len(one) >= steps
        for a, b in zip(one, two):
            same = {
                key
                for key in a
                if not key.endswith(("_per_sec", "seconds", "goodput"))
                and not key.startswith("time/")
                and isinstance(a[key], float)
            }
            assert same <= b.keys()
            for key in same:
                np.testing.assert_allclose(
                    b[key], a[key], rtol=1e-4, atol=1e-5, err_msg=f"{of} step {a['step']} {key}"
                )

    def names(n):
        return sorted(p.relative_to(workdirs[n]) for p in (workdirs[n] / "eval").rglob("*"))

    assert names(1) == names(COUNT)

    one, two = (json.loads((workdirs[n] / "report.json").read_text()) for n in (1, COUNT))
    assert [row["arm"] for row in one] == [row["arm"] for row in two] and len(one) >= 4

    one, two = (json.loads((workdirs[n] / "screen.json").read_text()) for n in (1, COUNT))
    for task, found in one["gains"].items():
        assert two["gains"][task]["pid"] == found["pid"] and None not in found["gain"]
        np.testing.assert_allclose(two["gains"][task]["gain"], found["gain"], rtol=1e-3, atol=1e-4)


@pytest.mark.long
@pytest.mark.slow
def test_each_process_writes_its_own_trace(workdirs):
    """Also where they are on one host, by whose name the profiler calls its files."""
    for processes, numbers in ((1, [""]), (COUNT, [f"process{n}-" for n in range(COUNT)])):
        folder = workdirs[processes] / "profile" / "plugins" / "profile" / "000003-000004"
        names = sorted(path.name for path in folder.glob("*.xplane.pb"))
        hosts = {name.removeprefix(number) for name, number in zip(names, numbers, strict=True)}
        assert len(hosts) == 1


@pytest.mark.long
@pytest.mark.slow
def test_two_processes_answer_and_measure_what_one_does(workdirs, tmp_path):
    """Tasks, which all answer together, a public table, of which each takes a share, and the KL."""
    import json

    import test_benchmark_files

    w, tables = workdirs[1], tmp_path / "tables"
    tables.mkdir()
    test_benchmark_files.write(tables, test_benchmark_files.mcq(13))
    for processes in (1, COUNT):
        common = "--workdir", w, "--batch_size=8"
        module(
            "eval",
            *common,
            "--visual_thoughts=real",
            f"--name=tasks{processes}",
            processes=processes,
        )
        module(
            "eval",
            *common,
            f"--data_dir={tables}",
            "--rows=11",
            f"--name=table{processes}",
            processes=processes,
        )
        module(
            "diagnose",
            "kl",
            *common,
            "--rows=12",
            "--completions=base,data",
            f"--name=kl{processes}",
            processes=processes,
        )
        module(
            "diagnose",
            "interventions",
            *common,
            "--rows=5",
            f"--name=interventions{processes}",
            processes=processes,
        )

    def read(name):
        return [json.loads(line) for line in (w / name).read_text().splitlines()]

    for kind, rows in (("tasks", small_run.TEST_ROWS), ("table", 11)):
        one, two = (read(f"eval/{kind}{n}/predictions.jsonl") for n in (1, COUNT))
        assert one == two and len(one) == rows
        assert [p.name for p in (w / "eval" / f"{kind}{COUNT}").glob("answers*")] == [
            "answers.jsonl"
        ]
    one, two = (read(f"diagnose/kl{n}/tokens.jsonl") for n in (1, COUNT))
    assert len(one) == len(two) > 12
    for a, b in zip(one, two):
        assert [a[k] for k in ("task", "index", "labels")] == [
            b[k] for k in ("task", "index", "labels")
        ]
        np.testing.assert_allclose(b["before"], a["before"], atol=1e-5)
    one, two = (
        json.loads((w / f"diagnose/interventions{n}/summary.json").read_text()) for n in (1, COUNT)
    )
    assert one["tasks"] == two["tasks"]
    for mode, shares in one["attention_of_the_answers"].items():
        for part, share in shares.items():
            found = two["attention_of_the_answers"][mode][part]
            np.testing.assert_allclose(found, share, atol=1e-5)


# --- a released model on several devices ----------------------------------------------------------

EVAL = """
import dataclasses, time
from opsd_jax import eval, interleave
protocols = interleave.PROTOCOLS
interleave.PROTOCOLS = protocols | {{
    "paper": dataclasses.replace(protocols["paper"], max_new_tokens=24)
}}
ask = interleave.reason
def slowly(model, questions, *more):
    time.sleep({pause})
    print("asks", len(questions), dict(model.mesh.shape), flush=True)
    kernel = model.params["llm"]["layers"]["und"]["q_kernel"]
    assert kernel.sharding.shard_shape(kernel.shape)[-1] * {tensor} == kernel.shape[-1]
    return ask(model, questions, *more)
interleave.reason = slowly
try:
    eval.main({arguments!r})
finally:
    interleave.PROTOCOLS, interleave.reason = protocols, ask
"""
ROWS = 13


def evaluation(name, folder, tensor, pause=0.0):
    """The program of an evaluation of a released model on a table, 4 questions at a time."""
    arguments = [
        f"--workdir={folder}",
        f"--checkpoint={folder}/released",
        f"--data_dir={folder}",
        "--batch_size=4",
        f"--tensor={tensor}",
        f"--name={name}",
    ]
    return EVAL.format(arguments=arguments, tensor=tensor, pause=pause)


def predictions(folder, name):
    return (folder / "eval" / name / "predictions.jsonl").read_text()


@pytest.fixture(scope="module")
def asked(released, tmp_path_factory):
    """A folder with a released model, a table, and the answers "one" of a single device."""
    import shutil

    import test_benchmark_files

    folder = tmp_path_factory.mktemp("asked")
    shutil.copytree(released, folder / "released")
    test_benchmark_files.write(folder, test_benchmark_files.mcq(ROWS))
    with small_run.fast_compiles(tmp_path_factory):
        exec(evaluation("one", folder, 1), {})
    assert predictions(folder, "one").count("\n") == ROWS
    return folder


def environment(tmp_path_factory, devices, **variables):
    return small_run.environment(tmp_path_factory) | {
        "XLA_FLAGS": xla_flags.devices(devices),
        "PYTHONUNBUFFERED": "1",
        **variables,
    }


@pytest.mark.slow
def test_two_copies_of_two_devices_answer_as_one_device_does(asked, tmp_path_factory):
    done = small_run.run(
        [sys.executable, "-c", evaluation("copies", asked, 2)],
        env=environment(tmp_path_factory, 4),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "asks 4 {'data': 1, 'fsdp': 2, 'tensor': 2}" in done.stdout
    assert predictions(asked, "copies") == predictions(asked, "one")


@pytest.mark.long
@pytest.mark.slow
def test_an_evaluation_of_two_processes_of_which_one_dies(asked, tmp_path_factory):
    """The other one ends with an error in time. Two processes then answer what is missing."""
    import json
    import re
    import signal
    import time

    from opsd_jax.runtime import distributed

    timeout, folder = 20, asked / "eval" / "two"

    def begin(pause):
        given = environment(
            tmp_path_factory,
            2,
            OPSD_NUM_PROCESSES="2",
            OPSD_COORDINATOR=f"127.0.0.1:{20000 + os.getpid() % 20000}",
            OPSD_TIMEOUT_S=str(timeout),
        )
        return [
            subprocess.Popen(
                [sys.executable, "-c", evaluation("two", asked, 2, pause)],
                env=given | {"OPSD_PROCESS_ID": str(n)},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for n in range(2)
        ]

    def kept():
        files = folder.glob("answers*.jsonl") if folder.is_dir() else []
        return sum(max(path.read_text().count("\n") - 1, 0) for path in files)

    processes = begin(pause=5)
    while not kept() and not any(process.poll() for process in processes):
        time.sleep(0.1)
    processes[1].kill()
    started = time.monotonic()
    said = processes[0].communicate(timeout=300)[0]
    assert time.monotonic() - started < timeout + 60
    code = processes[0].returncode
    assert code in (distributed.EXIT_PEER_LOST, -signal.SIGABRT), said[-3000:]
    assert re.search(r"another process is gone|task.*(unhealthy|heartbeat)|coordination", said)
    before = kept()
    assert 1 <= before < 4 and not (folder / "summary.json").exists()

    processes = begin(pause=0)
    said = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    asks = sum(text.count("asks 4 {'data': 1, 'fsdp': 1, 'tensor': 2}") for text in said)
    # the missing batches, and at most two of them once more for their time
    assert 4 - before <= asks <= 4 - before + 2
    assert predictions(asked, "two") == predictions(asked, "one")
    assert [path.name for path in folder.glob("answers*")] == ["answers.jsonl"]
    assert json.loads((folder / "summary.json").read_text())["benchmarks"]
