"""Adaptive, context-modelled binary entropy coding of weight tensors.

A weight is a few binary decisions: is it zero, its sign, the bits of its magnitude (the decisions of
DeepCABAC, Wiedemann et al., 2019). Each is predicted by six adaptive contexts at once; their
predictions are mixed in the logistic domain by weights that learn as they go (Mahoney, lpaq), and a
arithmetic coder writes the bit. The contexts know

- how large weights of this row, this column and the tensor have been, and so how large this one may be;
- the neighbours before and above, with their signs: kernels are smooth, and so are the rows of a layer
  that reads an image;
- a linear prediction from four neighbours whose coefficients are learned on the way (normalised least
  mean squares, Widrow and Hoff, 1960);
- factors: trained matrices are near ones of low rank, so a code is also predicted by the product of two vectors of
  32, one of its row and one of its column, learned on the way (online matrix factorisation, as Oja, 1982, and
  Koren et al., 2009); the linear prediction weighs it as a fifth neighbour;
- the mean of the column and of the row, with sign; the place within the kernel.

No tables are stored, so a tensor of 500 weights costs little more than its information. All arithmetic
is on integers: every machine decodes the same values. Encoder and decoder are one function, `_code`, so
they cannot drift apart. docs/format.md explains why numba compiles it. What is compiled stays in
one file: numba's cache follows the file of a function, and does not see changes in another that it calls.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numba import njit

from autocompress.artifact.dictionary import DICTIONARY

Array = np.ndarray[Any, np.dtype[Any]]

MAX_WEIGHTS_PER_BYTE = 24_000
"""No decision costs less than 16 / 65536 of certainty, so no byte can hold more zeros than this."""


class Scan(NamedTuple):
    """How a matrix of codes is walked.

    kernel: columns that belong to one input channel. width: distance in columns to the neighbour above,
    within a kernel when there is one; 0 when there is none. factors: whether each code is also predicted
    from two vectors, one of its row and one of its column.
    """

    kernel: int = 1
    width: int = 0
    factors: bool = False


# --- tables; the logistic domain is in 1/256 nat ---
_P_MIN = 16
_STRETCH = np.array(
    [max(-2047, min(2047, round(256 * math.log((i + 0.5) / (4095.5 - i))))) for i in range(4096)], np.int32
)
_SQUASH = np.array(
    [max(_P_MIN, min(65536 - _P_MIN, round(65536 / (1 + math.exp(-i / 256))))) for i in range(-2048, 2048)], np.int32
)
_RATE = np.array([round(65536 / (n + 1.3)) for n in range(1024)], np.int32)
"""Learning rate of a counter that has seen n bits."""
_TRUST = np.array([round(256 * n / (n + 1.05)) for n in range(1024)], np.int32)
"""How loudly a counter that has seen n bits may speak."""
_GAIN = np.array([round(2 + 14 * 60 / (60 + 4 * n)) for n in range(1024)], np.int32)
"""Learning rate of mixing weights that have seen 4 n bits, in 2^-18."""
_LOG = np.array([round(16 * math.log2(max(i, 0.5))) for i in range(4096)], np.int32)

LEARN, ENCODE, DECODE = range(3)
"""What `_bit` does with a decision: take note of it only, write it, read it."""

# --- arithmetic coding: an interval of numbers, of which the stream names one ---
_WIDTH = 40
"""Bits of its bounds; with the 16 of a probability, products fit into 63."""
_FULL = (1 << _WIDTH) - 1
_LOW, _HIGH, _POSITION, _CODE = range(4)
"""Its bounds, bytes written or read, and the number that the stream names."""

# --- memory: slots of counters (probability << 10 | bits seen), then mixing weights in vectors of 8 ---
_LEVELS = 32
_NEAR = 49
_NODES = 160
_S_ZERO_NEAR = 0
_S_ZERO_LINEAR = _S_ZERO_NEAR + _NEAR * _LEVELS
_S_SIGN_MEANS = _S_ZERO_LINEAR + 8 * _LEVELS
_S_SIGN_NEAR = _S_SIGN_MEANS + _NEAR
_S_SIGN_LINEAR = _S_SIGN_NEAR + _NEAR * 7
_S_NODE_EXPECTED = _S_SIGN_LINEAR + 15 * _NEAR
_S_NODE_MEANS = _S_NODE_EXPECTED + 2 * _NODES * _LEVELS
_S_FLOAT = _S_NODE_MEANS + _NODES * _NEAR
_S_FLOAT_NODE = _S_FLOAT + 35 * 512
_S_FLOAT_DEPTH = _S_FLOAT_NODE + 512
_S_TOP = _S_FLOAT_DEPTH + 16
_S_TOP_NODE = _S_TOP + 3 * 8
_S_TOP_SCALE = _S_TOP_NODE + 8
_S_ALWAYS = _S_TOP_SCALE + 3 * 1024
_S_FLAG = _S_ALWAYS + 1
_LOCAL = _S_FLAG + 32
"""From here on, slots are fresh for every tensor."""
_L_COLUMN = _LOCAL
_L_ROW = _L_COLUMN + _LEVELS
_L_PLACE = _L_ROW + _LEVELS
_L_NEAR = _L_PLACE + 64
_L_SIGN = _L_NEAR + _NEAR
_L_SIGN_LINEAR = _L_SIGN + _NEAR
_L_SIGN_PLACE = _L_SIGN_LINEAR + 15
_L_NODE = _L_SIGN_PLACE + 64
_L_NODE_ALONE = _L_NODE + 2 * _NODES
_L_NODE_NEAR = _L_NODE_ALONE + _NODES
_L_NODE_LINEAR = _L_NODE_NEAR + _NODES * _NEAR
_L_FLOAT = _L_NODE_LINEAR + _NODES * 15
_L_TOP = _L_FLOAT + 1024
_WEIGHTS = _L_TOP + 1024 * 8
_W_ZERO = _WEIGHTS
_W_SIGN = _W_ZERO + 8 * 2
_W_NODE = _W_SIGN + 8
_W_FLOAT = _W_NODE + 8 * 2 * 40
_W_SECOND = _W_FLOAT + 8 * 2
_W_END = _W_SECOND + 8 * _LEVELS * 81
_FRESH = 1 << 29
_INPUTS, _SEEN = 6, 7
_LIMIT = 1020

# --- factors of rows and columns, in 2^-16 ---
RANK = 32
_ROW_RATE, _COLUMN_RATE = round(0.1 * 65536), round(0.5 * 65536)
_FAR = 1 << 16
"""The largest prediction that is believed, in 2^-8 of a code."""

# --- text ---
_ORDERS = 5
_TABLE = 1 << 14
_T_MATCH = _ORDERS * _TABLE
_T_WEIGHTS = _T_MATCH + 2 * 32
_T_HASH = _T_WEIGHTS + 8 * 18
_T_SIZE = _T_HASH + 4096

_W_NONE = max(_W_END, _T_SIZE)
"""In the place of second weights: none. Behind all that learns, in the memory of tensors and in that of text."""
_SIZE = _W_NONE + 8


def _fresh_weights(memory: Array, first: int, end: int) -> None:
    memory[first:end].reshape(-1, 8)[:, :_INPUTS] = round(65536 * 0.2)


class CoderState:
    """Everything adaptive: lives from the first to the last tensor of a file. Without `stream` it writes."""

    def __init__(self, stream: bytes | None = None) -> None:
        self.mode = ENCODE if stream is None else DECODE
        self.memory = np.full(_SIZE, _FRESH, np.int32)
        self.memory[_WEIGHTS:] = 0
        _fresh_weights(self.memory, _WEIGHTS, _W_SECOND)
        self.interval = np.array([0, _FULL, 0, 0], np.int64)
        self.buffer: Array = np.zeros(0, np.uint8)
        if stream is not None:
            first = _WIDTH // 8
            self.buffer = np.frombuffer(bytearray(stream), np.uint8)
            self.interval[_POSITION:] = first, int.from_bytes(stream[:first].ljust(first, b"\0"), "big")

    def _make_room(self, more: int) -> None:
        room = self.position + more + 64
        if self.mode == ENCODE and len(self.buffer) < room:
            grown = np.zeros(room, np.uint8)
            grown[: len(self.buffer)] = self.buffer
            self.buffer = grown

    def copy(self) -> CoderState:
        twin = CoderState.__new__(CoderState)
        twin.mode = self.mode
        twin.memory, twin.interval, twin.buffer = self.memory.copy(), self.interval.copy(), self.buffer.copy()
        return twin

    def code(self, values: Array, scan: Scan, exponent: int, mantissa: int) -> None:
        """Encode `values` int32 [rows, columns], C-contiguous, or fill it by decoding.

        exponent, mantissa: bits of a float's bit pattern; exponent 0 means signed integers of at most
        2^mantissa in magnitude, mantissa at most 15.
        """
        rows, columns = values.shape
        self._make_room(values.size * (exponent + mantissa + 3) * 3 // 2)
        self.memory[_LOCAL:_WEIGHTS] = _FRESH
        self.memory[_WEIGHTS + _SEEN :: 8] = 0  # mixing weights are kept, but learn fast again
        flat = values.reshape(-1)
        if exponent:
            _code_floats(self.mode, flat, exponent, mantissa, self.memory, self.interval, self.buffer)
        else:
            means = np.zeros((2, columns), np.int32)
            sizes = (rows, columns, scan.kernel, scan.width, mantissa)
            factors = np.zeros((1 + columns * scan.factors, RANK), np.int32)
            rates = np.zeros(columns, np.int64)
            _begin_columns(factors, rates)
            _code(self.mode, flat, sizes, self.memory, self.interval, self.buffer, means[0], means[1], factors, rates)

    def code_text(self, text: Array) -> None:
        """Encode bytes uint8 [n], or fill them by decoding; the model knows `DICTIONARY` beforehand."""
        memory = np.full(_T_SIZE, _FRESH, np.int32)
        memory[_T_WEIGHTS:] = 0
        _fresh_weights(memory, _T_WEIGHTS, _T_WEIGHTS + 8 * 2)
        self._make_room(3 * len(text))
        whole = np.concatenate([DICTIONARY, text])
        slots, hashes = np.zeros((2, _ORDERS), np.int64)
        _code_text(self.mode, whole, len(DICTIONARY), memory, self.interval, self.buffer, slots, hashes)
        text[:] = whole[len(DICTIONARY) :]

    def number(self, value: int = 0) -> int:
        """Encode or decode a number of up to 20 bits; 0 costs a bit or less (Elias, gamma code)."""
        bits, length = 0, int(value).bit_length()
        while bits < 20 and self.flag(4 + bits, bits < length):
            bits += 1
        out = min(bits, 1)
        for k in range(bits - 2, -1, -1):
            out = out << 1 | self.flag(3, value >> k & 1 == 1)
        return out

    def flag(self, context: int, value: bool = False) -> bool:
        """Encode or decode a yes or no; context: which of 32 kinds of question it is."""
        self._make_room(1)
        slot = _S_FLAG + context
        return bool(_direct(self.mode, self.interval, self.buffer, self.memory, slot, int(value)))

    @property
    def position(self) -> int:
        """Bytes written or read so far."""
        return int(self.interval[_POSITION])

    @property
    def spent(self) -> float:
        """Bytes written so far, with the part of one that the interval holds; to be compared, not alone."""
        return self.position - math.log2(int(self.interval[_HIGH] - self.interval[_LOW] + 1)) / 8

    def finish(self) -> bytes:
        """The stream, with as few last bytes as there can be; the reader continues with zeros."""
        low, high = (int(bound) for bound in self.interval[:_POSITION])
        for bits in range(_WIDTH, -1, -8):
            value = -(-low >> bits) << bits
            if value <= high:
                break
        last = value.to_bytes(_WIDTH // 8, "big")[: (_WIDTH - bits) // 8]
        return self.buffer[: self.position].tobytes() + last


def _can_keep() -> bool:
    """Whether there is a place for what is compiled: where neither this folder nor a home can be written to, as in many
    a container, numba would refuse, and each process compiles anew."""
    try:
        njit(cache=True)(_can_keep)
    except RuntimeError:
        return False
    return True


# Compiling takes seconds, once on a machine, so: types are given, or each mixture of integer types that a function is
# called with would be compiled; functions that only compiled ones call have no way in from Python (to call one from
# there crashes); min, max and new arrays, which numba would compile too, are not used. error_model: nothing is ever
# divided by zero. `_mixed` and `_bit`, where the time of coding goes, LLVM must be told to inline.
compiled = partial(njit, cache=_can_keep(), error_model="numpy", no_cfunc_wrapper=True)
_inner = partial(compiled, no_cpython_wrapper=True)
_at = np.uint64
"""An index from the start: of a signed one numba asks at every access whether it counts from the end, which took a
fifth of the time."""


@_inner("i8(i8, i8)")
def _min(a: int, b: int) -> int:
    return a if a < b else b


@_inner("i8(i8, i8)")
def _max(a: int, b: int) -> int:
    return a if a > b else b


@_inner("i8(i8, i8[::1], u1[::1], i8, i8)", forceinline=True)
def _bit(mode: int, interval: Array, buffer: Array, p: int, bit: int) -> int:
    """Code one bit whose probability of being 1 is p / 65536: the interval shrinks to the part that is the bit's, and
    what its bounds have in common is settled (carry-less, as in Mahoney's lpaq)."""
    if mode == LEARN:
        return bit
    low, high = interval[_LOW], interval[_HIGH]
    middle = low + (((high - low) * p) >> 16)
    if mode == DECODE:
        bit = 1 if interval[_CODE] <= middle else 0
    if bit:
        high = middle
    else:
        low = middle + 1
    while (low ^ high) >> (_WIDTH - 8) == 0:
        position = interval[_POSITION]
        if mode == ENCODE:
            if position < len(buffer):
                buffer[position] = high >> (_WIDTH - 8)
        else:
            byte = buffer[position] if position < len(buffer) else 0
            interval[_CODE] = ((interval[_CODE] << 8) & _FULL) | byte
        interval[_POSITION] = position + 1
        low, high = (low << 8) & _FULL, ((high << 8) & _FULL) | 255
    interval[_LOW], interval[_HIGH] = low, high
    return bit


@_inner("void(i4[::1], i8, i8)")
def _update(memory: Array, slot: int, bit: int) -> None:
    state = memory[_at(slot)]
    n = state & 1023
    p = state >> 10
    target = 1048575 if bit else 0
    step = ((target - p) * _RATE[_at(n)]) >> 16
    memory[_at(slot)] = state + (step << 10) + (n < _LIMIT)


@compiled("i8(i8, i8[::1], u1[::1], i4[::1], i8, i8)")
def _direct(mode: int, interval: Array, buffer: Array, memory: Array, slot: int, bit: int) -> int:
    """A bit with one context."""
    p = _min(_max(memory[slot] >> 14, _P_MIN), 65536 - _P_MIN)
    bit = _bit(mode, interval, buffer, p, bit)
    _update(memory, slot, bit)
    return bit


@_inner("i8(i4[::1], i8)")
def _stretched(memory: Array, slot: int) -> int:
    """What a counter believes, in the logistic domain; the more bits it has seen, the louder."""
    state = np.uint32(memory[_at(slot)])
    belief: int = (_STRETCH[state >> np.uint32(18)] * _TRUST[state & np.uint32(1023)]) >> 8
    return belief


@_inner("void(i4[::1], i8, i8, i8, i8, i8, i8)")
def _learn(memory: Array, first: int, second: int, slot: int, belief: int, error: int, bit: int) -> None:
    """One of the predictions has seen its bit: the weights that it was mixed by and its counter follow."""
    step = (belief * error + 131072) >> 18
    memory[_at(first)] += step
    if second < _W_NONE:
        memory[_at(second)] += step
    _update(memory, slot, bit)


@_inner("i8(i8, i8[::1], u1[::1], i4[::1], i8, i8, i8, i8, i8, i8, i8, i8, i8)", forceinline=True)
def _mixed(
    mode: int,
    interval: Array,
    buffer: Array,
    memory: Array,
    bit: int,
    first: int,
    second: int,
    a: int,
    b: int,
    c: int,
    d: int,
    e: int,
    f: int,
) -> int:
    """A bit predicted by the counters in slots a to f, mixed by the sum of two weight vectors.

    Without loops or arrays of its own: nothing that is written to `memory` can then force a value to be read again.
    """
    sa, sb, sc = _stretched(memory, a), _stretched(memory, b), _stretched(memory, c)
    sd, se, sf = _stretched(memory, d), _stretched(memory, e), _stretched(memory, f)
    dot = (
        sa * (memory[_at(first)] + memory[_at(second)])
        + sb * (memory[_at(first + 1)] + memory[_at(second + 1)])
        + sc * (memory[_at(first + 2)] + memory[_at(second + 2)])
        + sd * (memory[_at(first + 3)] + memory[_at(second + 3)])
        + se * (memory[_at(first + 4)] + memory[_at(second + 4)])
        + sf * (memory[_at(first + 5)] + memory[_at(second + 5)])
    )
    p = _SQUASH[_at(_min(_max(dot >> 16, -2048), 2047) + 2048)]
    bit = _bit(mode, interval, buffer, p, bit)
    seen = memory[_at(first + _SEEN)]
    memory[_at(first + _SEEN)] = seen + 1 if seen < 4095 else seen
    error = ((65536 if bit else 0) - p) * _GAIN[_at(seen >> 2)]
    _learn(memory, first, second, a, sa, error, bit)
    _learn(memory, first + 1, second + 1, b, sb, error, bit)
    _learn(memory, first + 2, second + 2, c, sc, error, bit)
    _learn(memory, first + 3, second + 3, d, sd, error, bit)
    _learn(memory, first + 4, second + 4, e, se, error, bit)
    _learn(memory, first + 5, second + 5, f, sf, error, bit)
    return bit


@_inner("i8(i8, i8)")
def _near(value: int, unit: int) -> int:
    """A signed neighbour in 7 levels against `unit`, in the same scale: 3 is about zero."""
    size = abs(value)
    level = (10 * size >= 3 * unit) + (size >= unit) + (size >= 2 * unit)
    return 3 - level if value < 0 else 3 + level


@_inner("i8(i8)")
def _level(log: int) -> int:
    """The level, one of `_LEVELS`, of a size whose logarithm is known, in half octaves."""
    return _min(_max(log >> 3, 0), _LEVELS - 1)


@_inner("i8(i4[:, ::1], i8, i8)")
def _product(factors: Array, line: int, other: int) -> int:
    """Of two lines of factors, in 2^-32. Those of the present row stand in line 0, those of column c in line c + 1."""
    total = 0
    for k in range(factors.shape[1]):  # a loop of constant length would be unrolled, but not vectorised
        total += factors[line, k] * factors[other, k]
    return total


@_inner("void(i4[:, ::1], i8, i8, i8)")
def _add(factors: Array, to: int, line: int, times: int) -> None:
    """Add a multiple, in 2^-16, of one line to another."""
    for k in range(factors.shape[1]):
        factors[to, k] += (times * factors[line, k] + 32768) >> 16


@_inner("i8(i4[:, ::1], i8)")
def _row_rate(factors: Array, line: int) -> int:
    """How far the factors of a row follow an error at this column, in 2^-16."""
    return (_ROW_RATE << 16) // (32768 + _max(_product(factors, line, line) >> 16, 0))


@compiled("void(i4[:, ::1], i8[::1])")
def _begin_columns(factors: Array, rates: Array) -> None:
    """Factors of the columns, at random (linear congruential), and the rates that follow from them."""
    state = 1
    for line in range(1, len(factors)):
        for k in range(factors.shape[1]):
            state = (state * 1103515245 + 12345) & 0x7FFFFFFF
            factors[line, k] = (state >> 17) - 8192
        rates[line - 1] = _row_rate(factors, line)


@_inner("void(i4[:, ::1], i4[::1], i8[::1], i8, i8)")
def _learn_columns(factors: Array, row: Array, rates: Array, energy: int, count: int) -> None:
    """After a row: the factors of the columns follow its errors (normalised least mean squares, in turn with those
    of the row), and the row's begin anew. energy: sum of the squares of the `count` codes so far."""
    norm = _max(_product(factors, 0, 0) >> 16, 0)
    rate = (_COLUMN_RATE << 16) // ((energy << 15) // count + norm + 1)
    for c in range(len(row)):
        error = (row[c] << 16) - (_product(factors, 0, c + 1) >> 16)
        _add(factors, c + 1, 0, (error * rate) >> 16)
        rates[c] = _row_rate(factors, c + 1)
    for k in range(factors.shape[1]):
        factors[0, k] = 0


@compiled()
def _code(
    mode: int,
    values: Array,
    sizes: tuple[int, int, int, int, int],
    memory: Array,
    interval: Array,
    buffer: Array,
    column_size: Array,
    column_mean: Array,
    factors: Array,
    rates: Array,
) -> None:
    """Integers. Running means are in 2^-fine of a code, their levels in half octaves. factors: int32
    [1 + columns, RANK], or of one line: none."""
    rows, columns, kernel, width, mantissa = sizes
    shift = _max(11 - mantissa, 0)
    offset = 160 - 16 * shift
    fine = shift + 8
    tensor_size = (3 << fine) // 10  # mean magnitude of all codes
    nonzero_size = 1 << fine  # ... of those that are not zero
    nonzeros = 0
    l0, l1, l2, l3, l4 = 6554, 0, 5243, 0, 65536  # coefficients of the linear prediction, in 2^-16
    factored = len(factors) > 1
    squares = 0
    zero_weights = _W_ZERO + 8 * (kernel > 1)
    at = -1
    for r in range(rows):
        if mode == DECODE and interval[_POSITION] > len(buffer) + 8:  # a damaged stream that has run dry
            return
        row_size = tensor_size
        row_mean = 0
        west = west2 = 0
        inside = 0  # place within the kernel
        across = 0  # place within a row of the kernel
        for c in range(columns):
            at += 1
            if r == 0:
                column_size[c] = tensor_size
            north = northwest = 0
            if kernel > 1:
                if across == 0:
                    west = west2 = 0
                if width > 0 and inside >= width:
                    north = values[at - width]
                    northwest = values[at - width - 1] if across > 0 else 0
            elif width > 0 and c >= width:
                north = values[at - width]
                northwest = values[at - width - 1] if c > width else 0
            # --- what to expect ---
            log_tensor = _LOG[_min(tensor_size >> 8, 4095)]
            log_row = _LOG[_min(row_size >> 8, 4095)]
            log_column = _LOG[_min(column_size[c] >> 8, 4095)]
            level = _level(log_tensor + offset)
            expected = _level(log_row + log_column - log_tensor + offset)
            near_w = _near(west << fine, nonzero_size)
            near_n = _near(north << fine, nonzero_size)
            near = near_w * 7 + near_n
            near_c = _near(2 * column_mean[c], tensor_size)
            near_r = _near(4 * row_mean, tensor_size)
            prediction = 0
            linear = 7
            energy = west * west + west2 * west2 + north * north + northwest * northwest
            unit = _max(tensor_size >> shift, 1)
            product = 0
            if factored:
                product = _min(_max(_product(factors, 0, c + 1) >> 24, -_FAR), _FAR)
            if energy or product:
                prediction = ((l0 * west + l1 * west2 + l2 * north + l3 * northwest) >> 8) + ((l4 * product) >> 16)
                linear = _min((abs(prediction) * 4 + (unit >> 1)) // unit, 7)
                linear = 7 - linear if prediction < 0 else 7 + linear
            # --- zero or not ---
            x = values[at]
            place = _min(inside, 63)
            magnitude = 0
            if _mixed(
                mode,
                interval,
                buffer,
                memory,
                x != 0,
                zero_weights,
                _W_NONE,
                _L_COLUMN + _level(log_column + offset),
                _L_ROW + _level(log_row + offset),
                _L_PLACE + place,
                _L_NEAR + near,
                _S_ZERO_NEAR + near * _LEVELS + level,
                _S_ZERO_LINEAR + abs(linear - 7) * _LEVELS + expected,
            ):
                second = _W_SECOND + 8 * 81 * level
                negative = _mixed(
                    mode,
                    interval,
                    buffer,
                    memory,
                    x < 0,
                    _W_SIGN,
                    second,
                    _S_SIGN_MEANS + near_c * 7 + near_r,
                    _L_SIGN + near,
                    _S_SIGN_NEAR + near * 7 + near_c,
                    _S_SIGN_LINEAR + linear * _NEAR + near,
                    _L_SIGN_LINEAR + linear,
                    _L_SIGN_PLACE + place,
                )
                if negative:  # from here on, neighbours are seen from the side of this weight
                    near_w, near_n, near_c, near_r, linear = 6 - near_w, 6 - near_n, 6 - near_c, 6 - near_r, 14 - linear
                near, means = near_w * 7 + near_n, near_c * 7 + near_r
                # --- magnitude: length in bits, then the bits below the first, a tree for each length ---
                magnitude = abs(x)
                length = 0
                while (magnitude >> (length + 1)) > 0:
                    length += 1
                bits = 0
                below = 0  # bits of the tree that are still to come
                coded = 1
                growing = mantissa > 0
                while growing or below > 0:
                    if growing:
                        node, vector, decision = _min(bits, 15), _min(bits, 9), 1 if length > bits else 0
                    else:
                        node = _min(13 + (1 << bits) + coded, _NODES - 1)
                        vector = 10 + _min(bits - below, 3) + 4 * _min(bits, 6)
                        decision = (magnitude >> (below - 1)) & 1
                    signed = 2 * node + negative
                    vector = 8 * (2 * vector + negative)
                    decision = _mixed(
                        mode,
                        interval,
                        buffer,
                        memory,
                        decision,
                        _W_NODE + vector,
                        second + 8 + vector,
                        _L_NODE + signed,
                        _S_NODE_EXPECTED + signed * _LEVELS + expected,
                        _L_NODE_NEAR + node * _NEAR + near,
                        _S_NODE_MEANS + node * _NEAR + means,
                        _L_NODE_LINEAR + node * 15 + linear,
                        _L_NODE_ALONE + node,
                    )
                    if growing:
                        bits += decision
                        growing = decision == 1 and bits < mantissa
                        below = bits
                        if bits == mantissa:  # the largest magnitude that there is
                            coded, below = 1 << bits, 0
                    else:
                        coded = (coded << 1) | decision
                        below -= 1
                magnitude = coded
                x = -magnitude if negative else magnitude
                nonzero_size += (((magnitude << fine) - nonzero_size) * _RATE[_min(nonzeros, 1023)]) >> 16
                nonzeros += 1
            else:
                x = 0
            values[at] = x
            # --- learn ---
            if factored:
                squares += x * x
                _add(factors, 0, c + 1, ((((x << 8) - product) << 8) * rates[c]) >> 16)
            if energy or product:
                rate = 131 + 655360 // (500 + at)
                error = (x << 8) - prediction
                norm = (energy << 8) + ((product * product) >> 8) + ((8 * unit * unit) >> 8) + 26
                factor = ((rate * error) << 8) // norm
                l0 += (factor * west) >> 8
                l1 += (factor * west2) >> 8
                l2 += (factor * north) >> 8
                l3 += (factor * northwest) >> 8
                l4 += (factor * product) >> 16
            size = magnitude << fine
            signed_size = x << fine
            row_rate, column_rate = _RATE[_min(c + 3, 1023)], _RATE[_min(r + 3, 1023)]
            row_size += ((size - row_size) * row_rate) >> 16
            row_mean += ((signed_size - row_mean) * row_rate) >> 16
            column_size[c] += ((size - column_size[c]) * column_rate) >> 16
            column_mean[c] += ((signed_size - column_mean[c]) * column_rate) >> 16
            tensor_size += ((size - tensor_size) * _RATE[_min(at + 1, 1023)]) >> 16
            west2, west = west, x
            inside += 1
            across += 1
            if across == width:
                across = 0
            if inside == kernel:
                inside = across = 0
        if factored:
            _learn_columns(factors, values[at + 1 - columns : at + 1], rates, squares, at + 1)


@compiled()
def _code_floats(
    mode: int, values: Array, exponent: int, mantissa: int, memory: Array, interval: Array, buffer: Array
) -> None:
    """Bit patterns: zero or not; sign and exponent as a tree; three bits of mantissa; the rest as they are.

    Contexts: the exponent before; whether only positive values came so far, which tells scales from
    shifts, so that each finds what was learned of its like.
    """
    mask = (1 << (1 + exponent + mantissa)) - 1
    before = 0
    signs = 0  # 0 no value yet, 1 all positive so far, 2 mixed
    top = _min(mantissa, 3)
    for at in range(len(values)):
        if mode == DECODE and interval[_POSITION] > len(buffer) + 8:
            return
        pattern = values[at] & mask
        if not _direct(mode, interval, buffer, memory, _L_FLOAT, pattern != 0):
            values[at] = 0
            continue
        node = 1
        for k in range(1 + exponent + top):
            if k <= exponent:
                vector = _W_FLOAT
                a, b = _S_FLOAT + signs * 512 + node, _S_FLOAT + (3 + (before & 31)) * 512 + node
                c, d, e = _L_FLOAT + node, _S_FLOAT_NODE + node, _S_FLOAT_DEPTH + k
            else:
                vector = _W_FLOAT + 8
                depth = k - 1 - exponent
                scale = (node >> depth) & 1023
                tree = (1 << depth) | (node & ((1 << depth) - 1))
                a, b = _S_TOP + signs * 8 + tree, _L_TOP + scale * 8 + tree
                c, d, e = _L_TOP + tree, _S_TOP_NODE + tree, _S_TOP_SCALE + signs * 1024 + scale
            bit = (pattern >> (exponent + mantissa - k)) & 1
            bit = _mixed(mode, interval, buffer, memory, bit, vector, _W_NONE, a, b, c, d, e, _S_ALWAYS)
            node = (node << 1) | bit
        value = node - (1 << (1 + exponent + top))
        for k in range(mantissa - top - 1, -1, -1):
            value = (value << 1) | _bit(mode, interval, buffer, 32768, (pattern >> k) & 1)
        values[at] = value if exponent + mantissa < 31 else np.int32(value - (value >> 31 << 32))
        before = (value >> mantissa) & ((1 << exponent) - 1)
        signs = _max(signs, 1 + (value >> (exponent + mantissa)))


@compiled()
def _code_text(
    mode: int, text: Array, known: int, memory: Array, interval: Array, buffer: Array, slots: Array, hashes: Array
) -> None:
    """Bytes, each bit predicted by the 1, 2, 3 and 5 bytes before, by the word so far and by what
    followed the longest match. The first `known` bytes are learned, not coded."""
    history = 0
    word = 0
    match = 0  # place of the byte that the match predicts; 0: none
    length = 0
    for i in range(len(text)):
        now = LEARN if i < known else mode
        for order in range(4):
            size = order + 1 if order < 3 else 5
            hashes[order] = (history & ((1 << (8 * size)) - 1)) * 0x2F0B4C47
        hashes[4] = word
        node = 1
        agrees = match > 0
        for k in range(7, -1, -1):
            for order in range(_ORDERS):
                mixed = hashes[order] + node * 0x3C6EF372
                mixed = (mixed ^ (mixed >> 15)) * 0x2545F491
                slots[order] = order * _TABLE + ((mixed >> 12) & (_TABLE - 1))
            guess = (text[match] >> k) & 1 if agrees else 0
            matched = _T_MATCH + (_min(length, 31) * 2 + guess if agrees else 0)
            vector = _T_WEIGHTS + 8 * agrees
            second = _T_WEIGHTS + 16 + 8 * _min(length, 15)
            bit = (text[i] >> k) & 1
            bit = _mixed(
                now,
                interval,
                buffer,
                memory,
                bit,
                vector,
                second,
                slots[0],
                slots[1],
                slots[2],
                slots[3],
                slots[4],
                matched,
            )
            agrees = agrees and bit == guess
            node = (node << 1) | bit
        byte = node - 256
        text[i] = byte
        history = ((history << 8) | byte) & 0xFFFFFFFFFF
        word = ((word + byte + 1) * 0x2C9277B5) & 0xFFFFFFFF if byte >= 48 else 0
        if match > 0 and agrees:
            match += 1
            length += 1
        else:
            match = length = 0
        key = _T_HASH + (((history & 0xFFFFFF) * 0x9E3779B1) >> 12 & 4095)
        if match == 0:
            match = memory[key]
        memory[key] = i + 1
