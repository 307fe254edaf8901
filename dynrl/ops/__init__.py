"""The ops compute the rows that a decision has left to compute. Each op has one file.

An op `f` has a definition `f_ref` in plain torch, with the same arguments. Tests compare the two on every path.

The ops share `backend` (which path is taken), `costs` (when it pays to compute some rows only), `move` (moving rows),
`partition` (rows sorted by choice), `convolution` (folded layers) and `kernels` (Triton, imported where it is used).
"""
