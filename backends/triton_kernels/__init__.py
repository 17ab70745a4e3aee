"""Kernels in Triton: tensors in, tensors out. They know no batch, no backend and no numeric profile.

One file per family of the contract, as in the backends that call them. `numbers` has the arithmetic of number formats,
`runtime` launches, `interpreter` makes Triton's interpreter exact. What every kernel owes:
- it is deterministic: no atomics, and no sum whose order hangs on which program comes first;
- it is batch-invariant: what a row becomes does not hang on how many rows come with it, since no tile and no split of a
  sum is chosen by their number;
- it reads no address outside its tensors, whatever lies in pools and index tables that the contract admits;
- it compiles for NVIDIA (sm_80 to sm_120) and for AMD CDNA (gfx942, gfx950).
"""
