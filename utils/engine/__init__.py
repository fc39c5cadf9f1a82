"""The training loop over an engine of few methods, with two implementations: DeepSpeed and plain PyTorch."""
