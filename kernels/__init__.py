"""Triton kernels, a launcher per op beside what it launches; installed as mergetune.kernels, used by mergetune.ops."""
