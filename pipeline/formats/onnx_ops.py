"""What PyTorch's exporter to ONNX would translate into something that runtimes compute differently.

Imports onnxscript: to be imported where that is known to be there.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from onnxscript import FLOAT, INT64
from onnxscript import opset20 as op

OPSET = 20  # the first that has GELU


def max_pool(
    self: Any,
    kernel_size: Sequence[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    ceil_mode: bool = False,
) -> Any:
    """Max pooling behind the maximum with -∞, which changes nothing.

    It keeps runtimes from taking zeros around the image, padded before, into the pooling, which pads with -∞: a known
    fault of ONNX Runtime's `Pad_Fusion` and of onnx-simplifier, which gives other values where all are negative.
    """
    pooled, _ = op.MaxPool(
        op.Max(self, op.CastLike(op.Constant(value_float=-math.inf), self)),
        kernel_shape=list(kernel_size),
        strides=list(stride or kernel_size),
        pads=[*padding, *padding],
        dilations=list(dilation),
        ceil_mode=int(ceil_mode),
    )
    return pooled


def fourier(self: Any, waves_NN: tuple[Any, Any], waves_DD: tuple[Any, Any]) -> Any:
    """Orthonormal Fourier transform of real numbers (B, N, D) over N and D, real and imaginary part last, by matrices.

    ONNX Runtime's `DFT` errs by 1e-3 for lengths that are no powers of 2, and other runtimes lack it.
    """
    (cos_NN, sin_NN), (cos_DD, sin_DD) = waves_NN, waves_DD
    even, odd = op.MatMul(self, cos_DD), op.MatMul(self, sin_DD)
    real = op.Sub(op.MatMul(cos_NN, even), op.MatMul(sin_NN, odd))
    imaginary = op.Neg(op.Add(op.MatMul(cos_NN, odd), op.MatMul(sin_NN, even)))
    return op.Concat(op.Unsqueeze(real, [-1]), op.Unsqueeze(imaginary, [-1]), axis=-1)


def waves(length: Any) -> tuple[Any, Any]:
    """Cosines and sines (n, n) of 2π i j / n, over √n."""
    places = op.Range(0, length, 1)
    products = op.Mul(op.Unsqueeze(places, [1]), op.Unsqueeze(places, [0]))
    n = op.Cast(length, to=FLOAT.dtype)
    # whole turns are taken off while numbers are whole: of large angles float32 would leave little
    angles = op.Mul(op.Cast(op.Mod(products, length), to=FLOAT.dtype), op.Div(2 * math.pi, n))
    return op.Div(op.Cos(angles), op.Sqrt(n)), op.Div(op.Sin(angles), op.Sqrt(n))


def resize(
    self: Any,
    output_size: Any,
    align_corners: bool,
    scales_h: float | None = None,
    scales_w: float | None = None,
) -> Any:
    """Bicubic interpolation with antialiasing, as PyTorch has it: Keys' cubic (1981) with a = -1/2, and no weight on
    places outside of the image. onnxscript before 0.7.1 leaves out one or both."""
    size = op.Concat(op.Shape(self, start=0, end=2), op.Cast(output_size, to=INT64.dtype), axis=0)
    return op.Resize(self, None, None, size, mode="cubic", antialias=1, cubic_coeff_a=-0.5, exclude_outside=1)


def translations() -> dict[Any, Any]:
    """Operations of PyTorch and the functions that write them, for the export of one graph."""
    made: dict[str, tuple[Any, Any]] = {}  # waves by length: all blocks share them

    def fft2(self: Any, s: Any = None, dim: Sequence[int] = (-2, -1), norm: str | None = None) -> Any:
        if s is not None or tuple(dim) != (-2, -1) or norm != "ortho" or len(self.shape) != 3:
            raise NotImplementedError("a Fourier transform that is not an orthonormal one over tokens and width")
        for place in (1, 2):
            if str(self.shape[place]) not in made:
                made[str(self.shape[place])] = waves(op.Squeeze(op.Shape(self, start=place, end=place + 1)))
        return fourier(self, made[str(self.shape[1])], made[str(self.shape[2])])

    return {
        torch.ops.aten.max_pool2d.default: max_pool,
        torch.ops.aten.fft_fft2.default: fft2,
        torch.ops.aten._upsample_bicubic2d_aa.default: resize,
    }
