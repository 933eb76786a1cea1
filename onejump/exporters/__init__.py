"""From our format to others: diffusers, ONNX, torch.export."""
