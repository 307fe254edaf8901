"""Gated-execution ops: one file an op; `f` is what runs, `f_ref` is its definition in plain torch.

What they share: `backend` (which path is taken), `rows` (moving rows on the CPU), `convolution` (folded layers) and
`kernels` (Triton, imported where it is used).
"""
