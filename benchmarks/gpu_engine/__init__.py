"""The embedded engine on one GPU: its two kinds of kernels beside each other, a compiled module, the physical limit."""
