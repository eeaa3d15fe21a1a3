"""What would be fused, without generating code: tracing, and holding graphs against policies."""
