"""How it is measured: the correctness gate, the clocks, a process for each case that needs one."""
