"""Ways to compute a layer, and how torch differentiates them: step loop, oneDNN, Triton kernels."""
