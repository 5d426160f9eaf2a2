"""What the loop of ``smca.gpu.train`` calls."""
