"""The nets of the MNIST experiments, for images of 28x28."""

from torch import nn


def lenet300() -> nn.Sequential:
    """784-300-100-10 with tanh: 266,610 parameters."""
    layers = (nn.Linear(784, 300), nn.Tanh(), nn.Linear(300, 100), nn.Tanh(), nn.Linear(100, 10))
    return nn.Sequential(nn.Flatten(), *layers)


def lenet5() -> nn.Sequential:
    """Two convolutions of 5x5, with 20 and 50 channels, and 500 hidden units: 431,080 parameters."""
    features = (nn.Conv2d(1, 20, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(20, 50, 5), nn.ReLU(), nn.MaxPool2d(2))
    return nn.Sequential(*features, nn.Flatten(), nn.Linear(800, 500), nn.ReLU(), nn.Linear(500, 10))
