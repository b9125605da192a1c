"""The machine: device, memory, processes, threads, compiled C code."""
