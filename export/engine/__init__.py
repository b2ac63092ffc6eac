"""Build and run graphs with TensorRT, ONNX Runtime or PyTorch, and generate with any of them."""
