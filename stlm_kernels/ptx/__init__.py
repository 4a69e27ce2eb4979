"""Run, check and count compiled Triton kernels without a GPU.

Triton's own compiler makes the PTX that a GPU would get; here it is executed on a CPU, over the
tensors' own bytes, with checks that a GPU does not have.

    from stlm_kernels import ptx

    with ptx.executing(arch=90):
        byte_pool(byte_ids, weight, cu_patchlens, impl="triton")
    ptx.run(some_kernel, (grid,), *args, arch=80, num_warps=4, BLOCK=128)
"""

from .faults import Fault
from .launch import Execution, execute, run
from .parse import PtxError
from .session import Session, executing

__all__ = ["Execution", "Fault", "PtxError", "Session", "execute", "executing", "run"]
