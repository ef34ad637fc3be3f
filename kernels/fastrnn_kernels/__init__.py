"""Triton kernels of fastrnn: plain tensors in, plain tensors out, no autograd.

Importing this package imports neither Triton nor torch; the launchers are imported from their
modules, which do:

    from fastrnn_kernels.lstm_forward import lstm_forward
    from fastrnn_kernels.lstm_backward import lstm_backward
    from fastrnn_kernels.gradient_norm import clip_gradients
"""
