import subprocess
import sys

import pytest

FAULTS_OF_LARGE_BLOCKS_BEFORE_AND_AFTER = """
import resource, torch
from visionkit.engine.memory import keep_freed_memory

def faults():
    for _ in range(20):                                      # until small blocks have found their places between the large ones
        torch.ones(2**24)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.ones(2**24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print(faults(), keep_freed_memory(), faults())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator is set on Linux only")
def test_large_blocks_are_reused_instead_of_mapped_anew():
    printed = subprocess.run([sys.executable, "-c", FAULTS_OF_LARGE_BLOCKS_BEFORE_AND_AFTER], capture_output=True, text=True, check=True)
    before, done, after = printed.stdout.split()
    assert done == "True"
    assert int(after) < int(before) / 10
