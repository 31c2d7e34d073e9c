"""fastship."""
