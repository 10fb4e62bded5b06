"""The op boundary: what `ops/` calls, and every backend's kernels answer."""
