"""What ``smca benchmark`` measures."""
