"""Fine-tuning of the whole network with labels."""
