"""Gated-execution ops: one file an op; `f` is what runs, `f_ref` is its definition in plain torch."""
