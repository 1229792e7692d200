"""From a program to an ONNX file: what every backend that reads ONNX shares."""
