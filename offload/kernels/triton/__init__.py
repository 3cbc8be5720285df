"""Triton kernels that compute from quantized bytes where they lie on a device."""
