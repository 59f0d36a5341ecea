"""Triton kernels. Imported only when Triton is installed and a GPU (or its interpreter) is asked for."""
