"""What runs a finished program: the drop-in UNet and the operators that its graph calls."""
