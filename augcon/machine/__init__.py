"""What runs on this machine: its GPUs, processes that leave nothing behind, and the model's server."""
