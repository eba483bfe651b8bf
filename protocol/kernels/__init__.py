"""The inner loops of selection: numba on the CPU, and a plain torch reference that defines the answer."""
