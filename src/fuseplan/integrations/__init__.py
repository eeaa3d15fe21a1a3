"""Thin adapters to other projects, each imported only when it is asked for."""
