"""Training: from a configuration to a trained, evaluated, exported model."""
