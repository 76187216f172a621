"""The loop of LC quantization: L steps by the user's training function, C steps by ours (arXiv:1707.04319).

``min L(w) subject to w = Delta(Theta)`` is solved by an augmented Lagrangian, ``L(w) - lambda^T (w - Delta) + mu/2 ||w - Delta||^2``, for
rising mu: the L step minimizes it over the weights, the C step over the compressed weights, and ``lambda <- lambda - mu (w - Delta)``. With
lambda held at zero it is the quadratic-penalty method.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from diffq_fx.arguments import check_flags
from diffq_fx.compression import require_compression
from diffq_fx.errors import PreparationError
from diffq_fx.methods.learning_compression import LCWeight, shared_groups
from diffq_fx.training.safety import train_or_go_back
from diffq_fx.weights import refuse_not_finite


@dataclass(frozen=True)
class LStep:
    """What a training function is told about its L step."""

    index: int
    """0 for the first."""
    mu: float
    penalty: Callable[[], Tensor]
    """Add this to the loss at every step: the terms of the augmented Lagrangian, 0-d, differentiable in the weights."""

    @property
    def largest_rate(self) -> float:
        """A gradient step with a larger rate than ``1 / mu`` overshoots the penalty's minimum: clip the learning rate to it.

        Half of it with Nesterov's momentum: at 0.9 that diverges beyond 1.36 over the curvature, which is mu and that of the loss.
        """
        return 1 / self.mu if self.mu > 0 else float("inf")


@dataclass(frozen=True)
class LCProgress:
    """One turn of the loop."""

    index: int
    mu: float
    distance: float
    """``||w - Delta|| / ||w||`` over all LC weights after the C step."""
    seconds: float


_FLOAT_BITS = 32

TrainingFunction = Callable[[nn.Module, LStep], None]


def geometric_schedule(first: float = 9e-5, factor: float = 1.1, steps: int = 40) -> list[float]:
    """The schedule ``mu_k = first * factor^k``; the default is that of the authors' LeNet300 example.

    Args:
        first: mu of the first L step.
        factor: by which mu grows from step to step.
        steps: number of L steps.

    Returns:
        mu for each step.

    Example:
        >>> geometric_schedule(1.0, 2.0, 3)
        [1.0, 2.0, 4.0]
    """
    return [first * factor**k for k in range(steps)]


def lc_penalty(model: nn.Module) -> Tensor:
    """The LC terms of the loss: ``sum of -lambda^T (w - Delta) + mu/2 ||w - Delta||^2`` (arXiv:1707.04319).

    For a training loop of your own: add it to the loss, and call :func:`lc_step` every few epochs.

    Args:
        model: prepared with :class:`~diffq_fx.methods.LC`, or a wrapper of it.

    Returns:
        0-d, differentiable in the weights; zero before the first :func:`lc_step`.

    Raises:
        PreparationError: the model is not prepared, or has no LC weight.

    Example:
        >>> from diffq_fx import prepare
        >>> from diffq_fx.methods import LC
        >>> prepared = prepare(torch.nn.Linear(4, 4), torch.zeros(1, 4), LC(codebook="scaled_binary"))
        >>> before = float(lc_step(prepared, next_mu=0.1))
        >>> bool(lc_penalty(prepared) > 0)
        True
    """
    return torch.stack([quantizer.lagrangian() for quantizer in lc_weights(model, "lc_penalty")]).sum()


@torch.no_grad()
def lc_step(model: nn.Module, *, next_mu: float, augmented: bool = True) -> float:
    """The C step and the step of the multipliers, and then mu for what follows.

    Args:
        model: prepared with :class:`~diffq_fx.methods.LC`, or a wrapper of it.
        next_mu: weight of the penalty until the next call.
        augmented: move the multipliers; False for the quadratic-penalty method.

    Returns:
        ``||w - Delta|| / ||w||`` over all LC weights.

    Raises:
        DivergenceError: a weight is not finite; nothing has changed.
        PreparationError: the model is not prepared, or has no LC weight.
        ValueError: ``next_mu`` is negative.

    Example:
        >>> from diffq_fx import prepare
        >>> from diffq_fx.methods import LC
        >>> prepared = prepare(nn.Linear(16, 16), torch.zeros(1, 16), LC(entries=4))
        >>> 0 < lc_step(prepared, next_mu=1e-2) < 1
        True
    """
    check_flags("lc_step", augmented=augmented)
    if not next_mu >= 0:
        raise ValueError(f"lc_step: next_mu must not be negative, got {next_mu}.")
    quantizers = lc_weights(model, "lc_step")
    refuse_not_finite((f"lc_step: weight {quantizer.spec.name!r}", quantizer.target()) for quantizer in quantizers)
    for group in shared_groups(quantizers):
        values = torch.cat([quantizer.target().flatten() for quantizer in group])
        warm = group[0].entries if float(group[0].started) else None
        entries = group[0].config.fit(values, warm)
        for quantizer in group:
            quantizer.take_c_step(entries, augmented=augmented)
    for quantizer in quantizers:
        quantizer.penalty.fill_(next_mu)
    pairs = [((quantizer.weight.float() - quantizer.compressed).norm(), quantizer.weight.float().norm()) for quantizer in quantizers]
    away, size = (torch.stack(norms).norm() for norms in zip(*pairs, strict=True))
    return float(away / size.clamp(min=torch.finfo(torch.float32).tiny))


def lc_weights(model: nn.Module, caller: str) -> list[LCWeight]:
    """The LC weights of a prepared model.

    Raises:
        PreparationError: there are none.
    """
    compression = require_compression(model, caller)
    found = [quantizer for quantizer in compression.quantizers if isinstance(quantizer, LCWeight)]
    if not found:
        raise PreparationError(f"{caller}: no weight of the model is quantized by LC: it was prepared with {compression.method.name}.")
    return found


def counted_ratio(model: nn.Module) -> float:
    """Compression ratio as the paper counts it: ``(P1 + P0) b / (P1 ceil(log2 K) + (P0 + K) b)`` (arXiv:1707.04319).

    P1 weights are quantized, P0 parameters are not; K counts the learned entries of every codebook once; b is 32.

    Args:
        model: prepared with :class:`~diffq_fx.methods.LC` alone.

    Returns:
        How many times smaller the model is.

    Example:
        >>> from diffq_fx import prepare
        >>> from diffq_fx.methods import LC
        >>> layers = [torch.nn.Linear(784, 300), torch.nn.Tanh(), torch.nn.Linear(300, 100), torch.nn.Tanh(), torch.nn.Linear(100, 10)]
        >>> model = prepare(torch.nn.Sequential(*layers), torch.zeros(1, 784), LC(entries=2))
        >>> round(counted_ratio(model), 1)  # LeNet300
        30.5
    """
    compression = require_compression(model, "counted_ratio")
    weights = lc_weights(model, "counted_ratio")
    if len(weights) < len(compression.quantizers):
        raise PreparationError(f"counted_ratio: the paper counts LC weights alone; the model was prepared with {compression.method.name}.")
    quantized = sum(quantizer.spec.numel for quantizer in weights)
    codes = sum(sum(q.footprint().histogram.keys()) * q.spec.numel for q in weights)
    learned = sum(group[0].config.learned_floats for group in shared_groups(weights))
    rest = compression.rest_numel
    return (quantized + rest) * _FLOAT_BITS / (codes + (rest + learned) * _FLOAT_BITS)


class LCLoop:
    """Runs the L and C steps over a schedule of mu.

    It stops where the schedule ends or the weights meet their compressed values. What is deployed are the compressed values: eval() and
    ``convert`` give them. The loop may be interrupted at any time and go on from :meth:`state_dict`.

    Args:
        model: prepared with :class:`~diffq_fx.methods.LC`; trained before, as the paper does.
        train: trains the model for one L step with ``step.penalty()`` added to the loss. It keeps its own optimizer or makes a new one.
        schedule: mu of each step, positive and rising; None for :func:`geometric_schedule`.
        augmented: False for the quadratic-penalty method.
        tolerance: stop at ``||w - Delta|| <= tolerance ||w||``.
        progress: called after each turn.

    Raises:
        PreparationError: the model is not prepared, or has no LC weight.
        ValueError: the schedule is empty, not positive or falls.

    Example:
        >>> from diffq_fx import prepare
        >>> from diffq_fx.methods import LC
        >>> x, y = torch.randn(64, 4), torch.randn(64, 1)
        >>> model = prepare(torch.nn.Linear(4, 1), x, LC(entries=2))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        >>> def train(model, step):
        ...     for _ in range(50):
        ...         optimizer.zero_grad()
        ...         ((model(x) - y).square().mean() + step.penalty()).backward()
        ...         optimizer.step()
        >>> history = LCLoop(model, train, schedule=geometric_schedule(0.1, 1.5, 15)).run()
        >>> history[-1].distance < 1e-3
        True
    """

    def __init__(
        self,
        model: nn.Module,
        train: TrainingFunction,
        *,
        schedule: Sequence[float] | None = None,
        augmented: bool = True,
        tolerance: float = 1e-3,
        progress: Callable[[LCProgress], None] | None = None,
    ) -> None:
        lc_weights(model, "LCLoop")
        check_flags("LCLoop", augmented=augmented)
        self.schedule = list(geometric_schedule() if schedule is None else schedule)
        rising = all(a <= b for a, b in zip(self.schedule, self.schedule[1:], strict=False))
        if not self.schedule or not all(mu > 0 for mu in self.schedule) or not rising:
            raise ValueError(f"LCLoop: the schedule must be positive and rising, got {self.schedule}.")
        self.model, self.train = model, train
        self.augmented, self.tolerance, self.progress = augmented, tolerance, progress
        self.history: list[LCProgress] = []

    @property
    def finished(self) -> bool:
        """Whether the schedule is done, or the weights have met their compressed values."""
        done = len(self.history) >= len(self.schedule)
        return done or bool(self.history and self.history[-1].distance <= self.tolerance)

    def run(self) -> list[LCProgress]:
        """Run to the end, from where the loop stands.

        Returns:
            All turns, those before an interruption included.

        Raises:
            DivergenceError: an L step left values that are not finite; the model is as it was before that step.
        """
        if not self.history:
            lc_step(self.model, next_mu=self.schedule[0], augmented=False)  # direct compression: lambda is zero
        while not self.finished:
            index = len(self.history)
            mu = self.schedule[index]
            began = time.monotonic()
            step = LStep(index, mu, lambda: lc_penalty(self.model))
            advice = f"mu is {mu:.3g}: keep the learning rate below 1/mu = {1 / mu:.3g} (step.largest_rate), or let mu rise more slowly."
            train_or_go_back(self.model, partial(self.train, self.model, step), f"LCLoop: L step {index}", advice)
            following = self.schedule[min(index + 1, len(self.schedule) - 1)]
            distance = lc_step(self.model, next_mu=following, augmented=self.augmented)
            self.history.append(LCProgress(index, mu, distance, time.monotonic() - began))
            if self.progress is not None:
                self.progress(self.history[-1])
        return self.history

    def state_dict(self) -> dict[str, Any]:
        """All that is needed to go on: the model with its codebooks and multipliers, and the turns so far; not your optimizer."""
        return {"model": self.model.state_dict(), "history": [asdict(turn) for turn in self.history]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a :meth:`state_dict` of a loop over the same model and schedule."""
        self.model.load_state_dict(state["model"])
        self.history = [LCProgress(**turn) for turn in state["history"]]
