"""The built-in passes, one per file: found through the entry points `dmqfx.passes`, never imported by the core."""
