"""A folder that timm loads: `timm.create_model(NAME, checkpoint_path=…)`, or `"local-dir:FOLDER"`."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from vitscale.pipeline.formats.check import read_back
from vitscale.pipeline.formats.others import write_layout
from vitscale.pipeline.weights import Trained

LOADING = """import timm

model = timm.create_model("local-dir:FOLDER", pretrained=True)
settings = timm.data.resolve_model_data_config(model)
images = timm.data.create_transform(**settings)(picture)[None]"""


def write(trained: Trained, folder: Path, dtype: torch.dtype) -> None:
    """Write weights and pretrained configuration. Raises `UserError` if no architecture of timm is like it."""
    write_layout("timm", trained, folder, dtype)


@torch.inference_mode()
def logits(folder: Path, images: Tensor) -> tuple[Tensor, str]:
    """Logits (B, K) in float32 by timm, and its name; by our own reading of the files where it is missing."""
    try:
        import timm  # pyright: ignore[reportMissingImports]
    except (ImportError, RuntimeError):  # torchvision, which it needs, does not load beside every torch
        return read_back(folder, images), "vitscale, as timm cannot be imported"
    config, weights = json.loads((folder / "config.json").read_text()), folder / "model.safetensors"
    settings = {key: config[key] for key in ("num_classes", "global_pool") if key in config}
    settings |= config.get("model_args", {})
    with torch.device("meta"):  # else its random weights would be in memory beside ours
        model = timm.create_model(config["architecture"], **settings)
    if any(buffer.is_meta for buffer in model.buffers()):
        model = timm.create_model(config["architecture"], checkpoint_path=str(weights), **settings)
    else:
        state = {name: tensor.float() for name, tensor in load_file(weights).items()}
        model.load_state_dict(state, assign=True)
    return model.eval()(images), f"timm {timm.__version__}"
