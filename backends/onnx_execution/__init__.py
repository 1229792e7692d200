"""Running ONNX files in ONNX Runtime, and proving that they compute what the program does."""
