"""The process and the machine: allocator, signals, memory, compiler, provenance."""
