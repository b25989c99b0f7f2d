"""Triton kernels: one file per family, launchers only, no autograd."""
