"""Convolutional networks: the real topologies, narrow enough for a test."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

from zoo.entry import Entry, randn


def conv_bn(
    inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1, act: type[nn.Module] | None = nn.ReLU
) -> nn.Sequential:
    """Convolution, batch norm and, unless ``act`` is None, an activation."""
    layers: list[nn.Module] = [nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False), nn.BatchNorm2d(outputs)]
    return nn.Sequential(*layers, *([act()] if act else []))


class BasicBlock(nn.Module):
    """The residual block of ResNet-18 and, with ``excite``, of its squeeze-and-excitation variant."""

    def __init__(self, inputs: int, outputs: int, stride: int, excite: bool = False) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.excite = SqueezeExcite(outputs, 4) if excite else None
        self.downsample = conv_bn(inputs, outputs, 1, stride, act=None) if stride != 1 or inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        if self.excite is not None:
            out = self.excite(out)
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)


class SqueezeExcite(nn.Module):
    """Squeeze and excitation by two Linear layers."""

    def __init__(self, channels: int, squeezed: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(channels, squeezed), nn.Linear(squeezed, channels)

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, _, _ = x.size()
        scale = x.mean((2, 3)).view(batch, channels)
        return x * torch.sigmoid(self.fc2(F.relu(self.fc1(scale)))).view(batch, channels, 1, 1).expand_as(x)


class ResNetCifar(nn.Module):
    """ResNet-20 for CIFAR: three stages of three blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 3, 1, 1, bias=False), nn.BatchNorm2d(4)
        blocks, inputs = [], 4
        for width, stride in ((4, 1), (4, 1), (4, 1), (8, 2), (8, 1), (8, 1), (16, 2), (16, 1), (16, 1)):
            blocks.append(BasicBlock(inputs, width, stride))
            inputs = width
        self.blocks = nn.Sequential(*blocks)
        self.linear = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        out = self.blocks(F.relu(self.bn1(self.conv1(x))))
        out = F.avg_pool2d(out, out.size()[3])
        return self.linear(out.view(out.size(0), -1))


class ResNet18(nn.Module):
    """ResNet-18, plain or with squeeze and excitation."""

    def __init__(self, excite: bool = False) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 7, 2, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1))
        widths = (4, 4, 8, 8, 12, 12, 16, 16)
        strides = (1, 1, 2, 1, 2, 1, 2, 1)
        inputs = (4, *widths)
        self.layers = nn.ModuleList(BasicBlock(i, o, s, excite) for i, o, s in zip(inputs, widths, strides, strict=False))
        self.pool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for layer in self.layers:
            x = layer(x)
        return self.fc(torch.flatten(self.pool(x), 1))


class InvertedResidual(nn.Module):
    """The block of MobileNetV2."""

    def __init__(self, inputs: int, outputs: int, stride: int, expand: int) -> None:
        super().__init__()
        hidden = inputs * expand
        self.use_residual = stride == 1 and inputs == outputs
        layers = [conv_bn(inputs, hidden, 1, act=nn.ReLU6)] if expand != 1 else []
        layers += [conv_bn(hidden, hidden, 3, stride, hidden, act=nn.ReLU6), conv_bn(hidden, outputs, 1, act=None)]
        self.conv = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.use_residual else self.conv(x)


class MobileNetV2(nn.Module):
    """MobileNetV2 with its seven stages, at most two blocks in each."""

    def __init__(self) -> None:
        super().__init__()
        features: list[nn.Module] = [conv_bn(3, 4, 3, 2, act=nn.ReLU6)]
        inputs = 4
        stages = ((1, 4, 1, 1), (2, 4, 2, 2), (2, 4, 1, 2), (2, 8, 2, 2), (2, 8, 1, 1), (2, 12, 1, 1), (2, 12, 1, 1))
        for expand, width, repeats, stride in stages:
            for i in range(repeats):
                features.append(InvertedResidual(inputs, width, stride if i == 0 else 1, expand))
                inputs = width
        self.features = nn.Sequential(*features, conv_bn(inputs, 24, 1, act=nn.ReLU6))
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(24, 10))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(F.adaptive_avg_pool2d(self.features(x), (1, 1)).reshape(x.shape[0], -1))


