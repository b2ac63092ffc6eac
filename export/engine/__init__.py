"""What builds and runs one graph: TensorRT, ONNX Runtime, PyTorch; and generation over any of them."""
