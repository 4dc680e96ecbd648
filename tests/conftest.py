"""What must be so before any test is imported."""
import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")                           # read when triton is imported, by whichever test comes first
