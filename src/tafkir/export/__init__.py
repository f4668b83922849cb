"""What leaves Python: recursive models as ONNX graphs, the web page that runs them, films of how they think."""
