"""The policies that ship with dmqfx, one YAML file each."""
