"""Kernels for GPUs that Triton serves: in the module of an op its launchers, named as its passes."""
