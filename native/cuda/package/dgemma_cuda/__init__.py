"""The compiled CUDA backend of dgemma: the engine looks for the library in this folder."""

from pathlib import Path

LIBRARY = Path(__file__).with_name("libdgemma_cuda.so")
"""Where it is; `DGEMMA_CUDA_LIBRARY` may name it to a dgemma that is installed elsewhere."""
