"""The kinds of training, pretraining and fine-tuning: model, loss of a step, validation."""
