"""What is particular to a cell: one step forward and backward, in plain PyTorch."""
