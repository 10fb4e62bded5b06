"""One file per op: check, select a backend, call it; the autograd.Function where one is needed."""
