"""The machine: device, memory, processes, compiled code."""
