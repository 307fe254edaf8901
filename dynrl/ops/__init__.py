"""The ops compute the rows that a decision has left to compute. Each op has one file.

An op `f` has a definition `f_ref` in plain torch, of the same arguments. A test holds the two together on every path.

They share `backend` (which path is taken), `costs` (when it pays to compute some rows only), `move` (moving rows),
`partition` (rows sorted by choice), `convolution` (folded layers) and `kernels` (Triton, imported where it is used).
"""
