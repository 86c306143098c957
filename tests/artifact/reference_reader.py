"""A second reader of `.acz`, written from docs/format.md alone: slow, plain Python, nothing shared with ours.

It keeps the text honest: when it fails on a golden file, either the format or its description changed.
"""

from __future__ import annotations

import math
import struct
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

STRETCH = [max(-2047, min(2047, round(256 * math.log((i + 0.5) / (4095.5 - i))))) for i in range(4096)]
SQUASH = [max(16, min(65520, round(65536 / (1 + math.exp((2048 - i) / 256))))) for i in range(4096)]
RATE = [round(65536 / (n + 1.3)) for n in range(1024)]
TRUST = [round(256 * n / (n + 1.05)) for n in range(1024)]
GAIN = [round(2 + 840 / (60 + 4 * n)) for n in range(1024)]
LOG = [round(16 * math.log2(max(i, 0.5))) for i in range(4096)]
FLOATS = {"float32": (8, 23), "float16": (5, 10), "bfloat16": (8, 7), "e8m5": (8, 5), "e8m3": (8, 3), "e8m2": (8, 2)}
FLOATS |= {"float8-e4m3": (4, 3), "float8-e5m2": (5, 2)}
BITS = range(8, 1, -1)
CHOICES: list[list[str]] = [
    list(FLOATS),
    [*(f"int{b}" for b in BITS), *(f"int{b}-channel" for b in BITS)],
    ["ternary", "binary"],
    [f"codebook-{k}" for k in (256, 128, 64, 32, 16, 8, 4)],
    ["filters-0.75", "filters-0.5", "filters-0.25"],
]


class Counters:
    """Named counters [P, n]; `fresh` drops the local ones."""

    def __init__(self) -> None:
        self.shared: dict[Any, list[int]] = defaultdict(lambda: [1 << 19, 0])
        self.local: dict[Any, list[int]] = defaultdict(lambda: [1 << 19, 0])


class Weights:
    def __init__(self, start: int) -> None:
        self.values = [start] * 6
        self.seen = 0


class Stream:
    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 5
        self.low, self.high, self.code = 0, (1 << 40) - 1, int.from_bytes(data[:5].ljust(5, b"\0"), "big")
        self.counters = Counters()
        self.first: dict[Any, Weights] = defaultdict(lambda: Weights(round(0.2 * 65536)))
        self.second: dict[Any, Weights] = defaultdict(lambda: Weights(0))

    def bit(self, p: int) -> int:
        middle = self.low + ((self.high - self.low) * p >> 16)
        bit = int(self.code <= middle)
        self.low, self.high = (self.low, middle) if bit else (middle + 1, self.high)
        while self.low >> 32 == self.high >> 32:
            byte = self.data[self.at] if self.at < len(self.data) else 0
            self.low, self.high = self.low << 8 & 0xFFFFFFFFFF, self.high << 8 & 0xFFFFFFFFFF | 255
            self.code, self.at = self.code << 8 & 0xFFFFFFFFFF | byte, self.at + 1
        return bit

    def direct(self, counter: list[int]) -> int:
        bit = self.bit(min(max(counter[0] >> 4, 16), 65520))
        update(counter, bit)
        return bit

    def flag(self, context: int) -> int:
        return self.direct(self.counters.shared["flag", context])

    def number(self) -> int:
        bits = 0
        while bits < 20 and self.flag(4 + bits):
            bits += 1
        value = min(bits, 1)
        for _ in range(bits - 1):
            value = value << 1 | self.flag(3)
        return value


def update(counter: list[int], bit: int) -> None:
    counter[0] += ((1048575 if bit else 0) - counter[0]) * RATE[counter[1]] >> 16
    counter[1] = min(counter[1] + 1, 1020)


def mixed(counters: Sequence[list[int]], first: Weights, second: Weights | None, code: Callable[[int], int]) -> int:
    """One decision; `code(p)` reads it from the stream, or gives it when it is known."""
    s = [STRETCH[p >> 8] * TRUST[n] >> 8 for p, n in counters]
    extra = second.values if second else [0] * 6
    dot = sum((w + e) * x for w, e, x in zip(first.values, extra, s, strict=False)) >> 16
    p = SQUASH[min(max(dot, -2048), 2047) + 2048]
    bit = code(p)
    error = ((65536 if bit else 0) - p) * GAIN[first.seen >> 2]
    first.seen = min(first.seen + 1, 4095)
    for k, (x, counter) in enumerate(zip(s, counters, strict=True)):
        step = (x * error + (1 << 17)) >> 18
        first.values[k] += step
        if second:
            second.values[k] += step
        update(counter, bit)
    return bit


