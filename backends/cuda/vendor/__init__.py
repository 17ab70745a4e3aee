"""Libraries of other vendors' kernels, used where they are installed and able, never required.

`probe` says whether DeepGEMM and FlashMLA load here and what they offer; `layouts` has what they want rearranged, in
plain PyTorch; `deep_gemm` and `flash_mla` have what they can do, as data, and the calls; `backend` is the backend
`cuda-vendor` that a run asks for to use them. Importing any of it imports neither library.

What was checked, on a CPU: every layout, index by index, against the libraries' documentation; every call, against
stand-ins that compute what it documents from its documented layouts. None of it has run on a GPU.
"""
