"""Saved models: JSON, YAML and safetensors, checksummed and atomic."""
