"""The native kernels: C++ that is compiled at installation into the shared library `_kernels` in this folder.

`redraft.ops.library` finds and loads the library; `abi.py` has the structures of its arguments.
"""
