"""Triton kernels of mmae_fast, installed as ``mmae_fast.kernels``."""
