"""Adaptive, context-modelled binary entropy coding of weight tensors.

Every decision (is it zero, its sign, the bits of its magnitude) is predicted by several adaptive
contexts at once: neighbours, row density, column density, kernel position. Their predictions are
mixed in the logistic domain by weights that learn as they go (Mahoney, PAQ/lpaq; the decisions follow
DeepCABAC, Wiedemann et al., 2019) and a range coder writes the bit. No tables are stored, so a tensor
of 500 weights costs little more than its information. All arithmetic is on integers: every machine
decodes the same values. Encoder and decoder are one function, `_code`, so they cannot drift apart.

Compiled by numba on first use and cached on disk: no compiler is needed to install, and a Python loop
over bits would be a thousand times slower.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import njit

Array = np.ndarray[Any, np.dtype[Any]]

MAX_WEIGHTS_PER_BYTE = 12_000
"""No bit costs less than 64 / 65536 of certainty, so no byte can hold more zeros than this."""

# --- tables (domain: 1/256 nat) ---
_LIMIT = 2047
_P_MIN = 48
_STRETCH = np.array(
    [max(-_LIMIT, min(_LIMIT, round(256 * math.log((i + 0.5) / (4096 - i - 0.5))))) for i in range(4096)],
    dtype=np.int32,
)
_SQUASH_HALF = 3072
_SQUASH = np.array(
    [
        max(_P_MIN, min(65536 - _P_MIN, round(65536 / (1 + math.exp(-i / 256)))))
        for i in range(-_SQUASH_HALF, _SQUASH_HALF)
    ],
    dtype=np.int32,
)
_RATE = np.array([round(65536 / (n + 1.6)) for n in range(1024)], dtype=np.int32)

_DICTIONARY = np.frombuffer(
    b"encoder.layers.0.self_attn.in_proj_weight\nencoder.layers.0.self_attn.in_proj_bias\nout_proj.weight\n"
    b"out_proj.bias\nlinear1.weight\nlinear1.bias\nlinear2.weight\nlinear2.bias\nlstm.weight_ih_l0\nweight_hh_l0\n"
    b"bias_ih_l0\nembedding.weight\nfc1.weight\nfc1.bias\nfc2.weight\nfeatures.0.conv.weight\nfeatures.0.norm.bias\n"
    b"classifier.weight\nlayer1.0.conv1.weight\nlayer1.0.bn1.weight\nlayer1.0.bn1.bias\nlayer1.0.conv2.weight\n"
    b"layer1.0.bn2.weight\nlayer1.0.bn2.bias\ndownsample.0.weight\nstem.conv.weight\nstem.norm.weight\n"
    b"stem.norm.bias\nblock1.conv1.weight\nblock1.norm1.weight\nblock1.norm1.bias\nshortcut.conv.weight\n"
    b"shortcut.norm.weight\nshortcut.norm.bias\nhead.weight\nhead.bias\n"
    b"activation\0shardtanh\0activation\0srelu\0activation_bits\0i8\0activation_bits\0i6\0channels\0f0.5\0"
    b"model\0precision\0sbfloat16\0rate_penalty\0f0.05\0vectors\0se8m3\0weights\0sint4\0weights\0sint3\0"
    b"weights\0sint2\0weights\0sint8\0weights\0sfloat16\0sparsity\0f0.9\0sparsity\0f0.95\0sparsity\0f0.7\0",
    np.uint8,
).copy()
"""What headers tend to say: the text model learns it before it codes."""

# --- context layout: shared slots live as long as the file, local ones as long as a tensor ---
_NODES = 512
_SHARED_ZERO = 16
_SHARED_MAGNITUDE = _SHARED_ZERO + 6 * 4096
_SHARED_FLOAT = _SHARED_MAGNITUDE + 3 * 32 * _NODES
_SHARED = _SHARED_FLOAT + 36 * _NODES
_LOCAL_MAGNITUDE = 4096
_LOCAL_FLOAT = _LOCAL_MAGNITUDE + 8 * _NODES
_LOCAL = _LOCAL_FLOAT + 1024 + 1024 * 8
_SETS = 48
_INPUTS = 8
_TEXT_SET = 47
_TEXT_ORDERS = 6
_TEXT_TABLE = 1 << 16
_FLAG = 12


class CoderState:
    """Everything adaptive: lives from the first to the last tensor of a file."""

    def __init__(self, stream: bytes | None = None) -> None:
        self.shared = np.full(_SHARED, 32768 << 10, np.int32)
        self.local = np.full(_LOCAL, 32768 << 10, np.int32)
        self.mixer = np.full((_SETS, _INPUTS), round(65536 * 0.16), np.int32)
        self.seen = np.zeros(_SETS, np.int64)
        # low, range, cache, pending, position, code
        self.range = np.array([0, 0xFFFFFFFF, 0, 0, 0, 0], np.int64)
        self.buffer: Array = np.zeros(0, np.uint8)
        if stream is not None:
            self.buffer = np.frombuffer(bytearray(stream), np.uint8)
            head = stream[:4] + bytes(max(0, 4 - len(stream)))
            self.range[4] = 4
            self.range[5] = int.from_bytes(head, "big")

    def _make_room(self, more: int) -> None:
        room = self.position + more + 64
        if len(self.buffer) < room:
            grown = np.zeros(room, np.uint8)
            grown[: len(self.buffer)] = self.buffer
            self.buffer = grown

    def copy(self) -> CoderState:
        twin = CoderState.__new__(CoderState)
        twin.__dict__.update({key: value.copy() for key, value in self.__dict__.items()})
        return twin

    def code(self, values: Array, kernel: int, exponent: int, mantissa: int, encode: bool) -> None:
        """Encode `values` int32 [rows, columns], or fill it by decoding.

        kernel: columns that belong to one input channel. exponent, mantissa: bits of a float's bit
        pattern; exponent 0 means signed integers below 2^mantissa in magnitude.
        """
        rows, columns = values.shape
        if encode:
            self._make_room(values.size * (exponent + mantissa + 12) // 6)
        self.local[:] = 32768 << 10
        counts = np.zeros(columns + columns // kernel + 1, np.int32)
        _code(
            encode,
            values.reshape(-1),
            rows,
            columns,
            kernel,
            exponent,
            mantissa,
            self.shared,
            self.local,
            self.mixer,
            self.seen,
            self.range,
            self.buffer,
            counts,
            _STRETCH,
            _SQUASH,
            _RATE,
        )

    def code_text(self, text: Array, encode: bool) -> None:
        """Encode bytes uint8 [n], or fill them by decoding; the model knows `_DICTIONARY` beforehand."""
        table = np.full(_TEXT_ORDERS * _TEXT_TABLE, 32768 << 10, np.int32)
        scratch = CoderState()
        scratch._make_room(2 * len(_DICTIONARY))
        if encode:
            self._make_room(2 * len(text))
        for state, data, writes in ((scratch, _DICTIONARY, True), (self, text, encode)):
            _code_text(
                writes,
                data,
                table,
                self.mixer,
                self.seen,
                state.range,
                state.buffer,
                _STRETCH,
                _SQUASH,
                _RATE,
            )

    def flag(self, value: bool, encode: bool) -> bool:
        """Encode or decode one yes or no."""
        if encode:
            self._make_room(1)
        return bool(_direct(self.range, self.buffer, encode, self.shared, _FLAG, int(value), _RATE))

    @property
    def position(self) -> int:
        """Bytes written or read so far."""
        return int(self.range[4] + self.range[3])

    def finish(self) -> bytes:
        """The stream, cut after the last byte that matters; the reader continues with zeros."""
        low, width = int(self.range[0]), int(self.range[1])
        for bits in range(32, -1, -1):
            value = (low + (1 << bits) - 1) >> bits << bits
            if value < low + width:
                break
        self.range[0] = value
        room = np.zeros(self.position + 16, np.uint8)
        room[: min(len(self.buffer), len(room))] = self.buffer[: len(room)]
        self.buffer = room
        for _ in range(5):
            _shift_low(self.range, self.buffer)
        return self.buffer[1 : int(self.range[4])].tobytes().rstrip(b"\0")


@njit(cache=True)
def _shift_low(rc: Array, buffer: Array) -> None:
    """Write the settled top byte; carries run through the pending 0xFF bytes (as in LZMA)."""
    low = rc[0]
    if low < 0xFF000000 or low > 0xFFFFFFFF:
        carry = low >> 32
        position = rc[4]
        if position < len(buffer):
            buffer[position] = (rc[2] + carry) & 0xFF
        position += 1
        while rc[3] > 0:
            if position < len(buffer):
                buffer[position] = (0xFF + carry) & 0xFF
            position += 1
            rc[3] -= 1
        rc[4] = position
        rc[2] = (low >> 24) & 0xFF
    else:
        rc[3] += 1
    rc[0] = (low & 0x00FFFFFF) << 8


@njit(cache=True)
def _bit(rc: Array, buffer: Array, encode: bool, p: int, bit: int) -> int:
    """Code one bit whose probability of being 1 is p / 65536."""
    bound = (rc[1] >> 16) * p
    if encode:
        if bit:
            rc[1] = bound
        else:
            rc[0] += bound
            rc[1] -= bound
        while rc[1] < 0x1000000:
            rc[1] <<= 8
            _shift_low(rc, buffer)
    else:
        if rc[5] < bound:
            bit = 1
            rc[1] = bound
        else:
            bit = 0
            rc[5] -= bound
            rc[1] -= bound
        while rc[1] < 0x1000000:
            rc[1] <<= 8
            byte = 0
            if rc[4] < len(buffer):
                byte = buffer[rc[4]]
            rc[4] += 1
            rc[5] = (rc[5] << 8) | byte
    return bit


@njit(cache=True)
def _update(table: Array, slot: int, bit: int, limit: int, rates: Array) -> None:
    state = table[slot]
    n = state & 1023
    p = state >> 10
    target = 65535 if bit else 0
    p += ((target - p) * rates[n]) >> 16
    table[slot] = (p << 10) | (n + 1 if n < limit else n)


@njit(cache=True)
def _direct(rc: Array, buffer: Array, encode: bool, table: Array, slot: int, bit: int, rates: Array) -> int:
    """A bit with one context."""
    p = min(max(table[slot] >> 10, 48), 65536 - 48)
    bit = _bit(rc, buffer, encode, p, bit)
    _update(table, slot, bit, 250, rates)
    return bit


@njit(cache=True)
def _mixed(
    rc: Array,
    buffer: Array,
    encode: bool,
    bit: int,
    shared: Array,
    local: Array,
    slots: Array,
    first_local: int,
    inputs: int,
    weights: Array,
    seen: Array,
    which: int,
    stretched: Array,
    stretch: Array,
    squash: Array,
    rates: Array,
) -> int:
    """A bit predicted by `inputs` contexts: slots[:first_local] are shared, the rest are local."""
    total = np.int64(0)
    for k in range(inputs):
        state = shared[slots[k]] if k < first_local else local[slots[k]]
        s = stretch[(state >> 10) >> 4]
        n = state & 1023
        if n < 6:  # young contexts speak softly
            s = s * (n + 2) >> 3
        stretched[k] = s
        total += np.int64(weights[which, k]) * s
    dot = total >> 16
    if dot > 3071:
        dot = np.int64(3071)
    if dot < -3072:
        dot = np.int64(-3072)
    p = squash[dot + 3072]
    bit = _bit(rc, buffer, encode, p, bit)
    error = (65536 if bit else 0) - p
    n = seen[which]
    gain = 2 + 24 // (1 + (n >> 5))
    seen[which] = n + 1
    for k in range(inputs):
        weights[which, k] += (stretched[k] * error * gain + 131072) >> 18
        if k < first_local:
            _update(shared, slots[k], bit, 255, rates)
        else:
            _update(local, slots[k], bit, 1000, rates)
    return bit


@njit(cache=True)
def _code_text(
    encode: bool,
    text: Array,
    table: Array,
    mixer: Array,
    seen: Array,
    rc: Array,
    buffer: Array,
    stretch: Array,
    squash: Array,
    rates: Array,
) -> None:
    """Bytes, each bit predicted by the 0, 1, 2, 3 and 5 bytes before and by the word so far."""
    slots = np.zeros(8, np.int64)
    stretched = np.zeros(8, np.int64)
    hashes = np.zeros(_TEXT_ORDERS, np.int64)
    history = np.int64(0)
    word = np.int64(0)
    for i in range(len(text)):
        for order in range(5):
            length = order if order < 4 else 5
            hashes[order] = (history & ((1 << (8 * length)) - 1)) * 0x2F0B4C47
        hashes[5] = word
        node = 1
        for k in range(7, -1, -1):
            for order in range(_TEXT_ORDERS):
                mixed = hashes[order] + node * 0x3C6EF372
                mixed = (mixed ^ (mixed >> 15)) * 0x2545F491
                slots[order] = order * _TEXT_TABLE + ((mixed >> 12) & (_TEXT_TABLE - 1))
            bit = _mixed(
                rc,
                buffer,
                encode,
                (text[i] >> k) & 1,
                table,
                table,
                slots,
                0,
                _TEXT_ORDERS,
                mixer,
                seen,
                _TEXT_SET,
                stretched,
                stretch,
                squash,
                rates,
            )
            node = (node << 1) | bit
        byte = node - 256
        text[i] = byte
        history = ((history << 8) | byte) & 0xFFFFFFFFFF
        word = ((word + byte + 1) * 0x2C9277B5) & 0xFFFFFFFF if byte >= 48 else np.int64(0)


@njit(cache=True)
def _level(nonzero: int, n: int, prior: int) -> int:
    """Density as one of 12 levels, logarithmic at both ends; prior in 1/4096."""
    d = (nonzero * 4096 + 2 * prior) // (n + 2)
    if d > 2048:
        d = 4096 - d
        if d > 1024:
            return 6
        if d > 512:
            return 7
        if d > 200:
            return 8
        if d > 80:
            return 9
        return 10 if d > 20 else 11
    if d > 1024:
        return 5
    if d > 560:
        return 4
    if d > 280:
        return 3
    if d > 140:
        return 2
    return 1 if d > 50 else 0


@njit(cache=True)
def _code(
    encode: bool,
    values: Array,
    rows: int,
    columns: int,
    kernel: int,
    exponent: int,
    mantissa: int,
    shared: Array,
    local: Array,
    mixer: Array,
    seen: Array,
    rc: Array,
    buffer: Array,
    counts: Array,
    stretch: Array,
    squash: Array,
    rates: Array,
) -> None:
    slots = np.zeros(8, np.int64)
    stretched = np.zeros(8, np.int64)
    column_nonzero = counts[:columns]
    channel_nonzero = counts[columns:]
    nonzeros = 0
    before = 0
    signs_seen = 0
    for r in range(rows):
        row_nonzero = 0
        for c in range(columns):
            at = r * columns + c
            done = at
            prior = (nonzeros * 4096 + 1024) // (done + 1)
            if prior > 4095:
                prior = 4095
            w = values[at - 1] if c > 0 else 0
            ww = values[at - 2] if c > 1 else 0
            north = values[at - columns] if r > 0 else 0
            nn = values[at - 2 * columns] if r > 1 else 0
            wk = values[at - kernel] if c >= kernel else 0
            ne = values[at - columns + 1] if r > 0 and c + 1 < columns else 0
            if exponent:
                w, ww, north, nn, wk, ne = w != 0, ww != 0, north != 0, nn != 0, wk != 0, ne != 0
            aw, aww, an, ann, awk, ane = abs(w), abs(ww), abs(north), abs(nn), abs(wk), abs(ne)
            row = _level(row_nonzero, c, prior)
            column = _level(column_nonzero[c], r, prior)
            channel = c // kernel
            inside = c - channel * kernel
            block = _level(channel_nonzero[channel], r * kernel + inside, prior)
            tensor = prior >> 6
            near = min(aw, 2) + 3 * min(an, 2) + 9 * min(awk, 2) + 27 * min(aww, 2)
            x = values[at]
            size = 0
            while (done >> (6 + 2 * size)) > 0 and size < 3:
                size += 1
            # --- zero or not ---
            slots[0] = _SHARED_ZERO + near
            slots[1] = _SHARED_ZERO + 4096 + row * 32 + column * 2 + (aw > 0)
            slots[2] = _SHARED_ZERO + 2 * 4096 + block * 64 + column * 4 + (an > 0) * 2 + (awk > 0)
            slots[3] = _SHARED_ZERO + 3 * 4096 + tensor * 12 + row
            slots[4] = _SHARED_ZERO + 4 * 4096 + min(aw + aww + an + ann + awk + ane, 15) * 64 + tensor
            slots[5] = 0
            slots[6] = 1 + min(inside, 63) * 4 + min(aw + an, 3)
            slots[7] = 512 + row * 16 + block
            nonzero = _mixed(
                rc,
                buffer,
                encode,
                1 if x != 0 else 0,
                shared,
                local,
                slots,
                5,
                8,
                mixer,
                seen,
                size,
                stretched,
                stretch,
                squash,
                rates,
            )
            if not nonzero:
                values[at] = 0
                continue
            nonzeros += 1
            row_nonzero += 1
            column_nonzero[c] += 1
            channel_nonzero[channel] += 1
            if exponent:
                values[at] = _float_bits(
                    rc, buffer, encode, x, before, signs_seen, exponent, mantissa, shared, local, slots,
                    mixer, seen, stretched, stretch, squash, rates,
                )  # fmt: skip
                pattern = values[at] & ((1 << (1 + exponent + mantissa)) - 1)
                before = (pattern >> mantissa) & ((1 << exponent) - 1)
                signs_seen = max(signs_seen, 1 + (pattern >> (exponent + mantissa)))
                continue
            # --- sign ---
            signs = (0 if w == 0 else (1 if w > 0 else 2)) + 3 * (0 if north == 0 else (1 if north > 0 else 2))
            negative = _direct(rc, buffer, encode, shared, signs, 1 if x < 0 else 0, rates)
            # --- magnitude: length in bits, then the bits below the first, as one tree ---
            m = abs(x)
            length = 0
            while (m >> (length + 1)) > 0:
                length += 1
            around = aw + an + awk + ((aww + ane) >> 1)
            q = 0
            while (around >> q) > 0 and q < 9:
                q += 1
            q2 = 0
            while (max(aw, an) >> q2) > 0 and q2 < 9:
                q2 += 1
            code = 0
            while code < mantissa:
                more = 1 if length > code else 0
                _magnitude_slots(slots, code, q, q2, row, column, tensor)
                more = _mixed(
                    rc,
                    buffer,
                    encode,
                    more,
                    shared,
                    local,
                    slots,
                    3,
                    5,
                    mixer,
                    seen,
                    4 + min(code, 9),
                    stretched,
                    stretch,
                    squash,
                    rates,
                )
                if not more:
                    break
                code += 1
            value = 1
            for k in range(code - 1, -1, -1):
                node = 16 + value
                node = min(node, 511)
                _magnitude_slots(slots, node, q, q2, row, column, tensor)
                bit = _mixed(
                    rc,
                    buffer,
                    encode,
                    (m >> k) & 1,
                    shared,
                    local,
                    slots,
                    3,
                    5,
                    mixer,
                    seen,
                    16 + min(code - 1 - k, 3) + 4 * min(code, 6),
                    stretched,
                    stretch,
                    squash,
                    rates,
                )
                value = (value << 1) | bit
            values[at] = -value if negative else value


@njit(cache=True)
def _magnitude_slots(slots: Array, node: int, q: int, q2: int, row: int, column: int, tensor: int) -> None:
    base = _SHARED_MAGNITUDE
    slots[0] = base + q * 512 + node
    slots[1] = base + 32 * 512 + (tensor >> 2) * 512 + node
    slots[2] = base + 64 * 512 + q2 * 512 + node
    slots[3] = _LOCAL_MAGNITUDE + node
    slots[4] = _LOCAL_MAGNITUDE + 512 + min(q2, 4) * 512 + node


@njit(cache=True)
def _float_bits(
    rc: Array,
    buffer: Array,
    encode: bool,
    x: int,
    before: int,
    signs: int,
    exponent: int,
    mantissa: int,
    shared: Array,
    local: Array,
    slots: Array,
    mixer: Array,
    seen: Array,
    stretched: Array,
    stretch: Array,
    squash: Array,
    rates: Array,
) -> int:
    """Sign, exponent (a tree), three bits of mantissa, the rest as they are.

    before: the exponent of the value before. signs: 0 first value, 1 all positive so far, 2 mixed; it
    tells scales from shifts, so that each finds what was learned of its like.
    """
    pattern = x & ((1 << (1 + exponent + mantissa)) - 1)
    near = _SHARED_FLOAT
    far = _LOCAL_FLOAT
    node = 1
    for k in range(exponent, -1, -1):
        slots[0] = near + signs * 512 + node
        slots[1] = near + 3 * 512 + (before & 31) * 512 + node
        slots[2] = far + node
        bit = _mixed(
            rc, buffer, encode, (pattern >> (mantissa + k)) & 1, shared, local, slots, 2, 3, mixer, seen,
            44, stretched, stretch, squash, rates,
        )  # fmt: skip
        node = (node << 1) | bit
    value = node - (1 << (exponent + 1))
    top = min(mantissa, 3)
    tree = 1
    for k in range(top):
        slots[0] = near + 35 * 512 + signs * 8 + tree
        slots[1] = far + 1024 + (node & 1023) * 8 + tree
        bit = _mixed(
            rc, buffer, encode, (pattern >> (mantissa - 1 - k)) & 1, shared, local, slots, 1, 2, mixer, seen,
            45, stretched, stretch, squash, rates,
        )  # fmt: skip
        tree = (tree << 1) | bit
    value = (value << top) | (tree - (1 << top))
    for k in range(mantissa - top - 1, -1, -1):
        value = (value << 1) | _bit(rc, buffer, encode, 32768, (pattern >> k) & 1)
    return value
