"""The ranks of one node of several: what `vitscale launch ssh` starts on each host, and `launch kubeflow` in each pod.

The environment says which node this is: RANK its number, MASTER_ADDR and MASTER_PORT where rank 0 listens, and
VITSCALE_HOSTS the ranks of all nodes in their order, `gpu01:8,gpu02:8`. Ranks are started as on one machine (`local`),
so that signals, failures and the end of the launcher mean the same, and take their places among all of them.
"""

import json
import os
import signal
import threading

from vitscale.errors import EXIT_DONE, EXIT_INTERRUPTED, EXIT_USER, UserError

HOSTS = "VITSCALE_HOSTS"
STDIN = "VITSCALE_SIGNALS_ON_STDIN"  # environment: names of signals come by lines, and the end asks to save
PLACE = "VITSCALE_NODE_PLACE"  # environment of a rank: its node's place among all
RETRY = 128  # added to the exit codes that ask for another start, where an operator tells them by that


def places(hosts: str) -> list[tuple[str, int]]:
    """Names and numbers of ranks out of `gpu01:8,gpu02:8`."""
    pairs = [pair.rpartition(":") for pair in hosts.split(",")]
    return [(host, int(slots)) for host, _, slots in pairs]


def written(hosts: list[tuple[str, int]]) -> str:
    """What `places` reads."""
    return ",".join(f"{host}:{slots}" for host, slots in hosts)


def run_node(words: list[str]) -> int:
    """Run `vitscale WORDS` as the ranks of this node and wait for them. Returns the exit code of `vitscale.errors`.

    Raises `UserError` where the environment does not say which node this is.
    """
    from vitscale.launch.local import launch

    lacking = [name for name in (HOSTS, "RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if lacking:
        got = f"no {' and no '.join(lacking)}"
        raise UserError("environment", got, "the place of this node", "Use `vitscale launch ssh` or `launch kubeflow`.")
    slots = [number for _, number in places(os.environ[HOSTS])]
    node = int(os.environ["RANK"])
    place = {
        "first": sum(slots[:node]),
        "world": sum(slots),
        "address": os.environ["MASTER_ADDR"],
        "port": os.environ["MASTER_PORT"],
    }
    os.environ[PLACE] = json.dumps(place)
    if os.environ.pop(STDIN, ""):
        threading.Thread(target=_obey, daemon=True).start()
    try:
        return launch(["launch", "node-rank", *words], slots[node])
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED


def _obey() -> None:
    """Send this process the signals named on its stdin, and SIGTERM when that ends: whoever started it died."""
    left = b""
    while read := os.read(0, 256):  # not by `sys.stdin`, whose lock a thread may hold while the interpreter ends
        *names, left = (left + read).split(b"\n")
        for name in names:
            os.kill(os.getpid(), signal.Signals[name.decode()])
    os.kill(os.getpid(), signal.SIGTERM)


def take_place() -> None:
    """Turn the place among this node's ranks into that among all."""
    place = json.loads(os.environ[PLACE])
    os.environ["RANK"] = str(place["first"] + int(os.environ["LOCAL_RANK"]))
    os.environ["WORLD_SIZE"] = str(place["world"])
    os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = place["address"], place["port"]
    os.environ.pop("TORCHELASTIC_USE_AGENT_STORE", None)  # it is rank 0 that listens


def for_operator(code: int) -> int:
    """The exit code for Kubeflow's restart policy ExitCode: 1 to 127 are final, 128 to 255 are tried again."""
    return code if code in (EXIT_DONE, EXIT_USER) else RETRY | code
