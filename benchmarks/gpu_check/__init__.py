"""All that a GPU machine without a network can prove and measure: ``scripts/gpu_check``."""
