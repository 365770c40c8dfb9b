"""Processes of one training: their world, DDP and FSDP2, sharded state, signals, memory."""
