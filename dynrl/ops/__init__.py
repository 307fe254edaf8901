"""Gated-execution ops: one file an op; `f` is what runs, `f_ref` is its definition in plain torch.

They share `backend` (which path is taken), `costs` (when it pays to compute some rows only), `move` (moving rows),
`partition` (rows sorted by choice), `convolution` (folded layers) and `kernels` (Triton, imported where it is used).
"""
