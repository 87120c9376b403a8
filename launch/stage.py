"""What the commands share: errors as paragraphs and exit codes, help with settings, and work on several ranks.

Like the command itself, it imports nothing heavy before it is needed.
"""

import errno
import functools
import os
import signal
import sys
import traceback
from collections.abc import Callable
from typing import Any

import typer
from typer.core import TyperCommand

from vitscale.errors import EXIT_INTERNAL, EXIT_INTERRUPTED, EXIT_REQUEUE, EXIT_USER, Requeue, UserError, report_failure
from vitscale.pipeline.signals import STOP_SIGNALS


def settings_of(stage: str) -> Any:
    """Default settings of a stage as a dataclass."""
    if stage == "shard":
        from vitscale.data_prep.config import ShardConfig

        return ShardConfig()
    from vitscale.pipeline.config import Config

    return Config()


class SettingsCommand(TyperCommand):
    """A command that takes SETTING=VALUE arguments: `--help` also lists every setting with its default."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        super().format_help(ctx, formatter)
        from vitscale.pipeline.config import explain

        print("Settings, as SETTING=VALUE, with their defaults:\n")
        print(explain(settings_of(str(ctx.info_name))))


def stage(function: Callable[..., None]) -> Callable[..., None]:
    """Turn errors into one paragraph and one of the exit codes of `vitscale.errors`."""

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        try:
            function(*args, **kwargs)
        except UserError as error:
            if kwargs["debug"]:
                traceback.print_exc()
            report_failure(f"error: {error}", cause=True)
            _exit(EXIT_USER)
        except KeyboardInterrupt as stop:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second one would show a traceback
            report_failure(str(stop) or "interrupted; run the same command again to go on")
            _exit(EXIT_INTERRUPTED)
        except (typer.Exit, typer.Abort):
            raise
        except Exception as error:
            if kwargs["debug"]:
                traceback.print_exc()
            if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
                report_failure(f"error: {error.filename}: {error.strerror}. Choose a shorter one.", cause=True)
                _exit(EXIT_USER)
            said = " ".join(str(error).split())
            report_failure(f"internal error: {type(error).__name__}: {said}. `--debug` shows where.")
            _exit(EXIT_INTERNAL)

    return wrapped


def _exit(code: int) -> None:
    """Leave, at once if this process may be a rank: one that failed must not wait for others in its turn."""
    if "torch" in sys.modules:
        from vitscale.pipeline.distributed import end

        end(code)
    raise typer.Exit(code)


def run_ranks(work: Callable[[Any], None], check: Callable[[], None], nproc: int, device: str, setting: str) -> None:
    """Do `work(world)` in this process, which then ends, or in `nproc` new ones after `check` found nothing against it.

    `device` is what the user asked for by `setting`.
    """
    from vitscale.launch.local import LAUNCHER, check_processes, launch, under_launcher

    if not under_launcher():
        check_processes(nproc, device, setting)
        if nproc > 1:
            check()
            code = launch(sys.argv[1:], nproc)
            if code:
                raise typer.Exit(code)
            return
    from vitscale.pipeline.distributed import die_with_parent, join, leave

    if LAUNCHER in os.environ:
        die_with_parent(int(os.environ[LAUNCHER]))
    world = join(device)
    try:
        work(world)
    except Requeue as saved:
        for number in STOP_SIGNALS:  # one more changes nothing, or it would change the exit code
            signal.signal(number, signal.SIG_IGN)
        if world.main:
            report_failure(f"{saved}; run the same command again to go on")
        leave(EXIT_INTERRUPTED if saved.interrupted and not under_launcher() else EXIT_REQUEUE)
    leave()
