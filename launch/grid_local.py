"""A grid on this machine: its runs one after another, each on several processes; then the table, and the test."""

from collections.abc import Callable

from vitscale.errors import EXIT_REQUEUE, UserError
from vitscale.launch.chain_stages import run_complete
from vitscale.launch.grid import TEST, GridKind, Run
from vitscale.launch.grid_table import result_line
from vitscale.launch.local import check_processes, launch, under_launcher
from vitscale.launch.slurm import SlurmConfig
from vitscale.pipeline.config import require


def check_here(grid: GridKind, nproc: int) -> None:
    """Raise `UserError` for what can be known to fail on this machine, with `nproc` processes a run."""
    remedy = "Start it alone with --nproc N, or use `vitscale launch grid`."
    require(not under_launcher(), "--grid", "one of several ranks", "one process, which starts the ranks", remedy)
    grid.check("grid", SlurmConfig(gpus_per_node=1))
    check_processes(nproc, grid.config().engine.device, "engine.device")
    grid.check_data(nproc)


def run_here(grid: GridKind, nproc: int, say: Callable[[str], None]) -> int:
    """Do what is missing of the runs; write and say the table; with a test set do the final run, and test it once.

    Returns the exit code: 1 if a run failed, `EXIT_REQUEUE` if one was asked to stop, and all with it. Raises
    `UserError` if the folder of the final run holds another, as when a grid was widened since.
    """
    for run in grid.runs:
        if _run(grid, run, nproc, say) == EXIT_REQUEUE:
            return EXIT_REQUEUE
    code = grid.write_table(say)
    if code or not grid.test or grid.tested():
        return code
    final = grid.final()
    try:
        return _run(grid, final, nproc, say) or _test(grid, final, nproc, say)
    except UserError as error:
        remedy = "Move it away: the grid has another best run now."
        raise UserError("--test", f"{error.got}", "a final run of the best settings", remedy) from error


def _run(grid: GridKind, run: Run, nproc: int, say: Callable[[str], None]) -> int:
    if run_complete(grid.config(run)):
        say(f"{run.folder}: complete already")
        return 0
    say(f"{run.folder}: {', '.join(run.words[:-1]) or 'the only run'}")
    code = launch([grid.command(run), grid.recipe, *grid.settings, *run.words], nproc)
    if code and code != EXIT_REQUEUE:
        say(f"{run.folder}: ended with exit code {code}")
    return code


def _test(grid: GridKind, final: Run, nproc: int, say: Callable[[str], None]) -> int:
    code = launch(grid.evaluation(final).words(TEST, 0), nproc)
    test = grid.tested()
    if code or not test:
        return code or 1
    grid.write_table(lambda _: None)
    say(result_line(test))
    return 0
