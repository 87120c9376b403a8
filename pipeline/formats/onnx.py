"""A graph for ONNX Runtime and other programs that read ONNX, with a dynamic batch, float32 in and out."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitscale.errors import UserError
from vitscale.model.config import to_dict
from vitscale.model.network import Network
from vitscale.pipeline.formats.capture import capture, check_size, exporting

FILE = "model.onnx"
PACKAGES = ("onnx", "onnxscript", "onnxruntime")
LARGEST = 2_000_000_000  # bytes of weights in one file: protobuf reads no 2 GiB, and the graph takes its part
LOADING = f"""import onnxruntime

session = onnxruntime.InferenceSession("FOLDER/{FILE}")
[logits] = session.run(["logits"], {{"images": images}})  # float32 (B, 3, Y, X), normalised"""


def check(config: Any, dtype: torch.dtype, dynamic_size: bool) -> None:
    """Raise `UserError` if `write` would refuse a network of that configuration, or a package is missing."""
    check_size(config, dynamic_size)
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:
        got = f"onnx without the package {' and '.join(missing)}"
        raise UserError("--format", got, f"{', '.join(PACKAGES)}", "Run: pip install 'vitscale[onnx]'")
    if dtype == torch.bfloat16:
        expected = "float32 or float16 for onnx: ONNX Runtime does not compute in bfloat16 on CPUs"
        raise UserError("--dtype", "bfloat16", expected, "Choose one of these, or --format pt2.")


def write(network: Network, folder: Path, dtype: torch.dtype, dynamic_size: bool) -> None:
    """Write the graph that `capture` makes as `model.onnx`; weights of more than 2 GB as `model.onnx.data` beside it.

    Of the metadata that the exporter adds, which tell of this machine, none remain; `architecture` holds the network's
    configuration as JSON. Raises `UserError` as `check` does or if the exporter fails, and OSError.
    """
    check(network.config, dtype, dynamic_size)
    program = capture(network, dtype, dynamic_size)
    with exporting():
        from vitscale.pipeline.formats.onnx_ops import OPSET, translations

        made = torch.onnx.export(
            program,
            input_names=["images"],
            output_names=["logits"],
            opset_version=OPSET,
            dynamo=True,
            custom_translation_table=translations(),
            verbose=False,
        )
        assert made is not None
        strip(made.model, dynamic_size)
        made.model.metadata_props["architecture"] = json.dumps(to_dict(network.config))
        size = sum(weight.nbytes for weight in program.state_dict.values())
        made.save(folder / FILE, external_data=size > LARGEST)


def strip(model: Any, dynamic_size: bool) -> None:
    """Leave of an `onnx_ir.Model` the graph and its weights, without notes on where each node came from.

    Free sides get names that say what they are; shapes between nodes, in symbols that nobody could read, go.
    """
    import onnx_ir

    graph = model.graph
    for noted in (model, graph, *graph, *graph.inputs, *graph.initializers.values()):
        noted.metadata_props.clear()
        noted.doc_string = None
    for node in graph:
        for value in node.outputs:
            value.metadata_props.clear()
            if not value.is_graph_output():
                value.shape = value.type = None
    (images,), (logits,) = graph.inputs, graph.outputs
    images.shape = onnx_ir.Shape(["batch", 3, *(["height", "width"] if dynamic_size else images.shape[2:])])
    logits.shape = onnx_ir.Shape(["batch", logits.shape[1]])


def logits(folder: Path, images: Tensor) -> tuple[Tensor, str]:
    """Logits (B, K) of normalised float32 images by what was written, and what computed them."""
    with exporting():
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(folder / FILE, options, providers=["CPUExecutionProvider"])
        [found] = session.run(["logits"], {"images": images.numpy()})
        return torch.from_numpy(found), f"onnxruntime {onnxruntime.__version__}"
