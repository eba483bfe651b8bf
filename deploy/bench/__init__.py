"""``carryover bench``: the kernels against the speed of the memory, and the bytes against entropy."""
