"""Where a process stands among those of its run: by flags, by what each scheduler leaves in the environment, or alone."""

import os
import pathlib
import signal
import socket
import subprocess
import sys
from types import SimpleNamespace

import jax
import pytest

from moe_jax import mesh, processes
from moe_jax.processes import Place
from moe_jax.validation import ConfigError

SLURM = {
    "SLURM_JOB_ID": "4097",
    "SLURM_STEP_NODELIST": "gpu[07-08,11]",
    "SLURM_STEP_NUM_NODES": "3",
    "SLURM_NTASKS": "24",
    "SLURM_PROCID": "17",
    "SLURM_LOCALID": "1",
}
OPEN_MPI = {
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "0",
}


@pytest.fixture
def environment(monkeypatch):
    """Sets variables, of which those of schedulers are gone first."""
    for name in [*SLURM, *OPEN_MPI, "KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX", "JAX_COORDINATOR_PORT"]:
        monkeypatch.delenv(name, raising=False)
    return lambda variables: [monkeypatch.setenv(name, value) for name, value in variables.items()]


def test_a_process_alone_joins_nothing(environment):
    assert processes.find() is None
    assert processes.find("none") is None
    processes.start(None)
    assert not jax.distributed.is_initialized()
    assert processes.count() == 1
    assert processes.first()


def test_flags_say_it_by_hand(environment):
    environment(SLURM)
    assert processes.find("auto", "10.0.0.1:8476", 4, 3) == Place("10.0.0.1:8476", 4, 3)
    assert processes.find("auto", "[::1]:8476", 2, 0) == Place("[::1]:8476", 2, 0)
    assert processes.find("auto", "10.0.0.1:8476", 1, 0) is None


@pytest.mark.parametrize("kind", ["auto", "slurm"])
def test_slurm(environment, kind):
    environment(SLURM)
    assert processes.find(kind) == Place("gpu07:61441", 24, 17, (1,))
    environment({"JAX_COORDINATOR_PORT": "9000"})
    assert processes.find(kind).coordinator == "gpu07:9000"


def test_none_wins_over_slurm(environment):
    environment(SLURM)
    assert processes.find("none") is None


def test_a_shell_in_a_slurm_allocation_is_one_process(environment):
    environment(SLURM | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"})
    assert processes.find() is None


@pytest.mark.parametrize("kind", ["auto", "ompi"])
def test_open_mpi(environment, kind):
    environment(OPEN_MPI)
    place = processes.find(kind)
    assert (place.coordinator.split(":")[0], place.count, place.index, place.local_devices) == ("10.96.0.1", 4, 2, (0,))


def test_tpu_slices(environment, monkeypatch):
    module = sys.modules[processes.clusters.GkeTpuCluster.__module__]
    monkeypatch.setattr(module, "running_in_cloud_tpu_vm", True)
    slices = {"MEGASCALE_COORDINATOR_ADDRESS": "localhost:8080", "MEGASCALE_NUM_SLICES": "2", "MEGASCALE_SLICE_ID": "1"}
    environment({"TPU_WORKER_HOSTNAMES": "worker-0,worker-1", "TPU_WORKER_ID": "1"} | slices)
    assert processes.find("tpu") == processes.find("auto") == Place("localhost:8482", 4, 3)


def test_kubernetes_is_asked_in_a_pod_of_an_indexed_job_only(environment, monkeypatch):
    cluster = SimpleNamespace(
        is_env_present=lambda: True,
        get_process_count=lambda: 2,
        get_coordinator_address=lambda timeout, port: "job-0.service:55527",
        get_local_process_id=lambda: None,
        get_process_id=lambda: 1,
    )
    monkeypatch.setattr(processes.clusters, "K8sCluster", cluster)
    assert processes.find() is None
    environment({"JOB_COMPLETION_INDEX": "1"})
    assert processes.find() == processes.find("kubernetes") == Place("job-0.service:55527", 2, 1)


def test_a_scheduler_that_cannot_tell_is_one_sentence(environment):
    environment(SLURM | {"SLURM_NTASKS": "many"})
    with pytest.raises(ConfigError, match=r"^SlurmCluster of JAX cannot tell .*'many'.* --processes=none for one process\.$"):
        processes.find()


@pytest.mark.parametrize("kind", ["slurm", "tpu", "kubernetes", "ompi"])
def test_a_scheduler_that_did_not_start_it_is_refused(environment, kind):
    with pytest.raises(ConfigError, match=f"--processes = '{kind}', but this process was not started by it"):
        processes.find(kind)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("pbs",), "--processes = 'pbs' is unknown; choose one of auto, none, slurm, tpu, kubernetes, ompi, mpi4py."),
        (("auto", "a:1", None, 0), "--num_processes is missing"),
        (("auto", None, 2, 0), "--coordinator is missing"),
        (("none", "a:1", 2, 0), "--processes = 'none' contradicts --coordinator = 'a:1'"),
        (("slurm", "a:1", 2, 0), "--processes = 'slurm' contradicts --coordinator = 'a:1'"),
        (("auto", "host", 2, 0), "--coordinator = 'host' is not HOST:PORT"),
        (("auto", ":80", 2, 0), "--coordinator = ':80' is not HOST:PORT"),
        (("auto", "host:99999", 2, 0), "--coordinator = 'host:99999' is not HOST:PORT"),
        (("auto", "a:1", 0, 0), "--num_processes = 0 must be at least 1"),
        (("auto", "a:1", 2, 2), "--process_id = 2 is not one of the 2 processes"),
        (("auto", "a:1", 2, -1), "--process_id = -1 is not one of the 2 processes"),
    ],
)
def test_what_makes_no_sense_is_refused(environment, arguments, message):
    with pytest.raises(ConfigError) as refusal:
        processes.find(*arguments)
    assert message in str(refusal.value)


