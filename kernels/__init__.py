"""Triton kernels of mmae_fast, installed as ``mmae_fast.kernels``. Tensors in, tensors out.

| file           | kernels                                                                |
|----------------|------------------------------------------------------------------------|
| rows.py        | 1 / row norms, mean row, products of rows with the mean row            |
| gram.py        | Gram matrix of either side on a triangle of tiles; its moments alone   |
| product.py     | gradient of z from the k x k weight, with the projection               |
| coding_rate.py | batches of small log det(I + cG): Gram, factor and weight in one block |
| tiles.py       | what they share; configs.py: tile sizes per architecture               |

z is ``(batch, n, d)`` float32, bfloat16 or float16 with any strides; all else is float32 and
contiguous. Nothing here synchronises with the host, uses atomics or depends on values, and no copy
of z is made.
"""
