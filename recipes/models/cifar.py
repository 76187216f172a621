"""The nets of the CIFAR experiments, for images of 32x32."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class BasicBlock(nn.Module):
    """Two convolutions and a shortcut, a 1x1 convolution where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """The block."""
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


class ResNet18(nn.Module):
    """ResNet-18 (He et al., arXiv:1512.03385) with a 3x3 stem: 11.2 M weights."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU())
        widths = [64, 64, 64, 128, 128, 256, 256, 512, 512]
        self.blocks = nn.Sequential(*(BasicBlock(a, b, 2 if b != a else 1) for a, b in zip(widths[:-1], widths[1:], strict=True)))
        self.head = nn.Linear(512, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Scores of the classes."""
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


class PaddedBlock(nn.Module):
    """A basic block whose shortcut has no parameters: every second pixel, new channels zero, on both sides."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.stride, self.padding = (1, 0) if inputs == outputs else (2, outputs // 4)
        self.conv1, self.bn1 = nn.Conv2d(inputs, outputs, 3, self.stride, 1, bias=False), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        """The block."""
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        shortcut = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.padding, self.padding)) if self.stride == 2 else x
        return F.relu(out + shortcut)


class ResNet20(nn.Module):
    """ResNet-20 (He et al., arXiv:1512.03385, section 4.2): 0.27 M weights."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(PaddedBlock(16, 16), PaddedBlock(16, 16), PaddedBlock(16, 16))
        self.layer2 = nn.Sequential(PaddedBlock(16, 32), PaddedBlock(32, 32), PaddedBlock(32, 32))
        self.layer3 = nn.Sequential(PaddedBlock(32, 64), PaddedBlock(64, 64), PaddedBlock(64, 64))
        self.linear = nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Scores of the classes."""
        x = self.layer3(self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x))))))
        return self.linear(x.mean((2, 3)))


def _separable(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    """A depthwise convolution and a pointwise one."""
    depthwise = nn.Conv2d(inputs, inputs, 3, stride, 1, groups=inputs, bias=False)
    pointwise = nn.Conv2d(inputs, outputs, 1, bias=False)
    return nn.Sequential(depthwise, nn.BatchNorm2d(inputs), nn.ReLU(), pointwise, nn.BatchNorm2d(outputs), nn.ReLU())


class MobileNet(nn.Module):
    """MobileNet (Howard et al., arXiv:1704.04861) with a stem of stride 1: 3.2 M weights."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 32, 3, 1, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU())
        layers = [(64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5, (1024, 2), (1024, 1)]
        inputs = [32, *(outputs for outputs, _ in layers)]
        self.blocks = nn.Sequential(*(_separable(a, b, stride) for a, (b, stride) in zip(inputs, layers, strict=False)))
        self.head = nn.Linear(1024, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Scores of the classes."""
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


class _WideBlock(nn.Module):
    """Norm and activation before each convolution, dropout between them."""

    def __init__(self, inputs: int, outputs: int, stride: int, dropout: float) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(inputs), nn.Conv2d(inputs, outputs, 3, 1, 1)
        self.dropout = nn.Dropout(dropout)
        self.bn2, self.conv2 = nn.BatchNorm2d(outputs), nn.Conv2d(outputs, outputs, 3, stride, 1)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride) if stride != 1 or inputs != outputs else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        out = self.dropout(self.conv1(F.relu(self.bn1(x))))
        return self.conv2(F.relu(self.bn2(out))) + self.shortcut(x)


class WideResNet(nn.Module):
    """WideResNet-28-10 (Zagoruyko and Komodakis, arXiv:1605.07146): 36.5 M weights."""

    def __init__(self, classes: int = 10, depth: int = 28, widen: int = 10, dropout: float = 0.3) -> None:
        super().__init__()
        widths = [16, 16 * widen, 32 * widen, 64 * widen]
        blocks = []
        for number, (inputs, outputs) in enumerate(zip(widths[:-1], widths[1:], strict=True)):
            for index in range((depth - 4) // 6):
                stride = 2 if number and not index else 1
                blocks.append(_WideBlock(outputs if index else inputs, outputs, stride, dropout))
        self.conv, self.blocks = nn.Conv2d(3, 16, 3, 1, 1), nn.Sequential(*blocks)
        self.norm, self.head = nn.BatchNorm2d(widths[-1]), nn.Linear(widths[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        """Scores of the classes."""
        return self.head(F.relu(self.norm(self.blocks(self.conv(x)))).mean((2, 3)))


class _Layer(nn.Module):
    def __init__(self, width: int, heads: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        n, t, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(n, t, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, t, width)
        x = x + self.dropout(self.out(y))
        return x + self.dropout(self.down(self.dropout(F.gelu(self.up(self.norm2(x))))))


class ViT(nn.Module):
    """A vision transformer (Dosovitskiy et al., arXiv:2010.11929): 6 layers, 512 wide, on patches of 4x4."""

    def __init__(
        self, classes: int = 10, width: int = 512, layers: int = 6, heads: int = 8, hidden: int = 512, dropout: float = 0.1
    ) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, 4)
        self.token = nn.Parameter(torch.randn(1, 1, width))
        self.position = nn.Parameter(torch.randn(1, 65, width))
        self.dropout = nn.Dropout(dropout)
        self.layers = nn.Sequential(*(_Layer(width, heads, hidden, dropout) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Scores of the classes."""
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), tokens], 1) + self.position
        return self.head(self.norm(self.layers(self.dropout(x)))[:, 0])
