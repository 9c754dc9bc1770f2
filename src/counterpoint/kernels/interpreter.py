"""Triton's interpreter: its kernels on a CPU, slowly, for checking what they compute."""

from __future__ import annotations

import os
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec
from multiprocessing import get_context


def interpreter() -> ProcessPoolExecutor:
    """One process in which Triton kernels run on CPU tensors; to be used as a context.

    Triton decides when it is imported whether its kernels are compiled or interpreted, hence a process of its own.

    Raises:
        ValueError: Triton is not installed.
    """
    if find_spec("triton") is None:
        raise ValueError("triton is not installed; pip install 'counterpoint[triton]'")
    return ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=_interpret)


def _interpret() -> None:
    os.environ["TRITON_INTERPRET"] = "1"  # of this process only; read when triton is imported

    import torch

    torch.set_num_threads(1)
