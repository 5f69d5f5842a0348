"""Triton kernels and the functions that launch them; installed as mergetune.kernels, used by mergetune.ops."""
