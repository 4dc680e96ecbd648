"""Triton kernels for CUDA GPUs, one module for each op that has some.

A module has `forward` and `backward`, with the arguments and the results of the portable implementation in `visionkit/ops/`, which calls them
where `visionkit.ops.tiers` says so; nothing else imports them, so that Triton is needed only where it serves. Kernels read maps channels-last
and in the type they have, add up in float32, and collect the gradients of maps by atomic additions: the order of the additions, and with it the
last bits, changes from run to run.

`tests/ops/triton/` compares each with the portable tier: on a GPU where there is one, else in Triton's interpreter (`TRITON_INTERPRET=1`), and
compiles each for the GPUs of the day, which needs none.
"""
