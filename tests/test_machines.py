"""The template on two machines: network namespaces joined by a virtual cable.

A machine has a network, a name, an /etc/hosts, mounts and processes of its own, and nothing outside
it is touched. It vanishes with its first process, which ends when the tests do, even if killed.
"""

import contextlib
import os
import re
import subprocess
import sys
import time

import pytest
from conftest import ROOT

EXAMPLE = ROOT / "examples" / "my_model.py"
NAMES, ADDRESSES = ("alpha", "beta"), ("10.0.0.1", "10.0.0.2")
ALONE = "unshare", "--net", "--mount", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc"
CABLE = "ip link add cable type veth peer name"
NODE_RANK = "--nnodes 2 --node-rank {} --master-addr 10.0.0.1"  # 29500 is free: a new network
C10D = "--nnodes 2 --nproc-per-node 1 --rdzv-backend c10d --rdzv-endpoint 10.0.0.1 --rdzv-id a"
SECONDS = 120  # when a test gives up


def obstacle():
    """Why this cannot run here, if it cannot."""
    try:
        trial = subprocess.run([*ALONE, *f"{CABLE} other".split()], capture_output=True, text=True)
        subprocess.run(["nsenter", "--version"], capture_output=True, check=True)
    except OSError as error:  # no unshare
        return str(error)
    return trial.stderr if trial.returncode else ""


class Machine:
    """Runs commands. What torchrun and its processes print goes into a file."""

    def __init__(self, number, folder):
        self.name, self.output = NAMES[number], folder / f"{NAMES[number]}.txt"
        first = "echo up; exec cat >/dev/null"  # until its input is closed
        self.init = subprocess.Popen(
            [*ALONE, "sh", "-c", first], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self.init.stdout.readline() == "up\n"
        pids = f"/proc/{self.init.pid}/ns/pid_for_children"
        self.network = ["nsenter", f"--target={self.init.pid}", "--net"]
        self.enter = [*self.network, "--mount", "--uts", f"--pid={pids}"]
        self.sh(f"hostname {self.name}; ip link set lo up")

    def sh(self, command):
        command = [*self.enter, "sh", "-ec", command]
        return subprocess.run(
            command, check=True, capture_output=True, text=True, timeout=20
        ).stdout

    def torchrun(self, launcher, *flags, **environment):
        quiet = {"TORCH_CPP_LOG_LEVEL": "ERROR", "OMP_NUM_THREADS": "1"}
        torchrun = [sys.executable, "-m", "torch.distributed.run", *launcher.split()]
        with self.output.open("w") as file:
            self.started = subprocess.Popen(
                [*self.enter, *torchrun, EXAMPLE, *map(str, flags)],
                env={**os.environ, **quiet, **environment},
                stdout=file,
                stderr=subprocess.STDOUT,
            )

    def said(self):
        return self.output.read_text()

    def lines(self):
        """What processes of the template said of an error."""
        return re.findall("^process .*", self.said(), re.MULTILINE)

    def running(self):
        return re.findall(".*my_model.*", self.sh("ps -eww -o args"))


@pytest.fixture
def machines(tmp_path):
    """Two of them. Each knows its own name as 127.0.1.1, as on Debian, and not the other's."""
    if why := obstacle():
        pytest.skip(f"needs root, ip and network namespaces: {' '.join(why.split())}")
    with contextlib.ExitStack() as stack:
        made = []
        for number in (0, 1):
            made.append(machine := Machine(number, tmp_path))
            stack.callback(machine.init.communicate)  # closes its input
            set_hosts(machine, tmp_path, f"127.0.1.1 {machine.name}")
        link = f"{CABLE} cable netns {machine.init.pid}"
        subprocess.run([*made[0].network, *link.split()], check=True)
        for machine, address in zip(made, ADDRESSES, strict=True):
            machine.sh(f"ip address add {address}/24 dev cable; ip link set cable up")
        yield made


def set_hosts(machine, folder, *lines):
    file = folder / f"{machine.name}.hosts"
    file.write_text("\n".join(["127.0.0.1 localhost", *lines, ""]))
    machine.sh(f"mount --bind {file} /etc/hosts")


def wait_until(done, machines):
    end = time.monotonic() + SECONDS
    while not done():
        assert time.monotonic() < end, [machine.said() for machine in machines]
        time.sleep(0.05)


def statuses(machines):
    """Of their torchruns, which have ended and left nothing behind."""
    wait_until(lambda: all(m.started.poll() is not None for m in machines), machines)
    assert [machine.running() for machine in machines] == [[]] * len(machines)
    return [machine.started.returncode for machine in machines]


def losses_of(text):
    return [float(loss) for loss in re.findall(r"^step \d+: loss (\S+)", text, re.MULTILINE)]


@pytest.fixture(scope="module")
def alone():
    """The losses of three steps in one process, with the same seeds of dropout."""
    values = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    values |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "OMP_NUM_THREADS": "1"}
    command, env = [sys.executable, EXAMPLE, "--steps", "3"], {**os.environ, **values}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 0, done.stderr
    return losses_of(done.stdout)


