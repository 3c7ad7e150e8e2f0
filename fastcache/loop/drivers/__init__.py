"""What carries out a step's own work: PyTorch's operations, compiled C, or a CUDA graph."""
