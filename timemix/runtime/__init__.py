"""Access to the machine: device, memory, processes, threads and compiled C code."""
