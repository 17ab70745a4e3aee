"""Ascend operators on a CPU, for tests and development: never chosen unless it is asked for.

The real torch_npu is loaded on stub libraries in CANN's place, and its operators get CPU implementations that are
written from their documents. So a call is checked by the real schema, by the operator's own meta kernel, and by a table
of rules for what these let through; and its numbers can be compared. What this cannot show is what a device computes.

`build` makes the stubs, `load` loads torch_npu on them, `call` wires an operator; `rules` says what a rule is and
`rule_table` holds them; `numbers` reads packed values and scales. The other files are operators, by family.
"""
