"""How much arithmetic a Vision Transformer asks for, counted from its configuration alone. Imports no torch."""

from vitscale.model.registry import ViTConfig


def forward_macs(config: ViTConfig, size: int | None = None) -> int:
    """Multiply-adds of the forward pass of one image of `size` px a side (default: `config.img_size`).

    Matrix products are counted: the projection of the patches; in each block query, key and value, the scores of all
    tokens with all, the mixing of values by them, the projection, and the two layers of the MLP; the hidden layer of
    the head, if there is one, and the classifier. Biases, norms, softmax, GELU, residuals and the interpolation of
    positions are not. (timm's tables, by fvcore, add 5 operations an element for every layer norm: 0.1% of B/16.)
    """
    patches = ((config.img_size if size is None else size) // config.patch_size) ** 2
    tokens, width = patches + 1, config.width
    dense = 4 * width * width + 2 * width * config.mlp_width  # of one token in one block
    attention = 2 * tokens * width  # scores and mixing; the heads share the width
    embedding = patches * 3 * config.patch_size**2 * width
    head = width * config.num_classes + (width * width if config.pre_logits else 0)
    return embedding + config.depth * tokens * (dense + attention) + head


def training_flops(config: ViTConfig, size: int | None = None) -> int:
    """Floating-point operations of training on one image: 2 to a multiply-add, 3 forward passes' worth.

    A backward pass costs two forward passes: gradients of inputs and of weights. What is computed a second time to
    save memory does not count, so that a share of the device's peak (MFU) is one of useful work: Chowdhery et al. 2022
    (PaLM, arXiv:2204.02311), appendix B.
    """
    return 3 * 2 * forward_macs(config, size)