def signed64(value: int) -> int:
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value


def text(stream: Stream, length: int, dictionary: bytes) -> bytes:
    tables: dict[Any, list[int]] = defaultdict(lambda: [1 << 19, 0])
    first = [Weights(round(0.2 * 65536)), Weights(round(0.2 * 65536))]
    second = [Weights(0) for _ in range(16)]
    places: dict[int, int] = {}
    done = bytearray()
    word = place = match = 0
    for i in range(len(dictionary) + length):
        hashes = [int.from_bytes(done[-o:], "big") for o in (1, 2, 3, 5)]
        hashes = [h * 0x2F0B4C47 for h in hashes] + [word]
        node, agrees = 1, place > 0
        for k in range(7, -1, -1):
            counters = []
            for order, h in enumerate(hashes):
                m = signed64(h + node * 0x3C6EF372)
                m = signed64((m ^ (m >> 15)) * 0x2545F491)
                counters.append(tables[order, (m >> 12) % (1 << 14)])
            guess = done[place] >> k & 1 if agrees else 0
            counters.append(tables["match", min(match, 31) * 2 + guess if agrees else 0])
            known = dictionary[i] >> k & 1 if i < len(dictionary) else None
            code = stream.bit if known is None else (lambda p, known=known: known)
            bit = mixed(counters, first[agrees], second[min(match, 15)], code)
            agrees = agrees and bit == guess
            node = node << 1 | bit
        byte = node - 256
        done.append(byte)
        word = (word + byte + 1) * 0x2C9277B5 % (1 << 32) if byte >= 48 else 0
        place, match = (place + 1, match + 1) if place and agrees else (0, 0)
        key = (int.from_bytes(done[-3:], "big") * 0x9E3779B1 >> 12) % 4096
        place = place or places.get(key, 0)
        places[key] = i + 1
    return bytes(done[len(dictionary) :])


def near(value: int, unit: int) -> int:
    size = abs(value)
    level = (10 * size >= 3 * unit) + (size >= unit) + (size >= 2 * unit)
    return 3 - level if value < 0 else 3 + level


class Factors:
    """Of the present row and of every column."""

    def __init__(self, columns: int) -> None:
        state, start = 1, []
        for _ in range(32 * columns):
            state = (1103515245 * state + 12345) % (1 << 31)
            start.append((state >> 17) - 8192)
        self.p, self.q = [0] * 32, [start[i : i + 32] for i in range(0, len(start), 32)]
        self.energy = self.count = 0

    @staticmethod
    def dot(a: list[int], b: list[int]) -> int:
        return sum(x * y for x, y in zip(a, b, strict=True))

    @staticmethod
    def moved(a: list[int], b: list[int], times: int) -> list[int]:
        return [x + (y * times + 32768 >> 16) for x, y in zip(a, b, strict=True)]

    def product(self, c: int) -> int:
        return min(max(self.dot(self.p, self.q[c]) >> 24, -65536), 65536)

    def after_code(self, c: int, x: int, product: int) -> None:
        q = self.q[c]
        rate = (6554 << 16) // (32768 + (self.dot(q, q) >> 16))
        self.p = self.moved(self.p, q, 256 * (256 * x - product) * rate >> 16)
        self.energy, self.count = self.energy + x * x, self.count + 1

    def after_row(self, row: list[int]) -> None:
        rate = (32768 << 16) // ((self.energy << 15) // self.count + (self.dot(self.p, self.p) >> 16) + 1)
        for c, x in enumerate(row):
            error = 65536 * x - (self.dot(self.p, self.q[c]) >> 16)
            self.q[c] = self.moved(self.q[c], self.p, error * rate >> 16)
        self.p = [0] * 32


