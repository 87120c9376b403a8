"""A real Slurm of several nodes on this machine: munged, slurmctld and N slurmd, without systemd or cgroups.

As root each node has a network, host name, /dev/shm and process table of its own, and can be killed and booted; else
all of them share the loopback device. Files are those of this machine, as on a cluster with a shared file system.
"""

import os
import pwd
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from tests.slurm_parts import (
    CONF,
    MACHINE,
    SYSTEM_PATH,
    alive,
    can_unshare,
    children,
    descendants_of_environment,
    free_port,
    kill_process,
    network_of,
)

NEEDED = ("munged", "slurmctld", "slurmd", "sbatch", "ip", "unshare", "nsenter", "setpriv")
PACKAGES = "slurmctld slurmd slurm-client munge iproute2 util-linux"
POLL = 0.1
SETTLE = 1.5  # seconds


class SlurmCluster:
    """A cluster; `start` it, and `stop` it however that went. `env` is that of its clients and jobs."""

    def __init__(self, nodes: int = 3, cpus: int = 4) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-"))
        self.env = {**os.environ, "PATH": SYSTEM_PATH, "SLURM_CONF": str(self.folder / "slurm.conf")}
        self.apart = os.geteuid() == 0 and can_unshare()
        first = 1 if self.apart else 11
        self.nodes = [f"node{n + 1}" if self.apart else f"127.0.0.{first + n}" for n in range(nodes)]
        self._cpus = cpus
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        self._network = 0

    def start(self) -> None:
        """Start all and wait until every node is idle. Raises `RuntimeError` with what a daemon said."""
        for name in ("state", "spool"):
            (self.folder / name).mkdir()
        self.folder.chmod(0o755)
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        self._write_conf(self._join_networks() if self.apart else "127.0.0.1")
        munge = [f"--{name}={self.folder}/{file}" for name, file in (
            ("key-file", "munge.key"), ("socket", "munge.socket"), ("pid-file", "munged.pid"),
            ("log-file", "munged.log"), ("seed-file", "munged.seed"),
        )]  # fmt: skip
        self._daemon("munged", "munged", "--foreground", "--force", *munge)
        self._until(lambda: self._says("munge", "-n", "-S", f"{self.folder}/munge.socket"), 10, "munged")
        hosts = f"hostname ctl; mount --bind {self.folder}/hosts /etc/hosts; " if self.apart else ""
        apart = ("unshare", "--uts", "--mount", "--kill-child", "--fork") if self.apart else ()
        self._daemon("slurmctld", *apart, "sh", "-c", f"{hosts}exec slurmctld -D -c -f {self.folder}/slurm.conf")
        self._until(lambda: "is UP" in self._says("scontrol", "ping"), 20, "slurmctld")
        for node in self.nodes:
            self._node(node)
        self._until(lambda: self._idle() == len(self.nodes), 40, "slurmd")

    def stop(self) -> None:
        """End every process of the cluster and of its jobs, and remove its folder."""
        if not self.apart and "slurmctld" in self._daemons:
            self._says("scancel", "--full", "--signal=KILL", f"--user={os.geteuid()}")
        for name in reversed(list(self._daemons)):
            self._kill(name)
        if self._network:
            self._says("ip", "link", "del", f"sl{self._network}")
        shutil.rmtree(self.folder, ignore_errors=True)

    def kill(self, node: str) -> None:
        """Take a node's power away: all its processes are killed. Slurm is told at once: it would take 30 s."""
        self._kill(node)
        self.client("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=killed")

    def boot(self, node: str) -> None:
        """Start a killed node again, and wait until it is idle."""
        self._node(node)
        self.client("scontrol", "update", f"NodeName={node}", "State=RESUME")
        self._until(
            lambda: self._says("sinfo", "-h", "-N", "-p", "main", "-n", node, "-o", "%T").strip() == "idle", 30, node
        )

    def drain(self, *nodes: str, back: bool = False) -> None:
        """Give no more jobs to nodes, or do so again."""
        for node in nodes:
            if back:
                self._says("scontrol", "update", f"NodeName={node}", "State=RESUME")  # refused if it is not drained
            else:
                self.client("scontrol", "update", f"NodeName={node}", "State=DRAIN", "Reason=test")

    def client(self, *words: str | Path, env: dict[str, str] | None = None) -> str:
        """What a Slurm client prints. Raises `RuntimeError` with what it says if it fails."""
        done = subprocess.run(
            [str(word) for word in words], env={**self.env, **(env or {})}, capture_output=True, text=True, timeout=60,
            cwd=self.folder,
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(f"{words}: {done.stderr}")
        return done.stdout

    def submit(self, *words: str | Path, env: dict[str, str] | None = None) -> int:
        """`sbatch WORDS`; returns the job's number."""
        return int(self.client("sbatch", "--parsable", *words, env=env))

    def show(self, job: int) -> dict[str, str]:
        """What Slurm knows of a job: JobState, Reason, Restarts, ExitCode, NumNodes, …"""
        rows = self.client("scontrol", "show", "job", str(job), "--oneliner")
        return dict(word.split("=", 1) for word in rows.split() if "=" in word)

    def state(self, job: int) -> str:
        """PENDING, RUNNING, COMPLETED, FAILED, …"""
        return self.show(job)["JobState"]

    def wait(self, job: int, *states: str, seconds: float = 240, hurry: bool = True) -> str:
        """Until a job is in one of `states` (default: ended for good); returns which.

        With `hurry`, one that was requeued starts at once: by itself it would wait for two minutes.
        """
        wanted = states or ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        end = time.monotonic() + seconds
        while (state := self.state(job)) not in wanted:
            if hurry and state == "PENDING" and self.show(job)["Reason"] == "BeginTime":
                self.requeue_now(job)
            if time.monotonic() > end:
                raise TimeoutError(f"job {job} is {state}, not {' or '.join(wanted)}, after {seconds:g} s")
            time.sleep(POLL * 3)
        return state

    def requeue_now(self, job: int) -> None:
        """Start a requeued job that waits for its time, once messages of its last attempt have come in.

        Slurm takes a late one, that the batch script failed, for one of the next attempt.
        """
        time.sleep(SETTLE)
        try:
            self.client("scontrol", "update", f"JobId={job}", "StartTime=now")
        except RuntimeError as error:
            if "completing" not in str(error).lower():  # its nodes are not free yet: ask again
                raise

    def _says(self, *words: str) -> str:
        """What a command prints; empty if it fails."""
        done = subprocess.run(words, env=self.env, capture_output=True, text=True, timeout=20)
        return done.stdout if not done.returncode else ""

    def _idle(self) -> int:
        return self._says("sinfo", "-h", "-N", "-p", "main", "-o", "%T").split().count("idle")

    def _until(self, true: Callable[[], object], seconds: float, what: str) -> None:
        end = time.monotonic() + seconds
        while not true():
            if time.monotonic() > end:
                said = [f"{log.name}: {log.read_text()[-500:]}" for log in self.folder.glob("*.out")]
                raise RuntimeError(f"no {what} after {seconds:g} s; " + "; ".join(said))
            time.sleep(POLL)

    def _daemon(self, name: str, *words: str) -> subprocess.Popen[bytes]:
        """Start a process that ends with this one."""
        env = {key: self.env[key] for key in ("PATH", "SLURM_CONF")} | {"LANG": "C.UTF-8", "SLURM_TEST_NODE": name}
        with (self.folder / f"{name}.out").open("wb") as out:
            command = ["setpriv", "--pdeathsig", "KILL", *words]
            started = subprocess.Popen(command, env=env, stdin=subprocess.DEVNULL, stdout=out, stderr=out)
        self._daemons[name] = started
        return started

    def _kill(self, name: str) -> None:
        """Kill a daemon; with a node that is apart the kernel kills all that runs on it."""
        daemon = self._daemons.pop(name, None)
        if not daemon:
            return
        below = children(daemon.pid)
        daemon.kill()
        daemon.wait()
        if not self.apart and name in self.nodes:
            below += descendants_of_environment(f"SLURM_TEST_NODE={name}", f"SLURM_CONF={self.env['SLURM_CONF']}")
            for number in below:
                kill_process(number)
        self._until(lambda: not any(alive(number) for number in below), 20, f"end of {name}")

    def _node(self, name: str) -> None:
        number = int(re.findall(r"\d+", name)[-1])
        (self.folder / "spool" / name).mkdir(exist_ok=True)
        if not self.apart:
            self._daemon(name, "slurmd", "-D", "-N", name, "-f", f"{self.folder}/slurm.conf")
            return
        spaces = ("--net", "--uts", "--mount", "--pid", "--fork", "--mount-proc", "--kill-child")
        address = f"10.213.{self._network}.{10 + number}/24"
        started = self._daemon(name, "unshare", *spaces, "sh", "-ec", MACHINE, name, str(self.folder), address)
        self._until(lambda: network_of(started.pid) != network_of(os.getpid()), 10, f"network of {name}")
        switch = f"nsenter -t {self._daemons['switch'].pid} -n ip link"
        self._says(*f"{switch} del {name}".split())
        self.client(*f"{switch} add name {name} type veth peer name eth0 netns {started.pid}".split())
        self.client(*f"{switch} set {name} master br0 up".split())

    def _join_networks(self) -> str:
        """Make a switch in a network of its own, joined to this machine's; returns this machine's address."""
        switch = self._daemon("switch", "unshare", "--net", "sleep", "infinity").pid
        self._until(lambda: network_of(switch) != network_of(os.getpid()), 10, "switch")
        taken = self.client("ip", "-4", "route")
        for offset in range(1, 255):
            number = (os.getpid() + offset) % 254 + 1
            pair = f"ip link add name sl{number} type veth peer name host netns {switch}"
            if f"10.213.{number}." not in taken and not subprocess.run(pair.split(), capture_output=True).returncode:
                break
        else:
            raise RuntimeError("no free network 10.213.N.0/24")
        self._network, address = number, f"10.213.{number}.1"
        self.client("ip", "addr", "add", f"{address}/24", "dev", f"sl{number}")
        self.client("ip", "link", "set", f"sl{number}", "up")
        inside = "link add name br0 type bridge, link set br0 up, link set host master br0 up, link set lo up"
        for words in inside.split(", "):
            self.client(*f"nsenter -t {switch} -n ip {words}".split())
        return address

    def _write_conf(self, address: str) -> None:
        port, rows, hosts = (6817 if self.apart else free_port()), [], ["127.0.0.1 localhost", f"{address} ctl"]
        for name in self.nodes:
            number = int(re.findall(r"\d+", name)[-1])
            at = f"10.213.{self._network}.{10 + number}"
            hosts.append(f"{at} {name}")
            own = f"NodeHostname={socket.gethostname()} NodeAddr=127.0.0.1 Port={free_port()}"
            rows.append(
                f"NodeName={name} {f'NodeAddr={at}' if self.apart else own} CPUs={self._cpus} RealMemory=256000"
            )
        (self.folder / "hosts").write_text("\n".join(hosts) + "\n")
        conf = CONF.format(
            controller="ctl" if self.apart else socket.gethostname(), address=address, port=port, folder=self.folder,
            user=pwd.getpwuid(os.geteuid()).pw_name, nodes="\n".join(rows),
            listen="NoCtldInAddrAny" + ("" if self.apart else ",NoInAddrAny"),
        )  # fmt: skip
        (self.folder / "slurm.conf").write_text(conf)


def missing() -> list[str]:
    """Programs that a cluster needs and this machine lacks."""
    return [name for name in NEEDED if not shutil.which(name, path=SYSTEM_PATH)]


if (
    __name__ == "__main__"
):  # `python -m tests.slurm_cluster`, for a look by hand: a shell in which sbatch and the rest talk to a cluster
    cluster = SlurmCluster(int(sys.argv[1]) if len(sys.argv) > 1 else 3)
    try:
        cluster.start()
        subprocess.run([os.environ.get("SHELL", "bash")], env=cluster.env)
    finally:
        cluster.stop()
