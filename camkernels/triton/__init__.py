"""Kernels for GPUs that Triton serves: in the module of an op its launchers, under the names of its passes."""
