"""Sequence-mixing kernels: one folder a primitive, usable without the rest of flame (torch and triton only).

Every folder holds the same four things:

- ``reference.py``  the recurrence as the paper writes it, one token at a time, any dtype; in fp64 it is the oracle.
- ``chunked.py``    the parallel form in plain torch, on any device; the default without a GPU.
- ``triton_*.py``   the fast path.
- ``__init__.py``   the public op.

Conventions: activations ``[B, T, H, D]``; log decays in natural logarithm, ``<= 0``; accumulation and states in fp32;
``initial_state`` and ``output_final_state`` differentiable; ``cu_seqlens`` ``[N + 1]`` int32 with ``B == 1`` for packed
documents, whose states never meet. Ops take plain tensors, never DTensors.
"""
