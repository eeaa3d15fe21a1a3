"""FX facts and surgery that know nothing of fusions."""
