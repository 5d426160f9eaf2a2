"""What the properties are tried on."""
