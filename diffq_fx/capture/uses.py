"""Which elements of which weight an operator multiplies with what: found by the storage of its arguments, whatever module or function ran.

A weight is known by the address of its storage, so that views (transposed, chunked, reshaped, expanded) need no rule of their own, and by
what was copied from it (another dtype, other strides). Every product of PyTorch ends in a handful of operators: torch.einsum in bmm, a
linear layer in addmm, a recurrent layer in one addmm for each step.

Shape legend: P products (rows of the input), K inputs of each, G groups.
"""

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from diffq_fx.example import tensors_of
from diffq_fx.weights import WeightSpec

PIECE = 1 << 22
"""Elements of an unfolded input that are held at a time."""

_MATRIX_PRODUCTS = {"mm": 0, "bmm": 0, "mv": 0, "addmm": 1, "baddbmm": 1, "addmv": 1}
"""Operators and which argument is their left factor; the right one is the next."""
_LOOK_UPS = ("embedding", "_embedding_bag", "_embedding_bag_forward_only", "index_select", "index")
_COPIES = ("clone", "_to_copy")


@dataclass(frozen=True, eq=False)
class Given:
    """A weight as the model computes with it, or a copy of it."""

    spec: WeightSpec
    tensor: Tensor
    """Kept alive, so that no other tensor gets its address."""
    copied: Tensor | None = None
    """Of a copy with other strides: which element of the weight each element of its storage is, int64."""
    shift: int = 0
    """Of a copy with the same strides: how much earlier it begins in its storage."""


class WeightProduct(NamedTuple):
    """One use of a weight: what some of its rows and columns are multiplied with."""

    first_row: int
    rows: int
    columns: Tensor | None
    """Those that the inputs run along, int64; None for all of them in their order."""
    along_rows: bool
    """Whether the inputs run along the rows instead, so that none has more than one of them: a table that is looked up."""
    inputs: Callable[[], Iterator[Tensor]]
    """The inputs in pieces of shape (P, K)."""
    one_hot: Tensor | None = None
    """Of a look-up, whose inputs are rows of the unit matrix: the indices that are looked up."""
    width: int = 0
    """Of a look-up: how many rows the unit matrix has."""
    key: Tensor | None = None
    """The inputs, where neighbouring products may share them."""

    @property
    def same_inputs(self) -> tuple[Any, ...] | None:
        """Equal for products with the same inputs, as long as the key of one is held; None where that cannot be known."""
        read = self.key
        if read is None or read.is_inference():  # which counts no changes
            return None
        return read.data_ptr(), read.shape, read.stride(), read.dtype, read._version


