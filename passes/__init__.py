"""The built-in passes: one per file, one name in three spellings: file, YAML (kebab) and class."""
