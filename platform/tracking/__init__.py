"""What a run leaves to be read: metrics, TensorBoard, summary, progress view, learning curve."""
