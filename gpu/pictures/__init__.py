"""Pictures of detections and of training."""
