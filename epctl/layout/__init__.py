"""What a checkpoint is: safetensors headers and config in, ModelLayout out. No torch."""
