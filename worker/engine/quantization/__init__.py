"""Integer ONNX files: finding layers in them, calibrating them."""
