"""Damaged and malicious `.acz` files by the hundred thousand: each is read or refused, nothing else.

    python -m benchmarks.fuzz_artifact [--count 100000] [--seed 0]

Every mutation is decoded three times: as it is (the checksum should refuse it); sealed again with a right
checksum, so that it reaches the decoder; and with the mutation made in the header before it was coded, as
a malicious writer would, so that it reaches the reader of the header. Fails on any
exception but ArtifactError, on a crash of the process, on a decode of more than SECONDS, and on more memory
than MEMORY beyond what the process had. Writes benchmarks/results/fuzz_artifact.json.
"""

from __future__ import annotations

import argparse
import collections
import functools
import json
import multiprocessing
import random
import re
import resource
import time
import zlib
from pathlib import Path

import numpy as np
import torch

from autocompress.artifact.basis import Basis
from autocompress.artifact.coder import CoderState, Scan
from autocompress.artifact.container import Plan, decode_artifact, encode_artifact
from autocompress.errors import ArtifactError
from autocompress.recipe import Recipe
from autocompress.techniques.base import coding_choices, coding_of, transforms

SECONDS, MEMORY = 20.0, 1 << 30
CHUNK = 1000
PREFIX = 9
RESULTS = Path(__file__).parent / "results" / "fuzz_artifact.json"


def samples() -> list[bytes]:
    """Small files that between them hold every coding, kind of tensor, way to walk and transform."""
    torch.manual_seed(0)
    out = []
    for choices in (["int4", "int2", "float32"], ["int8", "e8m3", "float16"], sorted(map(str, coding_choices()))):
        plans = {}
        for i, choice in enumerate(choices):
            shape = [(4, 3, 3, 3), (6, 20), (5, 2, 3)][i % 3]
            value = torch.randn(shape) * (torch.rand(shape) < 0.5)
            plans[f"block{i}.conv.weight"] = Plan(value, choice, coding_of(choice).initial(value, choice))
            plans[f"block{i}.norm.bias"] = Plan(torch.randn(9), "e8m3")
        plans["steps"] = Plan(torch.arange(3), "float32")
        plans["constant"] = Plan(torch.full((3, 4), 0.5), "float32")
        out.append(encode_artifact(plans, Recipe.of({"block0.conv:activation_bits": 8, "act:activation": "relu"})))
    low_rank = torch.randn(40, 1) @ torch.randn(1, 32) + 0.1 * torch.randn(40, 32)
    out.append(encode_artifact({"fc.weight": Plan(low_rank, "int3", torch.tensor([-1.0]))}, Recipe()))
    turned = [("fc", (6, 84), 12), ("conv", (4, 3, 3, 3), 0), ("signal", (3, 70), 70)]
    bases = {name: Basis(transforms()["dct"], width) for name, _, width in turned}
    plans = {f"{n}.weight": Plan(torch.randn(shape), "int3", torch.tensor([-1.0]), bases[n]) for n, shape, _ in turned}
    out.append(encode_artifact(plans, Recipe()))
    out.append(encode_artifact({}, Recipe()))
    return out


def mutate(data: bytes, others: list[bytes], rng: random.Random) -> bytes:
    broken = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 4, 16])):
        kind = rng.randrange(7)
        at = rng.randrange(len(broken)) if broken else 0
        if kind == 0 and broken:
            broken[at] ^= 1 << rng.randrange(8)
        elif kind == 1 and broken:
            broken[at] = rng.choice([0, 1, 127, 128, 255, rng.randrange(256)])
        elif kind == 2:
            del broken[at:]
        elif kind == 3:
            broken[at:at] = rng.randbytes(rng.randrange(1, 9))
        elif kind == 4:
            del broken[at : at + rng.randrange(1, 9)]
        elif kind == 5:
            other = rng.choice(others)
            broken[at:] = other[rng.randrange(len(other)) :]
        elif kind == 6:
            broken += rng.choice([bytes(rng.randrange(1, 99)), rng.randbytes(rng.randrange(1, 99))])
    return bytes(broken)


def sealed(data: bytes) -> bytes:
    """The same content under a right magic, version and checksum."""
    body = data[PREFIX:]
    return b"\x89ACZ\x01" + zlib.crc32(body).to_bytes(4, "little") + body


def forged(data: bytes, others: list[bytes], rng: random.Random) -> bytes:
    """A well-coded file whose header is a mutation of that of `data`, followed by some codes."""
    state = CoderState()
    lies = mutate(header_of(data), [header_of(other) for other in others], rng)
    state.code_text(np.frombuffer(lies, np.uint8).copy())
    state.code(np.array([[rng.randrange(-4, 4) for _ in range(99)]], np.int32), Scan(), 0, 3)
    return sealed(bytes(PREFIX) + _varint(len(lies)) + state.finish())


@functools.cache
def header_of(data: bytes) -> bytes:
    """The header of a sound file, decoded."""
    length, at = 0, PREFIX
    for shift in (0, 7, 14):
        length |= (data[at] & 127) << shift
        at += 1
        if data[at - 1] < 128:
            break
    header = np.zeros(length, np.uint8)
    CoderState(data[at:]).code_text(header)
    return header.tobytes()


def _varint(value: int) -> bytes:
    return bytes([value]) if value < 128 else bytes([value & 127 | 128]) + _varint(value >> 7)


def chunk(task: tuple[int, int]) -> tuple[collections.Counter[str], float, list[str]]:
    """(outcomes, slowest decode in seconds, what went wrong) of CHUNK mutations."""
    seed, count = task
    rng = random.Random(seed)
    files = samples()
    outcomes: collections.Counter[str] = collections.Counter()
    wrong, slowest = [], 0.0
    for _ in range(count):
        whole = rng.choice(files)
        broken = mutate(whole, files, rng)
        for data in (broken, sealed(broken), forged(whole, files, rng)):
            began = time.monotonic()
            try:
                decode_artifact(data)
                outcomes["read"] += 1
            except ArtifactError as error:
                outcomes[re.sub(r"""'.*'|".*"|\d+""", "...", str(error))] += 1
            except BaseException as error:
                wrong.append(f"{error!r} for {data.hex()}")
            spent = time.monotonic() - began
            slowest = max(slowest, spent)
            if spent > SECONDS:
                wrong.append(f"{spent:.1f} s for {data.hex()}")
    return outcomes, slowest, wrong


def limit_memory() -> None:
    """More than MEMORY beyond what the worker needs to start raises MemoryError."""
    decode_artifact(samples()[0])
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=100_000, help="mutated files")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    tasks = [(arguments.seed * 1_000_003 + i, CHUNK) for i in range(-(-arguments.count // CHUNK))]
    began = time.monotonic()
    outcomes: collections.Counter[str] = collections.Counter()
    wrong: list[str] = []
    slowest = 0.0
    with multiprocessing.get_context("spawn").Pool(initializer=limit_memory) as pool:
        for done, (seen, worst, bad) in enumerate(pool.imap_unordered(chunk, tasks), 1):
            outcomes += seen
            slowest, wrong = max(slowest, worst), wrong + bad
            left = (time.monotonic() - began) / done * (len(tasks) - done)
            print(f"\r{done * CHUNK:,} files, {len(wrong)} wrong, {left:.0f} s left ", end="", flush=True)
    print()
    result = {
        "mutated_files": len(tasks) * CHUNK,
        "decodes": sum(outcomes.values()) + len(wrong),
        "slowest_seconds": round(slowest, 2),
        "memory_limit_bytes": MEMORY,
        "wrong": wrong[:20],
        "outcomes": dict(outcomes.most_common()),
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    if wrong:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
