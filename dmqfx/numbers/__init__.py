"""The numbers side: scales and codes, range search, packing, observers. Knows no graph."""
