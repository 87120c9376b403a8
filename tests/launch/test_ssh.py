"""Runs on two hosts by ssh, as far as one machine can have them: the transport alone is replaced.

`ssh` on PATH is a script that runs the command here; hosts, ranks, signals and files are otherwise what they are.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.pipeline.runs import TINY, command, losses, wait_for
from vitscale.errors import EXIT_INTERNAL, EXIT_REQUEUE, UserError
from vitscale.launch import ssh
from vitscale.launch.node import places, written
from vitscale.pipeline.distributed import launcher_place

FAKE = """#!/bin/bash
while [[ $1 == -o ]]; do shift 2; done
[[ $1 == nowhere ]] && { echo "ssh: connect to host nowhere port 22: No route to host" >&2; exit 255; }
shift
exec bash -c "$*"
"""
LONG = ("train.duration=400", "checkpoint.every=20", "eval.every=0", "data.workers=0")


@pytest.fixture
def env(tmp_path: Path) -> dict[str, str]:
    """An environment in which ssh is the script above."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "ssh").write_text(FAKE)
    (folder / "ssh").chmod(0o755)
    return {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}


@pytest.fixture
def words(digits: Any, tmp_path: Path) -> Callable[..., list[str]]:
    """`words("run", "train.duration=3")`: the command for a tiny run on two hosts, of a rank each."""
    (tmp_path / "hosts").write_text("# two names of this machine\n127.0.0.1 slots=1\n\nlocalhost slots=1 # small\n")

    def line(run: str, *more: str) -> list[str]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        data = (f"data.train={digits.train}", f"data.val={digits.test}", f"run.dir={tmp_path / run}")
        program = [sys.executable, "-m", "vitscale.launch.cli", "launch", "ssh", "hosts", "digits-demo"]
        return [*program, *TINY, *data, *more, "--port", port]

    return line


