"""Triton kernels, one file an op; installed as mergetune.kernels and reached through mergetune.ops."""
