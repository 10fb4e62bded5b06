"""Public ops, a file each: checks, choice of a backend, the call, autograd where it is needed."""
