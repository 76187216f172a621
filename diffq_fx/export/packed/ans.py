"""Bytes at their order-0 entropy by asymmetric numeral systems (Duda, arXiv:1311.2540), through the library constriction.

``docs/packed-format.md`` has the bytes of a coded sequence. After its symbols comes 0xD1FF, drawn from ``Uniform(65536)``: it tells a
reader that it has read as many symbols as were written.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffq_fx.errors import PackedFileError

_HIGHEST = (1 << 16) - 1
_AT_ONCE = 1 << 17  # the library gives symbols as int32
_END, _ENDS = 0xD1FF, 1 << 16


def encode(symbols: NDArray[np.uint8]) -> bytes:
    """Code symbols, uint8 of shape (n,), at their order-0 entropy."""
    stream = _library()
    counts = np.bincount(symbols, minlength=2)
    frequencies = np.maximum(np.rint(counts * (_HIGHEST / counts.max())), counts > 0).astype("<u2")
    coder = stream.stack.AnsCoder()
    coder.encode_reverse(np.array([_END], np.int32), stream.model.Uniform(_ENDS))
    coder.encode_reverse(symbols.astype(np.int32), _model(stream, frequencies))
    return bytes([len(frequencies) - 1]) + frequencies.tobytes() + coder.get_compressed().astype("<u4").tobytes()


def decode(data: memoryview, count: int) -> NDArray[np.uint8]:
    """Undo :func:`encode`; an error if ``data`` is damaged, or not exactly ``count`` symbols."""
    words_at = 3 + 2 * data[0] if len(data) else 0
    if words_at < 5 or len(data) < words_at or (len(data) - words_at) % 4:
        raise PackedFileError(f"{len(data)} bytes do not hold the frequencies and words of a coded sequence")
    frequencies, words = np.frombuffer(data[1:words_at], "<u2"), np.frombuffer(data[words_at:], "<u4").astype(np.uint32)
    if not frequencies.any() or not len(words) or not words[-1]:
        raise PackedFileError("a coded sequence has no frequencies or ends in a wrong word")
    stream = _library()
    coder, model, symbols = stream.stack.AnsCoder(words), _model(stream, frequencies), np.empty(count, np.uint8)
    for first in range(0, count, _AT_ONCE):
        some = symbols[first : first + _AT_ONCE]
        some[:] = coder.decode(model, len(some))
    if coder.decode(stream.model.Uniform(_ENDS), 1)[0] != _END or not coder.is_empty():
        raise PackedFileError(f"a coded sequence does not end after {count} symbols")
    return symbols


def estimated_bits(shares: NDArray[np.float64], size: int) -> float:
    """About how long the code of ``size`` bytes is, whose values have these shares."""
    present = np.flatnonzero(shares)
    some = shares[present]
    return -size * float(some @ np.log2(some)) + 56 + 16 * (int(present[-1]) + 1)


def _library() -> Any:
    import constriction  # takes a moment, and most files do without

    return vars(constriction)["stream"]  # its submodules are made by its binary, unseen by type checkers


def _model(stream: Any, frequencies: NDArray[np.uint16]) -> Any:
    return stream.model.Categorical(frequencies.astype(np.float32), perfect=False)
