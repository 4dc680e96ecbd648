"""Triton kernels for CUDA GPUs: a module for each op that has some.

A module has `forward` and `backward`, with the arguments and results of the portable implementation in `visionkit/ops/`; deformable
convolution, whose matrix products need no kernel, has a `Sampler`. The portable implementation calls them where `visionkit.ops.tiers`
says so; nothing else imports them, so Triton is needed only where it serves. Kernels read maps channels-last and in the type they have,
add up in float32, and collect gradients of maps by atomic additions: the order of the additions, and so the last bits, change from run
to run. Those of attention, in `attention.py`, need none.

`tests/ops/triton/` compares each module with the portable tier, on a GPU where there is one, else in Triton's interpreter
(`TRITON_INTERPRET=1`), and compiles every kernel for the GPUs of the day, which needs no GPU.
"""