def test_a_timeout_too_short_to_tell_is_refused():
    with pytest.raises(ConfigError, match="--peer_timeout = 1 must be at least 5 seconds"):
        processes.start(None, 1)


def test_emulated_devices_are_shared_out(monkeypatch):
    monkeypatch.setattr(processes, "count", lambda: 3)
    with pytest.raises(ConfigError, match=r"mesh.emulate = 8 devices do not divide over 3 processes; choose a multiple of 3\."):
        mesh.emulate_devices(8)


def test_failures_of_one_process_alone_are_left_to_the_program():
    with pytest.raises(ZeroDivisionError), processes.ending():
        raise ZeroDivisionError


def free_address():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


def two(program):
    """Two processes of a Python text, whose argument is their number: the ended processes, and what each wrote to stderr."""
    environment = os.environ | {"PYTHONPATH": str(pathlib.Path(__file__).parents[1])}
    started = [
        subprocess.Popen([sys.executable, "-c", program, str(index)], env=environment, stderr=subprocess.PIPE, text=True)
        for index in range(2)
    ]
    return started, [process.communicate(timeout=600)[1] for process in started]


@pytest.mark.faults
def test_an_abort_ends_its_process_as_ever_and_the_other_with_the_sentence():
    """abort(3) is how JAX ends a process whose peer is gone; one for any other reason keeps its own status."""
    address = free_address()
    program = (
        "import os, sys, time; from moe_jax import processes; index = int(sys.argv[1]);"
        f"processes.start(processes.Place('{address}', 2, index), 5); os.abort() if index else time.sleep(300)"
    )
    started, said = two(program)
    assert [process.returncode for process in started] == [processes.RUN_AGAIN, -signal.SIGABRT]
    assert "error: another process of this run of 2 is gone, or was not heard of for 5 seconds" in said[0]
    assert "error:" not in said[1]


@pytest.mark.faults
def test_a_process_may_be_a_minute_late_to_a_collective():
    """As one is whose program takes longer to compile; gloo alone gives it 30 seconds to open connections."""
    program = f"""
import sys, time
import jax, numpy as np
from moe_jax import processes
from moe_jax.config import Config, MeshConfig
from moe_jax.mesh import emulate_devices, make_mesh, shard_batch
processes.start(processes.Place({free_address()!r}, 2, int(sys.argv[1])))
emulate_devices(8)
mesh = make_mesh(Config(mesh=MeshConfig(data=2, expert=4, emulate=8)))
processes.connect(mesh)
with processes.ending(5), jax.set_mesh(mesh):
    rows = shard_batch(mesh, {{"rows": np.ones(4)}})["rows"]
    time.sleep(45 * int(sys.argv[1]))
    assert float(jax.jit(lambda rows: rows.sum())(rows)) == 8
"""
    started, said = two(program)
    assert [process.returncode for process in started] == [0, 0], said
