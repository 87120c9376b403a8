"""Trained weights → a folder to keep and to share: `model.safetensors` and `config.json`."""

import json
import os
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from vitscale.data_prep.publish import publish_text, sync_folder
from vitscale.errors import UserError
from vitscale.model.vit import VisionTransformer
from vitscale.pipeline.run_folder import versions
from vitscale.pipeline.weights import EXPORT_FORMAT, describe, open_trained


def export(source: str, out: str, weights: str = "auto") -> float:
    """Export the network at `source` (a run or a checkpoint) into the new folder `out`; `weights` as in `open_trained`.

    Before `out` appears, what was written is read back and its logits are compared with the source's on fixed
    inputs; returns their largest absolute difference. Raises `UserError` if `out` exists, if there is nothing to
    export, or if the logits differ.
    """
    target = Path(out)
    if target.exists():
        raise UserError("OUT", f"{out}, which exists", "a new folder", "Choose another name, or remove it first.")
    trained = open_trained(source, "SOURCE", weights)
    network = trained.load()
    partial = target.with_name(f".{target.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        save_file(network.state_dict(), partial / "model.safetensors")
        (partial / "model.safetensors").chmod(0o644)  # safetensors makes it private
        description = describe(trained.model, trained.classes, trained.preprocess)
        config = {"format": EXPORT_FORMAT, **description, "origin": trained.origin, "versions": versions()}
        publish_text(partial / "config.json", json.dumps(config, indent=1))
        difference = largest_difference(network, open_trained(str(partial), "OUT").load())
        if difference != 0:  # the same float32 weights in the same network; nan if they are not finite
            raise UserError("OUT", f"logits that differ by {difference}", "the source's logits", "Check the source.")
        with (partial / "model.safetensors").open("rb") as file:
            os.fsync(file.fileno())
        partial.rename(target)
        sync_folder(target.parent)
    except (OSError, SafetensorError) as error:
        raise UserError(
            "OUT", f"{error} while writing {out}", "a folder that can be written", "Choose another."
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return difference


@torch.inference_mode()
def largest_difference(one: VisionTransformer, other: VisionTransformer) -> float:
    """Largest absolute difference of the logits of two networks on four fixed images of noise."""
    side = one.config.img_size
    images = torch.randn(4, 3, side, side, generator=torch.Generator().manual_seed(0))
    return (one(images) - other(images)).abs().max().item()
