"""These Triton kernels for NVIDIA GPUs are behind the ops; they compute the rows that a decision has left.

The modules here import triton at their top, so the ops import them only when Triton is used. Each public function
launches one kernel on rows that are named by arrays in device memory. No function reads a device value on the host. So
the grid is sized for the most rows that there could be, and programs without rows return at once.

Limitations:
    - A tile size is chosen by timing the first call for a kind of shape (key: sizes, dtypes, rows to a factor of four).
      That call waits for the device and cannot be captured in a CUDA graph, so make one ordinary call before. It is
      timed on its own rows, so it should be a typical call: a call that keeps no row chooses at random.
    - Weights whose input channels are next to each other in memory (channels_last) are read fastest; sizes, widths and
      starts that are no multiple of 16 elements are read one element at a time.
    - An input of few channels (a stem's 3) wastes most of a block of at least 16.
    - Weight gradients are summed by one program for each tile of a matrix, which keeps them deterministic; a single
      small matrix with very many rows leaves most of the GPU idle.
    - Interpreted (TRITON_INTERPRET=1, set before the first import of triton) with triton below 3.7, numpy must be
      below 2.4: loop bounds loaded from memory fail there otherwise.
"""
