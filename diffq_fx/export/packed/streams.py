"""Streams of unsigned values as bytes: each either bit-packed or entropy coded, whichever is smaller.

What the entropy coder sees are symbols of up to 6 bits. Up to 3 bits several values make one symbol (6, 3 and 2 of them), which is faster
and learns what neighbours have in common; above 6 bits the symbol is the value's high 6 bits and the rest is bit-packed.

A block of S streams, whose widths and counts the reader knows, is (little endian)::

    steps       u16       symbols in the longest lane of the coder, 0 if every stream is bit-packed
    words       u32       words of the coder
    coded       u8 x S    1: entropy coded, 0: bit-packed
    frequencies           12 bits x 2^(bits of a symbol), bit-packed, for each coded stream
    states      u32       one for each lane
    words       u16
    symbols               bit-packed, of each stream that is not coded
    low bits              bit-packed, of each stream of more than 6 bits
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from diffq_fx.errors import PackedFileError
from diffq_fx.export.packed import rans
from diffq_fx.export.packed.bitplanes import Values, pack, packed_size, unpack

_HEAD = struct.Struct("<HI")
_FEW_STEPS, _MANY_STEPS = 1024, 2048
_LANE_BITS = 24
"""What a lane costs, on average, over the information in it."""


@dataclass(frozen=True)
class Alphabet:
    """How values of one width are cut into symbols."""

    width: int

    @property
    def values_per_symbol(self) -> int:
        """Neighbouring values that make one symbol."""
        return max(rans.SYMBOL_BITS // self.width, 1)

    @property
    def symbol_bits(self) -> int:
        """Bits of a symbol."""
        return min(self.width * self.values_per_symbol, rans.SYMBOL_BITS)

    @property
    def low_bits(self) -> int:
        """Bits of a value that are not part of its symbol."""
        return max(self.width - rans.SYMBOL_BITS, 0)

    def symbols(self, count: int) -> int:
        """Number of symbols that ``count`` values make."""
        return -(-count // self.values_per_symbol)

    def split(self, values: Values) -> tuple[NDArray[np.uint8], Values]:
        """Symbols, and the low bits that they do not hold.

        Example:
            >>> Alphabet(3).split(np.array([1, 2, 7], np.uint8))[0]
            array([17,  7], dtype=uint8)
        """
        if self.values_per_symbol == 1:
            low = values.dtype.type(self.low_bits)
            return (values >> low).astype(np.uint8), values & values.dtype.type((1 << self.low_bits) - 1)
        values = values.astype(np.uint8)
        if missing := -len(values) % self.values_per_symbol:
            values = np.concatenate([values, np.zeros(missing, np.uint8)])
        columns = values.reshape(-1, self.values_per_symbol)
        symbols = columns[:, 0].copy()
        for place in range(1, self.values_per_symbol):
            symbols |= columns[:, place] << np.uint8(place * self.width)
        return symbols, values[:0]

    def join(self, symbols: NDArray[np.uint8], low: Values, count: int) -> Values:
        """Undo :meth:`split`.

        Example:
            >>> Alphabet(3).join(np.array([17, 7], np.uint8), np.zeros(0, np.uint8), 3)
            array([1, 2, 7], dtype=uint8)
        """
        if self.low_bits:
            kind = np.uint8 if self.width <= 8 else np.uint16
            return (symbols.astype(kind) << kind(self.low_bits)) | low
        if self.values_per_symbol == 1:
            return symbols
        values = np.empty((len(symbols), self.values_per_symbol), np.uint8)
        for place in range(self.values_per_symbol):
            np.right_shift(symbols, np.uint8(place * self.width), out=values[:, place])
        values &= np.uint8((1 << self.width) - 1)
        return values.reshape(-1)[:count]


@dataclass(frozen=True)
class Stream:
    """Values of one width."""

    width: int
    values: Values

    @property
    def count(self) -> int:
        """Number of values."""
        return len(self.values)


def encode_block(streams: Sequence[Stream], *, entropy: bool, hidden: bytes = b"") -> tuple[bytes, int]:
    """Encode streams.

    Args:
        streams: any number of them, the empty ones too.
        entropy: False packs every stream at its width.
        hidden: bytes, an even number of them, of which the coder takes as many as it can hide in the states that it starts with.

    Returns:
        The block, and how many of the hidden bytes are in it.
    """
    cuts = [_Cut.of(stream, entropy) for stream in streams]
    coded = [cut for cut in cuts if cut.model is not None]
    counts = [len(cut.symbols) for cut in coded]
    steps = _steps(sum(counts), len(hidden)) if coded else 0
    lanes = rans.Lanes.of(counts, max(steps, 1))
    words_to_hide = np.frombuffer(hidden[: 2 * lanes.total], "<u2")
    models = [cut.model for cut in coded if cut.model is not None]
    states, words = rans.encode([cut.symbols for cut in coded], models, lanes, words_to_hide)
    pieces = [_HEAD.pack(steps, len(words)), bytes(cut.model is not None for cut in cuts)]
    pieces += [pack(model[: 1 << cut.alphabet.symbol_bits].astype(np.uint16), 12) for cut, model in zip(coded, models, strict=True)]
    pieces += [states.astype("<u4").tobytes(), words.astype("<u2").tobytes()]
    pieces += [pack(cut.symbols, cut.alphabet.symbol_bits) for cut in cuts if cut.model is None]
    pieces += [pack(cut.low, cut.alphabet.low_bits) for cut in cuts]
    return b"".join(pieces), 2 * len(words_to_hide)


@dataclass(frozen=True)
class _Cut:
    """A stream cut into symbols and low bits, and the frequencies of its symbols, None to bit-pack them."""

    alphabet: Alphabet
    symbols: NDArray[np.uint8]
    low: Values
    model: NDArray[np.uint32] | None

    @staticmethod
    def of(stream: Stream, entropy: bool) -> "_Cut":
        alphabet = Alphabet(stream.width)
        symbols, low = alphabet.split(stream.values)
        return _Cut(alphabet, symbols, low, _model(alphabet, symbols) if entropy else None)


def _steps(symbols: int, hidden: int) -> int:
    """Few lanes are small, many are fast; lanes that hide something are small, too."""
    if hidden < 2 * symbols // _FEW_STEPS:
        return _MANY_STEPS
    return min(max(symbols // 4096, _FEW_STEPS), _MANY_STEPS)


def _model(alphabet: Alphabet, symbols: NDArray[np.uint8]) -> NDArray[np.uint32] | None:
    """Frequencies of the symbols; None where coding would not make the stream smaller."""
    if not len(symbols):
        return None
    counts = np.bincount(symbols, minlength=1 << rans.SYMBOL_BITS)
    frequencies = rans.frequencies_of(counts)
    cost = float(counts @ (rans.PRECISION - np.log2(np.maximum(frequencies, 1))))
    cost += 12 * 2**alphabet.symbol_bits + _LANE_BITS * -(-len(symbols) // _FEW_STEPS)
    return frequencies if cost < len(symbols) * alphabet.symbol_bits else None


class DecodedStream:
    """A stream of a block that has been decoded: its values can be had, and until then take little room."""

    def __init__(
        self, alphabet: Alphabet, count: int, symbols: NDArray[np.uint8] | None, packed: memoryview | bytes, low: memoryview
    ) -> None:
        self._alphabet = alphabet
        self._count = count
        self._symbols = symbols
        self._packed = packed  # the symbols, where they are not in ``_symbols``
        self._low = low

    def fold(self) -> None:
        """Keep the symbols bit-packed."""
        if self._symbols is not None:
            self._packed, self._symbols = pack(self._symbols, self._alphabet.symbol_bits), None

    def values(self) -> Values:
        """The values, made anew at each call."""
        alphabet, symbols = self._alphabet, self._symbols
        if symbols is None:
            symbols = unpack(self._packed, alphabet.symbol_bits, alphabet.symbols(self._count))
        low = unpack(self._low, alphabet.low_bits, self._count) if alphabet.low_bits else symbols
        return alphabet.join(symbols, low, self._count)


def decode_block(data: memoryview, expected: Sequence[tuple[int, int]]) -> tuple[list[DecodedStream], bytes]:
    """Undo :func:`encode_block`.

    Args:
        data: exactly the block.
        expected: width and count of each stream.

    Returns:
        The streams, and the hidden bytes, padded with zeros to two for every lane.

    Raises:
        PackedFileError: the block is damaged, or not of these streams.
    """
    alphabets, counts = [Alphabet(width) for width, _ in expected], [count for _, count in expected]
    reader = _Reader(data)
    steps, words = _HEAD.unpack(reader.take(_HEAD.size))
    flags = bytes(reader.take(len(alphabets)))
    if max(flags, default=0) > 1 or steps > rans.MAX_STEPS or (steps == 0) != (not any(flags)):
        raise PackedFileError(f"a block of {len(data)} bytes has a damaged head")
    frequencies = np.zeros((sum(flags), 1 << rans.SYMBOL_BITS), np.uint32)
    for row, alphabet in enumerate(a for a, flag in zip(alphabets, flags, strict=True) if flag):
        size = 1 << alphabet.symbol_bits
        frequencies[row, :size] = unpack(reader.take(packed_size(size, 12)), 12, size)
    rans.check_frequencies(frequencies)
    lanes = rans.Lanes.of([a.symbols(count) for a, count, flag in zip(alphabets, counts, flags, strict=True) if flag], max(steps, 1))
    states = np.frombuffer(reader.take(4 * lanes.total), "<u4").astype(np.uint32)
    coder_words = np.frombuffer(reader.take(2 * words), "<u2")
    sizes = [0 if flag else packed_size(a.symbols(count), a.symbol_bits) for a, count, flag in zip(alphabets, counts, flags, strict=True)]
    plain = [reader.take(size) for size in sizes]
    low = [reader.take(packed_size(count, a.low_bits)) for a, count in zip(alphabets, counts, strict=True)]
    reader.end()  # before anything of the declared size is allocated
    decoded, hidden = rans.decode(states, coder_words, list(frequencies), lanes)
    symbols = iter(decoded)
    streams = [
        DecodedStream(a, count, next(symbols) if flag else None, raw, rest)
        for a, count, flag, raw, rest in zip(alphabets, counts, flags, plain, low, strict=True)
    ]
    return streams, hidden.astype("<u2").tobytes()


class _Reader:
    """Takes bytes from the front, and never more than there are."""

    def __init__(self, data: memoryview) -> None:
        self._data = data
        self._at = 0

    def take(self, count: int) -> memoryview:
        """The next ``count`` bytes."""
        if count > len(self._data) - self._at:
            raise PackedFileError(f"a block of {len(self._data)} bytes ends early")
        self._at += count
        return self._data[self._at - count : self._at]

    def end(self) -> None:
        """Refuse bytes that nobody took."""
        if self._at != len(self._data):
            raise PackedFileError(f"a block of {len(self._data)} bytes has {len(self._data) - self._at} too many")
