"""ResNet-v2 with group norm and weight standardisation: BiT (Kolesnikov et al. 2020, arXiv:1912.11370), and the ResNet
in front of the hybrid Vision Transformer (Dosovitskiy et al. 2020, arXiv:2010.11929, section 3.1)."""

from collections import OrderedDict
from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from vitscale.model.config import ResNetConfig
from vitscale.model.initial import Rules, constant, kaiming
from vitscale.model.layers import Block, kept
from vitscale.model.network import Network

GROUPS = 32  # of every group norm (Wu & He 2018, arXiv:1803.08494)


class StdConv(nn.Conv2d):
    """A convolution without bias whose kernels have mean 0 and variance 1 (Qiao et al. 2019, arXiv:1903.10520).

    Zeros around its input make ⌈side / stride⌉ pixels a side: `kernel` // 2 on each side, or with `same` as many as
    `pad_same` has.
    """

    def __init__(self, before: int, after: int, kernel: int = 1, stride: int = 1, same: bool = False) -> None:
        uneven = same and kernel > 1 and stride > 1  # elsewhere both are the same
        super().__init__(before, after, kernel, stride, padding=0 if uneven else kernel // 2, bias=False)
        self.window = (kernel, stride) if uneven else None

    def forward(self, input: Tensor) -> Tensor:
        # each kernel's mean and variance; layer norm computes them in float32 whatever the dtype. timm's epsilon
        weight = F.layer_norm(self.weight, self.weight.shape[1:], eps=1e-8)
        padded = input if self.window is None else pad_same(input, *self.window)
        return F.conv2d(padded, weight, None, self.stride, self.padding)


def pad_same(x_BCYX: Tensor, kernel: int, stride: int) -> Tensor:
    """Zeros around a feature map so that windows of `kernel` ≥ `stride` give ⌈side / stride⌉ pixels a side.

    As TensorFlow's "SAME": no more than are needed, of an odd number the larger part on the right and below. They
    depend on the size of the image, so that weights made with them need them.
    """
    rows, columns = (kernel - stride + -side % stride for side in x_BCYX.shape[-2:])
    return F.pad(x_BCYX, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2))


class Bottleneck(Block):
    """Pre-activation bottleneck (He et al. 2016, arXiv:1603.05027): x + conv3(conv2(conv1(x))), a norm and ReLU before
    each; the stride is that of the 3×3 in the middle.

    With `project`, the first norm and ReLU are shared by a projection of the residual, `downsample`. `keep_2B` is as of
    `Block`, for its one branch the first row.
    """

    def __init__(self, before: int, after: int, stride: int, project: bool) -> None:
        super().__init__()
        middle = after // 4
        self.downsample = named(conv=StdConv(before, after, stride=stride)) if project else None
        self.norm1, self.conv1 = nn.GroupNorm(GROUPS, before), StdConv(before, middle)
        self.norm2, self.conv2 = nn.GroupNorm(GROUPS, middle), StdConv(middle, middle, 3, stride)
        self.norm3, self.conv3 = nn.GroupNorm(GROUPS, middle), StdConv(middle, after)

    def forward(self, x_BCYX: Tensor, keep_2B: Tensor | None = None) -> Tensor:
        active = F.relu(self.norm1(x_BCYX))
        residual = x_BCYX if self.downsample is None else self.downsample(active)
        branch = self.conv2(F.relu(self.norm2(self.conv1(active))))
        branch = self.conv3(F.relu(self.norm3(branch)))
        return residual + kept(branch, None if keep_2B is None else keep_2B[0])


class PostNormBottleneck(Block):
    """The bottleneck of the hybrid's ResNet: norms and ReLUs behind the convolutions, the last ReLU behind the sum."""

    def __init__(self, before: int, after: int, stride: int, project: bool) -> None:
        super().__init__()
        middle = after // 4
        self.downsample = None
        if project:
            self.downsample = named(conv=StdConv(before, after, stride=stride), norm=nn.GroupNorm(GROUPS, after))
        self.conv1, self.norm1 = StdConv(before, middle), nn.GroupNorm(GROUPS, middle)
        self.conv2, self.norm2 = StdConv(middle, middle, 3, stride, same=True), nn.GroupNorm(GROUPS, middle)
        self.conv3, self.norm3 = StdConv(middle, after), nn.GroupNorm(GROUPS, after)

    def forward(self, x_BCYX: Tensor, keep_2B: Tensor | None = None) -> Tensor:
        residual = x_BCYX if self.downsample is None else self.downsample(x_BCYX)
        branch = F.relu(self.norm1(self.conv1(x_BCYX)))
        branch = self.norm3(self.conv3(F.relu(self.norm2(self.conv2(branch)))))
        return F.relu(residual + kept(branch, None if keep_2B is None else keep_2B[0]))