class StochasticDepth(nn.Module):
    """Drops the whole branch for some rows of the batch: random numbers and a test of the mode, but no weight."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        keep = torch.empty([x.shape[0]] + [1] * (x.ndim - 1), dtype=x.dtype, device=x.device).bernoulli_(1 - self.p)
        return x * keep / (1 - self.p)


class MBConv(nn.Module):
    """The block of EfficientNet: SiLU, squeeze and excitation by 1x1 convolutions, stochastic depth."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expand: int) -> None:
        super().__init__()
        hidden = inputs * expand
        self.expand = conv_bn(inputs, hidden, 1, act=nn.SiLU) if expand != 1 else nn.Identity()
        self.depthwise = conv_bn(hidden, hidden, kernel, stride, hidden, act=nn.SiLU)
        self.squeeze = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(hidden, 2, 1), nn.SiLU(), nn.Conv2d(2, hidden, 1), nn.Sigmoid())
        self.project = conv_bn(hidden, outputs, 1, act=None)
        self.drop = StochasticDepth(0.5)
        self.use_residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        out = self.depthwise(self.expand(x))
        out = self.project(self.squeeze(out) * out)
        return x + self.drop(out) if self.use_residual else out


class EfficientNet(nn.Module):
    """EfficientNet with one block less a stage than B0."""

    def __init__(self) -> None:
        super().__init__()
        blocks: list[nn.Module] = []
        inputs = 4
        for expand, width, repeats, stride, kernel in (
            (1, 4, 1, 1, 3),
            (2, 4, 1, 2, 3),
            (2, 8, 2, 2, 5),
            (2, 8, 2, 1, 3),
            (2, 12, 2, 1, 5),
        ):
            for i in range(repeats):
                blocks.append(MBConv(inputs, width, kernel, stride if i == 0 else 1, expand))
                inputs = width
        self.features = nn.Sequential(conv_bn(3, 4, 3, 2, act=nn.SiLU), *blocks, conv_bn(inputs, 24, 1, act=nn.SiLU))
        self.avgpool, self.classifier = nn.AdaptiveAvgPool2d(1), nn.Sequential(nn.Dropout(0.2), nn.Linear(24, 10))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(torch.flatten(self.avgpool(self.features(x)), 1))


def channel_shuffle(x: Tensor, groups: int) -> Tensor:
    """Interleave the channels of the groups."""
    batch, channels, height, width = x.size()
    return x.view(batch, groups, channels // groups, height, width).transpose(1, 2).contiguous().view(batch, channels, height, width)


class ShuffleUnit(nn.Module):
    """The block of ShuffleNetV2."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.stride, half = stride, outputs // 2
        self.branch1 = nn.Sequential()
        if stride > 1:
            self.branch1 = nn.Sequential(conv_bn(inputs, inputs, 3, stride, inputs, act=None), conv_bn(inputs, half, 1))
        start = inputs if stride > 1 else half
        self.branch2 = nn.Sequential(conv_bn(start, half, 1), conv_bn(half, half, 3, stride, half, act=None), conv_bn(half, half, 1))

    def forward(self, x: Tensor) -> Tensor:
        if self.stride == 1:
            kept, changed = x.chunk(2, dim=1)
            out = torch.cat((kept, self.branch2(changed)), dim=1)
        else:
            out = torch.cat((self.branch1(x), self.branch2(x)), dim=1)
        return channel_shuffle(out, 2)


class ShuffleNetV2(nn.Module):
    """ShuffleNetV2 with two units a stage."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = conv_bn(3, 4, 3, 2)
        stages, inputs = [], 4
        for width in (8, 16, 32):
            stages += [ShuffleUnit(inputs, width, 2), ShuffleUnit(width, width, 1)]
            inputs = width
        self.stages, self.conv5, self.fc = nn.Sequential(*stages), conv_bn(inputs, 32, 1), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.conv5(self.stages(self.conv1(x))).mean([2, 3]))


class DenseLayer(nn.Module):
    """A layer of DenseNet: takes the list of all features before it."""

    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(inputs), nn.Conv2d(inputs, 2 * growth, 1, bias=False)
        self.norm2, self.conv2 = nn.BatchNorm2d(2 * growth), nn.Conv2d(2 * growth, growth, 3, padding=1, bias=False)
        self.drop_rate = 0.1
        self.dropout = nn.Dropout(self.drop_rate)

    def forward(self, features: list[Tensor]) -> Tensor:
        bottleneck = self.conv1(F.relu(self.norm1(torch.cat(features, 1))))
        return self.dropout(self.conv2(F.relu(self.norm2(bottleneck))))


class DenseBlock(nn.ModuleDict):
    """A block of DenseNet: a ModuleDict with a forward of its own."""

    def __init__(self, layers: int, inputs: int, growth: int) -> None:
        super().__init__({f"denselayer{i + 1}": DenseLayer(inputs + i * growth, growth) for i in range(layers)})

    def forward(self, start: Tensor) -> Tensor:
        features = [start]
        for _, layer in self.items():
            features.append(layer(features))
        return torch.cat(features, 1)


