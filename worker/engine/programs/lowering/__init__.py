"""From weights in few bits to an ONNX file that stores them so, and computes with them where ONNX Runtime can."""
