"""Measures this machine and describes it as a cluster.

This room imports cluster, kernels and runtime, the launcher of local workers from training, and, for the comparison
of predicted with measured, the simulator. Nothing but the command line imports it.
"""
