"""Programs for people: show, diff, why, the picture, the inventory, the report."""
