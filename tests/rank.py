"""One rank of a test: `python rank.py FILE FUNCTION OUT ARGUMENTS`, started by the fixture `ranks`.

Calls FUNCTION(world, *ARGUMENTS) of the test file and writes what it returns as JSON to OUT, on rank 0.
"""

import json
import runpy
import sys
from pathlib import Path

import torch

from vitscale.pipeline.distributed import join, leave


def main(file: str, function: str, out: str, arguments: str) -> None:
    torch.set_num_threads(1)
    world = join("cpu")
    result = runpy.run_path(file)[function](world, *json.loads(arguments))
    if world.main:
        Path(out).write_text(json.dumps(result))
    leave()


if __name__ == "__main__":
    main(*sys.argv[1:])
