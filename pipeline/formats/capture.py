"""A network as a graph of tensor operations, for programs that do not have its code."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from vitscale.errors import UserError
from vitscale.model.build import build_network
from vitscale.model.network import Network
from vitscale.pipeline.formats.check import fill

ANY_SIZE = ("vit", "resnet")  # families whose weights and operations are the same for images of all sizes


def check_size(config: Any, dynamic_size: bool) -> None:
    """Raise `UserError` if images of all sizes are wanted of a network that is tied to one."""
    if dynamic_size and config.family not in ANY_SIZE:
        expected = "a ViT or a ResNet: a Mixer's weights, and how a Swin's windows lie, depend on the size of images"
        raise UserError("--dynamic-size", f"a network of the family {config.family}", expected, "Leave it out.")


def capture(network: Network, dtype: torch.dtype, dynamic_size: bool) -> ExportedProgram:
    """The graph of a network on the CPU: `images` (B, 3, Y, X) → `logits` (B, K), both float32, for any B.

    `images` are normalised as training has them; weights are of `dtype`, and so is what is computed. Y and X are those
    of `config.img_size`, with `dynamic_size` any from two patches on (of a ResNet: from one more than its stride).
    Nothing in it tells where it was made. Raises `UserError` for a network that is tied to one size, or that the
    exporter cannot follow.
    """
    config = network.config
    check_size(config, dynamic_size)
    patch, sides, shapes = config.patch_size, config.height_width, {0: Dim("batch")}
    if dynamic_size:
        # a single row or column would be another graph: such dimensions are repeated where they meet larger ones
        least = 2 if config.family == "vit" else (2 << len(config.depths)) + 1
        rows, columns = Dim("rows", min=least), Dim("columns", min=least)
        shapes |= {2: rows, 3: columns} if patch == 1 else {2: patch * rows, 3: patch * columns}
        sides = [
            patch * (max(*config.grid, least) + more) for more in (1, 2)
        ]  # both unlike, and unlike what is trained
    with torch.device("meta"):
        rounded = build_network(config, seed=None)
    fill(rounded, "", lambda name: network.get_parameter(name).detach().to(dtype))  # at float32 the same memory
    graph = Graph(rounded, dtype)
    example = torch.zeros(2, 3, *sides)  # of which the shape alone matters; one image would be taken for all there are
    with exporting(), torch.no_grad():
        program = torch.export.export(graph, (example,), dynamic_shapes={"images": shapes}, strict=False)
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # holds paths of this machine
    return program


class Graph(nn.Module):
    """What is captured: a network of any dtype, with float32 in and out."""

    def __init__(self, network: Network, dtype: torch.dtype) -> None:
        super().__init__()
        self.network, self.dtype = network, dtype

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images.to(self.dtype)).float()


@contextmanager
def exporting() -> Iterator[None]:
    """Keep what an exporter prints, logs and warns of off the screen, and say in one paragraph why it failed."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stdout(StringIO()):
            warnings.simplefilter("ignore")
            yield
    except (UserError, OSError):
        raise
    except Exception as error:
        cause = error
        while cause.__cause__:  # exporters wrap what happened in several pages of advice
            cause = cause.__cause__
        said = f"{type(cause).__name__}: {' '.join(str(cause).split())[:300]}"
        raise UserError("--format", said, "a network that can be written as a graph", "Use another format.") from error
    finally:
        logging.disable(before)
