"""Export of trained models: safetensors, the Hub, torch.export, ONNX."""
