"""Several processes on this machine, by torch's elastic launcher."""

import json
import logging
import os
import sys
import time
from pathlib import Path

from vitscale.errors import UserError

EXIT_USER_ERROR = 2


def under_launcher() -> bool:
    """Whether this process was started as one of several ranks (torchrun, srun), and joins them."""
    from vitscale.pipeline.distributed import launcher_place

    return launcher_place(os.environ) is not None


def launch(command: list[str], processes: int) -> int:
    """Run `vitscale COMMAND` as `processes` ranks and wait for them. Returns the exit code.

    If a rank fails the others are ended, and what the first one to fail said is printed once.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    for name in list(logging.root.manager.loggerDict):  # each has a level of its own
        if name.startswith("torch.distributed.elastic"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
    threads = max(1, len(os.sched_getaffinity(0)) // processes)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id="vitscale",
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        max_restarts=0,
        monitor_interval=0.1,
    )
    try:
        # -P: like the console script, do not import from the working directory
        elastic_launch(config, sys.executable)("-P", "-m", "vitscale.launch.cli", *command)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if isinstance(failure.message, dict):  # written by `report_failure`
            print(failure.message["message"], file=sys.stderr)
        else:
            print(f"error: rank {rank} ended: {failure.message}. Run the same command again to go on.", file=sys.stderr)
        return EXIT_USER_ERROR if failure.exitcode == EXIT_USER_ERROR else 1
    except SignalException:
        raise KeyboardInterrupt from None
    return 0


def report_failure(text: str, cause: bool = False) -> None:
    """Say why this process fails: to the launcher that waits for it, if it is `launch`, else on stderr.

    The launcher tells what the earliest failure said. One that is known to be a `cause`, not the loss of another
    rank, comes before all others, whose times it knows to the second only.
    """
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file:
        told = {"message": text, "extraInfo": {"timestamp": 0 if cause else int(time.time())}}
        Path(file).write_text(json.dumps({"message": told}))  # the launcher's own form
    else:
        print(text, file=sys.stderr, flush=True)


def check_processes(processes: int, device: str, setting: str) -> None:
    """Raise `UserError` if this machine cannot run so many ranks on `device` (`auto`, `cpu`, `cuda`), as `setting`."""
    from vitscale.pipeline.distributed import use_cuda

    if processes < 1:
        raise UserError("--nproc", processes, "at least 1 process", "Leave it out for one.")
    use_cuda(device, processes, setting)
