"""Kernels compiled by numba: lines of float32 numbers, convolutions and pooling of many models' pictures."""
