"""The verifier: probes, judges, bisection, and what the table claims held against the graph."""
