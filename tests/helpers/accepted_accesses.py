"""Accesses above `counting.MOST_ACCESSES` that the committed table of bounds has, with reasons."""

from __future__ import annotations

Accesses = dict[tuple[str, str], tuple[float, str]]
"""(kernel, "sectors" or "wavefronts") -> the most over the fewest in any row, and why it stays."""

OFF_ALIGNMENT = "the elements before a thread's own begin off the alignment of a sector"
BISECTION = "a bisection looks into as many sectors as it has probes"
ACCEPTED: Accesses = {
    ("stlm_unpool_runs", "sectors"): (1.22, f"{OFF_ALIGNMENT}; runs begin and end anywhere"),
    ("stlm_ngram_embedding_keys", "sectors"): (1.38, f"{OFF_ALIGNMENT}: one to seven bytes back"),
    ("stlm_ema_unpool_links", "sectors"): (1.25, f"{BISECTION}, for documents of few patches"),
    ("stlm_long_segments", "sectors"): (1.25, "16 notes a program, off the alignment by one part"),
    ("stlm_find_patches_blocks", "sectors"): (
        2.0,
        f"{OFF_ALIGNMENT}, in lines that the first load has brought into L1",
    ),
    ("stlm_find_patches_write", "sectors"): (1.9, "as in stlm_find_patches_blocks"),
    ("stlm_find_patches_carry", "sectors"): (
        4.1,
        "one program, whose scans want neighbours in a thread: at most four loads of 0.02 us",
    ),
    ("stlm_swiglu_pack", "sectors"): (
        1.57,
        "turns `down` over by a few columns a program: weights alone, once for all rows of a call",
    ),
    ("stlm_byte_pool_bwd", "sectors"): (1.2, f"{OFF_ALIGNMENT}, where ids are of two bytes"),
}