class Stem(nn.Module):
    """The ResNet in front of the hybrid's patches: images (B, 3, Y, X) → (B, C, Y / stride, X / stride), ≥ 0.

    `depths` are the blocks of each stage, the stride 2^(stages + 1), and C is `channels`. As in timm, of whose backbone
    (`patch_embed.backbone`) the parameters have their names.
    """

    def __init__(self, depths: Sequence[int]) -> None:
        super().__init__()
        self.channels = 256 << (len(depths) - 1)
        self.stem = named(conv=StdConv(3, 64, 7, 2, same=True), norm=nn.GroupNorm(GROUPS, 64))
        self.stages = make_stages(PostNormBottleneck, depths, factor=1)

    def forward(self, images_BCYX: Tensor) -> Tensor:
        x_BCYX = F.relu(self.stem(images_BCYX))
        return self.stages(F.max_pool2d(pad_same(x_BCYX, 3, 2), 3, 2))  # nothing is below the zeros around


# As in timm and in the paper's own code (`vit_jax/models_resnet.py`): every block begins as its residual.
STEM_RULES: Rules = (
    (r".*\.norm3\.weight$", constant(0.0)),
    (r".*norm\w*\.weight$", constant(1.0)),
    (r".*conv\d?\.weight$", kaiming),
)


class ResNet(Network):
    """BiT's ResNet-v2: 7×7 convolution and max pooling → stages of bottlenecks → norm, ReLU, mean, classifier.

    Images of any sides; features are (B, C, Y / 32, X / 32) for four stages, rounded up. Parameter names are timm's,
    the classifier a 1×1 convolution as there.
    """

    config: ResNetConfig

    def __init__(self, config: ResNetConfig, seed: int | None = 0) -> None:
        super().__init__(config)
        width = 256 * config.factor << (len(config.depths) - 1)
        self.stem = named(conv=StdConv(3, 64 * config.factor, 7, 2))
        self.stages = make_stages(Bottleneck, config.depths, config.factor)
        self.norm = nn.GroupNorm(GROUPS, width)
        self.head = named(fc=nn.Conv2d(width, config.num_classes, 1))
        self.initialise(seed)

    @staticmethod
    def rules(config: ResNetConfig) -> Rules:
        """As in timm, but for a classifier of zeros, as in google-research/big_vision `models/bit.py`; all norms begin
        as ones, the last of a block as well."""
        return (
            (r"norm\d?\.weight$", constant(1.0)),
            (r"conv\d?\.weight$", kaiming),
            (r"^head\.fc\.bias$", constant(config.head_bias)),
        )

    def forward(self, images_BCYX: Tensor, keep_L2B: Tensor | None = None, return_attention: bool = False) -> Tensor:
        """Logits (B, K). Raises `ValueError` for `return_attention`."""
        if return_attention:
            raise ValueError("a ResNet has no attention to return")
        pooled_BC = self.representation(self.forward_features(images_BCYX, keep_L2B))
        return self.head(pooled_BC[:, :, None, None]).flatten(1)

    def forward_features(self, images_BCYX: Tensor, keep_L2B: Tensor | None = None) -> Tensor:
        """Feature map of the last block, normalised and behind a ReLU, (B, C, Y, X)."""
        x_BCYX = F.max_pool2d(F.pad(self.stem(images_BCYX), (1, 1, 1, 1)), 3, 2)  # zeros, as BiT has it, not -∞
        blocks = [block for block in self.stages.modules() if isinstance(block, Bottleneck)]
        return F.relu(self.norm(self.through(blocks, x_BCYX, keep_L2B)))

    def representation(self, features_BCYX: Tensor) -> Tensor:
        """What the classifier sees: the mean over places, (B, C)."""
        return features_BCYX.mean(dim=(2, 3))


def make_stages(
    bottleneck: type[Bottleneck] | type[PostNormBottleneck], depths: Sequence[int], factor: int
) -> nn.Sequential:
    """Stages of so many blocks, the first 256 · `factor` wide; later ones double the width and halve the sides."""
    stages, before = [], 64 * factor
    for number, depth in enumerate(depths):
        after, blocks = 256 * factor << number, []
        for place in range(depth):
            stride = 2 if number and not place else 1
            blocks.append(bottleneck(before, after, stride, project=not place))
            before = after
        stages.append(named(blocks=nn.Sequential(*blocks)))
    return nn.Sequential(*stages)


def named(**modules: nn.Module) -> nn.Sequential:
    """Modules one after another, by name."""
    return nn.Sequential(OrderedDict(modules))
