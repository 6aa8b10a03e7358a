"""From a diffusers UNet to a Program: what it takes, the export, the import."""
