"""What a policy says and how its YAML is read."""
