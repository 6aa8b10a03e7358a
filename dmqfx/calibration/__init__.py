"""The calls that a UNet really receives: recording them, keeping them, handing them out."""
