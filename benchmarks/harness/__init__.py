"""The measurement: the correctness gate, the clocks, and processes for cases that need one."""
