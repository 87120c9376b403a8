"""What every architecture has in common: the interface that training, evaluation and export use."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from vitscale.model.config import ArchitectureConfig
from vitscale.model.initial import Rules, initialise
from vitscale.model.layers import Block

RECOMPUTE = ("none", "blocks", "selective")
HEAD = ("head.", "head_dist.", "pre_logits.")  # beginnings of names of what is dropped for other classes


class Network(nn.Module):
    """A classifier of images made of residual blocks. Single-device code: partitioned and compiled from outside.

    `forward`: float images (B, 3, Y, X), any sides that are multiples of `config.patch_size` → logits (B, K).
    `keep_L2B` are the factors of the two branches of each block, image by image, for stochastic depth in training
    (Huang et al. 2016): 0 where a branch is dropped, 1 / (1 - rate) where it is kept; None keeps them all.
    `return_attention=True` returns logits and the attention weights of each block, in float32.
    `forward_features` returns normalised features of the last block, and `representation` of these what the classifier
    sees, (B, D).

    Initial weights are those of `rules(config)` for `seed`; with None they are left as torch makes them, which is for
    parameters that are partitioned over ranks as they are made.

    `recompute`, set from outside, saves memory in training. `blocks` keeps of each `recompute_every`-th block its input
    alone and computes the rest again in the backward pass (Chen et al. 2016); `selective` keeps the results of its
    matrix products as well, so that what is computed again is cheap (Korthikanti et al. 2022).
    """

    recompute = "none"
    recompute_every = 1
    compiled = False

    def __init__(self, config: ArchitectureConfig) -> None:
        super().__init__()
        self.config: Any = config

    @staticmethod
    def rules(config: Any) -> Rules:
        """How the weights of such a network begin."""
        raise NotImplementedError

    def initialise(self, seed: int | None) -> None:
        """Give it its initial weights, unless `seed` is None."""
        if seed is not None:
            initialise(self, seed, self.rules(self.config))

    def through(
        self, blocks: Iterable[nn.Module], x: Tensor, keep_L2B: Tensor | None, *more: Any, first: int = 0
    ) -> Tensor:
        """`x` after these blocks, the `first`-th of the network and those that follow; `more` goes to each."""
        saving = self.recompute != "none" and self.training and torch.is_grad_enabled()
        for number, block in enumerate(blocks, first):
            keep_2B = None if keep_L2B is None else keep_L2B[number].to(x.dtype)
            if not saving or number % self.recompute_every or (self.compiled and self.recompute == "selective"):
                x = block(x, keep_2B, *more)
            else:  # around the block's hooks, which under ZeRO-3 gather its weights again
                x = recomputed(block, self.recompute)(x, keep_2B, *more)
        return x


def recomputed(run: Callable[..., Tensor], recompute: str) -> Callable[..., Tensor]:
    """`run`, keeping what `recompute` says for the backward pass.

    The variant without a backward pass within: under ZeRO-3 each weight is then gathered no more often.
    """
    if recompute == "selective":
        contexts = partial(create_selective_checkpoint_contexts, _policy)
        return partial(checkpoint, run, use_reentrant=False, context_fn=contexts)
    return partial(checkpoint, run, use_reentrant=False)


_PRODUCTS = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten.baddbmm.default,
    torch.ops.aten.convolution.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
}


def _policy(_: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in _PRODUCTS else CheckpointPolicy.PREFER_RECOMPUTE


def compile_blocks(model: Network) -> None:
    """Compile the forward of every `Block` within: one graph, which all blocks alike share, without breaks.

    Names in the state dict stay, and so do hooks on a block, which run before and after what is compiled: those that
    gather partitioned weights have to be on blocks as a whole, none on the modules within. What makes another graph is
    another micro batch, image size or dtype, the change between training and evaluation, and stochastic depth; those
    met before are kept. Dropout draws other numbers than uncompiled blocks do. A copy of a compiled model would run the
    weights of the original: copy first. Set `recompute` before.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)  # sizes × forms of blocks
    model.compiled = True
    number = 0
    for name, block in model.named_modules():
        if not isinstance(block, Block):
            continue
        forward, of_stem = block.forward, name.startswith("patch_embed.")
        if model.recompute == "selective" and not of_stem and number % model.recompute_every == 0:
            forward = recomputed(forward, "selective")  # the compiler takes it in; from outside it cannot see within
        number += not of_stem
        block.forward = torch.compile(forward, fullgraph=True, dynamic=False)
