"""DeepSeek-V4, written once, against the ops contract.

A token walks `generate` -> `Batch` -> `Ops.plan` -> `transformer` -> `block` (`hyper_connection`, `attention`, `moe`)
-> logits. A weight walks `checkpoint` -> the one table in `weights` -> `Ops.repack` -> the op that reads it.
"""
