"""Freed memory stays with the process."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, torch
from autocompress.allocator import keep_freed_memory, return_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.ones(20_000_000)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()

before = faults()
keep_freed_memory()
faults()
after, kept = faults(), resident()
return_freed_memory()
print(after, before, resident(), kept)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another allocator")
def test_large_tensors_take_no_new_pages_until_memory_is_returned() -> None:
    ran = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True)
    after, before, returned, kept = map(int, ran.stdout.split())
    assert before > 1000
    assert after < before / 3
    assert returned < kept - 40_000_000