def check_losses(machines, alone):
    assert statuses(machines) == [0, 0], [machine.said() for machine in machines]
    first, second = (losses_of(machine.said()) for machine in machines)
    assert (first, second) == (pytest.approx(alone, abs=1e-4), [])
    assert len(first) == 3


def test_two_machines_train_as_one_process_does(machines, alone):
    for rank, machine in enumerate(machines):
        machine.torchrun(NODE_RANK.format(rank), "--steps", 3, GLOO_SOCKET_IFNAME="cable")
    check_losses(machines, alone)


def test_where_names_lead_to_addresses_no_variable_is_needed(machines, alone, tmp_path):
    names = [" ".join(pair) for pair in zip(ADDRESSES, NAMES, strict=True)]
    for machine in machines:
        set_hosts(machine, tmp_path, *names)  # c10d sorts by them: alpha has process 0
        machine.torchrun(C10D, "--steps", 3)
    check_losses(machines, alone)


@pytest.mark.parametrize("victim", [0, 1])
def test_when_a_machine_dies_the_processes_of_the_other_end(machines, victim):
    for rank, machine in enumerate(machines):
        machine.torchrun(NODE_RANK.format(rank), "--steps", 10**6, GLOO_SOCKET_IFNAME="cable")
    wait_until(lambda: "step 2:" in machines[0].said(), machines)
    killed, other = machines[victim], machines[1 - victim]
    assert len(killed.running()) == len(other.running()) == 2  # torchrun and a process
    killed.sh("kill -9 -1")  # all, at once
    start = time.monotonic()
    assert statuses([other]) == [1]
    assert other.lines() == [f"process {1 - victim}: lost another process"]
    assert time.monotonic() - start < 60  # it takes 3 to 5 seconds


def test_a_folder_on_each_machine_is_refused(machines, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    for rank, machine in enumerate(machines):
        machine.sh(f"mount -t tmpfs tmpfs {folder}")
        flags = ("--steps", 1, "--save", folder)
        machine.torchrun(NODE_RANK.format(rank), *flags, GLOO_SOCKET_IFNAME="cable")
    assert statuses(machines) == [1, 1]  # torchrun's, where a process ends with 2
    line = f"process 0: --save {folder} is not one folder for all machines"
    assert machines[0].lines() == [line]
    for machine in machines:
        assert "step0" not in machine.sh(f"ls {folder}")


def test_other_flags_on_one_machine_are_refused(machines):
    for rank, machine in enumerate(machines):
        flags = ("--steps", 3, *["--cut", "2"][: 2 * rank])
        machine.torchrun(NODE_RANK.format(rank), *flags, GLOO_SOCKET_IFNAME="cable")
    assert statuses(machines) == [1, 1]
    line = "process 0: processes 0 and 1 were started with different cut"
    assert machines[0].lines() == [line]
