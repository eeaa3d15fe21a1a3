"""Scripts of the documentation; tests import them."""
