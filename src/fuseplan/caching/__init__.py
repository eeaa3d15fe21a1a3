"""Cache keys by content, and the reports that are stored under them."""
