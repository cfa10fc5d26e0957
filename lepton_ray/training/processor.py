"""Which processor this is; without torch, so that a cluster's nodes can be asked quickly."""

from __future__ import annotations

import platform
from pathlib import Path

KERNELS_BY = {
    *("avx", "avx2", "fma", "f16c", "avx_vnni", "amx_tile", "amx_bf16", "amx_int8"),
    *("avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx512_bf16", "avx512_fp16"),
    *("asimd", "asimddp", "bf16", "i8mm", "sve", "sve2", "svebf16"),
}
"""Names of instructions in /proc/cpuinfo, of x86 and of ARM."""


def kind() -> str:
    """The maker of the processor and the instructions by which libraries choose their kernels.

    PyTorch's own name of it, such as AVX512, stands for machines of which some multiply bfloat16 in
    other units than others.
    """
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    about = {key.strip(): value.strip() for key, _, value in (x.partition(":") for x in lines)}
    maker = about.get("vendor_id") or f"implementer {about.get('CPU implementer', 'unknown')}"
    instructions = set((about.get("flags") or about.get("Features") or "").split())
    return " ".join([maker, *sorted(instructions & KERNELS_BY)])
