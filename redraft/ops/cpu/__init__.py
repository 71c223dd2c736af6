"""The native kernels: C++ that is compiled at install into the shared library `_kernels`, beside this file.

`redraft.ops.library` finds and loads the library; `abi.py` has the structures that it takes.
"""
