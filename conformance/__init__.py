"""The conformance suite. Start with docs/conformance.md, or `smca conformance --list`."""
