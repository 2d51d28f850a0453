"""Backends, which of them serves a call (dispatch.py), and the PyTorch operators made of them."""
