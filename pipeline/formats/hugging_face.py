"""A folder that transformers loads: `AutoModelForImageClassification.from_pretrained(FOLDER)`."""

from pathlib import Path

import torch
from torch import Tensor

from vitscale.errors import UserError
from vitscale.pipeline.formats.check import read_back
from vitscale.pipeline.formats.others import write_layout
from vitscale.pipeline.weights import Trained

LOADING = """from transformers import AutoImageProcessor, AutoModelForImageClassification

processor = AutoImageProcessor.from_pretrained("FOLDER")
model = AutoModelForImageClassification.from_pretrained("FOLDER")
logits = model(**processor(image, return_tensors="pt")).logits"""


def write(trained: Trained, folder: Path, dtype: torch.dtype) -> None:
    """Write weights, configuration and image processor. Raises `UserError` if no model of transformers is like it."""
    write_layout("hugging_face", trained, folder, dtype)


@torch.inference_mode()
def logits(folder: Path, images: Tensor) -> tuple[Tensor, str]:
    """Logits (B, K) in float32 by transformers, and its name; by our own reading of the files where it is missing."""
    try:
        import transformers

        model_class = transformers.AutoModelForImageClassification
    except (ImportError, RuntimeError):  # some installations of its own requirements are broken
        return read_back(folder, images), "vitscale, as transformers cannot be imported"
    transformers.utils.logging.disable_progress_bar()
    model, found = model_class.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True, output_loading_info=True
    )
    odd = [*found["missing_keys"], *found["unexpected_keys"], *found["mismatched_keys"]]
    if odd:
        raise UserError(
            "--format", f"hf: tensors {odd[:4]} that transformers does not take", "all of them", "Use timm."
        )
    return model.eval()(images).logits, f"transformers {transformers.__version__}"
