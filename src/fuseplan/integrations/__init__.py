"""Thin adapters to other projects, each imported only on request."""