class WeightUses(TorchDispatchMode):
    """Tells every use of some weights by what runs under it.

    ``on_product`` is called with a weight's name and a :class:`WeightProduct`, ``on_other`` with the name and that of another operator.
    """

    def __init__(
        self, given: Sequence[Given], on_product: Callable[[str, WeightProduct], None], on_other: Callable[[str, str], None]
    ) -> None:
        super().__init__()
        self.given = {_address(each.tensor): each for each in given}
        self.known = dict(self.given)
        self.on_product, self.on_other = on_product, on_other

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator, then look at what it was given."""
        kwargs = kwargs or {}
        if torch.is_inference_mode_enabled():  # operators made of others come whole there
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        result = func(*args, **kwargs)
        made = {_address(tensor) for tensor in tensors_of(result)}
        for tensor in tensors_of((args, kwargs)):
            given = self.known.get(_address(tensor))
            if given is not None and made and _address(tensor) not in made:  # neither a view nor a look at its shape
                self._note(func.overloadpacket.__name__, given, tensor, args, result)
        return result

    def forget_copies(self) -> None:
        """Let go of what was copied from weights; for between two forwards."""
        self.known = dict(self.given)

    def _note(self, operator: str, given: Given, tensor: Tensor, args: Any, result: Any) -> None:
        name, products = given.spec.name, None
        if operator in _COPIES:
            self.known[_address(result)] = _copy_of(given, tensor, result)
            return
        if operator in _LOOK_UPS and tensor is args[0]:
            products = _look_ups(operator, given, *args)
        elif operator in _MATRIX_PRODUCTS:
            left = _MATRIX_PRODUCTS[operator]
            products = _matrix_products(given, tensor, args[left], args[left + 1])
        elif operator == "convolution" and tensor is args[1]:
            products = _convolutions(given, *args)
        if products is None:
            self.on_other(name, operator)
        for product in products or ():
            self.on_product(name, product)


@contextmanager
def operators_in_parts(model: nn.Module) -> Iterator[None]:
    """No operator that computes a whole layer: of attention's none, and none of a recurrent layer's where there is one."""
    fast = torch.backends.mha.get_fastpath_enabled()
    with ExitStack() as stack:
        if any(isinstance(module, nn.RNNBase) for module in model.modules()):
            stack.enter_context(warnings.catch_warnings())
            warnings.filterwarnings("ignore", message="TF32 acceleration")  # which the next line warns of where there is no such GPU
            stack.enter_context(torch.backends.mkldnn.flags(enabled=False))
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr() if tensor.layout is torch.strided else 0


def _elements(given: Given, view: Tensor, dims: Sequence[int]) -> Tensor:
    """Which elements of the weight lie along some dimensions of a view of it, at index 0 of the others; int64, in one row."""
    place = torch.tensor([view.storage_offset()], device=view.device)
    for dim in dims:
        place = (place[:, None] + torch.arange(view.shape[dim], device=view.device) * view.stride(dim)).reshape(-1)
    place = place + given.shift
    return place if given.copied is None else given.copied[place]


def _copy_of(given: Given, source: Tensor, result: Tensor) -> Given:
    if result.stride() == source.stride():
        return Given(given.spec, result, given.copied, given.shift + int(source.storage_offset() - result.storage_offset()))
    copied = torch.zeros(result.untyped_storage().nbytes() // result.element_size(), dtype=torch.int64, device=result.device)
    elements = _elements(given, source, range(source.ndim)).reshape(source.shape)
    copied.as_strided(result.shape, result.stride(), result.storage_offset()).copy_(elements)
    return Given(given.spec, result, copied)


def rows_and_columns(spec: WeightSpec, elements: Tensor) -> tuple[Tensor, Tensor]:
    """Where elements of a weight, by their index in it, are in its rows; both int64.

    Example:
        >>> rows_and_columns(WeightSpec(name="w", shape=(2, 3), axis=1), torch.tensor([0, 1, 5]))
        (tensor([0, 1, 2]), tensor([0, 0, 1]))
    """
    after = math.prod(spec.shape[spec.axis + 1 :])
    above = elements // (after * spec.rows)
    return elements // after % spec.rows, above * after + elements % after


def _product(
    given: Given, view: Tensor, free: Sequence[int], summed: Sequence[int], inputs: Callable[[], Iterator[Tensor]], **more: Any
) -> WeightProduct | None:
    """The product that sums over some dimensions of a view; None where neither rows nor columns of the weight run along them."""
    rows, one_column = rows_and_columns(given.spec, _elements(given, view, free))
    other_rows, columns = rows_and_columns(given.spec, _elements(given, view, summed))
    if _all_same(rows) and _all_same(columns) and not (_all_same(other_rows) and _all_same(one_column)):
        return WeightProduct(0, given.spec.rows, None, True, inputs, **more)
    if not _all_same(other_rows) or not _all_same(one_column) or not _count_up(rows, int(rows[0])):
        return None
    every = len(columns) == given.spec.columns and _count_up(columns, 0)
    return WeightProduct(int(rows[0]), len(rows), None if every else columns, False, inputs, **more)


def _all_same(values: Tensor) -> bool:
    return bool((values == values[0]).all())


def _count_up(values: Tensor, first: int) -> bool:
    return torch.equal(values, torch.arange(first, first + len(values), device=values.device))


def _look_ups(operator: str, given: Given, weight: Tensor, *args: Any) -> list[WeightProduct] | None:
    """A look-up along the first axis as a product with rows of the unit matrix."""
    indices = args[0]
    if operator == "index_select":
        indices = args[1] if args[0] == 0 else None
    elif operator == "index":
        indices = args[0][0] if len(args[0]) == 1 else None
    if indices is None or indices.dtype not in (torch.int64, torch.int32):
        return None
    one_hot = indices.reshape(-1).long() % weight.shape[0]
    product = _product(given, weight, range(1, weight.ndim), (0,), lambda: iter(()), one_hot=one_hot, width=weight.shape[0])
    return None if product is None else [product]


def _matrix_products(given: Given, weight: Tensor, left: Tensor, right: Tensor) -> list[WeightProduct] | None:
    if weight is right:
        inputs, free, summed = left, -1, -2
        if weight.ndim == 1:  # a matrix by a vector
            weight = weight[:, None]
    else:
        inputs, free, summed = right.mT if right.ndim > 1 else right[None], -2, -1
    if weight.ndim == 3 and (weight.shape[0] == 1 or weight.stride(0) == 0):
        weight, inputs = weight[0], inputs.reshape(-1, inputs.shape[-1])
    pairs = [(weight, inputs)] if weight.ndim == 2 else list(zip(weight, inputs, strict=True))
    products = [_product(given, factor, (free,), (summed,), lambda own=own: iter((own,)), key=own) for factor, own in pairs]
    return None if None in products else cast("list[WeightProduct]", products)


def _convolutions(
    given: Given,
    inputs: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
) -> list[WeightProduct] | None:
    kernel = weight.shape[2:]
    if transposed:
        windows = _windows(*_stuffed(inputs, kernel, stride, padding, dilation, output_padding), kernel, [1] * len(kernel), dilation)
        flipped = tuple(range(-len(kernel), 0))
    else:
        pads = [pad for each in reversed(padding) for pad in (each, each)]
        windows, flipped = _windows(inputs, pads, kernel, stride, dilation), ()
    free, summed = ((1,), (0, *range(2, weight.ndim))) if transposed else ((0,), tuple(range(1, weight.ndim)))
    channels, products = inputs.shape[1] // groups, []
    for group, part in enumerate(weight.chunk(groups)):
        own = windows[:, group * channels : (group + 1) * channels]
        products.append(_product(given, part, free, summed, lambda own=own: _pieces(own, len(kernel), flipped)))
    return None if None in products else products


def _stuffed(
    inputs: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], further: Sequence[int]
) -> tuple[Tensor, list[int]]:
    """What a transposed convolution convolves with its flipped kernel: the inputs with zeros between them, and how to pad them."""
    spread = inputs.new_zeros(*inputs.shape[:2], *((n - 1) * s + 1 for n, s in zip(inputs.shape[2:], stride, strict=True)))
    spread[(slice(None), slice(None), *(slice(None, None, s) for s in stride))] = inputs
    ends = [(d * (k - 1) - p, d * (k - 1) - p + more) for k, p, d, more in zip(kernel, padding, dilation, further, strict=True)]
    return spread, [pad for each in reversed(ends) for pad in each]


def _windows(inputs: Tensor, pads: Sequence[int], kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]) -> Tensor:
    """A view of the padded input, shape (N, C, positions..., kernel...)."""
    windows = F.pad(inputs, list(pads))
    for axis, (size, step, apart) in enumerate(zip(kernel, stride, dilation, strict=True), 2):
        windows = windows.unfold(axis, (size - 1) * apart + 1, step)[..., ::apart]
    return windows


def _pieces(windows: Tensor, dims: int, flipped: tuple[int, ...]) -> Iterator[Tensor]:
    """The windows as rows of (channel, kernel...), in pieces."""
    windows = windows.movedim(1, 1 + dims)  # (N, positions..., C, kernel...)
    columns = math.prod(windows.shape[1 + dims :])
    each = max(math.prod(windows.shape[1:]), 1)
    samples, length = max(PIECE // each, 1), max(PIECE * windows.shape[1] // each, 1)
    for some in windows.split(samples):
        for piece in some.split(length, 1):
            yield (piece.flip(flipped) if flipped else piece).reshape(-1, columns)
