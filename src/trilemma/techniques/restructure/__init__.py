"""Another architecture of the same function, as nearly as it goes."""
