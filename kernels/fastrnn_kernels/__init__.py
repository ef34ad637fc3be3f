"""fastrnn's Triton kernels. `fastrnn` imports this package only when a kernel is needed."""
