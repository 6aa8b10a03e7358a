"""The built-in passes: one per file, named alike in the file, in YAML (kebab case) and as a class (camel case)."""