@pytest.mark.slow
def test_a_run_on_two_hosts_is_that_of_as_many_local_ranks(
    words: Callable[..., list[str]], env: dict[str, str], digits: Any, tmp_path: Path
) -> None:
    """Also where a path has to be quoted."""
    short = ("train.duration=4", "checkpoint.every=0", "eval.every=0", "data.workers=0")
    done = subprocess.run(words("a 'run'", *short), env=env, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "2 ranks on cpu" in done.stdout
    local = command(digits, tmp_path / "local", *short, "--nproc", "2")
    assert local.returncode == 0, local.stderr
    assert losses(tmp_path / "a 'run'") == losses(tmp_path / "local"), "the same ranks compute the same, bit for bit"


@pytest.mark.slow
def test_a_signal_saves_on_all_hosts_and_the_command_goes_on(
    words: Callable[..., list[str]], env: dict[str, str], tmp_path: Path
) -> None:
    line = words("run", *LONG)
    (tmp_path / "hosts").write_text("127.0.0.1 slots=2\nlocalhost slots=1\n")
    running = subprocess.Popen(line, env=env, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    wait_for(tmp_path / "run" / "checkpoints" / "latest", running)
    running.send_signal(signal.SIGTERM)
    said = running.communicate(timeout=120)[1]
    assert running.returncode == EXIT_REQUEUE, said
    assert "after SIGTERM; run the same command again to go on" in said
    saved = newest(tmp_path / "run")
    running = subprocess.Popen(line, env=env, cwd=tmp_path, stderr=subprocess.DEVNULL)
    until(lambda: newest(tmp_path / "run") > saved)
    running.kill()  # the hosts lose it, and save
    running.wait()
    later = newest(tmp_path / "run")
    until(lambda: newest(tmp_path / "run") > later or newest(tmp_path / "run") == 400)
    until(lambda: not ranks_of(tmp_path / "run"))


def newest(run: Path) -> int:
    """Step of the newest checkpoint."""
    return max((int(path.name[5:]) for path in (run / "checkpoints").glob("step-*")), default=0)


def ranks_of(run: Path) -> list[str]:
    """Processes whose command line names the run's folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found += [str(path)] if f"run.dir={run}".encode() in path.read_bytes() else []
        except OSError:
            continue
    return found


def until(done: Callable[[], bool]) -> None:
    """Wait for it; fails after a minute."""
    for _ in range(1200):
        if done():
            return
        time.sleep(0.05)
    raise AssertionError("not after 60 s")


@pytest.mark.slow
def test_the_doctor_names_a_host_that_is_not_reached(env: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("127.0.0.1 slots=1\nnowhere slots=2\n")
    program = [sys.executable, "-m", "vitscale.launch.cli", "launch", "ssh", "hosts", "doctor", "--port", "29871"]
    program += ["--timeout", "5"]
    done = subprocess.run(program, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == EXIT_INTERNAL
    assert "nowhere: ssh: connect to host nowhere port 22: No route to host\n" in done.stderr
    assert "error: nowhere: not reached by ssh, or lost." in done.stderr
    assert "node nowhere: ranks 1-2 did not arrive within 5 s\n" in done.stdout


def test_hosts_get_signals_and_end_when_one_fails(
    monkeypatch: pytest.MonkeyPatch, env: dict[str, str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """One fails; the other, which does not notice, is told to end twice, and killed as it does not."""
    monkeypatch.setenv("PATH", env["PATH"])
    monkeypatch.setattr(ssh, "GRACE", 0.3)
    monkeypatch.setattr(ssh, "LAST_WAIT", 0.5)
    heard = tmp_path / "heard"
    lines = ["echo broken >&2; exit 3", f"while read line; do echo $line >>{heard}; done; sleep 60"]
    began = time.monotonic()
    assert ssh.run_hosts(["a", "b"], lines) == EXIT_INTERNAL
    assert time.monotonic() - began < 20
    assert heard.read_text() == "SIGINT\nSIGINT\n"
    assert "a: broken\n" in capfd.readouterr().err
    assert ssh.run_hosts(["a", "b"], ["exit 75", "exit 0"]) == EXIT_REQUEUE
    assert ssh.run_hosts(["a", "b"], ["exit 2", "exit 75"]) == 2


def test_hostfiles(tmp_path: Path) -> None:
    file = tmp_path / "hosts"
    file.write_text("# a comment\ngpu01 slots=8\n\n  gpu02   slots=4  \n")
    assert ssh.read_hostfile(str(file)) == [("gpu01", 8), ("gpu02", 4)]
    refused = {
        "gpu01": "'gpu01' in line 1",
        "a slots=1\na slots=2": "a host again in line 2",
        "a slots=0": "'a slots=0'",
        "-oProxyCommand=x slots=1": "'-oProxy",
        "# none": "without a host",
    }
    for text, said in refused.items():
        file.write_text(text)
        with pytest.raises(UserError, match="HOSTFILE: got ") as error:
            ssh.read_hostfile(str(file))
        assert said in str(error.value)
    with pytest.raises(UserError, match="No such file"):
        ssh.read_hostfile(str(tmp_path / "nothing"))


def test_a_line_says_to_a_host_who_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    hosts = [("gpu01", 8), ("gpu02", 8)]
    first, second = ssh.commands(hosts, ["doctor"], 29500)
    assert "secret" not in first + second, "everybody on a host can see it"
    assert places(written(hosts)) == hosts
    show = "-c 'import json, os; print(json.dumps(dict(os.environ)))'"
    told = second.replace("-P -m vitscale.launch.cli launch node doctor", show)
    said = subprocess.run(["bash", "-c", told], capture_output=True, text=True, check=True)
    env = json.loads(said.stdout)
    assert (env["RANK"], env["MASTER_ADDR"], env["MASTER_PORT"]) == ("1", "gpu01", "29500")
    assert (env["VITSCALE_HOSTS"], env["NCCL_DEBUG"]) == ("gpu01:8,gpu02:8", "INFO")


def test_ranks_of_a_node_take_their_place_among_all(monkeypatch: pytest.MonkeyPatch) -> None:
    from vitscale.launch.node import PLACE, take_place

    place = {"first": 8, "world": 12, "address": "gpu01", "port": "29500"}
    local = {"RANK": "3", "LOCAL_RANK": "3", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "127.0.0.1"}
    local |= {"MASTER_PORT": "1", "TORCHELASTIC_USE_AGENT_STORE": "True", PLACE: json.dumps(place)}
    for name, value in local.items():
        monkeypatch.setenv(name, value)
    take_place()
    assert launcher_place(os.environ) == (11, 12, 3, 4)
    assert (os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]) == ("gpu01", "29500")
    assert "TORCHELASTIC_USE_AGENT_STORE" not in os.environ
