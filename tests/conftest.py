"""What must be so before any test is imported."""
import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")                           # read when triton is imported, by whichever test comes first
if "PYTEST_XDIST_WORKER" in os.environ:                                      # several processes test at once: a core each, theirs too
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