def integers(
    stream: Stream, rows: int, columns: int, kernel: int, width: int, mantissa: int, factored: int
) -> list[int]:
    factors = Factors(columns) if factored else None
    stream.counters.local.clear()
    for weights in stream.first.values():
        weights.seen = 0
    shared, local = stream.counters.shared, stream.counters.local
    shift = max(11 - mantissa, 0)
    fine, offset = 8 + shift, 160 - 16 * shift
    tensor, nonzero, nonzeros = (3 << fine) // 10, 1 << fine, 0
    column, column_mean = [0] * columns, [0] * columns
    coefficients, last = [6554, 0, 5243, 0], 65536
    out: list[int] = []

    def log(v: int) -> int:
        return LOG[min(v >> 8, 4095)]

    def clipped(v: int) -> int:
        return min(max((v + offset) >> 3, 0), 31)

    for t in range(rows * columns):
        r, c = divmod(t, columns)
        if c == 0:
            row, row_mean = tensor, 0
        if r == 0:
            column[c] = tensor
        place = c % kernel if kernel > 1 else 0
        inside = place if kernel > 1 else c  # columns on this side of the border
        across = (place % width if width else place) if kernel > 1 else c

        def back(steps: int, room: int, t: int = t) -> int:
            return out[t - steps] if steps <= room else 0

        up = width > 0 and inside >= width
        neighbours = [
            back(1, across),
            back(2, across),
            back(width, inside) if up else 0,
            back(width + 1, inside) if up and across > 0 and (kernel > 1 or c > width) else 0,
        ]
        west, _, north, _ = neighbours
        level = clipped(log(tensor))
        expected = clipped(log(row) + log(column[c]) - log(tensor))
        w, n = near(west << fine, nonzero), near(north << fine, nonzero)
        cm, rm = near(2 * column_mean[c], tensor), near(4 * row_mean, tensor)
        linear, prediction, unit = 7, 0, max(tensor >> shift, 1)
        product = factors.product(c) if factors else 0
        if any(neighbours) or product:
            prediction = sum(a * b for a, b in zip(coefficients, neighbours, strict=True)) >> 8
            prediction += last * product >> 16
            step = min((4 * abs(prediction) + unit // 2) // unit, 7)
            linear = 7 - step if prediction < 0 else 7 + step
        counters = [
            local["column", clipped(log(column[c]))],
            local["row", clipped(log(row))],
            local["place", min(place, 63)],
            local["near", 7 * w + n],
            shared["zero near", 7 * w + n, level],
            shared["zero linear", abs(linear - 7), expected],
        ]
        x = 0
        if mixed(counters, stream.first["zero", kernel > 1], None, stream.bit):
            counters = [
                shared["means", 7 * cm + rm],
                local["sign", 7 * w + n],
                shared["sign near", 7 * w + n, cm],
                shared["sign linear", linear, 7 * w + n],
                local["sign linear", linear],
                local["sign place", min(place, 63)],
            ]
            sign = mixed(counters, stream.first["sign"], stream.second["sign", level], stream.bit)
            if sign:
                w, n, cm, rm, linear = 6 - w, 6 - n, 6 - cm, 6 - rm, 14 - linear

            def decide(node: int, step: int) -> int:
                counters = [
                    local["node", node, sign],
                    shared["node expected", node, sign, expected],
                    local["node near", node, 7 * w + n],
                    shared["node means", node, 7 * cm + rm],
                    local["node linear", node, linear],
                    local["node", node],
                ]
                second = stream.second["node", level, step, sign]
                return mixed(counters, stream.first["node", step, sign], second, stream.bit)

            k = 0
            while k < mantissa and decide(min(k, 15), min(k, 9)):
                k += 1
            m = 1 if k < mantissa else 1 << k
            for done in range(k if k < mantissa else 0):
                m = m << 1 | decide(min(13 + (1 << k) + m, 159), 10 + min(done, 3) + 4 * min(k, 6))
            x = -m if sign else m
            nonzero += ((m << fine) - nonzero) * RATE[min(nonzeros, 1023)] >> 16
            nonzeros += 1
        out.append(x)
        if factors:
            factors.after_code(c, x, product)
        if any(neighbours) or product:
            rate, energy = 131 + 655360 // (500 + t), sum(v * v for v in neighbours)
            norm = 256 * energy + (product * product >> 8) + (8 * unit * unit >> 8) + 26
            factor = (rate * (256 * x - prediction) << 8) // norm
            coefficients = [a + (factor * b >> 8) for a, b in zip(coefficients, neighbours, strict=True)]
            last += factor * product >> 16
        size, value = abs(x) << fine, x << fine
        row += (size - row) * RATE[min(c + 3, 1023)] >> 16
        row_mean += (value - row_mean) * RATE[min(c + 3, 1023)] >> 16
        column[c] += (size - column[c]) * RATE[min(r + 3, 1023)] >> 16
        column_mean[c] += (value - column_mean[c]) * RATE[min(r + 3, 1023)] >> 16
        tensor += (size - tensor) * RATE[min(t + 1, 1023)] >> 16
        if factors and c == columns - 1:
            factors.after_row(out[-columns:])
    return out


def floats(stream: Stream, count: int, exponent: int, mantissa: int) -> list[int]:
    stream.counters.local.clear()
    for weights in stream.first.values():
        weights.seen = 0
    shared, local = stream.counters.shared, stream.counters.local
    before = signs = 0
    out = []
    for _ in range(count):
        if not stream.direct(local["zero"]):
            out.append(0)
            continue
        node = 1
        for depth in range(1 + exponent):
            counters = [shared["signs", signs, node], shared["before", before % 32, node], local["tree", node]]
            counters += [shared["tree", node], shared["depth", depth], shared["always"]]
            node = node << 1 | mixed(counters, stream.first["float"], None, stream.bit)
        tree = 1
        for _ in range(min(mantissa, 3)):
            counters = [shared["top", signs, tree], local["top", node % 1024, tree], local["top", tree]]
            counters += [shared["top", tree], shared["scale", signs, node % 1024], shared["always"]]
            tree = tree << 1 | mixed(counters, stream.first["mantissa"], None, stream.bit)
        value = (node << min(mantissa, 3)) | (tree - (1 << min(mantissa, 3)))
        for _ in range(mantissa - 3):
            value = value << 1 | stream.bit(32768)
        value -= 1 << (1 + exponent + mantissa)
        out.append(value)
        before = value >> mantissa & ((1 << exponent) - 1)
        signs = max(signs, 1 + (value >> (exponent + mantissa)))
    return out


def codes(stream: Stream, shape: Sequence[int], mantissa: int) -> list[int]:
    """Integer codes of a tensor, row by row."""
    rows, columns = (shape[0], math.prod(shape[1:])) if len(shape) > 1 else (1, math.prod(shape))
    transposed, kernel, width = 0, max(1, math.prod(shape[2:])), shape[-1] if len(shape) > 3 else 0
    size = math.prod(shape[2:])
    if len(shape) > 1 and min(shape[:2]) > 1:
        transposed = stream.number()
        if len(shape) == 2:
            kernel, width = stream.number() + 1, stream.number()
    if transposed:
        rows, columns = shape[1], shape[0] * size
    factored = stream.flag(2) if min(rows, columns) >= 32 and mantissa <= 8 else 0
    flat = integers(stream, rows, columns, kernel, width, mantissa, factored)
    if transposed:
        flat = [
            flat[(j * shape[0] + i) * size + k] for i in range(shape[0]) for j in range(shape[1]) for k in range(size)
        ]
    return flat


class Header:
    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def take(self, count: int) -> bytes:
        self.at += count
        return self.data[self.at - count : self.at]

    def varint(self) -> int:
        value = shift = 0
        while True:
            byte = self.take(1)[0]
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    def shapes(self, count: int) -> list[list[int]]:
        ranks = [self.varint() for _ in range(count)]
        shapes: list[list[int]] = [[] for _ in ranks]
        for place in range(max(ranks, default=0)):
            predicted = 0
            for shape, rank in zip(shapes, ranks, strict=True):
                if place < rank:
                    number = self.varint()
                    shape.append(number - 1 if number else predicted)
                    predicted = shape[place] if place != 1 else predicted
                if place == 1 and rank > 1:
                    predicted = shape[0]
        return shapes


def parameter_count(choice: str, shape: Sequence[int]) -> int:
    if choice in FLOATS:
        return 0
    if choice.startswith("codebook"):
        return int(choice.split("-")[1]) - 1
    if choice.endswith("-channel") and len(shape) > 1:
        return shape[0]
    return 2 if choice == "ternary" else 1


def layout(choice: str) -> tuple[int, int]:
    if choice in FLOATS:
        return FLOATS[choice]
    if choice.startswith("codebook"):
        return 0, int(choice.split("-")[1]).bit_length() - 1
    if choice.startswith("filters"):
        return 0, 3
    return 0, int(choice[3]) - 1 if choice.startswith("int") else 0


def repeated(stream: Stream, choice: str, shape: list[int]) -> list[int]:
    """Codes of a tensor, each of its rows once when filters are shared."""
    if not choice.startswith("filters") or len(shape) < 2:
        return codes(stream, shape, layout(choice)[1])
    rows: list[int] = []
    for _ in range(shape[0]):
        rows.append(stream.number())
    flat = codes(stream, [max(rows) + 1, *shape[1:]], layout(choice)[1])
    size = math.prod(shape[1:])
    return [code for row in rows for code in flat[row * size : (row + 1) * size]]


def waves(places: int) -> list[list[int]]:
    """A row for each coefficient of a side of at most 64 places, in 2^-23."""
    size = places if places <= 7 else 4
    rows = []
    for start in range(0, places, size):
        n = min(size, places - start)
        for f in range(n):
            scale = 2**23 * math.sqrt((2 if f else 1) / n)
            wave = [round(scale * math.cos(math.pi / n * (t + 0.5) * f)) for t in range(n)]
            rows.append((f, [0] * start + wave + [0] * (places - start - n)))
    return [row for _, row in sorted(rows, key=lambda row: row[0])]


def along(values: list[int], stride: int, places: int) -> list[int]:
    """Coefficients back to values, along a dimension of so many places, each `stride` apart."""
    out = list(values)
    for piece in range(0, places, 64):
        rows = waves(min(64, places - piece))
        for i in range(len(values)):
            place = i // stride % places - piece
            if 0 <= place < len(rows):
                first = i - place * stride
                out[i] = round(sum(values[first + f * stride] * row[place] for f, row in enumerate(rows)) / 2**23)
    return out


def synthesised(coefficients: list[float], shape: list[int], width: int) -> list[float]:
    """float32 each, before they are rounded."""
    sides = [shape[1] // width, width] if len(shape) == 2 else shape[2:]
    unit = 2.0 ** (math.frexp(max(map(abs, coefficients)))[1] - 25)
    values = [round(x / unit) for x in coefficients]
    for i, places in enumerate(sides):
        if places > 1:
            values = along(values, math.prod(sides[i + 1 :]), places)
    return [x * unit for x in values]


class Tensor(NamedTuple):
    """codes: None for constant and raw ones. width: None for those that are not transformed."""

    name: str
    choice: str
    shape: list[int]
    codes: list[int] | None
    parameters: list[float]
    width: int | None


def read(data: bytes, dictionary: bytes) -> Iterator[Tensor]:
    assert data[:4] == b"\x89ACZ"
    version = data[4]
    assert version in (1, 2)
    assert zlib.crc32(data[9:]) == int.from_bytes(data[5:9], "little")
    start = Header(data[9:])
    length = start.varint()
    stream = Stream(start.data[start.at :])
    header = Header(text(stream, length, dictionary))
    count = header.varint()
    names = header.take(header.varint()).decode().split("\n")
    shapes = header.shapes(count)
    kinds = [header.varint() for _ in names]
    chosen = [CHOICES[(k - 2) // 32][(k - 2) % 32] if k > 1 else ("constant", "raw")[k] for k in kinds]
    widths: dict[int, int] = {}
    for at, (shape, kind) in enumerate(zip(shapes, kinds, strict=True)):
        if version > 1 and kind > 1 and len(shape) > 1 and header.varint() == 1:
            widths[at] = header.varint() if len(shape) == 2 else 0
    counts = [parameter_count(c, s) if k > 1 else 0 for c, s, k in zip(chosen, shapes, kinds, strict=True)]
    planes = [header.take(sum(counts)) for _ in range(4)]
    parameters = iter([struct.unpack("<f", bytes(four))[0] for four in zip(*planes, strict=True)])
    for at, (name, choice, shape, kind, some) in enumerate(zip(names, chosen, shapes, kinds, counts, strict=True)):
        own = [next(parameters) for _ in range(some)]
        found = None
        if kind > 1:
            size = math.prod(shape)
            found = floats(stream, size, *FLOATS[choice]) if choice in FLOATS else repeated(stream, choice, shape)
        yield Tensor(name, choice, shape, found, own, widths.get(at))