class DenseNet(nn.Module):
    """DenseNet with two blocks and a transition."""

    def __init__(self) -> None:
        super().__init__()
        self.conv0 = conv_bn(3, 8, 3, 2)
        self.block1 = DenseBlock(3, 8, 4)
        self.transition = nn.Sequential(nn.BatchNorm2d(20), nn.ReLU(), nn.Conv2d(20, 10, 1, bias=False), nn.AvgPool2d(2))
        self.block2, self.classifier = DenseBlock(3, 10, 4), nn.Linear(22, 10)

    def forward(self, x: Tensor) -> Tensor:
        out = self.block2(self.transition(self.block1(self.conv0(x))))
        return self.classifier(F.adaptive_avg_pool2d(F.relu(out), 1).flatten(1))


class UNet(nn.Module):
    """One level of a U-Net with a transposed convolution, in one, two or three dimensions."""

    def __init__(self, dims: int, output_size: bool = False) -> None:
        super().__init__()
        conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
        transposed = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[dims - 1]
        self.down1, self.down2 = conv(2, 4, 3, padding=1), conv(4, 6, 3, stride=2, padding=1)
        self.up, self.out = transposed(6, 4, 2, stride=2), conv(8, 2, 3, padding=1)
        self.output_size = output_size

    def forward(self, x: Tensor) -> Tensor:
        skip = F.relu(self.down1(x))
        deep = F.relu(self.down2(skip))
        up = self.up(deep, skip.shape[2:]) if self.output_size else self.up(deep)
        return self.out(torch.cat([up, skip], 1))


class BlurPool(nn.Module):
    """A fixed filter in a buffer that is expanded: one value stands for many, so nothing can be written to it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 3, bias=False), nn.Linear(4, 5)
        self.register_buffer("kernel", torch.tensor(1 / 9).expand(4, 1, 3, 3), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        blurred = F.conv2d(self.conv(x), self.kernel, stride=2, groups=4)
        return self.fc(blurred.mean((2, 3)))


class WeightNormed(nn.Module):
    """Weight norm by parametrization: the weight itself is the result of a computation."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear = weight_norm(nn.Conv1d(3, 8, 3)), weight_norm(nn.Linear(8, 5))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(F.relu(self.conv(x)).mean(-1))


class SpectralNormed(nn.Module):
    """Spectral norm by parametrization: in training it changes buffers before the weight is made."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear = spectral_norm(nn.Conv1d(3, 8, 3)), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(F.relu(self.conv(x)).mean(-1))


def _images(size: int):
    return lambda variant: randn(2 + variant, 3, size + 8 * variant, size + 8 * variant)


def _unet_inputs(dims: int):
    return lambda variant: randn(2 + variant, 2, *[8 + 4 * variant] * dims)


_MAGNITUDES = ("conv.parametrizations.weight.original0", "linear.parametrizations.weight.original0")

ENTRIES = [
    Entry(name="resnet20_cifar", build=ResNetCifar, inputs=_images(16), weights=22),
    Entry(name="resnet18", build=ResNet18, inputs=_images(32), weights=21),
    Entry(name="mobilenetv2", build=MobileNetV2, inputs=_images(32), weights=1 + 2 + 8 * 3 + 2),
    Entry(name="efficientnet", build=EfficientNet, inputs=_images(32), weights=2 + 8 * 5 - 1 + 1),
    Entry(name="shufflenetv2", build=ShuffleNetV2, inputs=_images(32), weights=1 + 3 * (5 + 3) + 2),
    Entry(name="seresnet18", build=lambda: ResNet18(excite=True), inputs=_images(32), weights=21 + 16),
    Entry(name="densenet", build=DenseNet, inputs=_images(16), weights=1 + 6 + 1 + 6 + 1),
    Entry(name="unet1d", build=lambda: UNet(1), inputs=_unet_inputs(1), weights=4),
    Entry(name="unet2d", build=lambda: UNet(2), inputs=_unet_inputs(2), weights=4),
    Entry(name="unet3d", build=lambda: UNet(3), inputs=_unet_inputs(3), weights=4),
    Entry(
        name="unet2d_output_size",
        build=lambda: UNet(2, output_size=True),
        inputs=_unet_inputs(2),
        weights=4,
        untraceable="inputs to control flow",
    ),
    Entry(name="blur_pool", build=BlurPool, inputs=_images(8), weights=2),
    Entry(name="weight_norm", build=WeightNormed, inputs=lambda v: randn(2 + v, 3, 9 + v), weights=2, skipped=_MAGNITUDES, pickles=False),
    Entry(name="spectral_norm", build=SpectralNormed, inputs=lambda v: randn(2 + v, 3, 9 + v), weights=2, pickles=False),
]
