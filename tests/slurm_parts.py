"""What `slurm_cluster.py` is made of: the cluster's configuration, a node's first process, and looks into /proc."""

import contextlib
import os
import signal
import socket
import subprocess
from pathlib import Path

SYSTEM_PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"
MACHINE = """
hostname "$0"
mount --bind "$1/hosts" /etc/hosts
mount -t tmpfs -o mode=1777 tmpfs /dev/shm
ip link set lo up
until ip link show eth0 >/dev/null 2>&1; do sleep 0.02; done
ip addr add "$2" dev eth0
ip link set eth0 up
exec slurmd -D -N "$0" -f "$1/slurm.conf"
"""  # a node's process 1: name, folder, address
CONF = """
ClusterName=test
SlurmctldHost={controller}({address})
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/spool/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
CommunicationParameters={listen}
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MailProg=/bin/true
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=1,batch_sched_delay=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
JobRequeue=1
ReturnToService=0
SlurmdTimeout=10
KillWait=3
MinJobAge=86400
{nodes}
PartitionName=main Nodes=ALL Default=YES State=UP MaxTime=INFINITE PriorityTier=1 OverSubscribe=NO GraceTime=0
PartitionName=urgent Nodes=ALL State=UP MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF
PartitionName=short Nodes=ALL State=UP MaxTime=30 MaxNodes=1 PriorityTier=1
"""


def can_unshare() -> bool:
    """Whether nodes can have networks and process tables of their own."""
    spaces = ("unshare", "--net", "--uts", "--mount", "--pid", "--fork", "--mount-proc", "sh", "-ec")
    trial = "hostname t; ip link add name a type veth peer name b; ip link add name c type bridge"
    return not subprocess.run([*spaces, trial], env={"PATH": SYSTEM_PATH}, capture_output=True).returncode


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def network_of(process: int) -> str:
    """The network namespace of a process."""
    return os.readlink(f"/proc/{process}/ns/net")


def alive(process: int) -> bool:
    """Whether a process runs; one that waits for its parent to hear of its end does not."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(") ", 1)[1][0] != "Z"
    except OSError:
        return False


def children(process: int) -> list[int]:
    """The child processes of one."""
    try:
        return [int(word) for word in Path(f"/proc/{process}/task/{process}/children").read_text().split()]
    except OSError:
        return []


def descendants_of_environment(*marks: str) -> list[int]:
    """slurmstepd of a node, which leave their parent, by the environment they were started with; and all below."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if (folder / "comm").read_text().strip() == "slurmstepd":
                variables = (folder / "environ").read_bytes().decode(errors="replace").split("\0")
                found += [int(folder.name)] if set(marks) <= set(variables) else []
        except OSError:
            continue
    for process in found:
        found += children(process)
    return found


def kill_process(process: int) -> None:
    """Kill a process if it is there still."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, signal.SIGKILL)
