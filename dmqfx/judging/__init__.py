"""How near a compiled UNet is to its float model: outputs, trajectories, pictures, and under what protocol."""
