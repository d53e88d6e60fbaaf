"""What is read: safetensors, config.json, packed weights, where they are."""
